"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

FLAGS = (
    "--n-layer 2 --n-head 2 --d-model 32 --q-rank 12 --kv-rank 8 --d-nope 6 --d-rope 4 --d-value 6 "
    "--d-ff 16 --d-expert 8 --n-expert 4 --n-active 2 --seq-len 24 --tokenizer bytes "
    "--batch-size 4 --steps 2 --dtype float32 --device cpu"
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
    (["--bias-speed", "-1"], "bias_speed must be at least 0"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--n-expert", "4", "--n-group", "3"], "n_expert 4 cannot be n_group 3 equal groups"),
    (["--n-group", "2", "--n-active-group", "3"], "n_active_group 3 are chosen from"),
    (["--n-expert", "2", "--n-active", "3"], "n_active 3 is more than n_expert"),
    (["--n-expert", "0"], "n_expert must be at least 1"),
    (["--kv-rank", "0"], "kv_rank must be at least 1"),
    (["--d-rope", "7"], "d_rope 7 is odd"),
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
    text = (FOLDER / "data" / "recall.txt").read_text(encoding="utf-8")
    separator = "<|endoftext|>\n"
    file = folder / "recall.txt"
    file.write_text(separator.join(text.split(separator)[:40]) + separator, encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures."""
    import figures

    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
