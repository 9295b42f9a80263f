"""Does this machine compute right? Every step here against the CPU in float64, then the oracles.

device    forward, backward and one step of an adapted model, beside the same on the CPU
oracles   start = base, merged = apart, unmerged = untouched, the table of NF4
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

import hardware
import lora
import nf4
import several
from model import Llama, LlamaConfig
from options import UserError, say
from train import TrainConfig
from variants import AdapterConfig

SIZES = LlamaConfig(vocab_size=97, n_layer=2, d_model=32, d_head=8, d_ff=48, seq_len=40)
TARGETS = r"\.(wq|wv|w2)$"


def small_model() -> nn.Module:
    """A small adapted model whose adapters are not at their start, in float64."""
    torch.manual_seed(0)
    model = Llama(SIZES).double()
    lora.adapt(model, AdapterConfig(rank=2, alpha=6.0, targets=TARGETS))
    with torch.no_grad():
        for layer in lora.layers(model):
            layer.adapters["default"].lora_b.normal_(std=0.1)
    return model


def one_step(model: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss, gradients and weights after a step, on the CPU in float64."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()
              if p.grad is not None}  # fmt: skip
    optimizer.step()
    found |= {f"{n} after a step": p.detach().clone() for n, p in model.named_parameters()}
    return {name: x.cpu().double() for name, x in found.items()}


def device_error(device: torch.device) -> float:
    """Largest difference of a step on `device` in float32 from the CPU in float64."""
    model = small_model()
    rows = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(0))
    right = one_step(copy.deepcopy(model), rows)
    found = one_step(model.float().to(device), rows.to(device))
    return max((found[name] - x).abs().max().item() for name, x in right.items())


def oracles() -> dict[str, bool]:
    """What must hold exactly, or nearly, of lora.py and nf4.py."""
    model, rows = small_model().eval(), torch.randint(97, (2, 20))
    apart = model(rows)
    weights = {n: x.clone() for n, x in model.state_dict().items()}
    several.activate(model, {})
    plain = model(rows)
    several.activate(model, {"default": 1.0})
    lora.merge(model)
    merged = model(rows)
    lora.unmerge(model)
    back = all(torch.equal(x, weights[n]) for n, x in model.state_dict().items())
    fresh = copy.deepcopy(model)
    for layer in lora.layers(fresh):
        nn.init.zeros_(layer.adapters["default"].lora_b)
    return {
        "B = 0 is the base": torch.equal(fresh(rows), plain),
        "the adapter changes the output": bool((apart - plain).abs().max() > 1e-3),
        "merged = apart": bool((merged - apart).abs().max() < 1e-12),
        "unmerged = untouched, to the bit": back,
        "NF4's largest error is 0.1519 of a scale": abs(nf4.largest_error() - 0.1519) < 1e-4,
    }


def main(args: argparse.Namespace) -> None:
    """Print a line a check. UserError if one fails."""
    device, _ = hardware.choose_device(getattr(args, "device", TrainConfig().device))
    error = device_error(device)
    checks = {f"{device}: a step is off by {error:.1e}": error < 1e-4} | oracles()
    for name, good in checks.items():
        print(f"{'ok  ' if good else 'FAIL'}  {name}")
    if wrong := [name for name, good in checks.items() if not good]:
        raise UserError(f"this machine does not compute right: {wrong[0]}")
    say("all is well")
