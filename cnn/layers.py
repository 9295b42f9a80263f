"""Convolution, pooling and batch normalisation, forward and backward, written out.

    convolution     LeCun et al. 1998, "Gradient-based learning applied to document recognition"
    as a product    Chellapilla, Puri and Simard 2006, "High performance convolutional neural
                    networks for document processing": unroll the windows, multiply matrices
    normalisation   Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1 and §3.1

Each layer is a function on tensors and a module. A module takes the arguments, holds the parameters
and keeps the buffers of its namesake in torch.nn, so `model.py` can be built from either, and a
state dict fits both. Nothing here calls torch's own convolutions, pools or norms. The gradients are
derived by hand; as they are made of the same functions, they can be differentiated again.

Key: N pictures, C channels in, O channels out, G groups; H, W height and width in, I, J out; P, Q
height and width of the kernel; s stride, d dilation, g the gradient of the loss by the output y.

Left out: padding that is not zeros, ceil_mode, transposed and 1- or 3-dimensional convolutions.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx
from torch.nn import (  # noqa: F401
    Dropout,
    Flatten,
    Identity,
    Linear,
    Module,
    ModuleList,
    ReLU,
    Sequential,
)

CACHE = 2 << 20  # bytes of unrolled windows at a time: what a CPU can keep close

Pair = int | tuple[int, int]


def pair(value: Pair) -> tuple[int, int]:
    """One number for both directions, or one for each."""
    return (value, value) if isinstance(value, int) else tuple(value)


def size_out(size: tuple, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> list[int]:
    """[I, J] = ⌊((H, W) + 2 padding − d (kernel − 1) − 1) / s⌋ + 1.

    ValueError if no window fits.
    """
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, *map(pair, (kernel, stride, padding, dilation)), strict=True)
    ]
    if min(sides) < 1:
        raise ValueError(f"pictures of {tuple(size)} pixels are too small for a kernel of {kernel}")
    return sides


# convolution


def windows(x: Tensor, kernel: Pair, stride: Pair, dilation: Pair) -> Iterator[Tensor]:
    """For each place (p, q) of the kernel the view (…, I, J) of all x[…, i s + p d, j s + q d]."""
    (h, w), (sh, sw), (dh, dw) = pair(kernel), pair(stride), pair(dilation)
    i, j = size_out(x.shape[-2:], kernel, stride, 0, dilation)
    for p, q in itertools.product(range(0, h * dh, dh), range(0, w * dw, dw)):
        yield x[..., p : p + sh * (i - 1) + 1 : sh, q : q + sw * (j - 1) + 1 : sw]


def pad(x: Tensor, padding: Pair, value: float = 0.0) -> Tensor:
    """A frame of `value` around the pictures (…, H, W)."""
    h, w = pair(padding)
    return F.pad(x, (w, w, h, h), value=value) if h or w else x


def conv2d_direct(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """The definition, to be read and to check `conv2d` against; autograd finds its gradients.

        y[n, o, i, j] = b[o] + Σ_c Σ_p Σ_q  w[o, c, p, q] · x[n, c, i s + p d, j s + q d]

    with x zero outside the picture, and c over the channels of o's group. Arguments as `conv2d`.
    """
    x = pad(x, padding).unflatten(1, (groups, -1))  # (N, G, C/G, H, W)
    w = weight.flatten(2).unflatten(0, (groups, -1))  # (G, O/G, C/G, P·Q)
    seen = windows(x, weight.shape[2:], stride, dilation)
    y = sum(torch.einsum("ngcij,goc->ngoij", part, w[..., k]) for k, part in enumerate(seen))
    return y.flatten(1, 2) + (0 if bias is None else bias[:, None, None])


def im2col(x: Tensor, kernel, stride, padding, dilation, groups: int) -> Iterator[Tensor]:
    """The windows of x (N, C, H, W) as the rows of matrices: (G, n·I·J, P·Q·C/G), n pictures each.

    A window is no copy but a way to walk through memory: with the channels innermost, the strides
    of (i, j, p, q) are those of (y, x) times (s, s, d, d). Copying the view unrolls it. It grows
    P·Q-fold, so it is done for a few pictures at a time and multiplied while it is in the cache.
    """
    x = pad(x, padding).permute(0, 2, 3, 1).contiguous()  # (N, H, W, C)
    (n, *_, c), (i, j) = x.shape, size_out(x.shape[1:3], kernel, stride, 0, dilation)
    c //= groups
    (sh, sw), (dh, dw), (step_n, step_h, step_w, _) = stride, dilation, x.stride()
    view = x.as_strided(
        (n, i, j, groups, *kernel, c),
        (step_n, sh * step_h, sw * step_w, c, dh * step_h, dw * step_w, 1),
    )
    room = CACHE if x.device.type == "cpu" else 64 * CACHE
    count = max(1, room // (math.prod(view.shape[1:]) * x.element_size()))
    buffer = torch.empty_like(view[:count], memory_format=torch.contiguous_format)
    for part in view.split(count):
        rows = buffer[: len(part)].copy_(part)
        yield rows.view(len(part) * i * j, groups, math.prod(kernel) * c).transpose(0, 1)


def as_matrix(weight: Tensor, groups: int) -> Tensor:
    """The kernels (O, C/G, P, Q) as the matrices that multiply im2col's rows: (G, P·Q·C/G, O/G)."""
    return weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3).contiguous()


