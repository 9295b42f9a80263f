"""Training: `train(config)` is the whole story and returns the log.

Four tasks with one face, `step`, `evaluate`, `state`, `load`: the two moons on the scalar engine,
images and text on the tensor engine. Batches depend on (seed, step) alone and the random generator
is saved, so a resumed run equals one that never stopped, bit for bit.

The held-out data chooses nothing: the weights kept are those of the last step.
"""

import dataclasses
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import data
import nn
import optim
import tensor as pg
from model import WIDTH, ModelConfig, ScalarNet, build
from run import (  # noqa: F401  (main.py and tests use them through here)
    RunDirectory,
    UserError,
    ctrl_c,
    from_options,
    load_tensors,
    option,
    read_json,
    save_tensors,
    say,
)

HERE = Path(__file__).resolve().parent
MODELS = ("moons", "mlp", "cnn", "gpt")
# what each model uses unless told otherwise; seconds are those of two cores
DEFAULTS = {
    "moons": {"steps": 400, "batch_size": 20, "lr": 0.6, "promise": 0.98},
    "mlp": {"steps": 600, "batch_size": 64, "lr": 2e-3, "promise": 0.965},
    "cnn": {"steps": 900, "batch_size": 64, "lr": 4e-3, "promise": 0.975},
    "gpt": {"steps": 700, "batch_size": 32, "lr": 4e-3, "promise": 1.4},
}
MNIST_STEPS = 5000  # a folder of 60,000 images needs more than 1,438 do


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Raises ValueError for values that make no sense.
    """

    model: str = option("cnn", "what to train", MODELS)
    size: str = option("tiny", "a factor on all widths", tuple(WIDTH))
    data: str = option("", "folder with MNIST idx files (mlp, cnn) or text file (gpt)")
    out: str = option(str(HERE / "runs" / "default"), "run directory")
    steps: int | None = option(None, "optimizer steps")
    batch_size: int | None = option(None, "examples per step")
    lr: float | None = option(None, "highest learning rate")
    weight_decay: float = option(0.05, "AdamW's")
    dropout: float = option(0.1, "probability, in training")
    seq_len: int = option(64, "characters a gpt sees")
    seed: int = option(0, "of weights, batches and dropout")
    device: str = option("auto", "numpy computes on the CPU", ("auto", "cpu"))
    dtype: str = option("auto", "number format", ("auto", "float32", "float64"))

    def __post_init__(self):
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name} {value!r} is none of {', '.join(choices)}")
        for name in ("steps", "batch_size", "lr", "seq_len"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be more than 0, not {value}")
            if name != "lr" and isinstance(value, float):
                raise ValueError(f"{name} must be a whole number, not {value}")
        if not self.out:
            raise ValueError("out must name a directory")
        if not (0 <= self.weight_decay < math.inf and 0 <= self.dropout < 1 and self.seed >= 0):
            raise ValueError("needs weight_decay ≥ 0, 0 ≤ dropout < 1 and seed ≥ 0")

    def complete(self):
        """With the model's own steps, batch_size and lr where none were given."""
        own = dict(DEFAULTS[self.model])
        if self.data and self.model in ("mlp", "cnn"):
            own |= {"steps": MNIST_STEPS, "batch_size": 128}
        fill = {n: own[n] for n in ("steps", "batch_size", "lr") if getattr(self, n) is None}
        return dataclasses.replace(self, **fill)


class MoonsTask:
    """Points of two moons, hinge loss mean max(0, 1 − y·score), plain SGD: all on `Value`."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.data = data.load_moons(config.data)
        self.net = ScalarNet(16 * WIDTH[model.size], config.seed)

    @staticmethod
    def describe(config):
        return ModelConfig("moons", config.size)

    def step(self, number):
        x, y = self.data.batch(number, self.config.batch_size, self.config.seed)
        losses = [
            (1 - yi * self.net(xi)).relu() for xi, yi in zip(x.tolist(), y.tolist(), strict=True)
        ]
        loss = sum(losses, losses[0] * 0) * (1 / len(losses))
        loss.backward()
        lr = self.config.lr * (1 - 0.9 * number / self.config.steps)
        for p in self.net.parameters():
            p.data -= lr * p.grad
            p.grad = 0.0
        return loss.data

    def scores(self, x):
        """The net's score of each point, computed by numpy: evaluating needs no tape."""
        for i, rows in enumerate(self.net.layers):
            w = np.array([[p.data for p in row] for row in rows])
            x = x @ w[:, :-1].T + w[:, -1]
            x = x if i == len(self.net.layers) - 1 else np.tanh(x)
        return x[:, 0]

    def evaluate(self):
        s, y = self.scores(self.data.x_test), self.data.y_test
        return {
            "loss": float(np.maximum(0, 1 - y * s).mean()),
            "accuracy": float((s * y > 0).mean()),
        }

    def state(self):
        return {"parameters": np.array([p.data for p in self.net.parameters()])}

    def load(self, arrays):
        for p, value in zip(self.net.parameters(), arrays["parameters"].tolist(), strict=True):
            p.data = value

    def optimizer_state(self):
        return {}

    def load_optimizer(self, state):
        pass

    def expected(self):
        return "loss near 1 (scores near 0) at step 1, 0 at best"

    def count(self):
        return len(self.net.parameters())


