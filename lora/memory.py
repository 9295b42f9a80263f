"""How many parameters learn, and how many bytes a training keeps for them.

That is weights, gradients and the optimizer's moments: `planned` says it beforehand, `measured`
counts the tensors that are there. Activations are apart: they depend on the batch, and an adapter
saves few of them.
"""

import torch
from torch import nn


def n_byte(tensors) -> int:
    """Bytes of tensors; one that is there twice counts once."""
    found = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t is not None}
    return sum(found.values())


def trainable(model: nn.Module) -> tuple[int, int]:
    """(how many parameters learn, how many there are); a tied matrix counts once."""
    parameters = list(model.parameters())
    packed = sum(module.n_weight for module in model.modules() if hasattr(module, "n_weight"))
    learn = sum(p.numel() for p in parameters if p.requires_grad)
    return learn, packed + sum(p.numel() for p in parameters)


def planned(model: nn.Module) -> dict[str, int]:
    """Bytes for AdamW: a gradient and two moments of each parameter that learns."""
    held = [*model.parameters(), *model.buffers()]
    learns = n_byte(p for p in model.parameters() if p.requires_grad)
    return {"weights": n_byte(held), "gradients": learns, "moments": 2 * learns}


def measured(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """The same, counted after a backward pass and a step. Counters of steps are left out."""
    held = [*model.parameters(), *model.buffers()]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    gradients = [p.grad for p in model.parameters()]
    return {
        "weights": n_byte(held),
        "gradients": n_byte(gradients),
        "moments": n_byte(moments),
    }


def in_words(sizes: dict[str, int]) -> str:
    """A line such as `weights 2.68 MB, gradients 0.02 MB, moments 0.04 MB`."""
    return ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
