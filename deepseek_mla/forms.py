"""Naive = cached = absorbed, checked on the model at hand.

The three are one function written in three ways, so in float64 they differ by rounding alone, by
about 1e-14. `--train` checks that at every look at the validation part and says so in its line.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from mla import absorbed, naive
from model import Deepseek, LatentAttention


@contextlib.contextmanager
def using(model: nn.Module, form: Callable) -> Iterator[None]:
    """Within it, all attention of `model` has this form: `naive`, `absorbed` or `fewest`."""
    layers = [m for m in model.modules() if isinstance(m, LatentAttention)]
    before = [layer.form for layer in layers]
    for layer in layers:
        layer.form = form
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.form = old


def cached_logits(model: Deepseek, tokens: Tensor, chunk: int) -> Tensor:
    """Logits of tokens (B, T) that come `chunk` at a time, through the cache: (B, T, V)."""
    cache = model.new_cache(*tokens.shape)
    return torch.cat([model(part, cache) for part in tokens.split(chunk, dim=1)], dim=1)


@torch.no_grad()
def largest_difference(model: Deepseek, tokens: Tensor) -> float:
    """How far apart the logits of the forms are, on a model in float64.

    Whole texts, three tokens at a time and one at a time, naive and absorbed. tokens: (B, T).
    """
    found = []
    for form in (naive, absorbed):
        with using(model, form):
            found += [model(tokens), cached_logits(model, tokens, 3)]
            found.append(cached_logits(model, tokens, 1))
    return max((logits - found[0]).abs().max().item() for logits in found[1:])
