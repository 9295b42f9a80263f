"""Several texts in one row, and the answers to a prompt behind one copy of it.

    in rows of their own   prompt chosen ····      packed   prompt chosen rejected | prompt cho…
                           prompt rejected

A token sees itself and, before it in its own text, the prompt and its own answer: never another
text and never the other answer (a block-diagonal mask). An answer's positions go on from the end of
the prompt, whatever stands between. So every answer has the log-probability that it has in a row of
its own, to 1e-12 in float64, and a prompt is computed once, not once an answer.

Nothing in model.py changes: its blocks take a `Context`, and here it is given another mask.

Key: B rows, T tokens, S texts that the fullest row holds, A = 3 answers a text at most.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Context, Llama, compute_dtype, fastest_attention

N_ANSWER = 3  # chosen, rejected, and for KTO one to another prompt


class Packed(NamedTuple):
    """Rows of texts. All are (B, T) int64 but `number`."""

    tokens: Tensor
    positions: Tensor  # in the text
    text: Tensor  # which text of the row, 0 … S − 1; −1 is filling
    answer: Tensor  # 0 is the prompt, 1 chosen, 2 rejected, 3 the answer to another prompt
    before: Tensor  # the column of the token before it in its text, which predicts it
    number: Tensor  # (B, S), which of the packed texts stands there; −1 is none


Text = tuple[list[int], list[list[int]]]  # ids of a prompt and of its answers


def length(text: Text) -> int:
    """Tokens of a prompt with all of its answers."""
    return len(text[0]) + sum(map(len, text[1]))


def pack(texts: list[Text], capacity: int = 0) -> Packed:
    """Put texts into as few rows of `capacity` tokens as first fit finds; 0 is one text a row.

    A text that is longer than the capacity gets a row of its own. ValueError for a text without
    prompt: nothing would predict its first token.
    """
    if not all(prompt for prompt, _ in texts):
        raise ValueError("a text has no prompt: nothing predicts its first token")
    rows: list[list[int]] = []
    room: list[int] = []
    for number, text in enumerate(texts):
        fitting = [row for row, left in enumerate(room) if left >= length(text)]
        if not fitting:
            rows.append([])
            room.append(capacity)
        row = fitting[0] if fitting else len(rows) - 1
        rows[row].append(number)
        room[row] -= length(text)
    width = max(sum(length(texts[i]) for i in row) for row in rows)
    filled = [lay_out([texts[i] for i in row], width) for row in rows]
    n_text = max(map(len, rows))
    number = torch.tensor([row + [-1] * (n_text - len(row)) for row in rows])
    return Packed(*torch.stack(filled, dim=1).unbind(), number)


def lay_out(texts: list[Text], width: int) -> Tensor:
    """One row: tokens, positions, text, answer and before, (5, width) int64."""
    columns = []
    for i, (prompt, answers) in enumerate(texts):
        start = len(columns)
        columns += [(t, p, i, 0, max(0, start + p - 1)) for p, t in enumerate(prompt)]
        last = len(columns) - 1  # the end of the prompt predicts the first token of each answer
        for kind, answer in enumerate(answers, 1):
            here = len(columns)
            for p, token in enumerate(answer):
                before = here + p - 1 if p else last
                columns.append((token, len(prompt) + p, i, kind, before))
    columns += [(0, 0, -1, 0, 0)] * (width - len(columns))
    return torch.tensor(columns).T


def of_rows(values: Tensor, packed: Packed) -> Tensor:
    """Values of the packed texts, (N, 3), as they stand in rows: (B, S, 3), 0 where none stands."""
    return torch.cat((values, values.new_zeros(1, values.shape[1])))[packed.number]


def of_texts(values: Tensor, packed: Packed) -> Tensor:
    """The reverse of `of_rows`: (B, S, 3) to (N, 3), in the order in which texts were packed."""
    there = packed.number >= 0
    return values[there][packed.number[there].argsort()]


def visible(packed: Packed, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, (B, T, T): 0 where a token may look, −∞ elsewhere."""
    text, answer = packed.text, packed.answer
    places = torch.arange(text.shape[1], device=text.device)
    sees = places[:, None] >= places
    sees = sees & (text[:, :, None] == text[:, None, :])
    sees = sees & ((answer[:, None, :] == 0) | (answer[:, :, None] == answer[:, None, :]))
    return torch.zeros(sees.shape, dtype=dtype, device=text.device).masked_fill(~sees, -math.inf)


class AnswerScorer(nn.Module):
    """A Llama that says how probable the answers in packed rows are."""

    def __init__(self, llama: Llama):
        super().__init__()
        self.llama = llama

    def features(self, packed: Packed) -> Tensor:
        """What the last block says of each token, (B, T, D), each text on its own."""
        x = self.llama.embedding(packed.tokens)
        dtype, n_token = compute_dtype(x), packed.tokens.shape[1]
        context = Context(
            rotary=self.llama.rotary(packed.positions, n_token, dtype),
            mask=visible(packed, dtype),
            causal=False,
            attend=fastest_attention(x.device, dtype, n_token, n_token),
            cache=None,
            slots=packed.positions,
        )
        for block in self.llama.blocks:
            x = block(x, context)
        return self.llama.norm(x)

    def forward(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows: the tensors of a `Packed`. Returns Σ log π of each answer and its tokens.

        Both (B, S, 3), 0 where there is no such answer. The scores of all V tokens are computed for
        tokens of answers alone, which are few beside those of prompts and filling.
        """
        packed = Packed(*rows)
        (B, S), x = packed.number.shape, self.features(packed)
        row, column = (packed.answer > 0).nonzero(as_tuple=True)  # the N tokens of answers
        states = x[row, packed.before[row, column]]  # (N, D)
        logits = self.llama.head(states)  # (N, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logps = -F.cross_entropy(logits, packed.tokens[row, column], reduction="none")
        place = (row, packed.text[row, column], packed.answer[row, column] - 1)
        zeros = logps.new_zeros(B, S, N_ANSWER)
        sums = zeros.index_put(place, logps, accumulate=True)
        counts = zeros.index_put(place, torch.ones_like(logps), accumulate=True)
        return sums, counts
