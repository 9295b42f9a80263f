"""Files: recognised by content, refused by name, and never a crash or a hang on damaged ones."""

import json
import math
import os
import random
import string

import pytest

from bpe import BPE
from conftest import hard_strings
from formats import read_tokenizer_json, recover_merges, write_tokenizer_json
from offsets import encode_with_offsets
from spm import field, read_fields, read_model, write_model
from tokenizer import load, pad, save, truncate
from unigram import Unigram
from wordpiece import WordPiece

MUTATIONS = int(os.environ.get("PIKO_MUTATIONS", "300"))


@pytest.fixture(scope="module")
def files(corpus, tmp_path_factory):
    """One small file of each format: name → (path, a tokenizer that was written)."""
    folder = tmp_path_factory.mktemp("files")
    bpe = BPE.train(corpus, 300, pattern="gpt4", special_tokens=["<|end|>"])
    marked = BPE.train(corpus[:3000], 400, pattern="metaspace")
    unigram = Unigram.train(corpus[:3000], 400)
    wordpiece = WordPiece.train(corpus[:20_000], 300)
    made = {
        "bpe.json": bpe, "marked.json": marked, "unigram.json": unigram,
        "wordpiece.json": wordpiece, "bpe.tiktoken": bpe, "marked.model": marked,
        "unigram.model": unigram, "vocab.txt": wordpiece,
        "vocab.bpe": bpe,
    }  # fmt: skip
    for name, tokenizer in made.items():
        save(tokenizer, folder / name)
    return {name: (folder / name, tokenizer) for name, tokenizer in made.items()}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes changed, cut out or doubled, or with its end cut off."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(damaged))
        kind = rng.randrange(4)
        if kind == 0:
            damaged[at] = rng.randrange(256)
        elif kind == 1:
            del damaged[at : at + rng.randint(1, 40)]
        elif kind == 2:
            damaged[at:at] = damaged[at : at + rng.randint(1, 40)]
        else:
            del damaged[at:]
        damaged = damaged or bytearray(b"{")
    return bytes(damaged)


@pytest.mark.parametrize(
    "name",
    ["bpe.json", "marked.json", "unigram.json", "wordpiece.json", "bpe.tiktoken", "marked.model",
     "unigram.model", "vocab.txt", "vocab.bpe"],
)  # fmt: skip
def test_mutations_of_every_format(files, name, tmp_path):
    """Truncated, flipped, doubled, cut: the answer is a tokenizer that works, or one ValueError."""
    path, _ = files[name]
    rng, data = random.Random(name), path.read_bytes()
    broken = tmp_path / name
    for _ in range(MUTATIONS):
        broken.write_bytes(mutated(data, rng))
        try:
            tokenizer = load(broken, pattern="gpt4")
        except ValueError as error:
            assert name in str(error)
            continue
        try:
            ids = tokenizer.encode("Halo dunia, 12 é\n", add_special_tokens=True)
            tokenizer.decode(ids)
        except ValueError as error:
            assert str(error)


def test_round_trips_keep_ids(files):
    for name, (path, tokenizer) in files.items():
        again = load(path, pattern="gpt4")
        for text in hard_strings(150, 9):
            if "<0x" not in text and "<unk>" not in text:
                assert again.encode(text) == tokenizer.encode(text), name


def test_a_directory_is_its_tokenizer(files, tmp_path):
    path, tokenizer = files["bpe.json"]
    (tmp_path / "tokenizer.json").write_bytes(path.read_bytes())
    assert load(tmp_path).vocab == tokenizer.vocab
    with pytest.raises(ValueError, match="holds none of"):
        load(path.parent.parent)


def test_merges_are_recovered_from_ranks(files):
    tokenizer = files["bpe.tiktoken"][1]
    ranks = {p: i for p, i in tokenizer.vocab.items() if i not in tokenizer.added_ids}
    assert recover_merges(ranks) == tokenizer.merges
    with pytest.raises(ValueError, match="not the join"):
        recover_merges(ranks | {"zzzqqq": 9999})


