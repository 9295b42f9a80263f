"""Unigram by looking words up, although each word's best spelling may depend on all before it.

SentencePiece finds the best path through a whole text, and adds up scores in 32 bits on the way. A
path of 10,000 words has a sum near −80,000, where the next larger number is 0.0078 away. So two
spellings of a word whose scores differ by less than that may come out either way, depending on the
sum so far. To give the same ids, and still not search again for every word:

1. Each stretch between two spaces is searched once, alone. Its *margin* says how far the nearest
   rival of its best path came. Rounding cannot add up to more than (characters + 1) · step, where
   step is the distance of neighbouring numbers at the sum so far. For nearly all stretches the
   margin is larger even at the largest sum there is: these are `safe` wherever they stand.
2. For the others the sum so far must be known, exactly if need be: the scores of all pieces before
   are added in 32 bits by numpy, in order, from the last place where the sum was known.
3. Between two powers of two the step is the same and every score is rounded to a multiple of it, so
   the best path is the same as well, and is remembered for that power.

All stretches lie behind one another in arrays, so that a text is a list of row numbers and its ids
are gathered at once.

Dimension key: R stretches known, N stretches of the text.

Left out: texts in which a stretch does not stand for itself (a literal ▁ at an end, or a character
that becomes a space there); `ids` then returns None and the whole text is searched.
"""

import math
import re
from functools import lru_cache
from itertools import chain

import numpy as np

from decoders import MARK

AFTER_SPACE = re.compile(r" ( *[^ ]*)")
CHARACTERS = 1 << 22  # of all stretches that are remembered


def step_at(total: float, bits: int) -> float:
    """How far neighbouring numbers of so many bits are apart near `total`."""
    return 2.0 ** (math.frexp(max(abs(total), 1.0))[1] - bits)


class Table:
    """What is known of stretches, (R,) each; their ids and scores lie in one row for all."""

    def __init__(self):
        self.row: dict[str, int] = {}
        self.words: list[str] = []
        self.characters = 0
        self.size = np.zeros(0, np.int64)  # characters
        self.score = np.zeros(0)
        self.margin = np.zeros(0)  # for each character that may be rounded
        self.ids, self.id_begin = np.zeros(0, np.int64), np.zeros(1, np.int64)
        self.gains, self.gain_begin = np.zeros(0), np.zeros(1, np.int64)

    def add(self, parts: list[str], words: list[str], found: list[tuple]) -> None:
        """found: (ids, scores of the pieces, score, margin) of each word."""
        first = len(self.words)
        sizes = np.array([*map(len, words)], np.int64)
        self.size = np.append(self.size, sizes)
        self.score = np.append(self.score, [score for _, _, score, _ in found])
        self.margin = np.append(self.margin, [margin for *_, margin in found])
        for name, k in (("id", 0), ("gain", 1)):
            flat, begin = name + "s", name + "_begin"
            new = np.array([*chain.from_iterable(f[k] for f in found)], getattr(self, flat).dtype)
            setattr(self, flat, np.append(getattr(self, flat), new))
            ends = getattr(self, begin)[-1] + np.cumsum([len(f[k]) for f in found], dtype=np.int64)
            setattr(self, begin, np.append(getattr(self, begin), ends))
        self.words += words
        self.characters += int(sizes.sum())
        self.row.update((part, first + i) for i, part in enumerate(parts))  # last: others may read


def gathered(flat: np.ndarray, begin: np.ndarray, rows: np.ndarray):
    """The entries of `rows` behind one another, and where each begins (one more than there are)."""
    count = begin[rows + 1] - begin[rows]
    ends = np.concatenate([[0], np.cumsum(count)])
    return flat[np.repeat(begin[rows] - ends[:-1], count) + np.arange(ends[-1])], ends


