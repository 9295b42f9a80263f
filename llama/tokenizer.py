"""Text to token ids and back: four kinds of tokenizer behind one face.

    SentencePiece   trained on the data, or a Llama 2 `tokenizer.model`; byte-pair encoding with
                    bytes for whatever the vocabulary lacks, as in Llama 2 (arXiv:2307.09288, §2.2)
    bytes           the 256 bytes of UTF-8
    characters      the characters of the training text
    tokenizer.json  the format of Hugging Face's `tokenizers`, which must be installed to read it

Each has `vocab_size`, `encode(text)`, `decode(ids)`, `save(folder)` and says which ids stand around
a text: `prefix` and `suffix` are what `encode` of a prompt puts around it, exactly as the files say
(often a beginning-of-sequence id and nothing), `bos_id` and `eos_id` what separates documents in
training. The folder `../pikotokenizer` builds such tokenizers from nothing; here they are tools.
"""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from run import UserError, whole_file, write_json

KINDS = ("sentencepiece", "bytes", "characters")
BAD_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for half a character
OUR_SETTINGS = {  # the tokenizer_config.json of a tokenizer trained here
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
}


class Tokenizer:
    """What the tokenizers share. A subclass has encode_text, decode, save and vocab_size."""

    bos_id: int | None = None
    eos_id: int | None = None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with what the tokenizer's files put around it."""
        return [*self.prefix, *self.encode_text(text), *self.suffix]

    def encode_document(self, pieces: Iterable[str]) -> Iterator[list[int]]:
        """The ids of one document, come in pieces, between bos and eos where there are such."""
        yield [] if self.bos_id is None else [self.bos_id]
        yield from map(self.encode_text, pieces)
        yield [] if self.eos_id is None else [self.eos_id]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, from the bytes of a `tokenizer.model` file.

    settings: what stands in `tokenizer_config.json`; add_bos_token is true where it says nothing,
    since that is how Llama's reference tokenizer treats its file.
    """

    def __init__(self, model: bytes, settings: dict | None = None):
        self.model, self.settings = model, settings or {}
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError(
                "tokenizer.model is damaged or no SentencePiece model (Llama 3 folders need "
                "their tokenizer.json instead)"
            ) from None
        self.vocab_size = self.processor.vocab_size()
        bos, eos = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id, self.eos_id = (bos if bos >= 0 else None), (eos if eos >= 0 else None)
        if self.settings.get("add_bos_token", True) and self.bos_id is not None:
            self.prefix = (self.bos_id,)
        if self.settings.get("add_eos_token", False) and self.eos_id is not None:
            self.suffix = (self.eos_id,)

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> "SentencePieceTokenizer":
        """Train on lines of text. Lossless: spaces are kept as they are, a newline is a token.

        Raises UserError where the text cannot fill or cannot fit the vocabulary.
        """
        file = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=short_lines(lines),
                model_writer=file,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                split_digits=True,
                character_coverage=0.99995,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                user_defined_symbols=["\n"],
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"no SentencePiece tokenizer of --vocab-size {vocab_size} can be trained on this "
                f"text, try another size or --tokenizer bytes ({str(error).split(']')[-1].strip()})"
            ) from None
        return cls(file.getvalue(), OUR_SETTINGS)

    def encode_text(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode(ids)

    def save(self, folder: Path) -> None:
        with whole_file(folder / "tokenizer.model") as part:
            part.write_bytes(self.model)
        write_json(folder / "tokenizer_config.json", self.settings)


def short_lines(lines: Iterable[str], limit: int = 1000) -> Iterator[str]:
    """Lines cut to a length that SentencePiece's trainer does not skip (it takes 4,192 bytes)."""
    for line in lines:
        for i in range(0, len(line), limit):
            yield line[i : i + limit]


class ByteTokenizer(Tokenizer):
    """Ids 0 … 255 are the bytes of UTF-8, 256 begins a document and 257 ends it."""

    vocab_size, bos_id, eos_id, prefix = 258, 256, 257, (256,)

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> None:
        write_json(folder / "alphabet.json", {"kind": "bytes"})


class CharacterTokenizer(Tokenizer):
    """Id i is the i-th character of the alphabet; after those unknown, begin and end."""

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        self.id_of = {character: i for i, character in enumerate(alphabet)}
        self.unknown, self.bos_id, self.eos_id = (len(alphabet) + i for i in range(3))
        self.prefix = (self.bos_id,)
        self.vocab_size = len(alphabet) + 3

    def encode_text(self, text: str) -> list[int]:
        return [self.id_of.get(character, self.unknown) for character in text]

    def decode(self, ids: list[int]) -> str:
        shown = self.alphabet + BAD_CHARACTER
        return "".join(shown[i] for i in ids if i < len(shown))

    def save(self, folder: Path) -> None:
        write_json(folder / "alphabet.json", {"kind": "characters", "alphabet": self.alphabet})


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, read by the library `tokenizers`; its post-processor adds the specials."""

    def __init__(self, file: Path, settings: dict | None = None):
        try:
            import tokenizers
        except ImportError:
            raise UserError(
                f"reading {file} needs the library tokenizers: pip install tokenizers"
            ) from None
        self.file, self.settings = file, settings or {}
        try:
            self.content = file.read_bytes()
            self.library = tokenizers.Tokenizer.from_str(self.content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{file} is damaged: {error}") from None
        self.vocab_size = self.library.get_vocab_size()
        self.bos_id, self.eos_id = self.special("bos_token"), self.special("eos_token")
        self.prefix, self.suffix = self.around()

    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that the post-processor puts before and after a text.

        It alone decides, as in transformers 5: add_bos_token speaks to SentencePiece files.
        """
        sample = self.library.encode("a", add_special_tokens=True)
        text = [i for i, special in enumerate(sample.special_tokens_mask) if not special]
        start, end = (text[0], text[-1] + 1) if text else [len(sample.ids)] * 2
        return tuple(sample.ids[:start]), tuple(sample.ids[end:])

    def special(self, role: str) -> int | None:
        name = self.settings.get(role)
        name = name.get("content") if isinstance(name, dict) else name
        return self.library.token_to_id(name) if name else None

    def encode_text(self, text: str) -> list[int]:
        return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        with whole_file(folder / "tokenizer.json") as part:
            part.write_bytes(self.content)
        write_json(folder / "tokenizer_config.json", self.settings)


