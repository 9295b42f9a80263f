"""Normalizers: text → text, before anything is cut.

Each is described by the same dict as in a Hugging Face `tokenizer.json` ({"type": "NFC"}, …), so
that a file is read, kept and written without a translation in between. `normalizer(spec)` turns the
dict into a function; `CharsMap` reads the precompiled table of SentencePiece files.

Exactness has a price here. The Rust crates behind tokenizers 0.23 froze some of their tables long
ago: BERT's punctuation and accents are those of Unicode 8, `StripAccents` and the normal forms
those of Unicode 9. `AGE_9` and `AGE_10` list the characters of later versions for which it matters.
"""

import base64
import re
import struct
import unicodedata
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np

from characters import LAST, WHITE_SPACE, Splitter, category, class_body, newer

# Marks, punctuation, format characters and decomposable characters assigned by Unicode 9 …
AGE_9 = """
    8D4-8E2 1DFB 2E43-2E44 A8C5 1123E 11435-11446 1144B-1144F 1145B 1145D 11660-1166C
    11C2F-11C36 11C38-11C3F 11C41-11C45 11C70-11C71 11C92-11CA7 11CA9-11CB6 1E000-1E006
    1E008-1E018 1E01B-1E021 1E023-1E024 1E026-1E02A 1E944-1E94A 1E95E-1E95F 1F23B"""
# … and by Unicode 10 to 13 (U+AB69 is older, but decomposes since 13). Later: characters.NEWER.
AGE_10 = """
    7FD 8D3 9FD-9FE A76 AFA-AFF B55 C04 C77 C84 D00 D3B-D3C D81 EBA 1ABF-1AC0 1CF7 1DF6-1DF9
    2E45-2E4F 2E52 32FF A82C A8FF AB69 10D24-10D27 10EAB-10EAD 10F46-10F50 10F55-10F59 110CD
    11145-11146 111CE-111CF 1133B 1145A 1145E 1182C-1183B 11930-11935 11937-11938
    1193B-1193E 11940 11942-11946 119D1-119D7 119DA-119E0 119E2 119E4 11A01-11A0A
    11A33-11A39 11A3B-11A47 11A51-11A5B 11A8A-11A9C 11A9E-11AA2 11D31-11D36 11D3A
    11D3C-11D3D 11D3F-11D45 11D47 11D8A-11D8E 11D90-11D91 11D93-11D97 11EF3-11EF8 11FFF
    13430-13438 16E97-16E9A 16F4F 16F7F-16F87 16FE2 16FE4 16FF0-16FF1 1E130-1E136
    1E2EC-1E2EF 1F16C 1FBF0-1FBF9"""
# Characters whose category was another one in Unicode 8 and 9.
CATEGORY_8 = {
    "\u166d": "Po", "\U000111c9": "Po", "\u1734": "Mn", "\u1885": "Lo", "\u1886": "Lo",
    "\ua9bd": "Mc",
}  # fmt: skip
CATEGORY_9 = {"\u1cf2": "Mc", "\u1cf3": "Mc", "\U000111c9": "Po"}
# Lower case where Python 3.10 (Unicode 13) has none yet: (first, last, first of the lower case).
LOWER = [
    (0x1C89, 0x1C89, 0x1C8A), (0x2C2F, 0x2C2F, 0x2C5F), (0xA7C0, 0xA7C0, 0xA7C1),
    (0xA7CB, 0xA7CB, 0x264), (0xA7CC, 0xA7CC, 0xA7CD), (0xA7CE, 0xA7CE, 0xA7CF),
    (0xA7D0, 0xA7D0, 0xA7D1), (0xA7D2, 0xA7D2, 0xA7D3), (0xA7D4, 0xA7D4, 0xA7D5),
    (0xA7D6, 0xA7D6, 0xA7D7), (0xA7D8, 0xA7D8, 0xA7D9), (0xA7DA, 0xA7DA, 0xA7DB),
    (0xA7DC, 0xA7DC, 0x19B), (0x10570, 0x1057A, 0x10597), (0x1057C, 0x1058A, 0x105A3),
    (0x1058C, 0x10592, 0x105B3), (0x10594, 0x10595, 0x105BB), (0x10D50, 0x10D65, 0x10D70),
    (0x16EA0, 0x16EB8, 0x16EBB),
]  # fmt: skip
CHINESE = [
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B81F),
    (0x2B920, 0x2CEAF), (0x2F800, 0x2FA1F),
]  # fmt: skip


