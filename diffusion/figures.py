"""Every picture of the README, from the shipped networks, saved runs and `assets/results.json`.

samples.png   samples of every class, and the way of some from noise to data
film.gif      the same way, moving
flow.png      points of the spiral: where the flow carries them, by the network and by the truth
loss.png      loss by noise level: training and validation part, and the least possible
theory.png    error of the solvers by looks, and what guidance does
"""

from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone, no windows

import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

import checkpoint
import exact
import measure
import orders
import results
import train
from checkpoint import Loaded
from data import Split
from measure import SampleConfig, Watcher
from options import say
from run import whole_file
from sources import Source, to_bytes, to_unit

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
GOOD, BAD, BLUE, GREY = "#1b7a43", "#c0392b", "#1b4f8a", "#8795a1"
WIDE = 7.2  # inches of every figure: shown 700 pixels wide, letters of 8 points have 11 pixels
SMALL = 8  # points, the smallest letters
N_CURVE = 256  # rows at each of the times of a loss curve
SIDE = 700  # pixels: pictures of samples are magnified to about this
plt.rcParams.update({"font.size": SMALL, "axes.titlesize": 9, "axes.spines.top": False,
                     "axes.spines.right": False})  # fmt: skip


def finish(figure: plt.Figure, file: Path, dpi: int = 100) -> Path:
    """Write the picture, in 256 colours because noise compresses badly, and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        figure.savefig(
            part, format="png", dpi=dpi, bbox_inches="tight", metadata={"Software": None}
        )
        plt.close(figure)
        with Image.open(part) as picture:
            small = picture.convert("RGB").quantize(256)
        small.save(part, format="png", optimize=True)
    return file


# ── Samples ───────────────────────────────────────────────────────────────────────────────────────


def tiled(x: Tensor, n_column: int) -> Image.Image:
    """Pictures (N, C, H, W) from −1 to 1 side by side, magnified, with a line between them."""
    pixels = to_bytes(x)
    times = max(1, SIDE // (n_column * (x.shape[3] + 1)))
    pixels = torch.nn.functional.pad(pixels, (0, 1, 0, 1), value=128)
    n_row = -(-len(pixels) // n_column)
    blank = torch.full((n_row * n_column - len(pixels), *pixels.shape[1:]), 255, dtype=torch.uint8)
    rows = torch.cat([pixels, blank]).unflatten(0, (n_row, n_column))
    sheet = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()  # (height, width, C)
    picture = Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet)
    return picture.resize((picture.width * times, picture.height * times), Image.NEAREST)


def save_picture(picture: Image.Image, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        picture.save(part, format="PNG", optimize=True)
    return file


def sample_picture(x: Tensor, loaded: Loaded, file: Path) -> Path:
    """Samples as a grid of pictures, or points as points of the plane."""
    if loaded.is_pictures:
        n_column = max(1, round(len(x) ** 0.5))
        return save_picture(tiled(x, n_column), file)
    figure, axes = plt.subplots(figsize=(4, 4))
    points(axes, x, f"{len(x):,} samples")
    return finish(figure, file)


def points(axes, x: Tensor, title: str, colour=BLUE, limit: float = 1.3) -> None:
    """Points (N, 2, 1, 1) of the plane."""
    axes.scatter(*x.flatten(1).T, s=2, color=colour, linewidths=0)
    axes.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), xticks=[], yticks=[])
    axes.set_aspect("equal")


def film(seen: list, x: Tensor, loaded: Loaded, file: Path, most: int = 48) -> Path:
    """A GIF of the first samples, from noise to data."""
    frames = [rows[:most] for rows in stages(seen)]
    frames += [x[:most]] * 8  # the last stands still for a while
    if loaded.is_pictures:
        drawn = [tiled(rows, 8).convert("P") for rows in frames]
        drawn = [picture.resize((picture.width // 2, picture.height // 2)) for picture in drawn]
    else:
        drawn = [as_image(rows) for rows in frames]
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as part:
        drawn[0].save(
            part, format="GIF", save_all=True, append_images=drawn[1:], duration=150, loop=0
        )
    return file


def stages(seen: list) -> list[Tensor]:
    """The rows at each look, all batches together. A batch begins where the noise rises again."""
    n_look = next((i for i in range(1, len(seen)) if seen[i][0] > seen[i - 1][0]), len(seen))
    return [torch.cat([rows for _, rows, _ in seen[i::n_look]]) for i in range(n_look)]


def as_image(x: Tensor, side: int = 240, limit: float = 2.5) -> Image.Image:
    """Points of the plane as black dots of a white picture."""
    place = ((x.flatten(1) / limit + 1) / 2 * side).long()
    place = place[((place >= 0) & (place < side)).all(1)]
    pixels = torch.full((side, side), 255, dtype=torch.uint8)
    pixels[side - 1 - place[:, 1], place[:, 0]] = 0
    return Image.fromarray(pixels.numpy()).convert("P")


def strip(loaded: Loaded, n_row: int = 4, n_column: int = 10) -> Tensor:
    """Some samples on their way: (n_row · n_column, C, H, W), a row each, noise on the left."""
    labels = measure.even_labels(loaded, n_row)
    config, watcher = SampleConfig(sample_steps=50, sampler=smooth_sampler(loaded)), Watcher()
    x = measure.sample(loaded, config, labels, n_row, watch=watcher)
    shown = [int(i * len(watcher.seen) / (n_column - 1)) for i in range(n_column - 1)]
    return torch.stack([*(watcher.seen[i][1] for i in shown), x], dim=1).flatten(0, 1)


def smooth_sampler(loaded: Loaded) -> str:
    return "flow" if loaded.process.schedule == "flow" else "ddim"


def of_run(loaded: Loaded, source: Source, folder: Path) -> list[Path]:
    """The pictures of a finished run: samples, their way, and the loss by noise level."""
    labels = measure.even_labels(loaded, 100 if loaded.is_pictures else 2000)
    labels = labels.sort().values if labels is not None else None
    n = 100 if loaded.is_pictures else 2000
    x = measure.sample(loaded, SampleConfig(), labels, n)
    made = [sample_picture(x, loaded, folder / "samples.png")]
    if loaded.is_pictures:
        made.append(save_picture(tiled(strip(loaded), 10), folder / "strip.png"))
    figure, axes = plt.subplots(figsize=(WIDE, 3))
    loss_curves(axes, loaded, source)
    return [*made, finish(figure, folder / "loss.png")]


# ── Loss by noise level ───────────────────────────────────────────────────────────────────────────


def loss_by_time(
    loaded: Loaded, part, times: Tensor, best: exact.Mixture | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared error of the target at each of the times (S,) on a part of the data.

    Returns it for the network and for the exact denoiser `best`, on the same rows and noise.
    """
    schedule, target = loaded.process.make_schedule(), loaded.process.target
    device, dice = next(loaded.model.parameters()).device, torch.Generator().manual_seed(1)
    found, floors = [], []
    for time in times:
        noise = torch.randn(part.images.shape, generator=dice)
        at, rows = time.repeat(len(part)), to_unit(part.images)
        with torch.no_grad():
            errors = train.errors_at(
                loaded.model, loaded.process, schedule, part, at, noise.to(device), torch.float32
            )
        found.append(errors.cpu().double().mean())
        if best:
            least = exact.losses(best, schedule, at, target, rows, part.labels, noise)
            floors.append(least.mean())
    return torch.stack(found), torch.stack(floors) if best else None


