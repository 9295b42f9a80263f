"""A network ready to use: from a run, or from a state dict of torch.nn modules; and back.

run directory    config.json (ours), model.safetensors, alphabet.json or tokenizer_words.json
state dict       any file or folder with the weights of torch.nn.Embedding, LSTM, GRU or RNN, and
                 Linear, whatever they are called: torch_names.py finds them by shape and name
"""

from dataclasses import dataclass
from pathlib import Path

import torch

import torch_names
from hardware import check_memory
from loop import save_tensors
from model import SequenceConfig, SequenceModel
from options import UserError, make_config
from reviews import Vocabulary
from run import RunDirectory, place_to_export, read_json, refuse_endless
from tokenizer import Tokenizer, load_tokenizer
from weights import fill, read_pickle, read_safetensors, read_tensors


@dataclass
class Loaded:
    """A network ready to use. words: what makes ids of text, where the folder has it."""

    folder: Path
    model: SequenceModel
    task: str
    words: Tokenizer | Vocabulary | None = None


def load(folder: str | Path) -> Loaded:
    """Read a run, or a state dict in a file or folder, in float32. UserError says what is wrong."""
    path = Path(folder)
    if not path.exists():
        raise UserError(f"--weights {path}: there is no such file or folder")
    refuse_endless(path)
    config = read_json(path / "config.json", optional=True) if path.is_dir() else {}
    if "model" in config:
        sizes = make_config(SequenceConfig, config["model"], f"{path}/config.json, model")
        check_memory(4 * sizes.n_parameter, torch.device("cpu"), f"the model in {path}")
        state = read_safetensors(RunDirectory(path).weights)
        if f"layers.{sizes.n_layer - 1}.directions.0.bias" not in state:  # before it is built
            raise UserError(f"the weights in {path} lack those of layer {sizes.n_layer}")
        if sizes.tie_embeddings and "embedding.weight" in state:
            state["head.weight"] = state["embedding.weight"]
        model, task = fill(lambda: SequenceModel(sizes), state, path), task_of(config, path)
        if sizes.tie_embeddings:
            model.head.weight = model.embedding.weight
    else:
        model = torch_names.build(read_any(path), path)
        task = "lm" if model.config.answer == "every" else "sentiment"
    words = load_words(path, task) if path.is_dir() else None
    if words and words.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{path}: {words.vocab_size} words or letters, but weights for "
            f"{model.config.vocab_size}"
        )
    return Loaded(path, model.eval(), task, words)


def task_of(config: dict, folder: Path) -> str:
    """The task that a run was trained for. UserError if it does not say."""
    train = config.get("train")
    task = train.get("task") if isinstance(train, dict) else None
    if task not in ("lm", "sentiment", "adding", "copy"):
        raise UserError(f"{folder}/config.json does not name the task of the run")
    return task


def load_words(folder: Path, task: str) -> Tokenizer | Vocabulary | None:
    """The alphabet or the vocabulary in a folder; None where there is none."""
    if task == "lm" and (folder / "alphabet.json").exists():
        return load_tokenizer(folder)
    if task == "sentiment" and (folder / "tokenizer_words.json").exists():
        return Vocabulary.load(folder)
    return None


def read_any(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file or folder, in whichever format."""
    if path.is_dir():
        return read_tensors(path)
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def export(loaded: Loaded, folder: str | Path) -> None:
    """Write model.safetensors with the names of torch.nn, and the alphabet or the words.

    UserError unless `folder` is new or empty, and for a network that torch.nn does not have.
    """
    folder = place_to_export(folder)
    tensors = torch_names.to_torch(loaded.model)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    if loaded.words:
        loaded.words.save(folder)
