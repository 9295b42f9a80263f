"""Text from files or the Hub to batches of token rows, in constant memory.

    source ──pieces──▶ tokenizer ──ids──▶ train, valid, test.bin ──memory map──▶ rows (B, T + 1)

A source is a UTF-8 text file, a folder of them, or `hf:OWNER/NAME` with a column `text`. A document
is a file, a row of the data set, or what stands between two lines `<|endoftext|>`.

The text is cut in three: most of it to train on, a part to choose the best weights by (valid), and
a part that is looked at once, in the end (test). Which is how the last number stays honest: who
tries many times and reports the best score on the same text reports some luck as well. Where there
are many documents none is cut; a single one is cut in three pieces.

What a step trains on is a function of (seed, step) alone. So a resumed run and any number of ranks
see the same rows, and there is no sampler state to save. This file is the same in every folder that
trains on text.

Key: B rows, T seq_len.
"""

import bisect
import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from options import UserError
from run import read_json, whole_file, write_json
from tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
PIECE = 1 << 20  # characters read at a time
PARTS = ("train", "valid", "test")
BORDERS = (0.9, 0.95)  # of the text, where valid and test begin
IGNORE = -100  # a target that does not count


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def file_pieces(file: Path) -> Iterator[tuple[str, bool]]:
    """The text of one file; Windows line ends are read as plain ones."""
    held, size = [], 0
    with open(file, encoding="utf-8") as stream:
        while line := stream.readline(PIECE):
            if line.strip() == SEPARATOR:
                yield "".join(held).removesuffix("\n"), True
                held, size = [], 0
                continue
            if size > PIECE:
                yield "".join(held), False
                held, size = [], 0
            held.append(line)
            size += len(line)
    yield "".join(held), True


def hub_pieces(name: str) -> Iterator[tuple[str, bool]]:
    """The column `text` of a Hub data set (split train), or of a local copy of one."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises many kinds
        raise UserError(f"cannot load --data hf:{name}: {error}") from None
    if "text" not in rows.column_names:
        raise UserError(f"hf:{name} has no column text, only {', '.join(rows.column_names)}")
    for row in rows:
        if not isinstance(row["text"], str):
            raise UserError(f"the column text of hf:{name} holds something else than text")
        yield row["text"], True


def files_of(path: Path) -> list[Path]:
    """The file, or all files below the folder, in the order of their names, without hidden ones."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        if path.exists():
            raise UserError(f"--data {path} can be read only once: save it as a file first")
        raise UserError(f"--data {path}: there is no such file or folder")
    files = [file for file in path.rglob("*") if file.is_file()]
    return sorted(f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts))


def read_pieces(source: str) -> Iterator[tuple[str, bool]]:
    """A source as (piece of text, whether its document ends here), a megabyte at a time.

    Raises UserError for what is missing, unreadable or not UTF-8.
    """
    if source.startswith("hf:"):
        yield from hub_pieces(source.removeprefix("hf:"))
        return
    for file in files_of(Path(source)):
        try:
            yield from file_pieces(file)
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (at byte {error.start})") from None


@dataclass(frozen=True)
class Source:
    """A measured source, and where its parts begin."""

    name: str
    n_char: int
    n_document: int

    @classmethod
    def measure(cls, name: str) -> "Source":
        """Read the source once, to count. Raises UserError if it is empty."""
        n_char = n_document = in_document = 0
        for text, ends in read_pieces(name):
            n_char, in_document = n_char + len(text), in_document + len(text)
            if ends and in_document:
                n_document, in_document = n_document + 1, 0
        if n_char < len(PARTS):
            raise UserError(f"--data {name} is empty: text to train on is needed")
        return cls(name, n_char, n_document)

    def pieces(self) -> Iterator[tuple[str, bool, str]]:
        """(text, whether its document ends here, part), each text whole within a part."""
        borders = [int(self.n_char * border) for border in BORDERS]
        whole = self.n_document >= len(PARTS)  # enough documents to leave each as it is
        done = begin = number = 0  # characters so far, and where and which this document is
        part = before = 0  # of this document, and of the one before
        for text, ends in read_pieces(self.name):
            if whole:
                left = max(1, self.n_document - number)  # the last two are never trained on
                part = max(bisect.bisect_right(borders, begin), len(PARTS) - left)
                part = min(part, before + 1)  # a long document must not leave a part empty
                yield text, ends, PARTS[part]
            else:
                yield from cut(text, ends, done, borders)
            done += len(text)
            if ends and done > begin:
                begin, number, before = done, number + 1, part

    def training_lines(self, limit: int = 10 * PIECE) -> Iterator[str]:
        """Lines of the first `limit` characters of training text: what a tokenizer is made from."""
        for text, _, part in self.pieces():
            if part != "train" or limit < 0:
                return
            yield from text.splitlines()
            limit -= len(text)


