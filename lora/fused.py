"""Fused layers: one matrix with the rows of several parts, such as q, k and v, adapted in part.

GPT-2 computes q, k and v by one matrix of 3·D rows. The paper adapts q and v but not k, so each
adapted part gets an A and a B of its own, and the rows of the others must stay as they are:

    A (parts · r, I)        B of part 1 stands in the rows of part 1 and the columns of its own A,
    B (O, parts · r)  with  zeros everywhere else
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora import Adapter, LoraLayer, setting
from variants import AdapterConfig, refuse_other_layers


@dataclass(frozen=True)
class FusedConfig(AdapterConfig):
    """An adapter of a fused layer.

    parts: how many rows each part has, and whether it is adapted: ((64, True), (64, False), …).
    Raises ValueError for values that make no sense.
    """

    parts: tuple[tuple[int, bool], ...] = setting((), "rows of each part, and is it adapted?")

    def __post_init__(self):
        super().__post_init__()
        if self.dora or self.pissa:
            raise ValueError("dora and pissa do not go together with parts here")
        if not any(wanted for _, wanted in self.parts):
            raise ValueError(f"parts {self.parts}: one at least must be adapted")

    def new_adapter(self, layer: LoraLayer) -> Adapter:
        self.refuse_rank(layer)
        refuse_other_layers(layer, "parts")
        return FusedAdapter(layer, self)


class FusedAdapter(Adapter):
    """lora_a: (parts · r, I), the A of each adapted part. lora_b: (adapted rows, r), each B.

    Raises ValueError for parts that do not fill the layer.
    """

    def __init__(self, layer: LoraLayer, config: FusedConfig):
        super().__init__(layer, config)
        self.n_row, columns = layer.matrix().shape
        if sum(size for size, _ in config.parts) != self.n_row:
            raise ValueError(f"parts {config.parts} must have {self.n_row} rows together")
        wanted = torch.cat([torch.full((size,), bool(on)) for size, on in config.parts])
        self.sizes = [size for size, on in config.parts if on]
        self.rows = wanted.nonzero().flatten().to(layer.base.weight.device)
        a = layer.new(config.rank * len(self.sizes), columns)
        nn.init.kaiming_uniform_(a, a=5**0.5)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(layer.new(sum(self.sizes), config.rank))

    def pair(self) -> tuple[Tensor, Tensor]:
        blocks = torch.block_diag(*self.lora_b.split(self.sizes))  # (adapted rows, parts · r)
        empty = blocks.new_zeros(self.n_row, blocks.shape[1])
        return self.lora_a, empty.index_copy(0, self.rows, blocks)
