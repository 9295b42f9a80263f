"""Seeing it: why a word is cut as it is, merge trees, coloured tokens, and how good is optimal.

Everything here returns text (or numbers for figures.py) and changes nothing.
"""

import html
import itertools
import math
import random
from collections import Counter
from itertools import pairwise

from base import Tokenizer
from bpe import NEVER
from characters import chars_to_bytes, well_formed
from offsets import encode_with_offsets
from wordpiece import WordPiece

COLOURS = ["#ffd6d6", "#d6e8ff", "#d9f2d0", "#fff2c2", "#ead6ff"]
PAGE_HEAD = b'<!doctype html><meta charset="utf-8"><title>tokens</title>'  # page() begins so
ANSI = [101, 104, 102, 103, 105]


def readable(tokenizer: Tokenizer, piece: str) -> str:
    """A piece as a person reads it: bytes decoded where they are characters, ␣ for a space."""
    if tokenizer.byte_level:
        data = chars_to_bytes(piece)
        try:
            piece = data.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"\\x{b:02x}" for b in data)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in piece.replace(" ", "␣"))


# ---- BPE: merges ----


def merge_steps(tokenizer, word: str) -> list[tuple[int, str, str, list[str]]]:
    """The merges that happen in a word: (rank, left, right, the pieces afterwards)."""
    symbols, steps = tokenizer.symbols(word), []
    while len(symbols) > 1:
        ranks = [tokenizer.rank(a, b) for a, b in pairwise(symbols)]
        best = min(ranks)
        if best == NEVER:
            break
        i = ranks.index(best)
        left, right = symbols[i], symbols[i + 1]
        symbols[i : i + 2] = [left + right]
        steps.append((best, left, right, list(symbols)))
    return steps


def merge_tree(tokenizer, word: str) -> dict[str, tuple[str, str, int]]:
    """piece → (left part, right part, rank) for every merge inside a word."""
    return {a + b: (a, b, rank) for rank, a, b, _ in merge_steps(tokenizer, word)}


def draw_tree(tokenizer, piece: str, tree, indent: str = "") -> list[str]:
    """A merge tree as indented lines, the token first."""
    if piece not in tree:
        return [f"{indent}{readable(tokenizer, piece)}"]
    left, right, rank = tree[piece]
    head = f"{indent}{readable(tokenizer, piece)}   merge {rank:,}"
    lines = [head]
    for part in (left, right):
        lines += draw_tree(tokenizer, part, tree, indent + "  ")
    return lines


def explain_bpe(tokenizer, word: str) -> list[str]:
    """The merges in the order they happen, the tree of each token, and why it ends there."""
    lines = []
    for rank, _, _, after in merge_steps(tokenizer, word):
        lines.append(f"merge {rank:6,}   {' '.join(readable(tokenizer, s) for s in after)}")
    pieces = tokenizer.merged(word)
    tree = merge_tree(tokenizer, word)
    for piece in pieces:
        lines += draw_tree(tokenizer, piece, tree)
    if len(pieces) > 1:
        lines.append("no two neighbours left are a merge, so it ends here")
    elif tokenizer.whole_first and not tree.get(pieces[0]) and len(word) > 1:
        lines.append("the whole word is a token")
    return lines


# ---- WordPiece and Unigram ----


def explain_wordpiece(tokenizer: WordPiece, word: str) -> list[str]:
    """Each position with the longest piece that fits there."""
    lines = []
    for i, start, end in tokenizer.word_spans(word):
        rest = word[start:]
        lines.append(f"{rest!r}: the longest piece that it begins with is {tokenizer.pieces[i]!r}")
        longer = (tokenizer.prefix if start else "") + word[start : end + 1]
        if end < len(word) and tokenizer.pieces[i] != tokenizer.unk:
            lines.append(f"    {longer!r} is not in the vocabulary")
    return lines


def explain_unigram(tokenizer, word: str) -> list[str]:
    """The five best spellings with their probability among all of them."""
    lines = []
    total = tokenizer.forward(tokenizer.lattice_text(word))[-1]
    for ids, score in tokenizer.n_best(word, 5):
        pieces = " ".join(tokenizer.pieces[i] for i in ids)
        lines.append(f"{math.exp(score - total):7.2%}   log p {score:8.3f}   {pieces}")
    lines.append(f"entropy of all spellings {tokenizer.entropy(word):.3f} nats")
    return lines


