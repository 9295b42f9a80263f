"""The four models: a net of single numbers, an MLP, a convolutional net, a small GPT.

Dimension key: N images, H W their size, C classes, B batch, T time, D d_model, V vocab_size.
"""

import itertools
import math
import random
from dataclasses import dataclass

import nn
import tensor as pg
from value import Value

WIDTH = {"tiny": 1, "small": 2}  # --size: a factor on all widths


@dataclass(frozen=True)
class ModelConfig:
    """What to build; saved with the weights.

    kind: moons, mlp, cnn or gpt. image: (H, W). vocab: the characters a gpt knows, in order.
    mean, std: of the training pixels, for images from elsewhere.
    """

    kind: str
    size: str = "tiny"
    classes: int = 2
    image: tuple = ()
    mean: float = 0.0
    std: float = 1.0
    vocab: str = ""
    seq_len: int = 64
    dropout: float = 0.1

    def __post_init__(self):
        good = {
            "kind": self.kind in ("moons", "mlp", "cnn", "gpt"),
            "size": self.size in WIDTH,
            "classes": 0 < self.classes <= 256,
            "image": self.kind in ("moons", "gpt")
            or (len(self.image) == 2 and all(type(n) is int and 0 < n <= 4096 for n in self.image)),
            "mean": math.isfinite(self.mean),
            "std": 0 < self.std < math.inf,
            "vocab": self.kind != "gpt" or len(set(self.vocab)) == len(self.vocab) > 1,
            "seq_len": 0 < self.seq_len <= 1 << 20,
            "dropout": 0 <= self.dropout < 1,
        }
        for name, fine in good.items():
            if not fine:
                raise ValueError(f"{name} {getattr(self, name)!r} makes no {self.kind}")


class ScalarNet:
    """2 → 16 → 16 → 1 with tanh, every number a Value: 337 parameters, drawn as nn.Linear's."""

    def __init__(self, width=16, seed=0):
        draw = random.Random(seed)
        sizes = [2, width, width, 1]
        self.layers = []
        for n_in, n_out in itertools.pairwise(sizes):
            bound = n_in**-0.5
            rows = [[Value(draw.uniform(-bound, bound)) for _ in range(n_in + 1)]
                    for _ in range(n_out)]  # fmt: skip
            self.layers.append(rows)

    def parameters(self):
        return [p for rows in self.layers for row in rows for p in row]

    def __call__(self, x):
        """The score of the point x, two numbers: > 0 means the upper moon."""
        for i, rows in enumerate(self.layers):
            sums = [sum((w * v for w, v in zip(row[:-1], x, strict=True)), row[-1]) for row in rows]
            x = sums if i == len(self.layers) - 1 else [s.tanh() for s in sums]
        return x[0]


def mlp(config):
    """(N, 1, H, W) → (N, C): two hidden layers, 256 and 128 wide for size tiny."""
    w, (height, width) = WIDTH[config.size], config.image
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(height * width, 256 * w), nn.ReLU(), nn.Dropout(config.dropout),
        nn.Linear(256 * w, 128 * w), nn.ReLU(), nn.Dropout(config.dropout),
        nn.Linear(128 * w, config.classes),
    )  # fmt: skip


def cnn(config):
    """(N, 1, H, W) → (N, C): two 3 × 3 convolutions, each halved by pooling, and a linear layer."""
    w, (height, width) = WIDTH[config.size], config.image
    return nn.Sequential(
        nn.Conv2d(1, 16 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16 * w, 32 * w, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(config.dropout),
        nn.Linear(32 * w * (height // 4) * (width // 4), config.classes),
    )  # fmt: skip


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, d_model, n_head, dropout):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention = nn.MultiHeadAttention(d_model, n_head)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU("tanh"), nn.Linear(4 * d_model, d_model)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x), is_causal=True))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """(B, T) characters → (B, T, V) logits of the next one. Radford et al. 2019, at toy size.

    Two blocks of d_model 64 and 4 heads for size tiny; learned positions.
    """

    def __init__(self, config):
        super().__init__()
        d_model, n_head, n_layer = 64 * WIDTH[config.size], 4, 2
        self.token = nn.Embedding(len(config.vocab), d_model)
        self.position = nn.Embedding(config.seq_len, d_model)
        for table in (self.token, self.position):
            table.weight.array *= 0.02**0.5  # small enough for loss ≈ ln V at the start
        self.blocks = nn.Sequential(*[
            Block(d_model, n_head, config.dropout) for _ in range(n_layer)
        ])  # fmt: skip
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, len(config.vocab), bias=False)

    def forward(self, ids):
        x = self.token(ids) + self.position(pg.arange(ids.shape[1]))  # (B, T, D)
        return self.head(self.norm(self.blocks(x)))  # (B, T, V)


def build(config):
    """The module for a config. Raises ValueError for images too small to pool twice."""
    if config.kind == "cnn" and min(config.image) < 4:
        raise ValueError(f"the cnn halves its image twice: {config.image} is too small")
    return {"mlp": mlp, "cnn": cnn, "gpt": GPT}[config.kind](config)
