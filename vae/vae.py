"""The variational autoencoder: a bound on log p(x) in nats, and how to climb it.

A picture x is explained by a few hidden numbers z, drawn from a normal distribution p(z) = N(0, I).
A decoder says how likely x is given z. Summing over all z gives p(x), which nobody can compute; but
an encoder can guess which z fit, q(z|x) = N(mu, exp(logvar)), and then (Jensen's inequality)

    log p(x)  ≥  ELBO  =  E_q[log p(x|z)]  −  KL(q(z|x) ‖ p(z))        1312.6114, Eq. (3)
    log p(x)  ≥  L_k   =  E[log (1/k) Σ_i p(x, z_i) / q(z_i|x)]        1509.00519, Eq. (8)

L_1 is the ELBO and L_k grows with k towards log p(x). Everything here is a sum over pixels and over
latents for one picture. Averages are over pictures alone: only so is the number a bound in nats,
and only so does beta = 1 mean what the paper means.

Papers: Kingma and Welling 2013 (1312.6114); Burda et al. 2015 (1509.00519); beta: Higgins et al.
2017, and 1606.05579; free bits: Kingma et al. 2016 (1606.04934).

Key: B pictures, K samples of z for each, D latents, … any shape. Imports torch alone.
Left out: normalising flows, hierarchies of latents, learned priors. A codebook is in vq.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # exp(20) is 5e8 and exp(−30) 1e-13: beyond, float32 overflows soon
LOG_2PI = 1.8378770664093453
ACTIVE = 0.01  # nats (or variance) above which a latent counts as used


# ── q(z|x) and the KL divergence ──────────────────────────────────────────────────────────────────


def bounded(logvar: Tensor) -> Tensor:
    """logvar kept where its exponential is a finite number, whatever a network says.

    Outside of LOGVAR_RANGE the gradient is 0.
    """
    return logvar.clamp(*LOGVAR_RANGE)


def reparameterise(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """z = mu + sigma · eps, §2.4 of 1312.6114: a draw through which gradients reach mu and sigma.

    mu, logvar: (B, D). eps: (B, K, D), drawn from N(0, 1). Returns (B, K, D).
    """
    return mu[:, None] + (0.5 * bounded(logvar))[:, None].exp() * eps


def kl_closed(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) ‖ N(0, 1)) of each latent in nats, Appendix B of 1312.6114.

        ½ (mu² + sigma² − 1 − log sigma²)

    The same shape as mu. Never below 0, and 0 only at mu = 0, logvar = 0. expm1 keeps the digits of
    a sigma² close to 1.
    """
    logvar = bounded(logvar)
    return 0.5 * (mu.square() + torch.expm1(logvar) - logvar)


def log_normal(z: Tensor, mu: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mu, exp(logvar)) summed over the last axis (the latents), in nats."""
    logvar = bounded(torch.as_tensor(logvar, dtype=z.dtype, device=z.device))
    return -0.5 * (LOG_2PI + logvar + (z - mu).square() * (-logvar).exp()).sum(-1)


def kl_sampled(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log q(z|x) − log p(z) of draws z (B, K, D): (B, K). Its mean over draws is the KL divergence.

    A single draw may be negative; the closed form is the same without the noise.
    """
    return log_normal(z, mu[:, None], logvar[:, None]) - log_normal(z)


# ── log p(x|z) ────────────────────────────────────────────────────────────────────────────────────


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x|z) of black and white pixels: x is 0 or 1, σ(logit) the probability of a 1.

        x · log σ(l) + (1 − x) · log σ(−l)  =  x · l − log(1 + e^l)

    Finite for any logit. x, logits: (…, C, H, W). Returns (…), a sum over pixels. Grey x between 0
    and 1 are taken too, as cross-entropy; that is no probability of anything any more.
    """
    cost = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -cost.flatten(-3).sum(-1)


def log_bernoulli_of_draws(x: Tensor, logits: Tensor) -> Tensor:
    """The same of pictures (B, C, H, W) and K decodings each (B, K, C, H, W): (B, K).

    Σ x · l is a product of matrices, which makes thousands of draws a third cheaper. Its gradient
    would cost more.
    """
    logits = logits.flatten(2)
    return (logits @ x.flatten(1)[..., None])[..., 0] - F.softplus(logits).sum(-1)


def log_gaussian(x: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log N(x; mean, sigma²) summed over pixels, a density. sigma is learned (2006.13202).

    x, mean: (…, C, H, W). log_sigma: (C, 1, 1). With a fixed sigma = 1 this would be a squared
    error whose balance with the KL is an accident of the scale of x.
    """
    log_sigma = bounded(log_sigma)
    squares = ((x - mean) * (-log_sigma).exp()).square()
    return -(0.5 * (squares + LOG_2PI) + log_sigma).flatten(-3).sum(-1)


