"""Weights in and out: runs of our own, and the files of torchvision and akamaster, both ways.

    run directory   config.json, model.safetensors
    torchvision     a state dict: conv1, bn1, layer1.0.conv1 …, layer2.0.downsample.0, fc
    akamaster       pytorch_resnet_cifar10 (and kuangliu's pytorch-cifar): {"state_dict": …} of
                    module.conv1 …, module.layer2.0.shortcut.0, module.linear

Our names are torchvision's. A file says nothing about the network but the shapes of its weights:
`identify` reads it off them. Nor does it hold the constants that its pictures were normalised
with; both sources took ImageNet's, so those travel with the weights.
"""

import re
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import data
import quantize
from loop import refuse_flipped_bits, save_tensors
from model import NetConfig, build
from options import UserError, make_config
from run import (
    RunDirectory,
    place_to_export,
    read_json,
    refuse_endless,
    whole_file,
    write_json,
)

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
AKAMASTER = {"fc": "linear", "downsample": "shortcut"}  # our and torchvision's name: akamaster's
OURS = {theirs: mine for mine, theirs in AKAMASTER.items()}
VIEWS = ("flip", "shift")


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
    seed: int = 0  # of its validation part
    image_size: int = 0  # that the pictures were brought to, see data.py

    @property
    def facts(self) -> dict:
        """What config.json holds of it."""
        pictures = {"name": self.source, "classes": self.classes}
        pictures |= {"mean": self.mean, "std": self.std}
        return {"model": asdict(self.sizes), "data": pictures, "views": self.views}

    def dataset(self, source: str | None = None, image_size: int = 0) -> data.Dataset:
        """The data of `source`, else what it was trained on, decoded only if that is needed."""
        folder = self.path if self.path.is_dir() else self.path.parent
        size = image_size or self.image_size
        return data.load(source or self.source, self.seed, size, folder / "pictures.npz")

    def refuse_changes(self, asked: dict, preset: NetConfig | None) -> None:
        """UserError if the command line asks for another network than these weights are of."""
        parts = ("net", "width", "depth", "n_stage", "shortcut", "stem")
        if preset:
            asked = {name: getattr(preset, name) for name in parts} | asked
        for name, value in asked.items():
            mine = getattr(self.sizes, name)
            unused = self.sizes.net != "resnet" and name not in ("net", "width")
            if name in parts and value != mine and not unused:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value}: the network in --weights {self.path} has {mine}")

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


