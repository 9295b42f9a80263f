"""A tokenizer in one page: byte-pair encoding, trained, encoding and decoding. Start here.

    python basic.py        shows it learning from one sentence

A model reads numbers, so a text must become a list of numbers (ids) and come back. Every text is a
list of bytes, numbers below 256, already; that would do, but the lists are long. So we look for the
two neighbours that stand side by side most often, give the pair a number of its own (256, 257, …),
write that number wherever the pair stands, and do it again. Frequent words end up as one number.

    train    counts pairs and makes the most frequent one a token, until there are enough tokens
    encode   text → ids: the same merges, in the order in which they were learnt
    decode   ids → text: every token knows its bytes

This file imports nothing of the folder. tests/test_basic.py proves that its merges and ids are
those of the fast tokenizer in bpe.py, which only avoids counting everything again.

Left out: special tokens, other ways to cut words, speed, files. The rest of the folder adds them.
"""

import re
from collections import Counter
from itertools import pairwise

# A word takes the space before it along: " the" is one word. No merge ever crosses a word's border.
WORDS = re.compile(r" ?\S+|\s+(?!\S)|\s+")
# The first 256 tokens are the bytes. GPT-2 numbers the visible ones first ("!" is 0), and so do we:
# then our ids are comparable with everybody's.
VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = [bytes([byte]) for byte in VISIBLE + HIDDEN]
ID_OF_BYTE = {token[0]: i for i, token in enumerate(BYTES)}

Pair = tuple[int, int]


def byte_ids(word: str) -> list[int]:
    """A word before any merge: one id for each byte of its UTF-8."""
    return [ID_OF_BYTE[byte] for byte in word.encode("utf-8")]


def count_pairs(words: dict[tuple[int, ...], int]) -> Counter[Pair]:
    """How often each two neighbours occur, where a word that occurs n times counts n times."""
    pairs: Counter[Pair] = Counter()
    for ids, count in words.items():
        for pair in pairwise(ids):
            pairs[pair] += count
    return pairs


def merge(ids: list[int], pair: Pair, new: int) -> list[int]:
    """`ids` with `new` wherever the pair stood, from left to right: of aaa the first two merge."""
    out: list[int] = []
    for i in ids:
        if out and (out[-1], i) == pair:
            out[-1] = new
        else:
            out.append(i)
    return out


def train(text: str, size: int) -> tuple[list[bytes], dict[Pair, int]]:
    """Learns up to `size` tokens. Returns the bytes of each, and each merged pair with its new id.

    Where two pairs are equally frequent the one with the lower ids is taken.
    """
    tokens, merges = list(BYTES), {}
    words = {tuple(byte_ids(word)): count for word, count in Counter(WORDS.findall(text)).items()}
    while len(tokens) < size:
        pairs = count_pairs(words)
        if not pairs:
            break  # every word is one token
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        joined = tokens[best[0]] + tokens[best[1]]
        if joined not in tokens:  # (ab)c and a(bc) are the same token
            tokens.append(joined)
        merges[best] = tokens.index(joined)
        words = {tuple(merge(list(w), best, merges[best])): count for w, count in words.items()}
    return tokens, merges


def encode(text: str, merges: dict[Pair, int]) -> list[int]:
    """The ids of a text: in every word, the pair that was learnt first is merged first."""
    order = {pair: number for number, pair in enumerate(merges)}
    out: list[int] = []
    for word in WORDS.findall(text):
        ids = byte_ids(word)
        while len(ids) > 1:
            pair = min(pairwise(ids), key=lambda p: order.get(p, len(order)))
            if pair not in merges:
                break
            ids = merge(ids, pair, merges[pair])
        out += ids
    return out


def decode(ids: list[int], tokens: list[bytes]) -> str:
    """The text of the ids. Joining comes first: a character may lie across two tokens."""
    return b"".join(tokens[i] for i in ids).decode("utf-8", "replace")


if __name__ == "__main__":
    text = "low low low low low lower lower newest newest newest widest widest"
    tokens, merges = train(text, 256 + 10)
    for left, right in merges:
        print(tokens[left], "+", tokens[right], "→", tokens[merges[left, right]])
    ids = encode("lowest 🙂", merges)
    print(ids, [tokens[i] for i in ids], repr(decode(ids, tokens)))
