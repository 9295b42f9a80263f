"""Adapters of layers that are no plain linear layer: what differs is how A and B meet the input.

    layer                    matrix (O, I)                      A                   B
    Conv1D of GPT-2          the weight (I, O), transposed      (r, I)              (O, r)
    embedding (V, D)         the weight, transposed: O D, I V   (r, V), zeros       (D, r), noise
    convolution (O, C, k)    O rows of C·k numbers              (r, C, k)           (O, r, 1)

k stands for the sizes of a kernel, one, two or three of them. In each the correction of the matrix
is scale · B·A, so merging is the same for all (LoRA, arXiv:2106.09685, §4.1; the embedding and the
convolution are as in the authors' own code). Left out: grouped and transposed convolutions.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from lora import LoraLayer


class TransposedLayer(LoraLayer):
    """GPT-2's linear layer, whose weight is (I, O). PEFT calls that fan_in_fan_out."""

    def matrix(self) -> Tensor:
        return self.base.weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.T


class LoraEmbedding(TransposedLayer):
    """An embedding: A is a small table itself, a row of r numbers for each token."""

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        rows, columns = self.matrix().shape
        return self.new(rank, columns), nn.init.normal_(self.new(rows, rank))

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(F.embedding(x, a.T), b)


class LoraConv(LoraLayer):
    """A convolution: A makes r channels with the base's kernel size, B mixes them (1 × 1)."""

    def matrix(self) -> Tensor:
        return self.base.weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base.weight.shape)

    def start(self, rank: int) -> tuple[Tensor, Tensor]:
        rows, columns, *kernel = self.base.weight.shape
        a, b = self.new(rank, columns, *kernel), self.new(rows, rank, *[1] * len(kernel))
        nn.init.kaiming_uniform_(a, a=5**0.5)
        return a, b

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[a.dim()]
        return convolve(self.base._conv_forward(x, a, None), b)


def kind_of(module: nn.Module) -> type[LoraLayer] | None:
    """The class of this file that adapts `module`; None if there is none."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return LoraConv if not module.transposed and module.groups == 1 else None
    if isinstance(module, nn.Embedding):
        return LoraEmbedding
    return TransposedLayer if type(module).__name__ == "Conv1D" else None
