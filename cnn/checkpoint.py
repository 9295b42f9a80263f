"""Weights in and out: runs of our own, and the files of torchvision and akamaster, both ways.

    run directory   config.json, model.safetensors
    torchvision     a state dict: conv1, bn1, layer1.0.conv1 …, layer2.0.downsample.0, fc
    akamaster       pytorch_resnet_cifar10 (and kuangliu's pytorch-cifar): {"state_dict": …} of
                    module.conv1 …, module.layer2.0.shortcut.0, module.linear

Our names are torchvision's. A file says nothing about the network but the shapes of its weights:
`identify` reads it off them. Nor does it hold the constants that its pictures were normalised
with; both sources took ImageNet's, so those travel with the weights.
"""

import json
import re
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import quantize
from model import NetConfig, build
from run import RunDirectory, UserError, whole_file

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
AKAMASTER = {"fc": "linear", "downsample": "shortcut"}  # ours and torchvision's: theirs


@dataclass
class Loaded:
    """A network ready to use, and what it must know about its pictures."""

    path: Path
    model: nn.Module
    sizes: NetConfig
    classes: tuple[str, ...]
    mean: list[float]
    std: list[float]
    views: tuple[str, ...] = ()
    source: str | None = None  # of the training data

    @property
    def facts(self) -> dict:
        """What config.json holds of it."""
        pictures = {"name": self.source, "classes": self.classes}
        pictures |= {"mean": self.mean, "std": self.std}
        return {"model": asdict(self.sizes), "data": pictures, "views": self.views}

    def refuse_misfits(self, name: str | None, classes: tuple, images: Tensor) -> None:
        """UserError where the network cannot be tried on these images (N, C, H, W)."""
        sizes, there = self.sizes, tuple(images.shape[1:])
        wanted = (sizes.channels, sizes.image_height, sizes.image_width)
        if there != wanted:
            raise UserError(f"--data {name}: pictures of {there} (channels, height, width), "
                            f"the network wants {wanted}")  # fmt: skip
        if len(classes) != sizes.n_class:
            raise UserError(
                f"--data {name}: {len(classes)} classes, the network has {sizes.n_class}"
            )


def read_config(folder: Path) -> dict:
    """The config.json of a folder; {} if there is none. UserError if it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    return content if isinstance(content, dict) else {}


def load(path: str | Path) -> Loaded:
    """Read a run, an exported folder or a file, in float32. UserError says what is wrong."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--weights {path}: there is no such file or folder")
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    if "model" not in config:
        if path.is_dir():
            raise UserError(f"{path} has no config.json of a run; name the file of the weights")
        return load_file(path)
    try:
        sizes, pictures = NetConfig(**config["model"]), config["data"]
        constants = [[float(x) for x in pictures[name]] for name in ("mean", "std")]
        if [len(x) for x in constants] != [sizes.channels] * 2 or not all(constants[1]):
            raise ValueError(f"mean and std must be {sizes.channels} numbers, std not 0")
        classes = tuple(map(str, pictures["classes"]))
        if len(classes) != sizes.n_class:
            raise ValueError(f"{len(classes)} classes, the network has {sizes.n_class}")
        loaded = Loaded(path, build(sizes), sizes, classes, *constants,
                        tuple(config.get("views", ())), pictures["name"])  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: {error}") from None
    if config.get("int8"):
        loaded.model = quantize.skeleton(loaded.model)
    run = RunDirectory(folder)
    file = path if path.is_file() else run.weights
    state = read_tensors(file if file.exists() else folder / "weights.pth")
    loaded.model = fill(loaded.model, ours(state), file)
    return loaded


