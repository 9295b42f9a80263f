"""What a run says: the numbers to expect, log.jsonl and its progress, and how it went."""

import math
import statistics
import time

from torch import nn

import run as machinery
from model import NetConfig, macs
from run import RunDirectory, say

ON_TRACK = 0.01  # below the ceiling: what the default run must reach
LOG_EVERY = 20  # steps
BOARD = (0.5, 0.9, 0.95, 0.98, 0.99, 0.993, 0.995)  # validation accuracies, × the ceiling


def announce(model: nn.Module, sizes: NetConfig, trainer) -> None:
    """Print what is about to happen and the numbers to expect. trainer: a `train.Trainer`."""
    config = trainer.config
    counts = {"filters": 0, "matrices": 0, "norms and biases": 0}
    for parameter in model.parameters():
        counts[{4: "filters", 2: "matrices"}.get(parameter.dim(), "norms and biases")] += (
            parameter.numel()
        )
    dataset, shown = trainer.dataset, ", ".join(f"{name} {n:,}" for name, n in counts.items())
    epochs = config.steps * config.batch_size / len(dataset.train)
    say(f"config     {config}")
    say(f"           {sizes}")
    say(f"parameters {sum(counts.values()):,}: {shown}; {macs(model, sizes) / 1e6:.1f} million "
        "multiply-adds a picture")  # fmt: skip
    say(f"data       {dataset.name}: {len(dataset.train):,} pictures, {len(dataset.valid):,} to "
        f"validate, {len(dataset.test):,} to test; {epochs:.1f} epochs")  # fmt: skip
    mirrored = "mirrored" if trainer.flip else "not mirrored"
    if config.flip == "auto":
        mirrored += f" (left differs from right by {100 * trainer.asymmetry:.1f} %)"
    say(f"views      moved by up to {trainer.shift} pixels, {mirrored}")
    k = sizes.n_class
    say(f"expect     loss ln {k} = {math.log(k):.3f} nats at step 1")
    if dataset.ceiling:
        say(f"           and at the very best {percent(dataset.ceiling)} right, the Bayes ceiling")


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"


def verdict(dataset, accuracy: float) -> str:
    """Whether a run came as near to the ceiling of its data as the README says it should."""
    if dataset.ceiling is None:
        return f"done: {percent(accuracy)} of the test part (the ceiling of this data is unknown)"
    word = "on track" if accuracy >= dataset.ceiling - ON_TRACK else "off track"
    return (f"{word}: {percent(accuracy)} of the test part, Bayes ceiling "
            f"{percent(dataset.ceiling)}, the README promises at most 1 % less")  # fmt: skip


class Log:
    """Writes log.jsonl and shows it: means over the steps since the last line of their kind.

    Rates and times count training alone, not validation.
    """

    def __init__(self, run: RunDirectory, trainer, sizes: NetConfig, done: int):
        self.run, self.config, self.trainer = run, trainer.config, trainer
        peak = machinery.matmul_rate(trainer.device, trainer.dtype)
        self.pictures_at_peak = peak / (6 * macs(trainer.average, sizes))
        past = [line["train_seconds"] for line in run.history()]
        self.trained, self.begin = max(past, default=0.0), time.perf_counter()
        self.progress = machinery.Progress(self.config.steps, done)
        self.busy, self.losses, self.accuracies = 0.0, [], []  # since the last line

    def step(self, done: int, loss: float, accuracy: float, seconds: float) -> None:
        """One training step is done."""
        self.busy += seconds
        self.trained += seconds
        self.progress.step()
        self.losses.append(loss)
        self.accuracies.append(accuracy)
        if done % LOG_EVERY == 0 or done in (1, self.config.steps):
            speed = len(self.losses) * self.config.batch_size / self.busy
            loss, accuracy = statistics.mean(self.losses), statistics.mean(self.accuracies)
            self.busy, self.losses, self.accuracies = 0.0, [], []
            lr = self.trainer.learning_rate(done - 1)
            self.write(done, "train", loss=loss, accuracy=accuracy, lr=lr,
                       pictures_per_second=round(speed),
                       gemm_fraction=round(speed / self.pictures_at_peak, 4))  # fmt: skip
            self.progress.note(
                f"step {done:5d}  loss {loss:.4f}  lr {lr:.1e}  {speed:,.0f} pictures/s"
            )

    def score(self, done: int, split: str, score: dict) -> None:
        """A part was scored."""
        self.write(done, split, **score)
        right, nats = percent(score["accuracy"]), f"{score['loss']:.4f} nats"
        when = f"after {self.trained:.1f} s of training"
        self.progress.note(f"step {done:5d}  {split} {right}, {nats}, {when}")

    def write(self, done: int, split: str, **numbers) -> None:
        times = {"train_seconds": round(self.trained, 2)}
        times |= {"seconds": round(time.perf_counter() - self.begin, 2)}
        times |= {"cpu_seconds": round(time.process_time(), 1)}  # fair on a machine that is shared
        self.run.log(step=done, split=split, **numbers, **times)


def board(history: list[dict], ceiling: float = 1.0) -> dict[float, float]:
    """Seconds of training until validation first reached each accuracy × the ceiling."""
    found = {}
    for line in history:
        for goal in BOARD:
            if line["split"] == "valid" and line["accuracy"] >= goal * ceiling:
                found.setdefault(goal, line["train_seconds"])
    return found


def conclude(dataset, history: list[dict], accuracy: float) -> None:
    """Print how long it took to be how good, and whether it went as it should."""
    times = board(history, dataset.ceiling or 1.0)
    shown = ", ".join(f"{100 * goal:g} %: {seconds:.1f} s" for goal, seconds in times.items())
    say(f"time to    {'the ceiling × ' if dataset.ceiling else ''}{shown or 'no goal'} of training")
    say(verdict(dataset, accuracy))
