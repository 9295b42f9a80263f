"""Grids, steps back, guidance: by exact answers, by chance and by diffusers."""

import pytest
import torch
from peers import Timekeeper, assert_near, float64, same_tables
from torch.utils._python_dispatch import TorchDispatchMode

import orders
from diffusion import Schedule, q_sample
from exact import Mixture
from samplers import (
    FLOWS,
    SAMPLERS,
    SPACINGS,
    Denoiser,
    Grid,
    ddim,
    ddpm,
    dpmpp,
    flow,
    make_grid,
    midpoint,
    timesteps,
)

COUNTS = (1, 7, 13, 50, 999, 1000)


def oracle(x0, eps):
    """A `predict` that knows where x came from."""
    return lambda x, time, alpha, sigma: (x0, eps)


def honest(x0):
    """A `predict` that knows the data and reads the noise off x."""
    return lambda x, time, alpha, sigma: (x0, (x - alpha * x0) / sigma)


# ── Grids ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_step", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_fall_from_the_last_step_to_the_data(spacing, n_step):
    """All different, in range; each step's end is the next step's start; the end is α = 1."""
    schedule = Schedule("linear")
    times = timesteps(1000, n_step, spacing)
    assert len(times) == n_step and (times.diff() < 0).all() and 0 <= times[-1]
    if spacing != "leading":
        assert times[0] == 999
    grid = make_grid(schedule, n_step, spacing)
    assert torch.equal(grid.alpha[:-1], schedule.alpha[times])
    assert grid.alpha[-1] == 1 and grid.sigma[-1] == 0


def test_leading_grid_never_reaches_the_noise():
    """Why it is not the default: with 50 steps it begins at step 980 of 999."""
    assert timesteps(1000, 50, "leading")[0] == 980 and timesteps(1000, 50, "trailing")[0] == 999


@pytest.mark.parametrize("n_step", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_grids_are_those_of_diffusers(spacing, n_step):
    diffusers = pytest.importorskip("diffusers")
    there = diffusers.DDIMScheduler(timestep_spacing=spacing)
    there.set_timesteps(n_step)
    ours, theirs = timesteps(1000, n_step, spacing), there.timesteps
    if (spacing, n_step) == ("linspace", 1):
        assert ours.tolist() == [999] and theirs.tolist() == [0]  # theirs takes noise for data
        return
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("n_step", [0, 1001])
def test_steps_out_of_range_are_refused(n_step):
    with pytest.raises(ValueError, match="take 1 to 1000"):
        timesteps(1000, n_step)
    with pytest.raises(ValueError, match="no spacing 'even'"):
        timesteps(1000, 5, "even")


# ── With a perfect denoiser ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_step", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["linear", "cosine", "zero-snr"])
def test_ddim_with_the_true_noise_recovers_the_data(name, spacing, n_step):
    x0, eps = torch.randn(2, 4, 1, 1, 3).double().unbind(0)
    schedule = Schedule(name)
    grid = make_grid(schedule, n_step, spacing)
    x = q_sample(x0, eps, grid.alpha[0], grid.sigma[0])
    torch.testing.assert_close(ddim(oracle(x0, eps), x, grid), x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*SAMPLERS, *FLOWS])
@pytest.mark.parametrize("n_step", [1, 2, 7, 50])
def test_every_sampler_ends_at_data_that_are_one_point(name, n_step):
    x0 = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    for schedule in ("flow",) if name in FLOWS else ("linear", "cosine", "zero-snr"):
        grid = make_grid(Schedule(schedule), n_step)
        x = torch.randn(x0.shape, dtype=torch.float64)
        found = (SAMPLERS | FLOWS)[name](honest(x0), x, grid)
        torch.testing.assert_close(found, x0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["heun", "dpmpp", "ddim"])
def test_flows_may_be_sampled_by_other_solvers(name):
    x0 = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    found = SAMPLERS[name](
        honest(x0), torch.randn(x0.shape).double(), make_grid(Schedule("flow"), 9)
    )
    torch.testing.assert_close(found, x0, rtol=0, atol=1e-9)


def test_euler_on_straight_lines_is_ddim():
    """α' x0 + σ' ε = x + (σ' − σ)(ε − x0) where α + σ = 1: two papers, one sampler."""
    mixture, x = orders.mixture(), torch.randn(20, 2, 1, 1, dtype=torch.float64)
    grid = make_grid(Schedule("flow"), 10)
    torch.testing.assert_close(flow(mixture, x, grid), ddim(mixture, x, grid))


