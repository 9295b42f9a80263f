"""Every operation of optable.CASES: finite differences, twice, and torch, value and gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes

import tensor as pg
from optable import CASES, pikograd_functions
from transforms import gradcheck, gradgradcheck


class TorchFunctions:
    """torch and torch.nn.functional under one name, with the names that only optable uses."""

    def __getattr__(self, name):
        own = {
            "tensor": torch.tensor,
            "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
            "float64": torch.float64,
        }
        return own.get(name) or getattr(torch, name, None) or getattr(TF, name)


F, T = pikograd_functions(), TorchFunctions()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_op(case):
    """gradcheck, gradgradcheck, and value, gradient, second gradient equal to torch's ≤ 1e-12."""
    arrays = case.arrays()
    ours = [pg.Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    assert gradcheck(lambda *x: case.f(F, *x), ours)
    assert gradgradcheck(lambda *x: case.f(F, *x), ours)
    y, t = case.f(F, *ours), case.f(T, *theirs)
    assert_close(y, t)
    u = np.random.default_rng(1).standard_normal(y.shape)
    g = pg.grads(y, ours, pg.Tensor(u), create_graph=True)
    h = torch.autograd.grad(t, theirs, torch.tensor(u), create_graph=True)
    for a, b in zip(g, h, strict=True):
        assert_close(a, b)
    second(g, h, ours, theirs)


def second(g, h, ours, theirs):
    """The gradient of the squared norm of the gradient; all zero where ours is a constant."""
    curved = [b for b in h if b.requires_grad]
    expected = [None] * len(theirs)
    if curved:
        t = sum((b * b).sum() for b in curved)
        expected = torch.autograd.grad(t, theirs, allow_unused=True)
    s = sum((a * a).sum() for a in g)
    found = pg.grads(s, ours) if s.requires_grad else [pg.zeros_like(x) for x in ours]
    for a, b in zip(found, expected, strict=True):
        assert_close(a, torch.zeros(a.shape) if b is None else b)


def assert_close(a, b):
    b = b.detach().numpy(force=True)
    assert a.shape == b.shape
    np.testing.assert_allclose(a.detach().numpy(), b, rtol=1e-12, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(mutually_broadcastable_shapes(num_shapes=2, max_dims=4, max_side=4), st.integers(0, 99))
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "pow", "where"])
def test_every_pair_of_shapes_broadcasts_and_sums_back(name, shapes, seed):
    """Value and gradients of two-input operations on all pairs of shapes, against torch."""
    rng = np.random.default_rng(seed)
    arrays = [rng.uniform(0.5, 2.0, s) for s in shapes.input_shapes]
    mask = rng.random(shapes.result_shape) < 0.5
    ours = [pg.Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    if name == "where":
        y, t = pg.where(mask, *ours), torch.where(torch.tensor(mask), *theirs)
    else:
        y, t = getattr(pg, name)(*ours), getattr(torch, name)(*theirs)
    u = rng.standard_normal(shapes.result_shape)
    y.backward(pg.Tensor(u))
    t.backward(torch.tensor(u))
    assert_close(y, t)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad, b.grad)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_matmul_and_reductions_of_all_shapes(data):
    batch = data.draw(mutually_broadcastable_shapes(num_shapes=2, max_dims=2, max_side=3))
    n, k, m = (data.draw(st.integers(1, 3)) for _ in range(3))
    rng = np.random.default_rng(n + 7 * k)
    a = rng.standard_normal((*batch.input_shapes[0], n, k))
    b = rng.standard_normal((*batch.input_shapes[1], k, m))
    ours = [pg.Tensor(x, requires_grad=True) for x in (a, b)]
    theirs = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    y, t = ours[0] @ ours[1], theirs[0] @ theirs[1]
    dims = tuple(data.draw(st.sets(st.integers(-y.ndim, -1), min_size=1)))
    keep = data.draw(st.booleans())
    y, t = y.logsumexp(dims, keep), t.logsumexp(dims, keep)
    assert_close(y, t)
    (y * y).sum().backward()
    (t * t).sum().backward()
    for x, z in zip(ours, theirs, strict=True):
        assert_close(x.grad, z.grad)


