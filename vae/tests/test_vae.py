"""The idea: vae.py against torch.distributions, by hand, and at its edges."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import vae


@pytest.fixture
def q():
    """mu, logvar (7, 5) and draws z (7, 3, 5), in float64."""
    mu, logvar = torch.randn(2, 7, 5, dtype=torch.float64)
    eps = torch.randn(7, 3, 5, dtype=torch.float64)
    return mu, logvar, vae.reparameterise(mu, logvar, eps)


def test_kl_by_hand():
    """mu = 1, sigma² = 4: ½ (1 + 4 − 1 − ln 4) = ½ (4 − 1.386) = 1.307."""
    kl = vae.kl_closed(torch.tensor([1.0]), torch.tensor([math.log(4)]))
    assert kl.item() == pytest.approx(2 - math.log(2), abs=1e-6)


def test_elbo_by_hand():
    """Two pixels 1 and 0 at logits 0: 2 · ln ½ = −1.386. One latent as above: −1.386 − 1.307."""
    x = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    log_px = vae.log_bernoulli(x[:, None], torch.zeros(1, 1, 1, 1, 2))
    kl = vae.kl_closed(torch.tensor([[1.0]]), torch.tensor([[math.log(4)]]))
    assert vae.elbo(log_px, kl).item() == pytest.approx(-2 * math.log(2) - 2 + math.log(2))


def test_kl_is_that_of_torch_distributions(q):
    mu, logvar, _ = q
    theirs = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(vae.kl_closed(mu, logvar), theirs, rtol=0, atol=1e-12)


def test_kl_is_never_negative_and_zero_only_for_the_prior():
    """The sign is the bug of AntixK's PyTorch-VAE, issue 68."""
    steps = torch.arange(-30, 31)
    mu, logvar = torch.meshgrid(steps / 10, steps / 3, indexing="ij")
    kl = vae.kl_closed(mu, logvar)
    assert (kl >= 0).all()
    zero = (kl == 0).nonzero()
    assert zero.tolist() == [[30, 30]] and mu[30, 30] == logvar[30, 30] == 0
    assert vae.kl_closed(torch.tensor(0.0), torch.tensor(1e-4)).item() == pytest.approx(
        2.5e-9, rel=1e-3  # ¼ logvar²: 1 + logvar − 1 in float32 would give 0
    )  # fmt: skip


@pytest.mark.parametrize("value", [-29.0, -12.0, 12.0, 19.0])
def test_only_absurd_logvars_are_bounded(value):
    """Inside −30 … 20 the KL at mu = 0 is ½ (e^logvar − 1 − logvar), to the last digit."""
    logvar = torch.tensor([value], dtype=torch.float64)
    wanted = 0.5 * (math.exp(value) - 1 - value)
    assert vae.kl_closed(torch.zeros(1), logvar).item() == pytest.approx(wanted, rel=1e-12)


def test_log_normal_is_that_of_torch_distributions(q):
    mu, logvar, z = q
    theirs = Normal(mu[:, None], (logvar / 2).exp()[:, None]).log_prob(z).sum(-1)
    torch.testing.assert_close(vae.log_normal(z, mu[:, None], logvar[:, None]), theirs)
    torch.testing.assert_close(vae.log_normal(z), Normal(0.0, 1.0).log_prob(z).sum(-1))


def test_sampled_kl_has_the_closed_one_as_its_mean():
    """Within 5 standard errors of 100,000 draws."""
    mu, logvar = torch.randn(2, 2, 4, dtype=torch.float64)
    eps = torch.randn(2, 100_000, 4, dtype=torch.float64)
    sampled = vae.kl_sampled(vae.reparameterise(mu, logvar, eps), mu, logvar)
    error = 5 * sampled.std(1) / math.sqrt(100_000)
    assert ((sampled.mean(1) - vae.kl_closed(mu, logvar).sum(1)).abs() < error).all()


def test_draws_have_the_mean_and_variance_that_they_should():
    mu, logvar = torch.tensor([[2.0]]), torch.tensor([[math.log(9.0)]])
    z = vae.reparameterise(mu, logvar, torch.randn(1, 200_000, 1))
    assert z.mean().item() == pytest.approx(2, abs=0.05)
    assert z.std().item() == pytest.approx(3, abs=0.05)


