"""The front door: `load(path)` any tokenizer, `save(tokenizer, path)` it in any format.

    from tokenizer import load, BPE, WordPiece, Unigram

    load("cl100k_base.tiktoken").encode("Halo dunia!")     # a list of ids
    load("tokenizer.model", special_tokens="llama3")       # whose rank file it is
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
    Special,
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
from options import UserError, say
from run import whole_file
from spm import read_model, write_model
from unigram import Unigram
from wordpiece import WordPiece

__all__ = ["BPE", "AddedToken", "StreamDecoder", "Tokenizer", "Unigram", "WordPiece", "load", "pad",
           "save", "truncate"]  # fmt: skip

# What `load` looks for in a directory, in this order.
NAMES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.bpe", "merges.txt",
    "encoder.json", "vocab.json",
)  # fmt: skip
PAIRS = (("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"))  # GPT-2's: merges and ids
RANK_FILE = re.compile(rb"(?:(?:[A-Za-z0-9+/]+={0,2}|=) \d+\r?(?:\n|\Z)){1,9}")
MERGES_FILE = re.compile(
    rb"(?:#version[^\n]*(?:\n|\Z))?(?:[^\s]+ [^\s]+\r?(?:\n|\Z)){1,9}|#version"
)
# What a damaged file can make the readers trip over; `load` turns all of it into one sentence.
DAMAGE = (
    KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError, RecursionError,
    struct.error, binascii.Error,
)  # fmt: skip


def load(
    path: str | os.PathLike, pattern: str | None = None, special_tokens: Special = None
) -> Tokenizer:
    """The tokenizer in a file or a directory (a run, a Hugging Face checkpoint).

    pattern, special_tokens: for files that do not say them. A rank file that is not one of OpenAI's
    needs the pattern, or the name of its publisher as `special_tokens` ("llama3", "llama4",
    "whisper-v3" … , see published.py). special_tokens may also be a dict of texts and ids, or a
    list of texts, which get the ids after the last one; GPT-2's pair of files takes them, too.

    Says on stderr what it does not apply (a file's truncation and padding). Raises ValueError with
    one sentence that names the file if it is damaged, unknown, or asks for something that is not
    supported; OSError if it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = in_directory(path)
    data = path.read_bytes()
    try:
        tokenizer = read(data, path, pattern, special_tokens)
        # A step may be described wrongly in a way that shows only when it runs: let it show here.
        tokenizer.split(tokenizer.normalize("Aé 1\n"), True)
        tokenizer.join([tokenizer.shown(i) for i in list(tokenizer.pieces)[:5]])
    except DAMAGE as error:
        plain = type(error) is ValueError
        what = str(error) if plain else f"the file is damaged ({type(error).__name__}: {error})"
        raise ValueError(f"{path}: {what}") from error
    for note in tokenizer.notes:
        say(f"note       {path.name}: {note}")
    return tokenizer


def in_directory(folder: Path) -> Path:
    """The file to read in a directory; ValueError if there is none."""
    found = [folder / name for name in NAMES if (folder / name).is_file()]
    found += sorted(folder.glob("*.tiktoken"))
    if not found:
        raise ValueError(f"{folder} holds none of {', '.join(NAMES)}, nor a *.tiktoken")
    return found[0]


def read(data: bytes, path: Path, pattern: str | None, special_tokens: Special) -> Tokenizer:
    """`data` by whichever reader it looks like."""
    if not data:
        raise ValueError("the file is empty")
    if RANK_FILE.match(data):
        return read_tiktoken(data, pattern, special_tokens)
    if data.lstrip()[:1] == b"{":
        parsed = json.loads(data.decode("utf-8"))
        if not isinstance(parsed.get("model"), dict):  # in GPT-2's ids "model" is a piece
            merges = beside(path, merges=False)
            if merges is None:
                raise ValueError("these are the ids of GPT-2's pair: the merges are not beside it")
            return read_pair(merges.read_text(encoding="utf-8"), parsed, path, special_tokens)
    elif MERGES_FILE.match(data):
        ids = beside(path, merges=True)
        vocab = None if ids is None else json.loads(ids.read_text(encoding="utf-8"))
        return read_pair(data.decode("utf-8"), vocab, path, special_tokens)
    if special_tokens is not None:
        raise ValueError("special tokens can be told to a rank file or GPT-2's pair of files only: "
                         "this file names its own")  # fmt: skip
    if data.lstrip()[:1] == b"{":
        return read_tokenizer_json(parsed)
    return read_model(data) if data[0] == 0x0A else read_vocab_txt(data.decode("utf-8"))


def beside(path: Path, merges: bool) -> Path | None:
    """The other file of GPT-2's pair: `path` has the merges (or the ids), None if it is not there.

    What stands before the usual name, as in small-merges.txt, must be the same for both.
    """
    names = [pair if merges else pair[::-1] for pair in PAIRS]
    start = next((path.name.removesuffix(a) for a, _ in names if path.name.endswith(a)), "")
    own_first = sorted(names, key=lambda pair: not path.name.endswith(pair[0]))
    found = (path.with_name(start + other) for _, other in own_first)
    return next((file for file in found if file.is_file()), None)


def read_pair(merges: str, vocab: dict | None, path: Path, special_tokens: Special) -> BPE:
    """GPT-2's pair, with `added_tokens.json` if that is there, too."""
    more = path.with_name("added_tokens.json")
    added = json.loads(more.read_text(encoding="utf-8")) if more.is_file() else None
    return read_gpt2(merges, vocab, added, special_tokens)


def save(tokenizer: Tokenizer, path: str | os.PathLike, new: bool = False) -> list[Path]:
    """Writes a tokenizer in the format that the name says; returns the files written.

    *.json: Hugging Face; *.tiktoken; *.model: SentencePiece; merges.txt and *.bpe: GPT-2, with
    vocab.json or encoder.json beside it; other *.txt: BERT. Raises ValueError for another
    name, or if the format cannot express it; UserError if the file cannot be written, or if it
    exists and should be `new`.
    """
    path = Path(path)
    files: dict[Path, bytes] = {}
    if path.suffix == ".json":
        files[path] = as_json(write_tokenizer_json(tokenizer)).encode("utf-8")
    elif path.suffix == ".tiktoken":
        files[path] = write_tiktoken(tokenizer)
    elif path.suffix == ".model":
        files[path] = write_model(tokenizer)
    elif path.name.endswith("merges.txt") or path.suffix == ".bpe":
        merges, vocab = write_gpt2(tokenizer)
        ids = path.name.removesuffix("merges.txt") + "vocab.json"
        files[path] = merges.encode("utf-8")
        files[path.with_name(ids if path.suffix == ".txt" else "encoder.json")] = as_json(
            vocab
        ).encode("utf-8")
    elif path.suffix == ".txt":
        files[path] = write_vocab_txt(tokenizer).encode("utf-8")
    else:
        raise ValueError(
            f"{path.name}: the name must end in .json, .tiktoken, .model, .txt or .bpe"
        )
    for file in files:
        if new and os.path.lexists(file):
            raise UserError(f"{file} exists already: name another, or move it away")
    for file, content in files.items():
        with whole_file(file) as part:
            part.write_bytes(content)
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
