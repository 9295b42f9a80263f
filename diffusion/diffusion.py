"""The diffusion process alone: how data turns into noise, and what a network is taught about it.

A step t takes data x0 to a mixture with noise ε ~ N(0, 1),

    x_t = α_t x0 + σ_t ε                                                     (1)

where α falls from 1 to 0 and σ rises from 0 to 1 as t rises: signal fades, noise grows. Two ways
to let them are here. *Variance preserving*: α² + σ² = 1, α² is the ᾱ ("alpha bar") of the papers
(Ho et al. 2020, arXiv:2006.11239). *Flow matching*: α + σ = 1, a straight line from data to noise
(Lipman et al. 2022, arXiv:2210.02747; Liu et al. 2022, arXiv:2209.03003).

A network sees x_t and t and is asked for the noise, the data or a mixture of both: its *target*.
Whatever it was asked for, x0 and ε follow from its answer by (1): see `to_x0_eps`.

Times count from 0, as in the library diffusers: x_0 of the code has gone through one step of noise
already, and the papers' t is ours plus 1. Data without noise is α = 1, σ = 0.

Key: B rows of a batch, T steps. x, x0 and eps are (B, …) of any shape, alpha and sigma are (B,) or
numbers. Left out: learned variances (arXiv:2102.09672 §3.1). This file imports torch alone.
"""

import math

import torch
from torch import Tensor

TARGETS = ("eps", "x0", "v", "flow")
SCHEDULES = ("linear", "cosine", "zero-snr", "flow")

# ── Schedules: how fast the signal fades ──────────────────────────────────────────────────────────


