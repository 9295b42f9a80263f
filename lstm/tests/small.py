"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

FLAGS = (
    "--d-model 8 --n-layer 2 --d-embed 6 --batch-size 4 --seq-len 20 --steps 2 "
    "--dtype float32 --device cpu"
).split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2", "--dropout", "0.2"]
SAMPLE = ["--sample", "--max-new-tokens", "2"]
RANKS = [["--micro-batch-size", "2"], ["--shard", "--micro-batch-size", "2"]]
REFUSED = [
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--weight-decay", "-1"], "weight_decay must be at least 0"),
    (["--tokenizer", "words"], "invalid choice: 'words'"),
    (["--cell", "transformer"], "invalid choice: 'transformer'"),
    (["--task", "chess"], "invalid choice: 'chess'"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--cell", "gru", "--d-proj", "3"], "are the LSTM's"),
    (["--cell", "rnn", "--chrono", "50"], "chrono needs a cell with gates"),
    (["--chrono", "2"], "3 steps or more"),
    (["--bidirectional"], "would see the next token"),
    (["--tie-embeddings"], "tie_embeddings needs d_embed = 8"),
    (["--dropout", "1"], "dropout must be less than 1"),
    (["--n-layer", "0"], "n_layer must be at least 1"),
    (["--seq-len", "1"], "seq_len must be at least 2"),
    (["--seq-len", "100000"], "--seq-len 100000 needs 100001 or more"),
    (["--batch-size", "100000"], "--batch-size 100000 rows"),
    (["--n-layer", "1000000000"], "training this needs"),
    (["--d-model", "100000000"], "training this needs"),
    (["--n-layer", "1" + "0" * 20], "n_layer must be at"),
    (["--task", "adding"], "--data changes nothing in --task adding"),
    (["--temperature", "0.5", "--banana"], "--banana"),
]
FOLDER = Path(__file__).resolve().parent.parent


def write_data(folder: Path) -> Path:
    """The first 4,000 characters of our notes."""
    text = (FOLDER / "data" / "notes.txt").read_text(encoding="utf-8")
    file = folder / "notes.txt"
    file.write_text(text[:4000], encoding="utf-8")
    return file


def hurry(monkeypatch) -> None:
    """No pictures, and samples of a few tokens."""
    import figures
    import main
    import sample

    usual = sample.SampleConfig
    monkeypatch.setattr(figures, "training_curve", lambda run, folder: folder / "none.png")
    monkeypatch.setattr(main, "leave_pictures", quick(usual))


def quick(config_class):
    """`main.leave_pictures` with a sample of three tokens."""
    import checkpoint
    import sample

    def leave(run_dir, task):
        if task != "lm":
            return
        loaded = checkpoint.load(run_dir.path)
        print(sample.write(loaded, config_class(max_new_tokens=3)))

    return leave
