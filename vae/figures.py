"""Every picture of the README, from saved runs and from `assets/results.json`.

grid.png      test pictures, what comes back through 16 latents, and new ones
curve.png     ELBO of training and validation against what nobody can beat
inside.png    a map of two latents, a walk between two pictures, latents and codes in use
proof.png     linear decoders: ELBO against exact log p(x), collapse, IWAE, rate and error
sprites.png   what each latent does to a sprite, and what it knows of the factors
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone, no windows

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

import checkpoint
import data
import sprites
import train
import vae
from experiments import RUNS
from options import say
from run import RunDirectory, read_json, whole_file, write_json

ASSETS = Path(__file__).resolve().parent / "assets"
GOOD, BAD, BLUE, PALE = "#1b7a43", "#c0392b", "#1b4f8a", "#9bb8d3"
WIDE = 7.2  # inches of every figure: shown 700 pixels wide, letters of 8 points have 11 pixels
SMALL = 8  # points, the smallest letters
SHIPPED = Path(__file__).resolve().parent / "pretrained"


def finish(figure: plt.Figure, file: Path) -> Path:
    """Write the picture, in 256 colours because noise compresses badly, and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        figure.savefig(part, format="png", dpi=100, metadata={"Software": None})
        plt.close(figure)
        with Image.open(part) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(part, format="png", optimize=True)
    return file


