"""The exact denoiser, the floor of the loss, memorisation, and the toys."""

import pytest
import torch

import exact
import toys
from diffusion import TARGETS, Schedule
from exact import Mixture


def two_points(labels=None):
    centres = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    return Mixture(centres, 0.0, labels)


def test_two_points_by_hand():
    """Data −1 and 1: E[x0 | x] = tanh(α x / σ²)."""
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = 0.8, 0.6
    wanted = torch.tanh(alpha * x / sigma**2)
    torch.testing.assert_close(two_points().denoise(x, alpha, sigma), wanted)


def test_one_heap_by_hand():
    """N(μ, s²): E[x0 | x] = μ + α s² (x − α μ) / (α² s² + σ²)."""
    mixture = Mixture(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.3)
    x = torch.tensor([1.2], dtype=torch.float64).view(1, 1, 1, 1)
    wanted = 0.5 + 0.8 * 0.09 * (1.2 - 0.4) / (0.64 * 0.09 + 0.36)
    assert mixture.denoise(x, 0.8, 0.6).item() == pytest.approx(wanted)


def test_score_is_the_slope_of_the_density():
    """∇ ln p by torch's autograd, at every kind of noise level."""
    mixture = toys.mixture("moons")
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    for place in (10, 300, 900):
        alpha, sigma = Schedule("cosine").at(torch.tensor([place] * 5))
        (slope,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
        torch.testing.assert_close(mixture.score(x.detach(), alpha, sigma), slope)


def test_density_adds_up_to_one():
    mixture = toys.mixture("spiral")
    line = torch.linspace(-2, 2, 400, dtype=torch.float64)
    x, y = torch.meshgrid(line, line, indexing="xy")
    points = torch.stack([x, y], dim=2).view(-1, 2, 1, 1)
    total = mixture.log_density(points).exp().sum() * (line[1] - line[0]) ** 2
    assert total.item() == pytest.approx(1, abs=1e-3)


def test_no_other_guess_is_better():
    """Shifted or shrunk, the exact denoiser has a larger error: it is the mean given x."""
    mixture, dice = toys.mixture("moons"), torch.Generator().manual_seed(0)
    x0, _ = mixture.draw(20_000, dice)
    x = 0.8 * x0 + 0.6 * torch.randn(x0.shape, generator=dice)
    guess = mixture.denoise(x, 0.8, 0.6)
    best = (guess - x0).square().mean()
    for other in (0.95 * guess, 1.05 * guess, guess + 0.05, x, 0 * x):
        assert (other - x0).square().mean() > best


def test_classes_make_the_denoiser_surer():
    """With its label known, each of the two points is known: the floor is 0."""
    time, schedule = torch.tensor([500]), Schedule("linear")
    labelled = two_points(torch.tensor([0, 1]))
    assert exact.floor(labelled, schedule, time, "x0", 500) < 1e-20
    assert exact.floor(two_points(), schedule, time, "x0", 500) > 0.1


@pytest.mark.parametrize("name", ["linear", "flow"])
def test_floors_of_all_targets_are_one_floor(name):
    """An error of the target is d/σ as large as that of x0, see `to_x0_eps`."""
    schedule, mixture = Schedule(name), toys.mixture("fish")
    times = torch.tensor([100, 500])
    alpha, sigma = schedule.at(times)
    floors = {t: exact.floor(mixture, schedule, times, t, 300) for t in TARGETS}
    torch.testing.assert_close(floors["eps"], floors["x0"] * (alpha / sigma) ** 2)
    d = alpha + sigma
    torch.testing.assert_close(floors["flow"], floors["x0"] * (d / sigma) ** 2)


def test_floor_of_a_heap_by_hand():
    """N(0, s²): what is left of x0 is s² σ² / (α² s² + σ²)."""
    mixture = Mixture(torch.zeros(1, 3, 1, 1, dtype=torch.float64), 0.5)
    schedule, time = Schedule("linear"), torch.tensor([400])
    alpha, sigma = schedule.at(time)
    wanted = 0.25 * sigma**2 / (alpha**2 * 0.25 + sigma**2)
    found = exact.floor(mixture, schedule, time, "x0", 20_000)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)


def test_copies_are_found_and_new_rows_are_not():
    training, fresh, new = torch.randn(3, 60, 1, 4, 4).unbind(0)
    copies = training[:20] + 0.01 * torch.randn(20, 1, 4, 4)
    found = exact.memorisation(copies, training, fresh)
    assert found["memorised"] == 1 and found["distance"] < 0.05
    found = exact.memorisation(new, training, fresh)
    assert found["memorised"] == 0 and found["distance"] == pytest.approx(1, abs=0.15)


def test_samples_of_the_exact_denoiser_are_copies():
    """Why a network must be worse than the best: a finite set's own denoiser repeats it."""
    from samplers import dpmpp, make_grid

    training = torch.rand(30, 1, 4, 4, dtype=torch.float64) * 2 - 1
    x = torch.randn(50, 1, 4, 4, dtype=torch.float64)
    samples = dpmpp(Mixture(training), x, make_grid(Schedule("cosine"), 50))
    assert exact.memorisation(samples, training, torch.randn(50, 1, 4, 4))["memorised"] == 1


@pytest.mark.parametrize("name", toys.DRAW)
def test_toys_fit_the_square_and_draw_what_they_say(name):
    mixture = toys.mixture(name)
    assert mixture.centres.abs().max() <= 1.0 + 1e-6 and mixture.centres.shape[1:] == (2, 1, 1)
    x, labels = mixture.draw(500, torch.Generator().manual_seed(0))
    nearest, _ = exact.two_nearest(x, mixture.centres)
    assert nearest[:, 0].max() < 5 * toys.SPREADS[name] and len(labels) == 500
    assert labels.unique().tolist() == mixture.labels.unique().tolist()


def test_checkerboard_is_half_full():
    centres = toys.checkerboard()[0]
    dark = ((2 * centres).floor().sum(1) % 2 == 0).double().mean()
    assert len(centres) == 800 and dark == 1


def test_copies_by_hand():
    """Between training rows 0 and 4: 0.9 is 0.9/3.1 as far from the nearer, 1.1 is 1.1/2.9."""
    training, fresh = (torch.tensor(z).view(-1, 1, 1, 1) for z in ([0.0, 4.0], [1.0, 1.1]))
    found = exact.memorisation(torch.tensor([0.9, 1.1]).view(-1, 1, 1, 1), training, fresh)
    assert found["memorised"] == 0.5 and found["memorised_real"] == 0
    assert found["distance"] == pytest.approx(1.0 / 1.05)
