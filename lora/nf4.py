"""NF4: sixteen numbers to store a weight in four bits, and the frozen base of QLoRA made of them.

(Dettmers et al. 2023, arXiv:2305.14314, §3.) Weights of a trained layer look normally distributed.
So the sixteen values are quantiles of the normal distribution: each is the right one for about as
many weights. A block of 64 weights is divided by its largest absolute value, the scale, and of each
weight only the number of the nearest value is kept. Double quantization keeps the scales in 8 bits.

    4 bits a weight + 8/64 for scales + 32/(64·256) for scales of scales = 4.127 bits

The correction beside it is learned in float32. Left out: paged optimizers, and the kernels that
multiply in 4 bits: here the matrix is unpacked for each product, which saves memory and costs time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import replace

BLOCK = 64  # weights to a scale
BLOCK_OF_SCALES = 256  # scales to a scale of scales


def quantiles(n: int, last: float) -> Tensor:
    """n quantiles of the normal distribution, at even steps from probability `last` towards ½."""
    p = torch.linspace(last, 0.5, n + 1, dtype=torch.float64)[:-1]
    return torch.special.ndtri(p)


def table() -> Tensor:
    """The sixteen values, (16,) float32 from −1 to 1: seven below zero, zero, eight above.

    Zero must be among them, since padding is exactly zero. So the two sides are made apart (QLoRA,
    §3). They begin at the probability 1 − ½(1/32 + 1/30): half a step from the end for a side of 16
    and of 15 values, and the mean of the two.
    """
    last = 1 - (1 / 32 + 1 / 30) / 2
    above, below = quantiles(8, last), -quantiles(7, last)
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (values / values.max()).float()


def largest_error() -> float:
    """Half the widest gap between two values: the error of a weight is at most this · scale."""
    return float(table().diff().max() / 2)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(numbers of the nearest values (N,) uint8, scales (blocks,) float32) of all N weights.

    The last block is filled up with zeros.
    """
    flat = F.pad(weight.detach().float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = flat.abs().amax(dim=1)
    ratio = flat / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    values = table().to(weight.device)
    borders = (values[1:] + values[:-1]) / 2
    return torch.bucketize(ratio, borders).to(torch.uint8).flatten(), scales


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales in 8 bits: (steps (n,) uint8, size of a step for each 256 of them, the least one)."""
    low = scales.min()
    groups = F.pad(scales - low, (0, -len(scales) % BLOCK_OF_SCALES)).view(-1, BLOCK_OF_SCALES)
    step = groups.amax(dim=1) / 255
    codes = (groups / step.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return codes.to(torch.uint8).flatten()[: len(scales)], step, low


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is kept in 4 bits. `weight` is unpacked at every use."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.n_weight, self.bias = linear.weight.numel(), linear.bias
        codes, scales = quantize_blocks(linear.weight)
        steps, step, low = quantize_scales(scales)
        self.register_buffer("codes", codes[0::2] << 4 | codes[1::2])  # two to a byte
        self.register_buffer("steps", steps)
        self.register_buffer("step", step)
        self.register_buffer("low", low)

    @property
    def scales(self) -> Tensor:
        """The scale of each block, unpacked, (blocks,)."""
        return (
            self.low + self.steps * self.step.repeat_interleave(BLOCK_OF_SCALES)[: len(self.steps)]
        )

    @property
    def weight(self) -> Tensor:
        """(O, I) float32."""
        codes = torch.stack((self.codes >> 4, self.codes & 15), dim=1).view(-1, BLOCK)
        values = table().to(codes.device)[codes.long()] * self.scales[:, None]
        return values.flatten()[: self.n_weight].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        out = Product.apply(x, self)
        return out if self.bias is None else out + self.bias


class Product(torch.autograd.Function):
    """x·Wᵀ of a layer in 4 bits, which unpacks W anew for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize(model: nn.Module, paths: list[str]) -> None:
    """Put an NF4Linear in the place of each of these linear layers. ValueError for other layers."""
    for path in paths:
        layer = model.get_submodule(path)
        if type(layer) is not nn.Linear:
            raise ValueError(f"quantize: {path} is no linear layer")
        replace(model, path, NF4Linear(layer))
