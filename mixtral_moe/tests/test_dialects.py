"""The dialects know how probable a text is, so the floor under every loss is exact."""

import math
import random
from collections import Counter

import make_dialects as source
import numpy as np
import pytest

import data
from conftest import FOLDER
from experiments import dialect_table, latest_known
from run import read_json
from text import Tokens
from tokenizer import ByteTokenizer, SentencePieceTokenizer


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    """The texts in the file."""
    text = (FOLDER / "data" / "dialects.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n<|endoftext|>\n").split("\n<|endoftext|>\n")


def test_files_are_what_the_script_writes(monkeypatch, tmp_path):
    """Byte for byte."""
    monkeypatch.setattr(source, "HERE", tmp_path)
    source.main()
    for name in ("dialects.txt", "floor.json"):
        written = (FOLDER / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert (tmp_path / name).read_bytes() == written


def test_every_dialect_has_its_words_and_its_particles():
    words = [set(after) for after in source.AFTER]
    particles = [set(p) for p in source.PARTICLES]
    common = set.intersection(*words)
    assert len(common) == 80 and all(len(p) == 8 for p in particles)
    for i in range(4):
        assert len(words[i]) == 80 + 110 + 8 and particles[i] <= words[i]
        for j in range(i):
            assert words[i] & words[j] == common
    for after in source.AFTER:
        assert all(len(set(follows)) == 4 for follows in after.values())


def test_probability_of_a_text_by_hand():
    """ln of 1/4 (dialect), 1/8 (particle), 1/4 (length 4), two ½ and two ⅛ (words), 1/16 (end)."""
    after, words = source.AFTER[2], [source.PARTICLES[2][5]]
    for choice in (0, 0, 2, 3):
        words.append(after[words[-1]][choice])
    expected = 1 / 4 * 1 / 8 * 1 / 4 * (1 / 2) ** 2 * (1 / 8) ** 2 * 1 / 16
    assert source.log_prob(" ".join(words)) == pytest.approx(math.log(expected))
    other = " ".join(["Zzz", *words[1:]])
    for wrong in (other, " ".join(words[1:]), " ".join(words[:3]), " ".join(words) + " ", ""):
        assert source.log_prob(wrong) == -math.inf


def test_mean_cost_of_a_text_is_its_entropy():
    """ln 4 + 16 sentences of ln 8 + ln 4 + 4.5 · 1.75 ln 2 + h(1/16) nats, h of a coin."""
    dice = random.Random(0)
    costs = [-source.log_prob(source.tell(i % 4, dice)) for i in range(4000)]
    coin = -(math.log(1 / 16) / 16 + math.log(15 / 16) * 15 / 16)
    sentence = math.log(8) + math.log(4) + 4.5 * 1.75 * math.log(2) + coin
    mean, error = np.mean(costs), np.std(costs) / math.sqrt(len(costs))
    assert abs(mean - (math.log(4) + 16 * sentence)) < 4 * error


def test_all_texts_are_possible_and_the_floor_is_their_mean(corpus):
    assert all(source.log_prob(text) > -math.inf for text in corpus)
    for part, texts in (("valid", source.part(corpus, 0.9, 0.95)),
                        ("test", source.part(corpus, 0.95, 1))):  # fmt: skip
        nats = -sum(map(source.log_prob, texts))
        expected = nats / sum(map(len, texts))
        assert data.floor("dialects", part) == pytest.approx(expected, rel=1e-12)
        assert read_json(data.FLOOR)[part]["texts"] == len(texts)
    assert data.floor("other.txt", "test") is None
    counts = Counter(map(source.dialect_of, corpus))
    assert set(counts) == {0, 1, 2, 3} and min(counts.values()) == max(counts.values())


def test_texts_stand_in_chapters_of_one_dialect(corpus):
    dialects = list(map(source.dialect_of, corpus))
    for start in range(0, len(corpus), 40):
        chapters = [set(dialects[i : i + 10]) for i in range(start, start + 40, 10)]
        assert all(len(chapter) == 1 for chapter in chapters) and len(set.union(*chapters)) == 4


def test_parts_are_those_that_training_cuts(corpus):
    found = {}
    for text, _, part in data.measure("dialects").pieces():
        if text:
            found.setdefault(part, []).append(text)
    assert found["valid"] == source.part(corpus, 0.9, 0.95)
    assert found["test"] == source.part(corpus, 0.95, 1)


def tokens_of(texts: list[str], tokenizer) -> Tokens:
    ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    return Tokens(np.array(ids, dtype=np.uint16), sum(map(len, texts)), tokenizer)


def test_labels_are_the_dialect_of_each_token_of_a_text(corpus):
    tokenizer = ByteTokenizer()
    tokens = tokens_of([*corpus[:200:9], "What is this?"], tokenizer)
    labels = data.labels(tokens, tokenizer)
    for (begin, end), text in zip(
        zip(tokens.bounds, tokens.bounds[1:], strict=False), [*corpus[:200:9], ""], strict=False
    ):
        known = source.dialect_of(text)
        expected = data.UNKNOWN if known is None else known
        assert labels.ids[begin] == data.UNKNOWN  # nobody can know it before the first word
        assert set(labels.ids[begin + 1 : end].tolist()) == {expected}
    rows, theirs = (list(t.evaluation_rows(4, 24)) for t in (tokens, labels))
    assert [a.shape for a, _ in rows] == [a.shape for a, _ in theirs]


def test_told_router_hears_of_the_latest_word_that_tells(corpus):
    import torch

    tokenizer = SentencePieceTokenizer.train(corpus[:2000], 900)
    table = dialect_table(tokenizer, tokenizer.vocab_size)
    assert (table >= 0).sum() >= 4 * 110  # nearly all of 110 words and 8 particles of each dialect
    assert [len(words) for words in data.telling_words()] == [118] * 4
    for text in corpus[:200:7]:
        ids = torch.tensor([tokenizer.encode(text)])
        heard = latest_known(table[ids])[0].tolist()
        assert set(heard[1:]) == {source.dialect_of(text)}
    by_hand = latest_known(torch.tensor([[-1, 2, -1, -1, 0, -1], [1, -1, -1, 3, 2, -1]]))
    assert by_hand.tolist() == [[0, 2, 2, 2, 0, 0], [1, 1, 1, 3, 2, 2]]
