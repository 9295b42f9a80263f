"""What a network looks at: Grad-CAM, and how far the eye of one pixel really reaches.

    Grad-CAM          Selvaraju et al. 2016, arXiv:1610.02391, Eq. 1–2
    receptive field   Luo et al. 2016, arXiv:1701.04128, §2: the gradient of one output pixel by
                      the input pixels

Key: N pictures, C channels, H and W height and width, h and w those of the features.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import evaluating


def last_features(model: nn.Module) -> nn.Module:
    """The last module whose output still has a height and a width: the one before the pooling."""
    names = [name for name, _ in model.named_children()]
    if "avgpool" not in names:
        raise ValueError("Grad-CAM needs a network that ends with a mean over all places")
    return model.get_submodule(names[names.index("avgpool") - 1])


@contextlib.contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that gets what `module` puts out."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def grad_cam(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Where each picture speaks for its label: (N, H, W), between 0 and 1.

        α_c = mean over places of ∂logit/∂A_c          map = relu(Σ_c α_c·A_c)

    A are the last features. x: (N, C, H, W) normalised; labels: (N,).
    """
    x = x.detach().requires_grad_()  # so that there is a gradient even if the weights want none
    with torch.enable_grad(), evaluating(model), watched(last_features(model)) as seen:
        chosen = model(x).gather(1, labels[:, None])  # one logit for each picture
        (slope,) = torch.autograd.grad(chosen.sum(), seen[0])
    features, slope = seen[0].detach(), slope.detach()  # (N, c, h, w)
    maps = F.relu((slope.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True))
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def receptive_field(model: nn.Module, module: nn.Module, x: Tensor) -> Tensor:
    """How much each input pixel moves the middle pixel of what `module` puts out: (H, W), sum 1.

    The mean over pictures and channels of |∂ Σ_c A_c(middle) / ∂x|. x: (N, C, H, W) normalised.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad(), evaluating(model), watched(module) as seen:
        model(x)
        h, w = seen[0].shape[2:]
        (slope,) = torch.autograd.grad(seen[0][:, :, h // 2, w // 2].sum(), x)
    field = slope.abs().mean((0, 1))
    return field / field.sum().clamp(min=1e-30)
