"""What is read, what is refused and how, and how it is split."""

import gzip
import hashlib
import io
import os
import pickle
import random
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import posix
from PIL import Image, ImageOps

import data
import formats
from conftest import FOLDER
from options import UserError

DIGITS = FOLDER / "data" / "digits.npz"


def pictures(n: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def labels(n: int, classes: int = 3) -> np.ndarray:
    return (np.arange(n) % classes).astype(np.uint8)


def complaint(source: str | Path) -> str:
    """The one line that refuses a source; it names the source or a file in it."""
    with pytest.raises(UserError) as caught:
        data.load(str(source))
    line = str(caught.value)
    assert "\n" not in line and str(source).removeprefix("hf:") in line, line
    return line


# sources to read


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def write_mnist(folder: Path, packed: bool = False, dot: bool = False) -> tuple:
    """The four files with 40 and 10 pictures of 5 × 6. Returns the arrays."""
    arrays = pictures(40, 5, 6), labels(40), pictures(10, 5, 6, seed=1), labels(10)
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images", "labels")]
    for name, array in zip(names, arrays, strict=True):
        raw = gzip.compress(idx(array), mtime=0) if packed else idx(array)
        name = f"{name}{'.' if dot else '-'}idx{array.ndim}-ubyte{'.gz' if packed else ''}"
        (folder / name).write_bytes(raw)
    return arrays


def write_cifar(folder: Path) -> tuple:
    x, y = pictures(50, 3, 32, 32), labels(50, 10)
    records = np.concatenate([y[:, None], x.reshape(50, -1)], axis=1)
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 5)] + ["test_batch"]):
        (folder / f"{name}.bin").write_bytes(records[10 * i : 10 * i + 10].tobytes())
    return x, y


def write_classes(folder: Path, n: int = 6, mode: str = "RGB", kind: str = "png") -> None:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            x = pictures(1, 6, 5, 3, seed=i)[0]
            Image.fromarray(x).convert(mode).save(folder / name / f"{i}.{kind}")


def write_npz(file: Path, **changes) -> Path:
    arrays = {"x": pictures(30, 6, 5, 3), "y": labels(30)} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


@pytest.mark.parametrize(("packed", "dot"), [(False, False), (True, False), (False, True)])
def test_mnist_is_read(packed, dot, tmp_path):
    x, y, x_test, y_test = write_mnist(tmp_path, packed, dot)
    found = data.read(str(tmp_path))
    assert (found.train.images.squeeze(1).numpy() == x).all()
    assert (found.train.labels.numpy() == y).all() and found.train.labels.dtype == torch.int64
    assert (found.test.images.squeeze(1).numpy() == x_test).all()
    assert (found.test.labels.numpy() == y_test).all()
    assert found.classes == ("0", "1", "2") and found.train.images.shape == (40, 1, 5, 6)


def test_cifar_is_read(tmp_path):
    x, y = write_cifar(tmp_path)
    found = data.read(str(tmp_path))
    assert (found.train.images.numpy() == x[:40]).all()
    assert (found.test.images.numpy() == x[40:]).all()
    assert (found.test.labels.numpy() == y[40:]).all()
    assert len(found.classes) == 10 and found.classes[3] == "cat"


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "gif", "webp", "ppm", "tiff"])
def test_class_folders_are_read(kind, tmp_path):
    write_classes(tmp_path, kind=kind)
    (tmp_path / ".DS_Store").write_bytes(b"no picture")
    (tmp_path / "cat" / ".hidden").write_bytes(b"no picture")
    found = data.read(str(tmp_path))
    assert found.classes == ("cat", "dog") and found.test is None
    assert found.train.images.shape == (12, 3, 6, 5)
    assert found.train.labels.tolist() == [0] * 6 + [1] * 6
    if kind in ("png", "bmp", "ppm", "tiff"):  # the others lose a little
        first = pictures(1, 6, 5, 3)[0].transpose(2, 0, 1)
        assert (found.train.images[0].numpy() == first).all()


def test_class_folders_may_come_in_two_parts(tmp_path):
    write_classes(tmp_path / "train")
    write_classes(tmp_path / "test", n=2)
    found = data.read(str(tmp_path))
    assert len(found.train) == 12 and len(found.test) == 4
    assert found.test.labels.tolist() == [0, 0, 1, 1]


