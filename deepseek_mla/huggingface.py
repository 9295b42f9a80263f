"""DeepSeek-V3 folders of Hugging Face: their config.json and names of weights, both ways.

Experts are stored in two ways, as in mixtral_moe: the Hub has three matrices for each expert,
transformers 5 keeps those of all experts in one tensor. Both are read, the first is written.

    model.layers.3.mlp.experts.5.gate_proj.weight        (F, D), also up_proj and down_proj
    model.layers.3.mlp.experts.gate_up_proj, …down_proj        (E, 2F, D) and (E, D, F)

Rotary channels lie in two ways: in pairs of neighbours (2i, 2i + 1) where config.json says
rope_interleave, as DeepSeek's own weights do, else (i, i + P/2) as here. A permutation of rows goes
from one to the other, and changes no score, since query and key are permuted alike. What a folder
asks for that model.py does not have is refused by name, never ignored. Modules that look ahead
(layers behind the last) are left out.
"""

import dataclasses
import json
import re
from pathlib import Path

import torch
from torch import Tensor

from model import DeepseekConfig
from options import UserError, make_config, shorten
from weights import renamed

# our names and theirs, of each tensor outside the blocks and of each in a block
TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
BLOCK = {
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn.router.gate": "mlp.gate",
    "ffn.shared.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared.w2": "mlp.shared_experts.down_proj",
    "ffn.shared.w3": "mlp.shared_experts.up_proj",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
EXPERTS = r"model\.layers\.([0-9]{1,6})\.mlp\.experts\."
MATRICES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
THEIR_BIAS = ".mlp.gate.e_score_correction_bias"
OUR_BIAS = ".ffn.router.bias"
SIZES = {  # our names and theirs
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "d_nope": "qk_nope_head_dim",
    "d_rope": "qk_rope_head_dim",
    "d_value": "v_head_dim",
    "d_ff": "intermediate_size",
    "n_dense": "first_k_dense_replace",
    "d_expert": "moe_intermediate_size",
    "n_expert": "n_routed_experts",
    "n_active": "num_experts_per_tok",
    "n_shared": "n_shared_experts",
    "n_group": "n_group",
    "n_active_group": "topk_group",
    "normalize_weights": "norm_topk_prob",
    "weight_factor": "routed_scaling_factor",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
DEFAULTS = {"n_dense": 3, "n_shared": 1, "n_group": 8, "n_active_group": 4, "n_active": 8,
            "normalize_weights": True, "weight_factor": 2.5, "norm_eps": 1e-6,
            "tie_embeddings": False}  # fmt: skip
SCALING = {"factor": "factor", "low_turns": "beta_slow", "high_turns": "beta_fast",
           "original_seq_len": "original_max_position_embeddings",
           "mscale": "mscale_all_dim"}  # fmt: skip


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────


def to_our_names(
    tensors: dict[str, Tensor], sizes: DeepseekConfig, interleaved: bool, where: Path
) -> dict[str, Tensor]:
    """Their tensors under our names, experts stacked, rotary channels in our order."""
    single: dict[str, dict[int, Tensor]] = {}  # our name of a stack, and its parts by expert
    state = {}
    for name, tensor in tensors.items():
        layer = re.match(r"model\.layers\.([0-9]{1,6})\.", name)
        if name.endswith("rotary_emb.inv_freq") or (layer and int(layer[1]) >= sizes.n_layer):
            continue  # angles that old folders keep, and modules that look ahead
        if found := re.fullmatch(EXPERTS + r"([0-9]{1,6})\.(\w+_proj)\.weight", name):
            stack = f"blocks.{found[1]}.ffn.experts.{MATRICES.get(found[3], found[3])}"
            single.setdefault(stack, {})[int(found[2])] = tensor
        elif found := re.fullmatch(EXPERTS + r"(gate_up_proj|down_proj)", name):
            state |= unstacked(f"blocks.{found[1]}.ffn.experts", found[2], tensor, where)
        elif name.endswith(THEIR_BIAS):
            name = name.replace("model.layers", "blocks").replace(THEIR_BIAS, OUR_BIAS)
            state[name] = tensor
        else:
            state[name.replace(".self_attn.q_proj.", ".self_attn.q_b_proj.")] = tensor
    state |= {name: stacked(name, parts, sizes, where) for name, parts in single.items()}
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    state = renamed(state, top, block, ("model.layers", "blocks"))
    return with_rotary_rows(state, sizes, half_split, where) if interleaved else state


def stacked(name: str, parts: dict[int, Tensor], sizes: DeepseekConfig, where: Path) -> Tensor:
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


def half_split(rows: Tensor) -> Tensor:
    """Rows (…, P, D) from the order of neighbours, (0, 1), (2, 3), …, to ours, (0, P/2), …"""
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2)


def neighbours(rows: Tensor) -> Tensor:
    """The reverse of `half_split`."""
    return torch.stack(rows.chunk(2, dim=-2), dim=-2).flatten(-3, -2)


def with_rotary_rows(
    state: dict[str, Tensor], sizes: DeepseekConfig, order, where: Path
) -> dict[str, Tensor]:
    """The state with the rows that make rotary channels in another order, in all blocks."""
    changed, d_head = dict(state), sizes.d_nope + sizes.d_rope
    for name, rows in state.items():
        query, key = (name.endswith(f".attention.{w}.weight") for w in ("wq_b", "wkv_a"))
        n_row = sizes.n_head * d_head if query else sizes.kv_rank + sizes.d_rope
        if (query or key) and len(rows) != n_row:
            raise UserError(f"{where}: {name} has {len(rows)} rows, not {n_row}")
        if query:
            plain, rotary = rows.view(sizes.n_head, d_head, -1).split(
                (sizes.d_nope, sizes.d_rope), dim=1
            )
            changed[name] = torch.cat((plain, order(rotary)), dim=1).flatten(0, 1)
        elif key:
            changed[name] = torch.cat((rows[: sizes.kv_rank], order(rows[sizes.kv_rank :])))
    return changed


def to_their_names(
    state: dict[str, Tensor], sizes: DeepseekConfig, interleaved: bool = True
) -> dict[str, Tensor]:
    """Our tensors under the Hub's names, without the modules that look ahead."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("ahead.")}
    if interleaved:
        state = with_rotary_rows(state, sizes, neighbours, Path("ours"))
    theirs, tensors = {ours: name for name, ours in MATRICES.items()}, {}
    for name, tensor in state.items():
        if name.endswith(OUR_BIAS):
            tensors[name.replace("blocks", "model.layers").replace(OUR_BIAS, THEIR_BIAS)] = tensor
        elif found := re.fullmatch(r"blocks\.(\d+)\.ffn\.experts\.(w[123])", name):
            before, after = f"model.layers.{found[1]}.mlp.experts", theirs[found[2]]
            tensors |= {f"{before}.{e}.{after}.weight": one for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor
    tensors = renamed(tensors, TOP, BLOCK, ("blocks", "model.layers"))
    if sizes.q_rank:
        return tensors
    return {name.replace(".q_b_proj.", ".q_proj."): tensor for name, tensor in tensors.items()}


# ── Config ────────────────────────────────────────────────────────────────────────────────────────


def refuse_what_we_lack(config: dict, rope: dict, where: Path) -> None:
    """UserError for the first thing in a config.json that model.py does not have."""
    wrong = {
        "model_type": config.get("model_type", "deepseek_v3") not in ("deepseek_v3", "kimi_k2"),
        "attention_bias": config.get("attention_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config"),
        "scoring_func": config.get("scoring_func", "sigmoid") != "sigmoid",
        "topk_method": config.get("topk_method", "noaux_tc") != "noaux_tc",
        "moe_layer_freq": config.get("moe_layer_freq", 1) != 1,
        "mscale": rope.get("mscale_all_dim") != rope.get("mscale"),
        "attention_factor": rope.get("attention_factor") is not None,
        "truncate": rope.get("truncate", True) is not True,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = shorten(json.dumps(config.get(name, rope.get(name))), 80)
            raise UserError(f"{where}: {name} {value} is not supported here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise UserError(f"{where}: rope_type {shorten(kind, 40)} is not supported, only yarn")


def rotary_values(config: dict, where: Path) -> dict:
    """rope_theta, and rope_scaling where there is one, of a config.json of transformers 4 or 5."""
    rope = config.get("rope_parameters")
    if rope is None:  # transformers 4 has the two apart
        rope = {"rope_theta": config.get("rope_theta", 1e4)}
        rope |= as_object(config.get("rope_scaling") or {}, where)
    rope = as_object(rope, where)
    refuse_what_we_lack(config, rope, where)
    values = {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 1e4))}
    if rope.get("rope_type", rope.get("type")) == "yarn":
        rope = {"beta_slow": 1.0, "beta_fast": 32.0} | rope
        if lacking := [theirs for theirs in SCALING.values() if rope.get(theirs) is None]:
            raise UserError(f"{where}: {lacking[0]} is missing")
        values["rope_scaling"] = {ours: rope[theirs] for ours, theirs in SCALING.items()}
    return values


def our_config(config: dict, where: Path) -> DeepseekConfig:
    """A Hugging Face config.json, as transformers 4 or 5 writes it, as our sizes."""
    values = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    values = {k: v if v is not None else DEFAULTS.get(k) for k, v in values.items()}
    values["q_rank"] = values["q_rank"] or 0  # null: queries come of no latent
    values |= {"n_ahead": 0} | rotary_values(config, where)
    if missing := [SIZES.get(k, k) for k, v in values.items() if v is None]:
        raise UserError(f"{where}: {missing[0]} is missing")
    return make_config(DeepseekConfig, values, where)


def is_interleaved(config: dict) -> bool:
    """Do the folder's weights have rotary channels as pairs of neighbours? DeepSeek's own do."""
    return config.get("rope_interleave", True) is not False


def as_object(value, where: Path) -> dict:
    """`value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: the rotary parameters are no object")
    return value


def their_config(sizes: DeepseekConfig, where: Path, interleaved: bool = True) -> dict:
    """The reverse of `our_config`, in the style of transformers 4, which version 5 reads too.

    UserError for sizes that Hugging Face's DeepSeek-V3 cannot have.
    """
    if sizes.softmax_scores or not sizes.n_shared:
        what = "a softmax router" if sizes.softmax_scores else "no shared expert"
        raise UserError(f"{where} has {what}, which Hugging Face's DeepSeek-V3 does not know")
    values = dataclasses.asdict(sizes) | {"q_rank": sizes.q_rank or None}
    scaling = values["rope_scaling"]
    if scaling:
        scaling = {theirs: scaling[ours] for ours, theirs in SCALING.items()}
        scaling |= {"rope_type": "yarn", "mscale": scaling["mscale_all_dim"]}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "num_key_value_heads": sizes.n_head,
        "num_nextn_predict_layers": 0,
        "rope_interleave": interleaved,
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling,
    } | {theirs: values[ours] for ours, theirs in SIZES.items()}
