"""YaRN's frequencies and temperature, against transformers and by hand."""

import math

import pytest
import torch

from yarn import YarnScaling, mscale, yarn_frequencies


def test_without_scaling_they_are_those_of_llama():
    expected = [1.0, 10.0**-1, 10.0**-2, 10.0**-3]
    assert yarn_frequencies(8, 10_000.0, None).tolist() == pytest.approx(expected)


def test_fast_pairs_stay_and_slow_ones_are_stretched():
    """64 channels, θ = 10,000, context 4,096: pair i turns 4,096·θ^(−i/32)/2π times.

    Pair 0 turns 652 times and stays; pair 31 turns 0.09 times and slows down 40 times over.
    """
    plain, slow = (yarn_frequencies(64, 1e4, s) for s in (None, YarnScaling()))
    ratio = plain / slow
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(40)
    assert (ratio.diff() >= -1e-9).all() and 1 < ratio[16] < 40
    turns = 4096 * plain / (2 * math.pi)
    assert (ratio[turns > 40] == 1).all()
    assert ratio[turns < 0.9].tolist() == pytest.approx([40.0] * int((turns < 0.9).sum()))


@pytest.mark.parametrize(
    ("d_rope", "theta", "factor", "slow", "fast", "original"),
    [(64, 1e4, 40.0, 1.0, 32.0, 4096), (64, 5e4, 32.0, 1.0, 1.0, 4096),
     (16, 500.0, 3.0, 2.0, 9.0, 99)],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(d_rope, theta, factor, slow, fast, original):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "rope_theta": theta, "factor": factor, "beta_slow": slow,
            "beta_fast": fast, "original_max_position_embeddings": original,
            "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip
    config = transformers.DeepseekV3Config(
        qk_rope_head_dim=d_rope,
        rope_parameters=rope,
        max_position_embeddings=int(original * factor),
    )
    theirs, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    ours = yarn_frequencies(d_rope, theta, YarnScaling(factor, slow, fast, original))
    assert torch.allclose(ours.float(), theirs, rtol=2e-6, atol=0)
    assert attention_factor == 1.0  # they scale the scores too, and not cos and sin


def test_temperature_by_hand():
    """0.1 · ln 40 + 1 = 1.369; squared 1.874."""
    assert mscale(YarnScaling(factor=40.0)) == pytest.approx(1.36889, abs=1e-5)
    assert mscale(YarnScaling(factor=40.0, mscale=0.0)) == 1.0


@pytest.mark.parametrize(
    "wrong",
    [{"factor": 0.5}, {"factor": math.inf}, {"low_turns": 0}, {"low_turns": 40.0},
     {"original_seq_len": 0}, {"mscale": -1.0}, {"mscale": math.nan}],
    ids=str,
)  # fmt: skip
def test_scaling_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="rope scaling"):
        YarnScaling(**wrong)
