"""How probable a model thinks data are: two routes to −ln p(x), which should agree.

*Variational bound* (`bound`): the cost of sending x with the chain as a code. The noisy end costs
the distance of q(x_T | x) from plain noise, each step back costs the distance of the true step from
the network's, and what remains is read off the last step. Eq. 5 of arXiv:2006.11239; with the
variance β̃ a step's term is as simple as Eq. 13 of arXiv:2107.00630,

    ½ (SNR(t−1) − SNR(t)) ‖x0 − x̂0(x_t)‖²,     SNR = α²/σ²

*Probability flow* (`flow_nll`): `ddim` with η = 0 moves points along a smooth flow, and the density
along it changes by the divergence of the velocity: Eq. 39 of arXiv:2011.13456. In x̄ = x/α and σ̄ =
σ/α the flow is dx̄/dσ̄ = ε(x), so

    ln p(x) = ln N(x̄ at the end; 0, σ̄²) + ∫ div ε dσ̄

The divergence is estimated by Hutchinson's trick, vᵀ (∂ε/∂x̄) v with random signs v. It needs one
backward pass and not D of them, and is exact in the mean.

Both give nats a row; `bits_per_dim` turns them into bits a number.

Key: B rows of D numbers. Data are x (B, …) scaled to −1 … 1.
"""

import itertools
import math

import torch
from torch import Tensor

from diffusion import Schedule, q_sample, spread
from samplers import Predict

LEVELS = 256  # of a pixel


def bits_per_dim(nats: Tensor, shape: torch.Size, pictures: bool) -> Tensor:
    """Nats a row (B,) as bits a number. pictures: of whole levels 0 … 255 in place of a density.

    A density over −1 … 1 counts volume; a level is 2/255 wide, which costs log2(255/2) bits more.
    Only for `flow_nll`: `bound` of pictures counts levels already.
    """
    bits = nats / math.log(2) / math.prod(shape[1:])
    return bits + math.log2((LEVELS - 1) / 2) if pictures else bits


def normal_log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -(((x - mean) / std) ** 2) / 2 - std.log() - math.log(2 * math.pi) / 2


