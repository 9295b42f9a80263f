"""What the harness has to know of this folder: a run that takes a moment, and its data."""

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

import train
from loop import save_tensors
from model import Llama, LlamaConfig
from run import write_json


def tiny_llama() -> str:
    """A folder with a random model of one layer that reads as the shipped base does."""
    folder = Path(tempfile.mkdtemp(prefix="piko-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    sizes = LlamaConfig(n_layer=1, n_head=2, n_kv_head=1, d_model=16, d_head=8, d_ff=24)
    weights = Llama(sizes).state_dict()
    del weights["head.weight"]  # it is the embedding
    save_tensors(folder / "model.safetensors", weights)
    write_json(folder / "config.json", {"model": vars(sizes)})
    train.load_start("").tokenizer.save(folder)
    return str(folder)


FLAGS = [
    "--weights",
    tiny_llama(),
    *"--batch-size 4 --steps 2 --dtype float32 --device cpu".split(),
]
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2"]
SAMPLE = ["--sample", "--max-new-tokens", "2"]
RANKS = [["--micro-batch-size", "2"], ["--shard", "--micro-batch-size", "2"]]
REFUSED = [
    (["--beta", "0"], "beta must be more than 0"),
    (["--beta", "nan"], "beta must be"),
    (["--loss", "ppo"], "invalid choice: 'ppo'"),
    (["--flip", "0.5", "--loss", "rdpo"], "flip must be less than 0.5"),
    (["--flip", "0.1"], "flip is for the losses cdpo and rdpo"),
    (["--sft-steps", "-1"], "sft_steps must be at least 0"),
    (["--sft-lr", "0"], "sft_lr must be more than 0"),
    (["--gamma", "-1"], "gamma must be at least 0"),
    (["--max-length", "5"], "the prompts fill the context of 5 tokens"),
    (["--pack", "-1"], "pack must be at least 0"),
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--temperature", "0.5", "--banana"], "--banana"),
]
FOLDER = Path(__file__).resolve().parent.parent


def write_data(folder: Path) -> Path:
    """Ten texts to imitate and twenty pairs of the tales."""
    lines = (FOLDER / "data" / "tales.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = folder / "tales.jsonl"
    file.write_text("".join(lines[:10] + lines[-20:]), encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures, and samples of a few tokens."""
    import figures
    import main

    monkeypatch.setattr(main, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
