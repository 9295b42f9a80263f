"""other_layers.py: GPT-2's transposed layer, embeddings and convolutions."""

import pytest
import torch
from helpers import Conv1D, config, stir
from torch import nn

import lora

OTHERS = {
    "linear": (lambda: nn.Linear(6, 9), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (Conv1D, lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (2, 3))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, bias=False),
               lambda: torch.randn(2, 4, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
                        lambda: torch.randn(2, 4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_layer(kind):
    """Start = base; merged = apart; the change has at most the rank that it should have."""
    make, draw = OTHERS[kind]
    model, x = nn.Sequential(make()).double(), draw()
    x = x.double() if x.is_floating_point() else x
    plain, weight = model(x), model[0].weight.detach().clone()
    lora.adapt(model, config(targets="0", rank=2, alpha=5.0))
    assert torch.equal(model(x), plain)
    stir(model, 1.0)
    apart = model(x)
    assert (apart - plain).abs().max() > 1e-2
    lora.merge(model)
    assert (model(x) - apart).abs().max() < 1e-11
    change = (model[0].base.weight - weight).flatten(1)
    assert torch.linalg.matrix_rank(change, atol=1e-9) == 2
    lora.unmerge(model)
    assert torch.equal(model[0].base.weight, weight)


def test_layers_that_cannot_be_adapted_are_no_match():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.LayerNorm(4)
    )
    with pytest.raises(ValueError, match="no layer"):
        lora.adapt(model, config(targets="."))
