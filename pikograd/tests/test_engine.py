"""The tape: planted faults are caught and named, memory is released, graphs may be deep."""

import gc
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nn
import tensor as pg
from engine import Modes, Node, reachable
from tensor import AnomalyError, GraphError, ShapeError, Tensor


def leaf(*values):
    return Tensor(np.array(values), requires_grad=True)


# ── Planted faults ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", ["add_", "mul_", "copy_", "fill_", "zero_", "setitem", "step"])
def test_change_of_a_saved_tensor_is_named(change):
    x = leaf(1.0, 2.0)
    y = x * x
    z = y.exp()  # saves its result
    with pg.no_grad():
        if change == "setitem":
            z[0] = 3.0
        elif change == "step":
            import optim

            x.grad = Tensor(np.ones(2))
            optim.SGD([x], lr=0.1).step()
        else:
            getattr(z, change)(*([] if change == "zero_" else [2.0]))
    name = {"setitem": "x[...] =", "step": "SGD.step"}.get(change, change)
    saver = "mul" if change == "step" else "exp"
    with pytest.raises(
        GraphError, match=rf"`{re.escape(name)}` changed in place .*`{saver}` saved"
    ):
        z.sum().backward()


def test_change_through_a_view_or_of_the_source_of_a_view_is_seen():
    for change in (lambda v, x: v.zero_(), lambda v, x: x.zero_(), lambda v, x: v[0].fill_(1.0)):
        x = leaf(1.0, 2.0, 3.0)
        base = x.clone()
        view = base.reshape(3, 1).T[0]
        y = view.square()
        with pg.no_grad():
            change(view, base)
        with pytest.raises(GraphError, match="saved"):
            y.sum().backward()


@pytest.mark.parametrize("view", [
    lambda x: x.expand(4, 3), lambda x: x.reshape(3, 1), lambda x: x[1:], lambda x: x.unsqueeze(0),
    lambda x: x.reshape(1, 3).permute(1, 0),
])  # fmt: skip
def test_every_kind_of_view_shares_its_version(view):
    base = leaf(1.0, 2.0, 3.0).clone()
    y = view(base).square()
    with pg.no_grad():
        base.zero_()
    with pytest.raises(GraphError, match="`zero_` changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("copy", [lambda x: x.mT.reshape(6), lambda x: x[:, np.array([0, 1])]])
def test_a_copy_has_its_own_version(copy):
    """numpy's own copies have a base too: that alone does not make them views."""
    x = Tensor(np.ones((2, 3)), requires_grad=True).clone()
    y = x.square()
    with pg.no_grad():
        copy(x).zero_()
    y.sum().backward()
    assert x.tolist() == np.ones((2, 3)).tolist()


def test_change_of_dtype_between_forward_and_backward_is_seen():
    layer = nn.Linear(2, 2)
    y = layer(pg.ones(1, 2, requires_grad=True)).sum()
    layer.to(np.float64)
    with pytest.raises(GraphError, match=r"`Module\.to` changed in place"):
        y.backward()


def test_change_of_what_nobody_saved_is_fine():
    """Addition needs neither input nor result: changing them harms nothing, as in torch."""
    x = leaf(1.0, 2.0)
    a, b = x * 3.0, x * 4.0
    c = a + b
    with pg.no_grad():
        a.zero_()
        b.fill_(7.0)
        c.add_(1.0)
    c.sum().backward()
    assert x.grad.tolist() == [7.0, 7.0]


def test_in_place_on_a_recorded_tensor_is_refused():
    x = leaf(1.0)
    for write in (
        lambda: x.add_(1.0),
        lambda: x.__setitem__(0, 2.0),
        lambda: Tensor([0.0]).copy_(x),
    ):
        with pytest.raises(GraphError, match="requires gradients"):
            write()
    assert x.tolist() == [1.0]


def test_second_backward_on_a_freed_graph():
    x = leaf(2.0)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.tolist() == [8.0]
    with pytest.raises(GraphError, match=r"`mul` a second time.*retain_graph=True"):
        y.backward()
    z = (x + 1.0).sum()  # saved nothing, so nothing is missing: as torch
    z.backward()
    z.backward()


@pytest.mark.parametrize("make, name", [
    (lambda: Tensor([1.0, 0.0]).log(), "log"),
    (lambda: Tensor([1.0]) / Tensor([0.0]), "div"),
    (lambda: Tensor([1000.0]).exp(), "exp"),
    (lambda: Tensor([-1.0]).sqrt(), "sqrt"),
    (lambda: Tensor([[1e38]]) @ Tensor([[1e38]]), "matmul"),
])  # fmt: skip
def test_birth_of_nan_or_infinity_is_named(make, name):
    with (
        pg.detect_anomaly(),
        pytest.raises(AnomalyError, match=rf"`{name}` made .*test_engine.py:"),
    ):
        make()


def test_nan_that_came_in_is_nobodys_fault():
    with pg.detect_anomaly():
        assert Tensor([np.nan, -np.inf]).exp().isnan().tolist() == [True, False]


def test_anomaly_in_the_backward_names_the_forward_and_its_line():
    """√x at 0: the value is fine, the slope 1/(2√x) is not."""
    x = Tensor([0.0, 1.0], requires_grad=True)
    with pg.detect_anomaly():
        y = x.sqrt().sum()  # the line that must be named
        with pytest.raises(AnomalyError) as error:
            y.backward()
    assert "`div` made" in str(error.value) and "backward of `sqrt`" in str(error.value)
    source = Path(__file__).read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(source, 1) if "x.sqrt().sum()  #" in text)
    assert f"test_engine.py:{line}" in str(error.value)


