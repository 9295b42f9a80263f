"""The cells by hand, their starting biases, and their exact Jacobians."""

import math

import pytest
import torch

import cells


def filled(cell: cells.Cell, value: float) -> cells.Cell:
    """The same with every weight `value` and every bias 0, in float64."""
    for name, parameter in cell.double().named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if "bias" in name else value)
    return cell


def test_lstm_by_hand():
    """One cell, all weights 1, no bias, x = 1, h = 0, c = 2.

    Every gate sees W x + U h = 1. i = f = o = σ(1) = 0.731059, g = tanh 1 = 0.761594.
    c' = 0.731059 · 2 + 0.731059 · 0.761594 = 1.462117 + 0.556770 = 2.018887
    h' = 0.731059 · tanh 2.018887 = 0.731059 · 0.965338 = 0.705719
    """
    cell = filled(cells.LSTM(1, 1), 1.0)
    h, c = torch.zeros(1, 1).double(), torch.full((1, 1), 2.0).double()
    h, c = cell.step(cell.inputs(torch.ones(1, 1).double()), (h, c))
    assert c.item() == pytest.approx(2.018887, abs=1e-6)
    assert h.item() == pytest.approx(0.705719, abs=1e-6)


def test_gru_by_hand():
    """One cell, all weights 1, x = 1, h = 1: r = z = σ(2) = 0.880797.

    n = tanh(1 + 0.880797 · 1) = tanh 1.880797 = 0.954558
    h' = 0.119203 · 0.954558 + 0.880797 · 1 = 0.994583
    """
    cell = filled(cells.GRU(1, 1), 1.0)
    one = torch.ones(1, 1).double()
    assert cell.step(cell.inputs(one), (one,))[0].item() == pytest.approx(0.994583, abs=1e-6)


def test_projected_lstm_hands_a_smaller_h_on():
    cell = cells.LSTM(4, 6, d_proj=3)
    h, c = cell.step(cell.inputs(torch.randn(2, 4)), cell.start(2))
    assert h.shape == (2, 3) and c.shape == (2, 6)


def test_peepholes_that_are_zero_are_none():
    torch.manual_seed(0)
    with_peepholes = cells.LSTM(4, 6, peephole=True)
    plain = cells.LSTM(4, 6)
    plain.load_state_dict(with_peepholes.state_dict(), strict=False)
    a, state = torch.randn(2, 24), (torch.randn(2, 6), torch.randn(2, 6))
    assert torch.equal(with_peepholes.step(a, state)[0], plain.step(a, state)[0])
    with torch.no_grad():
        with_peepholes.peep[2] = 1.0
    h, c = with_peepholes.step(a, state)
    assert torch.equal(c, plain.step(a, state)[1])  # o sees c', so c' cannot depend on it
    assert not torch.equal(h, plain.step(a, state)[0])


def test_layer_norm_forgets_the_scale_of_the_input():
    cell = cells.LSTM(4, 6, layer_norm=True).double()
    a, state = torch.randn(2, 24).double(), cell.start(2)
    h, shifted = cell.step(a, state)[0], cell.step(100 * a + 7, state)[0]
    assert (h - shifted).abs().max() < 1e-4


def test_forget_bias_is_the_forget_gates_alone():
    cell = cells.LSTM(4, 6)
    cells.set_forget_bias(cell, 1.0)
    assert cell.bias.tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 12


def test_chrono_bias_of_both_gates():
    """b_f = ln u with u in 1 … 99 and b_i = −b_f: f = u / (u + 1) forgets in u + 1 steps."""
    cell = cells.LSTM(4, 500)
    cells.set_chrono_bias(cell, 100)
    i, f, g, o = cell.bias.detach().view(4, -1)
    assert torch.equal(i, -f) and g.abs().max() == o.abs().max() == 0
    assert 0 <= f.min() and f.max() <= math.log(99) and f.exp().mean() == pytest.approx(50, rel=0.1)
    gru = cells.GRU(4, 500)
    cells.set_chrono_bias(gru, 100)
    r, z, n = gru.bias.detach().view(3, -1)
    assert z.exp().mean() == pytest.approx(50, rel=0.1)
    assert torch.cat([r, n]).abs().max() == 0


def test_chrono_bias_needs_gates_and_time():
    with pytest.raises(ValueError, match="chrono"):
        cells.set_chrono_bias(cells.RNN(4, 6), 100)
    with pytest.raises(ValueError, match="chrono"):
        cells.set_chrono_bias(cells.LSTM(4, 6), 2)


def test_recurrent_weights_begin_as_rotations():
    """Every gate's matrix keeps lengths: U Uᵀ = 1."""
    for gate in cells.GRU(4, 6).w_state.chunk(3):
        assert (gate @ gate.T - torch.eye(6)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", cells.CELLS)
def test_jacobians_against_differences(kind):
    """∂h_T/∂s_t column by column, from small changes of s_t."""
    torch.manual_seed(0)
    cell, x = cells.CELLS[kind](3, 4).double(), torch.randn(5, 3).double()
    found = cells.jacobians(cell, x)
    assert found.shape == (5,)
    for t in range(5):
        _, state = cells.unroll(cell, x[:t, None], cell.start(1)) if t else (None, cell.start(1))
        flat, step = torch.cat(state, dim=-1), 1e-6
        columns = []
        for i in range(flat.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[0, i] += sign * step
                parts = tuple(moved.split(4, dim=-1))
                ends.append(cells.unroll(cell, x[t:, None], parts)[1][0][0])
            columns.append((ends[0] - ends[1]) / (2 * step))
        norm = torch.linalg.matrix_norm(torch.stack(columns, dim=1), ord=2)
        assert found[t].item() == pytest.approx(norm.item(), rel=1e-6)


def test_jacobian_of_a_cell_that_only_forgets():
    """With f = ½ and o = 1 and nothing else, ∂h_T/∂c_t = ½^(T − t), near c = 0."""
    cell = cells.LSTM(1, 1).double()
    for parameter in cell.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        cell.bias[3] = 50.0
    norms = cells.jacobians(cell, torch.zeros(4, 1).double())
    assert norms.tolist() == pytest.approx([1 / 16, 1 / 8, 1 / 4, 1 / 2])
