"""several.py: switching, adding up, and one adapter a row."""

import copy
import itertools

import pytest
import torch
from helpers import adapted, config, same

import lora
import several


@pytest.fixture
def two(base):
    """A model with adapters a and b of different rank, scale and layers."""
    model = adapted(copy.deepcopy(base), "a", rank=2, alpha=6.0)
    return adapted(model, "b", rank=3, alpha=30.0, targets=r"\.(wv|w2)$")


def merged_weights(model, shares) -> list:
    several.activate(model, shares)
    lora.merge(model)
    found = [layer.base.weight.detach().clone() for layer in lora.layers(model)]
    lora.unmerge(model)
    return found


def test_switching(two, base, tokens):
    several.activate(two, {})
    assert torch.equal(two(tokens), base(tokens))
    outs = []
    for shares in ({"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": 0.3}, {"a": 1.0}):
        several.activate(two, shares)
        outs.append(two(tokens))
    assert torch.equal(outs[0], outs[3])
    assert all((x - y).abs().max() > 1e-3 for x, y in itertools.pairwise(outs))


def test_a_weighted_sum_is_the_sum_of_the_changes(two):
    plain, a, b = (merged_weights(two, shares) for shares in ({}, {"a": 1.0}, {"b": 1.0}))
    both = merged_weights(two, {"a": 0.7, "b": -0.3})
    for w, one, other, mixed in zip(plain, a, b, both, strict=True):
        assert torch.allclose(mixed, w + 0.7 * (one - w) - 0.3 * (other - w), atol=1e-12)


def test_several_adapters_in_one_batch(two):
    """Each row with its own adapter is the same as each row alone with that adapter."""
    names, rows = ["b", None, "a", "b", "a"], torch.randint(97, (5, 11))
    with several.one_adapter_a_row(two, names):
        together = two(rows)
    for i, name in enumerate(names):
        several.activate(two, {name: 1.0} if name else {})
        assert (two(rows[i : i + 1])[0] - together[i]).abs().max() < 1e-12
    with several.one_adapter_a_row(two, ["a"]), pytest.raises(ValueError, match="1 names"):
        two(rows)


def test_only_the_newest_adapter_learns(two):
    learning = {n.split(".adapters.")[1][0] for n, p in two.named_parameters() if p.requires_grad}
    assert learning == {"b"}


def test_names_that_cannot_be(two):
    for name in ("a", "x.y", ""):
        with pytest.raises(ValueError, match="cannot be called"):
            lora.adapt(two, config(), name)
    with pytest.raises(ValueError, match="no adapter 'c'"):
        several.activate(two, {"c": 1.0})
    lora.merge(two)
    with pytest.raises(ValueError, match="unmerge first"):
        several.activate(two, {"a": 1.0})


def test_strip_leaves_the_base_or_the_merged_model(two, base, tokens):
    several.activate(two, {"a": 1.0})
    want, other = two(tokens), copy.deepcopy(two)
    lora.strip(other)
    assert same(other.state_dict(), base.state_dict())
    lora.merge(two)
    lora.strip(two)
    assert not lora.layers(two) and (two(tokens) - want).abs().max() < 1e-12
