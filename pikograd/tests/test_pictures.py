"""Pictures and idx files that are damaged or from elsewhere: one line, no traceback, no memory."""

import gzip
import io
import os
import random
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data
import main
import pictures
from options import UserError

HERE = Path(__file__).resolve().parent.parent
MUTATIONS = int(os.environ.get("PIKOGRAD_MUTATIONS", "2000"))
LIMIT = 60_000_000  # bytes; the files here have at most 10 thousand


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def idx(array):
    return b"\0\0\x08" + struct.pack(f">B{array.ndim}I", array.ndim, *array.shape) + array.tobytes()


def pgm(array, kind):
    head = f"{kind}\n# a comment\n{array.shape[1]} {array.shape[0]}\n255\n".encode()
    return head + (array.tobytes() if kind == "P5" else " ".join(map(str, array.ravel())).encode())


def samples():
    """name → (bytes, what reads them)."""
    rng = np.random.default_rng(0)
    grey, images = (
        rng.integers(0, 256, (9, 7), np.uint8),
        rng.integers(0, 256, (30, 5, 6), np.uint8),
    )
    one, many = (HERE / "data" / "seven.pgm").read_bytes(), idx(images)
    return {
        "P2": (pgm(grey, "P2"), "one"), "P5": (pgm(grey, "P5"), "one"), "seven": (one, "one"),
        "npy": (npy(grey), "one"), "float npy": (npy(grey / 255), "one"),
        "fortran npy": (npy(np.asfortranarray(grey)), "one"), "npz": (b"PK\x03\x04" + one, "one"),
        "idx": (many, "many"), "idx.gz": (gzip.compress(many), "many"),
        "labels": (idx(np.arange(30, dtype=np.uint8) % 10), "many"),
    }  # fmt: skip


def mutated(pick, raw):
    """Bytes with one to four random changes: flipped, cut, doubled, numbers made huge, text."""
    raw = bytearray(raw)
    for _ in range(pick.randint(1, 4)):
        at = pick.randrange(min(len(raw), 200 if pick.random() < 0.7 else len(raw)) or 1)
        kind = pick.randrange(6)
        if kind == 0 and raw:
            raw[at] = pick.randrange(256)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = raw[at : at + pick.randint(1, 50)]
        elif kind == 3:
            raw[at : at + 4] = struct.pack(">I", pick.choice([0, 1, 2**31, 2**32 - 1, 70_000]))
        elif kind == 4:
            raw[at:at] = pick.choice([b"9" * 30, b"-1", b"nan", b"inf", b" ", b"(", b"1e9", b"_1"])
        else:
            del raw[at : at + pick.randint(1, 8)]
    return bytes(raw)


def test_mutated_files_are_one_line_or_a_picture(tmp_path):
    """MUTATIONS of every kind of file: a clean array or a UserError, in bounded memory."""
    kinds, pick, read = samples(), random.Random(0), 0
    tracemalloc.start()
    try:
        for i in range(MUTATIONS):
            name = list(kinds)[i % len(kinds)]
            raw, how = kinds[name]
            file = tmp_path / "train-images"
            file.write_bytes(mutated(pick, raw))
            try:
                if how == "one":
                    image = pictures.read_image(file)
                    assert image.dtype == np.float32 and 0 <= image.min() <= image.max() <= 1
                    assert image.ndim == 2 and image.size and np.isfinite(image).all()
                else:
                    pictures.read_idx(tmp_path, "train-images")
                read += 1
            except UserError as error:
                assert "train-images" in str(error) and len(str(error)) < 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LIMIT and 0.05 * MUTATIONS < read < 0.95 * MUTATIONS