def points(table: str) -> set[str]:
    """The characters of a table of hexadecimal ranges."""
    pairs = [item.split("-") for item in table.split()]
    return {chr(c) for p in pairs for c in range(int(p[0], 16), int(p[-1], 16) + 1)}


@lru_cache(1)
def later_than_9() -> set[str]:
    return points(AGE_10) | set(map(chr, newer()))


def category_8(char: str) -> str:
    """General category in Unicode 8, exact for marks, punctuation and format characters."""
    later = char in later_than_9() or char in points_of_9()
    return CATEGORY_8.get(char) or ("Cn" if later else category(char))


def category_9(char: str) -> str:
    """General category in Unicode 9, exact for marks."""
    return CATEGORY_9.get(char) or ("Cn" if char in later_than_9() else category(char))


@lru_cache(1)
def points_of_9() -> set[str]:
    return points(AGE_9)


@lru_cache(1)
def unknown_to_9() -> re.Pattern:
    """Later characters that today compose, decompose or reorder, and in Unicode 9 did not."""
    chars = (c for c in later_than_9() if unicodedata.combining(c) or unicodedata.decomposition(c))
    return re.compile("([" + "".join(map(re.escape, sorted(chars))) + "])")


def normal_form(form: str, text: str) -> str:
    """NFC, NFD, NFKC or NFKD of `text` under Unicode 9 (UAX #15)."""
    if text.isascii():
        return text
    parts = unknown_to_9().split(text)
    parts[::2] = [unicodedata.normalize(form, part) for part in parts[::2]]
    return "".join(parts)


LOWER_TABLE = {p: p + to - first for first, last, to in LOWER for p in range(first, last + 1)}


def lower(text: str) -> str:
    """Lower case, each character alone: Σ is always σ, where str.lower() makes a last one ς."""
    if text.isascii():
        return text.lower()
    return text.translate(LOWER_TABLE).replace("Σ", "σ").lower()


@lru_cache(1)
def bert_tables() -> tuple[dict, dict]:
    """str.translate tables: (control characters out, white space to " "), (CJK between spaces)."""
    clean = {p: " " for first, last in WHITE_SPACE for p in range(first, last + 1)}
    clean |= dict.fromkeys([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)])
    clean |= {0xFFFD: None, 0x9: " ", 0xA: " ", 0xD: " "}
    return clean, {p: f" {chr(p)} " for a, b in CHINESE for p in range(a, b + 1)}


@lru_cache(1 << 16)
def invisible(char: str) -> bool:
    """Format and private-use characters, which BERT drops (its table is of Unicode 8)."""
    return category_8(char) in ("Cf", "Co")


@lru_cache(1 << 16)
def accent(char: str) -> bool:
    """Non-spacing marks, which BERT strips after NFD (Unicode 8 again)."""
    return category_8(char) == "Mn"


def bert(text: str, clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True):
    """BERT's `BasicTokenizer` up to the cutting: clean, CJK spaced, accents off, lower case."""
    strip_accents = lowercase if strip_accents is None else strip_accents
    clean, chinese = bert_tables()
    if clean_text:
        text = text.translate(clean)
        if not text.isascii():
            text = "".join(c for c in text if not invisible(c))
    if handle_chinese_chars and not text.isascii():
        text = text.translate(chinese)
    if strip_accents and not text.isascii():
        text = "".join(c for c in normal_form("NFD", text) if not accent(c))
    return lower(text) if lowercase else text


