"""From a source to rows: how it is cut in three, what a step reads, what is read exactly once."""

import json
import os

import numpy as np
import pytest
import torch
from harness import posix

import data
import text
from options import UserError
from text import IGNORE, Source, Tokens, encode, file_pieces, load_tokens, tokens_of, write_tokens
from tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer


class Plain(Tokenizer):
    """Bytes with no marks around a document."""

    vocab_size = 256

    def encode_text(self, text):
        return list(text.encode())


def written(folder, **files) -> str:
    for name, content in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(folder if len(files) > 1 else file)


@pytest.fixture(autouse=True)
def borders(monkeypatch):
    """What the worked examples are for: of 20 characters 17 to train on, 1, and 2 for the test.

    That the stories' floor is of the same borders as their parts is for test_stories.py.
    """
    monkeypatch.setattr(text, "BORDERS", (0.85, 0.9))


def documents_file(folder, *documents: str) -> str:
    return written(folder, a="\n<|endoftext|>\n".join(documents))


def parts(name: str) -> tuple[str, str, str]:
    """The text to train on, to validate with and to test with, with | where a document ends."""
    found = dict.fromkeys(text.PARTS, "")
    for piece, ends, part in Source.measure(name).pieces():
        found[part] += piece + "|" * ends
    return tuple(found.values())


# ── Split ─────────────────────────────────────────────────────────────────────────────────────────


def test_one_document_is_cut_at_the_borders(tmp_path):
    """Of 20 characters 17 are trained on, one is for validation, two are for the test."""
    assert parts(written(tmp_path, a="0123456789" * 2)) == ("01234567890123456|", "7|", "89|")


def test_of_several_documents_the_last_ones_are_kept_whole(tmp_path):
    """20 characters: those that begin at the 17th are for validation, at the 18th for the test."""
    documents = ["0123456789", "0123456", "7", "89"]
    assert parts(documents_file(tmp_path, *documents)) == ("0123456789|0123456|", "7|", "89|")


def test_document_that_crosses_a_border_belongs_to_where_it_begins(tmp_path):
    """Borders at 17 and 18 of 20; they begin at 0, 10, 17 and 19, or at 0, 10, 16 and 19."""
    assert parts(documents_file(tmp_path, "0123456789", "0123456", "78", "9")) == (
        "0123456789|0123456|", "78|", "9|",
    )  # fmt: skip
    assert parts(documents_file(tmp_path, "0123456789", "012345", "678", "9")) == (
        "0123456789|012345|", "678|", "9|",
    )  # fmt: skip


def test_last_two_documents_are_never_trained_on_however_long(tmp_path):
    long = "0123456789" * 3
    assert parts(documents_file(tmp_path, "01", "23", long)) == ("01|", "23|", long + "|")
    assert parts(documents_file(tmp_path, "01", "23", "4", long)) == ("01|23|", "4|", long + "|")


def test_first_document_is_trained_on_however_long(tmp_path):
    long = "0123456789" * 3
    assert parts(documents_file(tmp_path, long, "1", "2")) == (long + "|", "1|", "2|")


def test_two_documents_are_cut_like_one(tmp_path):
    """Too few for three parts: 17, 1 and 2 of the 20 characters; the border between them stays."""
    assert parts(documents_file(tmp_path, "0123456789", "0123456789")) == (
        "0123456789|0123456|", "7|", "89|",
    )  # fmt: skip


def test_files_of_a_folder_are_documents_in_order_of_name(tmp_path):
    name = written(
        tmp_path, b="B" * 9, a="A" * 9, sub__c="C", sub__d="D", **{".hidden": "no", ".run__e": "no"}
    )
    assert parts(name) == ("A" * 9 + "|" + "B" * 9 + "|", "C|", "D|")


def test_folder_of_one_file_is_one_document(tmp_path):
    written(tmp_path, a="0123456789" * 2)
    assert parts(str(tmp_path)) == ("01234567890123456|", "7|", "89|")


