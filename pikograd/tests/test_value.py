"""The scalar engine: micrograd's published numbers, torch on random graphs, deep graphs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from value import Value


def test_the_example_of_micrograds_readme():
    """github.com/karpathy/micrograd, README: g = 24.7041, dg/da = 138.8338, dg/db = 645.5773."""
    a, b = Value(-4.0), Value(2.0)
    c = a + b
    d = a * b + b**3
    c += c + 1
    c += 1 + c + (-a)
    d += d * 2 + (b + a).relu()
    d += 3 * d + (b - a).relu()
    e = c - d
    f = e**2
    g = f / 2.0
    g += 10.0 / f
    g.backward()
    assert f"{g.data:.4f} {a.grad:.4f} {b.grad:.4f}" == "24.7041 138.8338 645.5773"


def test_a_reused_value_hears_from_all_uses():
    """b = a + a, c = b + b: ∂c/∂a = 4, the case that breaks a walk without an order."""
    a = Value(3.0)
    b = a + a
    (b + b).backward()
    assert a.grad == 4.0


def test_second_backward_doubles_the_leaves_only():
    a = Value(3.0)
    b = a * a
    c = b * b  # a⁴: 4·27 = 108
    c.backward()
    c.backward()
    assert a.grad == 216.0
    c.backward()
    assert a.grad == 324.0


def test_chain_of_100_000_and_2_to_the_60_paths():
    x = Value(1.0)
    y = x
    for _ in range(100_000):
        y = y + 1e-5
    y.backward()
    assert x.grad == 1.0 and y.data == pytest.approx(2.0)
    x = Value(1.0)
    y = x
    for _ in range(60):
        y = y + y
    y.backward()
    assert x.grad == 2.0**60


STEPS = {
    "+": lambda F, x, y: x + y, "-": lambda F, x, y: x - y, "*": lambda F, x, y: x * y,
    "/": lambda F, x, y: x / (y * y + 1.0), "2-x": lambda F, x, y: 2.0 - x,
    "1.5/x": lambda F, x, y: 1.5 / (x**2 + 1), "**": lambda F, x, y: (x * x + 1.0) ** -0.5,
    "tanh": lambda F, x, y: F.tanh(x), "exp": lambda F, x, y: F.exp(x),
    "log": lambda F, x, y: F.log(x * x + 0.5), "relu": lambda F, x, y: F.relu(x - y),
}  # fmt: skip
PLACES = st.integers(0, 50)
GRAPHS = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), PLACES, PLACES), min_size=1, max_size=12
)


@settings(max_examples=100, deadline=None)
@given(GRAPHS)
def test_random_graphs_against_torch(steps):
    """Random expressions: every operation, reflected ones too, kept small by a tanh each."""

    def run(F, leaves):
        nodes = list(leaves)
        for kind, i, j in steps:
            nodes.append(F.tanh(STEPS[kind](F, nodes[i % len(nodes)], nodes[j % len(nodes)])))
        return sum(nodes[1:], nodes[0])

    ours = [Value(v) for v in (0.7, -1.3)]
    theirs = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, -1.3)]
    y, t = run(Value, ours), run(torch, theirs)
    y.backward()
    t.backward()
    assert y.data == pytest.approx(t.item(), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad == pytest.approx(b.grad.item(), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("x", [-2.0, 0.0, 3.0])
@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_constant_powers_of_any_base(x, n):
    v = Value(x)
    (v**n).backward()
    assert v.grad == (n * x ** (n - 1) if n else 0.0)


def test_kinks_and_refusals():
    zero, nan = Value(0.0), Value(math.nan)
    zero.relu().backward()
    assert zero.grad == 0.0 and math.isnan(nan.relu().data)
    with pytest.raises(TypeError, match="constant int or float exponent"):
        Value(2.0) ** Value(3.0)
    with pytest.raises(ValueError, match=r"-8\.0 \*\* 0\.5 is not a real number"):
        Value(-8.0) ** 0.5
    assert repr(Value(2.0)) == "Value(data=2.0, grad=0.0)"
