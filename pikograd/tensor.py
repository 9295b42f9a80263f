"""Every operation on tensors, each beside its derivative. Import from here.

A derivative rule maps g = ∂L/∂out to ∂L/∂input. It is written in tensor operations, so it can be
differentiated again. Names, defaults and conventions at kinks are torch's.

Left out against torch: complex numbers, `out=`, strides, half precision, exact GELU (numpy has no
erf). The linear-algebra trick used throughout: of two adjoint linear maps (expand ⇄ sum,
gather ⇄ scatter, unfold ⇄ fold, index ⇄ put) each is the other's derivative, so they come in pairs.
"""

import builtins

import numpy as np

from engine import (  # noqa: F401  (re-exported: the tape's own names)
    FLOATS,
    AnomalyError,
    GraphError,
    Modes,
    ShapeError,
    Tensor,
    _new,
    _plain_key,
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
    zeros_like,
)

random = np.random.default_rng(0)  # the one source of randomness; see manual_seed


def manual_seed(seed):
    """Restart the generator behind randn, rand and dropout."""
    random.bit_generator.state = np.random.default_rng(seed).bit_generator.state


# ── Creation ──────────────────────────────────────────────────────────────────────────────────────


def zeros(*shape, dtype=np.float32, requires_grad=False):
    return Tensor(np.zeros(_flat(shape), dtype), requires_grad)


def ones(*shape, dtype=np.float32, requires_grad=False):
    return Tensor(np.ones(_flat(shape), dtype), requires_grad)


def ones_like(x):
    return zeros_like(x, 1)


def arange(*args):
    x = np.arange(*args)
    return Tensor(x, dtype=np.float32 if x.dtype.kind == "f" else None)


def randn(*shape, dtype=np.float32, requires_grad=False):
    """Standard normal numbers."""
    return Tensor(random.standard_normal(_flat(shape)).astype(dtype), requires_grad)


def rand(*shape, dtype=np.float32, requires_grad=False):
    """Uniform numbers in [0, 1)."""
    return Tensor(random.random(_flat(shape)).astype(dtype), requires_grad)


def one_hot(index, n):
    """(…) integers in [0, n) → (…, n) float32 with a single 1 in each row."""
    index = as_tensor(index)
    if ((index.data < 0) | (index.data >= n)).any():
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
    """x to a constant or a tensor power."""
    if isinstance(y, (int, float)):
        x = as_tensor(x)
        whole = x.dtype in FLOATS or (isinstance(y, int) and y >= 0)
        return _power(x if whole else cast(x, np.float32), y)
    return _pow(x, y)


def square(x):
    return _power(x, 2)


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
    return np.sin(x)


@elementwise(real=True, x=lambda g, x: neg(g * sin(x)))
def cos(x):
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


@elementwise(x=lambda g, out: _keep(g, ~(out <= 0)))
def relu(x):
    """max(x, 0):  ∂ = 0 at 0, as torch; NaN passes both ways."""
    return np.maximum(x, 0)


@elementwise(x=lambda g, x: g * sign(x))
def abs(x):
    """|x|:  ∂ = sign x, 0 at 0."""
    return np.abs(x)


@elementwise(x=None)
def sign(x):
    return np.sign(x)


@elementwise(x=None)
def floor(x):
    return np.floor(x)


def _share(x, y):
    """How much of the gradient of max(x, y) goes to x: 1, ½ for a tie, 0; 1 if one is NaN."""
    return 1.0 - (x < y) - 0.5 * equal(x, y)


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
    return where(mask, value, x)


def silu(x):
    """x·σ(x)."""
    return x * sigmoid(x)


