"""A recurrent network for every task of this folder: embedding, layers of cells, output layer.

    tokens (B, T) ─ embedding ─▶ (B, T, E) ─ layer ─▶ … ─ layer ─▶ (B, T, D) ─ head ─▶ (B, T, V)
    numbers (B, T, N) ──────────────┘                    └─ last state ─ head ─▶ (B, V)

Layers can walk in both directions, over rows of different length, and hand their state to the next
call. Parts that regularise: one dropout mask for all steps of a row (variational dropout, Gal &
Ghahramani 2016, arXiv:1512.05287), and dropout of the matrix between states (weight drop, Merity
et al. 2017, arXiv:1708.02182, §2).

Key: B batch, T time, E d_embed, D what the layers give, V answers, L layers times directions.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bptt
import cells
from cells import State
from options import check, option

ANSWERS = ("every", "last", "mean")


@dataclass(frozen=True)
class SequenceConfig:
    """The network.

    Raises ValueError for sizes that do not fit together.
    """

    d_model: int = option(256, "size of a cell's state", least=1)
    n_layer: int = option(1, "layers", least=1)
    d_embed: int = option(32, "numbers that a token is turned into", least=1)
    cell: str = option("lstm", "kind of cell", tuple(cells.CELLS))
    bidirectional: bool = option(False, "every layer walks backwards, too")
    d_proj: int = option(0, "LSTM: size that h is projected to; 0 is not", least=0)
    peephole: bool = option(False, "LSTM: gates see the cell")
    layer_norm: bool = option(False, "LSTM: normalise what goes into the gates")
    dropout: float = option(0.0, "share of numbers dropped, alike at all steps", least=0, below=1)
    weight_drop: float = option(0.0, "share of recurrent weights dropped", least=0, below=1)
    tie_embeddings: bool = option(False, "the head is the embedding")
    forget_bias: float = option(1.0, "LSTM: where the forget gate's bias begins")
    answer: str = option(
        "every", "where the head answers: at every step, after the last, or on the mean", ANSWERS
    )
    chrono: int = option(0, "biases for memories up to so many steps; 0 is not", least=0)
    vocab_size: int = 0  # 0: the inputs are numbers, n_number at each step
    n_number: int = 0
    n_answer: int = 1

    def __post_init__(self):
        check(self)
        if self.cell != "lstm" and (self.d_proj or self.peephole or self.layer_norm):
            raise ValueError("d_proj, peephole and layer_norm are the LSTM's")
        if self.chrono and (self.cell == "rnn" or self.chrono < 3):
            raise ValueError("chrono needs a cell with gates (lstm or gru), and 3 steps or more")
        if self.tie_embeddings and (not self.vocab_size or self.d_embed != self.d_out):
            raise ValueError(
                f"tie_embeddings needs d_embed = {self.d_out}, which the layers give, and tokens"
            )
        if min(self.vocab_size, self.n_number, self.n_answer) < 0:
            raise ValueError("vocab_size, n_number and n_answer cannot be negative")
        if not (self.vocab_size or self.n_number) or not self.n_answer:
            raise ValueError("a network needs vocab_size or n_number, and n_answer")
        if self.answer == "every" and self.bidirectional and self.vocab_size == self.n_answer:
            raise ValueError("bidirectional layers would see the next token that they are to guess")

    @property
    def d_out(self) -> int:
        """Numbers that the last layer gives at each step."""
        return (2 if self.bidirectional else 1) * (self.d_proj or self.d_model)

    @property
    def n_recurrent(self) -> int:
        """Parameters in the layers; weights alone, which is nearly all."""
        gates, directions = cells.CELLS[self.cell].n_gate, 2 if self.bidirectional else 1
        size, first = (
            self.d_proj or self.d_model,
            self.d_embed if self.vocab_size else self.n_number,
        )
        inputs = first + (self.n_layer - 1) * self.d_out
        products = inputs + self.n_layer * size
        return directions * self.d_model * (gates * products + self.n_layer * self.d_proj)

    @property
    def n_parameter(self) -> int:
        """Parameters, but for biases."""
        return self.n_recurrent + self.d_embed * self.vocab_size + self.d_out * self.n_answer


def make_cell(config: SequenceConfig, d_in: int) -> cells.Cell:
    """A cell with new weights and the biases that the configuration asks for."""
    if config.cell == "lstm":
        cell = cells.LSTM(d_in, config.d_model, config.d_proj, config.peephole, config.layer_norm)
    else:
        cell = cells.CELLS[config.cell](d_in, config.d_model)
    if config.chrono:
        cells.set_chrono_bias(cell, config.chrono)
    else:
        cells.set_forget_bias(cell, config.forget_bias)
    return cell


class Layer(nn.Module):
    """One layer: a cell that walks forwards and, if there are two, one that walks backwards."""

    def __init__(self, config: SequenceConfig, d_in: int):
        super().__init__()
        n_direction = 2 if config.bidirectional else 1
        self.directions = nn.ModuleList(make_cell(config, d_in) for _ in range(n_direction))
        self.weight_drop = config.weight_drop

    def forward(
        self, x: Tensor, starts: list[State], lengths: Tensor | None
    ) -> tuple[Tensor, list[State]]:
        """x (T, B, ·) and a state for each direction. Returns (T, B, D) and the last states.

        lengths fall from row to row, as bptt.run wants them.
        """
        outputs, ends = [], []
        for number, (cell, start) in enumerate(zip(self.directions, starts, strict=True)):
            inputs = reversed_rows(x, lengths) if number else x
            with dropped_weights(cell, self.weight_drop if self.training else 0.0):
                y, end = bptt.run(cell, inputs, start, lengths)
            outputs.append(reversed_rows(y, lengths) if number else y)
            ends.append(end)
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0], ends


def reversed_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (T, B, ·) with each row back to front, the filling behind its end left where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(len(x), device=x.device)[:, None]
    lengths = lengths.to(x.device)
    source = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    return x.gather(0, source[..., None].expand_as(x))


@contextlib.contextmanager
def dropped_weights(cell: cells.Cell, share: float):
    """For a while, the cell has a w_state of which a share is zero, the same for all steps."""
    if not share:
        yield
        return
    whole = cell._parameters.pop("w_state")
    cell.w_state = F.dropout(whole, share)
    try:
        yield
    finally:
        del cell.w_state
        cell._parameters["w_state"] = whole


def locked_dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout of x (T, B, ·) with one mask for all steps of a row (Gal & Ghahramani 2016, §4)."""
    if not training or not share:
        return x
    return x * F.dropout(torch.ones_like(x[:1]), share)


