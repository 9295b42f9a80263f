"""The first task: two moons told apart on the scalar engine, every number a `Value`."""

import numpy as np

import data
from model import WIDTH, ModelConfig, ScalarNet


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
