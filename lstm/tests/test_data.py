"""The sources of which everything is known: notes and reviews."""

import itertools
import math
import random
from collections import Counter

import make_notes
import make_reviews
import pytest

import data
import reviews
from options import UserError
from run import read_json

# ── Notes ─────────────────────────────────────────────────────────────────────────────────────────


def states(limit: int = 400) -> list[tuple]:
    """The first states that are reached from the start."""
    found = [make_notes.START]
    for state in found:
        if len(found) < limit:
            found += [s for _, _, s in make_notes.choices(state) if s not in found]
    return found


def test_choices_of_every_state_sum_to_one():
    for state in states():
        options = make_notes.choices(state)
        assert math.isclose(sum(p for p, _, _ in options), 1.0) and all(t for _, t, _ in options)


def test_listener_knows_the_probability_of_the_first_letters():
    """Names are equally likely, and only Anton begins with A: ln 1/6, and then n is certain."""
    listener = make_notes.Listener()
    assert listener.next_letter()["A"] == pytest.approx(1 / 6)
    assert listener.hear("A") == pytest.approx(math.log(1 / 6))
    assert listener.hear("n") == pytest.approx(0.0)
    with pytest.raises(ValueError, match="does not write 'x'"):
        listener.hear("x")


def test_letters_that_can_come_sum_to_one():
    text, listener = make_notes.write(1500, seed=3), make_notes.Listener()
    for letter in text:
        coming = listener.next_letter()
        assert sum(coming.values()) == pytest.approx(1.0)
        assert listener.hear(letter) == pytest.approx(math.log(coming[letter]))


def test_probability_of_a_text_is_the_product_of_the_choices():
    """Written down while the dice fell; equal, since no two ways write the same text."""
    dice, state, text, nats = random.Random(1), make_notes.START, "", 0.0
    while len(text) < 3000 or state != make_notes.START:
        options = make_notes.choices(state)
        p, piece, state = dice.choices(options, [p for p, _, _ in options])[0]
        text, nats = text + piece, nats - math.log(p)
    assert -sum(make_notes.log_probs(text)) == pytest.approx(nats)


def test_notes_are_what_their_script_writes():
    text = data.NOTES.read_text(encoding="utf-8")
    assert make_notes.write(60_000, make_notes.SEED)[:60_000] == text[:60_000]
    assert make_notes.floor(text, "test") == pytest.approx(read_json(data.FLOORS)["test"])


def test_quotations_and_brackets_are_closed():
    text = data.NOTES.read_text(encoding="utf-8")[:200_000]
    for note in text.split("\n")[:-1]:
        depths = list(itertools.accumulate((c == "(") - (c == ")") for c in note))
        assert note.count('"') % 2 == 0 and min(depths) == 0 == depths[-1] and max(depths) <= 3


def test_floor_is_of_our_notes_alone(tmp_path):
    assert data.floor("notes", "test") == data.floor(str(data.NOTES), "test") > 0.15
    assert data.floor(str(tmp_path / "x.txt"), "test") is None


# ── Reviews ───────────────────────────────────────────────────────────────────────────────────────


def value_of(clause: str) -> int:
    """What a clause says, read from its words."""
    *before, adjective = clause.split()
    value = next(v for v, words in make_reviews.ADJECTIVES.items() if adjective in words)
    return -value if before[-1] in make_reviews.NEGATIONS else value


def probability(text: str) -> float:
    """P(label 1) of a review by a reader that knows nothing of how it was made, but the rules."""
    sentences = [s.strip() for s in text.split(" .") if s.strip()]
    (review,) = [s for s in sentences if not s.startswith(("we had", "it "))]
    if review.startswith("although "):
        a, b = review.removeprefix("although ").split(" , ")
        return make_reviews.positive(value_of(a) + 3 * value_of(b))
    for join, (weight_first, weight_second) in {
        " , and ": (1, 1), " , but ": (1, 3), " , although ": (3, 1)
    }.items():  # fmt: skip
        if join in review:
            first, second = review.split(join)
            s = weight_first * value_of(first) + weight_second * value_of(second)
            return make_reviews.positive(s)
    return make_reviews.positive(value_of(review))


def test_reviews_mean_what_their_third_column_says():
    lines = reviews.read("reviews")["test"]
    assert len(lines) == 4000
    for text, _, p in lines[:500]:
        assert probability(text) == pytest.approx(p, abs=1e-6), text


