"""Unicode classes, normalizers and pre-tokenizers, asked code point by code point."""

import json
import re
import unicodedata
from itertools import pairwise

import pytest

from characters import (
    BYTE_TO_CHAR,
    CHAR_TO_BYTE,
    LAST,
    PATTERNS,
    Splitter,
    bytes_to_chars,
    category_runs,
    chars_to_bytes,
    complement,
    ranges_of,
    well_formed,
)
from conftest import hard_strings
from normalize import CharsMap, bert, normalizer
from pretokenize import pre_tokenizer

POINTS = [chr(p) for p in range(LAST + 1) if not 0xD800 <= p < 0xE000]
old_python = tuple(map(int, unicodedata.unidata_version.split("."))) <= (16, 0, 0)
exact = pytest.mark.skipif(not old_python, reason="this Python's Unicode is newer than theirs")


def test_byte_alphabet():
    assert len(set(BYTE_TO_CHAR)) == 256 and BYTE_TO_CHAR[32] == "Ġ" and BYTE_TO_CHAR[65] == "A"
    every = bytes(range(256))
    assert chars_to_bytes(bytes_to_chars(every)) == every
    assert chars_to_bytes("čx") == "čx".encode() or "č" in CHAR_TO_BYTE
    assert chars_to_bytes("日") == "日".encode()


@exact
@pytest.mark.parametrize("name", ["L", "N", "M", "Lu", "Ll", "Lt", "Lm", "Lo", "P", "S", "Nd"])
def test_every_code_point_is_in_the_class_that_tiktoken_puts_it_in(name):
    library = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)}
    pattern = rf"\p{{{name}}}"
    tik = library.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    mine = {p for first, last in ranges_of(name) for p in range(first, last + 1)}
    text = "".join(POINTS)
    theirs = tik.decode(tik.encode_ordinary(text))
    assert mine - {*range(0xD800, 0xE000)} == set(map(ord, theirs))


def test_runs_cover_unicode_once():
    runs = category_runs()
    assert runs[0][0] == 0 and runs[-1][1] == LAST
    assert all(a[1] + 1 == b[0] and a[2] != b[2] for a, b in pairwise(runs))
    whole = [name for first, last, name in runs for _ in range(first, last + 1)]
    assert [unicodedata.category(c) for c in map(chr, range(0x40000, LAST + 1))] == whole[0x40000:]
    assert complement([]) == [(0, LAST)] and complement([(0, 5), (7, LAST)]) == [(6, 6)]
    with pytest.raises(ValueError, match="not a general category"):
        ranges_of("Greek")


@pytest.mark.parametrize("name", list(PATTERNS))
def test_the_three_compilations_agree(name):
    """ASCII, U+FFFF and all of Unicode: the narrow ones must not change a single cut."""
    splitter = Splitter(PATTERNS[name])
    wide = splitter.compiled(LAST)
    for text in hard_strings(2000, 11):
        assert "".join(splitter(text)) == text
        assert splitter(text) == [w for w in wide.findall(text) if w]


def test_translation():
    assert Splitter(r"\p{Lu}")("aBc") == ["a", "B", "c"]
    assert Splitter(r"\P{L}+")("a1 b") == ["a", "1 ", "b"]
    assert Splitter(r"[^\P{L}a]+")("ab1") == ["a", "b", "1"]
    assert Splitter(r"\d+")("a٣4") == ["a", "٣4"]
    assert Splitter(r"[\p{M}]")("ab") == ["ab"]
    assert Splitter(r"(a)(b)?")("abab") == ["ab", "ab"]
    assert Splitter(r"a$", r"(?=\n|\Z)")("a\na") == ["a", "\n", "a"]
    assert Splitter(r"a\z")("a\na") == ["a\n", "a"]
    assert Splitter(r"[&a]+")("a&") == ["a&"]
    assert Splitter(r"\s+")("a\x1c\x85b") == ["a\x1c", "\x85", "b"]  # U+001C is no White_Space
    assert Splitter(PATTERNS["gpt4"])("a\n  ") == ["a", "\n  "]
    assert well_formed("a\udc00\ud83d\ude00") == "a\ufffd😀"


def normalizers():
    library = pytest.importorskip("tokenizers").normalizers
    return [library.NFC(), library.NFD(), library.NFKC(), library.NFKD(), library.Lowercase(),
            library.StripAccents(), library.BertNormalizer(), library.Strip(),
            library.BertNormalizer(lowercase=False, handle_chinese_chars=False)]  # fmt: skip


