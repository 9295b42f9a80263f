"""Unigram: a vocabulary with probabilities, and the most probable way to spell each text with it.

    Kudo 2018, "Subword Regularization", arXiv:1804.10959 (§3.2 the model, §3.3 sampling);
    Kudo & Richardson 2018, arXiv:1808.06226 (SentencePiece).

A segmentation x = (x₁ … x_M) has probability P(x) = Π p(xᵢ). All segmentations of a word form a
lattice; Viterbi finds the best, forward–backward sums over all. Training (`train_pieces`) starts
from frequent substrings, found with a suffix array, and alternates

    E   c(x) = Σ_words count · E[times x is used]          M   p(x) = c(x) / Σ c

(which never lowers the likelihood) with pruning the pieces that the corpus would miss least.

Dimension key: W words, N nodes (a word of n characters has n + 1), E edges (piece occurrences).
"""

import math
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import groupby

import numpy as np

from base import (
    AddedToken,
    Cache,
    Pipeline,
    Tokenizer,
    check_size,
    check_special,
    count_words,
    sentencepiece_pipeline,
)
from characters import well_formed
from decoders import MARK
from normalize import charsmap_of
from running import Running

UNK_PENALTY = 10.0  # an unknown character is this much less likely than the rarest piece
USER_SCORE = 0.0  # of a user-defined piece: as if it were certain (found by experiment)
REBASE = -100_000.0  # (found by experiment: where rounding errors start over)
LONGEST = 16  # characters of a seed


def to_float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def to_float64(x: float) -> float:
    return x