def test_empty_documents_are_none(tmp_path):
    mark = "<|endoftext|>\n"
    documents = f"{mark}{mark}0123456789\n{mark}{mark}01\n{mark}2\n{mark}{mark}"
    name = written(tmp_path, a=documents)
    assert Source.measure(name).n_document == 3
    assert [s.strip("|") for s in parts(name)] == ["0123456789", "01", "2"]
    ids = [ids.tolist() for ids, _, _ in encode(Source.measure(name), ByteTokenizer())]
    assert ids == [[256, *b"0123456789", 257], [256, *b"01", 257], [256, *b"2", 257]]


def test_windows_line_ends_are_plain_ones(tmp_path):
    mark = "<|endoftext|>\r\n"
    name = written(tmp_path, a=f"one\r\n{mark}two\r\nthree\r\n{mark}four\r\n")
    assert parts(name) == ("one|", "two\nthree|", "four\n|")


def test_separator_must_stand_alone_on_its_line(tmp_path):
    name = written(tmp_path, a="say <|endoftext|> twice\n <|endoftext|> \nx")
    assert Source.measure(name).n_document == 2


def test_characters_count_and_not_bytes(tmp_path):
    assert Source.measure(written(tmp_path, a="é漢🙂")).n_char == 3


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same_ids(tmp_path, monkeypatch, piece):
    """Long files come in pieces: no mark may fall between them."""
    whole = "".join(f"line {i}\n" for i in range(20))
    name = written(tmp_path, a=whole)
    first, second = int(0.85 * len(whole)), int(0.9 * len(whole))
    expected = [whole[:first], whole[first:second], whole[second:]]
    monkeypatch.setattr(text, "PIECE", piece)
    assert "".join(part for part, _ in file_pieces(tmp_path / "a")) == whole
    for part, wanted in zip(text.PARTS, expected, strict=True):
        ids = tokens_of(Source.measure(name), ByteTokenizer(), part).ids.tolist()
        assert ids == [256, *wanted.encode(), 257]


@pytest.mark.parametrize("piece", [16, 10**6])
def test_long_documents_are_split_whole_too(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(text, "PIECE", piece)
    documents = ["a\n" * 30, "b\n" * 20, "c\n" * 4, "d\n" * 3]
    name = written(tmp_path, a="<|endoftext|>\n".join(documents))
    assert Source.measure(name).n_document == 4
    train, valid, test = parts(name)
    assert train.count("|") == 2 and (valid, test) == ("c\n" * 3 + "c|", "d\n" * 3 + "|")


@pytest.mark.parametrize("content", ["", "\n<|endoftext|>\n", "xy"])
def test_text_too_short_to_split_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="is empty"):
        Source.measure(written(tmp_path, a=content))


def test_text_that_is_not_utf_8_is_refused_with_its_place(tmp_path):
    name = written(tmp_path, good="fine", bad=b"abc\xff")
    with pytest.raises(UserError, match=r"bad is not UTF-8 text \(at byte 3\)"):
        Source.measure(name)


def test_source_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file or folder"):
        Source.measure(str(tmp_path / "gone"))


def test_tokenizer_sees_the_training_text_alone(tmp_path):
    source = Source.measure(written(tmp_path, a="abc\ndef\n" * 8 + "XYZ\nXYZ\n"))
    assert set("".join(source.training_lines())) == set("abcdef")
    source = Source.measure(documents_file(tmp_path, "abc" * 9, "def", "UVW", "XYZ"))
    assert set("".join(source.training_lines())) == set("abcdef")


def test_tokenizer_sees_no_more_than_its_limit(tmp_path):
    documents = ["a" * 10] * 50
    source = Source.measure(documents_file(tmp_path, *documents))
    assert 30 <= len("".join(source.training_lines(limit=30))) <= 50


def test_data_set_of_the_hub_from_a_local_copy(tmp_path):
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one one", "two", "three"))
    written(tmp_path, **{"train.jsonl": rows})
    assert parts(f"hf:{tmp_path}") == ("one one|", "two|", "three|")


