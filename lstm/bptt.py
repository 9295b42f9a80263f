"""Backpropagation through time by hand: the cells of cells.py, forward and backward, fast.

Autograd over an unrolled cell is right and slow. It remembers some ten small operations a step, and
makes the gradient of each weight matrix from T small products that it adds up. Two observations
(Werbos 1990; Appleyard et al. 2016, arXiv:1604.01946, §3) make three large products of them:

    forward    W x_t + b for all t at once, since no input waits for the state. A step is then one
               product U h and a few operations number by number.
    backward   Let a_t be what goes into the gates of step t, and δ_t = ∂L/∂a_t. Only δ has to be
               found step by step, from the last to the first. With all δ at hand
               ∂L/∂W = Σ δ_t x_tᵀ,  ∂L/∂U = Σ δ_t h_{t−1}ᵀ,  ∂L/∂x_t = Wᵀ δ_t
               are one matrix product each, with T·B rows.

All that δ_t is made of, but for the gradients that come from step t + 1, is known before the walk
back begins. So these factors, called k below, are computed for all steps at once, and the walk
multiplies them by what comes.

Rows of different length stand in the order of their lengths, the longest first. Then the rows that
are still alive at step t are the first counts[t] ones, and nothing is computed for the others.

Key: T time, B batch, D size of an input, H size of a cell, P size of h, as in cells.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import cells
from cells import GRU, LSTM, Cell, State


def run(cell: Cell, x: Tensor, state: State, lengths: Tensor | None = None) -> tuple[Tensor, State]:
    """`cells.unroll(cell, x, state, lengths)`, by the functions below where they have the cell.

    lengths, if given, must be sorted, the longest first, and at least 1.
    """
    if isinstance(cell, LSTM) and not cell.plain:
        return cells.unroll(cell, x, state, lengths)
    weights = [cell.w_input, cell.w_state, cell.bias]
    if isinstance(cell, LSTM):
        y, h, c = LSTMFunction.apply(x, *state, *weights, cell.w_proj, lengths)
        return y, (h, c)
    if isinstance(cell, GRU):
        y, h = GRUFunction.apply(x, *state, *weights, cell.bias_n, lengths)
    else:
        y, h = RNNFunction.apply(x, *state, *weights, lengths)
    return y, (h,)


# ── What the three share ──────────────────────────────────────────────────────────────────────────


def alive_counts(x: Tensor, lengths: Tensor | None) -> list[int]:
    """How many rows are alive at each step of x (T, B, D). ValueError if they are not sorted."""
    n_step, n_row = x.shape[:2]
    if lengths is None:
        return [n_row] * n_step
    if (lengths[1:] > lengths[:-1]).any() or not 1 <= lengths[-1] <= lengths[0] <= n_step:
        raise ValueError("lengths must fall from row to row, from at most T to at least 1")
    return (lengths.cpu() > torch.arange(n_step)[:, None]).sum(dim=1).tolist()


def alive_rows(x: Tensor, counts: list[int]) -> list[Tensor]:
    """The rows of x (T, B, …) that are alive at each step, as views: to write there writes to x."""
    return [
        one if count == len(one) else one[:count]
        for one, count in zip(x.unbind(0), counts, strict=True)
    ]


def dead(x: Tensor, lengths: Tensor) -> Tensor:
    """Which (step, row) lie beyond the end of their row: (T, B), True there."""
    return torch.arange(len(x), device=x.device)[:, None] >= lengths.to(x.device)


def states(start: Tensor, n_step: int, ragged: bool) -> Tensor:
    """Room for the states before, between and after the steps: (T + 1, B, ·), the first filled."""
    room = like(start, n_step + 1, ragged)
    room[0] = start
    return room


def like(x: Tensor, n_step: int, ragged: bool) -> Tensor:
    """Room for n_step times x. Where rows end early, it must be zero what they do not fill."""
    new = x.new_zeros if ragged else x.new_empty
    return new(n_step, *x.shape)


def tanh(x: Tensor, out: Tensor) -> Tensor:
    """tanh x = 2 σ(2x) − 1, written to `out`: on CPUs torch's σ is much faster than its tanh."""
    return torch.add(x, x, out=out).sigmoid_().mul_(2).sub_(1)


