"""Does this machine compute right? In seconds, before you trust a run on it.

First the device in float32 against the CPU in float64: forward, backward and one optimizer step of
the same small model, since some devices give wrong numbers without a word. Then what must hold on
any device: a cached translation is an uncached one, a beam search finds what an exhaustive search
finds, and padding is never seen.
"""

import copy
import itertools
from collections.abc import Iterator

import torch

import decode
import hardware
import train
from checkpoint import Loaded, Rules
from data import pad
from model import Transformer, TransformerConfig
from options import UserError, from_options

SIZES = TransformerConfig(
    vocab_size=97, seq_len=64, n_layer=2, n_head=4, d_model=64, d_ff=96, dropout=0.0
)
SMALL = TransformerConfig(  # padding and start 0, end 1, two words
    vocab_size=4, seq_len=8, n_layer=1, n_head=2, d_model=16, d_ff=16, start_id=0, end_id=1
)
TOLERANCE = 1e-4  # of the largest number: what float32 and another order of summation may cost


def sentence_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Four pairs of different length, filled up with padding."""
    ids = torch.randint(4, SIZES.vocab_size, (8, 30)).tolist()
    source = pad([ids[i][: 30 - 5 * i] for i in range(4)])
    target = pad([[SIZES.start_id, *ids[4 + i][: 12 + 4 * i]] for i in range(4)])
    return source, target


def one_step(model: Transformer, source: torch.Tensor, target: torch.Tensor) -> dict:
    """Logits, gradient and updated weights of one step, on the CPU."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits, targets = model(source, target[:, :-1]), target[:, 1:]
    loss = train.loss_sums(logits, targets, 0.1, SIZES.pad_id)[0]
    (loss / (targets != SIZES.pad_id).sum()).backward()
    weight = model.decoder[0].cross.wkv.weight
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": logits, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def against_cpu(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """(what, largest relative difference, tolerance) of the device against the CPU."""
    model, (source, target) = Transformer(SIZES), sentence_pairs()
    there = one_step(copy.deepcopy(model).to(device), source.to(device), target.to(device))
    for name, here in one_step(model.double(), source, target).items():
        error = (there[name] - here).abs().max() / here.abs().max()
        yield f"{name} in float32 on {device} = in float64 on cpu", error.item(), TOLERANCE


def cached_is_uncached(device: torch.device) -> tuple[str, float, float]:
    """Beam search with the cache and without: how many tokens differ."""
    model = Transformer(SIZES).to(device).eval()
    loaded = Loaded(None, model, None, Rules(2, 3, (0, 2)))
    sources, search = torch.randint(4, 97, (3, 12)).tolist(), decode.Search(max_new_tokens=20)
    fast, slow = (
        decode.search_translations(loaded, sources, search, way) for way in ("cached", "uncached")
    )
    texts = ([[h.tokens for h in found] for found in one] for one in (fast, slow))
    different = sum(one != other for one, other in zip(*texts, strict=True))
    return "translations with the cache = without", float(different), 0.0


def beam_is_exhaustive(device: torch.device) -> tuple[str, float, float]:
    """The best of all 30 hypotheses of up to 4 tokens, each scored by a forward pass."""
    model, rules = Transformer(SMALL).to(device).eval(), Rules(0, 1, (0,))
    source = torch.tensor([[2, 3, 1]], device=device)
    best = -float("inf")
    for n in range(1, 5):
        endings = [[1]] if n < 4 else [[1], [2], [3]]
        for start, end in itertools.product(itertools.product((2, 3), repeat=n - 1), endings):
            tokens = [*start, *end]
            with torch.no_grad():
                logits = model(source, torch.tensor([[0, *tokens[:-1]]], device=device))[0]
            log_p = decode.log_probabilities(logits, rules).cpu()
            best = max(best, sum(log_p[i, t].item() for i, t in enumerate(tokens)) / n)
    limits = torch.tensor([4], device=device)
    found = decode.beam_search(model, source, rules, limits, decode.Search(beam=31))[0]
    error = abs(found[0].score - best) if found else float("inf")
    return "score of a wide beam = of an exhaustive search", error, 1e-5


def padding_is_unseen(device: torch.device) -> tuple[str, float, float]:
    """Logits of sentences with and without more padding behind them."""
    model, (source, target) = Transformer(SIZES).to(device).eval(), sentence_pairs()
    source, target = source.to(device), target.to(device)
    wider = torch.nn.functional.pad(source, (0, 9))
    with torch.no_grad():
        error = (model(source, target) - model(wider, target)).abs().max()
    return "logits with more padding = with less", error.item(), TOLERANCE


def main(args) -> None:
    """Print a line for each check. UserError names the device that lies."""
    device, why = hardware.choose_device(from_options(train.TrainConfig(), args).device)
    hardware.seed_everything(0)
    print(f"device {device}: {why}; torch {torch.__version__}")
    checks = [*against_cpu(device), cached_is_uncached(device), beam_is_exhaustive(device),
              padding_is_unseen(device)]  # fmt: skip
    for name, error, tolerance in checks:
        word = "ok " if error <= tolerance else "BAD"
        print(f"{word}  {name}: {error:.1e}, at most {tolerance:.0e}")
    if bad := [name for name, error, tolerance in checks if not error <= tolerance]:
        raise UserError(f"{device} computes wrong numbers ({'; '.join(bad)}): use --device cpu")