def gelu(x):
    """½x(1 + tanh(√(2/π)(x + 0.044715x³))), Hendrycks & Gimpel 2016 (arXiv:1606.08415), §2."""
    return 0.5 * x * (1 + tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


# Comparisons have no gradient; they make masks.


@elementwise(x=None, y=None)
def equal(x, y):
    return x == y


@elementwise(x=None, y=None)
def not_equal(x, y):
    return x != y


@elementwise(x=None, y=None)
def less(x, y):
    return x < y


@elementwise(x=None, y=None)
def less_equal(x, y):
    return x <= y


@elementwise(x=None, y=None)
def logical_and(x, y):
    return np.logical_and(x, y)


@elementwise(x=None, y=None)
def logical_or(x, y):
    return np.logical_or(x, y)


@elementwise(x=None)
def logical_not(x):
    return np.logical_not(x)


@elementwise(x=None)
def isnan(x):
    return np.isnan(x)


# ── Reductions ────────────────────────────────────────────────────────────────────────────────────
# Axes are counted from the end, so that axes hidden in front by vmap do not matter.


def axes(x, dim):
    """dim (None, int or tuple) as a tuple of negative axes, none of them twice.

    Raises ShapeError outside the rank; 0 and −1 are allowed for a 0-d tensor and mean no axis.
    """
    dims = range(x.ndim) if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    rank = builtins.max(x.ndim, 1)
    found = tuple(sorted({d % rank - rank for d in dims}))
    if len(found) != len(dims) or not all(-rank <= d < rank for d in dims):
        raise ShapeError(f"dim {dim} of a tensor of shape {x.shape}")
    return found if x.ndim else ()


def axis(x, dim):
    """dim as one negative axis. A 0-d tensor has none (under vmap, −1 would be a hidden one)."""
    if not x.ndim:
        raise ShapeError(f"dim {dim} of a tensor of shape ()")
    return axes(x, dim)[0]


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
    return sum(square(centred), dims, keepdim) / builtins.max(n - correction, 0)


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


def argmax(x, dim=None, keepdim=False):
    """Index of the first maximum, along dim or (None) in the flattened tensor."""
    return argmax(reshape(x, (-1,)), 0) if dim is None else _argmax(x, axis(x, dim), keepdim)


def argmin(x, dim=None, keepdim=False):
    return argmax(neg(x), dim, keepdim)


def max(x, dim=None, keepdim=False):
    """The maximum of all; or with dim (values, indices), where the first winner takes it all."""
    return amax(x) if dim is None else _extremum(x, argmax(x, dim, True), dim, keepdim)


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


@reducer(flops=5, real=True, x=lambda g, out, dim: out * (g - sum(g * out, dim, keepdim=True)))
def _softmax(x, dim):
    e = np.exp(x - x.max(axis=dim, keepdims=True, initial=-np.inf))
    e /= e.sum(axis=dim, keepdims=True)
    return e


def softmax(x, dim):
    """eˣ / Σ eˣ along dim:  ∂ = p·(g − Σ g·p)."""
    return _softmax(x, axis(x, dim))


@reducer(flops=5, real=True, x=lambda g, out, dim: g - exp(out) * sum(g, dim, keepdim=True))
def _log_softmax(x, dim):
    x = x - x.max(axis=dim, keepdims=True, initial=-np.inf)
    x -= np.log(np.exp(x).sum(axis=dim, keepdims=True))
    return x


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
    x = x - x.mean(axis=dims, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=dims, keepdims=True) + eps)
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
    if sorted(d % x.ndim for d in dims) != list(range(x.ndim)):
        raise ShapeError(f"permute: {dims} is no order of the axes of shape {x.shape}")
    return _permute(x, tuple(d % x.ndim - x.ndim for d in dims))


def transpose(x, a, b):
    """Two axes swapped: a view."""
    dims = list(range(-x.ndim, 0))
    i, j = axis(x, a), axis(x, b)
    dims[i], dims[j] = j, i
    return _permute(x, tuple(dims))


def squeeze(x, dim=None):
    """Without the axes of size 1, or without that one if its size is 1."""
    drop = [d for d in (axes(x, dim)) if x.shape[d] == 1]
    return _reshape(x, tuple(n for i, n in enumerate(x.shape) if i - x.ndim not in drop))


def unsqueeze(x, dim):
    """With an axis of size 1 put in at dim."""
    if not -x.ndim - 1 <= dim <= x.ndim:
        raise ShapeError(f"unsqueeze: dim {dim} of a tensor of shape {x.shape}")
    dim = dim % (x.ndim + 1)
    return _reshape(x, (*x.shape[:dim], 1, *x.shape[dim:]))


def flatten(x, start_dim=0):
    """All axes from start_dim on as one."""
    return reshape(x, (*x.shape[:start_dim], int(np.prod(x.shape[start_dim:]))))


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
    return apply(_cat, tensors, (axis(tensors[0], dim),))


