"""The tasks on the tensor engine: images to classes, and the next character of a text.

Every task has the same face, which train.py uses: `describe` (config → sizes of the net), `step`,
`evaluate`, `state` and `load` (weights), `optimizer_state` and `load_optimizer`, `expected`,
`count`. task_moons.py holds the one on the scalar engine.
"""

import math

import numpy as np

import data
import nn
import optim
import tensor as pg
from model import ModelConfig, build
from options import UserError


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
        return {name: t.array for name, t in self.net.state_dict().items()}

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

    def n_example(self):
        """How many examples a batch holds."""
        return self.config.batch_size


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

    def n_example(self):
        """A batch is never more than all images."""
        return min(self.config.batch_size, len(self.data.x))

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


def show(score):
    """A held-out score in words."""
    if "accuracy" in score:
        return f"held out: loss {score['loss']:.4f}, accuracy {100 * score['accuracy']:.2f} %"
    floor = f" = {score['loss'] / score['floor']:.3f} × the floor" if "floor" in score else ""
    return f"held out: {score['loss']:.4f} nats per character{floor}"