def curve_times(loaded: Loaded, n: int = 24) -> Tensor:
    """Times from little noise to much, the same distance apart."""
    schedule = loaded.process.make_schedule()
    return schedule.draw((torch.arange(n) + 0.5) / n)


def loss_curves(axes, loaded: Loaded, source: Source) -> dict[str, list[float]]:
    """Draw the loss by time: training and validation part, and the least possible."""
    times, curves = curve_times(loaded), {}
    best = source.clean(source.train) if source.is_pictures else source.mixture
    best = best if loaded.sizes.n_class else replace(best, labels=None)
    if source.is_pictures:
        label = "a network that copies its training pictures"
        curves["validation part"], _ = loss_by_time(loaded, source.valid[:N_CURVE], times)
        curves["training part"], curves[label] = loss_by_time(
            loaded, source.train[:N_CURVE], times, best
        )
    else:
        label, dice = "the least possible", torch.Generator().manual_seed(5)
        fresh = Split(*source.mixture.draw(4096, dice))
        curves["fresh points"], curves[label] = loss_by_time(loaded, fresh, times, best)
    looks = {"training part": (BLUE, "-"), label: (GOOD, "--")}
    for name, losses in curves.items():
        colour, line = looks.get(name, (BAD, "-"))
        axes.plot(times, losses.clamp(min=1e-6), line, color=colour, label=name, marker=".", ms=4)
    target = loaded.process.target
    axes.set(xlabel="time t: little noise left, noise alone right", title=source.name,
             ylabel=f"loss (squared error of {target})")  # fmt: skip
    axes.set_yscale("log" if source.is_pictures else "linear")
    axes.legend(frameon=False)
    return {name: losses.tolist() for name, losses in curves.items()}


# ── Theory ────────────────────────────────────────────────────────────────────────────────────────


