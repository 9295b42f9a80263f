"""Every operation with its domain: what `--selfcheck` and the tests prove.

A case is an expression in torch's names, so that the same function runs on pikograd, on torch, and
under finite differences. Domains keep away from kinks, poles and ties, where a difference quotient
means nothing; the conventions there are tested apart.
"""

from dataclasses import dataclass

import numpy as np

DOMAINS = {
    "real": lambda rng, shape: rng.standard_normal(shape),
    "positive": lambda rng, shape: rng.uniform(0.3, 2.0, shape),
    "nonzero": lambda rng, shape: rng.uniform(0.2, 2.0, shape) * rng.choice([-1.0, 1.0], shape),
    # all pairs of elements at least 0.1 apart: no ties for maxima and sorting
    "distinct": lambda rng, shape: (rng.permutation(int(np.prod(shape))) * 0.2 - 1.13).reshape(
        shape
    ),
}


@dataclass(frozen=True)
class Case:
    """name; f(F, *tensors) with F holding the functions; one (domain, shape) per input."""

    name: str
    f: object
    inputs: tuple
    order: int = 2  # how often it can be differentiated usefully

    def arrays(self, seed=0):
        rng = np.random.default_rng(seed)
        return [DOMAINS[domain](rng, shape) for domain, shape in self.inputs]


def _case(name, f, *inputs, order=2):
    return Case(name, f, tuple(i if isinstance(i, tuple) else (i, (2, 3)) for i in inputs), order)


def _index(F, values):
    """An integer tensor of whichever library F stands for."""
    return F.tensor(np.array(values))


UNARY = {
    "neg": "real", "exp": "real", "log": "positive", "log1p": "positive", "sqrt": "positive",
    "sin": "real", "cos": "real", "tanh": "real", "sigmoid": "real", "softplus": "real",
    "relu": "nonzero", "abs": "nonzero", "square": "real", "silu": "real",
    "gelu": "real", "erf": "real",
}  # fmt: skip

BINARY = {"add": "real", "sub": "real", "mul": "real", "div": "nonzero"}

IMAGE, KERNEL = ("real", (2, 4, 5, 4)), ("real", (6, 2, 3, 2))