def test_orders_of_the_solvers():
    """Slopes of error over looks with the exact denoiser: Euler 1, Heun 2, DPM-Solver++(2M) 2."""
    found = {name: orders.slope(points) for name, points in orders.errors(50).items()}
    wanted = {"Euler (DDIM)": -1, "Heun": -2, "DPM-Solver++(2M)": -2}
    assert found == pytest.approx(wanted, abs=0.15)


def test_orders_of_the_flow_solvers():
    """Euler 1 and midpoint 2 on the straight lines, which bend where data are several points."""
    mixture, errors = orders.mixture(), {flow: [], midpoint: []}
    x = torch.randn(50, 2, 1, 1, dtype=torch.float64)
    schedule = Schedule("flow")
    end = midpoint(mixture, x, make_grid(schedule, 1024))
    for solver, looks in ((flow, 1), (midpoint, 2)):
        for n in (32, 64, 128):
            error = (solver(mixture, x, make_grid(schedule, n)) - end).norm(dim=1).mean()
            errors[solver].append((looks * n, error.item()))
    assert orders.slope(errors[flow]) == pytest.approx(-1, abs=0.15)
    assert orders.slope(errors[midpoint]) == pytest.approx(-2, abs=0.15)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp", "flow", "midpoint"])
def test_samples_of_a_known_mixture_have_its_moments(name):
    """A heap at 0.5 with standard deviation 0.3: mean and spread of 4,000 samples."""
    mixture = Mixture(torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), 0.3)
    schedule = Schedule("flow" if name in FLOWS else "linear")
    n_step = 200 if name == "ddpm" else 60
    x = torch.randn(4000, 1, 1, 1, dtype=torch.float64)
    found = (SAMPLERS | FLOWS)[name](mixture, x, make_grid(schedule, n_step))
    assert found.mean().item() == pytest.approx(0.5, abs=0.02)
    assert found.std().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("name", ["linear", "cosine", "zero-snr", "flow"])
@pytest.mark.parametrize("n_step", [5, 10])
def test_second_order_is_better_from_noise_alone_too(name, n_step):
    """The grids that samples are drawn on begin where σ/α may be 20,000; `orders` begins at 20."""
    mixture, schedule = orders.mixture(), Schedule(name)
    x = torch.randn(200, 2, 1, 1, dtype=torch.float64)
    end = ddim(mixture, x, make_grid(schedule, 1000))
    grid = make_grid(schedule, n_step)
    error = {
        solver: (SAMPLERS[solver](mixture, x, grid) - end).norm(dim=1).mean() for solver in SAMPLERS
    }
    assert max(error["heun"], error["dpmpp"]) < error["ddim"] < 0.5


@pytest.mark.parametrize(
    ("schedule", "name"),
    [(schedule, name) for schedule in ("linear", "cosine", "zero-snr") for name in SAMPLERS]
    + [("flow", name) for name in ("ddim", "heun", "dpmpp", *FLOWS)],
)
def test_every_look_is_told_the_time_of_its_noise(schedule, name):
    """Also the second look of a step: the exact denoiser would not notice, a network would."""
    process = Schedule(schedule)
    predict = Timekeeper(process, honest(torch.zeros(2, 1, 1, 1, dtype=torch.float64)))
    x = torch.randn(2, 1, 1, 1, dtype=torch.float64)
    (SAMPLERS | FLOWS)[name](predict, x, make_grid(process, 7))
    assert predict.n_look >= 7 and predict.n_wrong == 0


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on the device meta, which stands for one without it, such as mps."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type == "meta":
            assert found.dtype != torch.float64, func
        return found


@pytest.mark.parametrize("name", [*SAMPLERS, *FLOWS])
def test_samplers_work_where_there_is_no_float64(name):
    schedule = Schedule("flow" if name in FLOWS else "cosine")
    predict = Denoiser(lambda x, times, labels: torch.tanh(x), "v", clip=1.0)
    x = torch.zeros(2, 1, 4, 4, device="meta")
    with NoFloat64():
        found = (SAMPLERS | FLOWS)[name](predict, x, make_grid(schedule, 3), torch.Generator())
    assert found.shape == x.shape and found.dtype == torch.float32


# ── Against diffusers ─────────────────────────────────────────────────────────────────────────────


def net(x, time):
    """Stands for a network: some smooth function of x and time, noise-like in size."""
    return torch.tanh(x * 0.7) + 0.2 * torch.cos(3 * x + float(time) / 300)


def as_predict(target="eps", clip=0.0):
    return Denoiser(lambda x, times, labels: net(x, times[0]), target, clip=clip)


