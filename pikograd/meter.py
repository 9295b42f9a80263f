"""What a computation costs: operations counted, bytes of the tape measured.

The cheap-gradient bound: a function of any number of inputs together with its gradient costs at
most 5 × the function alone, in arithmetic operations (Baur & Strassen 1983; Griewank & Walther,
2008, ch. 3 and 4). Additions, products and elementary functions count 1 each here, copies 0.
"""

import contextlib
import ctypes
import sys
import tracemalloc

from engine import Modes, reachable


class CostMeter:
    """Counts the operations of everything run inside `with meter.measure():`.

    flops: in all. by_op: per operation. live: (flops so far, bytes numpy and Python hold) after
    each operation if `memory` is set; measured by tracemalloc, which makes it slow.
    """

    def __init__(self, memory=False):
        self.memory, self.flops, self.by_op, self.live = memory, 0, {}, []

    @contextlib.contextmanager
    def measure(self):
        own = self.memory and not tracemalloc.is_tracing()
        if own:
            tracemalloc.start()
        try:
            with Modes.set(meter=self):
                yield self
        finally:
            if own:
                tracemalloc.stop()

    def record(self, op, arrays, out):
        """Called by the engine after each operation."""
        if callable(op.flops):
            n = op.flops(arrays, out)
        else:
            n = op.flops * max([a.size for a in arrays] + [out.size])
        self.flops += n
        self.by_op[op.name] = self.by_op.get(op.name, 0) + n
        if self.memory:
            self.live.append((self.flops, tracemalloc.get_traced_memory()[0]))


def keep_memory():
    """Ask the C library not to give freed memory back to the system between steps.

    Every step makes the same arrays again. Where they are taken from the system anew each time, it
    has to clear every page first, which can take longer than computing what is written there.
    glibc only (Linux); elsewhere nothing happens.
    """
    trim, pad, mmap = -1, -2, -3  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            c = ctypes.CDLL(None)
            for what, value in ((trim, 2**31 - 1), (pad, 2**26), (mmap, 2**25)):
                c.mallopt(what, value)


def gradient_cost(f):
    """(operations of the forward, of the backward) for f() → a tensor of one element."""
    forward, backward = CostMeter(), CostMeter()
    with forward.measure():
        out = f()
    with backward.measure():
        out.backward()
    return forward.flops, backward.flops


def tape_bytes(out):
    """Bytes of the arrays that the tape behind `out` keeps alive, each memory block once."""
    blocks = {}
    for node in reachable([out.node]):
        arrays = [t.array for _, t, _ in node.saved] + ([node.out[0]] if node.out else [])
        for a in arrays:
            while a.base is not None and hasattr(a.base, "nbytes"):
                a = a.base
            blocks[id(a)] = a.nbytes
    return sum(blocks.values())
