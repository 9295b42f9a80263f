"""The formats that pictures and labels come in, read without trust.

A size that a file declares is checked before memory is taken, and nothing is ever unpickled: a
pickle can run any code. Whatever is wrong ends as a UserError of one line that names the file.

Each reader returns what it found as arrays, in their order: the names of the classes (None: they
are numbers), pictures and labels to train on, and the same to test and to validate on (None: there
are none). Pictures are (N, H, W), (N, H, W, C) or (N, C, H, W); whether all fits together is for
data.py.

Left out: colour profiles, and all frames of a moving picture but the first.

Key: N pictures, C channels (1 grey, 3 colour), H and W their size.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from options import UserError

LIMIT = 2 << 30  # bytes of pictures
LONGEST = 4096  # pixels along a side, of pictures that are taken as they are
LARGEST = 1 << 26  # pixels of a picture that is scaled down: a phone's camera has fewer
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # none that starts a program
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")  # kinds of picture with a see-through channel
CIFAR = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())

Arrays = tuple[np.ndarray, np.ndarray]


class Found(NamedTuple):
    """What stood in a source; notes: what was done to its pictures, in words."""

    classes: tuple[str, ...] | None
    train: Arrays
    test: Arrays | None = None
    valid: Arrays | None = None
    notes: str = ""


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


def open_file(path: Path):
    """Open a file for its bytes. ValueError for a pipe or a device: reading it might never end."""
    if path.exists() and not path.is_file():
        raise ValueError("no file")
    return open(path, "rb")


def read_folder(folder: Path, image_size: int = 0) -> Found:
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
    return read_class_folders(folder, image_size)


# idx and CIFAR


def idx_file(folder: Path, stem: str) -> Path | None:
    """The file `stem`-idx… or `stem`.idx… in `folder`, if there is one."""
    files = sorted(folder.glob(f"{stem}[-.]idx*"))
    return files[0] if files else None


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
    with open_file(file) as plain:
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
            with complaining(file), open_file(file) as stream:
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
    """x and y (or x_train and y_train); x_test, y_test, x_valid, y_valid and `classes` if there."""
    with zipfile.ZipFile(file) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        train = ("x", "y") if "x" in names else ("x_train", "y_train")
        if not names.issuperset(train):
            held = ", ".join(sorted(names)) or "nothing"
            raise ValueError(f"x and y are needed, it holds {held}")
        parts = []
        for part in (train, ("x_test", "y_test"), ("x_valid", "y_valid")):
            whole = names.issuperset(part)
            if not whole and (alone := names.intersection(part)):
                raise ValueError(f"{alone.pop()} without the other of {part[0]} and {part[1]}")
            parts.append(tuple(read_npy(archive, name) for name in part) if whole else None)
        classes = read_npy(archive, "classes").tolist() if "classes" in names else None
    if classes is not None and not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no strings")
    if classes is not None and len(set(classes)) < len(classes):
        raise ValueError("two of its classes have the same name")
    return Found(classes and tuple(classes), *parts)


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


class Picture(NamedTuple):
    """A picture that is still to be read: its name in complaints, its file or bytes, its class."""

    name: str
    source: Path | bytes
    label: int


def read_class_folders(folder: Path, image_size: int = 0) -> Found:
    """folder/CLASS/picture, or folder/train/CLASS/picture with test/ and val/ beside train/."""
    has_parts = bool(inner_folders(folder / "train"))
    root = folder / "train" if has_parts else folder
    classes = tuple(inner.name for inner in inner_folders(root))
    if not classes:
        raise ValueError(
            "neither train-images-idx3-ubyte, data_batch_1.bin nor class folders in it"
        )
    parts = {"train": labelled(root, classes)}
    for part, names in (("test", ("test",)), ("valid", ("val", "valid", "validation"))):
        inner = [folder / name for name in names if has_parts and (folder / name).is_dir()]
        if len(inner) > 1:
            raise ValueError(f"{inner[0].name}/ and {inner[1].name}/ mean the same: keep one")
        if inner:
            parts[part] = labelled(inner[0], classes)
    return gather(classes, parts, image_size)


def inner_folders(folder: Path) -> list[Path]:
    """The folders in `folder` in the order of their names, without the hidden ones."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))


