"""From noise to data: every way to take the steps back, and guidance by a class.

A sampler is given `predict(x, time, alpha, sigma) -> (x0, ε)`, which is a network (`Denoiser`) or
the exact answer (exact.py), pure noise x, and a `Grid`, the noise levels to pass through:

    ddpm      a random step of the chain that was taught         Ho et al. 2020, Algorithm 2
    ddim      η = 0: no chance at all; η = 1: as random as ddpm   Song et al. 2020, Eq. 12
    heun      two looks a step, second order                      Karras et al. 2022, Algorithm 1
    dpmpp     second order by remembering the step before         Lu et al. 2022, Algorithm 2 (2M)
    flow      straight on along dx/dσ = ε − x0 (Euler)            Liu et al. 2022, §2.2
    midpoint  the same, with the slope of half a step ahead

arXiv numbers, in that order: 2006.11239, 2010.02502, 2206.00364, 2211.01095, 2209.03003. First
order means that twice the steps halve the error; second order, that they quarter it.

Key: B rows of a batch, S steps. x, x0, eps are (B, …). Left out: churn, third-order solvers.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion import Schedule, clipped, posterior, spread, to_x0_eps

SPACINGS = ("trailing", "linspace", "leading")
LEAST_ALPHA = 0.005  # below it there is hardly a signal, and `heun` steps as `ddim` does
Predict = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# ── Grids ─────────────────────────────────────────────────────────────────────────────────────────


class Grid(NamedTuple):
    """The noise levels that sampling passes through: S + 1 of them, in float64.

    times: what the network is told. The last of each is the end of the way: α = 1 and σ = 0 for
    data without noise, where nobody asks the network.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor


