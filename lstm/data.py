"""The data of the language model, and numbers for the tasks that make their own.

text.py reads a text and turns it into ids. What is special here is the order in which they are
trained on: the text is cut into B long rows, and at every step each row goes on where it stopped.

    text  a b c d e f g h i j k l      B = 3 rows     a b c d      steps of T = 2:  ab│cd
                                                      e f g h                       ef│gh
                                                      i j k l                       ij│kl

Only so does the state that a row ends with belong to what the row goes on with (contiguous
batching). Key: B rows, T seq_len.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import text
from options import UserError
from run import read_json
from text import IGNORE, Tokens

HERE = Path(__file__).resolve().parent / "data"
NOTES, FLOORS = HERE / "notes.txt", HERE / "notes.json"
REVIEWS, CEILINGS = HERE / "reviews", HERE / "reviews.json"
INSIDE = ("notes", "reviews", "dice")  # names of data that is no path of the user's
N_SYMBOL, N_COPIED = 8, 10  # of the copy task
N_ROW, N_CONTEXT = 32, 256  # of scoring


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


def measure(name: str) -> text.Source:
    """The source called `name`: notes, a file, a folder, or hf:OWNER/NAME."""
    return text.Source.measure(str(NOTES) if name == "notes" else name)


def floor(name: str, part: str) -> float | None:
    """The least loss to expect on a part of our notes, in nats per character; else None.

    It is the mean of −ln p by the source that wrote them, see data/make_notes.py.
    """
    if name != "notes" and Path(name) != NOTES:
        return None
    return read_json(FLOORS)[part]["nats_per_char"]


class Stream:
    """A text in B rows that are read side by side, seq_len ids a step."""

    def __init__(self, ids: np.ndarray, n_row: int, seq_len: int):
        self.ids, self.seq_len = ids, seq_len
        self.n_row, self.row_len = n_row, len(ids) // n_row
        self.n_step = (self.row_len - 1) // seq_len  # in an epoch, one reading of the whole
        if self.n_step < 1:
            needed = n_row * (seq_len + 1)
            raise UserError(
                f"--data has {len(ids)} tokens to train on, --batch-size {n_row} rows of "
                f"--seq-len {seq_len} needs {needed} or more: take a longer text or smaller ones"
            )

    def batch(self, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (B, T + 1), their numbers (B,), and which begin anew (B,), as a function of step.

        A row begins anew, with no past, when the text has been read to its end. Then all rows start
        some ids later or earlier than in the epoch before, so that they are cut in other places.
        """
        epoch, place = divmod(step, self.n_step)
        spare = self.row_len - 1 - self.n_step * self.seq_len
        shift = np.random.default_rng((seed, epoch)).integers(spare + 1)
        first = int(shift) + place * self.seq_len
        rows = [
            self.ids[row * self.row_len + first :][: self.seq_len + 1] for row in range(self.n_row)
        ]
        begins = torch.full((self.n_row,), place == 0)
        return torch.from_numpy(np.stack(rows).astype(np.int64)), torch.arange(self.n_row), begins


def scoring_rows(tokens: Tokens, n_row: int = N_ROW, n_context: int = N_CONTEXT) -> tuple:
    """All of `tokens` once, (B, T) inputs and targets, in rows that know what was before.

    Each row begins n_context ids before the part that it is scored on, with IGNORE for targets.
    """
    n = len(tokens.ids) - 1  # targets
    borders = [n * row // n_row for row in range(n_row + 1)]
    starts = [max(0, first - n_context) for first in borders[:-1]]
    longest = max(last - start for start, last in zip(starts, borders[1:], strict=True))
    inputs = np.zeros((n_row, longest), dtype=np.int64)
    targets = np.full_like(inputs, IGNORE)
    for row, (start, first, last) in enumerate(zip(starts, borders, borders[1:], strict=False)):
        inputs[row, : last - start] = tokens.ids[start:last]
        targets[row, first - start : last - start] = tokens.ids[first + 1 : last + 1]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def chunks(*rows: Tensor, size: int = 256) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (B, T) in pieces along T."""
    return zip(*(one.split(size, dim=1) for one in rows), strict=True)


# ── Tasks of dice ─────────────────────────────────────────────────────────────────────────────────


def adding(n_row: int, seq_len: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """The adding problem (Hochreiter & Schmidhuber 1997, §5.4): (B, T, 2) numbers, (B,) answers.

    At each step come a number uniform in 0 … 1 and a mark, 1 at one step of each half and 0 at the
    others. The answer is the sum of the two marked numbers. Who always says 1 is off by 1/6 in the
    mean square: 2 · 1/12.
    """
    numbers = torch.rand(n_row, seq_len, generator=dice)
    half = seq_len // 2
    first = torch.randint(0, half, (n_row, 1), generator=dice)
    second = torch.randint(half, seq_len, (n_row, 1), generator=dice)
    marked = torch.cat([first, second], dim=1)  # (B, 2)
    marks = torch.zeros(n_row, seq_len).scatter_(1, marked, 1.0)
    return torch.stack([numbers, marks], dim=-1), numbers.gather(1, marked).sum(dim=1)


def copying(n_row: int, seq_len: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """The copy problem as in Bai et al. 2018 (arXiv:1803.01271, §4.2): inputs, targets (B, T + 20).

    Ten symbols 1 … 8, then T − 1 blanks (0), then eleven times 9; the answer is blank but for the
    last ten steps, where the symbols are to be repeated. Who remembers nothing pays
    10 ln 8 / (T + 20) nats a step: 0.0204 for T = 1000.
    """
    symbols = torch.randint(1, N_SYMBOL + 1, (n_row, N_COPIED), generator=dice)
    inputs = torch.zeros(n_row, seq_len + 2 * N_COPIED, dtype=torch.int64)
    inputs[:, :N_COPIED] = symbols
    inputs[:, -N_COPIED - 1 :] = N_SYMBOL + 1
    targets = torch.zeros_like(inputs)
    targets[:, -N_COPIED:] = symbols
    return inputs, targets


def trivial(task: str, seq_len: int) -> float:
    """The loss of who remembers nothing: the mean square of adding, nats a step of copying."""
    if task == "adding":
        return 1 / 6
    return N_COPIED * float(np.log(N_SYMBOL)) / (seq_len + 2 * N_COPIED)