class SequenceModel(nn.Module):
    """Embedding (if the inputs are tokens), layers, head."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        first = config.n_number
        if config.vocab_size:
            first = config.d_embed
            self.embedding = nn.Embedding(config.vocab_size, first)
            nn.init.normal_(self.embedding.weight, std=0.5)
        sizes = [first, *[config.d_out] * (config.n_layer - 1)]
        self.layers = nn.ModuleList(Layer(config, size) for size in sizes)
        self.head = nn.Linear(config.d_out, config.n_answer)
        nn.init.zeros_(self.head.bias)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
            nn.init.uniform_(self.head.weight, -0.1, 0.1)  # logits begin small

    def start(self, n_row: int) -> State:
        """The state before the first step, all zero: (h,) or (h, c), each (L, B, ·)."""
        weight, c = self.head.weight, self.config
        sizes = (c.d_proj or c.d_model, c.d_model)[: cells.CELLS[c.cell].n_part]
        n = len(self.layers) * len(self.layers[0].directions)
        return tuple(
            torch.zeros(n, n_row, size, device=weight.device, dtype=weight.dtype) for size in sizes
        )

    def forward(
        self, inputs: Tensor, state: State | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """inputs: (B, T) tokens or (B, T, n_number). lengths: (B,) where rows are filled up.

        Returns the answers, (B, T, V) or (B, V), and the state after each row's last step, as
        `start` has it.
        """
        order = lengths.argsort(descending=True, stable=True) if lengths is not None else None
        if order is not None:  # bptt.py wants the longest row first
            inputs, lengths = inputs[order], lengths[order]
            state = None if state is None else tuple(part[:, order] for part in state)
        x, ends = self.features(inputs, state, lengths)
        answers = self.head(self.pooled(x, ends, lengths))
        if order is not None:
            back = order.argsort()
            answers, ends = answers[back], tuple(part[:, back] for part in ends)
        return answers, ends

    def features(
        self, inputs: Tensor, state: State | None, lengths: Tensor | None
    ) -> tuple[Tensor, State]:
        """What the last layer gives, (T, B, D), and the last state; lengths fall."""
        drop = functools.partial(locked_dropout, share=self.config.dropout, training=self.training)
        x = inputs.transpose(0, 1)  # (T, B, ·)
        x = drop(self.embedding(x)) if self.config.vocab_size else x
        state = self.start(len(inputs)) if state is None else state
        states, ends = list(zip(*(part.unbind(0) for part in state), strict=True)), []
        with torch.autocast(x.device.type, enabled=False):  # rounding would add up over the steps
            for number, layer in enumerate(self.layers):
                n = len(layer.directions)
                x, last = layer(x.to(self.head.weight.dtype), states[number * n :][:n], lengths)
                x = drop(x)
                ends += last
        return x, tuple(torch.stack(part) for part in zip(*ends, strict=True))

    def pooled(self, x: Tensor, ends: State, lengths: Tensor | None) -> Tensor:
        """What the head sees: (B, T, D) or, where a row has one answer, (B, D)."""
        if self.config.answer == "every":
            return x.transpose(0, 1)
        if self.config.answer == "mean":
            n = len(x) if lengths is None else lengths[:, None].to(x)
            return x.sum(dim=0) / n  # beyond the end of a row x is zero
        h = ends[0][-len(self.layers[0].directions) :]  # of the last layer
        h = locked_dropout(h, self.config.dropout, self.training)
        return torch.cat(tuple(h), dim=-1)


PRESETS = {
    "tiny": SequenceConfig(d_model=64, vocab_size=1),
    "small": SequenceConfig(d_model=128, chrono=100, vocab_size=1),
    "shakespeare": SequenceConfig(
        d_model=512, d_embed=64, dropout=0.2, weight_drop=0.2, vocab_size=1
    ),
}
