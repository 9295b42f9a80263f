"""Weights in and out: runs of our own, and files of pytorch/examples' VAE, both ways.

    run directory   config.json, model.safetensors
    the example     a state dict: fc1 (hidden layer), fc21 (mu), fc22 (logvar), fc3 (hidden layer),
                    fc4 (pixels); relu between, sigmoid at the end; any widths

A file of the example says nothing but the shapes of its weights: `identify` reads the network off
them. Pictures are taken to be square and grey where the number of pixels allows it.
"""

import math
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import data
from model import VaeConfig, build
from options import UserError, make_config
from run import (
    RunDirectory,
    place_to_export,
    read_json,
    refuse_endless,
    whole_file,
    write_json,
)

EXAMPLE = {"fc1": "encoder.hidden.0", "fc3": "decoder.hidden.0", "fc4": "decoder.out"}
HEADS = ("fc21", "fc22")  # mu and logvar, which are one layer here: encoder.head


@dataclass
class Loaded:
    """A network ready to use, and which pictures it was trained on."""

    path: Path
    model: nn.Module
    sizes: VaeConfig
    source: str | None = None  # of the training data
    seed: int = 0  # of its validation part
    image_size: int = 0  # that the pictures were brought to, see data.py

    def dataset(self, source: str | None = None, image_size: int = 0) -> data.Dataset:
        """The data of `source`, else what it was trained on, decoded only if that is needed."""
        folder = self.path if self.path.is_dir() else self.path.parent
        size = image_size or self.image_size
        return data.load(source or self.source, self.seed, size, folder / "pictures.npz")

    def refuse_changes(self, asked: dict, preset: VaeConfig | None) -> None:
        """UserError if the command line asks for another network than these weights are of."""
        parts = ("latent", "net", "width", "depth", "activation", "likelihood", "n_code", "patch")
        if preset:
            asked = {name: getattr(preset, name) for name in parts} | asked
        for name, value in asked.items():
            mine = getattr(self.sizes, name)
            unused = name == "patch" and self.sizes.net == "mlp"
            if value != mine and not unused:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} {value}: the network in --weights {self.path} has {mine}")

    def refuse_misfits(self, name: str, images: Tensor) -> None:
        """UserError where the network cannot be tried on these images (N, C, H, W)."""
        there = tuple(images.shape[1:])
        if there != self.sizes.shape:
            raise UserError(f"--data {name}: pictures of {there} (channels, height, width), "
                            f"the network wants {self.sizes.shape}")  # fmt: skip


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
        return load_example(path)
    sizes = make_config(VaeConfig, config["model"], f"{folder}/config.json, model")
    known = picture_facts(config, f"{folder}/config.json")
    weights = RunDirectory(folder).weights
    file = path if path.is_file() else weights if weights.exists() else folder / "weights.pth"
    state = to_our_names(read_tensors(file), file)
    return Loaded(path, fill(build(sizes), state, file), sizes, **known)


def picture_facts(config: dict, where: str) -> dict:
    """What config.json says of the pictures, as fields of Loaded. UserError for what is unfit."""
    trained = config.get("train", {})
    source = trained.get("data") if isinstance(trained, dict) else 0
    if not isinstance(source, str | None):
        raise UserError(f"{where}: train must hold options, data a text")
    numbers = {name: trained.get(name, 0) for name in ("seed", "image_size")}
    if any(type(value) is not int or value < 0 for value in numbers.values()):
        raise UserError(f"{where}: seed and image_size must be numbers of at least 0")
    return {"source": source} | numbers


def load_example(file: Path) -> Loaded:
    """The network in a file of pytorch/examples' VAE."""
    state = read_tensors(file)
    sizes = identify(state, file)
    return Loaded(file, fill(build(sizes), to_our_names(state, file), file), sizes)


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
    if not isinstance(content, dict) or not content or not all(map(is_named, content.items())):
        raise UserError(f"{file} holds something else than named tensors")
    return dict(content)


