"""Tokenizers are lossless, say what stands around a text, and stream whole characters."""

import json
import sys

import pytest

import tokenizer_json
from options import UserError
from tokenizer import (
    BAD_CHARACTER,
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    TextStream,
    load_tokenizer,
    short_lines,
    train_tokenizer,
)
from tokenizer_json import merges_of

TEXTS = [
    "",
    " ",
    "Once upon a time.",
    "  two  spaces  ",
    "a\n\nb\n",
    "é漢🙂",
    "tab\tand\r\n",
    "123",
]


@pytest.fixture(scope="module")
def trained_kinds(stories):
    lines = stories.splitlines()
    return {
        kind: train_tokenizer(kind, lines, 400) for kind in ("sentencepiece", "bytes", "characters")
    }


@pytest.fixture(params=["sentencepiece", "bytes", "characters"])
def tokenizer(request, trained_kinds):
    return trained_kinds[request.param]


@pytest.fixture(params=["sentencepiece", "bytes"])
def lossless(request, trained_kinds):
    return trained_kinds[request.param]


# ── Text and ids ──────────────────────────────────────────────────────────────────────────────────


def test_decoding_the_ids_gives_the_text(lossless, stories):
    for text in [*TEXTS, stories]:
        assert lossless.decode(lossless.encode_text(text)) == text


def test_any_text_survives(lossless):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    mark = "\N{LOWER ONE EIGHTH BLOCK}"  # stands for a space in SentencePiece itself
    letters = st.characters(exclude_categories=["Cs"], exclude_characters=mark + "\0")

    @hypothesis.given(st.text(letters, max_size=20))
    def check(text):
        assert lossless.decode(lossless.encode_text(text)) == text

    check()


def test_characters_survive_if_they_were_in_the_training_text(trained_kinds, stories):
    tokenizer = trained_kinds["characters"]
    assert tokenizer.decode(tokenizer.encode_text(stories)) == stories
    assert tokenizer.decode(tokenizer.encode_text("a漢")) == "a" + BAD_CHARACTER


def test_character_tokenizer_always_knows_the_newline():
    assert train_tokenizer("characters", ["ab", "c"], 0).alphabet == "\nabc"


def test_ids_are_within_the_vocabulary(tokenizer, stories):
    ids = tokenizer.encode(stories + "é漢🙂")
    assert 0 <= min(ids) and max(ids) < tokenizer.vocab_size
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(range(tokenizer.vocab_size))


def test_prompt_begins_with_bos_and_does_not_end(tokenizer):
    ids = tokenizer.encode("abc")
    assert ids == [tokenizer.bos_id, *tokenizer.encode_text("abc")]


def test_document_stands_between_bos_and_eos(tokenizer):
    ids = [i for part in tokenizer.encode_document(["ab", "c"]) for i in part]
    inside = [*tokenizer.encode_text("ab"), *tokenizer.encode_text("c")]
    assert ids == [tokenizer.bos_id, *inside, tokenizer.eos_id]


