"""Many adapters on one base: switch between them, add them up, or use several in one batch.

`lora.adapt` gives each its name. So one server can hold one base and the adapters of many
customers, and answer them together: the large product with W is done once for all rows, and each
adapter adds its small product to the rows that are its own.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from lora import LoraLayer, layers, refuse_merged


def activate(model: nn.Module, shares: dict[str, float]) -> None:
    """Use these adapters from now on, each with its share; {} is the base model.

    The corrections are added up, share · ΔW. Raises ValueError for a name that no layer has, and
    while the model is merged.
    """
    refuse_unknown(model, shares.keys())
    refuse_merged(model)
    for layer in layers(model):
        layer.active = {name: x for name, x in shares.items() if name in layer.adapters}


@contextlib.contextmanager
def one_adapter_a_row(model: nn.Module, names: list[str | None]) -> Iterator[None]:
    """Inside, row i of a batch is computed with the adapter names[i]; None is the base model.

    Raises ValueError for a name that no layer has, while the model is merged, and, in the forward
    pass, for a batch with another number of rows.
    """
    refuse_unknown(model, {name for name in names if name is not None})
    refuse_merged(model)
    for layer in layers(model):
        layer.by_row = partial(by_row, names)
    try:
        yield
    finally:
        for layer in layers(model):
            layer.by_row = None


def by_row(names: list[str | None], layer: LoraLayer, x: Tensor) -> Tensor:
    """One product with W for all rows, and a small one for the rows of each adapter."""
    if len(names) != len(x):
        raise ValueError(f"{len(names)} names of adapters for {len(x)} rows")
    plain = layer.base(x)
    out = plain.clone()
    for name in sorted({name for name in names if name in layer.adapters}):
        rows = torch.tensor([i for i, one in enumerate(names) if one == name], device=x.device)
        out[rows] += layer.adapters[name].correction(layer, x[rows], plain[rows])
    return out


def refuse_unknown(model: nn.Module, names) -> None:
    """ValueError for a name that no layer has an adapter of."""
    known = {name for layer in layers(model) for name in layer.adapters}
    if unknown := sorted(set(names) - known):
        raise ValueError(f"there is no adapter {unknown[0]!r}, only {sorted(known)}")
