"""Ten steps of every optimizer against torch in float64, with constants far from defaults."""

import inspect

import numpy as np
import pytest
import torch

import optim
import tensor as pg
from tensor import ShapeError, Tensor

ADVERSE = {"lr": 0.05, "eps": 1e-2, "weight_decay": 0.1}
CASES = {
    "SGD": ("SGD", {"lr": 0.05, "weight_decay": 0.1}),
    "SGD momentum": ("SGD", {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}),
    "SGD nesterov": ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    "RMSprop": ("RMSprop", dict(alpha=0.8, **ADVERSE)),
    "Adagrad": ("Adagrad", dict(**ADVERSE)),
    "Adam": ("Adam", dict(betas=(0.8, 0.95), **ADVERSE)),
    "Adam plain": ("Adam", {"lr": 0.05}),
    "AdamW": ("AdamW", dict(betas=(0.8, 0.95), **ADVERSE)),
    "Muon": ("Muon", {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.8}),
    "Muon plain momentum": ("Muon", {"lr": 0.05, "nesterov": False, "ns_steps": 3}),
}
START = {"w": np.random.default_rng(0).standard_normal((5, 3)),
         "v": np.random.default_rng(1).standard_normal((2, 4))}  # fmt: skip


def ten_steps(lib, make, tensors, steps=10):
    """Minimise a curved function of two matrices; returns them after every step."""
    optimizer, trace = make(list(tensors)), []
    w, v = tensors
    for _ in range(steps):
        optimizer.zero_grad()
        (
            lib.tanh(w).sum() ** 2 + (w[:4, :2].mT @ w[:4, :2] * v[:, :2]).sum() + (v**4).sum()
        ).backward()
        optimizer.step()
        trace.append([p.detach().numpy().copy() for p in tensors])
    return trace


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_equal_torch(name, monkeypatch):
    """Torch's Muon rounds to bfloat16 inside; with that taken out it must agree as well."""
    kind, options = CASES[name]
    if kind == "Muon":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours = [Tensor(a, requires_grad=True) for a in START.values()]
    theirs = [torch.tensor(a, requires_grad=True) for a in START.values()]
    a = ten_steps(pg, lambda p: getattr(optim, kind)(p, **options), ours)
    b = ten_steps(torch, lambda p: getattr(torch.optim, kind)(p, **options), theirs)
    for mine, torchs in zip(a, b, strict=True):
        for x, y in zip(mine, torchs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)
    assert np.abs(a[-1][0] - START["w"]).max() > 0.01  # they moved


@pytest.mark.parametrize("kind", ["SGD", "RMSprop", "Adagrad", "Adam", "AdamW", "Muon"])
def test_defaults_are_torchs(kind):
    ours = inspect.signature(getattr(optim, kind)).parameters
    theirs = inspect.signature(getattr(torch.optim, kind)).parameters
    for name, parameter in ours.items():
        if name != "params":
            assert parameter.default == theirs[name].default, name


def test_lion_equals_its_paper():
    """Alg. 2 of arXiv:2302.06675, written out once more with other words."""
    x = START["w"].copy()
    p = Tensor(x, requires_grad=True)
    optimizer = optim.Lion([p], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    momentum = np.zeros_like(x)
    for _ in range(10):
        p.grad = Tensor(np.cos(3 * p.detach().numpy()))
        g = np.cos(3 * x)
        update = np.sign(momentum * 0.8 + g * 0.2)
        x = x - 0.05 * update - 0.05 * 0.1 * x
        momentum = momentum * 0.95 + g * 0.05
        optimizer.step()
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-12, atol=1e-13)


def test_orthogonalize_moves_singular_values_near_one():
    g = np.random.default_rng(2).standard_normal((20, 7))
    for matrix in (g, g.T, 1e6 * g):
        s = np.linalg.svd(optim.orthogonalize(matrix), compute_uv=False)
        assert s.min() > 0.6 and s.max() < 1.3
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    assert np.vdot(optim.orthogonalize(g), u @ vt) / 7 > 0.7


