"""Does this machine compute right? In seconds, before you trust a run on it.

First the device in float32 against the CPU in float64: forward, backward and one optimizer step of
the same small network, since some devices give wrong numbers without a word. Then what must hold
on any device: our own layers give the numbers of torch's, folded batch normalisation changes
nothing, and the shipped network is about as good as the log beside it says (on 500 pictures).
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import layers
import optim
import quantize
import train
from hardware import choose_device, seed_everything
from model import NetConfig, build
from options import UserError, from_options
from run import RunDirectory

SIZES = NetConfig(net="resnet", width=8, depth=8, shortcut="B", image_height=16, image_width=16)
TOLERANCE = 1e-4  # of the largest number: what float32 and another order of summation may cost
SHIPPED = Path(__file__).resolve().parent / "pretrained"


def one_step(model: nn.Module, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Logits, gradient and updated weights of one step, on the CPU."""
    optimizer = optim.Momentum(model.parameters(), lr=0.1)
    logits = model(x)
    F.cross_entropy(logits, labels).backward()
    weight = model.get_parameter("layer2.0.conv1.weight")
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": logits, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def awake(model: nn.Module) -> nn.Module:
    """The model with a last layer that is not zero, so that gradients reach everything."""
    nn.init.normal_(model.fc.weight, std=0.1)
    return model


def against(
    name: str, here: dict[str, Tensor], there: dict[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    """(what, largest relative difference, tolerance) of two outcomes of `one_step`."""
    for part, exact in here.items():
        error = (there[part] - exact).abs().max() / exact.abs().max()
        yield f"{part} {name}", error.item(), TOLERANCE


def checks(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """All of them, as (what, error, tolerance)."""
    model = awake(build(SIZES))
    ours = build(SIZES, layers)
    ours.load_state_dict(model.state_dict())
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    exact = one_step(copy.deepcopy(model).double(), x.double(), labels)
    there = one_step(copy.deepcopy(model).to(device), x.to(device), labels.to(device))
    yield from against(f"in float32 on {device} = in float64 on cpu", exact, there)
    scratch = one_step(ours.double(), x.double(), labels)
    yield from against("by our own layers = by torch's", exact, scratch)
    model = model.double().eval()
    error = (quantize.fold(model)(x.double()) - model(x.double())).abs().max()
    yield "batch normalisation folded = not folded", error.item(), 1e-10
    loaded, found = checkpoint.load(SHIPPED), data.load()
    said = RunDirectory(SHIPPED).history()[-1]["accuracy"]  # the last line is of the test part
    loaded.model.to(device)
    score = train.evaluate(loaded.model, found.test[:500], found, torch.float32)
    yield "accuracy of the shipped network = as logged", abs(score["accuracy"] - said), 0.03


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
