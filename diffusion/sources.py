"""What to train on: points whose density is known, or pictures that data.py reads.

    digits                                        UCI digits, 8 × 8 grey, ten classes
    moons, spiral, checkerboard, fish             points of the plane, as many as asked for
    shapes-10, a folder, an .npz file, hf:NAME    pictures, see data.py

Bytes become numbers from −1 to 1, since the noise has mean 0, and back without loss.

Key: N rows, C channels, H and W height and width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
import toys
from data import Dataset, Split
from exact import Mixture
from options import UserError

DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
INSIDE = ("digits", "shapes-10", *toys.DRAW)  # names that are no paths
HELD_OUT = 2000  # points to validate, and as many to test


@dataclass(frozen=True)
class Source:
    """Training, validation and test part; mixture: where the rows come from, if that is known."""

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    mixture: Mixture | None = None
    dataset: Dataset | None = None

    @property
    def is_pictures(self) -> bool:
        return self.mixture is None

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.train.images.shape[1:])

    def clean(self, part: Split) -> Mixture:
        """The rows of a part as a distribution of their own: what its exact denoiser is made of."""
        labels = part.labels if len(self.classes) > 1 else None
        return Mixture(to_unit(part.images).double(), 0.0, labels)


def to_unit(images: Tensor) -> Tensor:
    """Bytes 0 … 255 to float32 from −1 to 1; other numbers stay as they are."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images


def to_bytes(x: Tensor) -> Tensor:
    """−1 … 1 to bytes 0 … 255, the reverse of `to_unit` to the byte."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load(name: str, seed: int = 0, image_size: int = 0, cache: Path | None = None) -> Source:
    """The source of this name. UserError as in data.py."""
    if name in toys.DRAW:
        if image_size:
            raise UserError(f"--image-size is for pictures, and {name} is points: leave it out")
        return load_points(name)
    dataset = data.load(str(DIGITS) if name == "digits" else name, seed, image_size, cache)
    parts = (dataset.train, dataset.valid, dataset.test)
    return Source(name, dataset.classes, *parts, dataset=dataset)


def load_points(name: str) -> Source:
    """A toy; its parts are the same whatever the seed."""
    mixture, dice = toys.mixture(name), torch.Generator().manual_seed(0)
    parts = [Split(*mixture.draw(HELD_OUT, dice)) for _ in range(3)]
    classes = tuple(str(i) for i in range(int(mixture.labels.max()) + 1))
    return Source(name, classes, *parts, mixture=mixture)
