"""Unigram and WordPiece against brute force, and the numbers that can be checked by hand."""

import itertools
import math
import random
import struct
from collections import Counter

import numpy as np
import pytest

from bpe import BPE
from unigram import (
    Lattices,
    Unigram,
    common_prefixes,
    maximisation,
    seed_pieces,
    sentencepiece_pipeline,
    suffix_array,
)
from wordpiece import PREFIX, PairTable, WordPiece, bert_pipeline, best_naive


def toy(scores: dict[str, float]) -> Unigram:
    """A Unigram model of a few pieces, without ▁ in front."""
    pieces = ["<unk>", *scores]
    return Unigram(
        {piece: i for i, piece in enumerate(pieces)},
        [0.0, *scores.values()],
        sentencepiece_pipeline(prefix=False),
        hidden=[0],
    )


def spellings(word: str, pieces) -> list[list[str]]:
    """Every way to write `word` with `pieces`."""
    if not word:
        return [[]]
    heads = (word[:n] for n in range(1, len(word) + 1))
    return [[h, *rest] for h in heads if h in pieces for rest in spellings(word[len(h) :], pieces)]


SCORES = {"a": -2.0, "b": -2.5, "ab": -3.0, "ba": -3.2, "aba": -5.5, "bb": -4.1, "abb": -6.0}


@pytest.mark.parametrize("word", ["a", "abab", "abbaab", "bbbbb", "abaabba"])
def test_lattice_against_all_spellings(word):
    model = toy(SCORES)
    every = {tuple(s): sum(SCORES[p] for p in s) for s in spellings(word, SCORES)}
    ranked = sorted(every.values(), reverse=True)
    path, score, _ = model.viterbi(word)
    assert math.isclose(score, ranked[0])
    assert every[tuple(word[a:b] for _, a, b in path)] == pytest.approx(ranked[0])
    z = math.log(sum(map(math.exp, ranked)))
    assert model.log_likelihood(word) == pytest.approx(z)
    entropy = -sum(math.exp(s - z) * (s - z) for s in ranked)
    assert model.entropy(word) == pytest.approx(entropy)
    best = model.n_best(word, 4)
    assert [s for _, s in best] == pytest.approx(ranked[:4])
    assert len({tuple(ids) for ids, _ in best}) == len(best)


def test_entropy_of_a_fair_coin():
    """ "ab" is [ab] or [a, b] with equal scores: log 2."""
    assert toy({"a": -1.0, "b": -1.0, "ab": -2.0}).entropy("ab") == pytest.approx(math.log(2))


def test_sampling_has_the_right_frequencies():
    """Each spelling's share of 4,000 draws is its probability, within four standard deviations."""
    model, word, n = toy(SCORES), "abba", 4000
    every = {tuple(s): math.exp(sum(SCORES[p] for p in s)) for s in spellings(word, SCORES)}
    total = sum(every.values())
    seen = Counter(tuple(model.pieces[i] for i in model.sample(word, 1.0, k)) for k in range(n))
    assert set(seen) <= set(every)
    for spelling, weight in every.items():
        p = weight / total
        assert abs(seen[spelling] - n * p) < 4 * math.sqrt(n * p * (1 - p)) + 1
    assert model.sample("abab", 50.0) == [i for i, _, _ in model.viterbi("abab")[0]]


def test_unknown_runs_and_bytes():
    model = toy(SCORES)
    assert model.encode("aXYb") == [1, 0, 2]
    pieces = ["<unk>", "a", *(f"<0x{b:02X}>" for b in range(256))]
    pipeline = sentencepiece_pipeline(prefix=False)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = Unigram(vocab, [0.0, -1.0] + [0.0] * 256, pipeline, 0, True, [0, *range(2, 258)])
    assert model.encode("aé") == [1, vocab["<0xC3>"], vocab["<0xA9>"]]
    assert model.decode(model.encode("aé€")) == "aé€"


