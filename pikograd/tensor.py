"""Every operation on tensors, each beside its derivative. Import from here.

How an operation is written. `@elementwise` (or `@reducer`, `@primitive`) takes one rule per tensor
argument, under that argument's name. A rule turns g = ∂L/∂out into ∂L/∂argument, and the names of
its own parameters say what it wants to be given: `g`, `out` (the result), `shape` (of the
argument), or any argument of the forward. Only what some rule asks for is kept in memory until
the walk back. Both kinds of names are checked when the operation is defined. For example

    @elementwise(x=lambda g, y: g * y, y=lambda g, x: g * x)
    def mul(x, y):
        return x * y

is called as mul(a, b) with Tensors, gets numpy arrays x and y, and keeps both, because each is
asked for by the other's rule. Rules are written in tensor operations, so they can be differentiated
again; summing a gradient over broadcast axes is the engine's work. A new operation needs nothing
else: try `transforms.gradcheck(mul, [a, b])` on it, then give it a line in optable.py.

Names, defaults and conventions at kinks are torch's. Many operations are linear maps in adjoint
pairs (expand ⇄ sum, gather ⇄ scatter_add, unfold ⇄ fold, index ⇄ put): each is the other's rule.

Left out against torch: complex numbers, `out=`, strides, half precision. More generous than torch:
slices with a negative step, mean and softmax of integers.
"""

import builtins
import functools
import inspect
import math

import numpy as np

from engine import (  # noqa: F401  (re-exported: the tape's own names)
    FLOATS,
    AnomalyError,
    GraphError,
    Modes,
    ShapeError,
    Tensor,
    _new,
    _reshape,
    add,
    apply,
    as_tensor,
    cast,
    clone,
    detect_anomaly,
    enable_grad,
    expand,
    grads,
    match_dtypes,
    no_grad,
    primitive,
    split_key,
    zeros_like,
)

random = np.random.default_rng(0)  # the one source of randomness; see manual_seed


def manual_seed(seed):
    """Restart the generator behind randn, rand and dropout."""
    random.bit_generator.state = np.random.default_rng(seed).bit_generator.state


# ── Creation ──────────────────────────────────────────────────────────────────────────────────────


def tensor(data, dtype=None, requires_grad=False):
    """torch's name for making a Tensor from numbers, lists or arrays; the data is copied."""
    return Tensor(data, requires_grad, dtype)


def zeros(*shape, dtype=np.float32, requires_grad=False):
    """All 0, shape (2, 3) from zeros(2, 3) or zeros((2, 3))."""
    return Tensor(np.zeros(_flat(shape), dtype), requires_grad)


def ones(*shape, dtype=np.float32, requires_grad=False):
    """All 1."""
    return Tensor(np.ones(_flat(shape), dtype), requires_grad)


def ones_like(x):
    """All 1, with the shape and dtype of x."""
    return zeros_like(x, 1)


def arange(*args):
    """arange(stop), (start, stop) or (start, stop, step): numbers at equal steps, stop excluded."""
    x = np.arange(*args)
    return Tensor(x, dtype=np.float32 if x.dtype.kind == "f" else None)


def linspace(start, end, steps):
    """`steps` numbers from start to end, both included, at equal distances."""
    return Tensor(np.linspace(start, end, steps), dtype=np.float32)


def eye(n, m=None):
    """(n, m) with ones on the diagonal, m = n unless given."""
    return Tensor(np.eye(n, m), dtype=np.float32)


def randn(*shape, dtype=np.float32, requires_grad=False):
    """Standard normal numbers."""
    return Tensor(random.standard_normal(_flat(shape)).astype(dtype), requires_grad)


def rand(*shape, dtype=np.float32, requires_grad=False):
    """Uniform numbers in [0, 1)."""
    return Tensor(random.random(_flat(shape)).astype(dtype), requires_grad)


def one_hot(index, n):
    """(…) integers in [0, n) → (…, n) float32 with a single 1 in each row."""
    index = as_tensor(index)
    if ((index.array < 0) | (index.array >= n)).any():
        raise IndexError(f"one_hot: an index outside [0, {n})")
    return equal(unsqueeze(index, -1), arange(n)).float()


# ── Elementwise ───────────────────────────────────────────────────────────────────────────────────


def elementwise(flops=1, real=False, **rules):
    return primitive(batch="elementwise", flops=flops, real=real, **rules)


@elementwise(x=lambda g: g, y=lambda g: neg(g))
def sub(x, y):
    """x − y."""
    return x - y


@elementwise(x=lambda g, y: g * y, y=lambda g, x: g * x)
def mul(x, y):
    """x · y."""
    return x * y


@elementwise(real=True, x=lambda g, y: g / y, y=lambda g, y, out: neg(g * (out / y)))
def div(x, y):
    """x / y:  ∂/∂y = −x/y² = −out/y."""
    return x / y


@elementwise(x=lambda g: neg(g))
def neg(x):
    """−x."""
    return -x


@elementwise(x=lambda g, x, n: g * (n * _power(x, n - 1)) if n else g * 0.0)
def _power(x, n):
    """xⁿ, n constant:  ∂ = n·xⁿ⁻¹, without a logarithm, so x ≤ 0 is fine."""
    if n == 2:
        return np.square(x)
    if n == 3:  # products: numpy's power takes a logarithm and an exponential, 50 times as long
        return np.square(x) * x
    return x ** (x.dtype.type(n) if x.dtype in FLOATS else n)  # numpy < 2 widens 0-d by a float


@elementwise(
    x=lambda g, x, y: g * where(equal(y, 0), 0.0, y * _pow(x, where(equal(y, 0), 1.0, y - 1))),
    y=lambda g, x, y, out: g * where(equal(x, 0) & (y >= 0), 0.0, out * log(_positive(x))),
)
def _pow(x, y):
    """x^y:  ∂/∂x = y·x^(y−1), ∂/∂y = x^y·ln x, which is real for x ≥ 0 only (0⁰ counts as 1)."""
    return x**y


def _positive(x):
    return where(equal(x, 0), 1.0, x)


def pow(x, y):
    """x to a constant or a tensor power. Booleans count as 0 and 1."""
    if isinstance(x, Tensor) and x.dtype == bool:
        x = cast(x, np.int64)
    if isinstance(y, (int, float)):
        x = as_tensor(x)
        whole = x.dtype in FLOATS or (isinstance(y, int) and y >= 0)
        return _power(x if whole else cast(x, np.float32), y)
    return _pow(x, y)


def square(x):
    """x²."""
    return pow(x, 2)


@elementwise(x=lambda g: g, y=lambda g, x, y: neg(g * floor(x / y)))
def remainder(x, y):
    """x − ⌊x/y⌋·y, with the sign of y, as Python's %."""
    return np.remainder(x, y)


@elementwise(real=True, x=lambda g, out: g * out)
def exp(x):
    """eˣ."""
    return np.exp(x)


@elementwise(real=True, x=lambda g, x: g / x)
def log(x):
    """ln x."""
    return np.log(x)


@elementwise(real=True, x=lambda g, x: g / (x + 1))
def log1p(x):
    """ln(1 + x)."""
    return np.log1p(x)


@elementwise(real=True, x=lambda g, out: g * 0.5 / out)
def sqrt(x):
    """√x:  ∂ = 1/(2√x)."""
    return np.sqrt(x)


@elementwise(real=True, x=lambda g, x: g * cos(x))
def sin(x):
    """sin x:  ∂ = cos x."""
    return np.sin(x)


@elementwise(real=True, x=lambda g, x: neg(g * sin(x)))
def cos(x):
    """cos x:  ∂ = −sin x."""
    return np.cos(x)


@elementwise(real=True, x=lambda g, out: g * (1 - out * out))
def tanh(x):
    """∂ = 1 − tanh²."""
    return np.tanh(x)


