"""Momentum and Muon against torch's own, the orthogonal direction, the schedules by hand."""

import pytest
import torch
from torch import nn

import optim
from model import NetConfig, build, parameters_by_kind
from optim import COEFFICIENTS, Momentum, groups, orthogonalize, scheduled


def walk(optimizer_of, steps: int = 10, shape=(5, 3, 2, 2)) -> torch.Tensor:
    """Where ten given gradients lead."""
    dice = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(shape, generator=dice, dtype=torch.float64))
    optimizer = optimizer_of([weight])
    for _ in range(steps):
        weight.grad = torch.randn(shape, generator=dice, dtype=torch.float64)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_torchs(decay, nesterov):
    options = {"lr": 0.03, "momentum": 0.8, "weight_decay": decay, "nesterov": nesterov}
    expected = walk(lambda p: torch.optim.SGD(p, **options))
    torch.testing.assert_close(walk(lambda p: Momentum(p, **options)), expected, rtol=0, atol=1e-13)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_muon_is_torchs(shape):
    """torch rounds to bfloat16 while it orthogonalises, so by 1 % of the way gone."""
    options = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.1}
    ours = walk(lambda p: Momentum([{"params": p, "orthogonal": True}], **options), shape=shape)
    theirs = walk(lambda p: torch.optim.Muon(p, **options), shape=shape)
    start = walk(lambda p: Momentum(p, 0.0), steps=0, shape=shape)
    assert (ours - theirs).norm() < 0.02 * (ours - start).norm()
    assert (ours - theirs).abs().max() > 0


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (6, 6)])
def test_orthogonalize_acts_on_singular_values_alone(shape):
    """Five times as + bs³ + cs⁵, worked out on the singular values of an exact decomposition."""
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalize(matrix), u @ s.diag() @ v, rtol=1e-9, atol=1e-9)
    assert ((s > 0.6) & (s < 1.25)).all()


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.06), (None, 1e-5)])
def test_orthogonalize_computes_in_the_format_it_is_told(dtype, error):
    """bfloat16 keeps three digits in each of five rounds; without a word float32 stays float32."""
    matrix = torch.randn(8, 5)
    exact = orthogonalize(matrix.double())
    rounded = orthogonalize(matrix, dtype=dtype)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < error * exact.norm()
    assert ((rounded - exact).norm() > 1e-3 * exact.norm()) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_multiplies_in_the_format_of_the_run(dtype, monkeypatch):
    """bfloat16 products are 20 × slower where the processor has no instructions for them."""
    used, original = [], optim.orthogonalize
    monkeypatch.setattr(
        optim, "orthogonalize", lambda m, dtype: used.append(dtype) or original(m, dtype=dtype)
    )
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    weight.grad = torch.randn(4, 3, 3, 3)
    Momentum([{"params": [weight], "orthogonal": True}], lr=0.1, dtype=dtype).step()
    assert used == [dtype] and weight.dtype == torch.float32


def test_nothing_comes_of_nothing():
    assert orthogonalize(torch.zeros(3, 4)).abs().max() == 0


def test_filters_move_as_matrices_and_by_their_shape():
    """√max(1, rows / columns): a filter bank of 27 × 3 moves by three times an orthogonal one."""
    gradient = torch.randn(27, 3, 1, 1, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(27, 3, 1, 1, dtype=torch.float64))
    weight.grad = gradient
    Momentum([{"params": [weight], "orthogonal": True}], lr=0.1, momentum=0.0).step()
    expected = -0.1 * 3 * orthogonalize(gradient.flatten(1)).view_as(gradient)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_weight_without_gradient_stays():
    weight = nn.Parameter(torch.ones(2))
    Momentum([weight], lr=1.0, weight_decay=1.0).step()
    assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["muon", "sgd"])
def test_groups_have_every_parameter_once(kind):
    model = build(NetConfig(width=4))
    filters, matrices, others = groups(parameters_by_kind(model), kind, 0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = [names[id(p)] for g in (filters, matrices, others) for p in g["params"]]
    assert sorted(seen) == sorted(names.values())
    assert {names[id(p)] for p in matrices["params"]} == {"fc.weight"}
    assert all("bn" in names[id(p)] or names[id(p)] == "fc.bias" for p in others["params"])
    assert (filters["orthogonal"], matrices["orthogonal"]) == (kind == "muon", False)
    assert filters["scale"] == (optim.MUON_LR if kind == "muon" else 1)
    # what decays in a step is lr · scale · weight_decay, the same for filters and matrices
    assert filters["scale"] * filters["weight_decay"] == pytest.approx(0.5)
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.5, 0)


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("onecycle", 0, 0.005 / 0.2),  # half a step into the rise
        ("onecycle", 19, 0.195 / 0.2),
        ("onecycle", 20, 0.795 / 0.8),
        ("onecycle", 59, 0.405 / 0.8),
        ("onecycle", 99, 0.005 / 0.8),
        ("step", 0, 1.0),
        ("step", 49, 1.0),
        ("step", 50, 0.1),
        ("step", 75, 0.01),
        ("constant", 99, 1.0),
    ],
)
def test_schedule_by_hand(kind, step, expected):
    assert scheduled(kind, step, 100, 0.2) == pytest.approx(expected)


def test_no_warmup_begins_at_the_top():
    assert scheduled("onecycle", 0, 100, 0.0) == pytest.approx(0.995)
