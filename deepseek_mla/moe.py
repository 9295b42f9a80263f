"""DeepSeekMoE: many small experts, some of which every token takes, balanced by a bias.

Mixtral takes two of eight experts. Here experts are smaller and more (V3: 8 of 256), so that a
token can combine what it needs more freely; `n_shared` more work on every token and hold what all
tokens need. Each expert's score is a sigmoid of its own. A bias is added to the scores for the
choice alone; after each step it rises for experts with too little work and falls for those with too
much, so no loss has to push the scores about.

    fine-grained and shared experts  DeepSeekMoE: Dai et al. 2024, arXiv:2401.06066, §3
    router, bias, sequence loss      DeepSeek-V3: arXiv:2412.19437, §2.1.2, Eq. 12 to 20
    groups of experts                DeepSeek-V2: arXiv:2405.04434, §2.2.2
    bias instead of a loss           Wang et al. 2024, arXiv:2408.15664, §3.1

Experts, their dispatch and the recording of routings are mixtral_moe's to the letter.

Dimension key: N tokens, B rows of T tokens, E n_expert, k n_active, g n_group, D d_model, F d_ff,
M pairs of a token and one of its experts, at most N·k. Left out: experts on several devices, so
also limits to how many devices a token visits (a group is a device there).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # pairs of token and expert that are not worth sorting


@dataclass
class Routing:
    """Where the tokens of one layer went."""

    logits: Tensor  # (N, E), the router's scores
    chosen: Tensor  # (N, k) int64, expert numbers; E where an expert had no room
    weights: Tensor  # (N, k), positive, see the router


class SigmoidRouter(nn.Module):
    """The k experts with the highest score + bias, from the best groups alone; Eq. 12 to 16.

        s = sigmoid(W·x)        chosen = top k of (s + bias)        weight_e = factor · s_e / Σ s

    The bias chooses and never weighs: weights are made of s alone. It is a buffer, no gradient
    reaches it; `move_biases` moves it. With n_group > 1 only the n_active_group groups with the
    largest sum of their two best s + bias may be chosen from. normalize: divide by Σ s over the
    chosen. softmax: s is a softmax over all experts (DeepSeek-V2) instead of sigmoids (V3).
    """

    def __init__(self, d_model: int, n_expert: int, n_active: int):
        super().__init__()
        self.n_active, self.n_group, self.n_active_group = n_active, 1, 1
        self.normalize, self.factor, self.softmax = True, 1.0, False
        self.gate = nn.Linear(d_model, n_expert, bias=False)
        self.register_buffer("bias", torch.zeros(n_expert))

    def forward(self, x: Tensor, counted: Tensor | None) -> Routing:
        """x: (N, D). counted is of no use here: nothing depends on other tokens."""
        with torch.autocast(x.device.type, enabled=False):  # scores in 16 bits make training shaky
            logits = F.linear(wide(x), wide(self.gate.weight))  # (N, E)
        scores = self.scores(logits)
        chosen = self.best_groups(scores.detach() + self.bias).topk(self.n_active, dim=-1).indices
        weights = scores.gather(1, chosen)  # (N, k)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(logits, chosen, weights * self.factor)

    def scores(self, logits: Tensor) -> Tensor:
        """s, (N, E), positive."""
        return logits.softmax(dim=-1) if self.softmax else logits.sigmoid()

    def best_groups(self, scores: Tensor) -> Tensor:
        """The scores (N, E), with −∞ for all experts outside of the n_active_group best groups."""
        if self.n_group == 1:
            return scores
        groups = scores.unflatten(1, (self.n_group, -1))  # (N, g, E/g)
        two = min(2, groups.shape[2])
        best = groups.topk(two, dim=-1).values.sum(dim=-1).topk(self.n_active_group).indices
        outside = torch.ones_like(groups[:, :, 0], dtype=torch.bool).scatter(1, best, False)
        return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(1)


def wide(x: Tensor) -> Tensor:
    """x in float32, if it is in 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


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


def fastest(experts: Experts, x: Tensor, routing: Routing) -> Tensor:
    """`pairwise` for what one text needs to write on, else `grouped`; see `main.py --bench`."""
    few = routing.chosen.numel() <= FEW and not torch.is_grad_enabled()
    return (pairwise if few else grouped)(experts, x, routing)


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


class SharedAndRouted(MixtureOfExperts):
    """shared(x) + Σ over the chosen experts of weight · expert(x) (arXiv:2412.19437, Eq. 12).

    The n_shared shared experts are one layer of n_shared times the width: the same thing.
    """

    def __init__(self, router: nn.Module, experts: nn.Module, shared: nn.Module):
        super().__init__(router, experts)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) + super().forward(x)


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


def sequence_balance_sum(routing: Routing, scores: Tensor, counted: Tensor) -> Tensor:
    """Σ over counted tokens of Σ_e f_e·P_e of the token's own row (arXiv:2412.19437, Eq. 17 to 20).

    f_e = E / (k·T) · how many tokens of the row chose e, P_e = the row's mean of s_e / Σ s. Even
    work gives 1 a token, all work to k experts that are sure of it E / k. Rows have nothing to do
    with one another, so any part of a batch may be summed alone. f is a constant to the gradient.

    scores: (N, E), s of the router. counted: (B, T) bool, False for padding.
    """
    (B, T), E = counted.shape, scores.shape[1]
    mask = counted.view(B, T, 1).to(scores.dtype)
    n_token = mask.sum(dim=1).clamp(min=1)  # (B, 1)
    chosen = torch.zeros_like(scores).scatter(1, routing.chosen, 1.0).view(B, T, E)
    f = (chosen * mask).sum(dim=1) * E / (routing.chosen.shape[1] * n_token)  # (B, E)
    share = (scores / scores.sum(dim=-1, keepdim=True)).view(B, T, E)
    P = (share * mask).sum(dim=1) / n_token  # (B, E)
    return ((f.detach() * P).sum(dim=-1) * mask.sum(dim=(1, 2))).sum()


def max_violation(load: Tensor) -> Tensor:
    """How far the busiest expert is above the mean load, as a share of it; 0 is perfect balance.

    (arXiv:2408.15664, Eq. 4, MaxVio.) load: (…, E). Returns (…).
    """
    mean = load.mean(dim=-1)
    return (load.max(dim=-1).values - mean) / mean.clamp(min=1e-9)


@torch.no_grad()
def move_biases(router: SigmoidRouter, load: Tensor, speed: float) -> None:
    """A step up for experts with less than the mean load, down for those with more.

    (Wang et al. 2024, arXiv:2408.15664, Algorithm 1.) load: (E,), of the whole batch.
    """
    router.bias += speed * (load.mean() - load).sign()