def test_marks_are_not_shown(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode_text("abc"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "abc"


def test_newline_is_a_token_of_its_own(trained_kinds):
    tokenizer = trained_kinds["sentencepiece"]
    assert len(tokenizer.encode_text("\n\n\n")) == 3


def test_digits_are_tokens_of_their_own(stories):
    tokenizer = SentencePieceTokenizer.train([*stories.splitlines(), "2024 " * 99], 400)
    assert len(tokenizer.encode_text("2024")) == 4


def test_sentencepiece_has_the_size_that_was_asked_for(trained_kinds):
    assert trained_kinds["sentencepiece"].vocab_size == 400


def test_training_is_deterministic(trained_kinds, stories):
    again = SentencePieceTokenizer.train(stories.splitlines(), 400)
    assert again.model == trained_kinds["sentencepiece"].model


def test_vocabulary_that_is_too_small_is_the_users_error(stories):
    with pytest.raises(UserError, match="--vocab-size 20 can be trained"):
        SentencePieceTokenizer.train(stories.splitlines(), 20)


def test_long_lines_are_cut_and_not_skipped():
    assert list(short_lines(["abcde", "", "xy"], limit=2)) == ["ab", "cd", "e", "xy"]
    tokenizer = SentencePieceTokenizer.train(["one two three " * 2000], 320)
    assert len(tokenizer.encode_text("one two three ")) < 14


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────


def test_stream_of_a_text_is_the_text(tokenizer):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    letters = st.one_of(st.sampled_from(" \nabeé漢🙂"), st.characters(exclude_categories=["Cs"]))

    @hypothesis.given(st.text(letters, max_size=20))
    def check(text):
        ids = tokenizer.encode_text(text)
        stream = TextStream(tokenizer)
        pieces = [stream.push(i) for i in ids]
        assert not any(piece.endswith(BAD_CHARACTER) for piece in pieces)
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)

    check()


def test_stream_never_shows_half_a_character(lossless):
    stream = TextStream(lossless)
    pieces = [stream.push(i) for i in lossless.encode_text("aé漢🙂b")]
    assert "".join(pieces) == "aé漢🙂b"
    assert not any(BAD_CHARACTER in piece for piece in pieces)


def test_stream_of_any_ids_is_their_text(tokenizer):
    """Also where a model says nonsense: half a character, then something else."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    def check(ids):
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)

    check()


def test_stream_shows_each_character_as_soon_as_it_is_certain():
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def test_saved_tokenizer_loads(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    for name in ("vocab_size", "bos_id", "eos_id", "prefix", "suffix"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_folder_without_tokenizer_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .* tokenizer.model or tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("settings", "prefix", "suffix"),
    [
        (None, True, False),  # as Llama's reference tokenizer treats its file
        ({"add_bos_token": False}, False, False),
        ({"add_eos_token": True}, True, True),
        ({"add_bos_token": False, "add_eos_token": True}, False, True),
    ],
    ids=str,
)
def test_sentencepiece_file_adds_what_its_settings_say(
    trained_kinds, tmp_path, settings, prefix, suffix
):
    (tmp_path / "tokenizer.model").write_bytes(trained_kinds["sentencepiece"].model)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.prefix == ((1,) if prefix else ())
    assert tokenizer.suffix == ((2,) if suffix else ())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "</s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
PAIR = {"Sequence": {"id": "B", "type_id": 0}}


def json_folder(folder, template: list | None, settings: dict):
    """A tokenizer.json of bytes whose post-processor follows `template`."""
    content = tokenizer_json.bytes_json(ByteTokenizer())
    content["post_processor"] = template and {
        "type": "TemplateProcessing",
        "single": template,
        "pair": [*template, PAIR],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]}
            for name, i in (("<s>", 256), ("</s>", 257))
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    names["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings), encoding="utf-8")
    return folder


AROUND = [
    ([BOS, TEXT], {}, (256,), ()),
    ([BOS, TEXT, EOS], {}, (256,), (257,)),
    ([TEXT, EOS], {}, (), (257,)),
    ([TEXT], {}, (), ()),
    (None, {}, (), ()),  # no post-processor, nothing said: nothing is added
    (None, {"add_bos_token": True}, (), ()),  # which is a word to SentencePiece files
    ([BOS, TEXT], {"add_bos_token": False}, (256,), ()),
    ([BOS, TEXT], {"bos_token": None}, (256,), ()),
    ([BOS, TEXT], {"bos_token": "</s>"}, (256,), ()),
    ([EOS, TEXT], {"bos_token": "</s>"}, (257,), ()),  # one token is both: it stands before
    ([BOS, TEXT], {"bos_token": {"__type": "AddedToken", "content": "<s>"}}, (256,), ()),
]


@pytest.mark.parametrize(("template", "settings", "prefix", "suffix"), AROUND, ids=str)
def test_json_file_adds_what_its_files_say(tmp_path, template, settings, prefix, suffix):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(json_folder(tmp_path, template, settings))
    assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
    assert tokenizer.encode("ab") == [*prefix, 97, 98, *suffix]


@pytest.mark.parametrize(("template", "settings", "prefix", "suffix"), AROUND, ids=str)
def test_transformers_adds_the_same(tmp_path, template, settings, prefix, suffix):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(json_folder(tmp_path, template, settings))
    assert theirs("ab")["input_ids"] == [*prefix, 97, 98, *suffix]


def test_json_file_names_bos_and_eos(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(json_folder(tmp_path, [TEXT], {"eos_token": "gone"}))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (256, None)


def test_json_file_comes_before_a_sentencepiece_one(tmp_path, trained_kinds, monkeypatch):
    pytest.importorskip("tokenizers")
    folder = json_folder(tmp_path, [BOS, TEXT], {})
    (folder / "tokenizer.model").write_bytes(trained_kinds["sentencepiece"].model)
    assert isinstance(load_tokenizer(folder), JsonTokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)


def test_damaged_json_file_is_not_passed_over_for_a_sentencepiece_one(tmp_path, trained_kinds):
    """The two may differ: the text would become other ids without a word."""
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.model").write_bytes(trained_kinds["sentencepiece"].model)
    (tmp_path / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)


def test_json_file_without_the_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        load_tokenizer(json_folder(tmp_path, [BOS, TEXT], {}))


def test_damaged_json_file_is_the_users_error(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text('{"version": ', encoding="utf-8")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("nested", [False, True])
def test_template_that_names_an_unknown_token_is_the_users_error(tmp_path, nested):
    """The library would panic: a dozen lines on stderr, and no Exception."""
    pytest.importorskip("tokenizers")
    folder = json_folder(tmp_path, [BOS, TEXT], {})
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    del content["post_processor"]["special_tokens"]["<s>"]
    if nested:
        content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="its template names <s>"):
        load_tokenizer(folder)


@pytest.mark.parametrize("token", [5, ["<s>"], {"content": 7}, {}, True], ids=str)
def test_special_token_that_is_no_text_is_none(tmp_path, token):
    pytest.importorskip("tokenizers")
    assert load_tokenizer(json_folder(tmp_path, [TEXT], {"bos_token": token})).bos_id is None


def test_sentencepiece_file_with_a_piece_that_is_no_text(trained_kinds):
    """The library finds out when it first decodes, which may be late in a training."""
    model = trained_kinds["sentencepiece"].model
    piece = next(p for p in ("the", "and", "was", "to") if model.count(p.encode()))
    with pytest.raises(UserError, match="tokenizer.model is damaged"):
        SentencePieceTokenizer(model.replace(piece.encode(), b"\xff" * len(piece)))


def test_empty_sentencepiece_file_is_one_line(tmp_path, capfd):
    """The library takes no bytes for no model, and says so in lines of its own."""
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match="tokenizer.model is damaged"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


def test_imported_json_tokenizer_is_saved_as_it_came(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(json_folder(tmp_path, [BOS, TEXT], {"add_bos_token": False}))
    (tmp_path / "again").mkdir()
    tokenizer_json.save_for_transformers(tokenizer, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        ours, theirs = (
            json.loads((f / name).read_text(encoding="utf-8"))
            for f in (tmp_path / "again", tmp_path)
        )
        assert ours == theirs


def test_merges_by_hand():
    """Pieces ab, abc, bc in this order: ab = a+b; abc = a+bc or ab+c, best-ranked part first."""
    pieces = ["ab", "abc", "bc", "a", "b", "c"]
    assert merges_of(pieces) == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]


def test_byte_characters_are_those_of_gpt_2():
    characters = tokenizer_json.byte_characters()
    assert len(set(characters)) == 256
    assert characters[ord("A")] == "A" and characters[ord(" ")] == "Ġ" and characters[10] == "Ċ"
