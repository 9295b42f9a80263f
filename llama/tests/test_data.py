"""From a source to rows: what is held out, what a step reads, and what is read exactly once."""

import json

import numpy as np
import pytest
import torch

import data
from data import IGNORE, Source, Tokens, encode, file_pieces, load_tokens, write_tokens
from run import UserError
from tokenizer import ByteTokenizer, CharacterTokenizer, Tokenizer


class Plain(Tokenizer):
    """Bytes with no marks around a document."""

    vocab_size = 256

    def encode_text(self, text):
        return list(text.encode())


def written(folder, **files) -> str:
    for name, text in files.items():
        file = folder / name.replace("__", "/")
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder if len(files) > 1 else file)


def sides(name: str) -> tuple[str, str]:
    """The training text and the held-out text, with | where a document ends."""
    text = ["", ""]
    for piece, ends, held_out in Source.measure(name).pieces():
        text[held_out] += piece + "|" * ends
    return tuple(text)


# ── Split ─────────────────────────────────────────────────────────────────────────────────────────


def test_of_one_document_the_last_tenth_is_held_out(tmp_path):
    assert sides(written(tmp_path, a="0123456789" * 2)) == ("012345678901234567|", "89|")


def test_of_several_documents_the_last_ones_are_held_out_whole(tmp_path):
    """20 characters: those that begin at the 18th or later."""
    documents = ["0123456789", "01234567", "89"]
    name = written(tmp_path, a="\n<|endoftext|>\n".join(documents))
    assert sides(name) == ("0123456789|01234567|", "89|")


def test_document_that_crosses_the_border_is_trained_on(tmp_path):
    """The border is at 18 of 20; the middle one begins at 10, the last at 19."""
    name = written(tmp_path, a="\n<|endoftext|>\n".join(["0123456789", "012345678", "9"]))
    assert sides(name) == ("0123456789|012345678|", "9|")


def test_last_of_several_documents_is_held_out_however_long(tmp_path):
    name = written(tmp_path, a="\n<|endoftext|>\n".join(["01", "23", "0123456789" * 3]))
    assert sides(name) == ("01|23|", "0123456789" * 3 + "|")


def test_files_of_a_folder_are_documents_in_order_of_name(tmp_path):
    name = written(tmp_path, b="B" * 9, a="A" * 9, sub__c="C" * 2, **{".hidden": "no"})
    assert sides(name) == ("A" * 9 + "|" + "B" * 9 + "|", "CC|")


def test_folder_of_one_file_is_one_document(tmp_path):
    written(tmp_path, a="0123456789")
    assert sides(str(tmp_path)) == ("012345678|", "9|")


def test_empty_documents_are_none(tmp_path):
    mark = "<|endoftext|>\n"
    name = written(tmp_path, a=f"{mark}{mark}0123456789\n{mark}{mark}01\n{mark}{mark}")
    assert Source.measure(name).n_document == 2
    assert [s.strip("|") for s in sides(name)] == ["0123456789", "01"]
    ids = [ids.tolist() for ids, _, _ in encode(Source.measure(name), ByteTokenizer())]
    assert ids == [[256, *b"0123456789", 257], [256, *b"01", 257]]


def test_windows_line_ends_are_plain_ones(tmp_path):
    name = written(tmp_path, a="one\r\n<|endoftext|>\r\ntwo\r\nthree\r\n")
    assert sides(name) == ("one|", "two\nthree\n|")


def test_separator_must_stand_alone_on_its_line(tmp_path):
    name = written(tmp_path, a="say <|endoftext|> twice\n <|endoftext|> \nx")
    assert Source.measure(name).n_document == 2


def test_characters_count_and_not_bytes(tmp_path):
    assert Source.measure(written(tmp_path, a="é漢🙂")).n_char == 3


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_pieces_of_any_size_give_the_same_ids(tmp_path, monkeypatch, piece):
    """Long files come in pieces: no mark may fall between them."""
    text = "".join(f"line {i}\n" for i in range(20))
    name = written(tmp_path, a=text)
    expected = [256, *text[: int(0.9 * len(text))].encode(), 257]
    monkeypatch.setattr(data, "PIECE", piece)
    assert "".join(text for text, _ in file_pieces(tmp_path / "a")) == text
    ids = [i for ids, _, held_out in encode(Source.measure(name), ByteTokenizer()) if not held_out
           for i in ids.tolist()]  # fmt: skip
    assert ids == expected


@pytest.mark.parametrize("piece", [16, 10**6])
def test_long_documents_are_split_whole_too(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(data, "PIECE", piece)
    documents = ["a\n" * 30, "b\n" * 20, "c\n" * 4]
    name = written(tmp_path, a="<|endoftext|>\n".join(documents))
    source = Source.measure(name)
    assert source.n_document == 3
    train, held_out = sides(name)
    assert train.count("|") == 2 and held_out == "c\n" * 4 + "|"


@pytest.mark.parametrize("content", ["", "\n<|endoftext|>\n", "x"])
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


def test_tokenizer_sees_no_held_out_text(tmp_path):
    source = Source.measure(written(tmp_path, a="abc\ndef\n" * 9 + "XYZ\nXYZ\n"))
    assert set("".join(source.training_lines())) == set("abcdef")
    documents = "\n<|endoftext|>\n".join(["abc" * 9, "def", "XYZ"])
    source = Source.measure(written(tmp_path, b=documents))
    assert set("".join(source.training_lines())) <= set("abcdefXYZ") - set("XYZ")


def test_tokenizer_sees_no_more_than_its_limit(tmp_path):
    documents = ["a" * 10] * 50
    source = Source.measure(written(tmp_path, a="\n<|endoftext|>\n".join(documents)))
    assert 30 <= len("".join(source.training_lines(limit=30))) <= 50


def test_data_set_of_the_hub_from_a_local_copy(tmp_path):
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in ("one one", "two", "three"))
    written(tmp_path, **{"train.jsonl": rows})
    assert sides(f"hf:{tmp_path}") == ("one one|two|", "three|")


