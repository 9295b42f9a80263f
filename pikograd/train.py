"""Training: `train(config)` is the whole story and returns the log.

A task (tasks.py, task_moons.py) knows its data, its net and what a step is; here are the options
and everything around the steps. Batches depend on (seed, step) alone and the random generator is
saved, so a resumed run equals one that never stopped, bit for bit.

The held-out data chooses nothing: the weights kept are those of the last step.
"""

import dataclasses
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import tensor as pg
from meter import keep_memory, tape_bytes
from model import WIDTH, ModelConfig
from options import UserError, check, make_config, option, say
from run import RunDirectory, read_json, stop_signals
from task_moons import MoonsTask
from tasks import ImageTask, TextTask, show
from weights import load_tensors, save_tensors

HERE = Path(__file__).resolve().parent
TASKS = {"moons": MoonsTask, "mlp": ImageTask, "cnn": ImageTask, "gpt": TextTask}
MODELS = tuple(TASKS)
# what each model uses unless told otherwise, and what the README promises of such a run
DEFAULTS = {
    "moons": {"steps": 400, "batch_size": 20, "lr": 0.6, "promise": 0.98},
    "mlp": {"steps": 600, "batch_size": 64, "lr": 2e-3, "promise": 0.965},
    "cnn": {"steps": 900, "batch_size": 64, "lr": 4e-3, "promise": 0.975},
    "gpt": {"steps": 700, "batch_size": 32, "lr": 4e-3, "promise": 1.4},
}
MNIST_STEPS = 5000  # a folder of 60,000 images needs more than 1,438 do
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Raises ValueError for values that make no sense.
    """

    model: str = option("cnn", "what to train", MODELS)
    size: str = option("tiny", "a factor on all widths", tuple(WIDTH))
    data: str = option("", "folder with MNIST idx files (mlp, cnn) or text file (gpt)")
    out: str = option(str(HERE / "runs" / "default"), "run directory")
    steps: int | None = option(None, "optimizer steps", least=1, most=10**9)
    batch_size: int | None = option(None, "examples per step", least=1, most=10**9)
    lr: float | None = option(None, "highest learning rate", above=0)
    weight_decay: float = option(0.05, "AdamW's", least=0)
    dropout: float = option(0.1, "probability, in training", least=0, below=1)
    seq_len: int = option(64, "characters a gpt sees", least=1)
    seed: int = option(0, "of weights, batches and dropout", least=0)
    device: str = option("auto", "numpy computes on the CPU", ("auto", "cpu"))
    dtype: str = option("auto", "number format", ("auto", "float32", "float64"))

    def __post_init__(self):
        check(self)

    def complete(self):
        """With the model's own steps, batch_size and lr where none were given."""
        own = dict(DEFAULTS[self.model])
        changes = {}
        if self.data:
            changes["data"] = str(Path(self.data).absolute())
            if self.model in ("mlp", "cnn"):
                own |= {"steps": MNIST_STEPS, "batch_size": 128}
        for name in ("steps", "batch_size", "lr"):
            if getattr(self, name) is None:
                changes[name] = own[name]
        return dataclasses.replace(self, **changes)


# ── Before the first step ─────────────────────────────────────────────────────────────────────────


def make_task(config, model):
    """The task with its data loaded and its net built. UserError where that cannot be."""
    try:
        return TASKS[model.kind](config, model)
    except ValueError as error:  # a net that cannot be built for this data
        raise UserError(str(error)) from None


def check_memory(task):
    """UserError if a step would need more memory than there is, to judge by one example."""
    if not isinstance(task, (ImageTask, TextTask)) or not hasattr(os, "sysconf"):
        return
    x, y = task.data.batch(0, 1, task.config.seed)
    rng = pg.random.bit_generator.state
    needed = 1.5 * tape_bytes(task.loss(x, y)) * task.n_example()
    pg.random.bit_generator.state = rng
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise UserError(
            f"a batch of {task.config.batch_size:,} needs {needed / 1e9:,.0f} GB of memory, there "
            f"are {there / 1e9:,.0f}: choose a smaller --batch-size"
        )


def begin(run_dir, config):
    """Check everything that can be wrong, then make the run directory. Returns the task."""
    run_dir.refuse_what_is_not_ours()
    model = TASKS[config.model].describe(config)
    task = make_task(config, model)
    check_memory(task)
    kept = asdict(config)
    del kept["out"]  # a copied folder is a run of its own
    run_dir.create({"train": kept, "model": asdict(model)})
    return task


def read_config(folder, changes):
    """(TrainConfig with `changes`, ModelConfig) of a run directory. UserError if they are unfit."""
    file = folder / "config.json"
    saved = read_json(file)
    for part in ("train", "model"):
        if not isinstance(saved.get(part), dict):
            raise UserError(f"{file} is no config of a run: it has no {part!r}")
    image = saved["model"].get("image")
    sizes = saved["model"] | {"image": tuple(image) if isinstance(image, list) else image}
    model = make_config(ModelConfig, sizes, file)
    return make_config(TrainConfig, saved["train"] | changes, file), model


def load_run(folder, changes=None):
    """(task with weights, TrainConfig) of a run directory. UserError if something is not right."""
    config, model = read_config(folder, changes or {})
    task = make_task(config, model)
    try:
        task.load(load_tensors(folder / "model.safetensors")[0])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: config and weights do not fit together: {error}") from None
    return task, config


# ── Saving and going on ───────────────────────────────────────────────────────────────────────────