def log_discretised_logistic(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of grey levels 0, 1/255 … 1: the mass of a logistic in a bin, 1701.05517, Eq. (2).

        P(x) = σ(a) − σ(b),   a, b = (x ± 1/510 − mean) / s,
             = σ(a) · σ(−b) · (1 − exp(b − a)),   which loses no digits

    The bins at 0 and 1 reach to infinity, so all 256 probabilities sum to 1. x, mean:
    (…, C, H, W); log_scale: (C, 1, 1). Returns (…), a sum over pixels.
    """
    inverse = (-bounded(log_scale)).exp()
    a, b = ((x - mean + half) * inverse for half in (1 / 510, -1 / 510))
    inside = torch.log(-torch.expm1(-inverse / 255)).expand_as(x)
    none = torch.zeros_like(a)
    first, last = x < 0.5 / 255, x > 254.5 / 255
    total = torch.where(last, none, F.logsigmoid(a)) + torch.where(first, none, F.logsigmoid(-b))
    return (total + torch.where(first | last, none, inside)).flatten(-3).sum(-1)


# ── The bounds ────────────────────────────────────────────────────────────────────────────────────


def elbo(log_px: Tensor, kl: Tensor, beta: float = 1.0, free_bits: float = 0.0) -> Tensor:
    """The evidence lower bound of each picture in nats: (B,).

    log_px: (B, K) log p(x|z) of K draws. kl: (B, D) of each latent, `kl_closed`.
    beta: weight of the KL. 1 is the bound; above 1 latents carry less and tend to mean one thing
    each (1606.05579); below 1 pictures are sharper, and it bounds nothing.
    free_bits: nats that a latent may carry at no cost (1606.04934, App. C.8), against latents
    that switch themselves off early. The paper compares the mean over a batch with the floor; here
    it is each picture's own, so that splitting a batch changes nothing.
    """
    if free_bits:
        kl = kl.clamp(min=free_bits)
    return log_px.mean(1) - beta * kl.sum(1)


def iwae(log_weights: Tensor) -> Tensor:
    """L_k of each picture, 1509.00519, Eq. (8): log of the mean of K weights, (B, K) to (B,).

    log_weights: log p(x|z) + log p(z) − log q(z|x), which is log p(x|z) − `kl_sampled`.
    """
    return torch.logsumexp(log_weights, 1) - log_weights.new_tensor(log_weights.shape[1]).log()


def beta_at(step: int, warmup: float, beta: float = 1.0) -> float:
    """The weight of the KL at a step: it rises in a straight line, to beta after `warmup` steps.

    The first step has beta / warmup (annealing of the KL: 1511.06349). Early on the decoder cannot
    use z yet, and a full KL would make the encoder give z up.
    """
    return beta * min(1.0, (step + 1) / warmup) if warmup >= 1 else beta


# ── Which latents are used ────────────────────────────────────────────────────────────────────────


def active_units(mu: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Which latents move with the picture, (D,) bool: variance of mu over pictures > threshold.

    mu: (B, D) of many pictures. 1509.00519, §5.
    """
    return mu.var(0) > threshold


def collapsed(kl: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Which latents say nothing, (D,) bool: their mean KL over pictures is below `threshold` nats.

    kl: (B, D). All of them: posterior collapse, the decoder ignores z.
    """
    return kl.mean(0) < threshold
