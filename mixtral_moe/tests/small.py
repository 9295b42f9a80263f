"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

FLAGS = (
    "--n-layer 1 --n-head 4 --n-kv-head 2 --d-model 32 --d-head 8 --d-ff 16 --n-expert 4 "
    "--seq-len 24 --tokenizer bytes --batch-size 4 --steps 2 --dtype float32 --device cpu"
).split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2"]
SAMPLE = ["--sample", "--max-new-tokens", "2"]
RANKS = [
    ["--micro-batch-size", "2"],
    ["--shard", "--micro-batch-size", "2"],
]
REFUSED = [
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--weight-decay", "-1"], "weight_decay must be at least 0"),
    (["--tokenizer", "words"], "invalid choice: 'words'"),
    (["--balance", "hope"], "invalid choice: 'hope'"),
    (["--jitter", "1"], "jitter must be less than 1"),
    (["--capacity", "0"], "capacity must be more than 0"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--n-head", "4", "--n-kv-head", "3"], "n_kv_head 3 does not divide n_head 4"),
    (["--n-expert", "2", "--n-active", "3"], "n_active 3 is more than n_expert 2"),
    (["--n-expert", "0"], "n_expert must be at least 1"),
    (["--window", "-1"], "window must be at least 0"),
    (["--d-head", "7"], "d_head 7 is odd"),
    (["--n-layer", "0"], "n_layer must be at least 1"),
    (["--seq-len", "0"], "seq_len must be at least 1"),
    (["--seq-len", "100000"], "--seq-len 100000 needs 100001 or more"),
    (["--n-layer", "1000000000"], "training this needs"),
    (["--n-expert", "1000000000"], "training this needs"),
    (["--d-model", "100000000"], "training this needs"),
    (["--n-layer", "1" + "0" * 20], "n_layer must be at"),
    (["--tokenizer", "sentencepiece", "--vocab-size", "50"], "--vocab-size 50"),
    (["--temperature", "0.5", "--banana"], "--banana"),
]
FOLDER = Path(__file__).resolve().parent.parent


def write_data(folder: Path) -> Path:
    """The first 40 of our texts, with the separators between them."""
    text = (FOLDER / "data" / "dialects.txt").read_text(encoding="utf-8")
    separator = "<|endoftext|>\n"
    file = folder / "dialects.txt"
    file.write_text(separator.join(text.split(separator)[:40]) + separator, encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures."""
    import figures

    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