class CharsMap:
    """SentencePiece's `precompiled_charsmap`: a table of strings and what replaces them.

    The blob is the size of a trie in bytes, the trie, and the replacements, each ended by NUL. The
    trie is a double array (darts-clone): 32-bit units, of which child `c` of a node at offset `o`
    is unit `o ^ c` if the low byte of that unit, its label, is `c`. Bit 8 says that a key ends
    here; then unit `o` holds the position of its replacement. Raises ValueError for a damaged one.
    """

    MAX_KEY = 64  # bytes; the longest key of NFKC has 12

    def __init__(self, blob: bytes, keep: Iterable[str] = ()):
        """keep: texts that stay as they are (SentencePiece's user-defined pieces)."""
        size = struct.unpack_from("<I", blob)[0] if len(blob) >= 4 else -1
        if size < 4 or size % 4 or 4 + size > len(blob):
            raise ValueError("the character map is truncated")
        units = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64)
        self.units = units & 0x800000FF, (units >> 10) << ((units & 0x200) >> 6), units & 0x100
        self.labels = self.units[0].tolist()  # a value has bit 31 set: nobody's child
        self.offsets, self.ends = self.units[1].tolist(), self.units[2].tolist()
        self.values = (units & 0x7FFFFFFF).tolist()
        self.texts = blob[4 + size :]
        self.replacement = lru_cache(1 << 16)(self.text_at)
        first = self.characters_after([self.offsets[0]])
        then = self.characters_after([node for _, _, node, _ in first])
        self.single = {char for _, char, _, ends in first if ends}
        self.longer = {first[origin][1] for origin, *_ in then}
        self.second = {char for _, char, _, _ in then}
        self.keep = "|".join(map(re.escape, sorted(keep, key=len, reverse=True))) or "(?!)"
        self.starts = lru_cache(None)(self._starts)

    def _starts(self, top: str) -> re.Pattern:
        """Where a key may begin in a text without characters above `top`.

        There stands a kept text, a character that is a key, or one that with the next may begin
        one. (`re` tries characters above U+FFFF one by one, so texts without them do without.)
        """
        single, longer, second = (
            "".join(re.escape(c) for c in sorted(chars) if c <= top)
            for chars in (self.single, self.longer, self.second)
        )
        parts = [f"(?P<keep>{self.keep})"]
        parts += [f"[{single}]"] if single else []
        parts += [f"[{longer}](?=[{second}])"] if longer and second else []
        return re.compile("|".join(parts))

    def between_spaces(self) -> bool:
        """Whether no key holds a space, so that what stands between two is mapped alone."""
        return not bool((self.units[0] == 0x20).any())

    def text_at(self, at: int) -> str:
        end = self.texts.find(b"\0", at)
        if end < 0:
            raise ValueError("the character map points outside itself")
        return self.texts[at:end].decode("utf-8")

    def characters_after(self, nodes: list[int]) -> list[tuple[int, str, int, bool]]:
        """(index of the node, character, the node it leads to, does a key end there) for all.

        All nodes of a level take a byte at once.
        """
        labels, offsets, ends = self.units
        found, level = [], [(i, b"", node) for i, node in enumerate(nodes)]
        for _ in range(4):
            at = np.array([node for _, _, node in level], np.int64)[:, None] ^ np.arange(1, 256)
            inside = np.minimum(at, len(labels) - 1)
            rows, columns = np.nonzero((at < len(labels)) & (labels[inside] == np.arange(1, 256)))
            units, before, level = at[rows, columns], level, []
            columns = zip(rows.tolist(), (columns + 1).tolist(), (units ^ offsets[units]).tolist(),
                          ends[units].tolist(), strict=True)  # fmt: skip
            for row, byte, node, end in columns:
                origin, key = before[row][0], before[row][1] + bytes([byte])
                if len(key) == utf8_size(key[0]):
                    found.append((origin, key.decode("utf-8"), node, bool(end)))
                else:
                    level.append((origin, key, node))
        return found

    def match(self, text: str, shortest: bool = False) -> tuple[int, str] | None:
        """The longest (or shortest) key that `text` begins with: (its bytes, its replacement)."""
        node, found = self.offsets[0], None
        for size, byte in enumerate(text.encode("utf-8"), 1):
            at = node ^ byte
            if at >= len(self.labels) or self.labels[at] != byte:
                break
            node = at ^ self.offsets[at]
            if self.ends[at]:
                if node >= len(self.values):
                    raise ValueError("the character map points outside itself")
                found = size, self.replacement(self.values[node])
                if shortest:
                    break
        return found

    def __call__(self, text: str) -> str:
        """`text` with the longest key at each position replaced, left to right."""
        starts, out, end = self.starts(plane(text)), [], 0
        while found := starts.search(text, end):
            at = found.start()
            key = None if found["keep"] else self.match(text[at : at + self.MAX_KEY])
            if key is None:
                out.append(text[end : found.end()])
                end = found.end()
            else:
                out += [text[end:at], key[1]]
                end = at + len(text[at : at + key[0]].encode("utf-8")[: key[0]].decode("utf-8"))
        return "".join([*out, text[end:]])

    def by_grapheme(self, text: str) -> str:
        """The way tokenizers uses the table: clusters of less than six bytes are looked up whole.

        The *shortest* key that begins a cluster replaces all of it; without one, and in longer
        clusters, each character is looked up alone.
        """
        out = []
        for cluster in graphemes(text):
            whole = self.match(cluster, True) if len(cluster.encode("utf-8")) < 6 else None
            if whole is None:
                out += [c if (found := self.match(c, True)) is None else found[1] for c in cluster]
            else:
                out.append(whole[1])
        return "".join(out)