def mosaic(pictures: Tensor, per_row: int) -> np.ndarray:
    """Pictures (N, C, H, W) of 0 … 1 side by side with a thin line between, (H', W', 3) bytes."""
    pictures = pictures.expand(-1, 3, -1, -1) if pictures.shape[1] == 1 else pictures
    missing = -len(pictures) % per_row
    pictures = torch.cat([pictures, torch.ones(missing, *pictures.shape[1:])])
    framed = torch.nn.functional.pad(pictures, (0, 1, 0, 1), value=0.5)
    rows = framed.unflatten(0, (-1, per_row)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    return (rows[:-1, :-1] * 255).round().byte().numpy()


def tiled(pictures: Tensor, per_row: int = 8) -> Image.Image:
    """The same as a picture, enlarged so that a small one can be seen."""
    image = Image.fromarray(mosaic(pictures, per_row))
    times = max(1, 700 // image.width)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def put(axes: plt.Axes, pictures: Tensor, per_row: int, title: str = "") -> None:
    """Lay pictures on axes without ticks."""
    axes.imshow(mosaic(pictures, per_row), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=SMALL + 1, loc="left", pad=3)


# ── What every training leaves ────────────────────────────────────────────────────────────────────


def there_and_back(model, x: Tensor) -> Tensor:
    """The mean picture of each x's own latents (or codes)."""
    return model.picture(model.encode(x)[0] if hasattr(model, "encode") else model.numbers(x))


@torch.no_grad()
def grid(loaded: checkpoint.Loaded, dataset: data.Dataset, file: Path, n: int = 16) -> Path:
    """Test pictures as the network sees them, what it makes of their latents, and new pictures."""
    model = loaded.model.cpu().eval()
    images = dataset.test.images[:n]
    x = next(data.fixed(dataset.test.images, loaded.sizes.likelihood))[:n]
    blocks = [(images.float() / 255, "test pictures, which it never trained on")]
    if loaded.sizes.likelihood == "bernoulli":
        blocks.append((x, "what the encoder gets: each pixel black or white, by a throw of dice"))
    blocks.append((there_and_back(model, x), "reconstructions: through the latents and back"))
    if not loaded.sizes.n_code:
        z = torch.randn(3 * n, loaded.sizes.latent, generator=torch.Generator().manual_seed(0))
        blocks.append((model.picture(z), "new pictures, from random latents"))
    heights = [-(-len(pictures) // n) for pictures, _ in blocks]
    figure, panels = plt.subplots(
        len(blocks), 1, figsize=(WIDE, 0.48 * sum(heights) + 0.25 * len(blocks)),
        height_ratios=heights, layout="constrained",
    )  # fmt: skip
    for axes, (pictures, title) in zip(panels, blocks, strict=True):
        put(axes, pictures, n, title)
    return finish(figure, file)


def training_curve(folder: Path, dataset: data.Dataset, file: Path) -> Path:
    """−ELBO by step of the run in `folder`, with its two parts."""
    history = RunDirectory(folder).history()
    steps, valid, test = (
        [line for line in history if line["split"] == split] for split in ("train", "valid", "test")
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDE, 3.2), layout="constrained")
    left.plot([x["step"] for x in steps], [x["reconstruction"] + x["kl"] for x in steps],
              color=PALE, label="training batches")  # fmt: skip
    left.plot([x["step"] for x in valid], [x["loss"] for x in valid], color=BLUE,
              label="validation, averaged weights")  # fmt: skip
    for line in test:
        if "nll" in line:
            left.plot(line["step"], line["nll"], "o", color=GOOD,
                      label=f"test: −log p(x) = {line['nll']:.2f}")  # fmt: skip
    if read_json(folder / "config.json")["model"]["likelihood"] == "bernoulli":
        coin, least = data.alone(dataset.mean, dataset.test.images), train.floor_of(dataset)[0]
        left.axhline(coin, color="black", linestyle=":", label="each pixel a coin of its own")
        left.axhline(least, color=BAD, linestyle="--", label="nobody can be lower")
    left.set(xlabel="step", ylabel="−ELBO (nats a picture)")
    left.legend(frameon=False, fontsize=SMALL, loc="center right", bbox_to_anchor=(1, 0.4))
    for name, colour in (("reconstruction", BLUE), ("kl", BAD)):
        right.plot([x["step"] for x in valid], [x[name] for x in valid], color=colour, label=name)
    right.set(xlabel="step", ylabel="parts of −ELBO, validation (nats)", ylim=(0, None))
    right.legend(frameon=False, fontsize=SMALL)
    return finish(figure, file)


def of_run(loaded: checkpoint.Loaded, dataset: data.Dataset, target: Path) -> list[Path]:
    """The two pictures that every training leaves."""
    return [
        grid(loaded, dataset, target / "grid.png"),
        training_curve(loaded.path, dataset, target / "curve.png"),
    ]


# ── Inside ────────────────────────────────────────────────────────────────────────────────────────


def latent_map(axes: plt.Axes, model, n: int = 12) -> None:
    """What two latents decode to, at equal steps of probability from 3 % to 97 %."""
    steps = torch.special.ndtri(torch.linspace(0.03, 0.97, n))
    z = torch.cartesian_prod(steps.flip(0), steps).flip(1)  # rows are the second latent
    put(axes, model.picture(z), n, "two latents: what each place decodes to")
    axes.set(xlabel="latent 0, from −1.9 to 1.9", ylabel="latent 1")
    axes.xaxis.label.set_size(SMALL), axes.yaxis.label.set_size(SMALL)


def scatter(axes: plt.Axes, loaded: checkpoint.Loaded, dataset: data.Dataset) -> None:
    """Where the encoder puts the test and validation pictures, coloured by their labels."""
    for part in (dataset.test, dataset.valid):
        x = next(data.fixed(part.images, loaded.sizes.likelihood))
        mu = loaded.model.encode(x)[0]
        for label in range(len(dataset.classes)):
            chosen = mu[part.labels[: len(x)] == label]
            axes.scatter(chosen[:, 0], chosen[:, 1], color="white", s=1)
            for a, b in chosen.tolist():
                axes.text(a, b, dataset.classes[label], color=plt.cm.tab10(label % 10),
                          fontsize=SMALL - 1, ha="center", va="center")  # fmt: skip
    axes.set_title("where unseen pictures land", fontsize=SMALL + 1, loc="left", pad=3)
    axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
    axes.tick_params(labelsize=SMALL)


def walk(model, x: Tensor, n: int = 14) -> Tensor:
    """Pictures on the straight line between the latents of pairs of pictures, n for each pair."""
    mu = model.encode(x)[0]
    share = torch.linspace(0, 1, n)[:, None]
    return model.picture(
        torch.cat([(1 - share) * a + share * b for a, b in mu.unflatten(0, (-1, 2))])
    )


@torch.no_grad()
def inside(loaded: checkpoint.Loaded, results: dict) -> Path | None:
    """Map, walk, latents in use, codes in use; None while the gallery has not been trained."""
    folders = [RUNS / "gallery" / f"{name}-0" for name in ("map", "codes")]
    if not all((folder / "model.safetensors").exists() for folder in folders):
        return None
    flat, codes = (checkpoint.load(folder) for folder in folders)
    dataset = loaded.dataset()
    figure, panels = plt.subplot_mosaic(
        "AB;CC;DE", figsize=(WIDE, 7.8), height_ratios=(3.3, 1.15, 1.5), layout="constrained"
    )
    latent_map(panels["A"], flat.model.eval())
    scatter(panels["B"], flat, dataset)
    chosen = [int((dataset.test.labels == k).nonzero()[0, 0]) for k in (0, 1, 3, 8, 7, 4)]
    x = next(data.fixed(dataset.test.images, loaded.sizes.likelihood))[chosen]
    title = "walks in a straight line through 16 latents: from 0 to 1, 3 to 8, 7 to 4"
    put(panels["C"], walk(loaded.model.eval(), x), 14, title)
    bars_of_latents(panels["D"], RunDirectory(loaded.path).history()[-1]["kl_each"])
    bars_of_codes(panels["E"], codes, dataset)
    return finish(figure, ASSETS / "inside.png")


def bars_of_latents(axes: plt.Axes, each: list[float]) -> None:
    """KL of each latent, the busiest first."""
    axes.bar(range(len(each)), sorted(each, reverse=True), color=BLUE)
    used = sum(kl >= vae.ACTIVE for kl in each)
    axes.set_title(f"{used} of {len(each)} latents in use", fontsize=SMALL + 1, loc="left")
    axes.set_ylabel("KL (nats)", fontsize=SMALL)
    axes.set_xlabel("latents, the busiest first", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)


def bars_of_codes(axes: plt.Axes, codes: checkpoint.Loaded, dataset: data.Dataset) -> None:
    """How often each code of a codebook is chosen for test pictures."""
    model, n = codes.model.eval(), codes.sizes.n_code
    numbers = model.numbers(next(data.fixed(dataset.test.images, codes.sizes.likelihood)))
    share = torch.bincount(numbers.flatten(), minlength=n).sort(descending=True).values
    axes.bar(range(n), (100 * share / share.sum()).tolist(), color=GOOD)
    axes.axhline(100 / n, color="black", linewidth=0.8, linestyle="--", label="all alike")
    axes.legend(frameon=False, fontsize=SMALL)
    title = f"how often each of {n} codes is chosen"
    axes.set_title(title, fontsize=SMALL + 1, loc="left")
    axes.set_ylabel("per cent", fontsize=SMALL)
    axes.set_xlabel("codes, the commonest first", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)


# ── Proof and sprites ─────────────────────────────────────────────────────────────────────────────


def proof(found: dict) -> Path:
    """The four claims of ppca.py, drawn from `--experiment ppca`."""
    figure, panels = plt.subplots(2, 2, figsize=(WIDE, 5.8), layout="constrained")
    (gap, silent), (order, trade) = panels
    gap.semilogy([max(value, 1e-10) for value in found["gap_by_round"]], color=BLUE)
    gap.axhline(1e-3, color=BAD, linestyle="--", label="1e-3 nats")
    gap.set(xlabel="round of training", ylabel="best log p(x) − ELBO (nats)",
            title="the ELBO meets log p(x)")  # fmt: skip
    gap.legend(frameon=False, fontsize=SMALL)
    places = np.arange(8)
    silent.bar(places - 0.2, found["kl_predicted"], 0.4, color=PALE, label="½ ln(λ / sigma²) or 0")
    silent.bar(places + 0.2, found["kl_seen"], 0.4, color=BLUE, label="seen after training")
    silent.set_xticks(places, [f"{value:g}" for value in np.round(found["eigenvalues"], 2)])
    silent.set(xlabel=f"eigenvalue λ of the data (sigma² = {found['sigma2']})",
               ylabel="KL of a latent (nats)", title="which latents collapse")  # fmt: skip
    silent.legend(frameon=False, fontsize=SMALL)
    ks = [int(k) for k in found["iwae"]]
    order.semilogx(ks, list(found["iwae"].values()), "o-", color=BLUE, label="L_k (IWAE)")
    for key, colour, style, label in (("truth", GOOD, "-", "log p(x), exact"),
                                      ("annealed", "#e08e0b", ":", "annealed, without encoder"),
                                      ("elbo", BAD, "--", "ELBO")):  # fmt: skip
        order.axhline(found[key], color=colour, linestyle=style, label=label)
    order.set(xlabel="k, draws for each point", ylabel="nats a point",
              title="ELBO ≤ L_k ≤ log p(x)")  # fmt: skip
    order.legend(frameon=False, fontsize=SMALL)
    trade.plot(*zip(*found["trade_curve"], strict=True), color=PALE, linewidth=4,
               label="least possible (water-filling)")  # fmt: skip
    for i, (beta, rate, error) in enumerate(found["trade_seen"]):
        trade.plot(rate, error, "o", color=BLUE, label="trained, by beta" if i == 0 else None)
        trade.annotate(f"{beta:g}", (rate, error), fontsize=SMALL, xytext=(4, 4),
                       textcoords="offset points")  # fmt: skip
    trade.set(xlabel="rate: KL (nats)", ylabel="squared error", title="beta moves along a curve")
    trade.legend(frameon=False, fontsize=SMALL)
    return finish(figure, ASSETS / "proof.png")


@torch.no_grad()
def of_sprites(results: dict) -> Path | None:
    """Traversals of the busiest latents for beta 4, and both tables of information."""
    folder = RUNS / "sprites" / "beta4-0"
    if not (folder / "model.safetensors").exists():
        return None
    loaded = checkpoint.load(folder)
    model, tables = loaded.model.eval(), results["sprites"]
    figure, panels = plt.subplot_mosaic(
        "AB;AC", figsize=(WIDE, 4.4), width_ratios=(2.1, 1), layout="constrained"
    )
    mu, logvar = model.encode(sprites.all_pictures())
    busiest = vae.kl_closed(mu, logvar).mean(0).argsort(descending=True)[:6]
    rows = []
    for latent in busiest.tolist():
        z = mu[745].expand(9, -1).clone()
        z[:, latent] = torch.linspace(-2, 2, 9)
        rows.append(model.picture(z))
    put(panels["A"], torch.cat(rows), 9, "beta 4: one latent a row, moved from −2 to 2")
    side = sprites.S + 1
    panels["A"].set_yticks([side * i + side / 2 for i in range(len(rows))], busiest.tolist())
    panels["A"].set_ylabel("latent", fontsize=SMALL)
    for place, name in (("B", "beta1"), ("C", "beta4")):
        axes, first = panels[place], tables[name][0]
        axes.imshow(np.array(first["information"]).T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_yticks(range(4), sprites.FACTORS, fontsize=SMALL)
        axes.set_xticks(range(len(first["information"])))
        axes.tick_params(labelsize=SMALL)
        axes.set_title(f"beta {name[-1]}: gap {first['gap']:.2f}", fontsize=SMALL + 1)
    panels["C"].set_xlabel("latent; dark: knows the factor", fontsize=SMALL)
    return finish(figure, ASSETS / "sprites.png")


def collect() -> dict:
    """Put what the README quotes of the experiments that are there into results.json.

    The last JSON lines of other commands are taken from runs/NAME.json too.
    """
    results = read_json(ASSETS / "results.json", optional=True)
    names = (
        "seeds",
        "ppca",
        "annealed",
        "sprites",
        "gallery",
        "bench",
        "mnist",
        "default_run",
        "changes",
    )
    for name in names:
        if found := read_json(RUNS / f"{name}.json", optional=True):
            results[name] = {k: v for k, v in found.items() if k not in ("weights", "data")}
    write_json(ASSETS / "results.json", results)
    return results


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    results = collect()
    loaded = checkpoint.load(getattr(args, "weights", SHIPPED))
    files = of_run(loaded, loaded.dataset(), ASSETS)
    files += [inside(loaded, results)]
    files += [proof(results["ppca"])] if "ppca" in results else []
    files += [of_sprites(results)] if "sprites" in results else []
    for file in filter(None, files):
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
