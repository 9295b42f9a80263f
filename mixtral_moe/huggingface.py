"""Mixtral folders of Hugging Face: their config.json and names of weights, both ways.

Experts are stored in two ways. The Hub, and so most programs, has three matrices for each expert;
transformers 5 keeps those of all experts in one tensor, w1 and w3 in one below the other:

    model.layers.0.block_sparse_moe.experts.5.w1.weight        (F, D), also w2 and w3
    model.layers.0.mlp.experts.gate_up_proj, …down_proj        (E, 2F, D) and (E, D, F)

Both are read, the first is written. What a folder asks for that model.py does not have (other
rotary scalings, quantized weights) is refused by name, never ignored.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from model import MixtralConfig
from options import UserError, make_config, shorten
from weights import renamed

# our names and theirs, of each tensor outside the blocks and of each in a block
TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn.router.gate": "block_sparse_moe.gate",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
EXPERTS = r"model\.layers\.([0-9]{1,6})\.(?:mlp|block_sparse_moe)\.experts\."
SIZES = {  # our names and theirs
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "n_expert": "num_local_experts",
    "n_active": "num_experts_per_tok",
    "window": "sliding_window",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"seq_len": 131_072, "n_kv_head": 8, "n_expert": 8, "n_active": 2, "window": 0,
            "norm_eps": 1e-5, "tie_embeddings": False}  # fmt: skip
SCALING = {"factor": "factor", "low_freq_factor": "low_freq_factor",
           "high_freq_factor": "high_freq_factor",
           "original_seq_len": "original_max_position_embeddings"}  # fmt: skip


def to_our_names(
    tensors: dict[str, Tensor], sizes: MixtralConfig, where: Path
) -> dict[str, Tensor]:
    """Their tensors under our names, with the experts stacked and the biases of balancing, 0."""
    single: dict[str, dict[int, Tensor]] = {}  # our name of a stack, and its parts by expert
    state = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            continue  # angles that old folders keep
        if found := re.fullmatch(EXPERTS + r"([0-9]{1,6})\.(w[123])\.weight", name):
            stack = single.setdefault(f"blocks.{found[1]}.ffn.experts.{found[3]}", {})
            stack[int(found[2])] = tensor
        elif found := re.fullmatch(EXPERTS + r"(gate_up_proj|down_proj)", name):
            state |= unstacked(f"blocks.{found[1]}.ffn.experts", found[2], tensor, where)
        else:
            state[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = tensor
    state |= {name: stacked(name, parts, sizes, where) for name, parts in single.items()}
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    state = renamed(state, top, block, ("model.layers", "blocks"))
    gates = [name for name in state if name.endswith(".router.gate.weight")]
    biases = {name.replace("gate.weight", "bias"): torch.zeros(sizes.n_expert) for name in gates}
    return state | biases


def stacked(name: str, parts: dict[int, Tensor], sizes: MixtralConfig, where: Path) -> Tensor:
    """The matrices of all experts as one tensor, (E, rows, columns)."""
    shapes, kinds = {t.shape for t in parts.values()}, {t.dtype for t in parts.values()}
    if sorted(parts) != list(range(sizes.n_expert)):
        raise UserError(f"{where}: {name} is of {len(parts)} experts, not {sizes.n_expert}")
    if len(shapes) > 1 or len(kinds) > 1:
        raise UserError(f"{where}: the parts of {name} differ in shape or number format")
    return torch.stack([parts[e] for e in sorted(parts)])


def unstacked(prefix: str, theirs: str, tensor: Tensor, where: Path) -> dict[str, Tensor]:
    """w1 and w3 from what transformers 5 keeps one below the other, or w2."""
    if theirs == "down_proj":
        return {f"{prefix}.w2": tensor}
    if tensor.dim() != 3 or tensor.shape[1] % 2:
        raise UserError(f"{where}: {theirs} is {tuple(tensor.shape)}, no pairs of matrices")
    w1, w3 = tensor.chunk(2, dim=1)
    return {f"{prefix}.w1": w1, f"{prefix}.w3": w3}


def to_their_names(state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Our tensors under the Hub's names, one tensor for each matrix of an expert."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(".router.bias"):
            if tensor.any():
                raise UserError(
                    f"{where} was balanced by biases, which Hugging Face's Mixtral does not have: "
                    "train with another --balance to export"
                )
        elif found := re.fullmatch(r"blocks\.(\d+)\.ffn\.experts\.(w[123])", name):
            before = f"model.layers.{found[1]}.block_sparse_moe.experts"
            tensors |= {f"{before}.{e}.{found[2]}.weight": one for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    return renamed(tensors, TOP, BLOCK, ("blocks", "model.layers"))


def refuse_what_we_lack(config: dict, rope: dict, where: Path) -> None:
    """UserError for the first thing in a config.json that model.py does not have."""
    wrong = {
        "model_type": config.get("model_type", "mixtral") != "mixtral",
        "attention_bias": config.get("attention_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = shorten(json.dumps(config.get(name, rope.get(name))), 80)
            raise UserError(f"{where}: {name} {value} is not supported here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type {shorten(kind, 40)} is not supported, only llama3")


def our_config(config: dict, where: Path) -> MixtralConfig:
    """A Hugging Face config.json, as transformers 4 or 5 writes it, as our sizes."""
    rope = config.get("rope_parameters")
    if rope is None:  # transformers 4 has the two apart
        rope = {"rope_theta": config.get("rope_theta", 1e6)}
        rope |= as_object(config.get("rope_scaling") or {}, where)
    rope = as_object(rope, where)
    refuse_what_we_lack(config, rope, where)
    values = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    values = {k: v if v is not None else DEFAULTS.get(k) for k, v in values.items()}
    if values["d_head"] is None and plain_int(values["d_model"]) and plain_int(values["n_head"]):
        values["d_head"] = values["d_model"] // values["n_head"]
    values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 1e6))
    if rope.get("rope_type", rope.get("type")) == "llama3":
        if lacking := [theirs for theirs in SCALING.values() if rope.get(theirs) is None]:
            raise UserError(f"{where}: {lacking[0]} is missing")
        values["rope_scaling"] = {ours: rope[theirs] for ours, theirs in SCALING.items()}
    if missing := [SIZES.get(k, k) for k, v in values.items() if v is None]:
        raise UserError(f"{where}: {missing[0]} is missing")
    return make_config(MixtralConfig, values, where)


def as_object(value, where: Path) -> dict:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: the rotary parameters are no object")
    return value


def plain_int(value) -> bool:
    """Is it a size to divide by?"""
    return type(value) is int and value > 0


def their_config(sizes: MixtralConfig) -> dict:
    """The reverse of `our_config`, in the style of transformers 4, which version 5 reads too."""
    values = dataclasses.asdict(sizes)
    values["window"] = sizes.window or None
    scaling = values["rope_scaling"]
    if scaling:
        scaling = {theirs: scaling[ours] for ours, theirs in SCALING.items()}
        scaling["rope_type"] = "llama3"
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling,
    } | {theirs: values[ours] for ours, theirs in SIZES.items()}
