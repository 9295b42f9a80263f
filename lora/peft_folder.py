"""Adapter folders of Hugging Face's PEFT, both ways, for our Llama and for any module tree.

    adapter_config.json          rank, alpha, which layers, which variant
    adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, I), lora_B.weight (O, r)

A layer is found by its name and checked by its shape. Our Llama has shorter names than the one in
transformers, so its names are translated: a folder that is written here fits the base that
`--export` writes, and one that PEFT trained on such a base fits here.

What a folder asks for that lora.py does not have (trained biases, whole layers, a variant without a
name here) is refused by name, never ignored.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from fused import FusedAdapter
from huggingface import BLOCK, TOP
from loop import save_tensors
from model import Llama
from options import UserError, shorten
from other_layers import LoraEmbedding, TransposedLayer
from run import place_to_export, read_json, write_json
from variants import AdapterConfig, DoraAdapter, PissaAdapter
from weights import read_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BEFORE = "base_model.model."
TENSORS = {  # names at the end of a tensor's name: theirs, and ours
    "lora_A.weight": "lora_a",
    "lora_B.weight": "lora_b",
    "lora_embedding_A": "lora_a",
    "lora_embedding_B": "lora_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
UNKNOWN = {  # fields that change what an adapter computes, and the values that change nothing
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "target_parameters": (None, []),
    "velora_config": (None,),
    "arrow_config": (None,),
    # other starts change the base too: PiSSA's is found again, those of OLoRA, CorDA, LoftQ are not
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "pissa"),
    "use_rslora": (False, True, None),
    "use_dora": (False, True, None),
}


@dataclass
class Folder:
    """An adapter as read: tensors[layer][lora_a, lora_b or magnitude], with their layers' names."""

    path: Path
    config: dict
    tensors: dict[str, dict[str, Tensor]]


def our_name(theirs: str) -> str:
    """The name in our Llama of a layer of transformers' Llama; other names stay."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", theirs)
    names = {v: k for k, v in BLOCK.items()}
    if found and found[2] in names:
        return f"blocks.{found[1]}.{names[found[2]]}"
    return {v: k for k, v in TOP.items()}.get(theirs, theirs)


def their_name(ours: str) -> str:
    """The reverse of `our_name`."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", ours)
    if found and found[2] in BLOCK:
        return f"model.layers.{found[1]}.{BLOCK[found[2]]}"
    return TOP.get(ours, ours)


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read(path: str | Path) -> Folder:
    """Read a folder. UserError for what is missing, damaged, or asks for what lora.py lacks."""
    path = Path(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} has no {CONFIG}: it is no adapter")
    config = read_json(path / CONFIG)
    refuse_what_we_lack(config, path / CONFIG)
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read_safetensors(path / WEIGHTS).items():
        layer, kind = split_name(name, path)
        tensors.setdefault(layer, {})[kind] = tensor
    for layer, found in tensors.items():
        if not {"lora_a", "lora_b"} <= found.keys():
            raise UserError(f"{path / WEIGHTS}: {layer} has only one of A and B")
        if min(found["lora_a"].dim(), found["lora_b"].dim()) < 2:
            raise UserError(f"{path / WEIGHTS}: {layer} has an A or B that is no matrix")
        if not all(x.is_floating_point() and x.isfinite().all() for x in found.values()):
            raise UserError(f"{path / WEIGHTS}: {layer} holds what is no finite number")
    if not tensors:
        raise UserError(f"{path / WEIGHTS} is empty: it is no adapter")
    return Folder(path, config, tensors)


def refuse_what_we_lack(config: dict, where: Path) -> None:
    """UserError for the first thing in an adapter_config.json that lora.py does not have."""
    if config.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type {shorten(config.get('peft_type'), 40)} is not LORA")
    for name, harmless in UNKNOWN.items():
        value = config.get(name, harmless[0])
        if value not in harmless:
            raise UserError(f"{where}: {name} {shorten(value, 40)} is not supported here")
    sizes = [(name, config.get(name)) for name in ("r", "lora_alpha")]
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise UserError(f"{where}: {name} is no object")
        refuse_odd_patterns(patterns, f"{where}: {name}")
        sizes += [(f"{name} {shorten(key, 40)}", value) for key, value in patterns.items()]
    for name, value in sizes:
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise UserError(f"{where}: {name} is {shorten(value, 40)}, a size was expected")


def refuse_odd_patterns(patterns: dict, where: str) -> None:
    """UserError for a key that is no regular expression."""
    for key in patterns:
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"{where}: {shorten(key, 40)} is no pattern: {error}") from None


def split_name(name: str, path: Path) -> tuple[str, str]:
    """(name of the layer, lora_a, lora_b or magnitude) of a tensor."""
    for end, kind in TENSORS.items():
        if name.endswith("." + end):
            layer = name.removeprefix(BEFORE).removesuffix("." + end)
            return layer, kind
    raise UserError(f"{path / WEIGHTS} has {shorten(name, 80)}, which is no part of a LoRA adapter")


