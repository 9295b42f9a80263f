"""The classifier, the Fréchet distance, and what --eval prints."""

import math
from pathlib import Path

import pytest
import torch
from test_model import SMALL, awake
from torch import nn

import classifier
import likelihood
import measure
import sources
from checkpoint import Loaded, Process
from data import Split
from diffusion import Schedule, target_of
from exact import Mixture
from measure import SampleConfig, check_sampler, sample
from model import NetConfig, build
from options import UserError
from samplers import Denoiser, ddim, ddpm, make_grid


def network(sizes=SMALL, **process) -> Loaded:
    classes = tuple(map(str, range(sizes.n_class)))
    return Loaded(Path("nowhere"), awake(build(sizes)), sizes, Process(**process), classes)


def test_frechet_distance_by_hand():
    """Independent Gaussians: Σ (μ₁ − μ₂)² + (σ₁ − σ₂)²: here 3² + (2 − 1)² + 0."""
    x = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0)).double()
    other = x * torch.tensor([2.0, 1.0]) + torch.tensor([3.0, 0.0])
    assert classifier.frechet(x, other) == pytest.approx(10, rel=0.02)
    assert classifier.frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_against_scipy():
    """The trace of a matrix root, computed in another way."""
    linalg = pytest.importorskip("scipy.linalg")
    x, y = torch.randn(50, 6).double(), torch.randn(60, 6).double() @ torch.randn(6, 6).double()
    first, second = torch.cov(x.T), torch.cov(y.T)
    root = linalg.sqrtm((first @ second).numpy()).real.trace()
    wanted = (x.mean(0) - y.mean(0)).square().sum() + first.trace() + second.trace() - 2 * root
    assert classifier.frechet(x, y) == pytest.approx(wanted.item(), rel=1e-6)


@pytest.fixture(scope="module")
def judge():
    """A classifier of digits as --eval trains one."""
    return classifier.fit(sources.load("digits").train, 10)


def test_classifier_reads_real_digits(judge):
    """At least 97 % of the test part, which it never saw: else it could not judge samples."""
    source = sources.load("digits")
    _, classes = classifier.read(judge, sources.to_unit(source.test.images))
    assert (classes == source.test.labels).double().mean() >= 0.97


def test_classifier_leaves_the_runs_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 2)
    source, state = sources.load("digits"), torch.get_rng_state()
    classifier.fit(source.train, 10)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (1, 28, 20)])
def test_classifier_takes_pictures_of_any_size(shape):
    model = classifier.Classifier(shape[0], 4)
    features, classes = classifier.read(model, torch.randn(3, *shape))
    assert features.shape == (3, 32) and classes.shape == (3,)


def test_moving_is_by_a_pixel_at_most():
    x = torch.arange(64.0).view(1, 1, 8, 8)
    for seed in range(9):
        y = classifier.moved(x, torch.Generator().manual_seed(seed))
        down, across = ((y[0, 0, 4, 4] - 36) / 8).round(), (y[0, 0, 4, 4] - 36 + 4) % 8 - 4
        assert y.shape == x.shape and abs(down) <= 1 and abs(across) <= 1


def test_same_seed_same_samples_whatever_the_batch(monkeypatch):
    labels = torch.arange(7) % 3
    config = SampleConfig(sample_steps=3, sampler="ddim", seed=5)
    loaded = network()
    one = sample(loaded, config, labels)
    monkeypatch.setattr(measure, "BATCH", 2)
    torch.testing.assert_close(sample(loaded, config, labels), one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("process", "flags", "complaint"), [
    ({}, {"sampler": "flow"}, "is for networks trained with --schedule flow"),
    ({"schedule": "flow", "target": "flow"}, {"sampler": "ddpm"}, "steps back are not random"),
    ({"schedule": "flow", "target": "flow"}, {"eta": 1.0}, "steps back are not random"),
    ({}, {"sampler": "dpmpp", "eta": 0.5}, "--eta is for --sampler ddim"),
    ({"n_step": 100}, {"sample_steps": 101}, "knows 100 noise levels"),
])  # fmt: skip
def test_samplers_that_do_not_fit_are_refused(process, flags, complaint):
    with pytest.raises(UserError, match=complaint):
        check_sampler(SampleConfig(**flags), network(**process))


def test_guidance_of_a_network_without_null_label_is_refused():
    from dataclasses import replace

    foreign = network()
    foreign.sizes = replace(SMALL, null_label=False)
    with pytest.raises(UserError, match="take --guidance 1"):
        check_sampler(SampleConfig(), foreign)
    assert check_sampler(SampleConfig(guidance=1.0), foreign) == "dpmpp"


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp"])
def test_watching_does_not_change_the_samples(name):
    config, labels = SampleConfig(sampler=name, sample_steps=4), torch.arange(3)
    watcher, one = measure.Watcher(), network()
    plain = sample(one, config, labels)
    watched = sample(one, config, labels, watch=watcher)
    assert torch.equal(plain, watched)
    assert len(watcher.seen) == (7 if name == "heun" else 4)
    assert [sigma for sigma, _, _ in watcher.seen] == sorted(
        (sigma for sigma, _, _ in watcher.seen), reverse=True
    )


