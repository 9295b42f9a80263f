"""`--bench`: pikograd beside torch eager and beside micrograd's algorithm, same work, one process.

The two take turns in blocks of steps: alternating single steps would make numpy's and torch's
thread pools, which spin for a while after each product, steal the cores from each other. Medians of
nine blocks each; ratios above 1 mean pikograd is faster.
"""

import json
import math
import os
import time
from pathlib import Path

import numpy as np

import data
import meter
import model
import nn
import optim
import tensor as pg
from model import ScalarNet
from options import UserError, say
from run import write_json
from value import Value

BLOCKS = 9
RESULT = Path(__file__).resolve().parent / "runs" / "bench.json"


def alternate(*jobs, inner=10, warm=3):
    """Median seconds of a call of each job: BLOCKS blocks of `inner` calls each, in turns."""
    medians = [[] for _ in jobs]
    for _ in range(BLOCKS):
        for job, found in zip(jobs, medians, strict=True):
            times = []
            for _ in range(warm + inner):
                start = time.perf_counter()
                job()
                times.append(time.perf_counter() - start)
            found.append(np.median(times[warm:]))
    return [float(np.median(m)) for m in medians]


def layers(lib, kind):
    """The same net from either library."""
    if kind == "mlp":
        parts = (lib.Linear(784, 256), lib.ReLU(), lib.Linear(256, 128), lib.ReLU())
        return lib.Sequential(*parts, lib.Linear(128, 10))
    convolutions = (lib.Conv2d(1, 16, 3), lib.ReLU(), lib.MaxPool2d(2))
    convolutions += (lib.Conv2d(16, 32, 3), lib.ReLU(), lib.MaxPool2d(2))
    return lib.Sequential(*convolutions, lib.Flatten(), lib.Linear(800, 10))


def nets(torch, kind):
    """(ours, torch's) net of a kind, with the same weights."""
    if kind != "gpt":
        ours, theirs = layers(nn, kind), layers(torch.nn, kind)
        ours.load_state_dict(theirs.state_dict())
        return ours, theirs
    config = model.ModelConfig("gpt", classes=27, vocab="".join(map(chr, range(97, 124))))
    ours = Rows(model.GPT(config))
    theirs = torch_gpt(torch)
    weights = {n: torch.tensor(t.numpy()) for n, t in ours.net.state_dict().items()}
    theirs.load_state_dict(weights)
    return ours, theirs


class Rows(nn.Module):
    """The gpt with (B·T, V) logits, as cross entropy wants them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).reshape(-1, 27)


def torch_gpt(torch):
    """The gpt of model.py with torch's layers, under the same names; dropout 0.1 as there."""
    T = torch.nn

    class Block(T.Module):
        def __init__(self, d=64):
            super().__init__()
            self.norm1, self.norm2 = T.LayerNorm(d), T.LayerNorm(d)
            self.attention = T.MultiheadAttention(d, 4, batch_first=True)
            self.mlp = T.Sequential(T.Linear(d, 4 * d), T.GELU("tanh"), T.Linear(4 * d, d))
            self.dropout = T.Dropout(0.1)

        def forward(self, x):
            layer = self.attention
            parts = T.functional.linear(self.norm1(x), layer.in_proj_weight, layer.in_proj_bias)
            q, k, v = (p.unflatten(-1, (4, 16)).transpose(1, 2) for p in parts.chunk(3, -1))
            h = T.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.dropout(layer.out_proj(h.transpose(1, 2).flatten(2)))
            return x + self.dropout(self.mlp(self.norm2(x)))

    class GPT(T.Module):
        def __init__(self):
            super().__init__()
            self.token, self.position = T.Embedding(27, 64), T.Embedding(64, 64)
            self.blocks = T.Sequential(Block(), Block())
            self.norm, self.head = T.LayerNorm(64), T.Linear(64, 27, bias=False)

        def forward(self, ids):
            x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
            return self.head(self.norm(self.blocks(x))).reshape(-1, 27)

    return GPT()


def step_of(net, optimizer, loss, x, y):
    def step():
        optimizer.zero_grad()
        loss(net(x), y).backward()
        optimizer.step()

    return step


def with_threads(torch, n, step):
    """A step of torch's with n threads."""

    def run():
        torch.set_num_threads(n)
        step()

    return run


def bench_nets(torch, table):
    """Whole training steps with Adam: forward, backward, update. torch with its best number of
    threads, pikograd with one (which `main.py` asks numpy for)."""
    rng, out = np.random.default_rng(0), {}
    for kind, batch, shape in (("mlp", 128, (784,)), ("cnn", 64, (1, 28, 28)), ("gpt", 32, (64,))):
        if kind == "gpt":
            x, y = rng.integers(0, 27, (batch, *shape)), rng.integers(0, 27, batch * shape[0])
        else:
            x = rng.standard_normal((batch, *shape)).astype(np.float32)
            y = rng.integers(0, 10, batch)
        ours, theirs = nets(torch, kind)
        theirs_step = step_of(
            theirs, torch.optim.Adam(theirs.parameters()), torch.nn.functional.cross_entropy,
            torch.tensor(x), torch.tensor(y),
        )  # fmt: skip
        a, one, *more = alternate(
            step_of(ours, optim.Adam(ours.parameters()), nn.cross_entropy, pg.Tensor(x), y),
            *[with_threads(torch, n, theirs_step) for n in sorted({1, os.cpu_count()})],
        )
        table(f"{kind} step, batch {batch}", a * 1e3, min([one, *more]) * 1e3, "ms")
        out |= {f"{kind}_vs_torch": min([one, *more]) / a, f"{kind}_vs_torch_one_thread": one / a}
    return out