def test_grey_pictures_have_one_channel_unless_one_is_in_colour(tmp_path):
    write_classes(tmp_path, mode="L")
    grey = data.read(str(tmp_path)).train.images
    assert grey.shape == (12, 1, 6, 5)
    Image.new("RGB", (5, 6), "red").save(tmp_path / "dog" / "z.png")
    both = data.read(str(tmp_path)).train.images
    assert both.shape == (13, 3, 6, 5) and both[12, :, 0, 0].tolist() == [255, 0, 0]
    assert (both[:12] == grey).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((6, 5), (1, 6, 5)),
        ((6, 5, 1), (1, 6, 5)),
        ((1, 6, 5), (1, 6, 5)),
        ((6, 5, 3), (3, 6, 5)),
        ((3, 6, 5), (3, 6, 5)),
        ((1, 1, 1), None),
        ((3, 6, 3), None),
        ((1, 6, 3), None),
    ],
)
def test_an_npz_says_by_its_shape_where_the_channels_are(shape, expected, tmp_path):
    x = pictures(30, *shape)
    file = write_npz(tmp_path / "a.npz", x=x)
    if expected is None:
        assert "either axis could be the channels" in complaint(file)
        return
    images = data.read(str(file)).train.images.numpy()
    assert images.shape == (30, *expected)
    if shape == (6, 5, 3):
        assert (images.transpose(0, 2, 3, 1) == x).all()


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int64", "uint16", ">i4", "bool"]
)
def test_number_types(dtype, tmp_path):
    """0 … 1 are scaled, 0 … 255 are taken as they are, columns may come first in memory."""
    x = pictures(30, 6, 5, 3)
    small = np.dtype(dtype).kind in "bf"
    stored = np.asfortranarray(
        (x > 127 if dtype == "bool" else x / 255 if small else x).astype(dtype)
    )
    images = data.read(str(write_npz(tmp_path / "a.npz", x=stored))).train.images
    expected = (x > 127) * 255 if dtype == "bool" else x
    assert (images.numpy().transpose(0, 2, 3, 1) == expected).all()
    whole = write_npz(tmp_path / "b.npz", x=x.astype("float32"))
    assert (data.read(str(whole)).train.images.numpy().transpose(0, 2, 3, 1) == x).all()


def test_an_npz_may_hold_a_test_part_and_names(tmp_path):
    parts = {"x": None, "y": None, "x_train": pictures(9, 6, 5), "y_train": labels(9)[:, None]}
    parts |= {
        "x_test": pictures(4, 6, 5),
        "y_test": labels(4),
        "classes": np.array(["a", "b", "ç"]),
    }
    found = data.load(str(write_npz(tmp_path / "a.npz", **parts)))
    assert found.classes == ("a", "b", "ç")
    assert (len(found.train), len(found.valid), len(found.test)) == (8, 1, 4)
    np.savez_compressed(tmp_path / "b.npz", x=parts["x_train"], y=labels(9))
    assert len(data.read(str(tmp_path / "b.npz")).train) == 9


def test_a_copy_of_a_hub_set_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["no", "yes"]), "img": datasets.Image()}
    )
    for part, n in (("train", 20), ("test", 6)):
        rows = {"label": list(labels(n, 2)), "img": [Image.fromarray(p) for p in pictures(n, 6, 5)]}
        (tmp_path / "set").mkdir(exist_ok=True)
        file = tmp_path / "set" / f"{part}-00000-of-00001.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    found = data.load(f"hf:{tmp_path / 'set'}")
    assert found.classes == ("no", "yes")
    assert (len(found.train), len(found.valid), len(found.test)) == (18, 2, 6)
    assert (found.test.images.squeeze(1).numpy() == pictures(6, 6, 5)).all()
    assert found.test.labels.tolist() == [0, 1] * 3

    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "set" / "test-00000-of-00001.parquet").unlink()
    (tmp_path / "set" / "train-00000-of-00001.parquet").unlink()
    (tmp_path / "train.parquet").rename(tmp_path / "set" / "train.parquet")
    assert "Image and ClassLabel" in complaint(f"hf:{tmp_path / 'set'}")
    assert "hf:" in complaint(f"hf:{tmp_path / 'none'}")


# pictures of several sizes and kinds


def as_folder(folder: Path, pictures: dict[str, Image.Image], **options) -> Path:
    """Class folders a and b with the same pictures in both."""
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for file, picture in pictures.items():
            picture.save(folder / name / file, **options)
    return folder


def test_pictures_of_several_sizes_are_scaled_and_cropped_in_the_middle(tmp_path):
    """Wide: red, a green middle, blue. Only the middle is left, scaled; a high one likewise."""
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("lime", (20, 0, 40, 20))
    wide.paste("blue", (40, 0, 60, 20))
    high = wide.transpose(Image.Transpose.ROTATE_90)
    square = Image.new("RGB", (8, 8), "lime")
    found = data.read(str(as_folder(tmp_path, {"a.png": wide, "b.png": high, "c.png": square})), 8)
    assert found.train.images.shape == (6, 3, 8, 8)
    middle = torch.tensor([0, 255, 0], dtype=torch.uint8)
    assert (found.train.images[:, :, 1:7, 1:7] == middle[:, None, None]).all()
    assert found.notes == "4 scaled and cropped in the middle"


