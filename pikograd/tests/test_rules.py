"""What everybody writes first, and where torch and numpy disagree: pikograd does as torch does."""

import inspect
import math

import numpy as np
import pytest
import torch

import nn
import optim
import tensor as pg
from engine import GraphError, ShapeError
from tensor import Tensor, elementwise, primitive
from transforms import checkpoint
from value import Value


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


# ── In place ──────────────────────────────────────────────────────────────────────────────────────


def fit_line(update):
    """w after 30 steps towards 2 of (w·1 − 2)², with the given update of w."""
    w = leaf(0.0)
    for _ in range(30):
        ((w - 2.0) ** 2).sum().backward()
        w = update(w)
        w.grad = None
    return w.item()


def no_grad_update(w):
    with pg.no_grad():
        w -= 0.1 * w.grad
    return w


def data_update(w):
    w.data -= 0.1 * w.grad
    return w


def data_update_with_numpy(w):
    w.data = w.data - 0.1 * w.grad.numpy()
    return w


def sub_update(w):
    with pg.no_grad():
        return w.sub_(0.1 * w.grad)


@pytest.mark.parametrize(
    "update", [no_grad_update, data_update, data_update_with_numpy, sub_update]
)
def test_the_update_that_everybody_writes_trains(update):
    """The error shrinks by 1 − 2·0.1 a step: 2 − 2·0.8³⁰."""
    assert fit_line(update) == pytest.approx(2 - 2 * 0.8**30)


def test_an_update_inside_a_function_changes_the_parameter_itself():
    layer, x = nn.Linear(2, 1), pg.ones(3, 2)
    before = layer.weight.tolist()
    layer(x).sum().backward()
    with pg.no_grad():
        for p in layer.parameters():
            p -= 0.1 * p.grad
    np.testing.assert_allclose(layer.weight.tolist(), np.array(before) - 0.3, rtol=1e-6)
    assert layer.weight.is_leaf and layer.weight.requires_grad


OPERATORS = {
    "+=": lambda x, y: x.__iadd__(y), "-=": lambda x, y: x.__isub__(y),
    "*=": lambda x, y: x.__imul__(y), "/=": lambda x, y: x.__itruediv__(y),
    "%=": lambda x, y: x.__imod__(y),
    "add_": lambda x, y: x.add_(y), "sub_": lambda x, y: x.sub_(y),
    "mul_": lambda x, y: x.mul_(y), "div_": lambda x, y: x.div_(y),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_in_place_operators_keep_memory_and_gradients_as_torch(name):
    """On a result inside the graph the step is recorded; the array stays the same one."""

    def run(lib, x, y):
        h = x * 3.0
        same = h
        array = h.array if lib is pg else None
        h = OPERATORS[name](h, y)
        assert h is same and (lib is not pg or h.array is array)
        OPERATORS[name](h, h.detach() * 0 + 2.0) if lib is torch else OPERATORS[name](h, 2.0)
        (h * h).sum().backward()
        return h

    arrays = np.array([1.5, 2.0]), np.array([0.5, 1.5])
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    h, t = run(pg, *ours), run(torch, *theirs)
    np.testing.assert_allclose(h.detach().numpy(), t.detach().numpy(), rtol=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-12)


def test_in_place_refusals_are_torchs_or_said():
    w = leaf(1.0, 2.0)
    with pytest.raises(GraphError, match=r"add= on a leaf .* no_grad\(\)"):
        w += 1.0
    h = w * 1.0
    view = h[:1]
    with pytest.raises(GraphError, match="memory another tensor sees"):
        h += 1.0
    del view
    h += 1.0  # nobody sees it any more
    y = h.exp()
    with pg.no_grad():
        y += 1.0
    with pytest.raises(GraphError, match="`add=` changed in place the result"):
        y.sum().backward()
    with pytest.raises(TypeError, match="result of float32 into a tensor of int64"):
        Tensor([1]).add_(0.5)
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3, 2\): the result is larger"):
        pg.ones(2).add_(pg.ones(3, 2))
    mask = Tensor([True, False])
    other = mask
    mask &= Tensor([False, False])
    assert other.tolist() == [False, False]
    x = x0 = w * 2.0
    x *= x  # both sides are the same tensor
    x.sum().backward()
    assert x is x0 and w.grad.tolist() == [8.0, 16.0]


