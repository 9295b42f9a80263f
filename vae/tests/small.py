"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

import numpy as np

FLAGS = (
    "--latent 3 --width 8 --batch-size 8 --steps 2 --importance 4 --dtype float32 --device cpu"
).split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2", "--samples", "2"]
SAMPLE = ["--eval", "--importance", "4"]
RANKS = [[], ["--micro-batch-size", "2"]]
REFUSED = [
    (["--micro-batch-size", "-1"], "micro_batch_size must be at least 0"),
    (["--beta", "-1"], "beta must be at least 0"),
    (["--warmup", "1.5"], "warmup must be at most 1"),
    (["--free-bits", "-1"], "free_bits must be at least 0"),
    (["--bound", "iwae", "--free-bits", "1"], "free_bits belongs to bound elbo"),
    (["--bound", "hope"], "invalid choice: 'hope'"),
    (["--samples", "0"], "samples must be at least 1"),
    (["--importance", "0"], "importance must be at least 1"),
    (["--ema", "1"], "ema must be less than 1"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--likelihood", "poisson"], "invalid choice: 'poisson'"),
    (["--n-code", "4"], "n_code needs 2 codes or more, and --net conv"),
    (["--n-code", "1", "--net", "conv"], "n_code needs 2 codes or more"),
    (["--net", "conv", "--patch", "99"], "patch 99 is larger than pictures of"),
    (["--latent", "0"], "latent must be at least 1"),
    (["--width", "1" + "0" * 20], "width must be at most"),
    (["--width", "100000", "--depth", "100000"], "training this needs"),
    (["--image-size", "-1"], "image_size must be at least 0"),
    (["--image-size", "100000"], "image_size must be at most 1024"),
]


def bars(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures (n, 8, 6) of a bright row (0) or column (1) in noise."""
    dice = np.random.default_rng(seed)
    x, y = dice.integers(0, 60, (n, 8, 6)), dice.integers(0, 2, n)
    for picture, label, place in zip(x, y, dice.integers(1, 5, n), strict=True):
        part = picture[place] if label == 0 else picture[:, place]
        part += 190
    return x.astype(np.uint8), y


def write_data(folder: Path) -> Path:
    """A data set that a small network learns."""
    x, y = bars(90)
    np.savez(folder / "bars.npz", x=x, y=y)
    return folder / "bars.npz"


def hurry(monkeypatch) -> None:
    """No pictures."""
    import main

    monkeypatch.setattr(main, "leave_pictures", lambda *_: None)
