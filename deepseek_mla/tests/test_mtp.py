"""Modules that look ahead: what they are given, what they are to say, and that nothing leaks."""

import dataclasses

import pytest
import torch

from model import Deepseek
from mtp import DeepseekMTP
from text import IGNORE
from train import shifted


@pytest.fixture
def two(sizes) -> DeepseekMTP:
    """A model with two modules, in float64."""
    return DeepseekMTP(dataclasses.replace(sizes, n_ahead=2)).double().eval()


def test_module_is_given_the_token_after_and_the_next_module_the_one_after_that(two):
    """Changing token j changes what module k says of token i only if j ≤ i + k."""
    tokens = torch.randint(97, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 97
    with torch.no_grad():
        before, after = (two(t[:, :-1], following=t[:, 1:]) for t in (tokens, changed))
    first = [
        int(((a - b).abs().amax(dim=-1)[0] > 1e-9).nonzero()[0])
        for a, b in zip(before, after, strict=True)
    ]
    assert first == [6, 5, 4]


def test_a_module_by_its_equation(two):
    """h¹ = norm(block(W·[norm(embedding of the next token) ; norm(h⁰)])), Eq. 21."""
    tokens = torch.randint(97, (1, 7))
    module = two.ahead[0]
    with torch.no_grad():
        features = two.features(tokens[:, :-1])
        after = two.embedding(tokens[:, 1:])
        joined = module.join(
            torch.cat((module.embedding_norm(after), module.features_norm(features)), dim=-1)
        )
        expected = module.norm(module.block(joined, two.context_of(features, None)))
        found = two.look_ahead(features, tokens[:, 1:])[0]
    assert torch.equal(found, expected)


def test_targets_of_module_k_are_k_further_on():
    targets = torch.tensor([[1, 2, 3, IGNORE]])
    assert shifted(targets, 1).tolist() == [[2, 3, IGNORE, IGNORE]]
    assert shifted(targets, 3).tolist() == [[IGNORE] * 4]
    assert shifted(targets, 9).tolist() == [[IGNORE] * 4]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 9])
def test_with_a_cache_a_module_says_the_same(model, chunk):
    model.double()
    tokens = torch.randint(97, (1, 10))
    with torch.no_grad():
        features = model.features(tokens[:, :-1])
        whole = model.look_ahead(features, tokens[:, 1:])[0]
        cache, parts = model.new_ahead_cache(1, 9), []
        for start in range(0, 9, chunk):
            piece, after = (
                features[:, start : start + chunk],
                tokens[:, 1:][:, start : start + chunk],
            )
            parts += model.look_ahead(piece, after, cache)
    assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-10


def test_without_modules_it_is_the_model_itself(sizes):
    plain = dataclasses.replace(sizes, n_ahead=0)
    torch.manual_seed(0)
    first = Deepseek(plain).eval()
    second = DeepseekMTP(plain).eval()
    second.load_state_dict(first.state_dict())
    tokens = torch.randint(97, (2, 8))
    assert torch.equal(first(tokens), second(tokens))
    assert [x.shape for x in second(tokens, following=tokens)] == [(2, 8, 97)]


def test_every_weight_gets_a_gradient(two):
    tokens = torch.randint(97, (4, 12))
    logits = two(tokens[:, :-1], following=tokens[:, 1:])
    sum(x.logsumexp(dim=-1).sum() for x in logits).backward()
    assert [name for name, p in two.named_parameters() if p.grad is None] == []


def test_head_and_embedding_are_the_models_own(two):
    assert not any("embedding.weight" in n or "head" in n for n, _ in two.ahead.named_parameters())