@pytest.mark.parametrize(
    "change, name",
    [
        ({"normalizer": {"type": "Nmt"}}, "Nmt"),
        ({"pre_tokenizer": {"type": "UnicodeScripts"}}, "UnicodeScripts"),
        ({"decoder": {"type": "CTC"}}, "CTC"),
        ({"post_processor": {"type": "Other"}}, "Other"),
        ({"model": {"type": "WordLevel"}}, "WordLevel"),
    ],
)
def test_unsupported_features_are_refused_by_name(files, change, name):
    data = write_tokenizer_json(files["bpe.json"][1]) | change
    with pytest.raises(ValueError, match=name):
        read_tokenizer_json(data)


@pytest.mark.parametrize(
    "change, name",
    [({"dropout": 0.1}, "dropout"), ({"continuing_subword_prefix": "##"}, "subword_prefix"),
     ({"merges": [["q", "nope"]]}, "nope"), ({"merges": ["a b c"]}, "not a pair")],
)  # fmt: skip
def test_unsupported_models_are_refused_by_name(files, change, name):
    data = write_tokenizer_json(files["bpe.json"][1])
    data["model"] |= change
    with pytest.raises(ValueError, match=name):
        read_tokenizer_json(data)


@pytest.mark.parametrize(
    "name, path, value, complaint",
    [
        ("bpe.json", ("added_tokens", 0, "lstrip"), "no", "lstrip = 'no' should be"),
        ("bpe.json", ("added_tokens", 0, "content"), 5, "content = 5"),
        ("bpe.json", ("model", "ignore_merges"), "false", "ignore_merges"),
        ("bpe.json", ("model", "end_of_word_suffix"), 3, "end_of_word_suffix = 3"),
        ("bpe.json", ("pre_tokenizer", "pretokenizers", 0, "invert"), "no", "invert"),
        ("bpe.json", ("version",), "2.0", "version"),
        ("wordpiece.json", ("model", "max_input_chars_per_word"), "x", "max_input"),
        ("wordpiece.json", ("model", "max_input_chars_per_word"), -1, "max_input"),
        ("wordpiece.json", ("post_processor", "special_tokens", "[CLS]", "ids"), [999], "999"),
        ("wordpiece.json", ("post_processor", "single", 1, "Sequence", "id"), "B", "template"),
        ("wordpiece.json", ("normalizer", "lowercase"), "yes", "lowercase"),
        ("unigram.json", ("model", "unk_id"), True, "unk_id"),
        ("unigram.json", ("model", "vocab", 300, 1), "-1.5", "pieces and scores"),
        ("unigram.json", ("model", "byte_fallback"), "false", "byte_fallback"),
        ("unigram.json", ("decoder",), {"type": "Strip", "content": " ", "start": -1, "stop": 0},
         "Strip"),
        ("unigram.json", ("pre_tokenizer",),
         {"type": "Metaspace", "replacement": "_", "prepend_scheme": "maybe"}, "maybe"),
        ("unigram.json", ("normalizer",),
         {"type": "Replace", "pattern": {"Regex": "a*"}, "content": ""}, "may be empty"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind_are_refused_by_name(files, name, path, value, complaint):
    data = json.loads(json.dumps(write_tokenizer_json(files[name][1])))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=complaint):
        read_tokenizer_json(data)


def test_added_tokens_that_cannot_be_told_apart(files):
    data = write_tokenizer_json(files["bpe.json"][1])
    token = data["added_tokens"][0]
    with pytest.raises(ValueError, match="two ids"):
        read_tokenizer_json(data | {"added_tokens": [token, token | {"id": 900}]})
    clash = token | {"content": "É", "id": data["model"]["vocab"]["É"]}
    with pytest.raises(ValueError, match="'É' is the piece of a byte"):
        read_tokenizer_json(data | {"added_tokens": [token, clash]})


@pytest.mark.parametrize(
    "pattern, name",
    [(r"\bx", r"\\b"), (r"a\Z", r"\\Z"), ("[]a]", "empty"), ("(?m)a", r"\(\?m"),
     ("[a--b]", "nests"), (r"[a-[b]]", "nests"), (r"\p{Greek}", "Greek"), ("(", "compile"),
     ("^a", r"\^"), (r"\w+", r"\\w")],
)  # fmt: skip
def test_patterns_that_python_cannot_say_are_refused(pattern, name):
    with pytest.raises(ValueError, match=name):
        BPE.train("a b", 300, pattern=pattern)


def test_sentencepiece_features_are_refused_by_name(files):
    data = write_model(files["unigram.model"][1])
    for extra, name in (
        (field(1, field(1, "x!") + field(2, 0.0) + field(3, 7)), "type-7"),
        (field(2, field(3, 3)), "model type 3"),
        (field(2, field(24, 1)), "suffix"),
        (field(3, field(5, 0)), "spaces as ▁"),
        (field(5, field(2, b"abcdefgh")), "denormalizer"),
        (field(2, field(44, "?")), "unk_surface"),
        (field(2, field(35, 0)), "go with byte_fallback"),
        (field(1, field(1, "x!") + field(2, math.nan)), "not finite"),
    ):
        with pytest.raises(ValueError, match=name):
            read_model(data + extra)


def test_a_message_in_two_parts_is_one(files):
    """Protocol buffers merge them: what only the first says still holds."""
    model = files["unigram.model"][1]
    again = read_model(write_model(model) + field(2, field(99, 1)) + field(3, field(98, 1)))
    assert again.byte_fallback and again.pipeline.normalizer == model.pipeline.normalizer


def test_protocol_buffer_numbers():
    """150 is 96 01, the example of the format's own documentation; −1 takes ten bytes."""
    assert field(1, 150) == b"\x08\x96\x01" and read_fields(b"\x08\x96\x01") == {1: [150]}
    assert read_fields(field(3, -1))[3] == [2**64 - 1]
    assert read_fields(field(2, "é") + field(2, 1.5)) == {2: ["é".encode(), b"\x00\x00\xc0\x3f"]}
    for bad in (b"\x08", b"\x0a\x05ab", b"\x0b", b"\xff" * 11):
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_fields(bad)


def test_exports_that_cannot_be_are_refused(files, tmp_path):
    bpe, unigram, wordpiece = (files[n][1] for n in ("bpe.json", "unigram.json", "wordpiece.json"))
    for tokenizer, name in (
        (bpe, "x.model"), (bpe, "x.txt"), (unigram, "x.tiktoken"), (unigram, "x.bpe"),
        (wordpiece, "x.model"), (wordpiece, "x.tiktoken"), (bpe, "x.bin"),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            save(tokenizer, tmp_path / name)
        assert not list(tmp_path.iterdir())


def test_a_rank_file_of_ours_needs_its_pattern(files):
    with pytest.raises(ValueError, match="pattern"):
        load(files["bpe.tiktoken"][0])


def test_added_tokens_take_spaces_and_respect_words(corpus):
    """lstrip, rstrip and single_word, as tokenizers has them (it is asked, if it is there)."""
    data = write_tokenizer_json(BPE.train(corpus, 300, special_tokens=["<m>", "<w>"]))
    data["added_tokens"][0] |= {"lstrip": True, "rstrip": True}
    data["added_tokens"][1] |= {"single_word": True, "special": False, "content": "<w>"}
    ours = read_tokenizer_json(data)
    texts = ["a  <m> \n b", "a<w>b", "a <w> b", "<w>", "x<m><m> y", "é<w>", " <w>_"]
    library = pytest.importorskip("tokenizers")
    other = library.Tokenizer.from_str(json.dumps(data))
    for text in texts:
        assert ours.encode(text, "all") == other.encode(text).ids, text
    assert 1 in ours.encode("<w>") and 0 not in ours.encode("<m>")


@pytest.mark.parametrize("name", ["bpe.json", "unigram.json", "wordpiece.json"])
def test_every_switch_of_added_tokens_as_in_tokenizers(files, name):
    """Two special and two other tokens beside one another and in words, each switch on and off."""
    library = pytest.importorskip("tokenizers")
    rng, bits = random.Random(name), ["<a>", "<b>", "Zq", "<a><b>", " ", "  ", "\n", "x", "é", "_"]
    for _ in range(25):
        data = write_tokenizer_json(files[name][1])
        flags = ("single_word", "lstrip", "rstrip", "normalized")
        for i, content in enumerate(("<a>", "<b>", "Zq", "<a><b>"), len(files[name][1])):
            token = {flag: rng.random() < 0.4 for flag in flags} | {"id": i, "content": content}
            data["added_tokens"].append(token | {"special": rng.random() < 0.5})
        ours = read_tokenizer_json(json.loads(json.dumps(data)))
        other = library.Tokenizer.from_str(json.dumps(data))
        for _ in range(40):
            text = "".join(rng.choices(bits, k=rng.randint(1, 7)))
            assert ours.encode(text, "all") == other.encode(text, add_special_tokens=False).ids
            ids, spans = encode_with_offsets(ours, text, "all")
            assert ids == ours.encode(text, "all")
            assert all(0 <= a <= b <= len(text) for a, b in spans)


def test_text_never_becomes_a_special_token(corpus):
    """Also where the model itself knows the piece, as Unigram, WordPiece and whole words do."""
    data = [write_tokenizer_json(m) for m in (Unigram.train(corpus[:9000], 400),
            WordPiece.train(corpus[:9000], 200), BPE.train(corpus[:9000], 300))]  # fmt: skip
    data[0]["model"]["vocab"] += [["</s>", 0.0]]
    data[1]["model"]["vocab"] |= {"</s>": 200}
    data[2]["model"] |= {"vocab": data[2]["model"]["vocab"] | {"</s>": 300}, "ignore_merges": True}
    data[1]["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    data[2]["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\S+|\s+"
    for one, i in zip(data, (400, 200, 300), strict=True):
        token = {"id": i, "content": "</s>", "special": True, "single_word": False}
        one["added_tokens"] += [token | dict.fromkeys(["lstrip", "rstrip", "normalized"], False)]
        model = read_tokenizer_json(one)
        assert i not in model.encode("a </s> b") and i in model.encode("a </s> b", "all")


def test_unknown_text_that_is_the_unknown_piece(files):
    """tokenizers: "<unk>" in a text is that piece, but in a longer unknown run it is bytes."""
    library = pytest.importorskip("tokenizers")
    data = write_tokenizer_json(files["unigram.json"][1])
    data["added_tokens"] = []
    ours, other = read_tokenizer_json(data), library.Tokenizer.from_str(json.dumps(data))
    for text in ("a <unk> b", "日<unk>日", "<unk><unk>"):
        assert ours.encode(text) == other.encode(text).ids


def test_padding_and_truncation():
    rows, masks = pad([[1, 2, 3], [4]], pad_id=0)
    assert rows == [[1, 2, 3], [4, 0, 0]] and masks == [[1, 1, 1], [1, 0, 0]]
    rows, masks = pad([[1], []], 9, length=2, side="left")
    assert rows == [[9, 1], [9, 9]] and masks == [[0, 1], [0, 0]]
    assert truncate([1, 2, 3], 2) == [1, 2] and truncate([1, 2, 3], 2, "left") == [2, 3]
    assert truncate([1], 5, "left") == [1] and truncate([1, 2], 0, "left") == []
    for call in (
        lambda: pad([[1, 2]], 0, 1),
        lambda: truncate([1], -1),
        lambda: pad([[1]], 0, side="x"),
    ):
        with pytest.raises(ValueError):
            call()


def test_random_text_is_no_tokenizer(tmp_path):
    rng = random.Random(4)
    for _ in range(200):
        (tmp_path / "x").write_text("".join(rng.choices(string.printable, k=50)), encoding="utf-8")
        with pytest.raises(ValueError, match="x: "):
            load(tmp_path / "x")
