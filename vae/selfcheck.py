"""Does this machine compute right? In seconds, before you trust a run on it.

First the device in float32 against the CPU in float64: forward, backward and one optimizer step of
the same small network with the same dice, since some devices give wrong numbers without a word.
Then what must hold on any device: the closed form of the KL is torch's, the ELBO of a linear
decoder meets the exact log p(x), and the shipped network is as good as the log beside it says.
"""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import ppca
import train
import vae
from hardware import choose_device, seed_everything
from model import VaeConfig, build
from options import UserError, from_options
from run import RunDirectory

SIZES = {"mlp": VaeConfig(latent=4, width=32), "conv": VaeConfig(latent=4, net="conv", width=8)}
TOLERANCE = 1e-4  # of the largest number: what float32 and another order of summation may cost
SHIPPED = Path(__file__).resolve().parent / "pretrained"


def one_step(model: nn.Module, x: Tensor, eps: Tensor) -> dict[str, Tensor]:
    """Bounds, gradient and updated weights of one step, on the CPU."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    log_px, mu, logvar, _ = model(x, eps)
    bound = vae.elbo(log_px, vae.kl_closed(mu, logvar))
    (-bound.mean()).backward()
    weight = model.encoder.head.weight
    gradient = weight.grad.clone()
    optimizer.step()
    found = {"forward": bound, "backward": gradient, "step": weight}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def checks(device: torch.device) -> Iterator[tuple[str, float, float]]:
    """All of them, as (what, error, tolerance)."""
    for net, sizes in SIZES.items():
        model = build(sizes)
        x, eps = torch.rand(16, *sizes.shape).round(), torch.randn(16, 2, 4)
        exact = one_step(copy.deepcopy(model).double(), x.double(), eps.double())
        there = one_step(copy.deepcopy(model).to(device), x.to(device), eps.to(device))
        for part, wanted in exact.items():
            error = (there[part] - wanted).abs().max() / wanted.abs().max()
            yield f"{part} of {net} in float32 on {device} = in float64", error.item(), TOLERANCE
    mu, logvar = torch.randn(2, 100, 8, dtype=torch.float64)
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    theirs = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
    yield "KL = torch.distributions", (vae.kl_closed(mu, logvar) - theirs).abs().max().item(), 1e-12
    points, linear = ppca.data(200), ppca.LinearVae(8, 3)
    ppca.fit(linear, points)
    gap = ppca.best_log_density(points, 3) - linear.elbo(points).mean().item()
    yield "ELBO of a linear decoder = exact log p(x)", abs(gap), 1e-3
    loaded = checkpoint.load(SHIPPED)
    said = RunDirectory(SHIPPED).history()[-1]["nll"]  # the last line is of the test part
    images = loaded.dataset().test.images
    score = train.test(loaded.model.to(device), images, loaded.sizes, 1000)
    yield "-log p(x) of the shipped network = as logged", abs(score["nll"] - said), 0.05


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
