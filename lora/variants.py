"""The successors of LoRA that change its scale, its start, its length or its learning rates.

    rsLoRA  Kalajdzievski 2023, arXiv:2312.03732, Eq. 5: scale = alpha / √rank
    DoRA    Liu et al. 2024, arXiv:2402.09353, Eq. 5: the length of each row of W + ΔW learns apart
    PiSSA   Meng et al. 2024, arXiv:2404.02948, Eq. 3 and 4: A and B begin as the main part of W
    LoRA+   Hayou et al. 2024, arXiv:2402.12354, §3: B learns faster than A

`AdapterConfig` is what the command line offers: lora.adapt(model, AdapterConfig(dora=True)).

Dimension key: r rank, I numbers that go into a layer, O that come out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import other_layers
from lora import Adapter, LoraConfig, LoraLayer, setting
from nf4 import NF4Linear
from product import JoinedLayer


@dataclass(frozen=True)
class AdapterConfig(LoraConfig):
    """The adapter.

    Raises ValueError for values that make no sense.
    """

    rslora: bool = setting(False, "scale by alpha / √rank instead")
    dora: bool = setting(False, "learn the length of each row apart from its direction")
    pissa: bool = setting(False, "begin with the largest singular values of each matrix")
    quantize: bool = setting(False, "QLoRA: keep the frozen matrices that are adapted in 4 bits")

    def __post_init__(self):
        super().__post_init__()
        if self.dora and self.pissa:
            raise ValueError("dora and pissa do not go together here")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def kind_of(self, module: nn.Module) -> type[LoraLayer] | None:
        if isinstance(module, nn.Linear | NF4Linear):
            return JoinedLayer
        return other_layers.kind_of(module)

    def new_adapter(self, layer: LoraLayer) -> Adapter:
        self.refuse_rank(layer)
        if self.dora or self.pissa:
            refuse_other_layers(layer, "dora and pissa")
        kind = DoraAdapter if self.dora else PissaAdapter if self.pissa else Adapter
        return kind(layer, self)


def refuse_other_layers(layer: LoraLayer, what: str) -> None:
    """ValueError for an embedding or a convolution."""
    if isinstance(layer, other_layers.LoraEmbedding | other_layers.LoraConv):
        raise ValueError(f"{what} are for linear layers alone")


class DoraAdapter(Adapter):
    """W' = m ⊙ (W + ΔW) / ‖W + ΔW‖, row by row: the length m of a row learns apart (DoRA, Eq. 5).

    magnitude: m, (O,). It begins as the lengths of the rows of W, so W' begins as W. The paper
    writes columns, whose matrices stand the other way; its authors' code and PEFT take, as here,
    one length for each output.
    """

    def __init__(self, layer: LoraLayer, config: LoraConfig):
        super().__init__(layer, config)
        self.magnitude = nn.Parameter(layer.matrix().detach().to(layer.wide()).norm(dim=1))

    def gain(self, layer: LoraLayer) -> Tensor:
        """m / ‖W + ΔW‖ of each row, (O,). No gradient goes through the norm (DoRA, §4.3)."""
        with torch.no_grad():
            norm = (layer.matrix().to(layer.wide()) + super().delta(layer)).norm(dim=1)
        return self.magnitude / norm

    def correction(self, layer: LoraLayer, x: Tensor, plain: Tensor) -> Tensor:
        low = super().correction(layer, x, plain)
        gain = self.gain(layer).to(low.dtype)
        without_bias = plain if layer.base.bias is None else plain - layer.base.bias
        return ((gain - 1) * without_bias + gain * low).to(plain.dtype)

    def delta(self, layer: LoraLayer) -> Tensor:
        weight = layer.matrix().to(layer.wide())
        return self.gain(layer)[:, None] * (weight + super().delta(layer)) - weight


class PissaAdapter(Adapter):
    """A and B begin as the main part of W, which then learns, while the rest of W stays frozen.

    The paper takes the first product away from W. Here the base stays whole and start_b·start_a is
    taken away beside it: ΔW = scale · (B·A − B₀·A₀), which is zero at first, to the bit.
    """

    def __init__(self, layer: LoraLayer, config: LoraConfig):
        super().__init__(layer, config)
        a, b = principal(layer.matrix().to(layer.wide()), config)
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.register_buffer("start_a", a.clone())
        self.register_buffer("start_b", b.clone())

    def correction(self, layer: LoraLayer, x: Tensor, plain: Tensor) -> Tensor:
        first = self.scale * layer.low_rank(self.prepare(x), self.start_a, self.start_b)
        return super().correction(layer, x, plain) - first.to(plain.dtype)

    def delta(self, layer: LoraLayer) -> Tensor:
        start_a, start_b = self.start_a.to(layer.wide()), self.start_b.to(layer.wide())
        return super().delta(layer) - self.scale * start_b @ start_a

    def whole_pair(self) -> tuple[Tensor, Tensor]:
        """The same correction as an ordinary adapter of twice the rank (PiSSA, appendix C)."""
        return torch.cat([self.lora_a, self.start_a]), torch.cat([self.lora_b, -self.start_b], 1)


def principal(weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """PiSSA's A (r, I) and B (O, r): scale · B·A is the best approximation of rank r of W (O, I).

    With W = U·S·Vᵀ (singular value decomposition), B = U√S and A = √S·Vᵀ of the r largest S.
    """
    u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = (s[: config.rank] / config.scale).sqrt()
    return root[:, None] * vt[: config.rank], u[:, : config.rank] * root


def learning_groups(model: nn.Module, ratio: float = 1.0) -> list[dict]:
    """Parameters for an optimizer, in two groups: B with `scale` = ratio, and the others.

    LoRA+ lets B learn `ratio` times as fast as A: in a wide model A's gradient is the larger.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    b = [p for name, p in named if name.endswith("lora_b")]
    others = [p for name, p in named if not name.endswith("lora_b")]
    return [{"params": others, "scale": 1.0}, {"params": b, "scale": ratio}]