def test_groups_have_their_own_options():
    a, b = (Tensor([1.0], requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    for p in (a, b):
        p.grad = Tensor([1.0])
    optimizer.step()
    assert (a.item(), b.item()) == (pytest.approx(0.9), 0.5)
    optimizer.lr = 0.2
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.2]


def test_a_parameter_without_a_gradient_stays():
    a, b = Tensor([1.0], requires_grad=True), Tensor([1.0], requires_grad=True)
    optimizer = optim.AdamW([a, b], lr=0.1)
    b.grad = Tensor([1.0])
    optimizer.step()
    assert a.item() == 1.0 and b.item() != 1.0


def test_state_dict_goes_on_exactly():
    def make(p):
        return optim.Adam(p, lr=0.05, betas=(0.7, 0.9))

    whole = ten_steps(pg, make, [Tensor(a, requires_grad=True) for a in START.values()])
    first = make(p := [Tensor(a, requires_grad=True) for a in START.values()])
    ten_steps(pg, lambda _: first, p, 4)
    second = optim.Adam(p, lr=0.9)
    second.load_state_dict(first.state_dict())
    rest = ten_steps(pg, lambda _: second, p, 6)
    for x, y in zip(whole[-1], rest[-1], strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(KeyError, match="does not belong to SGD"):
        optim.SGD(p, lr=0.1).load_state_dict(first.state_dict())
    with pytest.raises(ShapeError, match=r"'0.mean' has shape \(2,\)"):
        second.load_state_dict({"0.mean": np.ones(2)})


def test_gradients_are_left_alone():
    for name, (kind, options) in CASES.items():
        p = Tensor(START["w"], requires_grad=True)
        p.grad = Tensor(START["w"] + 1)
        getattr(optim, kind)([p], **options).step()
        np.testing.assert_array_equal(p.grad.numpy(), START["w"] + 1, err_msg=name)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_clipping_equals_torch(limit):
    ours = [Tensor(a, requires_grad=True) for a in START.values()]
    theirs = [torch.tensor(a, requires_grad=True) for a in START.values()]
    for p, q, a in zip(ours, theirs, START.values(), strict=True):
        p.grad, q.grad = Tensor(3 * a), torch.tensor(3 * a)
    norm = optim.clip_grad_norm_(ours, limit)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, limit).item(), rel=1e-12)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-12)
    optim.clip_grad_value_(ours, 0.01)
    torch.nn.utils.clip_grad_value_(theirs, 0.01)
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.abs(p.grad.numpy()).max(), q.grad.abs().max().numpy())


def lrs(schedule_of, steps=20):
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.3)
    schedule, found = schedule_of(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_equal_torch():
    S = torch.optim.lr_scheduler
    expected = lrs(lambda o: S.StepLR(o, 6, gamma=0.3))
    assert [0.3 * optim.step_decay(t, 6, 0.3) for t in range(20)] == pytest.approx(expected)
    expected = lrs(lambda o: S.OneCycleLR(o, 0.3, total_steps=20, cycle_momentum=False), 19)
    assert [0.3 * optim.one_cycle(t, 20) for t in range(19)] == pytest.approx(expected)
    expected = lrs(lambda o: S.CosineAnnealingLR(o, 20, eta_min=0.03))
    assert [0.3 * optim.warmup_cosine(t, 0, 20, 0.1) for t in range(20)] == pytest.approx(expected)
    assert [optim.warmup_cosine(t, 4, 20) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [optim.one_cycle(t, 2, rise=0.5) for t in (0, 1)] == pytest.approx([1.0, 4e-6])
    assert optim.warmup_cosine(99, 4, 20, 0.1) == pytest.approx(0.1)


def test_schedule_sets_every_group():
    a, b = (Tensor([1.0], requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    schedule = optim.Schedule(optimizer, lambda t: 1 / (t + 1))
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5]
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.25]


def test_refusals():
    x = Tensor([1.0], requires_grad=True)
    for make, words in (
        (lambda: optim.SGD([], lr=0.1), "no parameters"),
        (lambda: optim.SGD([Tensor([1.0])], lr=0.1), "requires gradients"),
        (lambda: optim.SGD([x * 2.0], lr=0.1), "leaf"),
        (lambda: optim.SGD([x, x], lr=0.1), "given twice"),
        (lambda: optim.SGD([x], lr=-1), "lr must be"),
        (lambda: optim.SGD([x], lr=float("nan")), "lr must be"),
        (lambda: optim.SGD([x], nesterov=True), "nesterov needs momentum"),
        (lambda: optim.SGD([{"params": [x], "betas": 1}], lr=0.1), "no option betas"),
        (lambda: optim.Muon([x]), r"matrices, a parameter has shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
