"""Low-rank adaptation: freeze a model, and learn a small correction to some of its matrices.

    W·x  becomes  W·x + scale · B·(A·x),   scale = alpha / rank        (LoRA, §4.1, Eq. 3)

A matrix of 4096 × 4096 has 16.8 million numbers; A (rank × 4096) and B (4096 × rank) together have
65,536 for rank 8. B begins as zeros, so the adapted model begins as the base model.

Source: Hu et al. 2021, arXiv:2106.09685. Here are its linear layers. What builds on them has files
of its own: other_layers.py (embeddings, convolutions), variants.py (rsLoRA, DoRA, PiSSA, LoRA+),
several.py (many adapters on one base), fused.py (q, k and v in one matrix), nf4.py (QLoRA), and
product.py (the same result in less time).

Dimension key: r rank, I numbers that go into a layer, O that come out.

Left out: adapters of biases, a rank for each layer. This file imports torch and the standard
library alone and works on any module tree: copy it into a project of your own.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def setting(default, help: str, **limits):
    """A field that is also a flag of `main.py`. limits: least=, most=, above= or below=."""
    return field(default=default, metadata={"help": help} | limits)


@dataclass(frozen=True)
class LoraConfig:
    """What to adapt and how strongly. A subclass may know more kinds of layers and of adapters.

    Raises ValueError for values that make no sense.
    """

    rank: int = setting(1, "rank of each correction", least=1, most=2**31 - 1)
    alpha: float = setting(8.0, "strength of the correction: it is scaled by alpha / rank", above=0)
    targets: str = setting(r"\.(wq|wk|wv|wo|w2)$", "regular expression for names of layers")
    dropout: float = setting(0.0, "of what goes into A, in training", least=0, below=1)

    def __post_init__(self):
        if not 1 <= self.rank < 2**31:
            raise ValueError(f"rank must be at least 1 and below 2³¹, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be more than 0 and finite, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets {self.targets!r} is no regular expression: {error}"
            ) from None

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by."""
        return self.alpha / self.rank

    def kind_of(self, module: nn.Module) -> "type[LoraLayer] | None":
        """The class that adapts this layer; None for a layer that cannot be adapted."""
        return LoraLayer if isinstance(module, nn.Linear) else None

    def new_adapter(self, layer: "LoraLayer") -> "Adapter":
        """An adapter that changes nothing yet. ValueError for what this layer cannot have."""
        self.refuse_rank(layer)
        return Adapter(layer, self)

    def refuse_rank(self, layer: "LoraLayer") -> None:
        """ValueError for a rank that the layer's matrix cannot have."""
        if self.rank > (limit := min(layer.matrix().shape)):
            raise ValueError(f"rank {self.rank} is more than a matrix here can have: {limit}")


# ── One layer ─────────────────────────────────────────────────────────────────────────────────────


class Adapter(nn.Module):
    """One correction of one layer: lora_a is A (r, I), lora_b is B (O, r).

    It does not hold its layer, which holds it, so the layer comes with each call.
    """

    def __init__(self, layer: "LoraLayer", config: LoraConfig):
        super().__init__()
        self.scale = config.scale
        a, b = layer.start(config.rank)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.dropout = nn.Dropout(config.dropout)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B as they are multiplied."""
        return self.lora_a, self.lora_b

    def correction(self, layer: "LoraLayer", x: Tensor, plain: Tensor) -> Tensor:
        """What is added to the output of the base, which is `plain`: scale · B·(A·x)."""
        return (self.scale * layer.low_rank(self.prepare(x), *self.pair())).to(plain.dtype)

    def delta(self, layer: "LoraLayer") -> Tensor:
        """What is added to the matrix, (O, I), in float32 or more: scale · B·A."""
        a, b = (x.flatten(1).to(layer.wide()) for x in self.pair())
        return self.scale * b @ a

    def prepare(self, x: Tensor) -> Tensor:
        """The input of A: with dropout in training, and in A's number format."""
        if not x.is_floating_point():  # the tokens that an embedding looks up
            return x
        x = self.dropout(x)
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_a.dtype)


