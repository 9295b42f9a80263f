"""The process: schedules, forward steps, targets, weights; by hand, by chance and by diffusers."""

import math

import pytest
import torch
from peers import assert_near, float64, same_tables

from diffusion import (
    SCHEDULES,
    TARGETS,
    Schedule,
    clipped,
    cosine_betas,
    linear_betas,
    loss_per_row,
    posterior,
    q_sample,
    target_of,
    to_x0_eps,
    weight,
    zero_terminal_snr,
)
from sources import to_bytes, to_unit

PLACES = [1, 10, 400, 998]


def pair(shape=(3, 1, 4, 4)):
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("linear", {}),
        ("cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        ("zero-snr", {"rescale_betas_zero_snr": True}),
    ],
)
def test_schedules_are_those_of_diffusers(name, theirs):
    diffusers = pytest.importorskip("diffusers")
    there, ours = diffusers.DDPMScheduler(**theirs), Schedule(name)
    if name == "zero-snr":  # their float32 table is 2e-6 off, so their function gets float64
        there.betas = diffusers.schedulers.scheduling_ddpm.rescale_zero_terminal_snr(
            linear_betas(1000)
        )
        there.alphas_cumprod = (1 - there.betas).cumprod(0)
    torch.testing.assert_close(ours.betas, there.betas.double(), rtol=0, atol=1e-6)
    bar = there.alphas_cumprod.double()
    torch.testing.assert_close(ours.alpha**2, bar, rtol=0, atol=1e-6)
    x0, noise = pair()
    times = torch.tensor([0, 500, 998])
    there = float64(there)
    wanted = there.add_noise(x0, noise, times)
    assert_near(q_sample(x0, noise, *same_tables(there).at(times)), wanted)
    assert_near(q_sample(x0, noise, *ours.at(times)), wanted)