def labelled(root: Path, classes: tuple[str, ...]) -> list[Picture]:
    """The pictures in the class folders below `root`."""
    pictures = []
    for inner in inner_folders(root):
        if inner.name not in classes:
            raise ValueError(f"{inner} has no class of that name to train on")
        files = sorted(file for file in inner.iterdir() if not file.name.startswith("."))
        if not files:
            raise ValueError(f"the class folder {inner} is empty: fill it or remove it")
        label = classes.index(inner.name)
        pictures += [Picture(str(file), file, label) for file in files]
    return pictures


def read_hub(name: str, image_size: int = 0) -> Found:
    """The splits of a set on the Hugging Face Hub, or of a local copy of one."""
    import datasets

    splits = datasets.load_dataset(name)
    if "train" not in splits:
        raise ValueError(f"it has no split train, only {', '.join(splits)}")
    features, columns = splits["train"].features, []
    for wanted in (datasets.Image, datasets.ClassLabel):
        columns += [key for key, kind in features.items() if isinstance(kind, wanted)][:1]
    if len(columns) < 2:
        raise ValueError(f"columns of kind Image and ClassLabel are needed, not {features}")
    parts = {}
    for part, name in (("train", "train"), ("test", "test"), ("valid", "valid"),
                       ("valid", "val"), ("valid", "validation")):  # fmt: skip
        if name in splits:
            undecoded = splits[name].cast_column(columns[0], datasets.Image(decode=False))
            parts[part] = hub_rows(undecoded.select_columns(columns), *columns)
    return gather(tuple(features[columns[1]].names), parts, image_size)


def hub_rows(split, image: str, label: str) -> list[Picture]:
    """The pictures of a split, as the files they were uploaded as."""
    rows: list[Picture] = []
    for batch in split.iter(1000):
        for content, number in zip(batch[image], batch[label], strict=True):
            if content is None or number is None:
                raise ValueError(f"row {len(rows)} has no picture or no label")
            source = content["bytes"] or Path(content["path"])
            rows.append(Picture(f"row {len(rows)}", source, number))
    return rows


def gather(classes: tuple[str, ...], parts: dict[str, list[Picture]], image_size: int) -> Found:
    """Read the pictures of all parts, several at a time: (N, H, W), or (N, H, W, 3) if one of them
    is in colour. They must be of one size, unless image_size makes them so."""
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in parts}
    notes, total = Counter(), 0
    size = (image_size, image_size) if image_size else None
    first = None
    for name, pictures in parts.items():
        for picture, (array, done) in zip(pictures, decoded(pictures, size), strict=True):
            arrays[name].append(array)
            notes.update(done)
            total += array.nbytes
            first = array.shape if first is None else first
            if array.shape[:2] != first[:2]:
                sizes = f"{first[1]} × {first[0]} and {array.shape[1]} × {array.shape[0]}"
                raise ValueError(f"up to {picture.name} there are pictures of {sizes}: say what "
                                 "to make of them, as in --image-size 32")  # fmt: skip
            if total > LIMIT:
                raise ValueError(f"up to {picture.name} the pictures fill {LIMIT:,} bytes, which "
                                 "is the limit: --image-size makes them smaller")  # fmt: skip
    colour = any(array.ndim == 3 for part in arrays.values() for array in part)
    found = {}
    for name, part in arrays.items():
        if colour:
            part = [a if a.ndim == 3 else np.stack([a] * 3, axis=-1) for a in part]
        found[name] = np.array(part), np.array([picture.label for picture in parts[name]])
    shown = ", ".join(f"{n:,} {what}" for what, n in notes.items())
    return Found(classes, **found, notes=shown)


