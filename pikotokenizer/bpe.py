"""Byte-pair encoding: the most frequent pair of neighbours becomes one token, again and again.

    Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016, arXiv:1508.07909
    (§3.2); on bytes: Radford et al. 2019 (§2.2). BPE-dropout: Provilkov et al. 2020,
    arXiv:1910.13267 (§3).

Training sees each distinct word once, with its count. A word is a Python string in which every
token is one character, chr(id): a pair is a string of two characters, and merging it is
`word.replace(pair, chr(new))`, leftmost first, as BPE wants it. `train_naive` is that and nothing
more; `train_merges` gives the same merges and touches only the words that hold the pair.

Tie rule, the same as in Hugging Face's trainer: among pairs of equal count the one with the lowest
left id wins, then the lowest right id. So neither hashing nor the order of the documents matters.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain, pairwise

from base import (
    AddedToken,
    Pipeline,
    Tokenizer,
    check_size,
    check_special,
    count_words,
    marked_pipeline,
)
from characters import BYTE_TO_CHAR, PATTERNS, bytes_to_chars, well_formed
from decoders import MARK
from together import RankTable, merge_together

NEVER = 1 << 62  # the rank of a pair that is no token
LONG = 128  # symbols; longer words are merged with a heap
MANY = 50  # new words; so many are merged together
Merge = tuple[int, int, int]  # left id, right id, new id


# ---- training ----


def count_pairs(words: dict[str, int]) -> Counter[str]:
    """How often each pair of neighbouring tokens occurs; "aaa" holds (a, a) twice."""
    pairs: Counter[str] = Counter()
    for word, count in words.items():
        for i in range(len(word) - 1):
            pairs[word[i : i + 2]] += count
    return pairs


def train_naive(words: dict[str, int], pieces: list[str], size: int, floor: int = 1):
    """The definition: recount everything for every merge, O(merges · words); the tests' oracle."""
    pieces, merges = list(pieces), []
    known = {piece: i for i, piece in enumerate(pieces)}
    while len(pieces) < size:
        pairs = count_pairs(words)
        if not pairs or max(pairs.values()) < floor:
            break
        pair = min(pairs, key=lambda p: (-pairs[p], p))
        new = add_piece(pieces, known, pair)
        merges.append((ord(pair[0]), ord(pair[1]), new))
        merged: Counter[str] = Counter()
        for word, count in words.items():
            merged[word.replace(pair, chr(new))] += count
        words = merged
    return pieces, merges


def add_piece(pieces: list[str], known: dict[str, int], pair: str) -> int:
    """The id of the joined pair: a new one, unless another pair already spells the same piece."""
    text = pieces[ord(pair[0])] + pieces[ord(pair[1])]
    if text not in known:
        known[text] = len(pieces)
        pieces.append(text)
    return known[text]


def train_merges(
    words: dict[str, int],
    pieces: list[str],
    size: int,
    floor: int = 1,
    watch: Callable[[int, str, int], bool | None] | None = None,
) -> tuple[list[str], list[Merge]]:
    """Grows `pieces` to `size` by merging the most frequent pair, in O(N log V) instead of O(N·V).

    words: count of each word, a string of chr(id); pieces: id → text so far; floor: a pair rarer
    than this ends the training; watch: called with (new id, its text, count) at each merge, may
    return True to stop there.
    Returns all pieces, and the merges in order. Fewer if the words run out of pairs.

    Counts in the heap may be too high, never too low: one that turns out stale is pushed back.
    """
    pieces, merges = list(pieces), []
    known = {piece: i for i, piece in enumerate(pieces)}
    texts, weights = list(words), list(words.values())
    counts, where = index_pairs(texts, weights)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(pieces) < size and heap:
        negative, pair = heapq.heappop(heap)
        count = counts[pair]
        if count != -negative:
            if count > 0:
                heapq.heappush(heap, (-count, pair))
            continue
        if count < max(floor, 1):
            break
        new = add_piece(pieces, known, pair)
        merges.append((ord(pair[0]), ord(pair[1]), new))
        stop = watch and watch(new, pieces[new], count)
        grown = merge_everywhere(pair, chr(new), texts, weights, counts, where)
        for other in grown:
            heapq.heappush(heap, (-counts[other], other))
        counts[pair] = 0
        if stop:
            break
    return pieces, merges


