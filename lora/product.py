"""The output of a linear layer and of its adapter in one step, forward and backward.

`LoraLayer` of lora.py says what is computed, and autograd finds the gradients. `JoinedLayer` here
computes the same numbers in less time; `python main.py --bench` says how much less.

Dimension key: N tokens of a batch together, r rank, I numbers that go in, O that come out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora import Adapter, LoraLayer


class LowRankProduct(torch.autograd.Function):
    """W·x + bias + s·B·(A·x) of a frozen W, faster than by the rules of single operations.

    With g the gradient of the output, token by token:

        gradient of x = Wᵀ·g + s·Aᵀ·(Bᵀ·g),   of A = s·(Bᵀ·g)·xᵀ,   of B = s·g·(A·x)ᵀ

    W has none. Two things save time. What stands between A and B is kept as (r, N), since a product
    with r rows is up to five times as fast on a CPU as one with r columns. And no large tensor is
    made only to be added to another: for many tokens W + s·B·A is put together and multiplied once,
    for few the correction is added in place, see `many_tokens`.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # (N, I)
        low = a @ tokens.T  # (r, N)
        ctx.many = many_tokens(tokens, weight)
        if ctx.many:
            out = F.linear(tokens, torch.addmm(weight, b, a, alpha=scale), bias)  # (N, O)
        else:
            out = F.linear(tokens, weight, bias).addmm_(low.T, b.T, alpha=scale)
        ctx.save_for_backward(tokens, low, weight, a, b)
        ctx.shape, ctx.scale = x.shape, scale
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, low, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])  # (N, O)
        back = (b.T @ gradient.T).mul_(ctx.scale)  # (r, N)
        of_x = None
        if ctx.needs_input_grad[0] and ctx.many:
            of_x = (gradient @ torch.addmm(weight, b, a, alpha=ctx.scale)).view(ctx.shape)
        elif ctx.needs_input_grad[0]:
            of_x = (gradient @ weight).addmm_(back.T, a).view(ctx.shape)
        return of_x, None, None, back @ tokens, (low @ gradient).mul_(ctx.scale).T, None


def many_tokens(tokens: Tensor, weight: Tensor) -> bool:
    """Is it less work to add B·A to W (O, I) than B·(A·x) to the outputs of N tokens?

    Never in 16 bits: there W + B·A would be rounded to the digits of W, and a small correction,
    such as every one at the start of a training, would be lost.
    """
    wide = weight.dtype in (torch.float32, torch.float64)
    return wide and len(tokens) > max(weight.shape)


class JoinedLayer(LoraLayer):
    """A linear layer whose only adapter is computed by `LowRankProduct` where that can be."""

    def forward(self, x: Tensor) -> Tensor:
        busy = self.saved is not None or self.by_row is not None
        return super().forward(x) if busy or not self.can_join(x) else self.joined(x)

    def can_join(self, x: Tensor) -> bool:
        """Can `LowRankProduct` compute it all: one plain adapter, a frozen base, one format?"""
        if len(self.active) != 1 or type(self.base) is not nn.Linear:
            return False
        adapter = self.adapters[next(iter(self.active))]
        dropping = adapter.training and adapter.dropout.p > 0  # then A and W have different inputs
        if type(adapter) is not Adapter or dropping:
            return False
        formats = {x.dtype, self.base.weight.dtype, adapter.lora_a.dtype}
        frozen = not any(p.requires_grad for p in self.base.parameters())
        return frozen and (len(formats) == 1 or torch.is_autocast_enabled(x.device.type))

    def joined(self, x: Tensor) -> Tensor:
        """The output of the base and of its only adapter."""
        ((name, share),) = self.active.items()
        tensors = [x, self.base.weight, self.base.bias, *self.adapters[name].pair()]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if t is None else t.to(dtype) for t in tensors]
        return LowRankProduct.apply(*tensors, share * self.adapters[name].scale)