def test_image_size_scales_arrays_too(tmp_path):
    """Four quarters of 0, 80, 160 and 240, from 8 × 8 to 4 × 4: each corner stays what it was."""
    x = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((4, 4), dtype=np.uint8))
    file = write_npz(tmp_path / "a.npz", x=np.stack([x] * 6), y=labels(6))
    images = data.load(str(file), image_size=4).train.images
    assert images.shape[1:] == (1, 4, 4)
    assert images[0, 0, [0, 0, 3, 3], [0, 3, 0, 3]].tolist() == [0, 80, 160, 240]


def test_exif_orientation_is_followed(tmp_path):
    """Tag 274 = 6: the camera was turned, the picture is to be shown a quarter turn clockwise."""
    picture = Image.new("RGB", (6, 4), "black")
    picture.paste("white", (0, 0, 3, 4))  # the left half, which then is the upper one
    exif = Image.Exif()
    exif[274] = 6
    found = data.read(str(as_folder(tmp_path, {"a.png": picture}, exif=exif)))
    assert found.train.images.shape == (2, 3, 6, 4)
    assert found.train.images[0, 0, :, 0].tolist() == [255] * 3 + [0] * 3
    assert found.notes == "2 turned upright (EXIF)"
    upright = data.read_picture(tmp_path / "a" / "a.png", 3, (6, 4))
    assert (upright[0] == found.train.images[0]).all()


@pytest.mark.parametrize(
    ("mode", "note"),
    [
        ("RGBA", "transparent (laid on white)"),
        ("LA", "transparent (laid on white)"),
        ("P", "transparent (laid on white)"),
        ("CMYK", "converted from CMYK"),
        ("I;16", "of 16 bits"),
    ],
)
def test_kinds_of_pictures(mode, note, tmp_path):
    """A black left half; the right half is transparent, or light where there is no transparency."""
    if mode == "I;16":
        levels = np.repeat(np.array([[0, 0, 65535, 65535]], dtype=np.uint16), 4, axis=0)
        picture = Image.fromarray(levels)
    elif mode == "CMYK":
        picture = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
        picture.paste((0, 0, 0, 255), (0, 0, 2, 4))
    else:
        picture = Image.new("RGBA", (4, 4), (9, 9, 9, 0))  # dark, if the transparency is forgotten
        picture.paste((0, 0, 0, 255), (0, 0, 2, 4))
        picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    name = "a.tiff" if mode == "CMYK" else "a.png"
    found = data.read(str(as_folder(tmp_path, {name: picture})))
    channels = 1 if mode in ("LA", "I;16") else 3
    assert found.train.images.shape == (2, channels, 4, 4)
    assert found.train.images[0, 0, 0].tolist() == [0, 0, 255, 255]
    assert found.notes == f"2 {note}"


def test_a_jpeg_is_decoded_smaller_at_once_and_looks_the_same(tmp_path):
    """Its shortcut (draft) against scaling the whole picture, to a few levels of 255."""
    y, x = np.mgrid[:400, :600]
    wave = (127 + 60 * np.sin(x / 70) + 60 * np.cos(y / 50)).astype(np.uint8)
    file = save(tmp_path / "a.jpg", Image.fromarray(wave), quality=95)
    short, notes = formats.read_picture(file, "a", (32, 32))
    whole = ImageOps.fit(Image.open(file), (32, 32), Image.Resampling.BILINEAR)
    assert np.abs(short.astype(int) - np.asarray(whole)).max() <= 4
    assert notes == ["scaled and cropped in the middle"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_folder_is_the_validation_part(name, tmp_path):
    write_classes(tmp_path / "train", n=9)
    write_classes(tmp_path / name, n=3, mode="L")
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.valid), len(found.test)) == (16, 6, 2)  # a tenth to test
    assert found.valid.images.shape[1:] == (3, 6, 5)
    grey = found.valid.images
    assert (grey[:, 0] == grey[:, 1]).all() and found.valid.labels.tolist() == [0] * 3 + [1] * 3
    write_classes(tmp_path / "test", n=2)
    found = data.load(str(tmp_path))
    assert (len(found.train), len(found.valid), len(found.test)) == (18, 6, 4)