@exact
@pytest.mark.parametrize("index", range(9))
def test_normalizers_on_every_code_point_and_hard_strings(index):
    theirs = normalizers()[index]
    ours = normalizer(json.loads(theirs.__getstate__()))
    for text in hard_strings(1500, index):
        assert ours(text) == theirs.normalize_str(text), ascii(text)
    low = POINTS[:0x20000]  # above are CJK, private use, and nothing
    for start in range(0, len(low), 64):
        text = "a".join(low[start : start + 64])
        assert ours(text) == theirs.normalize_str(text), ascii(text)


@exact
def test_pre_tokenizers_on_every_code_point_and_hard_strings():
    library = pytest.importorskip("tokenizers")
    kinds, regex = library.pre_tokenizers, library.Regex(r"\p{L}+")
    behaviours = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
    splits = [kinds.Split(regex, b, invert=i) for b in behaviours for i in (False, True)]
    others = [
        kinds.Metaspace(), kinds.Metaspace(prepend_scheme="first", split=False),
        kinds.BertPreTokenizer(), kinds.Whitespace(), kinds.WhitespaceSplit(), kinds.Punctuation(),
        kinds.Digits(True), kinds.Digits(False), kinds.Split(" ", "merged_with_next"),
        kinds.Sequence([kinds.WhitespaceSplit(), kinds.Metaspace()]),
    ]  # fmt: skip
    texts = ["a".join(POINTS[i : i + 500]) for i in range(0, len(POINTS), 500)]
    for theirs in [*splits, *others]:
        ours = pre_tokenizer(json.loads(theirs.__getstate__()))
        for text in [*texts[::20], *hard_strings(300, 12)]:
            expected = [word for word, _ in theirs.pre_tokenize_str(text)]
            assert ours(text, True) == expected, (theirs, ascii(text)[:200])


def test_lower_case_knows_no_final_sigma():
    assert normalizer({"type": "Lowercase"})("ΑΣ") == "ασ" != "ΑΣ".lower()


def test_bert_by_hand():
    assert bert("Café\t日本\x00\u200d!") == "cafe  日  本 !"
    assert bert("É", strip_accents=False) == "é" and bert("É", lowercase=False) == "É"


def tiny_map() -> bytes:
    """A double array by hand with the one key "A" → "xy".

    Unit 0 is the root with offset 0x100 (bits 10 …). Its child "A" (0x41) is unit 0x141, with the
    label 0x41, bit 8 (a key ends) and offset 0x200; unit 0x341 … 0x141 ^ 0x200 holds the value 0.
    """
    units = [0] * 0x400
    units[0] = 0x100 << 10
    units[0x141] = 0x200 << 10 | 0x100 | 0x41
    units[0x141 ^ 0x200] = 0x80000000
    trie = b"".join(u.to_bytes(4, "little") for u in units)
    return len(trie).to_bytes(4, "little") + trie + b"xy\0"


def test_character_map_by_hand():
    charsmap = CharsMap(tiny_map())
    assert charsmap("bAAé") == "bxyxyé" and charsmap.by_grapheme("A\u0301B") == "xyB"
    assert (charsmap.single, charsmap.longer, charsmap.second) == ({"A"}, set(), set())
    for bad in (b"", tiny_map()[:100], b"\x07\0\0\0abcdefg"):
        with pytest.raises(ValueError, match="truncated"):
            CharsMap(bad)
    with pytest.raises(ValueError, match="outside itself"):
        CharsMap(tiny_map()[:-1])("A")


def test_patterns_are_what_the_libraries_publish():
    """The two that tiktoken writes with possessive quantifiers say the same without."""
    public = pytest.importorskip("tiktoken_ext.openai_public")
    import inspect

    source = inspect.getsource(public)
    assert PATTERNS["o200k"].split("|")[0].split("(?i")[0] in source
    published = re.search(r'"pat_str": r"""(.*?)"""', source, re.DOTALL)[1]
    plain = re.sub(r"([?*+}])\+", r"\1", published)
    assert plain.replace("$", r"\z") == PATTERNS["gpt4"]


@exact
def test_grapheme_clusters_as_tokenizers_sees_them():
    """Each code point after, and before, a cluster that the character map would compose."""
    import base64
    import io

    from spm import read_model
    from tokenizer import Unigram

    spm = pytest.importorskip("sentencepiece")
    library = pytest.importorskip("tokenizers")
    out = io.BytesIO()
    lines = iter(["a b c d e f", "abc def"])
    spm.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=out,
        vocab_size=14,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    model = read_model(out.getvalue())
    assert isinstance(model, Unigram)
    blob = base64.b64decode(model.pipeline.normalizer["charsmap"])
    theirs, ours = library.normalizers.Precompiled(blob), CharsMap(blob)
    for char in POINTS[:0x11FFF] + [chr(p) for p in range(0x1E600, 0x1F400)]:
        for text in ("e\u0301" + char, char + "\u00a8\u0301"):
            assert ours.by_grapheme(text) == theirs.normalize_str(text), ascii(text)