def test_expected_counts_are_the_gradient_of_the_likelihood():
    """∂ log P / ∂ score(x) = E[count of x]: central differences, in float64."""
    words = {"abab": 3, "abba": 1, "bb": 2}
    pieces, lattices = list(SCORES), Lattices(words, list(SCORES))
    scores = np.array(list(SCORES.values()))
    counts, likelihood = lattices.expectation(scores)
    brute = sum(n * math.log(sum(math.exp(sum(SCORES[p] for p in s))
                for s in spellings(w, SCORES))) for w, n in words.items())  # fmt: skip
    assert likelihood == pytest.approx(brute)
    for k in range(len(pieces)):
        step = np.zeros(len(pieces))
        step[k] = 1e-5
        up, down = lattices.expectation(scores + step)[1], lattices.expectation(scores - step)[1]
        assert counts[k] == pytest.approx((up - down) / 2e-5, abs=1e-6)


def test_em_never_lowers_the_likelihood():
    rng = random.Random(0)
    for _ in range(20):
        words = {
            "".join(rng.choices("abc", k=rng.randint(1, 8))): rng.randint(1, 9) for _ in range(9)
        }
        pieces = sorted(
            {w[i:j] for w in words for i, j in itertools.combinations(range(len(w) + 1), 2)}
        )
        lattices = Lattices(words, pieces)
        scores, before = maximisation(np.ones(len(pieces))), -math.inf
        for _ in range(8):
            counts, likelihood = lattices.expectation(scores)
            assert likelihood >= before - 1e-9
            before, scores = likelihood, maximisation(counts)


def test_suffix_array_and_seeds_against_brute_force():
    rng = random.Random(1)
    for _ in range(50):
        words = {
            "".join(rng.choices("ab", k=rng.randint(1, 9))): rng.randint(1, 3) for _ in range(5)
        }
        text = "\0".join(words) + "\0"
        codes = np.array([ord(c) for c in text])
        order = suffix_array(codes, 16)
        assert [text[i : i + 16] for i in order] == sorted(
            text[i : i + 16] for i in range(len(text))
        )
        shared = common_prefixes(codes, order, 16)
        for k in range(1, len(order)):
            pair = zip(text[order[k - 1] :], text[order[k] :], strict=False)
            same = itertools.takewhile(lambda cs: cs[0] == cs[1] != "\0", pair)
            assert shared[k] == min(16, len(list(same)))
        counts = Counter()
        for word, n in words.items():
            for i, j in itertools.combinations(range(len(word) + 1), 2):
                counts[word[i:j]] += n
        seeds = seed_pieces(words, 1000)
        assert all(counts[piece] == n and len(piece) > 1 for piece, n in seeds.items())
        for piece, n in counts.items():  # a seed, or the beginning of a longer one as frequent
            longer = [p for p in counts if p.startswith(piece) and counts[p] == n]
            assert (
                n < 2
                or len(piece) < 2
                or any(p in seeds or len(p) > 16 for p in longer)
                or (sum(w.count(piece) for w in words) == 1)
            )


def test_unigram_training_round_trip(corpus, strings):
    seen = []
    model = Unigram.train(corpus, 900, watch=lambda n, nats: seen.append((n, nats)))
    assert len(model) == 900 and model.pieces[0] == "<unk>"
    for (size, before), (same, after) in itertools.pairwise(seen):
        assert size != same or after <= before + 1e-12
    total = sum(math.exp(s) for i, s in enumerate(model.scores) if i not in model.hidden)
    assert total == pytest.approx(1, abs=1e-5)
    for text in strings[:500]:
        if "▁" not in text:
            assert model.decode(model.encode(text)) == text
    with pytest.raises(ValueError, match="too small"):
        Unigram.train(corpus, 300)


def test_a_million_restarts_of_the_sum_take_no_longer(corpus):
    """REBASE restarts a sum every few thousand unknown characters: only what lies ahead moves."""
    model = toy({"a": -9_000.0, "aa": -18_000.1})
    single = Unigram(model.vocab, model.scores, model.pipeline, hidden=[0], single=True)
    moved = []
    single.round = lambda x: moved.append(x) or x
    single.viterbi("a" * 2000)
    assert len(moved) < 2000 * (2 + 4)


def test_long_texts_equal_one_big_lattice(corpus):
    """Looking up parts must give what Viterbi over the whole text gives, rounding and all."""
    model = Unigram.train(corpus, 700)
    text = model.normalize(corpus[:30_000])
    whole = [i for i, _, _ in model.spelled(text, model.viterbi(text)[0])]
    assert model.encode(corpus[:30_000]) == whole


