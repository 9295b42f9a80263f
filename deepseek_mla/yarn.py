"""YaRN: a model that was trained on short texts reads long ones.

Rotary embeddings turn each pair of channels by position · ω. Fast pairs turn many times within the
texts of training, so the model has met all their angles. A slow pair has turned a part of a circle
when the text ends; further on come angles that the model has never met, and attention goes wrong.
YaRN slows the slow pairs down by `factor`, so that a long text has the angles of a short one,
leaves the fast ones alone, since they tell neighbours apart, and mixes in between. And as a longer
text has more tokens to attend to, scores are made a little larger, by mscale².

    Peng et al. 2023, arXiv:2309.00071, §3.2 to §3.4; in DeepSeek: arXiv:2405.04434, §3.1.4

This file imports torch and math alone.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class YarnScaling:
    """How far a context is stretched, and which pairs of channels.

    Pairs that turn less than low_turns times within original_seq_len are slow, those that turn more
    than high_turns times are fast. Raises ValueError for values that make no sense.
    """

    factor: float = 40.0
    low_turns: float = 1.0
    high_turns: float = 32.0
    original_seq_len: int = 4096
    mscale: float = 1.0  # × 0.1 · ln factor: how much larger scores become, see `mscale`

    def __post_init__(self):
        ordered = 0 < self.low_turns <= self.high_turns < math.inf
        long_enough = 1 <= self.original_seq_len < 2**31
        finite = 1 <= self.factor < math.inf and 0 <= self.mscale < math.inf
        if not (finite and ordered and long_enough):
            raise ValueError(f"rope scaling needs factor ≥ 1 and 0 < low ≤ high, not {self}")


def yarn_frequencies(d_rope: int, theta: float, scaling: YarnScaling | None) -> Tensor:
    """Angle per position of each pair of channels, in radians: (P/2,) float64.

        ω_i = θ^(−2i/P)        (Su et al. 2021, arXiv:2104.09864, §3.2.2)

    With `scaling` ω_i becomes keep·ω_i + (1 − keep)·ω_i/factor; keep falls from 1 to 0, evenly by
    the number i of the pair, between the pair that turns high_turns times within the original
    context and the one that turns low_turns times (arXiv:2309.00071, Eq. 13 ff.).
    """
    pair = torch.arange(0, d_rope, 2, dtype=torch.float64, device="cpu")
    frequency = theta ** (-pair / d_rope)
    if scaling is None:
        return frequency
    first = max(math.floor(pair_that_turns(scaling.high_turns, d_rope, theta, scaling)), 0)
    last = min(math.ceil(pair_that_turns(scaling.low_turns, d_rope, theta, scaling)), d_rope - 1)
    keep = 1 - ((pair / 2 - first) / max(last - first, 1e-3)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


def pair_that_turns(turns: float, d_rope: int, theta: float, scaling: YarnScaling) -> float:
    """The number i, with a fraction, of the pair that turns so often: L·θ^(−2i/P) = 2π·turns."""
    slowest = math.log(scaling.original_seq_len / (2 * math.pi * turns))
    return d_rope * slowest / (2 * math.log(theta))


def mscale(scaling: YarnScaling | None) -> float:
    """0.1 · mscale · ln factor + 1 (arXiv:2309.00071, Eq. 22); 1 without YaRN.

    Query and key are both longer by that much, so scores are multiplied by its square.
    """
    return 1.0 if scaling is None else 0.1 * scaling.mscale * math.log(scaling.factor) + 1
