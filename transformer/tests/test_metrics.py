"""BLEU and chrF are sacrebleu's numbers; the error rate of alignments is that of the paper."""

import logging
import math
import random

import pytest

from metrics import alignment_error_rate, bleu, chrf, ngrams, tokenize_13a

WORDS = [
    *"the a cat dog sat on mat kucing-kucing itu membaca sebuah buku Budi's The CAT".split(),
    *["1", "3.14", "1,000", "10-20", "2024-01-01", "U.S.", "e.g.", "a.b", "3.", ".5", "7-", "-7"],
    *["&quot;", "&amp;", "&lt;", "&gt;", "&amp;lt;", "&apos;", "&", "<skipped>", "<b>", "a&b"],
    *["!", "?", ",", ".", "...", "'", '"', "(", ")", "[x]", "{y}", "/", "\\", "~", "`", "@", "#$%"],
    *[
        "é",
        "e\u0301",
        "漢字",
        "。",
        "«",
        "»",
        "–",
        "…",
        "🙂",
        "👩\u200d🚀",
        "مرحبا",
        "ß",
        "İ",
        "½",
        "٣",
    ],
    *["\u00a0", "\u2028", "\u3000", "\t", "\n", "-\n", "\x1c", "\x85", "\u200b", "x\u00a0y"],
]


def random_sentence(dice: random.Random) -> str:
    kind = dice.random()
    if kind < 0.05:
        return ""
    if kind < 0.08:
        return dice.choice([" ", "\n", "  \t "])
    n = 1 if kind < 0.2 else dice.randint(1, 14)
    return dice.choice(["", "", " "]).join(
        dice.choice(WORDS) + dice.choice([" ", " ", " ", ""]) for _ in range(n)
    )


def changed(text: str, dice: random.Random) -> str:
    """A hypothesis that shares something with its reference."""
    words = text.split(" ")
    for _ in range(dice.randint(0, 3)):
        at = dice.randrange(len(words) + 1)
        words[at : at + dice.randint(0, 2)] = dice.choices(WORDS, k=dice.randint(0, 2))
    return " ".join(words)


def random_lists(seed: int) -> tuple[list[str], list[str]]:
    dice = random.Random(seed)
    references = [random_sentence(dice) for _ in range(dice.randint(1, 6))]
    alike = dice.random() < 0.8
    return [changed(r, dice) if alike else random_sentence(dice) for r in references], references


@pytest.fixture(scope="module")
def sacrebleu():
    library = pytest.importorskip("sacrebleu")
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    return library


def test_scores_are_those_of_sacrebleu_on_1000_random_lists(sacrebleu):
    """To 1e-9; among them lists without any match and lists that are all right."""
    found = []
    for seed in range(1_000):
        hypotheses, references = random_lists(seed)
        theirs = sacrebleu.corpus_bleu(hypotheses, [references]).score
        assert bleu(hypotheses, references) == pytest.approx(theirs, abs=1e-9), seed
        found.append(theirs)
        theirs = sacrebleu.corpus_chrf(hypotheses, [references]).score
        assert chrf(hypotheses, references) == pytest.approx(theirs, abs=1e-9), seed
    assert sum(score == 0 for score in found) > 20
    assert sum(0 < score < 99 for score in found) > 500
    assert sum(score > 99.9 for score in found) > 5


def test_any_text_scores_as_with_sacrebleu(sacrebleu):
    hypothesis = pytest.importorskip("hypothesis")
    text = hypothesis.strategies.text(max_size=30) | hypothesis.strategies.text(
        alphabet="ab ,.-&;0'<>ltgampquo", max_size=30
    )
    lists = hypothesis.strategies.lists(
        hypothesis.strategies.tuples(text, text), min_size=1, max_size=4
    )

    @hypothesis.given(lists)
    def check(rows):
        ours, true = [list(side) for side in zip(*rows, strict=True)]
        for pair in ((ours, true), (true, true)):
            theirs = sacrebleu.corpus_bleu(pair[0], [pair[1]]).score
            assert bleu(*pair) == pytest.approx(theirs, abs=1e-9)
            theirs = sacrebleu.corpus_chrf(pair[0], [pair[1]]).score
            assert chrf(*pair) == pytest.approx(theirs, abs=1e-9)

    check()


def test_tokens_are_those_of_sacrebleu(sacrebleu):
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    theirs = Tokenizer13a()
    for seed in range(300):
        text = random_sentence(random.Random(seed))
        assert tokenize_13a(text) == theirs(text.rstrip()).split(), text


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("Saya membaca buku.", "Saya membaca buku ."),
        ("kucing-kucing itu, ya?", "kucing-kucing itu , ya ?"),
        ("3.14 is 1,000-2", "3.14 is 1,000 - 2"),
        ("&quot;A&amp;B&quot;", '" A & B "'),
        ("it's (x)", "it's ( x )"),
        ("", ""),
    ],
)
def test_tokens_by_hand(text, tokens):
    assert tokenize_13a(text) == tokens.split()