@elementwise(real=True, flops=4, x=lambda g, out: g * (out * (1 - out)))
def sigmoid(x):
    """σ(x) = 1/(1 + e⁻ˣ), ∂ = σ(1 − σ); computed from e^−|x|, which cannot overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@elementwise(real=True, flops=4, x=lambda g, x: g * sigmoid(x))
def softplus(x):
    """ln(1 + eˣ)."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _keep_bits(x, mask):
    """x where the mask holds, else exactly 0, even for infinite x.

    np.where and masked copies take a branch per element, and on masks without a pattern the
    processor guesses wrong half the time: and-ing the bits is 15 times as fast here.
    """
    bits = f"i{x.itemsize}"
    return (x.view(bits) & np.negative(mask.view("i1"), dtype=bits)).view(x.dtype)


@elementwise(x=lambda g, mask: _keep(g, mask), mask=None)
def _keep(x, mask):
    return _keep_bits(x, mask)


@elementwise(x=lambda g, mask: _drop(g, mask), mask=None)
def _drop(x, mask):
    """x where the mask does not hold, else exactly 0."""
    bits = f"i{x.itemsize}"
    return (x.view(bits) & np.subtract(mask.view("i1"), 1, dtype=bits)).view(x.dtype)


@elementwise(x=lambda g, out: _drop(g, out <= 0))
def relu(x):
    """max(x, 0):  ∂ = 0 at 0, as torch; NaN passes both ways."""
    return np.maximum(x, 0)


@elementwise(x=lambda g, x: g * sign(x))
def abs(x):
    """|x|:  ∂ = sign x, 0 at 0."""
    return np.abs(x)


@elementwise(x=lambda g: zeros_like(g))
def sign(x):
    """−1, 0 or 1:  ∂ = 0, since it is flat wherever it has a slope."""
    return x.copy() if x.dtype == bool else np.sign(x)


@elementwise(x=lambda g: zeros_like(g))
def floor(x):
    """The largest whole number ≤ x:  ∂ = 0."""
    return np.floor(x) if x.dtype in FLOATS else x.copy()


def _share(x, y):
    """How much of the gradient of max(x, y) goes to x: 1, ½ for a tie, 0; 1 if one is NaN."""
    return where(x < y, 0.0, where(equal(x, y), 0.5, 1.0))


@elementwise(x=lambda g, x, y: g * _share(x, y), y=lambda g, x, y: g * _share(y, x))
def maximum(x, y):
    """The larger of the two; a tie halves the gradient."""
    return np.maximum(x, y)


@elementwise(x=lambda g, x, y: g * _share(y, x), y=lambda g, x, y: g * _share(x, y))
def minimum(x, y):
    """The smaller of the two; a tie halves the gradient."""
    return np.minimum(x, y)


@elementwise(x=lambda g, x, low, high: _keep(g, (x >= low) & (x <= high)))
def _clamp(x, low, high):
    return np.clip(x, x.dtype.type(low), x.dtype.type(high))


def clamp(x, min=-np.inf, max=np.inf):
    """x kept within [min, max]; the gradient passes on the borders, as torch."""
    if x.dtype in FLOATS:
        return _clamp(x, float(min), float(max))
    x = x if min == -np.inf else maximum(x, min)
    return x if max == np.inf else minimum(x, max)


@elementwise(mask=None, x=lambda g, mask: _keep(g, mask), y=lambda g, mask: _keep(g, ~mask))
def where(mask, x, y):
    """x where the mask (booleans) holds, else y."""
    if mask.dtype != bool:
        raise TypeError(f"where: the mask holds {mask.dtype}, it must hold booleans")
    return np.where(mask, x, y)


def masked_fill(x, mask, value):
    """x with one value wherever the mask holds."""
    value = as_tensor(value, x)
    return where(mask, value if value.dtype == x.dtype else cast(value, x.dtype), x)


def silu(x):
    """x·σ(x)."""
    return x * sigmoid(x)


def leaky_relu(x, negative_slope=0.01):
    """x for x > 0, else negative_slope·x."""
    return where(x > 0, x, x * negative_slope)


# erf and its slope at 769 points 1/64 apart; beyond ±6 it is ±1 to the last digit
ERF_STEP = 1 / 64
ERF_POINTS = np.arange(-384, 385) * ERF_STEP
ERF_VALUES = np.array([math.erf(v) for v in ERF_POINTS])
ERF_SLOPES = 2 / math.sqrt(math.pi) * np.exp(-np.square(ERF_POINTS))


@elementwise(real=True, flops=12, x=lambda g, x: g * (2 / math.sqrt(math.pi)) * exp(neg(x * x)))
def erf(x):
    """2/√π·∫₀ˣ e^−t² dt:  ∂ = 2/√π·e^−x². numpy has none: Taylor's series around the nearest of
    769 points at which math.erf is exact, to the fifth power, right to 1e-13."""
    place = np.rint(np.nan_to_num(np.clip(x, -6, 6)) / ERF_STEP).astype(np.int64) + 384
    p = ERF_POINTS[place]
    d = np.clip(x, -6, 6) - p
    series = 1 + d * (-p + d * ((2 * p * p - 1) / 3 + d * (
        (3 * p - 2 * p**3) / 6 + d * (4 * p**4 - 12 * p * p + 3) / 30)))  # fmt: skip
    return (ERF_VALUES[place] + ERF_SLOPES[place] * d * series).astype(x.dtype)


def gelu(x, approximate="none"):
    """x·Φ(x), Φ the normal distribution: ½x(1 + erf(x/√2)); or with "tanh" as the approximation
    ½x(1 + tanh(√(2/π)(x + 0.044715x³))), Hendrycks & Gimpel 2016 (arXiv:1606.08415), §2."""
    if approximate == "tanh":
        return gelu_tanh(x)
    if approximate != "none":
        raise ValueError(f"gelu: approximate {approximate!r} is neither 'none' nor 'tanh'")
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


GELU_A, GELU_B = math.sqrt(2 / math.pi), 0.044715


def _gelu_bend(x):
    """tanh(√(2/π)(x + 0.044715x³)), in one array."""
    t = np.square(x)
    t *= GELU_A * GELU_B
    t += GELU_A
    t *= x
    return np.tanh(t, out=t)


@elementwise(real=True, flops=9, x=lambda g, x: g * _gelu_slope(x))
def gelu_tanh(x):
    """½x(1 + t), t = tanh(√(2/π)(x + 0.044715x³))."""
    t = _gelu_bend(x)
    t += 1
    t *= x
    t *= 0.5
    return t


def _gelu_slope_rule(g, x):
    """With s = √(2/π)(x + bx³): ∂ of the slope = (1 − t²)(s' − x·t·s'² + ½x·s'')."""
    t = tanh(GELU_A * (x + GELU_B * x**3))
    s1, s2 = GELU_A * (1 + 3 * GELU_B * x * x), 6 * GELU_A * GELU_B * x
    return g * (1 - t * t) * (s1 - x * t * s1 * s1 + 0.5 * x * s2)


@elementwise(flops=14, x=_gelu_slope_rule)
def _gelu_slope(x):
    """½(1 + t) + ½x(1 − t²)·√(2/π)(1 + 3·0.044715x²), the derivative of gelu_tanh."""
    t, bend = _gelu_bend(x), np.square(x)
    bend *= 3 * GELU_A * GELU_B
    bend += GELU_A
    bend *= x
    rest = np.square(t)
    np.subtract(1, rest, out=rest)
    bend *= rest
    bend += t
    bend += 1
    bend *= 0.5
    return bend


# Comparisons have no gradient; they make masks.


@elementwise(x=None, y=None)
def equal(x, y):
    """x = y, element by element."""
    return x == y


@elementwise(x=None, y=None)
def not_equal(x, y):
    """x ≠ y, element by element."""
    return x != y


@elementwise(x=None, y=None)
def less(x, y):
    """x < y, element by element."""
    return x < y


@elementwise(x=None, y=None)
def less_equal(x, y):
    """x ≤ y, element by element."""
    return x <= y


@elementwise(x=None, y=None)
def logical_and(x, y):
    """x and y, element by element."""
    return np.logical_and(x, y)


