"""The formats that pictures and labels come in, read without trust.

A size that a file declares is checked before memory is taken, and nothing is ever unpickled: a
pickle can run any code. Whatever is wrong ends as a UserError of one line that names the file.

Each reader returns what it found as arrays, in their order: the names of the classes (None: they
are numbers), pictures and labels to train on, and the same to test on (None: there are none).
Pictures are (N, H, W), (N, H, W, C) or (N, C, H, W); whether all fits together is for data.py.

Left out: pictures of different sizes in one source, transparency, further frames.

Key: N pictures, C channels (1 grey, 3 colour), H and W their size.
"""

import contextlib
import gzip
import math
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from run import UserError

LIMIT = 2 << 30  # bytes of pictures
LONGEST = 4096  # pixels along a side
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # none that starts a program
CIFAR = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

Arrays = tuple[np.ndarray, np.ndarray]


class Found(NamedTuple):
    """What stood in a source."""

    classes: tuple[str, ...] | None
    train: Arrays
    test: Arrays | None = None


@contextlib.contextmanager
def complaining(where: str | Path):
    """Whatever goes wrong in here, in any library, becomes one line that begins with `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where}: {reason}") from None


def read_exactly(stream, n: int) -> bytearray:
    """The `n` bytes that `stream` holds; ValueError if it holds others or they are too many."""
    if n > LIMIT:
        raise ValueError(f"it declares {n:,} bytes; the limit is {LIMIT:,}")
    raw = bytearray()
    while len(raw) <= n and (piece := stream.read(min(1 << 20, n + 1 - len(raw)))):
        raw += piece
    if len(raw) != n:
        what = "more" if len(raw) > n else f"{len(raw):,}"
        raise ValueError(f"damaged: it declares {n:,} bytes and holds {what}")
    return raw


def read_folder(folder: Path) -> Found:
    """Look what lies in `folder`, and read it."""
    if idx_file(folder, "train-images"):
        return read_mnist(folder)
    if list(folder.glob("data_batch_*.bin")):
        return read_cifar(folder)
    if (folder / "data_batch_1").exists():
        raise ValueError(
            "this is CIFAR-10 as Python pickles, and a pickle can run any code when it is read: "
            "take the binary version, cifar-10-binary.tar.gz with data_batch_1.bin"
        )
    return read_class_folders(folder)


# idx and CIFAR


def idx_file(folder: Path, stem: str) -> Path | None:
    """The file `stem`-idx… or `stem`.idx… in `folder`, if there is one."""
    return next(iter(sorted(folder.glob(f"{stem}[-.]idx*"))), None)


def read_mnist(folder: Path) -> Found:
    """The four idx files of MNIST (LeCun et al. 1998) and of the sets that copy its format."""
    arrays = []
    for part in ("train", "t10k"):
        for kind, rank in (("images", 3), ("labels", 1)):
            file = idx_file(folder, f"{part}-{kind}")
            if file is None:
                raise ValueError(f"there is no {part}-{kind}-idx{rank}-ubyte beside the others")
            with complaining(file):
                arrays.append(read_idx(file, rank))
    return Found(None, tuple(arrays[:2]), tuple(arrays[2:]))


def read_idx(file: Path, rank: int) -> np.ndarray:
    """The array in an idx file: 0, 0, 8, rank, the sizes (4 bytes each, big-endian), bytes."""
    with open(file, "rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        stream = gzip.GzipFile(fileobj=plain) if packed else plain
        head = stream.read(4)
        if head != bytes((0, 0, 8, rank)):
            raise ValueError(f"no idx file: it begins with {head.hex(' ')}, not 00 00 08 {rank:02}")
        sizes = stream.read(4 * rank)
        if len(sizes) < 4 * rank:
            raise ValueError("damaged: it ends within its header")
        shape = [int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * rank, 4)]
        return np.frombuffer(read_exactly(stream, math.prod(shape)), np.uint8).reshape(shape)


def read_cifar(folder: Path) -> Found:
    """CIFAR-10, binary version (cs.toronto.edu/~kriz/cifar.html): records of a label, R, G, B."""
    parts = []
    for pattern in ("data_batch_*.bin", "test_batch.bin"):
        raw = bytearray()
        for file in sorted(folder.glob(pattern)):
            with complaining(file), open(file, "rb") as stream:
                size = file.stat().st_size
                if size == 0 or size % 3073:
                    raise ValueError(f"{size:,} bytes are no whole number of records of 3,073")
                raw += read_exactly(stream, size)
        if not raw:
            raise ValueError(f"there is no {pattern} beside the others")
        records = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        parts.append((records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]))
    return Found(CIFAR, *parts)


# npz


def read_npz(file: Path) -> Found:
    """x and y (or x_train and y_train), x_test and y_test, and the names `classes`, if there."""
    with zipfile.ZipFile(file) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist()}
        train, test = ("x", "y") if "x" in there else ("x_train", "y_train"), ("x_test", "y_test")
        if not there.issuperset(train):
            raise ValueError(
                f"x and y are needed, it holds {', '.join(sorted(there)) or 'nothing'}"
            )
        classes = read_npy(archive, "classes").tolist() if "classes" in there else None
        if classes is not None and not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are no strings")
        parts = [train, test] if there.issuperset(test) else [train]
        arrays = [tuple(read_npy(archive, name) for name in part) for part in parts]
    return Found(classes and tuple(classes), *arrays)


def read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array of an .npz. Its header is checked first: numpy would take the memory at once."""
    with archive.open(f"{name}.npy") as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} is in a version of the format that no array of numbers needs")
        shape, columns_first, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled Python objects, which can run any code")
        if min(shape, default=1) < 0:
            raise ValueError(f"damaged: {name} has the shape {shape}")
        raw = read_exactly(stream, math.prod(shape) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if columns_first else "C")