def index_pairs(texts: list[str], weights: list[int]):
    """The count of every pair, and the words (by index) that hold it."""
    counts: dict[str, int] = {}
    where: dict[str, list[int]] = {}
    for w, text in enumerate(texts):
        weight = weights[w]
        for pair in map(str.__add__, text, text[1:]):
            if pair in counts:
                counts[pair] += weight
                where[pair].append(w)
            else:
                counts[pair] = weight
                where[pair] = [w]
    return counts, where


def merge_everywhere(pair, new, texts, weights, counts, where) -> set[str]:
    """Merges `pair` into `new` in all words; returns the pairs whose count grew.

    Cutting a word at the pair leaves the parts between: only the neighbours of the cuts change.
    """
    first, second = pair
    grown = set()
    for w in where.pop(pair):
        parts = texts[w].split(pair)
        if len(parts) == 1:
            continue  # merged on an earlier visit
        weight = weights[w]
        texts[w] = new.join(parts)
        before = ""  # the token left of the cut after merging, and as it was
        was = ""
        for part, after in pairwise(parts):
            if part:
                before = was = part[-1]
            if before:
                counts[was + first] -= weight
                add(before + new, w, weight, counts, where, grown)
            if after:
                counts[second + after[0]] -= weight
                add(new + after[0], w, weight, counts, where, grown)
            before, was = new, second
    return grown


def add(pair, w, weight, counts, where, grown) -> None:
    if pair in counts:
        counts[pair] += weight
        where.setdefault(pair, []).append(w)
    else:
        counts[pair] = weight
        where[pair] = [w]
    grown.add(pair)


# ---- encoding one word ----


def merge_short(symbols: list[str], rank: Callable[[str, str], int]) -> list[str]:
    """Merges the pair of lowest rank, leftmost first, until none is left. O(n²), best for few."""
    ranks = [rank(a, b) for a, b in pairwise(symbols)]
    while ranks:
        best = min(ranks)
        if best == NEVER:
            break
        i = ranks.index(best)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        del ranks[i]
        if i:
            ranks[i - 1] = rank(symbols[i - 1], symbols[i])
        if i < len(ranks):
            ranks[i] = rank(symbols[i], symbols[i + 1])
    return symbols


def merge_long(symbols: list[str], rank: Callable[[str, str], int]) -> list[str]:
    """The same with a heap and a linked list: O(n log n), whatever the input.

    A heap entry is rank · 2³² + position. It is stale if the pair that now begins at that position
    has another rank.
    """
    n = len(symbols)
    after, before = list(range(1, n + 1)), list(range(-1, n - 1))
    ranks = (rank(a, b) for a, b in pairwise(symbols))
    heap = [r << 32 | i for i, r in enumerate(ranks) if r != NEVER]
    heapq.heapify(heap)
    while heap:
        entry = heapq.heappop(heap)
        i = entry & 0xFFFFFFFF
        j = after[i]
        if not symbols[i] or j == n or rank(symbols[i], symbols[j]) != entry >> 32:
            continue
        symbols[i] += symbols[j]
        symbols[j] = ""
        after[i] = k = after[j]
        if k < n:
            before[k] = i
            if (r := rank(symbols[i], symbols[k])) != NEVER:
                heapq.heappush(heap, r << 32 | i)
        if (h := before[i]) >= 0 and (r := rank(symbols[h], symbols[i])) != NEVER:
            heapq.heappush(heap, r << 32 | h)
    return [symbol for symbol in symbols if symbol]