def test_data_is_the_same_memory_without_history():
    x = leaf(1.0, 2.0)
    x.data[0] = 5.0
    x.data.mul_(2.0)
    assert x.tolist() == [10.0, 4.0] and not x.data.requires_grad
    y = x * x
    x.data += 1.0  # torch would give a wrong gradient here
    with pytest.raises(GraphError, match="changed in place"):
        y.sum().backward()


# ── Where numpy differs from torch ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", [
    (0, slice(None), [1, 2]), (slice(None), 0, [[0, 1], [1, 0]] and np.array([[0, 1], [1, 0]])),
    ([0, 1], slice(None), [1, 2]), (0, [1, 0], slice(1, None)), (1, None, [2, 0]),
    ([True, False], slice(None), 1), (..., [0, 0], 1), (np.array(1), slice(None), [3, 3]),
    True, False, (slice(None), np.array([True, False, True])),
], ids=str)  # fmt: skip
def test_mixed_indices_have_torchs_order_of_axes(key):
    """Reading, its gradient, and writing."""
    a = np.arange(24.0).reshape(2, 3, 4)
    x, t = Tensor(a, requires_grad=True), torch.tensor(a, requires_grad=True)
    as_torch = tuple(torch.tensor(k) if isinstance(k, np.ndarray) else k for k in (
        key if isinstance(key, tuple) else (key,)))  # fmt: skip
    y, s = x[key], t[as_torch]
    np.testing.assert_array_equal(y.detach().numpy(), s.detach().numpy())
    u = np.random.default_rng(0).standard_normal(y.shape)
    y.backward(Tensor(u))
    s.backward(torch.tensor(u))
    np.testing.assert_array_equal(x.grad.numpy(), t.grad.numpy())
    z, r = Tensor(a), torch.tensor(a)
    z[key], r[as_torch] = Tensor(u), torch.tensor(u)
    np.testing.assert_array_equal(z.numpy(), r.numpy())


def test_negative_and_repeated_rows_add_up():
    """x[[−1, n − 1]] names the last row twice: its gradient is 2."""
    for index in ([-1, 2], [2, -1, 0, -3]):
        x, t = Tensor(np.ones((3, 2)), requires_grad=True), torch.ones(3, 2, requires_grad=True)
        x[index].sum().backward()
        t[index].sum().backward()
        assert x.grad.tolist() == t.grad.tolist()


def test_lists_of_lists_are_refused():
    """torch takes x[[[0, 1], [1, 0]]] for x[[0, 1], [1, 0]], numpy for one array."""
    with pytest.raises(IndexError, match="ambiguous"):
        pg.ones(2, 2)[[[0, 1], [1, 0]]]


def test_views_and_copies_are_torchs():
    x = pg.ones(2, 3)
    for copy in (x.flip(0), x.clone(), x[[0, 1]], x[x > 0], x[:1].prod(0), x.tril(), x.sum(()),
                 x.float().contiguous() + 0):  # fmt: skip
        copy.zero_()
        assert x.tolist() == [[1.0] * 3] * 2
    for view in (x.view(6), x.reshape(3, 2), x.T, x.mT, x[:, 1], x[0, 0], x.unsqueeze(0),
                 x.detach(), x.data, x.flatten(), x.split(1)[0], x.contiguous()):  # fmt: skip
        x.copy_(1.0)
        view += 1.0
        assert x.sum().item() > 6
    with pytest.raises(ShapeError, match=r"view: .*reshape\(\) makes a copy"):
        x.T.view(6)
    conv = nn.Conv2d(1, 2, 3)(pg.randn(4, 1, 5, 5))
    assert conv.view(conv.size(0), -1).shape == (4, 18)  # the idiom of every tutorial
    assert pg.ones(2, 3, 4).T.shape == (4, 3, 2)


def test_dtypes_that_were_silently_others():
    b, i, f32 = Tensor([True, False]), Tensor([1, 2]), pg.ones(2)
    assert pg.tril(Tensor([[True, True], [True, True]])).dtype == bool
    assert (b**b).dtype == (b**2).dtype == b.square().dtype == np.int64
    assert b.sign().dtype == bool and i.floor().dtype == np.int64
    assert i.masked_fill(b, 2.5).tolist() == [2, 2]
    assert (Tensor(np.array(2.0)) * f32).dtype == np.float32  # 0-d: does not widen
    assert (Tensor(np.array(2.0)) * i).dtype == np.float64  # but an integer has no width
    assert pg.ones(2, 3).sum(()).tolist() == 6.0  # all axes, as torch


