"""Does this machine compute right? Its device against float64 on the CPU, then the oracles.

The oracles are answers that are known: the ends of exact flows, the orders of the solvers, and what
the shipped network scored where it was trained.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import orders
import train
from diffusion import Schedule, q_sample
from hardware import choose_device, seed_everything
from model import NetConfig, build
from options import UserError, from_options
from run import RunDirectory
from samplers import ddim, make_grid

TOLERANCE = 1e-3  # relative, float32 against float64
SIZES = NetConfig(widths="16,24", attention="1", n_group=4, d_head=8, n_class=3)
SHIPPED = Path(__file__).resolve().parent / "pretrained"


def one_step(model: nn.Module, x: Tensor, times: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Answer, gradient and updated weights of one step, on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    answer = model(x, times, labels)
    answer.square().mean().backward()
    weight = model.get_parameter("mid_block.resnets.0.conv1.weight")
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": answer, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def true_noise_error() -> float:
    """How far DDIM with the true noise ends from the data."""
    x0, eps = torch.randn(2, 4, 1, 3, 3).double().unbind(0)
    grid = make_grid(Schedule("linear"), 13)
    end = ddim(lambda *_: (x0, eps), q_sample(x0, eps, grid.alpha[0], grid.sigma[0]), grid)
    return (end - x0).abs().max().item()


def checks(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """All of them, as (what, error, tolerance)."""
    model = build(SIZES)
    x, labels = torch.randn(8, 1, 8, 8), torch.arange(8) % 4
    times = torch.linspace(0, 999, 8)
    exact = one_step(copy.deepcopy(model).double(), x.double(), times, labels)
    there = one_step(copy.deepcopy(model).to(device), *(z.to(device) for z in (x, times, labels)))
    for part, wanted in exact.items():
        error = (there[part] - wanted).abs().max() / wanted.abs().max()
        yield f"{part} in float32 on {device} = in float64 on cpu", error.item(), TOLERANCE
    yield "DDIM with the true noise ends at the data", true_noise_error(), 1e-5
    for name, points in orders.errors(40).items():
        order = -1 if "Euler" in name else -2
        yield f"slope of {name} = {order}", abs(orders.slope(points) - order), 0.15
    loaded = checkpoint.load(SHIPPED)
    loaded.model.to(device)
    source = loaded.rows()
    said = RunDirectory(SHIPPED).history()[-1]["loss"]  # the last line is of the test part
    loss = train.loss_of(loaded.model, loaded.process, source, source.test, torch.float32)
    yield "loss of the shipped network = as logged", abs(loss / said - 1), 0.03


def main(args) -> None:
    """Print a line for each check. UserError names the device that lies."""
    device, why = choose_device(from_options(train.TrainConfig(), args).device)
    seed_everything(0)
    print(f"device {device}: {why}; torch {torch.__version__}")
    bad = []
    for name, error, tolerance in checks(device):
        good = error <= tolerance  # False for nan
        print(f"{'ok ' if good else 'BAD'}  {name}: {error:.1e}, at most {tolerance:.0e}")
        bad += [] if good else [name]
    if bad:
        raise UserError(f"{device} computes wrong numbers ({'; '.join(bad)}): use --device cpu")