class Convolution(Function):
    """y = im2col(x) · w, and its gradients, which are convolutions themselves.

    Both follow from the definition, L being the loss and g = ∂L/∂y:

        ∂L/∂w[o, c, p, q] = Σ_n Σ_i Σ_j  g[n, o, i, j] · x[n, c, i s + p d, j s + q d]

        ∂L/∂x[n, c, a, b] = Σ_o Σ_p Σ_q  w[o, c, p, q] · g[n, o, (a − p d) / s, (b − q d) / s]

    where only whole quotients inside of g count. The first is im2col(x)ᵀ · g. The second walks
    through the kernel backwards: it is the convolution of g, its pixels s apart with zeros between,
    with the kernels turned by 180° and their channels in and out exchanged.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x, weight, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding, dilation, groups
        kernel, w = weight.shape[2:], as_matrix(weight, groups)
        i, j = size_out(x.shape[2:], kernel, stride, padding, dilation)
        y = x.new_empty(len(x), i, j, len(weight))  # (N, I, J, O): channels innermost
        rows = y.view(len(x) * i * j, groups, len(weight) // groups).transpose(0, 1)
        done = 0
        for columns in im2col(x, kernel, *ctx.geometry):
            torch.bmm(columns, w, out=rows[:, done : done + columns.shape[1]])
            done += columns.shape[1]
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: FunctionCtx, g):
        x, weight = ctx.saved_tensors
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = input_gradient(g, weight, x.shape[2:], *ctx.geometry)
        if ctx.needs_input_grad[1]:
            by_weight = WeightGradient.apply(g, x, weight.shape[2:], *ctx.geometry)
        return by_x, by_weight, None, None, None, None


def input_gradient(g, weight, size, stride, padding, dilation, groups) -> Tensor:
    """The second gradient of `Convolution`, (N, C, H, W) with (H, W) = size."""
    g, (n, o, i, j) = g.permute(0, 2, 3, 1), g.shape
    if stride != (1, 1):
        apart = g.new_zeros(n, stride[0] * (i - 1) + 1, stride[1] * (j - 1) + 1, o)
        apart[:, :: stride[0], :: stride[1]] = g
        g = apart
    frame = []  # so wide that each pixel of x meets all windows it was in; less than 0 cuts off
    for axis in (1, 0):
        before = dilation[axis] * (weight.shape[2 + axis] - 1) - padding[axis]
        frame += [before, size[axis] + padding[axis] - g.shape[1 + axis]]
    g = F.pad(g, (0, 0, *frame)).permute(0, 3, 1, 2)
    turned = weight.flip(2, 3).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return Convolution.apply(g, turned, (1, 1), (0, 0), dilation, groups)


class WeightGradient(Function):
    """∂L/∂w of `Convolution` as a function of g and x. It is linear in both, as y is in x and w."""

    @staticmethod
    def forward(ctx: FunctionCtx, g, x, kernel, stride, padding, dilation, groups):
        ctx.save_for_backward(g, x)
        ctx.geometry = stride, padding, dilation, groups
        rows = g.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (groups, -1)).transpose(0, 1)
        height, done = math.prod(kernel) * x.shape[1] // groups, 0
        wide = torch.promote_types(g.dtype, torch.float32)  # a sum of many needs the digits
        total = g.new_zeros(groups, height, rows.shape[2], dtype=wide)
        for columns in im2col(x, kernel, *ctx.geometry):
            total += torch.bmm(columns.mT, rows[:, done : done + columns.shape[1]])
            done += columns.shape[1]
        total = total.to(g.dtype).unflatten(1, (*kernel, -1))  # (G, P, Q, C/G, O/G)
        return total.permute(0, 4, 3, 1, 2).flatten(0, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, v):
        g, x = ctx.saved_tensors
        by_g = Convolution.apply(x, v, *ctx.geometry) if ctx.needs_input_grad[0] else None
        by_x = input_gradient(g, v, x.shape[2:], *ctx.geometry) if ctx.needs_input_grad[1] else None
        return by_g, by_x, None, None, None, None, None


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """`conv2d_direct` as matrix products, so at the speed of those.

    x (N, C, H, W), weight (O, C/G, P, Q), bias (O,); y (N, O, I, J), the channels innermost in
    memory. Output o is in group ⌊o G / O⌋ and sees the channels of that group alone. ValueError
    if the shapes do not fit.
    """
    o, c = weight.shape[:2]
    if x.ndim != 4 or x.shape[1] != c * groups or o % groups:
        raise ValueError(
            f"kernels {tuple(weight.shape)} in {groups} groups do not fit pictures {tuple(x.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    y = Convolution.apply(x, weight, pair(stride), pair(padding), pair(dilation), groups)
    return y if bias is None else y + bias[:, None, None].to(y.dtype)


# pooling


class MaxPool(Function):
    """y = the largest of each window; its gradient goes to the first pixel that is as large.

        ∂L/∂x[a, b] = Σ of g[i, j] over the windows (i, j) that chose (a, b)

    A window that holds NaN yields NaN.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x, kernel, stride, padding, dilation):
        ctx.geometry, ctx.padding = (kernel, stride, dilation), padding
        first, *others = windows(pad(x, padding, float("-inf")), *ctx.geometry)
        y = first.clone()
        for other in others:
            torch.maximum(y, other, out=y)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, g):
        x, y = ctx.saved_tensors
        total, to_give = framed_zeros(g, x.shape, ctx.padding), torch.ones_like(y, dtype=torch.bool)
        framed = pad(x, ctx.padding, float("-inf"))
        pixels, places = windows(framed, *ctx.geometry), windows(total, *ctx.geometry)
        for pixel, place in zip(pixels, places, strict=True):
            chosen = to_give & (pixel == y)
            to_give ^= chosen
            place += torch.where(chosen, g, 0)
        return cropped(total, ctx.padding), None, None, None, None