def test_two_validation_folders_are_one_too_many(tmp_path):
    for name in ("train", "val", "valid"):
        write_classes(tmp_path / name)
    assert "val/ and valid/ mean the same: keep one" in complaint(tmp_path)


def test_an_npz_may_hold_a_validation_part(tmp_path):
    valid = {"x_valid": pictures(5, 6, 5, 3, seed=1), "y_valid": labels(5)}
    found = data.load(str(write_npz(tmp_path / "a.npz", **valid)))
    assert (found.valid.images.numpy().transpose(0, 2, 3, 1) == valid["x_valid"]).all()
    assert (len(found.train), len(found.test)) == (27, 3)


# read once


def test_decoded_pictures_are_kept_and_taken_again(tmp_path, monkeypatch):
    write_classes(tmp_path / "set", n=10)
    first, cache = data.load(str(tmp_path / "set"), seed=3), tmp_path / "pictures.npz"
    with open(cache, "wb") as file:
        first.save(file)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "read_picture", None)  # nothing is decoded
        again = data.load(str(tmp_path / "set"), seed=3, cache=cache)
    assert again.classes == first.classes and again.mean == first.mean
    for name in ("train", "valid", "test"):
        one, other = getattr(first, name), getattr(again, name)
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("change", ["a picture", "its time", "seed", "size", "damaged", "pickle"])
def test_decoded_pictures_of_something_else_are_not_taken(change, tmp_path):
    folder, cache, seed, size = tmp_path / "set", tmp_path / "pictures.npz", 3, 0
    write_classes(folder, n=10)
    with open(cache, "wb") as file:
        data.load(str(folder), seed=3).save(file)
    if change == "a picture":
        Image.new("RGB", (5, 6), "red").save(folder / "cat" / "new.png")
    elif change == "its time":
        os.utime(folder / "cat" / "0.png", (1, 1))
    elif change == "damaged":
        cache.write_bytes(cache.read_bytes()[:-500])
    elif change == "pickle":
        np.savez(cache, stamp=np.array([None]), x=np.array([None]))
    seed, size = (4, 0) if change == "seed" else (3, 4) if change == "size" else (3, 0)
    stamp = data.load(str(folder), seed, size).stamp
    assert data.read_cache(cache, stamp) is None
    found = data.load(str(folder), seed, size, cache)
    assert len(found.train) == (17 if change == "a picture" else 16)
    assert found.train.images.shape[3] == (4 if change == "size" else 5)


def test_what_is_quick_to_read_is_not_kept(tmp_path):
    write_mnist(tmp_path)
    for source in (None, str(DIGITS), str(tmp_path)):
        assert data.load(source).stamp == ""


def test_reading_stops_at_the_first_picture_that_is_none(tmp_path, monkeypatch):
    """The pictures after it are not all read first: with 4,000 of them that would take a while."""
    write_classes(tmp_path)
    for i in range(4000):
        (tmp_path / "cat" / f"x{i}.png").touch()
    read, original = [], formats.read_picture
    monkeypatch.setattr(formats, "read_picture", lambda *a: read.append(a) or original(*a))
    assert "x0.png: no picture" in complaint(tmp_path)
    assert len(read) < 2000


# splits


def test_the_default_is_shapes():
    found = data.load()
    assert found.name == "shapes-10" and found.ceiling == 0.95 and len(found.classes) == 10
    assert [len(part) for part in (found.train, found.valid, found.test)] == [9000, 1000, 2000]
    assert found.train.images.shape[1:] == (3, 32, 32)
    assert (data.load("shapes-10").test.images == found.test.images).all()


