"""Our tokenizers in the format of Hugging Face's `tokenizers`, so that other programs read them.

A tokenizer.json says how text becomes ids, as a pipeline:

    text ─normalizer─▶ ─pre_tokenizer─▶ pieces ─model─▶ tokens ─post_processor─▶ with <s> before

SentencePiece's own file, `tokenizer.model`, is in Google's protobuf format. transformers needs two
more libraries to read it, so an export holds a tokenizer.json as well. What a SentencePiece model
does to spaces is written in that file alone: `spaces_of` reads it.

This file is the same in every folder that exports a language model.
"""

from collections.abc import Iterator
from pathlib import Path

from options import say
from run import write_json
from tokenizer import (
    OUR_SETTINGS,
    ByteTokenizer,
    CharacterTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # by which SentencePiece writes a space


def save_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Save so that AutoTokenizer gives the same ids; what came from there goes back as it was."""
    tokenizer.save(folder)
    settings = getattr(tokenizer, "settings", {})
    ours = OUR_SETTINGS["tokenizer_class"]
    if isinstance(tokenizer, ByteTokenizer):
        content = bytes_json(tokenizer)
    elif isinstance(tokenizer, CharacterTokenizer):
        content = characters_json(tokenizer)
    elif not isinstance(tokenizer, SentencePieceTokenizer):
        return  # it came from a tokenizer.json
    elif settings.get("tokenizer_class", ours) != ours:
        return  # it came with words to transformers of its own
    elif spaces_of(tokenizer.model) is None:
        say("tokenizer  tokenizer.model is exported as it is: reading it takes protobuf")
        return
    else:
        content = sentencepiece_json(tokenizer)
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", settings_of(tokenizer, content))


def settings_of(tokenizer: Tokenizer, content: dict) -> dict:
    """What tokenizer_config.json says beside a tokenizer.json with this content."""
    name_of = {one["id"]: one["content"] for one in content["added_tokens"]}
    return OUR_SETTINGS | {
        "bos_token": name_of.get(tokenizer.bos_id),
        "eos_token": name_of.get(tokenizer.eos_id),
        "add_bos_token": bool(tokenizer.prefix),
        "add_eos_token": bool(tokenizer.suffix),
    }


# ── The three kinds ───────────────────────────────────────────────────────────────────────────────


def bytes_json(tokenizer: ByteTokenizer) -> dict:
    """The 256 bytes, as byte-pair encoding without a merge."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    level["trim_offsets"] = False
    return whole(
        tokenizer,
        specials={"<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id},
        pre_tokenizer=level,
        decoder=level,
        model={"type": "BPE", "vocab": {c: i for i, c in enumerate(byte_characters())}}
        | {"merges": []},
    )


def characters_json(tokenizer: CharacterTokenizer) -> dict:
    """Every character by itself, as words of one letter."""
    specials = {"<unk>": tokenizer.unknown, "<s>": tokenizer.bos_id, "</s>": tokenizer.eos_id}
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated"}
    return whole(
        tokenizer,
        specials=specials,
        pre_tokenizer=split | {"invert": False},
        decoder={"type": "Fuse"},
        model={"type": "WordLevel", "vocab": tokenizer.id_of | specials, "unk_token": "<unk>"},
    )


def sentencepiece_json(tokenizer: SentencePieceTokenizer) -> dict:
    """Byte-pair encoding by a SentencePiece model that `spaces_of` understands."""
    processor, ids = tokenizer.processor, range(tokenizer.vocab_size)
    piece = [processor.id_to_piece(i) for i in ids]
    symbols = user_symbols(tokenizer.model)
    specials = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
    plain = [i for i in ids if not processor.is_byte(i) and i not in symbols]
    merged = sorted(set(plain) - set(specials), key=processor.get_score, reverse=True)
    normalizers, decoders = spaces_json(*spaces_of(tokenizer.model))
    return whole(
        tokenizer,
        specials={piece[i]: i for i in specials},
        symbols={piece[i]: i for i in symbols},
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "type": "BPE",
            "vocab": {text: i for i, text in enumerate(piece)},
            "merges": merges_of([piece[i] for i in merged]),
            "unk_token": piece[processor.unk_id()],
            "fuse_unk": True,
            "byte_fallback": any(processor.is_byte(i) for i in ids),
        },
    )


def spaces_json(dummy_prefix: bool, remove_extra: bool) -> tuple[list[dict], list[dict]]:
    """Normalizers and decoders that treat spaces as SentencePiece does, see `spaces_of`."""

    def replace(pattern: dict, content: str) -> dict:
        return {"type": "Replace", "pattern": pattern, "content": content}

    normalizers = [replace({"String": " "}, MARK)]
    decoders = [replace({"String": MARK}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": MARK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if remove_extra:
        before = [replace({"Regex": r"\A +"}, ""), replace({"Regex": " {2,}"}, " ")]
        normalizers = [*before, *normalizers, replace({"Regex": MARK + r"+\z"}, "")]
    return normalizers, decoders


def whole(
    tokenizer: Tokenizer,
    specials: dict[str, int],
    model: dict,
    decoder: dict,
    symbols: dict[str, int] | None = None,
    normalizer: dict | None = None,
    pre_tokenizer: dict | None = None,
) -> dict:
    """The content of a tokenizer.json.

    specials: tokens that no text becomes. symbols: tokens that stand in the text as they are and
    are never part of another one.
    """
    symbols = symbols or {}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": name, "special": True} for name, i in specials.items()]
    added += [{"id": i, "content": name, "special": False} for name, i in symbols.items()]
    return {
        "version": "1.0",
        "added_tokens": [one | flags for one in sorted(added, key=lambda one: one["id"])],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": around_json(tokenizer, specials),
        "decoder": decoder,
        "model": model,
    }


def around_json(tokenizer: Tokenizer, specials: dict[str, int]) -> dict | None:
    """The post-processor that puts the tokenizer's prefix and suffix around a text, or two."""
    name_of = {i: name for name, i in specials.items()}
    before = [{"SpecialToken": {"id": name_of[i], "type_id": 0}} for i in tokenizer.prefix]
    after = [{"SpecialToken": {"id": name_of[i], "type_id": 0}} for i in tokenizer.suffix]
    text, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    used = {name_of[i]: i for i in (*tokenizer.prefix, *tokenizer.suffix)}
    return {
        "type": "TemplateProcessing",
        "single": [*before, text, *after],
        "pair": [*before, text, second, *after],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for name, i in used.items()
        },
    }


def merges_of(pieces: list[str]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE model, which stores only their results, best first.

    SentencePiece joins the neighbours whose joint piece comes first in the vocabulary, so every way
    to split a piece into two others is a merge, with the rank of the piece.
    """
    rank = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(a, b) for a, b in splits if a in rank and b in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges


def byte_characters() -> list[str]:
    """The visible characters by which GPT-2's format writes the 256 bytes.

    Bytes that print stand for themselves, the others for the characters from 256 on, in order.
    """
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


# ── What a tokenizer.model says ───────────────────────────────────────────────────────────────────

# numbers of fields and kinds in SentencePiece's sentencepiece_model.proto
PIECE, TRAINING, NORMALIZING = 1, 2, 3  # of the whole
KIND_OF_PIECE, USER_DEFINED, UNUSED = 3, 4, 5  # of a piece
KIND_OF_MODEL, BPE, SPACE_AS_SUFFIX = 3, 2, 24  # of the training
CHARACTER_MAP, DUMMY_PREFIX, REMOVE_EXTRA, ESCAPE = 2, 3, 4, 5  # of the normalizing


def spaces_of(model: bytes) -> tuple[bool, bool] | None:
    """How a SentencePiece model treats spaces; None for one that tokenizer.json cannot describe.

    The two are: whether a text gets a space before it (so that its first word is as the others),
    and whether further spaces, those at the ends and those beside another, are left out. None is
    for models other than BPE, for those that rewrite characters, and for rare combinations.
    """
    whole_model = dict(fields(model))  # of pieces, which are many, the last one stays
    training = dict(fields(whole_model.get(TRAINING, b"")))
    normalizing = dict(fields(whole_model.get(NORMALIZING, b"")))
    dummy_prefix = bool(normalizing.get(DUMMY_PREFIX, 1))
    kinds = {kind for _, kind in kinds_of_pieces(model)}
    if (
        training.get(KIND_OF_MODEL) != BPE
        or training.get(SPACE_AS_SUFFIX, 0)
        or normalizing.get(CHARACTER_MAP)
        or not normalizing.get(ESCAPE, 1)
        or UNUSED in kinds
        or (dummy_prefix and USER_DEFINED in kinds)
    ):
        return None
    return dummy_prefix, bool(normalizing.get(REMOVE_EXTRA, 1))


def user_symbols(model: bytes) -> list[int]:
    """The ids of the pieces that are never joined with others, such as our newline."""
    return [i for i, kind in kinds_of_pieces(model) if kind == USER_DEFINED]


def kinds_of_pieces(model: bytes) -> Iterator[tuple[int, int]]:
    """Yield the id of each piece and what kind it is; 1 is an ordinary one."""
    pieces = (value for number, value in fields(model) if number == PIECE)
    for i, piece in enumerate(pieces):
        yield i, dict(fields(piece)).get(KIND_OF_PIECE, 1)


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (number, value) for each field of a protobuf message.

    A field is a key, 8 · number + wire type, and a value: a number (wire type 0), 8 or 4 bytes (1
    and 5), or a length and as many bytes (2). Keys, numbers and lengths are in groups of seven
    bits, lowest first, a byte each, whose highest bit says that more follow.
    """
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = message[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        wire = key & 7
        if wire == 0:
            yield key >> 3, number()
        else:
            length = {1: 8, 5: 4}.get(wire) or number()
            yield key >> 3, message[at : at + length]
            at += length
