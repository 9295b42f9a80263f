"""Convolutional networks: LeNet-5, residual networks, their plain twins, and a small fast one.

A convolution is a small pattern that slides over a picture: few weights, and what it learns in one
place it knows everywhere. Stacking more of them should help, yet beyond some twenty layers a plain
stack gets worse, even on its own training pictures. A residual block adds its input to its output,

    y = relu(F(x) + x)          so that doing nothing is easy: F = 0

and then hundreds of layers train.

    LeNet-5   LeCun et al. 1998, "Gradient-based learning applied to document recognition", §II-B
    ResNet    He et al. 2015, arXiv:1512.03385, §3.3 (ResNet-18) and §4.2 (CIFAR: 6n + 2 layers)
    plain     the same without shortcuts, arXiv:1512.03385 §3.3
    fast      ours: few layers, and most of them on small pictures, where they are cheap

Key: N pictures, C channels, H and W height and width, K classes.

Left out: bottleneck blocks (ResNet-50 and deeper), dropout. The names of the parameters are those
of torchvision. `layers` says whose convolutions to use: torch.nn, or any namespace with the same
constructors. This file imports torch alone: copy it into a project of your own.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 100_000  # that any of the numbers below may be


def size(default, help: str, choices: tuple | None = None):
    """A field that `main.py` offers as a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class NetConfig:
    """The network.

    Raises ValueError for sizes that cannot be built.
    """

    net: str = size("fast", "family", ("fast", "lenet", "resnet"))
    width: int = size(24, "channels of the first stage; each later stage has twice as many")
    depth: int = size(20, "layers of a resnet: 2 · n_stage · n + 2")
    n_stage: int = size(3, "stages of a resnet; the pictures halve between them")
    shortcut: str = size("A", "resnet: zero-padded, convolved, none = plain", ("A", "B", "none"))
    stem: str = size("cifar", "first layer of a resnet, for small or large pictures",
                     ("cifar", "imagenet"))  # fmt: skip
    zero_init: bool = size(False, "residual blocks begin as the identity")
    zero_head: bool = size(True, "the last layer begins at zero: all classes are equally likely")
    channels: int = 3  # of the pictures; these four come from the data
    image_height: int = 32
    image_width: int = 32
    n_class: int = 10

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
            if type(value) is int and value > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST:,}")
        step = 2 * self.n_stage
        if self.net == "resnet" and (self.depth < 4 or (self.depth - 2) % step):
            raise ValueError(
                f"depth {self.depth}: {self.n_stage} stages need {step}·n + 2 layers, "
                f"such as {step + 2} or {2 * step + 2}"
            )
        if min(self.image_height, self.image_width) < self.smallest:
            raise ValueError(
                f"pictures of {self.image_height} × {self.image_width} are too small for the net "
                f"{self.net}, which needs {self.smallest} × {self.smallest}"
            )

    @property
    def smallest(self) -> int:
        """The smallest side of a picture that leaves a pixel for the last layer."""
        return {"fast": 8, "lenet": 12}.get(self.net, 1)

    @property
    def n_block(self) -> int:
        """Residual blocks in each stage."""
        return (self.depth - 2) // (2 * self.n_stage)


def cifar_resnet(depth: int, shortcut: str = "A") -> NetConfig:
    """arXiv:1512.03385 §4.2: three stages of 16, 32 and 64 channels."""
    return NetConfig(net="resnet", width=16, depth=depth, n_stage=3, shortcut=shortcut)


def resnet18(stem: str) -> NetConfig:
    """arXiv:1512.03385, Table 1: four stages of two blocks, 64 to 512 channels."""
    return NetConfig(net="resnet", width=64, depth=18, n_stage=4, shortcut="B", stem=stem)


PRESETS = {  # with the number of parameters for ten classes of 3 × 32 × 32; a test counts them
    "fast": NetConfig(),  # 261,730
    "lenet": NetConfig(net="lenet"),  # 83,126; for grey pictures of 28 × 28: 61,706
    "resnet20": cifar_resnet(20),  # 269,722
    "resnet32": cifar_resnet(32),  # 464,154
    "resnet44": cifar_resnet(44),  # 658,586
    "resnet56": cifar_resnet(56),  # 853,018
    "resnet110": cifar_resnet(110),  # 1,727,962
    "plain20": cifar_resnet(20, "none"),  # 269,722
    "plain56": cifar_resnet(56, "none"),  # 853,018
    "resnet18": resnet18("cifar"),  # 11,173,962
    "resnet18-imagenet": resnet18("imagenet"),  # 11,181,642
}


