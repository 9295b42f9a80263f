"""Text from files or the Hub to batches of token rows, in constant memory.

    source ──pieces──▶ tokenizer ──ids──▶ train.bin, valid.bin ──memory map──▶ (B, T + 1) rows

A source is a UTF-8 text file, a folder of them, `hf:OWNER/NAME` with a column `text`, or `stories`,
the corpus that ships with this folder. A document
is a file, a row of the data set, or what stands between two lines `<|endoftext|>`. The last tenth
of the characters is held out: of one document its end, of several the last ones, whole.

Documents are packed one after the other, so no row is padding. A training row begins where its
document begins if that is less than a row away, else anywhere: a model that has not seen who the
story is about cannot know it. What a step trains on is a function of (seed, step) alone. So a
resumed run and any number of ranks see the same rows, and there is no sampler state to save.

Key: B rows, T seq_len.
"""

import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from run import UserError, whole_file, write_json
from tokenizer import Tokenizer

STORIES = Path(__file__).resolve().parent / "data" / "stories.txt"
FLOOR = STORIES.with_name("floor.json")
SEPARATOR = "<|endoftext|>"
PIECE = 1 << 20  # characters read at a time
HELD_OUT = 0.1
IGNORE = -100  # a target that does not count


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
        yield row["text"], True


def read_pieces(source: str) -> Iterator[tuple[str, bool]]:
    """A source as (piece of text, whether its document ends here), a megabyte at a time.

    Raises UserError for what is missing, unreadable or not UTF-8.
    """
    if source.startswith("hf:"):
        yield from hub_pieces(source.removeprefix("hf:"))
        return
    path = STORIES if source == "stories" else Path(source)
    if not path.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
    for file in files:
        try:
            yield from file_pieces(file)
        except OSError as error:
            raise UserError(f"cannot read --data {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 text (at byte {error.start})") from None


@dataclass(frozen=True)
class Source:
    """A measured source and the line between training and held-out text."""

    name: str
    n_char: int
    n_document: int

    @classmethod
    def measure(cls, name: str) -> "Source":
        """Read the source once, to count. Raises UserError if it is empty."""
        n_char = n_document = in_document = 0
        for text, ends in read_pieces(name):
            n_char, in_document = n_char + len(text), in_document + len(text)
            if ends:
                n_document, in_document = n_document + (in_document > 0), 0
        if n_char < 2:
            raise UserError(f"--data {name} is empty: text to train on is needed")
        return cls(name, n_char, n_document)

    def pieces(self) -> Iterator[tuple[str, bool, bool]]:
        """As `read_pieces`, and whether the piece is held out. A lone document is cut in two."""
        border = int(self.n_char * (1 - HELD_OUT))
        done = begin = number = 0  # characters so far, and where and which this document is
        for text, ends in read_pieces(self.name):
            if self.n_document > 1:
                held_out = begin >= border or number == self.n_document - 1
            else:
                held_out = done >= border
                if not held_out and done + len(text) > border:
                    yield text[: border - done], True, False
                    text, done, held_out = text[border - done :], border, True
            yield text, ends, held_out
            done += len(text)
            if ends and done > begin:
                begin, number = done, number + 1

    def training_lines(self, limit: int = 10 * PIECE) -> Iterator[str]:
        """Lines of the first `limit` characters of training text: what a tokenizer is made from."""
        for text, _, held_out in self.pieces():
            if not held_out:
                yield from text.splitlines()
                limit -= len(text)
            if held_out or limit < 0:
                return


def id_type(tokenizer: Tokenizer) -> type:
    """The smallest integer type that holds every id."""
    return np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32


def encode(source: Source, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int, bool]]:
    """A source as (ids with bos and eos around each document, characters, whether held out)."""
    fresh = True
    for text, ends, held_out in source.pieces():
        if fresh and not text:
            continue  # an empty document is none
        before = [tokenizer.bos_id] if fresh and tokenizer.bos_id is not None else []
        after = [tokenizer.eos_id] if ends and tokenizer.eos_id is not None else []
        ids = np.array(before + tokenizer.encode_text(text) + after, dtype=id_type(tokenizer))
        fresh = ends
        yield ids, len(text), held_out


