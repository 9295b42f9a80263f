"""A model ready to use: from a run or from a Hugging Face folder; and back.

run directory    config.json (ours), model.safetensors, tokenizer files
Hugging Face     config.json (model_type deepseek_v3), *.safetensors or *.bin, tokenizer files
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import huggingface
from hardware import check_memory
from loop import save_tensors
from model import DeepseekConfig
from mtp import DeepseekMTP
from options import UserError, make_config, say, shorten
from run import RunDirectory, place_to_export, read_json, refuse_endless, write_json
from tokenizer import Tokenizer, load_tokenizer
from tokenizer_json import save_for_transformers
from weights import fill, read_safetensors, read_tensors


@dataclass
class Loaded:
    """A model ready to use. stop_ids: the tokens that end a text."""

    folder: Path
    model: DeepseekMTP
    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]


def load(folder: str | Path) -> Loaded:
    """Read whichever of the two kinds `folder` is, in float32. UserError says what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--weights {folder}: there is no such folder")
    refuse_endless(folder)
    config = read_json(folder / "config.json", optional=True)
    if "model" in config:
        sizes = make_config(DeepseekConfig, config["model"], f"{folder}/config.json, model")
        refuse_too_large(sizes, folder)
        state = read_safetensors(RunDirectory(folder).weights)
    elif config:
        sizes = huggingface.our_config(config, folder / "config.json")
        refuse_too_large(sizes, folder)
        state = huggingface.to_our_names(
            read_tensors(folder), sizes, huggingface.is_interleaved(config), folder
        )
    else:
        raise UserError(f"{folder} has no config.json: neither a run nor a DeepSeek")
    if sizes.tie_embeddings and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"]
    last = f"blocks.{sizes.n_layer - 1}.attention_norm.weight"
    if last not in state:  # before a model of a million layers is built
        raise UserError(f"the weights in {folder} lack {last}")
    model, tokenizer = fill(lambda: DeepseekMTP(sizes), state, folder), load_tokenizer(folder)
    if sizes.tie_embeddings:
        model.head.weight = model.embedding.weight
    if tokenizer.vocab_size > sizes.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, "
            f"the weights only {sizes.vocab_size}"
        )
    return Loaded(folder, model.eval(), tokenizer, stop_ids(folder, config, tokenizer))


def refuse_too_large(sizes: DeepseekConfig, folder: Path) -> None:
    """UserError if the weights cannot be in memory; before they are read."""
    check_memory(4 * sizes.n_parameter, torch.device("cpu"), f"the model in {folder}")


def stop_ids(folder: Path, config: dict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text: generation_config.json has them all, config.json often one.

    UserError for what is no number, since texts would then run on without a word.
    """
    ends = read_json(folder / "generation_config.json", optional=True).get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id", tokenizer.eos_id)
    ends = ends if isinstance(ends, list) else [ends]
    ends = [one for one in ends if one is not None]
    if any(type(one) is not int for one in ends):
        raise UserError(f"{folder}: eos_token_id {shorten(ends, 40)} is no token")
    return tuple(ends)


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer of transformers load.

    The modules that look ahead are left out: transformers 5 writes its own way with them. UserError
    unless `folder` is new or empty, and for what Hugging Face's DeepSeek-V3 does not have.
    """
    folder, sizes = place_to_export(folder), loaded.model.config
    their_config = huggingface.their_config(sizes, loaded.folder)
    tensors = huggingface.to_their_names(loaded.model.state_dict(), sizes)
    if sizes.n_ahead:
        say(f"left out   {sizes.n_ahead} module(s) that look ahead")
    if sizes.tie_embeddings:
        del tensors["lm_head.weight"]
    ids = {"bos_token_id": loaded.tokenizer.bos_id, "eos_token_id": list(loaded.stop_ids) or None}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", their_config | ids)
    write_json(folder / "generation_config.json", ids)
    save_for_transformers(loaded.tokenizer, folder)