def explain(tokenizer: Tokenizer, text: str) -> str:
    """Why `text` is cut as it is, word by word."""
    text = well_formed(text)
    if tokenizer.algorithm == "unigram":
        lines = explain_unigram(tokenizer, text)
    else:
        lines = []
        for word in tokenizer.split(tokenizer.normalize(text), True):
            lines.append(f"word {word.replace(' ', '␣')!r}")
            explainer = explain_wordpiece if tokenizer.algorithm == "wordpiece" else explain_bpe
            lines += [f"  {line}" for line in explainer(tokenizer, word)]
    ids = tokenizer.encode(text)
    pieces = " | ".join(readable(tokenizer, tokenizer.pieces[i]) for i in ids)
    return "\n".join([*lines, f"tokens {pieces}", f"ids {' '.join(map(str, ids))}"])


# ---- coloured tokens ----


def stretches(tokenizer: Tokenizer, text: str) -> list[tuple[str, list[int]]]:
    """`text` cut where tokens begin and end; tokens that share a character stay together."""
    out: list[tuple[str, list[int]]] = []
    end = 0
    for i, (start, stop) in zip(*encode_with_offsets(tokenizer, text), strict=True):
        if start < end and out:
            out[-1] = (out[-1][0] + text[end:stop], [*out[-1][1], i])
        else:
            if start > end:
                out.append((text[end:start], []))
            out.append((text[start:stop], [i]))
        end = max(end, stop)
    return [*out, (text[end:], [])] if end < len(text) else out


def coloured(tokenizer: Tokenizer, text: str) -> str:
    """For a terminal: each token on a background of its own."""
    parts = []
    for n, (part, _) in enumerate(stretches(tokenizer, text)):
        shown = part.replace("\n", "↵\n")
        parts.append(f"\x1b[30;{ANSI[n % len(ANSI)]}m{shown}\x1b[0m" if part else "")
    return "".join(parts)


def page(tokenizer: Tokenizer, text: str) -> str:
    """For a browser: a whole HTML page, with the ids in the tooltips."""
    spans = []
    for n, (part, ids) in enumerate(stretches(tokenizer, text)):
        tip = " ".join(f"{i}:{readable(tokenizer, tokenizer.pieces[i])}" for i in ids)
        colour = COLOURS[n % len(COLOURS)] if ids else "#fff"
        shown = html.escape(part).replace("\n", "↵<br>")
        spans.append(f'<span style="background:{colour}" title="{html.escape(tip)}">{shown}</span>')
    style = "font:18px/1.8 monospace;white-space:pre-wrap;margin:2em"
    body = "".join(spans)
    return PAGE_HEAD.decode("ascii") + f'<p style="{style}">{body}</p>\n'


# ---- how good is optimal ----


def fewest_tokens(word: str, pieces: set[str]) -> int:
    """The smallest number of pieces (or single characters) that spell `word`."""
    best = [0] + [len(word)] * len(word)
    for end in range(1, len(word) + 1):
        for start in range(end):
            if end - start == 1 or word[start:end] in pieces:
                best[end] = min(best[end], best[start] + 1)
    return best[-1]


def optimal_vocabulary(words: dict[str, int], size: int) -> tuple[int, set[str]]:
    """The fewest tokens that any `size` pieces of two or more characters allow, by trying them all.

    Finding them is NP-complete (Whittington et al. 2025, arXiv:2412.15210): for tiny corpora only.
    """
    candidates = sorted(
        {w[i:j] for w in words for i in range(len(w)) for j in range(i + 2, len(w) + 1)}
    )
    tried = ((sum(n * fewest_tokens(w, set(c)) for w, n in words.items()), c)
             for c in itertools.combinations(candidates, min(size, len(candidates))))  # fmt: skip
    tokens, chosen = min(tried)
    return tokens, set(chosen)


def word_source(size: int, words: int, seed: int = 0) -> tuple[str, float]:
    """A text of independent words with Zipf's probabilities p(k) ∝ 1/k, and its entropy in bits.

    The entropy −Σ p log₂ p is what any lossless code needs for a word on average: a floor.
    """
    rng = random.Random(seed)
    vocabulary: list[str] = []
    while len(vocabulary) < size:
        word = "".join(
            rng.choice("ptkslmnr") + rng.choice("aeiou") for _ in range(rng.randint(1, 4))
        )
        if word not in vocabulary:
            vocabulary.append(word)
    weights = [1 / k for k in range(1, size + 1)]
    total = sum(weights)
    entropy = -sum(w / total * math.log2(w / total) for w in weights)
    return " ".join(rng.choices(vocabulary, weights, k=words)), entropy


def bits_per_word(tokenizer: Tokenizer, text: str) -> float:
    """What an ideal code of single tokens spends on a word of `text`: tokens a word · entropy."""
    counts = Counter(tokenizer.encode(text))
    total = sum(counts.values())
    return -sum(n * math.log2(n / total) for n in counts.values()) / len(text.split())
