"""grad, vjp, jvp, hvp, jacobian, hessian, vmap against torch.func; checkpoint against none."""

import numpy as np
import pytest
import torch
import torch.func as tf

import nn
import tensor as pg
from engine import GraphError, ShapeError, reachable
from optable import CASES, pikograd_functions
from tensor import Tensor
from transforms import (
    GradcheckError,
    checkpoint,
    grad,
    gradcheck,
    gradgradcheck,
    hessian,
    hvp,
    jacobian,
    jvp,
    value_and_grad,
    vjp,
    vmap,
)

# torch.func itself warns about torch.jit on import of its inner parts
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
RNG = np.random.default_rng(0)
X, V, W = RNG.standard_normal((2, 3)), RNG.standard_normal((2, 3)), RNG.standard_normal((3, 4))
F = pikograd_functions()


def assert_close(a, b, tolerance=1e-12):
    assert tuple(a.shape) == tuple(b.shape)
    np.testing.assert_allclose(
        a.detach().numpy(), b.detach().numpy(), rtol=tolerance, atol=tolerance
    )


def network(lib):
    """A curved function of x and w that both libraries can run: → number."""

    def f(x, w):
        h = lib.tanh(x @ w)
        return (lib.softmax(h, -1) * h**2).sum() + lib.logsumexp(x, (0, 1))

    return f


OURS, THEIRS = network(pg), network(torch)
tx, tv, tw = (torch.tensor(a) for a in (X, V, W))


def test_grad_and_value_and_grad():
    assert_close(grad(OURS)(X, W), tf.grad(THEIRS)(tx, tw))
    value, (gx, gw) = value_and_grad(OURS, (0, 1))(X, W)
    tgx, tgw = tf.grad(THEIRS, (0, 1))(tx, tw)
    assert_close(value, THEIRS(tx, tw))
    assert_close(gx, tgx)
    assert_close(gw, tgw)
    assert not gx.requires_grad and not value.requires_grad


def test_vjp_and_jvp():
    def step(lib):
        return lambda x, w: lib.tanh(x @ w)

    u = RNG.standard_normal((2, 4))
    (y, pull), (ty, tpull) = vjp(step(pg), X, W), tf.vjp(step(torch), tx, tw)
    assert_close(y, ty)
    for _ in range(2):  # a pullback may be used again
        for a, b in zip(pull(Tensor(u)), tpull(torch.tensor(u)), strict=True):
            assert_close(a, b)
    dw = RNG.standard_normal(W.shape)
    y, t = jvp(step(pg), (X, W), (V, dw)), tf.jvp(step(torch), (tx, tw), (tv, torch.tensor(dw)))
    assert_close(y[0], t[0])
    assert_close(y[1], t[1])


def test_jvp_of_a_linear_and_of_a_constant_function():
    _, tangent = jvp(lambda x: x * 3.0, (X,), (V,))
    np.testing.assert_allclose(tangent.numpy(), 3 * V)
    _out, tangent = jvp(lambda x: Tensor(np.ones(2)), (X,), (V,))
    assert tangent.tolist() == [0.0, 0.0]


def test_hvp_hessian_jacobian():
    def f(x):
        return OURS(x, Tensor(W))

    def t(x):
        return THEIRS(x, tw)

    assert_close(hessian(f)(X), tf.hessian(t)(tx))
    assert_close(hvp(f, X, Tensor(V)), tf.jvp(tf.grad(t), (tx,), (tv,))[1])
    assert_close(jacobian(lambda x, w: pg.tanh(x @ w), 1)(X, W),
          tf.jacrev(lambda x, w: torch.tanh(x @ w), 1)(tx, tw))  # fmt: skip
    assert jacobian(lambda x: Tensor(np.ones(2)))(X).tolist() == np.zeros((2, 2, 3)).tolist()
    np.testing.assert_allclose(hvp(f, X, Tensor(V)).numpy(), np.einsum(
        "ijkl,kl->ij", hessian(f)(X).numpy(), V), rtol=1e-10)  # fmt: skip


def test_third_derivative_by_nesting():
    f = grad(grad(grad(lambda x: (x**4).sum())))
    assert f(Tensor(np.array(2.0))).item() == 48.0


