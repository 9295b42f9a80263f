"""Pictures and labels from a source: read, check, split.

    source                                  its test part
    none, or shapes-10                      2,000 pictures; the best possible accuracy is known
    folder with train-images-idx3-ubyte     t10k-images-…: MNIST and its relatives, .gz or not
    folder with data_batch_1.bin            test_batch.bin: CIFAR-10, "binary version"
    folder of class folders of pictures     test/CLASS/ if the others are in train/CLASS/
    file.npz with x and y                   x_test and y_test, if there
    hf:OWNER/NAME, or hf:FOLDER             the split test, if there

Where a source has no test part, a tenth is held out, the same one whatever the seed: no run ever
trains on it. Choices are made on the validation part and never on the test part. It is val/CLASS/,
x_valid and y_valid or the split validation; without those a tenth of the rest, which then depends
on the seed.

Pictures are read once: `Dataset.save` keeps the decoded parts of a folder of pictures or of a set
of the Hub in one file, and `load(…, cache=file)` takes them from there as long as the source is
unchanged.

Key: N pictures, C channels (1 grey, 3 colour), H and W their size.
"""

import functools
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import formats
import shapes
from options import UserError

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
    notes: str = ""  # what was done to the pictures, in words
    stamp: str = ""  # what `load` compares a cache with; none if the source is quick to read

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

    def save(self, file) -> None:
        """Write the parts to an open file, an .npz that `load` knows as a cache."""
        arrays = {"classes": np.array(self.classes), "stamp": np.array([self.stamp])}
        for name in ("train", "test", "valid"):
            part = getattr(self, name)
            arrays |= {f"x_{name}": part.images.numpy(), f"y_{name}": part.labels.numpy()}
        np.savez(file, **arrays)


class Source(NamedTuple):
    """What stands in a source, in its order; None for a part that is not there."""

    classes: tuple[str, ...]
    train: Split
    test: Split | None
    valid: Split | None
    notes: str = ""


def load(
    source: str | None = None, seed: int = 0, image_size: int = 0, cache: Path | None = None
) -> Dataset:
    """Read a source (see the top of this file) and split it; `seed` chooses the validation part.

    image_size: scale and crop all pictures to this many pixels a side; 0 takes them as they are.
    cache: a file that `Dataset.save` wrote. It is taken instead if it is of the same source.

    Raises UserError for what is missing, damaged, too large, or does not fit together.
    """
    name = source or "shapes-10"
    with formats.complaining(f"--data {name}"):
        stamp = formats.stamp(name)
        stamp = f"{stamp} seed {seed} size {image_size}" if stamp else ""
    cached = read_cache(cache, stamp)
    classes, train, test, valid, notes = cached or read(name, image_size)
    if len(train) < 3 and not cached:
        raise UserError(f"--data {name} has {len(train)} pictures: three parts need more")
    if test is None:
        test, train = hold_out(train, round(len(train) * HELD_OUT), seed=0)
    if valid is None:
        valid, train = hold_out(train, min(round(len(train) * HELD_OUT), MOST_VALID), seed)
    ceiling = 1 - shapes.AMBIGUITY / 2 if name == "shapes-10" else None
    parts = {"train": train, "valid": valid, "test": test}
    return Dataset(name, classes, **parts, ceiling=ceiling, notes=notes, stamp=stamp)


def read_cache(file: Path | None, stamp: str) -> Source | None:
    """What `Dataset.save` wrote to `file`; None if it is not there, not whole or of other data."""
    if file is None or not stamp or not file.is_file():
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            if formats.read_npy(archive, "stamp").tolist() != [stamp]:
                return None
        return checked(formats.read_npz(file))
    except Exception:  # whatever is wrong with it: the pictures themselves are still there
        return None


def hold_out(split: Split, n: int, seed: int) -> tuple[Split, Split]:
    """`n` pictures (at least one) drawn at random, and the others."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    return split[order[: max(n, 1)]], split[order[max(n, 1) :]]


def read(source: str = "shapes-10", image_size: int = 0) -> Source:
    """The parts of a source as they stand there. UserError as in `load`."""
    path = Path(source)
    with formats.complaining(f"--data {source}"):
        if source == "shapes-10":
            found = formats.Found(*shapes.load())
        elif source.startswith("hf:"):
            found = formats.read_hub(source.removeprefix("hf:"), image_size)
        elif path.is_dir():
            found = formats.read_folder(path, image_size)
        elif path.is_file() and path.suffix == ".npz":
            found = formats.read_npz(path)
        else:
            what = "no .npz file and no folder" if path.exists() else "no such file or folder"
            raise ValueError(f"{what}; `python main.py` says what is read")
        return checked(found, image_size)


# checks: ValueError says what is wrong, `read` says where


def checked(found: formats.Found, image_size: int = 0) -> Source:
    """Arrays as a Source, if all of them fit together. Without names the classes are numbers."""
    parts = {}
    for name in ("train", "test", "valid"):
        arrays = getattr(found, name)
        parts[name] = as_split(*arrays, image_size) if arrays else None
    there = {name: part for name, part in parts.items() if part is not None}
    size = tuple(parts["train"].images.shape[1:])
    for name, part in there.items():
        other = tuple(part.images.shape[1:])
        if other != size:
            raise ValueError(f"pictures (C, H, W) to train on {size}, to {name} on {other}")
    classes = found.classes or tuple(map(str, range(int(parts["train"].labels.max()) + 1)))
    highest = max(int(part.labels.max()) for part in there.values())
    if highest >= len(classes) or len(classes) < 2:
        raise ValueError(f"label {highest} is out of range: there are {len(classes)} classes")
    return Source(classes, **parts, notes=found.notes)


def as_split(x: np.ndarray, y: np.ndarray, image_size: int) -> Split:
    """Pictures and labels as tensors, the pictures scaled to image_size × image_size unless 0."""
    if len(x) != len(y):
        raise ValueError(f"{len(x)} pictures but {len(y)} labels")
    pictures, labels = as_pictures(x), as_labels(y)
    if image_size and pictures.shape[2:] != (image_size, image_size):
        pictures = formats.resized(pictures, image_size)
    return Split(torch.from_numpy(pictures), torch.from_numpy(labels))


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

    size: (H, W); other sizes are scaled and cropped in the middle. UserError if `path` holds no
    picture.
    """
    if channels not in (1, 3):
        raise UserError(f"{path}: the network takes {channels} channels, a picture has 1 or 3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd meta data
        array, _ = formats.read_picture(Path(path), str(path), size)
    picture = Image.fromarray(array).convert("L" if channels == 1 else "RGB")
    array = np.array(picture).reshape(1, *size, channels)
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
