"""Training from the first step to the last: scores, logs, saves, stops, and goes on after a kill.

    run_loop        steps until the last one or Ctrl-C
    Log             log.jsonl, the progress bar, and rates
    save, restore   checkpoint.pt: a resumed run ends with the same bits as one left alone

This file is the same in every folder of Piko that uses torch, and nothing in it knows a model.
"""

import contextlib
import math
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

import hardware
from options import UserError, say
from run import RunDirectory, stop_signals, whole_file
from trainer import Trainer

LOG_EVERY = 20  # steps


def run_loop(trainer: Trainer, run_dir: RunDirectory, resume: bool) -> bool:
    """Train until the last step, or until Ctrl-C. Returns whether the last step was reached.

    With `resume` it goes on from the last checkpoint, and ends with the same bits as a run that
    was left alone. UserError for a loss that is not finite.
    """
    config = trainer.config
    done, best, log = 0, math.inf, Log(trainer, run_dir)
    if resume:
        done, best = restore(trainer, run_dir, log)
    with stop_signals() as asked_to_stop, log.progress(done):
        while done < config.steps and not hardware.any_rank(asked_to_stop(), trainer.device):
            start = time.perf_counter()
            numbers = trainer.step(done)
            if not math.isfinite(numbers["loss"]):
                last = run_dir.checkpoint if run_dir.checkpoint.exists() else "the start"
                raise UserError(
                    f"the loss is not finite at step {done + 1}: try --lr {config.lr / 4:g}; "
                    f"the last good state is {last}"
                )
            done += 1
            log.step(done, numbers, time.perf_counter() - start)
            if done % config.eval_every == 0 or done == config.steps:
                score = scores(trainer)
                log.score(done, "valid", score)
                if score["loss"] < best or not run_dir.weights.exists():
                    best = score["loss"]
                    save_weights(run_dir, trainer.weights())
            if done % config.checkpoint_every == 0 or done == config.steps:
                save(trainer, run_dir, done, best, log)
        if done < config.steps:
            save(trainer, run_dir, done, best, log)
            say(f"stopped at step {done} and saved")
            say(f"go on with --train --resume --out {run_dir.path}")
    return done == config.steps


@torch.no_grad()
def scores(trainer: Trainer) -> dict[str, float]:
    """The numbers of the validation part, with nothing in the model that differs by mode."""
    trainer.model.eval()
    return trainer.score()


class Log:
    """Writes log.jsonl and shows it. Rates count the time of steps, not of scores and saves."""

    def __init__(self, trainer: Trainer, run_dir: RunDirectory):
        self.trainer, self.run_dir = trainer, run_dir
        self.pending: list[dict] = []  # the steps since the last line
        self.busy = self.trained = self.before = 0.0
        self.units, self.begin = 0, time.perf_counter()
        self.peak = hardware.matmul_rate(trainer.device, trainer.dtype)

    @contextlib.contextmanager
    def progress(self, done: int) -> Iterator[None]:
        """A bar with rate and time left on a terminal, plain lines elsewhere."""
        past = self.run_dir.history()
        self.trained, self.before = latest(past, "train_seconds"), latest(past, "seconds")
        total = self.trainer.config.steps
        with tqdm(total=total, initial=done, disable=None, unit="step", leave=False) as self.bar:
            yield

    def step(self, done: int, numbers: dict, seconds: float) -> None:
        """A training step is done; every LOG_EVERY of them give one line of their means.

        UserError if the steps before, from a checkpoint, logged other numbers.
        """
        if self.pending and self.pending[0].keys() != numbers.keys():
            raise UserError(f"{self.run_dir.checkpoint} is damaged: its pending numbers are others")
        self.pending.append(numbers)
        self.busy, self.trained = self.busy + seconds, self.trained + seconds
        self.units += self.trainer.units_done
        self.bar.update()
        if done % LOG_EVERY == 0 or done in (1, self.trainer.config.steps):
            means = {k: sum(x[k] for x in self.pending) / len(self.pending) for k in numbers}
            lr, rate = self.trainer.learning_rate(done - 1), self.units / self.busy
            unit, flops = self.trainer.unit, rate * self.trainer.flops_per_unit
            self.write(done, "train", **means, lr=lr, **{f"{unit}_per_second": round(rate)},
                       gemm_fraction=round(flops / self.peak, 4))  # fmt: skip
            self.note(
                f"step {done:5d}  loss {means['loss']:.4f}  lr {lr:.1e}  {rate:,.0f} {unit}/s"
            )
            self.pending, self.busy, self.units = [], 0.0, 0

    def score(self, done: int, split: str, score: dict) -> None:
        """A part was scored."""
        self.write(done, split, **score)
        self.note(f"step {done:5d}  {split} {self.trainer.describe(score)}")

    def write(self, done: int, split: str, **numbers) -> None:
        seconds = round(self.before + time.perf_counter() - self.begin, 2)
        times = {"train_seconds": round(self.trained, 2), "seconds": seconds}
        self.run_dir.log(step=done, split=split, **numbers, **times)

    def note(self, text: str) -> None:
        self.bar.clear()
        say(text)


