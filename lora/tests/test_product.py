"""product.py: the joined product is the plain one, forward and backward, and knows when it is."""

import copy

import pytest
import torch
from helpers import EVERY, adapted, config, loss_of, same, stir
from torch import nn

import lora
from lora import LoraConfig
from product import JoinedLayer, LowRankProduct, many_tokens


def wide(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (1, 4), (0, 4), (3, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_gradients_are_the_differences(shape, bias):
    """Each against (f(x + h) − f(x − h)) / 2h; W and bias have none, since they are frozen."""
    weight, added = wide(6, 4).detach(), wide(6).detach() if bias else None
    product = lambda x, a, b: LowRankProduct.apply(x, weight, added, a, b, 1.7)  # noqa: E731
    assert torch.autograd.gradcheck(product, (wide(*shape), wide(2, 4), wide(6, 2)))


@pytest.mark.parametrize(("dtype", "n", "many"), [
    (torch.float32, 7, True), (torch.float64, 7, True), (torch.float32, 6, False),
    (torch.bfloat16, 700, False), (torch.float16, 700, False)])  # fmt: skip
def test_when_tokens_are_many(dtype, n, many):
    """More than W (6, 4) has rows, and in a format with the digits for it."""
    assert many_tokens(torch.zeros(n, 4, dtype=dtype), torch.zeros(6, 4, dtype=dtype)) == many


@pytest.mark.parametrize("n", [5, 50])
def test_a_small_correction_is_not_lost_in_bfloat16(n):
    """256 and 256.5 are one number in bfloat16; W + ½ would be W. The output is 1 · ½ larger."""
    weight, x = torch.full((4, 4), 256.0).bfloat16(), torch.zeros(n, 4).bfloat16()
    x[:, 0], x[:, 1] = 1.0, -1.0  # so that W·x = 0
    a, b = torch.tensor([[0.5, 0.0, 0.0, 0.0]]).bfloat16(), torch.ones(4, 1).bfloat16()
    assert LowRankProduct.apply(x, weight, None, a, b, 1.0).unique().tolist() == [0.5]


def test_tokens_that_are_no_block_of_memory():
    """A transposed input and a transposed gradient, as attention makes them."""
    x, weight, a, b = wide(3, 4, 5), wide(6, 4).detach(), wide(2, 4), wide(6, 2)
    product = lambda x, a, b: LowRankProduct.apply(x.mT, weight, None, a, b, 0.6).mT  # noqa: E731
    assert torch.autograd.gradcheck(product, (x, a, b))


def test_a_second_derivative_is_refused_and_not_wrong():
    x, a, b = wide(3, 4), wide(2, 4), wide(6, 2)
    out = LowRankProduct.apply(x, wide(6, 4).detach(), None, a, b, 2.0).square().sum()
    (gradient,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def twins(base, **changes) -> tuple[nn.Module, nn.Module]:
    """The same adapted model, by autograd's own rules and by the joined product."""
    plain, joined = copy.deepcopy(base), copy.deepcopy(base)
    lora.adapt(plain, LoraConfig(rank=4, alpha=32.0, targets=EVERY, **changes))
    lora.adapt(joined, config(**changes))
    stir(plain)
    joined.load_state_dict(plain.state_dict())
    kinds = {type(layer) for layer in lora.layers(joined)}
    assert kinds == {JoinedLayer} and type(lora.layers(plain)[0]) is lora.LoraLayer
    return plain, joined


def test_a_model_by_either_way(base, tokens):
    """Logits and the gradients of all that learns."""
    plain, joined = twins(base)
    assert many_tokens(tokens.view(-1, 1), joined.blocks[0].attention.wk.base.weight)
    assert not many_tokens(tokens.view(-1, 1), joined.blocks[0].ffn.w1.base.weight)
    assert (plain(tokens) - joined(tokens)).abs().max() < 1e-12
    for model in (plain, joined):
        loss_of(model, tokens).backward()
    for a, b in zip(plain.parameters(), joined.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or (a.grad - b.grad).abs().max() < 1e-12


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_by_either_way(base, tokens, autocast):
    """Under autocast, and with base and input in bfloat16, up to its three digits."""
    plain, joined = twins(base.float())
    if not autocast:
        for layer in (*lora.layers(plain), *lora.layers(joined)):
            layer.base.bfloat16()
        x = torch.randn(3, 24, dtype=torch.bfloat16)
        a, b = (model.blocks[0].attention.wq(x) for model in (plain, joined))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            a, b = plain(tokens), joined(tokens)
            loss_of(joined, tokens).backward()
        assert all(p.grad.dtype == torch.float32 for p in joined.parameters() if p.requires_grad)
    assert a.dtype == b.dtype == torch.bfloat16
    assert (a - b).abs().max() < 0.05 * a.abs().max()


def joins(model: nn.Module, x: torch.Tensor) -> bool:
    return lora.layers(model)[0].can_join(x)


def test_when_it_is_not_the_joined_product(base):
    """Dropout in training, several adapters, other kinds, other formats, a base that learns."""
    x = torch.randn(2, 24, dtype=torch.float64)
    model = adapted(base, dropout=0.5)
    assert joins(model, x) and not joins(model.train(), x) and not joins(model.eval(), x.float())
    assert not joins(adapted(base, dora=True), x) and not joins(adapted(base, pissa=True), x)
    two = adapted(adapted(base), "b")
    assert joins(two, x)
    for layer in lora.layers(two):
        layer.active = {"default": 0.5, "b": 0.5}
    assert not joins(two, x)
    layer = lora.layers(model)[0]
    layer.base.weight.requires_grad_(True)
    assert not joins(model, x)
    layer(x).sum().backward()
    assert layer.base.weight.grad.norm() > 0
    layer.active = {}
    assert torch.equal(layer(x), layer.base(x))


def test_a_share_is_a_share(base, tokens):
    model = adapted(base)
    states = copy.deepcopy(model.state_dict())
    outs = []
    for share in (0.0, 0.5, 1.0):
        for layer in lora.layers(model):
            layer.active = {"default": share}
        outs.append(model.blocks[0].attention.wq(torch.ones(1, 24, dtype=torch.float64)))
    assert torch.allclose(outs[1] - outs[0], 0.5 * (outs[2] - outs[0]))
    assert same(model.state_dict(), states)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, of its tracer
def test_compiled_without_a_break_it_is_the_same():
    """torch.compile follows forward and backward pass; `aot_eager` leaves out making kernels."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    lora.adapt(model, config(targets=".", rank=2))
    stir(model)
    x, found = torch.randn(20, 6, dtype=torch.float64), []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        forward(x).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*found, strict=True))
