"""What the README's tables and pictures are made of.

    seeds      the default recipe, three seeds
    ppca       linear decoders, where log p(x) is known: ELBO, IWAE, annealing, collapse, beta
    annealed   importance sampling against annealing on the trained network's test pictures
    sprites    beta 1 against beta 4 on sprites with known factors, three seeds each
    gallery    a network with two latents, for the map, and one with a codebook

Trainings are runs of their own in runs/NAME/, and one that is there already is not repeated. The
outcome is a table, and runs/NAME.json.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import data
import likelihood
import ppca
import sprites
import train
import vae
from model import PRESETS, VaeConfig
from options import UserError, say
from run import RunDirectory, read_json, write_json
from trainer import asked_for

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
SEEDS = (0, 1, 2)
SPRITES = {"data": "sprites", "steps": 3000}
SHORT = {"steps": 1500}  # seconds, and enough for a picture
VARIANTS: dict[str, dict[str, tuple[dict, VaeConfig]]] = {
    "seeds": {"default": ({}, PRESETS["digits"])},
    "sprites": {
        "beta1": (SPRITES, PRESETS["sprites"]),
        "beta4": (SPRITES | {"beta": 4.0}, PRESETS["sprites"]),
    },
    "gallery": {
        "map": (SHORT, PRESETS["map"]),
        "codes": (SHORT, PRESETS["codes"]),
    },
}


def trained(name: str, seed: int, base: train.TrainConfig) -> tuple[checkpoint.Loaded, dict]:
    """The network and the test score of a variant, trained if it is not there yet."""
    experiment, variant = name.split("/")
    changes, sizes = VARIANTS[experiment][variant]
    folder = RUNS / experiment / f"{variant}-{seed}"
    history = RunDirectory(folder).history()
    if not history or history[-1]["split"] != "test":
        say(f"── {folder.name}")
        config = dataclasses.replace(base, seed=seed, out=str(folder), **changes)
        history = train.train(config, sizes)
    if history[-1]["split"] != "test":
        raise UserError(f"{folder} is not finished: the same command begins it anew")
    return checkpoint.load(folder), history[-1]


def outcomes(experiment: str, base: train.TrainConfig) -> dict[str, list[dict]]:
    """Every variant of an experiment with every seed (the gallery with one): its test scores."""
    seeds = SEEDS if experiment != "gallery" else SEEDS[:1]
    found: dict[str, list[dict]] = {}
    for variant in VARIANTS[experiment]:
        found[variant] = []
        for seed in seeds:
            loaded, score = trained(f"{experiment}/{variant}", seed, base)
            if experiment == "sprites":
                score = score | factors_found(loaded)
            found[variant].append(score)
    return found


@torch.no_grad()
def factors_found(loaded: checkpoint.Loaded) -> dict:
    """The mutual information gap of a network on all sprites, and the table that it is made of."""
    mu, _ = loaded.model.eval().encode(sprites.all_pictures())
    shares = sprites.information(mu, sprites.load()[2])
    return {"gap": sprites.gap(shares), "information": shares.round(4).tolist()}


# ── Linear decoders ───────────────────────────────────────────────────────────────────────────────


def proof() -> dict:
    """All that `ppca.py` says, measured."""
    x = ppca.data()
    values, _ = ppca.principal(x)
    model = ppca.LinearVae(8, 4)
    best, curve = ppca.best_log_density(x, 4), ppca.fit(model, x)
    found = {
        "eigenvalues": values.tolist(),
        "gap_by_round": [best - elbo for elbo in curve],
        "gap": best - model.elbo(x).mean().item(),
        "cosines": ppca.angles(model, x).tolist(),
    }
    return found | collapse(x, values) | sandwich(x) | trade(x, values)


def collapse(x: Tensor, values: Tensor) -> dict:
    """KL of each of 8 latents at sigma² = 0.7, as predicted from the eigenvalues and as seen."""
    model = ppca.LinearVae(8, 8, sigma2=0.7)
    ppca.fit(model, x)
    seen = vae.kl_closed(*model.encode(x)).mean(0).sort(descending=True).values.tolist()
    return {"sigma2": 0.7, "kl_seen": seen, "kl_predicted": predicted_kl(values, 0.7).tolist()}


def predicted_kl(eigenvalues: Tensor, sigma2: float) -> Tensor:
    """½ ln(λ / sigma²), or 0 where λ is below sigma²: what each latent carries at the optimum."""
    return 0.5 * (eigenvalues / sigma2).log().clamp(min=0)


def turned(x: Tensor, n_latent: int = 4) -> ppca.LinearVae:
    """A model whose log p(x) is the best one, but whose true posterior no encoder here can say.

    The columns of W are mixed by a rotation, which p(x) does not notice. The latents then depend
    on one another given x, and q has a variance for each alone. Only the encoder is fitted.
    """
    model = ppca.LinearVae(8, n_latent)
    ppca.fit(model, x)
    dice = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(n_latent, n_latent, generator=dice, dtype=x.dtype))[0]
    with torch.no_grad():
        model.weight.copy_(model.weight @ turn)
    for parameter in (model.weight, model.bias, model.log_sigma):
        parameter.requires_grad_(False)
    ppca.fit(model, x)
    return model


def sandwich(x: Tensor, n: int = 200) -> dict:
    """ELBO ≤ L_k ≤ log p(x), and annealing, on n points of the `turned` model."""
    model, dice = turned(x), torch.Generator().manual_seed(2)
    x = x[:n]
    sigma2 = (2 * model.log_sigma).exp()
    truth = ppca.log_density(x, model.weight, model.bias, sigma2).mean().item()
    bounds = {}
    for k in (1, 2, 5, 10, 50, 100, 500, 1000, 5000):
        repeats = max(1, 2000 // k)  # small k are noisy: the mean of many
        each = [likelihood.importance(model, x, k, dice).mean().item() for _ in range(repeats)]
        bounds[k] = statistics.mean(each)
    ais = annealed_points(model, x)
    elbo = model.elbo(x).mean().item()
    return {"truth": truth, "elbo": elbo, "iwae": bounds, "annealed": ais}


def annealed_points(model: ppca.LinearVae, x: Tensor) -> float:
    """The mean log p(x) of points by annealing: 16 chains each."""
    dice, shape = torch.Generator().manual_seed(3), (len(x), 16, model.weight.shape[1])
    found = likelihood.annealed(
        lambda z: model.log_likelihood(x, z), shape, 500, dice=dice, dtype=x.dtype
    )
    return found.mean().item()


def trade(x: Tensor, values: Tensor, sigma2: float = 0.3) -> dict:
    """(beta, rate, squared error) of trained models, and of the best curve by reverse filling."""
    seen = []
    for beta in (0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0):
        model = ppca.LinearVae(8, 8, sigma2)
        ppca.fit(model, x, beta)
        rate = vae.kl_closed(*model.encode(x)).sum(1).mean().item()
        seen.append((beta, rate, model.squared_error(x).mean().item()))
    levels = torch.logspace(-1.5, 0.95, 60, dtype=torch.float64)
    curve = [ppca.rate_distortion(values, theta.item()) for theta in levels]
    least = [ppca.rate_distortion(values, beta * sigma2) for beta, _, _ in seen]
    return {"trade_seen": seen, "trade_least": least, "trade_curve": curve}


# ── Annealing on a trained network ────────────────────────────────────────────────────────────────


def compared(loaded: checkpoint.Loaded, n: int = 12) -> dict:
    """Mean log p(x) of n test pictures by L_k and by annealing, and how far the two are apart."""
    model = loaded.model.eval()
    x = next(data.fixed(loaded.dataset().test.images, loaded.sizes.likelihood))[:n]
    dice = torch.Generator().manual_seed(0)
    bounds = {k: likelihood.importance(model, x, k, dice) for k in (1, 10, 100, 1000, 5000)}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    shape = (n, 16, loaded.sizes.latent)
    ais = likelihood.annealed(lambda z: model.log_likelihood(x, z), shape, 400, dice=dice)
    apart = (ais - bounds[5000]).abs()
    means = {k: value.mean().item() for k, value in bounds.items()}
    largest = apart.max().item()
    return {"pictures": n, "iwae": means, "annealed": ais.mean().item(), "apart": largest}


# ── The verb ──────────────────────────────────────────────────────────────────────────────────────


def spread(values: list[float], digits: int = 2) -> str:
    """mean ± standard deviation, or the value itself where there is one alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def show(found: dict[str, list[dict]]) -> None:
    """Print a row for each variant: its test scores, mean and standard deviation over seeds."""
    columns = ("loss", "nll", "kl", "active", "gap", "perplexity")
    print(f"{'':10s}" + "".join(f"{name:>16s}" for name in columns))
    for variant, scores in found.items():
        cells = [
            spread([score[name] for score in scores]) if name in scores[0] else ""
            for name in columns
        ]
        print(f"{variant:10s}" + "".join(f"{cell:>16s}" for cell in cells))


def main(args) -> None:
    """Run one experiment and print its table; the last line is JSON."""
    base, _ = asked_for(args, train.TrainConfig(), PRESETS["digits"], data.INSIDE)
    if args.experiment == "ppca":
        found = proof()
        print(f"ELBO below the best log p(x) by {found['gap']:.1e} nats")
    elif args.experiment == "annealed":
        found = compared(checkpoint.load(base.weights or HERE / "pretrained"))
        print(f"importance {found['iwae'][5000]:.3f}, annealed {found['annealed']:.3f} nats")
    else:
        found = outcomes(args.experiment, base)
        show(found)
    RUNS.mkdir(exist_ok=True)
    file = RUNS / f"{args.experiment}.json"
    write_json(file, read_json(file, optional=True) | found)
    print(json.dumps(found))
