"""From files and the Hub to batches: what is read, what is refused, how it is cut and told."""

import itertools
import json
import math
import os
import random

import pytest
import torch

import data
from data import PARTS, Pairs, Subwords, batches, cut, families, load, pad, read_pairs
from options import UserError

TEN = [(f"sentence number {i} of ten .", f"kalimat ke-{i} dari sepuluh .") for i in range(10)]


def written(folder, content: str | bytes, name: str = "pairs.tsv") -> str:
    file = folder / name
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def tsv(pairs) -> str:
    return "".join(f"{source}\t{target}\n" for source, target in pairs)


def everything(pairs: Pairs) -> list[tuple[str, str]]:
    return sorted(itertools.chain(pairs.train, pairs.valid, pairs.test))


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_of_a_file(tmp_path):
    pairs = load(written(tmp_path, tsv(TEN)))
    assert everything(pairs) == TEN
    assert [len(pairs.part(part)) for part in PARTS] == [8, 1, 1]
    assert (pairs.floor("test"), pairs.ceiling("test")) == (None, None)
    assert (pairs.alignments("test"), pairs.unseen("test")) == (None, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: "\n\n" + text + "\n  \n\t\n",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace(" ", "  ").replace("sentence", "\u3000sentence\u00a0"),
        lambda text: text + text,
        lambda text: text.replace("\n", "\tCC-BY 2.0 (France)\t17\n"),
    ],
)
def test_file_may_come_from_any_editor(tmp_path, change):
    """Windows line ends, a byte order mark, empty lines, wide spaces, all twice, more columns."""
    assert everything(load(written(tmp_path, change(tsv(TEN))))) == TEN


