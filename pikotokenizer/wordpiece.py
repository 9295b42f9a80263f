"""WordPiece: the longest piece that fits, then the longest that goes on from there.

    Schuster & Nakajima 2012, "Japanese and Korean Voice Search"; Wu et al. 2016, arXiv:1609.08144
    (§4.1); BERT: Devlin et al. 2019, arXiv:1810.04805 (§3).

The papers merge what raises the likelihood of the training text most, and print no formula. Under
independent symbols one occurrence of ab gains log p(ab) − log p(a) p(b) by being joined; the common
reading of the papers, and ours, takes the pair of the highest gain an occurrence,

    score(a, b) = count(ab) / (count(a) · count(b))

so a pair of rare symbols that always meet beats a frequent pair that often parts. (The "WordPiece"
trainer of Hugging Face's tokenizers is its BPE trainer and gives BPE's vocabulary.) A piece inside
a word is written ##piece.

Left out: BERT's basic tokenizer's never_split list; training on subsamples.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np

from base import AddedToken, Pipeline, Tokenizer, check_size, check_special, count_words

PREFIX = "##"


def best_naive(words: dict[str, int], floor: int) -> str | None:
    """The definition of one step: recount, then the best score; ties to the lowest ids."""
    symbols: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for word, count in words.items():
        for i, symbol in enumerate(word):
            symbols[symbol] += count
            if i + 1 < len(word):
                pairs[word[i : i + 2]] += count
    scores = {p: n / (symbols[p[0]] * symbols[p[1]]) for p, n in pairs.items() if n >= floor}
    return min(scores, key=lambda p: (-scores[p], p)) if scores else None


class PairTable:
    """The counts of symbols and pairs as arrays, so that every score is seen at every step.

    A score rises when a symbol gets rarer, which a heap would miss; one numpy division over all
    pairs costs less than keeping track. A pair is a string of two chr(id), as in bpe.py.
    """

    def __init__(self, words: dict[str, int], size: int):
        self.texts, self.weights = list(words), list(words.values())
        self.symbols = np.zeros(size, np.float64)  # (V,) count of each symbol
        self.rows: dict[str, int] = {}  # pair → its row in the arrays below
        self.where: list[set[int]] = []  # the words that hold the pair
        self.counts, self.left, self.right = (np.zeros(1024, t) for t in (float, int, int))
        for w, text in enumerate(self.texts):
            self.add(w, text, self.weights[w])

    def add(self, w: int, text: str, weight: int) -> None:
        """Counts word `w` in (weight > 0) or out (weight < 0)."""
        for symbol in text:
            self.symbols[ord(symbol)] += weight
        for pair in map(str.__add__, text, text[1:]):
            row = self.rows.get(pair)
            row = self.new_row(pair) if row is None else row
            self.counts[row] += weight
            self.where[row].add(w)

    def new_row(self, pair: str) -> int:
        row = self.rows[pair] = len(self.where)
        self.where.append(set())
        if row == len(self.counts):
            for name in ("counts", "left", "right"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old)]))
        self.left[row], self.right[row] = map(ord, pair)
        return row

    def best(self, floor: int) -> str | None:
        """The pair of the highest score among those that occur `floor` times; ties: lowest ids."""
        n = len(self.where)
        counts, left, right = self.counts[:n], self.left[:n], self.right[:n]
        live = np.flatnonzero(counts >= floor)
        if not len(live):
            return None
        scores = counts[live] / (self.symbols[left[live]] * self.symbols[right[live]])
        ties = live[scores == scores.max()]
        return min(chr(left[row]) + chr(right[row]) for row in ties)

    def merge(self, pair: str, new: str) -> None:
        """Replaces the pair by `new` in the words that hold it."""
        for w in list(self.where[self.rows[pair]]):
            text, weight = self.texts[w], self.weights[w]
            merged = text.replace(pair, new)
            if merged != text:
                self.add(w, text, -weight)
                self.texts[w] = merged
                self.add(w, merged, weight)


class WordPiece(Tokenizer):
    """A WordPiece tokenizer. `WordPiece.train(...)` makes one; formats.py reads and writes them.

    A word that cannot be covered, or is longer than `longest` characters, is one `unk`.
    """

    algorithm = "wordpiece"

    def __init__(
        self,
        vocab: dict[str, int],
        pipeline: Pipeline,
        unk: str = "[UNK]",
        prefix: str = PREFIX,
        longest: int = 100,
    ):
        if unk not in vocab:
            raise ValueError(f"the unknown token {unk!r} is not in the vocabulary")
        self.unk = self.unk_piece = unk
        self.prefix, self.longest = prefix, longest
        self.longest_piece = max(map(len, vocab))
        super().__init__(vocab, pipeline)
        # text never becomes a special token: those that may were cut out before
        self.usable = {piece: i for piece, i in vocab.items() if i not in self.special_ids}

    def word_ids(self, word: str) -> list[int]:
        return [i for i, _, _ in self.word_spans(word)]

    def word_spans(self, word: str) -> list[tuple[int, int, int]]:
        """Greedy longest match from the left: (id, start, end)."""
        unknown = [(self.vocab[self.unk], 0, len(word))]
        if len(word) > self.longest:
            return unknown
        spans, start = [], 0
        while start < len(word):
            prefix = self.prefix if start else ""
            for end in range(min(len(word), start + self.longest_piece), start, -1):
                i = self.usable.get(prefix + word[start:end])
                if i is not None:
                    break
            else:
                return unknown
            spans.append((i, start, end))
            start = end
        return spans

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        special_tokens: Iterable[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        lowercase: bool = False,
        min_frequency: int = 2,
        watch: Callable[[int, str, int], bool | None] | None = None,
    ) -> "WordPiece":
        """Learns `vocab_size` tokens from a text or from an iterable of documents.

        lowercase: BERT's "uncased" normalizer (also strips accents). min_frequency: a pair seen
        once has the highest score there is, 1, and teaches nothing; so rarer pairs are not merged.
        Raises ValueError if `vocab_size` is below the special tokens and the alphabet.
        """
        special = list(dict.fromkeys([*special_tokens, "[UNK]"]))
        pipeline = bert_pipeline(lowercase)
        pipeline.added = [AddedToken(i, token) for i, token in enumerate(special)]
        index = {token: i for i, token in enumerate(special)}
        if {"[CLS]", "[SEP]"} <= index.keys():
            pipeline.prefix, pipeline.suffix = (index["[CLS]"],), (index["[SEP]"],)
        counts = count_words(cls(index, pipeline), text)
        symbols = {w: [w[0], *(PREFIX + c for c in w[1:])] for w in counts}
        alphabet = sorted({s for parts in symbols.values() for s in parts})
        check_special(special, alphabet)
        pieces = special + alphabet
        check_size(vocab_size, len(pieces), "the special tokens and the alphabet")
        ids = {piece: chr(i) for i, piece in enumerate(pieces)}
        words = {"".join(map(ids.__getitem__, symbols[w])): n for w, n in counts.items()}
        check_special(special, grow(pieces, words, vocab_size, min_frequency, watch))
        return cls({piece: i for i, piece in enumerate(pieces)}, pipeline)


def grow(pieces: list[str], words: dict[str, int], size: int, floor: int, watch=None) -> set[str]:
    """Appends merged pieces until there are `size`, or no pair is left that occurs so often.

    Returns what the merges spell.
    """
    size = min(size, len(pieces) + sum(map(len, words)))  # a merge shortens a word
    table, made = PairTable(words, size), set()
    known = {piece: i for i, piece in enumerate(pieces)}
    while len(pieces) < size and (pair := table.best(max(floor, 1))):
        text = pieces[ord(pair[0])] + pieces[ord(pair[1])].removeprefix(PREFIX)
        count = int(table.counts[table.rows[pair]])
        made.add(text)
        if text not in known:
            known[text] = len(pieces)
            pieces.append(text)
            if watch and watch(known[text], text, count):
                break
        table.merge(pair, chr(known[text]))
    return made


def bert_pipeline(lowercase: bool) -> Pipeline:
    """BERT's basic tokenizer before, ## joined and spaces put back after."""
    return Pipeline(
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": lowercase,
        },
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
    )