class Tokens:
    """One side of a source as ids: (N,) uint16 or uint32, in memory or mapped from a file."""

    def __init__(self, ids: np.ndarray, n_char: int, tokenizer: Tokenizer):
        self.ids, self.n_char = ids, n_char
        ends = (
            np.flatnonzero(ids[:-1] == tokenizer.eos_id) + 1 if tokenizer.eos_id is not None else []
        )
        self.begins = np.concatenate(([0], ends)).astype(np.int64)  # of the documents

    def n_row(self, seq_len: int) -> int:
        """Rows of an epoch. UserError if there are none."""
        n_row = (len(self.ids) - 1) // seq_len - 1  # one less: room for the shift
        if n_row < 1:
            raise UserError(
                f"--data has {len(self.ids)} tokens to train on, --seq-len {seq_len} needs "
                f"{2 * seq_len + 1} or more: take a longer text or a smaller --seq-len"
            )
        return n_row

    def training_rows(self, step: int, batch_size: int, seq_len: int, seed: int) -> Tensor:
        """The rows of one step, (B, T + 1) int64: a function of its arguments alone.

        Each epoch lays a grid with a random shift over the ids and shuffles its cells.
        """
        n_row = self.n_row(seq_len)
        place = np.arange(step * batch_size, (step + 1) * batch_size)
        starts = [self.epoch(i // n_row, n_row, seq_len, seed)[i % n_row] for i in place]
        begins = self.begins[np.searchsorted(self.begins, starts, side="right") - 1]
        starts = np.where(np.subtract(starts, begins) < seq_len, begins, starts)
        rows = np.stack([self.ids[s : s + seq_len + 1] for s in starts])
        return torch.from_numpy(rows.astype(np.int64))

    @functools.lru_cache(maxsize=2)  # noqa: B019 - there are two Tokens in a program
    def epoch(self, number: int, n_row: int, seq_len: int, seed: int) -> np.ndarray:
        """Where the rows of an epoch start, in their order, before they snap to documents."""
        dice = np.random.default_rng((seed, number))
        return dice.permutation(n_row) * seq_len + dice.integers(seq_len)

    def evaluation_rows(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All of it once, (b, T) inputs and targets: each document from its start, row by row.

        Rows do not overlap, and the end of a document's last row is filled with IGNORE targets.
        """
        bounds = [*self.begins.tolist(), len(self.ids)]
        starts = [
            (start, min(start + seq_len, end - 1))
            for begin, end in itertools.pairwise(bounds)
            for start in range(begin, end - 1, seq_len)
        ]
        for i in range(0, len(starts), batch_size):
            inputs = np.zeros((len(starts[i : i + batch_size]), seq_len), dtype=np.int64)
            targets = np.full_like(inputs, IGNORE)
            for row, (start, end) in enumerate(starts[i : i + batch_size]):
                inputs[row, : end - start] = self.ids[start:end]
                targets[row, : end - start] = self.ids[start + 1 : end + 1]
            yield torch.from_numpy(inputs), torch.from_numpy(targets)


def write_tokens(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    """Write train.bin and valid.bin, and how many characters they stand for, into `folder`."""
    n_char = [0, 0]
    with (
        whole_file(folder / "train.bin") as train,
        whole_file(folder / "valid.bin") as valid,
        open(train, "wb") as train_out,
        open(valid, "wb") as valid_out,
    ):
        for ids, n, held_out in encode(source, tokenizer):
            ids.tofile(valid_out if held_out else train_out)
            n_char[held_out] += n
    write_json(folder / "tokens.json", {"train_chars": n_char[0], "valid_chars": n_char[1]})


def load_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[Tokens, Tokens]:
    """Training and held-out tokens, mapped from the files that `write_tokens` left."""
    try:
        n_char = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        return tuple(
            Tokens(np.memmap(folder / f"{side}.bin", id_type(tokenizer), "r"), n, tokenizer)
            for side, n in (("train", n_char["train_chars"]), ("valid", n_char["valid_chars"]))
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the tokens of the run in {folder} are damaged: {error}") from None


def held_out_tokens(source: Source, tokenizer: Tokenizer) -> Tokens:
    """The held-out side alone, in memory."""
    parts = [(ids, n) for ids, n, held_out in encode(source, tokenizer) if held_out]
    ids, sizes = zip(*parts, strict=True)
    return Tokens(np.concatenate(ids), sum(sizes), tokenizer)


def floor_nats_per_char(name: str) -> float | None:
    """The least loss anybody can expect on the held-out part of our stories; else unknown."""
    if name != "stories" and Path(name) != STORIES:
        return None
    return json.loads(FLOOR.read_text(encoding="utf-8"))["nats_per_char"]
