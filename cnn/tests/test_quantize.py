"""Folding changes nothing, integers are integers, and eight bits are nearly as good."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import data
from augment import normalize
from model import PRESETS, build
from quantize import TOP, Int8, compare, fold, quantize, sums_are_equal

NAMES = ["fast", "lenet", "resnet20", "resnet18", "resnet18-imagenet"]


def network(name: str) -> nn.Module:
    """Statistics and γ of either sign, far from where they begin."""
    config = dataclasses.replace(PRESETS[name], width=6)
    model = build(config).double().eval()
    for key, tensor in model.state_dict().items():
        if tensor.dim() == 1 or key.startswith("fc"):
            tensor.copy_(torch.rand(tensor.shape) + 0.3)
            if key.endswith("bn1.weight"):
                tensor[::2] *= -1
    return model


@pytest.mark.parametrize("name", NAMES)
def test_folded_is_the_same_network_without_normalisation(name):
    model, x = network(name), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    small = fold(model)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in small.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == (name != "lenet")


def test_folding_by_hand():
    """γ = 6, σ² + ε = 9, μ = 4, β = 1, w = 5, b = 2: w' = 10, b' = 1 + (2 − 4)·2 = −3."""
    conv, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.5)
    with torch.no_grad():
        for tensor, value in ((conv.weight, 5), (conv.bias, 2), (norm.weight, 6), (norm.bias, 1),
                              (norm.running_mean, 4), (norm.running_var, 8.5)):  # fmt: skip
            tensor.fill_(value)
    small = fold(nn.Sequential(conv, norm))
    assert (small[0].weight.item(), small[0].bias.item()) == pytest.approx((10, -3))
    assert conv.weight.item() == 5


CONVOLUTIONS = {
    "conv": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 7, "stride": 2, "padding": 3},
    "1 × 1": {"kernel_size": 1, "stride": 2},
    "dilated": {"kernel_size": 3, "dilation": (2, 3), "padding": (2, 1)},
    "grouped": {"kernel_size": 3, "groups": 2},
}


def full_layer(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer in float32 and an input for it, the same ones each time."""
    torch.manual_seed(5)
    if kind == "linear":
        return nn.Linear(40, 7), torch.randn(5, 40)
    return nn.Conv2d(6, 8, **CONVOLUTIONS[kind]), torch.randn(2, 6, 9, 12)


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "linear"])
def test_integers_and_floats_agree_to_the_bit(kind):
    full, x = full_layer(kind)
    small = Int8(full, torch.tensor(3.0))
    q = small.quantized(x)
    assert torch.equal(q, q.round()) and q.abs().max() <= TOP
    integers = small.integer_sums(q)
    assert integers.dtype == torch.int32
    assert torch.equal(integers.double(), small.sums(q).double())


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "linear"])
def test_the_error_is_that_of_rounding(kind):
    """At most half a step of the input and of each weight, times what it is multiplied with."""
    full, x = full_layer(kind)
    small, x = Int8(full, torch.tensor(3.0)), x.clamp(-3, 3)
    scale = small.scale.view((-1,) + (1,) * (full.weight.dim() - 1))
    assert ((small.weight * scale - full.weight).abs() <= scale * 0.501).all()
    n = full.weight[0].numel()
    bound = n * (3 / TOP / 2 * full.weight.abs().max() + small.scale.max() / 2 * 3.1)
    assert (small(x) - full(x)).abs().max() < bound
    assert (small(x) - full(x)).abs().max() < 0.03 * full(x).abs().max()


def test_what_is_larger_than_ever_seen_is_cut_off():
    small = Int8(nn.Linear(1, 1), torch.tensor(2.0))
    assert small.quantized(torch.tensor([[5.0], [-9.0], [2.0], [1.0]])).flatten().tolist() == [
        TOP, -TOP, TOP, 64]  # fmt: skip


@pytest.mark.parametrize(("n", "dtype"), [(1040, torch.float32), (1041, torch.float64)])
def test_float64_where_float32_could_round(n, dtype):
    """127 · 127 · 1,040 < 2²⁴ = 16,777,216 < 127 · 127 · 1,041."""
    full = nn.Linear(n, 1)
    nn.init.ones_(full.weight)
    small = Int8(full, torch.tensor(1.0))
    assert small.exact == dtype
    q = torch.full((1, n), float(TOP))
    assert small.sums(q).item() == n * TOP**2 == small.integer_sums(q).item()


def test_a_whole_network_saved_and_loaded(tmp_path):
    net = checkpoint.load(Path(__file__).resolve().parent.parent / "pretrained")
    found = data.load()
    pictures = normalize(found.train.images[:64], net.mean, net.std)
    small = checkpoint.export_int8(net, pictures, tmp_path)
    again = checkpoint.load(tmp_path)
    assert torch.equal(again.model(pictures), small.model(pictures))
    assert again.facts == net.facts
    files = (tmp_path / "model.safetensors").stat().st_size
    assert files < 0.3 * sum(t.nbytes for t in net.model.state_dict().values())
    part = dataclasses.replace(found, test=found.test[:300])
    score = compare(net.model, again.model, part, net)
    assert score["fold_error"] < 1e-12
    assert score["int8_equal"] is True
    assert score["same_class"] >= 0.97
    assert abs(score["accuracy"] - score["int8_accuracy"]) < 0.02


def test_unequal_sums_are_noticed(monkeypatch):
    model, x = network("fast").float(), torch.randn(2, 3, 32, 32)
    small = quantize(model, x)
    assert sums_are_equal(small, x)
    monkeypatch.setattr(Int8, "integer_sums", lambda self, q: self.sums(q) + 1)
    assert not sums_are_equal(small, x)


def test_quantizing_leaves_the_model_alone():
    model, x = network("fast").float(), torch.randn(2, 3, 32, 32)
    before = model(x)
    quantize(model, x)
    assert torch.equal(model(x), before)
    assert F.relu(before).shape == (2, 10)