def last(room: Tensor, lengths: Tensor | None) -> Tensor:
    """The state of each row after its own last step, from `states`."""
    if lengths is None:
        return room[-1].clone()
    return room[lengths.to(room.device), torch.arange(room.shape[1], device=room.device)]


def arriving(grad_y: Tensor, grad_last: Tensor, lengths: Tensor | None) -> Tensor:
    """∂L/∂h at each step as far as it comes from outside: from y, and from the last state."""
    if lengths is None:
        arrived = grad_y.clone(memory_format=torch.contiguous_format)
        arrived[-1] += grad_last
        return arrived
    arrived = grad_y.masked_fill(dead(grad_y, lengths)[..., None], 0)
    rows = torch.arange(len(grad_last), device=grad_last.device)
    arrived[lengths.to(grad_last.device) - 1, rows] += grad_last
    return arrived


def affine(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """x Wᵀ + b for all steps in one product: (T, B, G·H)."""
    return torch.addmm(bias, x.flatten(0, 1), w.T).view(*x.shape[:2], -1)


def gate_views(a: Tensor, n_gate: int) -> tuple[Tensor, ...]:
    """The gates in (T, B, G·H) one by one, as views (T, B, H)."""
    return a.unflatten(-1, (n_gate, -1)).unbind(-2)


def weight_gradients(ctx, delta: Tensor, delta_u: Tensor, x: Tensor, h: Tensor, w: Tensor) -> tuple:
    """(∂L/∂x or None, ∂L/∂W, ∂L/∂U, ∂L/∂b), each one product over all steps.

    delta: ∂L/∂(W x + b), delta_u: ∂L/∂(U h), both (T, B, G·H); h: the states before each step.
    """
    flat, flat_u = delta.flatten(0, 1), delta_u.flatten(0, 1)  # (T·B, G·H)
    grad_x = (flat @ w).view_as(x) if ctx.needs_input_grad[0] else None
    # (xᵀ δ)ᵀ and not δᵀ x: a tenth faster, as MKL likes its long factor on the right
    grad_w, grad_u = (x.flatten(0, 1).T @ flat).T, (h.flatten(0, 1).T @ flat_u).T
    return grad_x, grad_w, grad_u, flat.sum(dim=0)


# ── The plain RNN ─────────────────────────────────────────────────────────────────────────────────


class RNNFunction(torch.autograd.Function):
    """h' = tanh(a), a = W x + b + U h. Backward: δ = ∂L/∂h' ∘ (1 − h'²), and Uᵀ δ goes on."""

    @staticmethod
    def forward(ctx, x, h0, w_input, w_state, bias, lengths):
        ctx.counts, ctx.lengths = alive_counts(x, lengths), lengths
        a, h = affine(x, w_input, bias), states(h0, len(x), lengths is not None)
        before, after = (alive_rows(one, ctx.counts) for one in (h[:-1], h[1:]))
        u = w_state.T
        for t, a_t in enumerate(alive_rows(a, ctx.counts)):
            tanh(a_t.addmm_(before[t], u), out=after[t])
        ctx.save_for_backward(x, h, w_input, w_state)
        return h[1:], last(h, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, h, w_input, w_state = ctx.saved_tensors
        dh = arriving(grad_y, grad_h, ctx.lengths)
        k = torch.addcmul(torch.ones_like(dh), h[1:], h[1:], value=-1)  # 1 − h²
        if ctx.lengths is not None:
            k.masked_fill_(dead(k, ctx.lengths)[..., None], 0)
        dh_rows, k_rows = alive_rows(dh, ctx.counts), alive_rows(k, ctx.counts)
        for t in range(len(x) - 1, -1, -1):
            delta = k_rows[t].mul_(dh_rows[t])
            if t:
                dh[t - 1, : len(delta)].addmm_(delta, w_state)
        gradients = weight_gradients(ctx, k, k, x, h[:-1], w_input)
        grad_h0 = k[0] @ w_state if ctx.needs_input_grad[1] else None
        return gradients[0], grad_h0, *gradients[1:], None


# ── LSTM ──────────────────────────────────────────────────────────────────────────────────────────


class LSTMFunction(torch.autograd.Function):
    """c' = f ∘ c + i ∘ g, m = o ∘ tanh(c'), h' = m or W_p m. See `cells.LSTM`.

    Backward, with dm = ∂L/∂m (W_pᵀ ∂L/∂h', or ∂L/∂h' itself) and dc = ∂L/∂c':

        dc  += dm ∘ o (1 − tanh²c')        c' acts through m, and through the steps after it
        δ_i = dc ∘ g i (1 − i)             since σ' = σ (1 − σ)
        δ_f = dc ∘ c f (1 − f)
        δ_g = dc ∘ i (1 − g²)              since tanh' = 1 − tanh²
        δ_o = dm ∘ tanh(c') o (1 − o)
        dc before the step = dc ∘ f,  and Uᵀ δ goes to the h before
    """

    @staticmethod
    def forward(ctx, x, h0, c0, w_input, w_state, bias, w_proj, lengths):
        ctx.counts, ctx.lengths = alive_counts(x, lengths), lengths
        a, (size, ragged) = affine(x, w_input, bias), (c0.shape[1], lengths is not None)
        h, c = states(h0, len(x), ragged), states(c0, len(x), ragged)
        tanh_c = like(c0, len(x), ragged)
        m = h[1:] if w_proj is None else like(c0, len(x), ragged)
        i, f, g, o = (alive_rows(one, ctx.counts) for one in gate_views(a, 4))
        i_and_f = alive_rows(a[..., : 2 * size], ctx.counts)  # they stand side by side
        h_before, h_after, c_before, c_after, tanhs, ms = (
            alive_rows(one, ctx.counts) for one in (h[:-1], h[1:], c[:-1], c[1:], tanh_c, m)
        )
        u = w_state.T
        for t, a_t in enumerate(alive_rows(a, ctx.counts)):
            a_t.addmm_(h_before[t], u)
            i_and_f[t].sigmoid_()
            tanh(g[t], out=g[t])
            o[t].sigmoid_()
            torch.mul(f[t], c_before[t], out=c_after[t]).addcmul_(i[t], g[t])
            tanh(c_after[t], out=tanhs[t])
            torch.mul(o[t], tanhs[t], out=ms[t])
            if w_proj is not None:
                torch.mm(ms[t], w_proj.T, out=h_after[t])
        weights = (w_input, w_state, w_proj)
        ctx.save_for_backward(x, a, h, c, tanh_c, *weights)
        return h[1:], last(h, lengths), last(c, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h, grad_c):
        x, a, h, c, tanh_c, w_input, w_state, w_proj = ctx.saved_tensors
        k, k_m = lstm_factors(a, c[:-1], tanh_c)
        if ctx.lengths is not None:
            k.masked_fill_(dead(k, ctx.lengths)[..., None], 0)
        dh, dc = arriving(grad_y, grad_h, ctx.lengths), grad_c.clone()
        f = alive_rows(gate_views(a, 4)[1], ctx.counts)
        k_rows, k_m_rows, dh_rows = (alive_rows(one, ctx.counts) for one in (k, k_m, dh))
        for t in range(len(x) - 1, -1, -1):
            dm, dc_t = dh_rows[t], dc[: len(dh_rows[t])]
            if w_proj is not None:
                dm = dm @ w_proj
            dc_t.addcmul_(dm, k_m_rows[t])
            delta = k_rows[t].view(len(dm), 4, -1)
            delta[:, :3].mul_(dc_t[:, None])
            delta[:, 3].mul_(dm)
            dc_t.mul_(f[t])
            if t:
                dh[t - 1, : len(dm)].addmm_(k_rows[t], w_state)
        gradients = weight_gradients(ctx, k, k, x, h[:-1], w_input)
        grad_proj = None
        if w_proj is not None:
            m = gate_views(a, 4)[3] * tanh_c  # zero where a row is dead, as tanh_c is
            grad_proj = dh.flatten(0, 1).T @ m.flatten(0, 1)
        grad_h0 = k[0] @ w_state if ctx.needs_input_grad[1] else None
        return gradients[0], grad_h0, dc, *gradients[1:], grad_proj, None


def lstm_factors(a: Tensor, c: Tensor, tanh_c: Tensor) -> tuple[Tensor, Tensor]:
    """What δ of i, f, g, o is multiplied by, (T, B, 4H), and ∂m/∂c', (T, B, H), for all steps.

    a: the gates, (T, B, 4H); c: before each step; tanh_c: after it.
    """
    k = torch.addcmul(a, a, a, value=-1)  # σ (1 − σ); for g it is written anew
    i, _, g, o = gate_views(a, 4)
    k_i, k_f, k_g, k_o = gate_views(k, 4)
    k_i.mul_(g)
    k_f.mul_(c)
    torch.mul(g, g, out=k_g).neg_().add_(1).mul_(i)
    k_o.mul_(tanh_c)
    k_m = torch.mul(tanh_c, tanh_c).neg_().add_(1).mul_(o)
    return k, k_m


# ── GRU ───────────────────────────────────────────────────────────────────────────────────────────


class GRUFunction(torch.autograd.Function):
    """n = tanh(a_n + r ∘ v), v = U_n h + b_n, h' = (1 − z) ∘ n + z ∘ h. See `cells.GRU`.

    Backward, with dh = ∂L/∂h':

        δ_n = dh ∘ (1 − z) (1 − n²)         ∂L/∂a_n
        δ_v = δ_n ∘ r                       ∂L/∂(U_n h): the one place where δ for U differs
        δ_r = δ_n ∘ v r (1 − r)
        δ_z = dh ∘ (h − n) z (1 − z)
        to the h before goes dh ∘ z + Uᵀ (δ_r, δ_z, δ_v)
    """

    @staticmethod
    def forward(ctx, x, h0, w_input, w_state, bias, bias_n, lengths):
        ctx.counts, ctx.lengths = alive_counts(x, lengths), lengths
        a, (size, ragged) = affine(x, w_input, bias), (h0.shape[1], lengths is not None)
        h, v = states(h0, len(x), ragged), like(h0, len(x), ragged)
        _, z, n = (alive_rows(one, ctx.counts) for one in gate_views(a, 3))
        before, after, vs = (alive_rows(one, ctx.counts) for one in (h[:-1], h[1:], v))
        u_rz, u_n = w_state[: 2 * size].T, w_state[2 * size :].T
        for t, a_t in enumerate(alive_rows(a, ctx.counts)):
            rz = a_t[:, : 2 * size].addmm_(before[t], u_rz).sigmoid_()
            torch.addmm(bias_n, before[t], u_n, out=vs[t])
            tanh(n[t].addcmul_(rz[:, :size], vs[t]), out=n[t])
            torch.lerp(n[t], before[t], z[t], out=after[t])
        ctx.save_for_backward(x, a, h, v, w_input, w_state)
        return h[1:], last(h, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_h):
        x, a, h, v, w_input, w_state = ctx.saved_tensors
        z = gate_views(a, 3)[1]
        k, k_n = gru_factors(a, h[:-1], v)
        if ctx.lengths is not None:
            beyond = dead(k, ctx.lengths)[..., None]
            k.masked_fill_(beyond, 0)
            k_n.masked_fill_(beyond, 0)
        dh = arriving(grad_y, grad_h, ctx.lengths)
        dh_rows, k_rows, z_rows = (alive_rows(one, ctx.counts) for one in (dh, k, z))
        for t in range(len(x) - 1, -1, -1):
            dh_t = dh_rows[t]
            k_rows[t].view(len(dh_t), 3, -1).mul_(dh_t[:, None])
            if t:
                dh[t - 1, : len(dh_t)].addcmul_(dh_t, z_rows[t]).addmm_(k_rows[t], w_state)
        grad_h0 = None
        if ctx.needs_input_grad[1]:
            grad_h0 = torch.addmm(dh[0] * z[0], k[0], w_state)
        delta = k.clone()
        torch.mul(dh, k_n, out=gate_views(delta, 3)[2])
        grads = weight_gradients(ctx, delta, k, x, h[:-1], w_input)
        grad_bias_n = gate_views(k, 3)[2].sum(dim=(0, 1))
        return grads[0], grad_h0, *grads[1:], grad_bias_n, None


def gru_factors(a: Tensor, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What dh is multiplied by: for δ of r, z and v, (T, B, 3H), and for δ_n, (T, B, H)."""
    k = torch.addcmul(a, a, a, value=-1)  # σ (1 − σ); for v it is written anew
    r, z, n = gate_views(a, 3)
    k_r, k_z, k_v = gate_views(k, 3)
    k_n = torch.mul(n, n).neg_().add_(1).mul_(1 - z)
    k_r.mul_(v).mul_(k_n)
    k_z.mul_(h - n)
    torch.mul(k_n, r, out=k_v)
    return k, k_n