def latest(lines: list[dict], name: str) -> float:
    """The largest number that logged lines have under `name`; 0 where there is none."""
    found = [line.get(name) for line in lines]
    numbers = [x for x in found if type(x) in (int, float) and math.isfinite(x)]
    return max(numbers, default=0.0)


# ── Saving ────────────────────────────────────────────────────────────────────────────────────────


def save_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with whole_file(file) as part:
        try:
            safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # its word for a full disk
            raise UserError(f"cannot write {file}: no space? {error}") from None


def save_weights(run_dir: RunDirectory, tensors: dict[str, Tensor]) -> None:
    """Write model.safetensors."""
    if run_dir.writes:
        save_tensors(run_dir.weights, tensors)


def save(trainer: Trainer, run_dir: RunDirectory, done: int, best: float, log: Log) -> None:
    """Write checkpoint.pt: all that `restore` needs to go on as if nothing had happened."""
    state = hardware.full_state(trainer.model, trainer.optimizer)
    state |= {"step": done, "best": best, "pending": log.pending}
    if trainer.average is not None:
        state["average"] = trainer.average.state_dict()
    rngs = [hardware.rng_state()]
    if hardware.world() > 1:
        rngs = [None] * hardware.world()
        torch.distributed.all_gather_object(rngs, hardware.rng_state())
    if run_dir.writes:
        with whole_file(run_dir.checkpoint) as part:
            try:
                torch.save(state | {"rng": rngs}, part)
            except RuntimeError as error:  # its word for a full disk
                raise UserError(f"cannot write {run_dir.checkpoint}: no space? {error}") from None


def restore(trainer: Trainer, run_dir: RunDirectory, log: Log) -> tuple[int, float]:
    """Go back to the last checkpoint. Returns the steps done and the best validation loss.

    A run that was stopped before its first checkpoint begins anew: (0, ∞).
    """
    done, best = 0, math.inf
    if run_dir.checkpoint.exists():
        try:
            refuse_flipped_bits(run_dir.checkpoint)
            state = torch.load(run_dir.checkpoint, map_location="cpu", weights_only=True)
            refuse_misfits(trainer, state)
            done, best, log.pending = state["step"], state["best"], state["pending"]
            hardware.load_full_state(trainer.model, trainer.optimizer, state)
            if trainer.average is not None:
                trainer.average.load_state_dict(state["average"])
            hardware.restore_rng(state["rng"][hardware.rank() % len(state["rng"])])
        except Exception as error:  # what a damaged file makes torch raise has no common class
            what = f"{type(error).__name__}: {error}"
            raise UserError(f"{run_dir.checkpoint} is damaged or of another run ({what})") from None
    run_dir.truncate_log(done)
    return done, best


def refuse_flipped_bits(file: Path) -> None:
    """ValueError if a file of torch.save fails its own checksums, which torch.load passes over.

    Files from before torch 1.6 have none, and torch.save can be told to write zeros instead.
    """
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            has_sums = any(part.CRC for part in archive.infolist())
            if has_sums and (damaged := archive.testzip()):
                raise ValueError(f"the checksum of {damaged} does not fit")


def refuse_misfits(trainer: Trainer, state: dict) -> None:
    """ValueError if a checkpoint cannot be of this run, before anything of it is put in place."""
    done, best, pending = state["step"], state["best"], state["pending"]
    if type(done) is not int or not 0 <= done <= trainer.config.steps:
        raise ValueError(f"step {done} is no step of this run")
    if type(best) not in (int, float) or math.isnan(best):
        raise ValueError(f"best {best} is no loss")
    names = [set(line) if isinstance(line, dict) else None for line in pending]
    numbers = [x for line in pending if isinstance(line, dict) for x in line.values()]
    if any(line != names[0] or not line for line in names) or set(map(type, numbers)) - {
        int,
        float,
    }:
        raise ValueError("pending holds something else than the numbers of steps")
    ours = hardware.full_state(trainer.model, trainer.optimizer)  # before the first step
    if hardware.rank() > 0:
        return  # the first rank alone has the whole of it
    refuse_other_shapes(ours["model"], state["model"], "the model")
    for name, wanted in ours["optimizer"]["state"].items():
        stored = state["optimizer"]["state"][name]
        refuse_other_shapes(wanted, stored, f"the optimizer's state of {name}")
    groups = ours["optimizer"]["param_groups"], state["optimizer"]["param_groups"]
    for group, stored in zip(*groups, strict=True):
        if any(plain(stored[name]) != plain(group[name]) for name in group.keys() - {"lr"}):
            raise ValueError("the optimizer was set otherwise")


def refuse_other_shapes(ours: dict[str, Tensor], theirs: dict[str, Tensor], what: str) -> None:
    """ValueError unless `theirs` has tensors of these names, shapes and number formats."""
    for name, tensor in ours.items():
        found = theirs[name]
        if found.shape != tensor.shape or found.dtype != tensor.dtype:
            raise ValueError(f"{what}: {name} is {tuple(found.shape)} of {found.dtype}")


def plain(value):
    """Betas are a tuple in a new optimizer and a list in one that was loaded."""
    return tuple(value) if isinstance(value, list) else value