def load_file(file: Path) -> Loaded:
    """A ResNet from a file of torchvision's or akamaster's."""
    state = ours(read_tensors(file))
    sizes = identify(state, file)
    classes = tuple(str(i) for i in range(sizes.n_class))
    if sizes.channels != 3:
        raise UserError(f"{file} is for {sizes.channels} channels: their constants are unknown")
    return Loaded(file, fill(build(sizes), state, file), sizes, classes, **IMAGENET)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The named tensors of a .safetensors file or of a pickle without code in it."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with warnings.catch_warnings():  # of other pickles, which are refused below
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # a damaged pickle makes torch raise all kinds, IndexError too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged or holds more than tensors: {reason}") from None
    for key in ("state_dict", "model"):  # training scripts put them beside other things
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (isinstance(content, dict) and content and all(map(torch.is_tensor, content.values()))):
        raise UserError(f"{file} holds something else than named tensors")
    return dict(content)


def ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision or akamaster as ours."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.removeprefix("module.").split(".")
        back = {theirs: mine for mine, theirs in AKAMASTER.items()}
        renamed[".".join(back.get(part, part) for part in parts)] = tensor
    return renamed


def identify(state: dict[str, Tensor], file: Path) -> NetConfig:
    """The network that these weights are of, from names and shapes. UserError if there is none."""
    places = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name) for name in state]
    stages: dict[int, int] = {}
    for place in filter(None, places):
        stages[int(place[1])] = stages.get(int(place[1]), 0) + 1
    first, head = state.get("conv1.weight"), state.get("fc.weight")
    if not stages or first is None or head is None or first.dim() != 4 or head.dim() != 2:
        raise UserError(f"{file} is no ResNet: it lacks conv1, layer1 or fc")
    if any(name.endswith("conv3.weight") for name in state):
        raise UserError(f"{file} has bottleneck blocks (ResNet-50 and deeper), not supported here")
    if len(set(stages.values())) > 1:
        counts = ", ".join(str(n) for _, n in sorted(stages.items()))
        raise UserError(f"{file} has stages of {counts} blocks; supported are equal ones")
    large = first.shape[2] == 7
    return NetConfig(
        "resnet", first.shape[0], 2 * sum(stages.values()) + 2, len(stages),
        "B" if any(".downsample." in name for name in state) else "A",
        "imagenet" if large else "cifar", channels=first.shape[1], n_class=len(head),
        **dict.fromkeys(("image_height", "image_width"), 224 if large else 32),
    )  # fmt: skip


def fill(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> nn.Module:
    """The model with these weights. UserError names the first missing, extra or misshapen one."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name.endswith("num_batches_tracked"):  # older files have none
            state = {name: tensor} | state
        if name not in state:
            raise UserError(f"the weights in {where} lack {name}")
        if state[name].shape != tensor.shape:
            there, needed = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} is {there}, the configuration needs {needed}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {where} have {extra[0]}, which the network does not")
    model.load_state_dict({name: state[name].to(t.dtype) for name, t in wanted.items()})
    return model


def theirs(model: nn.Module, sizes: NetConfig) -> dict[str, Tensor]:
    """The weights under the names of akamaster (CIFAR ResNets), else of torchvision."""
    names = AKAMASTER if sizes.net == "resnet" and sizes.stem == "cifar" else {}
    return {
        ".".join(names.get(part, part) for part in name.split(".")): tensor.contiguous().clone()
        for name, tensor in model.state_dict().items()
    }


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write weights.pth, a state dict as torch users expect it, and what to know beside it."""
    run = RunDirectory(folder)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with whole_file(run.path / "weights.pth") as part:
            torch.save(theirs(loaded.model, loaded.sizes), part)
        run.save_config(loaded.facts)
    except OSError as error:
        raise UserError(f"cannot write to --export {folder}: {error.strerror}") from None


def export_int8(loaded: Loaded, pictures: Tensor, folder: str | Path) -> Loaded:
    """Write the network in eight bits, its ranges measured on `pictures`. Returns that network."""
    small = replace(loaded, model=quantize.quantize(loaded.model, pictures))
    run = RunDirectory(folder)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.save_weights(small.model.state_dict())
        run.save_config(small.facts | {"int8": True})
    except OSError as error:
        raise UserError(f"cannot write to --export {folder}: {error.strerror}") from None
    return small
