"""Does this machine compute right? The oracles of the tests, small enough for a few seconds.

There is no other device to compare with: what can differ is Python's Unicode version, hashing and
numpy. Each check compares a fast path with its definition.
"""

import random
import unicodedata
from itertools import pairwise

from base import count_words
from bpe import BPE, merge_long, merge_short, train_merges, train_naive
from characters import BYTE_TO_CHAR, PATTERNS, ranges_of
from data import load_texts
from options import UserError
from unigram import Unigram
from wordpiece import WordPiece

LETTERS = 141_028  # of Unicode 16, which tiktoken and tokenizers use


def random_words(rng: random.Random, letters: str, count: int) -> dict[str, int]:
    """Words over the first ids, as the trainers want them."""
    words = {}
    for _ in range(count):
        word = "".join(chr(rng.randrange(len(letters))) for _ in range(rng.randint(1, 9)))
        words[word] = rng.randint(1, 5)
    return words


def check_training() -> str:
    """The incremental trainer against the definition."""
    rng = random.Random(0)
    for _ in range(200):
        letters = "ab" if rng.random() < 0.5 else "abc"
        words = random_words(rng, letters, 6)
        if train_merges(words, list(letters), 30) != train_naive(words, list(letters), 30):
            raise UserError(f"the trainers disagree on {words}")
    return "200 random corpora: the incremental BPE trainer equals the naive one"


def check_merging() -> str:
    """The heap against the scan."""
    rng = random.Random(1)
    text = "".join(load_texts().values())
    bpe = BPE.train(text, 600)
    for _ in range(200):
        start = rng.randrange(len(text) - 300)
        symbols = [BYTE_TO_CHAR[b] for b in text[start : start + 300].encode("utf-8")]
        if merge_short(list(symbols), bpe.rank) != merge_long(list(symbols), bpe.rank):
            raise UserError(f"heap and scan disagree at position {start}")
    return "200 stretches of 300 characters: heap and scan merge alike"


def check_round_trips() -> str:
    """encode, decode on hard strings."""
    rng = random.Random(2)
    text = "".join(load_texts().values())
    bpe = BPE.train(text, 600)
    for _ in range(2000):
        points = [rng.randrange(0x110000) for _ in range(rng.randint(0, 9))]
        hard = "".join(
            chr(p) if not 0xD800 <= p < 0xE000 else rng.choice(" \n\u0301") for p in points
        )
        if bpe.decode(bpe.encode(hard)) != hard:
            raise UserError(f"{hard!r} does not come back")
    return "2,000 random Unicode strings come back"


def check_unigram() -> str:
    """The likelihood never falls within a round of EM."""
    seen: list[tuple[int, float]] = []
    Unigram.train(load_texts()["english"], 600, watch=lambda n, nats: seen.append((n, nats)))
    for (size, before), (same, after) in pairwise(seen):
        if size == same and after > before + 1e-9:
            raise UserError(f"EM raised the loss from {before} to {after}")
    return f"{len(seen)} EM steps: the likelihood never falls"


def check_wordpiece() -> str:
    """The score is not frequency."""
    corpus = "ab ab ab ac ac ad zq zq"
    wordpiece = WordPiece.train(corpus, 13, special_tokens=["[UNK]"])
    bpe = BPE.train(corpus, 257, pattern="whitespace")
    words = count_words(bpe, corpus)
    if "zq" not in wordpiece.vocab or bpe.merges[0] not in ((" ", "a"), ("Ġ", "a")):
        raise UserError(f"WordPiece or BPE chose another pair than its score says on {words}")
    return "WordPiece's first merge is the pair that always meets, BPE's the frequent one"


def check_unicode() -> str:
    """The tables know Unicode 16."""
    letters = sum(last - first + 1 for first, last in ranges_of("L"))
    newer = tuple(map(int, unicodedata.unidata_version.split("."))) > (16, 0, 0)
    if letters != LETTERS and not newer:
        raise UserError(f"{letters} letters instead of the {LETTERS} of Unicode 16")
    word = "more than" if newer else "exactly"
    names = ", ".join(PATTERNS)
    return f"Python has Unicode {unicodedata.unidata_version}: {word} the letters of 16 for {names}"


def main(args=None) -> None:
    """Runs every check; the first that fails ends it with one line and exit code 2."""
    checks = (check_unicode, check_training, check_merging, check_round_trips, check_wordpiece,
              check_unigram)  # fmt: skip
    for check in checks:
        print(f"ok   {check()}")
    print("this machine computes right")
