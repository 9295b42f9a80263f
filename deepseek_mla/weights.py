"""Named tensors in and out of folders, whatever the file format, and into a model.

    model.safetensors                              one file
    model.safetensors.index.json                   several, named by an index
    pytorch_model.bin, pytorch_model.bin.index.json   PyTorch's pickles; only tensors are unpickled

A pickle can run any code when it is read. torch.load(weights_only=True) builds tensors and plain
containers and refuses everything else. This file is the same in every folder that reads the
weights of language models, and nothing in it knows one.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from loop import refuse_flipped_bits
from options import UserError, shorten
from run import read_json


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder laid out as on the Hugging Face Hub. UserError if there are none."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        if (folder / name).exists():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            tensors: dict[str, Tensor] = {}
            for shard in shards(index):
                tensors |= read(folder / shard)
            return tensors
    raise UserError(f"{folder} has neither model.safetensors nor pytorch_model.bin: no weights")


def shards(index: Path) -> list[str]:
    """The files that an index names, each beside it."""
    names = read_json(index).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    plain = all(isinstance(name, str) and Path(name).name == name for name in names)
    if not names or not plain:
        raise UserError(f"{index} is damaged: its weight_map names no files of this folder")
    return sorted(set(names))


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file. UserError if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # SafetensorError, OSError, KeyError for a number format of its own
        raise UserError(f"{file} is damaged or no safetensors file: {error}") from None


def read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a file that torch.save wrote; one with anything else in it is refused."""
    try:
        refuse_flipped_bits(file)
        with warnings.catch_warnings():  # of quantized tensors, which are refused below
            warnings.simplefilter("ignore")
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped(file))
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except Exception as error:  # a damaged pickle makes torch raise all kinds, IndexError too
        reason = shorten(error, 200)
        raise UserError(f"{file} is damaged or holds more than tensors: {reason}") from None
    if not (isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)):
        raise UserError(f"{file} holds something else than named tensors")
    if other := [name for name, value in tensors.items() if not torch.is_tensor(value)]:
        raise UserError(f"{file}: {shorten(other[0], 60)} is no tensor")
    for name, value in tensors.items():
        if value.layout != torch.strided or value.is_nested or value.is_meta:
            raise UserError(f"{file}: {shorten(name, 60)} is sparse, nested or has no values")
    return dict(tensors)


def zipped(file: Path) -> bool:
    """Is it torch's format since 1.6, which can be mapped into memory?"""
    with open(file, "rb") as stream:
        return stream.read(2) == b"PK"


def renamed(
    tensors: dict[str, Tensor], top: dict[str, str], block: dict[str, str], before: tuple[str, str]
) -> dict[str, Tensor]:
    """The same tensors under other names; a name that is not known stays, for `fill` to report.

    top, block: new names by old ones, without the `.weight` at the end, of tensors outside the
    blocks and in a block. before: what stands before the number of a block, in old and new names.
    """
    names = {}
    for name in tensors:
        found = re.fullmatch(re.escape(before[0]) + r"\.([0-9]+)\.(.+)\.weight", name)
        if found and found[2] in block:
            names[name] = f"{before[1]}.{found[1]}.{block[found[2]]}.weight"
        elif name.removesuffix(".weight") in top:
            names[name] = top[name.removesuffix(".weight")] + ".weight"
    return {names.get(name, name): tensor for name, tensor in tensors.items()}


def fill(build: Callable[[], nn.Module], state: dict[str, Tensor], where: Path | str) -> nn.Module:
    """The model that `build` makes, with the weights `state` in float32.

    UserError names the first weight that is missing, left over, misshapen or no plain number.
    """
    with torch.device("meta"):  # no memory, no random numbers
        model = build()
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise UserError(f"the weights in {where} lack {name}")
        found = state[name]
        if found.shape != tensor.shape:
            there, needed = tuple(found.shape), tuple(tensor.shape)
            raise UserError(f"{where}: {name} is {there}, the configuration needs {needed}")
        if not found.is_floating_point() or found.itemsize == 1:  # eight bits need scales beside
            raise UserError(f"{where}: {name} holds {found.dtype}: quantized weights are not read")
        if not torch.isfinite(found).all():
            raise UserError(f"{where}: {name} holds numbers that are not finite")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {where} have {shorten(extra[0], 80)}, the model does not")
    model.load_state_dict({name: state[name].float() for name in wanted}, assign=True)
    return model.requires_grad_(True)
