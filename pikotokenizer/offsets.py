"""Where in the text each token came from.

Normalization changes lengths, so it is done again here step by step, on pieces small enough to know
their origin: a step becomes a list of (what came out, how many characters went in).
"""

import re

from characters import well_formed
from decoders import MARK
from normalize import charsmap_of, extends, graphemes, normalizer, splitter_for, strip

Span = tuple[int, int]
Piece = tuple[str, int]  # what came out, how many characters went in


def pieces_of(spec: dict, text: str) -> list[Piece]:
    """One step of a normalizer on `text`, piece by piece."""
    kind, whole = spec["type"], normalizer(spec)
    if kind == "Prepend":
        return [(spec["prepend"], 0), *((c, 1) for c in text)] if text else []
    if kind == "SentencePiece":
        return sentencepiece_pieces(spec, text)
    if kind == "Strip":
        left = len(text) - len(strip(text, spec["strip_left"], False))
        kept = whole(text)
        pieces = [("", left), *((c, 1) for c in kept), ("", len(text) - left - len(kept))]
    elif kind == "Replace":
        pieces, end = [], 0
        for match in splitter_for(spec["pattern"]).regex(text).finditer(text):
            pieces += [(c, 1) for c in text[end : match.start()]]
            pieces.append((spec["content"], len(match[0])))
            end = match.end()
        pieces += [(c, 1) for c in text[end:]]
    else:
        cut = graphemes if kind == "Precompiled" else clusters
        pieces = [(whole(cluster), len(cluster)) for cluster in cut(text)]
    if "".join(out for out, _ in pieces) != whole(text):
        return [(whole(text), len(text))]  # not a local step: all of it comes from all of it
    return pieces


def sentencepiece_pieces(spec: dict, text: str) -> list[Piece]:
    """The same for SentencePiece: the map, then the spaces, then ▁ in front."""
    charsmap = charsmap_of(spec)
    pieces = [(charsmap(c), len(c)) for c in clusters(text)]
    if "".join(out for out, _ in pieces) != charsmap(text):
        pieces = [(charsmap(text), len(text))]
    if spec["collapse"]:
        pieces = collapsed(pieces)
    pieces = [(out.replace(" ", MARK), size) for out, size in pieces]
    if spec["collapse"]:
        pieces = trimmed(pieces, MARK)
    filled = any(out for out, _ in pieces)
    return [(MARK, 0), *pieces] if spec["prefix"] and filled else pieces


def collapsed(pieces: list[Piece]) -> list[Piece]:
    """Without spaces at the ends and next to spaces."""
    out, after_space = [], True
    for text, size in trimmed(pieces, " "):
        kept = re.sub(" +", " ", text.lstrip(" ") if after_space else text)
        after_space = text.endswith(" ") if text else after_space
        out.append((kept, size))
    return out


def trimmed(pieces: list[Piece], char: str) -> list[Piece]:
    """Without `char` at the end of the whole."""
    out = list(pieces)
    for k in range(len(out) - 1, -1, -1):
        out[k] = out[k][0].rstrip(char), out[k][1]
        if out[k][0]:
            break
    return out


def clusters(text: str) -> list[str]:
    """`text` cut where nothing composes across: before each character that does not extend."""
    out: list[str] = []
    for char in text:
        if out and (extends(char) or "\u1160" <= char <= "\u11ff"):
            out[-1] += char
        else:
            out.append(char)
    return out


def normalize_with_origin(spec: dict | None, text: str) -> tuple[str, list[Span]]:
    """The normalized text, and for each of its characters the span of `text` it comes from."""
    steps = [] if spec is None else spec["normalizers"] if spec["type"] == "Sequence" else [spec]
    origin = [(i, i + 1) for i in range(len(text))]
    for step in steps:
        pieces, out, at = pieces_of(step, text), [], 0
        for piece, size in pieces:
            used = origin[at : at + size]
            edge = origin[at - 1][1] if at else 0
            span = (used[0][0], used[-1][1]) if used else (edge, edge)
            out += used if len(piece) == size else [span] * len(piece)
            at += size
        text, origin = "".join(piece for piece, _ in pieces), out
    return text, origin


def put_in(spec: dict | None) -> str:
    """What a pre-tokenizer may put before a word: a space, Metaspace's mark, or nothing."""
    kind = spec["type"] if spec else None
    if kind == "Sequence":
        return next(filter(None, map(put_in, spec["pretokenizers"])), "")
    if kind == "Metaspace":
        return spec["replacement"]
    return " " if kind == "ByteLevel" and spec["add_prefix_space"] else ""


def find_word(word: str, text: str, at: int, mark: str) -> tuple[int, int]:
    """Where `word` begins in `text` from `at` on, and how many of its characters were put in."""
    whole = text.find(word, at)
    if mark and word.startswith(mark):
        rest = text.find(word[1:], at)
        if rest >= 0 and (whole < 0 or rest < whole):
            return rest, 1
    if whole < 0:
        raise ValueError(f"the word {word!r} is not in the text: this pre-tokenizer has no offsets")
    return whole, 0


def encode_with_offsets(
    tokenizer, text: str, allowed_special=(), add_special_tokens: bool = False
) -> tuple[list[int], list[Span]]:
    """`tokenizer.encode`, and the characters text[start:end] that each token stands for.

    A character shared by several tokens (its bytes, or one that normalization split) belongs to
    each of them; what was put in by the tokenizer (▁, [CLS]) has an empty span.
    """
    text, active = well_formed(text), tokenizer.allowed(allowed_special)
    ids: list[int] = []
    spans: list[Span] = []
    for part, start, token in tokenizer.parts(text, active):
        if token is not None:
            ids.append(token.id)
            spans.append((start, start + len(part)))
        else:
            add_part(tokenizer, part, start, active, ids, spans)
    if add_special_tokens:
        before, after = tokenizer.pipeline.prefix, tokenizer.pipeline.suffix
        ids = [*before, *ids, *after]
        spans = [(0, 0)] * len(before) + spans + [(len(text), len(text))] * len(after)
    return ids, spans


def add_part(tokenizer, part: str, start: int, active, ids: list[int], spans) -> None:
    """Appends the tokens of text without (other) special tokens."""
    normal, origin = normalize_with_origin(tokenizer.pipeline.normalizer, part)
    mark = put_in(tokenizer.pipeline.pre_tokenizer)
    marked = normal.replace(" ", mark) if mark else normal
    for piece, at, token in tokenizer.normalized_parts(normal, active):
        if token is not None:
            ids.append(token.id)
            spans.append(cover(origin[at : at + len(piece)] or [(len(part), len(part))], start))
            continue
        cursor = at
        for word in tokenizer.split(piece, start + at == 0):
            cursor, inserted = find_word(word, marked, cursor, mark)
            for i, a, b in tokenizer.word_spans(word):
                used = origin[cursor + max(a - inserted, 0) : cursor + max(b - inserted, 0)]
                edge = origin[cursor][0] if cursor < len(origin) else len(part)
                ids.append(i)
                spans.append(cover(used or [(edge, edge)], start))
            cursor += len(word) - inserted


def cover(used: list[Span], shift: int) -> Span:
    """From the first to the last character of `used`; what was put in counts only if it is all."""
    used = [span for span in used if span[0] < span[1]] or used
    return used[0][0] + shift, max(end for _, end in used) + shift