def merge_dropout(symbols, rank, dropout: float, rng: random.Random) -> list[str]:
    """Algorithm 1 of Provilkov et al. 2020: each possible merge is left out with probability p."""
    while True:
        ranked = [(rank(a, b), i) for i, (a, b) in enumerate(pairwise(symbols))]
        kept = [(r, i) for r, i in ranked if r != NEVER and rng.random() >= dropout]
        if not kept:
            return symbols
        _, i = min(kept)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


class BPE(Tokenizer):
    """A byte-pair encoder. `BPE.train(...)` makes one; formats.py reads and writes them.

    merges: pairs of pieces in order of rank, as GPT-2 and Hugging Face have them. None: any two
    neighbours whose join is a piece may merge, by `ranks[join]` (tiktoken, SentencePiece).
    byte_level: words are read as bytes in GPT-2's alphabet. Otherwise a character that is no piece
    becomes <0xXX> pieces if `byte_fallback`, else `unk` (one for a run of them if `fuse_unk`), else
    nothing. whole_first: a word that is a piece is that piece, whatever the merges say. suffix:
    joined to the last character of a word (CLIP's </w>). hidden: ids that text never becomes.
    """

    algorithm = "bpe"

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]] | None,
        pipeline: Pipeline,
        ranks: dict[str, int] | None = None,
        byte_level: bool = True,
        byte_fallback: bool = False,
        unk: str | None = None,
        fuse_unk: bool = False,
        whole_first: bool = False,
        suffix: str = "",
        hidden: Iterable[int] = (),
    ):
        self.hidden = frozenset(hidden)
        self.byte_level, self.whole_first, self.suffix = byte_level, whole_first, suffix
        self.byte_fallback, self.fuse_unk = byte_fallback, fuse_unk
        self.unk = self.unk_piece = unk
        self.merges, self.ranks = merges, ranks
        self.rank = self.rank_function()
        self.byte_ids = [vocab.get(f"<0x{b:02X}>", -1) for b in range(256)]
        if byte_fallback and min(self.byte_ids) < 0:
            self.byte_fallback = False  # tokenizers: all of them or none
        if unk is not None and unk not in vocab:
            raise ValueError(f"the unknown token {unk!r} is not in the vocabulary")
        super().__init__(vocab, pipeline)
        self.not_whole = {None, *self.special_ids}  # no word is one of these by itself
        self.tables = lru_cache(1)(self._tables)

    def _tables(self) -> tuple[RankTable, RankTable] | None:
        """What `merge_together` needs, ranks and ids; None where words are not plain bytes."""
        pieces = self.vocab
        if added := self.added.keys() & pieces.keys():
            pieces = {piece: i for piece, i in pieces.items() if piece not in added}
        plain = self.byte_level and not self.suffix and not self.hidden
        if not plain or any(char not in pieces for char in BYTE_TO_CHAR):
            return None
        try:
            ids = RankTable(pieces, [*pieces.values()])
            if self.merges is None:
                same = self.ranks is pieces
                return ids if same else RankTable(self.ranks, [*self.ranks.values()]), ids
            joined = [a + b for a, b in self.merges]
            left = [len(a) for a, _ in self.merges]
            return RankTable(joined, [*range(len(joined))], left), ids
        except ValueError:  # a merge is repeated
            return None

    def rank_function(self) -> Callable[[str, str], int]:
        """rank(a, b) of two neighbours, NEVER if they do not merge."""
        if self.merges is None:
            get = self.ranks.get
            return lambda a, b: get(a + b, NEVER)
        table: dict[tuple[str, str], int] = {}
        for i, pair in enumerate(self.merges):
            table[tuple(pair)] = i
        lookup = table.get
        return lambda a, b: lookup((a, b), NEVER)

    def symbols(self, word: str) -> list[str]:
        """What the merging starts from: characters, or the bytes' characters."""
        symbols = list(bytes_to_chars(word.encode("utf-8")) if self.byte_level else word)
        if symbols and self.suffix:
            symbols[-1] += self.suffix
        return symbols

    def merged(self, word: str, dropout: float = 0.0, rng: random.Random | None = None):
        """The pieces of one word before unknown ones are replaced."""
        symbols = self.symbols(word)
        if self.whole_first and not dropout:
            whole = self.vocab.get("".join(symbols))
            if whole is not None and whole not in self.special_ids:
                return [self.pieces[whole]]
        if dropout:
            return merge_dropout(symbols, self.rank, dropout, rng or random.Random())
        return (merge_short if len(symbols) < LONG else merge_long)(symbols, self.rank)

    def word_ids(self, word: str) -> list[int]:
        return [i for i, _ in self.known(self.merged(word))]

    def learn_words(self, words: Iterable[str]) -> None:
        """Puts many new words into the cache, merged together (together.py)."""
        new = [word for word in words if len(word) < LONG]
        if len(new) < MANY or self.tables() is None:
            return
        coded = [word.encode("utf-8") for word in new]
        if self.whole_first:
            whole = [self.vocab.get(bytes_to_chars(data)) for data in coded]
            hits = zip(new, whole, strict=True)
            self.words.add((word, (i,)) for word, i in hits if i not in self.not_whole)
            rest = [n for n, i in enumerate(whole) if i in self.not_whole]
            new, coded = [new[n] for n in rest], [coded[n] for n in rest]
        if new:
            self.words.add(zip(new, merge_together(coded, *self.tables()), strict=True))

    def word_spans(self, word: str) -> list[tuple[int, int, int]]:
        """(id, start, end) in characters of `word`; a character cut into bytes is in each part."""
        chars = [i for i, c in enumerate(word) for _ in range(len(c.encode("utf-8")))]
        spans, at = [], 0
        for i, size in self.known(self.merged(word)):
            first, last = at, min(at + max(size, 1), len(chars if self.byte_level else word)) - 1
            if self.byte_level:
                first, last = chars[first], chars[last]
            elif not size:  # the second, third … byte of a character that is no piece
                first = last = at - 1
            spans.append((i, first, last + 1))
            at += size
        return spans

    def known(self, symbols: list[str]) -> list[tuple[int, int]]:
        """(id, length in symbols' characters) with bytes or `unk` for what is no piece.

        Of the bytes of a character the first covers it, the others cover nothing.
        """
        out: list[tuple[int, int]] = []
        unk_run = False
        for symbol in symbols:
            i = self.vocab.get(symbol)
            if i is not None and i not in self.hidden:
                out.append((i, len(symbol)))
            elif self.byte_fallback:
                codes = [self.byte_ids[b] for b in symbol.encode("utf-8")]
                out += [(code, len(symbol) if n == 0 else 0) for n, code in enumerate(codes)]
            elif self.unk is not None and self.fuse_unk and unk_run:
                out[-1] = (out[-1][0], out[-1][1] + len(symbol))
            elif self.unk is not None:
                out.append((self.vocab[self.unk], len(symbol)))
            unk_run = i is None or i in self.hidden
        return out

    def sample(self, text: str, dropout: float = 0.1, seed: int = 0) -> list[int]:
        """`encode(text)` with BPE-dropout: another segmentation of the same text at every seed."""
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout is a probability, got {dropout}")
        rng, ids, active = random.Random(seed), [], self.allowed(())
        for part, start, special in self.parts(well_formed(text), active):
            words = self.plain_words(part, start == 0, active)
            for word, token in [(part, special)] if special else words:
                if token is not None:
                    ids.append(token.id)
                    continue
                for piece in self.cut(word):
                    ids += [i for i, _ in self.known(self.merged(piece, dropout, rng))]
        return ids

    # ---- training ----

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        pattern: str = "gpt4",
        special_tokens: Iterable[str] = (),
        min_frequency: int = 1,
        watch: Callable[[int, str, int], bool | None] | None = None,
    ) -> "BPE":
        """Learns `vocab_size` tokens from a text or from an iterable of documents.

        pattern: a name in `PATTERNS`, a regular expression, or "metaspace" (characters instead of
        bytes, words begin with ▁, unknown characters fall back to bytes, as in Llama 2).
        special_tokens get the first ids, then come the bytes (or characters), then the merges.
        Raises ValueError if `vocab_size` is below what there is before the first merge, or if a
        special token would be a piece of plain text, too.
        """
        special = list(dict.fromkeys(special_tokens))
        if pattern == "metaspace":
            pipeline, special = marked_pipeline(), list(dict.fromkeys(["<unk>", *special]))
        else:
            pipeline = bytes_pipeline(PATTERNS.get(pattern, pattern))
        pipeline.added = [AddedToken(i, content) for i, content in enumerate(special)]
        empty = cls.from_pieces(special, [], pipeline, pattern)
        counts = count_words(empty, text)
        base = special + empty.alphabet(counts)
        check_size(vocab_size, len(base), "the special tokens and the alphabet")
        index = {piece: chr(i) for i, piece in enumerate(base)}
        words = {"".join(map(index.__getitem__, empty.symbols(w))): n for w, n in counts.items()}
        pieces, merges = train_merges(words, base, vocab_size, min_frequency, watch)
        check_special(special, base[len(special) :] + [pieces[new] for _, _, new in merges])
        return cls.from_pieces(pieces, merges, pipeline, pattern)

    @classmethod
    def from_pieces(cls, pieces: list[str], merges: list[Merge], pipeline, pattern: str) -> "BPE":
        """The tokenizer of a list of pieces (by id) and merges of ids, as training makes them."""
        vocab = {piece: i for i, piece in enumerate(pieces)}
        pairs = [(pieces[a], pieces[b]) for a, b, _ in merges]
        if pattern != "metaspace":
            return cls(vocab, pairs, pipeline)
        unk = "<unk>" if pieces else None
        return cls(vocab, pairs, pipeline, None, False, True, unk, fuse_unk=True)

    def alphabet(self, counts: dict[str, int]) -> list[str]:
        """The pieces before any merge: all bytes, or <0x00> … <0xFF> and the characters seen."""
        if self.byte_level:
            return sorted(BYTE_TO_CHAR)
        return [f"<0x{b:02X}>" for b in range(256)] + sorted({*MARK, *chain.from_iterable(counts)})

    def extend(
        self, text: str | Iterable[str], vocab_size: int, min_frequency: int = 1, watch=None
    ):
        """A tokenizer that goes on from this one's merges, on `text`, up to `vocab_size` pieces.

        Old ids and merges stay. Raises ValueError if there is nothing to go on from (no merge list,
        or ids that do not run from 0).
        """
        pieces = [self.pieces.get(i) for i in range(len(self))]
        if self.merges is None or None in pieces or self.suffix:
            raise ValueError("only a tokenizer with a merge list and ids 0, 1, 2 … can be extended")
        check_size(vocab_size, len(pieces) + 1, "the vocabulary to extend")
        counts: Counter[str] = Counter()
        for word, n in count_words(self, text).items():
            counts["".join(chr(i) for i in self.word_ids(word))] += n
        size = len(pieces)
        pieces, merges = train_merges(counts, pieces, vocab_size, min_frequency, watch)
        check_special(self.added, [pieces[new] for _, _, new in merges])
        vocab = self.vocab | {piece: i + size for i, piece in enumerate(pieces[size:])}
        pairs = [*self.merges, *((pieces[a], pieces[b]) for a, b, _ in merges)]
        return BPE(
            vocab, pairs, self.pipeline, byte_level=self.byte_level, unk=self.unk,
            byte_fallback=self.byte_fallback, fuse_unk=self.fuse_unk,
            whole_first=self.whole_first, hidden=self.hidden,
        )  # fmt: skip


def bytes_pipeline(pattern: str) -> Pipeline:
    """Words by a regular expression, then bytes."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [split, to_bytes | {"use_regex": False}]
    return Pipeline(
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=to_bytes | {"use_regex": True},
    )
