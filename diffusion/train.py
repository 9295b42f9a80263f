"""Training: mean squared error of the target at random noise levels, resumable to the bit.

`train(config, sizes)` is the whole story and returns the log. What is special about diffusion
stands here: the options, what a batch is made of (rows, noise, times, labels), the loss by bucket
of times, and the validation part at fixed noise. trainer.py has the step that these are parts of,
loop.py the steps one after another.

A batch with its noise depends on (seed, step) alone. The validation part decides which weights are
best; the test part is looked at once, in the end.

Key: B rows of a batch, C channels, H and W height and width, K classes.
"""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import diffusion
import hardware
import sources
from checkpoint import Process
from diffusion import Schedule, loss_per_row, q_sample, spread, target_of, weight
from loop import latest, run_loop
from model import PRESETS, NetConfig, build
from options import UserError, option, say
from run import RunDirectory, whole_file
from trainer import CommonConfig, Trainer, announce, as_described, facts

BUCKETS = 4  # of times, for the log: the loss at little noise and at much noise are two numbers
CACHE = "pictures.npz"  # in a run: the decoded pictures, where reading them takes a while
RECIPES = {  # what a size is trained on and how, where it is not the default
    "toy": {
        "data": "spiral",
        "steps": 4000,
        "batch_size": 256,
        "lr": 4e-3,
        "ema": 0.999,
        "eval_every": 1000,
    },
    "shapes": {"data": "shapes-10", "steps": 4000, "batch_size": 64, "eval_every": 500},
    "mnist": {"steps": 2500, "batch_size": 64, "eval_every": 500},
}


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("digits", "digits, shapes-10, moons, spiral, checkerboard, fish, a folder, "
                       "an .npz file, or hf:OWNER/NAME")  # fmt: skip
    image_size: int = option(
        0, "scale and crop pictures to this many pixels a side; 0 takes them as they are",
        least=0, most=1024,
    )  # fmt: skip
    schedule: str = option("cosine", "how the signal fades", diffusion.SCHEDULES)
    target: str = option("auto", "what the network predicts; auto is v, or flow for a flow",
                         ("auto", *diffusion.TARGETS))  # fmt: skip
    timesteps: int = option(1000, "noise levels T of the schedule", least=2, most=100_000)
    min_snr: float = option(0.0, "weigh errors of x0 by min(SNR, this); 0: all the same", least=0)
    labels: bool = option(True, "tell the network the class, where there are classes")
    drop_label: float = option(
        0.1, "share of rows whose class is hidden, for guidance", least=0, most=1
    )
    steps: int = option(1000, "optimizer steps", least=1)
    batch_size: int = option(96, "rows per step, over all ranks", least=1)
    lr: float = option(2e-3, "highest learning rate", above=0)
    warmup: float = option(0.05, "share of the steps in which the rate rises", least=0, below=1)
    weight_decay: float = option(0.0, "of matrices", least=0)
    ema: float = option(
        0.995, "average of the weights that keeps this much a step", least=0, below=1
    )
    eval_every: int = option(100, "steps between looks at the validation part", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.schedule == "zero-snr" and self.target == "eps":
            raise ValueError("target eps: the last step of the schedule zero-snr is noise alone, "
                             "and its noise says nothing about the data: take v or x0")  # fmt: skip
        if self.target != "auto" and (self.schedule == "flow") != (self.target == "flow"):
            raise ValueError(f"target {self.target} does not go with the schedule {self.schedule}")

    @property
    def process(self) -> Process:
        """What was taught, with the target chosen."""
        target = self.target
        if target == "auto":
            target = "flow" if self.schedule == "flow" else "v"
        return Process(schedule=self.schedule, n_step=self.timesteps, target=target)


# ── Batches and scores ────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """All n rows in the order of an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def batch_rows(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The rows of a step (batch_size,): epochs follow one another without a break.

    So every batch is whole, whatever n is.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    return torch.from_numpy(
        np.concatenate([order(n, seed, e)[places[places // n == e] % n] for e in epochs])
    )


def dice_for(seed: int, step: int) -> torch.Generator:
    """Random numbers of a step: the same ones however the run came there."""
    number = np.random.SeedSequence((seed, 1, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(number >> 1))


def even_places(n: int, dice: torch.Generator) -> Tensor:
    """n numbers of [0, 1), one in each n-th of it, in random order: (n,).

    So each batch has all noise levels, and its loss jumps less than with independent draws.
    """
    place = (torch.randperm(n, generator=dice) + torch.rand(n, generator=dice)) / n
    return place.clamp(max=1 - 2**-24)  # the largest float32 below 1


class DiffusionTrainer(Trainer):
    """What of a training step is special about diffusion: noise, times, labels and the loss."""

    unit = "rows"

    def __init__(self, config: TrainConfig, sizes: NetConfig, model: nn.Module, source, dtype):
        if config.shard:
            raise UserError("--shard is for weights that outgrow a device, and these networks are "
                            "small: leave it out and start with torchrun")  # fmt: skip
        model = model.to(memory_format=torch.channels_last)
        super().__init__(config, model, [], dtype)
        self.source, self.sizes = source, sizes
        self.process, self.schedule = config.process, config.process.make_schedule()
        self.flops_per_unit = 3 * forward_flops(model, sizes)  # 1 forward, 2 backward

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        kinds = {True: [], False: []}
        for parameter in model.parameters():
            kinds[parameter.dim() > 1].append(parameter)
        groups = [
            {"params": kinds[True], "weight_decay": config.weight_decay},
            {"params": kinds[False], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99), fused=True)

    def learning_rate(self, step: int) -> float:
        """Up in a straight line, then down to a twentieth like half a cosine."""
        config = self.config
        rising = max(1, round(config.warmup * config.steps))
        if step < rising:
            return config.lr * (step + 1) / rising
        part = (step - rising) / max(1, config.steps - rising)
        return config.lr * (0.05 + 0.95 * (1 + math.cos(math.pi * part)) / 2)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Rows (B, C, H, W), noise, places of their times (B,), labels (B,), and log shares (B,).

        A share is what makes a bucket's sum over the batch the mean of its rows.
        """
        config, source = self.config, self.source
        n, dice = config.batch_size, dice_for(config.seed, step)
        if source.mixture:
            x0, labels = source.mixture.draw(n, dice)
        else:
            rows = batch_rows(len(source.train), n, step, config.seed)
            x0, labels = source.train.images[rows], source.train.labels[rows]
        hidden = torch.rand(n, generator=dice) < config.drop_label
        labels = labels.masked_fill(hidden, len(source.classes))
        noise = torch.randn(x0.shape, generator=dice)
        place = even_places(n, dice)
        count = torch.bincount(bucket(place), minlength=BUCKETS)
        return x0, noise, place, labels, n / count[bucket(place)]

    def batch_loss(self, forward: Callable, x0, noise, place, labels, share) -> tuple:
        target, times = self.process.target, self.schedule.draw(place)
        alpha, sigma = self.schedule.at(times)
        x0 = sources.to_unit(x0)
        x = q_sample(x0, noise, alpha, sigma).contiguous(memory_format=torch.channels_last)
        out = forward(x, times.float(), labels if self.sizes.n_class else None)
        errors = loss_per_row(out, target_of(target, x0, noise, alpha, sigma))
        parts = torch.zeros(BUCKETS, device=errors.device)
        parts.index_add_(0, bucket(place), (errors * share).detach())
        numbers = {f"loss_{i}": part for i, part in enumerate(parts)}
        weights = spread(weight(target, alpha, sigma, self.config.min_snr), errors)
        return (errors * weights).sum(), len(errors), numbers

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Move the averaged weights towards the live ones, which stay as they are.

        As in trainer.py, early on faster, but in one call for all weights: with many small ones the
        calls would cost a twentieth of the step.
        """
        if self.average is not None:
            keep = min(self.config.ema, (1 + number) / (10 + number))
            means, live = list(self.average.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(means, live, 1 - keep)

    def score(self) -> dict:
        """The loss of the validation part, at noise that is the same each time."""
        loss = loss_of(self.scored, self.process, self.source, self.source.valid, self.dtype)
        return {"loss": loss}

    def describe(self, score: dict) -> str:
        return describe(score)


def bucket(place: Tensor) -> Tensor:
    """Which quarter of the times a place of [0, 1) is in: 0 is the least noise."""
    return (place * BUCKETS).long()


def describe(score: dict) -> str:
    """A score in words."""
    text = f"loss {score['loss']:.4f}"
    if "accuracy" in score:
        text += (
            f", {100 * score['accuracy']:.1f} % of samples are read as their label, "
            f"{100 * score['memorised']:.1f} % are copies"
        )
    return text


@torch.no_grad()
def loss_of(
    model: nn.Module, process: Process, source, part, dtype, n_level: int = 16, most: int = 512
) -> float:
    """Mean squared error of the target on a part of the data, at fixed noise and even times."""
    part = part[:most]
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(0)
    schedule, total = process.make_schedule(), 0.0
    for i in range(n_level):
        place = (i + even_places(len(part), dice)) / n_level
        noise = torch.randn(part.images.shape, generator=dice).to(device)
        times = schedule.draw(place.to(device))
        errors = errors_at(model, process, schedule, part, times, noise, dtype)
        total += errors.cpu().double().mean().item() / n_level  # not every device has float64
    return total


def errors_at(model, process: Process, schedule: Schedule, part, times, noise, dtype) -> Tensor:
    """Mean squared error of the target for each row of a part (N,), at these times (N,)."""
    x0 = sources.to_unit(part.images.to(noise.device))
    alpha, sigma = schedule.at(times)
    x = q_sample(x0, noise, alpha, sigma).contiguous(memory_format=torch.channels_last)
    labels = part.labels.to(noise.device) if model.config.n_class else None
    with hardware.autocast(noise.device, dtype):
        out = model(x, times.float(), labels)
    return loss_per_row(out, target_of(process.target, x0, noise, alpha, sigma))


def forward_flops(model: nn.Module, sizes: NetConfig) -> int:
    """Multiplications and additions for one row, counted by torch."""
    device = next(model.parameters()).device
    x, times = torch.zeros(1, *sizes.shape, device=device), torch.zeros(1, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, times)
    return counter.get_total_flops()


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def sizes_for(sizes: NetConfig, source, labels: bool) -> NetConfig:
    """`sizes` with what the data decides. UserError if there is no such network."""
    channels, height, width = source.shape
    n_class = len(source.classes) if labels and len(source.classes) > 1 else 0
    try:
        return replace(
            sizes, channels=channels, image_height=height, image_width=width, n_class=n_class
        )
    except ValueError as error:
        raise UserError(f"--data {source.name}: {error}") from None


def check_memory(config: TrainConfig, sizes: NetConfig, device: torch.device) -> None:
    """UserError if the training cannot fit, before any of it is built.

    Counted are the weights with gradient, two moments and average, and two activations of the first
    layer, four bytes a number.
    """
    with torch.device("meta"):  # shapes without memory
        n_parameter = sum(p.numel() for p in build(sizes).parameters())
    wide = sizes.levels[0] if sizes.net == "unet" else sizes.d_model
    n_activation = config.batch_size * wide * math.prod(sizes.shape[1:])
    hardware.check_memory(20 * n_parameter + 8 * n_activation, device, "training this")


def what_was_run(config: TrainConfig, sizes: NetConfig, source) -> dict:
    """What config.json keeps."""
    rows = {"name": source.name, "classes": source.classes, "pictures": source.is_pictures}
    return facts(config, sizes, data=rows, process=vars(config.process))


def keep_pictures(source, folder) -> None:
    """Write the decoded pictures into a run, if decoding them took a while."""
    if source.dataset is not None and source.dataset.stamp:
        with whole_file(folder / CACHE) as part, open(part, "wb") as file:
            source.dataset.save(file)


def expectations(trainer: DiffusionTrainer) -> None:
    """Print the data and the numbers to expect of it."""
    config, source = trainer.config, trainer.source
    say(f"           {trainer.flops_per_unit / 6e6:.1f} million multiply-adds a row")
    epochs = config.steps * config.batch_size / len(source.train)
    seen = f"; {epochs:.1f} epochs" if source.is_pictures else ", and fresh ones each step"
    say(f"data       {source.name}: {len(source.train):,} rows, {len(source.valid):,} to "
        f"validate, {len(source.test):,} to test{seen}")  # fmt: skip
    process = trainer.process
    say(f"process    {process.schedule}, {process.n_step} steps, target {process.target}")
    say(f"expect     loss {loss_of_zero(source, process):.3f} for answering 0 always")
    if source.mixture:
        floor = source_floor(source, process, bool(trainer.sizes.n_class))
        say(f"           and {floor:.4f} at the very best, the floor")


def loss_of_zero(source, process: Process) -> float:
    """What a network that always answers 0 would have: the mean square of the target."""
    schedule = process.make_schedule()
    p, q = diffusion.shares(process.target, schedule.alpha, schedule.sigma)
    p, q = torch.as_tensor(p), torch.as_tensor(q)
    square = sources.to_unit(source.valid.images).double().square().mean()
    return (p**2 * square + q**2).mean().item()


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format to compute in and why: as hardware.py, but for auto on the CPU float32.

    Its large matrix products may be faster in bfloat16; convolutions of small pictures are slower.
    """
    if name == "auto" and device.type == "cpu":
        return torch.float32, "small convolutions are faster in it on CPUs"
    return hardware.choose_dtype(name, device)


def source_floor(source, process: Process, labels: bool = True) -> float:
    """The least possible loss over all times, for points; labels: where the network knows them."""
    import exact

    schedule = process.make_schedule()
    places = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    times = schedule.draw(places)
    mixture = source.mixture if labels else replace(source.mixture, labels=None)
    return exact.floor(mixture, schedule, times, process.target, 1024).mean().item()


def finish(trainer: DiffusionTrainer, run_dir: RunDirectory, at_end: Callable | None) -> None:
    """Look at the test part, once, with the weights that were best on validation."""
    config, source, start = trainer.config, trainer.source, time.perf_counter()
    try:
        loaded = checkpoint.load(run_dir.path)
        loaded.model.to(trainer.device, memory_format=torch.channels_last)
        score = {"loss": loss_of(loaded.model, loaded.process, source, source.test, trainer.dtype)}
        if at_end:
            score |= at_end(loaded, source)
        seconds = latest(run_dir.history(), "seconds") + time.perf_counter() - start
        run_dir.log(step=config.steps, split="test", **score, seconds=round(seconds, 2))
        say(f"test part  {describe(score)}")
        if as_described(config, trainer.sizes, (TrainConfig(), described_sizes())):
            good = score.get("accuracy", 0) >= 0.95
            say(f"{'on' if good else 'off'} track: the README promises 95 % of samples read right")
    except KeyboardInterrupt:
        say(f"stopped; the trained network is in {run_dir.path}: --eval and --sample use it")
        raise


def described_sizes() -> NetConfig:
    """The network of the default run, with what the digits decide."""
    return replace(PRESETS["digits"], image_height=8, image_width=8, n_class=10)


def train(
    config: TrainConfig,
    sizes: NetConfig,
    resume: bool = False,
    loaded: "checkpoint.Loaded | None" = None,
    at_end: Callable | None = None,
) -> list[dict]:
    """Train a network of these sizes, and return the log.

    resume: go on from the last checkpoint in `config.out`.
    loaded: the network in `config.weights`, where it is at hand already.
    at_end: called with the trained network and the data; returns more numbers for the test line.

    UserError for data, sizes or files that will not do, and for a loss that is not finite.
    """
    run_dir = RunDirectory(config.out)
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    with hardware.ranks(device), run_dir.writing():
        if run_dir.writes and not resume:
            run_dir.refuse_what_is_not_ours(config.data)
        at_start = not (resume and run_dir.checkpoint.exists())
        if config.weights and at_start and not loaded:
            loaded = checkpoint.load(config.weights)
        cache = run_dir.path / CACHE if resume else None
        source = sources.load(config.data, config.seed, config.image_size, cache)
        sizes = sizes_for(loaded.sizes if loaded else sizes, source, config.labels)
        check_memory(config, sizes, device)
        hardware.seed_everything(config.seed)
        model = build(sizes)
        if loaded:
            checkpoint.fill(model, loaded.model.state_dict(), loaded.path)
        trainer = DiffusionTrainer(config, sizes, model.to(device), source, dtype)
        if run_dir.writes and resume:
            run_dir.save_config(what_was_run(config, sizes, source))
        elif run_dir.writes:
            kept = what_was_run(config, sizes, source)
            run_dir.create(kept, lambda folder: keep_pictures(source, folder))
        hardware.barrier()
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(trainer)
        finished = run_loop(trainer, run_dir, resume)
        scored = {(line["split"], line["step"]) for line in run_dir.history()}
        if finished and run_dir.writes and ("test", config.steps) not in scored:
            finish(trainer, run_dir, at_end)
        return run_dir.history()
