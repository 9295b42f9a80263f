"""How the use of experts is counted: by hand, by chance, and never with padding."""

import math

import pytest
import torch

from moe import Routing
from usage import Usage, meetings, mutual_information, repeats, repeats_by_chance

YES = torch.ones(1, 4, dtype=torch.bool)


def routing(*chosen: tuple[int, ...], n_expert: int = 4) -> Routing:
    chosen = torch.tensor(chosen)
    return Routing(torch.zeros(len(chosen), n_expert), chosen, torch.ones(chosen.shape))


def numbers(chosen: list, labels: list, counted: torch.Tensor = YES) -> dict:
    usage = Usage(n_layer=1, n_expert=4, n_active=2, n_label=2)
    usage.add([routing(*chosen)], counted, torch.tensor([labels]))
    return usage.numbers()


def test_numbers_by_hand():
    """Four tokens, two choices each; expert 3 is dead, expert 0 does half of the work."""
    found = numbers([(0, 1), (0, 1), (0, 2), (2, 0)], [0, 0, 1, 1])
    assert found["load"] == [[0.5, 0.25, 0.25, 0.0]]
    assert (found["dead_experts"], found["busiest"]) == ([1], [2.0])
    assert found["router_entropy"] == [pytest.approx(math.log(4))]  # all scores are equal
    # neighbours: (0,1)(0,1) same; (0,1)(0,2) same first; (0,2)(2,0) share both
    assert found["same_first"] == [pytest.approx(2 / 3)] and found["same_any"] == [1.0]
    # {0,1} means dialect 0, {0,2} means dialect 1: all of ln 2
    assert found["information"] == [pytest.approx(math.log(2))]


def test_padding_is_not_counted():
    counted = torch.tensor([[True, True, False, False]])
    found = numbers([(0, 1), (2, 1), (3, 0), (3, 0)], [0, 1, 1, 1], counted)
    assert found["load"] == [[0.25, 0.5, 0.25, 0.0]]
    assert found["same_first"] == [0.0] and found["same_any"] == [1.0]  # one pair
    assert found["information"] == [pytest.approx(math.log(2))]


def test_neighbours_are_those_of_a_row():
    """The last token of a row and the first one of the next are none."""
    chosen = torch.tensor([[[0, 1], [2, 3]], [[2, 3], [0, 1]]])
    assert repeats(chosen, torch.ones(2, 1, dtype=torch.bool)).tolist() == [0, 0]


def test_repeats_by_chance_are_the_papers():
    """12.5 % and 46 % for two of eight (arXiv:2401.04088, Table 5)."""
    first, any_choice = repeats_by_chance(8, 2)
    assert first == 0.125 and any_choice == pytest.approx(1 - 6 / 8 * 5 / 7)
    chosen = torch.rand(200, 200, 8).topk(2).indices
    both = torch.ones(200, 199, dtype=torch.bool)
    assert (repeats(chosen, both) / both.sum()).tolist() == pytest.approx([0.125, 0.464], abs=0.01)


def test_order_of_the_choices_does_not_matter_to_who_met_whom():
    met = meetings(torch.tensor([[1, 0], [0, 1], [2, 0]]), torch.tensor([3, 3, 3]))
    assert met == {(0, 1, 3): 2, (0, 2, 3): 1}


@pytest.mark.parametrize(
    ("met", "expected"),
    [
        ({(0, 0): 5, (1, 1): 5}, math.log(2)),  # the expert tells the label
        ({(0, 0): 5, (0, 1): 5, (1, 0): 5, (1, 1): 5}, 0.0),  # it says nothing
        ({(0, 0): 5, (1, 0): 5}, 0.0),  # there is nothing to say
        ({(0, 0): 2, (0, 1): 1, (1, 1): 1},  # ½·ln(4/3) + ¼·ln(2/3) + ¼·ln 2
         0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)),
        ({(0, 1, 0): 3, (2, 3, 1): 3, (4, 5, 2): 3, (6, 7, 3): 3}, math.log(4)),
    ],
)  # fmt: skip
def test_information_by_hand(met, expected):
    assert mutual_information(met) == pytest.approx(expected, abs=1e-12)


def test_batches_add_up():
    together, apart = (Usage(1, 4, 2, 2) for _ in range(2))
    chosen, labels = torch.rand(6, 5, 4).topk(2).indices, torch.randint(3, (6, 5))
    counted = torch.rand(6, 5) < 0.7

    def add(usage, rows):
        flat = chosen[rows].flatten(0, 1)
        record = [Routing(torch.zeros(len(flat), 4), flat, torch.ones(flat.shape))]
        usage.add(record, counted[rows], labels[rows])

    add(together, slice(None))
    for i in range(6):
        add(apart, slice(i, i + 1))
    a, b = together.numbers(), apart.numbers()
    assert a.keys() == b.keys()
    for name in a:
        flat = [torch.tensor(x[name], dtype=torch.float64) for x in (a, b)]
        assert torch.allclose(*flat)


def test_choices_without_room_are_no_work():
    usage = Usage(1, 4, 2, 2)
    lost = routing((0, 4), (4, 4), (1, 0), (4, 1))
    usage.add([lost], YES, torch.tensor([[0, 0, 1, 1]]))
    assert usage.numbers()["load"] == [[0.5, 0.5, 0.0, 0.0]]