class NetTask:
    """A module of nn.py, cross entropy, AdamW with warm-up and cosine, gradients clipped to 1."""

    def __init__(self, config, model):
        self.config, self.model = config, model
        self.data = self.load_data(config, model)
        pg.manual_seed(config.seed)
        self.net = build(model)
        if config.dtype == "float64":
            self.net.to(np.float64)
        decay = [p for p in self.net.parameters() if p.ndim > 1]
        rest = [p for p in self.net.parameters() if p.ndim <= 1]
        self.optimizer = optim.AdamW(
            [
                {"params": decay, "weight_decay": config.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=config.lr,
        )

    def loss(self, x, y, reduction="mean"):
        return nn.cross_entropy(self.logits(x), pg.Tensor(y), reduction=reduction)

    def step(self, number):
        warmup, total = max(1, self.config.steps // 20), self.config.steps
        self.optimizer.lr = self.config.lr * optim.warmup_cosine(number, warmup, total)
        x, y = self.data.batch(number, self.config.batch_size, self.config.seed)
        self.net.train()
        loss = self.loss(x, y)
        loss.backward()
        optim.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def state(self):
        return {name: t.data for name, t in self.net.state_dict().items()}

    def load(self, arrays):
        self.net.load_state_dict(arrays)

    def optimizer_state(self):
        """Slots and step counts; the options come from the config."""
        state = self.optimizer.state_dict()
        return {n: np.asarray(v) for n, v in state.items() if not n.startswith("group")}

    def load_optimizer(self, state):
        if len(state) != len(self.optimizer.parameters()) * (1 + len(self.optimizer.slots)):
            raise ValueError(f"{len(state)} arrays of optimizer state, some are missing")
        self.optimizer.load_state_dict(state)

    def count(self):
        return sum(p.numel() for p in self.net.parameters())


class ImageTask(NetTask):
    """Images to classes."""

    @staticmethod
    def load_data(config, model):
        images = data.load_images(config.data, (model.mean, model.std))
        if images.x.shape[2:] != tuple(model.image) or images.classes > model.classes:
            raise UserError(
                f"--data {config.data}: {images.classes} classes of images {images.x.shape[2:]}, "
                f"the net knows {model.classes} of {tuple(model.image)}: train on that data first"
            )
        return images

    @staticmethod
    def describe(config):
        images = data.load_images(config.data)
        return ModelConfig(config.model, config.size, images.classes, images.x.shape[2:],
                           images.mean, images.std, dropout=config.dropout)  # fmt: skip

    def logits(self, x):
        return self.net(pg.Tensor(x, dtype=self.net.parameters()[0].dtype))

    def evaluate(self):
        self.net.eval()
        nats = right = 0.0
        with pg.no_grad():
            for x, y in self.data.held_out():
                logits = self.logits(x)
                nats += nn.cross_entropy(logits, pg.Tensor(y), reduction="sum").item()
                right += int((logits.argmax(1).numpy() == y).sum())
        n = len(self.data.y_test)
        return {"loss": nats / n, "accuracy": right / n, "images": n}

    def expected(self):
        return f"loss ln {self.model.classes} = {math.log(self.model.classes):.2f} at step 1"


class TextTask(NetTask):
    """The next character."""

    @staticmethod
    def load_data(config, model):
        return data.Text(config.data, model.seq_len, model.vocab)

    @staticmethod
    def describe(config):
        vocab = data.Text(config.data, config.seq_len).vocab
        return ModelConfig("gpt", config.size, len(vocab), vocab=vocab, seq_len=config.seq_len,
                           dropout=config.dropout)  # fmt: skip

    def logits(self, x):
        return self.net(pg.Tensor(x)).reshape(-1, len(self.model.vocab))

    def loss(self, x, y, reduction="mean"):
        return super().loss(x, y.reshape(-1), reduction)

    def evaluate(self):
        self.net.eval()
        with pg.no_grad():
            nats = sum(self.loss(x, y, "sum").item() for x, y in self.data.held_out())
        score = {"loss": nats / (len(self.data.test) - 1), "characters": len(self.data.test) - 1}
        floor = self.data.floor()
        return score | ({"floor": floor} if floor else {})

    def expected(self):
        v, floor = len(self.model.vocab), self.data.floor()
        text = f"loss near ln {v} = {math.log(v):.2f} nats per character at step 1"
        return text + (f", never below {floor:.3f}, the entropy of the grammar" if floor else "")


TASKS = {"moons": MoonsTask, "mlp": ImageTask, "cnn": ImageTask, "gpt": TextTask}


def show(score):
    """A held-out score in words."""
    if "accuracy" in score:
        return f"held out: loss {score['loss']:.4f}, accuracy {100 * score['accuracy']:.2f} %"
    floor = f" = {score['loss'] / score['floor']:.3f} × the floor" if "floor" in score else ""
    return f"held out: {score['loss']:.4f} nats per character{floor}"


def verdict(config, score):
    """Whether a run on our own data came as far as the README says it should."""
    promise = DEFAULTS[config.model]["promise"]
    if config.data:
        return "done (no promise for this data)"
    if "accuracy" in score:
        word = "on track" if score["accuracy"] >= promise else "off track"
        return f"{word}: {100 * score['accuracy']:.2f} %, the README promises ≥ {100 * promise:g} %"
    ratio = score["loss"] / score["floor"]
    word = "on track" if ratio <= promise else "off track"
    return f"{word}: {ratio:.3f} × the floor, the README promises ≤ {promise}"


def announce(config, task):
    """What is about to happen and the numbers to expect."""
    say(f"config     {config}")
    say(f"device     cpu: numpy {np.__version__}; parameters {task.count():,}")
    say(f"expect     {task.expected()}")


def save(run, task, step):
    """The checkpoint: weights, optimizer, generator, step."""
    arrays = {f"model.{n}": a for n, a in task.state().items()}
    arrays |= {f"optimizer.{n}": a for n, a in task.optimizer_state().items()}
    rng = json.dumps(pg.random.bit_generator.state)
    save_tensors(run.checkpoint, arrays, {"step": str(step), "rng": rng})
    save_tensors(run.weights, task.state())


def restore(run, task):
    """Back to the checkpoint. Returns the steps done; UserError if it does not fit."""
    arrays, metadata = run.load_checkpoint()
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
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{run.checkpoint} does not fit this run: {error}") from None
    run.history(before=step)
    return step


def load_run(folder, changes=None):
    """(task with weights, TrainConfig) of a run directory. UserError if something is not right."""
    saved = read_json(folder / "config.json")
    try:
        config = TrainConfig(**(saved["train"] | (changes or {})))
        model = ModelConfig(**(saved["model"] | {"image": tuple(saved["model"]["image"])}))
        task = TASKS[model.kind](config, model)
        task.load(load_tensors(folder / "model.safetensors")[0])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: config and weights do not fit together: {error}") from None
    return task, config


def train(config, resume=False):
    """Train, and return the log. With `resume`, go on from the checkpoint in `config.out`.

    Raises UserError for data or files that will not do and for a loss that is not finite.
    """
    run = RunDirectory(config.out)
    if resume:
        task, done = resumed(run, config)
    else:
        config = config.complete()
        model = TASKS[config.model].describe(config)
        try:
            task, done = TASKS[config.model](config, model), 0
        except ValueError as error:  # a net that cannot be built for this data
            raise UserError(str(error)) from None
        run.start()
        run.save_config({"train": asdict(config), "model": asdict(model)})
    config = task.config
    announce(config, task)
    every = max(1, config.steps // 10)
    begin = busy = time.perf_counter()
    score = None
    with ctrl_c() as stopped, np.errstate(all="ignore"):  # a loss that overflows is found below
        while done < config.steps and not stopped():
            loss = task.step(done)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {done + 1}: try --lr {config.lr / 4:g}; the last "
                    f"good state is {run.checkpoint if run.checkpoint.exists() else 'the start'}"
                )
            done += 1
            if done % every == 0 or done in (1, config.steps) or stopped():
                now = time.perf_counter()
                rate = (every if done > 1 else 1) * config.batch_size / (now - busy)
                score = task.evaluate()
                seconds = round(now - begin, 2)
                run.log(step=done, split="train", loss=loss, examples_per_second=round(rate, 1),
                        seconds=seconds)  # fmt: skip
                run.log(step=done, split="held out", seconds=seconds, **score)
                left = (now - begin) / done * (config.steps - done)
                say(
                    f"step {done:5d}  loss {loss:.4f}  {show(score)}  {rate:,.0f}/s"
                    f"  {left:.0f} s left"
                )
                save(run, task, done)
                busy = time.perf_counter()
    if done < config.steps:
        say(f"stopped at step {done} and saved; go on with --train --resume --out {run.path}")
    elif score:
        say(verdict(config, score))
    return run.history()


def resumed(run, config):
    """(task, steps done) of the run in `config.out`; only --steps may differ from before."""
    if not run.checkpoint.exists():
        raise UserError(f"nothing to resume in {run.path}: no checkpoint there, train first")
    changes = {"out": config.out} | ({"steps": config.steps} if config.steps else {})
    task, old = load_run(run.path, changes)
    fresh = TrainConfig()
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if name not in changes and value not in (getattr(fresh, name), getattr(old, name)):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run to resume has {flag} {getattr(old, name)}: leave {flag} out")
    return task, restore(run, task)