# Kinks, ties and poles, where a difference quotient says nothing: torch's convention.
EDGES = {
    "relu at 0": (lambda F, x: F.relu(x), [-1.0, 0.0, -0.0, 2.0]),
    "relu of NaN and inf": (lambda F, x: F.relu(x), [np.nan, np.inf, -np.inf]),
    "abs at 0": (lambda F, x: F.abs(x), [-1.0, 0.0, 2.0]),
    "clamp on the borders": (lambda F, x: F.clamp(x, -1.0, 1.0), [-1.0, 1.0, 0.5, 2.0]),
    "maximum of equals": (lambda F, x: F.maximum(x, x * 1.0), [1.0, 2.0]),
    "maximum of NaN": (lambda F, x: F.maximum(x, x * 2), [np.nan, 2.0]),
    "std of equals": (lambda F, x: F.std(x.reshape(2, 2), dim=1), [3.0, 3.0, 1.0, 2.0]),
    "amax of equals": (lambda F, x: F.amax(x, dim=0), [3.0, 1.0, 3.0]),
    "max of equals": (lambda F, x: F.max(x), [3.0, 1.0, 3.0]),
    "max dim of equals": (lambda F, x: F.max(x, dim=0)[0], [1.0, 3.0, 3.0]),
    "min dim of equals": (lambda F, x: F.min(x, dim=0)[0], [1.0, 3.0, 1.0]),
    "pool of equals": (lambda F, x: F.max_pool1d(x.reshape(1, 1, 4), 2), [1.0, 1.0, 2.0, 2.0]),
    "square of x ≤ 0": (lambda F, x: x**2, [-2.0, 0.0, 3.0]),
    "cube of x ≤ 0": (lambda F, x: x**3, [-2.0, 0.0, 3.0]),
    "x⁰": (lambda F, x: x**0, [-2.0, 0.0, 3.0]),
    "0 to a tensor power": (lambda F, x: F.zeros(3, dtype=F.float64) ** x, [0.0, 1.0, 2.0]),
    "tensor power of 0": (lambda F, x: x ** F.tensor(np.array([0.0, 1.0, 2.0])), [0.0, 0.0, 0.0]),
    "sigmoid far out": (lambda F, x: F.sigmoid(x), [-800.0, -30.0, 30.0, 800.0]),
    "softplus far out": (lambda F, x: F.softplus(x), [-800.0, -15.0, 15.0]),
    "logsumexp far out": (lambda F, x: F.logsumexp(x, dim=0), [900.0, -900.0, 899.0]),
    "softmax of −inf": (lambda F, x: F.softmax(x, dim=0), [-np.inf, 1.0, 2.0]),
    "NaN is the largest": (lambda F, x: F.sort(x, dim=0, descending=True)[0], [1.0, np.nan, 2.0]),
    "sort down of equals": (lambda F, x: F.sort(x, dim=0, descending=True)[0]
                            * F.tensor(np.array([1.0, 2, 3, 4])), [1.0, 2.0, 1.0, 2.0]),
    "stable sort": (lambda F, x: F.sort(x, dim=0)[0] * F.tensor(np.array([1.0, 2, 3])),
                    [2.0, 1.0, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edges_as_torch(name):
    f, values = EDGES[name]
    x, t = pg.Tensor(np.array(values), requires_grad=True), None
    t = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    y, s = f(F, x), f(T, t)
    assert_close(y, s)
    y.sum().backward()
    s.sum().backward()
    assert_close(x.grad, t.grad)


EMPTY = {
    "linear": (lambda F, x, w: F.linear(x, w, w.sum(1)), (0, 3)),
    "linear of nothing": (lambda F, x, w: F.linear(x, w, w.sum(1)), (4, 0)),
    "matmul": (lambda F, x, w: x @ w.mT, (2, 0, 3)),
    "matmul of nothing": (lambda F, x, w: x @ w.mT, (2, 4, 0)),
    "flatten": (lambda F, x, w: (x[:, None] * w).flatten(1), (0, 3)),
    "split": (lambda F, x, w: F.split(x, 2, 0)[0] * w[0], (0, 3)),
    "chunk": (lambda F, x, w: F.chunk(x, 2, 1)[0] + F.sum(w), (2, 0)),
    "conv1d": (lambda F, x, w: F.conv1d(x[:, :, None], w[..., None]), (0, 3)),
    "softmax": (lambda F, x, w: F.softmax(x, 1) * w.sum(), (2, 0)),
    "logsumexp": (lambda F, x, w: F.logsumexp(x, 0) + w.sum(), (0, 3)),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_batches_and_axes_as_torch(name):
    f, shape = EMPTY[name]
    arrays = np.zeros(shape), np.ones((5, shape[-1]))
    ours = [pg.Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    y, t = f(F, *ours), f(T, *theirs)
    assert_close(y, t)
    y.sum().backward()
    t.sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.grad, b.grad)


def test_masking_an_infinite_gradient_gives_zero_not_nan():
    x = pg.Tensor([-1.0, 2.0], requires_grad=True)
    x.relu().backward(pg.Tensor([np.inf, np.inf]))
    assert x.grad.tolist() == [0.0, np.inf]


@pytest.mark.parametrize("number", [2, 2.5, True])
def test_python_numbers_do_not_widen(number):
    for x in (pg.Tensor([1.0, 2.0]), pg.Tensor(1.0)):  # a 0-d array as well
        for y in (x + number, number * x, x / number, number - x, x**number, number**x):
            assert y.dtype == np.float32


def test_dtypes_promote_as_torch():
    f32, f64, i64 = pg.Tensor([1.5]), pg.Tensor(np.array([1.5])), pg.Tensor([2])
    assert (f32 * f64).dtype == np.float64
    assert (i64 * f32).dtype == np.float32
    assert (i64 / 2).dtype == np.float32 and (i64 / 4).tolist() == [0.5]
    assert (i64 * 2).dtype == np.int64 and (pg.Tensor([True]) * 2).tolist() == [2]
    assert i64.clamp(max=1).dtype == np.int64 and i64.clamp(2.5).tolist() == [2.5]
    assert pg.cat([i64, f32]).dtype == np.float32 and i64.softmax(0).dtype == np.float32
    assert (i64 * 2.5).tolist() == [5.0]
    x = pg.Tensor([1.0], requires_grad=True)
    (x * f64).sum().backward()
    assert x.grad.dtype == np.float32


def test_comparisons_and_integers_against_numpy():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 2.0])
    x, y = pg.Tensor(a), pg.Tensor(b)
    for mine, theirs in (
        (x == y, a == b), (x != y, a != b), (x < y, a < b), (x <= y, a <= b), (x > y, a > b),
        (x >= y, a >= b), ((x < y) | (x > y), a != b), ((x <= y) & ~(x < y), a == b),
        (pg.floor(x / y), a // b), (pg.sign(x - y), np.sign(a - b)), (x.argmax(), 2),
        (x.argmin(0), 0), (x.isnan(), np.isnan(a)),
    ):  # fmt: skip
        assert not mine.requires_grad
        np.testing.assert_array_equal(mine.numpy(), theirs)


def test_topk_sort_indices_and_smallest():
    x = pg.Tensor([[3.0, 1.0, 2.0]])
    values, index = x.topk(2, largest=False)
    assert values.tolist() == [[1.0, 2.0]] and index.tolist() == [[1, 2]]
    assert x.sort(descending=True)[1].tolist() == [[0, 2, 1]]
    assert x.max(1)[1].tolist() == [0] and x.min(1)[1].tolist() == [1]
    assert pg.Tensor([3.0, 1.0]).argsort().tolist() == [1, 0]


def test_one_hot_split_sizes_and_arange():
    assert pg.one_hot(pg.Tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    parts = pg.arange(6).split([1, 2, 3])
    assert [p.tolist() for p in parts] == [[0], [1, 2], [3, 4, 5]]


def test_dropout_keeps_the_mean_and_the_seed():
    pg.manual_seed(3)
    x = pg.ones(20_000, requires_grad=True)
    y = pg.dropout(x, 0.3)
    assert set(np.unique(y.detach().numpy()).tolist()) == {0.0, np.float32(1 / 0.7).item()}
    assert abs(y.mean().item() - 1) < 0.02  # 3 standard deviations: 3·√(0.3/0.7/20000) = 0.014
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.detach().numpy())
    pg.manual_seed(3)
    np.testing.assert_array_equal(pg.dropout(x, 0.3).detach().numpy(), y.detach().numpy())
    assert pg.dropout(x, 0.3, training=False) is x