class Unigram(Tokenizer):
    """A Unigram tokenizer. `Unigram.train(...)` makes one; formats.py reads and writes them.

    scores: log-probability of each id. hidden: ids that text never becomes (control tokens).
    single: sums are rounded to 32 bits as SentencePiece does, which decides ties, and over long
    texts more than ties (tokenizers has 64 bits); hidden scores do not count for the unknown's.
    user: ids of SentencePiece's user-defined pieces; each has the score USER_SCORE.
    """

    algorithm = "unigram"

    def __init__(
        self,
        vocab: dict[str, int],
        scores: list[float],
        pipeline: Pipeline,
        unk_id: int | None = 0,
        byte_fallback: bool = False,
        hidden: Iterable[int] = (),
        single: bool = False,
        user: Iterable[int] = (),
    ):
        if unk_id is not None and not 0 <= unk_id < len(scores):
            raise ValueError(f"the unknown id {unk_id} is not in the vocabulary")
        if len(scores) <= max(vocab.values(), default=-1) or not all(map(math.isfinite, scores)):
            raise ValueError("every piece needs a finite score")
        super().__init__(vocab, pipeline)
        self.scores, self.unk_id, self.single = scores, unk_id, single
        self.hidden = frozenset(hidden)
        self.unk_piece = None if unk_id is None else self.pieces[unk_id]
        self.round = to_float32 if single else to_float64
        self.byte_ids = [vocab.get(f"<0x{b:02X}>", -1) for b in range(256)]
        self.byte_fallback = byte_fallback and min(self.byte_ids) >= 0
        self.user = frozenset(user)
        apart = self.hidden | self.user if single else frozenset()
        normal = [s for i, s in enumerate(scores) if i not in apart]
        self.unk_score = self.round(min(normal, default=0.0) - UNK_PENALTY)
        self.matches: dict[str, tuple[int, float] | None] = {}  # all prefixes of pieces
        for piece, i in vocab.items():
            if i in self.hidden:
                continue
            for end in range(1, len(piece)):
                self.matches.setdefault(piece[:end], None)
            self.matches[piece] = (i, USER_SCORE if i in self.user else scores[i])
        self.longest = max(map(len, self.matches), default=1)
        self.best_parts = Cache(self.part, self.cache_size)
        self.running = self._running()

    def _running(self) -> Running | None:
        """The way past searching again; None where stretches between spaces do not stand alone."""
        spec = self.pipeline.normalizer or {}
        if spec.get("type") != "SentencePiece" or not spec["prefix"] or self.late:
            return None
        charsmap = charsmap_of(spec)
        alone = self.marked and not self.pipeline.pre_tokenizer
        if not alone or (charsmap is not str and not charsmap.between_spaces()):
            return None
        return Running(self, charsmap, spec["collapse"], REBASE)

    def plain_ids(self, text: str, first: bool, active: frozenset[str]) -> list[int]:
        ids = self.running.ids(text) if self.running and text else None
        return super().plain_ids(text, first, active) if ids is None else ids

    # ---- the best segmentation ----

    def edges(self, word: str, start: int) -> list[tuple[int, int, float]]:
        """The pieces that begin at `start`: (end, id, score); `unk` if none is one character."""
        found, single = [], False
        for end in range(start + 1, len(word) + 1):
            text = word[start:end]
            if text not in self.matches:
                break
            if (match := self.matches[text]) is not None:
                found.append((end, *match))
                single = single or end == start + 1
        if not single:
            unk = -1 if self.unk_id is None else self.unk_id
            found.append((start + 1, unk, self.unk_score))
        return found

    def viterbi(self, word: str, origin: float = 0.0):
        """The best path: ([(id, start, end)], its score + origin, by how much it beat its rivals).

        A later path must be strictly better to replace an earlier one. With `single`, a sum that
        falls below REBASE becomes zero, and those ahead move with it, as in SentencePiece 0.2.
        """
        n = len(word)
        score, back = [origin] + [-math.inf] * n, [(-1, -1)] * (n + 1)
        gap = [math.inf] * (n + 1)  # between the two best arrivals at each node
        for start in range(n):
            if self.single and score[start] < REBASE:
                ahead, base = slice(start, start + self.longest + 1), score[start]
                score[ahead] = [self.round(s - base) for s in score[ahead]]
            here = score[start]
            for end, i, gain in self.edges(word, start):
                rival = self.round(here + gain)
                best = score[end]
                if rival > best:
                    score[end], back[end], gap[end] = rival, (start, i), rival - best
                elif best - rival < gap[end]:
                    gap[end] = best - rival
        path, margin = self.traced(back, gap, n)
        return path, score[n], margin

    def quick_viterbi(self, word: str):
        """`viterbi` of a short word from 0 on with nothing rounded, written out for speed.

        The path is that of `viterbi` if the margin is larger than rounding can be.
        """
        n, matches = len(word), self.matches
        score, back = [0.0] + [-math.inf] * n, [(-1, -1)] * (n + 1)
        gap = [math.inf] * (n + 1)
        for start in range(n):
            here, end, single = score[start], start + 1, False
            while end <= n and (text := word[start:end]) in matches:
                if match := matches[text]:
                    rival, best = here + match[1], score[end]
                    if rival > best:
                        score[end], back[end], gap[end] = rival, (start, match[0]), rival - best
                    elif best - rival < gap[end]:
                        gap[end] = best - rival
                    single = single or end == start + 1
                end += 1
            if not single:
                rival, best = here + self.unk_score, score[start + 1]
                if rival > best:
                    unk = -1 if self.unk_id is None else self.unk_id
                    score[start + 1], back[start + 1] = rival, (start, unk)
                    gap[start + 1] = rival - best
                else:
                    gap[start + 1] = min(gap[start + 1], best - rival)
        return self.traced(back, gap, n), score[n]

    def traced(self, back: list[tuple[int, int]], gap: list[float], end: int):
        """The path that `back` leads along, and the smallest gap on it."""
        path, margin = [], math.inf
        while end:
            start, i = back[end]
            path.append((i, start, end))
            margin, end = min(margin, gap[end]), start
        return path[::-1], margin

    def word_spans(self, word: str) -> list[tuple[int, int, int]]:
        return self.spelled(word, self.viterbi(word)[0])

    def spelled(self, word: str, path) -> list[tuple[int, int, int]]:
        """A path with runs of unknown characters joined, or spelled in bytes."""
        out: list[tuple[int, int, int]] = []
        for known, run in groupby(path, lambda edge: edge[0] not in (self.unk_id, -1)):
            edges = list(run)
            start, end = edges[0][1], edges[-1][2]
            if known:
                out += edges
            elif match := self.matches.get(word[start:end]):  # the unknown token's own text
                out.append((match[0], start, end))
            elif self.byte_fallback:
                for _, a, b in edges:
                    out += [(self.byte_ids[code], a, b) for code in word[a:b].encode("utf-8")]
            elif self.unk_id is None:
                raise ValueError(f"{word[start:end]!r} is unknown and there is no unknown token")
            else:
                out.append((self.unk_id, start, end))
        return out

    def word_ids(self, word: str) -> list[int]:
        return [i for i, _, _ in self.word_spans(word)]

    def gain(self, i: int) -> float:
        """What a path gains by one piece."""
        if i in (self.unk_id, -1):
            return self.unk_score
        return self.matches[self.pieces[i]][1]

    def part(self, word: str) -> tuple:
        path, score, margin = self.viterbi(word)
        gains = tuple(self.gain(i) for i, _, _ in path)
        return tuple(i for i, _, _ in self.spelled(word, path)), score, margin, gains

    def long_ids(self, word: str) -> list[int]:
        """The ids of a word of many parts (a whole text, if there is no pre-tokenizer).

        Its best path is that of its parts, one after the other, but for rounding: the sums have the
        score of everything before in them. Where rivals are further apart than rounding can reach,
        the part's own path is right and is looked up; elsewhere it is found again from the sum.
        """
        ids: list[int] = []
        unit = 2.0**-24 if self.single else 2.0**-53
        total = exact = 0.0  # the score so far: nearly, and as it is rounded up to `waiting`
        waiting: list[str] = []
        for part in self.cut(word):
            found, score, margin, _ = self.best_parts[part]
            total += score
            reach = min(abs(total), abs(score) - REBASE) if self.single else abs(total)
            if margin > 4 * (len(part) + 1) * unit * reach:
                waiting.append(part)
            else:
                for before in waiting:
                    exact = self.rounded_sum(before, exact)
                waiting = []
                path, exact, _ = self.viterbi(part, exact)
                found = [i for i, _, _ in self.spelled(part, path)]
            ids.extend(found)
        return ids

    def rounded_sum(self, part: str, exact: float) -> float:
        """The sum after a part whose best path is known, rounded at each of its pieces."""
        _, _, _, gains = self.best_parts[part]
        if self.single and exact + len(part) * self.unk_score < REBASE:
            return self.viterbi(part, exact)[1]
        for gain in gains:
            exact = self.round(exact + gain)
        return exact

    # ---- all segmentations ----

    def n_best(self, text: str, n: int) -> list[tuple[list[int], float]]:
        """The `n` most probable segmentations of `text` and their log-probabilities, best first."""
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        word = self.lattice_text(text)
        best: list[list[tuple[float, int, int, int]]] = [[(0.0, -1, -1, 0)]]
        arriving: dict[int, list[tuple[float, int, int, int]]] = {}
        for start in range(len(word)):
            for end, i, gain in self.edges(word, start):
                rivals = arriving.setdefault(end, [])
                rivals += [(best[start][k][0] + gain, start, i, k) for k in range(len(best[start]))]
            best.append(sorted(arriving.pop(start + 1, []), key=lambda r: -r[0])[:n])
        return [(self.trace(word, best, k), best[-1][k][0]) for k in range(len(best[-1]))]

    def trace(self, word: str, best, k: int) -> list[int]:
        """Follows the k-th best path back to the start."""
        path, end = [], len(word)
        while end:
            _, start, i, k = best[end][k]
            path.append((i, start, end))
            end = start
        return [i for i, _, _ in self.spelled(word, path[::-1])]

    def lattice_text(self, text: str) -> str:
        """The normalized text as one lattice. Raises ValueError if the pre-tokenizer cuts it up."""
        words = self.split(self.normalize(well_formed(text)), True)
        if len(words) > 1:
            raise ValueError("this tokenizer cuts the text into words, each with its own lattice")
        return "".join(words)

    def forward(self, word: str, theta: float = 1.0) -> list[float]:
        """log Σ over all paths from the start to each node of exp(theta · score)."""
        arriving: list[list[float]] = [[0.0]] + [[] for _ in word]
        alpha = []
        for start in range(len(word) + 1):
            alpha.append(log_sum_exp(arriving[start]))
            if start < len(word):
                for end, _, gain in self.edges(word, start):
                    arriving[end].append(alpha[start] + theta * gain)
        return alpha

    def sample(self, text: str, theta: float = 1.0, seed: int = 0) -> list[int]:
        """A segmentation drawn with probability ∝ P(x)^theta (Kudo 2018, §3.3): theta 0 is uniform.

        Forward filtering, backward sampling: exact, over all segmentations and not the n best.
        """
        rng, word = random.Random(seed), self.lattice_text(text)
        alpha = self.forward(word, theta)
        into: list[list[tuple[int, int, float]]] = [[] for _ in range(len(word) + 1)]
        for start in range(len(word)):
            for end, i, gain in self.edges(word, start):
                into[end].append((start, i, alpha[start] + theta * gain))
        path, end = [], len(word)
        while end:
            weights = [math.exp(w - alpha[end]) for _, _, w in into[end]]
            start, i, _ = rng.choices(into[end], weights)[0]
            path.append((i, start, end))
            end = start
        return [i for i, _, _ in self.spelled(word, path[::-1])]

    def log_likelihood(self, text: str) -> float:
        """log Σ P(x) over all segmentations of `text`, in nats."""
        return self.forward(self.lattice_text(text))[-1]

    def entropy(self, text: str, theta: float = 1.0) -> float:
        """Entropy in nats of the segmentations of `text` under P(x)^theta / Z.

        H(n) = Σ over edges into n of q · (H(start) − log q), q the probability to come that way.
        """
        word = self.lattice_text(text)
        alpha, h = self.forward(word, theta), [0.0] * (len(word) + 1)
        for start in range(len(word)):
            for end, _, gain in self.edges(word, start):
                log_q = alpha[start] + theta * gain - alpha[end]
                h[end] += math.exp(log_q) * (h[start] - log_q)
        return h[-1]

    # ---- training ----

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = (),
        byte_fallback: bool = True,
        watch: Callable[[int, float], bool | None] | None = None,
    ) -> "Unigram":
        """Learns `vocab_size` tokens from a text or from an iterable of documents.

        byte_fallback: spend 256 of them on bytes, which makes every text but a literal ▁ come back
        as it was. watch: called with (number of pieces, nats a character) at each EM
        step, may return True to prune to the end at once.
        Raises ValueError if `vocab_size` is below the specials, bytes and characters of the text.
        """
        special = list(dict.fromkeys(["<unk>", *special_tokens]))
        codes = [f"<0x{b:02X}>" for b in range(256)] if byte_fallback else []
        pipeline = sentencepiece_pipeline()
        pipeline.added = [AddedToken(i, content) for i, content in enumerate(special)]
        bare = cls({t: i for i, t in enumerate(special)}, [0.0] * len(special), pipeline)
        words = dict(sorted(count_words(bare, text).items()))
        alphabet = {MARK}.union(*words)
        fixed = special + codes
        check_size(vocab_size, len(fixed) + len(alphabet), "specials, bytes and characters")
        learnt = train_pieces(words, alphabet, vocab_size - len(fixed), watch)
        check_special(special, [*codes, *(piece for piece, _ in learnt)])
        pieces = fixed + [piece for piece, _ in learnt]
        scores = [0.0] * len(fixed) + [to_float32(score) for _, score in learnt]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        hidden = range(len(fixed))
        return cls(vocab, scores, pipeline, 0, byte_fallback, hidden, single=True)


