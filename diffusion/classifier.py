"""A small classifier of real pictures, which then reads the samples: are they what was asked for?

Three convolutions and a linear layer, trained in seconds on the training part of the same data with
each batch moved by up to a pixel at random. It never sees a sample. Its last features, 32 numbers a
picture, are also where the Fréchet distance is measured.

Key: N pictures, C channels, H and W height and width, K classes, D = 32 features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Split
from sources import to_unit

STEPS, BATCH, LR = 500, 128, 3e-3
WIDE = 32


class Classifier(nn.Module):
    """Pictures (N, C, H, W) from −1 to 1 to logits (N, K)."""

    def __init__(self, channels: int, n_class: int):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(n_in, WIDE, 3, padding=1) for n_in in (channels, WIDE, WIDE)
        )
        self.squeeze, self.head = nn.Linear(16 * WIDE, WIDE), nn.Linear(WIDE, n_class)

    def features(self, x: Tensor) -> Tensor:
        """(N, D): what the head sees."""
        for conv in self.convs:
            x = F.relu(conv(x))
            if min(x.shape[2:]) > 8:
                x = F.max_pool2d(x, 2)
        return F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 4).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def moved(x: Tensor, dice: torch.Generator) -> Tensor:
    """The pictures moved by up to a pixel in both directions, together; black comes in."""
    down, across = torch.randint(3, (2,), generator=dice).tolist()
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    return padded[:, :, down : down + height, across : across + width]


def fit(part: Split, n_class: int, seed: int = 0, device="cpu") -> Classifier:
    """A classifier trained on a part of the data, in evaluation mode."""
    dice = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():  # how the classifier begins is not to change the run
        torch.manual_seed(seed)
        model = Classifier(part.images.shape[1], n_class).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(part), (BATCH,), generator=dice)
        x, labels = to_unit(part.images[rows]).to(device), part.labels[rows].to(device)
        loss = F.cross_entropy(model(moved(x, dice)), labels, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.no_grad()
def read(model: Classifier, x: Tensor, batch: int = 512) -> tuple[Tensor, Tensor]:
    """(features (N, D), classes (N,)) of pictures (N, C, H, W) from −1 to 1, on the CPU."""
    device = model.head.weight.device
    features = [model.features(part.to(device)) for part in x.split(batch)]
    classes = [model.head(part).argmax(1) for part in features]
    return torch.cat(features).cpu(), torch.cat(classes).cpu()


def frechet(one: Tensor, other: Tensor) -> float:
    """Fréchet distance of the Gaussians with the mean and covariance of two sets (N, D), (M, D).

    ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁^½ Σ₂ Σ₁^½)^½): Eq. 6 of arXiv:1706.08500, which takes the
    features of another network, so values of other tables do not compare with these.
    """
    one, other = one.double(), other.double()
    first, second = torch.cov(one.T), torch.cov(other.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    apart = (one.mean(0) - other.mean(0)).square().sum()
    return (apart + first.trace() + second.trace() - 2 * cross).item()