def bench_overhead(torch, table, n=500):
    """A chain of n additions to one number: forward and backward per operation, all overhead."""

    def chain(tensor, one):
        def run():
            x = tensor
            for _ in range(n):
                x = x + one
            x.backward()

        return run

    ours, theirs = pg.Tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    a, b = alternate(chain(ours, pg.Tensor(1.0)), chain(theirs, torch.tensor(1.0)), inner=5)
    table("tape overhead per operation", a / n * 1e6, b / n * 1e6, "µs")
    return {"overhead_us": a / n * 1e6, "overhead_vs_torch": b / a}


class ClosureValue:
    """micrograd's algorithm: a closure per step, a recursive sort (our own text)."""

    def __init__(self, data, children=()):
        self.data, self.grad, self._prev = data, 0, set(children)
        self._backward = lambda: None

    def __add__(self, other):
        other = other if isinstance(other, ClosureValue) else ClosureValue(other)
        out = ClosureValue(self.data + other.data, (self, other))

        def back():
            self.grad += out.grad
            other.grad += out.grad

        out._backward = back
        return out

    def __mul__(self, other):
        other = other if isinstance(other, ClosureValue) else ClosureValue(other)
        out = ClosureValue(self.data * other.data, (self, other))

        def back():
            self.grad += other.data * out.grad
            other.grad += self.data * out.grad

        out._backward = back
        return out

    def squash(self, f, slope):
        out = ClosureValue(f(self.data), (self,))

        def back():
            self.grad += slope(out.data) * out.grad

        out._backward = back
        return out

    def tanh(self):
        return self.squash(math.tanh, lambda t: 1 - t * t)

    def relu(self):
        return self.squash(lambda x: max(x, 0.0), lambda y: float(y > 0))

    def __rsub__(self, other):
        return self * -1 + other

    __radd__, __rmul__ = __add__, __mul__

    def backward(self):
        order, seen = [], set()

        def visit(v):
            if v not in seen:
                seen.add(v)
                for child in v._prev:
                    visit(child)
                order.append(v)

        visit(self)
        self.grad = 1
        for v in reversed(order):
            v._backward()


def scalar_step(kind):
    """One training step on 100 points with the given scalar class, 2-16-16-1."""
    points, labels = data.moons(100, seed=1)
    net = ScalarNet(16)
    net.layers = [[[kind(p.data) for p in row] for row in rows] for rows in net.layers]
    examples = list(zip(points.tolist(), labels.tolist(), strict=True))

    def step():
        losses = [(1 - y * net(x)).relu() for x, y in examples]
        (sum(losses[1:], losses[0]) * 0.01).backward()
        for p in net.parameters():
            p.data -= 0.1 * p.grad
            p.grad = 0.0

    return step


def bench_scalar(table):
    """A step on 100 points of two moons, 2-16-16-1: as tensors, as Values, as micrograd does it."""
    points, labels = data.moons(100, seed=1)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    x, y = pg.Tensor(points, dtype=np.float32), pg.Tensor(labels[:, None], dtype=np.float32)

    def tensor_step():
        optimizer.zero_grad()
        (1.0 - y * net(x)).relu().mean().backward()
        optimizer.step()

    (a,) = alternate(tensor_step, inner=50)
    b, c = alternate(scalar_step(Value), scalar_step(ClosureValue), inner=1, warm=1)
    table("moons step, Value", b * 1e3, c * 1e3, "ms", "micrograd's algorithm")
    table("moons step, tensors", a * 1e3, c * 1e3, "ms", "micrograd's algorithm")
    return {"scalar_step_s": b, "scalar_vs_micrograd": c / b, "tensor_vs_micrograd": c / a}


def bench_products():
    """The limit: rate of numpy's own matrix product, and what of it an MLP step reaches."""
    a = np.ones((1024, 1024), np.float32)
    seconds = alternate(lambda: a @ a, inner=5)[0]
    return 2 * 1024**3 / seconds


def main(args=None):
    try:
        import torch
    except ImportError:
        raise UserError("--bench compares with torch: pip install torch") from None
    meter.keep_memory()  # for both sides: torch takes its memory from the same C library
    say(f"numpy {np.__version__}, torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} torch threads")  # fmt: skip
    print(f"{'':32s}{'pikograd':>12s}{'peer':>12s}{'ratio':>10s}")

    rows = {}

    def table(name, ours, theirs, unit, peer=""):
        ratio, rows[name] = theirs / ours, [round(ours, 4), round(theirs, 4)]
        print(f"{name:32s}{ours:9.3f} {unit}{theirs:9.3f} {unit}{ratio:9.2f} × {peer}", flush=True)

    out = bench_nets(torch, table) | bench_overhead(torch, table) | bench_scalar(table)
    peak = bench_products()
    print(f"numpy's matrix product: {peak / 1e9:.0f} GFLOP/s")
    out |= {"gemm_gflops": peak / 1e9}
    out = {name: round(value, 4) for name, value in out.items()}
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, out | {"rows": rows})  # from where `--figures` takes the README's numbers
    print(json.dumps(out))
