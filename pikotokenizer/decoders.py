"""Decoders: pieces → text, the way back. Described as in `tokenizer.json`, like the normalizers.

A step maps a list of pieces to a list of pieces; `decoder(spec)` joins what the last one leaves.
The bytes of byte-level tokenizers are not here: `Tokenizer.decode` joins them directly.
"""

import re
from collections.abc import Callable

from normalize import replacer, run

MARK = "▁"  # U+2581, SentencePiece's visible space
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Step = Callable[[list[str]], list[str]]


def byte_fallback(pieces: list[str], strict: bool = True) -> list[str]:
    """Runs of <0xE2> <0x82> <0xAC> become "€".

    A run that is not UTF-8 becomes one U+FFFD a byte: all of it if `strict` (tokenizers), else only
    the bytes that are wrong (SentencePiece).
    """
    out: list[str] = []
    run = b""
    for piece in [*pieces, ""]:
        match = BYTE_PIECE.fullmatch(piece)
        if match:
            run += bytes([int(match[1], 16)])
            continue
        if run:
            out.append(from_utf8(run, strict))
            run = b""
        out.append(piece)
    return out[:-1]


def from_utf8(data: bytes, strict: bool) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if strict:
            return "\ufffd" * len(data)
        good, rest = data[: error.start].decode("utf-8"), data[error.start + 1 :]
        return good + "\ufffd" + from_utf8(rest, strict)


def wordpiece(pieces: list[str], prefix: str, cleanup: bool) -> list[str]:
    """Spaces between words, none before a ##piece; `cleanup` closes up English punctuation."""
    out = []
    for i, piece in enumerate(pieces):
        if i:
            piece = piece[len(prefix) :] if piece.startswith(prefix) else " " + piece
        if cleanup:
            for mark in ".?!,":
                piece = piece.replace(f" {mark}", mark)
            for old, new in ((" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" do not", " don't"),
                             (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):  # fmt: skip
                piece = piece.replace(old, new)
        out.append(piece)
    return out


def metaspace(pieces: list[str], mark: str, prefix: bool) -> list[str]:
    """▁ becomes a space, except in the first piece, where it was put by the pre-tokenizer."""
    return [p.replace(mark, "" if prefix and i == 0 else " ") for i, p in enumerate(pieces)]


def strip(pieces: list[str], char: str, start: int, stop: int) -> list[str]:
    """At most `start` and `stop` of `char` off the ends of each piece."""
    out = []
    for piece in pieces:
        left = min(start, len(piece) - len(piece.lstrip(char)))
        right = min(stop, len(piece) - len(piece.rstrip(char)), len(piece) - left)
        out.append(piece[left : len(piece) - right])
    return out


def sentencepiece(pieces: list[str], prefix: bool, collapse: bool) -> list[str]:
    """SentencePiece's own: one leading ▁ goes (all of them if runs of spaces were collapsed)."""
    out, at_start = [], prefix or collapse
    for piece in byte_fallback(pieces, strict=False):
        if at_start and piece:
            rest = piece.removeprefix(MARK)
            at_start = collapse and not rest
            piece = rest
        out.append(piece.replace(MARK, " "))
    return out


def bpe_suffix(pieces: list[str], suffix: str) -> list[str]:
    """CLIP's: the end-of-word mark is a space, except at the very end."""
    last = len(pieces) - 1
    return [p.replace(suffix, "" if i == last else " ") for i, p in enumerate(pieces)]


def step(spec: dict) -> Step:
    """The function of one decoder; raises ValueError if it is not supported."""
    kind = spec["type"]
    if kind == "Sequence":
        steps = [step(s) for s in spec["decoders"]]
        return lambda pieces: run(steps, pieces)
    if kind == "ByteFallback":
        return byte_fallback
    if kind == "Fuse":
        return lambda pieces: ["".join(pieces)]
    if kind == "Replace":
        replace = replacer(spec)
        return lambda pieces: [replace(piece) for piece in pieces]
    if kind == "Strip" and len(spec["content"]) == 1 and min(spec["start"], spec["stop"]) >= 0:
        return lambda pieces: strip(pieces, spec["content"], spec["start"], spec["stop"])
    if kind == "WordPiece":
        return lambda pieces: wordpiece(pieces, spec["prefix"], spec["cleanup"])
    if kind == "Metaspace":
        old = "always" if spec.get("add_prefix_space", True) else "never"
        prefix = spec.get("prepend_scheme", old) != "never"
        return lambda pieces: metaspace(pieces, spec["replacement"], prefix)
    if kind == "BPEDecoder":
        return lambda pieces: bpe_suffix(pieces, spec["suffix"])
    if kind == "SentencePiece":
        return lambda pieces: sentencepiece(pieces, spec["prefix"], spec["collapse"])
    raise ValueError(f"the decoder {spec} is not supported")


def decoder(spec: dict | None) -> Callable[[list[str]], str]:
    """pieces → text. Without a description they are joined by spaces, as tokenizers does."""
    if spec is None:
        return " ".join
    if spec["type"] == "ByteLevel":
        return "".join
    one = step(spec)
    return lambda pieces: "".join(one(pieces))