def log_sum_exp(values: list[float]) -> float:
    top = max(values, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(v - top) for v in values))


# ---- seeds ----


def suffix_array(codes: np.ndarray, depth: int) -> np.ndarray:
    """Positions of `codes` sorted by the `depth` codes that follow, by prefix doubling.

    Knowing the order by 1, 2, 4 … codes, the order by twice as many is that of the pairs
    (rank here, rank that many further on): Manber & Myers 1993.
    """
    rank = np.unique(codes, return_inverse=True)[1].astype(np.int64) + 1
    width = 1
    while width < depth:
        further = np.concatenate([rank[width:], np.zeros(min(width, len(rank)), np.int64)])
        pair = rank * (rank.max() + 1) + further[: len(rank)]
        rank = np.unique(pair, return_inverse=True)[1].astype(np.int64) + 1
        width *= 2
    return np.argsort(rank, kind="stable")


def common_prefixes(codes: np.ndarray, order: np.ndarray, depth: int) -> np.ndarray:
    """How many codes each suffix shares with the one before it, up to `depth`; code 0 ends it."""
    padded = np.concatenate([codes, np.zeros(depth, codes.dtype)])
    same = np.ones(len(order) - 1, bool)
    lengths = np.zeros(len(order), np.int64)
    for k in range(depth):
        a, b = padded[order[:-1] + k], padded[order[1:] + k]
        same &= (a == b) & (a != 0)
        lengths[1:] += same
    return lengths


