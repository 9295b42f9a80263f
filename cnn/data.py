"""Pictures and labels from a source: read, check, split.

    source                                  its test part
    none, or shapes-10                      2,000 pictures; the best possible accuracy is known
    folder with train-images-idx3-ubyte     t10k-images-…: MNIST and its relatives, .gz or not
    folder with data_batch_1.bin            test_batch.bin: CIFAR-10, "binary version"
    folder of class folders of pictures     test/CLASS/ if the others are in train/CLASS/
    file.npz with x and y                   x_test and y_test, if there
    hf:OWNER/NAME, or hf:FOLDER             the split test, if there

Where a source has no test part, a tenth is held out, the same one whatever the seed: no run ever
trains on it. The validation part is taken from the rest and depends on the seed. Choices are made
on it and never on the test part.

Key: N pictures, C channels (1 grey, 3 colour), H and W their size.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import formats
import shapes
from run import UserError

MOST_CLASSES = 10_000
HELD_OUT = 0.1
MOST_VALID = 5_000  # as in §4.2 of He et al. 2015 (arXiv:1512.03385)


@dataclass(frozen=True)
class Split:
    """images (N, C, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows) -> "Split":
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True)
class Dataset:
    """The three parts of a source. ceiling: the best accuracy to be expected, where it is known."""

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    ceiling: float | None = None

    @property
    def mean(self) -> list[float]:
        """Of each channel over the training part, on the 0 … 1 scale."""
        return self._moments[0]

    @property
    def std(self) -> list[float]:
        """As `mean`; 1 for a channel that never changes."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[list[float], list[float]]:
        level = torch.arange(256).double() / 255
        moments = []
        for channel in self.train.images.unbind(1):  # exact: a sum over the 256 levels
            share = sum(torch.bincount(x.flatten(), minlength=256) for x in channel.split(4096))
            share = share / share.sum(dtype=torch.float64)
            mean = (share * level).sum()
            moments.append((mean.item(), (share * (level - mean) ** 2).sum().sqrt().item() or 1.0))
        mean, std = zip(*moments, strict=True)
        return list(mean), list(std)


class Source(NamedTuple):
    """What stands in a source, in its order; test is None where there is no such part."""

    classes: tuple[str, ...]
    train: Split
    test: Split | None


def load(source: str | None = None, seed: int = 0) -> Dataset:
    """Read a source (see the top of this file) and split it; `seed` chooses the validation part.

    Raises UserError for what is missing, damaged, too large, or does not fit together.
    """
    classes, train, test = read(source)
    if len(train) < 3:
        raise UserError(f"--data {source} has {len(train)} pictures: three parts need more")
    if test is None:
        test, train = hold_out(train, round(len(train) * HELD_OUT), seed=0)
    valid, train = hold_out(train, min(round(len(train) * HELD_OUT), MOST_VALID), seed)
    ours = source in (None, "shapes-10")
    ceiling = 1 - shapes.AMBIGUITY / 2 if ours else None
    return Dataset("shapes-10" if ours else source, classes, train, valid, test, ceiling)


def hold_out(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """`n` pictures (at least one) drawn at random, and the others."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split[order[: max(n, 1)]], split[order[max(n, 1) :]]


def read(source: str | None = None) -> Source:
    """The parts of a source as they stand there. UserError as in `load`."""
    source = source or "shapes-10"
    path = Path(source)
    with formats.complaining(f"--data {source}"):
        if source == "shapes-10":
            found = shapes.load()
        elif source.startswith("hf:"):
            found = formats.read_hub(source.removeprefix("hf:"))
        elif path.is_dir():
            found = formats.read_folder(path)
        elif path.is_file() and path.suffix == ".npz":
            found = formats.read_npz(path)
        else:
            what = "no .npz file and no folder" if path.exists() else "no such file or folder"
            raise ValueError(f"{what}; `python main.py` says what is read")
        return checked(*found)


# checks: ValueError says what is wrong, `read` says where


def checked(classes: tuple[str, ...] | None, train: tuple, test: tuple | None = None) -> Source:
    """Arrays as a Source, if all of them fit together. Without `classes` they are numbers."""
    parts = []
    for x, y in filter(None, (train, test)):
        if len(x) != len(y):
            raise ValueError(f"{len(x)} pictures but {len(y)} labels")
        parts.append(Split(torch.from_numpy(as_pictures(x)), torch.from_numpy(as_labels(y))))
    sizes = [tuple(part.images.shape[1:]) for part in parts]
    if sizes[0] != sizes[-1]:
        raise ValueError(f"pictures (C, H, W) to train on {sizes[0]}, to test on {sizes[1]}")
    classes = classes or tuple(map(str, range(int(parts[0].labels.max()) + 1)))
    highest = max(int(part.labels.max()) for part in parts)
    if highest >= len(classes) or len(classes) < 2:
        raise ValueError(f"label {highest} is out of range: there are {len(classes)} classes")
    return Source(classes, parts[0], parts[1] if len(parts) > 1 else None)


def as_pictures(x: np.ndarray) -> np.ndarray:
    """(N, H, W), (N, H, W, C) or (N, C, H, W) of any number type as (N, C, H, W) uint8.

    Floats are taken to be on the 0 … 1 scale, unless some are larger.
    """
    first, last = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (1, 3))
    if not (x.ndim == 3 or first or last) or not x.size:
        raise ValueError(
            f"pictures {x.shape}; (N, H, W) or (N, H, W, C) with 1 or 3 channels needed"
        )
    if first and last:
        raise ValueError(f"pictures {x.shape}: either axis could be the channels")
    x = x[:, None] if x.ndim == 3 else x if first else x.transpose(0, 3, 1, 2)
    if max(x.shape[2:]) > formats.LONGEST:
        raise ValueError(f"pictures of {x.shape[2:]} pixels; the limit is {formats.LONGEST} a side")
    if x.dtype.kind not in "buif":
        raise ValueError(f"pixels are {x.dtype}, not numbers")
    low, high = float(x.min()), float(x.max())
    if not 0 <= low <= high <= 255:  # false for NaN too
        raise ValueError(f"pixels are {x.dtype} from {low:g} to {high:g}, not 0 … 255 or 0 … 1")
    if x.dtype.kind in "bf" and high <= 1:
        x = x * np.float32(255)
    return np.ascontiguousarray(np.rint(x) if x.dtype.kind == "f" else x, dtype=np.uint8)


def as_labels(y: np.ndarray) -> np.ndarray:
    """(N,) or (N, 1) integers as (N,) int64."""
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "ui":
        raise ValueError(f"labels are {y.dtype} {y.shape}, not integers (N,)")
    if y.min() < 0 or y.max() >= MOST_CLASSES:
        raise ValueError(f"labels from {y.min()} to {y.max()} are out of range: count from 0")
    return y.astype(np.int64)


def read_picture(path: str | Path, channels: int, size: tuple[int, int]) -> Tensor:
    """One picture of any size and kind as a network wants it: (1, C, H, W) uint8.

    size: (H, W); other sizes are scaled to it, whatever their proportions. UserError if `path`
    holds no picture.
    """
    if channels not in (1, 3):
        raise UserError(f"{path}: the network takes {channels} channels, a picture has 1 or 3")
    picture = formats.open_picture(path).convert("L" if channels == 1 else "RGB")
    if picture.size != size[::-1]:
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    array = np.array(picture).reshape(1, *size, channels)
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
