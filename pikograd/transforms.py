"""Functions of functions: grad, vjp, jvp, hvp, jacobian, hessian, checkpoint, gradcheck.

All are a few lines over the tape, because the walk back is made of tensor operations and can be
recorded itself. Calling conventions are `torch.func`'s. They nest: hessian(f) is jacobian(grad(f)).
`vmap` stands in batching.py and can be imported from here as well.

    vjp   u ↦ uᵀ·J, what one walk back computes: J holds ∂f_i/∂x_j, u is what comes in at the end
    jvp   v ↦ J·v, how f moves when x moves along v
"""

from contextlib import contextmanager

import numpy as np

import tensor as pg
from batching import vmap  # noqa: F401  (it belongs to the same family)
from engine import (
    FLOATS,
    GraphError,
    Modes,
    Node,
    ShapeError,
    Tensor,
    _new,
    _reshape,
    as_tensor,
    enable_grad,
    grads,
    no_grad,
    primitive,
    reachable,
    run_backward,
    zeros_like,
)


class GradcheckError(AssertionError):
    """The derivative rules and finite differences disagree."""


def _fresh(x):
    """x under a new name, so that a derivative by it sees only the uses inside one function."""
    x = as_tensor(x)
    if x.requires_grad:
        return _reshape(x, x.shape)
    out = x.detach()
    return out.requires_grad_()


def _settle(result, fresh):
    """The result without its tape, if that leads nowhere but to our own fresh inputs."""
    if result.node is None:
        return result.detach() if any(result is x for x in fresh) else result
    nodes = reachable([result.node])
    leaves = {e for n in nodes for e in n.edges if isinstance(e, Tensor)}
    return result.detach() if leaves <= set(fresh) else result


def _freshened(args, argnums):
    picks = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    args = list(args)
    for i in picks:
        args[i] = _fresh(args[i])
    return args, [args[i] for i in picks]


def value_and_grad(f, argnums=0):
    """f(…) → number becomes (…) → (f(…), ∂f/∂argument); argnums a tuple gives a tuple."""

    def both(*args):
        create_graph = Modes.grad_enabled
        with enable_grad():
            args, inputs = _freshened(args, argnums)
            out = f(*args)
            if out.numel() != 1:
                raise ShapeError(f"grad: the function must return one number, not {out.shape}")
            found = grads(out, inputs, create_graph=create_graph) if out.requires_grad else None
        found = [zeros_like(x) for x in inputs] if found is None else found
        found = tuple(_settle(g, inputs) for g in found)
        return _settle(out, inputs), found[0] if isinstance(argnums, int) else found

    return both


def grad(f, argnums=0):
    """f(…) → number becomes (…) → ∂f/∂argument."""
    both = value_and_grad(f, argnums)
    return lambda *args: both(*args)[1]


def vjp(f, *primals):
    """(f(x…), u ↦ (uᵀ·∂f/∂x, …)): the reverse-mode product."""
    with enable_grad():
        inputs = [_fresh(x) for x in primals]
        out = f(*inputs)

    def pullback(u):
        if not out.requires_grad:
            return tuple(zeros_like(x) for x in inputs)
        found = grads(out, inputs, u, retain_graph=True, create_graph=Modes.grad_enabled)
        return tuple(_settle(g, inputs) for g in found)

    return _settle(out, inputs), pullback


def jvp(f, primals, tangents):
    """(f(x…), Σ ∂f/∂x·v): the forward-mode product, by reverse mode twice.

    u ↦ uᵀJ is linear in u, so its own derivative in the direction v is J·v, whatever u is
    (Townsend, "A new trick for calculating Jacobian vector products", 2017).
    """
    if [np.shape(x) for x in primals] != [np.shape(v) for v in tangents]:
        raise ShapeError(
            f"jvp: primals {[np.shape(x) for x in primals]}, "
            f"tangents {[np.shape(v) for v in tangents]}"
        )
    with enable_grad():
        inputs = [_fresh(x) for x in primals]
        out = f(*inputs)
        u = zeros_like(out).requires_grad_()
        found = grads(out, inputs, u, create_graph=True) if out.requires_grad else inputs[:0]
        pairs = [(g, v) for g, v in zip(found, tangents, strict=False) if g.requires_grad]
        left, right = [g for g, _ in pairs], [as_tensor(v) for _, v in pairs]
        product = grads(left, [u], right, create_graph=True)[0] if pairs else zeros_like(out)
    return _settle(out, inputs), _settle(product, [*inputs, u])


def hvp(f, x, v):
    """H·v with H = ∂²f/∂x², f: x → number, without ever holding H: vᵀ·∂(∂f/∂x)/∂x."""
    return vjp(grad(f), x)[1](v)[0]


def jacobian(f, argnums=0):
    """(…) → ∂f/∂argument, of shape f(x).shape + x.shape: one walk back per element of f(x)."""

    def matrix(*args):
        create_graph = Modes.grad_enabled
        with enable_grad():
            args, (x,) = _freshened(args, argnums)
            out = f(*args)
            if not (out.requires_grad and out.numel()):
                return pg.zeros(out.shape + x.shape, dtype=x.dtype)
            rows = []
            for one in np.eye(out.numel(), dtype=out.dtype):
                u = _new(one.reshape(out.shape))
                rows += grads(out, [x], u, retain_graph=True, create_graph=create_graph)
            result = pg.reshape(pg.stack(rows), out.shape + x.shape)
        return _settle(result, [x])

    return matrix


