"""Does this machine compute right? Every step here against the CPU in float64, then the oracles.

device    forward, backward and one step of each kind of network, beside the same on the CPU
oracles   gradients by hand = autograd; chunks with a carried state = one pass; torch.nn agrees
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bptt
import cells
import hardware
import torch_names
from model import SequenceConfig, SequenceModel
from options import UserError, say
from train import TrainConfig

LENGTHS = torch.tensor([5, 12, 1, 9])


def small_model(cell: str) -> SequenceModel:
    """A small network that walks in both directions, in float64."""
    torch.manual_seed(0)
    sizes = SequenceConfig(d_model=16, n_layer=2, d_embed=8, cell=cell, bidirectional=True,
                           vocab_size=20, n_answer=5)  # fmt: skip
    return SequenceModel(sizes).double()


def one_step(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Loss, gradients and weights after a step, on the CPU in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    answers, _ = model(tokens, None, LENGTHS.to(tokens.device))
    loss = F.cross_entropy(answers.flatten(0, 1), (tokens % 5).flatten())
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    found |= {f"{n} after a step": p.detach().clone() for n, p in model.named_parameters()}
    return {name: x.cpu().double() for name, x in found.items()}


def device_error(device: torch.device, cell: str) -> float:
    """Largest difference of a step on `device` in float32 from the CPU in float64."""
    model = small_model(cell)
    tokens = torch.randint(20, (4, 12), generator=torch.Generator().manual_seed(0))
    right = one_step(copy.deepcopy(model), tokens)
    found = one_step(model.float().to(device), tokens.to(device))
    return max((found[name] - x).abs().max().item() for name, x in right.items())


def by_hand(kind: str) -> float:
    """Largest difference between the gradients of bptt.py and those of autograd."""
    cell = cells.CELLS[kind](3, 4).double()
    x = torch.randn(6, 2, 3).double()
    grads = []
    for walk in (bptt.run, cells.unroll):
        y, end = walk(cell, x, cell.start(2))
        loss = y.square().sum() + sum(part.sum() for part in end)
        grads.append(torch.autograd.grad(loss, list(cell.parameters())))
    return max((a - b).abs().max().item() for a, b in zip(*grads, strict=True))


def against_torch() -> float:
    """Largest difference of an LSTM's outputs from torch.nn's, with the same weights."""
    ours = cells.LSTM(3, 4).double()
    theirs = nn.LSTM(3, 4).double()
    named = torch_names.cell_to_torch(ours)
    theirs.load_state_dict({f"{name}_l0": tensor for name, tensor in named.items()})
    x = torch.randn(6, 2, 3).double()
    return (bptt.run(ours, x, ours.start(2))[0] - theirs(x)[0]).abs().max().item()


@torch.no_grad()
def carried() -> float:
    """Largest difference of two chunks with a carried state from one pass."""
    model = SequenceModel(SequenceConfig(d_model=8, vocab_size=9, n_answer=9)).double()
    tokens = torch.randint(9, (2, 10))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    second, _ = model(tokens[:, 4:], state)
    return (torch.cat([first, second], dim=1) - whole).abs().max().item()


def main(args: argparse.Namespace) -> None:
    """Print a line a check. UserError if one fails."""
    device, _ = hardware.choose_device(getattr(args, "device", TrainConfig().device))
    checks = {}
    for kind in cells.CELLS:
        error = device_error(device, kind)
        checks[f"{device}: a step of the {kind} is off by {error:.1e}"] = error < 1e-4
        checks[f"{kind}: gradients by hand are autograd's"] = by_hand(kind) < 1e-12
    checks["torch.nn.LSTM gives the same"] = against_torch() < 1e-12
    checks["chunks with a carried state are one pass"] = carried() < 1e-12
    for name, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'}  {name}")
    if wrong := [name for name, good in checks.items() if not good]:
        raise UserError(f"this machine does not compute right: {wrong[0]}")
    say("all is well")