@pytest.mark.parametrize("n_step", COUNTS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_that_of_diffusers(spacing, n_step, eta):
    """Each step of the way at the place that diffusers comes from, to the place it goes to.

    It goes to t − 1000 // S, which is the next of the grid only where S divides 1000 evenly; ours
    goes to the next of the grid always, see `test_ddim_of_diffusers_misses_its_own_grid`.
    """
    diffusers = pytest.importorskip("diffusers")
    there = float64(diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=True))
    there.set_timesteps(n_step)
    schedule, stride = same_tables(there), 1000 // n_step
    x, noise = torch.randn(2, 5, 1, 2, 2).double().unbind(0)
    for time in there.timesteps[:: max(1, n_step // 40)]:
        wanted = there.step(
            net(x, time), int(time), x, eta, use_clipped_model_output=True, variance_noise=noise
        ).prev_sample
        last = int(time) - stride < 0
        level = torch.tensor([int(time)] if last else [int(time), int(time) - stride])
        alpha, sigma = schedule.at(level)
        end = torch.tensor([1.0] if last else [], dtype=torch.float64)
        times = torch.cat([level.double(), 0 * end])
        grid = Grid(times, torch.cat([alpha, end]), torch.cat([sigma, 0 * end]))
        found = ddim(as_predict(clip=1.0), x, grid, Fixed(noise), eta)
        assert_near(found, wanted)


class Fixed:
    """In the place of a generator: its only draw is known."""

    def __init__(self, noise):
        self.noise = noise


@pytest.fixture(autouse=True)
def known_draws(monkeypatch):
    """`noise_like` gives what a `Fixed` generator says."""
    import samplers

    usual = samplers.noise_like
    monkeypatch.setattr(
        samplers,
        "noise_like",
        lambda x, dice: dice.noise if isinstance(dice, Fixed) else usual(x, dice),
    )


@pytest.mark.parametrize("n_step", [1, 50, 500, 1000])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_whole_ddim_chains_are_those_of_diffusers(n_step, eta):
    """Where S divides 1000 the whole way is the same, from the same noise and the same dice."""
    diffusers = pytest.importorskip("diffusers")
    there = float64(diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=True))
    there.set_timesteps(n_step)
    x = start = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    dice = torch.Generator().manual_seed(1)
    for time in there.timesteps:
        x = there.step(
            net(x, time), int(time), x, eta, use_clipped_model_output=True, generator=dice
        ).prev_sample
    grid = make_grid(same_tables(there), n_step)
    found = ddim(as_predict(clip=1.0), start, grid, torch.Generator().manual_seed(1), eta)
    assert_near(found, x)


@pytest.mark.parametrize(("spacing", "n_step"), [("linspace", 7), ("trailing", 13)])
def test_ddim_of_diffusers_misses_its_own_grid(spacing, n_step):
    """With the true noise ours ends at the data; a fixed stride does not."""
    diffusers = pytest.importorskip("diffusers")
    there = float64(diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False))
    there.set_timesteps(n_step)
    x0, eps = torch.randn(2, 4, 1, 2, 2).double().unbind(0)
    schedule = same_tables(there)
    x = q_sample(x0, eps, schedule.alpha[999], schedule.sigma[999])
    grid, theirs = make_grid(schedule, n_step, spacing), x
    for time in there.timesteps:
        theirs = there.step(eps, int(time), theirs).prev_sample
    assert (ddim(oracle(x0, eps), x, grid) - x0).abs().max() < 1e-5
    assert (theirs - x0).abs().max() > 1e-3


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n_step", [7, 50, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_that_of_diffusers(spacing, n_step, variance):
    diffusers = pytest.importorskip("diffusers")
    there = float64(
        diffusers.DDPMScheduler(timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    )
    there.set_timesteps(n_step)
    x = start = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    dice = torch.Generator().manual_seed(1)
    for time in there.timesteps:
        last = time == there.timesteps[-1]  # theirs adds noise to the result if the grid ends early
        x = there.step(net(x, time), int(time), x, generator=dice)
        x = x.pred_original_sample if last and time > 0 else x.prev_sample
    found = ddpm(
        as_predict(clip=1.0),
        start,
        make_grid(same_tables(there), n_step, spacing),
        torch.Generator().manual_seed(1),
        variance,
    )
    assert_near(found, x)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "leading"])
@pytest.mark.parametrize("n_step", [2, 7, 13, 50])
@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of numpy about diffusers
def test_dpmpp_is_that_of_diffusers(spacing, n_step):
    """On the grid of diffusers, which for this solver is one of S + 1 steps without the last."""
    diffusers = pytest.importorskip("diffusers")
    there = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, lower_order_final=True)
    there.set_timesteps(n_step)
    levels = there.sigmas.double()
    x = start = torch.randn(5, 1, 2, 2, dtype=torch.float64)
    for time in there.timesteps:
        x = there.step(net(x, time), time, x).prev_sample
    alpha = 1 / (1 + levels**2).sqrt()
    times = torch.cat([there.timesteps, torch.zeros(1)])
    found = dpmpp(as_predict(), start, Grid(times, alpha, levels * alpha))
    assert_near(found, x)


