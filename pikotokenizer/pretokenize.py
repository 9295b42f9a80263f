"""Pre-tokenizers: text → words, the pieces that no token may cross.

As with the normalizers, the descriptions are those of `tokenizer.json`. A pre-tokenizer is a
function `split(text, first) -> words`, where `first` says whether the text begins the document
(Metaspace wants to know); "Sequence" feeds every word to the next one.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial

from characters import LAST, PATTERNS, WHITE_SPACE, Splitter, class_body, ranges_of
from normalize import category_8, splitter_for

SPACE = class_body(WHITE_SPACE, LAST)
NOT_SPACE_RUN = re.compile(f"[^{SPACE}]+")
ASCII_PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
# Alphabetic symbols (Ⓐ …): in \w, though their category is So; with the two joiners.
ODD_WORD_CHARACTERS = [
    (0x200C, 0x200D), (0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189),
]  # fmt: skip

Split = Callable[[str, bool], list[str]]


@lru_cache(1 << 16)
def is_punctuation(char: str) -> bool:
    """ASCII's symbols and all of P* in Unicode 8, as BERT's pre-tokenizer has it."""
    return char in ASCII_PUNCTUATION or category_8(char)[0] == "P"


def separate(text: str, alone: Callable[[str], bool]) -> list[str]:
    """Cuts before and after each character for which `alone(char)` is true."""
    words, start = [], 0
    for i, char in enumerate(text):
        if alone(char):
            words += [text[start:i], char]
            start = i + 1
    return [word for word in [*words, text[start:]] if word]


def bert_words(text: str, first: bool = True) -> list[str]:
    """BERT: cut at white space; every punctuation character is a word of its own."""
    return [w for run in NOT_SPACE_RUN.findall(text) for w in separate(run, is_punctuation)]


@lru_cache(1)
def word_class() -> str:
    """\\w as the inside of a class: Alphabetic, M, Nd, Pc and the joiners (UTS #18, annex C)."""
    ranges = [pair for name in ("L", "Nl", "M", "Nd", "Pc") for pair in ranges_of(name)]
    return class_body(ranges + ODD_WORD_CHARACTERS, LAST)


@lru_cache(1)
def is_word() -> re.Pattern:
    return re.compile(f"[{word_class()}]")


@lru_cache(1)
def word_or_symbols() -> re.Pattern:
    """\\w+|[^\\w\\s]+"""
    return re.compile(f"[{word_class()}]+|[^{word_class()}{SPACE}]+")


def matches(regex: re.Pattern, text: str, invert: bool) -> list[tuple[str, bool]]:
    """`text` as (piece, whether the pattern matched it); `invert` swaps the two."""
    out, end = [], 0
    for match in regex.finditer(text):
        out += [(text[end : match.start()], invert), (match[0], not invert)]
        end = match.end()
    return [(piece, hit) for piece, hit in [*out, (text[end:], invert)] if piece]


def join_behaviour(parts: list[tuple[str, bool]], behaviour: str) -> list[str]:
    """What becomes of the delimiters: the five behaviours of Hugging Face's Split."""
    words: list[str] = []
    last = None  # whether the part before was a delimiter
    for piece, hit in parts:
        if behaviour == "Removed" and hit:
            pass
        elif (
            (behaviour == "MergedWithPrevious" and hit and last is False)
            or (behaviour == "MergedWithNext" and not hit and last)
            or (behaviour == "Contiguous" and hit == last)
        ):
            words[-1] += piece
        else:
            words.append(piece)
        last = hit
    return words


def by_pattern(spec: dict) -> Split:
    """{"type": "Split", "pattern": {"String" or "Regex"}, "behavior": …, "invert": …}."""
    behaviour, invert = spec["behavior"], spec.get("invert", False)
    if behaviour not in (
        "Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous",
    ):  # fmt: skip
        raise ValueError(f"the split behaviour {behaviour} is not supported")
    splitter = splitter_for(spec["pattern"])
    if behaviour == "Isolated" and not invert:
        return lambda text, first: splitter(text)
    return lambda text, first: join_behaviour(
        matches(splitter.regex(text), text, invert), behaviour
    )


def metaspace(text: str, first: bool, mark: str, scheme: str, cut: bool) -> list[str]:
    """Spaces become `mark` (▁), one is put before the text, and every mark begins a word."""
    text = text.replace(" ", mark)
    if text and not text.startswith(mark) and (scheme == "always" or (scheme == "first" and first)):
        text = mark + text
    if not cut:
        return [text] if text else []
    return re.findall(f"{re.escape(mark)}[^{re.escape(mark)}]*|[^{re.escape(mark)}]+", text)


def whole(text: str, first: bool) -> list[str]:
    """No cut at all."""
    return [text] if text else []


def byte_level(text: str, first: bool, prefix_space: bool, splitter: Splitter | None) -> list[str]:
    """GPT-2's: the pattern's words; the bytes are the model's business (`BPE.byte_level`)."""
    if prefix_space and text and not text.startswith(" "):
        text = " " + text
    return splitter(text) if splitter else [text] if text else []


def in_turn(steps: list[Split], text: str, first: bool) -> list[str]:
    words = whole(text, first)
    for step in steps:
        words = [w for i, word in enumerate(words) for w in step(word, first and i == 0)]
    return words


def pre_tokenizer(spec: dict | None) -> Split:
    """The function that a pre-tokenizer's description stands for; ValueError if unsupported."""
    kind = spec["type"] if spec else None
    if kind is None:
        return whole
    if kind == "Sequence":
        steps = [pre_tokenizer(step) for step in spec["pretokenizers"]]
        changing = [step for step in steps if step is not whole]
        return changing[0] if len(changing) == 1 else partial(in_turn, changing)
    if kind == "ByteLevel":
        splitter = Splitter(PATTERNS["gpt2"]) if spec.get("use_regex", True) else None
        if not splitter and not spec["add_prefix_space"]:
            return whole
        return partial(byte_level, prefix_space=spec["add_prefix_space"], splitter=splitter)
    if kind == "Split":
        return by_pattern(spec)
    if kind == "Metaspace":
        old = "always" if spec.get("add_prefix_space", True) else "never"  # before tokenizers 0.15
        scheme, cut = spec.get("prepend_scheme", old), spec.get("split", True)
        if scheme not in ("always", "first", "never") or len(spec["replacement"]) != 1:
            raise ValueError(f"the pre-tokenizer {spec} is not supported")
        return partial(metaspace, mark=spec["replacement"], scheme=scheme, cut=cut)
    if kind == "BertPreTokenizer":
        return bert_words
    if kind == "WhitespaceSplit":
        return lambda text, first: NOT_SPACE_RUN.findall(text)
    if kind == "Whitespace":
        return lambda text, first: word_or_symbols().findall(text)
    if kind == "Punctuation" and spec.get("behavior", "Isolated") == "Isolated":
        return lambda text, first: separate(text, is_punctuation)
    if kind == "Digits":
        each = "[\\p{N}\U00011de0-\U00011de9]"  # the range: new in Unicode 17, which Rust knows
        each += "" if spec["individual_digits"] else "+"
        return by_pattern({"pattern": {"Regex": each}, "behavior": "Isolated"})
    raise ValueError(f"the pre-tokenizer {kind} with {spec} is not supported")
