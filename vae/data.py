"""Pictures from a source: read, check, split, and make them what a likelihood takes.

    source                                  its test part
    none, or digits                         1,797 handwritten digits of 8 × 8, in data/digits.npz
    sprites                                 1,200 drawn pictures of which all factors are known
    folder with train-images-idx3-ubyte     t10k-images-…: MNIST and its relatives, .gz or not
    folder with data_batch_1.bin            test_batch.bin: CIFAR-10, "binary version"
    folder of folders of pictures           test/NAME/ if the others are in train/NAME/
    file.npz with x and y                   x_test and y_test, if there
    hf:OWNER/NAME, or hf:FOLDER             the split test, if there

Where a source has no test part, a tenth is held out, the same one whatever the seed: no run ever
trains on it. Choices are made on the validation part and never on the test part. It is val/NAME/,
x_valid and y_valid or the split validation; without those a tenth of the rest, which then depends
on the seed. Labels are only there to colour pictures; one label for all is fine.

Black and white: a byte b is turned into 1 with probability b / 255, anew at each visit of a picture
in training, and once and for all in the validation and test parts (1509.00519, §5).

Key: N pictures, C channels (1 grey, 3 colour), H and W their size.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import formats
import sprites
from options import UserError

DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
INSIDE = ("digits", "sprites")  # names of data that comes with the folder
MOST_CLASSES = 10_000
HELD_OUT = 0.1
MOST_VALID = 2_000  # enough to choose weights by
FIXED = 20_151  # the dice that binarise validation and test parts, whatever the seed of a run


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
    """The three parts of a source."""

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    test: Split
    notes: str = ""  # what was done to the pictures, in words
    stamp: str = ""  # what `load` compares a cache with; none if the source is quick to read

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return tuple(self.train.images.shape[1:])

    @property
    def mean(self) -> Tensor:
        """The mean training picture (C, H, W), each pixel between 0 and 1 and never quite there."""
        images = self.train.images
        total = sum(part.double().sum(0) for part in images.split(4096)) / 255
        return ((total + 0.5) / (len(images) + 1)).float()

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
    name = source or "digits"
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
    return Dataset(name, classes, train, valid, test, notes, stamp)


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


def read(source: str = "digits", image_size: int = 0) -> Source:
    """The parts of a source as they stand there. UserError as in `load`."""
    path = DIGITS if source == "digits" else Path(source)
    with formats.complaining(f"--data {source}"):
        if source == "sprites":
            found = formats.Found(*sprites.load()[:2])
        elif source.startswith("hf:"):
            found = formats.read_hub(source.removeprefix("hf:"), image_size)
        elif path.is_dir():
            found = formats.read_folder(path, image_size)
        elif path.is_file() and path.suffix == ".npz":
            found = formats.read_npz(path)
        else:
            what = "no .npz file and no folder" if path.exists() else "no such file or folder"
            raise ValueError(f"{what}; the README says what is read")
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
    if highest >= len(classes):
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


# ── What a likelihood takes ───────────────────────────────────────────────────────────────────────


def as_x(images: Tensor, likelihood: str, dice: np.random.Generator) -> Tensor:
    """Bytes (N, C, H, W) as the x of a likelihood, see `model.Pixels`. `dice` are thrown in order.

    bernoulli: 1 with probability byte / 255, else 0. gaussian: (byte + u) / 256 with u uniform in
    0 … 1. logistic: byte / 255, no dice.
    """
    if likelihood == "logistic":
        return images.float() / 255
    u = torch.from_numpy(dice.random(images.shape, dtype=np.float32)).to(images.device)
    return (u * 255 < images).float() if likelihood == "bernoulli" else (images + u) / 256


def fixed(images: Tensor, likelihood: str, rows: int = 1000) -> Iterator[Tensor]:
    """The pictures of a validation or test part, some at a time, always with the same dice."""
    dice = np.random.default_rng(FIXED)
    for part in images.split(rows):
        yield as_x(part, likelihood, dice)


def floor(images: Tensor) -> float:
    """Nats a picture that no model can go below: the entropy of the binarising dice alone.

    Who knew the grey picture itself would still have to guess each dice: Σ h(byte / 255), where
    h(p) = −p ln p − (1 − p) ln(1 − p). What the grey pictures are like comes on top.
    """
    p = torch.arange(256, dtype=torch.float64) / 255
    h = torch.special.entr(p) + torch.special.entr(1 - p)
    return sum(h[part.long()].sum().item() for part in images.split(1000)) / len(images)


def alone(train_mean: Tensor, images: Tensor) -> float:
    """Nats a picture of a model in which each pixel is a coin of its own, with its mean's odds."""
    m = train_mean.double()
    p = sum(part.double().sum(0) for part in images.split(4096)) / 255 / len(images)
    return -(p * m.log() + (1 - p) * (1 - m).log()).sum().item()
