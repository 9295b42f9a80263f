"""Does this machine compute right? In seconds, before you trust a run on it.

First the device in float32 against the CPU in float64: forward, backward and one optimizer step of
the same small model, since some devices give wrong numbers without a word. Then what must hold on
any device: naive, cached and absorbed attention give one result, text written with guesses is the
text written without, and the rotary angles are exact.
"""

import copy
from collections.abc import Iterator

import torch

import hardware
import train
from forms import largest_difference
from generate import Sampling, generate
from model import DeepseekConfig, RotaryTable
from mtp import DeepseekMTP
from options import UserError, from_options
from speculative import speculate
from yarn import YarnScaling, yarn_frequencies

SIZES = DeepseekConfig(
    vocab_size=97, seq_len=64, n_layer=2, n_head=4, d_model=64, q_rank=24, kv_rank=16, d_nope=12,
    d_rope=8, d_value=12, d_ff=48, d_expert=16, n_expert=8, n_active=2, n_ahead=1,
    rope_scaling=YarnScaling(factor=4.0, original_seq_len=16),
)  # fmt: skip
TOLERANCE = 1e-4  # of the largest number: what float32 and another order of summation may cost


def one_step(model: DeepseekMTP, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits, gradient and updated weights of one step, on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = torch.cat(model(rows[:, :-1], following=rows[:, 1:]))
    (train.loss_sum(logits, rows[:, 1:].repeat(2, 1)) / rows[:, 1:].numel()).backward()
    weight = model.blocks[0].attention.wkv_a.weight
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": logits, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def against_cpu(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(what, largest relative difference, tolerance) of the device against the CPU."""
    model, rows = DeepseekMTP(SIZES), torch.randint(SIZES.vocab_size, (4, SIZES.seq_len + 1))
    there = one_step(copy.deepcopy(model).to(device), rows.to(device))
    for name, here in one_step(model.double(), rows).items():
        error = (there[name] - here).abs().max() / here.abs().max()
        yield f"{name} in float32 on {device} = in float64 on cpu", error.item(), TOLERANCE


def forms_agree(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """Naive, cached and absorbed on the device in float32, and on the CPU in float64."""
    tokens = torch.randint(SIZES.vocab_size, (2, 40))
    model = DeepseekMTP(SIZES).eval()
    for kind, where, most in (
        (torch.float32, device, TOLERANCE),
        (torch.float64, torch.device("cpu"), 1e-10),
    ):
        error = largest_difference(copy.deepcopy(model).to(where, kind), tokens.to(where))
        name = str(kind).removeprefix("torch.")
        yield f"naive = cached = absorbed in {name} on {where}", error, most


def guesses_change_nothing(device: torch.device) -> tuple[str, float, float]:
    """Greedy text with guesses against greedy text without: how many tokens differ."""
    model, prompt, greedy = (
        DeepseekMTP(SIZES).to(device).eval(),
        [5, 17, 3],
        Sampling(temperature=0),
    )
    plain = [ids[0] for ids in generate(model, [prompt], 30, greedy)]
    guessed = list(speculate(model, prompt, 30, greedy))
    different = sum(a != b for a, b in zip(plain, guessed, strict=True))
    return "greedy text with guesses = without", float(different), 0.0


def rotary_is_exact(device: torch.device) -> tuple[str, float, float]:
    """cos at position 4,095 against float64, on the device."""
    frequencies = yarn_frequencies(32, 1e4, None)
    table = RotaryTable(frequencies)(torch.tensor([[4095]], device=device), 4096, torch.float32)[0]
    exact = (4095 * frequencies).cos()
    error = (table.flatten().cpu().double()[: len(exact)] - exact).abs().max()
    return "rotary angle at position 4,095", error.item(), 1e-6


def main(args) -> None:
    """Print a line for each check. UserError names the device that lies."""
    device, why = hardware.choose_device(from_options(train.TrainConfig(), args).device)
    hardware.seed_everything(0)
    print(f"device {device}: {why}; torch {torch.__version__}")
    checks = [*against_cpu(device), *forms_agree(device)]
    checks += [guesses_change_nothing(device), rotary_is_exact(device)]
    for name, error, tolerance in checks:
        word = "ok " if error <= tolerance else "BAD"
        print(f"{word}  {name}: {error:.1e}, at most {tolerance:.0e}")
    if bad := [name for name, error, tolerance in checks if not error <= tolerance]:
        raise UserError(f"{device} computes wrong numbers ({'; '.join(bad)}): use --device cpu")
