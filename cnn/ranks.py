"""Batch normalisation whose batch is that of all ranks, so that two ranks train as one does.

torch.nn.SyncBatchNorm does the same on GPUs alone. Every rank adds up its own pictures, the sums
run over all of them, and so does what flows back.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hardware import sum_over_ranks


class SumOverRanks(torch.autograd.Function):
    """The sum over all ranks; what flows back is summed as well, since all of them used it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return sum_over_ranks(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient.clone())


class SyncedBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d over the batches of all ranks together (Ioffe & Szegedy 2015, Algorithm 1)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        n = sum_over_ranks(torch.tensor(x.numel() / x.shape[1], device=x.device))
        shape = (1, -1, 1, 1)
        mean = SumOverRanks.apply(wide.sum((0, 2, 3))) / n
        centred = wide - mean.view(shape)
        var = SumOverRanks.apply(centred.square().sum((0, 2, 3))) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)


def synced(model: nn.Module) -> nn.Module:
    """The model with every batch normalisation replaced by one over all ranks, if there are any."""
    if dist.is_initialized():
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if hasattr(child, "running_var"):
                    twin = SyncedBatchNorm(len(child.weight), child.eps, child.momentum)
                    twin.load_state_dict(child.state_dict())
                    setattr(parent, name, twin.to(child.weight.device))
    return model
