"""Networks around the idea of vae.py: encoders, decoders, and what a pixel is.

    VaeConfig   sizes, and what is assumed of a pixel
    Mlp, Conv   encoder and decoder, fully connected or convolutional, for pictures of any size
    Pixels      log p(x|z) of black and white, or of grey and coloured pixels
    VAE         normal latents, 1312.6114
    VQVAE       a codebook instead, 1711.00937

Key: B pictures, K samples for each, C channels, H and W height and width, D latents, P places of a
code. Imports torch, vae.py and vq.py alone.
Left out: residual blocks, attention, batch normalisation (it would tie pictures to their batch).
"""

import dataclasses
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import vae
from vq import Codebook

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU}
LARGEST = 100_000  # that any of the numbers below may be


def size(default, help: str, choices: tuple | None = None):
    """A field that `main.py` offers as a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class VaeConfig:
    """The network.

    Raises ValueError for sizes that make none.
    """

    latent: int = size(16, "latents; with --n-code the numbers of a code")
    net: str = size("mlp", "fully connected or convolutional", ("mlp", "conv"))
    width: int = size(128, "numbers of a hidden layer, or channels of the first one")
    depth: int = size(2, "hidden layers")
    patch: int = size(2, "conv: side of the squares of pixels that become one place")
    activation: str = size("silu", "what bends between layers", tuple(ACTIVATIONS))
    likelihood: str = size(
        "bernoulli",
        "of pixels: black and white, or grey and colour",
        ("bernoulli", "logistic", "gaussian"),
    )
    n_code: int = size(0, "codes of a codebook instead of normal latents; 0 is none")
    channels: int = 1  # of the pictures; these three come from the data
    image_height: int = 8
    image_width: int = 8

    def __post_init__(self):
        for name, value in vars(self).items():
            if type(value) is int and value < (0 if name == "n_code" else 1):
                raise ValueError(f"{name} must be at least {0 if name == 'n_code' else 1}")
            if type(value) is int and value > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST:,}")
        if self.n_code == 1 or (self.n_code and self.net != "conv"):
            raise ValueError("n_code needs 2 codes or more, and --net conv, which has places")
        if self.net == "conv" and self.patch > max(self.shape[1:]):
            raise ValueError(f"patch {self.patch} is larger than pictures of {self.shape[1:]}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.channels, self.image_height, self.image_width

    @property
    def n_pixel(self) -> int:
        return self.channels * self.image_height * self.image_width

    @property
    def grid(self) -> tuple[int, int]:
        """Places of the convolutional network, down and right."""
        return -(-self.image_height // self.patch), -(-self.image_width // self.patch)

    @property
    def n_place(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def border(self) -> tuple[int, int, int, int]:
        """Zeros on the left, right, top and bottom that make the sides multiples of `patch`."""
        down, right = (n * self.patch for n in self.grid)
        return 0, right - self.image_width, 0, down - self.image_height


PRESETS = {
    "digits": VaeConfig(),
    "map": VaeConfig(latent=2),
    "conv": VaeConfig(net="conv", width=32),
    "codes": VaeConfig(net="conv", width=32, patch=4, latent=8, n_code=32),
    "sprites": VaeConfig(latent=10, width=256),
    "example": VaeConfig(latent=20, width=400, depth=1, activation="relu"),
    "mnist": VaeConfig(latent=50, width=500),
    "mnist-conv": VaeConfig(latent=50, net="conv", width=32, patch=4),
}


# ── Networks ──────────────────────────────────────────────────────────────────────────────────────


def bent(layer: nn.Module, sizes: VaeConfig) -> list[nn.Module]:
    """A layer, and what bends its output."""
    return [layer, ACTIVATIONS[sizes.activation]()]


class MlpEncoder(nn.Module):
    """Pictures to `n_head` heads of D numbers each, through `depth` hidden layers."""

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        layers, n = [], sizes.n_pixel
        for _ in range(sizes.depth):
            layers += bent(nn.Linear(n, sizes.width), sizes)
            n = sizes.width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(n, 2 * sizes.latent)  # mu, then logvar: one product for both

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x.flatten(1)))  # (B, C, H, W) to (B, 2 D)


class MlpDecoder(nn.Module):
    """Latents to a number for each pixel."""

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        self.shape = sizes.shape
        layers, n = [], sizes.latent
        for _ in range(sizes.depth):
            layers += bent(nn.Linear(n, sizes.width), sizes)
            n = sizes.width
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Linear(n, sizes.n_pixel)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.hidden(z)).unflatten(-1, self.shape)  # (N, D) to (N, C, H, W)


class ConvEncoder(nn.Module):
    """Squares of patch × patch pixels become the channels of one place; then 3 × 3 filters.

    Pictures whose side is no multiple of `patch` get a border of zeros. Places are the last but one
    axis of what the head sees, so a codebook finds a vector for each.
    """

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        self.patch, self.border = sizes.patch, sizes.border
        layers, n = [], sizes.channels * sizes.patch**2
        for _ in range(sizes.depth):
            layers += bent(nn.Conv2d(n, sizes.width, 3, padding=1), sizes)
            n = sizes.width
        self.hidden = nn.Sequential(*layers)
        if sizes.n_code:
            self.head = nn.Linear(n, sizes.latent)  # at each place
        else:
            self.head = nn.Linear(n * sizes.n_place, 2 * sizes.latent)
        self.flat = 2 if sizes.n_code else 1

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, self.border)
        x = nn.functional.pixel_unshuffle(x, self.patch)  # (B, C p², H / p, W / p)
        x = self.hidden(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, P, width)
        return self.head(x if self.flat == 2 else x.flatten(1))  # (B, P, E), else (B, 2 D)


class ConvDecoder(nn.Module):
    """The encoder backwards: latents to places, 3 × 3 filters, and each place to its square."""

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        self.patch, self.grid, self.shape = sizes.patch, sizes.grid, sizes.shape
        if sizes.n_code:
            self.first = nn.Linear(sizes.latent, sizes.width)  # at each place
        else:
            self.first = nn.Linear(sizes.latent, sizes.width * sizes.n_place)
        layers = [ACTIVATIONS[sizes.activation]()]  # behind `first`
        for _ in range(sizes.depth - 1):
            layers += bent(nn.Conv2d(sizes.width, sizes.width, 3, padding=1), sizes)
        self.hidden = nn.Sequential(*layers)
        self.out = nn.Conv2d(sizes.width, sizes.channels * sizes.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.first(z).flatten(1).unflatten(1, (*self.grid, -1)).permute(0, 3, 1, 2)
        x = nn.functional.pixel_shuffle(self.out(self.hidden(x)), self.patch)
        return x[:, :, : self.shape[1], : self.shape[2]]  # (N, D) or (N, P, E) to (N, C, H, W)


NETS = {"mlp": (MlpEncoder, MlpDecoder), "conv": (ConvEncoder, ConvDecoder)}


class Pixels(nn.Module):
    """log p(x|z), given what the decoder says of each pixel. The last two are of whole bytes, so
    their scores compare.

    bernoulli   x is 0 or 1, the decoder gives logits
    logistic    x is a grey level 0, 1/255 … 1, the decoder gives means; one learned width a channel
    gaussian    x is (byte + u) / 256 with u uniform in 0 … 1, the decoder gives means; one learned
                sigma a channel. The density in units of bytes bounds log P(byte) from below
                (1511.01844, §3.1), where a density of bytes themselves could grow without end.
    """

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        self.kind, self.n_pixel = sizes.likelihood, sizes.n_pixel
        if self.kind != "bernoulli":
            self.log_scale = nn.Parameter(torch.full((sizes.channels, 1, 1), -2.0))

    def log_prob(self, x: Tensor, decoded: Tensor) -> Tensor:
        """(B, K) nats of pictures x (B, C, H, W), decoded K times each: (B, K, C, H, W)."""
        if self.kind == "bernoulli" and not decoded.requires_grad:
            return vae.log_bernoulli_of_draws(x, decoded)
        x = x[:, None]
        if self.kind == "bernoulli":
            return vae.log_bernoulli(x, decoded)
        if self.kind == "logistic":
            return vae.log_discretised_logistic(x, decoded, self.log_scale)
        return vae.log_gaussian(x, decoded, self.log_scale) - self.n_pixel * math.log(256)

    def mean(self, decoded: Tensor) -> Tensor:
        """The mean picture, each pixel in 0 … 1."""
        return decoded.sigmoid() if self.kind == "bernoulli" else decoded.clamp(0, 1)


@torch.no_grad()
def begin_at_mean(decoder: nn.Module, mean: Tensor, sizes: VaeConfig) -> None:
    """Let the decoder say the mean picture (C, H, W), whatever z is: nothing is learned yet."""
    nn.init.zeros_(decoder.out.weight)
    if sizes.net == "conv":  # one number for each pixel of a square: the mean over the places
        padded = nn.functional.pad(mean[None], sizes.border, value=float(mean.min()))
        mean = nn.functional.pixel_unshuffle(padded, sizes.patch).mean((2, 3))
    mean = mean.logit() if sizes.likelihood == "bernoulli" else mean
    decoder.out.bias.copy_(mean.flatten())


def precise(x: Tensor) -> Tensor:
    """x in float32, or finer if it is: three digits of bfloat16 are too few for a sum of nats."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ── Models ────────────────────────────────────────────────────────────────────────────────────────


