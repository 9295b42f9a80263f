"""Write shapes10.npz, the scenes of 10,000 pictures to train on and 2,000 to test on.

    python data/make_shapes.py                        the committed file
    python data/make_shapes.py 0.3 harder.npz         pictures with 30 % chimeras, for --data

Accuracy cannot pass 1 − ambiguity / 2: with 0.3 that is 85 %.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import shapes
from formats import complaining
from options import UserError, command_line
from shapes import S

N_TRAIN, N_TEST = 10_000, 2_000


def one_sided(rgb: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Colours (…, 3) moved to luma ≥ 159 where `light` (…), else to luma ≤ 96."""
    wrong = (shapes.luma(rgb, -1) >= 8 * 128) != light
    rgb = np.where(wrong[..., None], 255 - rgb, rgb)
    return np.where(light[..., None], 255 - (255 - rgb) * 3 // 4, rgb * 3 // 4)


def sample(n: int, ambiguity: float = shapes.AMBIGUITY, seed: int = 0) -> np.ndarray:
    """`n` scenes (n,), of which exactly round(ambiguity · n) are chimeras.

    Of the chimeras exactly half (rounded up) have the earlier of their two classes as the label, so
    the accuracy that the oracle reaches on them is the expected one and no matter of luck.
    """
    dice = np.random.default_rng(seed)
    scenes = np.zeros(n, dtype=shapes.SCENE)
    first = dice.integers(10, size=n)
    other = (first + dice.integers(1, 10, size=n)) % 10
    rank = dice.permutation(n)
    n_chimera = round(ambiguity * n)
    scenes["left"], scenes["right"] = first, np.where(rank < n_chimera, other, first)
    earlier = rank < (n_chimera + 1) // 2
    pair = np.sort([scenes["left"], scenes["right"]], axis=0)
    scenes["label"] = np.where(earlier, *pair)

    scenes["angle"], scenes["size"] = dice.integers(shapes.ANGLES, size=n), dice.integers(6, size=n)
    room = S // 2 - 1 - (shapes.SIZES[0] + scenes["size"].astype(np.int64))  # the border stays free
    scenes["place"] = dice.integers(-room[:, None], room[:, None], size=(n, 2))
    scenes["confetti"][..., :2] = dice.integers(S, size=(n, 3, 2))
    scenes["confetti"][..., 2:] = dice.integers(1, 5, size=(n, 3, 2))

    light = dice.integers(2, size=(n, 1)) == [0, 0, 1, 1, 0, 0, 0]  # the shape's colours alone, or
    colours = one_sided(dice.integers(256, size=(n, 7, 3)), light)  # all the others
    scenes["colours"] = colours[:, :4].reshape(n, 2, 2, 3)
    scenes["confetti_colours"] = colours[:, 4:]
    scenes["pattern"] = dice.integers(8, size=(n, 2))
    scenes["noise"] = dice.integers(2**32, size=n)
    return scenes


def parts(ambiguity: float) -> dict[str, np.ndarray]:
    """Scenes to train on and to test on, sampled apart: each has its exact share of chimeras."""
    return {"train": sample(N_TRAIN, ambiguity, 1), "test": sample(N_TEST, ambiguity, 2)}


def main() -> None:
    words = sys.argv[1:]
    if not words:
        np.savez_compressed(shapes.FILE, **parts(shapes.AMBIGUITY))
        return
    try:
        ambiguity, out = float(words[0]), words[1]
        if not 0 <= ambiguity <= 1:
            raise ValueError
    except (ValueError, IndexError):
        raise UserError("give an ambiguity from 0 to 1 and a file, such as 0.3 x.npz") from None
    arrays = {"classes": np.array(shapes.CLASSES)}
    for name, scenes in parts(ambiguity).items():
        arrays |= {f"x_{name}": shapes.draw(scenes), f"y_{name}": scenes["label"]}
    with complaining(out):
        np.savez_compressed(out, **arrays)


if __name__ == "__main__":
    command_line(main)