def test_more_columns_are_mentioned(tmp_path, capsys):
    load(written(tmp_path, tsv(TEN) + "one\ttwo\tthree\n"))
    assert "what stands after a second TAB in a line is not read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "has 0 pairs"),
        ("\n\n\n", "has 0 pairs"),
        (tsv(TEN[:5]), "has 5 pairs that can be cut .* 10 or more are needed"),
        (tsv(TEN) + "no tab here\n", "line 11 of .* has no TAB: write English TAB Indonesian"),
        (tsv(TEN).encode() + b"caf\xe9\tkafe\n", "is not UTF-8 text: save it as UTF-8"),
        (tsv(TEN).encode("utf-16"), "is not UTF-8 text"),
        (bytes(range(256)) * 10, "is not UTF-8 text|has no TAB"),
        (tsv([("same", f"t{i}") for i in range(20)]), "without a sentence in two of them"),
        (tsv([(f"s{i}", "") for i in range(20)]), "has 0 pairs"),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        load(written(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        load(str(tmp_path / "nowhere.tsv"))
    with pytest.raises(UserError, match="is a folder"):
        load(str(tmp_path))
    for name in ("", "  "):
        with pytest.raises(UserError, match="--data is empty"):
            load(name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="can be read only once"):
        load(str(tmp_path / "pipe"))


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    """Two empty sides, two too long, one there twice; the rest is left."""
    long, wide = "word " * 101, "x" * 1001
    odd = [("", "x"), ("y", " "), (long, "z"), ("z", wide), TEN[0]]
    pairs = load(written(tmp_path, tsv(TEN + odd)))
    assert everything(pairs) == TEN
    said = capsys.readouterr().err
    assert "pairs passed over: 2 empty, 2 too long, 1 there twice; 10 are left" in said


def test_sides_of_exactly_the_longest_are_kept(tmp_path):
    edge = [(" ".join(["word"] * 100), "z"), ("z", "x" * 1000)]
    assert everything(load(written(tmp_path, tsv(TEN + edge)))) == sorted(TEN + edge)


def test_line_of_ten_megabytes_is_too_long(tmp_path, capsys):
    huge = "a " * 5_000_000 + "\tx\n"
    assert everything(load(written(tmp_path, tsv(TEN) + huge))) == TEN
    assert "1 too long" in capsys.readouterr().err
    with pytest.raises(UserError) as caught:
        load(written(tmp_path, huge.replace("\t", " ")))
    assert len(str(caught.value)) < 500


def test_nothing_is_said_of_a_file_that_is_read_whole(tmp_path, capsys):
    load(written(tmp_path, tsv(TEN)))
    assert capsys.readouterr().err == ""


def test_all_pairs_of_a_source_for_scoring(tmp_path):
    assert read_pairs(written(tmp_path, tsv(TEN[:1]))) == TEN[:1]
    assert len(read_pairs("grammar")) == 10_800
    with pytest.raises(UserError, match="has no pair of sentences"):
        read_pairs(written(tmp_path, "\n"))


# ── The Hub ───────────────────────────────────────────────────────────────────────────────────────


def hub(folder, **splits) -> str:
    """A local folder in the Hub's layout: a file of JSON lines for each split."""
    pytest.importorskip("datasets")
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        written(folder, text, f"data/{split}.jsonl")
    return f"hf:{folder}"


def rows(first: str, second: str, pairs=TEN) -> list[dict]:
    return [{first: source, second: target} for source, target in pairs]


@pytest.mark.parametrize(
    "first, second", [("en", "id"), ("source", "target"), ("src", "tgt"), ("kiri", "kanan")]
)
def test_two_columns_of_a_data_set(tmp_path, first, second):
    assert everything(load(hub(tmp_path, train=rows(first, second)))) == TEN


def test_known_columns_among_others(tmp_path):
    both = [row | {"id": "x", "score": 1} for row in rows("english", "indonesian")]
    assert everything(load(hub(tmp_path, train=both))) == TEN


def test_columns_that_are_asked_for(tmp_path):
    three = [row | {"fr": "trois"} for row in rows("deu", "ind")]
    name = hub(tmp_path, train=three)
    with pytest.raises(
        UserError, match="has the columns deu, ind, fr: say which two with .*#SOURCE"
    ):
        load(name)
    assert everything(load(name + "#deu,ind")) == TEN
    assert everything(load(name + "#ind, deu")) == sorted((b, a) for a, b in TEN)
    for wrong in ("#deu", "#deu,xyz", "#a,b,c"):
        with pytest.raises(UserError, match="say which two"):
            load(name + wrong)


def test_column_translation_as_in_opus_100(tmp_path):
    """Each row is {"translation": {"en": …, "id": …}}; the parts are the data set's own."""
    parts = {
        "train": [{"translation": row} for row in rows("en", "id", TEN[:8])],
        "validation": [{"translation": row} for row in rows("en", "id", TEN[8:9])],
        "test": [{"translation": row} for row in rows("en", "id", TEN[9:])],
    }
    pairs = load(hub(tmp_path, **parts))
    assert (pairs.train, pairs.valid, pairs.test) == (TEN[:8], TEN[8:9], TEN[9:])
    swapped = load(f"hf:{tmp_path}#id,en")
    assert swapped.test == [TEN[9][::-1]]


def test_parquet_files_of_a_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"translation": row} for row in rows("en", "id")])
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert everything(load(f"hf:{tmp_path}")) == TEN


def test_configuration_of_a_data_set(tmp_path):
    """NAME@CONFIG, as opus-100@en-id: a folder whose card names two configurations."""
    pytest.importorskip("datasets")
    card = (
        "---\nconfigs:\n- config_name: en-id\n  data_files: id.jsonl\n"
        "- config_name: en-fr\n  data_files: fr.jsonl\n---\n"
    )
    written(tmp_path, card, "README.md")
    for language in ("id", "fr"):
        found = [{"en": s, language: language + t} for s, t in TEN]
        text = "".join(json.dumps(row) + "\n" for row in found)
        written(tmp_path, text, f"{language}.jsonl")
    pairs = load(f"hf:{tmp_path}@en-fr")
    assert everything(pairs) == [(s, "fr" + t) for s, t in TEN]
    with pytest.raises(UserError, match="cannot load --data hf:"):
        load(f"hf:{tmp_path}@en-de")


def test_own_parts_of_a_data_set_lose_what_leaks(tmp_path, capsys):
    """A test sentence that stands in the training part is taken out of there, not of the test."""
    name = hub(
        tmp_path,
        train=rows("en", "id", [*TEN[:8], ("other", TEN[9][1]), (TEN[8][0].upper(), "new")]),
        validation=rows("en", "id", [TEN[8], TEN[9]]),
        test=rows("en", "id", TEN[9:]),
    )
    pairs = load(name)
    assert (pairs.train, pairs.valid, pairs.test) == (TEN[:8], TEN[8:9], TEN[9:])
    assert "3 pairs passed over" in capsys.readouterr().err