class VAE(nn.Module):
    """Encoder, decoder and pixels, with normal latents."""

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        encoder, decoder = NETS[sizes.net]
        self.encoder, self.decoder, self.pixels = encoder(sizes), decoder(sizes), Pixels(sizes)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of q(z|x), (B, D) each."""
        return tuple(precise(self.encoder(x)).chunk(2, dim=1))

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of K draws z (B, K, D) for each picture (B, C, H, W): (B, K) nats."""
        decoded = precise(self.decoder(z.flatten(0, 1)))
        return self.pixels.log_prob(x, decoded.unflatten(0, z.shape[:2]))

    def picture(self, z: Tensor) -> Tensor:
        """The mean pictures (N, C, H, W) of latents (N, D)."""
        return self.pixels.mean(precise(self.decoder(z)))

    def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        """(log p(x|z) (B, K), mu, logvar, z (B, K, D)); eps (B, K, D) are the dice."""
        mu, logvar = self.encode(x)
        z = vae.reparameterise(mu, logvar, eps)
        return self.log_likelihood(x, z), mu, logvar, z


class VQVAE(nn.Module):
    """Encoder, codebook and decoder: a picture becomes P whole numbers."""

    def __init__(self, sizes: VaeConfig):
        super().__init__()
        encoder, decoder = NETS[sizes.net]
        self.encoder, self.decoder, self.pixels = encoder(sizes), decoder(sizes), Pixels(sizes)
        self.codebook = Codebook(sizes.n_code, sizes.latent)

    def numbers(self, x: Tensor) -> Tensor:
        """The codes of pictures, (B, P)."""
        return self.codebook.nearest(self.encoder(x))

    def picture(self, numbers: Tensor) -> Tensor:
        """The mean pictures (N, C, H, W) of codes (N, P)."""
        return self.pixels.mean(precise(self.decoder(self.codebook.codes[numbers])))

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, ...]:
        """(log p(x|codes) (B, 1), commitment (B,), numbers (B, P)). eps is not looked at."""
        chosen, commitment, numbers = self.codebook(precise(self.encoder(x)))
        decoded = precise(self.decoder(chosen))[:, None]
        return self.pixels.log_prob(x, decoded), commitment, numbers


def build(sizes: VaeConfig) -> VAE | VQVAE:
    """The network of these sizes, with random weights."""
    model = VQVAE(sizes) if sizes.n_code else VAE(sizes)
    return model.to(memory_format=torch.channels_last)  # in which CPUs convolve the fastest


def macs(part: nn.Module, example: Tensor) -> int:
    """Multiply-adds of one row of `example` through an encoder or a decoder."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        total += layer.weight.numel() * output.numel() // len(layer.bias)  # once for each place

    layers = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        part(example[:1])
    for hook in hooks:
        hook.remove()
    return total


def with_data(sizes: VaeConfig, shape: tuple[int, int, int]) -> VaeConfig:
    """`sizes` for pictures of (C, H, W)."""
    channels, height, width = shape
    return dataclasses.replace(sizes, channels=channels, image_height=height, image_width=width)