def conv3x3(c_in: int, c_out: int, stride: int = 1, layers=nn) -> nn.Module:
    """A 3 × 3 convolution that keeps the size (or halves it); its bias would be undone by BN."""
    return layers.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)


class LeNet(nn.Module):
    """LeNet-5 with today's ReLU and maximum instead of tanh and weighted averages.

    The padding makes grey pictures of 28 × 28 the 32 × 32 of the paper: 61,706 parameters.
    """

    def __init__(self, config: NetConfig, layers=nn):
        super().__init__()
        self.conv1 = layers.Conv2d(config.channels, 6, 5, padding=2)
        self.conv2 = layers.Conv2d(6, 16, 5)
        self.pool = layers.MaxPool2d(2)
        side = [(s // 2 - 4) // 2 for s in (config.image_height, config.image_width)]
        self.fc1 = layers.Linear(16 * side[0] * side[1], 120)
        self.fc2 = layers.Linear(120, 84)
        self.fc = layers.Linear(84, config.n_class)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))  # (N, 6, H/2, W/2)
        x = self.pool(F.relu(self.conv2(x)))  # (N, 16, H/4 − 2, W/4 − 2)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 120)
        return self.fc(F.relu(self.fc2(x)))  # (N, K)


class PaddedShortcut(nn.Module):
    """Option A of arXiv:1512.03385 §3.3: every other pixel, and channels of zeros; no parameters.

    The paper does not say where the zeros go; here half of them on each side, as in the weights of
    akamaster/pytorch_resnet_cifar10.
    """

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.zeros, self.stride = c_out - c_in, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.zeros // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.zeros - before))


def shortcut(kind: str, c_in: int, c_out: int, stride: int, layers=nn) -> nn.Module | None:
    """How the input of a block reaches its sum: A pads, B convolves, none does not."""
    if kind == "none":
        return None
    if stride == 1 and c_in == c_out:
        return layers.Identity()
    if kind == "A":
        return PaddedShortcut(c_in, c_out, stride)
    project = layers.Conv2d(c_in, c_out, 1, stride=stride, bias=False)
    return layers.Sequential(project, layers.BatchNorm2d(c_out))


class BasicBlock(nn.Module):
    """Two convolutions and a way around them (arXiv:1512.03385, Fig. 2 and Eq. 1).

    y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))
    """

    def __init__(self, c_in: int, c_out: int, stride: int, kind: str, layers=nn):
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, stride, layers)
        self.bn1 = layers.BatchNorm2d(c_out)
        self.conv2 = conv3x3(c_out, c_out, 1, layers)
        self.bn2 = layers.BatchNorm2d(c_out)
        self.downsample = shortcut(kind, c_in, c_out, stride, layers)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y if self.downsample is None else y + self.downsample(x))


class ResNet(nn.Module):
    """Stages of residual blocks; from one to the next half the size and twice the channels.

    The CIFAR stem (§4.2) is one 3 × 3 convolution; the ImageNet stem (Table 1) makes the picture
    four times smaller at once, which leaves little of 32 × 32.
    """

    def __init__(self, config: NetConfig, layers=nn):
        super().__init__()
        c = config.width
        large = config.stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = layers.Conv2d(
            config.channels, c, kernel, stride=stride, padding=kernel // 2, bias=False
        )
        self.bn1 = layers.BatchNorm2d(c)
        self.maxpool = layers.MaxPool2d(3, stride=2, padding=1) if large else layers.Identity()
        self.n_stage, c_in = config.n_stage, c
        for stage in range(config.n_stage):
            blocks, c_out = [], c * 2**stage
            for i in range(config.n_block):
                stride = 2 if stage and i == 0 else 1
                blocks.append(BasicBlock(c_in, c_out, stride, config.shortcut, layers))
                c_in = c_out
            self.add_module(f"layer{stage + 1}", layers.Sequential(*blocks))
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.fc = layers.Linear(c_in, config.n_class)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))  # (N, width, H, W)
        for stage in range(self.n_stage):
            x = self.get_submodule(f"layer{stage + 1}")(x)  # (N, width · 2^s, H / 2^s, W / 2^s)
        return self.fc(self.avgpool(x).flatten(1))  # (N, K)