def stack(tensors, dim=0):
    """Joined along a new axis."""
    return cat([unsqueeze(t, dim) for t in tensors], dim)


def narrow(x, dim, start, length):
    """x[start : start + length] along dim."""
    if not 0 <= start <= start + length <= x.shape[axis(x, dim)]:
        raise ShapeError(f"narrow: {start} to {start + length} of dim {dim}, shape {x.shape}")
    return x[(..., slice(start, start + length), *[slice(None)] * (-1 - axis(x, dim)))]


def split(x, size, dim=0):
    """Pieces of `size` along dim (the last may be smaller), or of the given list of sizes."""
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


def flip(x, dim):
    """Reversed along dim."""
    return x[(..., slice(None, None, -1), *[slice(None)] * (-1 - axis(x, dim)))]


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
    return where(_below(x, diagonal), x, 0.0)


def triu(x, diagonal=0):
    """The upper triangle of the last two axes, zeros below."""
    return where(_below(x, diagonal - 1), 0.0, x)


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
    """x[key] with numpy's indexing: integers, slices, None, …, integer and boolean arrays."""
    if isinstance(key, Tensor) and key.hidden and key.dtype == np.int64:
        return _own_rows(x, key)
    key = _plain_key(key)
    parts = key if isinstance(key, tuple) else (key,)
    if any(isinstance(k, (list, np.ndarray)) for k in parts):
        return _index(x, key)
    return _slice(x, _full(parts, x.ndim))


def _own_rows(x, index):
    """x[index] where every example of vmap has its own index."""
    column = reshape(index, (index.numel(),) + (1,) * (x.ndim - 1))
    rows = gather(x, 0, expand(column, (index.numel(), *x.shape[1:])))
    return reshape(rows, index.shape + x.shape[1:])


def _full(parts, rank):
    """A key without arrays, with its `...` written out, so that hidden axes can go in front."""
    given = builtins.sum(k is not None and k is not ... for k in parts)
    if given > rank:
        raise ShapeError(f"index: {given} indices for a tensor with {rank} axes")
    spot = next((i for i, k in enumerate(parts) if k is ...), len(parts))
    return (*parts[:spot], *[slice(None)] * (rank - given), *parts[spot + 1 :])


def _grid(x, index, dim):
    """The indices that name, for every place of `index`, the entry of x it points to along dim."""
    if index.ndim != x.ndim:
        raise ValueError("the index needs as many axes as the tensor")
    grid = list(np.ogrid[tuple(slice(n) for n in index.shape)])
    grid[dim] = index
    return tuple(grid)


@primitive(
    flops=0,
    x=lambda g, index, dim, shape: scatter_add(zeros(shape, dtype=g.dtype), dim, index, g),
    index=None,
)
def _gather(x, index, dim):
    return x[_grid(x, index, dim)]


def gather(x, dim, index):
    """out[i, j] = x[index[i, j], j] for dim 0, and so on for any axis."""
    return _gather(x, index, axis(x, dim))


@primitive(flops=1, x=lambda g: g, index=None, source=lambda g, index, dim: _gather(g, index, dim))
def _scatter_add(x, index, source, dim):
    out = x.copy()
    np.add.at(out, _grid(x, index, dim), source)
    return out


def scatter_add(x, dim, index, source):
    """A copy of x with source[i, j] added at [index[i, j], j] for dim 0, and so on."""
    return _scatter_add(x, index, source, axis(x, dim))


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
    """A copy of x with source[i, j] written at [index[i, j], j] for dim 0; index names no place
    twice (then the winner is not defined, as in torch)."""
    if not isinstance(source, Tensor):
        source = ones(index.shape, dtype=x.dtype) * source
    return _scatter(x, index, source, axis(x, dim))


@primitive(batch="trailing", x=None)
def _argsort(x, dim, descending):
    if descending:  # not of −x: that has no meaning for booleans and would put NaN last
        order = np.argsort(np.flip(x, dim), axis=dim, kind="stable")
        return np.flip(x.shape[dim] - 1 - order, dim)
    return np.argsort(x, axis=dim, kind="stable")