class AveragePool(Function):
    """y = Σ over the window / P Q, where zeros of the frame count; each pixel gets g / P Q."""

    @staticmethod
    def forward(ctx: FunctionCtx, x, kernel, stride, padding):
        ctx.geometry, ctx.padding, ctx.shape = (kernel, stride, 1), padding, x.shape
        first, *others = windows(pad(x, padding), *ctx.geometry)
        y = first.clone()
        for other in others:
            y += other
        return y.div_(math.prod(kernel))

    @staticmethod
    def backward(ctx: FunctionCtx, g):
        total, share = framed_zeros(g, ctx.shape, ctx.padding), g / math.prod(ctx.geometry[0])
        for place in windows(total, *ctx.geometry):
            place += share
        return cropped(total, ctx.padding), None, None, None


def framed_zeros(like: Tensor, shape: tuple, padding: tuple) -> Tensor:
    """Zeros for the pictures (N, C, H, W) = shape and their frame, the channels innermost."""
    n, c, h, w = shape
    return like.new_zeros(n, h + 2 * padding[0], w + 2 * padding[1], c).permute(0, 3, 1, 2)


def cropped(x: Tensor, padding: tuple) -> Tensor:
    """The pictures without their frame."""
    (h, w), (i, j) = padding, x.shape[2:]
    return x[:, :, h : i - h, w : j - w]


def check_frame(kernel: Pair, padding: Pair) -> None:
    """ValueError if a window could lie outside of the picture altogether, as in torch."""
    if any(2 * p > k for k, p in zip(pair(kernel), pair(padding), strict=True)):
        raise ValueError(f"padding {padding} is more than half of the kernel {kernel}")


def max_pool2d(x, kernel, stride=None, padding=0, dilation=1) -> Tensor:
    """The largest of each window, (N, C, I, J); the frame is −∞. stride: by default the kernel."""
    check_frame(kernel, padding)
    stride = kernel if stride is None else stride
    return MaxPool.apply(x, *map(pair, (kernel, stride, padding, dilation)))


def avg_pool2d(x, kernel, stride=None, padding=0) -> Tensor:
    """The mean of each window, (N, C, I, J); the frame is 0. stride: by default the kernel."""
    check_frame(kernel, padding)
    stride = kernel if stride is None else stride
    return AveragePool.apply(x, *map(pair, (kernel, stride, padding)))


class GlobalAverage(Function):
    """y[n, c] = the mean over all pixels, (N, C, 1, 1); each of the H W pixels gets g / H W."""

    @staticmethod
    def forward(ctx: FunctionCtx, x):
        ctx.shape = x.shape
        return x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: FunctionCtx, g):
        return (g / math.prod(ctx.shape[2:])).expand(ctx.shape)


# batch normalisation


