"""A sparse mixture of experts: many feed-forward layers, of which each token takes a few.

A router scores all experts for a token, the n_active best work on it, and their results are added,
weighted by a softmax over the chosen scores. Parameters grow with n_expert, work with n_active.

    the layer   Mixtral: Jiang et al. 2024, arXiv:2401.04088, §2.1
    balance     Switch: Fedus et al. 2021, arXiv:2101.03961, §2.2; by biases: Wang et al. 2024,
                arXiv:2408.15664, §3.1
    z-loss      Zoph et al. 2022, arXiv:2202.08906, §3.2
    dropless    MegaBlocks: Gale et al. 2022, arXiv:2211.15841, §3

Dimension key: N tokens, E n_expert, k n_active, D d_model, F d_ff, M pairs of a token and one of
its experts, at most N·k. Left out: experts on several devices, noise that is learned.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # pairs of token and expert that are not worth sorting
SOME = 64  # pairs whose matrices a compiled step may read one after the other


@dataclass
class Routing:
    """Where the tokens of one layer went."""

    logits: Tensor  # (N, E), the router's scores
    chosen: Tensor  # (N, k) int64, expert numbers; E where an expert had no room
    weights: Tensor  # (N, k), positive, of each token 1 together


class SoftmaxRouter(nn.Module):
    """The k experts with the highest scores, weighted by a softmax over these k scores.

    `bias` is added to the scores for the choice alone, not for the weights: see `move_biases`.
    jitter and capacity are of training: the router's input is multiplied by random numbers from
    1 − jitter to 1 + jitter (arXiv:2101.03961, Table 11), and an expert takes at most
    capacity · N·k / E tokens (§2.2, Eq. 3). 0 means without.
    """

    def __init__(self, d_model: int, n_expert: int, n_active: int):
        super().__init__()
        self.n_active, self.jitter, self.capacity = n_active, 0.0, 0.0
        self.gate = nn.Linear(d_model, n_expert, bias=False)
        self.register_buffer("bias", torch.zeros(n_expert))

    def forward(self, x: Tensor, counted: Tensor | None) -> Routing:
        """x: (N, D). counted: (N,) bool, False for padding; None is all of them."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        with torch.autocast(x.device.type, enabled=False):  # scores in 16 bits make training shaky
            logits = F.linear(wide(x), wide(self.gate.weight))  # (N, E)
        chosen = (logits + self.bias).topk(self.n_active, dim=-1).indices  # (N, k)
        weights = logits.gather(1, chosen).softmax(dim=-1)
        if self.training and self.capacity:
            chosen = within_capacity(chosen, counted, len(self.bias), self.capacity)
        return Routing(logits, chosen, weights)


def wide(x: Tensor) -> Tensor:
    """x in float32, if it is in 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def within_capacity(
    chosen: Tensor, counted: Tensor | None, n_expert: int, capacity: float
) -> Tensor:
    """chosen (N, k), with n_expert in the place of an expert that had no room left for the token.

    First choices come before second ones, and early tokens before late ones. Padding takes no room.
    """
    N, k = chosen.shape
    counted = chosen.new_ones(N) if counted is None else counted.long()
    room = math.ceil(capacity * k * int(counted.sum()) / n_expert)
    queue = chosen.t().flatten()  # (k·N,), all first choices first
    taken = F.one_hot(queue, n_expert) * counted.repeat(k)[:, None]  # (k·N, E)
    place = taken.cumsum(dim=0).gather(1, queue[:, None]).squeeze(1)  # 1 for the first in line
    late = (place > room) & counted.repeat(k).bool()
    return queue.masked_fill(late, n_expert).view(k, N).t()


class Experts(nn.Module):
    """E feed-forward layers w2·(silu(w1·x) ⊙ w3·x), SwiGLU as in llama, their matrices stacked."""

    def __init__(self, n_expert: int, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(n_expert, d_ff, d_model))
        self.w2 = nn.Parameter(torch.empty(n_expert, d_model, d_ff))
        self.w3 = nn.Parameter(torch.empty(n_expert, d_ff, d_model))
        self.dispatch: Callable = fastest

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x: (N, D) to Σ over the chosen experts e of weight_e · expert_e(x), (N, D)."""
        return self.dispatch(self, x, routing)