def save(run_dir, task, step):
    """The checkpoint (weights, optimizer, generator, step), then the weights alone."""
    arrays = {f"model.{n}": a for n, a in task.state().items()}
    arrays |= {f"optimizer.{n}": a for n, a in task.optimizer_state().items()}
    rng = json.dumps(pg.random.bit_generator.state)
    save_tensors(run_dir.path / CHECKPOINT, arrays, {"step": str(step), "rng": rng})
    save_tensors(run_dir.weights, task.state())


def restore(run_dir, task):
    """Back to the checkpoint, or to the start if there is none yet. Returns the steps done.

    The weights are written again: a kill may have come after the checkpoint and before them.
    """
    file, step = run_dir.path / CHECKPOINT, 0
    if file.exists():
        arrays, metadata = load_tensors(file)
        parts = {"model": {}, "optimizer": {}}
        try:
            for name, array in arrays.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = array
            task.load(parts["model"])
            task.load_optimizer(parts["optimizer"])
            pg.random.bit_generator.state = json.loads(metadata["rng"])
            step = int(metadata["step"])
            if step < 0:
                raise ValueError(f"step {step}")
        except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
            raise UserError(f"{file} does not fit this run: {error}") from None
        save_tensors(run_dir.weights, task.state())
    run_dir.truncate_log(step)
    return step


def resumed(run_dir, config):
    """(task, steps done) of the run in `config.out`; only --steps may differ from before."""
    if not run_dir.config.exists():
        raise UserError(f"nothing to resume in {run_dir.path}: no run there, train first")
    changes = {"out": config.out} | ({"steps": config.steps} if config.steps else {})
    old, model = read_config(run_dir.path, changes)
    if config.data:
        config = dataclasses.replace(config, data=str(Path(config.data).absolute()))
    fresh = TrainConfig()
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name not in changes and value not in (getattr(fresh, name), getattr(old, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run to resume has {flag} {getattr(old, name)}: leave {flag} out")
    task = make_task(old, model)
    return task, restore(run_dir, task)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


class Pace:
    """Examples per second, and the seconds left: both count steps, and the time of steps alone."""

    def __init__(self, config, done):
        self.config, self.start = config, done
        self.units, self.busy, self.trained = 0, 0.0, 0.0

    def step(self, seconds):
        self.units += self.config.batch_size
        self.busy, self.trained = self.busy + seconds, self.trained + seconds

    def rate(self):
        """Examples per second since the last call."""
        rate = self.units / max(self.busy, 1e-9)
        self.units, self.busy = 0, 0.0
        return rate

    def left(self, done):
        """Seconds that the remaining steps will take."""
        return self.trained / (done - self.start) * (self.config.steps - done)


def announce(config, task):
    """What is about to happen and the numbers to expect."""
    say(f"config     {config}")
    say(f"device     cpu: numpy {np.__version__}; parameters {task.count():,}")
    say(f"expect     {task.expected()}")


def verdict(config, score):
    """Whether the run that the README describes came as far as it should; no word of others."""
    usual = TrainConfig(model=config.model, out=config.out, seed=config.seed).complete()
    if config != usual:
        return f"done: {show(score)} (the README promises nothing for these options)"
    promise = DEFAULTS[config.model]["promise"]
    if "accuracy" in score:
        word = "on track" if score["accuracy"] >= promise else "off track"
        return f"{word}: {100 * score['accuracy']:.2f} %, the README promises ≥ {100 * promise:g} %"
    ratio = score["loss"] / score["floor"]
    word = "on track" if ratio <= promise else "off track"
    return f"{word}: {ratio:.3f} × the floor, the README promises ≤ {promise}"


def log_and_save(run_dir, task, done, loss, pace):
    """Score the held-out part, log, say and save. Returns the score."""
    rate, score = pace.rate(), task.evaluate()
    run_dir.log(step=done, split="train", loss=loss, examples_per_second=round(rate, 1),
                seconds=round(pace.trained, 2))  # fmt: skip
    run_dir.log(step=done, split="held out", seconds=round(pace.trained, 2), **score)
    left = f"{rate:,.0f}/s  {pace.left(done):.0f} s left"
    say(f"step {done:5d}  loss {loss:.4f}  {show(score)}  {left}")
    save(run_dir, task, done)
    return score


def run_steps(run_dir, task, done):
    """Steps until the last one or Ctrl-C, logged and saved ten times. Returns whether it ended."""
    config, pace, score = task.config, Pace(task.config, done), None
    every = max(1, config.steps // 10)
    with stop_signals() as stopped, np.errstate(all="ignore"):  # an overflow is found below
        while done < config.steps and not stopped():
            start = time.perf_counter()
            loss = task.step(done)
            pace.step(time.perf_counter() - start)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {done + 1}: try --lr {config.lr / 4:g}; the last "
                    f"good state is in {run_dir.path}"
                )
            done += 1
            if done in (1, config.steps) or done % every == 0 or stopped():
                score = log_and_save(run_dir, task, done, loss, pace)
        if score is None:  # nothing was left to do, or it was stopped before its first step
            score = task.evaluate()
            save(run_dir, task, done)
    if done == config.steps:
        say(verdict(config, score))
        return True
    say(f"stopped at step {done} and saved; go on with --train --resume --out {run_dir.path}")
    return False


def train(config, resume=False):
    """Train, and return the log. With `resume`, go on from the checkpoint in `config.out`.

    Raises UserError for data or files that will not do and for a loss that is not finite.
    """
    keep_memory()
    run_dir = RunDirectory(config.out)
    with run_dir.writing():
        if resume:
            task, done = resumed(run_dir, config)
        else:
            task, done = begin(run_dir, config.complete()), 0
        announce(task.config, task)
        run_steps(run_dir, task, done)
        return run_dir.history()
