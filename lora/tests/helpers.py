"""Small adapted models for the tests of lora.py and of what builds on it. Always alpha ≠ rank."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import lora
from variants import AdapterConfig

EVERY = r"\.(wq|wk|wv|wo|w1|w2|w3)$"
VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"pissa": True}]


def config(**changes) -> AdapterConfig:
    return AdapterConfig(**{"rank": 4, "alpha": 32.0, "targets": EVERY} | changes)


def stir(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Stands for a training: other numbers in whatever learns."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * std)
    return model


def adapted(base: nn.Module, name: str = "default", **changes) -> nn.Module:
    model = base if lora.layers(base) else copy.deepcopy(base)
    lora.adapt(model, config(**changes), name)
    return stir(model).eval()


def base_state(model: nn.Module) -> dict:
    """The state of the base inside an adapted model, under the base's own names."""
    state = model.state_dict().items()
    return {n.replace(".base.", "."): x for n, x in state if ".adapters." not in n}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def two_by_two(kind=AdapterConfig, **changes) -> nn.Module:
    """W = ((1, 2), (3, 4)) with A = (1, −1) and B = (½, 2)ᵀ, alpha 6, rank 1."""
    model = nn.Sequential(nn.Linear(2, 2, bias=True)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([10.0, 20.0]))
    lora.adapt(model, kind(rank=1, alpha=6.0, targets="0", **changes))
    with torch.no_grad():
        model[0].adapters["default"].lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        model[0].adapters["default"].lora_b.copy_(torch.tensor([[0.5], [2.0]]))
    return model


def loss_of(model: nn.Module, tokens) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (I, O)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))

    def forward(self, x):
        return x @ self.weight + self.bias