# pictures


def read_class_folders(folder: Path) -> Found:
    """folder/CLASS/picture, or folder/train/CLASS/picture and folder/test/CLASS/picture."""
    has_parts = bool(inner_folders(folder / "train"))
    root = folder / "train" if has_parts else folder
    classes = tuple(inner.name for inner in inner_folders(root))
    if not classes:
        raise ValueError(
            "neither train-images-idx3-ubyte, data_batch_1.bin nor class folders in it"
        )
    has_test = has_parts and (folder / "test").is_dir()
    test = gather(labelled(folder / "test", classes)) if has_test else None
    return Found(classes, gather(labelled(root, classes)), test)


def inner_folders(folder: Path) -> list[Path]:
    """The folders in `folder` in the order of their names, without the hidden ones."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def labelled(root: Path, classes: tuple[str, ...]) -> Iterator[tuple[Path, Image.Image, int]]:
    """The pictures below `root`: where they are, they themselves, the place of their class."""
    for inner in inner_folders(root):
        if inner.name not in classes:
            raise ValueError(f"{inner} has no class of that name to train on")
        files = sorted(file for file in inner.iterdir() if not file.name.startswith("."))
        if not files:
            raise ValueError(f"the class folder {inner} is empty: fill it or remove it")
        for file in files:
            yield file, open_picture(file), classes.index(inner.name)


def open_picture(file: str | Path) -> Image.Image:
    """The decoded picture. UserError if `file` is none, or is larger than LONGEST."""
    with complaining(file), warnings.catch_warnings(), open(file, "rb") as stream:
        warnings.simplefilter("ignore")  # on odd meta data
        try:
            picture = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"no picture ({', '.join(FORMATS)})") from None
        if max(picture.size) > LONGEST:
            raise ValueError(f"{picture.size} pixels; the limit is {LONGEST} a side")
        if picture.mode[0] in "IF":
            raise ValueError(f"pixels of kind {picture.mode}; save it with 8 bits a channel")
        picture.load()
        return picture


def gather(pictures: Iterable[tuple[str | Path, Image.Image, int]]) -> Arrays:
    """Pictures of one size as (N, H, W), or (N, H, W, 3) if one is in colour, and their labels."""
    arrays, labels = [], []
    for where, picture, label in pictures:
        grey = picture.mode in ("1", "L", "LA")
        arrays.append(np.asarray(picture.convert("L" if grey else "RGB")))
        labels.append(label)
        if arrays[-1].shape[:2] != arrays[0].shape[:2]:
            sizes = " and ".join(f"{a.shape[1]} × {a.shape[0]}" for a in (arrays[0], arrays[-1]))
            raise ValueError(f"up to {where} there are pictures of {sizes}: make them one size")
        if arrays[-1].nbytes * len(arrays) > LIMIT:
            raise ValueError(f"up to {where} the pictures fill {LIMIT:,} bytes, which is the limit")
    if any(array.ndim == 3 for array in arrays):
        arrays = [a if a.ndim == 3 else np.stack([a] * 3, axis=-1) for a in arrays]
    return np.array(arrays), np.array(labels)


def read_hub(name: str) -> Found:
    """The splits train and test of a set on the Hugging Face Hub, or of a local copy of one."""
    import datasets

    splits = datasets.load_dataset(name)
    if "train" not in splits:
        raise ValueError(f"it has no split train, only {', '.join(splits)}")
    features, columns = splits["train"].features, []
    for wanted in (datasets.Image, datasets.ClassLabel):
        columns += [key for key, kind in features.items() if isinstance(kind, wanted)][:1]
    if len(columns) < 2:
        raise ValueError(f"columns of kind Image and ClassLabel are needed, not {features}")
    parts = [
        gather((f"row {i}", row[columns[0]], row[columns[1]]) for i, row in enumerate(splits[part]))
        for part in ("train", "test")
        if part in splits
    ]
    return Found(tuple(features[columns[1]].names), *parts)