def flow_field(loaded: Loaded, source: Source, file: Path) -> Path:
    """Where the network and the exact denoiser send noisy points, at three noise levels.

    Arrows stand only where noisy data are found: elsewhere nobody ever asks.
    """
    schedule = loaded.process.make_schedule()
    figure, axes = plt.subplots(2, 3, figsize=(WIDE, 5.2))
    line = torch.linspace(-1.3, 1.3, 17)
    x, y = torch.meshgrid(line, line, indexing="xy")
    grid = torch.stack([x, y], dim=2).reshape(-1, 2, 1, 1)
    dice = torch.Generator().manual_seed(0)
    data, _ = source.mixture.draw(1500, dice)
    judges = {"network": measure.denoiser(loaded, None, 1.0), "exact": source.mixture}
    for column, place in enumerate((0.5, 0.25, 0.08)):
        time = schedule.draw(torch.tensor([place]))
        alpha, sigma = schedule.at(time)
        noisy = alpha.float() * data.flatten(1) + sigma.float() * torch.randn(
            len(data), 2, generator=dice
        )
        for row, (name, predict) in enumerate(judges.items()):
            with torch.no_grad():
                x0, _ = predict(grid, time[0], alpha[0], sigma[0])
            pane = axes[row, column]
            pane.scatter(*noisy.T, s=1, color="#9aa7b3", linewidths=0)
            seen = source.mixture.log_density(grid.double(), alpha[0], sigma[0]) > -6
            start, there = grid[seen].flatten(1), (x0 - grid)[seen].flatten(1)
            look = {"angles": "xy", "scale_units": "xy", "scale": 1.6, "width": 0.004}
            pane.quiver(*start.T, *there.T, color=BLUE if row == 0 else GOOD, **look)
            pane.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=[], yticks=[])
            pane.set_title(f"{name}, noise σ = {float(sigma):.2f}")
            pane.set_aspect("equal")
    figure.tight_layout()
    return finish(figure, file)


def solver_errors(axes) -> None:
    """Error against looks, with the measured slopes."""
    colours = (BLUE, BAD, GOOD)
    for colour, (name, found) in zip(colours, orders.errors().items(), strict=True):
        looks, error = zip(*found, strict=True)
        label = f"{name}: slope {orders.slope(found):.2f}"
        axes.plot(looks, error, "o-", color=colour, ms=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="looks at the denoiser", ylabel="error of the end",
             title="solvers with the exact denoiser", ylim=(2e-7, 0.1))  # fmt: skip
    axes.set_xticks([16, 32, 64, 128, 256, 512], labels=["16", "32", "64", "128", "256", "512"])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower left")


def guidance_sweep(axes, found: dict) -> None:
    """Samples read as their label, and distance to real pictures, against w."""
    sweep = found["guidance"]
    w = [line["guidance"] for line in sweep]
    axes.plot(w, [100 * line["accuracy"] for line in sweep], "o-", color=BLUE, ms=4)
    axes.set(xlabel="guidance w", title="guidance on the digits")
    axes.set_ylabel("read as their label, %", color=BLUE)
    other = axes.twinx()
    other.plot(w, [line["frechet"] for line in sweep], "s--", color=BAD, ms=4)
    other.set_ylabel("Fréchet distance to real ones", color=BAD)
    other.spines["right"].set_visible(True)


def main(args) -> None:
    """Write assets/results.json and redraw assets/, from runs/ and pretrained/."""
    found = results.collect()
    digits, toy = (checkpoint.load(HERE / "pretrained" / name) for name in (".", "toy"))
    digit_rows, toy_rows = digits.rows(), toy.rows()
    labels = measure.even_labels(digits, 100).sort().values
    x = measure.sample(digits, SampleConfig(), labels)
    top, below = tiled(x, 20), tiled(strip(digits, 3, 20), 20)
    sheet = Image.new("L", (top.width, top.height + below.height + 12), 255)
    sheet.paste(top, (0, 0))
    sheet.paste(below, (0, top.height + 12))
    made = [save_picture(sheet, ASSETS / "samples.png")]
    watcher = Watcher()
    start = SampleConfig(sample_steps=50, sampler=smooth_sampler(toy), num_samples=2000)
    x = measure.sample(toy, start, None, 2000, watch=watcher)
    made.append(film(watcher.seen, x, toy, ASSETS / "film.gif", most=2000))
    made.append(flow_field(toy, toy_rows, ASSETS / "flow.png"))
    figure, axes = plt.subplots(1, 2, figsize=(WIDE, 3.2))
    loss_curves(axes[0], toy, toy_rows)
    loss_curves(axes[1], digits, digit_rows)
    figure.tight_layout()
    made.append(finish(figure, ASSETS / "loss.png"))
    figure, axes = plt.subplots(1, 2, figsize=(WIDE, 3.2))
    solver_errors(axes[0])
    guidance_sweep(axes[1], found)
    figure.tight_layout()
    made.append(finish(figure, ASSETS / "theory.png"))
    for file in made:
        say(f"{file.relative_to(HERE)}  {file.stat().st_size:,} bytes")
