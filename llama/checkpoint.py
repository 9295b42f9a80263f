"""Weights in and out: runs of our own, Hugging Face folders both ways, Meta's original files in.

    run directory    config.json (ours), model.safetensors, tokenizer files
    Hugging Face     config.json (model_type llama), *.safetensors, tokenizer.json or .model
    Meta             params.json, consolidated.00.pth, tokenizer.model

The three name the same matrices differently, and ours joins some (q, k, v; gate and up). Meta's q
and k rows pair neighbouring channels for the rotary embedding, ours and Hugging Face's pair channel
i with i + C/2: `half_split_rows` reorders them. What a file asks for that `model.py` does not have
(biases, other rotary scalings, quantized weights) is refused by name, never ignored.

Key: D d_model, H heads, C d_head, R rows.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import Llama, LlamaConfig, RopeScaling
from run import RunDirectory, UserError, write_json
from tokenizer import Tokenizer, load_tokenizer, read_json, save_for_transformers

HF_NAMES = {  # ours: theirs, top to bottom where ours is several of theirs
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "ffn.w13": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.w2": ("mlp.down_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
}
META_NAMES = {
    "attention.wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wo": ("attention.wo",),
    "ffn.w13": ("feed_forward.w1", "feed_forward.w3"),
    "ffn.w2": ("feed_forward.w2",),
    "attention_norm": ("attention_norm",),
    "ffn_norm": ("ffn_norm",),
}
HF_TOP = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
META_TOP = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}


@dataclass
class Loaded:
    """A model ready to use. stop_ids: the tokens that end a text."""

    folder: Path
    model: Llama
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]


def load(folder: str | Path) -> Loaded:
    """Read whichever of the three kinds `folder` is, in float32. UserError says what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--weights {folder}: there is no such folder")
    config = read_json(folder / "config.json")
    if "model" in config:
        sizes, state = read_sizes(config["model"], folder), read_run(folder)
    elif config:
        sizes = hf_config(config, folder)
        state = joined(read_hf(folder), sizes, HF_NAMES, HF_TOP, "model.layers.")
    elif (folder / "params.json").exists():
        weights = read_meta(folder)
        sizes = meta_config(read_json(folder / "params.json"), weights)
        weights = half_split(weights, sizes)
        state = joined(weights, sizes, META_NAMES, META_TOP, "layers.")
    else:
        raise UserError(f"{folder} has no config.json or params.json: neither a run nor a Llama")
    model, tokenizer = fill(sizes, state, folder), load_tokenizer(folder)
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, "
            f"the weights only {sizes.vocab_size}"
        )
    ends = read_json(folder / "generation_config.json").get("eos_token_id")
    ends = config.get("eos_token_id", tokenizer.eos_id) if ends is None else ends
    stop_ids = tuple(ends) if isinstance(ends, list) else () if ends is None else (ends,)
    return Loaded(folder, model, tokenizer, stop_ids)


def fill(sizes: LlamaConfig, state: dict[str, Tensor], folder: Path) -> Llama:
    """A model with these weights. UserError names the first that is missing, extra or misshapen."""
    with torch.device("meta"):  # no memory, no random numbers
        model = Llama(sizes)
    wanted = model.state_dict()
    if sizes.tie_embeddings:
        state["head.weight"] = state.get("embedding.weight")
    for name, tensor in wanted.items():
        if state.get(name) is None:
            raise UserError(f"the weights in {folder} lack {name}")
        if state[name].shape != tensor.shape:
            there, needed = tuple(state[name].shape), tuple(tensor.shape)
            raise UserError(f"{folder}: {name} is {there}, the configuration needs {needed}")
    if extra := sorted(state.keys() - wanted.keys()):
        raise UserError(f"the weights in {folder} have {extra[0]}, which Llama does not")
    model.load_state_dict({k: v.float() for k, v in state.items()}, assign=True)
    if sizes.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.requires_grad_(True)


