"""Texts with labels: from TSV files to batches of rows of word ids.

A line is a text, a tab, and its label; a third column, if there is one, is the probability that the
label is 1, which only who made the text can know. --data is a file, or a folder with train.tsv,
dev.tsv (or valid.tsv) and test.tsv, as SST-2 comes in. One file alone is cut: of twenty lines, the
last two are to choose by and to test on.

Key: B rows, T words of the longest row.
"""

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from options import UserError
from run import read_json, whole_file, write_json

FILLING, UNKNOWN = 0, 1  # ids of what fills short rows up, and of words that were never seen
PARTS = {"train": ("train.tsv",), "valid": ("dev.tsv", "valid.tsv"), "test": ("test.tsv",)}


@dataclass(frozen=True)
class Vocabulary:
    """The words that have an id, and the names of the labels."""

    words: tuple[str, ...]
    classes: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return len(self.words) + 2

    @functools.cached_property
    def id_of(self) -> dict[str, int]:
        return {word: i + 2 for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """The ids of the words of a text; UNKNOWN for one without words."""
        return [self.id_of.get(word, UNKNOWN) for word in words_of(text)] or [UNKNOWN]

    def save(self, folder: Path) -> None:
        write_json(folder / "tokenizer_words.json", {"words": self.words, "classes": self.classes})

    @classmethod
    def load(cls, folder: Path) -> "Vocabulary":
        """From a run. UserError if it is damaged."""
        saved = read_json(folder / "tokenizer_words.json")
        lists = [saved.get(name) for name in ("words", "classes")]
        for one in lists:
            good = isinstance(one, list) and all(isinstance(word, str) for word in one)
            if not good or len(set(one)) < len(one) or not one:
                raise UserError(f"{folder}/tokenizer_words.json is damaged: words are missing")
        return cls(*map(tuple, lists))


def words_of(text: str) -> list[str]:
    """The words of a text in small letters; a sign such as a comma is a word of its own."""
    return re.findall(r"[\w'’]+|[^\w\s]", text.lower())


@dataclass(frozen=True, eq=False)
class Reviews:
    """One part: ids of all words in a row, the length of each text, labels, P(label 1) or NaN."""

    ids: np.ndarray  # (Σ lengths,)
    lengths: np.ndarray  # (N,)
    labels: np.ndarray  # (N,)
    p: np.ndarray  # (N,)

    def __len__(self) -> int:
        return len(self.lengths)

    @functools.cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.lengths)

    @property
    def bayes(self) -> float | None:
        """The accuracy to expect of who knows every P(label 1); None where nobody does."""
        return None if np.isnan(self.p).any() else float(np.maximum(self.p, 1 - self.p).mean())

    def rows(self, which: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Ids (B, T) filled up with FILLING, lengths (B,) and labels (B,) of some texts."""
        lengths = self.lengths[which]
        ids = np.full((len(which), lengths.max()), FILLING, dtype=np.int64)
        for row, (end, length) in enumerate(zip(self.ends[which], lengths, strict=True)):
            ids[row, :length] = self.ids[end - length : end]
        found = (ids, lengths.astype(np.int64), self.labels[which].astype(np.int64))
        return tuple(torch.from_numpy(one) for one in found)

    def training_rows(self, step: int, n_row: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of one step: a function of the arguments alone; each text once an epoch."""
        places = range(step * n_row, (step + 1) * n_row)
        which = [self.epoch(i // len(self), seed)[i % len(self)] for i in places]
        return self.rows(np.array(which))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - there are three in a program
    def epoch(self, number: int, seed: int) -> np.ndarray:
        return np.random.default_rng((seed, number)).permutation(len(self))


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read_lines(file: Path) -> list[tuple[str, str, float]]:
    """(text, label, P(label 1) or NaN) of each line. UserError names the line that is none."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (at byte {error.start})") from None
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t")
        try:
            p = float(columns[2]) if len(columns) > 2 else float("nan")
            if len(columns) not in (2, 3) or not columns[1].strip() or p < 0 or p > 1:
                raise ValueError
        except ValueError:
            raise UserError(f"{file}, line {number}: a text, a tab and a label expected") from None
        found.append((columns[0], columns[1].strip(), p))
    if not found:
        raise UserError(f"{file} is empty: texts with labels are needed")
    return found


def read(name: str) -> dict[str, list[tuple[str, str, float]]]:
    """The three parts of --data. UserError if one is missing or the labels do not fit."""
    path = data.REVIEWS if name == "reviews" else Path(name)
    if name.startswith("hf:"):
        raise UserError(f"--data {name}: for sentiment save it as TSV files, text, tab and label")
    if path.is_dir():
        parts = {part: read_lines(first_of(path, names)) for part, names in PARTS.items()}
    elif path.is_file():
        parts = cut(read_lines(path), path)
    else:
        raise UserError(f"--data {name}: there is no such file or folder")
    known = {label for _, label, _ in parts["train"]}
    for part, lines in parts.items():
        if other := {label for _, label, _ in lines} - known:
            raise UserError(f"--data {name}: label {min(other)!r} of {part} is not in train")
    if len(known) < 2:
        raise UserError(f"--data {name}: all labels are {min(known)!r}, there is nothing to learn")
    return parts


def first_of(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of these files that is there."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"--data {folder}: there is no {names[0]} in it")


def cut(lines: list, path: Path) -> dict[str, list]:
    """The parts of a single file."""
    if len(lines) < 20:
        raise UserError(f"{path} has {len(lines)} texts: 20 or more are needed")
    part_of = ["train"] * 18 + ["valid", "test"]
    parts: dict[str, list] = {part: [] for part in PARTS}
    for i, line in enumerate(lines):
        parts[part_of[i % 20]].append(line)
    return parts


def make_vocabulary(lines: list[tuple[str, str, float]], least: int) -> Vocabulary:
    """The words that come `least` times or more, frequent ones first, and the labels."""
    counts = Counter(word for text, _, _ in lines for word in words_of(text))
    words = sorted((w for w, n in counts.items() if n >= least), key=lambda w: (-counts[w], w))
    if not words:
        raise UserError(f"--min-count {least}: no word is that frequent")
    return Vocabulary(tuple(words), tuple(sorted({label for _, label, _ in lines})))


def encode(lines: list[tuple[str, str, float]], vocabulary: Vocabulary) -> Reviews:
    """Texts as ids."""
    ids = [vocabulary.encode(text) for text, _, _ in lines]
    return Reviews(
        ids=np.concatenate([np.array(one, dtype=np.int32) for one in ids]),
        lengths=np.array([len(one) for one in ids]),
        labels=np.array([vocabulary.classes.index(label) for _, label, _ in lines]),
        p=np.array([p for _, _, p in lines]),
    )


def save(parts: dict[str, Reviews], folder: Path) -> None:
    """Write reviews.npz."""
    arrays = {f"{part}_{name}": value for part, one in parts.items()
              for name, value in vars(one).items() if isinstance(value, np.ndarray)
              and name != "ends"}  # fmt: skip
    with whole_file(folder / "reviews.npz") as part, open(part, "wb") as stream:
        np.savez(stream, **arrays)


def load(folder: Path, vocabulary: Vocabulary) -> dict[str, Reviews]:
    """What `save` wrote. UserError if it is damaged."""
    file = folder / "reviews.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            parts = {
                part: Reviews(*(arrays[f"{part}_{n}"] for n in ("ids", "lengths", "labels", "p")))
                for part in PARTS
            }
        for one in parts.values():
            sizes = {len(one.lengths), len(one.labels), len(one.p)}
            if len(sizes) > 1 or one.lengths.sum() != len(one.ids) or one.lengths.min() < 1:
                raise ValueError("its lengths do not fit")
            if one.ids.max() >= vocabulary.vocab_size or one.labels.max() >= len(
                vocabulary.classes
            ):
                raise ValueError("it is of other words")
    except Exception as error:  # a damaged zip makes numpy raise all kinds
        raise UserError(f"{file} is damaged or missing: {error}") from None
    return parts