CASES = (
    *(_case(n, lambda F, x, _n=n: getattr(F, _n)(x), d) for n, d in UNARY.items()),
    *(_case(n, lambda F, x, y, _n=n: getattr(F, _n)(x, y), d, d) for n, d in BINARY.items()),
    _case("add broadcast", lambda F, x, y: x + y, ("real", (2, 1, 3)), ("real", (4, 1))),
    _case("mul broadcast", lambda F, x, y: x * y, ("real", (2, 1, 3)), ("real", (4, 1))),
    _case("sub scalar", lambda F, x: 2.0 - x, "real"),
    _case("div scalar", lambda F, x: 3.0 / x, "nonzero"),
    _case("div broadcast", lambda F, x, y: x / y, ("real", (3,)), ("nonzero", (2, 1))),
    _case("gelu tanh", lambda F, x: F.gelu_tanh(x), "real"),
    _case("leaky_relu", lambda F, x: F.leaky_relu(x, 0.2), "nonzero"),
    _case("remainder", lambda F, x, y: x % (y * 3), "positive", "positive"),
    _case("sign", lambda F, x: F.sign(x) * x + F.floor(x) * x, "nonzero"),
    _case("pow 2", lambda F, x: x**2, "real"),
    _case("pow 3", lambda F, x: x**3, "real"),
    _case("pow 0", lambda F, x: x**0, "real"),
    _case("pow -1.5", lambda F, x: x**-1.5, "positive"),
    _case("pow tensor", lambda F, x, y: x**y, "positive", "real"),
    _case("pow base", lambda F, y: 2.0**y, "real"),
    _case("maximum", lambda F, x: F.maximum(x[:2], x[2:]), ("distinct", (4, 3))),
    _case("minimum", lambda F, x: F.minimum(x[:2], x[2:]), ("distinct", (4, 3))),
    _case("clamp", lambda F, x: F.clamp(x, -0.5, 0.6), ("distinct", (3, 3))),
    _case("where", lambda F, x, y: F.where(x > 0, x * y, y), "nonzero", "real"),
    _case("masked_fill", lambda F, x: (x * x).masked_fill(x > 0, 2.0), "nonzero"),
    _case("cast", lambda F, x: (x * x).to(F.float64), "real"),
    _case("sum", lambda F, x: F.sum(x * x), "real"),
    _case("sum dim", lambda F, x: F.sum(x * x, dim=(0, -1)), ("real", (2, 3, 2))),
    _case("sum keepdim", lambda F, x: F.sum(x * x, dim=1, keepdim=True), "real"),
    _case("mean", lambda F, x: F.mean(x * x, dim=-1), "real"),
    _case("var", lambda F, x: F.var(x, dim=1), "real"),
    _case("var biased", lambda F, x: F.var(x, dim=(0, 1), correction=0, keepdim=True), "real"),
    _case("std", lambda F, x: F.std(x, dim=0), ("real", (4, 2))),
    _case("amax", lambda F, x: F.amax(x * 2, dim=(0, 2)), ("distinct", (2, 3, 2))),
    _case("amin", lambda F, x: F.amin(x * 2, dim=1, keepdim=True), ("distinct", (2, 3))),
    _case("max", lambda F, x: F.max(x * x), ("distinct", (2, 3))),
    _case("max dim", lambda F, x: F.max(x * 3, dim=1)[0], ("distinct", (2, 3))),
    _case("min dim", lambda F, x: F.min(x * 3, dim=0, keepdim=True)[0], ("distinct", (2, 3))),
    _case("logsumexp", lambda F, x: F.logsumexp(x, dim=1), "real"),
    _case("logsumexp all", lambda F, x: F.logsumexp(x, dim=(0, 1), keepdim=True), "real"),
    _case("prod", lambda F, x: F.prod(x), ("nonzero", (5,))),
    _case("prod dim", lambda F, x: F.prod(x, dim=1), ("nonzero", (2, 5))),
    _case("norm", lambda F, x: F.norm(x), "real"),
    _case("norm 3", lambda F, x: F.norm(x, p=3, dim=1, keepdim=True), "nonzero"),
    _case("norm inf", lambda F, x: F.norm(x, p=float("inf"), dim=0), ("distinct", (3, 2))),
    _case("softmax", lambda F, x: F.softmax(x, dim=0), "real"),
    _case("masked_softmax", lambda F, x: F.softmax(x.masked_fill(x > 1, float("-inf")), dim=-1),
          ("distinct", (3, 4))),
    _case("log_softmax", lambda F, x: F.log_softmax(x, dim=-1), "real"),
    _case("cross_entropy", lambda F, x: F.cross_entropy(x, _index(F, [2, 0])), "real"),
    _case("layer_norm", lambda F, x: F.layer_norm(x, (3, 2), eps=1e-2), ("real", (2, 3, 2))),
    _case("cumsum", lambda F, x: F.cumsum(x * x, dim=1), "real"),
    _case("matmul", lambda F, x, y: x @ y, "real", ("real", (3, 4))),
    _case("matmul batch", lambda F, x, y: x @ y, ("real", (2, 2, 3)), ("real", (2, 3, 2))),
    _case("matmul spread", lambda F, x, y: x @ y, ("real", (2, 1, 2, 3)), ("real", (3, 3, 2))),
    _case("matmul 3d 2d", lambda F, x, y: x @ y, ("real", (2, 2, 3)), ("real", (3, 2))),
    _case("matmul dot", lambda F, x, y: x @ y, ("real", (3,)), ("real", (3,))),
    _case("matmul vector", lambda F, x, y: x @ y, ("real", (2, 4, 3)), ("real", (3,))),
    _case("matmul row", lambda F, x, y: x @ y, ("real", (3,)), ("real", (2, 3, 4))),
    _case("linear", lambda F, x, w, b: F.linear(x, w, b),
          ("real", (2, 2, 3)), ("real", (4, 3)), ("real", (4,))),
    _case("linear no bias", lambda F, x, w: F.linear(x, w), "real", ("real", (4, 3))),
    _case("einsum", lambda F, x, y: F.einsum("bik,bjk->bij", x, y),
          ("real", (2, 3, 2)), ("real", (2, 4, 2))),
    _case("einsum three", lambda F, x, y, z: F.einsum("ij,jk,kl->li", x, y, z),
          ("real", (2, 3)), ("real", (3, 2)), ("real", (2, 4))),
    _case("einsum sum", lambda F, x, y: F.einsum("ia,jb->bi", x, y), "real", ("real", (4, 2))),
    _case("einsum implicit", lambda F, x: F.einsum("ba", x * x), "real"),
    _case("reshape", lambda F, x: (x * x).reshape(3, -1), "real"),
    _case("permute", lambda F, x: (x * x).permute(2, 0, 1), ("real", (2, 3, 4))),
    _case("transpose", lambda F, x: (x * x).transpose(0, -1), ("real", (2, 3, 4))),
    _case("expand", lambda F, x: (x * x).expand(4, -1, 3), ("real", (2, 1))),
    _case("squeeze", lambda F, x: (x * x).squeeze(1).unsqueeze(0), ("real", (2, 1, 3))),
    _case("flatten", lambda F, x: (x * x).flatten(1), ("real", (2, 3, 2))),
    _case("cat", lambda F, x, y: F.cat([x * x, y, x], dim=1), "real", ("real", (2, 1))),
    _case("stack", lambda F, x, y: F.stack([x * x, y], dim=1), "real", "real"),
    _case("split", lambda F, x: F.split(x * x, 2, dim=1)[1] * 2, ("real", (2, 5))),
    _case("chunk", lambda F, x: F.chunk(x * x, 2, dim=1)[1], ("real", (2, 5))),
    _case("pad", lambda F, x: F.pad(x * x, (1, 2, 0, 1), value=3.0), "real"),
    _case("flip", lambda F, x: (x * x).flip(0, 1), "real"),
    _case("contiguous", lambda F, x: (x * x).mT.contiguous().view(6), "real"),
    _case("tril", lambda F, x: F.tril(x * x, -1) + F.triu(x, 1), ("real", (3, 3))),
    _case("slice", lambda F, x: (x * x)[1:, ..., 0::2], ("real", (3, 2, 4))),
    _case("integer", lambda F, x: (x * x)[1, None, 0], ("real", (3, 2, 4))),
    _case("rows", lambda F, x: (x * x)[_index(F, [[2, 0], [2, 2]])], ("real", (3, 2))),
    _case("pairs", lambda F, x: (x * x)[_index(F, [0, 2, 0]), _index(F, [1, 1, 1])],
          ("real", (3, 2))),
    _case("integer, slice, array", lambda F, x: (x * x)[1, :, _index(F, [0, 3, 0])],
          ("real", (2, 3, 4))),
    _case("mask", lambda F, x: (x * x)[x > 0], "nonzero"),
    _case("gather", lambda F, x: F.gather(x * x, 1, _index(F, [[2, 2], [0, 1]])), "real"),
    _case("scatter", lambda F, x, y: F.scatter(x * x, 1, _index(F, [[2, 0], [0, 1]]), y),
          "real", ("real", (2, 2))),
    _case("scatter_add", lambda F, x, y: F.scatter_add(x * x, 0, _index(F, [[1, 1, 1]]), y * y),
          "real", ("real", (1, 3))),
    _case("sort", lambda F, x: F.sort(x * 2, dim=1)[0], ("distinct", (2, 3))),
    _case("sort down", lambda F, x: F.sort(x * x, dim=0, descending=True)[0], ("distinct", (3, 2))),
    _case("topk", lambda F, x: F.topk(x * 2, 2, dim=1)[0], ("distinct", (2, 4))),
    _case("conv1d", lambda F, x, w, b: F.conv1d(x, w, b, stride=2, padding=1),
          ("real", (2, 2, 6)), ("real", (3, 2, 3)), ("real", (3,))),
    _case("conv2d", lambda F, x, w: F.conv2d(x, w, stride=(1, 2), padding=(0, 1), groups=2),
          IMAGE, KERNEL),
    _case("conv2d bias", lambda F, x, w, b: F.conv2d(x, w, b),
          ("real", (2, 2, 4, 4)), ("real", (3, 2, 2, 2)), ("real", (3,))),
    _case("conv_transpose2d", lambda F, x, w, b: F.conv_transpose2d(x, w, b, (2, 3), (1, 0),
                                                                   (1, 0), 2),
          ("real", (2, 4, 3, 2)), ("real", (4, 3, 2, 3)), ("real", (6,))),
    _case("max_pool1d", lambda F, x: F.max_pool1d(x * 2, 3, 2), ("distinct", (2, 2, 7))),
    _case("max_pool2d", lambda F, x: F.max_pool2d(x * 2, 2), ("distinct", (2, 2, 4, 5))),
    _case("max_pool2d overlap", lambda F, x: F.max_pool2d(x * 2, 3, 1), ("distinct", (1, 2, 4, 5))),
    _case("max_pool2d padding", lambda F, x: F.max_pool2d(x * 2, 3, 2, 1),
          ("distinct", (1, 2, 4, 5))),
    _case("avg_pool2d padding", lambda F, x: F.avg_pool2d(x * x, 3, 2, (1, 0)),
          ("real", (1, 2, 4, 5))),
    _case("adaptive_avg_pool2d", lambda F, x: F.adaptive_avg_pool2d(x * x, (3, 2)),
          ("real", (1, 2, 4, 5))),
    _case("avg_pool1d", lambda F, x: F.avg_pool1d(x * x, 2), ("real", (2, 2, 5))),
    _case("avg_pool2d", lambda F, x: F.avg_pool2d(x * x, (2, 3), (1, 2)), ("real", (1, 2, 3, 5))),
)  # fmt: skip


def pikograd_functions():
    """The namespace F of pikograd for the cases."""
    from types import SimpleNamespace

    import nn
    import tensor

    names = {**vars(tensor), "tensor": tensor.Tensor}
    names |= {"cross_entropy": nn.cross_entropy, "layer_norm": nn.layer_norm, "float64": np.float64}
    return SimpleNamespace(**names)
