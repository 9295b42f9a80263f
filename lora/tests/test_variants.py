"""variants.py: rsLoRA, DoRA, PiSSA, LoRA+. What they share with LoRA is in test_lora.py."""

import copy
import math

import pytest
import torch
from helpers import Conv1D, config, stir, two_by_two
from torch import nn

import lora
from variants import learning_groups


def test_a_worked_example_of_dora():
    """Row 1 of W is √5 long and of W + ΔW √17: its output is scaled by √(5/17). b is not."""
    out = two_by_two(dora=True)(torch.tensor([1.0, 3.0], dtype=torch.float64))
    first = (4 * 1 - 1 * 3) * math.sqrt(5 / 17) + 10
    second = (15 * 1 - 8 * 3) * math.sqrt(25 / 289) + 20
    assert out.tolist() == pytest.approx([first, second], abs=1e-12)


def test_the_scale_of_rslora():
    """32 / √4, where LoRA's is 32 / 4."""
    assert config(rslora=True).scale == 16.0


def test_lora_plus_has_two_rates(base):
    model = copy.deepcopy(base)
    lora.adapt(model, config(dora=True))
    others, b = learning_groups(model, 16.0)
    assert (others["scale"], b["scale"]) == (1.0, 16.0)
    assert {id(p) for p in b["params"]} == {
        id(layer.adapters["default"].lora_b) for layer in lora.layers(model)
    }
    assert len(others["params"]) == 2 * len(b["params"])  # A and the lengths
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(learning) == 3 * len(b["params"])


def test_dora_and_pissa_of_transposed_layers():
    for changes in ({"dora": True}, {"pissa": True}):
        model, x = nn.Sequential(Conv1D()).double(), torch.randn(2, 6, dtype=torch.float64)
        lora.adapt(model, config(targets="0", rank=2, **changes))
        stir(model, 0.3)
        apart = model(x)
        lora.merge(model)
        assert (model(x) - apart).abs().max() < 1e-11


def test_pissa_begins_with_the_best_approximation(base):
    """‖W − scale·B·A‖² is Σ σ² beyond the rank: no matrix of it comes nearer (Eckart–Young)."""
    weights = [p.detach().clone() for n, p in base.named_parameters() if n.endswith("wq.weight")]
    model = copy.deepcopy(base)
    lora.adapt(model, config(pissa=True, targets="wq$"))
    for weight, layer in zip(weights, lora.layers(model), strict=True):
        adapter = layer.adapters["default"]
        rest = weight - adapter.scale * adapter.lora_b @ adapter.lora_a
        tail = torch.linalg.svdvals(weight)[4:].square().sum()
        assert rest.square().sum().item() == pytest.approx(tail.item(), rel=1e-10)
