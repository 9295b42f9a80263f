"""SentencePiece's `.model` files, read and written: a protocol buffer of pieces and settings.

    message ModelProto     { repeated Piece pieces = 1; Trainer trainer = 2;
                             Normalizer normalizer = 3, denormalizer = 5; }
    message Piece          { string piece = 1; float score = 2; Type type = 3; }
    message Trainer        { Model model_type = 3; int32 vocab_size = 4; bool suffix = 24;
                             bool byte_fallback = 35; int32 unk_id = 40, bos_id = 41 …;
                             string unk_surface = 44, unk_piece = 45; }
    message Normalizer     { string name = 1; bytes charsmap = 2; bool add_dummy_prefix = 3,
                             remove_extra_whitespaces = 4, escape_whitespaces = 5; }

A buffer is a row of fields: a number (field · 8 + wire type) and a value, numbers in base 128 with
the low digits first. Field numbers: `sentencepiece_model.proto` of google/sentencepiece.

A user-defined piece is always cut out whole; an unused one is never given.

Left out, and refused by name: user-defined and unused pieces of BPE, word and character models, ▁
as a suffix, denormalizers, another unk_surface.
"""

import base64
import math
import struct

from base import UNKNOWN_TEXT, AddedToken
from bpe import BPE
from decoders import MARK
from unigram import Unigram, sentencepiece_pipeline

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BYTE_PAIR = 1, 2
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """A base-128 number at position `at`, and the position behind it."""
    value = shift = 0
    while at < len(data) and shift < 70:
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
        shift += 7
    raise ValueError("the protocol buffer is truncated or damaged")


