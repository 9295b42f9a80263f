"""Sizes, parameter counts of the published models, and the first loss."""

import dataclasses
import math
import re

import pytest
import torch

from conftest import FOLDER
from model import PRESETS, Deepseek, DeepseekConfig
from mtp import DeepseekMTP
from train import loss_sum

PUBLISHED = {  # billions in all and working on a token, as their papers and pages say
    "v2-lite": (15.7, 2.4),
    "v3": (671, 37),
    "kimi-k2": (1000, 32),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_the_presets_on_the_meta_device(name):
    with torch.device("meta"):
        model = DeepseekMTP(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == PRESETS[name].n_parameter


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_models(name):
    """To 3 % in all; of those that work, papers leave out the embedding or round."""
    c, (total, active) = PRESETS[name], PUBLISHED[name]
    assert c.n_parameter / 1e9 == pytest.approx(total, rel=0.03)
    without_embedding = c.n_active_parameter - c.vocab_size * c.d_model
    assert without_embedding / 1e9 == pytest.approx(active, rel=0.03)


def test_counts_in_the_comments_are_right():
    source = (FOLDER / "model.py").read_text(encoding="utf-8")
    source = source[source.index("PRESETS = {") : source.index("class RMSNorm")]
    said = re.findall(r"# ([\d,]+) and ([\d,]+)", source)
    counts = [(f"{c.n_parameter:,}", f"{c.n_active_parameter:,}") for c in PRESETS.values()]
    assert said == counts


@pytest.mark.parametrize(
    "changes",
    [{}, {"q_rank": 0}, {"n_shared": 0}, {"n_dense": 0}, {"n_dense": 9}, {"n_ahead": 2},
     {"tie_embeddings": True}, {"d_nope": 0}],
    ids=str,
)  # fmt: skip
def test_counted_parameters_are_those_there_are(sizes, changes):
    config = dataclasses.replace(sizes, **changes)
    assert sum(p.numel() for p in DeepseekMTP(config).parameters()) == config.n_parameter


def test_active_parameters_are_those_of_the_chosen_experts(sizes):
    """Two layers and a module have experts; 5 of 8 sleep, each 3·11·28 numbers."""
    assert sizes.n_parameter - sizes.n_active_parameter == 3 * 5 * 3 * 11 * 28


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "equal groups"),
        ({"n_group": 2, "n_active_group": 3}, "are chosen from"),
        ({"n_active": 5}, "n_active 5 is more"),
        ({"d_rope": 3}, "odd"),
        ({"rope_theta": 0.0}, "no size"),
        ({"weight_factor": 0.0}, "no factor"),
        ({"weight_factor": math.inf}, "no factor"),
        ({"kv_rank": 0}, "kv_rank must be at least 1"),
        ({"q_rank": -1}, "q_rank must be at least 0"),
        ({"n_head": 2**31}, "below 2³¹"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_built_are_refused(sizes, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sizes, **changes)


def test_first_loss_is_that_of_a_blind_guess_and_a_half():
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=500, n_ahead=0)
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = torch.randint(500, (4, 65))
        logits = Deepseek(config)(tokens[:, :-1])
        losses.append(loss_sum(logits, tokens[:, 1:]).item() / 256)
    assert sum(losses) / 3 == pytest.approx(math.log(500) + 0.5, abs=0.12)


def test_tokens_beyond_the_context_are_refused(model):
    with pytest.raises(ValueError, match="more than the context of 40"):
        model(torch.zeros(1, 41, dtype=torch.int64))


def test_one_batch_is_learned_by_heart(sizes):
    model = DeepseekMTP(dataclasses.replace(sizes, n_expert=4, n_group=1, n_active_group=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.randint(97, (2, 16))
    for _ in range(60):
        logits = model(rows[:, :-1], following=rows[:, 1:])
        loss = loss_sum(logits[0], rows[:, 1:]) / 30 + loss_sum(logits[1][:, :-1], rows[:, 2:]) / 28
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_flops_count_the_weights_that_work():
    """Matrices that a token meets, 6 each; q_rank and experts by hand for a tiny model."""
    c = DeepseekConfig(
        vocab_size=50, seq_len=8, n_layer=1, n_head=2, d_model=10, q_rank=0, kv_rank=4, d_nope=3,
        d_rope=2, d_value=5, n_dense=0, d_expert=6, n_expert=4, n_active=2, n_shared=1, n_ahead=0,
    )  # fmt: skip
    attention = 10 * 10 + 10 * 6 + 4 * 16 + 10 * 10
    experts = 10 * 4 + (2 + 1) * 3 * 6 * 10
    expected = 6 * (attention + experts + 50 * 10) + 6 * 2 * (3 + 2 + 5) * 8
    assert Deepseek(c).flops_per_token(8) == expected
