"""Importance sampling and annealing against log p(x) where it is known exactly."""

import pytest
import torch

import experiments
import likelihood
import ppca


@pytest.fixture(scope="module")
def model():
    """A linear model whose q cannot be the true posterior, and 30 points."""
    x = ppca.data(200)
    return experiments.turned(x), x[:30]


def exact(model, x):
    sigma2 = (2 * model.log_sigma).exp()
    return ppca.log_density(x, model.weight, model.bias, sigma2).detach()


def test_importance_sampling_finds_log_p(model):
    model, x = model
    dice = torch.Generator().manual_seed(0)
    found = likelihood.importance(model, x, 5000, dice)
    torch.testing.assert_close(found, exact(model, x), rtol=0, atol=0.05)


def test_elbo_below_iwae_below_log_p(model):
    """In the mean over points and draws, for growing k."""
    model, x = model
    dice = torch.Generator().manual_seed(0)
    truth, elbo = exact(model, x).mean().item(), model.elbo(x).mean().item()
    bounds = []
    for k in (1, 4, 16, 256):
        each = [likelihood.importance(model, x, k, dice).mean().item() for _ in range(512 // k)]
        bounds.append(sum(each) / len(each))
    assert elbo < truth - 0.05  # there is something to gain
    assert bounds[0] == pytest.approx(elbo, abs=0.03)  # L_1 is the ELBO
    assert bounds == sorted(bounds) and bounds[-1] < truth + 0.01


@pytest.mark.parametrize("at_once", [1, 30, 77, 100_000])
def test_how_many_draws_are_decoded_together_does_not_matter(model, at_once):
    """Other dice, as good an estimate: within its noise, whatever divides k or does not."""
    model, x = model
    dice = torch.Generator().manual_seed(0)
    found = likelihood.importance(model, x, 1000, dice, at_once)
    torch.testing.assert_close(found, exact(model, x), rtol=0, atol=0.15)


def test_annealing_finds_log_p_without_the_encoder(model):
    model, x = model
    dice = torch.Generator().manual_seed(0)
    shape = (8, 32, 4)
    found = likelihood.annealed(
        lambda z: model.log_likelihood(x[:8], z), shape, 150, dice=dice, dtype=x.dtype
    )
    torch.testing.assert_close(found, exact(model, x[:8]), rtol=0, atol=0.25)


def test_annealing_of_a_decoder_that_ignores_z_is_exact():
    found = likelihood.annealed(lambda z: z.sum(-1) * 0 - 7.5, (3, 4, 2), 10)
    torch.testing.assert_close(found, torch.full((3,), -7.5).double())


def test_temperatures_rise_from_0_to_1():
    t = likelihood.temperatures(20)
    assert (t[0], t[-1], len(t)) == (0, 1, 21) and (t.diff() > 0).all()


def test_hamiltonian_moves_leave_the_distribution_as_it_is():
    """Chains drawn from N(0, I) stay so: p(z) alone, and p(z) p(x|z) = N(0, ½) for a normal x|z."""
    dice, size = torch.Generator().manual_seed(0), torch.full((1, 1, 1), 0.7)
    z = torch.randn(1, 4000, 1, generator=dice)
    for _ in range(5):
        z, accepted = likelihood.hamiltonian(lambda z: z.sum(-1) * 0, z, 1.0, size, 3, dice)
    assert z.var().item() == pytest.approx(1, abs=0.1) and accepted.float().mean() > 0.5
    z = z * 0.5**0.5
    for _ in range(5):
        z, _ = likelihood.hamiltonian(lambda z: -0.5 * z.square().sum(-1), z, 1.0, size, 3, dice)
    assert z.var().item() == pytest.approx(0.5, abs=0.05)