def test_unigram_rounding_is_32_bit_and_starts_over():
    """Ties that 64 bits would break: equal sums in 32 bits keep the path that came first."""
    model = toy({"a": -0.1, "aa": -0.2})
    single = Unigram(model.vocab, model.scores, model.pipeline, hidden=[0], single=True)
    assert single.viterbi("a" * 10, -99_990.0)[1] > -100_001
    assert single.viterbi("aaa", -100_000.5)[1] > -1  # below REBASE: becomes zero
    assert model.viterbi("aaa", -100_000.5)[1] < -100_000


def test_wordpiece_prefers_the_pair_that_always_meets():
    """ab: 4 / (a 8 · b 6); zq: 2 / (z 2 · q 2), which is more. BPE takes ab, WordPiece zq."""
    text = "ab ab ab ab ac ac ad ad eb eb zq zq"
    wordpiece = WordPiece.train(text, 1000, special_tokens=["[UNK]"])
    first = min((i, p) for p, i in wordpiece.vocab.items() if len(p.removeprefix(PREFIX)) == 2)[1]
    bpe = BPE.train(text, 257, pattern=r"\p{L}+")
    assert first == "zq" and bpe.merges == [("a", "b")]


def test_wordpiece_table_equals_the_definition():
    rng = random.Random(2)
    for _ in range(200):
        words = {}
        for _ in range(6):
            word = "".join(chr(rng.randrange(3)) for _ in range(rng.randint(1, 8)))
            words[word] = rng.randint(1, 4)
        table, now, size, floor = PairTable(words, 60), dict(words), 3, rng.choice([1, 2])
        while size < 30:
            pair = best_naive(now, floor)
            assert table.best(floor) == pair
            if pair is None:
                break
            table.merge(pair, chr(size))
            merged = Counter()
            for word, n in now.items():
                merged[word.replace(pair, chr(size))] += n
            now, size = merged, size + 1


def test_wordpiece_longest_match_and_unknown():
    vocab = {p: i for i, p in enumerate(["[UNK]", "un", "una", "##aff", "##able", "##ff", "##a"])}
    tokenizer = WordPiece(vocab, bert_pipeline(False), longest=10)
    assert [tokenizer.pieces[i] for i in tokenizer.word_ids("unaffable")] == [
        "una",
        "##ff",
        "##able",
    ]
    assert tokenizer.word_ids("xyz") == [0] == tokenizer.word_ids("a" * 11)
    assert tokenizer.word_ids("unz") == [0]


def test_wordpiece_training(corpus):
    tokenizer = WordPiece.train(corpus, 1200)
    assert len(tokenizer) == 1200
    ids = tokenizer.encode("The librarian was waiting.", add_special_tokens=True)
    assert ids[0] == tokenizer.vocab["[CLS]"] and ids[-1] == tokenizer.vocab["[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The librarian was waiting."
    with pytest.raises(ValueError, match="too small"):
        WordPiece.train(corpus, 20)


def test_a_piece_whose_beginnings_are_no_pieces_is_found():
    model = toy({"a": -1.0, "b": -1.0, "c": -1.0, "abc": -1.5})
    assert [model.pieces[i] for i in model.encode("abcab")] == ["abc", "a", "b"]


def test_looked_up_parts_keep_the_rounding_of_the_whole_sum():
    """Sums near 10⁵ in 32 bits are 0.008 apart, more than these rivals; and they start over."""
    scores = {"▁": -150.0, "a": -200.1, "b": -199.7, "ab": -399.798, "ba": -399.803, "▁a": -350.098}
    pieces = ["<unk>", *scores]
    values = [0.0, *(struct.unpack("f", struct.pack("f", s))[0] for s in scores.values())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    rng = random.Random(3)
    text = " ".join("".join(rng.choices("ab", k=rng.randint(1, 6))) for _ in range(3000))
    found = []
    for single in (True, False):
        model = Unigram(vocab, values, sentencepiece_pipeline(), hidden=[0], single=single)
        whole = model.normalize(text)
        found.append([i for i, _, _ in model.spelled(whole, model.viterbi(whole)[0])])
        assert model.encode(text) == found[-1]
    assert found[0] != found[1]  # so the rounding did decide something
