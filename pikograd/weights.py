"""safetensors files, written and read on numpy alone.

The format (github.com/huggingface/safetensors): the length of the header as 8 little-endian bytes,
a JSON header name → {dtype, shape, data_offsets}, then the bytes of all arrays one after the other.
torch reads such a file with `safetensors.torch.load_file`.
"""

import json
import math
import struct

import numpy as np

from options import UserError
from run import whole_file

DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST_HEADER = 1 << 26  # bytes


def save_tensors(path, arrays, metadata=None):
    """Write name → array, whole or not at all. metadata: texts to keep beside them."""
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, a in arrays.items():
        offsets = [at, at + a.nbytes]
        header[name] = {"dtype": CODES[a.dtype], "shape": a.shape, "data_offsets": offsets}
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for a in arrays.values():
            file.write(np.ascontiguousarray(a).tobytes())


def load_tensors(path):
    """(name → array, metadata) of a safetensors file. UserError if it is missing or damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        what = f"{path} cannot be read ({error.strerror})"
        raise UserError(f"{what}: train first, or give --weights") from None
    try:
        return parse(raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error})") from None


def parse(raw):
    """The arrays and the metadata in the bytes of a file. ValueError and its like if damaged."""
    (size,) = struct.unpack("<Q", raw[:8])
    if size > min(LARGEST_HEADER, len(raw)):
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(raw[8 : 8 + size])
    metadata, body, arrays = header.pop("__metadata__", {}), raw[8 + size :], {}
    for name, entry in header.items():
        (first, last), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        if not all(type(n) is int and n >= 0 for n in (first, last, *shape)):
            raise ValueError(f"{name} has no sensible shape or place")
        if last > len(body) or last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not fit into the file")
        arrays[name] = np.frombuffer(body[first:last], dtype).reshape(shape).copy()
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("the metadata are no texts")
    return arrays, metadata
