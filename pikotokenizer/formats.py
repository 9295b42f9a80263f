"""Other people's files, both ways: tiktoken ranks, GPT-2's pair, `tokenizer.json`, `vocab.txt`.

(SentencePiece's `.model` has spm.py.) A reader takes bytes or parsed JSON and returns a tokenizer;
a writer takes a tokenizer and returns what to write. Whatever a file asks for that this folder does
not do is refused by name with a ValueError, never passed over.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterable

from base import AddedToken, Pipeline, Tokenizer, sentencepiece_pipeline
from bpe import BPE, NEVER, bytes_pipeline, merge_short
from characters import BYTE_TO_CHAR, PATTERNS, bytes_to_chars, chars_to_bytes
from published import END, OTHERS, PUBLISHED, Published, recognised
from spm import marked_steps
from unigram import Unigram
from wordpiece import WordPiece, bert_pipeline

BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}|=) (\d+)\r?")  # Whisper writes "" as "="
GPT2_MERGES = 50_000
Special = str | dict[str, int] | Iterable[str] | None  # a published name, text → id, or texts


# ---- tiktoken ----


def read_tiktoken(data: bytes, pattern: str | None = None, special_tokens: Special = None) -> BPE:
    """A rank file: one base64 token and its rank a line. Pairs merge by the rank of their join.

    pattern: needed unless the file is a published one or `special_tokens` names one (published.py).
    special_tokens: such a name, or text → id, or texts, which get the ids behind the last rank.
    """
    ranks = read_ranks(data)
    name = special_tokens if isinstance(special_tokens, str) else recognised(ranks)
    known = None if name is None else published(name, len(ranks))
    if pattern is None and known is None:
        raise ValueError(
            "a rank file does not say its pattern: name it (pattern=… in Python, --pattern gpt4), "
            "or whose file it is (special_tokens=… , --special llama4)"
        )
    pattern = pattern or known.pattern
    special = known.special() if known else {}
    if special_tokens is not None and special_tokens != name:
        special = ids_of_special(special_tokens, max(ranks.values()) + 1)
    pipeline = bytes_pipeline(PATTERNS.get(pattern, pattern))
    pipeline.added = [AddedToken(i, content) for content, i in special.items()]
    tokenizer = BPE(ranks, None, pipeline, ranks=ranks, whole_first=True)
    if special_tokens is None and name in OTHERS:
        tokenizer.notes.append(OTHERS[name])
    return tokenizer


def read_ranks(data: bytes) -> dict[str, int]:
    """Piece → rank. Raises ValueError naming the line if one is damaged or a byte is missing."""
    ranks: dict[str, int] = {}
    for number, line in enumerate(data.rstrip(b"\n").split(b"\n"), 1):
        match = RANK_LINE.fullmatch(line)
        if not match:
            raise ValueError(f"line {number} is not a base64 token and a rank")
        try:
            coded = b"" if match[1] == b"=" else match[1]
            piece = bytes_to_chars(base64.b64decode(coded, validate=True))
        except binascii.Error as error:
            raise ValueError(f"line {number} is not base64: {error}") from None
        if piece in ranks:
            raise ValueError(f"line {number} repeats a token")
        ranks[piece] = int(match[2])
    if missing := [b for b, char in enumerate(BYTE_TO_CHAR) if char not in ranks]:
        raise ValueError(f"the byte 0x{missing[0]:02X} has no rank")
    return ranks


def published(name: str, size: int) -> Published:
    """The published vocabulary of that name; ValueError if there is none or it has another size."""
    if name not in PUBLISHED:
        raise ValueError(f"no vocabulary {name!r} is known by name: {', '.join(PUBLISHED)} are")
    if PUBLISHED[name].ranks != size:
        raise ValueError(f"{name} has {PUBLISHED[name].ranks:,} ranks, this file has {size:,}")
    return PUBLISHED[name]


def ids_of_special(special_tokens: dict[str, int] | Iterable[str], first: int) -> dict[str, int]:
    """Text → id: as given, or one after the other from `first`."""
    if not isinstance(special_tokens, dict):
        return {text: first + i for i, text in enumerate(special_tokens)}
    if any(type(i) is not int or i < 0 or not text for text, i in special_tokens.items()):
        raise ValueError("the special tokens are not an object of texts and ids")
    return special_tokens


def recover_merges(ranks: dict[str, int]) -> list[tuple[str, str]]:
    """The merge that made each token of a rank file, in order.

    With only the lower ranks, a token's bytes merge into exactly the two parts it was made of.
    Raises ValueError if they do not: then no list of merges stands behind the ranks.
    """
    merges, get = [], ranks.get
    for piece, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(piece) == 1:
            continue
        lower = lambda a, b, r=rank: n if (n := get(a + b, NEVER)) < r else NEVER  # noqa: E731
        parts = merge_short(list(piece), lower)
        if len(parts) != 2:
            raise ValueError(f"{chars_to_bytes(piece)!r} is not the join of two earlier tokens")
        merges.append((parts[0], parts[1]))
    return merges


def all_merges(vocab: dict[str, int], ranks: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces whose join is a piece, by the rank of the join.

    A list of merges (Hugging Face's format) that says what "merge by the rank of the join" says.
    """
    pairs = []
    for piece, rank in ranks.items():
        for i in range(1, len(piece)):
            a, b = piece[:i], piece[i:]
            if a in vocab and b in vocab:
                pairs.append((rank, vocab[a], vocab[b], a, b))
    return [(a, b) for _, _, _, a, b in sorted(pairs)]


