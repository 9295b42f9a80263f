"""The tape: n-dimensional tensors that remember how they were made, and the walk back.

Reverse mode in four steps. (1) `apply` runs an operation on numpy arrays and, when an input asks
for gradients, hangs a `Node` on the result. (2) The node keeps edges to its inputs' nodes and only
those arrays that its derivative rules name. (3) `run_backward` visits the nodes from the newest to
the oldest: an input always exists before its result, so creation order is a topological order.
(4) Each rule turns the gradient g of the result into that of an input. Rules are written in
tensor operations themselves, so with `create_graph` the walk back is on the tape too, to any order.

Griewank & Walther, Evaluating Derivatives (2008), ch. 3 (reverse mode), ch. 12 (checkpoints).

Left out: devices, dtypes other than float32, float64, int64 and bool, threads, and gradients
through writes into part of a tensor (refused, and caught when they harm). Operations live in
`tensor.py`, running them for a whole batch at once (`vmap`) in `batching.py`.
"""

import inspect
import itertools
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
DTYPES = (*FLOATS, np.dtype(np.int64), np.dtype(np.bool_))
KIND = {"b": 0, "i": 1, "f": 2}  # of a dtype, from the narrowest to the widest
OWN_FILES = {
    str(Path(__file__).parent / f"{name}.py")
    for name in ("engine", "tensor", "batching", "nn", "transforms")
}


class GraphError(RuntimeError):
    """The tape cannot be used as asked: freed, changed in place, or not connected."""


class AnomalyError(ArithmeticError):
    """Raised inside `detect_anomaly()` by the operation that made the first NaN or infinity."""


class ShapeError(ValueError):
    """Arrays that do not fit together; names the operation and every shape."""


class Modes:
    """What the next operation has to mind: the tape switch, and three watchers that are rare."""

    grad_enabled = True
    anomaly = False  # look for NaN and infinity after every operation
    meter = None  # a meter.CostMeter while one is open
    vmap_sizes = ()  # of the axes hidden by batching.vmap, outermost first
    special = False  # any of the three: keeps the usual path to one test
    backward_of = None  # the node whose rule is running, for anomaly messages
    batching = None  # how to run on hidden axes: the module batching.py puts itself here
    recomputing = False  # inside the second run of a checkpoint: statistics are not taken again

    @classmethod
    @contextmanager
    def set(cls, **changes):
        before = {name: getattr(cls, name) for name in changes}
        for name, value in changes.items():
            setattr(cls, name, value)
        cls.special = bool(cls.anomaly or cls.meter or cls.vmap_sizes)
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(cls, name, value)
            cls.special = bool(cls.anomaly or cls.meter or cls.vmap_sizes)


def no_grad():
    """Context in which nothing is recorded."""
    return Modes.set(grad_enabled=False)


def enable_grad():
    """Context in which recording is on, inside `no_grad` too."""
    return Modes.set(grad_enabled=True)


@contextmanager
def detect_anomaly():
    """Context in which the operation that makes the first NaN or infinity raises `AnomalyError`.

    Forward and backward; the message names the operation, its shapes and the line that called it.
    numpy's own warnings are silent inside, since the error says more.
    """
    with Modes.set(anomaly=True), np.errstate(all="ignore"):
        yield