def test_gradients_reach_mu_and_logvar_through_a_draw():
    """dz/dmu = 1 and dz/dlogvar = ½ sigma eps; by drawing alone both would be 0."""
    mu, logvar = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    vae.reparameterise(mu, logvar, torch.full((1, 1, 1), 3.0)).sum().backward()
    assert (mu.grad.item(), logvar.grad.item()) == (1.0, 1.5)


# ── Likelihoods ───────────────────────────────────────────────────────────────────────────────────


def test_bernoulli_is_that_of_torch_distributions():
    logits = 5 * torch.randn(4, 2, 3, 5, 6, dtype=torch.float64)
    x = torch.rand_like(logits).round()
    theirs = Bernoulli(logits=logits).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(vae.log_bernoulli(x, logits), theirs)


def test_many_draws_of_a_picture_score_as_each_alone():
    logits = 9 * torch.randn(4, 7, 3, 5, 6, dtype=torch.float64)
    x = torch.rand(4, 3, 5, 6, dtype=torch.float64).round()
    wanted = vae.log_bernoulli(x[:, None], logits)
    torch.testing.assert_close(vae.log_bernoulli_of_draws(x, logits), wanted)
    assert vae.log_bernoulli_of_draws(x, 1e6 * logits).isfinite().all()


def test_gaussian_is_that_of_torch_distributions():
    x, mean = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64)
    log_sigma = torch.randn(3, 1, 1, dtype=torch.float64)
    theirs = Normal(mean, log_sigma.exp()).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(vae.log_gaussian(x, mean, log_sigma), theirs)


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -1.0, 2.0])
@pytest.mark.parametrize("mean", [-0.5, 0.0, 0.31, 1.0])
def test_discretised_logistic_is_a_distribution_over_256_levels(mean, log_scale):
    levels = (torch.arange(256, dtype=torch.float64) / 255).view(256, 1, 1, 1)
    mean = torch.full_like(levels, mean)
    p = vae.log_discretised_logistic(levels, mean, torch.full((1, 1, 1), log_scale).double())
    assert p.isfinite().all() and p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_discretised_logistic_is_the_difference_of_two_sigmoids():
    """Level 128 of 255 with mean ½ and s = 0.1: σ(0.0392) − σ(0) = 0.0098."""
    x = torch.full((1, 1, 1, 1), 128 / 255, dtype=torch.float64)
    found = vae.log_discretised_logistic(x, torch.full_like(x, 0.5), torch.tensor(0.1).log())
    a, b = ((128 / 255 - 0.5 + half) / 0.1 for half in (1 / 510, -1 / 510))
    wanted = 1 / (1 + math.exp(-a)) - 1 / (1 + math.exp(-b))
    assert found.exp().item() == pytest.approx(wanted, rel=1e-6)
    assert wanted == pytest.approx(0.0098, abs=1e-4)


# ── Bounds ────────────────────────────────────────────────────────────────────────────────────────


def log_p_and_q(x, z, mu, logvar, logits):
    """The same bound from torch.distributions alone, (B, K)."""
    p = Bernoulli(logits=logits).log_prob(x[:, None].expand_as(logits)).sum((-3, -2, -1))
    prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    return p, prior - Normal(mu[:, None], (logvar / 2).exp()[:, None]).log_prob(z).sum(-1)


def test_elbo_is_that_of_torch_distributions(q):
    """Summed over pixels and latents and not averaged: AntixK's lines 140 to 145 are the bug."""
    mu, logvar, z = q
    x = torch.rand(7, 1, 4, 4, dtype=torch.float64).round()
    logits = torch.randn(7, 3, 1, 4, 4, dtype=torch.float64)
    p, _ = log_p_and_q(x, z, mu, logvar, logits)
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(1)
    found = vae.elbo(vae.log_bernoulli(x[:, None], logits), vae.kl_closed(mu, logvar))
    torch.testing.assert_close(found, p.mean(1) - kl)