def test_bleu_by_hand():
    """`the cat sat on the mat` against `the cat sat on a mat`, 6 words each.

    Words 5/6 (the second `the` has no partner), pairs the-cat cat-sat sat-on 3/5, triples 2/4,
    fours 1/3. BLEU = 100 (5/6 · 3/5 · 2/4 · 1/3)^¼ = 100 · (1/12)^¼ = 53.73.
    """
    found = bleu(["the cat sat on the mat"], ["the cat sat on a mat"])
    assert found == pytest.approx(100 * (1 / 12) ** 0.25)
    assert round(found, 2) == 53.73


def test_short_hypothesis_is_punished_by_hand():
    """4 of 6 words, all right: every p is 1, and exp(1 − 6/4) = 0.607 is left."""
    assert bleu(["the cat sat on"], ["the cat sat on a mat"]) == pytest.approx(
        100 * math.exp(1 - 6 / 4)
    )


def test_smoothing_by_hand():
    """`a b x y` for `a b c d`: 2/4, 1/3, then 0/2 and 0/1 count as 1/(2·2) and 1/(4·1)."""
    expected = 100 * (2 / 4 * 1 / 3 * 1 / 4 * 1 / 4) ** 0.25
    assert bleu(["a b x y"], ["a b c d"]) == pytest.approx(expected)


def test_bleu_is_of_the_corpus_and_no_mean_of_sentences():
    """Counts are added up: 4 + 0 of 8 words, 3 of 6, 2 of 4 and 1 of 2: every p is ½."""
    found = bleu(["a b c d", "e f g h"], ["a b c d", "p q r s"])
    assert found == pytest.approx(50)


def test_chrf_by_hand():
    """`abc` for `abd`: single letters 2/3, pairs 1/2, triples 0: P = R = (2/3 + 1/2 + 0) / 3."""
    assert chrf(["abc"], ["abd"]) == pytest.approx(100 * (2 / 3 + 1 / 2) / 3)


def test_chrf_counts_recall_more_by_hand():
    """`ab` for `abc`: P = 1, R = (2/3 + 1/2) / 2 = 7/12; 5 P R / (4 P + R) = 35/55."""
    assert chrf(["ab"], ["abc"]) == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))
    assert chrf(["abc"], ["ab"]) > chrf(["ab"], ["abc"])  # too much costs less than too little


@pytest.mark.parametrize("score", [bleu, chrf])
def test_scores_at_the_ends(score):
    text = ["Guru itu membeli sebuah buku baru.", "Dia bukan seorang dokter."]
    assert score(text, text) == pytest.approx(100)
    assert score(["", ""], text) == 0
    assert score(text, ["", ""]) == 0
    assert score([""], [""]) == 0
    assert score(["qqq"], ["xyz"]) == 0


@pytest.mark.parametrize("score", [bleu, chrf])
@pytest.mark.parametrize("lists", [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_lists_that_do_not_fit_are_refused(score, lists):
    with pytest.raises(ValueError, match="as many of both"):
        score(*lists)


def test_ngrams_of_words_and_of_letters():
    assert ngrams("aab", 1) == {"a": 2, "b": 1}
    assert ngrams(("a", "b", "a", "b"), 2) == {("a", "b"): 2, ("b", "a"): 1}
    assert ngrams("ab", 3) == {}


def test_alignment_error_rate_by_hand():
    """3 predicted, 4 gold, 2 in both: 1 − 2 · 2 / 7."""
    predicted, gold = [[(0, 0), (1, 1)], [(2, 0)]], [[(0, 0), (1, 2)], [(2, 0), (0, 1)]]
    assert alignment_error_rate(predicted, gold) == pytest.approx(1 - 4 / 7)


def test_alignment_error_rate_at_the_ends():
    gold = [[(0, 0), (1, 1)], [(0, 1)]]
    assert alignment_error_rate(gold, gold) == 0
    assert alignment_error_rate([[], []], gold) == 1
    assert alignment_error_rate([[(5, 5)], [(7, 7)]], gold) == 1
    assert alignment_error_rate([], []) == alignment_error_rate([[]], [[]]) == 0
    assert alignment_error_rate([[(0, 0), (0, 0)]], [[[0, 0]]]) == 0  # a set, from JSON or not
    with pytest.raises(ValueError):
        alignment_error_rate([[]], gold)
