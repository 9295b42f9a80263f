"""Likelihood by both routes, on densities that are known."""

import math

import pytest
import torch
from peers import Timekeeper

import likelihood
from diffusion import Schedule
from exact import Mixture

DICE = torch.Generator()


@pytest.fixture
def known():
    """Three heaps in six dimensions, draws of them, and their true −ln p in nats."""
    DICE.manual_seed(0)
    centres = torch.randn(3, 6, 1, 1, dtype=torch.float64, generator=DICE)
    mixture = Mixture(centres, 0.6)
    x, _ = mixture.draw(18_000, DICE)
    return mixture, x, -mixture.log_density(x)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_variational_bound_is_within_one_percent(known, name):
    """The mean of 14,000 rows, whose own chance is 0.35 %; 4,000 others set the variances."""
    mixture, x, truth = known
    found = likelihood.bound(mixture, x, Schedule(name), False, DICE, 150, 4000).mean()
    assert found.item() == pytest.approx(truth[4000:].mean().item(), rel=0.01)


def test_bound_with_the_papers_variances_is_above_the_truth(known):
    """β̃ is too small where x̂0 is uncertain: looser, and never below."""
    mixture, x, truth = known
    schedule = Schedule("linear")
    loose = likelihood.bound(mixture, x[:3000], schedule, False, DICE, 150).mean()
    assert loose > truth[:3000].mean() + 0.5


@pytest.mark.parametrize("name", ["linear", "cosine", "zero-snr", "flow"])
def test_probability_flow_is_within_one_percent(known, name):
    mixture, x, truth = known
    x, truth = x[:4000], truth[:4000]
    found = likelihood.flow_nll(mixture, x, Schedule(name), 40, DICE)
    assert found.mean().item() == pytest.approx(truth.mean().item(), rel=0.01)


def test_probability_flow_is_right_row_by_row(known):
    """With all axes as probes nothing is left to chance."""
    mixture, x, truth = known
    found = likelihood.flow_nll(mixture, x[:200], Schedule("cosine"), 60, n_probe=0)
    torch.testing.assert_close(found, truth[:200], rtol=0, atol=0.1)


def test_terms_drawn_in_the_place_of_all_add_up_to_the_same():
    """The weights of drawn terms make a sum over all: Σ 1 = T − 1, in the mean of many draws."""
    schedule, totals = Schedule("linear"), []
    for seed in range(300):
        steps, counts = likelihood.chosen_terms(schedule, 50, torch.Generator().manual_seed(seed))
        assert steps.min() >= 1 and steps.max() <= 999
        totals.append((counts * (steps < 200)).sum().item())
    assert sum(totals) / len(totals) == pytest.approx(199, rel=0.02)
    steps, counts = likelihood.chosen_terms(schedule, 0, None)
    assert steps.tolist() == list(range(1, 1000)) and (counts == 1).all()


def test_divergence_of_a_matrix_is_its_trace():
    """f(x) = M x. All axes are exact; one random probe is right in the mean."""
    matrix = torch.randn(5, 5, dtype=torch.float64)
    x = torch.randn(4000, 5, 1, 1, dtype=torch.float64, requires_grad=True)
    slope = (x.flatten(1) @ matrix.T).view_as(x)
    exactly = likelihood.divergence(slope, x, likelihood.all_axes(x))
    torch.testing.assert_close(exactly, matrix.trace().expand(4000))
    sign = torch.randint(2, x.shape) * 2.0 - 1
    once = likelihood.divergence(slope, x, [sign.double()])
    assert once.mean().item() == pytest.approx(matrix.trace().item(), abs=0.3)


def test_masses_of_the_levels_add_up_to_one():
    """All 256 levels of a pixel, whatever the mean: Eq. 13 of arXiv:2006.11239."""
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-1.3, 0.0, 0.99):
        mass = likelihood.level_log_mass(levels, torch.tensor(mean), torch.tensor(0.05).double())
        assert mass.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_bits_per_dim_by_hand():
    """64 pixels at ln 256 nats each are 8 bits; a density of ½ over −1 … 1 is 8 bits too."""
    nats = torch.tensor([64 * math.log(256)])
    shape = torch.Size((1, 1, 8, 8))
    assert likelihood.bits_per_dim(nats, shape, False).item() == pytest.approx(8)
    flat = torch.tensor([64 * math.log(2)])
    assert likelihood.bits_per_dim(flat, shape, True).item() == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_every_look_is_told_the_time_of_its_noise(known, name):
    """A network answers for the time that it is told; the exact denoiser would not notice."""
    mixture, x, _ = known
    schedule = Schedule(name)
    predict = Timekeeper(schedule, mixture)
    likelihood.bound(predict, x[:2], schedule, False, DICE, 5)
    likelihood.flow_nll(predict, x[:2], schedule, 5, DICE)
    assert predict.n_look >= 6 + 11 and predict.n_wrong == 0


def test_bound_counts_the_signal_that_is_left_at_the_end(known):
    """100 of the linear steps leave α = 0.6, so the noisy end alone costs 1.6 nats: Eq. 5's L_T."""
    mixture, x, truth = known
    schedule = Schedule("linear", 100)
    found = likelihood.bound(mixture, x[:3000], schedule, False, DICE, 0, 1000).mean()
    assert truth[1000:3000].mean() < found < truth[1000:3000].mean() + 1


def test_bound_of_pictures_is_their_entropy():
    """Four pictures, equally often: ln 4 nats, for a denoiser that knows them."""
    levels = torch.randint(256, (4, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    pictures = levels.double() / 127.5 - 1
    x = pictures.repeat(200, 1, 1, 1)
    found = likelihood.bound(Mixture(pictures), x, Schedule("linear"), True, DICE, 0, 200).mean()
    assert found.item() == pytest.approx(math.log(4), rel=0.02)