def plane(text: str) -> str:
    """The last character of ASCII, of plane 0 or of Unicode: the first that no character exceeds.

    A regex for the first or second is far faster than one for all.
    """
    if text.isascii():
        return "\x7f"
    return "\uffff" if max(text) <= "\uffff" else chr(LAST)


def utf8_size(lead: int) -> int:
    """How many bytes a character has that begins with this one."""
    return 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4


# What the categories do not tell of UAX #29, as tokenizers has it (Unicode 17): characters that
# stay with the one before though they are no marks we know, marks that do not, and those that hold
# the next one. Found by asking tokenizers about every code point.
EXTEND = """
    E33 EB3 1ACF-1ADD 1AE0-1AEB 200C-200D FF9E-FF9F 10EFA-10EFB 11B60-11B67 1E6E3 1E6E6
    1E6EE-1E6EF 1E6F5 1F3FB-1F3FF E0020-E007F"""
SEPARATE = """
    102B-102C 1038 1062-1064 1067-106D 1083 1087-108C 108F 109A-109C 1A61 1A63-1A64 AA7B AA7D
    11720-11721"""
PREPEND = """
    600-605 6DD 70F 890-891 8E2 D4E 110BD 110CD 111C2-111C3 113D1 1193F 11941 11A84-11A89 11D46
    11F02"""


@lru_cache(1)
def cluster_tables() -> tuple[set[str], set[str], set[str]]:
    return points(EXTEND), points(SEPARATE), points(PREPEND)


@lru_cache(1 << 16)
def extends(char: str) -> bool:
    """Whether `char` stays with the one before it in a grapheme cluster (UAX #29, GB9 and 9a)."""
    extend, separate, _ = cluster_tables()
    return char in extend or (category(char)[0] == "M" and char not in separate)


