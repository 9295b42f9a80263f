"""Does this machine compute right? A step here against the CPU in float64, then what must hold.

device    packed pairs through model and loss: loss, gradients and weights after a step
oracles   packed = apart, ln 2 at the start, the gradient of DPO, π* of the enumerable world
"""

import argparse
import copy
import math

import torch

import dpo
import hardware
import world
from model import Llama, LlamaConfig
from options import UserError, say
from packing import AnswerScorer, Packed, Text, of_texts, pack
from train import TrainConfig

SIZES = LlamaConfig(vocab_size=97, n_layer=2, d_model=32, d_head=8, d_ff=48, seq_len=40)


def small_scorer() -> AnswerScorer:
    """A small model in float64."""
    torch.manual_seed(0)
    return AnswerScorer(Llama(SIZES).double())


def small_texts() -> list[Text]:
    """Three prompts with two answers each, of different lengths."""
    dice = torch.Generator().manual_seed(1)
    ids = lambda n: torch.randint(97, (n,), generator=dice).tolist()  # noqa: E731
    return [(ids(4), [ids(3), ids(5)]), (ids(1), [ids(2), ids(2)]), (ids(7), [ids(6), ids(1)])]


def one_step(scorer: AnswerScorer, packed: Packed) -> dict[str, torch.Tensor]:
    """Loss, gradients and weights after a step, on the CPU in float64."""
    optimizer = torch.optim.SGD(scorer.parameters(), lr=1.0)
    policy = of_texts(scorer(*packed)[0], packed)[:, :2]
    loss = dpo.dpo_loss(policy[:, 0] - policy[:, 1], 0.3).mean()
    loss.backward()
    found = {"loss": loss.detach()}
    found |= {f"gradient of {n}": p.grad.clone() for n, p in scorer.named_parameters()}
    optimizer.step()
    found |= {f"{n} after a step": p.detach().clone() for n, p in scorer.named_parameters()}
    return {name: x.cpu().double() for name, x in found.items()}


def device_error(device: torch.device) -> float:
    """Largest difference of a step on `device` in float32 from the CPU in float64."""
    scorer, packed = small_scorer(), pack(small_texts(), 40)
    right = one_step(copy.deepcopy(scorer), packed)
    there = Packed(*(x.to(device) for x in packed))
    found = one_step(scorer.float().to(device), there)
    return max((found[name] - x).abs().max().item() for name, x in right.items())


@torch.no_grad()
def packing_error() -> float:
    """Largest difference between answers packed together and answers in rows of their own."""
    scorer, texts = small_scorer(), small_texts()
    packed = pack(texts, 40)
    together = of_texts(scorer(*packed)[0], packed)
    worst = 0.0
    for row, (prompt, answers) in zip(together, texts, strict=True):
        for found, answer in zip(row, answers, strict=False):
            tokens = torch.tensor([prompt + answer])
            said = torch.arange(tokens.shape[1])[None] >= len(prompt)
            alone, _ = dpo.response_logps(scorer.llama(tokens), tokens, said)
            worst = max(worst, (found - alone).abs().item())
    return worst


def oracles() -> dict[str, bool]:
    """What must hold exactly, or nearly, of dpo.py, packing.py and world.py."""
    h = torch.tensor([0.7, -1.3], dtype=torch.float64, requires_grad=True)
    dpo.dpo_loss(h, 0.3).sum().backward()
    here = world.make_world()
    learned = world.train(here, world.all_labels(here), "dpo", 1.0)
    best = world.optimal(here, 1.0)
    start = dpo.dpo_loss(torch.zeros(1, dtype=torch.float64), 0.1).item()
    return {
        "answers packed = apart, to 1e-12": packing_error() < 1e-12,
        "the loss starts at ln 2": abs(start - math.log(2)) < 1e-15,
        "the gradient is −β·σ(−β·h)": torch.allclose(h.grad, -0.3 * torch.sigmoid(-0.3 * h)),
        "DPO ends at π* of the enumerable world": bool(
            (learned.exp() - best.exp()).abs().sum() < 1e-4
        ),
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