def test_ceilings_against_counting():
    """Both ceilings from 60,000 reviews, by what they say and by the bag of kinds of words."""
    dice, n = random.Random(5), 60_000
    kind_of = {w: f"{v}" for v, words in make_reviews.ADJECTIVES.items() for w in words}
    kind_of |= dict.fromkeys(make_reviews.NEGATIONS, "no") | dict.fromkeys(make_reviews.NOUNS, "it")
    bayes, halves = 0.0, ({}, {})
    for i in range(n):
        text, p = make_reviews.review(dice)
        bayes += max(p, 1 - p)
        bag = frozenset(Counter(kind_of.get(word, word) for word in text.split()).items())
        both = halves[i % 2].setdefault(bag, [0.0, 0.0])
        both[0] += 1 - p
        both[1] += p
    found = make_reviews.ceilings()
    saved = read_json(data.CEILINGS)
    assert found == pytest.approx({name: saved[name] for name in found})
    assert bayes / n == pytest.approx(found["bayes"], abs=0.003)
    first, second = halves
    too_good = sum(map(max, first.values())) * 2 / n  # answers chosen by what they are scored on
    honest = sum(both[first.get(bag, both).index(max(first.get(bag, both)))]
                 for bag, both in second.items()) * 2 / n  # fmt: skip
    assert honest - 0.003 < found["bag_of_words"] < too_good + 0.003 and too_good - honest < 0.05
    assert sum(p for p, _, _ in make_reviews.kinds()) == pytest.approx(1.0)


def test_bag_is_the_same_in_any_order_and_its_kind_is_known():
    dice, known = random.Random(6), make_reviews.bags()
    for _ in range(300):
        text, _ = make_reviews.review(dice)
        bag = make_reviews.bag_of(text)
        words = text.split()
        dice.shuffle(words)
        assert bag in known and make_reviews.bag_of(" ".join(words)) == bag


def test_ceiling_of_counts_on_the_test_part():
    lines = [(text, p) for text, _, p in reviews.read("reviews")["test"]]
    found = make_reviews.ceiling_of_counts(lines)
    assert found == pytest.approx(read_json(data.CEILINGS)["bag_of_words_on_test"])
    assert found == pytest.approx(make_reviews.ceilings()["bag_of_words"], abs=0.015)


def test_labels_are_as_likely_as_they_should_be():
    lines = reviews.read("reviews")["train"]
    right = sum((label == "1") == (p > 0.5) for _, label, p in lines if p != 0.5)
    expected = [max(p, 1 - p) for _, _, p in lines if p != 0.5]
    assert right / len(expected) == pytest.approx(sum(expected) / len(expected), abs=0.01)


# ── TSV ───────────────────────────────────────────────────────────────────────────────────────────


def test_words_and_signs():
    assert reviews.words_of("It wasn't BAD, n't?") == ["it", "wasn't", "bad", ",", "n't", "?"]


def write(folder, name, *lines):
    file = folder / name
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_folder_as_sst2_comes(tmp_path):
    for name in ("train", "dev", "test"):
        write(tmp_path, f"{name}.tsv", "a good film\t1", "a bad film\t0")
    parts = reviews.read(str(tmp_path))
    vocabulary = reviews.make_vocabulary(parts["train"], 1)
    assert vocabulary.words == ("a", "film", "bad", "good") and vocabulary.classes == ("0", "1")
    part = reviews.encode(parts["test"], vocabulary)
    ids, _, labels = part.rows([0, 1])
    assert ids.tolist() == [[2, 5, 3], [2, 4, 3]] and labels.tolist() == [1, 0]
    assert part.bayes is None and vocabulary.encode("a FUNNY film") == [2, 1, 3]


def test_single_file_is_cut_and_labels_may_be_words(tmp_path):
    file = write(tmp_path, "all.tsv", *[f"text {i}\t{'no' if i % 3 else 'yes'}" for i in range(40)])
    parts = reviews.read(str(file))
    assert [len(parts[name]) for name in ("train", "valid", "test")] == [36, 2, 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["no tab here"], "line 1: a text, a tab and a label"),
        (["a\t1", "b\t"], "line 2"),
        (["a\t1\t2.5"], "line 1"),
        (["a\t1\tx"], "line 1"),
        ([""], "is empty"),
        (["a\t1"] * 30, "all labels are '1'"),
        (["a\t1", "b\t0"], "20 or more"),
        (["a\t1", "b\t0"] * 9 + ["c\t7", "d\t1"], "label '7' of valid is not in train"),
    ],
)
def test_lines_that_are_none_are_refused(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        reviews.read(str(write(tmp_path, "bad.tsv", *lines)))


def test_epochs_hold_each_text_once(tmp_path):
    file = write(tmp_path, "all.tsv", *[f"w{i} x\t{i % 2}" for i in range(40)])
    parts = reviews.read(str(file))
    part = reviews.encode(parts["train"], reviews.make_vocabulary(parts["train"], 1))
    first = [part.training_rows(step, 9, seed=0)[0][:, 0] for step in range(4)]
    assert len({i for rows in first for i in rows.tolist()}) == 36
    other = part.training_rows(0, 9, seed=1)[0][:, 0]
    assert other.tolist() != first[0].tolist()
