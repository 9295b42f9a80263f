"""A base model with adapters, from runs, from PEFT folders, or from what ships with this folder.

A run holds only what it learned, the adapter, and the name of its base. So the base has to be where
it was: it is data of the run, like the text that it was trained on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import lora
import nf4
import peft_folder
from checkpoint import Loaded
from lora import LoraConfig
from options import UserError, make_config
from run import is_run, read_json, refuse_endless
from weights import read_safetensors

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
SHIPPED = PRETRAINED / "adapter"


@dataclass
class Run:
    """What a run of this folder learned: an adapter, or with `full` all weights of its base."""

    folder: Path
    base: str
    settings: LoraConfig
    full: bool
    state: dict[str, Tensor]


def is_ours(folder: Path) -> bool:
    """Is this a run of this folder, and not a base?"""
    if not is_run(folder):
        return False
    model = read_json(folder / "config.json").get("model")
    return not isinstance(model, dict) or "n_layer" not in model


def read_run(folder: Path) -> Run:
    """Read a run. UserError for one that is damaged."""
    refuse_endless(folder)
    saved, where = read_json(folder / "config.json"), f"{folder}/config.json"
    settings = make_config(LoraConfig, saved.get("model"), f"{where}, model")
    training = saved["train"] if isinstance(saved.get("train"), dict) else {}
    base, full = training.get("weights", ""), training.get("full", False)
    if not isinstance(base, str) or type(full) is not bool:
        raise UserError(f"{where}: train says nothing sensible of the base")
    return Run(folder, base, settings, full, read_safetensors(folder / "model.safetensors"))


def load_base(folder: str) -> Loaded:
    """A base model; "" is the one that ships with this folder."""
    return checkpoint.load(folder or PRETRAINED)


def attach(model: nn.Module, settings: LoraConfig) -> list[str]:
    """Give a base its adapter, on matrices of 4 bits if asked. UserError if it cannot be."""
    try:
        if settings.quantize:
            nf4.quantize(model, lora.targets(model, settings))
        return lora.adapt(model, settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def fill(model: nn.Module, run: Run) -> None:
    """Put what a run learned into a model that is built as the run's was."""
    wanted = model.state_dict() if run.full else lora.adapter_state(model)
    if "head.weight" not in run.state:  # tied: it is the embedding
        wanted.pop("head.weight", None)
    if wanted.keys() != run.state.keys():
        odd = min(wanted.keys() ^ run.state.keys())
        raise UserError(f"{run.folder}: {odd} is missing, or has no place in the base")
    for name, tensor in run.state.items():
        if tensor.shape != wanted[name].shape or not tensor.isfinite().all():
            raise UserError(f"{run.folder}: {name} does not fit the base, or is not finite")
    model.load_state_dict(run.state, strict=False)


def load_run(folder: Path) -> Loaded:
    """The model of a run: its base with its adapter."""
    run = read_run(folder)
    loaded = load_base(run.base)
    if not run.full:
        attach(loaded.model, run.settings)
    fill(loaded.model, run)
    return Loaded(folder, loaded.model.eval(), loaded.tokenizer, loaded.stop_ids)


def load(folder: str | Path, adapters: list[tuple[str, float]] = ()) -> Loaded:
    """A run or a base, with these further adapters: (PEFT folder or run, share)."""
    folder = Path(folder)
    loaded = load_run(folder) if folder.is_dir() and is_ours(folder) else checkpoint.load(folder)
    if adapters and lora.layers(loaded.model):
        raise UserError(
            f"--weights {folder} is a run with an adapter: give the base, and --adapter"
        )
    shares = {}
    for number, (path, share) in enumerate(adapters):
        name = f"adapter{number}"
        put_on(loaded.model, Path(path), name)
        shares[name] = share
    if shares:
        lora.activate(loaded.model, shares)
    return loaded


def put_on(model: nn.Module, path: Path, name: str) -> None:
    """Give `model` the adapter of a PEFT folder, or of a run, under a name."""
    if not path.is_dir():
        raise UserError(f"--adapter {path}: there is no such folder")
    refuse_endless(path)
    if not is_ours(path):
        peft_folder.put_on(model, peft_folder.read(path), name)
        return
    run = read_run(path)
    if run.full:
        raise UserError(f"--adapter {path} trained all weights: it is a base, give it by --weights")
    try:
        lora.adapt(model, run.settings, name)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    run.state = {k.replace(".adapters.default.", f".adapters.{name}."): t
                 for k, t in run.state.items()}  # fmt: skip
    state = {k: t for k, t in lora.adapter_state(model).items() if f".adapters.{name}." in k}
    if state.keys() != run.state.keys() or any(
        state[k].shape != t.shape for k, t in run.state.items()
    ):
        raise UserError(f"{path} does not fit this base")
    model.load_state_dict(run.state, strict=False)


def merged(loaded: Loaded) -> Loaded:
    """The same model without adapters: their corrections are in its weights."""
    if not lora.layers(loaded.model):
        raise UserError("--merge: there is no adapter to merge")
    try:
        lora.merge(loaded.model)
    except ValueError as error:
        raise UserError(f"--merge: {error}") from None
    lora.strip(loaded.model)
    return loaded


def parse_adapter(word: str) -> tuple[str, float]:
    """DIR or DIR=SHARE. UserError for a share that is no number."""
    path, equals, share = word.rpartition("=")
    if not equals or Path(word).is_dir():
        return word, 1.0
    try:
        value = float(share)
    except ValueError:
        raise UserError(f"--adapter {word}: {share!r} is no number") from None
    if not torch.tensor(value).isfinite():
        raise UserError(f"--adapter {word}: the share must be finite")
    return path, value
