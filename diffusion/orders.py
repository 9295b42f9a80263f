"""How fast the error of each solver falls with the number of looks, with the network taken out.

The exact denoiser of a mixture of Gaussians takes the network's place, so what is left is the
solver's own error: the distance to where a very fine solution ends. Twice the looks divide it by 2
(order 1) or by 4 (order 2); on double logarithmic paper that is a line of slope −1 or −2.

The way ends at σ/α = 0.1 and not at the data, as the last step to σ = 0 is a DDIM step for all.

Key: S steps, B points.
"""

import math

import torch

from exact import Mixture
from samplers import Grid, ddim, dpmpp, heun

STEPS = (16, 32, 64, 128, 256)
SOLVERS = {  # the sampler, and how often it looks in a step
    "Euler (DDIM)": (ddim, 1),
    "Heun": (heun, 2),
    "DPM-Solver++(2M)": (dpmpp, 1),
}
CENTRES = ((-0.6, -0.4), (0.7, -0.2), (0.0, 0.7))


def mixture() -> Mixture:
    """Three round heaps of the plane."""
    return Mixture(torch.tensor(CENTRES, dtype=torch.float64)[:, :, None, None], 0.25)


def even_grid(n_step: int, first: float = 20.0, last: float = 0.1) -> Grid:
    """A grid even in ln σ/α, from `first` to `last`, where α² + σ² = 1."""
    ratio = torch.linspace(math.log(first), math.log(last), n_step + 1, dtype=torch.float64).exp()
    alpha = 1 / (1 + ratio**2).sqrt()
    return Grid(torch.zeros(n_step + 1), alpha, ratio * alpha)


def errors(n_point: int = 200, seed: int = 0) -> dict[str, list[tuple[int, float]]]:
    """For each solver (looks, mean distance to the true end) for every number of STEPS."""
    exact, dice = mixture(), torch.Generator().manual_seed(seed)
    noise = torch.randn(n_point, 2, 1, 1, dtype=torch.float64, generator=dice)
    true_end = heun(exact, noise, even_grid(2048))
    found = {}
    for name, (solver, looks) in SOLVERS.items():
        ends = {n: solver(exact, noise, even_grid(n)) for n in STEPS}
        found[name] = [
            (looks * n, (end - true_end).flatten(1).norm(dim=1).mean().item())
            for n, end in ends.items()
        ]
    return found


def slope(points: list[tuple[int, float]]) -> float:
    """The slope of ln error over ln looks, from the last three points."""
    x, y = torch.tensor(points[-3:], dtype=torch.float64).log().T
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()
