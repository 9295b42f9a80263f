"""Backpropagation by hand against autograd over cells.py, and both against torch.nn."""

import pytest
import torch

import bptt
import cells

T, B, D, H = 7, 5, 4, 6
LENGTHS = torch.tensor([7, 6, 6, 3, 1])
KINDS = [("rnn", {}), ("lstm", {}), ("lstm", {"d_proj": 3}), ("gru", {})]


def random_cell(kind: str, d_in: int = D, **more) -> cells.Cell:
    cell = cells.CELLS[kind](d_in, H, **more).double()
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return cell


def everything(walk, cell, x, state, lengths) -> list[torch.Tensor]:
    """Outputs, last state, and the gradient of a random sum of them to all that goes in."""
    y, end = walk(cell, x, state, lengths)
    dice = torch.Generator().manual_seed(1)
    weighted = [(p * torch.randn(p.shape, generator=dice).double()).sum() for p in (y, *end)]
    leaves = [x, *state, *cell.parameters()]
    return [y, *end, *torch.autograd.grad(sum(weighted), leaves)]


def inputs(cell, n_row: int = B):
    x = torch.randn(T, n_row, cell.d_in).double().requires_grad_()
    state = tuple(torch.randn_like(part).requires_grad_() for part in cell.start(n_row))
    return x, state


def worst(ours, theirs) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize(("kind", "more"), KINDS, ids=str)
def test_by_hand_equals_autograd(kind, more, lengths):
    cell = random_cell(kind, **more)
    x, state = inputs(cell)
    ours = everything(bptt.run, cell, x, state, lengths)
    assert worst(ours, everything(cells.unroll, cell, x, state, lengths)) < 1e-12


@pytest.mark.parametrize(("kind", "more"), KINDS, ids=str)
def test_gradcheck(kind, more):
    """Against differences of the outputs, which no derivation can be wrong about alike."""
    cell = random_cell(kind, **more)
    x, state = inputs(cell)
    parameters = tuple(cell.parameters())

    def function(x, *rest):
        y, end = bptt.run(cell, x, rest[: len(state)], LENGTHS)
        return (y, *end)

    assert torch.autograd.gradcheck(function, (x, *state, *parameters), fast_mode=True)


@pytest.mark.parametrize("kind", cells.CELLS)
def test_gradient_is_left_out_where_nobody_needs_it(kind):
    """The data need no gradient: its product is not computed, and the others are the same."""
    cell = random_cell(kind)
    x, state = inputs(cell)
    y, _ = bptt.run(cell, x.detach(), state)
    y.sum().backward()
    expected = [p.grad.clone() for p in cell.parameters()]
    cell.zero_grad()
    bptt.run(cell, x, state)[0].sum().backward()
    assert worst([p.grad for p in cell.parameters()], expected) < 1e-13
    assert x.grad is not None


def test_backward_twice_gives_the_same():
    """Nothing that was saved is written over."""
    cell = random_cell("lstm")
    x, state = inputs(cell)
    y, _ = bptt.run(cell, x, state)
    grads = [torch.autograd.grad(y.sum(), [x, cell.w_state], retain_graph=True) for _ in range(2)]
    assert worst(*grads) == 0


def test_gradient_of_the_filling_is_ignored():
    """What somebody does with outputs behind the end of a row changes nothing."""
    cell = random_cell("gru")
    x, state = inputs(cell)
    y, _ = bptt.run(cell, x, state, LENGTHS)
    alive = torch.arange(T)[:, None] < LENGTHS
    assert y[~alive].abs().max() == 0
    grads = [
        torch.autograd.grad((y * weight).sum(), [x, cell.w_input], retain_graph=True)
        for weight in (alive[..., None], torch.ones(T, B, 1))
    ]
    assert worst(*grads) == 0 and grads[0][0][~alive].abs().max() == 0


@pytest.mark.parametrize("wrong", [[3, 7, 1], [7, 7, 0], [8, 2, 1]], ids=str)
def test_lengths_that_do_not_fall(wrong):
    cell = random_cell("rnn")
    x, state = inputs(cell, 3)
    with pytest.raises(ValueError, match="lengths must fall"):
        bptt.run(cell, x, state, torch.tensor(wrong))


@pytest.mark.parametrize("more", [{"peephole": True}, {"layer_norm": True}], ids=str)
def test_variants_walk_step_by_step(more):
    cell = random_cell("lstm", **more)
    x, state = inputs(cell)
    ours = everything(bptt.run, cell, x, state, LENGTHS)
    assert worst(ours, everything(cells.unroll, cell, x, state, LENGTHS)) == 0


def test_float32_is_close():
    """tanh x = 2σ(2x) − 1 costs no digit that counts."""
    cell = random_cell("lstm")
    x, state = inputs(cell)
    right, _ = cells.unroll(cell, x, state)
    found, _ = bptt.run(cell.float(), x.float(), tuple(part.float() for part in state))
    assert (found - right).abs().max() < 1e-6


def test_memory_of_many_steps_is_one_room_each():
    """T = 2,000 steps of one row: no recursion, no graph of T nodes."""
    cell = random_cell("lstm")
    x = torch.randn(2000, 1, D).double().requires_grad_()
    y, _ = bptt.run(cell, x, cell.start(1))
    assert type(y.grad_fn).__name__ == "LSTMFunctionBackward"
    y[-1].sum().backward()
    assert torch.isfinite(x.grad).all()