def test_the_digits_are_the_uci_ones():
    found = data.load(str(DIGITS))
    assert [len(part) for part in (found.train, found.valid, found.test)] == [1455, 162, 180]
    assert found.train.images.shape[1:] == (1, 8, 8) and found.ceiling is None
    every = torch.cat([found.train.labels, found.valid.labels, found.test.labels])
    assert every.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert set(found.train.images.unique().tolist()) == {k * 255 // 16 for k in range(17)}


def test_the_parts_are_apart_and_make_up_the_whole():
    whole = data.read(str(DIGITS)).train.images.flatten(1)
    for seed in (0, 1):
        found = data.load(str(DIGITS), seed)
        parts = torch.cat([p.images.flatten(1) for p in (found.train, found.valid, found.test)])
        assert sorted(map(bytes, parts.numpy())) == sorted(map(bytes, whole.numpy()))


def test_the_seed_chooses_the_validation_part_and_never_the_test_part():
    one, again, other = (data.load(str(DIGITS), seed) for seed in (0, 0, 1))
    assert (one.test.images == other.test.images).all()
    assert (one.valid.images == again.valid.images).all()
    assert (one.train.labels == again.train.labels).all()
    assert (one.valid.images != other.valid.images).any()


def test_a_test_part_of_the_source_is_not_touched(tmp_path):
    *_, x_test, y_test = write_mnist(tmp_path)
    test = data.load(str(tmp_path), seed=3).test
    assert (test.images.squeeze(1).numpy() == x_test).all() and (
        test.labels.numpy() == y_test
    ).all()


def test_the_validation_part_is_limited(monkeypatch):
    monkeypatch.setattr(data, "MOST_VALID", 50)
    assert len(data.load(str(DIGITS)).valid) == 50


def test_the_smallest_source(tmp_path):
    file = write_npz(tmp_path / "a.npz", x=pictures(3, 6, 5), y=labels(3))
    found = data.load(str(file))
    assert [len(part) for part in (found.train, found.valid, found.test)] == [1, 1, 1]
    two = write_npz(tmp_path / "b.npz", x=pictures(2, 6, 5), y=labels(2))
    assert "three parts need more" in complaint(two)


def test_the_constants_are_those_of_the_training_part():
    """Of the pixels themselves: not means of batches, not of the test part."""
    found = data.load()
    x = found.train.images.double() / 255
    torch.testing.assert_close(
        torch.tensor(found.mean).double(), x.mean((0, 2, 3)), rtol=0, atol=1e-6
    )
    std = x.transpose(0, 1).flatten(1).std(1, correction=0)
    torch.testing.assert_close(torch.tensor(found.std).double(), std, rtol=0, atol=1e-6)


def test_a_channel_that_never_changes_has_the_constant_one(tmp_path):
    x = pictures(30, 6, 5, 3)
    x[..., 1] = 51
    found = data.load(str(write_npz(tmp_path / "a.npz", x=x)))
    assert found.std[1] == 1 and found.mean[1] == pytest.approx(0.2) and found.std[0] < 0.4


# bad input


def test_sources_that_are_none(tmp_path):
    assert "no such file" in complaint(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    assert "no .npz file" in complaint(tmp_path / "notes.txt")
    assert "class folders" in complaint(tmp_path)


def test_idx_files_that_are_damaged(tmp_path):
    write_mnist(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    good = file.read_bytes()
    for bad, what in (
        (b"\0\0\x09\x03" + good[4:], "it begins with 00 00 09 03, not 00 00 08 03"),
        (b"\0\0\x08\x01" + good[4:], "it begins with 00 00 08 01, not 00 00 08 03"),
        (b"", "it begins with"),
        (good[:10], "ends within its header"),
        (good[:-1], "declares 1,200 bytes and holds 1,199"),
        (good + b"x", "declares 1,200 bytes and holds more"),
        (gzip.compress(good)[:-200], "end-of-stream"),
        (gzip.compress(good) + b"junk", "Not a gzipped file"),
    ):
        file.write_bytes(bad)
        line = complaint(tmp_path)
        assert what in line and file.name in line


def test_a_header_cannot_take_memory(tmp_path):
    """An idx file and an .npz that promise a terabyte, and a gzip file that unpacks to a lot."""
    write_mnist(tmp_path)
    file, bomb = tmp_path / "train-images-idx3-ubyte", tmp_path / "bomb.npz"
    for sizes in ((10**6, 1000, 1000), (2**31, 2**31, 2**31), (60_000, 28, 28)):
        tracemalloc.start()
        file.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", *sizes) + bytes(1000))
        assert "it declares" in complaint(tmp_path)
        write_header(bomb, sizes)
        assert "it declares" in complaint(bomb)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
        tracemalloc.stop()
    file.write_bytes(gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", 9, 9, 9) + bytes(1 << 24)))
    tracemalloc.start()
    assert "holds more" in complaint(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def write_header(file: Path, shape: tuple, version: str = "1_0") -> None:
    """An .npz whose x has the header of an array of that shape and 1,000 bytes."""
    buffer, header = io.BytesIO(), {"descr": "|u1", "fortran_order": False, "shape": shape}
    getattr(np.lib.format, f"write_array_header_{version}")(buffer, header)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", buffer.getvalue() + bytes(1000))
        archive.writestr("y.npy", b"")


def test_idx_files_that_do_not_go_together(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels(39)))
    assert "40 pictures but 39 labels" in complaint(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels(40)))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels(10, 4)))
    assert "label 3 is out of range: there are 3 classes" in complaint(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels(10)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(pictures(10, 6, 6)))
    assert "(1, 5, 6)" in complaint(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    assert "no t10k-images" in complaint(tmp_path)


def test_cifar_files_that_are_wrong(tmp_path):
    write_cifar(tmp_path)
    file = tmp_path / "data_batch_2.bin"
    good = file.read_bytes()
    for bad, what in (
        (good[:-1], "no whole number of records"),
        (b"", "no whole number of records"),
        (b"\x0a" + good[1:], "label 10 is out of range: there are 10 classes"),
    ):
        file.write_bytes(bad)
        assert what in complaint(tmp_path)
    file.write_bytes(good)
    (tmp_path / "test_batch.bin").unlink()
    assert "no test_batch.bin" in complaint(tmp_path)


def test_pickled_cifar_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Trap()}))
    line = complaint(tmp_path)
    assert "any code" in line and "binary version" in line
    assert not (tmp_path / "ran").exists()


