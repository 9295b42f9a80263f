"""The smallest model there is, y = w·x + b, fitted to y = 2x + 1: what shows a training step."""

import math

import torch
from torch import nn

from trainer import CommonConfig, Trainer


class Line(nn.Module):
    """y = w·x + b, with a count of its calls, which no gradient moves."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))
        self.b = nn.Parameter(torch.tensor([0.0]))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return self.w * x + self.b


class LineTrainer(Trainer):
    """Σ (y − 2x − 1)² over the numbers that are not IGNORED."""

    def make_optimizer(self, model):
        groups = [{"params": [model.w]}, {"params": [model.b], "scale": 10.0}]
        return torch.optim.SGD(groups, lr=1.0, momentum=0.5)

    def batch(self, step):
        dice = torch.Generator().manual_seed(step)
        x = torch.randn(self.config.batch_size, 3, generator=dice)
        wanted = 2 * x + 1
        wanted[1:, 2] = math.nan  # no targets: the first row has three, the others two
        return x, wanted

    def batch_loss(self, forward, x, wanted):
        counted = ~wanted.isnan()
        off = forward(x)[counted] - wanted[counted]
        return off.square().sum(), counted.sum(), {"absolute": off.abs().sum()}

    def learning_rate(self, step):
        return 0.01 * (1 + step % 4)

    def score(self):
        return {"loss": 1.0}


def line(**changes) -> LineTrainer:
    defaults = {"batch_size": 5, "grad_clip": 0.0, "device": "cpu", "dtype": "float32"}
    return LineTrainer(CommonConfig(**defaults | changes), Line(), [], torch.float32)


def numbers(it: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().clone() for p in it.model.parameters()])
