"""Bytes and characters: what a tokenizer's text is made of, and how regular expressions see it.

Three ideas live here, and nothing about any algorithm:

1. GPT-2's byte alphabet: each of the 256 bytes gets a printable character, so that a vocabulary of
   byte strings can be written into a text file (Radford et al. 2019, §2.2, and its `encoder.py`).
2. Unicode classes. Python's `re` has no \\p{L}; we build the ranges from `unicodedata` and write
   them into the pattern. tiktoken 0.14 and tokenizers 0.23 both use Unicode 16; `NEWER` lists what
   was assigned after Unicode 13 (Python 3.10), so that every Python up to 3.14 sees what they see.
3. The published patterns which cut text into words before any merge is looked up.

Left out: \\b, \\w, named groups and the other corners of the regex dialects; a pattern that uses
them is refused by name. On a Python with a later Unicode, the newest characters follow that Python.
"""

import codecs
import re
import sys
import unicodedata
from functools import lru_cache
from itertools import chain

# General categories assigned by Unicode 14, 15, 15.1 and 16, as hexadecimal ranges. Found by asking
# tiktoken's regex engine about every code point; a test asks it again.
NEWER = """
    Cf: 890-891 13439-1343F
    Ll: 1C8A 2C5F A7C1 A7CD A7D1 A7D3 A7D5 A7D7 A7D9 A7DB 10597-105A1 105A3-105B1
    105B3-105B9 105BB-105BC 10D70-10D85 1DF00-1DF09 1DF0B-1DF1E 1DF25-1DF2A
    Lm: 8C9 A7F2-A7F4 10780-10785 10787-107B0 107B2-107BA 10D4E 10D6F 16D40-16D42
    16D6B-16D6C 1AFF0-1AFF3 1AFF5-1AFFB 1AFFD-1AFFE 1E030-1E06D 1E4EB
    Lo: 870-887 889-88E 8B5 8C8 C5D CDD 170D 171F 1B4C 9FFD-9FFF 105C0-105F3 10D4A-10D4D
    10D4F 10EC2-10EC4 10F70-10F81 11071-11072 11075 1123F-11240 11380-11389 1138B 1138E
    11390-113B5 113B7 113D1 113D3 11740-11746 11AB0-11ABF 11BC0-11BE0 11F02 11F04-11F10
    11F12-11F33 12F90-12FF0 1342F 13441-13446 13460-143FA 16100-1611D 16A70-16ABE
    16D43-16D6A 18CFF 1B11F-1B122 1B132 1B155 1DF0A 1E290-1E2AD 1E4D0-1E4EA 1E5D0-1E5ED
    1E5F0 1E7E0-1E7E6 1E7E8-1E7EB 1E7ED-1E7EE 1E7F0-1E7FE 2A6DE-2A6DF 2B735-2B739
    2EBF0-2EE5D 31350-323AF
    Lu: 1C89 2C2F A7C0 A7CB-A7CC A7D0 A7D6 A7D8 A7DA A7DC 10570-1057A 1057C-1058A
    1058C-10592 10594-10595 10D50-10D65
    Mc: CF3 1715 113B8-113BA 113C2 113C5 113C7-113CA 113CC-113CD 113CF 11F03 11F34-11F35
    11F3E-11F3F 11F41 1612A-1612C
    Mn: 897-89F 8CA-8D2 C3C ECE 180F 1AC1-1ACE 1DFA 10D69-10D6D 10EFC-10EFF 10F82-10F85
    11070 11073-11074 110C2 11241 113BB-113C0 113CE 113D0 113D2 113E1-113E2 11F00-11F01
    11F36-11F3A 11F40 11F42 11F5A 13440 13447-13455 1611E-16129 1612D-1612F 1CF00-1CF2D
    1CF30-1CF46 1E08F 1E2AE 1E4EC-1E4EF 1E5EE-1E5EF
    Nd: 10D40-10D49 116D0-116E3 11BF0-11BF9 11F50-11F59 16130-16139 16AC0-16AC9 16D70-16D79
    1CCF0-1CCF9 1E4F0-1E4F9 1E5F1-1E5FA
    No: 1D2C0-1D2D3
    Pd: 2E5D 10D6E
    Pe: 2E56 2E58 2E5A 2E5C
    Po: 61D 1B4E-1B4F 1B7D-1B7F 2E53-2E54 10F86-10F89 113D4-113D5 113D7-113D8 116B9
    11B00-11B09 11BE1 11F43-11F4F 12FF1-12FF2 16D6D-16D6F 1E5FF
    Ps: 2E55 2E57 2E59 2E5B
    Sc: 20C0
    Sk: 888 FBC2
    Sm: 10D8E-10D8F
    So: 2427-2429 2FFC-2FFF 31E4-31E5 31EF FD40-FD4F FDCF FDFE-FDFF 1CC00-1CCEF 1CD00-1CEB3
    1CF50-1CFC3 1D1E9-1D1EA 1F6DC-1F6DF 1F774-1F776 1F77B-1F77F 1F7D9 1F7F0 1F8B2-1F8BB
    1F8C0-1F8C1 1F979 1F9CC 1FA75-1FA77 1FA7B-1FA7C 1FA87-1FA89 1FA8F 1FAA9-1FAAF
    1FAB7-1FABF 1FAC3-1FAC6 1FACE-1FACF 1FAD7-1FADC 1FADF-1FAE9 1FAF0-1FAF8 1FBCB-1FBEF
"""

