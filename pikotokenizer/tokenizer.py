"""The front door: `load(path)` any tokenizer, `save(tokenizer, path)` it in any format.

    from tokenizer import load, BPE, WordPiece, Unigram

    load("cl100k_base.tiktoken").encode("Halo dunia!")     # a list of ids
    BPE.train(text, 1024).decode([72, 101])                # a text

A file is recognised by what is in it, a new one by its name.
"""

import binascii
import json
import os
import re
import struct
from pathlib import Path

from base import AddedToken, StreamDecoder, Tokenizer
from bpe import BPE
from formats import (
    as_json,
    read_gpt2,
    read_tiktoken,
    read_tokenizer_json,
    read_vocab_txt,
    write_gpt2,
    write_tiktoken,
    write_tokenizer_json,
    write_vocab_txt,
)
from run import write_whole
from spm import read_model, write_model
from unigram import Unigram
from wordpiece import WordPiece

__all__ = ["BPE", "AddedToken", "StreamDecoder", "Tokenizer", "Unigram", "WordPiece", "load", "pad",
           "save", "truncate"]  # fmt: skip

NAMES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.bpe")  # in a directory
# What a damaged file can make the readers trip over; `load` turns all of it into one sentence.
DAMAGE = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError,
    struct.error, binascii.Error,
)  # fmt: skip


def load(path: str | os.PathLike, pattern: str | None = None) -> Tokenizer:
    """The tokenizer in a file or a directory (a run, a Hugging Face checkpoint).

    pattern: for tiktoken's rank files that are not OpenAI's own. Raises ValueError with one
    sentence that names the file if it is damaged, unknown, or asks for something that is not
    supported; OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in NAMES if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} holds none of {', '.join(NAMES)}")
        path = found[0]
    data = path.read_bytes()
    try:
        tokenizer = read(data, path, pattern)
        # A step may be described wrongly in a way that shows only when it runs: let it show here.
        tokenizer.split(tokenizer.normalize("Aé 1\n"), True)
        tokenizer.join([tokenizer.shown(i) for i in list(tokenizer.pieces)[:5]])
        return tokenizer
    except DAMAGE as error:
        plain = type(error) is ValueError
        what = str(error) if plain else f"the file is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {what}") from error


def read(data: bytes, path: Path, pattern: str | None) -> Tokenizer:
    """`data` by whichever reader it looks like."""
    if not data:
        raise ValueError("the file is empty")
    if data.lstrip()[:1] == b"{":
        parsed = json.loads(data.decode("utf-8"))
        if "model" in parsed:
            return read_tokenizer_json(parsed)
        return read_gpt2(path.with_name("vocab.bpe").read_text(encoding="utf-8"), parsed)
    if data.startswith(b"#version"):
        encoder = path.with_name("encoder.json")
        vocab = json.loads(encoder.read_text(encoding="utf-8")) if encoder.is_file() else None
        return read_gpt2(data.decode("utf-8"), vocab)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
        return read_tiktoken(data, pattern)
    if data[0] == 0x0A:
        return read_model(data)
    return read_vocab_txt(data.decode("utf-8"))


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> list[Path]:
    """Writes a tokenizer in the format that the name says; returns the files written.

    *.json: Hugging Face; *.tiktoken; *.model: SentencePiece; *.txt: BERT; *.bpe: GPT-2, with
    encoder.json beside it. Raises ValueError for another name, or if the format cannot express it.
    """
    path = Path(path)
    files: dict[Path, bytes] = {}
    if path.suffix == ".json":
        files[path] = as_json(write_tokenizer_json(tokenizer)).encode("utf-8")
    elif path.suffix == ".tiktoken":
        files[path] = write_tiktoken(tokenizer)
    elif path.suffix == ".model":
        files[path] = write_model(tokenizer)
    elif path.suffix == ".txt":
        files[path] = write_vocab_txt(tokenizer).encode("utf-8")
    elif path.suffix == ".bpe":
        merges, vocab = write_gpt2(tokenizer)
        files[path] = merges.encode("utf-8")
        files[path.with_name("encoder.json")] = as_json(vocab).encode("utf-8")
    else:
        raise ValueError(
            f"{path.name}: the name must end in .json, .tiktoken, .model, .txt or .bpe"
        )
    for file, content in files.items():
        write_whole(file, content)
    return list(files)


# ---- batches ----


def truncate(ids: list[int], length: int, side: str = "right") -> list[int]:
    """At most `length` ids; `side` says which end is cut off."""
    if length < 0 or side not in ("left", "right"):
        raise ValueError(f"length {length} must not be negative and side {side!r} left or right")
    return ids[:length] if side == "right" else ids[max(0, len(ids) - length) :]


def pad(batch: list[list[int]], pad_id: int, length: int | None = None, side: str = "right"):
    """Rows of equal length (the longest, or `length`) and a mask of the same shape, 1 at real ids.

    Raises ValueError if a row is longer than `length`.
    """
    longest = max(map(len, batch), default=0)
    length = longest if length is None else length
    if longest > length or side not in ("left", "right"):
        raise ValueError(f"a row of {longest} ids does not fit {length}; side is left or right")
    rows, masks = [], []
    for ids in batch:
        gap = length - len(ids)
        fill, ones, zeros = [pad_id] * gap, [1] * len(ids), [0] * gap
        rows.append([*ids, *fill] if side == "right" else [*fill, *ids])
        masks.append([*ones, *zeros] if side == "right" else [*zeros, *ones])
    return rows, masks
