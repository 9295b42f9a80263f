"""Three recurrent cells, one time step at a time: the plain RNN, the LSTM and the GRU.

A recurrent network reads a sequence one element at a time and keeps what it needs of the past in a
state, a vector of fixed length. A cell is the rule for one step: from the new input and the old
state it makes the new state. The cells differ in one thing, how an old state gets through a step:

    RNN    h' = tanh(…)                 everything is written anew at every step (Elman 1990)
    LSTM   c' = f ∘ c + i ∘ g           kept, erased and written by gates (Hochreiter & Schmidhuber
                                        1997; the forget gate f is of Gers et al. 2000)
    GRU    h' = z ∘ h + (1 − z) ∘ n     one gate weighs old against new (Cho et al. 2014)

A gate is a vector of numbers between 0 and 1 that multiplies another vector (∘, number by number).

`unroll` walks a cell over a sequence and leaves the gradient to autograd. It is the definition, and
the oracle for bptt.py, which does the same faster. Left out: convolutional and attention cells.

Key: T time, B batch, D size of an input, H size of a cell (d_model), P size of h (H, or d_proj),
G gates (1 for the RNN, 4 for the LSTM, 3 for the GRU).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = tuple[Tensor, ...]  # (h,), or (h, c) for the LSTM: each (B, P or H)


class Cell(nn.Module):
    """What the cells share: the matrices for input and state, and one bias.

    torch.nn has two biases that are only ever added; one is enough, and a forget bias of 1 is 1.
    d_proj: the LSTM's h is projected to this size (Sak et al. 2014, arXiv:1402.1128, §2).
    """

    n_gate, n_part = 1, 1  # n_part: how many vectors are in the state

    def __init__(self, d_in: int, d_model: int, d_proj: int = 0):
        super().__init__()
        self.d_in, self.d_model, self.d_out = d_in, d_model, d_proj or d_model
        self.w_input = nn.Parameter(torch.empty(self.n_gate * d_model, d_in))  # (G·H, D)
        self.w_state = nn.Parameter(torch.empty(self.n_gate * d_model, self.d_out))  # (G·H, P)
        self.bias = nn.Parameter(torch.zeros(self.n_gate * d_model))  # (G·H,)
        self.reset()

    def reset(self) -> None:
        """New weights: uniform in ±1/√H for the input, a rotation for each gate of the state."""
        bound = 1 / math.sqrt(self.d_model)
        nn.init.uniform_(self.w_input, -bound, bound)
        for gate in self.w_state.chunk(self.n_gate):
            nn.init.orthogonal_(gate)

    def start(self, n_row: int) -> State:
        """The state before the first step, all zero."""
        sizes = (self.d_out, self.d_model)[: self.n_part]
        return tuple(self.bias.new_zeros(n_row, size) for size in sizes)

    def inputs(self, x: Tensor) -> Tensor:
        """W x + b for any number of steps at once: it does not wait for the state."""
        return F.linear(x, self.w_input, self.bias)  # (…, G·H)

    def step(self, a: Tensor, state: State) -> State:
        """The next state from a = inputs(x), (B, G·H), and the state before."""
        raise NotImplementedError


class RNN(Cell):
    """h' = tanh(W x + b + U h)."""

    def step(self, a: Tensor, state: State) -> State:
        return (torch.tanh(a + state[0] @ self.w_state.T),)