def write_tiktoken(tokenizer: Tokenizer) -> bytes:
    """The rank file of a byte-level BPE. tiktoken must be told its pattern and special tokens."""
    if not tokenizer.byte_level or tokenizer.pipeline.normalizer:
        raise ValueError("a rank file holds byte-level BPE without a normalizer only")
    ranks = {p: i for p, i in tokenizer.vocab.items() if i not in tokenizer.added_ids}
    if tokenizer.merges is not None and recover_merges(ranks) != tokenizer.merges:
        raise ValueError("the merges are not in the order of the ids, which is all ranks can say")
    lines = [
        (base64.b64encode(chars_to_bytes(piece)) or b"=") + b" %d\n" % rank
        for piece, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    return b"".join(lines)


# ---- GPT-2 ----


def read_gpt2(
    merges_text: str, vocab: dict | None = None, added: dict | None = None, special_tokens=None
) -> BPE:
    """GPT-2's pair: the merges (`vocab.bpe`, `merges.txt`) and piece → id (`encoder.json`, …).

    The first line of the merges may be a "#version". Without the ids the file must be GPT-2's own:
    bytes in the order of their characters, then one a merge, then <|endoftext|>. Special are
    <|endoftext|>, what `added` (the contents of `added_tokens.json`) and `special_tokens` name, and
    every piece of `vocab` that is written <…> or […] and that no merge makes.
    """
    lines = [line.removesuffix("\r") for line in merges_text.rstrip("\n").split("\n")]
    lines = lines[1:] if lines[0].startswith("#version") else lines
    merges = [tuple(line.split(" ")) for line in lines if line]
    if bad := next((m for m in merges if len(m) != 2 or not all(m)), None):
        raise ValueError(f"{' '.join(bad)!r} is not a pair of pieces")
    vocab = gpt2_ids(merges) if vocab is None else vocab
    check_vocab(vocab)
    check_merges(merges, vocab)
    made = {a + b for a, b in merges}
    special = {p: i for p, i in vocab.items() if p not in made and re.fullmatch(r"<.+>|\[.+\]", p)}
    special |= ids_of_special(added or {}, 0)
    special |= ids_of_special(special_tokens or {}, max([*vocab.values(), *special.values()]) + 1)
    pipeline = Pipeline(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        decoder={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        added=[AddedToken(i, content) for content, i in special.items()],
    )
    return BPE(vocab, merges, pipeline)


def gpt2_ids(merges: list[tuple[str, str]]) -> dict[str, int]:
    """The ids that GPT-2's own merges have; ValueError for any others."""
    if len(merges) != GPT2_MERGES:
        raise ValueError(
            "these merges are not GPT-2's own, so the ids must stand beside them, in vocab.json or "
            "encoder.json"
        )
    pieces = [*sorted(BYTE_TO_CHAR, key=lambda c: (ord(c) > 255, ord(c)))]
    pieces += [a + b for a, b in merges]
    vocab = {piece: i for i, piece in enumerate([*pieces, END])}
    if len(vocab) != len(pieces) + 1:
        raise ValueError("two merges make the same piece: encoder.json must say the ids")
    return vocab


def write_gpt2(tokenizer: Tokenizer) -> tuple[str, dict[str, int]]:
    """The text of `vocab.bpe` and the contents of `encoder.json` of a byte-level BPE."""
    if not tokenizer.byte_level or tokenizer.pipeline.normalizer:
        raise ValueError("vocab.bpe holds byte-level BPE without a normalizer only")
    merges = tokenizer.merges
    if merges is None:
        merges = recover_merges(tokenizer.ranks)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    added = {content: i for i, content in tokenizer.added_ids.items()}
    return "\n".join(lines) + "\n", tokenizer.vocab | added


# ---- BERT ----


def read_vocab_txt(text: str) -> WordPiece:
    """BERT's `vocab.txt`: a piece a line. "Uncased" if no piece has a capital letter."""
    pieces = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    if len(vocab) != len(pieces) or "[UNK]" not in vocab:
        raise ValueError("a vocab.txt has one piece a line, none twice, and [UNK] among them")
    named = [piece for piece in BERT_TOKENS if piece in vocab]
    cased = any(piece != piece.lower() for piece in pieces if not re.fullmatch(r"\[.*\]", piece))
    pipeline = bert_pipeline(lowercase=not cased)
    pipeline.added = [AddedToken(vocab[piece], piece) for piece in named]
    if "[CLS]" in vocab and "[SEP]" in vocab:
        pipeline.prefix, pipeline.suffix = (vocab["[CLS]"],), (vocab["[SEP]"],)
    return WordPiece(vocab, pipeline)


def write_vocab_txt(tokenizer: Tokenizer) -> str:
    """The `vocab.txt` of a WordPiece tokenizer. ValueError if a line cannot hold a piece."""
    if not isinstance(tokenizer, WordPiece):
        raise ValueError("a vocab.txt holds WordPiece only")
    pieces = [tokenizer.pieces.get(i) for i in range(len(tokenizer))]
    if None in pieces or any("\n" in piece for piece in pieces):
        raise ValueError("a vocab.txt needs ids 0, 1, 2 … without gaps, and no line break inside")
    text = "\n".join(pieces) + "\n"
    if read_vocab_txt(text).pipeline.normalizer != tokenizer.pipeline.normalizer:
        raise ValueError("a vocab.txt cannot express this normalizer: write a tokenizer.json")
    return text


# ---- Hugging Face ----


# The kind of value behind each name in a tokenizer.json; null passes everywhere.
KINDS = {
    bool: "special single_word lstrip rstrip normalized clean_text handle_chinese_chars "
    "strip_accents lowercase strip_left strip_right add_prefix_space trim_offsets use_regex invert "
    "split individual_digits cleanup fuse_unk byte_fallback ignore_merges",
    str: "type content prepend replacement prefix suffix behavior prepend_scheme String Regex "
    "unk_token continuing_subword_prefix end_of_word_suffix precompiled_charsmap",
    int: "start stop unk_id max_input_chars_per_word",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


def check_kinds(part) -> None:
    """Raises ValueError if a value in a part of a tokenizer.json is not what its name wants."""
    for name, value in part.items() if isinstance(part, dict) else enumerate(part or ()):
        kind = KIND_OF.get(name)
        if kind and value is not None and type(value) is not kind:
            raise ValueError(f"{name} = {value!r} should be of type {kind.__name__}")
        if isinstance(value, (dict, list)):
            check_kinds(value)


def check_vocab(vocab) -> None:
    fine = isinstance(vocab, dict) and vocab and all(type(i) is int for i in vocab.values())
    if not fine or min(vocab.values()) < 0:
        raise ValueError("the vocabulary is not an object of pieces and ids")


def check_merges(merges, vocab: dict[str, int]) -> None:
    for a, b in merges:
        for piece in (a, b, a + b):
            if piece not in vocab:
                raise ValueError(f"the merge {a!r} {b!r} needs {piece!r}, which is not a piece")


def refuse(spec: dict, what: str, **allowed) -> None:
    """Raises ValueError if a field of `spec` is set to anything but the one value allowed here."""
    for name, value in allowed.items():
        if spec.get(name) not in (value, None):
            raise ValueError(f"{what} with {name} = {spec[name]!r} is not supported")


def uses_bytes(spec: dict | None) -> bool:
    """Whether a pre-tokenizer ends in ByteLevel. Refuses one that is followed by something."""
    kind = spec["type"] if spec else None
    if kind != "Sequence":
        return kind == "ByteLevel"
    found = [step["type"] == "ByteLevel" for step in spec["pretokenizers"]]
    if any(found[:-1]):
        raise ValueError("a pre-tokenizer after ByteLevel is not supported")
    return bool(found and found[-1])


def template(spec: dict | None, vocab: dict[str, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post-processor puts before and after a single text."""
    kind = spec["type"] if spec else None
    if kind in (None, "ByteLevel"):
        return (), ()
    if kind == "Sequence":
        both = [template(step, vocab) for step in spec["processors"]]
        return sum((a for a, _ in reversed(both)), ()), sum((b for _, b in both), ())
    if kind in ("BertProcessing", "RobertaProcessing"):
        return (spec["cls"][1],), (spec["sep"][1],)
    if kind != "TemplateProcessing":
        raise ValueError(f"the post-processor {kind} is not supported")
    sides: list[list[int]] = [[]]
    for item in spec["single"]:
        if "Sequence" in item:
            if item["Sequence"]["id"] != "A":
                raise ValueError("a template without $A is not supported")
            sides.append([])
        else:
            sides[-1] += spec["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    if len(sides) != 2:
        raise ValueError("a template that does not hold the text once is not supported")
    return tuple(sides[0]), tuple(sides[1])


def read_tokenizer_json(data: dict) -> Tokenizer:
    """Hugging Face's `tokenizer.json`, parsed: BPE, WordPiece or Unigram."""
    refuse(data, "a tokenizer.json", version="1.0")
    model = data["model"]
    check_kinds([{k: v for k, v in model.items() if k not in ("vocab", "merges")}])
    check_kinds([data.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
    check_kinds(data.get("added_tokens"))
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    added = [
        AddedToken(
            t["id"], t["content"], t["special"], t["single_word"], t["lstrip"], t["rstrip"],
            t["normalized"],
        )
        for t in data.get("added_tokens") or []
    ]  # fmt: skip
    if any(type(t.id) is not int or t.id < 0 or not t.content for t in added):
        raise ValueError("an added token is empty, or its id is not a number")
    pipeline = Pipeline(
        data.get("normalizer"), data.get("pre_tokenizer"), data.get("decoder"), added=added
    )
    readers = {"BPE": read_bpe, "WordPiece": read_wordpiece, "Unigram": read_unigram}
    if kind not in readers:
        raise ValueError(f"the model {kind} is not supported")
    on_bytes = uses_bytes(pipeline.pre_tokenizer)
    tokenizer = readers[kind](model, pipeline, on_bytes)
    decodes_bytes = (pipeline.decoder or {}).get("type") == "ByteLevel"
    if on_bytes != decodes_bytes or (on_bytes and kind != "BPE"):
        raise ValueError("ByteLevel must be pre-tokenizer and decoder of a BPE, or neither")
    everything = tokenizer.vocab | {token.content: token.id for token in added}
    pipeline.prefix, pipeline.suffix = template(data.get("post_processor"), everything)
    for i in pipeline.prefix + pipeline.suffix:
        tokenizer.piece(i)  # ValueError if there is none
    for name, instead in (("truncation", "truncate"), ("padding", "pad")):
        if data.get(name) is not None:  # settings of the library's batches, not of the text's ids
            tokenizer.notes.append(f"the file's {name} is not applied: call {instead}(…) yourself")
    return tokenizer


def read_bpe(model: dict, pipeline: Pipeline, on_bytes: bool) -> BPE:
    refuse(model, "BPE", dropout=0.0, continuing_subword_prefix="")
    check_vocab(model["vocab"])
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    if bad := next((m for m in merges if len(m) != 2), None):
        raise ValueError(f"{bad!r} is not a pair of pieces")
    check_merges(merges, model["vocab"])
    return BPE(
        model["vocab"],
        merges,
        pipeline,
        byte_level=on_bytes,
        byte_fallback=model.get("byte_fallback") or False,
        unk=model.get("unk_token"),
        fuse_unk=model.get("fuse_unk") or False,
        whole_first=model.get("ignore_merges") or False,
        suffix=model.get("end_of_word_suffix") or "",
    )


def read_wordpiece(model: dict, pipeline: Pipeline, on_bytes: bool) -> WordPiece:
    check_vocab(model["vocab"])
    prefix, longest = model["continuing_subword_prefix"], model["max_input_chars_per_word"]
    if longest < 0:
        raise ValueError(f"max_input_chars_per_word = {longest} is not supported")
    return WordPiece(model["vocab"], pipeline, model["unk_token"], prefix, longest)


def read_unigram(model: dict, pipeline: Pipeline, on_bytes: bool) -> Unigram:
    rows = model["vocab"]
    if not all(isinstance(row[0], str) and type(row[1]) in (int, float) for row in rows):
        raise ValueError("the vocabulary is not a list of pieces and scores")
    vocab = {piece: i for i, (piece, _) in enumerate(rows)}
    scores = [float(score) for _, score in rows]
    if len(vocab) != len(scores) or not all(vocab):
        raise ValueError("pieces are repeated or empty")
    fallback = model.get("byte_fallback") or False
    hidden = [token.id for token in pipeline.added if token.special]  # cut out before, if allowed
    return Unigram(vocab, scores, pipeline, model.get("unk_id"), fallback, hidden)


def write_tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The contents of a `tokenizer.json`. ValueError if the format cannot express the tokenizer."""
    pipeline = portable(tokenizer.pipeline)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": t.id, "content": t.content, "single_word": t.single_word, "lstrip": t.lstrip,
                "rstrip": t.rstrip, "normalized": t.normalized, "special": t.special,
            }
            for t in sorted(pipeline.added, key=lambda t: t.id)
        ],
        "normalizer": pipeline.normalizer,
        "pre_tokenizer": pipeline.pre_tokenizer,
        "post_processor": template_of(tokenizer),
        "decoder": pipeline.decoder,
        "model": model_json(tokenizer),
    }  # fmt: skip


def portable(pipeline: Pipeline) -> Pipeline:
    """The pipeline in Hugging Face's words: SentencePiece's default normalizer is two of theirs."""
    if (pipeline.normalizer or {}).get("type") != "SentencePiece":
        return pipeline
    if pipeline.normalizer != sentencepiece_pipeline().normalizer:
        raise ValueError(
            "tokenizer.json cannot express SentencePiece's character map and collapsed spaces "
            "exactly: export a .model instead"
        )
    steps = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    return Pipeline(
        {"type": "Sequence", "normalizers": marked_steps()},
        None,
        {"type": "Sequence", "decoders": steps},
        added=pipeline.added,
    )


def template_of(tokenizer: Tokenizer) -> dict | None:
    """The post-processor that puts the tokenizer's prefix and suffix around a text."""
    prefix, suffix = tokenizer.pipeline.prefix, tokenizer.pipeline.suffix
    if not prefix + suffix:
        return None
    before, after = (
        [{"SpecialToken": {"id": tokenizer.piece(i), "type_id": 0}} for i in ids]
        for ids in (prefix, suffix)
    )
    named = {tokenizer.piece(i): i for i in prefix + suffix}
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, second, *after],
        "special_tokens": {p: {"id": p, "ids": [i], "tokens": [p]} for p, i in named.items()},
    }


def model_json(tokenizer: Tokenizer) -> dict:
    """The "model" part of a `tokenizer.json`."""
    if isinstance(tokenizer, WordPiece):
        return {
            "type": "WordPiece",
            "unk_token": tokenizer.unk,
            "continuing_subword_prefix": tokenizer.prefix,
            "max_input_chars_per_word": tokenizer.longest,
            "vocab": tokenizer.vocab,
        }
    if isinstance(tokenizer, Unigram):
        vocab = [[tokenizer.pieces[i], tokenizer.scores[i]] for i in range(len(tokenizer.scores))]
        return {
            "type": "Unigram",
            "unk_id": tokenizer.unk_id,
            "vocab": vocab,
            "byte_fallback": tokenizer.byte_fallback,
        }
    merges = tokenizer.merges
    if merges is None:
        merges = all_merges(tokenizer.vocab, tokenizer.ranks)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokenizer.unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": tokenizer.suffix or None,
        "fuse_unk": tokenizer.fuse_unk,
        "byte_fallback": tokenizer.byte_fallback,
        "ignore_merges": tokenizer.whole_first,
        "vocab": tokenizer.vocab,
        "merges": [list(pair) for pair in merges],
    }


def as_json(data) -> str:
    return json.dumps(data, ensure_ascii=False, indent=1)