ZERO_D = {
    "softmax": lambda x: x.softmax(0), "cumsum": lambda x: x.cumsum(-1),
    "max": lambda x: x.max(0)[0], "min index": lambda x: x.min(0)[1] + x,
    "argmax": lambda x: x.argmax(0) + x, "sort": lambda x: x.sort(0)[0],
    "topk": lambda x: x.topk(1)[0], "transpose": lambda x: x.transpose(0, 0),
    "flip": lambda x: x.flip(0), "log_softmax": lambda x: x.log_softmax(0),
    "gather": lambda x: x.gather(0, type(x)(np.array(0)) if isinstance(x, Tensor)
                                 else torch.tensor(0)),
    "flatten": lambda x: x.flatten(), "sign": lambda x: x.sign(), "prod": lambda x: x.prod(0),
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO_D)
def test_functions_of_a_single_number(name):
    x = Tensor(np.array(1.5), requires_grad=True)
    t = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    y, s = ZERO_D[name](x), ZERO_D[name](t)
    assert y.shape == tuple(s.shape) and y.tolist() == s.tolist()
    y.sum().backward()
    s.sum().backward()
    assert x.grad.tolist() == t.grad.tolist()


def test_scatter_add_takes_a_larger_source_and_refuses_a_smaller():
    a, rows, source = np.zeros((3, 2)), np.array([[0, 2]]), np.arange(6.0).reshape(2, 3)
    x, s = pg.tensor(a), Tensor(source, requires_grad=True)
    y = pg.scatter_add(x, 0, rows, s)
    z = torch.scatter_add(torch.tensor(a), 0, torch.tensor(rows), torch.tensor(source))
    np.testing.assert_array_equal(y.detach().numpy(), z.numpy())
    (y * y).sum().backward()  # torch's own walk back fails here; only source[0, :2] is used
    assert s.grad.tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    for index, words in (([[0], [0], [0], [0]], "smaller"), ([[-1, 0]], "outside")):
        with pytest.raises(ShapeError, match=words):
            pg.scatter_add(x, 0, np.array(index), s)


def test_sign_and_floor_have_a_slope_of_zero():
    x = leaf(-1.5, 0.0, 2.5)
    (x.sign().sum() + x.floor().sum()).backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.0]


def test_numbers_far_out():
    """Naive formulas overflow here."""
    with np.errstate(over="raise", invalid="raise"):
        big = Tensor(np.array([-1000.0, -720.0, 720.0, 1000.0]))
        assert pg.softplus(big).tolist() == [0.0, math.exp(-720.0), 720.0, 1000.0]
        assert big.sigmoid().tolist() == [0.0, math.exp(-720.0), 1.0, 1.0]
    with np.errstate(invalid="ignore", divide="ignore"):
        assert math.isnan(Tensor([3.0]).var().item()) and math.isnan(Tensor([3.0]).std().item())
    assert Tensor([3.0]).var(correction=0).item() == 0.0


# ── Writing an operation ──────────────────────────────────────────────────────────────────────────


def test_rules_are_bound_by_name():
    """In either order: ∂(x − y)/∂x = 1, ∂(x − y)/∂y = −1."""

    @elementwise(y=lambda g: -g, x=lambda g: g)
    def minus(x, y):
        return x - y

    x, y = leaf(3.0), leaf(1.0)
    minus(x, y).sum().backward()
    assert (x.grad.item(), y.grad.item()) == (1.0, -1.0)


@pytest.mark.parametrize("rules, words", [
    ({"banana": lambda g: g, "x": lambda g: g}, "operation f: there are rules for banana, x"),
    ({"y": lambda g: g}, "first arguments of its forward are x:"),
    ({"x": lambda g, yy: g * yy, "y": None}, "rule for x asks for yy; a rule can have g, i, n, "),
    ({"x": lambda grad: grad, "y": None}, "asks for grad"),
], ids=str)  # fmt: skip
def test_a_rule_that_does_not_fit_is_refused_where_it_is_defined(rules, words):
    with pytest.raises(TypeError, match=words):

        @elementwise(**rules)
        def f(x, y, n=0):
            return x - y

    with pytest.raises(TypeError, match="batch='elementwize'"):
        primitive(batch="elementwize", x=lambda g: g)(lambda x: x)