def cut(text: str, ends: bool, start: int, borders: list[int]) -> Iterator[tuple[str, bool, str]]:
    """The pieces of a text that begins at character `start`, as in `Source.pieces`."""
    inside = [border - start for border in borders if start < border < start + len(text)]
    for first, last in itertools.pairwise([0, *inside, len(text)]):
        part = bisect.bisect_right(borders, start + first)
        yield text[first:last], ends if last == len(text) else True, PARTS[part]


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────


def id_type(tokenizer: Tokenizer) -> type:
    """The smallest integer type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def encode(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int, str]]:
    """A source as (ids with bos and eos around each document, characters, part)."""
    fresh = True
    for text, ends, part in source.pieces():
        if fresh and not text:
            continue  # an empty document is none
        before = [tokenizer.bos_id] if fresh and tokenizer.bos_id is not None else []
        after = [tokenizer.eos_id] if ends and tokenizer.eos_id is not None else []
        ids = np.array(before + tokenizer.encode_text(text) + after, dtype=id_type(tokenizer))
        fresh = ends
        yield ids, len(text), part


class Tokens:
    """One part of a source as ids: (N,) uint16 or uint32, in memory or mapped from a file."""

    def __init__(self, ids: np.ndarray, n_char: int, tokenizer: Tokenizer):
        self.ids, self.n_char = ids, n_char
        ends = np.array([], dtype=np.int64)
        if tokenizer.eos_id is not None:
            ends = np.flatnonzero(ids[:-1] == tokenizer.eos_id) + 1
        self.bounds = np.concatenate(([0], ends, [len(ids)])).astype(np.int64)  # of the documents

    def refuse_too_short(self, seq_len: int) -> None:
        """UserError if there is not one row to train on."""
        if len(self.ids) <= seq_len:
            raise UserError(
                f"--data has {len(self.ids)} tokens to train on, --seq-len {seq_len} needs "
                f"{seq_len + 1} or more: take a longer text or a smaller --seq-len"
            )

    def training_rows(self, step: int, batch_size: int, seq_len: int, seed: int) -> Tensor:
        """The rows of one step, (B, T + 1) int64: a function of its arguments alone."""
        n_row = len(self.row_starts(seq_len, 0))
        place = range(step * batch_size, (step + 1) * batch_size)
        starts = [self.epoch(i // n_row, seq_len, seed)[i % n_row] for i in place]
        rows = np.stack([self.ids[s : s + seq_len + 1] for s in starts])
        return torch.from_numpy(rows.astype(np.int64))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - there are three Tokens in a program
    def epoch(self, number: int, seq_len: int, seed: int) -> np.ndarray:
        """Where the rows of an epoch start, in the order in which they are trained on."""
        dice = np.random.default_rng((seed, number))
        return dice.permutation(self.row_starts(seq_len, int(dice.integers(seq_len))))

    def row_starts(self, seq_len: int, shift: int) -> np.ndarray:
        """Where the rows of an epoch start: together they cover every token.

        One row begins where a document begins, since a model that has not seen who the story is
        about cannot know it. A document that is longer has more of them, `shift` tokens and then
        seq_len tokens apart. A row that reaches beyond the end of its document goes on in the next.
        shift, from 0 to seq_len − 1, differs by epoch, so that rows are cut in other places.
        """
        begins, lengths = self.bounds[:-1], np.diff(self.bounds)
        n_more = np.where(lengths - 1 > seq_len, -(-(lengths - 1) // seq_len), 0)
        first = np.repeat(np.cumsum(n_more) - n_more, n_more)
        number = np.arange(n_more.sum()) - first  # of a further row in its document
        more = np.repeat(begins, n_more) + number * seq_len + shift
        starts = np.concatenate((begins, more))
        return np.minimum(starts, len(self.ids) - 1 - seq_len)

    def evaluation_rows(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it once, (b, T) inputs and targets: each document from its start, row by row.

        Rows do not overlap, and the end of a document's last row is filled with IGNORE targets.
        """
        starts = [
            (start, min(start + seq_len, end - 1))
            for begin, end in itertools.pairwise(self.bounds.tolist())
            for start in range(begin, end - 1, seq_len)
        ]
        for i in range(0, len(starts), batch_size):
            inputs = np.zeros((len(starts[i : i + batch_size]), seq_len), dtype=np.int64)
            targets = np.full_like(inputs, IGNORE)
            for row, (start, end) in enumerate(starts[i : i + batch_size]):
                inputs[row, : end - start] = self.ids[start:end]
                targets[row, : end - start] = self.ids[start + 1 : end + 1]
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


