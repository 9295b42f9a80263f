"""One training step, whatever is trained, and the options that every training has.

    CommonConfig    steps, batch size, learning rate, seed, device, …; subclasses add their own
    asked_for     what the command line asks, or with --resume what the run was started with
    Trainer       one optimizer step: micro-batches, ranks, clipping, averaged weights

A folder's train.py makes a subclass of `Trainer` that says what a batch and its loss are; loop.py
takes the steps. Both files are the same in every folder of Piko that uses torch, and nothing in
them knows a model.

The rule that `Trainer.step` keeps: the gradient of a step is that of

    Σ loss over all targets of the batch / number of these targets

so how a batch is split, into micro-batches or over ranks, changes the speed and not the result.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import hardware
from options import UserError, check, from_options, make_config, option, say
from run import RunDirectory, read_json, refuse_endless

# what a resumed run may change: nothing here changes what a step computes
RESUMABLE = {"out", "steps", "device", "compile", "shard", "eval_every", "checkpoint_every"}
# in what a run may differ from the one that the README describes and still be compared with it
FREE = {"out", "seed", "device", "dtype", "compile", "checkpoint_every", "micro_batch_size"}


@dataclass(frozen=True)
class CommonConfig:
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("", "what to train on")
    out: str = option(str(Path(__file__).resolve().parent / "runs" / "default"), "run directory")
    steps: int = option(600, "optimizer steps", least=1)
    batch_size: int = option(16, "rows per step, over all ranks", least=1)
    micro_batch_size: int = option(0, "rows at a time, to save memory; 0 is all", least=0)
    lr: float = option(1e-3, "highest learning rate", above=0)
    grad_clip: float = option(1.0, "largest norm of the gradient; 0 is no limit", least=0)
    ema: float = option(0.0, "score averaged weights that keep this much a step", least=0, below=1)
    eval_every: int = option(100, "steps between looks at the validation part", least=1)
    checkpoint_every: int = option(100, "steps between checkpoints", least=1)
    seed: int = option(0, "of weights and batches", least=0, most=2**32 - 1)
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "number format of products", ("auto", "float32", "bfloat16"))
    weights: str = option("", "begin with these weights")
    compile: bool = option(False, "torch.compile: a minute of waiting, then faster steps")
    shard: bool = option(False, "under torchrun: shard weights and optimizer instead of copying")

    def __post_init__(self):
        check(self)


# ── Which run ─────────────────────────────────────────────────────────────────────────────────────


def asked_for(
    args, config: CommonConfig, sizes, inside: tuple[str, ...], movable: tuple[str, ...] = ()
) -> tuple:
    """(training, sizes) as the command line asks, or with --resume as the run was started.

    inside: the names of data that comes with the folder, which are no paths. movable: what a
    resumed run of this folder may change beside RESUMABLE.
    UserError for a resumed run that would become another one.
    """
    if not args.resume:
        config, sizes = from_options(config, args), from_options(sizes, args)
        return with_whole_paths(config, inside), sizes
    run_dir = RunDirectory(getattr(args, "out", config.out))
    started = started_with(run_dir.path, type(config), type(sizes))
    asked = tuple(from_options(base, args) for base in started)
    asked = (with_whole_paths(asked[0], inside), asked[1])
    was, now = ({**vars(config), **vars(sizes)} for config, sizes in (started, asked))
    for name, value in was.items():
        if now[name] not in (value, "auto") and name not in RESUMABLE.union(movable):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run to resume has {flag} {value}, not {now[name]}: leave it out")
    done = max((line["step"] for line in run_dir.history()), default=0)
    if asked[0].steps < min(done, started[0].steps):
        raise UserError(f"--steps {asked[0].steps}: the run to resume has {done} steps already")
    return asked


def with_whole_paths(config: CommonConfig, inside: tuple[str, ...]) -> CommonConfig:
    """The same with whole paths to the user's data, so that they are found from anywhere."""
    changes = {}
    for name in ("data", "weights"):
        value = getattr(config, name)
        if value and value not in inside and not value.startswith("hf:"):
            changes[name] = str(Path(value).absolute())
    return dataclasses.replace(config, **changes)


def started_with(folder: Path, training: type, model: type) -> tuple:
    """What the run in `folder` was started with.

    UserError if there is none, or if not all of it is known: no default may change a run.
    """
    saved = read_json(folder / "config.json", optional=True)
    if "train" not in saved:
        raise UserError(f"nothing to resume in {folder}: no run was started there")
    refuse_endless(folder)
    for part, kind in (("train", training), ("model", model)):
        names = {field.name for field in dataclasses.fields(kind)} - {"out"}
        if isinstance(saved.get(part), dict) and (lacking := names - saved[part].keys()):
            raise UserError(f"{folder}/config.json, {part}: {min(lacking)} is missing")
    config = make_config(training, saved["train"], f"{folder}/config.json, train")
    sizes = make_config(model, saved.get("model"), f"{folder}/config.json, model")
    return dataclasses.replace(config, out=str(folder)), sizes


def facts(config: CommonConfig, sizes, **more) -> dict:
    """What config.json keeps of a run. Where it lies is not part of it: a copy is a run too."""
    train = {k: v for k, v in dataclasses.asdict(config).items() if k != "out"}
    return {"model": dataclasses.asdict(sizes), "train": train} | more


def as_described(config: CommonConfig, sizes, shipped: tuple) -> bool:
    """Is this the run that the README describes, but for the seed and the machine?"""
    pairs = zip((config, sizes), shipped, strict=True)
    return all(
        getattr(ours, field.name) == getattr(theirs, field.name)
        for ours, theirs in pairs
        for field in dataclasses.fields(theirs)
        if field.name not in FREE
    )