def read_sizes(values: dict, folder: Path) -> LlamaConfig:
    """The model part of a run's config.json."""
    try:
        if values.get("rope_scaling"):
            values = values | {"rope_scaling": RopeScaling(**values["rope_scaling"])}
        return LlamaConfig(**values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json: {error}") from None


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of one file. UserError if it is missing or damaged."""
    try:
        return safetensors.torch.load_file(file)
    except FileNotFoundError:
        raise UserError(f"{file} is missing") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or no safetensors file: {error}") from None


def read_run(folder: Path) -> dict[str, Tensor]:
    """The weights of a run: the best on held-out text."""
    return read_safetensors(RunDirectory(folder).weights)


# Hugging Face


def hf_config(config: dict, folder: Path) -> LlamaConfig:
    """A Hugging Face Llama config.json, as written by transformers 4 or 5, as our sizes."""
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10_000.0),
        **(config.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "model_type": config.get("model_type", "llama") != "llama",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "quantization_config": config.get("quantization_config"),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1) != 1,
    }
    for name, wrong in refused.items():
        if wrong:
            value = json.dumps(config.get(name))
            raise UserError(f"{folder}/config.json: {name} {value} is not supported here")
    if kind not in ("default", "llama3"):
        raise UserError(f"{folder}/config.json: rope_type {kind} is not supported, only llama3")
    try:
        scaling = None
        if kind == "llama3":
            keys = ("factor", "low_freq_factor", "high_freq_factor")
            scaling = RopeScaling(
                *(float(rope[k]) for k in keys), rope["original_max_position_embeddings"]
            )
        n_head, d_model = config["num_attention_heads"], config["hidden_size"]
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            seq_len=config.get("max_position_embeddings", 2048),
            n_layer=config["num_hidden_layers"],
            n_head=n_head,
            n_kv_head=config.get("num_key_value_heads") or n_head,
            d_model=d_model,
            d_head=config.get("head_dim") or d_model // n_head,
            d_ff=config["intermediate_size"],
            rope_theta=float(rope["rope_theta"]),
            rope_scaling=scaling,
            norm_eps=config.get("rms_norm_eps", 1e-6),
            tie_embeddings=config.get("tie_word_embeddings", False),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UserError(f"{folder}/config.json: {what}") from None


def hf_config_of(sizes: LlamaConfig, tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> dict:
    """The reverse of `hf_config`, in the old style that transformers 4 and 5 both read."""
    scaling = sizes.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocab_size,
        "max_position_embeddings": sizes.seq_len,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_kv_head,
        "hidden_size": sizes.d_model,
        "head_dim": sizes.d_head,
        "intermediate_size": sizes.d_ff,
        "hidden_act": "silu",
        "rope_theta": sizes.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_seq_len,
        },
        "rms_norm_eps": sizes.norm_eps,
        "tie_word_embeddings": sizes.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(stop_ids) if len(stop_ids) > 1 else (*stop_ids, None)[0],
    }


def read_hf(folder: Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of the shards that its index names."""
    index = read_json(folder / "model.safetensors.index.json")
    single = folder / "model.safetensors"
    if index and not single.exists():
        shards = sorted(set(index.get("weight_map", {}).values()))
    elif single.exists():
        shards = [single.name]
    else:
        raise UserError(
            f"{folder} has no model.safetensors (pickled pytorch_model.bin files are refused, as "
            "they can run code: convert them to safetensors)"
        )
    tensors = {}
    for shard in shards:
        tensors |= read_safetensors(folder / shard)
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def joined(weights: dict, sizes: LlamaConfig, names: dict, top: dict, layers: str) -> dict:
    """Weights under foreign names as a state dict of ours: `names` in blocks, `top` outside."""
    left, state = dict(weights), {}
    for ours, theirs in top.items():
        if f"{theirs}.weight" in left:
            state[f"{ours}.weight"] = left.pop(f"{theirs}.weight")
    for layer in range(sizes.n_layer):
        for ours, theirs in names.items():
            parts = [left.pop(f"{layers}{layer}.{name}.weight", None) for name in theirs]
            if all(part is not None for part in parts):
                if len({part.shape[1:] for part in parts}) > 1:
                    found = ", ".join(str(tuple(part.shape)) for part in parts)
                    raise UserError(f"the {', '.join(theirs)} of layer {layer} are {found}")
                state[f"blocks.{layer}.{ours}.weight"] = torch.cat(parts)
    return state | left  # what is left over is reported by `fill`


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer of transformers load."""
    folder, sizes = Path(folder), loaded.model.config
    rows = (sizes.n_head * sizes.d_head, *[sizes.n_kv_head * sizes.d_head] * 2)
    heights = {"attention.wqkv": rows, "ffn.w13": (sizes.d_ff, sizes.d_ff)}
    tensors = {}
    for name, tensor in loaded.model.state_dict().items():
        stem = name.removesuffix(".weight")
        if not stem.startswith("blocks."):
            tensors[f"{HF_TOP[stem]}.weight"] = tensor
            continue
        _, layer, ours = stem.split(".", 2)
        parts = tensor.split(heights.get(ours, len(tensor)))
        for part, theirs in zip(parts, HF_NAMES[ours], strict=True):
            tensors[f"model.layers.{layer}.{theirs}.weight"] = part
    if sizes.tie_embeddings:
        del tensors["lm_head.weight"]
    run = RunDirectory(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        run.save_weights(tensors)
        config = hf_config_of(sizes, loaded.tokenizer, loaded.stop_ids)
        write_json(run.config, config)
        ends = {key: config[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", ends)
        save_for_transformers(loaded.tokenizer, folder)
    except OSError as error:
        raise UserError(f"cannot write to --export {folder}: {error.strerror}") from None


# Meta


def read_meta(folder: Path) -> dict[str, Tensor]:
    """The tensors of consolidated.00.pth; a pickle with anything but tensors in it is refused."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} consolidated.*.pth files, one is supported")
    try:
        weights = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle makes torch raise all kinds, IndexError too
        raise UserError(f"{files[0]} is damaged or holds more than tensors: {error}") from None
    if not (isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))):
        raise UserError(f"{files[0]} holds something else than named tensors")
    weights.pop("rope.freqs", None)
    return weights