def test_data_set_without_a_column_text_is_refused(tmp_path):
    pytest.importorskip("datasets")
    written(tmp_path, **{"train.jsonl": '{"story": "one"}\n'})
    with pytest.raises(UserError, match="has no column text, only story"):
        Source.measure(f"hf:{tmp_path}")


# ── Tokens on disk ────────────────────────────────────────────────────────────────────────────────


def test_tokens_written_are_tokens_loaded(tmp_path):
    documents = ["abc" * 5, "def" * 4, "gh"]
    source = Source.measure(written(tmp_path, a="\n<|endoftext|>\n".join(documents)))
    write_tokens(source, ByteTokenizer(), tmp_path)
    train, valid = load_tokens(tmp_path, ByteTokenizer())
    assert train.ids.tolist() == [256, *b"abc" * 5, 257, 256, *b"def" * 4, 257]
    assert valid.ids.tolist() == [256, *b"gh", 257]
    assert (train.n_char, valid.n_char) == (27, 2)
    assert isinstance(train.ids, np.memmap) and train.ids.dtype == np.uint16
    held_out = data.held_out_tokens(source, ByteTokenizer())
    assert held_out.ids.tolist() == valid.ids.tolist() and held_out.n_char == 2


def test_large_vocabularies_take_four_bytes():
    for n, expected in ((1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokenizer = Tokenizer()
        tokenizer.vocab_size = n
        assert data.id_type(tokenizer) is expected


@pytest.mark.parametrize("spoil", ["train.bin", "valid.bin", "tokens.json"])
def test_tokens_that_are_gone_are_the_users_error(tmp_path, spoil):
    source = Source.measure(written(tmp_path, a="0123456789"))
    write_tokens(source, ByteTokenizer(), tmp_path)
    (tmp_path / spoil).unlink()
    with pytest.raises(UserError, match="are damaged"):
        load_tokens(tmp_path, ByteTokenizer())


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def counting(n: int) -> Tokens:
    """One document 0, 1, 2, …, so that a row tells where it begins."""
    return Tokens(np.arange(n, dtype=np.uint16), n, Plain())


def starts(tokens: Tokens, step: int, batch_size: int, seq_len: int, seed: int) -> list[int]:
    return tokens.training_rows(step, batch_size, seq_len, seed)[:, 0].tolist()


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


def test_epoch_covers_every_cell_once():
    """400 ids in rows of 8: (400 − 1)//8 − 1 = 48 cells, 8 apart, in an order that changes."""
    tokens = counting(400)
    tokens.begins = np.array([-1000])  # no row snaps to where a document begins
    rows = [s for step in range(24) for s in starts(tokens, step, 4, 8, seed=3)]
    first, second = rows[:48], rows[48:]
    for epoch in (first, second):
        assert np.diff(sorted(epoch)).tolist() == [8] * 47
        assert 0 <= min(epoch) and max(epoch) + 8 < 400
        assert epoch != sorted(epoch)
    assert first != second


def test_batch_across_two_epochs_takes_the_end_of_one_and_the_start_of_the_next():
    tokens = counting(400)
    small = [s for step in range(24) for s in starts(tokens, step, 4, 8, seed=3)]
    large = [s for step in range(3) for s in starts(tokens, step, 32, 8, seed=3)]
    assert large == small


def test_shift_of_the_grid_changes_with_the_epoch_and_reaches_every_offset():
    tokens = counting(400)
    shifts = {int(tokens.epoch(i, 48, 8, 0)[0] % 8) for i in range(60)}
    assert shifts == set(range(8))


def test_no_row_runs_over_the_end():
    """Whatever the length: the last cell with the largest shift still has its target."""
    for n in range(17, 60):
        tokens = counting(n)
        for step in range(20):
            assert tokens.training_rows(step, 3, 8, seed=0).shape == (3, 9)


def test_row_begins_where_its_document_begins_if_that_is_near():
    """Documents of 20 ids at 0, 20, 40, …: a row of 8 in the first 8 ids snaps to their start."""
    ids = np.array([*range(1, 20), 0] * 20, dtype=np.uint16)
    tokenizer = Plain()
    tokenizer.eos_id = 0
    tokens = Tokens(ids, len(ids), tokenizer)
    assert tokens.begins.tolist() == list(range(0, 400, 20))
    grid = tokens.epoch(0, tokens.n_row(8), 8, 5)
    expected = [g - g % 20 if g % 20 < 8 else g for g in grid.tolist()]
    got = torch.cat([tokens.training_rows(step, 4, 8, seed=5) for step in range(len(grid) // 4)])
    wanted = [ids[s : s + 9].tolist() for s in expected]
    assert got.tolist() == wanted[: len(got)]


@pytest.mark.parametrize("n", [0, 1, 8, 16])
def test_text_shorter_than_two_rows_is_refused(n):
    with pytest.raises(UserError, match="--seq-len 8 needs 17 or more"):
        counting(n).n_row(8)
    assert counting(17).n_row(8) == 1


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


def test_unknown_characters_of_held_out_text_have_an_id(tmp_path):
    source = Source.measure(written(tmp_path, a="abcabcabcX"))
    tokenizer = CharacterTokenizer("abc")
    held_out = data.held_out_tokens(source, tokenizer)
    assert held_out.ids.tolist() == [tokenizer.bos_id, tokenizer.unknown, tokenizer.eos_id]
