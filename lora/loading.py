"""A base model with adapters, from runs, from PEFT folders, or from what ships with this folder.

A run holds only what it learned, the adapter, and of its base the place and a fingerprint. So the
base is data of the run, like the text that it was trained on: it has to be there, and to be the
same, since a correction of other weights would be noise.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import lora
import nf4
import peft_folder
import several
from checkpoint import Loaded
from options import UserError, make_config, say
from run import is_run, read_json, refuse_endless
from variants import AdapterConfig
from weights import read_safetensors

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
SHIPPED = PRETRAINED / "adapter"
N_PRINTED = 4096  # numbers of a tensor that its fingerprint looks at


@dataclass
class Run:
    """What a run of this folder learned: an adapter, or with `full` all weights of its base.

    base: the folder of the base, "" is the one that ships. fingerprint: of that base, "" if the run
    was made before there were any.
    """

    folder: Path
    base: str
    fingerprint: str
    settings: AdapterConfig
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
    settings = make_config(AdapterConfig, saved.get("model"), f"{where}, model")
    training = saved["train"] if isinstance(saved.get("train"), dict) else {}
    base, full = training.get("weights", ""), training.get("full", False)
    known = saved.get("base", "")
    if not isinstance(base, str) or not isinstance(known, str) or type(full) is not bool:
        raise UserError(f"{where}: train or base says nothing sensible of the base")
    state = read_safetensors(folder / "model.safetensors")
    return Run(folder, base, known, settings, full, state)


def load_base(folder: str) -> Loaded:
    """A base model; "" is the one that ships with this folder. UserError for an adapter."""
    if folder and (Path(folder) / peft_folder.CONFIG).is_file():
        raise UserError(f"--weights {folder} is an adapter: give it by --adapter")
    return checkpoint.load(folder or PRETRAINED)


def base_of(run: Path, folder: str, known: str) -> Loaded:
    """The base that the run in `run` was trained on, from `folder`.

    known: its fingerprint; "" leaves that check out. UserError if it is gone or another one.
    """
    mend = f"say where it is now: --train --resume --out {run} --weights DIR"
    if folder and not Path(folder).is_dir():
        raise UserError(f"the base of the run {run} was in {folder} and is gone: {mend}")
    base = load_base(folder)
    if known and known != fingerprint(base.model):
        place = folder or PRETRAINED
        raise UserError(f"{place} is not the base that the run {run} was trained on: {mend}")
    return base


def fingerprint(model: nn.Module) -> str:
    """Sixteen letters that tell one base from another.

    They are made of the names and shapes of all tensors, and of at most N_PRINTED numbers of each,
    evenly spaced: any training changes these, and a large model is done in a moment.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // N_PRINTED)].cpu().float()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def attach(model: nn.Module, settings: AdapterConfig) -> list[str]:
    """Give a base its adapter, on matrices of 4 bits if asked. UserError if it cannot be."""
    try:
        if settings.quantize:
            nf4.quantize(model, lora.targets(model, settings))
        return lora.adapt(model, settings)
    except ValueError as error:
        raise UserError(str(error)) from None


def fill(model: nn.Module, run: Run, name: str = "default") -> None:
    """Put what a run learned into a model that is built as the run's was, as adapter `name`.

    UserError for what is missing, has no place, does not fit or is no finite number.
    """
    wanted = model.state_dict()
    if not run.full:
        wanted = {k: t for k, t in wanted.items() if f".adapters.{name}." in k}
    elif "head.weight" not in run.state:  # tied: it is the embedding
        wanted.pop("head.weight", None)
    state = {k.replace(".adapters.default.", f".adapters.{name}."): t for k, t in run.state.items()}
    if wanted.keys() != state.keys():
        odd = min(wanted.keys() ^ state.keys())
        raise UserError(f"{run.folder}: {odd} is missing, or has no place in the base")
    for key, tensor in state.items():
        fits = tensor.shape == wanted[key].shape and tensor.is_floating_point()
        if not fits or not tensor.isfinite().all():
            raise UserError(f"{run.folder}: {key} does not fit the base, or is not finite")
    model.load_state_dict(state, strict=False)


def load_run(folder: Path) -> Loaded:
    """The model of a run: its base with its adapter."""
    run = read_run(folder)
    loaded = base_of(folder, run.base, "" if run.full else run.fingerprint)
    if not run.full:
        attach(loaded.model, run.settings)
    fill(loaded.model, run)
    return Loaded(folder, loaded.model.eval(), loaded.tokenizer, loaded.stop_ids)


def load(folder: str | Path, adapters: list[tuple[str, float]] = ()) -> Loaded:
    """A run or a base, with these further adapters: (PEFT folder or run, share)."""
    folder = Path(folder)
    loaded = load_run(folder) if folder.is_dir() and is_ours(folder) else load_base(str(folder))
    if adapters and lora.layers(loaded.model):
        raise UserError(
            f"--weights {folder} is a run with an adapter: give the base, and --adapter"
        )
    shares, base = {}, fingerprint(loaded.model) if adapters else ""
    for number, (path, share) in enumerate(adapters):
        name = f"adapter{number}"
        put_on(loaded.model, Path(path), name, base)
        shares[name] = share
    if shares:
        several.activate(loaded.model, shares)
    return loaded


def put_on(model: nn.Module, path: Path, name: str, base: str) -> None:
    """Give `model` the adapter of a PEFT folder, or of a run, under a name.

    base: the fingerprint of the model without adapters. A run that was trained on another base of
    the same sizes is used, with a word of warning; PEFT's folders do not say on which they were.
    """
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
    if run.fingerprint not in ("", base):
        say(f"warning    {path} was trained on another base than this: expect nonsense")
    fill(model, run, name)


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
        path, share = word, "1"
    if not path.strip():
        raise UserError(f"--adapter {word!r} names no folder")
    try:
        value = float(share)
    except ValueError:
        raise UserError(f"--adapter {word}: {share!r} is no number") from None
    if not torch.tensor(value).isfinite():
        raise UserError(f"--adapter {word}: the share must be finite")
    return path, value