def hessian(f, argnums=0):
    """(…) → ∂²f/∂x², of shape x.shape + x.shape."""
    return jacobian(grad(f, argnums), argnums)


# ── Recomputation ─────────────────────────────────────────────────────────────────────────────────


class Segment(Node):
    """A function call on the tape that keeps its arguments instead of its steps."""

    __slots__ = ("args", "f", "state", "versions")

    def __init__(self, f, args, state, edges):
        self.f, self.state, self.edges, self.seq = f, state, edges, next(Node.counter)
        self.args = args
        watched = [x for x in (*args, *edges) if isinstance(x, Tensor)]
        self.versions = [(x, x.version[0]) for x in watched]
        self.op, self.saved, self.out, self.hiddens, self.shapes = _segment, (), None, None, ()
        self.where = ""

    def pull(self, g, wanted):
        """Run the function again, recording, and walk back through that as far as our edges."""
        if self.f is None:
            raise GraphError("backward through a checkpoint a second time: pass retain_graph=True")
        for x, version in self.versions:
            if x.version[0] != version:
                self.complain("an argument or a weight", x.shape, x.version)
        with _rewound(self.state), Modes.set(recomputing=True, grad_enabled=True):
            out = self.f(*self.args)
        targets = {e for e in self.edges if wanted is None or e in wanted}
        create_graph = Modes.grad_enabled
        return run_backward([out], [g], targets, None, create_graph, beyond=False).items()

    def free(self):
        self.f = self.args = self.versions = None


@primitive(x=lambda g: g)
def _segment(x):
    """Only lends its name to Segment nodes."""
    return x


@contextmanager
def _rewound(state):
    generator = pg.random.bit_generator
    now = generator.state
    generator.state = state
    try:
        yield
    finally:
        generator.state = now


def checkpoint(f, *args):
    """f(*args), keeping only the arguments and computing the steps again in the backward.

    Memory against time: a chain of n segments holds n + 1 activations and one segment's steps, for
    one more forward (Griewank & Walther 2008, ch. 12). Tensors that f captures, such as weights,
    get their gradients too. f returns one Tensor and must do the same when run again; random
    numbers are rewound.
    """
    state, start = pg.random.bit_generator.state, next(Node.counter)
    out = f(*args)
    if out.node is None or out.node.seq < start:
        return out
    inside = [n for n in reachable([out.node]) if n.seq > start]
    edges = {e for n in inside for e in n.edges if e is not None}
    edges = [e for e in edges if isinstance(e, Tensor) or e.seq < start]
    result = out.detach()
    result.requires_grad, result.node = True, Segment(f, args, state, edges)
    return result


# ── Checking derivatives ──────────────────────────────────────────────────────────────────────────


def gradcheck(f, inputs, eps=1e-6, atol=1e-7, rtol=1e-6):
    """Compare the rules with central differences, (f(x + ε) − f(x − ε))/2ε, element by element.

    inputs: tensors; those that require gradients are checked and must be float64, since the
    difference has an error near ε² + 10⁻¹⁶/ε. Returns True or raises GradcheckError.
    """
    inputs = [as_tensor(x) for x in inputs]
    checked = [i for i, x in enumerate(inputs) if x.requires_grad]
    for i in checked:
        if inputs[i].dtype != FLOATS[1]:
            raise TypeError(f"gradcheck: input {i} is {inputs[i].dtype}, it needs float64")
    for i in checked:
        rules = jacobian(lambda *a: pg.reshape(f(*a), (-1,)), i)(*inputs).array
        numeric = np.moveaxis(_differences(f, inputs, i, eps), 0, -1).reshape(rules.shape)
        wrong = np.abs(rules - numeric) > atol + rtol * np.abs(numeric)
        if wrong.any() or not np.isfinite(rules).all():
            at = tuple(int(k) for k in np.argwhere(wrong | ~np.isfinite(rules))[0])
            raise GradcheckError(
                f"input {i}, ∂f[{at[0]}]/∂x{list(at[1:])}: the rule says {rules[at]:.9g}, "
                f"the difference {numeric[at]:.9g}"
            )
    return True


def _differences(f, inputs, i, eps):
    """∂f/∂inputs[i] by central differences, (elements of the input, elements of the output)."""
    base, rows = inputs[i].array, []
    with no_grad():
        for k in range(base.size):
            ends = []
            for step in (eps, -eps):
                moved = base.copy()
                moved.reshape(-1)[k] += step
                args = [Tensor(moved) if j == i else x for j, x in enumerate(inputs)]
                ends.append(f(*args).array.reshape(-1))
            rows.append((ends[0] - ends[1]) / (2 * eps))
    return np.stack(rows)


def gradgradcheck(f, inputs, eps=1e-6, atol=1e-6, rtol=1e-5):
    """gradcheck of the gradient itself: of (x, u) ↦ uᵀ·∂f/∂x for a fixed random u."""
    inputs = [as_tensor(x) for x in inputs]
    checked = [i for i, x in enumerate(inputs) if x.requires_grad]
    out = f(*inputs)
    u = Tensor(np.random.default_rng(0).standard_normal(out.shape), requires_grad=True)

    def first(*args):
        *args, u = args
        with enable_grad():
            fresh = [_fresh(a) if i in checked else a for i, a in enumerate(args)]
            found = grads(f(*fresh), [fresh[i] for i in checked], u, create_graph=True)
        return pg.cat([pg.reshape(g, (-1,)) for g in found])

    return gradcheck(first, [*inputs, u], eps, atol, rtol)