def test_no_confusion_between_nested_derivatives():
    """d/dx [x · d/dy (x + y)] = 1, and not 2: the inner derivative sees only its own y."""
    x = Tensor(np.array(3.0))
    assert grad(lambda x: x * grad(lambda y: x + y)(x))(x).item() == 1.0


def test_gradients_flow_through_grad_into_captured_weights():
    w = Tensor(W, requires_grad=True)
    slope = grad(lambda x: pg.tanh(x @ w).sum())(Tensor(X))
    assert slope.requires_grad
    slope.square().sum().backward()
    t = tw.clone().requires_grad_()
    tslope = tf.grad(lambda x: torch.tanh(x @ t).sum())(tx)
    tslope.square().sum().backward()
    assert_close(w.grad, t.grad)
    with pg.no_grad():
        assert not grad(lambda x: (x @ w).sum())(X).requires_grad


def test_functions_that_use_nothing_and_products_that_do_not_fit():
    ones = Tensor(np.ones(2))
    assert vjp(lambda x: ones, X)[1](ones)[0].tolist() == np.zeros((2, 3)).tolist()
    assert not vjp(lambda x: x, X)[0].requires_grad
    np.testing.assert_array_equal(vjp(lambda x: x * 2.0, X)[1](V)[0].numpy(), 2 * V)  # numpy too
    for tangents in ((V,), (V, V[0])):
        with pytest.raises(ShapeError, match=r"jvp: primals \[\(2, 3\), \(2, 3\)\], tangents"):
            jvp(lambda x, y: x * y, (X, X), tangents)
    with pytest.raises(ShapeError, match=r"gradient \(3,\) for a tensor of shape \(2, 3\)"):
        hvp(lambda x: (x**3).sum(), X, V[0])


def test_grad_needs_a_number():
    with pytest.raises(ShapeError, match=r"one number, not \(2, 3\)"):
        grad(lambda x: x * 2.0)(X)
    assert grad(lambda x: Tensor(1.0))(X).tolist() == np.zeros((2, 3)).tolist()


# ── vmap ──────────────────────────────────────────────────────────────────────────────────────────

BATCHED = [c for c in CASES if c.name != "mask"]  # the size of x[mask] differs between examples


@pytest.mark.parametrize("case", BATCHED, ids=lambda c: c.name)
def test_vmap_of_every_operation_equals_a_loop(case):
    """Values and per-example gradients; the last input is shared by all examples."""
    batch = [case.arrays(seed) for seed in range(3)]
    mapped = [np.stack(arrays) for arrays in zip(*batch, strict=True)]
    dims = (0,) * len(mapped)
    if len(mapped) > 1:
        mapped[-1], dims = batch[0][-1], (*dims[:-1], None)
        batch = [[*arrays[:-1], mapped[-1]] for arrays in batch]

    def loss(*x):
        return (case.f(F, *x) ** 2).sum()

    n = len(mapped)
    fast = vmap(lambda *x: (case.f(F, *x), *grad(loss, tuple(range(n)))(*x)), dims)(*mapped)
    for i, arrays in enumerate(batch):
        x = [Tensor(a) for a in arrays]
        slow = (case.f(F, *x), *grad(loss, tuple(range(n)))(*x))
        for a, b in zip(fast, slow, strict=True):
            assert_close(a[i], b, 1e-10)


@pytest.mark.parametrize("case", BATCHED, ids=lambda c: c.name)
def test_vmap_over_a_single_example(case):
    arrays = case.arrays(0)
    found = vmap(lambda *x: case.f(F, *x))(*[a[None] for a in arrays])
    assert_close(found[0], case.f(F, *map(Tensor, arrays)), 1e-12)


def test_vmap_axes_in_and_out():
    f = vmap(lambda x, y: x * y.sum(), in_dims=(1, None), out_dims=1)
    assert_close(f(X, V), torch.vmap(lambda x, y: x * y.sum(), (1, None), 1)(tx, tv))
    assert vmap(lambda x: Tensor(7.0))(X).tolist() == [7.0, 7.0]
    with pytest.raises(ShapeError, match=r"sizes \[2, 3\]"):
        vmap(lambda x, y: x * y)(X, W)


