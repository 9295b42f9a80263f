"""The networks: a U-Net for pictures, a transformer for pictures (DiT), an MLP for points.

All three answer the same question: given noisy rows x (B, C, H, W), their times (B,) and perhaps
labels (B,), what is the target (see diffusion.py)? Points of the plane are pictures of two channels
and one pixel, (B, 2, 1, 1).

The U-Net is that of Ho et al. 2020 (arXiv:2006.11239, appendix B) as the library diffusers builds
it in its `UNet2DModel`: the names of its parts are diffusers' names, so weights fit both ways. The
DiT is that of Peebles & Xie 2022 (arXiv:2212.09748, §3.2) with adaLN-Zero.

Key: B rows, C channels, H and W height and width, D features of a time or token, L tokens.
Left out: downsampling inside of residual blocks, FIR filters, learned variances.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from options import check, option


@dataclass(frozen=True)
class NetConfig:
    """The network.

    Raises ValueError for sizes that do not fit together. What has no option is read from diffusers'
    folders alone; the defaults are theirs.
    """

    net: str = option("unet", "unet, dit (a transformer) or mlp (points)", ("unet", "dit", "mlp"))
    widths: str = option("24,48", "unet: channels at each resolution, each half of the one before")
    attention: str = option("1", "unet: which resolutions have attention, from 0; none if empty")
    n_block: int = option(1, "unet: residual blocks at each resolution", least=1, most=64)
    n_group: int = option(8, "unet: groups of group normalisation", least=1)
    d_model: int = option(96, "dit and mlp: features", least=2, most=65536)
    n_layer: int = option(4, "dit and mlp: blocks", least=1, most=1024)
    patch: int = option(2, "dit: pixels along a side of a patch", least=1)
    d_head: int = option(24, "unet and dit: features of an attention head", least=1)
    dropout: float = option(0.0, "unet: share of features that training drops", least=0, below=1)
    channels: int = 1
    image_height: int = 8  # 0 where the data are to say it
    image_width: int = 8
    n_class: int = 0  # 0: no labels. Else label n_class means "any class"
    norm_eps: float = 1e-5
    downsample_padding: int = 1
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    null_label: bool = True  # False for class-conditional networks of others, without one

    def __post_init__(self):
        check(self)
        least = min(self.channels - 1, self.image_height, self.image_width, self.n_class)
        if least < 0 or self.downsample_padding not in (0, 1):
            raise ValueError(f"pictures of {self.shape} with {self.n_class} classes cannot be")
        {"unet": self.check_unet, "dit": self.check_dit, "mlp": lambda: None}[self.net]()

    def check_unet(self) -> None:
        factor = 2 ** (len(self.levels) - 1)
        if self.image_height % factor or self.image_width % factor:
            raise ValueError(f"pictures of {self.image_height} × {self.image_width}: this U-Net "
                             f"halves them {len(self.levels) - 1} times, so both sides must be "
                             f"multiples of {factor}: --image-size or fewer --widths")  # fmt: skip
        for width in self.levels:
            if width < 1 or width % self.n_group or width > 65536:
                raise ValueError(f"widths {self.widths}: each must be a multiple of n_group, "
                                 f"{self.n_group}, and at most 65536")  # fmt: skip
        if self.levels[0] % 2:
            raise ValueError(f"widths {self.widths}: the first must be even")
        if not 0 <= self.freq_shift < self.levels[0] // 2:
            raise ValueError(f"freq_shift {self.freq_shift} must be at least 0 and less than half "
                             "of the first width")  # fmt: skip
        for level in (*self.attended, len(self.levels) - 1):
            if not 0 <= level < len(self.levels) or self.levels[level] % self.d_head:
                raise ValueError(f"attention {self.attention}: there are resolutions 0 to "
                                 f"{len(self.levels) - 1}, and the widths of these and of the last "
                                 f"must be multiples of d_head, {self.d_head}")  # fmt: skip

    def check_dit(self) -> None:
        if self.image_height % self.patch or self.image_width % self.patch:
            raise ValueError(f"pictures of {self.image_height} × {self.image_width} are not made "
                             f"of whole patches of {self.patch} pixels: change --patch or "
                             "--image-size")  # fmt: skip
        if self.d_model % self.d_head or self.d_model % 4:
            raise ValueError(f"d_model {self.d_model} must be a multiple of 4 and of d_head "
                             f"{self.d_head}")  # fmt: skip

    @property
    def levels(self) -> tuple[int, ...]:
        """The channels at each resolution."""
        return whole_numbers("widths", self.widths)

    @property
    def attended(self) -> tuple[int, ...]:
        """The resolutions with attention."""
        return whole_numbers("attention", self.attention) if self.attention.strip() else ()

    @property
    def n_label(self) -> int:
        """How many labels the network knows."""
        return self.n_class + int(self.null_label) if self.n_class else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a row."""
        return self.channels, self.image_height, self.image_width


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """The numbers of "32,64". ValueError for anything else, and for more than 16 of them."""
    words = [word.strip() for word in text.split(",")]
    if len(words) > 16 or not all(w.isascii() and w.isdigit() and len(w) < 9 for w in words):
        raise ValueError(f"{name} must be up to 16 whole numbers with commas, not {text[:40]!r}")
    return tuple(map(int, words))