def pattern_value(patterns: dict | None, layer: str, default: float) -> float:
    """What rank_pattern or alpha_pattern say of a layer: keys are ends of names, or expressions."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return default


def put_on(model: nn.Module, folder: Folder, name: str) -> list[str]:
    """Give `model` the adapter of a folder, under a name of its own.

    Returns the names of its layers. UserError for a layer that the model does not have, or that has
    another shape.
    """
    ours = {our_name(t) if isinstance(model, Llama) else t: t for t in folder.tensors}
    modules = {path.replace(".base", "") for path, _ in model.named_modules()}
    for path, theirs in ours.items():
        if path not in modules:
            raise UserError(f"{folder.path}: the model has no layer {theirs}")
    try:
        settings = {path: settings_of(folder, path, theirs) for path, theirs in ours.items()}
        for path, theirs in ours.items():
            lora.adapt(model, settings[path], name)
            fill(model.get_submodule(path).adapters[name], folder.tensors[theirs], theirs)
    except ValueError as error:
        raise UserError(f"{folder.path}: {error}") from None
    for layer in lora.layers(model):
        layer.active = {name: 1.0} if name in layer.adapters else {}
    return list(ours)


@dataclass(frozen=True)
class FolderConfig(AdapterConfig):
    """The settings of a folder. A rank beyond the matrix's own is of no use, but it is theirs."""

    def refuse_rank(self, layer: lora.LoraLayer) -> None:
        pass


def fill(adapter: lora.Adapter, found: dict[str, Tensor], theirs: str) -> None:
    """Put the tensors of the layer `theirs` into its adapter. ValueError if they do not fit."""
    for kind, tensor in found.items():
        mine = getattr(adapter, kind)
        if mine.shape != tensor.shape:
            there, here = tuple(tensor.shape), tuple(mine.shape)
            raise ValueError(f"{kind} of {theirs} is {there}, the model needs {here}")
        with torch.no_grad():
            mine.copy_(tensor)


def settings_of(folder: Folder, path: str, theirs: str) -> FolderConfig:
    """What a folder says of the layer `theirs`, which is `path` here.

    ValueError where its tensors say something else than its config.
    """
    config, found = folder.config, folder.tensors[theirs]
    rank, said = (
        len(found["lora_a"]),
        pattern_value(config.get("rank_pattern"), theirs, config["r"]),
    )
    if rank != said:
        raise ValueError(f"{theirs} has rank {rank}, {CONFIG} says {said}")
    if bool(config.get("use_dora")) != ("magnitude" in found):
        raise ValueError(f"{theirs}: use_dora is {config.get('use_dora')}, the tensors differ")
    return FolderConfig(
        rank=rank,
        alpha=pattern_value(config.get("alpha_pattern"), theirs, config["lora_alpha"]),
        targets=f"^{re.escape(path)}$",
        dora="magnitude" in found,
        rslora=bool(config.get("use_rslora")),
        pissa=config.get("init_lora_weights") == "pissa",
    )


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def write(model: nn.Module, name: str, folder: str | Path, base: str = "") -> None:
    """Write adapter `name` of `model` as a folder that PEFT loads. `folder` must be new or empty.

    base: what to call the base model. A PiSSA adapter is written as an ordinary one of twice the
    rank, scale · (B·A − B₀·A₀), so that it fits the untouched base (PiSSA, §4 and appendix C).
    UserError for adapters of parts of a fused layer, which PEFT does not have.
    """
    folder = place_to_export(str(folder))
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, lora.LoraLayer) and name in module.adapters:
            layers[their_name(path) if isinstance(model, Llama) else path] = module
    tensors = {}
    for theirs, layer in layers.items():
        tensors |= their_tensors(theirs, layer, layer.adapters[name])
    config = their_config(layers, name) | {"base_model_name_or_path": base}
    if isinstance(model, Llama):
        config["task_type"] = "CAUSAL_LM"
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, config)


def their_tensors(theirs: str, layer: lora.LoraLayer, adapter: lora.Adapter) -> dict[str, Tensor]:
    """The tensors of one layer under PEFT's names."""
    if isinstance(adapter, FusedAdapter):
        raise UserError(f"{theirs}: PEFT has no adapters of parts of a fused layer")
    ends = ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    if isinstance(layer, LoraEmbedding):
        ends[:2] = "lora_embedding_A", "lora_embedding_B"
    numbers = list(untouched_pair(adapter))
    if isinstance(adapter, DoraAdapter):
        numbers.append(adapter.magnitude)
    return {
        f"{BEFORE}{theirs}.{end}": tensor.detach().cpu().clone()
        for end, tensor in zip(ends, numbers, strict=False)  # few have a magnitude
    }


def untouched_pair(adapter: lora.Adapter) -> tuple[Tensor, Tensor]:
    """A and B of an adapter of the untouched base."""
    return adapter.whole_pair() if isinstance(adapter, PissaAdapter) else adapter.pair()


def their_config(layers: dict[str, lora.LoraLayer], name: str) -> dict:
    """An adapter_config.json. The scale is alpha / r in every case: rsLoRA is in alpha by now."""
    adapters = {theirs: layer.adapters[name] for theirs, layer in layers.items()}
    ranks = {theirs: len(untouched_pair(x)[0]) for theirs, x in adapters.items()}
    alphas = {theirs: x.scale * ranks[theirs] for theirs, x in adapters.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {theirs: r for theirs, r in ranks.items() if r != rank},
        "alpha_pattern": {theirs: x for theirs, x in alphas.items() if x != alpha},
        "target_modules": list(layers),
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(type(x) is TransposedLayer for x in layers.values()),
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(isinstance(x, DoraAdapter) for x in adapters.values()),
        "init_lora_weights": True,
        "inference_mode": True,
    }