def test_vmap_in_vmap_and_hidden_sizes():
    a, b = RNG.standard_normal((4, 3)), RNG.standard_normal((5, 3))
    pairs = vmap(lambda x: vmap(lambda y: (x * y).sum() + x.max())(b))(a)
    np.testing.assert_allclose(pairs.numpy(), a @ b.T + a.max(1)[:, None], rtol=1e-12)
    outer = vmap(lambda x: vmap(grad(lambda y: (y * y * x).sum() * x.sum()))(Tensor(b)))(a)
    np.testing.assert_allclose(
        outer.numpy(), 2 * b * a[:, None] * a.sum(1)[:, None, None], rtol=1e-12
    )


def test_per_example_gradients_and_gradient_through_vmap():
    def loss(lib):
        return lambda w, x: lib.tanh(x @ w).sum()

    assert_close(
        vmap(grad(loss(pg)), (None, 0))(W, X), tf.vmap(tf.grad(loss(torch)), (None, 0))(tw, tx)
    )

    def total(lib, vm):
        return lambda w, x: vm(loss(lib), (None, 0))(w, x).pow(2).sum()

    assert_close(grad(total(pg, vmap))(W, X), tf.grad(total(torch, tf.vmap))(tw, tx))
    w = Tensor(W, requires_grad=True)  # captured instead of passed: the sum over the examples
    vmap(lambda x: loss(pg)(w, x))(X).pow(2).sum().backward()
    assert_close(w.grad, tf.grad(total(torch, tf.vmap))(tw, tx))


def test_vmap_of_hessian_and_jvp():
    def f(lib):
        return lambda x: lib.sin(x).prod() if lib is torch else (pg.sin(x)[0] * pg.sin(x)[1]
                                                                 * pg.sin(x)[2])  # fmt: skip

    assert_close(vmap(hessian(f(pg)))(X), tf.vmap(tf.hessian(f(torch)))(tx))
    assert_close(vmap(lambda x, v: jvp(pg.tanh, (x,), (v,))[1])(X, V),
          tf.vmap(lambda x, v: tf.jvp(torch.tanh, (x,), (v,))[1])(tx, tv))  # fmt: skip


def test_vmap_without_a_tape():
    with pg.no_grad():
        assert vmap(grad(lambda x: x.sum()))(X).tolist() == np.ones((2, 3)).tolist()


def test_vmap_of_indices_targets_and_copies():
    """Every example has its own rows of a table, its own ignored targets, its own copy."""
    index, table = np.array([[0, 2], [2, 2]]), Tensor(W)
    assert_close(vmap(lambda i: table[i])(index), Tensor(W[index]))
    assert_close(vmap(lambda x, i: x[i])(X, np.array([2, 0])), Tensor(X[[0, 1], [2, 0]]))
    target = np.array([[1, -100], [0, 2]])
    logits = RNG.standard_normal((2, 2, 3))
    losses = [nn.cross_entropy(Tensor(x), t) for x, t in zip(logits, target, strict=True)]
    assert_close(vmap(nn.cross_entropy)(logits, target), pg.stack(losses))
    single = vmap(nn.cross_entropy)(X, np.array([1, 2]))  # (C,) logits and one target each
    assert_close(single, nn.cross_entropy(Tensor(X), [1, 2], reduction="none"))
    assert vmap(lambda i: [i.clone(), Tensor(i)])(index)[1].tolist() == index.tolist()


def test_vmap_shares_versions():
    x = Tensor(X, requires_grad=True) * 1.0
    y = vmap(pg.square)(x)
    with pg.no_grad():
        x.zero_()
    with pytest.raises(GraphError, match="`zero_` changed in place"):
        y.sum().backward()


