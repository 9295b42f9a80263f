"""Guesses change the speed and never the text: exact in distribution, equal for temperature 0."""

import collections
import itertools

import pytest
import torch

from generate import Sampling, generate, probabilities
from model import DeepseekConfig
from mtp import DeepseekMTP
from speculative import Tally, distribution, draw, speculate, verdict

V = 3  # so few tokens that all texts can be counted
TINY = DeepseekConfig(
    vocab_size=V, seq_len=16, n_layer=1, n_head=2, d_model=16, q_rank=0, kv_rank=6, d_nope=4,
    d_rope=4, d_value=4, d_ff=8, n_dense=1, d_expert=6, n_expert=3, n_active=2, n_ahead=1,
    tie_embeddings=False,
)  # fmt: skip


def critical(freedom: int) -> float:
    """χ² that is exceeded once in 1,000 times (Wilson & Hilferty 1931)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.0902 * (2 / (9 * freedom)) ** 0.5) ** 3


def chi_square(counts: collections.Counter, expected: dict[tuple, float]) -> float:
    """Σ (seen − expected)² / expected over all texts."""
    n = sum(counts.values())
    assert counts.keys() <= expected.keys()
    return sum((counts[text] - n * p) ** 2 / (n * p) for text, p in expected.items())


@pytest.fixture(scope="module")
def tiny() -> DeepseekMTP:
    """A model with sure opinions, and a module with others."""
    torch.manual_seed(3)
    model = DeepseekMTP(TINY).eval()
    model.head.weight.data.mul_(1.5)
    return model


@torch.no_grad()
def exact(model: DeepseekMTP, prompt: list[int], n: int, sampling: Sampling) -> dict[tuple, float]:
    """The probability of every text of n tokens, token by token without cache or guesses."""
    found = {(): 1.0}
    for _ in range(n):
        longer = {}
        for text, p in found.items():
            logits = model(torch.tensor([prompt + list(text)]))[:, -1]
            for token, q in enumerate(probabilities(logits, sampling)[0].tolist()):
                longer[(*text, token)] = p * q
        found = longer
    return {text: p for text, p in found.items() if p > 0}


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=1.5, top_p=0.95)]
)
def test_texts_are_distributed_as_without_guesses(tiny, sampling):
    """χ² over all texts of three tokens; a rule that takes every guess fails the same test."""
    prompt, counts, tally = [1, 2], collections.Counter(), Tally()
    for seed in range(600):
        counts[tuple(speculate(tiny, prompt, 3, sampling, seed=seed, tally=tally))] += 1
    expected = exact(tiny, prompt, 3, sampling)
    assert sum(expected.values()) == pytest.approx(1.0)
    assert chi_square(counts, expected) < critical(len(expected) - 1)
    assert 0.05 < tally.rate < 0.95  # both ways were taken


def test_the_test_would_see_a_wrong_rule(tiny, monkeypatch):
    monkeypatch.setattr("speculative.verdict", lambda p, q, guess, dice: (True, guess))
    counts = collections.Counter()
    for seed in range(600):
        counts[tuple(speculate(tiny, [1, 2], 3, Sampling(temperature=1.0), seed=seed))] += 1
    expected = exact(tiny, [1, 2], 3, Sampling(temperature=1.0))
    assert chi_square(counts, expected) > 2 * critical(len(expected) - 1)


def test_verdict_by_hand():
    """p = (½, ½, 0), q = (1, 0, 0): the guess 0 stands half of the time, else token 1 comes."""
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    dice = torch.Generator().manual_seed(0)
    said = collections.Counter(verdict(p.double(), q.double(), 0, dice) for _ in range(4000))
    assert set(said) == {(True, 0), (False, 1)}
    assert abs(said[True, 0] - 2000) < 4 * 4000**0.5 / 2
    assert verdict(q.double(), q.double(), 0, dice) == (True, 0)


def test_a_draw_never_gives_what_cannot_be():
    dice = torch.Generator().manual_seed(0)
    p = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    assert {draw(p, dice) for _ in range(300)} == {1, 3}
    assert {draw(p[:4] * 1e-30, dice) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("n_prompt", [1, 2, 7])
def test_greedy_text_is_the_greedy_text(model, n_prompt):
    """Through the whole context; the last token has no room for a guess behind it."""
    prompt, greedy, tally = list(range(5, 5 + n_prompt)), Sampling(temperature=0), Tally()
    plain = [ids[0] for ids in generate(model, [prompt], 100, greedy)]
    assert list(speculate(model, prompt, 100, greedy, tally=tally)) == plain
    assert len(plain) == 40 - n_prompt and tally.guessed > 0


def test_a_module_that_is_always_right_halves_the_steps(tiny):
    """One token only can ever come, so every guess stands and a pass gives two tokens."""
    torch.manual_seed(0)
    model = DeepseekMTP(TINY).eval()
    model.head.weight.data.zero_()
    tally = Tally()
    assert list(speculate(model, [1], 9, Sampling(temperature=0), tally=tally)) == [0] * 9
    assert (tally.guessed, tally.accepted, tally.rate) == (4, 4, 1.0)


@pytest.mark.parametrize("n_new", range(1, 8))
def test_exactly_as_many_tokens_as_asked(tiny, n_new):
    texts = [list(speculate(tiny, [1], n_new, seed=seed)) for seed in range(4)]
    assert all(len(text) == n_new for text in texts)
    longer = [list(speculate(tiny, [1], 12, seed=seed))[:n_new] for seed in range(4)]
    assert texts == longer  # where it stops changes nothing before


def test_a_stop_ends_the_text_whether_it_was_guessed_or_drawn(tiny):
    for seed, stop in itertools.product(range(6), range(V)):
        whole = list(speculate(tiny, [1], 10, seed=seed))
        cut = list(speculate(tiny, [1], 10, seed=seed, stop_ids=(stop,)))
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)


def test_distribution_is_that_of_generate(tiny):
    logits = torch.randn(V)
    one = Sampling(temperature=0.5, top_p=0.9)
    assert torch.equal(distribution(logits, one), probabilities(logits[None], one)[0])
    certain = distribution(logits, Sampling(temperature=0))
    assert certain.argmax() == logits.argmax() and certain.sum() == 1


@pytest.mark.parametrize(
    ("prompt", "n_ahead", "message"),
    [([], 1, "prompt of 0 tokens"), ([1] * 16, 1, "context of 16"), ([1], 0, "no module")],
)
def test_what_cannot_be_written_is_refused(prompt, n_ahead, message):
    import dataclasses

    model = DeepseekMTP(dataclasses.replace(TINY, n_ahead=n_ahead))
    with pytest.raises(ValueError, match=message):
        list(speculate(model, prompt, 3))