def meta_config(params: dict, weights: dict[str, Tensor]) -> LlamaConfig:
    """Meta's params.json as our sizes; what it leaves out is read off the weights."""
    try:
        n_head = params["n_heads"]
        vocab_size, d_model = weights["tok_embeddings.weight"].shape
        scaled = params.get("use_scaled_rope", False)
        factor = float(params.get("rope_scaling_factor", 8.0))
        return LlamaConfig(
            vocab_size=vocab_size,
            seq_len=params.get("max_seq_len", 131_072 if scaled else 4096),
            n_layer=params["n_layers"],
            n_head=n_head,
            n_kv_head=params.get("n_kv_heads") or n_head,
            d_model=d_model,
            d_head=d_model // n_head,
            d_ff=len(weights["layers.0.feed_forward.w1.weight"]),
            rope_theta=float(params.get("rope_theta", 10_000.0)),
            rope_scaling=RopeScaling(factor) if scaled else None,
            norm_eps=params["norm_eps"],
            tie_embeddings="output.weight" not in weights,
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"params.json and the weights do not fit: {error}") from None


def half_split_rows(weight: Tensor, n_head: int) -> Tensor:
    """Rows (0, 1, 2, …) of each head to (0, 2, 4, …, 1, 3, 5, …). weight: (H·C, D).

    Then channel i is turned with i + C/2, by the angle by which 2i was turned with 2i + 1.
    """
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def interleaved_rows(weight: Tensor, n_head: int) -> Tensor:
    """The reverse of `half_split_rows`."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(weights: dict[str, Tensor], sizes: LlamaConfig) -> dict[str, Tensor]:
    """All of Meta's wq and wk in our order."""
    heads, halved = {"wq": sizes.n_head, "wk": sizes.n_kv_head}, {}
    for name, weight in weights.items():
        n_head = heads.get(name.removesuffix(".weight").split(".")[-1])
        if n_head and len(weight) != n_head * sizes.d_head:
            raise UserError(
                f"{name} has {len(weight)} rows, params.json says {n_head} × {sizes.d_head}"
            )
        halved[name] = half_split_rows(weight, n_head) if n_head else weight
    return halved