def test_samples_are_clipped_to_the_range_of_pixels():
    x = sample(network(), SampleConfig(sample_steps=5), torch.arange(3))
    assert x.abs().max() <= 1 + 1e-5


def test_quality_of_real_rows_is_perfect(judge, monkeypatch):
    """The test part in the place of samples: no copies, distance 1, and read as its labels."""
    source, digits = sources.load("digits"), network()
    monkeypatch.setattr(measure, "even_labels", lambda *_: source.test.labels)
    real = sources.to_unit(source.test.images)
    monkeypatch.setattr(measure, "sample", lambda *_: real)
    found = measure.quality(digits, source, SampleConfig(), judge)
    assert found["accuracy"] == found["classifier_accuracy"] >= 0.97
    assert found["frechet"] == pytest.approx(0, abs=1e-4) and found["frechet_real"] > 0
    assert found["memorised"] == found["memorised_real"] < 0.03
    assert found["distance"] == pytest.approx(1)


def test_bits_of_a_network_that_knows_nothing():
    """A finite number by both routes, and more than that of the shipped network."""
    source = sources.load("digits")
    from dataclasses import replace

    sizes = replace(SMALL, n_class=0)
    model = build(sizes).eval()
    blank = Loaded(Path("nowhere"), model, sizes, Process(schedule="cosine", target="v"))
    found = measure.bits(blank, source, 8)
    assert 5.5 < found["bits_per_dim"] < 30 and 5.5 < found["flow_bits_per_dim"] < 30


@pytest.mark.parametrize(("flags", "sampler", "more"), [
    ({"sampler": "ddim", "eta": 0.5, "guidance": 3.0, "spacing": "leading"}, ddim, {"eta": 0.5}),
    ({"sampler": "ddpm", "guidance": 0.0}, ddpm, {"variance": "large"}),
])  # fmt: skip
def test_what_is_asked_for_reaches_the_sampler(flags, sampler, more):
    """Guidance, spacing, η and the variance that the network was saved with, and clipping."""
    loaded, labels = network(schedule="cosine", target="v", variance="large"), torch.arange(3)
    found = sample(loaded, SampleConfig(sample_steps=4, seed=5, **flags), labels)
    dice = torch.Generator().manual_seed(5)
    noise = torch.randn(3, *SMALL.shape, generator=dice)
    predict = Denoiser(loaded.model, "v", labels, flags["guidance"], SMALL.n_class, 1.0)
    grid = make_grid(Schedule("cosine"), 4, flags.get("spacing", "trailing"))
    with torch.no_grad():
        wanted = sampler(predict, noise, grid, dice, **more)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


class Bell(nn.Module):
    """In the place of a network: the exact v of pixels with mean 0 and standard deviation 0.3."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule, self.zero = schedule, nn.Parameter(torch.zeros(1))
        self.mixture = Mixture(torch.zeros(1, 1, 2, 2), 0.3)

    def forward(self, x, times, labels):
        alpha, sigma = self.schedule.at(times)
        return target_of("v", *self.mixture(x, times, alpha, sigma), alpha, sigma) + self.zero


def test_bits_of_pictures_whose_probability_is_known():
    """Rounded to levels, 0.3 is 38 of them: log2(38 √(2πe)) = 7.3 bits, by both routes."""
    process = Process(schedule="cosine", target="v")
    rows = sources.to_bytes(0.3 * torch.randn(1024, 1, 2, 2))
    part = Split(rows, torch.zeros(1024).long())
    source = sources.Source("bell", ("0",), part, part, part)
    sizes = NetConfig(image_height=2, image_width=2)
    loaded = Loaded(Path("nowhere"), Bell(process.make_schedule()), sizes, process)
    x = sources.to_unit(rows[:512]).double()
    nats = -likelihood.level_log_mass(x, torch.zeros(1), torch.tensor(0.3).double())
    truth = nats.mean().item() / math.log(2)
    found = measure.bits(loaded, source, 512)
    assert truth == pytest.approx(7.3, abs=0.1)
    assert found["bits_per_dim"] == pytest.approx(truth, rel=0.01)
    assert found["flow_bits_per_dim"] == pytest.approx(truth, rel=0.01)


def test_flow_bits_are_of_blurred_pixels_and_not_clipped(monkeypatch):
    """Half a level of blur each way. A clipped guess has no slope; the bound may clip."""
    clips, asked = [], []

    def seen(predict, rows, *_):
        clips.append(predict.clip)
        asked.append(rows)
        return torch.zeros(len(rows))

    monkeypatch.setattr(likelihood, "bound", seen)
    monkeypatch.setattr(likelihood, "flow_nll", seen)
    measure.bits(network(), sources.load("digits"), 4)
    blur = 127.5 * (asked[1] - asked[0][4:])
    assert clips == [1.0, 0.0] and 0.45 < blur.abs().max() <= 0.5 + 1e-4
