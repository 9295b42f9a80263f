"""Momentum, Nesterov's and orthogonalised (Muon), and how the learning rate goes up and down.

    momentum  Sutskever et al. 2013, "On the importance of initialization and momentum in deep
              learning", Eq. 1–2, and Nesterov's, Eq. 3–4
    Muon      K. Jordan et al. 2024, kellerjordan.github.io/posts/muon
    one cycle L. Smith & N. Topin 2017, arXiv:1708.07120, §3

Left out: Adam; a network of convolutions and batch normalisation does not need it.
"""

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Muon's post: steepest at 0, near 1 after five times
MUON_LR = 0.1  # of the learning rate of what is not orthogonalised


def orthogonalize(matrix: Tensor, steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """A matrix (rows, columns) with the same singular vectors and all singular values near 1.

    Newton–Schulz: X ← aX + (b·XXᵀ + c·(XXᵀ)²)X sends each singular value s ≤ 1 to as + bs³ + cs⁵
    and needs products alone. With these coefficients five steps leave values of 0.7 … 1.2 (all
    but the tiniest), which is near enough.

    dtype: of the products, by default the matrix's own. bfloat16 is precise enough, but 20 × slower
    than float32 on a processor that has no instructions for it.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype or matrix.dtype)
    tall = len(x) > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)


class Momentum(torch.optim.Optimizer):
    """Momentum, by default Nesterov's; in groups with `orthogonal` the direction is orthogonalised.

        m ← μ·m + g             d = g + μ·m             (plain momentum: d = m)
        w ← w − lr·(d + wd·w)                            orthogonal: d ← √max(1, rows/columns)·UVᵀ

    g has the decay wd·w in it, as in torch.optim.SGD, unless `orthogonal`: there it acts on w
    directly, as in torch.optim.Muon. A filter (out, in, k, k) counts as a matrix (out, in·k²).

    dtype: of the products that orthogonalise.
    """

    def __init__(
        self,
        params,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = True,
        dtype: torch.dtype | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov, "orthogonal": False})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)

    def update(self, weight: Tensor, group: dict) -> None:
        """Move one weight."""
        lr, mu, decay = group["lr"], group["momentum"], group["weight_decay"]
        gradient = weight.grad
        if decay and not group["orthogonal"]:
            gradient = gradient.add(weight, alpha=decay)
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(mu).add_(gradient)
        direction = gradient.add(buffer, alpha=mu) if group["nesterov"] else buffer
        if group["orthogonal"]:
            matrix = orthogonalize(direction.flatten(1), dtype=self.dtype)
            direction = matrix.view_as(direction) * max(1, len(matrix) / matrix.shape[1]) ** 0.5
            weight.mul_(1 - lr * decay)
        weight.add_(direction, alpha=-lr)


def groups(kinds: dict[str, list[nn.Parameter]], kind: str, weight_decay: float) -> list[dict]:
    """Parameter groups: filters and matrices decay, biases and normalisation do not.

    kinds: as `model.parameters_by_kind` gives them. With kind "muon" the filters are
    orthogonalised. Such a direction has one size whatever the gradient's, and wants a learning
    rate of its own: `scale` times that of the others.
    """
    muon = kind == "muon"
    scale = MUON_LR if muon else 1.0
    filters = {"orthogonal": muon, "scale": scale, "weight_decay": weight_decay / scale}
    others = {"orthogonal": False, "scale": 1.0}
    return [
        {"params": kinds["filters"], **filters},
        {"params": kinds["matrices"], **others, "weight_decay": weight_decay},
        {"params": kinds["norms and biases"], **others, "weight_decay": 0.0},
    ]


def scheduled(kind: str, step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a fraction of the highest.

    onecycle  linear up during the first `warmup` of the steps, then linear down to nearly zero
    step      divided by ten after half and after three quarters (arXiv:1512.03385 §4.2)
    constant  1
    """
    done = (step + 0.5) / steps
    if kind == "constant":
        return 1.0
    if kind == "step":
        return 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01
    falling = (1 - done) / (1 - warmup)
    return min(done / warmup, falling) if warmup else falling