ANY_SIDE = {"image_height": 0, "image_width": 0}
PRESETS = {  # their pictures are as large as the data say
    "toy": NetConfig(net="mlp", d_model=128, n_layer=3, channels=2, **ANY_SIDE),
    "digits": NetConfig(**ANY_SIDE),
    "dit": NetConfig(net="dit", **ANY_SIDE),
    "mnist": NetConfig(widths="16,32,64", attention="2", d_head=32, **ANY_SIDE),
    "shapes": NetConfig(widths="32,64,64", attention="2", d_head=32, **ANY_SIDE),
}


def build(config: NetConfig) -> nn.Module:
    """The network of these sizes, with random weights."""
    return {"unet": UNet, "dit": DiT, "mlp": MLP}[config.net](config)


# ── Time and class ────────────────────────────────────────────────────────────────────────────────


def sinusoids(times: Tensor, width: int, flip: bool = True, shift: int = 0) -> Tensor:
    """Times (B,) as waves of `width` / 2 frequencies, from 1 down to 1/10000: (B, width).

    §3.5 of arXiv:1706.03762. flip: cosines first. shift 1 makes the lowest exactly 1/10000.
    """
    half = width // 2
    places = torch.arange(half, dtype=torch.float32, device=times.device)
    angles = times.float()[:, None] * torch.exp(-math.log(10000) / (half - shift) * places)
    waves = [angles.cos(), angles.sin()] if flip else [angles.sin(), angles.cos()]
    return torch.cat(waves, dim=1)


class TimeEmbedding(nn.Module):
    """Two layers that turn waves (B, n_in) into features (B, d_out)."""

    def __init__(self, n_in: int, d_out: int):
        super().__init__()
        self.linear_1 = nn.Linear(n_in, d_out)
        self.linear_2 = nn.Linear(d_out, d_out)

    def forward(self, waves: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(waves)))


class Network(nn.Module):
    """What the three networks share: features of time and class, added up."""

    def __init__(self, config: NetConfig, n_wave: int, d_features: int):
        super().__init__()
        self.config, self.n_wave = config, n_wave
        self.time_embedding = TimeEmbedding(n_wave, d_features)
        if config.n_class:
            self.class_embedding = nn.Embedding(config.n_label, d_features)

    def features(self, times: Tensor, labels: Tensor | None) -> Tensor:
        """(B, D). Without labels a network with classes is asked for any of them."""
        config = self.config
        waves = sinusoids(times, self.n_wave, config.flip_sin_to_cos, config.freq_shift)
        features = self.time_embedding(waves.to(self.time_embedding.linear_1.weight.dtype))
        if config.n_class:
            if labels is None:
                labels = torch.full((len(times),), config.n_label - 1, device=times.device)
            features = features + self.class_embedding(labels)
        return features


# ── U-Net ─────────────────────────────────────────────────────────────────────────────────────────


class ResidualBlock(nn.Module):
    """x + F(x, time): two convolutions, each after group normalisation and silu, x · sigmoid(x)."""

    def __init__(self, n_in: int, n_out: int, d_time: int, config: NetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.n_group, n_in, config.norm_eps)
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(d_time, n_out)
        self.norm2 = nn.GroupNorm(config.n_group, n_out, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, n_in, H, W) and silu of the features (B, d_time) to (B, n_out, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(hidden))))


