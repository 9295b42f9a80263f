"""What fine-tuning does to a matrix: how many directions change, and which are new.

Every matrix is a sum of rank-1 matrices, W = Σ σᵢ·uᵢ·vᵢᵀ with σ₁ ≥ σ₂ ≥ … (singular value
decomposition, SVD). Read it from the right: how much of vᵢ is in the input is measured, multiplied
by σᵢ, and answered in the direction uᵢ. All uᵢ have length 1 and are at right angles to each other.

An intruder dimension (Shuttleworth et al. 2024, arXiv:2410.21228, §3) is a strong direction of the
matrix after fine-tuning that is like none of the matrix before:

    uⱼ is one of the k strongest after,   and   max_i |uⱼ(after) · uᵢ(before)| < ε

The product is the cosine of the angle between the two: 1 is the same direction, 0 a right angle.
"""

import torch
from torch import Tensor

STRONGEST, UNLIKE = 10, 0.5  # k and ε, as the paper mostly takes them


def likeness(before: Tensor, after: Tensor) -> Tensor:
    """For each uⱼ of `after`, strongest first: its largest |cosine| with a uᵢ of `before`.

    before, after: (O, I). Returns (min(O, I),), between 0 and 1.
    """
    old, new = (torch.linalg.svd(w, full_matrices=False).U for w in (before, after))
    return (new.T @ old).abs().amax(dim=1)


def n_intruder(
    before: Tensor, after: Tensor, strongest: int = STRONGEST, unlike: float = UNLIKE
) -> int:
    """How many of the strongest directions after are unlike all directions before."""
    return int((likeness(before, after)[:strongest] < unlike).sum())


def n_direction(change: Tensor, part: float = 0.9) -> int:
    """How many singular values hold `part` of Σ σ², the squared size of `change` (O, I)."""
    squares = torch.linalg.svdvals(change).square()
    return int((squares.cumsum(0) < part * squares.sum()).sum()) + 1


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict:
    """What changed in some matrices (by name), as numbers for figures and README.

    intruders: in all of them together, of `looked_at`; directions: `n_direction` of the change, and
    size: its length divided by that of the matrix, both the mean; likeness: of the strongest
    direction, the second …, the mean.
    """
    changes = {name: after[name] - w for name, w in before.items()}
    alike = torch.stack([likeness(w, after[n])[: 2 * STRONGEST] for n, w in before.items()])
    sizes = torch.stack([changes[n].norm() / w.norm() for n, w in before.items()])
    return {
        "looked_at": STRONGEST * len(before),
        "intruders": sum(n_intruder(w, after[n]) for n, w in before.items()),
        "directions": sum(map(n_direction, changes.values())) / len(changes),
        "size": sizes.mean().item(),
        "likeness": alike.mean(dim=0).tolist(),
    }