@pytest.mark.parametrize("make, words", [
    (lambda: pg.ones(2, 3) + pg.ones(2, 4), ["add", "(2, 3)", "(2, 4)"]),
    (lambda: pg.ones(2, 3) @ pg.ones(2, 3), ["matmul", "(2, 3)"]),
    (lambda: pg.ones(2) @ Tensor(1.0), ["matmul", "(2,)", "()"]),
    (lambda: pg.linear(pg.ones(5, 3), pg.ones(4, 2), pg.ones(4)), ["linear", "(5, 3)", "(4, 2)"]),
    (lambda: pg.ones(2, 3).reshape(4, -1), ["reshape", "(2, 3)", "(4, -1)"]),
    (lambda: pg.ones(2, 3).reshape(7), ["reshape", "(2, 3)", "7"]),
    (lambda: pg.ones(2, 3).sum(2), ["dim 2", "(2, 3)"]),
    (lambda: pg.ones(2, 3).permute(0, 0), ["permute", "(2, 3)"]),
    (lambda: pg.ones(2, 3).expand(4, 3), ["expand", "(2, 3)"]),
    (lambda: pg.ones(3).expand(-1, 3), ["expand", "(1, 3)"]),
    (lambda: pg.ones(2, 3).sum((0, -2)), ["dim (0, -2)", "(2, 3)"]),
    (lambda: Tensor(1.0).sum(1), ["dim 1", "()"]),
    (lambda: pg.ones(3).unsqueeze(2), ["unsqueeze", "dim 2", "(3,)"]),
    (lambda: pg.ones(3).narrow(0, 2, 2), ["narrow", "2 to 4", "(3,)"]),
    (lambda: pg.ones(3, 4).gather(1, Tensor([0])), ["gather", "(3, 4)", "(1,)", "as many axes"]),
    (lambda: pg.tril(pg.ones(3)), ["tril", "(3,)"]),
    (lambda: pg.max_pool2d(pg.ones(3, 4, 4), 2), ["pooling", "2 axes", "(3, 4, 4)"]),
    (lambda: pg.cat([]), ["cat", "no tensors"]),
    (lambda: pg.cat([pg.ones(2, 3), pg.ones(3, 2)]), ["cat", "(2, 3)", "(3, 2)"]),
    (lambda: pg.ones(2, 3)[5], ["slice", "(2, 3)"]),
    (lambda: pg.ones(2, 3)[0, 0, 0], ["3 indices", "2 axes"]),
    (lambda: pg.ones(5).split([2, 2]), ["split", "(2, 2)", "(5,)"]),
    (lambda: pg.ones(5).topk(6), ["topk", "k=6", "(5,)"]),
    (lambda: pg.ones(5).gather(0, Tensor([5])), ["gather", "(5,)", "(1,)"]),
    (lambda: pg.pad(pg.ones(2), (1,)), ["pad", "(1,)", "(2,)"]),
    (lambda: pg.conv2d(pg.ones(1, 3, 8, 8), pg.ones(4, 2, 3, 3)), ["conv2d", "(1, 3, 8, 8)"]),
    (lambda: pg.conv2d(pg.ones(1, 2, 2, 2), pg.ones(4, 2, 3, 3)), ["kernel (3, 3)", "(2, 2)"]),
    (lambda: pg.max_pool2d(pg.ones(1, 1, 2, 2), 3), ["kernel (3, 3)", "(2, 2)"]),
    (lambda: pg.max_pool2d(pg.ones(1, 1, 2, 2), 1, 0), ["stride (0, 0)"]),
    (lambda: pg.scatter_add(pg.ones(3), 0, Tensor([0, 1]), pg.ones(1)), ["scatter_add", "(1,)"]),
    (lambda: pg.einsum("ij,jk->ik", pg.ones(2, 3), pg.ones(4, 5)), ["'j' is both 3 and 4"]),
    (lambda: pg.einsum("ij,j->i", pg.ones(2, 3)), ["2 terms for 1"]),
    (lambda: pg.einsum("ii->i", pg.ones(3, 3)), ["'ii'", "(3, 3)"]),
    (lambda: pg.einsum("ij->k", pg.ones(3, 3)), ["'k'"]),
    (lambda: pg.ones(2, 3).item(), ["item()", "(2, 3)"]),
    (lambda: leaf(1.0, 2.0).backward(Tensor([1.0])), ["(1,)", "(2,)"]),
    (lambda: pg.zeros(3).copy_(pg.ones(2)), ["copy_", "(3,)", "(2,)"]),
])  # fmt: skip
def test_shape_errors_name_the_operation_and_the_shapes(make, words):
    with pytest.raises(ShapeError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_gradients_into_integers_and_odd_dtypes_are_refused():
    for make in (
        lambda: Tensor([1, 2], requires_grad=True),
        lambda: Tensor([1, 2]).requires_grad_(),
        lambda: Tensor([True], requires_grad=True),
        lambda: Tensor(np.ones(2, np.float16)),
        lambda: Tensor([1j]),
        lambda: Tensor(["a"]),
        lambda: Tensor([1.0]).to(np.float16),
    ):
        with pytest.raises((TypeError, ValueError), match=r"dtype|floating point"):
            make()


def test_values_that_an_operation_cannot_hold_are_refused():
    for make, words in (
        (lambda: Tensor([1]).add_(0.5), "add_: a result of float32 into a tensor of int64"),
        (lambda: pg.where(Tensor([1, 0]), 1.0, 0.0), "mask holds int64"),
        (lambda: pg.one_hot(Tensor([0, 3]), 3), r"outside \[0, 3\)"),
    ):
        with pytest.raises((TypeError, IndexError), match=words):
            make()


def test_misuse_of_backward_is_explained():
    with pytest.raises(GraphError, match="does not require"):
        Tensor([1.0]).backward()
    with pytest.raises(GraphError, match=r"one element, the shape is \(2,\)"):
        leaf(1.0, 2.0).square().backward()
    with pytest.raises(GraphError, match="detach"):
        leaf(1.0).numpy()
    with pytest.raises(GraphError, match="detach"):
        leaf(1.0).square().requires_grad_(False)
    with pytest.raises(TypeError, match="0-d"):
        len(Tensor(1.0))


# ── What backward does ────────────────────────────────────────────────────────────────────────────


def test_chain_of_100_000_operations_and_its_end():
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1e-5
    y.backward()
    assert x.grad.tolist() == [1.0]
    del y
    gc.collect()  # freeing the chain must not recurse either


def test_diamond_of_2_to_the_60_paths():
    x = leaf(1.0)
    y = x
    for _ in range(60):
        y = y + y
    y.backward()
    assert x.grad.tolist() == [2.0**60]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50), st.integers(0, 50)), min_size=1,
                max_size=15))  # fmt: skip
