"""log p(x) of pictures that were not trained on, far tighter than the ELBO says it.

    importance   log (1/k) Σ p(x, z_i) / q(z_i|x), a running sum over thousands of draws: L_k with a
                 large k (1509.00519, §5). Exact as k grows, if q covers where the posterior is
    annealed     annealed importance sampling (Neal 1998, physics/9803008; for decoders 1611.04273):
                 no encoder needed. Chains of z begin at the prior and are led, by Hamiltonian
                 Monte Carlo, through p(z) p(x|z)^t from t = 0 to 1; their weights average to p(x)

Both are lower bounds in expectation (annealing not to the letter, as its step size follows its own
chains). That they agree although one uses the encoder and the other
does not is the check.

Key: B pictures, K draws or chains for each, D latents, T temperatures.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

import vae

AT_ONCE = 4096  # draws that are decoded together


@torch.no_grad()
def importance(
    model, x: Tensor, k: int = 5000, dice: torch.Generator | None = None, at_once: int = AT_ONCE
) -> Tensor:
    """log p(x) of pictures (B, C, H, W) by k draws from q(z|x) each: (B,) nats.

    dice: a generator on the CPU, so that the numbers are the same on every device.
    at_once: how many draws are decoded together. It changes the time, and which dice fall, so two
    values give two estimates, each as good as the other.
    """
    mu, logvar = model.encode(x)
    total = torch.full((len(x),), -torch.inf, dtype=torch.float64)  # on the CPU: MPS has no float64
    step = max(1, at_once // len(x))
    for start in range(0, k, step):
        n = min(step, k - start)
        eps = torch.randn(n, *mu.shape, generator=dice).to(x.device).transpose(0, 1)
        z = vae.reparameterise(mu, logvar, eps)
        weights = model.log_likelihood(x, z) - vae.kl_sampled(z, mu, logvar)
        total = torch.logaddexp(total, weights.cpu().double().logsumexp(1))
    return total - torch.tensor(float(k), dtype=torch.float64).log()


def temperatures(n: int, steepness: float = 4.0) -> Tensor:
    """n + 1 numbers from 0 to 1, close together at both ends, where p(z) p(x|z)^t changes most."""
    t = torch.linspace(-steepness, steepness, n + 1, dtype=torch.float64).sigmoid()
    return (t - t[0]) / (t[-1] - t[0])


def annealed(
    log_likelihood: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    n_temperature: int = 300,
    n_leapfrog: int = 8,
    dice: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """log p(x) of B pictures by K chains each: (B,) nats.

    log_likelihood: log p(x|z) of z (B, K, D) on the CPU, as (B, K). shape: (B, K, D).
    At each temperature one Hamiltonian move of n_leapfrog steps. Its step size is one for each
    picture, and is led towards 65 % of moves accepted.
    """
    z = torch.randn(shape, generator=dice, dtype=dtype)
    step_size = torch.full((shape[0], 1, 1), 0.1, dtype=dtype)
    log_weight = torch.zeros(shape[:2], dtype=torch.float64)
    grid = temperatures(n_temperature)
    for before, t in itertools.pairwise(grid):
        with torch.no_grad():
            log_weight += (t - before) * log_likelihood(z).double()
        z, accepted = hamiltonian(log_likelihood, z, float(t), step_size, n_leapfrog, dice)
        share = accepted.to(dtype).mean(1)[:, None, None]
        step_size *= torch.where(share > 0.65, 1.02, 0.98)
    return log_weight.logsumexp(1) - torch.tensor(float(shape[1]), dtype=torch.float64).log()


def hamiltonian(
    log_likelihood: Callable[[Tensor], Tensor],
    z: Tensor,
    t: float,
    step_size: Tensor,
    n_leapfrog: int,
    dice: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One move of each chain that leaves p(z) p(x|z)^t as it is: (z, which were accepted).

    z rolls over the landscape −log p with a random push; a move whose energy came out too high is
    taken back (Neal 2011, 1206.1901, §3.2).
    """

    def energy_and_slope(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            energy = 0.5 * z.square().sum(-1) - t * log_likelihood(z)
            slope = torch.autograd.grad(energy.sum(), z)[0]
        return energy.detach(), slope

    push = torch.randn(z.shape, generator=dice, dtype=z.dtype)
    energy, slope = energy_and_slope(z)
    begin = energy + 0.5 * push.square().sum(-1)
    moved = z
    push = push - 0.5 * step_size * slope
    for i in range(n_leapfrog):
        moved = moved + step_size * push
        energy, slope = energy_and_slope(moved)
        push = push - (0.5 if i + 1 == n_leapfrog else 1.0) * step_size * slope
    end = energy + 0.5 * push.square().sum(-1)
    coin = torch.rand(begin.shape, generator=dice, dtype=z.dtype)
    accepted = coin.log() < begin - end  # False for a move that went astray to infinity
    return torch.where(accepted[..., None], moved, z), accepted