def test_cosine_schedule_by_hand():
    """Eq. 17 of arXiv:2102.09672 for T = 2: ᾱ = f(t)/f(0), f(t) = cos²((t/2 + s)/(1 + s) π/2)."""
    f = [math.cos((t / 2 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(3)]
    wanted = [1 - f[1] / f[0], 0.999]  # the last would be 1 and is held at 0.999
    assert cosine_betas(2).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_falls_and_noise_rises(name):
    schedule = Schedule(name)
    assert (schedule.alpha.diff() < 0).all() and (schedule.sigma.diff() > 0).all()
    total = (
        schedule.alpha + schedule.sigma if name == "flow" else schedule.alpha**2 + schedule.sigma**2
    )
    torch.testing.assert_close(total, torch.ones_like(total))


def test_zero_terminal_snr_leaves_no_signal():
    """The first step stays as it was; the linear schedule still has α = 0.006 at its end."""
    betas = zero_terminal_snr(linear_betas(1000))
    assert betas[0] == pytest.approx(1e-4) and betas[-1] == 1
    assert Schedule("zero-snr").alpha[-1] == 0
    assert Schedule("linear").alpha[-1].item() == pytest.approx(0.00635, abs=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no schedule 'sigmoid'"):
        Schedule("sigmoid")
    with pytest.raises(ValueError, match="no target 'score'"):
        target_of("score", *pair(), 0.5, 0.5)


def test_posterior_is_that_of_diffusers():
    """Mean and variance, one step and several, with x0 at hand; variance_type fixed_small."""
    diffusers = pytest.importorskip("diffusers")
    there = float64(diffusers.DDPMScheduler(prediction_type="sample", clip_sample=False))
    schedule, (x0, x) = same_tables(there), pair()
    for t in PLACES:
        mean, variance = posterior(x0, x, schedule.alpha[t], schedule.alpha[t - 1])
        dice = torch.Generator().manual_seed(3)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        stepped = there.step(x0, t, x, generator=dice).prev_sample
        assert_near(mean + variance.sqrt() * noise, stepped)
        assert variance.item() == pytest.approx(there._get_variance(t).item(), rel=1e-6)


def test_posterior_variance_table_in_float64():
    """β̃_t = (1 − ᾱ_{t−1}) / (1 − ᾱ_t) β_t at every t: Eq. 7 of arXiv:2006.11239. 0 at the end."""
    betas = linear_betas(1000)
    bar = (1 - betas).cumprod(0)
    schedule, x = Schedule("linear"), torch.zeros(1, 1, dtype=torch.float64)
    for t in range(1, 1000):
        wanted = (1 - bar[t - 1]) / (1 - bar[t]) * betas[t]
        found = posterior(x, x, schedule.alpha[t], schedule.alpha[t - 1])[1]
        assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    mean, variance = posterior(x + 0.3, x + 0.7, schedule.alpha[0], 1.0)
    assert variance.item() == 0 and mean.item() == pytest.approx(0.3)


def test_posterior_by_chance():
    """Two noisings in a row: x_s given x_t near 0.5 has the mean and variance that Bayes says."""
    schedule, x0 = Schedule("linear"), 0.8
    s, t = 100, 160
    dice = torch.Generator().manual_seed(0)
    n = 400_000
    x_s = schedule.alpha[s] * x0 + schedule.sigma[s] * torch.randn(n, generator=dice).double()
    ratio = schedule.alpha[t] / schedule.alpha[s]
    fresh = (schedule.sigma[t] ** 2 - (ratio * schedule.sigma[s]) ** 2).sqrt()
    x_t = ratio * x_s + fresh * torch.randn(n, generator=dice).double()
    near = (x_t - 0.5).abs() < 0.01
    data = torch.full((1, 1), x0, dtype=torch.float64)
    mean, variance = posterior(
        data, torch.full_like(data, 0.5), schedule.alpha[t], schedule.alpha[s]
    )
    assert near.sum() > 3000
    assert x_s[near].mean().item() == pytest.approx(mean.item(), abs=0.02)
    assert x_s[near].var().item() == pytest.approx(variance.item(), rel=0.08)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_answers_and_targets_are_two_ways(target, name):
    """From (x0, ε) to the target and back, at every kind of noise level."""
    schedule, (x0, eps) = Schedule(name), pair()
    for t in (0, 300, 900):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        x = q_sample(x0, eps, alpha, sigma)
        out = target_of(target, x0, eps, alpha, sigma)
        torch.testing.assert_close(to_x0_eps(target, out, x, alpha, sigma), (x0, eps))


@pytest.mark.parametrize(("target", "theirs"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_conversions_are_those_of_diffusers(target, theirs):
    diffusers = pytest.importorskip("diffusers")
    there = float64(diffusers.DDIMScheduler(prediction_type=theirs, clip_sample=False))
    there.set_timesteps(1000)
    schedule, (x, out) = same_tables(there), pair()
    for t in PLACES[:3]:
        x0, _ = to_x0_eps(target, out, x, schedule.alpha[t], schedule.sigma[t])
        wanted = there.step(out, t, x).pred_original_sample
        assert_near(x0, wanted)
    if target == "v":
        noise, times = torch.randn_like(x), torch.tensor([5, 500, 990])
        wanted = there.get_velocity(x, noise, times)
        assert_near(target_of("v", x, noise, *schedule.at(times)), wanted)


def test_v_at_pure_noise_still_tells_the_data():
    """With zero terminal SNR x is the noise and v = −x0: nothing is divided by zero."""
    x0, eps = pair()
    found, noise = to_x0_eps("v", -x0, eps, 0.0, 1.0)
    assert torch.equal(found, x0) and torch.equal(noise, eps)


def test_clipping_derives_the_noise_anew():
    """x0 = 2 from x = 1.9 at α = 0.8, σ = 0.6: held at 1, so ε = (1.9 − 0.8) / 0.6."""
    x = torch.tensor([[1.9]], dtype=torch.float64)
    x0, eps = clipped(torch.tensor([[2.0]], dtype=torch.float64), x, 0.8, 0.6)
    assert x0.item() == 1 and eps.item() == pytest.approx(1.1 / 0.6)
    torch.testing.assert_close(q_sample(x0, eps, 0.8, 0.6), x)


@pytest.mark.parametrize(("target", "formula"), [
    ("eps", lambda snr: min(snr, 5) / snr),
    ("x0", lambda snr: min(snr, 5)),
    ("v", lambda snr: min(snr, 5) / (snr + 1)),
])  # fmt: skip
def test_min_snr_weights_are_those_of_the_paper(target, formula):
    """§3.4 of arXiv:2303.09556 and its appendix for v."""
    schedule = Schedule("cosine")
    for t in (3, 300, 700, 990):
        alpha, sigma = schedule.alpha[t], schedule.sigma[t]
        snr = float((alpha / sigma) ** 2)
        assert weight(target, alpha, sigma, 5.0).item() == pytest.approx(formula(snr))
        assert weight(target, alpha, sigma, 0.0).item() == 1


def test_weighted_losses_of_all_targets_are_one_loss():
    """With min-SNR weights an error of x0 costs the same, whatever was asked for."""
    (x0, eps), (guess, _) = pair(), pair()
    for name, targets in (("linear", ("eps", "x0", "v")), ("flow", ("flow", "x0"))):
        alpha, sigma = Schedule(name).at(torch.tensor([50, 500, 900]))
        x, found = q_sample(x0, eps, alpha, sigma), []
        noise = (x - alpha.view(-1, 1, 1, 1) * guess) / sigma.view(-1, 1, 1, 1)
        for target in targets:
            out, wanted = (target_of(target, *z, alpha, sigma) for z in ((guess, noise), (x0, eps)))
            found.append(loss_per_row(out, wanted) * weight(target, alpha, sigma, 5.0))
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=1e-5, atol=1e-5)


def test_bytes_come_back_to_the_byte():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_unit(every)
    assert x.min() == -1 and x.max() == 1 and torch.equal(to_bytes(x), every)
    assert torch.equal(to_bytes(x.double()), every)
