"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

FLAGS = (
    "--n-layer 1 --n-head 4 --d-model 32 --d-ff 48 --vocab-size 450 --batch-size 300 --steps 2 "
    "--warmup 4 --average 2 --average-every 2 --dtype float32 --device cpu"
).split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2"]
SAMPLE = ["--translate", "The dog sleeps.", "--beam", "2", "--max-new-tokens", "3"]
RANKS = [["--micro-batch-size", "2"]]  # --shard does not average: see test_main.py
REFUSED = [
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--smoothing", "1"], "smoothing must be less than 1"),
    (["--dropout", "1"], "dropout 1.0"),
    (["--norm", "both"], "invalid choice: 'both'"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--n-head", "5"], "n_head 5 does not divide d_model 32"),
    (["--d-model", "33", "--n-head", "3"], "d_model 33 is odd"),
    (["--n-layer", "0"], "n_layer must be at least 1"),
    (["--seq-len", "3"], "--seq-len 3 is too short"),
    (["--n-layer", "1000000000"], "training this needs"),
    (["--d-model", "100000000"], "training this needs"),
    (["--n-layer", "1" + "0" * 20], "n_layer must be at"),
    (["--vocab-size", "50"], "--vocab-size 50"),
    (["--vocab-size", "60000"], "--vocab-size 60000"),
    (["--beam", "4"], "--beam changes nothing in --train"),
    (["--banana"], "--banana"),
]
FOLDER = Path(__file__).resolve().parent.parent


def write_data(folder: Path) -> Path:
    """The first 60 pairs of our grammar's training part."""
    lines = (FOLDER / "data" / "train.tsv").read_text(encoding="utf-8").splitlines()
    file = folder / "pairs.tsv"
    file.write_text("\n".join(lines[:60]) + "\n", encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures, and short translations with a narrow beam at the end of a run."""
    import decode
    import figures
    import train

    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
    usual = train.translation_scores

    def quick(loaded, pairs, search):
        return usual(loaded, pairs, decode.Search(beam=1, max_new_tokens=2))

    monkeypatch.setattr(train, "translation_scores", quick)