def parameter_groups(model: nn.Module) -> dict[str, int]:
    """How many parameters there are under each name that stands right inside model or block."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        while len(parts) > 2 and parts[1].isdigit():  # blocks.3.ffn.w1.weight is one of ffn
            parts = parts[2:]
        counts[parts[0]] = counts.get(parts[0], 0) + parameter.numel()
    return counts


def announce(config: CommonConfig, sizes, model: nn.Module, why: str) -> None:
    """Print what is about to be trained, and where."""
    groups = parameter_groups(model)
    shown = ", ".join(f"{name} {count:,}" for name, count in groups.items())
    say(f"device     {why}; {hardware.world()} rank(s)")
    say(f"config     {config}\n           {sizes}")
    say(f"parameters {sum(groups.values()):,}: {shown}")


# ── One step ──────────────────────────────────────────────────────────────────────────────────────


class Trainer:
    """Model and optimizer of one run, and the step that joins them.

    A subclass says what is trained on, by `batch`, `batch_loss`, `learning_rate` and `score`. It
    may set `flops_per_unit`, what training on one unit (a token, a picture) costs.
    """

    unit, flops_per_unit = "rows", 0.0

    def __init__(self, config: CommonConfig, model: nn.Module, pieces: list, dtype: torch.dtype):
        if config.batch_size < hardware.world():
            raise UserError(f"--batch-size {config.batch_size} is less than one row a rank")
        if config.shard and config.ema:
            raise UserError("--shard and --ema do not go together")
        self.config, self.dtype = config, dtype
        self.device = next(model.parameters()).device
        self.average = copy.deepcopy(model).eval() if config.ema else None
        self.model = hardware.distribute(model, pieces, config.shard)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = self.make_optimizer(model)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all parameters of `model`."""
        raise NotImplementedError

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """The rows of a step, as tensors with the same first size: a function of seed and step."""
        raise NotImplementedError

    def batch_loss(self, forward: Callable, *rows: Tensor) -> tuple[Tensor, Tensor, dict]:
        """(Σ loss, number of targets, numbers to log) of some rows of a batch.

        The numbers to log are sums over the targets as well; the log shows them per target.
        """
        raise NotImplementedError

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step."""
        raise NotImplementedError

    def score(self) -> dict[str, float]:
        """Numbers of the validation part; the model is in eval() mode. `loss` chooses the best."""
        raise NotImplementedError

    def describe(self, score: dict) -> str:
        """A score in words."""
        return f"loss {score['loss']:.4f}"

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        """How many units a batch has, for the rate."""
        return len(rows[0])

    @property
    def scored(self) -> nn.Module:
        """The model that is scored and saved: the averaged weights, where there are any."""
        return self.model if self.average is None else self.average

    def weights(self) -> dict[str, Tensor]:
        """What model.safetensors holds."""
        return hardware.full_weights(self.scored)

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step. Returns the loss per target and what else is to be logged.

        If loss or gradient are not finite, no step is taken and the loss is NaN.
        """
        rows = self.batch(number)
        self.units_done = self.n_unit(rows)
        self.model.train()
        sums = self.accumulate(self.parts(rows))
        numbers = [torch.as_tensor(x, device=self.device).float() for x in sums.values()]
        totals = hardware.sum_over_ranks(torch.stack(numbers)).tolist()
        totals = dict(zip(sums, totals, strict=True))
        count = totals.pop("count")
        norm = self.finish_gradient(hardware.world() / count) if count else math.nan
        if not math.isfinite(totals["loss"] + norm):
            return {"loss": math.nan}
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(number) * group.get("scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.follow(number)
        return {name: total / count for name, total in totals.items()}

    def parts(self, rows: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """This rank's share of a batch in micro-batches, as many on each rank: they keep step."""
        n_row, rank, world = len(rows[0]), hardware.rank(), hardware.world()
        n_part = math.ceil(math.ceil(n_row / world) / (self.config.micro_batch_size or n_row))
        shares = [tensor[rank::world].tensor_split(n_part) for tensor in rows]
        return list(zip(*shares, strict=True))

    def accumulate(self, parts: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """Add up the gradient of the summed loss. Returns the sums: loss, count, what to log."""
        sums: dict[str, Tensor] = {}
        for i, part in enumerate(parts):
            last = i + 1 == len(parts)  # ranks exchange gradients once, after the last part
            several = isinstance(self.model, DistributedDataParallel)
            with contextlib.nullcontext() if last or not several else self.model.no_sync():
                with hardware.autocast(self.device, self.dtype):
                    loss, count, numbers = self.batch_loss(
                        self.forward, *(tensor.to(self.device) for tensor in part)
                    )
                loss.backward()
            for name, value in {"loss": loss.detach(), "count": count, **numbers}.items():
                sums[name] = sums.get(name, 0) + value
        return sums

    def finish_gradient(self, factor: float) -> float:
        """Turn the gradient of the sum into that of the mean, clipped. Returns its norm before.

        factor: ranks / targets, since the gradients were averaged over the ranks already.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item() * factor
        clip = self.config.grad_clip
        if clip and norm > clip:
            factor *= clip / norm
        torch._foreach_mul_(gradients, factor)
        return norm

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """Move the averaged weights a little towards the current ones; early on, faster."""
        if self.average is None:
            return
        keep = min(self.config.ema, (1 + number) / (10 + number))
        current = getattr(self.model, "module", self.model).state_dict()
        for name, mean in self.average.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(current[name], 1 - keep)
            else:
                mean.copy_(current[name])