def test_help_shows_signature_and_words_of_every_method():
    assert str(inspect.signature(Tensor.sum)) == "(x, dim=None, keepdim=False)"
    assert "Sum over dim" in Tensor.sum.__doc__ and "eˣ" in Tensor.exp.__doc__
    for f in pg.METHODS:
        method = getattr(Tensor, f.__name__ if inspect.isfunction(f) else f.name)
        assert method.__doc__ and inspect.signature(method).parameters, method


# ── Small things that newcomers reach for ─────────────────────────────────────────────────────────


def test_small_functions_equal_torch():
    a = np.array([[1.5, -2.0, 0.25], [4.0, 0.0, -1.0]])
    x, t = Tensor(a), torch.tensor(a)
    for f in (
        lambda F, x: x.size(1) + x.dim() + len(x.size()),
        lambda F, x: x.any(1),
        lambda F, x: x.all(),
        lambda F, x: x.prod(1),
        lambda F, x: x.norm(),
        lambda F, x: x.norm(dim=1),
        lambda F, x: x % 0.7,
        lambda F, x: -x % 2,
        lambda F, x: 3 % (x + 10),
        lambda F, x: F.eye(2, 3) * 1.0,
        lambda F, x: F.linspace(-1, 2, 5),
        lambda F, x: F.tensor([1, 2]),
        lambda F, x: abs(x),
        lambda F, x: F.tensor([[1.0]], requires_grad=True) * 2,
    ):
        ours, theirs = f(pg, x), f(torch, t)
        if isinstance(ours, Tensor):
            assert str(theirs.dtype).endswith(str(ours.dtype))
            ours, theirs = ours.detach().numpy(), theirs.detach().numpy()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(x.silu().numpy(), torch.nn.functional.silu(t), rtol=1e-14)
    np.testing.assert_allclose(x.softplus().numpy(), torch.nn.functional.softplus(t), rtol=1e-12)


def test_erf_is_right_to_1e_13_everywhere():
    x = np.concatenate([np.linspace(-7, 7, 30_001), [1e300, -np.inf, np.inf, 0.0]])
    exact = np.array([math.erf(v) for v in x])
    assert np.abs(pg.erf(Tensor(x)).numpy() - exact).max() < 1e-13
    assert math.isnan(pg.erf(Tensor([math.nan])).item())
    assert pg.erf(Tensor([0.5])).dtype == np.float32


def test_value_at_zero():
    """√x at 0: value 0, slope 1/(2·0) = ∞, as torch."""
    x = Value(0.0)
    (x**0.5).backward()
    assert x.grad == math.inf
    y = Value(0.0)
    (y**1).backward()
    assert y.grad == 1.0


def test_checkpoint_takes_the_statistics_of_batch_norm_once():
    results = []
    for wrap in (lambda f, x: f(x), checkpoint):
        pg.manual_seed(0)
        layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        wrap(layer, pg.randn(8, 3)).square().sum().backward()
        results.append({n: t.tolist() for n, t in layer.state_dict().items()})
    assert results[0] == results[1] and results[1]["1.num_batches_tracked"] == 1


def test_how_far_muon_is_from_torchs_own():
    """torch's Muon computes its product in bfloat16, pikograd in the dtype of the weights.

    Ten steps with lr 0.02 from the same weights end about 1e-3 apart (0.8e-3 to 1.6e-3 for five
    seeds): what bfloat16's 8 bits leave. The docstring of Muon says so.
    """
    start = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    p, q = Tensor(start, requires_grad=True), torch.tensor(start, requires_grad=True)
    ours, theirs = optim.Muon([p], lr=0.02), torch.optim.Muon([q], lr=0.02)
    for _ in range(10):
        for x, optimizer, lib in ((p, ours, pg), (q, theirs, torch)):
            optimizer.zero_grad()
            lib.sin(x).sum().backward()
            optimizer.step()
    gap = np.abs(p.detach().numpy() - q.detach().numpy()).max()
    assert 1e-5 < gap < 5e-3