def test_class_folders_that_are_wrong(tmp_path):
    write_classes(tmp_path)
    (tmp_path / "eel").mkdir()
    assert "eel is empty" in complaint(tmp_path)
    (tmp_path / "eel" / "notes.txt").write_text("no picture", encoding="utf-8")
    line = complaint(tmp_path / "eel" / "..")
    assert "notes.txt: no picture" in line
    (tmp_path / "eel" / "notes.txt").unlink()
    (tmp_path / "eel" / "inner").mkdir()
    assert "inner" in complaint(tmp_path)
    (tmp_path / "eel" / "inner").rmdir()
    Image.new("RGB", (6, 6)).save(tmp_path / "eel" / "a.png")
    line = complaint(tmp_path)
    assert "pictures of 5 × 6 and 6 × 6: say what to make of them, as in --image-size 32" in line


def test_class_folders_need_two_classes_and_the_same_ones_to_test(tmp_path):
    write_classes(tmp_path / "train")
    (tmp_path / "test" / "fox").mkdir(parents=True)
    assert "fox has no class of that name" in complaint(tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    (tmp_path / "train" / "cat").rename(only / "cat")
    assert "there are 1 classes" in complaint(only)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"y": None}, "x and y are needed, it holds x"),
        ({"x": None, "y": None, "z": labels(3)}, "it holds z"),
        ({"x": pictures(30, 6, 5, 2)}, "1 or 3 channels"),
        ({"x": pictures(30, 6, 5, 4)}, "1 or 3 channels"),
        ({"x": pictures(30, 6)}, "1 or 3 channels"),
        ({"x": pictures(30, 3, 3, 3, 3)}, "1 or 3 channels"),
        ({"x": pictures(30, 0, 5)}, "pictures (30, 0, 5)"),
        ({"x": pictures(0, 6, 5), "y": labels(0)}, "pictures (0, 6, 5)"),
        ({"x": pictures(30, 1, 4097)}, "(1, 4097) pixels; the limit is 4096"),
        ({"x": pictures(30, 4097, 1)}, "(4097, 1) pixels; the limit is 4096"),
        ({"x": pictures(30, 6, 5) * 1.5}, "0 … 255"),
        ({"x": pictures(30, 6, 5) / -255}, "0 … 255"),
        ({"x": np.full((30, 6, 5), np.nan)}, "0 … 255"),
        ({"x": np.full((30, 6, 5), np.inf)}, "0 … 255"),
        ({"x": pictures(30, 6, 5) * 1j}, "pixels are complex128, not numbers"),
        ({"x": np.full((30, 6, 5), "a")}, "pixels are <U1"),
        ({"x": np.zeros((30, 6, 5), dtype=[("r", "u1")])}, "pixels are"),
        ({"x": np.full((30, 6, 5), None)}, "any code"),
        ({"y": np.full(30, None)}, "any code"),
        ({"y": labels(29)}, "30 pictures but 29 labels"),
        ({"y": labels(30) / 1.0}, "not integers"),
        ({"y": np.eye(3)[labels(30)]}, "not integers"),
        ({"y": np.arange(30) - 1}, "labels from -1 to 28 are out of range"),
        ({"y": np.arange(30) + 2**40}, "out of range"),
        ({"y": np.full(30, 2**64 - 1, dtype=np.uint64)}, "out of range"),
        ({"y": np.zeros(30, dtype=int)}, "there are 1 classes"),
        ({"classes": np.array(["a", "b"])}, "label 2 is out of range: there are 2 classes"),
        ({"classes": np.array([1, 2, 3])}, "classes are no strings"),
        ({"x_test": pictures(4, 5, 6), "y_test": labels(4)}, "(3, 6, 5), to test on (1, 5, 6)"),
    ],
)
def test_npz_files_that_are_wrong(changes, what, tmp_path):
    assert what in complaint(write_npz(tmp_path / "a.npz", **changes))