@pytest.mark.parametrize("n_step", [1, 7, 50])
def test_flow_is_that_of_diffusers(n_step):
    diffusers = pytest.importorskip("diffusers")
    there = diffusers.FlowMatchEulerDiscreteScheduler()
    grid = make_grid(Schedule("flow"), n_step)
    there.set_timesteps(sigmas=grid.sigma[:-1].tolist())
    x = start = torch.randn(5, 1, 2, 2)
    torch.testing.assert_close(there.timesteps.double(), grid.times[:-1], rtol=1e-6, atol=0)
    for time in there.timesteps:
        x = there.step(net(x, time), time, x).prev_sample
    assert_near(flow(as_predict("flow"), start, grid), x)


def test_ddim_with_eta_1_has_the_variance_of_ddpm():
    """S = T: Eq. 16 of arXiv:2010.02502 at η = 1 is β̃_t, so both chains are the same."""
    schedule, x = Schedule("linear"), torch.randn(3, 1, 2, 2, dtype=torch.float64)
    grid = make_grid(schedule, 1000)
    one = ddim(as_predict(), x, grid, torch.Generator().manual_seed(5), 1.0)
    other = ddpm(as_predict(), x, grid, torch.Generator().manual_seed(5), "small")
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_two_formulas_for_a_step_agree_also_when_clipped(clip):
    """Eq. 7 of arXiv:2006.11239 and DDIM's Eq. 12 at η = 1: the same mean, as ε is derived anew."""
    schedule = Schedule("linear")
    grid = Grid(
        torch.tensor([500.0, 499.0]), schedule.alpha[[500, 499]], schedule.sigma[[500, 499]]
    )
    x = 3 * torch.randn(3, 1, 2, 2, dtype=torch.float64)
    zero = Fixed(torch.zeros_like(x))
    one, other = (
        ddim(as_predict(clip=clip), x, grid, zero, 1.0),
        ddpm(as_predict(clip=clip), x, grid, zero),
    )
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_mean_from_the_noise_is_the_posteriors_only_without_clipping(clip):
    """Algorithm 2's line 4, (x − β ε / √(1−ᾱ)) / √α, knows no x0 and so cannot clip it."""
    schedule, t = Schedule("linear"), 600
    grid = Grid(torch.tensor([t, t - 1.0]), schedule.alpha[[t, t - 1]], schedule.sigma[[t, t - 1]])
    x = 3 * torch.randn(3, 1, 2, 2, dtype=torch.float64)
    beta = schedule.betas[t]
    eps = net(x, t)
    wanted = (x - beta / schedule.sigma[t] * eps) / (1 - beta).sqrt()
    found = ddpm(as_predict(clip=clip), x, grid, Fixed(torch.zeros_like(x)))
    assert torch.allclose(found, wanted) == (not clip)


# ── Guidance ──────────────────────────────────────────────────────────────────────────────────────


def labelled(x, times, labels):
    """Answers 0.1 · label."""
    return torch.zeros_like(x) + 0.1 * labels.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("w", "wanted"), [(0.0, 0.7), (1.0, 0.3), (2.0, -0.1), (0.5, 0.5)])
def test_guidance_is_null_plus_w_times_the_difference(w, wanted):
    """Label 3 answers 0.3, null (7) answers 0.7: 0.7 + w (0.3 − 0.7). 0 is null, 1 is the label."""
    labels, x = torch.full((2,), 3), torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    predict = Denoiser(labelled, "eps", labels, w, null=7)
    _, eps = predict(x, 5, 0.6, 0.8)
    torch.testing.assert_close(eps, torch.full_like(eps, wanted), rtol=0, atol=1e-7)
    assert predict.n_evaluation == 1


def test_guidance_of_0_and_1_are_the_answers_to_the_bit():
    labels, x = torch.full((2,), 3), torch.randn(2, 1, 2, 2)
    times = torch.zeros(2)
    for w, label in ((0.0, 7), (1.0, 3)):
        answer = Denoiser(labelled, "eps", labels, w, null=7).answer(x, times)
        assert torch.equal(answer, labelled(x, times, torch.full((2,), label)))


def test_guidance_without_a_null_label_is_refused():
    with pytest.raises(ValueError, match="guidance needs labels"):
        Denoiser(labelled, "eps", torch.zeros(2).long(), 2.0)
