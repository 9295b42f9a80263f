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
from huggingface import BLOCK, TOP
from loop import save_tensors
from lora import LoraConfig, LoraEmbedding, LoraLayer
from model import Llama
from options import UserError, shorten
from run import place_to_export, read_json, write_json
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
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise UserError(f"{where}: {name} is {shorten(value, 40)}, a size was expected")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(name) or {}, dict):
            raise UserError(f"{where}: {name} is no object")


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
        for path, theirs in ours.items():
            put_one(model, path, folder, theirs, name)
    except ValueError as error:
        raise UserError(f"{folder.path}: {error}") from None
    for layer in lora.layers(model):
        layer.active = {name: 1.0} if name in layer.adapters else {}
    return list(ours)


def put_one(model: nn.Module, path: str, folder: Folder, theirs: str, name: str) -> None:
    """The adapter of one layer. ValueError if it does not fit."""
    config, found = folder.config, folder.tensors[theirs]
    rank = found["lora_a"].shape[0]
    alpha = pattern_value(config.get("alpha_pattern"), theirs, config["lora_alpha"])
    settings = LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=f"^{re.escape(path)}$",
        dora="magnitude" in found,
        rslora=bool(config.get("use_rslora")),
    )
    lora.adapt(model, settings, name)
    adapter = model.get_submodule(path).adapters[name]
    with torch.no_grad():
        for kind, tensor in found.items():
            mine = getattr(adapter, kind)
            if mine.shape != tensor.shape:
                there, here = tuple(tensor.shape), tuple(mine.shape)
                raise ValueError(f"{kind} of {theirs} is {there}, the model needs {here}")
            mine.copy_(tensor)


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def write(model: nn.Module, name: str, folder: str | Path, base: str = "") -> None:
    """Write adapter `name` of `model` as a folder that PEFT loads. `folder` must be new or empty.

    base: what to call the base model. A PiSSA adapter is written as an ordinary one of twice the
    rank, scale · (B·A − B₀·A₀), so that it fits the untouched base (PiSSA, §4 and appendix C).
    UserError for adapters of parts of a fused layer, which PEFT does not have.
    """
    folder = place_to_export(str(folder))
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.adapters
    ]
    named = {their_name(p) if isinstance(model, Llama) else p: p for p in paths}
    tensors, ranks, scales = {}, {}, {}
    for theirs, path in named.items():
        layer = model.get_submodule(path)
        adapter = layer.adapters[name]
        if adapter.sizes:
            raise UserError(f"{path}: PEFT has no adapters of parts of a fused layer")
        a, b = whole_pair(adapter)
        ranks[theirs], scales[theirs] = a.shape[0], adapter.scale
        ends = ("lora_A.weight", "lora_B.weight")
        if isinstance(layer, LoraEmbedding):
            ends = ("lora_embedding_A", "lora_embedding_B")
        for end, tensor in zip(ends, (a, b), strict=True):
            tensors[f"{BEFORE}{theirs}.{end}"] = tensor.detach().cpu().clone()
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude.detach().cpu().clone()
            tensors[f"{BEFORE}{theirs}.lora_magnitude_vector"] = magnitude
    layers = [model.get_submodule(path) for path in paths]
    dora = any(layer.adapters[name].magnitude is not None for layer in layers)
    config = their_config(ranks, scales, dora, any(layer.transposed for layer in layers), base)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, tensors)
    if isinstance(model, Llama):
        config["task_type"] = "CAUSAL_LM"
    write_json(folder / CONFIG, config)


def whole_pair(adapter: lora.Adapter) -> tuple[Tensor, Tensor]:
    """A and B of an adapter of the untouched base."""
    a, b = adapter.pair()
    if adapter.start_a is None:
        return a, b
    return torch.cat([a, adapter.start_a]), torch.cat([b, -adapter.start_b], dim=1)


def their_config(ranks: dict, scales: dict, dora: bool, transposed: bool, base: str) -> dict:
    """An adapter_config.json. The scale is alpha / r in every case: rsLoRA is in alpha by now."""
    rank, scale = next(iter(ranks.values())), next(iter(scales.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {
            n: scales[n] * r for n, r in ranks.items() if scales[n] * r != scale * rank
        },
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "use_rslora": False,
        "use_dora": dora,
        "init_lora_weights": True,
        "inference_mode": True,
    }