def is_named(item: tuple) -> bool:
    """Is this a name and an ordinary tensor of numbers?"""
    name, tensor = item
    if not (isinstance(name, str) and torch.is_tensor(tensor)) or tensor.layout != torch.strided:
        return False
    return not (tensor.is_complex() or tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def to_our_names(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Weights of the example under our names, its two heads as one; ours as they are."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if "fc1.weight" not in state:
        return state
    ours = {}
    for kind in ("weight", "bias"):
        parts = [f"{name}.{kind}" for name in (*EXAMPLE, *HEADS)]
        if missing := [name for name in parts if name not in state]:
            raise UserError(f"the weights in {where} lack {missing[0]}")
        ours |= {f"{mine}.{kind}": state.pop(f"{name}.{kind}") for name, mine in EXAMPLE.items()}
        mu, logvar = (state.pop(f"{name}.{kind}") for name in HEADS)
        if mu.dim() != (2 if kind == "weight" else 1) or mu.shape != logvar.shape:
            raise UserError(f"{where}: fc21.{kind} and fc22.{kind} do not fit together")
        ours[f"encoder.head.{kind}"] = torch.cat([mu, logvar])
    return ours | state


def to_example_names(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the example."""
    state, theirs = model.state_dict(), {}
    for kind in ("weight", "bias"):
        theirs |= {f"{name}.{kind}": state[f"{mine}.{kind}"] for name, mine in EXAMPLE.items()}
        heads = state[f"encoder.head.{kind}"].chunk(2)
        theirs |= {f"{name}.{kind}": head for name, head in zip(HEADS, heads, strict=True)}
    return {name: tensor.contiguous().clone() for name, tensor in theirs.items()}


def identify(state: dict[str, Tensor], file: Path) -> VaeConfig:
    """The network that these weights of the example are of. UserError if there is none."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    first, mu = state.get("fc1.weight"), state.get("fc21.weight")
    if first is None or mu is None or first.dim() != 2 or mu.dim() != 2:
        raise UserError(f"{file} is no VAE of pytorch/examples: it lacks fc1 or fc21")
    n_pixel, side = first.shape[1], math.isqrt(first.shape[1])
    height, width = (side, side) if side * side == n_pixel else (1, n_pixel)
    try:
        return VaeConfig(
            latent=len(mu),
            net="mlp",
            width=len(first),
            depth=1,
            activation="relu",
            image_height=height,
            image_width=width,
        )
    except ValueError as error:
        raise UserError(f"{file} is no VAE that can be built: {error}") from None


def is_example(sizes: VaeConfig) -> bool:
    """Is this a network that pytorch/examples' VAE has layers for?"""
    found = (sizes.net, sizes.depth, sizes.activation, sizes.likelihood, sizes.channels)
    return found == ("mlp", 1, "relu", "bernoulli", 1)


def fill(model: nn.Module, state: dict[str, Tensor], where: str | Path) -> nn.Module:
    """The model with these weights. UserError names the first missing, extra or misshapen one."""
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"the weights in {where} lack {name}")
        if state[name].shape != tensor.shape:
            there, needed = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} is {there}, the configuration needs {needed}")
        if not state[name].float().isfinite().all():
            raise UserError(f"{where}: {name} holds numbers that are not finite")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {where} have {extra[0]}, which the network does not")
    model.load_state_dict({name: state[name].to(t.dtype) for name, t in wanted.items()})
    return model


def export(loaded: Loaded, folder: str | Path) -> str:
    """Write weights.pth, a state dict, and config.json beside it. Returns whose names it has."""
    folder = place_to_export(folder)
    folder.mkdir(parents=True, exist_ok=True)
    theirs = is_example(loaded.sizes)
    state = to_example_names(loaded.model) if theirs else dict(loaded.model.state_dict())
    with whole_file(folder / "weights.pth") as part:
        try:
            torch.save(state, part)
        except RuntimeError as error:  # its word for a full disk
            raise UserError(f"cannot write {folder}/weights.pth: {error}") from None
    write_json(folder / "config.json", {"model": asdict(loaded.sizes)})
    return "pytorch/examples' VAE" if theirs else "this folder (--size example has those of theirs)"