def test_random_graphs_against_torch(steps):
    def run(lib, x, w):
        nodes = [x, w, lib.tanh(x)]
        for kind, i, j in steps:
            a, b = nodes[i % len(nodes)], nodes[j % len(nodes)]
            new = (a + b, a * b, a - b * 0.5, a @ b, a.mT + b.sum(), a[:1] * b[:, :1])[kind]
            nodes.append(lib.tanh(new))
        return sum(n.sum() for n in nodes)

    arrays = [np.random.default_rng(i).standard_normal((2, 2)) for i in range(2)]
    ours = [Tensor(a, requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    run(pg, *ours).backward()
    run(torch, *theirs).backward()
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.grad.numpy(), b.grad.numpy(), rtol=1e-11, atol=1e-11)


def test_grads_of_leaves_and_steps_without_touching_grad():
    x = leaf(2.0)
    y = x * x  # dz/dy = 3y² = 48, dz/dx = 6x⁵ = 192
    z = (y**3).sum()
    dy, dx = pg.grads(z, [y, x], retain_graph=True)
    assert (dy.item(), dx.item(), x.grad) == (48.0, 192.0, None)
    unrelated = leaf(1.0, 1.0)
    assert pg.grads(z, [unrelated])[0].tolist() == [0.0, 0.0]


def test_grad_memory_is_the_leafs_own():
    """x and y both get g itself from x + y; scaling one's .grad must not scale the other's."""
    x, y = leaf(1.0), leaf(2.0)
    seed = Tensor(np.array([1.0]))
    (x + y).backward(seed)
    x.grad.mul_(10.0)
    assert (x.grad.item(), y.grad.item(), seed.item()) == (10.0, 1.0, 1.0)
    z = leaf(1.0)
    z.backward(seed)
    z.grad.mul_(5.0)
    assert seed.item() == 1.0
    x, y = leaf(1.0), leaf(2.0)
    (x + y).backward(create_graph=True)
    x.grad.mul_(10.0)
    assert y.grad.item() == 1.0


def test_gradients_accumulate_and_stop_at_detach():
    x = leaf(3.0)
    (x * x.detach()).backward()
    (x * x).backward()
    assert x.grad.tolist() == [9.0]
    with pg.no_grad():
        assert not (x * x).requires_grad
        with pg.enable_grad():
            assert (x * x).requires_grad


def test_derivatives_up_to_the_fourth():
    """x⁵ at 2: 80, 160, 240, 240."""
    x = leaf(2.0)
    y, found = (x**5).sum(), []
    for _ in range(4):
        (g,) = pg.grads(y, [x], create_graph=True)
        found.append(g.item())
        y = g.sum()
    assert found == [80.0, 160.0, 240.0, 240.0]


def test_saved_is_only_what_the_rules_name():
    """Inputs of a product by a constant: the constant is kept, the other is not."""
    x = leaf(1.0, 2.0)
    assert [i for i, _, _ in (x * 2.0).node.saved] == [1]
    assert [i for i, _, _ in (x * x).node.saved] == [0, 1]
    assert (x + x).node.saved == [] and (x + x).node.out is None
    assert x.exp().node.saved == [] and x.exp().node.out is not None
    data, w = Tensor(np.ones((2, 3))), Tensor(np.ones((4, 3)), requires_grad=True)
    assert [i for i, _, _ in pg.linear(data, w, w[:, 0]).node.saved] == [0]  # no gradient for data


def test_the_tape_is_released_by_backward_and_without_it():
    gc.collect()
    gc.disable()
    try:
        before = sum(type(o) is Node for o in gc.get_objects())
        x = leaf(1.0, 2.0)
        y = (x.exp() * x).softmax(0).sum()
        assert sum(type(o) is Node for o in gc.get_objects()) == before + 4
        nodes = reachable([y.node])
        y.backward()
        assert all(n.saved in (None, []) and n.out is None for n in nodes)
        del y, nodes
        z = (x.exp() * x).softmax(0).sum()  # dropped without a backward: no cycle keeps it
        del z
        assert sum(type(o) is Node for o in gc.get_objects()) == before
    finally:
        gc.enable()


def test_modes_come_back_after_an_error():
    with pytest.raises(ZeroDivisionError), pg.no_grad(), pg.detect_anomaly():
        raise ZeroDivisionError
    assert Modes.grad_enabled and not Modes.anomaly and not Modes.special


# ── Manners of a Tensor ───────────────────────────────────────────────────────────────────────────


def test_construction_and_conversion():
    source = np.ones(3)
    x = Tensor(source)
    source[:] = 7
    assert x.dtype == np.float64 and x.tolist() == [1.0, 1.0, 1.0]  # a copy
    assert Tensor([1.0]).dtype == np.float32 and Tensor([1]).dtype == np.int64
    assert Tensor(np.ones(2, np.int32)).dtype == np.int64 and Tensor(x).dtype == np.float64
    assert np.asarray(x).dtype == np.float64 and Tensor([Tensor(1.0), Tensor(2.0)]).shape == (2,)
    assert pg.arange(3).dtype == np.int64 and pg.arange(0, 1, 0.5).tolist() == [0.0, 0.5]
    assert pg.arange(0, 1, 0.5).dtype == np.float32
    assert (x.float().dtype, x.long().dtype) == (np.float32, np.int64)
    assert (int(Tensor(3)), float(Tensor(2.5)), bool(Tensor(0.0)), len(x)) == (3, 2.5, False, 3)
    assert [v.item() for v in x] == [1.0, 1.0, 1.0] and x.numel() == 3
    assert repr(Tensor([1.0, 2.0])) == "Tensor([1., 2.])"
    assert repr(leaf(1.0)) == "Tensor([1.], dtype=float64, requires_grad=True)"
    assert repr(leaf(1.0) * 2.0) == "Tensor([2.], dtype=float64, op=mul)"


def test_numpy_on_the_left_makes_a_tensor():
    x = leaf(1.0, 2.0)
    for y in (np.array([3.0, 4.0]) * x, np.array([3.0, 4.0]) @ x, np.float64(2.0) - x):
        assert isinstance(y, Tensor) and y.requires_grad


def test_conversions_keep_the_gradient():
    x = Tensor([1.5], requires_grad=True)
    x.double().square().backward()
    assert x.grad.tolist() == [3.0] and x.grad.dtype == np.float32
    assert not x.long().requires_grad
