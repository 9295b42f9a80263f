"""Needles: that a text holds what its questions ask for, and what the shipped model finds."""

import dataclasses

import pytest
import torch

import needle
from model import Deepseek
from needle import N_NEEDLE, N_SYMBOL, TRAINED, texts
from yarn import YarnScaling, yarn_frequencies


@pytest.mark.parametrize("length", [32, 33, 100, 2048])
def test_every_question_has_its_answer_in_the_text(length):
    tokens, order = texts(5, length, torch.Generator().manual_seed(0))
    assert tokens.shape == (5, length)
    for row, depths in zip(tokens.tolist(), order.tolist(), strict=True):
        hay, questions = row[: -2 * N_NEEDLE], row[-2 * N_NEEDLE :]
        keys, values = questions[::2], questions[1::2]
        assert len(set(keys)) == N_NEEDLE
        for key, value, depth in zip(keys, values, depths, strict=True):
            assert N_SYMBOL <= key < 2 * N_SYMBOL <= value < 3 * N_SYMBOL
            assert hay.count(key) == 1  # once, so that there is one answer
            place = hay.index(key)
            assert hay[place + 1] == value
            assert place // (len(hay) // N_NEEDLE) == depth
        assert sum(token >= N_SYMBOL for token in hay) == 2 * N_NEEDLE


def test_the_loss_asks_at_the_keys_alone():
    """A model that answers right at the keys and wrong elsewhere has no loss."""
    tokens, _ = texts(2, 40, torch.Generator().manual_seed(0))

    class Knowing:
        def features(self, rows):
            after = torch.zeros_like(rows)
            after[:, -2 * N_NEEDLE :: 2] = rows[:, -2 * N_NEEDLE + 1 :: 2]
            return after

        def head(self, x):
            return 50.0 * torch.nn.functional.one_hot(x, 3 * N_SYMBOL)

    assert needle.step_loss(Knowing(), tokens) < 1e-6
    assert needle.answers(Knowing(), tokens).shape == (2, N_NEEDLE, 3 * N_SYMBOL)


def test_stretching_sets_frequencies_and_scale_and_no_weight():
    model = Deepseek(needle.SIZES)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain = model.blocks[0].attention.scale
    scaling = YarnScaling(factor=16.0, original_seq_len=TRAINED)
    stretched = needle.stretched(model, 16 * TRAINED, yarn=True)
    assert torch.equal(stretched.rotary.frequencies, yarn_frequencies(16, 1e4, scaling))
    assert stretched.config.seq_len == 8192
    built = Deepseek(dataclasses.replace(needle.SIZES, seq_len=8192, rope_scaling=scaling))
    assert stretched.blocks[1].attention.scale == pytest.approx(built.blocks[1].attention.scale)
    again = needle.stretched(model, 8192, yarn=False)
    assert again.blocks[0].attention.scale == plain
    assert torch.equal(again.rotary.frequencies, yarn_frequencies(16, 1e4, None))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_training_takes_steps_and_gives_the_same_model_again(monkeypatch):
    monkeypatch.setattr(needle, "BATCH", 1024)
    first, second = (needle.train_needle(3, 0, torch.device("cpu")) for _ in range(2))
    other = needle.train_needle(3, 1, torch.device("cpu"))
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_shipped_model_loses_needles_far_beyond_its_training_and_yarn_brings_them_back():
    """Eight times the length of its training; the README has 8,192. A guess: 1 in 24."""
    model, long = needle.load(needle.SHIPPED), 4096
    found = {}
    for length, yarn in ((TRAINED, False), (long, False), (long, True)):
        shares = needle.found(needle.stretched(model, length, yarn), length, 6)
        found[length, yarn] = sum(shares) / N_NEEDLE
    assert found[TRAINED, False] > 0.2  # five times a guess
    assert found[long, False] < 0.7 * found[TRAINED, False]
    assert found[long, True] > 0.7 * found[TRAINED, False]
    assert found[long, True] > 1.5 * found[long, False]