def linear_betas(n_step: int, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """β_t, the variance of the noise that step t adds: (T,). §4 of arXiv:2006.11239."""
    return torch.linspace(first, last, n_step, dtype=torch.float64)


def cosine_betas(n_step: int, offset: float = 0.008, most: float = 0.999) -> Tensor:
    """β_t such that ᾱ falls like a squared cosine: (T,). Eq. 17 of arXiv:2102.09672."""
    part = torch.arange(n_step + 1, dtype=torch.float64) / n_step
    alpha_bar = torch.cos((part + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=most)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """The same schedule bent so that no signal is left at the end: ᾱ_T = 0. Shape (T,).

    Algorithm 1 of arXiv:2305.08891. SNR is α²/σ², the signal-to-noise ratio. The linear schedule
    ends at α = 0.006, which tells a network the mean brightness of the picture: sampling, which
    begins without it, then yields pictures of medium brightness only.
    """
    alpha = (1 - betas).cumprod(0).sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_bar = alpha**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


class Schedule:
    """α_t and σ_t of every step t = 0 … T−1, as float64 tensors (T,).

    name: one of SCHEDULES. ValueError for another. first and last: β of the linear ones. `at` also
    knows the flow between its steps.
    """

    def __init__(
        self, name: str = "linear", n_step: int = 1000, first: float = 1e-4, last: float = 0.02
    ):
        if name not in SCHEDULES:
            raise ValueError(f"there is no schedule {name!r}, only {', '.join(SCHEDULES)}")
        self.name, self.n_step = name, n_step
        if self.is_flow:  # time 1000 is noise and time 0, which is never asked for, is data
            self.sigma = torch.arange(1, n_step + 1, dtype=torch.float64) / n_step
            self.alpha = 1 - self.sigma
            return
        linear = linear_betas(n_step, first, last)
        betas = cosine_betas(n_step) if name == "cosine" else linear
        self.betas = zero_terminal_snr(betas) if name == "zero-snr" else betas
        alpha_bar = (1 - self.betas).cumprod(0)
        self.alpha, self.sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    @property
    def is_flow(self) -> bool:
        """Straight lines from data to noise, and times that need not be whole numbers?"""
        return self.name == "flow"

    def at(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """(α, σ) of times (B,): whole steps, or for the flow numbers from 0 to T.

        On the CPU and in float64, which not every device has; `spread` brings them to the rows.
        """
        times = times.cpu()
        if self.is_flow:
            sigma = times.double() / self.n_step
            return 1 - sigma, sigma
        return self.alpha[times.long()], self.sigma[times.long()]

    def time_of(self, step: int) -> Tensor:
        """What a network is told at entry `step` of α and σ: the step; for the flow one more."""
        return torch.tensor(step + 1 if self.is_flow else step)

    def draw(self, place: Tensor) -> Tensor:
        """Times (B,) for numbers (B,) that are uniform in [0, 1)."""
        return place * self.n_step if self.is_flow else (place * self.n_step).floor().long()


# ── Forward: from data towards noise ──────────────────────────────────────────────────────────────


def spread(number, x: Tensor) -> Tensor:
    """Numbers (B,), or one, shaped to multiply the rows of x (B, …), and in its number format."""
    number = torch.as_tensor(number).to(x.dtype).to(x.device)
    return number.reshape(-1, *[1] * (x.dim() - 1))


def q_sample(x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """x_t = α x0 + σ ε: Eq. 4 of arXiv:2006.11239. Any t in one step, not t of them."""
    return spread(alpha, x0) * x0 + spread(sigma, x0) * eps


def posterior(x0: Tensor, x: Tensor, alpha, alpha_prev) -> tuple[Tensor, Tensor]:
    """Mean (B, …) and variance (B, 1 …) of q(x_s | x_t, x0) for a less noisy s, where α² + σ² = 1.

    Eq. 6 and 7 of arXiv:2006.11239, with ᾱ_t / ᾱ_s in place of α_t so that s may be any earlier
    step. The variance is 0 where s is the data itself.
    """
    bar, bar_prev = (torch.as_tensor(z).cpu().double() ** 2 for z in (alpha, alpha_prev))
    beta = 1 - bar / bar_prev
    from_x0 = bar_prev.sqrt() * beta / (1 - bar)
    from_x = (1 - beta).sqrt() * (1 - bar_prev) / (1 - bar)
    mean = spread(from_x0, x) * x0 + spread(from_x, x) * x
    return mean, spread(beta * (1 - bar_prev) / (1 - bar), x)


# ── Targets: what the network is asked for ────────────────────────────────────────────────────────


def shares(target: str, alpha, sigma) -> tuple:
    """(p, q) such that the target is p x0 + q ε. ValueError for an unknown target.

    eps   ε                  Ho et al. 2020, Eq. 14 of arXiv:2006.11239
    x0    x0
    v     α ε − σ x0         Salimans & Ho 2022, §4 and appendix D of arXiv:2202.00512
    flow  ε − x0 = dx/dσ     Eq. 1 of arXiv:2209.03003, from data to noise, where α + σ = 1
    """
    known = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}
    if target not in known:
        raise ValueError(f"there is no target {target!r}, only {', '.join(TARGETS)}")
    return known[target]


def target_of(target: str, x0: Tensor, eps: Tensor, alpha, sigma) -> Tensor:
    """What the network should answer: p x0 + q ε."""
    p, q = shares(target, alpha, sigma)
    return spread(p, x0) * x0 + spread(q, x0) * eps


def to_x0_eps(target: str, out: Tensor, x: Tensor, alpha, sigma) -> tuple[Tensor, Tensor]:
    """The data and the noise that a network's answer `out` to x means.

    Two equations with two unknowns, x = α x0 + σ ε and out = p x0 + q ε, by Cramer's rule:

        x0 = (q x − σ out) / d    ε = (α out − p x) / d    d = α q − σ p

    Not to be had where d = 0: noise alone (α = 0) says nothing of x0 if only ε is known.
    """
    p, q = (spread(z, x) for z in shares(target, alpha, sigma))
    alpha, sigma = spread(alpha, x), spread(sigma, x)
    d = alpha * q - sigma * p
    return (q * x - sigma * out) / d, (alpha * out - p * x) / d


def clipped(x0: Tensor, x: Tensor, alpha, sigma, limit: float = 1.0) -> tuple[Tensor, Tensor]:
    """x0 held within ±limit, and the noise that then fits: ε = (x − α x0) / σ.

    Pixels cannot leave [−1, 1], so a prediction that does is wrong, and its error would grow from
    step to step. Keeping the old ε would break (1).
    """
    x0 = x0.clamp(-limit, limit)
    return x0, (x - spread(alpha, x) * x0) / spread(sigma, x)


def weight(target: str, alpha, sigma, gamma: float) -> Tensor:
    """Weight (B,) of a squared error of the target. 1 if γ = 0; min-SNR-γ otherwise.

    §3.4 of arXiv:2303.09556: an error of x0 counts min(SNR, γ) times, so that steps with hardly any
    noise, whose SNR is in the thousands, do not take all of the network. An error of the target is
    σ/d as large in x0, see `to_x0_eps`.
    """
    alpha, sigma = torch.as_tensor(alpha), torch.as_tensor(sigma)
    if not gamma:
        return torch.ones_like(alpha * sigma)
    p, q = shares(target, alpha, sigma)
    return ((alpha / sigma) ** 2).clamp(max=gamma) * (sigma / (alpha * q - sigma * p)) ** 2


def loss_per_row(out: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each row (B,): Eq. 14 of arXiv:2006.11239."""
    return (out.float() - wanted.float()).square().flatten(1).mean(1)