def timesteps(n_train: int, n_step: int, spacing: str = "trailing") -> Tensor:
    """`n_step` of the steps 0 … n_train − 1, falling, all different. (S,) int64.

    Table 2 of arXiv:2305.08891. trailing and linspace begin at the last step, as the noise does.
    leading does not: it is here because so many saved models say they want it. ValueError for a
    number of steps out of range and an unknown spacing.
    """
    if not 1 <= n_step <= n_train:
        raise ValueError(f"{n_step} steps: the network knows {n_train} steps, take 1 to {n_train}")
    count = torch.arange(n_step, dtype=torch.float64)
    if spacing == "trailing":
        return (n_train - count * n_train / n_step).round().long() - 1
    if spacing == "linspace":
        return ((n_train - 1) * (1 - count / max(n_step - 1, 1))).round().long()
    if spacing == "leading":
        return (n_train // n_step) * torch.arange(n_step - 1, -1, -1)
    raise ValueError(f"there is no spacing {spacing!r}, only {', '.join(SPACINGS)}")


def make_grid(schedule: Schedule, n_step: int, spacing: str = "trailing") -> Grid:
    """The grid of `n_step` steps that ends at data without noise.

    The step before is the next in this list, never t − T/S: the two differ where S does not divide
    T. A flow has no steps of its own; its σ are 1, 1 − 1/S, … 1/S and 0.
    """
    if schedule.is_flow:
        times = schedule.n_step * torch.arange(n_step, 0, -1, dtype=torch.float64) / n_step
    else:
        times = timesteps(schedule.n_step, n_step, spacing)
    alpha, sigma = schedule.at(times)
    zero = torch.zeros(1, dtype=torch.float64)
    return Grid(*(torch.cat(pair) for pair in ((times, zero), (alpha, zero + 1), (sigma, zero))))


def pairs(grid: Grid):
    """(time, α, α of the next level, σ, σ of the next level) for each step of the way."""
    alpha, sigma = grid.alpha, grid.sigma
    return zip(grid.times[:-1], alpha[:-1], alpha[1:], sigma[:-1], sigma[1:], strict=True)


# ── What the network says ─────────────────────────────────────────────────────────────────────────


class Denoiser:
    """A network as `predict(x, time, alpha, sigma) -> (x0, ε)`, with guidance and clipping.

    network(x, times (B,), labels (B,) or None) answers with `target`. labels (B,): the classes
    wanted; `null` is the label that means "any". clip: hold x0 within ±clip; 0 does not.

    guidance w, classifier-free (Ho & Salimans 2022, arXiv:2207.12598):

        out = out(null) + w · (out(label) − out(null))

    w = 0 ignores the label, w = 1 is the network asked plainly, more exaggerates what is special
    about the class. That is diffusers' and Imagen's convention; the w of the paper's Eq. 6 is ours
    minus 1. ValueError for guidance without a null label.
    """

    def __init__(
        self,
        network: Callable,
        target: str,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        null: int | None = None,
        clip: float = 0.0,
    ):
        if guidance != 1 and (labels is None or null is None):
            raise ValueError("guidance needs labels, and a network that knows the label for any")
        self.network, self.target, self.labels = network, target, labels
        self.guidance, self.null, self.clip = guidance, null, clip
        self.n_evaluation = 0  # looks at the network; a guided look counts once

    def __call__(self, x: Tensor, time, alpha, sigma) -> tuple[Tensor, Tensor]:
        self.n_evaluation += 1
        times = torch.as_tensor(time).float().to(x.device).expand(len(x))
        out = self.answer(x, times).to(x.dtype)
        x0, eps = to_x0_eps(self.target, out, x, alpha, sigma)
        return clipped(x0, x, alpha, sigma, self.clip) if self.clip else (x0, eps)

    def answer(self, x: Tensor, times: Tensor) -> Tensor:
        """The network's answer, guided: both questions are asked in one batch."""
        if self.labels is None or self.guidance == 1:
            return self.network(x, times, self.labels)
        anything = torch.full_like(self.labels, self.null)
        if self.guidance == 0:
            return self.network(x, times, anything)
        labels = torch.cat([self.labels, anything])
        label, null = self.network(torch.cat([x, x]), torch.cat([times, times]), labels).chunk(2)
        return null + self.guidance * (label - null)


# ── Steps back ────────────────────────────────────────────────────────────────────────────────────


def noise_like(x: Tensor, dice: torch.Generator | None) -> Tensor:
    """Noise in the shape of x from `dice`, a generator on any device."""
    device = dice.device if dice else x.device
    return torch.randn(x.shape, generator=dice, device=device, dtype=x.dtype).to(x.device)


def ddpm(predict: Predict, x: Tensor, grid: Grid, dice=None, variance: str = "small") -> Tensor:
    """Ancestral sampling: Algorithm 2 of arXiv:2006.11239.

    variance: "small" is β̃_t, right if all data are one point; "large" is β_t, right if data are
    noise (§3.2). No noise is added in the last step.
    """
    for time, alpha, alpha_prev, sigma, sigma_prev in pairs(grid):
        x0, _ = predict(x, time, alpha, sigma)
        x, small = posterior(x0, x, alpha, alpha_prev)
        if sigma_prev > 0:
            large = spread(1 - (alpha / alpha_prev) ** 2, x)
            x = x + (small if variance == "small" else large).sqrt() * noise_like(x, dice)
    return x


def ddim(predict: Predict, x: Tensor, grid: Grid, dice=None, eta: float = 0.0) -> Tensor:
    """Predict data and noise, and mix them again with less noise. Eq. 12 of arXiv:2010.02502.

    eta: from 0, where the noise at the start decides everything, to 1, the randomness of `ddpm`
    (Eq. 16).
    """
    for time, alpha, alpha_prev, sigma, sigma_prev in pairs(grid):
        x0, eps = predict(x, time, alpha, sigma)
        fresh = eta * sigma_prev / sigma * (1 - (alpha / alpha_prev) ** 2).sqrt()
        kept = (sigma_prev**2 - fresh**2).clamp(min=0).sqrt()
        x = spread(alpha_prev, x) * x0 + spread(kept, x) * eps
        if fresh > 0:
            x = x + spread(fresh, x) * noise_like(x, dice)
    return x


def heun(predict: Predict, x: Tensor, grid: Grid, dice=None) -> Tensor:
    """Heun's method on dx̄/dσ̄ = ε with x̄ = x/α, σ̄ = σ/α: Algorithm 1 of arXiv:2206.00364.

    A DDIM step, a second look from where it led, and the step again with the mean of both slopes.
    The last step, to σ = 0, stays DDIM's, and so do those from α < 0.005: there σ̄ falls from
    thousands to a few, and the slope at the few is wrong for nearly all of the way. At most 2S − 1
    looks.
    """
    for i, (time, alpha, alpha_prev, sigma, sigma_prev) in enumerate(pairs(grid)):
        x0, eps = predict(x, time, alpha, sigma)
        there = spread(alpha_prev, x) * x0 + spread(sigma_prev, x) * eps
        if alpha >= LEAST_ALPHA and sigma_prev > 0:
            _, eps_there = predict(there, grid.times[i + 1], alpha_prev, sigma_prev)
            step = sigma_prev / alpha_prev - sigma / alpha
            there = x / spread(alpha, x) + spread(step, x) * (eps + eps_there) / 2
            there = there * spread(alpha_prev, x)
        x = there
    return x


def dpmpp(predict: Predict, x: Tensor, grid: Grid, dice=None) -> Tensor:
    """DPM-Solver++(2M): Algorithm 2 of arXiv:2211.01095, with λ = ln(α/σ) as time.

    The data are extrapolated from the last two predictions, as a straight line in λ. First order
    in the first step, which has nothing before it, and in the last, which is infinitely long in λ.
    One look a step.
    """
    lam = (grid.alpha / grid.sigma).log()
    before = None
    for i, (time, alpha, alpha_prev, sigma, sigma_prev) in enumerate(pairs(grid)):
        x0, _ = predict(x, time, alpha, sigma)
        h, data = lam[i + 1] - lam[i], x0
        if before is not None and h.isfinite():
            data = x0 + spread(h / (lam[i] - lam[i - 1]) / 2, x) * (x0 - before)
        x = spread(sigma_prev / sigma, x) * x - spread(alpha_prev * torch.expm1(-h), x) * data
        before = x0
    return x


def flow(predict: Predict, x: Tensor, grid: Grid, dice=None) -> Tensor:
    """Euler's method on dx/dσ = ε − x0, the straight lines of flow matching (arXiv:2209.03003).

    Where α + σ = 1 this is `ddim` with η = 0 to the letter: α' x0 + σ' ε = x + (σ' − σ)(ε − x0).
    """
    for time, alpha, _, sigma, sigma_prev in pairs(grid):
        x0, eps = predict(x, time, alpha, sigma)
        x = x + spread(sigma_prev - sigma, x) * (eps - x0)
    return x


def midpoint(predict: Predict, x: Tensor, grid: Grid, dice=None) -> Tensor:
    """As `flow`, with the slope in the middle of each step: second order, 2S looks."""
    per_sigma = grid.times[0] / grid.sigma[0]
    for time, alpha, _, sigma, sigma_prev in pairs(grid):
        x0, eps = predict(x, time, alpha, sigma)
        half = (sigma + sigma_prev) / 2
        middle = x + spread(half - sigma, x) * (eps - x0)
        x0, eps = predict(middle, per_sigma * half, 1 - half, half)
        x = x + spread(sigma_prev - sigma, x) * (eps - x0)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "heun": heun, "dpmpp": dpmpp}
FLOWS = {"flow": flow, "midpoint": midpoint}