def load(path: str | Path) -> Loaded:
    """Read a run, an exported folder or a file, in float32. UserError says what is wrong."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"--weights {path}: there is no such file or folder")
    refuse_endless(path)
    folder = path if path.is_dir() else path.parent
    config = read_json(folder / "config.json", optional=True)
    if "model" not in config:
        if path.is_dir():
            raise UserError(f"{path} has no config.json of a run; name the file of the weights")
        return load_file(path)
    sizes = make_config(NetConfig, config["model"], f"{folder}/config.json, model")
    try:
        known = picture_facts(config, sizes)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{folder}/config.json: {what}") from None
    model = build(sizes)
    if config.get("int8"):
        model = quantize.skeleton(model)
    weights = RunDirectory(folder).weights
    file = path if path.is_file() else weights if weights.exists() else folder / "weights.pth"
    return Loaded(path, fill(model, to_our_names(read_tensors(file)), file), sizes, **known)


def picture_facts(config: dict, sizes: NetConfig) -> dict:
    """What config.json says of the pictures, as fields of Loaded. Raises for what is unfit."""
    pictures, trained = config["data"], config.get("train", {})
    mean, std = ([float(x) for x in numbers(pictures[name])] for name in ("mean", "std"))
    usable = all(0 <= x <= 1 for x in mean + std) and all(std)  # pixels are from 0 to 1
    if [len(mean), len(std)] != [sizes.channels] * 2 or not usable:
        raise ValueError(f"mean and std must be {sizes.channels} numbers of 0 … 1, std not 0")
    classes, views = pictures["classes"], config.get("views", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes must be a list of texts")
    if len(classes) != sizes.n_class:
        raise ValueError(f"{len(classes)} classes, the network has {sizes.n_class}")
    source, fits = pictures["name"], isinstance(views, list) and set(views) <= set(VIEWS)
    if not isinstance(source, str | None) or not fits:
        raise ValueError(f"name must be a text, views some of {', '.join(VIEWS)}")
    whole = {name: trained.get(name, 0) for name in ("seed", "image_size")}
    if any(type(value) is not int or value < 0 for value in whole.values()):
        raise ValueError("seed and image_size must be numbers of at least 0")
    known = {"classes": tuple(classes), "views": tuple(views), "source": source}
    return known | {"mean": mean, "std": std} | whole


def numbers(values) -> list:
    """A list of numbers from JSON as it is. TypeError for anything else, true and "1" too."""
    if not isinstance(values, list) or any(type(x) not in (int, float) for x in values):
        raise TypeError("mean and std must be lists of numbers")
    return values


def load_file(file: Path) -> Loaded:
    """A ResNet from a file of torchvision's or akamaster's."""
    state = to_our_names(read_tensors(file))
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
            refuse_flipped_bits(file)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # a damaged pickle makes torch raise all kinds, IndexError too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{file} is damaged or holds more than tensors: {reason}") from None
    for key in ("state_dict", "model"):  # training scripts put them beside other things
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(map(is_named, content.items())):
        raise UserError(f"{file} holds something else than named tensors")
    return dict(content)


def is_named(item: tuple) -> bool:
    """Is this a name and an ordinary tensor of numbers?"""
    name, tensor = item
    if not (isinstance(name, str) and torch.is_tensor(tensor)) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_complex() or tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def to_our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision or akamaster as ours."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.removeprefix("module.").split(".")
        renamed[".".join(OURS.get(part, part) for part in parts)] = tensor
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
    side = 224 if large else 32
    try:
        return NetConfig(
            net="resnet",
            width=first.shape[0],
            depth=2 * sum(stages.values()) + 2,
            n_stage=len(stages),
            shortcut="B" if any(".downsample." in name for name in state) else "A",
            stem="imagenet" if large else "cifar",
            channels=first.shape[1],
            image_height=side,
            image_width=side,
            n_class=len(head),
        )
    except ValueError as error:
        raise UserError(f"{file} is no ResNet that can be built: {error}") from None


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
        both_floats = state[name].is_floating_point() and tensor.is_floating_point()
        if not both_floats and state[name].dtype != tensor.dtype:
            there, needed = state[name].dtype, tensor.dtype
            raise UserError(f"{where}: {name} holds {there}, the network has {needed}")
        if not state[name].float().isfinite().all():
            raise UserError(f"{where}: {name} holds numbers that are not finite")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {where} have {extra[0]}, which the network does not")
    model.load_state_dict({name: state[name].to(t.dtype) for name, t in wanted.items()})
    return model


def to_foreign_names(model: nn.Module, sizes: NetConfig) -> dict[str, Tensor]:
    """The weights under the names of akamaster (CIFAR ResNets), else of torchvision."""
    names = AKAMASTER if sizes.net == "resnet" and sizes.stem == "cifar" else {}
    return {
        ".".join(names.get(part, part) for part in name.split(".")): tensor.contiguous().clone()
        for name, tensor in model.state_dict().items()
    }


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write weights.pth, a state dict as torch users expect it, and what to know beside it."""
    folder = place_to_export(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "weights.pth") as part:
        try:
            torch.save(to_foreign_names(loaded.model, loaded.sizes), part)
        except RuntimeError as error:  # its word for a full disk
            raise UserError(f"cannot write {folder}/weights.pth: {error}") from None
    write_json(folder / "config.json", loaded.facts)


def export_int8(loaded: Loaded, pictures: Tensor, folder: str | Path) -> Loaded:
    """Write the network in eight bits, its ranges measured on `pictures`. Returns that network."""
    folder = place_to_export(folder)
    small = replace(loaded, model=quantize.quantize(loaded.model, pictures))
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(RunDirectory(folder).weights, small.model.state_dict())
    write_json(folder / "config.json", small.facts | {"int8": True})
    return small