def channel_mean(x: Tensor) -> Tensor:
    """Over N, H and W: (C, 1, 1)."""
    return x.mean((0, 2, 3))[:, None, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel over N, H and W, (C, 1, 1) each."""
    mean = channel_mean(x)
    return mean, channel_mean((x - mean).square())


class Normalisation(Function):
    """x̂ = (x − μ) / √(σ² + ε) with the moments of the batch itself. arXiv:1502.03167, Algorithm 1.

    μ and σ² depend on every x of the channel. With m = N H W, ∂μ/∂x = 1/m and
    ∂σ²/∂x = 2 (x − μ)/m, the chain rule gives

        ∂L/∂x = (g − mean(g) − x̂ · mean(g x̂)) / √(σ² + ε)

    the means being over the m values: g without its part along 1 and its part along x̂. So the
    gradient cannot shift or scale what the normalisation would undo.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x, eps):
        mean, var = moments(x)
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(x, mean, scale)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        return torch.addcmul(-mean * scale, x, scale), mean, var

    @staticmethod
    def backward(ctx: FunctionCtx, g, *_):
        x, mean, scale = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient is differentiated too: the moments depend on x
            mean, var = moments(x)
            scale = (var + ctx.eps).rsqrt()
        normal = torch.addcmul(-mean * scale, x, scale)
        along_one, along_normal = channel_mean(g), channel_mean(g * normal)
        out = torch.addcmul(-along_one * scale, g, scale)
        return out.addcmul_(normal, -along_normal * scale), None


# modules


def refuse(is_set: bool, what: str) -> None:
    """ValueError if an option is set that torch.nn has and we do not."""
    if is_set:
        raise ValueError(f"{what} is not among the layers written out here")


class Conv2d(nn.Conv2d):
    """`conv2d` with its parameters `weight` and `bias`, which begin as in torch.nn."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse(self.padding_mode != "zeros", f"Conv2d(padding_mode={self.padding_mode!r})")
        refuse(isinstance(self.padding, str), f"Conv2d(padding={self.padding!r})")

    def forward(self, x: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return conv2d(x, self.weight, self.bias, *geometry)


class MaxPool2d(nn.MaxPool2d):
    """`max_pool2d`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse(self.ceil_mode, "MaxPool2d(ceil_mode=True)")
        refuse(self.return_indices, "MaxPool2d(return_indices=True)")

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(x, self.kernel_size, self.stride, self.padding, self.dilation)


class AvgPool2d(nn.AvgPool2d):
    """`avg_pool2d`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse(self.ceil_mode, "AvgPool2d(ceil_mode=True)")
        refuse(not self.count_include_pad, "AvgPool2d(count_include_pad=False)")
        refuse(self.divisor_override is not None, "AvgPool2d(divisor_override=…)")

    def forward(self, x: Tensor) -> Tensor:
        return avg_pool2d(x, self.kernel_size, self.stride, self.padding)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """The mean over the whole picture: the output size can only be 1."""

    def __init__(self, output_size: Pair):
        super().__init__(output_size)
        refuse(output_size not in (1, (1, 1)), f"AdaptiveAvgPool2d({output_size})")

    def forward(self, x: Tensor) -> Tensor:
        return GlobalAverage.apply(x)


class BatchNorm2d(nn.BatchNorm2d):
    """y = γ x̂ + β: by the moments of the batch in training, by the running ones otherwise.

    arXiv:1502.03167, Algorithms 1 and 2. γ and β are `weight` and `bias`. In training the buffers
    follow:

        running ← (1 − momentum) · running + momentum · (μ, σ² m / (m − 1))

    The batch is normalised by the biased variance but σ² m / (m − 1), which is unbiased, is kept
    (§3.1 there). momentum = None: the plain average of all batches so far.
    """

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))  # sums need digits
        if self.training or self.running_mean is None:
            if x.numel() == x.shape[1]:
                raise ValueError(f"one value a channel has no variance: {tuple(x.shape)}")
            normal, mean, var = Normalisation.apply(x, self.eps)
            if self.training and self.running_mean is not None:
                self.follow(mean.flatten(), var.flatten(), x.numel() // x.shape[1])
        else:
            mean, var = self.running_mean[:, None, None], self.running_var[:, None, None]
            normal = (x - mean) * (var + self.eps).rsqrt()
        if self.weight is not None:
            normal = torch.addcmul(self.bias[:, None, None], normal, self.weight[:, None, None])
        return normal.to(dtype)

    @torch.no_grad()
    def follow(self, mean: Tensor, var: Tensor, m: int) -> None:
        """One step of the running moments; m values a channel."""
        self.num_batches_tracked += 1
        rate = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var * (m / (m - 1)), rate)
