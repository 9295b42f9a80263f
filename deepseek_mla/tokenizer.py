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

import contextlib
import importlib.util
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from options import UserError
from run import read_json, whole_file, write_json

KINDS = ("sentencepiece", "bytes", "characters")
BAD_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for half a character
OUR_SETTINGS = {  # the tokenizer_config.json of a tokenizer trained here
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "split_special_tokens": True,  # text that looks like a special token stays text
}


@contextlib.contextmanager
def blaming(what: Path | str) -> Iterator[None]:
    """UserError that names a file for whatever a library raises over it.

    A damaged file shows itself late, some by the first text that needs the damaged part, and the
    libraries raise all kinds of errors then. A panic of Rust code is not even an Exception.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} is damaged or does not fit its text: {error}") from None


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
            if not model:  # which the library takes for none given, and then says a line of its own
                raise ValueError("empty")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self.processor.vocab_size()
            self.processor.decode([[i] for i in range(self.vocab_size)])  # all must be UTF-8
            bos, eos = self.processor.bos_id(), self.processor.eos_id()
        except Exception:  # RuntimeError, UnicodeDecodeError, …
            raise UserError(
                "tokenizer.model is damaged or no SentencePiece model (Llama 3 folders need "
                "their tokenizer.json instead)"
            ) from None
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
        with blaming("tokenizer.model"):
            return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        with blaming("tokenizer.model"):
            return self.processor.decode([i for i in ids if i < self.vocab_size])

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
        refuse_broken_template(read_json(file).get("post_processor"), file)
        with blaming(file):
            self.content = file.read_bytes()
            self.library = tokenizers.Tokenizer.from_str(self.content.decode("utf-8"))
            self.library.encode_special_tokens = self.settings.get("split_special_tokens") is True
            self.vocab_size = max(self.library.get_vocab().values(), default=-1) + 1
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
        return self.library.token_to_id(name) if isinstance(name, str) else None

    def encode_text(self, text: str) -> list[int]:
        with blaming(self.file):
            return self.library.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with blaming(self.file):
            return self.library.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        with whole_file(folder / "tokenizer.json") as part:
            part.write_bytes(self.content)
        write_json(folder / "tokenizer_config.json", self.settings)


def refuse_broken_template(processor, file: Path) -> None:
    """UserError for a post-processor that names tokens it does not define.

    The library would panic over it, which prints more than a line before we hear of it.
    """
    if not isinstance(processor, dict):
        return
    inner = processor.get("processors")
    for one in inner if isinstance(inner, list) else []:
        refuse_broken_template(one, file)
    if processor.get("type") != "TemplateProcessing":
        return
    try:
        parts = [*processor["single"], *processor["pair"]]
        used = {part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part}
        missing = used - processor["special_tokens"].keys()
    except (TypeError, KeyError, AttributeError):
        return  # which the library refuses by itself
    if missing:
        raise UserError(f"{file} is damaged: its template names {min(missing, key=str)}")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a run directory or a Hugging Face folder. UserError if there is none.

    tokenizer.json comes first where both formats are there, as it does for AutoTokenizer, unless
    the library that reads it is missing.
    """
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    alphabet = read_json(folder / "alphabet.json", optional=True)
    if alphabet.get("kind") == "bytes":
        return ByteTokenizer()
    if alphabet:
        return CharacterTokenizer(checked_alphabet(alphabet.get("alphabet"), folder))
    spm, both = folder / "tokenizer.model", folder / "tokenizer.json"
    has_library = importlib.util.find_spec("tokenizers") is not None
    if both.exists() and (has_library or not spm.exists()):  # a damaged one is not passed over
        return JsonTokenizer(both, settings)
    if spm.exists():
        return SentencePieceTokenizer(spm.read_bytes(), settings)
    raise UserError(f"no tokenizer in {folder}: a tokenizer.model or tokenizer.json is needed")


def checked_alphabet(alphabet, folder: Path) -> str:
    """What stands in an alphabet.json, if it is text in which no letter comes twice."""
    try:
        if len(set(alphabet.encode("utf-8").decode("utf-8"))) == len(alphabet):
            return alphabet
    except (AttributeError, UnicodeError):  # no text; half a pair of surrogates
        pass
    raise UserError(f"{folder}/alphabet.json is damaged: its alphabet is no text of single letters")


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