# ── Files of a run ────────────────────────────────────────────────────────────────────────────────


def write_tokens(source: Source, tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """Write the ids of each part, and how many characters they stand for, into `folder`.

    UserError if there are too few to train on, or none in one of the parts.
    """
    counts = {part: {"ids": 0, "chars": 0} for part in PARTS}
    with contextlib.ExitStack() as stack:
        paths = {p: stack.enter_context(whole_file(folder / f"{p}.bin")) for p in PARTS}
        streams = {p: stack.enter_context(open(paths[p], "wb")) for p in PARTS}
        for ids, n_char, part in encode(source, tokenizer):
            streams[part].write(ids.tobytes())  # unlike ids.tofile it complains of a full disk
            counts[part]["ids"] += len(ids)
            counts[part]["chars"] += n_char
    if min(count["ids"] for count in counts.values()) < 2:
        raise UserError(f"--data {source.name} is too short: nothing is left to test on")
    write_json(folder / "tokens.json", counts)
    load_tokens(folder, tokenizer)["train"].refuse_too_short(seq_len)


def load_tokens(folder: Path, tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The three parts by name, mapped from the files that `write_tokens` left."""
    counts, dtype = read_json(folder / "tokens.json"), id_type(tokenizer)
    try:
        parts = {}
        for part in PARTS:
            n_id, n_char = counts[part]["ids"], counts[part]["chars"]
            file = folder / f"{part}.bin"
            ids = np.memmap(file, dtype, "r")
            if type(n_id) is not int or type(n_char) is not int or n_id < 2 or n_char < 1:
                raise ValueError(f"{n_id} ids of {n_char} characters cannot be")
            if len(ids) != n_id or ids.max() >= tokenizer.vocab_size:
                raise ValueError(f"{file.name} does not hold {n_id} ids of this tokenizer")
            parts[part] = Tokens(ids, n_char, tokenizer)
        return parts
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokens of the run in {folder} are damaged: {error}") from None


def tokens_of(source: Source, tokenizer: Tokenizer, wanted: str) -> Tokens:
    """One part alone, in memory."""
    found = [(ids, n_char) for ids, n_char, part in encode(source, tokenizer) if part == wanted]
    if sum(len(ids) for ids, _ in found) < 2:
        raise UserError(f"--data {source.name} is too short: it has no {wanted} part")
    ids, sizes = zip(*found, strict=True)
    return Tokens(np.concatenate(ids), sum(sizes), tokenizer)
