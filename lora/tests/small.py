"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

FLAGS = "--rank 2 --alpha 6 --batch-size 4 --steps 2 --dtype float32 --device cpu".split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2"]
SAMPLE = ["--sample", "--max-new-tokens", "2"]
RANKS = [["--micro-batch-size", "2"], ["--shard", "--micro-batch-size", "2"]]
REFUSED = [
    (["--rank", "0"], "rank must be at least 1"),
    (["--rank", "65"], "rank 65 is more than a matrix here can have: 64"),
    (["--rank", "1" + "0" * 20], "rank must be at"),
    (["--alpha", "0"], "alpha must be more than 0"),
    (["--alpha", "nan"], "alpha must be"),
    (["--dropout", "1"], "dropout must be at least 0"),
    (["--targets", "banana"], "no layer that can be adapted matches 'banana'"),
    (["--targets", "("], "is no regular expression"),
    (["--targets", "head"], "shares its weight with another layer"),
    (["--dora", "--pissa"], "do not go together"),
    (["--lr-ratio", "0"], "lr_ratio must be more than 0"),
    (["--full"], "leave out what is said of the adapter"),
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--temperature", "0.5", "--banana"], "--banana"),
]
FOLDER = Path(__file__).resolve().parent.parent


def write_data(folder: Path) -> Path:
    """The first 40 pieces of news."""
    lines = (FOLDER / "data" / "news.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    file = folder / "news.jsonl"
    file.write_text("".join(lines[:40]), encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures, and samples of a few tokens."""
    import figures
    import main

    monkeypatch.setattr(main, "SAMPLE_TOKENS", 3)
    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
