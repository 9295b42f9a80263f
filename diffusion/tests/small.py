"""What the harness has to know of this folder: a run that takes a moment, and its data."""

from pathlib import Path

import numpy as np

FLAGS = "--widths 8,8 --d-head 8 --batch-size 8 --steps 2 --dtype float32 --device cpu".split()
MANY = ["--steps", "12", "--eval-every", "3", "--checkpoint-every", "2", "--dropout", "0.1"]
SAMPLE = ["--sample", "--num-samples", "3", "--sample-steps", "2"]
RANKS = [[], ["--micro-batch-size", "3"]]
REFUSED = [
    (["--widths", "8,x"], "widths must be up to 16 whole numbers"),
    (["--widths", "7,8"], "each must be a multiple of n_group"),
    (["--widths", "8,8,8,8,8"], "halves them 4 times, so both sides must be multiples of 16"),
    (["--widths", "8,65536000"], "at most 65536"),
    (["--widths", "8,12"], "each must be a multiple of n_group"),
    (["--attention", "5"], "there are resolutions 0 to 1"),
    (["--d-head", "5"], "must be multiples of d_head, 5"),
    (["--n-block", "0"], "n_block must be at least 1"),
    (["--image-size", "9"], "both sides must be multiples of 2: --image-size"),
    (["--widths", "16,16,16,16,16,16,16,16,16,16,16,16,16,16,16,16,16"], "up to 16 whole"),
    (["--size", "dit", "--patch", "3"], "are not made of whole patches of 3 pixels"),
    (["--size", "dit", "--d-model", "50", "--d-head", "25"], "d_model 50 must be a multiple of 4"),
    (["--size", "huge"], "invalid choice: 'huge'"),
    (["--schedule", "zero-snr", "--target", "eps"], "take v or x0"),
    (["--schedule", "flow", "--target", "eps"], "target eps does not go with the schedule flow"),
    (["--target", "flow"], "target flow does not go with the schedule cosine"),
    (["--timesteps", "1"], "timesteps must be at least 2"),
    (["--drop-label", "1.5"], "drop_label must be at most 1"),
    (["--min-snr", "-1"], "min_snr must be at least 0"),
    (["--dropout", "1"], "dropout must be less than 1"),
    (["--n-block", "1" + "0" * 20], "n_block must be at"),
    (["--widths", "65536,65536", "--n-group", "65536", "--d-head", "65536"], "training this needs"),
    (["--data", "spiral", "--image-size", "8"], "spiral is points"),
    (["--data", "spiral"], "multiples of 2"),
]


def bars(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures (n, 8, 8) of a bright row (0), column (1) or corner (2) in noise."""
    dice = np.random.default_rng(seed)
    x, y = dice.integers(0, 60, (n, 8, 8)), dice.integers(0, 3, n)
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
    """No classifier, samples or pictures at the end."""
    import main

    monkeypatch.setattr(main, "judge_and_draw", lambda *_: {})
