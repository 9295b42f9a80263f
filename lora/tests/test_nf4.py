"""The sixteen values, their error, and the base in 4 bits."""

import pytest
import torch
from torch import nn

import loading
import lora
import memory
import nf4
from options import UserError
from variants import AdapterConfig, learning_groups

PUBLISHED = [  # QLoRA, appendix E, as the paper prints them
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_table_is_the_published_one():
    assert nf4.table().tolist() == pytest.approx(PUBLISHED, abs=2e-7)


def test_the_values_are_equally_likely_enough():
    """Of normal weights in blocks no value gets more than 1.8 × its share of a sixteenth."""
    codes, _ = nf4.quantize_blocks(torch.randn(64 * 4000))
    share = torch.bincount(codes.long(), minlength=16) / len(codes) * 16
    assert 0.2 < share.min() and share.max() < 1.8


def test_each_weight_gets_the_nearest_value():
    weight = torch.randn(64 * 10)
    codes, scales = nf4.quantize_blocks(weight)
    ratio = weight.view(-1, 64) / scales[:, None]
    nearest = (ratio[..., None] - nf4.table()).abs().argmin(dim=-1)
    assert torch.equal(codes.view(-1, 64).long(), nearest)


@pytest.mark.parametrize("spread", ["normal", "uniform", "one large", "zeros"])
def test_the_error_is_within_the_bound(spread):
    """|w − ŵ| ≤ largest half gap · scale + error of the scale, which is half a step of 255."""
    weight = {
        "normal": torch.randn(70, 33),
        "uniform": torch.rand(70, 33) - 0.5,
        "one large": torch.randn(70, 33) * 1e-3,
        "zeros": torch.zeros(70, 33),
    }[spread]
    if spread == "one large":
        weight[3, 5] = 10.0
    linear = nn.Linear(33, 70, bias=False)
    linear.weight.data = weight
    _, scales = nf4.quantize_blocks(weight)
    layer = nf4.NF4Linear(linear)
    off_scale = (layer.scales - scales).abs()
    assert (off_scale <= (scales.max() - scales.min()) / 255 / 2 * 1.001 + 1e-7).all()
    bound = nf4.largest_error() * scales + off_scale
    bound = bound.repeat_interleave(64)[: weight.numel()].view_as(weight)
    assert ((layer.weight - weight).abs() <= bound * 1.0001 + 1e-7).all()


def test_the_bound_is_reached_somewhere():
    """A weight in the middle of the widest gap is off by all of it: no smaller bound holds."""
    values = nf4.table()
    gap = values.diff().argmax()
    weight = torch.zeros(64)
    weight[0], weight[1] = 1.0, (values[gap] + values[gap + 1]) / 2
    codes, scales = nf4.quantize_blocks(weight)
    error = (values[codes.long()] * scales - weight).abs().max()
    assert error.item() == pytest.approx(nf4.largest_error(), rel=1e-5)


def test_bits_a_weight():
    """4 + 8/64 + 32/(64·256) = 4.127, and 32 more for the least scale of a layer."""
    layer = nf4.NF4Linear(nn.Linear(1024, 1024, bias=False))
    bits = 8 * memory.n_byte(layer.buffers()) / 1024**2
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_odd_sizes_and_bias():
    linear, x = nn.Linear(7, 3), torch.randn(2, 7)
    layer = nf4.NF4Linear(linear)
    assert layer(x).shape == (2, 3)
    assert torch.allclose(layer(x), x @ layer.weight.T + linear.bias)


def test_qlora_learns_beside_a_base_that_cannot(base):
    """Only A and B have gradients, the codes stay, and merging is refused."""
    model = base.float()
    loading.attach(model, AdapterConfig(rank=2, alpha=6.0, targets=r"\.(wq|w2)$", quantize=True))
    codes = [layer.base.codes.clone() for layer in lora.layers(model)]
    optimizer = torch.optim.AdamW(learning_groups(model), lr=1e-2)
    rows, losses = torch.randint(97, (2, 17)), []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    after = [layer.base.codes for layer in lora.layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(codes, after, strict=True))
    with pytest.raises(ValueError, match="4 bits"):
        lora.merge(model)


def test_what_is_no_linear_layer_is_refused(base):
    lora.untie(base, "head")
    with pytest.raises(UserError, match="no linear layer"):
        loading.attach(base, AdapterConfig(rank=2, targets="embedding", quantize=True))


def test_memory_planned_is_memory_measured(base):
    """All weights: four numbers each. LoRA: the base once, and three more of what learns."""
    model = base.float()
    n = sum(p.numel() for p in model.parameters())
    assert memory.planned(model) == {"weights": 4 * n, "gradients": 4 * n, "moments": 8 * n}
    lora.adapt(model, AdapterConfig(rank=2, targets=r"\.wq$"))
    learns = memory.trainable(model)[0]
    assert learns == 2 * 2 * (24 + 40)
    optimizer = torch.optim.AdamW(learning_groups(model))
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    measured = {"weights": 4 * (n + learns), "gradients": 4 * learns, "moments": 8 * learns}
    assert memory.planned(model) == memory.measured(model, optimizer) == measured
