"""Files: recognised by content, refused by name, and never a crash or a hang on damaged ones."""

import json
import random
import string

import pytest

from bpe import BPE
from conftest import hard_strings
from formats import read_tokenizer_json, recover_merges, write_tokenizer_json
from spm import field, read_fields, write_model
from tokenizer import load, pad, save, truncate
from unigram import Unigram
from wordpiece import WordPiece


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


@pytest.mark.parametrize(
    "name",
    ["bpe.json", "marked.json", "unigram.json", "wordpiece.json", "bpe.tiktoken", "marked.model",
     "unigram.model", "vocab.txt", "vocab.bpe"],
)  # fmt: skip
def test_500_mutations_of_every_format(files, name, tmp_path):
    """Truncated, flipped, doubled, cut: the answer is a tokenizer that works, or one ValueError."""
    path, _ = files[name]
    rng, data = random.Random(name), path.read_bytes()
    broken = tmp_path / name
    for _ in range(500):
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
        broken.write_bytes(bytes(damaged))
        try:
            tokenizer = load(broken, pattern="gpt4")
        except ValueError as error:
            assert name in str(error) or "encoder.json" in str(error)
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
        ({"truncation": {"max_length": 5}}, "truncation"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding"),
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
    "pattern, name",
    [(r"\bx", r"\\b"), (r"[a-[b]]", "nests"), (r"\p{Greek}", "Greek"), ("(", "compile"),
     ("^a", r"\^"),
     (r"\w+", r"\\w")],
)  # fmt: skip
def test_patterns_that_python_cannot_say_are_refused(pattern, name):
    with pytest.raises(ValueError, match=name):
        BPE.train("a b", 300, pattern=pattern)


def test_sentencepiece_features_are_refused_by_name(files):
    data = write_model(files["unigram.model"][1])
    for extra, name in (
        (field(1, field(1, "x!") + field(2, 0.0) + field(3, 4)), "user-defined"),
        (field(1, field(1, "x!") + field(2, 0.0) + field(3, 5)), "unused"),
        (field(2, field(3, 3)), "model type 3"),
        (field(2, field(24, 1)), "suffix"),
        (field(3, field(5, 0)), "spaces as ▁"),
        (field(5, field(2, b"abcdefgh")), "denormalizer"),
    ):
        from spm import read_model

        with pytest.raises(ValueError, match=name):
            read_model(data + extra)


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