def read_json(file: Path) -> dict:
    """The object in a JSON file, {} if there is no such file. UserError if it is damaged."""
    if not file.exists():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file} is damaged: no JSON object in it")
    return value


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a run directory or a Hugging Face folder. UserError if there is none.

    tokenizer.json comes first where both formats are there, as it does for AutoTokenizer, unless
    the library that reads it is missing.
    """
    settings = read_json(folder / "tokenizer_config.json")
    alphabet = read_json(folder / "alphabet.json")
    if alphabet.get("kind") == "bytes":
        return ByteTokenizer()
    if alphabet:
        return CharacterTokenizer(alphabet["alphabet"])
    spm, both = folder / "tokenizer.model", folder / "tokenizer.json"
    if both.exists():
        try:
            return JsonTokenizer(both, settings)
        except UserError:
            if not spm.exists():
                raise
    if spm.exists():
        return SentencePieceTokenizer(spm.read_bytes(), settings)
    raise UserError(f"no tokenizer in {folder}: a tokenizer.model or tokenizer.json is needed")


def train_tokenizer(kind: str, lines: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS for the text in `lines`."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "characters":
        return CharacterTokenizer("".join(sorted(set().union("\n", *lines))))
    return SentencePieceTokenizer.train(lines, vocab_size)


class TextStream:
    """Turns ids that come one at a time into text that never ends in half a character."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.ids, self.start, self.end = tokenizer, [], 0, 0

    def push(self, token: int) -> str:
        """The text that `token` makes certain, maybe none."""
        self.ids.append(token)
        text = self.pending()
        if text.endswith(BAD_CHARACTER):
            return ""
        self.start, self.end = self.end, len(self.ids)
        return text

    def flush(self) -> str:
        """What is left at the end, half a character as the replacement character."""
        text, self.start, self.end = self.pending(), self.end, len(self.ids)
        return text

    def pending(self) -> str:
        """Decoded along with the piece before, since the first space of a text may be dropped."""
        before = self.tokenizer.decode(self.ids[self.start : self.end])
        return self.tokenizer.decode(self.ids[self.start :])[len(before) :]


# the same tokenizers in the format of Hugging Face's `tokenizers`


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


def json_of(tokenizer: Tokenizer) -> dict:
    """A tokenizer of KINDS as the content of a tokenizer.json that gives the same ids."""
    bos, eos = {"<s>": tokenizer.bos_id}, {"</s>": tokenizer.eos_id}
    if isinstance(tokenizer, SentencePieceTokenizer):
        pieces = [tokenizer.processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        vocab = {piece: i for i, piece in enumerate(pieces)}
        merges = merges_of(pieces[4 + 256 :])  # after <unk>, <s>, </s>, the newline and the bytes
        added, plain = {"<unk>": 0} | bos | eos, {"\n": 3}
        model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
        model |= {"vocab": vocab, "merges": merges}
        mark = "\N{LOWER ONE EIGHTH BLOCK}"
        normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": mark}
        back = {"type": "Replace", "pattern": {"String": mark}, "content": " "}
        decoder = {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        }
        split = None
    elif isinstance(tokenizer, ByteTokenizer):
        added, plain, normalizer = bos | eos, {}, None
        vocab = {character: byte for byte, character in enumerate(byte_characters())}
        model = {"type": "BPE", "vocab": vocab, "merges": []}
        split = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        split |= {"trim_offsets": False}
        decoder = split
    else:
        added, plain, normalizer = {"<unk>": tokenizer.unknown} | bos | eos, {}, None
        vocab = tokenizer.id_of | added
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated"}
        split |= {"invert": False}
        decoder = {"type": "Fuse"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    known = added | plain
    names = [{"id": i, "content": n, "special": n in added} | flags for n, i in known.items()]
    first, text = (
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    template = [first, text]
    around = {"<s>": {"id": "<s>", "ids": [tokenizer.bos_id], "tokens": ["<s>"]}}
    processor = {"type": "TemplateProcessing", "single": template, "special_tokens": around}
    pair = [*template, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "added_tokens": names,
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": processor | {"pair": pair},
        "decoder": decoder,
        "model": model,
    }


def byte_characters() -> list[str]:
    """The visible characters by which GPT-2's format writes the 256 bytes.

    Bytes that print stand for themselves, the others for the characters from 256 on, in order.
    """
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in prints else next(spare)) for byte in range(256)]


def save_for_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Save so that AutoTokenizer gives the same ids; what came from there goes back as it was."""
    tokenizer.save(folder)
    made_here = isinstance(tokenizer, ByteTokenizer | CharacterTokenizer)
    if made_here or getattr(tokenizer, "settings", {}) == OUR_SETTINGS:
        write_json(folder / "tokenizer.json", json_of(tokenizer))
        write_json(folder / "tokenizer_config.json", OUR_SETTINGS)
