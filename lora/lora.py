"""Low-rank adaptation: freeze a model, and learn a small correction to some of its matrices.

    W·x  becomes  W·x + scale · B·(A·x),   scale = alpha / rank        (LoRA, Eq. 3)

A matrix of 4096 × 4096 has 16.8 million numbers; A (rank × 4096) and B (4096 × rank) together have
65,536 for rank 8. One of the two begins as zeros, so the adapted model begins as the base model.

    LoRA    Hu et al. 2021, arXiv:2106.09685, §4.1
    rsLoRA  Kalajdzievski 2023, arXiv:2312.03732, Eq. 5: scale = alpha / √rank
    DoRA    Liu et al. 2024, arXiv:2402.09353, Eq. 5: the length of each row of W + ΔW learns apart
    PiSSA   Meng et al. 2024, arXiv:2404.02948, Eq. 3 and 4: A and B begin as the main part of W
    LoRA+   Hayou et al. 2024, arXiv:2402.12354, §3: B learns faster than A

Dimension key: r rank, I numbers that go in, O that come out, V rows of an embedding, D its columns.

Left out: adapters of biases, grouped convolutions, choosing the rank by layer. This file imports
torch and the standard library alone and works on any module tree.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def setting(default, help: str, **limits):
    """A field that is also a flag of `main.py`. limits: least=, most=, above= or below=."""
    return field(default=default, metadata={"help": help} | limits)


@dataclass(frozen=True)
class LoraConfig:
    """The adapter.

    Raises ValueError for values that make no sense.
    """

    rank: int = setting(1, "rank of each correction", least=1, most=2**31 - 1)
    alpha: float = setting(8.0, "strength of the correction: it is scaled by alpha / rank", above=0)
    targets: str = setting(r"\.(wq|wk|wv|wo|w2)$", "regular expression for names of layers")
    dropout: float = setting(0.0, "of what goes into A, in training", least=0, below=1)
    rslora: bool = setting(False, "scale by alpha / √rank instead")
    dora: bool = setting(False, "learn the length of each row apart from its direction")
    pissa: bool = setting(False, "begin with the largest singular values of each matrix")
    quantize: bool = setting(False, "QLoRA: keep the frozen matrices that are adapted in 4 bits")

    def __post_init__(self):
        if not 1 <= self.rank < 2**31:
            raise ValueError(f"rank must be at least 1 and below 2³¹, not {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be more than 0 and finite, not {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.dora and self.pissa:
            raise ValueError("dora and pissa do not go together here")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"targets {self.targets!r} is no regular expression: {error}"
            ) from None

    @property
    def scale(self) -> float:
        """What the product B·A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


# ── One adapter of one layer ──────────────────────────────────────────────────────────────────────