def test_npz_files_that_are_none(tmp_path):
    file = tmp_path / "a.npz"
    good = write_npz(file).read_bytes()
    np.save(tmp_path / "b.npy", labels(3))
    for bad in (b"", good[:-30], good[: len(good) // 2], (tmp_path / "b.npy").read_bytes()):
        file.write_bytes(bad)
        assert "zip" in complaint(file)
    write_header(file, (10, 10, 10), version="2_0")
    assert "version" in complaint(file)
    write_header(file, (-10, 10, -10))
    assert "has the shape" in complaint(file)


def write_pictures(folder: Path) -> Path:
    """Class folders with some pictures of each format."""
    write_classes(folder, n=1)
    for kind in ("jpg", "gif", "bmp", "webp", "tiff", "ppm"):
        Image.fromarray(pictures(1, 6, 5, 3)[0]).save(folder / "cat" / f"a.{kind}")
    return folder


FORMATS = {
    "idx": lambda folder: write_mnist(folder) and folder,
    "gzip": lambda folder: write_mnist(folder, packed=True) and folder,
    "cifar": lambda folder: write_cifar(folder) and folder,
    "npz": lambda folder: write_npz(folder / "a.npz", classes=np.array(["a", "b", "c"])),
    "pictures": write_pictures,
}


@pytest.mark.parametrize("kind", FORMATS)
def test_500_mutations_are_read_or_refused_in_one_line(kind, tmp_path, monkeypatch):
    """Bytes changed, removed, added or repeated anywhere: never an error of another kind."""
    monkeypatch.setattr(formats, "LIMIT", 16 << 20)
    source = FORMATS[kind](tmp_path)
    files = [source] if source.is_file() else sorted(f for f in source.rglob("*") if f.is_file())
    dice, outcomes = random.Random(kind), {"read": 0, "refused": 0}
    for _ in range(500):
        file = dice.choice(files)
        good = file.read_bytes()
        file.write_bytes(mutated(good, dice))
        try:
            data.load(str(source))
            outcomes["read"] += 1
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error), str(error)
            outcomes["refused"] += 1
        file.write_bytes(good)
    assert min(outcomes.values()) > 10, outcomes
    data.load(str(source))


def mutated(raw: bytes, dice: random.Random) -> bytes:
    """Some bytes changed, mostly near the beginning or the end, where headers are."""
    raw, kind = bytearray(raw), dice.randrange(4)
    near = min(len(raw), dice.choice((16, 200, len(raw))))
    at = dice.randrange(near) if dice.random() < 0.6 else len(raw) - 1 - dice.randrange(near)
    if kind == 0:
        for _ in range(dice.choice((1, 1, 4))):
            raw[min(at + dice.randrange(8), len(raw) - 1)] = dice.choice(
                (0, 1, 255, dice.randrange(256))
            )
    elif kind == 1:
        del raw[at : at + dice.choice((1, 8, len(raw)))]
    elif kind == 2:
        raw[at:at] = dice.randbytes(dice.choice((1, 8, 500)))
    else:
        raw[at:at] = raw[at : at + dice.choice((4, 64, 1000))]
    return bytes(raw)


# one picture


def save(path: Path, picture: Image.Image, **options) -> Path:
    picture.save(path, **options)
    return path


def test_a_picture_of_the_right_kind_is_unchanged(tmp_path):
    x = pictures(1, 6, 5, 3)[0]
    read = data.read_picture(save(tmp_path / "a.png", Image.fromarray(x)), 3, (6, 5))
    assert read.shape == (1, 3, 6, 5) and read.dtype == torch.uint8 and read.is_contiguous()
    assert (read[0].permute(1, 2, 0).numpy() == x).all()
    grey = data.read_picture(save(tmp_path / "b.png", Image.fromarray(x[..., 0])), 1, (6, 5))
    assert (grey[0, 0].numpy() == x[..., 0]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_pictures_are_converted_and_scaled(mode, channels, tmp_path):
    """A red left half and a white right one: the halves stay halves."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("white", (20, 0, 40, 20))
    file = save(tmp_path / "a.png", picture.convert(mode))
    read = data.read_picture(file, channels, (8, 6)).float()
    assert read.shape == (1, channels, 8, 6)
    assert read[..., 5].mean() == 255 and read[..., 0].mean() < 200


def test_a_picture_of_a_digit_survives_its_own_file(tmp_path):
    image = data.load(str(DIGITS)).test.images[0]
    file = save(tmp_path / "digit.png", Image.fromarray(image[0].numpy()))
    assert (data.read_picture(file, 1, (8, 8))[0] == image).all()


def test_pictures_that_are_refused(tmp_path):
    def line(path: Path, channels: int = 3) -> str:
        with pytest.raises(UserError) as caught:
            data.read_picture(path, channels, (8, 8))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    assert "No such file" in line(tmp_path / "none.png")
    assert line(tmp_path)
    (tmp_path / "a.png").write_text("hello", encoding="utf-8")
    assert "no picture (PNG, JPEG" in line(tmp_path / "a.png")
    good = save(tmp_path / "b.png", Image.fromarray(pictures(1, 60, 50, 3)[0]))
    assert "takes 2 channels" in line(good, 2)
    good.write_bytes(good.read_bytes()[:-1000])
    assert "truncated" in line(good)
    giant = Image.new("1", (1 << 13, (1 << 13) + 1))
    assert "limit is 67,108,864 in all" in line(save(tmp_path / "c.png", giant))
    assert "8 or 16 bits" in line(save(tmp_path / "d.tiff", Image.new("F", (8, 8))))
    deep = Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32))
    assert "save it with 16 bits" in line(save(tmp_path / "e.tiff", deep))
    eps = save(tmp_path / "f.eps", Image.new("RGB", (8, 8)))  # to read one, PIL starts Ghostscript
    assert "no picture" in line(eps)


def test_a_picture_of_a_billion_pixels_takes_no_memory(tmp_path):
    """A PNG header that promises 30,000 × 30,000: refused by its size, and without a warning."""
    raw = bytearray(save(tmp_path / "a.png", Image.new("1", (8, 8))).read_bytes())
    raw[16:24] = struct.pack(">2I", 30_000, 30_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    data.read_picture(tmp_path / "a.png", 3, (8, 8))  # loads what PIL needs
    (tmp_path / "a.png").write_bytes(raw)
    tracemalloc.start()
    with warnings.catch_warnings(), pytest.raises(UserError, match="30000|decompression bomb"):
        warnings.simplefilter("error")
        data.read_picture(tmp_path / "a.png", 3, (8, 8))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_picture_with_odd_meta_data_gives_no_warning(tmp_path):
    """Pillow has lines of its own for it, which would stand before the one that we say."""
    file = save(tmp_path / "a.tiff", Image.new("P", (8, 8)))
    file.write_bytes(file.read_bytes()[:490])  # within the palette
    with warnings.catch_warnings(record=True) as said, pytest.raises(UserError, match="no picture"):
        warnings.simplefilter("always")
        data.read_picture(file, 3, (8, 8))
    assert not said


def test_the_committed_files_are_those_of_the_table():
    """data/README.md: name, size and sha256 of each."""
    table = (FOLDER / "data" / "README.md").read_text(encoding="utf-8")
    files = sorted((FOLDER / "data").glob("*.npz"))
    assert [file.name for file in files] == ["digits.npz", "shapes10.npz"]
    for file in files:
        row = next(line for line in table.splitlines() if line.startswith(f"| `{file.name}`"))
        assert hashlib.sha256(file.read_bytes()).hexdigest() in row
        assert f"{file.stat().st_size:,} bytes" in row


@pytest.mark.parametrize("alone", ["x_test", "y_test", "x_valid", "y_valid"])
def test_half_a_pair_in_an_npz_is_refused(tmp_path, alone):
    """Silently leaving it out would test on other pictures than the user meant."""
    x, y = np.zeros((8, 6, 6), np.uint8), np.arange(8) % 2
    arrays = {"x": x, "y": y, alone: x if alone[0] == "x" else y}
    np.savez(tmp_path / "half.npz", **arrays)
    with pytest.raises(UserError, match=f"{alone} without the other"):
        data.read(str(tmp_path / "half.npz"))


def test_classes_of_one_name_in_an_npz_are_refused(tmp_path):
    x, y = np.zeros((8, 6, 6), np.uint8), np.arange(8) % 2
    np.savez(tmp_path / "same.npz", x=x, y=y, classes=np.array(["a", "a"]))
    with pytest.raises(UserError, match="the same name"):
        data.read(str(tmp_path / "same.npz"))


@posix
def test_pipe_in_the_place_of_a_file_is_refused(tmp_path):
    """Else the program waits for ever for somebody to write to it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "1.png")
    for name in ("a/pipe.png", "train-images-idx3-ubyte", "data_batch_1.bin"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="pipe.png: no file"):
        data.read_picture(tmp_path / "a" / "pipe.png", 3, (8, 8))
    for name in ("train-images-idx3-ubyte", "data_batch_1.bin", "pipe.png"):
        with pytest.raises(UserError, match=f"{name}: no file"):
            data.read(str(tmp_path))
        (tmp_path / name).unlink(missing_ok=True)
