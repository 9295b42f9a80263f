"""Merging thousands of words at once: BPE's loop over one word, done by numpy for all in step.

Plain Python needs a microsecond or two for each merge. When a text is new, tens of thousands of
words wait, so they are laid behind one another in one array of symbols, and every round makes one
merge in every word that still has one: the pair of the lowest rank, the leftmost of equal ones. The
words are short, so some twenty rounds do.

A symbol is a stretch of the bytes, (start, end). To know its rank it is looked up by a number made
from its bytes, its hash: byte b at position k counts CODE[b] · MULT^k, and the hash of a stretch is
the sum over it, moved to position 0,

    h(start, end) = (S(end) − S(start)) · MULT^(−start)   modulo 2⁶⁴,  S(n) the sum of the first n

With S at hand any stretch costs one subtraction and one product. Two different pieces could have
the same hash, but with 2⁶⁴ of them the chance is below one in 10⁸ for a library of books; a
vocabulary in which it happened would be refused by `RankTable`.

Dimension key: W words, B bytes of all words, S symbols that are left.
"""

import codecs
from collections.abc import Collection
from itertools import pairwise

import numpy as np

from characters import ALPHABET_MAP

NEVER = np.int64(1 << 62)  # the rank of two symbols that do not merge
MULT = 0x9E3779B97F4A7C15  # odd, so it has an inverse modulo 2⁶⁴
CODE = np.random.default_rng(0).integers(1, 1 << 63, 256, dtype=np.uint64)
SPLIT = np.uint64(0xD1B54A32D192ED03)  # makes the length of the left part count
BITS = 16  # the first bits of a hash say where to look


def powers(base: int, count: int) -> np.ndarray:
    """base^0 … base^(count − 1), modulo 2⁶⁴."""
    out = np.full(count, base % (1 << 64), np.uint64)
    out[0] = 1
    return np.multiply.accumulate(out)


class Hashes:
    """The hash of every stretch of some bytes."""

    def __init__(self, data: bytes):
        codes = CODE[np.frombuffer(data, np.uint8)] * powers(MULT, max(len(data), 1))[: len(data)]
        self.sums = np.concatenate([np.zeros(1, np.uint64), np.add.accumulate(codes)])  # (B + 1,)
        self.down = powers(pow(MULT, -1, 1 << 64), len(data) + 1)

    def __call__(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        return (self.sums[end] - self.sums[start]) * self.down[start]


class RankTable:
    """Hash → rank.

    pieces: what merges make, in GPT-2's byte alphabet. ranks: when. left: for a list of merges, how
    many bytes the left part of each has; without it any two neighbours that spell a piece merge
    into it. Raises ValueError if one stands there twice.
    """

    def __init__(self, pieces: Collection[str], ranks: list[int], left: list[int] | None = None):
        ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)))
        data = codecs.charmap_encode("".join(pieces), "strict", ALPHABET_MAP)[0]
        keys = Hashes(data)(np.concatenate([[0], ends])[:-1], ends)
        self.by_parts = left is not None
        if self.by_parts:
            keys = keys + np.array(left, np.uint64) * SPLIT
        order = np.argsort(keys)
        self.keys = np.append(keys[order], np.uint64(2**64 - 1))
        if (self.keys[1:] == self.keys[:-1]).any():
            raise ValueError("two pieces have one hash")
        self.ranks = np.append(np.array(ranks, np.int64)[order], NEVER)
        self.shift = np.uint64(64 - BITS)
        begin = np.arange(1 << BITS, dtype=np.uint64) << self.shift
        self.first = np.searchsorted(self.keys, begin)

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """The rank of each hash, NEVER for what is not in the table."""
        at = self.first[(keys >> self.shift).astype(np.int64)]
        before = np.flatnonzero(self.keys[at] < keys)
        while len(before):  # a few of the same first bits lie side by side
            at[before] += 1
            before = before[self.keys[at[before]] < keys[before]]
        return np.where(self.keys[at] == keys, self.ranks[at], NEVER)


def merge_together(words: list[bytes], ranks: RankTable, ids: RankTable) -> list[tuple[int, ...]]:
    """The ids of each word; `ids` is the table that has ids instead of ranks."""
    sizes = np.fromiter(map(len, words), np.int64, len(words))
    hashes = Hashes(b"".join(words))
    start, end = merged_symbols(np.repeat(np.arange(len(words)), sizes), hashes, ranks)
    found = ids(hashes(start, end)).tolist()
    cuts = np.searchsorted(start, np.concatenate([[0], np.cumsum(sizes)])).tolist()
    return [tuple(found[a:b]) for a, b in pairwise(cuts)]


def merged_symbols(word: np.ndarray, hashes: Hashes, table: RankTable):
    """The starts and ends of all symbols when nothing merges any more; word: (B,) whose each is."""

    def rank_with_next(at: np.ndarray) -> np.ndarray:
        keys = hashes(start[at], end[at + 1])
        if table.by_parts:
            keys = keys + (end[at] - start[at]).astype(np.uint64) * SPLIT
        return table(keys)

    start = np.arange(len(word))
    end, finished = start + 1, []
    rank = np.full(len(word), NEVER)  # (S,) of each symbol with the next one
    inside = np.flatnonzero(word[1:] == word[:-1])
    rank[inside] = rank_with_next(inside)
    while len(word):
        first = np.flatnonzero(np.diff(word, prepend=-1))
        best, count = np.minimum.reduceat(rank, first), np.diff(np.append(first, len(word)))
        going = np.repeat(best < NEVER, count)
        finished.append((start[~going], end[~going]))
        best = np.repeat(best, count)[going]
        start, end, word, rank = start[going], end[going], word[going], rank[going]
        hits = np.flatnonzero(rank == best)
        hits = hits[np.diff(word[hits], prepend=-1) != 0]  # the leftmost of each word
        end[hits], rank[hits] = end[hits + 1], rank[hits + 1]
        kept = np.ones(len(word), bool)
        kept[hits + 1] = False
        start, end, word, rank = start[kept], end[kept], word[kept], rank[kept]
        new = hits - np.arange(len(hits))  # where the joined symbols are now
        followed = np.append(word[1:] == word[:-1], False)
        rank[new] = NEVER
        changed = np.concatenate([new, new[new > 0] - 1])
        changed = changed[followed[changed]]
        rank[changed] = rank_with_next(changed)
    starts = np.concatenate([np.zeros(0, np.int64), *(a for a, _ in finished)])
    ends = np.concatenate([np.zeros(0, np.int64), *(b for _, b in finished)])
    order = np.argsort(starts, kind="stable")
    return starts[order], ends[order]
