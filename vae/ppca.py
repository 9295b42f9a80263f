"""Where everything is known: linear decoders, normal noise, and log p(x) in closed form.

Let x = W z + b + sigma · noise, with z from N(0, I). Then x is normal with covariance
C = W Wᵀ + sigma² I, so log p(x) can be computed (probabilistic PCA: Tipping and Bishop 1999). A
VAE with one linear layer each way is that model. What is known of its best state (1911.02469):

    bound     ELBO = log p(x): with linear maps q can be the true posterior, if the columns of W
              are at right angles, and the ELBO itself turns them so
    columns   they point along the principal directions, eigenvectors of the data's covariance
    collapse  with a fixed sigma, a latent is used for each eigenvalue λ above sigma², and its KL is
              ½ ln(λ / sigma²); the latents left over have KL 0: nothing is wrong with training
    beta      a weight beta on the KL acts like sigma² · beta: rate ½ ln(λ / θ) for each λ > θ,
              squared error min(λ, θ), θ = beta · sigma². This is the rate–distortion curve of
              normal data (Cover and Thomas, §10.3.3, reverse water-filling)

The expectation over z is done by hand here, so there is no noise, and training is to 1e-6 nats.

Key: N points, X numbers of a point, D latents.
"""

import math

import torch
from torch import Tensor, nn

import vae


def data(n: int = 500, seed: int = 0) -> Tensor:
    """N points (N, 8) whose covariance has the eigenvalues 8, 4, 2, 1, 0.5, 0.25, 0.1, 0.1."""
    dice = torch.Generator().manual_seed(seed)
    eigenvalues = torch.tensor([8, 4, 2, 1, 0.5, 0.25, 0.1, 0.1], dtype=torch.float64)
    x = torch.randn(n, 8, generator=dice, dtype=torch.float64)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / n).T)  # exactly white
    turn = torch.linalg.qr(torch.randn(8, 8, generator=dice, dtype=torch.float64))[0]
    return x * eigenvalues.sqrt() @ turn.T + 1.0


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues, eigenvectors as columns) of the covariance of x, the largest first."""
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
    return values.flip(0), vectors.flip(1)


def log_density(x: Tensor, weight: Tensor, bias: Tensor, sigma2: Tensor) -> Tensor:
    """log p(x) of each point (N,), exactly: log N(x; b, W Wᵀ + sigma² I)."""
    covariance = weight @ weight.T + sigma2 * torch.eye(len(weight), dtype=x.dtype)
    return torch.distributions.MultivariateNormal(bias, covariance).log_prob(x)


def best_log_density(x: Tensor, n_latent: int) -> float:
    """The largest mean log p(x) of any such model, Tipping and Bishop 1999, Eq. (4), (7) and (8).

    sigma² is the mean of the eigenvalues left over; W has the others' directions, and squared
    lengths λ − sigma².
    """
    values, _ = principal(x)
    n = x.shape[1]
    sigma2 = values[n_latent:].mean()
    logs = values[:n_latent].log().sum() + (n - n_latent) * sigma2.log()
    return -0.5 * (n * math.log(2 * math.pi) + logs + n).item()


class LinearVae(nn.Module):
    """A VAE of one linear layer each way, with the same sigma for all pixels.

    sigma2: fixed if given, else learned.
    """

    def __init__(self, n_x: int, n_latent: int, sigma2: float | None = None, seed: int = 0):
        super().__init__()
        dice = torch.Generator().manual_seed(seed)

        def small(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.3 * torch.randn(*shape, generator=dice, dtype=torch.float64))

        self.weight, self.bias = small(n_x, n_latent), small(n_x)  # the decoder
        self.back, self.back_bias = small(n_latent, n_x), small(n_latent)  # the encoder's mu
        self.logvar = nn.Parameter(torch.zeros(n_latent, dtype=torch.float64))  # and its variance
        log_sigma = torch.tensor(0.5 * math.log(sigma2 or 1.0), dtype=torch.float64)
        self.log_sigma = nn.Parameter(log_sigma, requires_grad=sigma2 is None)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x @ self.back.T + self.back_bias
        return mu, self.logvar.expand_as(mu)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) of z (N, K, D): (N, K)."""
        mean = z @ self.weight.T + self.bias
        return vae.log_normal(x[:, None], mean, 2 * self.log_sigma)

    def squared_error(self, x: Tensor) -> Tensor:
        """E_q ‖x − W z − b‖² of each point (N,), without drawing: the noise of z adds its own."""
        mu, logvar = self.encode(x)
        noise = (logvar.exp() * self.weight.square().sum(0)).sum(1)
        return (x - mu @ self.weight.T - self.bias).square().sum(1) + noise

    def elbo(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """The ELBO of each point (N,), exactly."""
        constant = x.shape[1] * (vae.LOG_2PI + 2 * self.log_sigma)
        log_px = -0.5 * (constant + self.squared_error(x) * (-2 * self.log_sigma).exp())
        return vae.elbo(log_px[:, None], vae.kl_closed(*self.encode(x)), beta)


def fit(model: LinearVae, x: Tensor, beta: float = 1.0, rounds: int = 400) -> list[float]:
    """Climb the mean ELBO to its top by L-BFGS. Returns it after each round."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(wanted, max_iter=10, history_size=50,
                                  line_search_fn="strong_wolfe", tolerance_grad=1e-9)  # fmt: skip
    curve = []

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -model.elbo(x, beta).mean()
        value.backward()
        return value

    for _ in range(rounds):
        curve.append(-optimizer.step(loss).item())
        if len(curve) > 5 and abs(curve[-1] - curve[-5]) < 1e-10:
            break
    return curve


def angles(model: LinearVae, x: Tensor) -> Tensor:
    """How well each column of W points along a principal direction: the largest |cosine|, (D,)."""
    columns = model.weight.detach()
    return (principal(x)[1].T @ (columns / columns.norm(dim=0))).abs().amax(0)


def rate_distortion(eigenvalues: Tensor, theta: float) -> tuple[float, float]:
    """(rate in nats, squared error) of normal data at the water level theta, the least possible."""
    rate = 0.5 * (eigenvalues / theta).log().clamp(min=0).sum().item()
    return rate, eigenvalues.clamp(max=theta).sum().item()
