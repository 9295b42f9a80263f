"""Sprites: pictures of which it is known what varies, to see whether latents find it.

    shape   square, disc or cross          size   4 widths: 5, 7, 9 and 11 pixels
    x, y    10 places each, from the left and from the top

A picture is 20 × 20 pixels, black and white, and there is one for each combination: 1,200. All is
drawn in integers, so the pictures are the same on every machine: a small cousin of dSprites
(Matthey et al. 2017). `gap` is the mutual information gap: it is 1 where each factor is known from
one latent and from no other, and 0 where that knowledge is spread.

Key: N pictures, S = 20 their side, D latents, F factors.
"""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

S = 20
CLASSES = ("square", "disc", "cross")
FACTORS = {"shape": 3, "size": 4, "x": 10, "y": 10}
BINS = 20  # a latent's values are sorted into so many classes of equal width, as in 1811.12359


def mask(shape: int, size: int, x: int, y: int) -> np.ndarray:
    """One picture (S, S) of 0 and 1. All of it is inside: the centre is at 5 … 14."""
    down, right = (2 * (np.arange(S) - place - 5) for place in (y, x))  # in half pixels
    radius = (5, 7, 9, 11)[size]
    v, u = abs(down)[:, None], abs(right)[None, :]
    if shape == 0:
        return (v < radius) & (u < radius)
    if shape == 1:
        return u * u + v * v <= radius * radius
    return ((v < radius) & (u < 2)) | ((u < radius) & (v < 2))


def load() -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray], np.ndarray]:
    """(CLASSES, (pictures (N, S, S) of bytes, shapes (N,)), factors (N, F)), every combination."""
    factors = np.array(list(itertools.product(*(range(n) for n in FACTORS.values()))))
    pictures = np.array([mask(*row) for row in factors.tolist()])
    return CLASSES, (pictures * np.uint8(255), factors[:, 0]), factors


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """Σ p(a, b) log (p(a, b) / (p(a) p(b))) in nats, by counting two lists of whole numbers."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1 / len(a))
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
    here = table > 0
    return float((table[here] * np.log(table[here] / expected[here])).sum())


def binned(values: np.ndarray) -> np.ndarray:
    """Which of BINS classes of equal width each value is in; all in one if nothing varies."""
    low, high = values.min(), values.max()
    if high - low < 1e-6:
        return np.zeros(len(values), dtype=int)
    return np.minimum(((values - low) / (high - low) * BINS).astype(int), BINS - 1)


def information(mu: Tensor, factors: np.ndarray) -> np.ndarray:
    """How much each latent says about each factor, (D, F), as a share of what there is to know.

    mu: (N, D), the means of q(z|x) of N pictures with these factors (N, F).
    """
    latents = [binned(column) for column in mu.double().numpy().T]
    found = [[mutual_information(z, f) for f in factors.T] for z in latents]
    return np.array(found) / [math.log(n) for n in FACTORS.values()]


def gap(shares: np.ndarray) -> float:
    """The mutual information gap, 1802.04942, §4.1: best minus second-best latent, a mean.

    shares: (D, F) of `information`. 0 … 1; 1 is one latent for each factor and none beside it.
    """
    ordered = np.sort(np.vstack([shares, np.zeros_like(shares[:1])]), axis=0)
    return float((ordered[-1] - ordered[-2]).mean())


def all_pictures() -> Tensor:
    """Every picture as a network takes it: (N, 1, S, S) of 0 and 1."""
    return torch.from_numpy(load()[1][0]).float()[:, None] / 255