@elementwise(x=None, y=None)
def logical_or(x, y):
    """x or y, element by element."""
    return np.logical_or(x, y)


@elementwise(x=None)
def logical_not(x):
    """not x."""
    return np.logical_not(x)


@elementwise(x=None)
def isnan(x):
    """Where x is not a number."""
    return np.isnan(x)


# ── Reductions ────────────────────────────────────────────────────────────────────────────────────
# Axes are counted from the end, so that axes hidden in front by vmap do not matter.


def axes(x, dim):
    """dim (None, int or tuple) as a tuple of negative axes, none of them twice; () means all.

    Raises ShapeError outside the rank; 0 and −1 are allowed for a 0-d tensor and mean no axis.
    """
    whole = dim is None or (isinstance(dim, (tuple, list)) and not dim)
    dims = range(x.ndim) if whole else dim if isinstance(dim, (tuple, list)) else (dim,)
    rank = builtins.max(x.ndim, 1)
    found = tuple(sorted({d % rank - rank for d in dims}))
    if len(found) != len(dims) or not builtins.all(-rank <= d < rank for d in dims):
        raise ShapeError(f"dim {dim} of a tensor of shape {x.shape}")
    return found if x.ndim else ()


def axis(x, dim):
    """dim as one negative axis. A 0-d tensor has none (under vmap, −1 would be a hidden one)."""
    if not x.ndim:
        raise ShapeError(f"dim {dim} of a tensor of shape ()")
    return axes(x, dim)[0]


def along(f):
    """Decorator for a function along an axis: a 0-d tensor counts as one with a single element."""

    @functools.wraps(f)
    def lifted(x, *args, **kwargs):
        x = as_tensor(x)
        if x.ndim:
            return f(x, *args, **kwargs)
        found = f(_reshape(x, (1,)), *args, **kwargs)
        back = [reshape(one, ()) for one in (found if isinstance(found, tuple) else (found,))]
        return tuple(back) if isinstance(found, tuple) else back[0]

    return lifted


def kept(shape, dims):
    """`shape` with 1 in place of the reduced axes."""
    return tuple(1 if i - len(shape) in dims else n for i, n in enumerate(shape))


def reducer(flops=1, real=False, **rules):
    return primitive(batch="trailing", flops=flops, real=real, **rules)


@reducer(x=lambda g, shape, dims: expand(reshape(g, kept(shape, dims)), shape))
def _sum(x, dims, keepdim):
    return x.sum(axis=dims, keepdims=keepdim)


def sum(x, dim=None, keepdim=False):
    """Sum over dim (default: all)."""
    x = as_tensor(x)
    return _sum(x, axes(x, dim), keepdim)


@reducer(flops=0, x=None)
def _any(x, dims, keepdim):
    return x.any(axis=dims, keepdims=keepdim)


def any(x, dim=None, keepdim=False):
    """Whether any element is not 0."""
    return _any(x, axes(x, dim), keepdim)


def all(x, dim=None, keepdim=False):
    """Whether no element is 0."""
    return logical_not(any(equal(x, 0), dim, keepdim))


def prod(x, dim=None, keepdim=False):
    """Product over one axis, or of all elements: neighbours are multiplied until one is left.

    Unlike out/x, the derivatives of these steps are right where an element is 0.
    """
    if dim is None:
        return prod(reshape(x, (-1,) if x.numel() else (0,)), 0)
    if not x.ndim:
        axes(x, dim)
        return cast(x, np.int64) if x.dtype == bool else clone(x)
    dim = axis(x, dim)
    x = cast(x, np.int64) if x.dtype == bool else x
    if x.shape[dim] < 2:
        x = clone(x) if x.shape[dim] else sum(x, dim, keepdim=True) + 1
    while x.shape[dim] > 1:
        half = x.shape[dim] // 2
        left, right = narrow(x, dim, 0, half), narrow(x, dim, half, half)
        rest = narrow(x, dim, 2 * half, x.shape[dim] - 2 * half)
        x = cat([left * right, rest], dim) if rest.shape[dim] else left * right
    return x if keepdim else squeeze(x, dim)


def norm(x, p=2, dim=None, keepdim=False):
    """(Σ|x|ᵖ)^(1/p), the length of x for p = 2, its largest |x| for p = inf; slope 0 at 0."""
    if p == np.inf:
        return amax(abs(x), dim, keepdim)
    if p == 1:
        return sum(abs(x), dim, keepdim)
    total = sum(square(x) if p == 2 else abs(x) ** p, dim, keepdim)
    zero = equal(total, 0)
    return where(zero, 0.0, where(zero, 1.0, total) ** (1 / p))


def mean(x, dim=None, keepdim=False):
    """Mean over dim (default: all)."""
    x = as_tensor(x)
    dims = axes(x, dim)
    n = np.prod([x.shape[d] for d in dims], initial=1.0)
    return _sum(x, dims, keepdim) * float(1 / n) if n else _sum(x, dims, keepdim) * np.nan


def var(x, dim=None, correction=1, keepdim=False):
    """Σ(x − mean)² / (n − correction)."""
    dims = axes(x, dim)
    n = int(np.prod([x.shape[d] for d in dims]))
    centred = x - mean(x, dims, keepdim=True)
    return _sum(square(centred), dims, keepdim) / builtins.max(n - correction, 0)


def std(x, dim=None, correction=1, keepdim=False):
    """√var; the gradient is 0 where it is 0, as torch."""
    v = var(x, dim, correction, keepdim)
    zero = equal(v, 0)
    return where(zero, 0.0, sqrt(where(zero, 1.0, v)))


def _tied(g, x, out, dims, shape):
    """Gradient of an extremum: shared evenly among equal winners, as torch's amax."""
    out, g = reshape(out, kept(shape, dims)), reshape(g, kept(shape, dims))
    mask = cast(equal(x, out), x.dtype)
    return g * (mask / sum(mask, dims, keepdim=True))


@reducer(x=_tied)
def _amax(x, dims, keepdim):
    return x.max(axis=dims, keepdims=keepdim)


@reducer(x=_tied)
def _amin(x, dims, keepdim):
    return x.min(axis=dims, keepdims=keepdim)


def amax(x, dim=None, keepdim=False):
    """Maximum over dim (int, tuple or all); equal winners share the gradient."""
    return _amax(x, axes(x, dim), keepdim)


def amin(x, dim=None, keepdim=False):
    """Minimum over dim (int, tuple or all); equal winners share the gradient."""
    return _amin(x, axes(x, dim), keepdim)


@reducer(x=None)
def _argmax(x, dim, keepdim):
    return np.argmax(x, axis=dim, keepdims=keepdim)


@reducer(x=None)
def _argmin(x, dim, keepdim):
    return np.argmin(x, axis=dim, keepdims=keepdim)


@along
def argmax(x, dim=None, keepdim=False):
    """Index of the first maximum, along dim or (None) in the flattened tensor."""
    return _argmax(reshape(x, (-1,)), -1, False) if dim is None else _argmax(
        x, axis(x, dim), keepdim)  # fmt: skip


@along
def argmin(x, dim=None, keepdim=False):
    """Index of the first minimum, along dim or (None) in the flattened tensor."""
    return _argmin(reshape(x, (-1,)), -1, False) if dim is None else _argmin(
        x, axis(x, dim), keepdim)  # fmt: skip


@along
def max(x, dim=None, keepdim=False):
    """The maximum of all; or with dim (values, indices), where the first winner takes it all."""
    return amax(x) if dim is None else _extremum(x, argmax(x, dim, True), dim, keepdim)


@along
def min(x, dim=None, keepdim=False):
    """The minimum of all; or with dim (values, indices), where the first winner takes it all."""
    return amin(x) if dim is None else _extremum(x, argmin(x, dim, True), dim, keepdim)


def _extremum(x, index, dim, keepdim):
    values = gather(x, dim, index)
    return (values, index) if keepdim else (squeeze(values, dim), squeeze(index, dim))