class Adapter(nn.Module):
    """The numbers of one correction: lora_a, lora_b, and with DoRA the lengths of the rows.

    start_a, start_b: with PiSSA the first A and B, whose product is taken away again: the base
    stays whole, and the adapted model begins as the base model, to the bit.
    sizes, rows: of a fused layer, how many rows each adapted part has and which (see `adapt`).
    """

    def __init__(self, config: LoraConfig, a: Tensor, b: Tensor):
        super().__init__()
        self.scale, self.sizes, self.rows, self.n_row = config.scale, (), None, 0
        self.lora_a, self.lora_b = nn.Parameter(a), nn.Parameter(b)
        self.dropout = nn.Dropout(config.dropout)
        self.magnitude: nn.Parameter | None = None
        self.start_a: Tensor | None
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A and B. For a fused layer B has zeros where a row is no part's, or another part's."""
        if self.rows is None:
            return self.lora_a, self.lora_b
        blocks = torch.block_diag(*self.lora_b.split(self.sizes))  # (adapted rows, parts · r)
        return self.lora_a, blocks.new_zeros(self.n_row, blocks.shape[1]).index_copy(
            0, self.rows, blocks
        )


class LoraLayer(nn.Module):
    """A frozen layer and its adapters, for linear layers; subclasses are for other kinds.

    active: the share of each adapter that is in use, by name. batch: instead of that, the name of
    each row's adapter, see `one_adapter_a_row`. saved: the untouched weight while merged.
    """

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}
        self.batch: list[str | None] | None = None
        self.saved: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        plain = self.base(x)
        if self.saved is not None:  # merged: the base has it all
            return plain
        if self.batch is not None:
            return self.by_rows(x, plain)
        out = plain
        for name, share in self.active.items():
            adapter = self.adapters[name]
            if adapter.magnitude is None and adapter.start_a is None:
                out = self.add(out, adapter, x, share)
            else:
                out = out + share * self.correction(adapter, x, plain)
        return out

    def add(self, out: Tensor, adapter: Adapter, x: Tensor, share: float) -> Tensor:
        """out + share · scale · B·(A·x): the factor and the sum cost no pass of their own."""
        a, b = adapter.pair()
        x = self.prepare(adapter, x, a.dtype)
        if type(self) is not LoraLayer or x.dtype != out.dtype:
            return out + (share * adapter.scale * self.low_rank(x, a, b)).to(out.dtype)
        low = F.linear(x, a).view(-1, a.shape[0])
        sums = torch.addmm(out.reshape(-1, out.shape[-1]), low, b.T, alpha=share * adapter.scale)
        return sums.view(out.shape)

    def prepare(self, adapter: Adapter, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input of A: with dropout in training, and in A's number format."""
        if not x.is_floating_point():
            return x
        x = adapter.dropout(x) if adapter.dropout.p and adapter.training else x
        return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def by_rows(self, x: Tensor, plain: Tensor) -> Tensor:
        """One product with W for all rows, and a small one for the rows of each adapter."""
        if len(self.batch) != len(x):
            raise ValueError(f"{len(self.batch)} names of adapters for {len(x)} rows")
        out = plain.clone()
        for name in {name for name in self.batch if name is not None}:
            rows = torch.tensor([i for i, one in enumerate(self.batch) if one == name])
            rows = rows.to(x.device)
            out[rows] += self.correction(self.adapters[name], x[rows], plain[rows])
        return out

    def correction(self, adapter: Adapter, x: Tensor, plain: Tensor) -> Tensor:
        """What an adapter adds to the output `plain` of the base."""
        a, b = adapter.pair()
        x = self.prepare(adapter, x, a.dtype)
        low = adapter.scale * self.low_rank(x, a, b)
        if adapter.start_a is not None:
            low = low - adapter.scale * self.low_rank(x, adapter.start_a, adapter.start_b)
        if adapter.magnitude is not None:
            gain = self.gain(adapter).to(low.dtype)
            bias = 0 if self.base.bias is None else self.base.bias
            low = (gain - 1) * (plain - bias) + gain * low
        return low.to(plain.dtype)

    def delta(self, adapter: Adapter) -> Tensor:
        """What an adapter adds to the weight, in float32 or more, in the weight's shape."""
        wide = self.wide()
        a, b = (x.to(wide) for x in adapter.pair())
        delta = adapter.scale * self.product(a, b)
        if adapter.start_a is not None:
            start = self.product(adapter.start_a.to(wide), adapter.start_b.to(wide))
            delta = delta - adapter.scale * start
        if adapter.magnitude is not None:
            weight, gain = self.base.weight.to(wide), self.gain(adapter).to(wide)
            delta = (gain if self.transposed else gain[:, None]) * (weight + delta) - weight
        return delta

    def gain(self, adapter: Adapter) -> Tensor:
        """DoRA's m / ‖W + ΔW‖ of each row, (O,). No gradient through the norm (DoRA, §4.3)."""
        with torch.no_grad():
            weight = self.base.weight.to(self.wide())
            total = weight + adapter.scale * self.product(*adapter.pair())
            norm = total.norm(dim=0 if self.transposed else 1)
        return adapter.magnitude / norm

    def wide(self) -> torch.dtype:
        """The number format to merge in: float32, or float64 for a base in float64."""
        return torch.promote_types(self.base.weight.dtype, torch.float32)

    # What differs by kind of layer

    @property
    def transposed(self) -> bool:
        """Is the weight (I, O), as in GPT-2's Conv1D, instead of (O, I)? PEFT: fan_in_fan_out."""
        return type(self.base).__name__ == "Conv1D"

    def sizes(self) -> tuple[int, int]:
        """(O, I)."""
        shape = tuple(self.base.weight.shape)
        return shape[::-1] if self.transposed else shape

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        """A random (r, I) and B zero (O, r)."""
        rows, columns = self.sizes()
        a, b = self.new(rank, columns), self.new(rows, rank)
        nn.init.kaiming_uniform_(a, a=5**0.5)  # uniform within ±1/√I, as of a new linear layer
        return a, b

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B·(A·x): cheap, since the vector between has r numbers."""
        return F.linear(F.linear(x, a), b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """B·A in the shape of the weight."""
        return (b @ a).T if self.transposed else b @ a

    def new(self, *shape: int) -> Tensor:
        """Zeros for A or B: float32 beside a base of fewer digits, for sums of small steps."""
        return torch.zeros(shape, dtype=self.wide(), device=self.base.weight.device)


class LoraEmbedding(LoraLayer):
    """An embedding (V, D): A (r, V) is a table itself and begins as zeros, B (D, r) as noise."""

    def sizes(self) -> tuple[int, int]:
        return self.base.weight.shape[1], self.base.weight.shape[0]

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        rows, columns = self.sizes()
        return self.new(rank, columns), nn.init.normal_(self.new(rows, rank))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.embedding(x, a.T), b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return (b @ a).T


class LoraConv(LoraLayer):
    """A convolution: A makes r channels with the base's kernel size, B mixes them (1 × 1)."""

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        rows, columns, *kernel = self.base.weight.shape
        a, b = self.new(rank, columns, *kernel), self.new(rows, rank, *[1] * len(kernel))
        nn.init.kaiming_uniform_(a, a=5**0.5)
        return a, b

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.dim()]
        return convolve(self.base._conv_forward(x, a, None), b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("or,ri...->oi...", b.flatten(1), a)


def kind_of(module: nn.Module) -> type[LoraLayer] | None:
    """The class that adapts this layer; None for layers that cannot be adapted."""
    if isinstance(module, nn.modules.conv._ConvNd):
        can = not module.transposed and module.groups == 1
        return LoraConv if can else None
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    linear = isinstance(module, nn.Linear) or type(module).__name__ in ("Conv1D", "NF4Linear")
    return LoraLayer if linear else None


# ── Adapters of a model ───────────────────────────────────────────────────────────────────────────


def adapt(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    parts: list[tuple[int, bool]] | None = None,
) -> list[str]:
    """Freeze the model and give each layer whose name matches `config.targets` an adapter `name`.

    parts: for fused layers, such as one matrix with the rows of q, k and v: how many rows each part
    has, and whether it is adapted. Returns the names of the adapted layers. Raises ValueError if
    there are none, for a weight that is tied, and for a name that is taken.
    """
    found = targets(model, config)
    refuse_tied(model, found)
    taken = [p for p in found if name in getattr(model.get_submodule(p), "adapters", {})]
    if taken or not re.fullmatch(r"\w+", name):
        raise ValueError(f"an adapter cannot be called {name!r}: taken, or no plain word")
    refuse_merged(model)
    model.requires_grad_(False)
    for path in found:
        layer = model.get_submodule(path)
        if not isinstance(layer, LoraLayer):
            layer = kind_of(layer)(layer)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, layer)
        layer.adapters[name] = new_adapter(layer, config, parts)
        layer.active = {name: 1.0}
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
        can = isinstance(module, LoraLayer) or kind_of(module)
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


