"""fused.py: adapters of some of the parts of one matrix."""

import pytest
import torch
from helpers import Conv1D, stir
from torch import nn

import lora
import memory
from fused import FusedConfig


def config(*parts, **changes) -> FusedConfig:
    return FusedConfig(**{"rank": 2, "alpha": 5.0, "targets": "0", "parts": parts} | changes)


@pytest.mark.parametrize(
    "enabled", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
)
def test_parts_of_a_fused_layer(enabled):
    """q (8 rows), k (4), v (4) in one matrix: only rows of adapted parts change, by rank 2."""
    sizes, x = (8, 4, 4), torch.randn(3, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 16)).double()
    weight, plain = model[0].weight.detach().clone(), model(x)
    parts = [(size, bool(on)) for size, on in zip(sizes, enabled, strict=True)]
    lora.adapt(model, config(*parts))
    learns = sum(2 * (6 + size) for size, on in parts if on)
    assert torch.equal(model(x), plain) and memory.trainable(model)[0] == learns
    stir(model, 1.0)
    apart = model(x)
    lora.merge(model)
    assert (model(x) - apart).abs().max() < 1e-11
    changes = (model[0].base.weight - weight).split(sizes)
    for change, on in zip(changes, enabled, strict=True):
        assert torch.linalg.matrix_rank(change, atol=1e-9) == (2 if on else 0)


def test_each_part_has_an_a_of_its_own():
    """By hand: rows 1 and 3 of W are two parts with A = (1, 0) and (0, 1), B = 2 and 3, scale 5."""
    model = nn.Sequential(nn.Linear(2, 3, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    lora.adapt(model, config((1, True), (1, False), (1, True), rank=1))
    adapter = model[0].adapters["default"]
    with torch.no_grad():
        adapter.lora_a.copy_(torch.eye(2))
        adapter.lora_b.copy_(torch.tensor([[2.0], [3.0]]))
    assert model(torch.tensor([1.0, 10.0], dtype=torch.float64)).tolist() == [10.0, 0.0, 150.0]


def test_parts_of_a_transposed_layer():
    """GPT-2 keeps q, k and v in a Conv1D: 9 columns are 3 parts here."""
    model, x = nn.Sequential(Conv1D()).double(), torch.randn(2, 6, dtype=torch.float64)
    plain = model(x)
    lora.adapt(model, config((3, True), (3, False), (3, True)))
    stir(model, 1.0)
    apart = model(x)
    assert torch.equal(apart[:, 3:6], plain[:, 3:6]) and (apart - plain)[:, :3].abs().min() > 0
    lora.merge(model)
    assert (model(x) - apart).abs().max() < 1e-11


@pytest.mark.parametrize(
    ("parts", "changes", "word"),
    [([(8, True)], {}, "must have 16 rows"), ([(16, False)], {}, "one at least"),
     ([], {}, "one at least"), ([(16, True)], {"dora": True}, "do not go together"),
     ([(16, True)], {"rank": 7}, "rank 7 is more")],
)  # fmt: skip
def test_parts_that_cannot_be(parts, changes, word):
    with pytest.raises(ValueError, match=word):
        lora.adapt(nn.Sequential(nn.Linear(6, 16)), config(*parts, **changes))
    with pytest.raises(ValueError, match="linear layers alone"):
        lora.adapt(nn.Sequential(nn.Embedding(6, 4)), config((4, True)))