class Op:
    """An operation: a forward on numpy arrays and one derivative rule per differentiable input.

    A rule is a function whose parameter names say what it needs: `g` (gradient of the result),
    `out` (the result), any argument of the forward, `shape` (of the input it is for), and for
    variadic operations `i` and `node`. What no rule names is not kept on the tape. A gradient is
    summed over the axes along which its input was broadcast by the engine, so no rule does it.

    batch: how `vmap` runs it: "elementwise", "trailing" (axes are counted from the end), a function
    (params, hidden shape) → params that makes it "trailing", or None: one call per example.
    view: the result may share memory with the first input. real: integers become float32 first.
    flops: operations per element of the larger side, for the cost meter; or f(arrays, out).
    Raises TypeError for rules that do not fit the forward, see `check_rules`.
    """

    def __init__(self, forward, rules, batch, flops, view, variadic, real):
        self.forward, self.name = forward, forward.__name__.strip("_")
        self.__doc__ = forward.__doc__
        self.batch, self.flops, self.view, self.variadic = batch, flops, view, variadic
        self.real = real
        self.arguments = tuple(inspect.signature(forward).parameters)
        order = tuple(rules) if variadic else self.arguments[: len(rules)]
        check_rules(self.name, order, self.arguments, rules)
        if not (batch is None or callable(batch) or batch in ("elementwise", "trailing", "raw")):
            raise TypeError(f"operation {self.name}: batch={batch!r} is no way to run it in vmap")
        self.n_tensors = 0 if variadic else len(rules)
        self.rules = tuple(rules[name] for name in order)  # in the forward's order
        self.differentiable = any(self.rules)
        self.mixed = self.differentiable and None in self.rules
        self.names = [tuple(inspect.signature(r).parameters) if r else () for r in self.rules]
        self._keeps = {}

    def __call__(self, *args):
        """Tensors first, in the forward's order (numbers and arrays are wrapped), then the rest."""
        n = self.n_tensors
        tensors = args[:n]
        if self.mixed:  # masks and indices keep their dtype
            same = iter(match_dtypes([a for a, r in zip(tensors, self.rules, strict=True) if r]))
            tensors = [
                next(same) if r else as_tensor(a) for a, r in zip(tensors, self.rules, strict=True)
            ]
        else:
            tensors = match_dtypes(tensors)
            if self.real and tensors[0].array.dtype.kind != "f":
                tensors = [cast(t, np.float32) for t in tensors]
        return apply(self, tensors, args[n:])

    def rule(self, i):
        i = 0 if self.variadic else i
        return self.rules[i], self.names[i]

    def keeps(self, wanted):
        """Which inputs, and whether the result, the rules of the `wanted` inputs need."""
        found = self._keeps.get(wanted)
        if found is None:
            names = {n for i in wanted if i < len(self.names) for n in self.names[i]}
            found = tuple(i for i, a in enumerate(self.arguments[: self.n_tensors]) if a in names)
            found = self._keeps[wanted] = (found, "out" in names)
        return found

    def __repr__(self):
        return f"<op {self.name}>"


def check_rules(name, first, arguments, rules):
    """Complain, where an operation is defined, of rules that would go wrong in the walk back.

    The rules' keywords are the forward's `first` arguments, none left out between them, and every
    parameter of a rule is something that the engine can hand to it.
    """
    if set(rules) != set(first):
        raise TypeError(
            f"operation {name}: there are rules for {', '.join(rules)}, but the first arguments of "
            f"its forward are {', '.join(first) or 'none'}: give each of those a rule, or None"
        )
    handed = {"g", "out", "shape", "i", "node", *arguments}
    for argument, rule in rules.items():
        strange = set(inspect.signature(rule).parameters if rule else ()) - handed
        if strange:
            raise TypeError(
                f"operation {name}: the rule for {argument} asks for {', '.join(sorted(strange))}; "
                f"a rule can have {', '.join(sorted(handed))}"
            )


def primitive(batch=None, flops=0, view=False, variadic=False, real=False, **rules):
    """Decorator: `@primitive(x=rule, y=rule)` makes an `Op`; a rule None marks a constant input."""
    return lambda forward: Op(forward, rules, batch, flops, view, variadic, real)