def test_iwae_is_the_log_of_a_mean_of_ratios(q):
    mu, logvar, z = q
    x = torch.rand(7, 1, 2, 2, dtype=torch.float64).round()
    logits = torch.randn(7, 3, 1, 2, 2, dtype=torch.float64)
    p, ratio = log_p_and_q(x, z, mu, logvar, logits)
    log_w = vae.log_bernoulli(x[:, None], logits) - vae.kl_sampled(z, mu, logvar)
    wanted = (p + ratio).exp().mean(1).log()
    torch.testing.assert_close(vae.iwae(log_w), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(vae.iwae(log_w[:, :1]), log_w[:, 0])  # L_1 is the ELBO


def test_iwae_grows_with_k():
    log_w = torch.randn(1, 64, dtype=torch.float64).expand(1, -1)
    bounds = [vae.iwae(log_w.view(-1, k)).mean().item() for k in (1, 2, 4, 8, 16, 32, 64)]
    assert bounds == sorted(bounds) and bounds[0] < bounds[-1]


def test_iwae_survives_weights_that_would_overflow():
    assert vae.iwae(torch.tensor([[-2000.0, -2001.0], [3000.0, -3000.0]])).tolist() == (
        pytest.approx([-2000 + math.log((1 + math.exp(-1)) / 2), 3000 - math.log(2)])
    )


def test_beta_and_free_bits_by_hand():
    """KL 0.2 and 2.0: beta 4 costs 8.8; a floor of 0.5 nats each costs 2.5."""
    log_px, kl = torch.zeros(1, 1), torch.tensor([[0.2, 2.0]])
    assert vae.elbo(log_px, kl, beta=4).item() == pytest.approx(-8.8)
    assert vae.elbo(log_px, kl, free_bits=0.5).item() == pytest.approx(-2.5)


def test_free_bits_give_a_latent_below_the_floor_no_gradient():
    kl = torch.tensor([[0.2, 2.0]], requires_grad=True)
    vae.elbo(torch.zeros(1, 1), kl, free_bits=0.5).sum().backward()
    assert kl.grad.tolist() == [[0.0, -1.0]]


def test_beta_rises_in_a_straight_line():
    assert [vae.beta_at(step, 4, 2.0) for step in range(6)] == [0.5, 1, 1.5, 2, 2, 2]
    assert vae.beta_at(0, 0) == 1


@pytest.mark.parametrize("value", [-100.0, 100.0, -1e30, 1e30])
def test_any_logvar_is_finite_forward_and_backward(value):
    """exp(100) does not fit into float32: the pitfall of synthcity 331 and WorldModels 9."""
    mu = torch.tensor([[0.5]], requires_grad=True)
    logvar = torch.tensor([[value]], requires_grad=True)
    z = vae.reparameterise(mu, logvar, torch.randn(1, 4, 1))
    log_px = vae.log_bernoulli(torch.ones(1, 1, 1, 1, 1), z.view(1, 4, 1, 1, 1))
    for bound in (vae.elbo(log_px, vae.kl_closed(mu, logvar)),
                  vae.iwae(log_px - vae.kl_sampled(z, mu, logvar))):  # fmt: skip
        grads = torch.autograd.grad(bound.sum(), (mu, logvar), retain_graph=True)
        assert bound.isfinite().all() and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("value", [-1e4, 1e4])
def test_any_logit_and_scale_is_finite(value):
    x = torch.tensor([0.0, 1.0, 0.5]).view(3, 1, 1, 1)
    where, scale = torch.full_like(x, value), torch.full((1, 1, 1), value)
    assert vae.log_bernoulli(x, where).isfinite().all()
    assert vae.log_gaussian(x, x, scale).isfinite().all()
    for wide in (scale, torch.zeros(1, 1, 1)):
        assert vae.log_discretised_logistic(x, where / 1e4, wide).isfinite().all()


# ── Collapse ──────────────────────────────────────────────────────────────────────────────────────


def test_active_and_collapsed_latents_are_told_apart():
    """Latent 0 moves with the picture, latent 1 is the prior whatever the picture."""
    mu = torch.tensor([[-1.0, 0.001], [1.0, -0.001], [0.5, 0.0]])
    logvar = torch.tensor([[-2.0, 0.0]] * 3)
    assert vae.active_units(mu).tolist() == [True, False]
    assert vae.collapsed(vae.kl_closed(mu, logvar)).tolist() == [False, True]


def test_variances_and_means_over_pictures_are_compared_with_the_threshold():
    """mu = ±0.05: variance 0.005 is silent, at a deviation of 0.07. KL 0 and 0.1: mean 0.05."""
    assert vae.active_units(torch.tensor([[0.05], [-0.05]])).tolist() == [False]
    assert vae.collapsed(torch.tensor([[0.0], [0.1]])).tolist() == [False]
    assert vae.collapsed(torch.tensor([[0.0], [0.01]])).tolist() == [True]