WHITE_SPACE = [
    (0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A),
    (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000),
]  # fmt: skip
LAST = 0x10FFFF
# Where the category may change: planes 4 to 13 are empty, 15 and 16 are for private use.
POINTS = (range(0x40001), range(0xE0000, 0xE1001), (0xF0000, 0xFFFFE, 0x100000, 0x10FFFE))

# The words' patterns, in the dialect of the libraries: GPT-2 (Radford et al. 2019), GPT-4's
# cl100k_base and GPT-4o's o200k_base as in tiktoken 0.14, Llama 3's, and one without classes.
# In all of them a space that stands before anything but white space begins a new match.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+\z|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "whitespace": r" ?\S+|\s+(?!\S)|\s+",
}


def byte_alphabet() -> list[str]:
    """The printable character of each byte: itself where it has one, else U+0100, U+0101, …"""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(printable)]
    return [chr(b) if b in set(printable) else chr(256 + hidden.index(b)) for b in range(256)]


BYTE_TO_CHAR = byte_alphabet()
CHAR_TO_BYTE = {c: b for b, c in enumerate(BYTE_TO_CHAR)}


# The alphabet as one of Python's own character sets, like Latin-1: it is coded in C.
ALPHABET = "".join(BYTE_TO_CHAR)
ALPHABET_MAP = codecs.charmap_build(ALPHABET)


def bytes_to_chars(data: bytes) -> str:
    """b" t" → "Ġt": bytes as they stand in GPT-2's vocabulary files."""
    return codecs.charmap_decode(data, "strict", ALPHABET)[0]


def chars_to_bytes(text: str) -> bytes:
    """Back, "Ġt" → b" t"; text outside the alphabet (an added token) is its UTF-8."""
    try:
        return codecs.charmap_encode(text, "strict", ALPHABET_MAP)[0]
    except UnicodeEncodeError:
        return text.encode("utf-8")