class Attention(nn.Module):
    """x + attention over all H · W places, with heads of d_head features (arXiv:1706.03762)."""

    def __init__(self, width: int, config: NetConfig):
        super().__init__()
        self.d_head = config.d_head
        self.group_norm = nn.GroupNorm(config.n_group, width, config.norm_eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        q, k, v = (
            layer(tokens).unflatten(2, (-1, self.d_head)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )  # (B, heads, L, d_head)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, L, C)
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, (height, width))


class Downsample(nn.Module):
    """A convolution that takes every second place."""

    def __init__(self, width: int, padding: int):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each place four times, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks at one resolution: residual ones, each with attention or without."""

    def __init__(self, pairs: list[tuple[int, int]], d_time: int, attend: bool, config: NetConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(*pair, d_time, config) for pair in pairs)
        if attend:
            self.attentions = nn.ModuleList(Attention(n_out, config) for _, n_out in pairs)

    def block(self, i: int, x: Tensor, time: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x) if hasattr(self, "attentions") else x


class UNet(Network):
    """Down through coarser and coarser resolutions, and up again with what was seen on the way."""

    def __init__(self, config: NetConfig):
        widths, d_time = config.levels, 4 * config.levels[0]
        super().__init__(config, widths[0], d_time)
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        seen = [widths[0]]  # the channels of what the way up will be given
        for i, width in enumerate(widths):
            pairs = [(seen[-1], width)] + [(width, width)] * (config.n_block - 1)
            level = Level(pairs, d_time, i in config.attended, config)
            seen += [width] * config.n_block
            if i + 1 < len(widths):
                level.downsamplers = nn.ModuleList([Downsample(width, config.downsample_padding)])
                seen.append(width)
            self.down_blocks.append(level)
        middle = [(widths[-1], widths[-1])]
        self.mid_block = Level(middle * 2, d_time, False, config)
        self.mid_block.attentions = nn.ModuleList([Attention(widths[-1], config)])
        coming = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            pairs = []
            for _ in range(config.n_block + 1):
                pairs.append((coming + seen.pop(), width))
                coming = width
            level = Level(pairs, d_time, i in config.attended, config)
            if i:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(config.n_group, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), times (B,) and labels (B,) to the target (B, C, H, W)."""
        time = F.silu(self.features(times, labels))
        x = self.conv_in(x)
        seen = [x]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, x, time)
                seen.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                seen.append(x)
        x = self.mid_block.resnets[0](x, time)
        x = self.mid_block.resnets[1](self.mid_block.attentions[0](x), time)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                x = level.block(i, torch.cat([x, seen.pop()], dim=1), time)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


# ── DiT ───────────────────────────────────────────────────────────────────────────────────────────


def places(n_row: int, n_column: int, d_model: int) -> Tensor:
    """Waves of the row and of the column of each token: (L, d_model)."""
    rows, columns = torch.arange(n_row), torch.arange(n_column)
    down = sinusoids(rows, d_model // 2)[:, None].expand(-1, n_column, -1)
    across = sinusoids(columns, d_model // 2)[None].expand(n_row, -1, -1)
    return torch.cat([down, across], dim=2).flatten(0, 1)


class DiTBlock(nn.Module):
    """Attention and two layers, scaled, shifted and gated by time and class (adaLN-Zero).

    §3.2 and Figure 3 of arXiv:2212.09748. The gates begin at zero, so at first a block does
    nothing.
    """

    def __init__(self, config: NetConfig):
        super().__init__()
        width, self.d_head = config.d_model, config.d_head
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        """x (B, L, D) and silu of the features (B, D) to (B, L, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(features)[:, None].chunk(
            6, dim=2
        )
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.d_head)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer with weights and bias of zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DiT(Network):
    """A transformer over patches of the picture. Answers zero at first."""

    def __init__(self, config: NetConfig):
        width, patch = config.d_model, config.patch
        super().__init__(config, 256, width)
        self.patches = nn.Conv2d(config.channels, width, patch, stride=patch)
        grid = (config.image_height // patch, config.image_width // patch)
        self.register_buffer("places", places(*grid, width), persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.out = zeroed(nn.Linear(width, patch * patch * config.channels))

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), times (B,) and labels (B,) to the target (B, C, H, W)."""
        features = F.silu(self.features(times, labels))
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places  # (B, L, D)
        for block in self.blocks:
            tokens = block(tokens, features)
        shift, scale = self.modulation(features)[:, None].chunk(2, dim=2)
        pixels = self.out(self.norm(tokens) * (1 + scale) + shift).transpose(1, 2)
        return F.fold(pixels, x.shape[2:], self.config.patch, stride=self.config.patch)


# ── MLP ───────────────────────────────────────────────────────────────────────────────────────────


class MLP(Network):
    """Layers with shortcuts, for points of the plane or other small rows.

    They see each number also as waves, since layers alone are slow to learn fine lines
    (arXiv:2006.10739).
    """

    def __init__(self, config: NetConfig):
        width, n_in = config.d_model, config.channels * config.image_height * config.image_width
        super().__init__(config, width - width % 2, width)
        self.register_buffer("frequencies", 2.0 ** torch.arange(4), persistent=False)
        self.enter = nn.Linear(n_in * 9, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.n_layer))
        self.leave = zeroed(nn.Linear(width, n_in))

    def forward(self, x: Tensor, times: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), times (B,) and labels (B,) to the target (B, C, H, W)."""
        features = self.features(times, labels)
        angles = (x.flatten(1)[:, :, None] * self.frequencies).flatten(1)
        hidden = self.enter(torch.cat([x.flatten(1), angles.sin(), angles.cos()], dim=1))
        for layer in self.layers:
            hidden = hidden + layer(F.silu(hidden + features))
        return self.leave(F.silu(hidden)).view_as(x)
