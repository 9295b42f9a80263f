"""How good samples are, and how probable the model thinks unseen data: what --eval prints.

    accuracy        share of samples that a classifier of real pictures reads as their label
    frechet         distance of samples and real test pictures, in that classifier's features;
                    frechet_real is what as many real training pictures have
    memorised       share of samples that are near copies of training rows, see exact.py
    near            of points: share less than 4 standard deviations from where data can be
    bits_per_dim    variational bound and probability flow, see likelihood.py

Key: N samples, C channels, H and W height and width, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import classifier
import exact
import hardware
import likelihood
from checkpoint import Loaded
from options import UserError, check, option
from samplers import FLOWS, SAMPLERS, SPACINGS, Denoiser, Grid, make_grid
from sources import Source, to_bytes, to_unit

BATCH = 256  # samples at a time


@dataclass(frozen=True)
class SampleConfig:
    """The sampling.

    Raises ValueError for values that make no sense.
    """

    num_samples: int = option(100, "how many", least=1, most=100_000)
    label: str = option("", "which class, by name or number; all in turn if empty")
    guidance: float = option(2.0, "0 ignores the label, 1 asks plainly, more exaggerates")
    sampler: str = option("auto", "auto is dpmpp, or midpoint for a flow",
                          ("auto", *SAMPLERS, *FLOWS))  # fmt: skip
    sample_steps: int = option(20, "steps from noise to data", least=1, most=100_000)
    eta: float = option(0.0, "ddim: from 0, no chance at all, to 1, as ddpm", least=0, most=1)
    spacing: str = option("trailing", "which of the noise levels are passed", SPACINGS)
    seed: int = 0  # of the noise; the flag is that of the training

    def __post_init__(self):
        check(self)


def check_sampler(config: SampleConfig, loaded: Loaded) -> str:
    """The sampler to use. UserError where it does not go with the network's schedule."""
    is_flow = loaded.process.schedule == "flow"
    name = config.sampler
    if name == "auto":
        name = "midpoint" if is_flow else "dpmpp"
    if is_flow and (name == "ddpm" or config.eta):
        raise UserError("this network was taught a flow, whose steps back are not random: take "
                        "--sampler flow, midpoint, heun or dpmpp, and no --eta")  # fmt: skip
    if not is_flow and name in FLOWS:
        raise UserError(f"--sampler {name} is for networks trained with --schedule flow; this one "
                        f"was taught {loaded.process.schedule}")  # fmt: skip
    if config.eta and name != "ddim":
        raise UserError(f"--eta is for --sampler ddim, not {name}")
    if not is_flow and config.sample_steps > loaded.process.n_step:
        raise UserError(f"--sample-steps {config.sample_steps}: the network knows "
                        f"{loaded.process.n_step} noise levels")  # fmt: skip
    if loaded.sizes.n_class and config.guidance != 1 and loaded.null is None:
        raise UserError("--guidance: this network has no label for any class: take --guidance 1")
    return name


def denoiser(loaded: Loaded, labels: Tensor | None, guidance: float, dtype=torch.float32):
    """The network as a `predict`, in the number format `dtype`."""
    device = next(loaded.model.parameters()).device

    def network(x: Tensor, times: Tensor, labels: Tensor | None) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        with hardware.autocast(device, dtype):
            return loaded.model(x, times, labels)

    guidance = guidance if labels is not None else 1.0
    return Denoiser(network, loaded.process.target, labels, guidance, loaded.null, loaded.clip)


@torch.no_grad()
def sample(
    loaded: Loaded,
    config: SampleConfig,
    labels: Tensor | None,
    n: int | None = None,
    dtype=torch.float32,
    watch=None,
) -> Tensor:
    """Samples (N, C, H, W) on the CPU, for labels (N,), or `n` of any class.

    watch: wraps what the sampler asks, see `Watcher`. The same seed gives the same samples.
    """
    name = check_sampler(config, loaded)
    n = len(labels) if labels is not None else n
    device = next(loaded.model.parameters()).device
    schedule, dice = loaded.process.make_schedule(), torch.Generator().manual_seed(config.seed)
    grid = make_grid(schedule, config.sample_steps, config.spacing)
    noise = torch.randn(n, *loaded.sizes.shape, generator=dice)
    found = []
    for rows in torch.arange(n).split(BATCH):
        asked = None if labels is None else labels[rows].to(device)
        predict = denoiser(loaded, asked, config.guidance, dtype)
        if watch:
            predict = watch(predict)
        found.append(run_sampler(name, predict, noise[rows].to(device), grid, dice, config, loaded))
    return torch.cat(found).cpu()


