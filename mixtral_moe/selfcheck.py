"""Does this machine compute right? In seconds, before you trust a run on it.

First the device in float32 against the CPU in float64: forward, backward and one optimizer step of
the same small model, since some devices give wrong numbers without a word. Then what must hold on
any device: three ways to dispatch tokens give one result, text by the rolling cache is text without
a cache, and the rotary angles are exact.
"""

import copy
from collections.abc import Iterator

import torch

import hardware
import train
from generate import Sampling, generate
from model import Mixtral, MixtralConfig, RotaryTable, rotary_frequencies
from moe import dense, grouped, loop
from options import UserError, from_options

SIZES = MixtralConfig(
    vocab_size=97,
    seq_len=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    d_model=64,
    d_head=16,
    d_ff=48,
    n_expert=8,
    n_active=2,
    window=8,
)
TOLERANCE = 1e-4  # of the largest number: what float32 and another order of summation may cost


def decided() -> Mixtral:
    """A model whose routers are sure, so that rounding does not choose another expert."""
    model = Mixtral(SIZES)
    for block in model.blocks:
        block.ffn.router.gate.weight.data.mul_(50)
    return model


def one_step(model: Mixtral, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradient and updated weights of one step, on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(rows[:, :-1])
    (train.loss_sum(logits, rows[:, 1:]) / rows[:, 1:].numel()).backward()
    weight = model.blocks[0].ffn.experts.w1
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": logits, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def against_cpu(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(what, largest relative difference, tolerance) of the device against the CPU."""
    model, rows = decided(), torch.randint(SIZES.vocab_size, (4, SIZES.seq_len + 1))
    there = one_step(copy.deepcopy(model).to(device), rows.to(device))
    for name, here in one_step(model.double(), rows).items():
        error = (there[name] - here).abs().max() / here.abs().max()
        yield f"{name} in float32 on {device} = in float64 on cpu", error.item(), TOLERANCE


def ways_agree(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """The grouped product and the dense mask against the loop, forward and backward."""
    layer, x = decided().to(device).blocks[0].ffn, torch.randn(50, SIZES.d_model, device=device)
    results = {}
    for way in (loop, grouped, dense):
        layer.experts.dispatch = way
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), layer.experts.w1)
        results[way.__name__] = torch.cat((y.detach().flatten(), gradient.flatten()))
    expected = results.pop("loop")
    for name, found in results.items():
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        yield f"experts: {name} = one after the other", error, TOLERANCE


def cached_is_uncached(device: torch.device) -> tuple[str, float, float]:
    """Greedy text with the cache against a whole forward pass per token: how many differ."""
    model, prompt = decided().to(device).eval(), [5, 17, 3]
    cached = [ids[0] for ids in generate(model, [prompt], 20, Sampling(temperature=0))]
    text = list(prompt)
    for _ in cached:
        with torch.no_grad():
            text.append(int(model(torch.tensor([text], device=device))[0, -1].argmax()))
    different = sum(a != b for a, b in zip(cached, text[len(prompt) :], strict=True))
    return "greedy text with the rolling cache = without", float(different), 0.0


def rotary_is_exact(device: torch.device) -> tuple[str, float, float]:
    """cos at position 4,095 against float64, on the device."""
    frequencies = rotary_frequencies(d_head=32)
    table = RotaryTable(frequencies)(torch.tensor([[4095]], device=device), 4096, torch.float32)[0]
    exact = (4095 * frequencies).cos()
    error = (table.flatten().cpu().double()[: len(exact)] - exact).abs().max()
    return "rotary angle at position 4,095", error.item(), 1e-6


def main(args) -> None:
    """Print a line for each check. UserError names the device that lies."""
    device, why = hardware.choose_device(from_options(train.TrainConfig(), args).device)
    hardware.seed_everything(0)
    print(f"device {device}: {why}; torch {torch.__version__}")
    checks = [*against_cpu(device), *ways_agree(device)]
    checks += [cached_is_uncached(device), rotary_is_exact(device)]
    for name, error, tolerance in checks:
        word = "ok " if error <= tolerance else "BAD"
        print(f"{word}  {name}: {error:.1e}, at most {tolerance:.0e}")
    if bad := [name for name, error, tolerance in checks if not error <= tolerance]:
        raise UserError(f"{device} computes wrong numbers ({'; '.join(bad)}): use --device cpu")
