"""The texts know how probable they are, so the floor under every loss is exact."""

import math
import random
import re
import statistics

import make_recall as source
import numpy as np
import pytest

import data
from conftest import FOLDER
from run import read_json
from text import Tokens
from tokenizer import ByteTokenizer, SentencePieceTokenizer

HERE = FOLDER / "data"
KINDS = source.make_stories.KINDS
BEGINNING = "There once was a bear named Bram. Bram slept in a hollow log."
REST = (
    " One morning, Bram found a red "
    "cup on the market square. But the cup was swallowed by the deep hole. Soon a mole named Gus "
    "came by. Gus crept into the deep hole and pulled out the cup. That night Bram never left the "
    "cup alone."
)
ASKED = " Who was it? Bram, a bear in a hollow log."
TEXT = BEGINNING + ASKED + REST + ASKED


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """The texts in the file."""
    text = (HERE / "recall.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n<|endoftext|>\n").split("\n<|endoftext|>\n")


def test_files_are_what_the_script_writes(monkeypatch, tmp_path):
    """Byte for byte."""
    monkeypatch.setattr(source, "HERE", tmp_path)
    source.main()
    for name in ("recall.txt", "floor.json"):
        written = (HERE / name).read_bytes().replace(b"\r\n", b"\n")
        assert (tmp_path / name).read_bytes() == written


def test_probability_of_a_text_is_that_of_its_story():
    """The answers follow from the story, so they cost nothing."""
    of_story = source.make_stories.log_prob(BEGINNING + REST)
    assert -100 < of_story < -20
    assert source.log_prob(TEXT) == of_story
    for less in (BEGINNING + REST, BEGINNING + ASKED + REST, BEGINNING + REST + ASKED):
        assert source.log_prob(less) == -math.inf


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (", a bear", ", a fox"),
        (", a bear", ", a merry bear"),
        (", a bear in", ", a bear under"),
        ("? Bram, a", "? bram, a"),
        (" Who was it? ", " "),
        ("log. One", "log. One day, one"),
        ("named Bram", "named Gus"),
        ("alone.", "alone. "),
        ("hollow log.", "hollow log. "),
    ],
)
def test_what_the_dice_cannot_say_has_no_probability(old, new):
    assert old in TEXT
    for n in (1, 2):  # in the first place where it stands, and in all
        assert source.log_prob(TEXT.replace(old, new, n)) == -math.inf


def test_the_answer_is_said_at_the_beginning_and_never_again(corpus):
    """So only a look back over the whole story can know it."""
    answer = re.compile(rf"(\w+), a (?:(\w+) )?({'|'.join(KINDS)}) (.*)\.")
    for text in corpus:
        story, near, rest, far = re.split(r" Who was it\? (.*?\.)", text)[:4]
        name, trait, kind, home = answer.fullmatch(far).groups()
        assert near == far and f"{kind} " in story and f" {name}." in story and home in story
        assert trait is None or f" {trait} {kind} " in story
        assert home not in rest and not re.search(rf"\b{kind}\b", rest)


def test_a_text_that_tells_of_nobody_has_no_answer():
    with pytest.raises(ValueError, match="who lived where"):
        source.answer("It rained all day.")


def test_mean_cost_of_a_text_is_its_entropy():
    """Fresh texts cost what the held-out ones cost, within three standard errors."""
    dice = random.Random(99)
    costs = [-source.log_prob(source.tell(dice)) for _ in range(150)]
    floor = read_json(HERE / "floor.json")
    held = [floor[part]["nats"] / floor[part]["texts"] for part in ("valid", "test")]
    error = statistics.stdev(costs) / len(costs) ** 0.5
    assert abs(statistics.mean(costs) - statistics.mean(held)) < 3 * error * (1 + 150 / 250) ** 0.5


def test_floor_is_of_the_parts_that_are_cut(corpus):
    measured = data.measure("recall")
    chars = dict.fromkeys(("train", "valid", "test"), 0)
    for text, _, part in measured.pieces():
        chars[part] += len(text)
    for part in ("valid", "test"):
        assert read_json(HERE / "floor.json")[part]["chars"] == chars[part]
        assert data.floor("recall", part) == data.floor(str(data.RECALL), part)
    assert data.floor("other.txt", "test") is None


def test_answers_are_the_animals_behind_the_question(corpus):
    tokenizer = SentencePieceTokenizer.train(corpus[:600], 1000)
    ids = []
    for text in corpus[:5]:
        ids += [tokenizer.bos_id, *tokenizer.encode_text(text), tokenizer.eos_id]
    tokens = Tokens(np.array(ids, dtype=np.uint16), 1, tokenizer)
    mask = data.answers(tokens, tokenizer).ids
    marked = [tokenizer.decode([i]).strip() for i, yes in zip(ids, mask, strict=True) if yes]
    expected = [re.search(rf"({'|'.join(KINDS)}) ", text.split("?")[-1])[1] for text in corpus[:5]]
    assert marked == expected


def test_the_animals_that_count_as_answers_are_those_of_the_stories():
    """data.py names them itself, since the scripts in data/ are not imported by a run."""
    assert tuple(f" {kind}" for kind in KINDS) == data.KINDS
    assert data.QUESTION == source.QUESTION


def test_without_words_as_tokens_there_are_no_answers(corpus):
    ids = np.array(ByteTokenizer().encode(corpus[0]), dtype=np.uint16)
    tokens = Tokens(ids, 1, ByteTokenizer())
    assert data.answers(tokens, ByteTokenizer()).ids.sum() == 0