def new_adapter(
    layer: LoraLayer, config: LoraConfig, parts: list[tuple[int, bool]] | None
) -> Adapter:
    """An adapter that changes nothing yet. ValueError for what this kind of layer cannot have."""
    if type(layer) is not LoraLayer and (config.dora or config.pissa or parts):
        raise ValueError("dora, pissa and parts are for linear layers alone")
    if config.rank > (limit := min(layer.base.weight.flatten(1).shape)):
        raise ValueError(f"rank {config.rank} is more than a matrix here can have: {limit}")
    adapter = Adapter(config, *layer.start(config.rank))
    if parts:
        adapt_parts(adapter, layer, config, parts)
    if config.pissa:
        weight = layer.base.weight.T if layer.transposed else layer.base.weight
        a, b = principal(weight.to(layer.wide()), config)
        adapter.lora_a, adapter.lora_b = nn.Parameter(a), nn.Parameter(b)
        adapter.start_a, adapter.start_b = a.clone(), b.clone()
    if config.dora:
        dim = 0 if layer.transposed else 1
        adapter.magnitude = nn.Parameter(layer.base.weight.to(layer.wide()).norm(dim=dim))
    return adapter


def principal(weight: Tensor, config: LoraConfig) -> tuple[Tensor, Tensor]:
    """PiSSA's A (r, I) and B (O, r): scale · B·A is the best approximation of rank r of W (O, I).

    With W = U·S·Vᵀ (singular value decomposition), B = U√S and A = √S·Vᵀ of the r largest S.
    """
    u, s, vt = torch.linalg.svd(weight.detach(), full_matrices=False)
    root = (s[: config.rank] / config.scale).sqrt()
    return root[:, None] * vt[: config.rank], u[:, : config.rank] * root


