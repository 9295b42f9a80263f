"""Eckart and Young's bound, and that LoRA reaches it."""

import pytest

import theory


@pytest.mark.parametrize("rank", range(1, 10))
def test_lora_reaches_the_least_error_within_a_percent(rank):
    """Singular values 8 … 1: rank 6 leaves 2² + 1² = 5, rank 8 and more nothing."""
    d = theory.difference()
    least, learned = theory.least_error(d, rank), theory.learned_error(d, rank)
    by_hand = sum(s * s for s in range(1, 9 - rank))
    assert least == pytest.approx(by_hand, abs=1e-10)
    assert by_hand * (1 - 1e-9) <= learned <= 1.01 * by_hand + 1e-6