def test_vmap_refuses_what_it_would_get_wrong():
    mask = X > 0
    for f, words in (
        (lambda x: x.clone().zero_(), "zero_ inside vmap"),
        (lambda x: x.clone().__setitem__(0, 1.0), "inside vmap"),
        (lambda x: W[Tensor(0)] * vmap(lambda m: x[m])(mask), "mapped index"),
        (lambda x: x.sum().item(), "each of vmap's examples"),
        (lambda x: nn.BatchNorm(3)(x[None]), "training inside vmap"),
    ):
        with pytest.raises((GraphError, ShapeError), match=words):
            vmap(f)(X)
    w = Tensor(W, requires_grad=True)
    with pytest.raises(GraphError, match="in_dims=None"):
        vmap(lambda x: grad(lambda v: (x @ v).sum())(w))(X)
    y = (w * w).sum(0)
    with pytest.raises(GraphError, match="recorded outside"):
        vmap(lambda u: y.backward(u))(np.eye(4))


# ── checkpoint ────────────────────────────────────────────────────────────────────────────────────


def blocks(wrap):
    """Loss and gradients of a small net with dropout, segments wrapped by `wrap`."""
    pg.manual_seed(5)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4)]
    x = pg.randn(5, 8, requires_grad=True)
    h = x * 2.0
    for layer in layers:
        h = wrap(layer, h)
    loss = (h * h).sum()
    return x, layers, loss


def test_checkpoint_equals_no_checkpoint_to_the_bit():
    results = []
    for wrap in (lambda f, h: f(h), checkpoint):
        x, layers, loss = blocks(wrap)
        loss.backward()
        results.append([loss, x.grad] + [p.grad for f in layers for p in f.parameters()])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a.detach().numpy(), b.numpy() if not b.requires_grad
                                      else b.detach().numpy())  # fmt: skip


def test_checkpoint_keeps_only_segment_ends():
    counts = [len(reachable([blocks(w)[2].node])) for w in (lambda f, h: f(h), checkpoint)]
    assert counts == [1 + 4 * 3 + 2, 1 + 4 + 2]


def test_checkpoint_twice_differentiable_and_nested():
    def f(x):
        return checkpoint(lambda a: checkpoint(pg.tanh, a * a) * a, x).sum()

    def plain(x):
        return (pg.tanh(x * x) * x).sum()

    assert_close(grad(f)(X), grad(plain)(X))
    assert_close(hessian(f)(X), hessian(plain)(X))


def test_checkpoint_without_gradients_and_its_faults():
    with pg.no_grad():
        assert not checkpoint(pg.exp, Tensor(X, requires_grad=True)).requires_grad
    assert not checkpoint(pg.exp, Tensor(X)).requires_grad
    x = Tensor(X, requires_grad=True)
    y = x * 1.0
    z = checkpoint(pg.exp, y).sum()
    with pg.no_grad():
        y.zero_()
    with pytest.raises(GraphError, match="`zero_` changed in place an argument"):
        z.backward()
    w = Tensor(X, requires_grad=True)
    z = checkpoint(lambda a: a * w, x).sum()
    with pg.no_grad():
        w.add_(1.0)  # f would run again with another weight
    with pytest.raises(GraphError, match="`add_` changed in place an argument or a weight"):
        z.backward()
    z = checkpoint(pg.exp, x).sum()
    z.backward()
    with pytest.raises(GraphError, match="second time"):
        z.backward()


# ── gradcheck itself ──────────────────────────────────────────────────────────────────────────────


@pg.primitive(batch="elementwise", x=lambda g, x: g * pg.cos(x) * 1.001)
def crooked(x):
    """sin with a derivative that is 0.1 % off."""
    return np.sin(x)


@pg.primitive(batch="elementwise", x=lambda g, x: g * x.detach() * 2.0)
def flat(x):
    """x² with a right first derivative whose own derivative is lost."""
    return x * x


def test_gradcheck_finds_planted_errors():
    x = Tensor(np.array([0.3, 1.0]), requires_grad=True)
    with pytest.raises(GradcheckError, match=r"input 0, ∂f\[0\]/∂x\[0\]"):
        gradcheck(crooked, [x])
    assert gradcheck(flat, [x])
    with pytest.raises(GradcheckError):
        gradgradcheck(flat, [x])
    with pytest.raises(GradcheckError), np.errstate(all="ignore"):  # ∞ = ∞ is not agreement
        gradcheck(lambda x: x.abs().sqrt(), [Tensor(np.array([0.0]), requires_grad=True)])
    with pytest.raises(TypeError, match="float64"):
        gradcheck(pg.sin, [x.float().detach().requires_grad_()])