def read_fields(data: bytes) -> dict[int, list]:
    """Field number → its values in order: int, or bytes for strings, messages and floats."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        key, at = read_number(data, at)
        wire = key & 7
        if wire == 0:
            value, at = read_number(data, at)
        else:
            size, at = read_number(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, -1), at)
            if size < 0 or at + size > len(data):
                raise ValueError("the protocol buffer is truncated or damaged")
            value, at = data[at : at + size], at + size
        fields.setdefault(key >> 3, []).append(value)
    return fields


def message(fields: dict[int, list], number: int) -> dict[int, list]:
    """A message inside; several of one number are one after the other, as protocol buffers want."""
    last(fields, number, b"", bytes)
    return read_fields(b"".join(value for value in fields.get(number, [])))


def last(fields: dict[int, list], number: int, default, kind: type = int):
    """The last value of a field, as protocol buffers want it; ValueError if its type is wrong."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, kind):
        raise ValueError(f"field {number} of the protocol buffer has the wrong type")
    return value


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field, written."""
    if isinstance(value, float):
        return write_number(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return write_number(number << 3) + write_number(value & (1 << 64) - 1)
    data = value.encode("utf-8") if isinstance(value, str) else value
    return write_number(number << 3 | 2) + write_number(len(data)) + data


def write_number(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def read_pieces(fields: dict[int, list]) -> list[tuple[str, float, int]]:
    """(text, score, type) of each piece. Raises ValueError for the types that are left out."""
    pieces = []
    for n in range(len(fields.get(1, []))):
        piece = message({1: fields[1][n : n + 1]}, 1)
        text = last(piece, 1, b"", bytes).decode("utf-8")
        score = struct.unpack("<f", last(piece, 2, bytes(4), bytes))[0]
        kind = last(piece, 3, NORMAL)
        if not math.isfinite(score):
            raise ValueError(f"the score of piece {text!r} is not finite")
        if not NORMAL <= kind <= BYTE:
            raise ValueError(f"the type-{kind} piece {text!r} is not supported")
        if not text:
            raise ValueError(f"piece {len(pieces)} is empty")
        pieces.append((text, score, kind))
    return pieces


def read_model(data: bytes) -> BPE | Unigram:
    """The tokenizer in a `.model` file; raises ValueError for what is damaged or not supported."""
    fields = read_fields(data)
    trainer, settings = message(fields, 2), message(fields, 3)
    pieces = read_pieces(fields)
    if last(trainer, 24, 0):
        raise ValueError("▁ as a suffix is not supported")
    if not last(settings, 5, 1):
        raise ValueError("a normalizer that does not write spaces as ▁ is not supported")
    if last(message(fields, 5), 2, b"", bytes):
        raise ValueError("a denormalizer is not supported")
    if last(trainer, 44, UNKNOWN_TEXT.encode("utf-8"), bytes).decode("utf-8") != UNKNOWN_TEXT:
        raise ValueError("an unk_surface other than ⁇ is not supported")
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN]
    if len(vocab) != len(pieces) or len(unknown) != 1:
        raise ValueError("pieces are repeated, or there is not exactly one unknown piece")
    user = [i for i, (_, _, kind) in enumerate(pieces) if kind == USER_DEFINED]
    pipeline = sentencepiece_pipeline(
        base64.b64encode(last(settings, 2, b"", bytes)).decode("ascii"),
        bool(last(settings, 3, 1)),
        bool(last(settings, 4, 1)),
        [pieces[i][0] for i in user],
    )
    named = [(i, text) for i, (text, _, kind) in enumerate(pieces) if kind in (UNKNOWN, CONTROL)]
    pipeline.added = [AddedToken(i, text) for i, text in named]
    hidden = [i for i, (_, _, kind) in enumerate(pieces) if kind not in (NORMAL, USER_DEFINED)]
    fallback = bool(last(trainer, 35, 0))
    if {text for text, _, kind in pieces if kind == BYTE} != (set(BYTES) if fallback else set()):
        raise ValueError("the pieces for bytes do not go with byte_fallback")
    scores = [score for _, score, _ in pieces]
    model = last(trainer, 3, UNIGRAM)
    if model == UNIGRAM:
        return Unigram(
            vocab, scores, pipeline, unk_id=unknown[0], byte_fallback=fallback, hidden=hidden,
            single=True, user=user,
        )  # fmt: skip
    apart = [text for text, _, kind in pieces if kind in (USER_DEFINED, UNUSED)]
    if apart:
        raise ValueError(f"the user-defined or unused piece {apart[0]!r} of a BPE is not supported")
    if model != BYTE_PAIR:
        raise ValueError(f"model type {model} (3: words, 4: characters) is not supported")
    ranks = ranks_of_scores({text: s for text, s, kind in pieces if kind == NORMAL})
    unk = pieces[unknown[0]][0]
    return BPE(vocab, None, pipeline, ranks, False, fallback, unk, fuse_unk=True, hidden=hidden)


def ranks_of_scores(scores: dict[str, float]) -> dict[str, int]:
    """The highest score merges first; equal scores have equal ranks, so that the leftmost does."""
    order = {score: rank for rank, score in enumerate(sorted(set(scores.values()), reverse=True))}
    return {piece: order[score] for piece, score in scores.items()}


def scores_of(tokenizer: BPE | Unigram) -> list[float]:
    """The score of each id: log-probabilities, or minus the rank of the merge that makes it."""
    if isinstance(tokenizer, Unigram):
        return tokenizer.scores
    ranks = tokenizer.ranks
    if ranks is None:
        ranks = {}
        for rank, (a, b) in enumerate(tokenizer.merges):
            ranks.setdefault(a + b, rank)
    lowest = max(ranks.values(), default=0) + 1
    return [-float(ranks.get(tokenizer.pieces[i], lowest)) for i in range(len(tokenizer))]


def write_model(tokenizer) -> bytes:
    """A `.model` file of a BPE or Unigram tokenizer. ValueError if the format cannot express it."""
    normalizer = tokenizer.pipeline.normalizer
    if normalizer == {"type": "Sequence", "normalizers": marked_steps()}:
        normalizer = sentencepiece_pipeline().normalizer
    if tokenizer.algorithm not in ("bpe", "unigram") or tokenizer.byte_level:
        raise ValueError("a .model holds Unigram or BPE on characters, not bytes or WordPiece")
    if (normalizer or {}).get("type") != "SentencePiece" or tokenizer.pipeline.pre_tokenizer:
        raise ValueError("a .model cannot express this normalizer or pre-tokenizer")
    unk_id = tokenizer.vocab.get(tokenizer.unk) if isinstance(tokenizer, BPE) else tokenizer.unk_id
    if unk_id is None or set(tokenizer.pieces) != set(range(len(tokenizer))):
        raise ValueError("a .model needs an unknown token, and ids 0, 1, 2 … without gaps")
    scores, out = scores_of(tokenizer), []
    for i in range(len(tokenizer)):
        text = tokenizer.pieces[i]
        kind = UNKNOWN if i == unk_id else CONTROL if i in tokenizer.added_ids else NORMAL
        if tokenizer.byte_fallback and i in tokenizer.byte_ids:
            kind = BYTE
        elif isinstance(tokenizer, Unigram) and i in tokenizer.user:
            kind = USER_DEFINED
        elif kind == NORMAL and i in tokenizer.hidden:
            kind = UNUSED
        piece = field(1, text) + field(2, float(scores[i])) + field(3, kind)
        out.append(field(1, piece))
    model = BYTE_PAIR if isinstance(tokenizer, BPE) else UNIGRAM
    trainer = field(3, model) + field(4, len(tokenizer)) + field(35, int(tokenizer.byte_fallback))
    trainer += field(40, unk_id) + field(41, -1) + field(42, -1) + field(43, -1)
    trainer += field(45, tokenizer.pieces[unk_id])
    settings = field(1, "piko") + field(2, base64.b64decode(normalizer["charsmap"]))
    settings += field(3, int(normalizer["prefix"])) + field(4, int(normalizer["collapse"]))
    return b"".join(out) + field(2, trainer) + field(3, settings + field(5, 1))


def marked_steps() -> list[dict]:
    """The normalizers of Llama's `tokenizer.json` that say what SentencePiece does by default."""
    return [
        {"type": "Prepend", "prepend": MARK},
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
    ]
