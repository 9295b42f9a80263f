"""What several tests need: models with no weight left as it begins, and sentences with padding."""

import torch
from torch import nn


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    """The model with a little noise on every parameter: biases and gains too."""
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    return model


def sentences(lengths: list[int], vocab_size: int = 37, end: int = 3) -> list[list[int]]:
    """Random sentences of these lengths, their end included."""
    return [[*torch.randint(4, vocab_size, (n - 1,)).tolist(), end] for n in lengths]
