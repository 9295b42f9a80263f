"""The grammar knows how probable a story is, so the floor under every loss is exact."""

import itertools
import math
import random

import make_stories
import pytest

import data
from conftest import FOLDER
from run import read_json


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """The stories in the file."""
    text = (FOLDER / "data" / "stories.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n<|endoftext|>\n").split("\n<|endoftext|>\n")


def told(seed: int) -> make_stories.Teller:
    teller = make_stories.Teller(random.Random(seed))
    make_stories.story(teller.pick, teller.say)
    return teller


@pytest.mark.parametrize("seed", range(12))
def test_story_is_at_least_as_probable_as_the_throws_that_told_it(seed):
    """More probable where other throws spell the same: then by whole factors of such choices."""
    teller = told(seed)
    extra = make_stories.log_prob(teller.text) - teller.log_prob
    assert extra >= -1e-9
    if "hopped from ledge" not in teller.text and "the thing" not in teller.text:
        assert extra < math.log(2 * 10) + 1e-9


def test_some_story_is_exactly_as_probable_as_its_throws():
    exact = [t for t in map(told, range(12)) if abs(t.log_prob - log_prob_of(t)) < 1e-9]
    assert exact


def log_prob_of(teller: make_stories.Teller) -> float:
    return make_stories.log_prob(teller.text)


def test_what_no_throws_spell_is_impossible():
    text = told(0).text
    assert make_stories.log_prob(text[:-1]) == -math.inf
    assert make_stories.log_prob(text + " ") == -math.inf
    assert make_stories.log_prob(text.replace("named", "nymed")) == -math.inf
    assert make_stories.log_prob("") == -math.inf


def small_grammar(pick, say):
    """ab with ⅔ · ½ + ⅓ · ½ = ½ in two ways, a with ⅓, b with ⅙."""
    if pick({True: 2, False: 1}):
        say("a")
        say(pick(["", "b"]))
    else:
        say(pick(["ab", "b"]))


def test_probabilities_of_a_small_grammar_by_hand(monkeypatch):
    monkeypatch.setattr(make_stories, "story", small_grammar)
    p = {text: math.exp(make_stories.log_prob(text)) for text in ("a", "ab", "b", "", "abb")}
    assert p == pytest.approx({"a": 1 / 3, "ab": 1 / 2, "b": 1 / 6, "": 0, "abb": 0})


def test_probabilities_of_all_texts_sum_to_one(monkeypatch):
    def grammar(pick, say):
        n = pick({1: 1, 2: 3, 3: 1})
        for _ in range(n):
            say(pick({"x": 2, "y": 1, "xy": 1}))

    monkeypatch.setattr(make_stories, "story", grammar)
    words = [w for n in (1, 2, 3) for w in itertools.product(("x", "y", "xy"), repeat=n)]
    texts = {"".join(w) for w in words}
    assert math.fsum(math.exp(make_stories.log_prob(t)) for t in texts) == pytest.approx(1)
    assert len(texts) < len(words)  # some can be spelled in several ways


def test_teller_throws_by_the_weights():
    """10,000 throws of 3 : 1, within five standard deviations of 43 each."""
    teller = make_stories.Teller(random.Random(0))
    n = sum(teller.pick({"a": 3, "b": 1}) == "a" for _ in range(10_000))
    assert abs(n - 7500) < 5 * 43.3
    assert teller.log_prob == pytest.approx(n * math.log(0.75) + (10_000 - n) * math.log(0.25))


@pytest.fixture(scope="module")
def parts() -> dict[str, list[str]]:
    """The stories of each part, as training cuts them."""
    found = {"train": [], "valid": [], "test": []}
    for text, _, part in data.measure("stories").pieces():
        found[part] += [text] if text else []
    return found


def test_parts_are_the_whole_file_story_by_story(corpus, parts):
    assert parts["train"] + parts["valid"] + parts["test"] == corpus


def test_floor_is_that_of_the_parts(parts):
    """Recomputed from the text that is there, for the stories that text.py keeps from training."""
    floor = read_json(FOLDER / "data" / "floor.json")
    assert floor.keys() == {"valid", "test"}
    for part, found in floor.items():
        nats = -math.fsum(map(make_stories.log_prob, parts[part]))
        assert found["nats"] == pytest.approx(nats, rel=1e-12)
        assert found["chars"] == sum(map(len, parts[part]))
        assert found["stories"] == len(parts[part])
        assert found["nats_per_char"] == pytest.approx(nats / found["chars"], rel=1e-12)


def test_floor_is_known_for_the_stories_alone(small_data):
    floor = read_json(FOLDER / "data" / "floor.json")
    for part in ("valid", "test"):
        assert data.floor("stories", part) == floor[part]["nats_per_char"]
        assert data.floor(str(FOLDER / "data" / "stories.txt"), part) == data.floor("stories", part)
        assert data.floor(str(small_data), part) is None


def test_script_writes_the_committed_files_byte_for_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(make_stories, "HERE", tmp_path)
    monkeypatch.setattr(make_stories, "log_prob", lambda text: -1.0)  # the floor has its own test
    make_stories.main()
    committed = (FOLDER / "data" / "stories.txt").read_bytes()
    assert (tmp_path / "stories.txt").read_bytes() == committed
    ours, theirs = (read_json(f / "floor.json") for f in (tmp_path, FOLDER / "data"))
    for part in ("valid", "test"):
        assert ours[part].keys() == theirs[part].keys()
        assert ours[part]["chars"] == theirs[part]["chars"]


def test_files_are_as_large_as_promised():
    assert 300_000 <= (FOLDER / "data" / "stories.txt").stat().st_size < 2_000_000


def test_stories_are_consistent(corpus):
    """What a reader expects: the helper fits the trouble, and the hero keeps name and pronoun."""
    for text in corpus[:200]:
        kind = next(
            t for t in make_stories.TROUBLES.values() if any(f" {p}" in text for p in t["places"])
        )
        assert any(f" {helper} named " in text for helper in kind["helpers"])
        name = text.split(". ")[0].split()[-1]
        he, other = ("he", "she") if make_stories.NAMES[name][0] == "he" else ("she", "he")
        assert f" {other} " not in text and f"{other.capitalize()} " not in text.split(". ")
        assert he in text or name in text