class Running:
    """`ids(text)` of a Unigram model with SentencePiece's normalizer and a ▁ before the text."""

    def __init__(self, model, charsmap, collapse: bool, rebase: float):
        self.model, self.charsmap, self.collapse, self.rebase = model, charsmap, collapse, rebase
        self.kind, self.bits = (np.float32, 24) if model.single else (np.float64, 53)
        self.unknown = {model.unk_id, -1}
        self.gain_of = lru_cache(None)(model.gain)
        self.table = Table()
        self.at_power: dict[tuple[str, int], tuple] = {}

    def ids(self, text: str) -> list[int] | None:
        """The ids of a whole text; None if a stretch does not stand for itself."""
        parts = text.split(" ") if self.collapse else AFTER_SPACE.findall(" " + text)
        table = self.table
        try:
            rows = np.fromiter(map(table.row.__getitem__, parts), np.int64, len(parts))  # (N,)
        except KeyError:
            if (table := self.learn(parts)) is None:
                return None
            rows = np.fromiter(map(table.row.__getitem__, parts), np.int64, len(parts))
        ids, begin = gathered(table.ids, table.id_begin, rows)
        ids = ids.tolist()
        for n, other in reversed(self.corrections(table, rows)):
            ids[begin[n] : begin[n + 1]] = other
        return ids

    def learn(self, parts: list[str]) -> Table | None:
        """The table with all these stretches; None if one does not stand for itself."""
        table = self.table
        if table.characters > CHARACTERS:
            table, self.at_power = Table(), {}
        new = [part for part in dict.fromkeys(parts) if part not in table.row]
        words = [*map(self.word, new)]
        if None in words:
            return None
        table.add(new, words, [self.search(word) for word in words])
        self.table = table
        return table

    def word(self, part: str) -> str | None:
        """A stretch as SentencePiece normalizes it, with the ▁ before; None if not alone."""
        text = self.charsmap(part)
        if self.collapse:
            text = re.sub(" +", " ", text.strip(" "))
            if not text:
                return ""
        if text.startswith(MARK) or text.endswith(MARK) or (text != part and text.endswith(" ")):
            return None
        return MARK + text.replace(" ", MARK)

    def search(self, word: str, origin: float | None = None) -> tuple:
        """(ids, scores of the pieces, their sum, margin for each character), after a sum `origin`.

        Without one nothing is rounded, so the path is sure only if the margin is above 0.
        """
        if origin is None:
            (path, margin), score = self.model.quick_viterbi(word)
        else:
            path, score, margin = self.model.viterbi(word, origin)
            score -= origin
        ids = [i for i, _, _ in path]
        gains = [*map(self.gain_of, ids)]
        if self.unknown.intersection(ids):
            ids = [i for i, _, _ in self.model.spelled(word, path)]
        error = step_at(score, self.bits)  # of the search itself
        return ids, gains, score, min(margin, 2.0**60) / (len(word) + 1) - error

    def corrections(self, table: Table, rows: np.ndarray) -> list[tuple[int, list[int]]]:
        """(n, its ids) for the stretches of a text that the sum before them spells otherwise."""
        rough = np.cumsum(table.score[rows])  # after each, nearly
        reach = np.maximum(1.0 - 1.01 * rough, 1.0)
        if self.model.single:
            reach = np.minimum(reach, -self.rebase - table.score[rows])
        unsure = np.flatnonzero(table.margin[rows] <= np.exp2(np.frexp(reach)[1] - self.bits))
        if not len(unsure):
            return []
        sums = Sums(self, table, rows)
        exact, here, found = 0.0, 0, []
        for n in unsure.tolist():
            exact = sums.after(here, n, exact)
            ids, gains, _, _ = self.at(table.words[rows[n]], exact)
            found.append((n, ids))
            exact, here = sums.with_gains(n, gains, exact), n + 1
        return found

    def at(self, word: str, exact: float) -> tuple:
        """`search`, remembered where the next power of two is far enough away."""
        power = math.frexp(exact)[1]
        lowest = exact + len(word) * self.model.unk_score
        if math.frexp(lowest)[1] != power or (self.model.single and lowest < self.rebase):
            return self.search(word, exact)
        if (word, power) not in self.at_power:
            found = self.search(word, exact)
            if self.ties(word, exact):
                return found
            self.at_power[word, power] = found
        return self.at_power[word, power]

    def ties(self, word: str, exact: float) -> bool:
        """Whether a score lies in the middle of two multiples of the step: then the sum decides."""
        step = step_at(exact, self.bits)
        edges = chain.from_iterable(self.model.edges(word, start) for start in range(len(word)))
        return any((gain / step) % 1 == 0.5 for _, _, gain in edges)


class Sums:
    """The sum of scores between stretches of one text, rounded at every piece."""

    def __init__(self, running: Running, table: Table, rows: np.ndarray):
        self.model, self.rebase, self.kind = running.model, running.rebase, running.kind
        self.words, self.rows, self.size = table.words, rows, table.size[rows]
        self.gains, self.begin = gathered(table.gains, table.gain_begin, rows)

    def after(self, start: int, stop: int, exact: float) -> float:
        """The sum after the stretches from `start` to before `stop`, from the sum before them."""
        if start == stop:
            return exact
        gains = self.gains[self.begin[start] : self.begin[stop]]
        total = self.added(gains, exact)
        longest = int(self.size[start:stop].max())
        if not self.model.single or total + longest * self.model.unk_score >= self.rebase:
            return total
        if stop - start == 1:  # the sum may start over inside
            return self.model.viterbi(self.words[self.rows[start]], exact)[1]
        half = (start + stop) // 2
        return self.after(half, stop, self.after(start, half, exact))

    def with_gains(self, n: int, gains: list[float], exact: float) -> float:
        """The sum after stretch `n`, if its pieces have these scores."""
        total = self.added(gains, exact)
        if not self.model.single or total + self.size[n] * self.model.unk_score >= self.rebase:
            return total
        return self.model.viterbi(self.words[self.rows[n]], exact)[1]

    def added(self, gains, exact: float) -> float:
        return float(np.add.accumulate(np.concatenate([[exact], gains]).astype(self.kind))[-1])