def test_rows_without_text_are_empty(tmp_path):
    more = [{"en": None, "id": "x"}, {"en": "y", "id": None}]
    assert everything(load(hub(tmp_path, train=rows("en", "id") + more))) == TEN


@pytest.mark.parametrize("row", [{"en": 1, "id": 2}, {"translation": "text"}])
def test_columns_of_something_else_are_refused(tmp_path, row):
    with pytest.raises(UserError, match="something else than text|no dictionary by language"):
        load(hub(tmp_path, train=[row] * 20))


def test_data_set_that_is_not_there_is_refused(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(UserError, match="cannot load --data hf:") as caught:
        load(f"hf:{tmp_path / 'nowhere'}")
    assert "\n" not in str(caught.value)


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


def test_families_are_what_shares_a_sentence():
    """a-1, a-2 and b-2 belong together through a and 2; c-3 and C-4 through c."""
    pairs = [("a", "1"), ("a", "2"), ("c", "3"), ("b", "2"), ("C", "4"), ("2", "a")]
    assert families(pairs) == [[0, 1, 3], [2, 4], [5]]


def test_no_sentence_is_in_two_parts():
    """Of 400 pairs of 60 × 60 sentences, most in one large family, and 100 on their own."""
    tangled = {(f"s{i * i % 61}", f"t{i * i * i % 67}") for i in range(400)}
    alone = [(f"x{i}", f"y{i}") for i in range(100)]
    parts = cut(sorted(tangled) + alone)
    assert sorted(itertools.chain(*parts.values())) == sorted([*tangled, *alone])
    for side in (0, 1):
        texts = [{pair[side] for pair in parts[part]} for part in PARTS]
        assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    n = len(tangled) + 100
    assert len(parts["valid"]) == len(parts["test"]) == n // 20


def test_cut_of_any_pairs_keeps_all_and_leaks_nothing():
    hypothesis = pytest.importorskip("hypothesis")
    side = hypothesis.strategies.text(alphabet="abC", max_size=3)
    lists = hypothesis.strategies.lists(hypothesis.strategies.tuples(side, side), unique=True)

    @hypothesis.given(lists)
    def check(pairs):
        parts = cut(pairs)
        assert sorted(itertools.chain(*parts.values())) == sorted(pairs)
        for one, other in itertools.combinations(PARTS, 2):
            for i in (0, 1):
                texts = [{pair[i].casefold() for pair in parts[part]} for part in (one, other)]
                assert not texts[0] & texts[1]

    check()


def test_parts_are_the_same_every_time_and_no_larger_than_2000():
    pairs = [(f"s{i}", f"t{i}") for i in range(50_000)]
    parts = cut(pairs)
    assert parts == cut(pairs)
    assert [len(parts[part]) for part in PARTS] == [46_000, 2_000, 2_000]
    assert parts["test"] != pairs[-2000:]  # chosen by chance, in the order of the file
    assert parts["test"] == sorted(parts["test"], key=lambda pair: int(pair[0][1:]))


def test_our_grammar_has_its_own_parts():
    pairs = load("grammar")
    assert [len(pairs.part(part)) for part in PARTS] == [10_000, 400, 400]
    for part in PARTS:
        assert 0.1 < pairs.floor(part) < 0.3 and pairs.ceiling(part) >= 97
    assert sum(pairs.unseen("test")) == 200


# ── Subwords ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def subwords() -> Subwords:
    return Subwords.train(load("grammar").train[:2_000], 700)


def test_marks_and_size(subwords):
    assert subwords.vocab_size == 700 == len(subwords.pieces)
    assert (subwords.pad_id, subwords.unk_id, subwords.bos_id, subwords.eos_id) == (0, 1, 2, 3)
    assert subwords.decode([2, *subwords.encode("Budi membaca"), 3, 0, 0]) == "Budi membaca"
    assert subwords.encode("Budi", target=True) == subwords.encode("Budi", target=False)
    assert subwords.encode("") == [] and subwords.decode([]) == ""


@pytest.mark.parametrize(
    "text",
    [
        "héllo wörld",
        "漢字かな",
        "👩‍🚀🙂",
        "مرحبا",
        "a\x00b",
        "<s> </s> <pad> <unk>",
        "½ ﬁ Å e\u0301",
    ],
)
def test_text_that_was_never_seen_comes_back(subwords, text):
    ids = subwords.encode(text)
    assert subwords.decode(ids) == text
    assert not {0, 1, 2, 3} & set(ids)


def test_any_text_comes_back_with_single_spaces(subwords):
    hypothesis = pytest.importorskip("hypothesis")
    characters = hypothesis.strategies.characters(exclude_categories=["Cs"], exclude_characters="▁")

    @hypothesis.given(hypothesis.strategies.text(characters))
    def check(text):
        text = " ".join(text.split())
        assert subwords.decode(subwords.encode(text)) == text

    check()


def test_words_of_ids(subwords):
    text = "Siti membaca kucing-kucing 漢字 itu."
    ids = subwords.encode(text)
    numbers = subwords.words(ids)
    assert len(numbers) == len(ids) and numbers == sorted(numbers)
    for i, word in enumerate(text.split()):
        assert subwords.decode([j for j, n in zip(ids, numbers, strict=True) if n == i]) == word
    assert subwords.words([]) == []


def test_vocabulary_is_made_from_the_training_part_alone():
    """Pieces with a letter that only the other parts have cannot be there."""
    train = [(f"aba {'b' * (i % 7)} cab", f"bac abba {'c' * (i % 5)}") for i in range(50)]
    subwords = Subwords.train(train, 275)
    assert not any("z" in piece for piece in subwords.pieces)
    spelled = [i for i, piece in enumerate(subwords.pieces) if piece.startswith("<0x")]
    assert set(subwords.encode("z")) & set(spelled)


def test_training_twice_gives_the_same_model():
    train = load("grammar").train[:300]
    assert Subwords.train(train, 500).model == Subwords.train(train, 500).model


def test_model_is_saved_and_loaded(subwords, tmp_path):
    subwords.save(tmp_path)
    again = Subwords.load(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["subwords.model"]
    assert again.pieces == subwords.pieces
    text = "Dia sudah membeli sebuah topi."
    assert again.encode(text) == subwords.encode(text)


@pytest.mark.parametrize("vocab_size", [1, 100, 5_000, 2**31 - 1])
def test_sizes_that_cannot_be_are_refused(vocab_size):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size}") as caught:
        Subwords.train(load("grammar").train[:200], vocab_size)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_largest_size_is_named_and_works():
    train = load("grammar").train[:200]
    with pytest.raises(UserError, match="take [0-9]+ or less") as caught:
        Subwords.train(train, 5_000)
    largest = int(str(caught.value).split("take ")[1].split()[0])
    assert Subwords.train(train, largest).vocab_size == largest


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: b"",
        lambda model: b"no model at all",
        lambda model: model[: len(model) // 2],
        lambda model: model[:-1],
        lambda model: bytes(1000),
        lambda model: b"\xff" * 1000,
        lambda model: model.replace(b"<pad>", b"<PAD>"),
    ],
)
def test_damaged_models_are_refused(subwords, tmp_path, damage):
    (tmp_path / "subwords.model").write_bytes(damage(subwords.model))
    with pytest.raises(UserError, match="subwords.model"):
        Subwords.load(tmp_path)


