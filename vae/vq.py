"""A codebook in place of a normal distribution: the quantiser of VQ-VAE.

The encoder's vector at each place is replaced by the nearest of K learned vectors (codes), so a
picture becomes a short list of whole numbers. Choosing has no gradient. Two tricks (1711.00937):

    straight-through   the decoder's gradient at the code is handed to the encoder's vector as it is
    moving averages    each code follows the mean of the vectors that chose it (Appendix A.1), and
                       the commitment loss ‖e − code‖² keeps the vectors near their codes

With a uniform prior over codes q is certain of its choice, and KL = places · ln K, a constant:
log p(x) ≥ log p(x|codes) − places · ln K is an honest bound in nats.

Key: B pictures, P places, E numbers of a vector, K codes. Imports torch alone.
"""

import torch
from torch import Tensor, nn


class Codebook(nn.Module):
    """K codes of E numbers. In training mode it notes which vectors chose which code; `follow` then
    moves the codes, so a batch may be split into parts or over processes first.
    """

    codes: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, n_code: int, d_code: int, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("codes", torch.randn(n_code, d_code))
        self.register_buffer("count", torch.ones(n_code))  # moving averages, Appendix A.1
        self.register_buffer("total", self.codes.clone())
        self.noted: list[tuple[Tensor, Tensor, Tensor]] = []

    def nearest(self, vectors: Tensor) -> Tensor:
        """The number of the nearest code to each vector, Eq. (1): (…, E) to (…)."""
        flat, codes = vectors.detach().flatten(0, -2).float(), self.codes.float()
        with torch.autocast(vectors.device.type, enabled=False):  # three digits choose wrongly
            distance = codes.square().sum(1) - 2 * flat @ codes.T  # + |v|², the same for all codes
        return distance.argmin(1).view(vectors.shape[:-1])

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes with the gradient of `vectors`, commitment (B,), numbers) of vectors (B, P, E)."""
        numbers = self.nearest(vectors)
        chosen = self.codes[numbers]
        commitment = (vectors - chosen).square().flatten(1).sum(1)
        if self.training:
            self.note(vectors.detach().to(self.total.dtype), numbers)
        return vectors + (chosen - vectors).detach(), commitment, numbers

    def note(self, vectors: Tensor, numbers: Tensor) -> None:
        """Remember how many vectors chose each code, and their sum, until `follow`."""
        flat, where = vectors.flatten(0, -2), numbers.flatten()
        count = torch.zeros_like(self.count).index_add_(0, where, torch.ones_like(flat[:, 0]))
        total = torch.zeros_like(self.total).index_add_(0, where, flat)
        self.noted.append((count, total, flat[:1]))

    @torch.no_grad()
    def follow(self, everywhere=lambda tensor: tensor, first: bool = True) -> None:
        """Move the codes towards the vectors noted since the last call, Appendix A.1.

        everywhere: sums a tensor over all processes. first: is this the process with the first rows
        of the batch? A code that hardly anybody chooses any more is put where the first vector of
        the batch is, or it would never be chosen again.
        """
        if not self.noted:
            return
        count, total = (everywhere(sum(x)) for x in list(zip(*self.noted, strict=True))[:2])
        spare = everywhere(self.noted[0][2] * first)
        self.noted = []
        self.count.lerp_(count, 1 - self.decay)
        self.total.lerp_(total, 1 - self.decay)
        if self.count.min() < 0.01 * self.count.mean():
            unused = self.count.argmin()
            self.count[unused] = self.count.mean()
            self.total[unused] = spare[0] * self.count[unused]
        self.codes.copy_(self.total / self.count.clamp(min=1e-6)[:, None])


def perplexity(numbers: Tensor, n_code: int) -> float:
    """How many codes are in use, as if all were used alike: exp of the entropy of their shares."""
    share = torch.bincount(numbers.flatten(), minlength=n_code).double()
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())
