"""Views of pictures: random ones to train on, a few fixed ones to average over in the end.

A shift and a mirror image are one gather: pixel (y, x) of the view is pixel (r(y − dy), ±r(x − dx))
of the picture, where r folds what falls off the edge back in (reflection without padding).

Key: N pictures, C channels, H and W height and width, K classes.
"""

import numpy as np
import torch
from torch import Tensor, nn

from data import Split
from model import evaluating

TEST_SHIFTS = ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))  # (down, right)
ASYMMETRY = 0.02  # of the brightness, see `mirror_matters`


def normalize(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Bytes to numbers of mean 0 and variance 1 over the training part, channels last in memory."""
    mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (mean, std))
    images = (images.float() / 255 - mean) / std
    return images.contiguous(memory_format=torch.channels_last)


def fold(index: Tensor, n: int) -> Tensor:
    """Indices that miss 0 … n − 1 by less than n, reflected at the outermost pixel."""
    return (n - 1) - ((n - 1) - index.abs()).abs()


def view(images: Tensor, dy: Tensor, dx: Tensor, mirror: Tensor) -> Tensor:
    """Picture i mirrored where mirror[i], then moved (dy, dx)[i] pixels down and right.

    images: (N, C, H, W); dy, dx, mirror: (N,).
    """
    n, c, h, w = images.shape
    rows = fold(torch.arange(h, device=images.device) - dy[:, None], h)  # (N, H)
    columns = fold(torch.arange(w, device=images.device) - dx[:, None], w)  # (N, W)
    columns = torch.where(mirror[:, None], w - 1 - columns, columns)
    index = rows[:, :, None] * w + columns[:, None, :]  # (N, H, W)
    index = index.view(n, 1, h * w).expand(n, c, h * w)
    return images.flatten(2).gather(2, index).view_as(images)


def augment(
    images: Tensor, shift: int, flip: bool, cutout: int, dice: np.random.Generator
) -> Tensor:
    """Each picture moved by at most `shift` pixels, half of them mirrored, with a grey square.

    The square of `cutout` × `cutout` (DeVries & Taylor 2017, arXiv:1708.04552) may stick out. Its
    grey is the mean of the batch. The dice are numpy's, so all devices see the same. (N, C, H, W)
    """
    n, _, h, w = images.shape

    def throw(low: int, high: int) -> Tensor:
        return torch.from_numpy(dice.integers(low, high, n)).to(images.device)

    dy, dx, mirror = throw(-shift, shift + 1), throw(-shift, shift + 1), throw(0, 2) == 1
    y, x = throw(0, h), throw(0, w)
    if shift or flip:
        images = view(images, dy, dx, mirror & flip)
    if cutout:
        rows = ((torch.arange(h, device=images.device) - y[:, None]).abs() * 2) < cutout
        columns = ((torch.arange(w, device=images.device) - x[:, None]).abs() * 2) < cutout
        hole = rows[:, None, :, None] & columns[:, None, None, :]
        grey = images.float().mean().to(images.dtype)
        images = torch.where(hole, grey, images)
    return images


def mirror_matters(split: Split) -> float:
    """How much of the brightness tells left from right: 0 where a mirror image is as likely.

        Σ_c n_c·‖E[a | class c]‖² / Σ_c n_c·E[‖a‖² | class c],    a = x − mirror image of x

    less what chance alone gives. About 0 for photographs and for shapes that turn freely, far more
    for letters and digits. A class that differs from another by its handedness alone, wherever and
    however it lies, has the mean 0 and goes unseen: say --flip off there.
    """
    images, labels = split.images, split.labels
    explained = total = 0.0
    for label in labels.unique():
        mine = images[labels == label].float()
        a = (mine - mine.flip(3)).flatten(1)
        mean, square, n = a.mean(0).square().sum(), a.square().sum(1).mean(), len(a)
        if n > 1:  # E‖mean of n‖² = ‖E a‖² + Var a / n
            explained += n * (mean - (square - mean) / (n - 1)).item()
            total += n * square.item()
    return max(0.0, explained / total) if total else 0.0


@torch.no_grad()
def predict(
    model: nn.Module, images: Tensor, mean: list, std: list, averaged: tuple = (), batch: int = 500
) -> Tensor:
    """Probabilities (N, K) on the CPU for pictures (N, C, H, W) of bytes.

    averaged: what to average over beside the picture itself, of "flip" and "shift".
    """
    like = first_number(model)
    shifts = TEST_SHIFTS if "shift" in averaged else TEST_SHIFTS[:1]
    mirrors = (False, True) if "flip" in averaged else (False,)
    answers = []
    with evaluating(model):
        for part in images.split(batch):
            part = part.to(like.device)
            same = torch.ones(len(part), dtype=torch.int64, device=like.device)
            total = 0
            for dy, dx in shifts:
                for mirror in mirrors:
                    seen = view(part, dy * same, dx * same, same == int(mirror))
                    logits = model(normalize(seen, mean, std).to(like.dtype))
                    total = total + logits.double().softmax(1).cpu()
            answers.append(total / (len(shifts) * len(mirrors)))
    return torch.cat(answers)


def first_number(model: nn.Module) -> Tensor:
    """A tensor on the model's device, in its number format; eight-bit models keep integers too."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            return tensor
    raise ValueError("the model holds no numbers")
