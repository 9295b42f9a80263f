"""`--selfcheck`: does this machine compute right? Every operation against finite differences.

numpy has one device, so there is no second one to compare with; the check is of this numpy and its
BLAS against mathematics: derivatives, float32 against float64, and micrograd's published numbers.
"""

import time

import numpy as np

import nn
import optim
import tensor as pg
from optable import CASES, pikograd_functions
from options import UserError, say
from transforms import GradcheckError, gradcheck, gradgradcheck
from value import Value


def check_operations():
    """gradcheck and gradgradcheck of every case of optable.CASES."""
    functions = pikograd_functions()
    for case in CASES:
        inputs = [pg.Tensor(a, requires_grad=True) for a in case.arrays()]
        try:
            gradcheck(lambda *x, c=case: c.f(functions, *x), inputs)
            gradgradcheck(lambda *x, c=case: c.f(functions, *x), inputs)
        except GradcheckError as error:
            raise UserError(f"operation {case.name}: {error}: reinstall numpy") from None
    return f"{len(CASES)} operations: derivatives of first and second order right"


def check_micrograd():
    """The example of micrograd's README."""
    a, b = Value(-4.0), Value(2.0)
    c, d = a + b, a * b + b**3
    c += c + 1
    c += 1 + c + (-a)
    d += d * 2 + (b + a).relu()
    d += 3 * d + (b - a).relu()
    f = (c - d) ** 2
    g = f / 2.0
    g += 10.0 / f
    g.backward()
    text = f"g = {g.data:.4f}, dg/da = {a.grad:.4f}, dg/db = {b.grad:.4f}"
    if text != "g = 24.7041, dg/da = 138.8338, dg/db = 645.5773":
        raise UserError(f"micrograd's example gives {text}")
    return text


def train_step(dtype):
    """One step of a small convolutional net: loss and new weights."""
    pg.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5))
    net = nn.Sequential(*layers)
    net.to(dtype)
    optimizer = optim.AdamW(net.parameters(), eps=1e-2)
    x = pg.Tensor(np.random.default_rng(0).standard_normal((16, 1, 8, 8)), dtype=dtype)
    loss = nn.cross_entropy(net(x), np.arange(16) % 5)
    loss.backward()
    optimizer.step()
    return loss.item(), np.concatenate([p.array.ravel() for p in net.parameters()])


def check_formats():
    """Forward, backward and a step in float32 equal those in float64 to float32's precision."""
    (loss32, w32), (loss64, w64) = train_step(np.float32), train_step(np.float64)
    off = max(abs(loss32 - loss64), float(np.abs(w32 - w64).max()))
    if not off < 1e-5:
        raise UserError(f"float32 and float64 differ by {off:.1e} after one step: reinstall numpy")
    return f"a training step in float32 and float64 agrees to {off:.1e}"


def main(args=None):
    start = time.perf_counter()
    for check in (check_micrograd, check_formats, check_operations):
        print(f"ok   {check()}")
    say(f"{time.perf_counter() - start:.1f} s")
