"""Smaller and faster to run: batch normalisation folded away, then eight bits instead of 32.

After training, batch normalisation is a fixed line y = a·x + b for each channel, and a convolution
before it can do that itself (arXiv:1712.05877, §3.2):

    w' = w·γ/√(σ² + ε)          b' = β − μ·γ/√(σ² + ε)

Then numbers become integers, q = round(x / s) in −127 … 127 (§2.1 with zero-point 0), one scale s
for each filter and one for the input of each layer. Products of integers add up without rounding,
so what a layer computes in integers and in floats is the same to the bit, as long as the sums stay
below 2²⁴ (float32) or 2⁵³ (float64); which of the two suffices is known from the weights.

Additions, pooling and ReLU stay in float32. Left out: training with quantization in the loop.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import normalize, predict
from data import Dataset

TOP = 127


def fold(model: nn.Module) -> nn.Module:
    """A copy for evaluation in which the convolutions do what batch normalisation did.

    A batch normalisation belongs to the convolution right before it in the list of its parent.
    """
    model = copy.deepcopy(model).eval()
    for parent in list(model.modules()):
        children = list(parent.named_children())
        for (name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, folded(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return model


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does the work of both."""
    conv, scale = copy.deepcopy(conv), norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = torch.zeros_like(scale) if conv.bias is None else conv.bias
    conv.weight = nn.Parameter((conv.weight * scale.view(-1, 1, 1, 1)).detach())
    conv.bias = nn.Parameter((norm.bias + (bias - norm.running_mean) * scale).detach())
    return conv


class Int8(nn.Module):
    """A convolution or matrix whose weights and inputs are integers −127 … 127.

    y = s_x·s_w·(q_w ∗ q_x) + b          q_x = round(x / s_x), q_w = round(w / s_w)
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, largest_input: Tensor):
        super().__init__()
        weight = layer.weight.detach()
        scale = weight.abs().flatten(1).amax(1).clamp(min=1e-12) / TOP  # of each output
        integers = (weight.flatten(1) / scale[:, None]).round().to(torch.int8)
        self.register_buffer("weight", integers.view_as(weight))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach().clone())
        self.register_buffer("input_scale", largest_input.clamp(min=1e-12) / TOP)
        self.geometry = None  # of a convolution
        if isinstance(layer, nn.Conv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.geometry = {name: getattr(layer, name) for name in names}

    def quantized(self, x: Tensor) -> Tensor:
        """Integers, still stored as floats; what is larger than ever seen is cut off."""
        return (x / self.input_scale).round().clamp(-TOP, TOP)

    @property
    def exact(self) -> torch.dtype:
        """The smallest float format in which no sum of products is ever rounded."""
        largest = TOP * self.weight.flatten(1).to(torch.int64).abs().sum(1).max()
        return torch.float32 if largest < 2**24 else torch.float64

    def sums(self, q: Tensor) -> Tensor:
        """q_w ∗ q_x by the fast kernels for floats."""
        q, weight = q.to(self.exact), self.weight.to(self.exact)
        if self.geometry is None:
            return F.linear(q, weight)
        return F.conv2d(q, weight, **self.geometry)

    def integer_sums(self, q: Tensor) -> Tensor:
        """The same in int32 from beginning to end: what a chip without floats would do."""
        weight = self.weight.flatten(1).int()
        if self.geometry is None:
            return q.int() @ weight.T
        moves = {name: value for name, value in self.geometry.items() if name != "groups"}
        groups = self.geometry["groups"]
        columns = F.unfold(q, self.weight.shape[2:], **moves).int()  # (N, C·k², places)
        by_group = weight.unflatten(0, (groups, -1)) @ columns.unflatten(1, (groups, -1))
        return by_group.reshape(self.sums(q).shape)

    def forward(self, x: Tensor) -> Tensor:
        sums = self.sums(self.quantized(x)).to(x.dtype)
        scale, bias = self.scale * self.input_scale, self.bias
        if self.geometry is not None:  # one number for each channel (N, C, H, W)
            scale, bias = scale[:, None, None], bias[:, None, None]
        return sums * scale + bias


def replace_layers(model: nn.Module, largest: dict[str, Tensor]) -> nn.Module:
    """A folded model with an Int8 for each convolution and matrix, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Int8(layer, largest[name]))
    return model


@torch.no_grad()
def quantize(model: nn.Module, pictures: Tensor) -> nn.Module:
    """The model in eight bits. pictures (N, C, H, W), normalised, show how large inputs get."""
    model, largest = fold(model), {}

    def note(name: str):
        def hook(module, inputs):
            largest[name] = inputs[0].abs().max()

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers]
    model(pictures)
    for hook in hooks:
        hook.remove()
    return replace_layers(model, largest)


def skeleton(model: nn.Module) -> nn.Module:
    """An eight-bit model of the same shape, to be filled with saved numbers."""
    names = [name for name, _ in model.named_modules()]
    return replace_layers(fold(model), dict.fromkeys(names, torch.ones(())))


@torch.no_grad()
def compare(model: nn.Module, small: nn.Module, dataset: Dataset, constants) -> dict[str, float]:
    """How equal the folded and the eight-bit network are, on the test part.

    fold_error   largest difference of a logit by folding, in float64, relative to the largest logit
    int8_equal   whether sums in integers and in floats are the same to the bit, in every layer
    constants: what has the mean and std that the model wants.
    """
    exact = copy.deepcopy(model).double().eval()
    pictures = normalize(dataset.test.images[:200], constants.mean, constants.std)
    before, after = exact(pictures.double()), fold(exact)(pictures.double())
    both = [
        predict(net, dataset.test.images, constants.mean, constants.std) for net in (model, small)
    ]
    right = [(p.argmax(1) == dataset.test.labels).double().mean().item() for p in both]
    sizes = [sum(t.nbytes for t in net.state_dict().values()) for net in (model, small)]
    return {
        "fold_error": ((before - after).abs().max() / before.abs().max()).item(),
        "int8_equal": sums_are_equal(small, pictures),
        "accuracy": right[0],
        "int8_accuracy": right[1],
        "same_class": (both[0].argmax(1) == both[1].argmax(1)).double().mean().item(),
        "bytes": sizes[0],
        "int8_bytes": sizes[1],
    }


def sums_are_equal(small: nn.Module, pictures: Tensor) -> bool:
    """Whether each layer's sums over these pictures are equal in integers and in floats."""
    equal = []

    def check(layer: Int8, inputs: tuple) -> None:
        q = layer.quantized(inputs[0])
        equal.append(torch.equal(layer.integer_sums(q).double(), layer.sums(q).double()))

    hooks = [m.register_forward_pre_hook(check) for m in small.modules() if isinstance(m, Int8)]
    small(pictures)
    for hook in hooks:
        hook.remove()
    return bool(equal) and all(equal)