def seed_pieces(words: dict[str, int], limit: int, depth: int = LONGEST) -> dict[str, int]:
    """The substrings of 2 … `depth` characters with the highest count · length, and their counts.

    Only those that no longer one of equal count begins with: the inner nodes of the suffix tree,
    read off the suffix array as runs of neighbours that share a prefix (Abouelhoda et al. 2004).
    """
    text = "\0".join(words) + "\0"
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
    sizes = [len(word) + 1 for word in words]
    order = suffix_array(codes, depth)
    before = np.concatenate([[0], np.cumsum(np.repeat(list(words.values()), sizes)[order])])
    shared = [*common_prefixes(codes, order, depth).tolist(), 0]
    found: dict[str, int] = {}
    stack: list[tuple[int, int]] = []  # (length of the common prefix, where the run begins)
    for i, length in enumerate(shared):
        begin = i - 1
        while stack and stack[-1][0] > length:
            size, begin = stack.pop()
            if size > 1:
                at = int(order[begin])
                found[text[at : at + size]] = int(before[i] - before[begin])
        if length and (not stack or stack[-1][0] < length):
            stack.append((length, begin))
    for word, count in words.items():  # a word that is no other's beginning is a leaf, not a node
        if 1 < len(word) <= depth:
            found.setdefault(word, count)
    ranked = sorted((p for p in found if found[p] > 1), key=lambda p: (-found[p] * len(p), p))
    return {piece: found[piece] for piece in ranked[:limit]}