@pytest.mark.parametrize("name", samples())
def test_files_that_are_whole_are_read(tmp_path, name):
    raw, how = samples()[name]
    (tmp_path / "x").write_bytes(raw)
    if name == "npz":
        with pytest.raises(UserError, match="no grey picture"):
            pictures.read_image(tmp_path / "x")
    elif how == "one":
        image = pictures.read_image(tmp_path / "x")
        assert image.max() == 1 and image.shape == ((20, 16) if name == "seven" else (9, 7))
    else:
        assert len(pictures.read_idx(tmp_path, "x")) == 30


def test_a_file_that_unpacks_to_more_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "LARGEST_SET", 10_000)
    (tmp_path / "train-images").write_bytes(gzip.compress(bytes(10_000_000)))  # 10 kB on disk
    with pytest.raises(UserError, match="more than 10,000 bytes"):
        pictures.read_idx(tmp_path, "train-images")


def test_header_that_claims_terabytes(tmp_path):
    raw = npy(np.zeros((4, 4), np.uint8)).replace(b"(4, 4), }          ", b"(4000000, 4000000)}")
    (tmp_path / "x.npy").write_bytes(raw)
    with pytest.raises(UserError, match=r"16 bytes for shape \(4000000, 4000000\)"):
        pictures.read_image(tmp_path / "x.npy")


def test_the_example_picture_is_named_right_at_any_size(capsys, tmp_path):
    """data/seven.pgm as shipped, twice as large, half as large (rounded), as .npy and as .pgm."""
    image = pictures.read_image(HERE / "data" / "seven.pgm")
    large = np.kron(image, np.ones((2, 2)))
    np.save(tmp_path / "large.npy", (255 * large).astype(np.uint8))
    np.save(tmp_path / "small.npy", large[::3, ::3])
    (tmp_path / "large.pgm").write_bytes(pgm((255 * large).astype(np.uint8), "P5"))
    for file in (HERE / "data" / "seven.pgm", *tmp_path.iterdir()):
        for model in ("cnn", "mlp"):
            weights = str(HERE / "pretrained" / model)
            args = main.parser().parse_args(["--classify", str(file), "--weights", weights])
            main.do_classify(args)
            printed = capsys.readouterr()
            assert "the net says 7 (" in printed.out, (file, model, printed.out)
            assert f"{file}: resized from " in printed.err and "to (8, 8)" in printed.err


def test_resizing_averages_equal_shares():
    """4 pixels to 2: means of pairs; 3 to 2: (1 + 2/2)/1.5 and (2/2 + 3)/1.5; 1 to 2: itself."""
    row = pictures.resized(np.array([[1.0, 2, 3, 4]]), (1, 2), "x")
    np.testing.assert_allclose(row, [[1.5, 3.5]])
    np.testing.assert_allclose(
        pictures.resized(np.array([[1.0, 2, 3]]), (1, 2), "x"), [[4 / 3, 8 / 3]]
    )
    np.testing.assert_allclose(pictures.resized(np.array([[5.0]]), (2, 2), "x"), np.full((2, 2), 5))
    image = np.random.default_rng(0).random((13, 9))
    assert pictures.resized(image, (5, 4), "x").mean() == pytest.approx(image.mean())


def test_mutated_idx_folders_are_refused_or_trained_on(tmp_path):
    """A folder's four files, one of them mutated: data.load_images gives data or a UserError."""
    rng, pick, loaded = np.random.default_rng(0), random.Random(1), 0
    parts = {}
    for part, n in (("train", 20), ("t10k", 10)):
        parts[f"{part}-images"] = idx(rng.integers(0, 256, (n, 6, 5), np.uint8))
        parts[f"{part}-labels"] = idx(np.arange(n, dtype=np.uint8) % 10)
    for i in range(200):
        for name, raw in parts.items():
            (tmp_path / name).write_bytes(raw)
        name = list(parts)[i % 4]
        (tmp_path / name).write_bytes(mutated(pick, parts[name]))
        try:
            images = data.load_images(tmp_path)
            assert np.isfinite(images.x).all()
            loaded += 1
        except UserError as error:
            assert str(tmp_path) in str(error)
    assert 0 < loaded < 200