def adapt_parts(
    adapter: Adapter, layer: LoraLayer, config: LoraConfig, parts: list[tuple[int, bool]]
) -> None:
    """Make `adapter` one with an A and a B of its own for each adapted part of a fused layer."""
    (n_row, columns), enabled = layer.sizes(), [size for size, wanted in parts if wanted]
    if sum(size for size, _ in parts) != n_row or not enabled:
        raise ValueError(f"parts {parts} must have {n_row} rows together, and one be adapted")
    wanted = torch.cat([torch.full((size,), on, dtype=torch.bool) for size, on in parts])
    adapter.sizes, adapter.n_row = tuple(enabled), n_row
    adapter.rows = wanted.nonzero().flatten().to(layer.base.weight.device)
    a = layer.new(config.rank * len(enabled), columns)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    adapter.lora_a = nn.Parameter(a)
    adapter.lora_b = nn.Parameter(layer.new(sum(enabled), config.rank))


def layers(model: nn.Module) -> list[LoraLayer]:
    """All adapted layers of a model."""
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def activate(model: nn.Module, shares: dict[str, float]) -> None:
    """Use these adapters from now on, each with its share; {} is the base model.

    The corrections are added up, share · ΔW. Raises ValueError for a name that no layer has, and
    while the model is merged.
    """
    known = {name for layer in layers(model) for name in layer.adapters}
    if unknown := sorted(shares.keys() - known):
        raise ValueError(f"there is no adapter {unknown[0]!r}, only {sorted(known)}")
    refuse_merged(model)
    for layer in layers(model):
        layer.active = {name: x for name, x in shares.items() if name in layer.adapters}


@contextlib.contextmanager
def one_adapter_a_row(model: nn.Module, names: list[str | None]) -> Iterator[None]:
    """Inside, row i of a batch is computed with the adapter names[i]; None is the base model."""
    refuse_merged(model)
    for layer in layers(model):
        layer.batch = [name if name in layer.adapters else None for name in names]
    try:
        yield
    finally:
        for layer in layers(model):
            layer.batch = None


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
    if any(type(layer.base).__name__ == "NF4Linear" for layer in layers(model)):
        raise ValueError("a base in 4 bits cannot take a correction in: merge into the whole base")
    for layer in layers(model):
        if layer.saved is None:
            weight = layer.base.weight
            layer.saved = weight.detach().clone()
            total = weight.to(layer.wide())
            for name, share in layer.active.items():
                total = total + share * layer.delta(layer.adapters[name])
            weight.copy_(total)


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
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.base)


def learning_groups(model: nn.Module, ratio: float = 1.0) -> list[dict]:
    """Parameters for an optimizer, in two groups: B with `scale` = ratio, and the others.

    LoRA+ lets B learn `ratio` times as fast as A: in a wide model A's gradient is the larger.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    b = [p for name, p in named if name.endswith("lora_b")]
    others = [p for name, p in named if not name.endswith("lora_b")]
    return [{"params": others, "scale": 1.0}, {"params": b, "scale": ratio}]


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that is the adapters': all that has to be saved of a training."""
    return {name: x for name, x in model.state_dict().items() if ".adapters." in name}


def trainable(model: nn.Module) -> tuple[int, int]:
    """(how many parameters learn, how many there are); a tied matrix counts once."""
    parameters = list(model.parameters())
    held = sum(module.n_weight for module in model.modules() if hasattr(module, "n_weight"))
    return sum(p.numel() for p in parameters if p.requires_grad), held + sum(
        p.numel() for p in parameters
    )


def let_gradients_in(embedding: nn.Module) -> Callable[[], None]:
    """Make the output of a frozen embedding ask for gradients; returns what undoes that.

    Reentrant gradient checkpointing runs a block backward only if its input asks for gradients.
    With a frozen embedding it does not, and every adapter would silently stay as it is.
    """
    return embedding.register_forward_hook(lambda _, __, out: out.requires_grad_(True)).remove