def test_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="subwords.model cannot be read"):
        Subwords.load(tmp_path)


def test_model_with_other_marks_is_refused(tmp_path):
    """As other projects make them: unk 0, bos 1, eos 2, no pad."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 10), model_writer=model, vocab_size=7, minloglevel=2
    )
    with pytest.raises(UserError, match="we need 0, 1, 2, 3"):
        Subwords(model.getvalue())


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def encoded(n: int = 500) -> list[tuple[list[int], list[int]]]:
    """Pairs of 1 to 23 and 0 to 18 ids."""
    return [([4] * (1 + i * 5 % 23), [5] * (i * 7 % 19)) for i in range(n)]


@pytest.mark.parametrize("n_token", [24, 60, 500, 10**6])
def test_batches_cover_every_pair_once_and_respect_the_limit(n_token):
    """24 is one pair of the longest, 23 ids and their end mark."""
    pairs = encoded()
    found = batches(pairs, n_token, seed=0, epoch=0)
    assert sorted(itertools.chain(*found)) == list(range(len(pairs)))
    for batch in found:
        assert batch
        assert len(batch) * (1 + max(max(map(len, pairs[i])) for i in batch)) <= n_token


def test_batches_of_any_pairs():
    hypothesis = pytest.importorskip("hypothesis")
    sides = hypothesis.strategies.integers(0, 30).map(lambda n: [7] * n)
    lists = hypothesis.strategies.lists(hypothesis.strategies.tuples(sides, sides), max_size=40)

    @hypothesis.given(
        lists, hypothesis.strategies.integers(31, 200), hypothesis.strategies.integers(0)
    )
    def check(pairs, n_token, seed):
        found = batches(pairs, n_token, seed, 3)
        assert sorted(itertools.chain(*found)) == list(range(len(pairs)))
        for batch in found:
            assert len(batch) * (1 + max(max(map(len, pairs[i])) for i in batch)) <= n_token

    check()


def test_order_depends_on_seed_and_epoch_alone():
    pairs = encoded()
    found = {(s, e): batches(pairs, 300, s, e) for s in (0, 1) for e in (0, 1)}
    torch.manual_seed(99)
    assert found == {key: batches(pairs, 300, *key) for key in found}
    assert len({str(order) for order in found.values()}) == 4
    lengths = [max(map(len, pairs[batch[0]])) for batch in found[0, 0]]
    assert lengths != sorted(lengths)  # short and long batches come in turn


def test_little_of_a_batch_is_padding():
    """By length less than a tenth is padding, in the order of the corpus about a third."""
    pairs = [([1] * (4 + i % 17), [1] * (4 + i % 17)) for i in range(2_000)]

    def share(groups):
        real = sum(len(pairs[i][0]) for group in groups for i in group)
        return 1 - real / sum(len(g) * max(len(pairs[i][0]) for i in g) for g in groups)

    in_order = [list(range(i, i + 25)) for i in range(0, 2_000, 25)]
    assert share(batches(pairs, 500, 0, 0)) < 0.1 < 0.3 < share(in_order)


def test_pair_that_fits_into_no_batch_is_refused():
    with pytest.raises(UserError, match="has 24 tokens with its end mark, a batch only 23"):
        batches(encoded(), 23, 0, 0)


def test_no_pairs_give_no_batches():
    assert batches([], 100, 0, 0) == []


def test_padding():
    expected = torch.tensor([[5, 6, 7], [8, 0, 0], [0, 0, 0]])
    found = pad([[5, 6, 7], [8], []])
    assert torch.equal(found, expected) and found.dtype == torch.int64
    assert torch.equal(pad([[5, 6, 7], [8], []], 9), expected.where(expected > 0, 9))
    assert pad([]).shape == (0, 0) and pad([[]]).shape == (1, 0)


def test_batches_of_the_default_data_are_few_and_full(subwords):
    """About 10,000 · 15 / 4096 batches, nearly all of them full to nine tenths."""
    pairs = [(subwords.encode(s), subwords.encode(t)) for s, t in load("grammar").train[:3_000]]
    found = batches(pairs, 4096, 0, 0)
    sizes = [len(b) * (1 + max(max(map(len, pairs[i])) for i in b)) for b in found]
    assert math.fsum(sizes) / len(sizes) > 0.8 * 4096
    assert data.FEWEST == 10


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_to_a_model_gives_a_traceback(subwords, seed):
    """100 times some bytes changed, lost or put in: either it is refused, or it is a model."""
    dice = random.Random(seed)
    for _ in range(100):
        model, at = bytearray(subwords.model), dice.randrange(len(subwords.model))
        kind = dice.randrange(3)
        if kind == 0:
            model[at] = dice.randrange(256)
        elif kind == 1:
            del model[at : at + dice.randint(1, 200)]
        else:
            model[at:at] = dice.randbytes(dice.randint(1, 50))
        try:
            damaged = Subwords(bytes(model))
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert len(damaged.pieces) == damaged.vocab_size
        assert isinstance(damaged.decode(damaged.encode("Budi membaca 漢字.")), str)
