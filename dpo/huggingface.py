"""Llama folders of Hugging Face: their config.json and names of weights, both ways.

What a folder asks for that model.py does not have (biases, other rotary scalings, quantized
weights) is refused by name, never ignored.
"""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from model import LlamaConfig
from options import UserError, make_config
from weights import renamed

# our names and theirs, of each tensor outside the blocks and of each in a block
TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
BLOCK = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
SIZES = {  # our names and theirs
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "d_model": "hidden_size",
    "d_head": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
SCALING = {"factor": "factor", "low_freq_factor": "low_freq_factor",
           "high_freq_factor": "high_freq_factor",
           "original_seq_len": "original_max_position_embeddings"}  # fmt: skip


def to_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, without the angles that old folders keep."""
    kept = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    return renamed(kept, top, block, ("model.layers", "blocks"))


def to_their_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names."""
    return renamed(tensors, TOP, BLOCK, ("blocks", "model.layers"))


def refuse_what_we_lack(config: dict, rope: dict, where: Path) -> None:
    """UserError for the first thing in a config.json that model.py does not have."""
    wrong = {
        "model_type": config.get("model_type", "llama") != "llama",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = json.dumps(config.get(name, rope.get(name)))
            raise UserError(f"{where}: {name} {value} is not supported here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type {kind} is not supported, only llama3")


def our_config(config: dict, where: Path) -> LlamaConfig:
    """A Hugging Face config.json, as transformers 4 or 5 writes it, as our sizes."""
    rope = config.get("rope_parameters")
    if rope is None:  # transformers 4 has the two apart
        rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
        rope |= as_object(config.get("rope_scaling") or {}, where)
    rope = as_object(rope, where)
    refuse_what_we_lack(config, rope, where)
    defaults = {"seq_len": 2048, "norm_eps": 1e-6, "tie_embeddings": False}
    values = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    values = {k: v if v is not None else defaults.get(k) for k, v in values.items()}
    if values["n_kv_head"] is None:
        values["n_kv_head"] = values["n_head"]
    if values["d_head"] is None and plain_int(values["d_model"]) and plain_int(values["n_head"]):
        values["d_head"] = values["d_model"] // values["n_head"]
    values["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    if rope.get("rope_type", rope.get("type")) == "llama3":
        if lacking := [theirs for theirs in SCALING.values() if rope.get(theirs) is None]:
            raise UserError(f"{where}: {lacking[0]} is missing")
        values["rope_scaling"] = {ours: rope[theirs] for ours, theirs in SCALING.items()}
    if missing := [SIZES.get(k, k) for k, v in values.items() if v is None]:
        raise UserError(f"{where}: {missing[0]} is missing")
    return make_config(LlamaConfig, values, where)


def as_object(value, where: Path) -> dict:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: the rotary parameters are no object")
    return value


def plain_int(value) -> bool:
    """Is it a size to divide by?"""
    return type(value) is int and value > 0


def their_config(sizes: LlamaConfig) -> dict:
    """The reverse of `our_config`, in the style of transformers 4, which version 5 reads too."""
    values = dataclasses.asdict(sizes)
    scaling = values["rope_scaling"]
    if scaling:
        scaling = {theirs: scaling[ours] for ours, theirs in SCALING.items()}
        scaling["rope_type"] = "llama3"
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling,
    } | {theirs: values[ours] for ours, theirs in SIZES.items()}
