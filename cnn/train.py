"""Training: momentum on the cross-entropy of augmented pictures, resumable to the bit.

`train(config, sizes)` is the whole story and returns the log. A batch and its augmentation depend
on (seed, step) alone. The validation part decides which weights are best; the test part is looked
at once, in the end.

Batch normalisation looks at the whole batch, so under torchrun its sums run over all ranks, and
there is no accumulation over smaller batches: that would be another network.
"""

import copy
import dataclasses
import functools
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import layers
import optim
import run as machinery
from augment import ASYMMETRY, augment, mirror_matters, normalize, predict
from model import NetConfig, build
from ranks import synced
from report import Log, announce, conclude
from run import RunDirectory, UserError, option, say

HERE = Path(__file__).resolve().parent
RESUMABLE = {"out", "data", "steps", "device", "compile", "eval_every", "checkpoint_every"}
LAYERS = {"torch": nn, "scratch": layers}


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("shapes-10", "shapes-10, a folder, an .npz file, or hf:OWNER/NAME")
    out: str = option(str(HERE / "runs" / "default"), "run directory")
    steps: int = option(800, "optimizer steps")
    batch_size: int = option(256, "pictures per step, over all ranks")
    optimizer: str = option("muon", "how gradients become steps", ("muon", "sgd"))
    lr: float = option(0.2, "highest learning rate")
    momentum: float = option(0.9, "Nesterov's")
    weight_decay: float = option(5e-4, "of filters and matrices")
    label_smoothing: float = option(0.1, "part of the label that is shared by all classes")
    schedule: str = option("onecycle", "of the learning rate", ("onecycle", "step", "constant"))
    warmup: float = option(0.2, "part of the steps in which one cycle rises")
    ema: float = option(0.95, "keep this much of the averaged weights each step; 0 is no average")
    shift: int = option(-1, "pixels to move training pictures at most; -1 is a fourteenth")
    flip: str = option("auto", "mirror training pictures; auto measures", ("auto", "on", "off"))
    cutout: int = option(0, "side of a square to hide in training pictures")
    views: bool = option(True, "average the answers to views that training taught")
    eval_every: int = option(50, "steps between looks at the validation part")
    checkpoint_every: int = option(100, "steps between checkpoints")
    seed: int = option(0, "of weights, batches and the validation part")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "number format of products", ("auto", "float32", "bfloat16"))
    layers: str = option("torch", "whose layers: torch's, or ours of layers.py", tuple(LAYERS))
    weights: str = option("", "begin with these weights")
    compile: bool = option(False, "torch.compile: a minute of waiting, then faster steps")

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("weight_decay", "cutout", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        for name in ("momentum", "label_smoothing", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.shift < -1:
            raise ValueError(f"shift must not be negative: {self.shift}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be less than 2³², not {self.seed}")


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


def evaluate(model: nn.Module, split: data.Split, dataset, dtype: torch.dtype, averaged=()) -> dict:
    """Score one part: accuracy, and nats of −log p(label)."""
    device = next(iter(model.state_dict().values())).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        p = predict(model, split.images, dataset.mean, dataset.std, averaged)
    nats = -p.gather(1, split.labels[:, None]).clamp(min=1e-12).log()
    right = p.argmax(1) == split.labels
    return {
        "accuracy": right.double().mean().item(),
        "loss": nats.mean().item(),
        "pictures": len(right),
    }


class Trainer:
    """Model, its average and the optimizer of one run, and the step that joins them."""

    def __init__(self, config: TrainConfig, model: nn.Module, dataset, dtype: torch.dtype):
        self.config, self.dataset, self.dtype = config, dataset, dtype
        self.device = next(model.parameters()).device
        self.images, self.labels = (
            x.to(self.device) for x in (dataset.train.images, dataset.train.labels)
        )
        side = min(self.images.shape[2:])
        self.shift = round(side / 14) if config.shift < 0 else config.shift
        if self.shift >= side:
            raise UserError(f"--shift {self.shift} is too far for pictures of {side} pixels")
        self.asymmetry = mirror_matters(dataset.train) if config.flip == "auto" else 0.0
        self.flip = config.flip == "on" or (config.flip == "auto" and self.asymmetry < ASYMMETRY)
        model = model.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(model) if config.ema else model
        self.model = machinery.distribute(synced(model), [], shard=False)
        self.optimizer = optim.Momentum(
            optim.groups(model, config.optimizer, config.weight_decay),
            lr=config.lr, momentum=config.momentum,
        )  # fmt: skip
        self.forward = torch.compile(self.model) if config.compile else self.model

    @property
    def averaged(self) -> tuple[str, ...]:
        """The kinds of view that training taught the network, and so may be averaged over."""
        return ("flip",) * self.flip + ("shift",) * bool(self.shift)

    def learning_rate(self, step: int) -> float:
        config = self.config
        return config.lr * optim.scheduled(config.schedule, step, config.steps, config.warmup)

    def step(self, number: int, rank: int, world: int) -> tuple[float, float]:
        """One optimizer step. Returns loss and accuracy of the whole batch.

        The loss is NaN, and no step was taken, if the gradient is not finite.
        """
        config = self.config
        rows = batch_rows(len(self.labels), config.batch_size, number, config.seed)
        rows = rows.to(self.device)
        dice = np.random.default_rng((config.seed, 1, number))
        images = augment(self.images[rows], self.shift, self.flip, config.cutout, dice)
        images, labels = images[rank::world], self.labels[rows[rank::world]]
        images = normalize(images, self.dataset.mean, self.dataset.std)
        with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
            logits = self.forward(images).float()
        smoothing = config.label_smoothing
        loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        loss = loss / config.batch_size
        (loss * world).backward()  # times world: gradients are averaged over the ranks
        right = (logits.argmax(1) == labels).sum() / config.batch_size
        total = machinery.sum_over_ranks(torch.stack((loss.detach(), right)))
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        if not torch.isfinite(total[0] + norm):
            return math.nan, 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number) * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.follow(number)
        return tuple(total.tolist())

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Move the averaged weights a little towards the current ones; early on, faster."""
        keep = min(self.config.ema, (1 + number) / (10 + number))
        if self.config.ema:
            current = getattr(self.model, "module", self.model).state_dict()
            for name, mean in self.average.state_dict().items():
                if mean.is_floating_point():
                    mean.lerp_(current[name], 1 - keep)
                else:
                    mean.copy_(current[name])

    def save(self, run: RunDirectory, step: int, best: tuple[float, float]) -> None:
        """Write checkpoint.pt: all that `restore` needs to go on as if nothing had happened."""
        state = machinery.full_state(self.model, self.optimizer)
        state |= {"average": self.average.state_dict(), "step": step, "best": list(best)}
        run.save_checkpoint(state)

    def restore(self, run: RunDirectory) -> tuple[int, tuple[float, float]]:
        """Go back to the last checkpoint. Returns the steps done and the best validation score."""
        state = run.load_checkpoint()
        try:
            machinery.load_full_state(self.model, self.optimizer, state)
            self.average.load_state_dict(state["average"])
            done, best = state["step"], tuple(state["best"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{run.checkpoint} is damaged or of another run: {error}") from None
        run.history(before=done)
        return done, best


def absolute(config: TrainConfig) -> TrainConfig:
    """The same with whole paths, so that a run is found again from another folder."""
    paths = {name: getattr(config, name) for name in ("out", "data", "weights")}
    named = ("shapes-10", "hf:")  # what is no path
    whole = {k: str(Path(v).resolve()) for k, v in paths.items() if v and not v.startswith(named)}
    return dataclasses.replace(config, **whole)


def started_with(folder: Path) -> tuple[TrainConfig, NetConfig]:
    """What the run in `folder` was started with. UserError if there is none."""
    saved = checkpoint.read_config(folder)
    if "train" not in saved:
        raise UserError(f"nothing to resume in {folder}: no run was started there")
    try:
        return TrainConfig(**saved["train"]), NetConfig(**saved["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from None


def refuse_changes(started: tuple, asked: tuple) -> None:
    """UserError if the command line asks a resumed run to be another one."""
    was, now = ({**vars(config), **vars(sizes)} for config, sizes in (started, asked))
    for name, value in was.items():
        if now[name] not in (value, "auto") and name not in RESUMABLE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run to resume has {flag} {value}, not {now[name]}: leave it out")


def network(config: TrainConfig, sizes: NetConfig, dataset) -> tuple[nn.Module, NetConfig]:
    """The network for this data, fresh or from `config.weights` (a head that misfits is new)."""
    channels, height, width = dataset.train.images.shape[1:]
    pictures = {"channels": channels, "image_height": height, "image_width": width}
    pictures |= {"n_class": len(dataset.classes)}
    try:
        if not config.weights:
            sizes = dataclasses.replace(sizes, **pictures)
            return build(sizes, LAYERS[config.layers]), sizes
        loaded = checkpoint.load(config.weights)
        sizes = dataclasses.replace(loaded.sizes, **pictures)
    except ValueError as error:
        raise UserError(f"--data {dataset.name}: {error}") from None
    model, state = build(sizes, LAYERS[config.layers]), loaded.model.state_dict()
    if loaded.sizes.n_class != sizes.n_class:
        say(f"{config.weights} knows {loaded.sizes.n_class} classes: the last layer begins anew")
        state |= {name: model.state_dict()[name] for name in ("fc.weight", "fc.bias")}
    return checkpoint.fill(model, state, config.weights), sizes


def finish(run: RunDirectory, trainer: Trainer, log: Log, facts: dict) -> None:
    """Look at the test part, once, with the weights that were best on validation."""
    dataset, kinds = trainer.dataset, facts["views"]
    model = checkpoint.load(run.path).model.to(trainer.device)
    model = model.to(memory_format=torch.channels_last)
    result = evaluate(model, dataset.test, dataset, trainer.dtype, kinds)
    log.score(trainer.config.steps, "test", result)
    conclude(dataset, run.history(), result["accuracy"])


def train(config: TrainConfig, sizes: NetConfig, resume: bool = False) -> list[dict]:
    """Train, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    Raises UserError for data, sizes or files that will not do and for a loss that is not finite.
    """
    device, why_device = machinery.choose_device(config.device)
    dtype, why_dtype = machinery.choose_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    run = RunDirectory(config.out)
    with machinery.ranks(device) as (rank, world), machinery.ctrl_c() as stopped:
        machinery.seed_everything(config.seed)
        dataset = data.load(config.data, config.seed)
        model, sizes = network(config, sizes, dataset)
        trainer = Trainer(config, model.to(device), dataset, dtype)
        if run.writes and not resume:
            run.start()
        done, best = trainer.restore(run) if resume else (0, (-1.0, 0.0))
        say(f"device     {device}: {why_device}; {config.dtype}: {why_dtype}; {world} rank(s)")
        announce(model, sizes, trainer)
        facts = {"name": dataset.name, "classes": dataset.classes}
        facts |= {"mean": dataset.mean, "std": dataset.std, "ceiling": dataset.ceiling}
        facts = {"model": asdict(sizes), "train": asdict(config), "data": facts}
        facts["views"] = trainer.averaged if config.views else ()
        run.save_config(facts)
        log = Log(run, trainer, sizes, done)
        while done < config.steps and not stopped():
            start = time.perf_counter()
            loss, accuracy = trainer.step(done, rank, world)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {done + 1}: try --lr {config.lr / 4:g}; the last "
                    f"good state is {run.checkpoint if run.checkpoint.exists() else 'the start'}"
                )
            done += 1
            log.step(done, loss, accuracy, time.perf_counter() - start)
            if done % config.eval_every == 0 or done == config.steps:
                score = evaluate(trainer.average, dataset.valid, dataset, dtype)
                log.score(done, "valid", score)
                if (score["accuracy"], -score["loss"]) > best:
                    best = (score["accuracy"], -score["loss"])
                    run.save_weights(trainer.average.state_dict())
            if done % config.checkpoint_every == 0 or done == config.steps:
                trainer.save(run, done, best)
        log.progress.close()
        if done < config.steps:
            trainer.save(run, done, best)
            say(f"stopped at step {done} and saved; go on with --train --resume --out {run.path}")
        elif run.writes and run.history()[-1]["split"] != "test":
            finish(run, trainer, log, facts)
        machinery.barrier()  # nobody leaves the group before the others
        return run.history()
