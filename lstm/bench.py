"""How fast, beside torch.nn and beside what the machine can do, with the same weights.

All in one process, taking turns; medians. Each ratio is above 1 where ours is faster.

    train    forward and backward of two layers of 256, 32 rows of 64 steps, float32: bptt.py
             against torch.nn.LSTM, GRU and RNN, and against autograd over cells.py (`hand`)
    packed   the same LSTM over rows of 1 … 64 steps, beside packed sequences of torch.nn
    limits   both against the rate of matrix products: 6 floating-point operations a weight and
             token, less the gradient of the data, which nobody needs

The threads are those of the session: OMP_NUM_THREADS=1 python main.py --bench is one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import bptt
import cells
import hardware
import torch_names
from options import say
from run import write_json
from train import TrainConfig

RESULT = Path(__file__).resolve().parent / "runs" / "bench.json"
T, B, H, LAYERS, ROUNDS = 64, 32, 256, 2, 9
THEIRS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def stack(kind: str, device: torch.device) -> tuple[list[cells.Cell], nn.Module]:
    """Our cells, and torch's module with their weights."""
    torch.manual_seed(0)
    ours = [cells.CELLS[kind](H, H) for _ in range(LAYERS)]
    theirs = THEIRS[kind](H, H, LAYERS)
    theirs.load_state_dict({
        f"{name}_l{k}": tensor
        for k, cell in enumerate(ours)
        for name, tensor in torch_names.cell_to_torch(cell).items()
    })  # fmt: skip
    return [cell.to(device) for cell in ours], theirs.to(device)


def walk(layers: list[cells.Cell], x: Tensor, how: Callable, lengths: Tensor | None) -> Tensor:
    """x through all layers."""
    for cell in layers:
        x, _ = how(cell, x, cell.start(x.shape[1]), lengths)
    return x


def seconds(variants: dict[str, Callable], device: torch.device) -> dict[str, float]:
    """Median seconds of each variant; in every round each has one turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(ROUNDS + 2):
        for name, work in variants.items():
            start = time.perf_counter()
            work().flatten()[0].item()  # waits for the device
            if turn >= 2:  # allocate, warm up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(mine) for name, mine in times.items()}


def both_ways(forward: Callable, module: nn.Module) -> Callable:
    """Forward and backward of the sum of `forward()`; returns a gradient, to wait for."""

    def work() -> Tensor:
        module.zero_grad()
        forward().sum().backward()
        return next(module.parameters()).grad

    return work


def measure(kind: str, device: torch.device, ragged: bool) -> dict[str, float]:
    """Seconds of ours, of torch.nn and, for full rows, of autograd over the cells."""
    layers, theirs = stack(kind, device)
    x = torch.randn(T, B, H, device=device)
    lengths = torch.linspace(T, 1, B).round().long() if ragged else None
    module = nn.ModuleList(layers)

    def their_forward() -> Tensor:
        if not ragged:
            return theirs(x)[0]
        return theirs(pack_padded_sequence(x, lengths))[0].data

    variants = {
        "theirs": both_ways(their_forward, theirs),
        "ours": both_ways(lambda: walk(layers, x, bptt.run, lengths), module),
    }
    if not ragged:
        variants["autograd"] = both_ways(lambda: walk(layers, x, cells.unroll, None), module)
    return seconds(variants, device)


def products(kind: str) -> float:
    """Floating-point operations of the matrix products of a step of training."""
    gates = cells.CELLS[kind].n_gate
    one = 2 * T * B * gates * H * H  # W x, or U h, of one layer
    return one * (6 * LAYERS - 1)  # each forward, for the gradient of its input, of its weights


def main(args: argparse.Namespace) -> None:
    """Print a table, then one line of JSON, which is also kept in runs/bench.json."""
    device, _ = hardware.choose_device(getattr(args, "device", TrainConfig().device))
    peak = hardware.matmul_rate(device, torch.float32)
    result: dict = {"device": str(device), "threads": torch.get_num_threads(), "gemm_rate": peak}
    say(f"{LAYERS} × {H}, {B} rows of {T}, float32, {result['threads']} thread(s) on {device}; "
        f"products at {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    print("cell        ours    torch.nn  autograd   ratio   of the product rate")
    for kind in THEIRS:
        times = measure(kind, device, ragged=False)
        key = "train_vs_torch" if kind == "lstm" else f"train_{kind}_vs_torch"
        result[key] = times["theirs"] / times["ours"]
        result[f"{kind}_hand_vs_autograd"] = times["autograd"] / times["ours"]
        result[f"{kind}_gemm_fraction"] = products(kind) / times["ours"] / peak
        result[f"{kind}_ms"] = 1e3 * times["ours"]
        shown = "".join(f"{1e3 * times[name]:8.1f} ms" for name in ("ours", "theirs", "autograd"))
        print(f"{kind:6}{shown}  {result[key]:5.2f}   {result[f'{kind}_gemm_fraction']:.0%}")
    times = measure("lstm", device, ragged=True)
    result["packed_vs_torch"] = times["theirs"] / times["ours"]
    print(f"packed{1e3 * times['ours']:8.1f} ms{1e3 * times['theirs']:8.1f} ms             "
          f"{result['packed_vs_torch']:5.2f}")  # fmt: skip
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, result)
    print(json.dumps(result))