def test_data_set_without_a_column_text_is_refused(tmp_path):
    pytest.importorskip("datasets")
    written(tmp_path, **{"train.jsonl": '{"story": "one"}\n'})
    with pytest.raises(UserError, match="has no column text, only story"):
        Source.measure(f"hf:{tmp_path}")


# ── Tokens on disk ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def source(tmp_path) -> Source:
    return Source.measure(documents_file(tmp_path, "abc" * 5, "def" * 4, "gh", "ijk"))


def test_tokens_written_are_tokens_loaded(source, tmp_path):
    write_tokens(source, ByteTokenizer(), 8, tmp_path)
    found = load_tokens(tmp_path, ByteTokenizer())
    train, valid, test = (found[part] for part in text.PARTS)
    assert train.ids.tolist() == [256, *b"abc" * 5, 257, 256, *b"def" * 4, 257]
    assert valid.ids.tolist() == [256, *b"gh", 257]
    assert test.ids.tolist() == [256, *b"ijk", 257]
    assert (train.n_char, valid.n_char, test.n_char) == (27, 2, 3)
    assert isinstance(train.ids, np.memmap) and train.ids.dtype == np.uint16
    for part in text.PARTS:
        alone = tokens_of(source, ByteTokenizer(), part)
        assert alone.ids.tolist() == found[part].ids.tolist()
        assert alone.n_char == found[part].n_char


def test_large_vocabularies_take_four_bytes():
    for n, expected in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokenizer = Tokenizer()
        tokenizer.vocab_size = n
        assert text.id_type(tokenizer) is expected


@pytest.mark.parametrize("spoil", ["train.bin", "valid.bin", "test.bin"])
def test_tokens_that_are_gone_or_torn_are_the_users_error(source, tmp_path, spoil):
    write_tokens(source, ByteTokenizer(), 8, tmp_path)
    file = tmp_path / spoil
    content = file.read_bytes()
    for left in (content[:-2], content[:-1], content + b"\0\0", b"", content[:-2] + b"\xff\xff"):
        file.write_bytes(left)
        with pytest.raises(UserError, match="are damaged"):
            load_tokens(tmp_path, ByteTokenizer())
    file.unlink()
    with pytest.raises(UserError, match="are damaged"):
        load_tokens(tmp_path, ByteTokenizer())


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"train": 3}', '{"train": {"ids": "5", "chars": 1}}',
     '{"train": {"ids": -1, "chars": 1}}', '{"train": {"ids": 32, "chars": null}}'],
)  # fmt: skip
def test_list_of_tokens_that_is_damaged_is_the_users_error(source, tmp_path, content):
    write_tokens(source, ByteTokenizer(), 8, tmp_path)
    (tmp_path / "tokens.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="damaged|no JSON object"):
        load_tokens(tmp_path, ByteTokenizer())


@pytest.mark.parametrize("name", ["ids", "chars"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "9", []], ids=str)
def test_count_of_tokens_that_cannot_be_is_the_users_error(source, tmp_path, name, value):
    write_tokens(source, ByteTokenizer(), 8, tmp_path)
    counts = json.loads((tmp_path / "tokens.json").read_text(encoding="utf-8"))
    counts["valid"][name] = value
    (tmp_path / "tokens.json").write_text(json.dumps(counts), encoding="utf-8")
    with pytest.raises(UserError, match="are damaged"):
        load_tokens(tmp_path, ByteTokenizer())


@posix
def test_pipe_can_be_read_only_once_and_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="can be read only once: save it as a file"):
        Source.measure(str(tmp_path / "pipe"))


