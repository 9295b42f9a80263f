"""Reverse-mode automatic differentiation on single numbers: the first lesson.

Every arithmetic step makes a new `Value` that remembers its inputs and the local derivative towards
each of them. `backward()` walks the steps from last to first and multiplies local derivatives into
gradients: the chain rule, ∂L/∂x = Σ over uses u of x:  ∂L/∂u · ∂u/∂x.

The interface is micrograd's (github.com/karpathy/micrograd). Left out: tensors, higher order
(`tensor.py` has both).
"""

import math


class Value:
    """A number with a gradient.

    data: the number. grad: ∂(root)/∂(this), filled by `root.backward()`, 0.0 before.
    """

    __slots__ = ("_locals", "_op", "_prev", "data", "grad", "label")

    def __init__(self, data, _children=(), _locals=(), _op="", label=""):
        self.data, self.grad, self.label = data, 0.0, label
        self._prev, self._locals, self._op = _children, _locals, _op

    def __add__(self, other):
        """a + b:  ∂/∂a = 1, ∂/∂b = 1."""
        other = as_value(other)
        return Value(self.data + other.data, (self, other), (1.0, 1.0), "+")

    def __mul__(self, other):
        """a · b:  ∂/∂a = b, ∂/∂b = a."""
        other = as_value(other)
        return Value(self.data * other.data, (self, other), (other.data, self.data), "*")

    def __pow__(self, power):
        """aⁿ for a constant n:  ∂/∂a = n·aⁿ⁻¹. No logarithm, so a ≤ 0 is fine."""
        if not isinstance(power, (int, float)):
            raise TypeError(
                f"** needs a constant int or float exponent, not {type(power).__name__}"
            )
        if self.data < 0 and power % 1:
            raise ValueError(f"{self.data} ** {power} is not a real number")
        if power == 0:
            slope = 0.0
        elif self.data == 0 and 0 < power < 1:
            slope = math.inf  # √a is upright at 0
        else:
            slope = power * self.data ** (power - 1)
        return Value(self.data**power, (self,), (slope,), f"**{power}")

    def relu(self):
        """max(a, 0):  ∂/∂a = 1 where a > 0, else 0 (0 at the kink, as torch). NaN stays NaN."""
        cut = self.data <= 0
        return Value(0.0 if cut else self.data, (self,), (0.0 if cut else 1.0,), "ReLU")

    def tanh(self):
        """tanh a:  ∂/∂a = 1 − tanh² a."""
        t = math.tanh(self.data)
        return Value(t, (self,), (1.0 - t * t,), "tanh")

    def exp(self):
        """eᵃ:  ∂/∂a = eᵃ."""
        e = math.exp(self.data)
        return Value(e, (self,), (e,), "exp")

    def log(self):
        """ln a for a > 0:  ∂/∂a = 1/a."""
        return Value(math.log(self.data), (self,), (1.0 / self.data,), "log")

    def backward(self):
        """Set ∂self/∂self = 1 and add to the gradient of every value below.

        Gradients of inputs accumulate from call to call, as torch's; those of the steps in between
        start at 0 each time, or a second call would count the first one twice.
        """
        order = topological_order(self)
        for v in order:
            if v._prev:
                v.grad = 0.0
        self.grad += 1.0
        for v in reversed(order):
            for child, local in zip(v._prev, v._locals, strict=True):
                child.grad += local * v.grad  # += : a value used twice hears from both uses

    def __neg__(self):
        return self * -1

    def __sub__(self, other):
        return self + (-as_value(other))

    def __truediv__(self, other):
        return self * as_value(other) ** -1

    def __radd__(self, other):
        return self + other

    def __rmul__(self, other):
        return self * other

    def __rsub__(self, other):
        return as_value(other) - self

    def __rtruediv__(self, other):
        return as_value(other) / self

    def __repr__(self):
        return f"Value(data={self.data}, grad={self.grad})"


def as_value(x):
    return x if isinstance(x, Value) else Value(x)


def topological_order(root):
    """Every value that `root` depends on, inputs before their uses, each once.

    Why an order at all: with b = a + a and c = b·b, visiting along edges would pass b's gradient on
    before it is complete. Why no recursion: Python's stack ends near 1,000 calls, graphs do not.
    """
    order, seen, stack = [], set(), [(root, False)]
    while stack:
        value, children_done = stack.pop()
        if children_done:
            order.append(value)
        elif value not in seen:
            seen.add(value)
            stack.append((value, True))
            stack.extend((child, False) for child in value._prev)
    return order
