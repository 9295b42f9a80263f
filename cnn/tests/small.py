"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

import numpy as np

FLAGS = "--width 4 --batch-size 8 --steps 2 --dtype float32 --device cpu".split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2", "--cutout", "2"]
SAMPLE = ["--eval"]
RANKS = [[]]
REFUSED = [
    (["--micro-batch-size", "2"], "batch normalisation looks at the whole batch"),
    (["--weight-decay", "-1"], "weight_decay must be at least 0"),
    (["--weight-decay", "1e308"], "weight_decay must be at most"),  # more than float32 holds
    (["--lr", "1e308"], "lr must be at most"),
    (["--batch-size", "1"], "batch_size must be at least 2"),  # of one there is no variance
    (["--momentum", "1"], "momentum must be less than 1"),
    (["--label-smoothing", "1"], "label_smoothing must be less than 1"),
    (["--ema", "-0.1"], "ema must be at least 0"),
    (["--shift", "-2"], "shift must be at least -1"),
    (["--shift", "8"], "--shift 8 is too far for pictures of 8 pixels"),
    (["--optimizer", "adam"], "invalid choice: 'adam'"),
    (["--flip", "maybe"], "invalid choice: 'maybe'"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--net", "resnet", "--depth", "21"], "depth 21: 3 stages need"),
    (["--net", "lenet"], "pictures of 8 × 8 are too small for the net lenet"),
    (["--width", "0"], "width must be at least 1"),
    (["--width", "100000"], "training this needs"),
    (["--width", "1" + "0" * 20], "width must be at most"),
    (["--depth", "1" + "0" * 400], "depth must be at most"),
    (["--image-size", "-1"], "image_size must be at least 0"),
    (["--image-size", "100000"], "image_size must be at most 1024"),
    (["--image-size", "4"], "pictures of 4 × 4 are too small for the net fast"),
]


def bars(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Colour pictures (n, 8, 8, 3) of a bright row (0), column (1) or corner (2) in noise."""
    dice = np.random.default_rng(seed)
    x, y = dice.integers(0, 60, (n, 8, 8, 3)), dice.integers(0, 3, n)
    for picture, label, place in zip(x, y, dice.integers(1, 7, n), strict=True):
        part = [picture[place], picture[:, place], picture[:4, :4]][label]
        part += 150
    return x.astype(np.uint8), y


def write_data(folder: Path) -> Path:
    """A data set of three classes that a small network learns."""
    x, y = bars(90)
    np.savez(folder / "bars.npz", x=x, y=y)
    return folder / "bars.npz"


def hurry(monkeypatch) -> None:
    """No pictures."""
    import main

    monkeypatch.setattr(main, "leave_pictures", lambda *_: None)
