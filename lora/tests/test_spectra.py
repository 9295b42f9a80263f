"""spectra.py on matrices whose singular vectors are known by hand."""

import math

import pytest
import torch

import spectra


def diagonal(*sizes: float) -> torch.Tensor:
    return torch.diag(torch.tensor(sizes, dtype=torch.float64))


def test_a_matrix_is_like_itself():
    """Signs, scale and order of the directions make no difference."""
    w = torch.randn(6, 5, dtype=torch.float64)
    for other in (w, -w, 3.7 * w):
        assert spectra.likeness(w, other).tolist() == pytest.approx([1.0] * 5)
    assert spectra.n_intruder(w, w) == 0
    turned = diagonal(1.0, 9.0)
    assert spectra.likeness(diagonal(9.0, 1.0), turned).tolist() == [1.0, 1.0]


def test_a_planted_intruder_is_found():
    """W answers along e₁, e₂, e₃ with 5, 3, 2. A correction of size 10 along (e₁ + e₂ + e₃)/√3 has
    the cosine 1/√3 = 0.577 with each, so it is one for ε = 0.6 and none for 0.5."""
    before = diagonal(5.0, 3.0, 2.0, 0.0, 0.0)[:, :4]
    u = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64) / math.sqrt(3)
    v = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)  # an input that W does not look at
    after = before + 1000.0 * torch.outer(u, v)
    assert spectra.likeness(before, after)[0].item() == pytest.approx(1 / math.sqrt(3), abs=1e-3)
    assert spectra.n_intruder(before, after, strongest=1, unlike=0.6) == 1
    assert spectra.n_intruder(before, after, strongest=1, unlike=0.5) == 0


def test_only_the_strongest_are_looked_at():
    """A new direction of size 1 is the fourth of four; of size 10 it is the first."""
    before = torch.zeros(6, 4, dtype=torch.float64)
    before[:3, :3] = diagonal(5.0, 3.0, 2.0)
    before[3, 3] = 0.5  # so that u₄ is e₄, and e₅, e₆ are like none
    for size, place in ((1.5, 3), (10.0, 0)):
        after = before.clone()
        after[3, 3], after[4, 3] = 0.0, size
        found = spectra.likeness(before, after)
        assert found[place].item() == pytest.approx(0.0, abs=1e-12)
        assert found.sum().item() == pytest.approx(3.0)
        for k in range(5):
            assert spectra.n_intruder(before, after, strongest=k) == int(k > place)


@pytest.mark.parametrize(
    ("sizes", "part", "n"),
    [((3.0, 1.0, 0.0), 0.9, 1), ((3.0, 1.0, 0.0), 0.91, 2), ((1.0, 1.0, 1.0, 1.0), 0.9, 4),
     ((1.0, 1.0, 1.0, 1.0), 0.5, 2), ((7.0,), 1.0, 1)],
)  # fmt: skip
def test_how_many_directions_hold_a_part(sizes, part, n):
    """3² of 3² + 1² is 90 %."""
    assert spectra.n_direction(diagonal(*sizes), part) == n


def test_the_comparison_by_hand():
    """W has 4, 3 and small sizes. One twin gets 12 in a place of its own, the other is doubled.

    The changes are 12/5 and 1 of W's length; 90 % of them are in 1 and, as 4² < 0.9 · 5², in 2.
    """
    before = torch.zeros(40, 30, dtype=torch.float64)
    before[:30] = torch.diag(torch.tensor([4.0, 3.0, *(0.001 * i for i in range(28, 0, -1))]))
    after = before.clone()
    after[35, 29] = 12.0
    found = spectra.compare({"w": before, "v": before}, {"w": after, "v": 2 * before})
    assert found["looked_at"] == 20 and found["intruders"] == 1
    assert found["directions"] == 1.5
    assert found["size"] == pytest.approx((12 / 5 + 1) / 2, rel=1e-3)
    assert found["likeness"][0] == pytest.approx(0.5, abs=1e-3)  # one of two is new
    assert len(found["likeness"]) == 20