def argsort(x, dim=-1, descending=False):
    """The order that sorts; equal elements keep theirs."""
    return _argsort(x, axis(x, dim), descending)


def sort(x, dim=-1, descending=False):
    """(values, indices), sorted along dim; equal elements keep their order."""
    index = argsort(x, dim, descending)
    return gather(x, dim, index), index


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
    if any(s < 1 or k > n for n, k, s in axes):
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
    if any(padding):
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
    for i, window in _kernel_windows(space, kernel, stride):
        out[window] += _keep_bits(x, index == i)
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


def _pool(pool, n, x, kernel, stride):
    if x.ndim != n + 2:
        raise ShapeError(f"pooling over {n} axes needs (N, C, *L), not shape {x.shape}")
    return pool(x, _tuple(kernel, n), _tuple(kernel if stride is None else stride, n))


def max_pool1d(x, kernel, stride=None):
    """Largest element of each window of (N, C, L); the first of equals takes the gradient."""
    return _pool(_max_pool, 1, x, kernel, stride)


def max_pool2d(x, kernel, stride=None):
    """Largest element of each window of (N, C, H, W); the first of equals takes the gradient."""
    return _pool(_max_pool, 2, x, kernel, stride)


def avg_pool1d(x, kernel, stride=None):
    """Mean of each window of (N, C, L)."""
    return _pool(_mean_pool, 1, x, kernel, stride)


def avg_pool2d(x, kernel, stride=None):
    """Mean of each window of (N, C, H, W)."""
    return _pool(_mean_pool, 2, x, kernel, stride)


# ── Methods ───────────────────────────────────────────────────────────────────────────────────────


def dropout(x, p=0.5, training=True):
    """Each element 0 with probability p, else divided by 1 − p."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p must lie in [0, 1), not {p}")
    if not training or p == 0:
        return x
    keep = (random.random(x.shape, dtype=np.float32) >= p).astype(x.dtype)
    return x * _new(keep / x.dtype.type(1 - p))


def _swap(op):
    return lambda x, y: op(y, x)


METHODS = (
    add, sub, mul, div, neg, pow, square, exp, log, log1p, sqrt, sin, cos, tanh, sigmoid, relu, abs,
    sign, floor, maximum, minimum, clamp, masked_fill, isnan, sum, mean, var, std, amax, amin,
    argmax, argmin, max, min, logsumexp, softmax, log_softmax, cumsum, matmul, reshape, expand,
    permute, transpose, squeeze, unsqueeze, flatten, narrow, split, chunk, flip, tril, triu, gather,
    scatter, scatter_add, argsort, sort, topk, clone,
)  # fmt: skip


def _attach():
    """Operations as methods and operators of Tensor."""
    for method in METHODS:
        name = getattr(method, "__name__", None) or method.name
        setattr(Tensor, name, lambda self, *a, _f=method, **k: _f(self, *a, **k))
    operators = {
        "add": add, "sub": sub, "mul": mul, "truediv": div, "pow": pow, "matmul": matmul,
        "eq": equal, "ne": not_equal, "lt": less, "le": less_equal, "and_": logical_and,
        "or_": logical_or,
    }  # fmt: skip
    for name, f in operators.items():
        setattr(Tensor, f"__{name.rstrip('_')}__", lambda x, y, _f=f: _f(x, y))
    for name in ["add", "sub", "mul", "truediv", "pow", "matmul", "and_", "or_"]:
        setattr(Tensor, f"__r{name.rstrip('_')}__", _swap(operators[name]))
    Tensor.__gt__, Tensor.__ge__ = _swap(less), _swap(less_equal)
    Tensor.__neg__, Tensor.__invert__ = (lambda x: neg(x)), (lambda x: logical_not(x))
    Tensor.__getitem__, Tensor.__hash__ = getitem, object.__hash__
    Tensor.view = Tensor.reshape
    Tensor.expand = lambda x, *shape: expand(x, _flat(shape))
    Tensor.T = Tensor.mT = property(lambda x: transpose(x, -2, -1))
    Tensor.float = lambda x: cast(x, np.float32)
    Tensor.double = lambda x: cast(x, np.float64)
    Tensor.long = lambda x: cast(x, np.int64)
    Tensor.to = cast


_attach()