def test_text_too_short_for_one_row_is_refused(tmp_path):
    """27 characters to train on with bos and eos around them make 29 tokens: a row of 28 fits."""
    source = Source.measure(documents_file(tmp_path, "abc" * 9, "d", "e"))
    with pytest.raises(UserError, match="has 29 tokens to train on, --seq-len 29 needs 30 or more"):
        write_tokens(source, ByteTokenizer(), 29, tmp_path)
    write_tokens(source, ByteTokenizer(), 28, tmp_path)


def test_text_without_a_target_in_some_part_is_refused(tmp_path):
    """Without marks around documents the single character `d` has nothing to predict."""
    source = Source.measure(documents_file(tmp_path, "abc" * 9, "d", "ef"))
    with pytest.raises(UserError, match="too short: nothing is left to test on"):
        write_tokens(source, Plain(), 4, tmp_path)


def test_part_that_is_not_there_is_the_users_error(tmp_path):
    """Of three characters the borders fall on 2 and 2: nothing is between them."""
    source = Source.measure(written(tmp_path, a="abc"))
    with pytest.raises(UserError, match="too short: it has no valid part"):
        tokens_of(source, ByteTokenizer(), "valid")
    with pytest.raises(UserError, match="too short: it has no test part"):
        tokens_of(source, Plain(), "test")  # one character, and nothing to tell it from


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def counting(n: int) -> Tokens:
    """One document 0, 1, 2, …, so that a row tells where it begins."""
    return Tokens(np.arange(n, dtype=np.uint16), n, Plain())


def test_row_is_one_longer_than_the_context():
    rows = counting(100).training_rows(0, 3, 8, seed=0)
    assert rows.shape == (3, 9) and rows.dtype == torch.int64
    assert torch.equal(rows - rows[:, :1], torch.arange(9).expand(3, 9))


def test_rows_are_a_function_of_seed_and_step():
    a, b = counting(400), counting(400)
    later = [a.training_rows(step, 4, 8, seed=1) for step in (5, 0, 5)]
    assert torch.equal(later[0], later[2])
    assert torch.equal(later[0], b.training_rows(5, 4, 8, seed=1))
    assert not torch.equal(later[0], later[1])
    assert not torch.equal(later[0], a.training_rows(5, 4, 8, seed=2))


def stories_of(*lengths: int) -> Tokens:
    """Documents of these lengths: ids 1, 2, 3, … and a 0 at the end of each."""
    tokenizer = Plain()
    tokenizer.eos_id = 0
    ids = [i for length in lengths for i in (*range(1, length), 0)]
    return Tokens(np.array(ids, dtype=np.uint16), len(ids), tokenizer)


MIXES = [(400,), (20,) * 20, (3, 50, 9, 10, 8, 200, 1, 17), (2, 2, 2, 40, 3), (9,), (30, 1)]


