"""Which cell counts what: cells of a trained language model that follow a quantity in the text.

Nobody tells a network what to keep in its state. Yet some of its cells can be read: their value
follows whether a quotation is open, or how many brackets are (Karpathy et al. 2015,
arXiv:1506.02078, §4). There they were found by looking at pictures; here by searching. For each
quantity and each cell the correlation over a text is computed, and the strongest cell wins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import bptt
from checkpoint import Loaded
from options import UserError

QUANTITIES = ("open quotation", "open brackets", "characters since the line began")


def quantities(text: str) -> Tensor:
    """(3, N): each of QUANTITIES after each character of a text."""
    quotes = depth = since = 0
    rows = []
    for letter in text:
        quotes += letter == '"'
        depth += {"(": 1, ")": -1}.get(letter, 0)
        since = 0 if letter == "\n" else since + 1
        rows.append((quotes % 2, depth, since))
    return torch.tensor(rows, dtype=torch.float32).T


@torch.no_grad()
def cell_values(loaded: Loaded, text: str, layer: int = 0) -> Tensor:
    """tanh of every cell of a layer (h, where a cell has no c) after each character: (H, N).

    UserError for a network that has no alphabet, or where a token is no character.
    """
    if loaded.task != "lm" or loaded.words is None:
        raise UserError(f"{loaded.folder} is no language model with its alphabet")
    ids = loaded.words.encode(text)
    start = len(ids) - len(text)
    if start < 0 or len(loaded.words.encode_text(text)) != len(text):
        raise UserError("cells are searched over characters: take --tokenizer characters")
    model = loaded.model.eval()
    x = model.embedding(torch.tensor(ids, device=model.head.weight.device))[:, None]  # (T, 1, E)
    for one in model.layers[:layer]:
        x, _ = one(x, [cell.start(1) for cell in one.directions], None)
    cell = model.layers[layer].directions[0]
    values, state = [], cell.start(1)
    for step in x:
        _, state = bptt.run(cell, step[None], state)
        values.append(torch.tanh(state[-1])[0] if len(state) > 1 else state[0][0])
    return torch.stack(values[start:]).T.cpu()


def correlations(values: Tensor, quantity: Tensor) -> Tensor:
    """Pearson's correlation of each row of values (H, N) with a quantity (N,): (H,), −1 … 1."""
    a = values - values.mean(dim=1, keepdim=True)
    b = quantity - quantity.mean()
    norms = a.norm(dim=1) * b.norm()
    return torch.where(norms > 0, a @ b / norms.clamp(min=1e-12), 0.0)


@dataclass
class Found:
    """A cell that follows a quantity. values: (N,), its sign turned so that it rises with it."""

    quantity: str
    cell: int
    correlation: float
    values: Tensor


def search(loaded: Loaded, text: str, layer: int = 0) -> list[Found]:
    """The strongest cell for each of QUANTITIES over a text."""
    values, found = cell_values(loaded, text, layer), []
    for name, quantity in zip(QUANTITIES, quantities(text), strict=True):
        strength = correlations(values, quantity)
        cell = int(strength.abs().argmax())
        sign = 1.0 if strength[cell] >= 0 else -1.0
        found.append(Found(name, cell, abs(strength[cell].item()), sign * values[cell]))
    return found