class PooledConv(nn.Module):
    """Convolution, normalisation, the maximum of each 2 × 2 (half the size), ReLU.

    The maximum of ReLUs is the ReLU of the maximum, so the order of the last two is free. This way
    round the ReLU has a quarter of the numbers to look at, which saves a sixth of a training step.
    """

    def __init__(self, c_in: int, c_out: int, layers=nn):
        super().__init__()
        self.conv1 = conv3x3(c_in, c_out, 1, layers)
        self.bn1 = layers.BatchNorm2d(c_out)
        self.pool = layers.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pool(self.bn1(self.conv1(x))))


class FastNet(nn.Module):
    """Three pooled convolutions, a residual block after the second and the third."""

    def __init__(self, config: NetConfig, layers=nn):
        super().__init__()
        w = config.width
        self.stem = PooledConv(config.channels, w, layers)
        self.layer1 = PooledConv(w, 2 * w, layers)
        self.block1 = BasicBlock(2 * w, 2 * w, 1, "A", layers)
        self.layer2 = PooledConv(2 * w, 4 * w, layers)
        self.block2 = BasicBlock(4 * w, 4 * w, 1, "A", layers)
        self.avgpool = layers.AdaptiveAvgPool2d(1)
        self.fc = layers.Linear(4 * w, config.n_class)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)  # (N, w, H/2, W/2)
        x = self.block1(self.layer1(x))  # (N, 2w, H/4, W/4)
        x = self.block2(self.layer2(x))  # (N, 4w, H/8, W/8)
        return self.fc(self.avgpool(x).flatten(1))  # (N, K)


def build(config: NetConfig, layers=nn) -> nn.Module:
    """The network of `config`, initialised as `initialize` says."""
    model = {"fast": FastNet, "lenet": LeNet, "resnet": ResNet}[config.net](config, layers)
    initialize(model, config)
    return model


def initialize(model: nn.Module, config: NetConfig) -> None:
    """Filters as in He et al. 2015 (arXiv:1502.01852, Eq. 14): Var(w) = 2 / (k² · channels out).

    That keeps the size of the gradients from layer to layer ("fan-out"); Eq. 10 there has the
    channels in instead and keeps the size of the activations.

    zero_init: the last γ of each block begins at zero, which makes the block the identity (Goyal et
    al. 2017, arXiv:1706.02677, §5.1).
    zero_head: so does the last layer, and the first loss is exactly ln K. Else He's too (Eq. 10).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if config.zero_init and isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
    if config.zero_head:
        nn.init.zeros_(model.fc.weight)
    else:
        nn.init.kaiming_normal_(model.fc.weight, mode="fan_in", nonlinearity="relu")
    nn.init.zeros_(model.fc.bias)


def parameters_by_kind(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters as filters (of convolutions), matrices (of linear layers), and all others."""
    kinds: dict[str, list[nn.Parameter]] = {"filters": [], "matrices": [], "norms and biases": []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "norms and biases"
            if name == "weight" and isinstance(module, nn.Conv2d):
                kind = "filters"
            elif name == "weight" and isinstance(module, nn.Linear):
                kind = "matrices"
            kinds[kind].append(parameter)
    return kinds


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model in evaluation mode; afterwards each of its modules is in the mode it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def macs(model: nn.Module, config: NetConfig) -> int:
    """Multiply-adds of the convolutions and matrices for one picture, counted on its way."""
    total = 0

    def count(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal total
        n_use = output[0].numel() // output.shape[1]  # how often each weight is used
        total += module.weight.numel() * n_use

    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [module.register_forward_hook(count) for module in weighted]
    like = next(model.parameters())
    with torch.no_grad(), evaluating(model):
        model(like.new_zeros(1, config.channels, config.image_height, config.image_width))
    for hook in hooks:
        hook.remove()
    return total