@pytest.mark.parametrize("lengths", MIXES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_epoch_covers_every_token_as_a_target(lengths, seed):
    """All but the first of each document, which nothing before it could tell."""
    tokens, seq_len = stories_of(*lengths), 8
    begins = set(tokens.bounds[:-1].tolist())
    for number in range(10):
        starts = tokens.epoch(number, seq_len, seed).tolist()
        targets = {s + t for s in starts for t in range(1, seq_len + 1)}
        assert set(range(len(tokens.ids))) - begins <= targets
        assert min(starts) >= 0 and max(starts) + seq_len < len(tokens.ids)


def test_default_epoch_of_our_stories_covers_every_token():
    """The text and the sizes of the run that the README describes."""
    source = data.measure("stories")
    tokens, seq_len = tokens_of(source, ByteTokenizer(), "train"), 192
    reached = np.zeros(len(tokens.ids), dtype=bool)
    for start in tokens.epoch(0, seq_len, 0):
        reached[start + 1 : start + 1 + seq_len] = True
    missed = set(np.flatnonzero(~reached).tolist())
    assert missed <= set(tokens.bounds[:-1].tolist())


def test_row_begins_where_a_document_begins_and_every_row_length_further():
    """Lengths 5 and 21, rows of 8: the first has 4 targets, the second 20 and so 3 more rows."""
    tokens = stories_of(5, 21)
    assert tokens.row_starts(8, 0).tolist() == [0, 5, 5, 13, 17]  # the last is moved back to fit
    assert tokens.row_starts(8, 3).tolist() == [0, 5, 8, 16, 17]


def test_rows_of_an_epoch_are_those_in_another_order():
    tokens = stories_of(50, 70, 3)
    for number in range(5):
        dice = np.random.default_rng((7, number))
        expected = tokens.row_starts(8, int(dice.integers(8)))
        epoch = tokens.epoch(number, 8, 7).tolist()
        assert sorted(epoch) == sorted(expected.tolist()) != epoch
    assert tokens.epoch(0, 8, 7).tolist() != tokens.epoch(1, 8, 7).tolist()


def test_batches_follow_the_epochs_one_after_another():
    """And a batch across two epochs takes the end of one and the start of the next."""
    tokens = stories_of(50, 70, 3)
    n_row = len(tokens.epoch(0, 8, 3))
    small = [r for step in range(3 * n_row) for r in tokens.training_rows(step, 1, 8, 3).tolist()]
    large = [r for step in range(3) for r in tokens.training_rows(step, n_row, 8, 3).tolist()]
    assert small == large
    starts = [s for number in range(3) for s in tokens.epoch(number, 8, 3)]
    assert small == [tokens.ids[s : s + 9].tolist() for s in starts]


def test_shift_of_the_rows_changes_with_the_epoch_and_reaches_every_offset():
    tokens = stories_of(400)
    shifts = set()
    for number in range(60):
        shifts.add(sorted(tokens.epoch(number, 8, 0))[1] % 8)
    assert shifts == set(range(8))


def test_no_row_runs_over_the_end():
    """Whatever the length: a row that would is moved back."""
    for n in range(9, 60):
        tokens = counting(n)
        for step in range(20):
            assert tokens.training_rows(step, 3, 8, seed=0).shape == (3, 9)


@pytest.mark.parametrize("n", [0, 1, 8])
def test_text_shorter_than_a_row_is_refused(n):
    with pytest.raises(UserError, match=f"has {n} tokens to train on, --seq-len 8 needs 9 or more"):
        counting(n).refuse_too_short(8)
    counting(9).refuse_too_short(8)
    assert counting(9).training_rows(0, 2, 8, 0).tolist() == [list(range(9))] * 2


def test_evaluation_reads_every_target_once():
    ids = np.array([256, 1, 2, 3, 4, 5, 257, 256, 6, 257, 256, 7, 8, 9, 257], dtype=np.uint16)
    tokens = Tokens(ids, 9, ByteTokenizer())
    batches = list(tokens.evaluation_rows(2, seq_len=3))
    inputs = torch.cat([x for x, _ in batches])
    targets = torch.cat([y for _, y in batches])
    assert targets.tolist() == [
        [1, 2, 3],
        [4, 5, 257],
        [6, 257, IGNORE],
        [7, 8, 9],
        [257, IGNORE, IGNORE],
    ]
    assert inputs.tolist() == [[256, 1, 2], [3, 4, 5], [256, 6, 0], [256, 7, 8], [9, 0, 0]]
    assert [len(x) for x, _ in batches] == [2, 2, 1]


def test_evaluation_of_text_without_marks_is_one_document():
    tokens = counting(10)
    ((inputs, targets),) = tokens.evaluation_rows(9, seq_len=4)
    assert inputs[:, 0].tolist() == [0, 4, 8]
    assert targets[targets != IGNORE].tolist() == list(range(1, 10))


def test_unknown_characters_of_the_test_part_have_an_id(tmp_path):
    source = Source.measure(written(tmp_path, a="abcabcabcX"))
    tokenizer = CharacterTokenizer("abc")
    held_out = tokens_of(source, tokenizer, "test")
    assert held_out.ids.tolist() == [tokenizer.bos_id, tokenizer.unknown, tokenizer.eos_id]