class LSTM(Cell):
    """Long short-term memory, with a forget gate.

        i, f, o = σ(…)     write, keep, show: gates
        g       = tanh(…)  what could be written
        c'      = f ∘ c + i ∘ g
        h'      = o ∘ tanh(c')       (with d_proj: W_p times that)

    where … is W x + b + U h, each gate with rows of its own, in torch's order i, f, g, o.

    peephole: i and f also see c and o sees c', each number its own cell (Gers & Schmidhuber 2000).
    layer_norm: W x + b, U h and the c' that is shown are normalised (Ba et al. 2016,
    arXiv:1607.06450, Eq. 20–22): the mean is subtracted, and the standard deviation divides.
    """

    n_gate, n_part = 4, 2

    def __init__(
        self,
        d_in: int,
        d_model: int,
        d_proj: int = 0,
        peephole: bool = False,
        layer_norm: bool = False,
    ):
        super().__init__(d_in, d_model, d_proj)
        self.w_proj = self.peep = self.norms = None
        if d_proj:
            bound = 1 / math.sqrt(d_model)
            self.w_proj = nn.Parameter(torch.empty(d_proj, d_model).uniform_(-bound, bound))
        if peephole:
            self.peep = nn.Parameter(torch.zeros(3, d_model))  # of i, f, o
        if layer_norm:
            sizes = (4 * d_model, 4 * d_model, d_model)
            self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)

    @property
    def plain(self) -> bool:
        """Is this the LSTM that bptt.py has the gradient of, without extras inside of a step?"""
        return self.peep is None and self.norms is None

    def gates(self, a: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(i, f, g, o, c'), each (B, H)."""
        h, c = state
        u = h @ self.w_state.T
        if self.norms is not None:
            a, u = self.norms[0](a), self.norms[1](u)
        i, f, g, o = (a + u).chunk(4, dim=-1)
        if self.peep is not None:
            i, f = i + self.peep[0] * c, f + self.peep[1] * c
        i, f, g = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g)
        c = f * c + i * g
        if self.peep is not None:
            o = o + self.peep[2] * c
        return i, f, g, torch.sigmoid(o), c

    def step(self, a: Tensor, state: State) -> State:
        _, _, _, o, c = self.gates(a, state)
        h = o * torch.tanh(c if self.norms is None else self.norms[2](c))
        return (h if self.w_proj is None else h @ self.w_proj.T), c


class GRU(Cell):
    """Gated recurrent unit, as torch.nn and cuDNN have it.

        r, z = σ(W x + b + U h)                  reset, update
        n    = tanh(W x + b + r ∘ (U h + b_n))   what could be written
        h'   = (1 − z) ∘ n + z ∘ h

    Cho et al. (arXiv:1406.1078, Eq. 5–8) multiply h by r before U. Here r multiplies U h, so that
    all of U h is one product, and n has a second bias inside of r's reach.
    """

    n_gate = 3

    def __init__(self, d_in: int, d_model: int):
        super().__init__(d_in, d_model)
        self.bias_n = nn.Parameter(torch.zeros(d_model))

    def step(self, a: Tensor, state: State) -> State:
        (h,) = state
        a_r, a_z, a_n = a.chunk(3, dim=-1)
        u_r, u_z, u_n = (h @ self.w_state.T).chunk(3, dim=-1)
        r, z = torch.sigmoid(a_r + u_r), torch.sigmoid(a_z + u_z)
        n = torch.tanh(a_n + r * (u_n + self.bias_n))
        return ((1 - z) * n + z * h,)


CELLS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}


def unroll(
    cell: Cell, x: Tensor, state: State, lengths: Tensor | None = None
) -> tuple[Tensor, State]:
    """Walk over x (T, B, D) step by step. Returns all h, (T, B, P), and the last state.

    lengths: (B,) how many steps each row has. After its end a row's outputs are zero and its state
    stays what it was at its last step.
    """
    outputs = []
    for t, a in enumerate(cell.inputs(x)):
        new = cell.step(a, state)
        h = new[0]
        if lengths is not None:
            alive = (t < lengths)[:, None]  # (B, 1)
            h = h * alive
            new = tuple(torch.where(alive, *pair) for pair in zip(new, state, strict=True))
        state = new
        outputs.append(h)
    return torch.stack(outputs), state


@torch.no_grad()
def set_forget_bias(cell: Cell, bias: float) -> None:
    """Let the LSTM's forget gates begin at σ(bias) (Jozefowicz et al. 2015, §2.1: 1 is good).

    With b = 0 half of c is lost at each step, e⁻⁷ after ten; with b = 1 it is e⁻³. Other cells have
    no such gate and stay as they are.
    """
    if isinstance(cell, LSTM):
        cell.bias.view(4, -1)[1] = bias


@torch.no_grad()
def set_chrono_bias(cell: Cell, longest: int) -> None:
    """Let cells begin with memories of 1 … `longest` steps (Tallec & Ollivier 2018, §2, §3).

    A gate f that keeps the share f of c at each step forgets within about 1/(1 − f) steps. So with
    u uniform in 1 … longest − 1 a bias of ln u gives a memory of about u steps (arXiv:1804.11188):

        b_f = ln u,  b_i = −b_f     for the LSTM
        b_z = ln u                  for the GRU, whose z keeps

    ValueError for the plain RNN, which has no gate, and for fewer than 3 steps.
    """
    if isinstance(cell, RNN) or longest < 3:
        raise ValueError("chrono initialisation needs a cell with gates and 3 steps or more")
    b = torch.empty(cell.d_model).uniform_(1, longest - 1).log()
    parts = cell.bias.view(cell.n_gate, -1)
    parts[1] = b.to(parts)
    if isinstance(cell, LSTM):
        parts[0] = -b.to(parts)


def jacobians(cell: Cell, x: Tensor) -> Tensor:
    """‖∂h_T/∂s_t‖ for t = 0 … T − 1, exactly: (T,), the largest singular value of each.

    x: (T, D), one sequence. s_t is the whole state before step t + 1: h, and the LSTM's c with it.
    One backward pass for each number of h_T gives all rows of all these Jacobians (the matrices of
    derivatives) at once.
    """
    state, states = tuple(part.requires_grad_() for part in cell.start(1)), []
    for a in cell.inputs(x):
        state = tuple(part.clone() for part in state)  # so that h_t is no function of this c_t
        states.append(state)
        state = cell.step(a[None], state)
    h = state[0][0]
    inner = [part for one in states for part in one]
    rows = torch.autograd.grad(h, inner, torch.eye(len(h)).to(h), is_grads_batched=True)
    size = cell.n_part
    whole = [torch.cat(rows[i : i + size], dim=-1)[:, 0] for i in range(0, len(rows), size)]
    return torch.linalg.matrix_norm(torch.stack(whole), ord=2)  # of (T, P, P + H)