class LoraLayer(nn.Module):
    """A frozen linear layer and its adapters, in the place of the layer.

    active: the share of each adapter that is in use, by name. by_row: computes the output instead,
    see several.py. saved: the untouched weight while merged.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters = base, nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.by_row: Callable[[LoraLayer, Tensor], Tensor] | None = None
        self.saved: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.saved is not None:  # merged: the base has it all
            return self.base(x)
        if self.by_row is not None:
            return self.by_row(self, x)
        out = plain = self.base(x)
        for name, share in self.active.items():
            out = out + share * self.adapters[name].correction(self, x, plain)
        return out

    def wide(self) -> torch.dtype:
        """The number format to merge in: float32, or float64 for a base in float64."""
        return torch.promote_types(self.base.weight.dtype, torch.float32)

    def new(self, *shape: int) -> Tensor:
        """Zeros for A or B: float32 beside a base of fewer digits, for sums of small steps."""
        return torch.zeros(shape, dtype=self.wide(), device=self.base.weight.device)

    # What differs by kind of layer

    def matrix(self) -> Tensor:
        """The weight as a matrix (O, I)."""
        return self.base.weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The reverse: a matrix (O, I) in the shape of the weight."""
        return matrix

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        """A random (r, I) and B zero (O, r)."""
        rows, columns = self.matrix().shape
        a, b = self.new(rank, columns), self.new(rows, rank)
        nn.init.kaiming_uniform_(a, a=5**0.5)  # uniform within ±1/√I, as of a new linear layer
        return a, b

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B·(A·x): cheap, since the vector between has r numbers."""
        return F.linear(F.linear(x, a), b)


# ── Adapters of a model ───────────────────────────────────────────────────────────────────────────


def adapt(model: nn.Module, config: LoraConfig, name: str = "default") -> list[str]:
    """Freeze the model and give each layer whose name matches `config.targets` an adapter `name`.

    Returns the names of the adapted layers. Raises ValueError, before anything is changed, if there
    are none, for a weight that is tied, a name that is taken, and an adapter that cannot be.
    """
    found = targets(model, config)
    refuse_tied(model, found)
    refuse_merged(model)
    modules = {path: model.get_submodule(path) for path in found}
    taken = any(name in getattr(module, "adapters", {}) for module in modules.values())
    if taken or not re.fullmatch(r"\w+", name):
        raise ValueError(f"an adapter cannot be called {name!r}: taken, or no plain word")
    for path, module in modules.items():
        if not isinstance(module, LoraLayer):
            modules[path] = config.kind_of(module)(module)
    adapters = {path: config.new_adapter(layer) for path, layer in modules.items()}
    model.requires_grad_(False)
    for path, layer in modules.items():
        replace(model, path, layer)
        layer.adapters[name] = adapters[path]
        layer.train(layer.base.training)  # no dropout in a model that is in eval()
    for layer in layers(model):  # those of former adapters too
        layer.active = {name: 1.0} if name in layer.adapters else {}
        for other, adapter in layer.adapters.items():
            adapter.requires_grad_(other == name)
    return found


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """The names of the layers to adapt. Raises ValueError if there are none."""
    adapted = [path for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    found = []
    for path, module in model.named_modules():
        inside = any(path.startswith(outer + ".") for outer in adapted)
        can = isinstance(module, LoraLayer) or config.kind_of(module)
        if path and can and not inside and re.search(config.targets, path):
            found.append(path)
    if not found:
        raise ValueError(f"targets: no layer that can be adapted matches {config.targets!r}")
    return found


def refuse_tied(model: nn.Module, found: list[str]) -> None:
    """ValueError if a layer shares its weight: merging into one would change the other as well."""
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for path in found:
        module = model.get_submodule(path)
        weight = getattr(module, "base", module).weight
        if uses.count(id(weight)) > 1:
            raise ValueError(f"{path} shares its weight with another layer: call `untie` first")


def untie(model: nn.Module, path: str) -> None:
    """Give the layer `path` a weight of its own, with the same numbers."""
    layer = model.get_submodule(path)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def layers(model: nn.Module) -> list[LoraLayer]:
    """All adapted layers of a model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def replace(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place that is called `path`."""
    parent, _, last = path.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def refuse_merged(model: nn.Module) -> None:
    """ValueError if a layer is merged: its adapters could not be told apart."""
    if any(layer.saved is not None for layer in layers(model)):
        raise ValueError("the adapters are merged: unmerge first")


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the active corrections to the weights. A second call changes nothing.

    The sum is taken in float32 and rounded once to the weight's own format. The untouched weight is
    kept, so that `unmerge` is exact to the bit; subtracting would not be. Raises ValueError for a
    base in 4 bits, which has no weight to add to.
    """
    if not all(isinstance(layer.base.weight, nn.Parameter) for layer in layers(model)):
        raise ValueError("a base in 4 bits cannot take a correction in: merge into the whole base")
    for layer in layers(model):
        if layer.saved is None:
            total = layer.matrix().to(layer.wide())
            for name, share in layer.active.items():
                total = total + share * layer.adapters[name].delta(layer)
            layer.saved = layer.base.weight.detach().clone()
            layer.base.weight.copy_(layer.as_weight(total))


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """Put the untouched weights back. Without a merge before, nothing happens."""
    for layer in layers(model):
        if layer.saved is not None:
            layer.base.weight.copy_(layer.saved)
            layer.saved = None


def strip(model: nn.Module) -> None:
    """Put the base layers back into their places, merged or not, without their adapters."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            replace(model, path, layer.base)


def let_gradients_in(embedding: nn.Module) -> Callable[[], None]:
    """Make the output of a frozen embedding ask for gradients; returns what undoes that.

    Reentrant gradient checkpointing runs a block backward only if its input asks for gradients.
    With a frozen embedding it does not, and every adapter would silently stay as it is.
    """
    return embedding.register_forward_hook(lambda _, __, out: out.requires_grad_(True)).remove
