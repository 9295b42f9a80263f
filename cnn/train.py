"""Training: momentum on the cross-entropy of augmented pictures, resumable to the bit.

`train(config, sizes)` is the whole story and returns the log. What is special about pictures
stands here: the options, the views that a batch is made of, its loss, the optimizer, and how a
score reads. trainer.py has the step that these are parts of, loop.py the steps one after another.

A batch and its augmentation depend on (seed, step) alone. The validation part decides which weights
are best; the test part is looked at once, in the end.

Key: N pictures, C channels, H and W height and width, K classes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import hardware
import layers
import optim
from augment import ASYMMETRY, augment, mirror_matters, normalize, predict
from loop import run_loop
from model import PRESETS, NetConfig, build, macs, parameters_by_kind
from options import UserError, option, say
from ranks import synced
from report import conclude, describe, expectations
from run import RunDirectory, whole_file
from trainer import CommonConfig, Trainer, announce, as_described, facts

LAYERS = {"torch": nn, "scratch": layers}
CACHE = "pictures.npz"  # in a run: the decoded pictures, where reading them takes a while


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("shapes-10", "shapes-10, a folder, an .npz file, or hf:OWNER/NAME")
    image_size: int = option(
        0, "scale and crop pictures to this many pixels a side; 0 takes them as they are",
        least=0, most=1024,
    )  # fmt: skip
    steps: int = option(800, "optimizer steps", least=1)
    batch_size: int = option(128, "pictures per step, over all ranks", least=2)
    optimizer: str = option("muon", "how gradients become steps", ("muon", "sgd"))
    lr: float = option(0.2, "highest learning rate", above=0, most=1e6)
    momentum: float = option(0.9, "how much of the last direction is kept", least=0, below=1)
    nesterov: bool = option(True, "look ahead along the momentum (Nesterov)")
    weight_decay: float = option(5e-4, "of filters and matrices", least=0, most=1e6)
    grad_clip: float = option(0.0, "largest norm of the gradient; 0 is no limit", least=0)
    label_smoothing: float = option(
        0.1, "part of the label that is shared by all classes", least=0, below=1
    )
    schedule: str = option("onecycle", "of the learning rate", ("onecycle", "step", "constant"))
    warmup: float = option(0.2, "part of the steps in which one cycle rises", least=0, below=1)
    ema: float = option(0.95, "score averaged weights that keep this much a step", least=0, below=1)
    shift: int = option(
        -1, "pixels to move training pictures at most; -1 is a fourteenth", least=-1
    )
    flip: str = option("auto", "mirror training pictures; auto measures", ("auto", "on", "off"))
    cutout: int = option(0, "side of a square to hide in training pictures", least=0)
    views: bool = option(True, "average the answers to views that training taught")
    eval_every: int = option(50, "steps between looks at the validation part", least=1)
    layers: str = option("torch", "whose layers: torch's, or ours of layers.py", tuple(LAYERS))

    def __post_init__(self):
        super().__post_init__()
        if self.micro_batch_size:
            raise ValueError(
                "micro_batch_size: batch normalisation looks at the whole batch, which cannot be "
                "split; take a smaller batch_size"
            )


# ── Batches and scores ────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """All n pictures in the order of an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def batch_rows(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The pictures of a step (batch_size,): epochs follow one another without a break.

    So every batch is whole, whatever n is.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    return torch.from_numpy(
        np.concatenate([order(n, seed, e)[places[places // n == e] % n] for e in epochs])
    )


def answers(model: nn.Module, images: Tensor, constants, dtype: torch.dtype, views=()) -> Tensor:
    """The probabilities (N, K) that the model gives to pictures (N, C, H, W) of bytes.

    constants: what has the mean and std that the model wants. views: as `augment.predict`.
    """
    device = next(iter(model.state_dict().values())).device
    with hardware.autocast(device, dtype):
        return predict(model, images, constants.mean, constants.std, views)


def score_of(p: Tensor, labels: Tensor) -> dict:
    """Accuracy, and the mean nats of −log p(label), of answers p (N, K) to pictures with labels."""
    nats = -p.gather(1, labels[:, None]).clamp(min=1e-12).log()
    right = p.argmax(1) == labels
    return {
        "accuracy": right.double().mean().item(),
        "loss": nats.mean().item(),
        "pictures": len(right),
    }


def evaluate(model: nn.Module, split: data.Split, constants, dtype: torch.dtype, views=()) -> dict:
    """Score one part."""
    return score_of(answers(model, split.images, constants, dtype, views), split.labels)


class PictureTrainer(Trainer):
    """What of a training step is special about pictures: their views, and the loss of the label."""

    unit = "pictures"

    def __init__(
        self, config: TrainConfig, sizes: NetConfig, model: nn.Module, dataset, dtype: torch.dtype
    ):
        if config.shard:
            raise UserError("--shard is for weights that outgrow a device, and these networks are "
                            "small: leave it out and start with torchrun")  # fmt: skip
        side = min(sizes.image_height, sizes.image_width)
        self.shift = round(side / 14) if config.shift < 0 else config.shift
        if self.shift >= side:
            raise UserError(f"--shift {self.shift} is too far for pictures of {side} pixels")
        self.asymmetry = mirror_matters(dataset.train) if config.flip == "auto" else 0.0
        self.flip = config.flip == "on" or (config.flip == "auto" and self.asymmetry < ASYMMETRY)
        model = synced(model.to(memory_format=torch.channels_last))
        super().__init__(config, model, [], dtype)
        self.dataset, self.sizes = dataset, sizes
        self.images, self.labels = (
            x.to(self.device) for x in (dataset.train.images, dataset.train.labels)
        )
        self.flops_per_unit = 6 * macs(model, sizes)  # 2 forward, 4 backward

    @property
    def averaged(self) -> tuple[str, ...]:
        """The kinds of view that training taught the network, and so may be averaged over."""
        kinds = []
        if self.flip:
            kinds.append("flip")
        if self.shift:
            kinds.append("shift")
        return tuple(kinds)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.config
        groups = optim.groups(parameters_by_kind(model), config.optimizer, config.weight_decay)
        return optim.Momentum(
            groups, config.lr, config.momentum, nesterov=config.nesterov, dtype=self.dtype
        )

    def learning_rate(self, step: int) -> float:
        config = self.config
        return config.lr * optim.scheduled(config.schedule, step, config.steps, config.warmup)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Views of the pictures of a step (N, C, H, W), still in bytes, and their labels (N,)."""
        config = self.config
        rows = batch_rows(len(self.labels), config.batch_size, step, config.seed).to(self.device)
        dice = np.random.default_rng((config.seed, 1, step))
        views = augment(self.images[rows], self.shift, self.flip, config.cutout, dice)
        return views, self.labels[rows]

    def batch_loss(self, forward: Callable, images: Tensor, labels: Tensor) -> tuple:
        logits = forward(normalize(images, self.dataset.mean, self.dataset.std)).float()
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return loss, len(labels), {"accuracy": (logits.argmax(1) == labels).sum()}

    def score(self) -> dict:
        return evaluate(self.scored, self.dataset.valid, self.dataset, self.dtype)

    def describe(self, score: dict) -> str:
        return describe(score)


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def sizes_for(sizes: NetConfig, dataset: data.Dataset) -> NetConfig:
    """`sizes` with what the data decides. UserError if there is no such network."""
    channels, height, width = dataset.train.images.shape[1:]
    try:
        return replace(
            sizes,
            channels=channels,
            image_height=height,
            image_width=width,
            n_class=len(dataset.classes),
        )
    except ValueError as error:
        raise UserError(f"--data {dataset.name}: {error}") from None


def network(
    config: TrainConfig, sizes: NetConfig, loaded: checkpoint.Loaded | None = None
) -> nn.Module:
    """The network to train: fresh, or with loaded weights (a head that misfits is new)."""
    model = build(sizes, LAYERS[config.layers])
    if not loaded:
        return model
    state = loaded.model.state_dict()
    if loaded.sizes.n_class != sizes.n_class:
        say(f"{loaded.path} knows {loaded.sizes.n_class} classes: the last layer begins anew")
        state |= {name: model.state_dict()[name] for name in ("fc.weight", "fc.bias")}
    return checkpoint.fill(model, state, loaded.path)


def check_memory(config: TrainConfig, sizes: NetConfig, device: torch.device) -> None:
    """UserError if the training cannot fit, before any of it is built.

    Counted are the weights with gradient, momentum and average, and two activations of the first
    layer, four bytes a number.
    """
    with torch.device("meta"):  # shapes without memory
        n_parameter = sum(p.numel() for p in build(sizes).parameters())
    n_activation = config.batch_size * sizes.width * sizes.image_height * sizes.image_width
    hardware.check_memory(16 * n_parameter + 8 * n_activation, device, "training this")


def what_was_run(config: TrainConfig, sizes: NetConfig, trainer: PictureTrainer) -> dict:
    """What config.json keeps."""
    dataset = trainer.dataset
    pictures = {"name": dataset.name, "classes": dataset.classes, "ceiling": dataset.ceiling}
    pictures |= {"mean": dataset.mean, "std": dataset.std}
    views = trainer.averaged if config.views else ()
    return facts(config, sizes, data=pictures, views=views)


def keep_pictures(dataset: data.Dataset, folder) -> None:
    """Write the decoded pictures into a run, if decoding them took a while."""
    if dataset.stamp:
        with whole_file(folder / CACHE) as part, open(part, "wb") as file:
            dataset.save(file)


def finish(trainer: PictureTrainer, run_dir: RunDirectory, at_end: Callable | None) -> None:
    """Look at the test part, once, with the weights that were best on validation."""
    config, dataset = trainer.config, trainer.dataset
    try:
        loaded = checkpoint.load(run_dir.path)
        model = loaded.model.to(trainer.device, memory_format=torch.channels_last)
        p = answers(model, dataset.test.images, dataset, trainer.dtype, loaded.views)
        score = score_of(p, dataset.test.labels)
        run_dir.log(step=config.steps, split="test", **score)
        say(f"test part  {describe(score)}")
        described = as_described(config, trainer.sizes, (TrainConfig(), PRESETS["fast"]))
        conclude(dataset, run_dir.history(), score["accuracy"], described)
        if at_end:
            at_end(loaded, dataset, p)
    except KeyboardInterrupt:
        say(f"stopped; the trained network is in {run_dir.path}: --eval and --classify use it")
        raise


def train(
    config: TrainConfig,
    sizes: NetConfig,
    resume: bool = False,
    loaded: checkpoint.Loaded | None = None,
    at_end: Callable | None = None,
) -> list[dict]:
    """Train a network of these sizes, and return the log.

    resume: go on from the last checkpoint in `config.out`.
    loaded: the network in `config.weights`, where it is at hand already.
    at_end: called with the trained network, the data and the answers to the test part.

    UserError for data, sizes or files that will not do, and for a loss that is not finite.
    """
    run_dir = RunDirectory(config.out)
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = hardware.choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    with hardware.ranks(device), run_dir.writing():
        if run_dir.writes and not resume:
            run_dir.refuse_what_is_not_ours(config.data)
        at_start = not (resume and run_dir.checkpoint.exists())
        if config.weights and at_start and not loaded:
            loaded = checkpoint.load(config.weights)
        cache = run_dir.path / CACHE if resume else None
        dataset = data.load(config.data, config.seed, config.image_size, cache)
        sizes = sizes_for(loaded.sizes if loaded else sizes, dataset)
        check_memory(config, sizes, device)
        hardware.seed_everything(config.seed)
        model = network(config, sizes, loaded)
        trainer = PictureTrainer(config, sizes, model.to(device), dataset, dtype)
        if run_dir.writes and resume:
            run_dir.save_config(what_was_run(config, sizes, trainer))
        elif run_dir.writes:
            kept = what_was_run(config, sizes, trainer)
            run_dir.create(kept, lambda folder: keep_pictures(dataset, folder))
        hardware.barrier()
        why = f"{device}: {why_device}; {config.dtype}: {why_dtype}"
        announce(config, sizes, model, why)
        expectations(trainer, sizes)
        finished = run_loop(trainer, run_dir, resume)
        scored = {(line["split"], line["step"]) for line in run_dir.history()}
        if finished and run_dir.writes and ("test", config.steps) not in scored:
            finish(trainer, run_dir, at_end)
        return run_dir.history()
