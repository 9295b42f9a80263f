"""`vmap`: write a function for one example, run it for a whole batch at once.

The batch axis is hidden from the function: a Tensor says how many axes in front are `hidden`, and
its `shape` leaves them out, so the function sees one example's shapes while numpy works on all
examples. An operation says with `batch` how it can be run on arrays with hidden axes in front; one
that says nothing is run once per example. Frostig et al. 2018 (JAX) call this a batching transform.

Left out: vmap over a graph recorded outside it, different random numbers per example.
"""

from types import SimpleNamespace

import numpy as np

import tensor as pg
from engine import Modes, ShapeError, as_tensor, primitive


def run(op, tensors, params):
    """Run `op` on tensors with hidden axes: one call for all examples where it can.

    Returns (array, number of hidden axes). Hidden axes come first; a tensor that lacks the inner
    ones gets them with size 1.
    """
    if op.batch == "raw":
        return op.forward(*[t.array for t in tensors], *params), params[-1]
    depth = max(t.hidden for t in tensors)
    rank = max(t.ndim for t in tensors)
    arrays = [_align(t, depth, rank if op.batch == "elementwise" else t.ndim) for t in tensors]
    if op.batch == "elementwise":
        return op.forward(*arrays, *params), depth
    hidden = np.broadcast_shapes(*[a.shape[:depth] for a in arrays])
    arrays = [np.broadcast_to(a, hidden + a.shape[depth:]) for a in arrays]
    if op.batch:
        params = op.batch(params, hidden) if callable(op.batch) else params
        return op.forward(*arrays, *params), depth
    each = [op.forward(*[a[i] for a in arrays], *params) for i in np.ndindex(*hidden)]
    return np.reshape(np.stack(each), hidden + np.shape(each[0])), depth


def _align(t, depth, rank):
    ones = (1,) * (depth - t.hidden), (1,) * (rank - t.ndim)
    return t.array.reshape(t.array.shape[: t.hidden] + ones[0] + ones[1] + t.shape)


def sum_hidden(g, shape, hidden):
    """A gradient summed over the hidden axes that its input (`shape`, with `hidden`) lacks."""
    common = min(hidden, g.hidden)
    return _sum_hidden(g, shape[:common], g.hidden - common, common)


@primitive(batch="raw", flops=1, x=lambda g: g)
def _sum_hidden(x, shape, extra, hidden):
    """Sum over `extra` hidden axes after the first `hidden`, and where `shape` has 1."""
    ones = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=ones, keepdims=True).sum(axis=tuple(range(hidden, hidden + extra)))


@primitive(
    batch="raw",
    view=True,
    x=lambda g, dim, sizes: _leave(g, dim, sizes, g.hidden, len(sizes) - 1),
)
def _enter(x, dim, hidden, sizes, level):
    """Hide axis dim: it becomes hidden axis number `level`, in front; those before get their size,
    so that a derivative by x has its own value for every example of every level."""
    x = x.reshape(x.shape[:hidden] + (1,) * (level - 1 - hidden) + x.shape[hidden:])
    x = np.moveaxis(x, dim, level - 1)
    return np.broadcast_to(x, sizes + x.shape[level:])


@primitive(
    batch="raw",
    view=True,
    x=lambda g, dim, outside, sizes: _enter(g, dim, g.hidden, sizes, outside + 1),
)
def _leave(x, dim, sizes, hidden, outside):
    """Show hidden axis number `outside` + 1 again at dim; a tensor that lacks some is repeated."""
    x = x.reshape(x.shape[:hidden] + (1,) * (outside + 1 - hidden) + x.shape[hidden:])
    return np.moveaxis(np.broadcast_to(x, sizes + x.shape[outside + 1 :]), outside, dim)


def vmap(f, in_dims=0, out_dims=0):
    """f for one example becomes f for a batch: the batch axis is hidden from f and put back after.

    in_dims: the axis of each argument that counts the examples; None: the same for all.
    out_dims: where the axis appears in the result(s). Operations without a batched rule run once
    per example. Nests with itself and with grad: vmap(grad(loss), (None, 0))(w, x) has a gradient
    per example.
    """

    def mapped(*args):
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
        args = [as_tensor(a) for a in args]
        sizes = {a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None}
        if len(sizes) != 1:
            raise ShapeError(f"vmap: the mapped axes have sizes {sorted(sizes)}, in_dims={in_dims}")
        (size,) = sizes
        with Modes.set(vmap_sizes=(*Modes.vmap_sizes, size)):
            out = f(*[_hide(a, d) for a, d in zip(args, dims, strict=True)])
            return (
                tuple(_show(o, out_dims) for o in out)
                if isinstance(out, (tuple, list))
                else (_show(out, out_dims))
            )

    return mapped


def _hide(x, dim):
    sizes = Modes.vmap_sizes
    if dim is None:
        x, dim = pg.expand(pg.unsqueeze(x, 0), (sizes[-1], *x.shape)), 0
    return _enter(x, pg.axis(x, dim), x.hidden, sizes, len(sizes))


def _show(x, dim):
    x, sizes = as_tensor(x), Modes.vmap_sizes
    return _leave(x, dim % (x.ndim + 1) - x.ndim - 1, sizes, x.hidden, len(sizes) - 1)


Modes.batching = SimpleNamespace(run=run, sum_hidden=sum_hidden)  # now the engine knows how