# ---- expectation and maximisation ----


class Lattices:
    """The lattices of all words as arrays, so that EM is a numpy sum per position in the word."""

    def __init__(self, words: dict[str, int], pieces: list[str]):
        index = {piece: k for k, piece in enumerate(pieces)}
        longest = max(map(len, pieces))
        lengths = np.array([len(word) for word in words])
        self.weights = np.array(list(words.values()), float)  # (W,)
        self.first = np.concatenate([[0], np.cumsum(lengths + 1)[:-1]])  # (W,) node before the word
        self.last = self.first + lengths
        self.nodes = int(lengths.sum() + len(words))
        edges = [
            (base + i, base + j, k, i, j)
            for word, base in zip(words, self.first.tolist(), strict=True)
            for i in range(len(word))
            for j in range(i + 1, min(i + longest, len(word)) + 1)
            if (k := index.get(word[i:j])) is not None
        ]
        columns = np.array(edges, np.int64).T
        self.start, self.end, self.piece, self.i, self.j = columns  # (E,) each
        self.word = np.repeat(np.arange(len(words)), lengths + 1)[self.start]

    def keep(self, chosen: np.ndarray) -> None:
        """Drops the edges of pieces that are not `chosen` (V,) and renumbers the others."""
        new = np.cumsum(chosen) - 1
        mask = chosen[self.piece]
        for name in ("start", "end", "piece", "i", "j", "word"):
            setattr(self, name, getattr(self, name)[mask])
        self.piece = new[self.piece]

    def sweep(self, scores: np.ndarray, level, source, target, origin) -> np.ndarray:
        """log Σ over paths from `origin` to every node, going through the edges by `level`."""
        total = np.full(self.nodes, -np.inf)
        total[origin] = 0.0
        order = np.lexsort((target, level))
        cuts = np.flatnonzero(np.diff(level[order])) + 1
        for edges in np.split(order, cuts):
            values = total[source[edges]] + scores[self.piece[edges]]
            begin = np.flatnonzero(np.diff(target[edges], prepend=-1))
            top = np.maximum.reduceat(values, begin)
            run = np.diff(np.append(begin, len(edges)))
            sums = np.add.reduceat(np.exp(values - np.repeat(top, run)), begin)
            total[target[edges][begin]] = top + np.log(sums)
        return total

    def expectation(self, scores: np.ndarray) -> tuple[np.ndarray, float]:
        """E step: the expected count of each piece (V,), and the log-likelihood in nats."""
        alpha = self.sweep(scores, self.j, self.start, self.end, self.first)
        beta = self.sweep(scores, -self.i, self.end, self.start, self.last)
        z = alpha[self.last]  # (W,)
        path = alpha[self.start] + scores[self.piece] + beta[self.end] - z[self.word]
        counts = np.exp(path) * self.weights[self.word]
        return np.bincount(self.piece, counts, len(scores)), float(self.weights @ z)