def loop(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One expert after the other, each on the tokens that chose it: the definition."""
    out = torch.zeros_like(x)
    for e, (w1, w2, w3) in enumerate(zip(experts.w1, experts.w2, experts.w3, strict=True)):
        token, place = (routing.chosen == e).nonzero(as_tuple=True)
        hidden = F.silu(F.linear(x[token], w1)) * F.linear(x[token], w3)  # (tokens of e, F)
        result = F.linear(hidden, w2) * routing.weights[token, place, None]
        out = out.index_add(0, token, result.to(out.dtype))
    return out


def dense(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Every expert on every token, most of it times 0: E/k times the work, to check the others."""
    weights = x.new_zeros(len(x), len(experts.w1) + 1)  # the last column is for no expert
    weights = weights.scatter(1, routing.chosen, routing.weights.to(x.dtype))[:, :-1]  # (N, E)
    gate, up = (torch.einsum("nd,efd->nef", x, w) for w in (experts.w1, experts.w3))
    return torch.einsum("nef,edf,ne->nd", F.silu(gate) * up, experts.w2, weights).to(x.dtype)


class SegmentProduct(torch.autograd.Function):
    """Rows that lie in E segments, each segment times a matrix of its own.

    rows: (M, columns), w: (E, rows of w, columns), sizes: how many rows each segment has. It is
    `F.linear` of every segment, joined; written out so that no part is copied to be joined.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(rows, w)
        ctx.sizes, out = sizes, rows.new_empty(len(rows), w.shape[1])
        for x, y, matrix in zip(rows.split(sizes), out.split(sizes), w, strict=True):
            if len(x):
                torch.mm(x, matrix.t(), out=y)
        return out

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        rows, w = ctx.saved_tensors
        d_rows, d_w = torch.empty_like(rows), torch.zeros_like(w)
        parts = (rows.split(ctx.sizes), slope.split(ctx.sizes), d_rows.split(ctx.sizes), w, d_w)
        for x, dy, dx, matrix, d_matrix in zip(*parts, strict=True):
            if len(x):
                torch.mm(dy, matrix, out=dx)
                torch.mm(dy.t(), x, out=d_matrix)
        return d_rows, d_w, None


@torch.compiler.disable  # sizes differ at every step, and a new kernel for each would take ages
def grouped(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """Sort the pairs of token and expert by expert; then each expert has one segment of rows."""
    E, k = len(experts.w1), routing.chosen.shape[1]
    expert, order = routing.chosen.flatten().sort(stable=True)  # (N·k,)
    sizes = expert.bincount(minlength=E).tolist()[:E]
    order = order[: sum(sizes)]  # (M,), without the pairs that found no room
    token = order // k
    dtype = experts.w1.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    w1, w2, w3 = (w.to(dtype) for w in (experts.w1, experts.w2, experts.w3))
    rows = x.index_select(0, token).to(dtype)  # (M, D)
    hidden = F.silu(SegmentProduct.apply(rows, w1, sizes)) * SegmentProduct.apply(rows, w3, sizes)
    out = SegmentProduct.apply(hidden, w2, sizes) * routing.weights.flatten()[order, None]
    return torch.zeros_like(x).index_add(0, token, out.to(x.dtype))


def pairwise(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """One pair of token and expert after the other, without sorting: for a token or two."""
    out = torch.zeros_like(x)
    for row, chosen in enumerate(routing.chosen.tolist()):
        for place, e in enumerate(chosen):
            if e < len(experts.w1):
                one = x[row]
                hidden = F.silu(experts.w1[e] @ one) * (experts.w3[e] @ one)  # (F,)
                out[row] += routing.weights[row, place] * (experts.w2[e] @ hidden)
    return out


def gathered(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The matrices of each pair's expert side by side: for few tokens, in a compiled step.

    Its shapes do not depend on where the tokens go, and the compiler reads the matrices where they
    lie; without it they are copied for every token. Needs room for all (dropless).
    """
    gate, up = ((w[routing.chosen] * x[:, None, None, :]).sum(-1) for w in (experts.w1, experts.w3))
    hidden = F.silu(gate) * up  # (N, k, F)
    out = (experts.w2[routing.chosen] * hidden[:, :, None, :]).sum(-1)  # (N, k, D)
    return (out * routing.weights.unsqueeze(-1).to(x.dtype)).sum(dim=1)


def fastest(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """The dispatcher that `main.py --bench` found quickest for so many pairs."""
    n_pair = routing.chosen.numel()
    if torch.is_grad_enabled() or n_pair > SOME:
        return grouped(experts, x, routing)
    if torch.compiler.is_compiling():
        return gathered(experts, x, routing)
    return (pairwise if n_pair <= FEW else grouped)(experts, x, routing)


class MixtureOfExperts(nn.Module):
    """Σ over the chosen experts of weight · expert(x)."""

    def __init__(self, router: nn.Module, experts: nn.Module):
        super().__init__()
        self.router, self.experts = router, experts
        self.record: list[Routing] | None = None  # see `recording`
        self.counted: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (N, D)
        routing = self.router(flat, self.counted)
        if self.record is not None:
            self.record.append(routing)
        return self.experts(flat, routing).view_as(x)


@contextlib.contextmanager
def recording(model: nn.Module, counted: Tensor | None = None) -> Iterator[list[Routing]]:
    """Within it, each layer's routing is appended to the list, from the first layer to the last.

    counted: bool, as many as there are tokens, False for padding, which takes no room.
    """
    record: list[Routing] = []
    layers = [m for m in model.modules() if isinstance(m, MixtureOfExperts)]
    for layer in layers:
        layer.record, layer.counted = record, None if counted is None else counted.flatten()
    try:
        yield record
    finally:
        for layer in layers:
            layer.record = layer.counted = None


# ── Balance ───────────────────────────────────────────────────────────────────────────────────────


def loads(routing: Routing, counted: Tensor) -> Tensor:
    """How many of the counted tokens (N,) each expert got: (E,)."""
    n_expert, k = routing.logits.shape[1], routing.chosen.shape[1]
    weight = counted.to(routing.logits.dtype).repeat_interleave(k)
    return weight.new_zeros(n_expert + 1).index_add(0, routing.chosen.flatten(), weight)[:-1]


def balance_loss_sum(routing: Routing, counted: Tensor, load: Tensor) -> Tensor:
    """Σ over counted tokens of E · Σ_e f_e·p_e: per token, E · Σ_e f_e·P_e (2101.03961, Eq. 4).

    p_e is the token's softmax over all E scores and P_e its mean; f_e = load_e / Σ load is the
    share of work that expert e got of the whole batch. f is a constant to the gradient, so this is
    a sum over tokens: micro-batches and ranks may each work out their part of it. Even work gives 1
    a token; all work to experts that are sure of it gives E / k.
    """
    p = routing.logits.softmax(dim=-1) * counted.unsqueeze(-1)
    return len(load) * (p.sum(dim=0) * (load / load.sum())).sum()


def z_loss_sum(routing: Routing, counted: Tensor) -> Tensor:
    """Σ over counted tokens of log² Σ_e exp(logit_e): keeps scores small (2202.08906, Eq. 5)."""
    return (routing.logits.logsumexp(dim=-1).square() * counted).sum()


@torch.no_grad()
def move_biases(router: SoftmaxRouter, load: Tensor, speed: float) -> None:
    """A step up for experts with less than the mean load, down for those with more.

    (Wang et al. 2024, arXiv:2408.15664, Algorithm 1.) load: (E,), of the whole batch.
    """
    router.bias += speed * (load.mean() - load).sign()