class Tensor:
    """An n-dimensional array with a gradient.

    data: number, nested list, numpy array or Tensor; copied. Floats in Python lists become float32,
    a numpy array keeps its dtype. dtype: float32, float64, int64 or bool.
    grad: None, or a Tensor of the same shape, summed over all `backward` calls since it was None.
    array: the numpy array itself. data: the same memory as a Tensor without history, as in torch.
    Raises TypeError for other dtypes and for `requires_grad` on integers.
    """

    __slots__ = ("__weakref__", "array", "grad", "hidden", "node", "requires_grad", "version")
    __array_ufunc__ = None  # ndarray ⊕ Tensor goes to the Tensor's reflected operator

    def __init__(self, data, requires_grad=False, dtype=None):
        self.hidden = data.hidden if isinstance(data, Tensor) else 0
        data = data.array if isinstance(data, Tensor) else data
        if dtype is None and not isinstance(data, (np.ndarray, np.generic)):
            array = np.asarray(data)
            dtype = np.float32 if array.dtype.kind == "f" else None
        array = np.array(data, dtype=dtype)
        if array.dtype.kind in "iu":
            array = array.astype(np.int64)
        if array.dtype not in DTYPES:
            raise TypeError(f"dtype {array.dtype} is none of float32, float64, int64, bool")
        if requires_grad and array.dtype not in FLOATS:
            raise TypeError(f"only floating point tensors can require gradients, not {array.dtype}")
        self.array, self.grad, self.node = array, None, None
        self.requires_grad, self.version = requires_grad, [0, ""]

    @property
    def data(self):
        """detach(); may be assigned and changed in place: `p.data -= 0.1 * p.grad`.

        Unlike torch's, such a change counts: a walk back that needs the old value says so.
        """
        return self.detach()

    @data.setter
    def data(self, value):
        value = as_tensor(value)
        if value.array is not self.array:
            self.array = value.array
            self.bump("data = ...")

    @property
    def shape(self):
        """The logical shape: without the leading axes that `vmap` hides."""
        return self.array.shape[self.hidden :]

    @property
    def ndim(self):
        """The number of axes."""
        return self.array.ndim - self.hidden

    @property
    def dtype(self):
        """float32, float64, int64 or bool, as numpy's."""
        return self.array.dtype

    @property
    def is_leaf(self):
        """Whether no recorded operation made this tensor."""
        return self.node is None

    def size(self, dim=None):
        """The shape, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self):
        """The number of axes."""
        return self.ndim

    def numel(self):
        """The number of elements."""
        return int(np.prod(self.shape))

    def numpy(self):
        """The array itself, not a copy. Writes to it are not seen by the version counter."""
        if self.requires_grad:
            raise GraphError("numpy() of a tensor that requires gradients: call detach() first")
        return self.array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numpy(), dtype)

    def item(self):
        """The only element, as a Python number."""
        if self.array.size != 1:
            inside = " in each of vmap's examples" if self.hidden else ""
            raise ShapeError(f"item() needs one element, the shape is {self.shape}{inside}")
        return self.array.item()

    def tolist(self):
        """Nested Python lists."""
        return self.array.tolist()

    def detach(self):
        """The same memory without history; in-place changes count for both."""
        out = _new(self.array)
        out.version, out.hidden = self.version, self.hidden
        return out

    def requires_grad_(self, requires_grad=True):
        """Start (or stop) asking for gradients; returns the tensor."""
        if requires_grad and self.dtype not in FLOATS:
            raise TypeError(f"only floating point tensors can require gradients, not {self.dtype}")
        if self.node is not None and not requires_grad:
            raise GraphError("a computed tensor cannot stop requiring gradients: use detach()")
        self.requires_grad = requires_grad
        return self

    def backward(self, gradient=None, retain_graph=None, create_graph=False):
        """Add ∂(self·gradient)/∂leaf to `.grad` of every leaf that requires gradients.

        gradient: of self's shape; may be left out for a single element (then 1).
        retain_graph: keep saved tensors for another backward (default: create_graph).
        create_graph: record the backward itself, for higher order.
        """
        found = run_backward([self], [gradient], None, retain_graph, create_graph)
        for leaf, g in found.items():
            if isinstance(leaf, Tensor):
                leaf.grad = g if leaf.grad is None else leaf.grad + g

    def edge(self):
        """What gradients towards this tensor are filed under: its node, or a leaf itself."""
        return self if self.node is None else self.node

    def write_(self, name, value, key=(), arrays=()):
        """In-place assignment, the door of all that overwrites; bumps the version."""
        value = as_tensor(value)
        if Modes.grad_enabled and (self.requires_grad or value.requires_grad):
            raise GraphError(
                f"{name} on a tensor of shape {self.shape} that requires gradients, or with such a "
                "value: wrap it in no_grad(), or use where()/scatter(), which make a new tensor"
            )
        if self.hidden or value.hidden:
            raise GraphError(f"{name} inside vmap: use where()/scatter(), which make a new tensor")
        if value.dtype in FLOATS and self.dtype not in FLOATS:
            raise TypeError(f"{name}: {value.dtype} values into a tensor of {self.dtype}")
        try:
            place = self.array[(*key, ...)]
            place[arrays or ...] = value.array
        except (ValueError, IndexError) as error:
            raise ShapeError(f"{name}: shapes {self.shape} and {value.shape}: {error}") from None
        self.bump(name)
        return self

    def bump(self, name):
        """Note that `name` changed the memory in place."""
        self.version[0] += 1
        self.version[1] = name

    def copy_(self, other):
        """Overwrite every element with those of `other`, broadcast."""
        return self.write_("copy_", other)

    def fill_(self, value):
        """Overwrite every element with one number."""
        return self.write_("fill_", value)

    def zero_(self):
        """Overwrite every element with 0."""
        return self.write_("zero_", 0)

    def update_(self, name, op, other):
        """x ← op(x, other) in x's own memory: what `add_`, `sub_`, … and `+=`, `-=`, … do.

        With the tape on, a result that needs gradients is recorded as `x = op(x, other)` would be.
        Refused then, with GraphError: a leaf that requires gradients (as in torch), and a tensor
        whose memory another one can see (a view: torch would rewrite the view's history as well).
        """
        other = as_tensor(other, self)
        recorded = Modes.grad_enabled and (self.requires_grad or other.requires_grad)
        if self.hidden or other.hidden:
            raise GraphError(f"{name} inside vmap: write x = x + y, which makes a new tensor")
        if recorded:
            self.check_own(name)
        before = self.remembered() if recorded else self
        result = op(before, before if other is self else other)
        if KIND[result.dtype.kind] > KIND[self.dtype.kind]:
            raise TypeError(f"{name}: a result of {result.dtype} into a tensor of {self.dtype}")
        if result.shape != self.shape:
            raise ShapeError(f"{name}: shapes {self.shape} and {other.shape}: the result is larger")
        result = cast(result, self.dtype)
        try:
            self.array[...] = result.array
        except ValueError as error:  # an expanded view: one place in memory for many elements
            raise ShapeError(f"{name}: shape {self.shape}: {error}") from None
        self.bump(name)
        if recorded:
            self.requires_grad, self.node = True, result.node
        return self

    def check_own(self, name):
        """Complain if a recorded in-place step would go wrong here."""
        if self.requires_grad and self.node is None:
            raise GraphError(
                f"{name} on a leaf of shape {self.shape} that requires gradients: wrap an update "
                "in no_grad(), or write x = x + y, which makes a new tensor"
            )
        if self.shares_memory():
            raise GraphError(
                f"{name} on a tensor of shape {self.shape} that requires gradients and whose "
                "memory another tensor sees (a view): write x = x + y, or change a clone()"
            )

    def shares_memory(self):
        """Whether another living tensor is a view of this one, or this one of it.

        All of them hold one version cell, so its reference count says how many they are.
        """
        return sys.getrefcount(self.version) > sys.getrefcount(LONE.version)

    def remembered(self):
        """This tensor as it is now: its value copied, its history kept."""
        out = _new(self.array.copy())
        out.requires_grad, out.node = self.requires_grad, self.node
        return out

    def __setitem__(self, key, value):
        """x[key] = value, with the keys of `x[key]`; refused where it would have to be recorded."""
        plain, arrays = split_key(key, self.shape)
        self.write_("x[...] = ", value, plain, arrays)

    def __len__(self):
        if self.ndim == 0:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __bool__(self):
        return bool(self.item())

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __repr__(self):
        body = np.array2string(self.array, precision=4, separator=", ", prefix="Tensor(")
        kind = "" if self.dtype == np.float32 else f", dtype={self.dtype}"
        how = f", op={self.node.op.name}" if self.node else ", requires_grad=True"
        return f"Tensor({body}{kind}{how if self.requires_grad else ''})"


def _new(data):
    """A Tensor around an array, without copy or checks: the way out of every operation."""
    t = object.__new__(Tensor)
    t.array = data if type(data) is np.ndarray else np.asarray(data)
    t.requires_grad, t.hidden = False, 0
    t.grad = t.node = None
    t.version = [0, ""]
    return t


LONE = _new(np.zeros(()))  # a tensor that shares its memory with nobody, for comparison


def split_key(key, shape):
    """An index as torch reads it, in two steps: (integers, slices and None; then the arrays).

    The first part makes a view, the second picks from it. numpy alone would move the axes of
    x[0, :, [1, 2]] to the front, because it takes an integer beside an array for an array.
    Raises ShapeError for too many indices, IndexError for what is no index.
    """
    parts = [_plain_index(k) for k in (key if isinstance(key, tuple) else (key,))]
    used = sum(_axes_used(k) for k in parts)
    spots = [i for i, k in enumerate(parts) if k is ...]
    if used > len(shape) or len(spots) > 1:
        raise ShapeError(f"index: {used} indices for a tensor with {len(shape)} axes: {shape}")
    spot = spots[0] if spots else len(parts)
    parts[spot : spot + 1] = [slice(None)] * (len(shape) - used)
    plain, arrays = [], []
    for k in parts:
        if isinstance(k, np.ndarray):
            plain += [slice(None)] * _axes_used(k) or [None]
            arrays.append(k if k.ndim else np.flatnonzero(k))
        else:
            plain.append(k)
            arrays += [] if isinstance(k, int) else [slice(None)]
    while arrays and isinstance(arrays[-1], slice):  # what follows is whole anyway
        arrays.pop()
    return tuple(plain), tuple(arrays)


def _plain_index(k):
    """One part of an index: an integer, a slice, None, … or an array of integers or booleans."""
    if isinstance(k, Tensor):
        if k.hidden:
            raise GraphError(
                "inside vmap, a mapped index must be the only one, of integers: gather()"
            )
        k = k.array
    if k is None or k is ... or isinstance(k, slice):
        return k
    if isinstance(k, list) and any(isinstance(v, (list, tuple)) for v in k):
        raise IndexError("index: a list of lists is ambiguous: write x[rows, columns], or a Tensor")
    found = np.asarray(k, np.int64 if isinstance(k, (list, range)) and not len(k) else None)
    if found.dtype.kind not in "iub":
        raise IndexError(f"index: {found.dtype} is no index; integers, booleans, slices, None are")
    return int(found) if not found.ndim and found.dtype.kind != "b" else found


def _axes_used(k):
    """How many axes of the tensor a part of an index takes up."""
    if k is None or k is ...:
        return 0
    return k.ndim if isinstance(k, np.ndarray) and k.dtype.kind == "b" else 1


def as_tensor(x, like=None):
    """x as a Tensor. A Python number takes the dtype of `like`, unless that cannot hold it."""
    if isinstance(x, Tensor):
        return x
    if like is not None and isinstance(x, (int, float)):
        own, kind = (np.int64 if isinstance(x, int) else np.float32), like.array.dtype.kind
        fits = kind == "f" or isinstance(x, bool) or (kind == "i" and own is np.int64)
        return _new(np.array(x, dtype=like.dtype if fits else own))
    return Tensor(x)


def match_dtypes(args):
    """The arguments as Tensors of one dtype, by torch's rule.

    The widest kind decides, bool < integer < float. Within that kind a tensor with axes goes before
    one without (0-d float64 · float32 is float32), and of those the wider float counts.
    """
    if len(args) == 1:
        return (as_tensor(args[0]),)
    if len(args) == 2:  # the usual case, without the loops below
        x, y = args
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.array.dtype is y.array.dtype:
            return args
    like = next((a for a in args if isinstance(a, Tensor)), None)
    tensors = tuple(a if isinstance(a, Tensor) else as_tensor(a, like) for a in args)
    first = tensors[0].array.dtype
    if all(t.array.dtype is first for t in tensors):
        return tensors
    top = max(KIND[t.dtype.kind] for t in tensors)
    decisive = [t for t in tensors if KIND[t.dtype.kind] == top]
    decisive = [t for t in decisive if t.ndim] or decisive
    common = max((t.dtype for t in decisive), key=lambda dtype: dtype.itemsize)
    return tuple(cast(t, common) for t in tensors)


def cast(x, dtype):
    """x in another dtype; a gradient comes back in x's own."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtype not in DTYPES:
        raise TypeError(f"dtype {dtype} is none of float32, float64, int64, bool")
    return (_cast if dtype in FLOATS else _to_integer)(x, dtype, x.dtype)


class Node:
    """One recorded operation.

    edges: per input, the input's node, or the input itself if a leaf, or None if constant.
    saved: (index, tensor, version) of the inputs that the rules name; None once freed.
    """

    __slots__ = ("edges", "hiddens", "op", "out", "params", "saved", "seq", "shapes", "where")
    counter = itertools.count()

    def __init__(self, op, tensors, params, out):
        self.op, self.params, self.seq = op, params, next(Node.counter)
        self.edges = [(t.node or t) if t.requires_grad else None for t in tensors]
        self.shapes = [t.array.shape for t in tensors]
        self.hiddens = [t.hidden for t in tensors] if Modes.vmap_sizes else None
        wanted = tuple([i for i, e in enumerate(self.edges) if e is not None])
        inputs, keep_out = op.keeps(wanted)
        self.saved = [(i, tensors[i], tensors[i].version[0]) for i in inputs]
        self.out = (out.array, out.version, out.version[0], out.hidden) if keep_out else None
        self.where = caller_line() if Modes.anomaly else ""

    def values(self):
        """Name → value for everything a rule may ask for; checks that nothing has changed."""
        op = self.op
        if self.saved is None:
            raise GraphError(
                f"backward through `{op.name}` a second time: its saved tensors were freed by the "
                "first; pass retain_graph=True there"
            )
        values = dict(zip(op.arguments[op.n_tensors :], self.params, strict=not op.variadic))
        for i, tensor, version in self.saved:
            if tensor.version[0] != version:
                self.complain(f"input {i} ({op.arguments[i]})", tensor.shape, tensor.version)
            values[op.arguments[i]] = tensor
        if self.out is not None:
            data, cell, version, hidden = self.out
            if cell[0] != version:
                self.complain("the result", data.shape[hidden:], cell)
            values["out"] = out = _new(data)  # not held as a Tensor: node ⇄ tensor is a cycle
            out.requires_grad, out.node, out.version, out.hidden = True, self, cell, hidden
        return values

    def complain(self, what, shape, cell):
        raise GraphError(
            f"`{cell[1].strip()}` changed in place {what}, shape {shape}, that `{self.op.name}` "
            f"saved for its backward{self.where}: change a clone(), or after the backward"
        )

    def pull(self, g, wanted):
        """Yield (edge, gradient) for each input whose edge is in `wanted` (None: all)."""
        values = self.values()
        values["g"] = g
        for i, edge in enumerate(self.edges):
            if edge is None or (wanted is not None and edge not in wanted):
                continue
            rule, names = self.op.rule(i)
            shape, hidden = self.shapes[i], self.hiddens[i] if self.hiddens else 0
            values["shape"], values["i"], values["node"] = shape[hidden:], i, self
            dx = rule(*[values[n] for n in names])
            yield edge, dx if dx.array.shape == shape else fit(dx, shape, hidden)

    def free(self):
        """Drop the saved arrays; a node that saved none may be walked again, as in torch."""
        if self.saved or self.out is not None:
            self.saved = self.out = None


def apply(op, tensors, params=()):
    """Run `op` and record it if any input requires gradients. Raises ShapeError."""
    arrays = [t.array for t in tensors]
    hidden = 0
    try:
        if Modes.special and (op.batch == "raw" or any(t.hidden for t in tensors)):
            data, hidden = Modes.batching.run(op, tensors, params)
        else:
            data = op.forward(*arrays, *params)
    except (ValueError, IndexError) as error:
        if isinstance(error, ShapeError):
            raise
        shapes = " and ".join(str(t.shape) for t in tensors)
        raise ShapeError(f"{op.name}: shapes {shapes}: {error}") from None
    out = _new(data)
    out.hidden = hidden
    if op.view:
        first, base = tensors[0], out.array.base
        if base is not None and (base is first.array or base is first.array.base):
            out.version = first.version  # the same memory: a write to one is a write to both
    if Modes.grad_enabled and op.differentiable:
        for t in tensors:
            if t.requires_grad:
                out.requires_grad = True
                out.node = Node(op, tensors, params, out)
                break
    if Modes.special:
        watch(op, tensors, out)
    return out


def watch(op, tensors, out):
    if Modes.meter:
        Modes.meter.record(op, [t.array for t in tensors], out.array)
    if Modes.anomaly and out.dtype in FLOATS and not np.isfinite(out.array).all():
        innocent = any(not np.isfinite(t.array).all() for t in tensors)  # it came in that way
        if not innocent:
            raise AnomalyError(born(op, tensors, out))


def born(op, tensors, out):
    """The message of an anomaly: what, how many, where, and in whose backward."""
    bad = out.array[~np.isfinite(out.array)]
    what = "NaN" if np.isnan(bad).any() else "infinity"
    shapes = ", ".join(str(t.shape) for t in tensors)
    node = Modes.backward_of
    inside = f" in the backward of `{node.op.name}`{node.where}" if node else caller_line()
    return f"`{op.name}` made {what} ({bad.size} of {out.array.size} values) from {shapes}{inside}"


def caller_line():
    """' at file:line' of the nearest caller outside the engine's own files."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename in OWN_FILES:
        frame = frame.f_back
    return f" at {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def run_backward(roots, gradients, targets, retain_graph=None, create_graph=False, beyond=True):
    """Push `gradients` of `roots` back; the gradient at every leaf, or at every edge in `targets`.

    beyond: go on behind a target, where another one may lie. Returns {edge: Tensor}; edges that
    the roots do not depend on are absent.
    """
    retain_graph = create_graph if retain_graph is None else retain_graph
    pending = {}
    for root, g in zip(roots, gradients, strict=True):
        _accumulate(pending, root.edge(), _seed(root, g))
    nodes = reachable([r.node for r in roots if r.node is not None], () if beyond else targets)
    wanted = None if targets is None else _ancestors_of(targets, nodes)
    sizes = Modes.vmap_sizes
    if not sizes and any(n.hiddens for n in nodes):
        sizes = (1,)  # only turns batching on
    found = {}
    with Modes.set(grad_enabled=create_graph, vmap_sizes=sizes, backward_of=None):
        for node in nodes:
            g = pending.pop(node, None)
            if g is None:
                continue
            if targets is not None and node in targets:
                found[node] = g
                if not beyond:
                    continue
            if wanted is None or any(e in wanted for e in node.edges if e is not None):
                _step(node, g, wanted, pending)
                if not retain_graph:
                    node.free()
    leaves = {e: g for e, g in pending.items() if isinstance(e, Tensor)}
    return found | {e: g for e, g in leaves.items() if targets is None or e in targets}


def _step(node, g, wanted, pending):
    """One node of the walk: its inputs' gradients are added to `pending`."""
    Modes.backward_of = node
    for edge, dx in node.pull(g, wanted):
        shared = dx.array is g.array or dx.array.base is not None
        if shared and isinstance(edge, Tensor) and edge not in pending:
            dx = clone(dx)  # a leaf's .grad may be changed in place: own memory
        _accumulate(pending, edge, dx)


def _accumulate(pending, edge, g):
    before = pending.get(edge)
    pending[edge] = g if before is None else add(before, g)


def _seed(root, g):
    """The gradient to start from, checked."""
    if not root.requires_grad:
        raise GraphError("backward from a tensor that does not require gradients: nothing recorded")
    if g is None:
        if root.array.size != 1 and root.numel() != 1:
            raise GraphError(
                f"backward without a gradient needs one element, the shape is {root.shape}"
            )
        return zeros_like(root, 1)
    g = cast(as_tensor(g), root.dtype)
    if g.hidden > root.hidden:
        raise GraphError("inside vmap, backward through a graph recorded outside: record it inside")
    if g.shape != root.shape:
        raise ShapeError(f"backward: gradient {g.shape} for a tensor of shape {root.shape}")
    return clone(g) if root.is_leaf else g  # a leaf's .grad must not be the caller's array


def reachable(nodes, stop=()):
    """Every node that `nodes` depend on, newest first. Does not look beyond `stop`."""
    seen, stack = set(nodes), list(nodes)
    while stack:
        node = stack.pop()
        if node in stop:
            continue
        for edge in node.edges:
            if isinstance(edge, Node) and edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return sorted(seen, key=lambda n: n.seq, reverse=True)


def _ancestors_of(targets, nodes):
    """The edges on some path to a target: all that a walk towards the targets has to visit."""
    wanted = set(targets)
    for node in reversed(nodes):
        if any(e in wanted for e in node.edges if e is not None):
            wanted.add(node)
    return wanted


def grads(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False):
    """∂(Σ outputs·grad_outputs)/∂input for each of `inputs`, leaves or not; `.grad` is untouched.

    Returns a list with a zero Tensor where an output does not depend on an input.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    if grad_outputs is None:
        grad_outputs = [None] * len(outputs)
    elif not isinstance(grad_outputs, (tuple, list)):
        grad_outputs = [grad_outputs]
    targets = {x.edge() for x in inputs}
    if any(x.hidden < len(Modes.vmap_sizes) for x in inputs):
        raise GraphError(
            "inside vmap, gradients with respect to a captured tensor: pass it as an argument of "
            "the mapped function with in_dims=None"
        )
    found = run_backward(outputs, grad_outputs, targets, retain_graph, create_graph)
    return [found[x.edge()] if x.edge() in found else zeros_like(x) for x in inputs]


def zeros_like(x, value=0):
    out = _new(np.full_like(x.array, value))
    out.hidden = x.hidden
    return out


# The operations that the walk itself needs; all others are in tensor.py.


@primitive(batch="elementwise", x=lambda g, source: cast(g, source))
def _cast(x, dtype, source):
    return x.astype(dtype)


@primitive(batch="elementwise", x=None)
def _to_integer(x, dtype, source):
    return x.astype(dtype)


@primitive(batch="elementwise", x=lambda g: g)
def clone(x):
    """A copy with its own memory and the same history."""
    return x.copy()


@primitive(batch="elementwise", flops=1, x=lambda g: g, y=lambda g: g)
def add(x, y):
    """x + y."""
    return x + y


@primitive(batch="trailing", flops=1, x=lambda g, shape: _expand(g, shape))
def _sum_keep(x, dims):
    return x.sum(axis=dims, keepdims=True)


@primitive(batch=lambda params, hidden: (hidden + params[0],), view=True, x=lambda g: g)
def _expand(x, shape):
    return np.broadcast_to(x, shape)


@primitive(
    batch=lambda params, hidden: (hidden + params[0],),
    view=True,
    x=lambda g, shape: _reshape(g, shape),
)
def _reshape(x, to):
    return x.reshape(to)


def expand(x, shape):
    """x broadcast to `shape`, without copying; −1 keeps an axis."""
    lead = len(shape) - x.ndim
    shape = tuple(x.shape[i - lead] if n == -1 and i >= lead else n for i, n in enumerate(shape))
    x = _reshape(x, (1,) * lead + x.shape) if lead > 0 else x
    return _expand(x, shape)


def sum_to(x, shape):
    """x summed over the axes along which `shape` would be broadcast to x's shape."""
    full = (1,) * (x.ndim - len(shape)) + shape
    dims = tuple(i - x.ndim for i, n in enumerate(full) if n == 1 and x.shape[i] != 1)
    x = _sum_keep(x, dims) if dims else x
    return x if full == shape else _reshape(x, shape)


def fit(g, shape, hidden):
    """A gradient summed to the shape of the input it belongs to: the adjoint of broadcasting."""
    if g.hidden:
        g = Modes.batching.sum_hidden(g, shape, hidden)
    return g if g.shape == shape[hidden:] else sum_to(g, shape[hidden:])
