"""The best possible denoiser, where the data are known: a mixture of Gaussians, or a finite set.

Let the data be K centres μ_k, each as likely as w_k, with Gaussian noise of standard deviation s
around them. s = 0 is a finite data set, such as the pictures to train on. By Bayes' rule the centre
that a noisy x came from is known in probability,

    r_k(x) ∝ w_k N(x; α μ_k, α² s² + σ²)                                     (1)

and the data are expected at

    E[x0 | x] = Σ_k r_k [ μ_k + α s² / (α² s² + σ²) · (x − α μ_k) ]           (2)

No network can have a smaller squared error than (2), so what (2) leaves is the *floor* of the loss
at each noise level. Pascal Vincent 2011 (doi:10.1162/NECO_a_00142), §4, is the reason why learning
to denoise is learning the slope of the density; (2) is Eq. 57 of arXiv:2206.00364 for s = 0.

A network that learned a finite set perfectly would *be* (2) with s = 0, and then every sample is a
copy of a training picture. That it generalises is due to its being worse.

Key: K centres, B rows, D numbers in a row. Rows are (B, …), centres (K, …).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import Schedule, q_sample, shares, spread

CHUNK = 1 << 24  # entries of a table of distances that are held at a time


@dataclass
class Mixture:
    """centres (K, …), standard deviation, and labels (K,) or None. All centres weigh the same.

    It is a `predict` for samplers.py: called with (x, time, alpha, sigma) it returns E[x0 | x] and
    the noise that fits to it. wanted: labels (B,) of the rows to predict, None for any.
    """

    centres: Tensor
    spread: float = 0.0
    labels: Tensor | None = None
    wanted: Tensor | None = None

    def __call__(self, x: Tensor, time, alpha, sigma) -> tuple[Tensor, Tensor]:
        x0 = self.denoise(x, alpha, sigma)
        return x0, (x - spread(alpha, x) * x0) / spread(sigma, x)

    def draw(self, n: int, dice: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(n rows of data (n, …), their labels (n,))."""
        which = torch.randint(len(self.centres), (n,), generator=dice)
        rows = self.centres[which]
        noise = torch.randn(rows.shape, generator=dice, dtype=rows.dtype)
        labels = torch.zeros(n).long() if self.labels is None else self.labels[which]
        return rows + self.spread * noise, labels

    def log_shares(self, x: Tensor, alpha, sigma) -> tuple[Tensor, Tensor]:
        """(ln [w_k N(x; α μ_k, variance)] (B, K), variance (B, 1)): the terms of (1)."""
        alpha, sigma = (spread(z, x.flatten(1)).expand(len(x), 1) for z in (alpha, sigma))
        variance = (alpha * self.spread) ** 2 + sigma**2
        flat, centres = x.flatten(1), self.centres.to(x.dtype).flatten(1)
        squares = (
            flat.square().sum(1, keepdim=True)
            - 2 * alpha * (flat @ centres.T)
            + alpha**2 * centres.square().sum(1)
        ).clamp(min=0)
        logs = -squares / (2 * variance) - flat.shape[1] / 2 * (2 * torch.pi * variance).log()
        logs = logs - torch.tensor(len(centres), dtype=x.dtype).log()
        if self.wanted is not None:
            logs = logs.masked_fill(self.labels != self.wanted[:, None], -torch.inf)
        return logs, variance

    def denoise(self, x: Tensor, alpha, sigma) -> Tensor:
        """E[x0 | x], equation (2): (B, …)."""
        logs, variance = self.log_shares(x, alpha, sigma)
        centre = (logs.softmax(1) @ self.centres.to(x.dtype).flatten(1)).view_as(x)
        alpha = spread(alpha, x)
        pull = alpha * self.spread**2 / spread(variance[:, 0], x)
        return centre + pull * (x - alpha * centre)

    def log_density(self, x: Tensor, alpha=1.0, sigma=0.0) -> Tensor:
        """ln p(x) in nats (B,), of the data, or of data with noise. Needs s or σ above 0."""
        return self.log_shares(x, alpha, sigma)[0].logsumexp(1)

    def score(self, x: Tensor, alpha, sigma) -> Tensor:
        """∇ ln p_t(x) = (α E[x0 | x] − x) / σ²: which way the density rises. (B, …)"""
        return (spread(alpha, x) * self.denoise(x, alpha, sigma) - x) / spread(sigma, x) ** 2


def losses(
    mixture: Mixture, schedule: Schedule, times: Tensor, target: str, x0: Tensor, labels, noise
) -> Tensor:
    """The loss (B,) that the exact denoiser has on rows x0 (B, …) with this noise at times (B,).

    Mean squared error of the target per number of the row. Where classes are known to the network
    they are known to the exact denoiser too: labels (B,).
    """
    x0, noise = x0.double(), noise.double()
    alpha, sigma = schedule.at(times)
    x = q_sample(x0, noise, alpha, sigma)
    knowing = Mixture(mixture.centres, mixture.spread, mixture.labels)
    if mixture.labels is not None and len(mixture.labels.unique()) > 1:
        knowing.wanted = labels
    error = (knowing.denoise(x, alpha, sigma) - x0).square().flatten(1).mean(1)
    p, q = shares(target, alpha, sigma)
    return error * ((alpha * q - sigma * p) / sigma) ** 2  # an error of x0 as one of the target


def floor(
    mixture: Mixture, schedule: Schedule, times: Tensor, target: str, n_draw: int = 2048, seed=0
) -> Tensor:
    """The least possible loss at each of the times (S,), by `n_draw` draws a time. (S,) float64."""
    dice = torch.Generator().manual_seed(seed)
    room = max(1, CHUNK // len(mixture.centres))
    found = []
    for time in times:
        total = 0.0
        for start in range(0, n_draw, room):
            x0, labels = mixture.draw(min(room, n_draw - start), dice)
            noise = torch.randn(x0.shape, generator=dice)
            at = time.repeat(len(x0))
            total += losses(mixture, schedule, at, target, x0, labels, noise).sum()
        found.append(total / n_draw)
    return torch.stack(found)


# ── Memorisation ──────────────────────────────────────────────────────────────────────────────────


def two_nearest(rows: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(distances (B, 2), indices (B, 2)) of the two nearest of `known` (K, …) to each row."""
    distances = torch.cdist(rows.flatten(1), known.flatten(1).to(rows.dtype))
    return distances.topk(2, dim=1, largest=False)


def memorisation(samples: Tensor, training: Tensor, fresh: Tensor) -> dict[str, float]:
    """How many samples are copies of training rows, and how many of real unseen rows look so.

    A row counts as a copy if the nearest training row is less than a third as far away as the
    second nearest, as in Gu et al. 2023, arXiv:2310.02664. distance: mean distance to the nearest
    training row, divided by the same of the unseen rows: 0 for copies, 1 for samples as new as real
    rows are.
    """
    found = {}
    for name, rows in (("samples", samples), ("unseen", fresh)):
        near, _ = two_nearest(rows, training)
        found[name] = (near[:, 0] < near[:, 1] / 3).double().mean().item()
        found[f"{name}_distance"] = near[:, 0].mean().item()
    return {
        "memorised": found["samples"],
        "memorised_real": found["unseen"],
        "distance": found["samples_distance"] / found["unseen_distance"],
    }