def run_sampler(name, predict, x, grid: Grid, dice, config: SampleConfig, loaded) -> Tensor:
    """Call the sampler with what it alone wants to know."""
    more = {"ddim": {"eta": config.eta}, "ddpm": {"variance": loaded.process.variance}}
    return (SAMPLERS | FLOWS)[name](predict, x, grid, dice, **more.get(name, {}))


class Watcher:
    """Keeps what a `predict` saw and guessed: the film of how noise becomes data.

    seen: (noise level σ, rows x, guesses x0) of each look.
    """

    def __init__(self):
        self.seen: list[tuple[float, Tensor, Tensor]] = []

    def __call__(self, predict):
        def watched(x, time, alpha, sigma):
            x0, eps = predict(x, time, alpha, sigma)
            self.seen.append((float(sigma), x.cpu().clone(), x0.cpu().clone()))
            return x0, eps

        return watched


def quality(
    loaded: Loaded,
    source: Source,
    config: SampleConfig,
    judge: classifier.Classifier | None,
    dtype=torch.float32,
) -> dict:
    """Accuracy, Fréchet distance and memorisation of `config.num_samples` samples."""
    labels = even_labels(loaded, config.num_samples)
    x = sample(loaded, config, labels, config.num_samples, dtype)
    train, test = (to_unit(part.images) for part in (source.train, source.test))
    if source.is_pictures:
        x = to_unit(to_bytes(x))
    found = {}
    if source.mixture:
        for name, rows in (("near", x), ("near_real", test)):
            distance = exact.two_nearest(rows, source.mixture.centres)[0][:, 0]
            found[name] = (distance < 4 * source.mixture.spread).double().mean().item()
    if judge:
        features, classes = classifier.read(judge, x)
        there, real = (classifier.read(judge, rows) for rows in (test, train[: len(x)]))
        if labels is not None:
            found["accuracy"] = (classes == labels).double().mean().item()
        found["frechet"] = classifier.frechet(features, there[0])
        found["frechet_real"] = classifier.frechet(real[0], there[0])
        right = (there[1] == source.test.labels).double().mean()
        found["classifier_accuracy"] = right.item()
    return found | exact.memorisation(x, train, test[:500])


def even_labels(loaded: Loaded, n: int) -> Tensor | None:
    """As many of each class, in turn: (n,). None for a network without classes."""
    return torch.arange(n) % loaded.sizes.n_class if loaded.sizes.n_class else None


def bits(loaded: Loaded, source: Source, n_row: int = 0, seed: int = 0) -> dict:
    """Bits per dimension of `n_row` rows of the test part by both routes; 0 is 32 to 128, by size.

    The variances of the bound's steps are set by as many rows of the training part.
    """
    device, dice = next(loaded.model.parameters()).device, torch.Generator().manual_seed(seed)
    schedule = loaded.process.make_schedule()
    n_row = n_row or max(32, min(128, 2**13 // source.train.images[0].numel()))
    test, train = source.test[:n_row], source.train[:n_row]
    rows = torch.cat([to_unit(train.images), to_unit(test.images)]).to(device)
    labels = torch.cat([train.labels, test.labels]).to(device) if loaded.sizes.n_class else None
    predict, is_pictures = denoiser(loaded, labels, 1.0), source.is_pictures
    nats = likelihood.bound(predict, rows, schedule, is_pictures, dice, 60, len(train))
    shape = rows.shape
    found = {"bits_per_dim": nats.mean() / torch.log(torch.tensor(2.0)) / rows[0].numel()}
    half = torch.rand(test.images.shape, generator=dice) - 0.5 if is_pictures else 0.0
    x = (to_unit(test.images) + half / 127.5).to(device)
    predict = denoiser(loaded, None if labels is None else labels[len(train) :], 1.0)
    predict.clip = 0.0
    nats = likelihood.flow_nll(predict, x, schedule, 30, dice)
    found["flow_bits_per_dim"] = likelihood.bits_per_dim(nats, shape, is_pictures).mean()
    return {name: round(float(value), 4) for name, value in found.items()}