def maximisation(counts: np.ndarray) -> np.ndarray:
    """M step: log of the relative counts. A piece that is never used stays, but at e⁻⁵⁰."""
    return np.log(np.maximum(counts / counts.sum(), math.exp(-50)))


def spare_scores(pieces: list[str], scores: np.ndarray) -> np.ndarray:
    """The score of the best spelling of each piece by *other* pieces; −∞ for single characters."""
    table = dict(zip(pieces, scores.tolist(), strict=True))
    out = np.full(len(pieces), -np.inf)
    for k, piece in enumerate(pieces):
        n = len(piece)
        best = [0.0] + [-math.inf] * n
        for i in range(n):
            for j in range(i + 1, n + 1):
                if j - i < n and (score := table.get(piece[i:j])) is not None:
                    best[j] = max(best[j], best[i] + score)
        out[k] = best[n]
    return out


def train_pieces(words, alphabet: set[str], size: int, watch=None) -> list[tuple[str, float]]:
    """The `size` pieces of a Unigram model and their log-probabilities, most probable first.

    Kudo 2018, §3.2: (1) seeds, (2) EM, (3) drop the fifth of the pieces whose absence would cost
    least, Δ = c(x) · (log p(x) − best log p without x); single characters stay. Until `size`.
    """
    seeds = seed_pieces(words, limit=max(20_000, 8 * size))
    singles = Counter()
    for word, count in words.items():
        for char in word:
            singles[char] += count
    pieces = sorted(alphabet) + list(seeds)
    counts = np.array([max(singles[c], 1) for c in sorted(alphabet)] + list(seeds.values()), float)
    scores, lattices = maximisation(counts), Lattices(words, pieces)
    characters = sum(len(word) * count for word, count in words.items())
    stop = False
    while True:
        for _ in range(2):
            counts, likelihood = lattices.expectation(scores)
            if watch:
                stop = watch(len(pieces), -likelihood / characters) or stop
            scores = maximisation(counts)
        if len(pieces) <= size:
            return sorted(zip(pieces, scores.tolist(), strict=True), key=lambda p: (-p[1], p[0]))
        loss = counts * (scores - spare_scores(pieces, scores))
        loss[: len(alphabet)] = np.inf
        keep = size if stop else max(size, int(len(pieces) * 0.8))
        chosen = np.zeros(len(pieces), bool)
        chosen[np.argsort(-loss, kind="stable")[:keep]] = True
        lattices.keep(chosen)
        pieces = [piece for piece, kept in zip(pieces, chosen, strict=True) if kept]
        scores = maximisation(counts[chosen])