def well_formed(text: str) -> str:
    """`text` with lone surrogates replaced by U+FFFD and pairs of them joined, as tiktoken does."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(1)
def newer() -> dict[int, str]:
    """Code point → category for everything in NEWER."""
    table = {}
    for category, ranges in re.findall(r"([A-Z][a-z]):((?:\s+[0-9A-F-]+)+)", NEWER):
        for first, _, last in (item.partition("-") for item in ranges.split()):
            table.update(dict.fromkeys(range(int(first, 16), int(last or first, 16) + 1), category))
    return table


def category(char: str) -> str:
    """The general category of one character under Unicode 16 ("Lu", "Nd", … "Cn")."""
    found = unicodedata.category(char)
    return newer().get(ord(char), "Cn") if found == "Cn" else found


@lru_cache(1)
def category_runs() -> list[tuple[int, int, str]]:
    """All of Unicode as runs (first, last, category)."""
    table, runs, first, now = newer(), [], 0, "Cc"
    for point in chain(*POINTS):
        found = unicodedata.category(chr(point))
        if found == "Cn":
            found = table.get(point, "Cn")
        if found != now:
            runs.append((first, point - 1, now))
            first, now = point, found
    return [*runs, (first, LAST, now)]


@lru_cache(None)
def ranges_of(name: str) -> list[tuple[int, int]]:
    """The code points of \\p{name} as ascending ranges; `name` is a category, or its first letter.

    Raises ValueError for any other property.
    """
    joined = []
    for first, last, found in category_runs():
        if not found.startswith(name):
            continue
        if joined and joined[-1][1] == first - 1:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    if not joined or not name:
        raise ValueError(f"the pattern uses \\p{{{name}}}, which is not a general category")
    return joined


def complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Everything outside ascending ranges."""
    edges = [-1, *(edge for pair in ranges for edge in pair), LAST + 1]
    gaps = [(a + 1, b - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    return [(a, b) for a, b in gaps if a <= b]


def class_body(ranges: list[tuple[int, int]], top: int) -> str:
    """Ranges as the inside of a `re` class, cut off above code point `top`."""
    kept = [(a, min(b, top)) for a, b in ranges if a <= top]
    kept = kept or [(LAST, LAST)]  # an empty class does not compile; no text holds this character
    return "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in kept)


TOKEN = re.compile(
    r"(?P<nested>&&|--|~~|\|\|)|\\[pP]\{(?P<prop>\^?\w+)\}|\\[pP](?P<short>[A-Z])|\\(?P<escape>.)"
    r"|(?P<open>\[\^?)|(?P<close>\])"
    r"|(?P<group>\((?:\?(?:[:=!>]|<[=!]|i:))?)|(?P<possessive>[+*?}]\+)|(?P<other>.)",
    re.DOTALL,
)


def escaped(match: re.Match, top: int, inside: bool) -> str:
    """One backslash item of a pattern in Python's dialect."""
    name = match["prop"] or match["short"] or {"d": "Nd", "D": "Nd"}.get(match["escape"])
    if name is not None or match["escape"] in ("s", "S"):
        ranges = WHITE_SPACE if name is None else ranges_of(name.lstrip("^"))
        outside = match[0][1] in "PSD"
        if outside != name.startswith("^") if name else outside:
            ranges = complement(ranges)
        body = class_body(ranges, top)
        return body if inside else f"[{body}]"
    if match["escape"] == "z":
        return r"\Z"
    if match["escape"].isalnum() and match["escape"] not in "rntfv":
        raise ValueError(f"the pattern uses \\{match['escape']}, which is not supported")
    return match[0]


def to_python(pattern: str, top: int = LAST, dollar: str = r"\Z") -> str:
    """A regex of tiktoken or tokenizers in the dialect of Python's `re`.

    `top` leaves out all code points above it (see `Splitter`); `dollar` is what `$` means: the end
    of the text in tiktoken's engine, the end of a line in tokenizers' (Ruby's dialect).
    Raises ValueError for what has no equal in `re`.
    """
    out, inside = [], False
    for match in TOKEN.finditer(pattern):
        kind, text = match.lastgroup, match[0]
        if kind in ("prop", "short", "escape"):
            text = escaped(match, top, inside)
        elif kind in ("open", "nested") and inside:
            raise ValueError("the pattern nests character classes, which is not supported")
        elif kind == "open":
            inside = True
        elif kind == "close":
            if inside and out[-1] in ("[", "[^"):
                raise ValueError("the pattern has an empty character class")
            inside = False
        elif inside and kind in ("group", "possessive"):
            pass  # ordinary characters there
        elif kind == "group" and text == "(":
            if pattern.startswith("?", match.end()):
                raise ValueError(
                    f"the pattern uses {pattern[match.start() :][:4]}, which is not supported"
                )
            text = "(?:"
        elif kind == "possessive" and sys.version_info < (3, 11):
            raise ValueError(f"the pattern uses the possessive {text}, which needs Python 3.11")
        elif not inside and text == "$":
            text = dollar
        elif not inside and text == "^":
            raise ValueError("the pattern uses ^, which is not supported")
        out.append(text)
    return "".join(out)


class Splitter:
    """Cuts text by a pattern: `splitter(text)` is the list of matches and of what lies between.

    A class such as \\p{L} has hundreds of ranges above U+FFFF, which `re` tries one by one; so the
    pattern is compiled for ASCII, for U+0000…FFFF and for all of Unicode, each when first needed.
    """

    def __init__(self, pattern: str, dollar: str = r"\Z"):
        self.pattern, self.dollar = pattern, dollar
        self.compiled = lru_cache(None)(self._compile)
        self.compiled(0x7F)  # so that a bad pattern is refused here, not at the first text

    def _compile(self, top: int) -> re.Pattern:
        try:
            return re.compile(to_python(self.pattern, top, self.dollar))
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"the pattern does not compile: {error}") from None

    def regex(self, text: str) -> re.Pattern:
        """The cheapest compiled pattern that is right for `text`."""
        if text.isascii():
            return self.compiled(0x7F)
        return self.compiled(0xFFFF if max(text) <= "\uffff" else LAST)

    def __call__(self, text: str) -> list[str]:
        """All of `text`, in order, as pieces none of which is empty."""
        pieces = self.regex(text).findall(text)
        if sum(map(len, pieces)) == len(text):
            return [piece for piece in pieces if piece] if "" in pieces else pieces
        return self.with_gaps(text)

    def with_gaps(self, text: str) -> list[str]:
        """The same when the pattern leaves gaps, which become pieces of their own."""
        pieces, end = [], 0
        for match in self.regex(text).finditer(text):
            pieces += [text[end : match.start()], match[0]]
            end = match.end()
        return [piece for piece in [*pieces, text[end:]] if piece]
