"""How good can a correction of rank r be? A linear teacher, for which the answer is known.

A layer W₀ is to become W* = W₀ + D. With inputs x whose entries are independent with variance 1,
the expected error of W₀ + ΔW is ‖D − ΔW‖², the sum of the squares of all entries. By the theorem of
Eckart and Young (1936) no ΔW of rank r makes it smaller than Σ_{i>r} σᵢ², with σ the singular
values of D: the part of D that r directions cannot hold. Gradient descent on A and B should get
there.
"""

import torch
from torch import Tensor, nn

import lora
from lora import LoraConfig

ROWS, COLUMNS, TRUE_RANK = 24, 20, 8
STEPS = 1500


def difference(seed: int = 0) -> Tensor:
    """D of rank 8 with singular values 8, 7, …, 1, (24, 20) float64."""
    dice = torch.Generator().manual_seed(seed)
    sizes = torch.arange(TRUE_RANK, 0, -1, dtype=torch.float64)
    sides = [
        torch.linalg.qr(torch.randn(n, TRUE_RANK, dtype=torch.float64, generator=dice)).Q
        for n in (ROWS, COLUMNS)
    ]
    return sides[0] * sizes @ sides[1].T


def least_error(d: Tensor, rank: int) -> float:
    """Σ_{i>r} σᵢ²: no correction of this rank has a smaller error."""
    return float(torch.linalg.svdvals(d)[rank:].square().sum())


def learned_error(d: Tensor, rank: int, seed: int = 0) -> float:
    """‖D − ΔW‖² of an adapter after a training that begins at ΔW = 0."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False)).double()
    nn.init.zeros_(model[0].weight)  # what W₀ is makes no difference
    lora.adapt(model, LoraConfig(rank=rank, alpha=2.0 * rank, targets="0"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    everything = torch.eye(COLUMNS, dtype=torch.float64)  # Σ over unit inputs is ‖·‖² of the matrix
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, 2 * (1 - step / STEPS))
        loss = (model(everything) - d.T).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(everything) - d.T).square().sum())


def panel() -> list[tuple[int, float, float]]:
    """(rank, least error, learned error) for rank 1 … 9."""
    d = difference()
    return [(r, least_error(d, r), learned_error(d, r)) for r in range(1, TRUE_RANK + 2)]