def level_log_mass(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """ln of the mass that N(mean, std) puts on the level of each pixel: Eq. 13 of 2006.11239."""
    half = 1 / (LEVELS - 1)
    above = torch.special.ndtr((x + half - mean) / std)
    below = torch.special.ndtr((x - half - mean) / std)
    above = torch.where(x > 1 - half, torch.ones_like(x), above)
    below = torch.where(x < half - 1, torch.zeros_like(x), below)
    return (above - below).clamp(min=1e-12).log()


def chosen_terms(schedule: Schedule, n_look: int, dice) -> tuple[Tensor, Tensor]:
    """(steps to look at, what each counts): all of 1 … T−1 once, or at most `n_look` of them.

    Neighbours whose shares of the fall of ln(SNR + 10⁻⁴) add up to 1 / n_look make a block; of each
    block one is drawn, with a probability p in proportion to its share, and counts 1/p. A term is
    about as large as its share, so this changes little, and nothing in the mean.
    """
    n_term = schedule.n_step - 1
    if not 0 < n_look < n_term:
        return torch.arange(1, schedule.n_step), torch.ones(n_term, dtype=torch.float64)
    log_snr = ((schedule.alpha / schedule.sigma) ** 2 + 1e-4).log()
    share = (log_snr[:-1] - log_snr[1:]) / (log_snr[0] - log_snr[-1])
    block = (share.cumsum(0) * n_look * (1 - 1e-9)).long()
    steps, counts = [], []
    for number in block.unique():
        members = (block == number).nonzero()[:, 0]
        p = share[members] / share[members].sum()
        drawn = torch.multinomial(p, 1, generator=dice)
        steps.append(members[drawn] + 1)
        counts.append(1 / p[drawn])
    return torch.cat(steps), torch.cat(counts)


@torch.no_grad()
def bound(
    predict: Predict,
    x0: Tensor,
    schedule: Schedule,
    pictures: bool,
    dice=None,
    n_look: int = 0,
    n_reference: int = 0,
) -> Tensor:
    """Upper bound of −ln p(x0) in nats, with one draw of noise for each term of the sum.

    n_look: how many of the T − 1 steps back to look at; 0 is all of them. pictures: count the mass
    of a pixel's level in place of a density.

    n_reference: the first rows are not scored; their errors set the variance of each step. 0 takes
    β̃, which is too small where x̂0 is uncertain: the bound is loose then, by a third of a nat a
    number with the linear schedule. The variance that a step should have is ρ β̃ with
    ρ = 1 + (SNR(t−1) − SNR(t)) · (mean squared error of x̂0): Theorem 1 of arXiv:2201.06503.

    Returns (B − n_reference,).
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    snr, kept = (alpha / sigma) ** 2, slice(n_reference, None)

    def guess(step: int) -> Tensor:
        noise = torch.randn(x0.shape, generator=dice, dtype=x0.dtype).to(x0.device)
        x = q_sample(x0, noise, alpha[step], sigma[step])
        return predict(x, schedule.time_of(step), alpha[step], sigma[step])[0]

    end = (alpha[-1] ** 2 * x0**2 + sigma[-1] ** 2 - 1) / 2 - sigma[-1].log()
    total, size = end.flatten(1).sum(1)[kept], x0[0].numel()
    steps, counts = chosen_terms(schedule, n_look, dice)
    for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
        error = (x0 - guess(step)).square().flatten(1).mean(1)
        drop = float(snr[step - 1] - snr[step])
        rho = 1 + drop * error[:n_reference].mean().item() if n_reference else 1.0
        term = (1 / rho - 1 + math.log(rho) + drop * error[kept] / rho) / 2
        total = total + count * size * term
    guessed = guess(0)
    width = spread(sigma[0] / alpha[0], x0)
    if n_reference:
        width = (x0 - guessed)[:n_reference].square().mean().sqrt()
    log_p = level_log_mass if pictures else normal_log_density
    return total - log_p(x0[kept], guessed[kept], width).flatten(1).sum(1)


def divergence(slope: Tensor, x: Tensor, probes: list[Tensor]) -> Tensor:
    """Σ_i ∂slope_i/∂x_i of each row (B,): the mean over probes v of vᵀ J v."""
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for v in probes:
        (product,) = torch.autograd.grad(slope, x, v, retain_graph=True)
        total += (product * v).flatten(1).sum(1)
    return total / len(probes)


def all_axes(x: Tensor) -> list[Tensor]:
    """√D times each unit vector: with these probes `divergence` is exact."""
    n_axis = x[0].numel()
    units = n_axis**0.5 * torch.eye(n_axis, dtype=x.dtype, device=x.device)
    return [unit.view(1, *x.shape[1:]).expand_as(x) for unit in units]


def levels_for_flow(schedule: Schedule, n_step: int, least_alpha: float = 1e-2) -> list[int]:
    """Steps from little noise to much, about even in ln σ̄; not those with α below a hundredth."""
    usable = schedule.alpha >= least_alpha
    place = (schedule.sigma / schedule.alpha)[usable].log()
    wanted = torch.linspace(float(place[0]), float(place[-1]), n_step + 1, dtype=torch.float64)
    nearest = (place[:, None] - wanted).abs().argmin(0)
    return nearest.unique().tolist()


def flow_nll(
    predict: Predict, x0: Tensor, schedule: Schedule, n_step: int = 100, dice=None, n_probe: int = 1
) -> Tensor:
    """−ln p(x0) in nats (B,) along the probability flow, by Heun's method in about `n_step` steps.

    n_probe: random probes of Hutchinson's trick for each row, with a backward pass each a step; 0
    takes all axes, which is exact and needs D of them. 2 looks a step.
    """
    if n_probe:
        signs = [torch.randint(2, x0.shape, generator=dice) * 2 - 1 for _ in range(n_probe)]
        probes = [sign.to(x0) for sign in signs]
    else:
        probes = all_axes(x0)
    levels = levels_for_flow(schedule, n_step)

    sigma_bar = schedule.sigma / schedule.alpha

    def slope(x_bar: Tensor, step: int) -> Tensor:
        """ε at a point of the flow."""
        alpha, sigma = schedule.alpha[step], schedule.sigma[step]
        return predict(spread(alpha, x_bar) * x_bar, schedule.time_of(step), alpha, sigma)[1]

    def look(x_bar: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(ε, σ̄ div ε) at a point of the flow."""
        x_bar = x_bar.detach().requires_grad_()
        with torch.enable_grad():
            eps = slope(x_bar, step)
            change = divergence(eps, x_bar, probes) * float(sigma_bar[step])
        return eps.detach(), change.detach()

    x_bar, log_volume = x0, torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    eps, change = look(x_bar, levels[0])
    for here, there in itertools.pairwise(levels):
        step = spread(sigma_bar[there] - sigma_bar[here], x_bar)
        with torch.no_grad():
            eps_there = slope(x_bar + step * eps, there)
        x_bar = x_bar + step * (eps + eps_there) / 2
        eps, change_there = look(x_bar, there)
        stretch = float((sigma_bar[there] / sigma_bar[here]).log())
        log_volume = log_volume + stretch * (change + change_there) / 2
        change = change_there
    end = normal_log_density(x_bar, torch.zeros_like(x_bar), spread(sigma_bar[levels[-1]], x_bar))
    return -(end.flatten(1).sum(1) + log_volume)
