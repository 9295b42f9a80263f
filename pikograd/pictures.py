"""Pictures from files that anybody may have written: MNIST's idx files, .pgm and .npy.

Every reader checks what a file claims against the bytes that are there before it takes memory for
it, and complains in one line. A picture of another size than the net reads is resized.
"""

import ast
import gzip
import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from options import UserError, say

LARGEST_PICTURE = 1 << 26  # bytes of a file for --classify
LARGEST_SET = 1 << 30  # bytes of an idx file, unpacked


# ── idx: a whole data set ─────────────────────────────────────────────────────────────────────────


def read_idx_pair(folder, part):
    """(images (N, H, W), labels (N,)) from `part`-images… and `part`-labels…, gzipped or not."""
    images, labels = (read_idx(folder, f"{part}-{kind}") for kind in ("images", "labels"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.size:
        raise UserError(f"{folder}: {part} has images {images.shape} and labels {labels.shape}")
    return images, labels


def read_idx(folder, stem):
    """An array of bytes from an idx file: 0, 0, 8, rank, sizes (4 bytes each, big-endian), data."""
    found = sorted(folder.glob(f"{stem}*")) if folder.is_dir() else []
    if not found:
        raise UserError(f"{folder}: no {stem}… there; give a folder with the four MNIST idx files")
    try:
        return parse_idx(unpacked(found[0]))
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, struct.error) as error:
        raise UserError(f"{found[0]} is damaged or no idx file: {error}") from None


def unpacked(path):
    """The bytes of a file, gunzipped if need be, never more than LARGEST_SET of them."""
    raw, pieces, size = whole(path, LARGEST_SET), [], 0
    if raw[:2] != b"\x1f\x8b":
        return raw
    source = gzip.GzipFile(fileobj=io.BytesIO(raw))
    while piece := source.read(1 << 20):
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST_SET:
            raise ValueError(f"more than {LARGEST_SET:,} bytes")
    return b"".join(pieces)


def whole(path, largest):
    """The bytes of a regular file that is not too large."""
    if not path.is_file():
        raise ValueError("there is no such file")
    if path.stat().st_size > largest:
        raise ValueError(f"more than {largest:,} bytes")
    return path.read_bytes()


def parse_idx(raw):
    """The array in the bytes of an idx file."""
    if raw[:3] != b"\0\0\x08" or len(raw) < 4:
        raise ValueError("it does not begin with 0, 0, 8")
    rank = raw[3]
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    if len(raw) - 4 - 4 * rank != math.prod(shape):
        raise ValueError(f"{len(raw) - 4 - 4 * rank:,} bytes for the shape {shape}")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


# ── One picture ───────────────────────────────────────────────────────────────────────────────────


def read_image(path):
    """(H, W) brightnesses of a PGM picture (P2, P5) or a .npy array; the brightest pixel is 1.

    UserError for anything else.
    """
    path = Path(path)
    try:
        raw = whole(path, LARGEST_PICTURE)
        image = read_npy(raw) if raw[:6] == b"\x93NUMPY" else read_pgm(raw)
        if not np.isfinite(image).all():
            raise ValueError("it holds NaN or infinity")
        if image.min() < 0 or image.max() > 1e30:
            raise ValueError(f"brightnesses from {image.min():g} to {image.max():g}")
    except (OSError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"--classify {path}: no grey picture as .pgm or .npy ({error})") from None
    return (image / (image.max() or 1)).astype(np.float32)


def read_npy(raw):
    """numpy's format, header parsed here: np.load would take the memory that a header claims."""
    file = io.BytesIO(raw)
    version = raw[6]
    file.seek(8)
    (size,) = struct.unpack("<H" if version == 1 else "<I", file.read(2 if version == 1 else 4))
    header = file.read(min(size, 10_000))
    try:
        entry = ast.literal_eval(header.decode("latin-1").strip())
        dtype, shape = np.dtype(entry["descr"]), tuple(entry["shape"])
        order = "F" if entry["fortran_order"] else "C"
        sizes = [int(n) for n in shape]
    except (ValueError, TypeError, KeyError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"a damaged header: {type(error).__name__}") from None
    body = file.read()
    if len(sizes) != 2 or min(sizes) < 1 or dtype.kind not in "uif" or dtype.itemsize > 8:
        raise ValueError(f"shape {shape}, dtype {dtype}")
    if len(body) != math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"{len(body):,} bytes for shape {shape} of {dtype}")
    return np.frombuffer(body, dtype).reshape(sizes, order=order).astype(np.float64)


def read_pgm(raw):
    """netpbm's format: P2 (text) or P5 (bytes), width, height, maximum, pixels; # is a comment."""
    (kind, *words), at = pgm_header(raw)
    if kind not in (b"P2", b"P5") or not all(w.isdigit() and len(w) < 10 for w in words):
        raise ValueError("no P2 or P5 picture")
    width, height, top = map(int, words)
    if min(width, height) < 1 or not 0 < top < 65536:
        raise ValueError(f"{width} × {height} pixels up to {top}")
    if kind == b"P2":
        pixels = np.array(raw[at:].split(), float)
    else:
        pixels = np.frombuffer(raw, ">u2" if top > 255 else np.uint8, width * height, at)
    if pixels.size != width * height or pixels.max() > top:
        raise ValueError(f"{pixels.size} pixels up to {pixels.max():g} instead of "
                         f"{width * height} up to {top}")  # fmt: skip
    return pixels.reshape(height, width) / top


def pgm_header(raw):
    """(the first four words that are not in a comment, where the pixels begin)."""
    words, at = [], 0
    while len(words) < 4:
        end = at
        while raw[end : end + 1] not in (b" ", b"\n", b"\t", b"\r", b"#", b""):
            end += 1
        if end > at:
            words.append(raw[at:end])
        elif raw[at : at + 1] == b"":
            raise ValueError("the header is cut short")
        at = (raw.index(b"\n", end) if raw[end : end + 1] == b"#" else end) + 1
    return words, at


def resized(image, shape, name):
    """The picture at the size that a net reads, with a word where that changes it."""
    if image.shape == tuple(shape):
        return image
    say(f"note       {name}: resized from {image.shape} to {tuple(shape)}")
    rows, columns = (shares(n, parts) for n, parts in zip(image.shape, shape, strict=True))
    return (rows @ image @ columns.T).astype(np.float32)


def shares(n, parts):
    """(parts, n) matrix whose row i averages the i-th of `parts` equal shares of n pixels."""
    borders = np.linspace(0, n, parts + 1)
    place = np.arange(n)
    covered = np.minimum(place + 1, borders[1:, None]) - np.maximum(place, borders[:-1, None])
    return np.maximum(covered, 0) * (parts / n)