def _logsumexp_rule(g, x, out, dims, shape):
    return reshape(g, kept(shape, dims)) * exp(x - reshape(out, kept(shape, dims)))


@reducer(flops=5, real=True, x=_logsumexp_rule)
def _logsumexp(x, dims, keepdim):
    top = x.max(axis=dims, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    with np.errstate(divide="ignore"):  # a row of −inf has sum 0: its logarithm is −inf, rightly
        out = np.log(np.exp(x - top).sum(axis=dims, keepdims=True)) + top
    return out if keepdim else out.squeeze(dims)


def logsumexp(x, dim=None, keepdim=False):
    """ln Σ eˣ, shifted by the maximum so that nothing overflows."""
    return _logsumexp(x, axes(x, dim), keepdim)


# numpy reduces short rows slowly. For the last axis two ways around: a product with a column of
# ones for sums, and halving the rows for maxima. Four and ten times as fast for rows of 64.
SHORT = 4096  # longer rows are summed by numpy, pair by pair, which loses fewer digits


def _total(x, dim):
    """x.sum(axis=dim, keepdims=True)."""
    dim = dim[0] if isinstance(dim, tuple) and len(dim) == 1 else dim
    if dim != -1 or not 1 < x.shape[-1] <= SHORT or not x.flags.c_contiguous:
        return x.sum(axis=dim, keepdims=True)
    rows = x.reshape(-1, x.shape[-1]) @ np.ones((x.shape[-1], 1), x.dtype)
    return rows.reshape(*x.shape[:-1], 1)


def _top(x, dim):
    """x.max(axis=dim, keepdims=True), −∞ where there is nothing."""
    while dim == -1 and x.shape[-1] > 8:
        half = x.shape[-1] // 2
        x = np.maximum(x[..., : x.shape[-1] - half], x[..., half:])  # an odd middle is seen twice
    return x.max(axis=dim, keepdims=True, initial=-np.inf)


def _softmax_out_rule(h, g, out, dim):
    return h * (g - sum(g * out, dim, keepdim=True)) - g * sum(h * out, dim, keepdim=True)


@reducer(
    flops=4,
    d=lambda g, p, dim: _softmax_back(g, p, dim),
    p=lambda g, d, p, dim: _softmax_out_rule(g, d, p, dim),
)
def _softmax_back(d, p, dim):
    """p·(d − Σ d·p), the derivative of the softmax p for the slopes d: symmetric in d."""
    out = d * p
    out -= p * _total(out, dim)
    return out


@reducer(flops=5, real=True, x=lambda g, out, dim: _softmax_back(g, out, dim))
def _softmax(x, dim):
    e = x - _top(x, dim)
    np.exp(e, out=e)
    e /= _total(e, dim)
    return e


@primitive(batch="elementwise", flops=6, x=lambda g, out: _softmax_back(g, out, -1), mask=None)
def masked_softmax(x, mask):
    """softmax over the last axis of the places where `mask` holds, 0 elsewhere and in rows without
    any: x is replaced by −∞ there, and eˣ is then 0."""
    e = x + np.where(mask, x.dtype.type(0), x.dtype.type(-np.inf))
    top = _top(e, -1)
    e -= np.where(np.isfinite(top), top, 0)
    np.exp(e, out=e)
    total = _total(e, -1)
    e /= np.where(total == 0, 1, total)
    return e


@along
def softmax(x, dim):
    """eˣ / Σ eˣ along dim:  ∂ = p·(g − Σ g·p)."""
    return _softmax(x, axis(x, dim))


@reducer(flops=5, real=True, x=lambda g, out, dim: g - exp(out) * sum(g, dim, keepdim=True))
def _log_softmax(x, dim):
    x = x - x.max(axis=dim, keepdims=True, initial=-np.inf)
    x -= np.log(np.exp(x).sum(axis=dim, keepdims=True))
    return x


@along
def log_softmax(x, dim):
    """x − ln Σ eˣ along dim."""
    return _log_softmax(x, axis(x, dim))


def _cross_entropy_rule(g, x, target):
    return unsqueeze(g, -1) * (_softmax(x, -1) - cast(one_hot(target, x.shape[-1]), x.dtype))


@reducer(flops=6, x=_cross_entropy_rule, target=None)
def cross_entropy_rows(x, target):
    """(…, C) logits and (…) integers → (…): ln Σⱼ e^xⱼ − x_target, the loss of each row."""
    top = x.max(axis=-1, keepdims=True)
    x = x - top  # the difference first: large logits keep their digits
    return np.log(np.exp(x).sum(axis=-1)) - np.take_along_axis(x, target[..., None], -1)[..., 0]


def _standardize_rule(g, x, out, dims, eps):
    scale = _power(var(x, dims, 0, keepdim=True) + eps, -0.5)
    return scale * (g - mean(g, dims, True) - out * mean(g * out, dims, True))


@reducer(flops=8, x=_standardize_rule)
def _standardize(x, dims, eps):
    n = math.prod(x.shape[d] for d in dims) or 1
    x = x - _total(x, dims) / n
    x /= np.sqrt(_total(np.square(x), dims) / n + eps)
    return x


def standardize(x, dim, eps=1e-5):
    """(x − mean)/√(var + eps) over dim, var divided by n: the heart of batch, layer, group norm.

    With x̂ the result: ∂ = (g − mean g − x̂·mean(g·x̂))/√(var + eps), Ioffe & Szegedy 2015
    (arXiv:1502.03167), §3, put together.
    """
    return _standardize(x, axes(x, dim), eps)


@reducer(x=lambda g, dim: flip(cumsum(flip(g, dim), dim), dim))
def _cumsum(x, dim):
    return np.cumsum(x, axis=dim)


@along
def cumsum(x, dim):
    """Running sum along dim."""
    return _cumsum(x, axis(x, dim))


# ── Products ──────────────────────────────────────────────────────────────────────────────────────


def _matmul_flops(arrays, out):
    return 2 * out.size * arrays[0].shape[-1]


@primitive(
    batch="elementwise",  # aligned like one: all axes but the last two are broadcast
    flops=_matmul_flops,
    x=lambda g, y: _matmul(g, y.mT),
    y=lambda g, x: _matmul(x.mT, g),
)
def _matmul(x, y):
    return np.matmul(x, y)


def matmul(x, y):
    """x @ y over the last two axes, the others broadcast; 1-d means a row left, a column right."""
    x, y = as_tensor(x), as_tensor(y)
    if builtins.min(x.ndim, y.ndim) == 0:
        raise ShapeError(f"matmul: shapes {x.shape} and {y.shape}: needs at least one axis each")
    if x.ndim > 2 and y.ndim == 2:  # one large product instead of a batch of small ones
        return reshape(matmul(_rows(x), y), (*x.shape[:-1], y.shape[-1]))
    if x.ndim == 1:
        return squeeze(matmul(unsqueeze(x, 0), y), -1 if y.ndim == 1 else -2)
    if y.ndim == 1:
        return squeeze(matmul(x, unsqueeze(y, 1)), -1)
    return _matmul(x, y)


def _rows(x):
    return reshape(x, (int(np.prod(x.shape[:-1])), x.shape[-1]))


@primitive(
    flops=lambda arrays, out: 2 * out.size * arrays[1].shape[1] + out.size,
    x=lambda g, w: matmul(g, w),
    w=lambda g, x: matmul(_rows(g).mT, _rows(x)),
    b=lambda g: sum(_rows(g), 0),
)
def _linear(x, w, b):
    out = x.reshape(np.prod(x.shape[:-1], dtype=int), x.shape[-1]) @ w.T
    out += b
    return out.reshape(*x.shape[:-1], len(w))


def linear(x, weight, bias=None):
    """x·Wᵀ + b with x (…, in), W (out, in), b (out): one node, one product each way."""
    if bias is None or Modes.vmap_sizes:
        out = matmul(x, weight.mT)
        return out if bias is None else out + bias
    if x.shape[-1:] != weight.shape[1:]:
        raise ShapeError(f"linear: shapes {x.shape} and {weight.shape}: the last axes differ")
    return _linear(x, weight, bias)


def einsum(equation, *operands):
    """Sum of products by index letters, e.g. "bij,bjk->bik"; pairs are contracted left to right.

    Raises ShapeError for a letter with two sizes. Left out: a letter twice in one operand.
    """
    terms, result = _einsum_terms(equation, operands)
    done, term = as_tensor(operands[0]), terms[0]
    for i in range(1, len(operands)):
        keep = set("".join(terms[i + 1 :]) + result)
        done, term = _contract(done, term, as_tensor(operands[i]), terms[i], keep)
    gone = tuple(i for i, letter in enumerate(term) if letter not in result)
    done = sum(done, gone) if gone else done
    term = [letter for letter in term if letter in result]
    return permute(done, tuple(term.index(letter) for letter in result))


def _einsum_terms(equation, operands):
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        raise ShapeError(f"einsum {equation!r}: {len(terms)} terms for {len(operands)} operands")
    sizes = {}
    for term, x in zip(terms, operands, strict=True):
        if len(term) != x.ndim or len(set(term)) != len(term):
            raise ShapeError(f"einsum {equation!r}: {term!r} does not name the axes of {x.shape}")
        for letter, n in zip(term, x.shape, strict=True):
            if sizes.setdefault(letter, n) != n:
                raise ShapeError(f"einsum {equation!r}: {letter!r} is both {sizes[letter]} and {n}")
    if not arrow:
        result = "".join(sorted(c for c in sizes if left.count(c) == 1))
    if not set(result) <= set(sizes):
        raise ShapeError(f"einsum {equation!r}: the result {result!r} has letters of no operand")
    return terms, result


def _contract(x, a, y, b, keep):
    """Two operands as one batched product: (batch, rows, inner) @ (batch, inner, columns)."""
    sizes = dict(zip(a + b, x.shape + y.shape, strict=True))
    batch = [c for c in a if c in b and c in keep]
    inner = [c for c in a if c in b and c not in keep]
    rows = [c for c in a if c not in b]
    columns = [c for c in b if c not in a]

    def n(letters):
        return int(np.prod([sizes[c] for c in letters]))

    x = permute(x, tuple(a.index(c) for c in batch + rows + inner))
    y = permute(y, tuple(b.index(c) for c in batch + inner + columns))
    out = _matmul(
        reshape(x, (n(batch), n(rows), n(inner))), reshape(y, (n(batch), n(inner), n(columns)))
    )
    term = batch + rows + columns
    return reshape(out, tuple(sizes[c] for c in term)), "".join(term)


# ── Shapes ────────────────────────────────────────────────────────────────────────────────────────


def _flat(shape):
    """(2, 3) from either f(2, 3) or f((2, 3))."""
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape


def reshape(x, *shape):
    """The same elements in another shape; one −1 is worked out."""
    shape = _flat(shape)
    if -1 in shape:
        known = int(np.prod([n for n in shape if n != -1]))
        if shape.count(-1) > 1 or known == 0 or x.numel() % known:
            raise ShapeError(f"reshape: shapes {x.shape} and {shape}: −1 cannot be worked out")
        shape = tuple(x.numel() // known if n == -1 else n for n in shape)
    return _reshape(x, shape)


def view(x, *shape):
    """The same memory in another shape. ShapeError where no order of steps through it would do.

    A tensor whose memory nobody else sees is laid out anew for it, so that the result of a
    convolution or a transpose that has no other name can be viewed like any other.
    """
    out = reshape(x, *shape)
    if np.may_share_memory(out.array, x.array) or not x.numel():
        return out
    if x.shares_memory():
        raise ShapeError(
            f"view: shapes {x.shape} and {_flat(shape)}: the elements do not lie in that order in "
            "memory, and another tensor shares it; reshape() makes a copy"
        )
    x.array = np.ascontiguousarray(x.array)
    return reshape(x, *shape)


def contiguous(x):
    """x with its elements one after the other in memory: itself, or a copy."""
    return x if x.array.flags.c_contiguous else clone(x)


def _permute_batch(params, hidden):
    return ((*range(len(hidden)), *params[0]),)


@primitive(
    batch=_permute_batch,
    view=True,
    x=lambda g, dims: _permute(g, tuple(int(i) - len(dims) for i in np.argsort(np.array(dims)))),
)
def _permute(x, dims):
    return x.transpose(dims)


def permute(x, *dims):
    """Axes in another order: a view."""
    dims = _flat(dims)
    n = x.ndim
    if sorted(d + n if d < 0 else d for d in dims) != list(range(n)):
        raise ShapeError(f"permute: {dims} is no order of the axes of shape {x.shape}")
    return _permute(x, tuple(d % x.ndim - x.ndim for d in dims))


def transpose(x, a, b):
    """Two axes swapped: a view."""
    if not x.ndim:
        return _permute(x, axes(x, a) or axes(x, b))  # only checks a and b: there is nothing to do
    dims = list(range(-x.ndim, 0))
    i, j = axis(x, a), axis(x, b)
    dims[i], dims[j] = j, i
    return _permute(x, tuple(dims))


def squeeze(x, dim=None):
    """Without the axes of size 1, or without that one (or those) if its size is 1."""
    asked = () if isinstance(dim, (tuple, list)) and not dim else axes(x, dim)
    drop = [d for d in asked if x.shape[d] == 1]
    return _reshape(x, tuple(n for i, n in enumerate(x.shape) if i - x.ndim not in drop))


def unsqueeze(x, dim):
    """With an axis of size 1 put in at dim."""
    if not -x.ndim - 1 <= dim <= x.ndim:
        raise ShapeError(f"unsqueeze: dim {dim} of a tensor of shape {x.shape}")
    dim = dim % (x.ndim + 1)
    return _reshape(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def flatten(x, start_dim=0, end_dim=-1):
    """The axes from start_dim to end_dim as one."""
    if not x.ndim:
        return reshape(x, (1,))
    first, last = axis(x, start_dim) + x.ndim, axis(x, end_dim) + x.ndim
    if first > last:
        raise ShapeError(f"flatten: dims {start_dim} to {end_dim} of shape {x.shape}")
    return reshape(
        x, (*x.shape[:first], int(np.prod(x.shape[first : last + 1])), *x.shape[last + 1 :])
    )


def _cat_rule(g, i, dim, node):
    start = builtins.sum(shape[dim] for shape in node.shapes[:i])
    return narrow(g, dim, start, node.shapes[i][dim])


@primitive(
    batch="trailing",
    variadic=True,
    tensors=lambda g, i, node: _cat_rule(g, i, node.params[0], node),
)
def _cat(*arrays_and_dim):
    *arrays, dim = arrays_and_dim
    return np.concatenate(arrays, axis=dim)


def cat(tensors, dim=0):
    """Joined along an axis."""
    if not len(tensors):
        raise ShapeError("cat: no tensors given")
    tensors = match_dtypes(tensors)
    like = next((t for t in tensors if t.shape != (0,)), tensors[0])
    dim = axis(like, dim)
    if like.ndim != 1:  # as in torch, an empty list joins with anything
        shape = (*like.shape[:dim], 0, *like.shape[like.ndim + dim + 1 :])
        tensors = tuple(_reshape(t, shape) if t.shape == (0,) else t for t in tensors)
    return apply(_cat, tensors, (dim,))


def stack(tensors, dim=0):
    """Joined along a new axis."""
    return cat([unsqueeze(t, dim) for t in tensors], dim)


def narrow(x, dim, start, length):
    """x[start : start + length] along dim: a view."""
    dim = axis(x, dim)
    first = start + x.shape[dim] if start < 0 else start
    if not 0 <= first <= first + length <= x.shape[dim]:
        raise ShapeError(f"narrow: {start} to {start + length} of dim {dim}, shape {x.shape}")
    key = [slice(None)] * x.ndim
    key[dim] = slice(first, first + length)
    return _slice(x, tuple(key))


def split(x, size, dim=0):
    """Views of `size` along dim (the last may be smaller), or of the given list of sizes."""
    n = x.shape[axis(x, dim)]
    if isinstance(size, int):
        size = [builtins.min(size, n - i) for i in range(0, n, builtins.max(size, 1))] or [0]
    if builtins.sum(size) != n:
        raise ShapeError(f"split: sizes {tuple(size)} do not add up to dim {dim} of {x.shape}")
    starts = np.cumsum([0, *size[:-1]])
    return [narrow(x, dim, int(s), length) for s, length in zip(starts, size, strict=True)]


def chunk(x, chunks, dim=0):
    """`chunks` pieces of equal size along dim (the last may be smaller)."""
    return split(x, -(-x.shape[axis(x, dim)] // chunks), dim)


@primitive(batch="trailing", x=lambda g, dims: _flip(g, dims))
def _flip(x, dims):
    return np.flip(x, dims).copy()


def flip(x, *dims):
    """A copy, reversed along one or more axes."""
    dims = _flat(dims)
    return _flip(x, axes(x, dims) if dims else ())


@primitive(
    batch=lambda params, hidden: (((0, 0),) * len(hidden) + params[0], params[1]),
    x=lambda g, shape, pairs: g[
        tuple(slice(a, a + n) for (a, _), n in zip(pairs, shape, strict=True))
    ],
)
def _pad(x, pairs, value):
    return np.pad(x, pairs, constant_values=value)


def pad(x, pads, value=0.0):
    """Constant padding: (left, right) of the last axis, then of the one before, …, as torch."""
    if len(pads) % 2 or len(pads) > 2 * x.ndim or builtins.min(pads, default=0) < 0:
        raise ShapeError(f"pad: {tuple(pads)} does not fit shape {x.shape}: pairs of numbers ≥ 0")
    pairs = [tuple(pads[i : i + 2]) for i in range(0, len(pads), 2)]
    pairs += [(0, 0)] * (x.ndim - len(pairs))
    return _pad(x, tuple(reversed(pairs)), value)


def _below(x, diagonal):
    """The mask of the lower triangle of the last two axes."""
    if x.ndim < 2:
        raise ShapeError(f"tril, triu: needs two axes, the shape is {x.shape}")
    return np.tri(*x.shape[-2:], diagonal, dtype=bool)


def tril(x, diagonal=0):
    """The lower triangle of the last two axes, zeros above."""
    return where(_below(x, diagonal), x, False)  # False is 0 in x's own dtype


def triu(x, diagonal=0):
    """The upper triangle of the last two axes, zeros below."""
    return where(_below(x, diagonal - 1), False, x)


# ── Indexing ──────────────────────────────────────────────────────────────────────────────────────


@primitive(x=lambda g, key, shape: _put(g, key, shape))
def _index(x, key):
    return x[key]


@primitive(
    batch=lambda params, hidden: ((*[slice(None)] * len(hidden), *params[0]), params[1], hidden),
    x=lambda g, key: _slice(g, key),
)
def _put_slice(x, key, to, hidden):
    """The adjoint of a slice: zeros of shape `to` with x at key."""
    out = np.zeros(hidden + to, x.dtype)
    out[key] = x
    return out


@primitive(
    batch=lambda params, hidden: ((*[slice(None)] * len(hidden), *params[0]),),
    view=True,
    x=lambda g, key, shape: _put_slice(g, key, shape, ()),
)
def _slice(x, key):
    return x[(*key, ...)]  # with `...` even a single element is a view, not a copy


@primitive(flops=1, x=lambda g, key: _index(g, key))
def _put(x, key, to):
    """The adjoint of indexing with arrays: zeros of shape `to` with x added at key.

    A place named several times gets the sum. Rows of a table are added by sorting, which is much
    faster than `np.add.at`.
    """
    out = np.zeros(to, x.dtype)
    if isinstance(key, np.ndarray) and key.dtype.kind == "i" and x.ndim > key.ndim and key.size:
        rows = key.ravel() % to[0]
        order = np.argsort(rows, kind="stable")
        starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
        out[rows[order[starts]]] = np.add.reduceat(x.reshape(len(rows), *to[1:])[order], starts)
    else:
        np.add.at(out, key, x)
    return out


def getitem(x, key):
    """x[key]: integers, slices and None make a view; arrays of integers or booleans make a copy."""
    if isinstance(key, Tensor) and key.hidden and key.dtype == np.int64:
        return _own_rows(x, key)
    plain, arrays = split_key(key, x.shape)
    if plain.count(slice(None)) < len(plain) or not arrays:
        x = _slice(x, plain)
    if not arrays:
        return x
    return _index(x, arrays[0] if len(arrays) == 1 else arrays)


def _own_rows(x, index):
    """x[index] where every example of vmap has its own index."""
    column = reshape(index, (index.numel(),) + (1,) * (x.ndim - 1))
    rows = gather(x, 0, expand(column, (index.numel(), *x.shape[1:])))
    return reshape(rows, index.shape + x.shape[1:])


def _grid(x, index, dim):
    """The indices that name, for every place of `index`, the entry of x it points to along dim."""
    grid = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    grid[dim] = index
    return tuple(grid)


def _places(name, x, dim, index, source=None):
    """(x, dim, index, source) checked by torch's rules and with at least one axis each.

    The index has as many axes as x and is nowhere longer, but along dim; a source may be larger
    than the index, what lies beyond is not used.
    """
    index = as_tensor(index)
    x, index = (_reshape(t, t.shape or (1,)) for t in (x, index))
    dim = axis(x, dim)
    if not index.numel() and source is not None:  # no places, nothing to write
        none = _slice(reshape(source, (source.numel(),)), (slice(0, 0),))
        return x, dim, zeros(x.ndim * (0,), dtype=np.int64), _reshape(none, x.ndim * (0,))
    shapes = f"{name}: shapes {x.shape} and {index.shape}"
    if index.ndim != x.ndim:
        raise ShapeError(f"{shapes}: the index needs as many axes as the tensor")
    for d, (n, limit) in enumerate(zip(index.shape, x.shape, strict=True)):
        if n > limit and d - x.ndim != dim:
            raise ShapeError(f"{shapes}: the index is longer than the tensor along dim {d}")
    if index.numel() and (index.array.min() < 0 or index.array.max() >= x.shape[dim]):
        raise ShapeError(f"{shapes}: an index outside [0, {x.shape[dim]})")
    if source is not None:
        source = _reshape(source, source.shape or (1,))
        sizes = zip(source.shape, index.shape, strict=False)
        if source.ndim != x.ndim or builtins.any(n < m for n, m in sizes):
            raise ShapeError(f"{shapes}, source {source.shape}: smaller than the index")
        if source.shape != index.shape:
            source = _slice(source, tuple(slice(n) for n in index.shape))
    return x, dim, index, source


@primitive(
    flops=0,
    x=lambda g, index, dim, shape: scatter_add(zeros(shape, dtype=g.dtype), dim, index, g),
    index=None,
)
def _gather(x, index, dim):
    return x[_grid(x, index, dim)]


def gather(x, dim, index):
    """out[i, j] = x[index[i, j], j] for dim 0, and so on for any axis."""
    rows, dim, index_, _ = _places("gather", x, dim, index)
    out = _gather(rows, index_, dim)
    return out if np.ndim(index) else reshape(out, ())


@primitive(flops=1, x=lambda g: g, index=None, source=lambda g, index, dim: _gather(g, index, dim))
def _scatter_add(x, index, source, dim):
    out = x.copy()
    np.add.at(out, _grid(x, index, dim), source)
    return out


def scatter_add(x, dim, index, source):
    """A copy of x with source[i, j] added at [index[i, j], j] for dim 0, and so on."""
    rows, dim, index, source = _places("scatter_add", x, dim, index, as_tensor(source))
    return _reshape(_scatter_add(rows, index, source, dim), x.shape)


@primitive(
    x=lambda g, index, dim: _scatter(g, index, zeros(index.shape, dtype=g.dtype), dim),
    index=None,
    source=lambda g, index, dim: _gather(g, index, dim),
)
def _scatter(x, index, source, dim):
    out = x.copy()
    out[_grid(x, index, dim)] = source
    return out


def scatter(x, dim, index, source):
    """A copy of x with source[i, j] (or one number) written at [index[i, j], j] for dim 0; index
    names no place twice (then the winner is not defined, as in torch)."""
    if not isinstance(source, Tensor):
        source = zeros_like(as_tensor(index), 1) * cast(as_tensor(source), x.dtype)
    rows, dim, index, source = _places("scatter", x, dim, index, source)
    return _reshape(_scatter(rows, index, source, dim), x.shape)


@primitive(batch="trailing", x=None)
def _argsort(x, dim, descending):
    if descending:  # not of −x: that has no meaning for booleans and would put NaN last
        order = np.argsort(np.flip(x, dim), axis=dim, kind="stable")
        return np.flip(x.shape[dim] - 1 - order, dim)
    return np.argsort(x, axis=dim, kind="stable")


@along
def argsort(x, dim=-1, descending=False):
    """The order that sorts; equal elements keep theirs."""
    return _argsort(x, axis(x, dim), descending)


@along
def sort(x, dim=-1, descending=False):
    """(values, indices), sorted along dim; equal elements keep their order."""
    index = argsort(x, dim, descending)
    return gather(x, dim, index), index


@along
def topk(x, k, dim=-1, largest=True):
    """(values, indices) of the k largest (or smallest), best first."""
    if not 0 <= k <= x.shape[axis(x, dim)]:
        raise ShapeError(f"topk: k={k} of dim {dim} of a tensor of shape {x.shape}")
    index = narrow(argsort(x, dim, largest), dim, 0, k)
    return gather(x, dim, index), index


# ── Windows: convolution and pooling ──────────────────────────────────────────────────────────────
# n spatial axes; kernel, stride: tuples of n. Sizes: L_out = (L − k) // s + 1 along each.


def _window_slices(kernel, stride, sizes):
    """For each position in the kernel, the slices of the input that it touches."""
    for place in np.ndindex(*kernel):
        yield (
            place,
            tuple(slice(p, p + s * n, s) for p, s, n in zip(place, stride, sizes, strict=True)),
        )


def _window_sizes(space, kernel, stride):
    axes = list(zip(space, kernel, stride, strict=True))
    if builtins.any(s < 1 or k > n for n, k, s in axes):
        raise ShapeError(f"windows: kernel {kernel}, stride {stride} do not fit {tuple(space)}")
    return tuple((n - k) // s + 1 for n, k, s in axes)


@primitive(x=lambda g, kernel, stride, shape: fold(g, kernel, stride, shape[2:]))
def unfold(x, kernel, stride):
    """(N, C, *L) → (C, *kernel, N, *L_out): a column per window, ready for one matrix product."""
    sizes = _window_sizes(x.shape[2:], kernel, stride)
    out = np.empty((x.shape[1], *kernel, x.shape[0], *sizes), x.dtype)
    source = x.swapaxes(0, 1)
    for place, window in _window_slices(kernel, stride, sizes):
        out[(slice(None), *place)] = source[(..., *window)]
    return out


@primitive(
    flops=lambda arrays, out: arrays[0].size, x=lambda g, kernel, stride: unfold(g, kernel, stride)
)
def fold(x, kernel, stride, space):
    """The adjoint of unfold: every window is added back where it came from."""
    n = len(kernel)
    sizes = x.shape[n + 2 :]
    out = np.zeros((x.shape[0], x.shape[n + 1], *space), x.dtype)
    for place, window in _window_slices(kernel, stride, sizes):
        out[(..., *window)] += x[(slice(None), *place)]
    return out.swapaxes(0, 1)


def _tuple(value, n):
    return (value,) * n if isinstance(value, int) else tuple(value)


def _conv(x, weight, bias, stride, padding, groups):
    """out[n, o] = b[o] + Σ over c and the window of w[o, c, …]·x[n, c, …] (cross-correlation)."""
    n = weight.ndim - 2
    stride, padding = _tuple(stride, n), _tuple(padding, n)
    if x.ndim != n + 2 or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        raise ShapeError(f"conv{n}d: shapes {x.shape} and {weight.shape}, groups {groups}")
    if builtins.any(padding):
        x = pad(x, tuple(p for q in reversed(padding) for p in (q, q)))
    columns = unfold(x, weight.shape[2:], stride)  # (C, *K, N, *L)
    sizes = columns.shape[n + 1 :]
    w = reshape(weight, (groups, weight.shape[0] // groups, -1))  # (G, O/G, C/G·K)
    out = matmul(w, reshape(columns, (groups, w.shape[2], -1)))  # (G, O/G, N·L)
    out = reshape(out, (weight.shape[0], *sizes))  # (O, N, *L)
    if bias is not None:
        out = out + reshape(bias, (-1,) + (1,) * (n + 1))
    return transpose(out, 0, 1)  # (N, O, *L)


def conv1d(x, weight, bias=None, stride=1, padding=0, groups=1):
    """x (N, C, L), weight (O, C/groups, K), bias (O) → (N, O, L_out)."""
    return _conv(x, weight, bias, stride, padding, groups)


def conv2d(x, weight, bias=None, stride=1, padding=0, groups=1):
    """x (N, C, H, W), weight (O, C/groups, K, K'), bias (O) → (N, O, H_out, W_out)."""
    return _conv(x, weight, bias, stride, padding, groups)


def _conv_transpose(x, weight, bias, stride, padding, output_padding, groups):
    """The adjoint of _conv in x: every x[n, c, …] adds x·w[c, o, …] to a window of the result."""
    n = weight.ndim - 2
    stride, padding, extra = (_tuple(v, n) for v in (stride, padding, output_padding))
    if x.ndim != n + 2 or x.shape[1] != weight.shape[0] or x.shape[1] % groups:
        raise ShapeError(f"conv_transpose{n}d: shapes {x.shape}, {weight.shape}, groups {groups}")
    kernel, channels = weight.shape[2:], weight.shape[1] * groups
    full = tuple((size - 1) * s + k + e for size, s, k, e in zip(
        x.shape[2:], stride, kernel, extra, strict=True))  # fmt: skip
    if builtins.any(e >= s for e, s in zip(extra, stride, strict=True)):
        raise ShapeError(f"conv_transpose{n}d: output_padding {extra} must be less than {stride}")
    w = reshape(weight, (groups, x.shape[1] // groups, -1))  # (G, C/G, O/G·K)
    columns = matmul(w.mT, reshape(transpose(x, 0, 1), (groups, w.shape[1], -1)))  # (G, …, N·L)
    columns = reshape(columns, (channels, *kernel, x.shape[0], *x.shape[2:]))
    out = fold(columns, kernel, stride, full)  # (N, O, *full)
    for i, (size, p) in enumerate(zip(full, padding, strict=True)):
        out = narrow(out, i + 2, p, size - 2 * p)
    return out if bias is None else out + reshape(bias, (-1,) + (1,) * n)


def conv_transpose2d(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1):
    """x (N, C, H, W), weight (C, O/groups, K, K'), bias (O) → (N, O, H_out, W_out)."""
    return _conv_transpose(x, weight, bias, stride, padding, output_padding, groups)


def _kernel_windows(space, kernel, stride):
    """(number, slices) for each position in the kernel."""
    sizes = _window_sizes(space, kernel, stride)
    return [(i, (..., *w)) for i, (_, w) in enumerate(_window_slices(kernel, stride, sizes))]


@primitive(
    flops=lambda arrays, out: arrays[0].size,
    x=lambda g, x, out, kernel, stride: _spread(
        g, _winner(x, out, kernel, stride), kernel, stride, x.shape[2:]
    ),
)
def _max_pool(x, kernel, stride):
    first, *others = [x[w] for _, w in _kernel_windows(x.shape[2:], kernel, stride)]
    out = first.copy("K")
    for other in others:
        np.maximum(out, other, out=out)
    return out


@primitive(x=None, out=None)
def _winner(x, out, kernel, stride):
    """Which position of each window holds the maximum `out`: the first of equals."""
    index = np.zeros_like(out, np.int8 if np.prod(kernel) < 128 else np.int64)
    for i, window in reversed(_kernel_windows(x.shape[2:], kernel, stride)):
        index += (x[window] == out) * (i - index)  # index ← i where equal, without a branch
    return index


@primitive(flops=1, x=lambda g, index, kernel, stride: _pick(g, index, kernel, stride), index=None)
def _spread(x, index, kernel, stride, space):
    """Each element put at position `index` of its window; overlapping windows add up."""
    out = np.zeros_like(x, shape=(*x.shape[:2], *space))
    overlap = builtins.any(s < k for k, s in zip(kernel, stride, strict=True))
    bits = f"i{x.itemsize}"
    for i, window in _kernel_windows(space, kernel, stride):
        if overlap:
            out[window] += _keep_bits(x, index == i)
        else:  # the same and-ing of bits, into its place at once
            mask = np.negative((index == i).view("i1"), dtype=bits)
            np.bitwise_and(x.view(bits), mask, out=out.view(bits)[window])
    return out


@primitive(
    flops=1,
    x=lambda g, index, kernel, stride, shape: _spread(g, index, kernel, stride, shape[2:]),
    index=None,
)
def _pick(x, index, kernel, stride):
    """The adjoint of _spread: the element at position `index` of each window."""
    out = np.zeros_like(x, shape=index.shape)
    for i, window in _kernel_windows(x.shape[2:], kernel, stride):
        out += _keep_bits(x[window], index == i)
    return out


def _mean_pool(x, kernel, stride):
    windows = unfold(x, kernel, stride)
    return transpose(mean(windows, tuple(range(1, 1 + len(kernel)))), 0, 1)


def _pool(pool, n, x, kernel, stride, padding, fill):
    if x.ndim != n + 2:
        raise ShapeError(f"pooling over {n} axes needs (N, C, *L), not shape {x.shape}")
    kernel, padding = _tuple(kernel, n), _tuple(padding, n)
    if builtins.any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        raise ShapeError(f"pooling: padding {padding} is more than half the kernel {kernel}")
    if builtins.any(padding):
        x = pad(x, tuple(p for q in reversed(padding) for p in (q, q)), fill)
    return pool(x, kernel, kernel if stride is None else _tuple(stride, n))


def max_pool1d(x, kernel, stride=None, padding=0):
    """Largest element of each window of (N, C, L); the first of equals takes the gradient."""
    return _pool(_max_pool, 1, x, kernel, stride, padding, -np.inf)


def max_pool2d(x, kernel, stride=None, padding=0):
    """Largest element of each window of (N, C, H, W); the first of equals takes the gradient."""
    return _pool(_max_pool, 2, x, kernel, stride, padding, -np.inf)


def avg_pool1d(x, kernel, stride=None, padding=0):
    """Mean of each window of (N, C, L), padded zeros included."""
    return _pool(_mean_pool, 1, x, kernel, stride, padding, 0.0)


def avg_pool2d(x, kernel, stride=None, padding=0):
    """Mean of each window of (N, C, H, W), padded zeros included."""
    return _pool(_mean_pool, 2, x, kernel, stride, padding, 0.0)


def _shares(n, parts, dtype):
    """(parts, n) matrix whose row i averages the places ⌊i·n/parts⌋ to ⌈(i + 1)·n/parts⌉."""
    place, i = np.arange(n), np.arange(parts)[:, None]
    inside = (place >= i * n // parts) & (place < -(-(i + 1) * n // parts))
    return _new((inside / inside.sum(1, keepdims=True)).astype(dtype))


def adaptive_avg_pool2d(x, output_size):
    """(…, H, W) → (…, *output_size): means over equal shares, which overlap if they must."""
    height, width = _tuple(output_size, 2)
    rows = _shares(x.shape[-2], height or x.shape[-2], x.dtype)
    columns = _shares(x.shape[-1], width or x.shape[-1], x.dtype)
    return _matmul(_matmul(rows, x), columns.mT)


# ── Methods ───────────────────────────────────────────────────────────────────────────────────────


def dropout(x, p=0.5, training=True):
    """Each element 0 with probability p, else divided by 1 − p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must lie in [0, 1), not {p}")
    if not training or p == 0:
        return x
    keep = (random.random(x.shape, dtype=np.float32) >= p).astype(x.dtype)
    return x * _new(keep / x.dtype.type(1 - p))


METHODS = (
    add, sub, mul, div, neg, pow, square, remainder, exp, log, log1p, sqrt, sin, cos, tanh, sigmoid,
    relu, silu, softplus, erf, abs, sign, floor, maximum, minimum, clamp, masked_fill, isnan, sum,
    mean, var, std, prod, norm, any, all, amax, amin, argmax, argmin, max, min, logsumexp, softmax,
    log_softmax, cumsum, matmul, reshape, view, contiguous, permute, transpose, squeeze, unsqueeze,
    flatten, narrow, split, chunk, flip, tril, triu, gather, scatter, scatter_add, argsort, sort,
    topk, clone,
)  # fmt: skip
OPERATORS = {
    "add": add, "sub": sub, "mul": mul, "truediv": div, "pow": pow, "mod": remainder,
    "matmul": matmul, "and": logical_and, "or": logical_or,
}  # fmt: skip
COMPARISONS = {"eq": equal, "ne": not_equal, "lt": less, "le": less_equal}
IN_PLACE = {"add": add, "sub": sub, "mul": mul, "div": div, "pow": pow, "remainder": remainder}


def _function(op, name):
    """An Op as a plain function, so that it can be a method; help() shows name and arguments."""

    def method(*args):
        return op(*args)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = op.__doc__
    method.__signature__ = inspect.signature(op.forward)
    return method


def _updating(op, name):
    """The method that does `x ← op(x, other)` in x's own memory."""

    def method(self, other):
        return self.update_(name, op, other)

    method.__name__ = method.__qualname__ = name
    method.__doc__ = (
        f"{op.name if not inspect.isfunction(op) else op.__name__}(x, other), in place."
    )
    return method


def _swap(op):
    return lambda x, y: op(y, x)


def _attach():
    """Operations as methods and operators of Tensor."""
    for f in METHODS:
        name = f.__name__ if inspect.isfunction(f) else f.name
        setattr(Tensor, name, f if inspect.isfunction(f) else _function(f, name))
    for name, f in (OPERATORS | COMPARISONS).items():
        setattr(Tensor, f"__{name}__", lambda x, y, _f=f: _f(x, y))
    for name, f in OPERATORS.items():
        setattr(Tensor, f"__r{name}__", _swap(f))
        if f is not matmul:  # x @= y is x = x @ y: the shape may change
            setattr(Tensor, f"__i{name}__", _updating(f, f"{name}="))
    for name, f in IN_PLACE.items():
        setattr(Tensor, f"{name}_", _updating(f, f"{name}_"))
    Tensor.__gt__, Tensor.__ge__ = _swap(less), _swap(less_equal)
    Tensor.__neg__, Tensor.__invert__ = (lambda x: neg(x)), (lambda x: logical_not(x))
    Tensor.__abs__ = lambda x: abs(x)
    Tensor.__getitem__, Tensor.__hash__ = getitem, object.__hash__
    Tensor.expand = lambda x, *shape: expand(x, _flat(shape))
    Tensor.mT = property(
        lambda x: transpose(x, -2, -1) if x.ndim else x, doc="The last two axes swapped."
    )
    Tensor.T = property(lambda x: permute(x, tuple(range(x.ndim))[::-1]), doc="All axes reversed.")
    Tensor.float = lambda x: cast(x, np.float32)
    Tensor.double = lambda x: cast(x, np.float64)
    Tensor.long = lambda x: cast(x, np.int64)
    Tensor.to = cast


_attach()