def decoded(pictures: list[Picture], size: tuple[int, int] | None):
    """`read_picture` of each, in their order, on several threads at a time."""
    with warnings.catch_warnings():  # here, as threads share what is ignored
        warnings.simplefilter("ignore")  # on odd meta data
        pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            yield from pool.map(lambda p: read_picture(p.source, p.name, size), pictures)
        finally:  # Ctrl-C or a picture that is none: do not read the others first
            pool.shutdown(cancel_futures=True)


def read_picture(
    source: Path | bytes, name: str, size: tuple[int, int] | None
) -> tuple[np.ndarray, list[str]]:
    """A picture as (H, W) or (H, W, 3) bytes, and what had to be done to it.

    size: (H, W) to scale and crop it to, or None. UserError if `source` holds no picture.
    """
    with complaining(name):
        with io.BytesIO(source) if isinstance(source, bytes) else open_file(source) as stream:
            try:
                picture = Image.open(stream, formats=FORMATS)
            except UnidentifiedImageError:
                raise ValueError(f"no picture ({', '.join(FORMATS)})") from None
            refuse_giants(picture, size)
            if size:
                picture.draft(picture.mode, (2 * max(size), 2 * max(size)))  # a JPEG's shortcut
            picture.load()
            picture, notes = upright_and_opaque(picture)
        if size and picture.size != size[::-1]:
            picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)
            notes.append("scaled and cropped in the middle")
        return np.asarray(picture), notes


def refuse_giants(picture: Image.Image, size: tuple[int, int] | None) -> None:
    """ValueError for a picture that would fill the memory; only its header has been read."""
    width, height = picture.size
    if size is None and max(width, height) > LONGEST:
        raise ValueError(f"{width} × {height} pixels; the limit is {LONGEST} a side without "
                         "--image-size")  # fmt: skip
    if width * height > LARGEST:
        raise ValueError(f"{width} × {height} pixels; the limit is {LARGEST:,} in all")


def upright_and_opaque(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    """The picture in eight bits, grey or in colour (modes L and RGB), and what had to be done."""
    notes = []
    if picture.getexif().get(0x0112, 1) != 1:  # cameras store how they were held, not a turned one
        picture = ImageOps.exif_transpose(picture)
        notes.append("turned upright (EXIF)")
    if picture.mode[0] == "F":
        raise ValueError("pixels are floating-point numbers; save it with 8 or 16 bits a channel")
    if picture.mode[0] == "I":
        picture = from_16_bits(picture)
        notes.append("of 16 bits")
    elif picture.mode in TRANSPARENT or "transparency" in picture.info:
        grey = picture.mode in ("LA", "La")
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
        picture = picture.convert("L" if grey else "RGB")
        notes.append("transparent (laid on white)")
    elif picture.mode not in ("1", "L", "P", "RGB"):
        notes.append(f"converted from {picture.mode}")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB"), notes


def from_16_bits(picture: Image.Image) -> Image.Image:
    """Levels 0 … 65,535 as 0 … 255."""
    levels = np.asarray(picture).astype(np.int64)
    if levels.size and not 0 <= levels.min() <= levels.max() < 1 << 16:
        raise ValueError(f"pixels from {levels.min()} to {levels.max()}; save it with 16 bits")
    return Image.fromarray(np.rint(levels / 257).astype(np.uint8))


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """(N, C, H, W) uint8 scaled and cropped in the middle to (N, C, size, size)."""
    scaled = np.empty((*pictures.shape[:2], size, size), np.uint8)
    for picture, target in zip(pictures, scaled, strict=True):
        for channel, out in zip(picture, target, strict=True):
            image = Image.fromarray(channel)
            out[:] = np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
    return scaled


# read once


def stamp(source: str) -> str | None:
    """What changes when the pictures of a source do; None for what is quick to read anyway.

    Of a folder the names, sizes and times of all files; of a set on the Hub its name.
    """
    folder = Path(source.removeprefix("hf:"))
    if not folder.is_dir():
        return source if source.startswith("hf:") else None
    if not source.startswith("hf:") and not inner_folders(folder):
        return None
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(place, name))
            inside = os.path.relpath(os.path.join(place, name), folder)
            line = f"{inside}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