def graphemes(text: str) -> list[str]:
    """Extended grapheme clusters as far as clusters of less than six bytes need them.

    Hangul syllables, flags, emoji sequences and Indic conjuncts are longer, so cutting them up
    changes nothing that `CharsMap.by_grapheme` does with them.
    """
    out: list[str] = []
    for char in text:
        last = out[-1][-1] if out else ""
        control = last and category(last) in ("Cc", "Cf", "Zl", "Zp") and last not in "\u200c\u200d"
        joins = (extends(char) and not control) or (
            last in cluster_tables()[2] and category(char) != "Cc"
        )
        if out and (joins or (last == "\r" and char == "\n")):
            out[-1] += char
        else:
            out.append(char)
    return out


def strip(text: str, left: bool, right: bool) -> str:
    """`text` without white space (Unicode's, not Python's) at the chosen ends."""
    space = class_body(WHITE_SPACE, LAST)
    text = re.sub(f"^[{space}]+", "", text) if left else text
    return re.sub(f"[{space}]+\\Z", "", text) if right else text


def replacer(spec: dict) -> Callable[[str], str]:
    """{"type": "Replace", "pattern": {"String" or "Regex": …}, "content": …}."""
    regex, content = splitter_for(spec["pattern"]).regex, spec["content"]
    if regex("").match(""):
        raise ValueError(f"to replace {spec['pattern']}, which may be empty, is not supported")
    if old := spec["pattern"].get("String"):
        return lambda text: text.replace(old, content)
    return lambda text: regex(text).sub(lambda _: content, text)


def splitter_for(pattern: dict) -> Splitter:
    """{"String": …} or {"Regex": …} in the dialect of tokenizers."""
    source = re.escape(pattern["String"]) if "String" in pattern else pattern["Regex"]
    return Splitter(source, dollar=r"(?=\n|\Z)")


def normalizer(spec: dict | None) -> Callable[[str], str]:
    """The function that a normalizer's description stands for; raises ValueError if unsupported."""
    kind = spec["type"] if spec else None
    options = {k: v for k, v in spec.items() if k != "type"} if spec else {}
    if kind is None:
        return lambda text: text
    if kind == "Sequence":
        steps = [normalizer(step) for step in spec["normalizers"]]
        return lambda text: run(steps, text)
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return lambda text: normal_form(kind, text)
    if kind == "Lowercase":
        return lower
    if kind == "StripAccents":
        return lambda text: "".join(c for c in text if category_9(c)[0] != "M")
    if kind == "BertNormalizer":
        return lambda text: bert(text, **options)
    if kind == "Strip":
        return lambda text: strip(text, spec["strip_left"], spec["strip_right"])
    if kind == "Replace":
        return replacer(spec)
    if kind == "Prepend":
        return lambda text: spec["prepend"] + text if text else text
    if kind == "Precompiled":
        return CharsMap(base64.b64decode(spec["precompiled_charsmap"])).by_grapheme
    if kind == "SentencePiece":
        charsmap = charsmap_of(spec)
        return lambda text: sentencepiece(text, charsmap, spec["prefix"], spec["collapse"])
    raise ValueError(f"the normalizer {kind} is not supported")


def charsmap_of(spec: dict) -> Callable[[str], str]:
    """The character map in the description of a SentencePiece normalizer."""
    return char_map(spec["charsmap"], tuple(spec.get("keep", ()))) if spec["charsmap"] else str


@lru_cache(8)
def char_map(blob: str, keep: tuple[str, ...]) -> CharsMap:
    """The character map of a base64 text, made once."""
    return CharsMap(base64.b64decode(blob), keep)


def sentencepiece(text: str, charsmap: Callable[[str], str], prefix: bool, collapse: bool) -> str:
    """SentencePiece's order of things: map, collapse spaces, put ▁ in front, write spaces as ▁."""
    text = charsmap(text)
    if collapse:
        text = re.sub(" +", " ", text.strip(" "))
    if not text:
        return ""
    text = ("▁" if prefix else "") + text.replace(" ", "▁")
    return text.rstrip("▁") if collapse else text


def run(steps: list[Callable], value):
    """One step after the other, on a text or, for decoders, on a list of pieces."""
    for step in steps:
        value = step(value)
    return value
