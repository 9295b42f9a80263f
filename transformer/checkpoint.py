"""A model ready to translate: from a run, or from a Marian folder of Hugging Face; and back.

run directory    config.json (ours), model.safetensors, subwords
Marian folder    see marian.py
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import marian
from data import Subwords
from hardware import check_memory
from loop import save_tensors
from marian import MarianSubwords
from model import Transformer, TransformerConfig
from options import UserError, make_config
from run import RunDirectory, place_to_export, read_json, refuse_endless, write_json
from weights import fill, read_safetensors, read_tensors


@dataclass(frozen=True)
class Rules:
    """How translations of a model begin and end. Token ids.

    never: what is never written, such as padding. end_at_limit: at the longest length nothing but
    the end may come, at no cost. renormalise: the probabilities of what may come sum to 1 without
    `never`, as probabilities should; a Marian folder may ask for the other way.
    """

    start: int
    end: int
    never: tuple[int, ...] = ()
    end_at_limit: bool = False
    renormalise: bool = True


@dataclass
class Loaded:
    """A model ready to use."""

    folder: Path
    model: Transformer
    subwords: Subwords | MarianSubwords
    rules: Rules


def rules_of(sizes: TransformerConfig) -> Rules:
    """Our own models write neither padding nor a second start."""
    return Rules(sizes.start_id, sizes.end_id, tuple(sorted({sizes.pad_id, sizes.start_id})))


def load(folder: str | Path) -> Loaded:
    """Read whichever of the two kinds `folder` is, in float32. UserError says what is wrong."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--weights {folder}: there is no such folder")
    refuse_endless(folder)
    config = read_json(folder / "config.json", optional=True)
    if "model" in config:
        sizes = make_config(TransformerConfig, config["model"], f"{folder}/config.json, model")
        refuse_too_large(sizes, folder)
        state, rules = read_safetensors(RunDirectory(folder).weights), rules_of(sizes)
        subwords = load_subwords(folder)
    elif config:
        sizes = marian.our_config(config, folder / "config.json")
        refuse_too_large(sizes, folder)
        state = marian.to_our_names(read_tensors(folder), sizes, folder)
        rules = Rules(**marian.generation_rules(folder, sizes))
        subwords = MarianSubwords.load(folder)
    else:
        raise UserError(f"{folder} has no config.json: neither a run nor a Marian folder")
    for stack, n_layer in (("encoder", sizes.n_layer), ("decoder", sizes.decoder_layers)):
        last = f"{stack}.{n_layer - 1}.ffn.w1.weight"
        if last not in state:  # before a model of a million layers is built
            raise UserError(f"the weights in {folder} lack {last}")
    model = fill(lambda: Transformer(sizes), state, folder)
    if subwords.vocab_size > sizes.vocab_size:
        raise UserError(
            f"{folder}: the subwords have {subwords.vocab_size} ids, "
            f"the weights only {sizes.vocab_size}"
        )
    return Loaded(folder, model.eval(), subwords, rules)


def load_subwords(folder: Path) -> Subwords | MarianSubwords:
    """The subwords of a run: ours, or those of the Marian folder that it began with."""
    if (folder / MarianSubwords.IN_RUN[0]).exists():
        return MarianSubwords.load(folder, MarianSubwords.IN_RUN)
    return Subwords.load(folder)


def refuse_too_large(sizes: TransformerConfig, folder: Path) -> None:
    """UserError if the weights cannot be in memory; before they are read."""
    check_memory(4 * sizes.n_parameter, torch.device("cpu"), f"the model in {folder}")


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write a folder that MarianMTModel and MarianTokenizer of transformers load.

    UserError unless `folder` is new or empty, and for a pre-norm model, which Marian is not.
    """
    folder, sizes = place_to_export(folder), loaded.model.config
    config = marian.their_config(sizes)
    tensors = marian.to_their_names(loaded.model.state_dict(), sizes)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)
    generation = marian.their_generation(loaded.rules, sizes)
    write_json(folder / "generation_config.json", generation)
    marian.export_subwords(loaded.subwords, folder)
