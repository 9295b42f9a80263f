"""Every picture of the README, from saved runs and from `assets/results.json`.

curve.png     accuracy of training and validation against the Bayes ceiling
grid.png      pictures of the test part and what the network says
inside.png    the filters of the first layer, Grad-CAM, effective receptive fields, confusion
residual.png  residual networks against plain ones, 20 and 56 layers, on UCI digits
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files alone, no windows

import torch
from matplotlib import pyplot as plt
from PIL import Image

import checkpoint
import data
from augment import normalize, predict
from explain import grad_cam, receptive_field
from options import say
from run import RunDirectory, read_json, whole_file, write_json

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
GOOD, BAD, BLUE = "#1b7a43", "#c0392b", "#1b4f8a"
WIDE = 7.2  # inches of every figure: shown 700 pixels wide, letters of 8 points have 11 pixels
SMALL = 8  # points, the smallest letters


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


def training_curve(folder: Path, target: Path) -> Path:
    """Accuracy by step of the run in `folder`."""
    history = RunDirectory(folder).history()
    train, valid, test = (
        [line for line in history if line.get("split") == split]
        for split in ("train", "valid", "test")
    )
    figure, axes = plt.subplots(figsize=(WIDE, 3.4))
    for lines, colour, label in ((train, "#9bb8d3", "training, augmented"),
                                 (valid, BLUE, "validation, averaged weights")):  # fmt: skip
        axes.plot([x["step"] for x in lines], [100 * x["accuracy"] for x in lines],
                  color=colour, label=label)  # fmt: skip
    for line in test:
        accuracy = 100 * line["accuracy"]
        axes.plot(line["step"], accuracy, "o", color=GOOD, label=f"test: {accuracy:.2f} %")
    ceiling = read_json(folder / "config.json").get("data", {}).get("ceiling")
    if ceiling:
        axes.axhline(100 * ceiling, color=BAD, linestyle="--",
                     label=f"Bayes ceiling: {100 * ceiling:.2f} %")  # fmt: skip
    axes.set(xlabel="step", ylabel="accuracy (%)", ylim=(0, 102))
    axes.legend(frameon=False, loc="lower right")
    return finish(figure, target / "curve.png")


def show(axes: plt.Axes, picture: torch.Tensor) -> None:
    """One picture (C, H, W) of bytes, without ticks."""
    picture = picture.expand(3, -1, -1) if len(picture) == 1 else picture
    axes.imshow(picture.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def prediction_grid(
    classes: tuple[str, ...], test: data.Split, p: torch.Tensor, target: Path
) -> Path:
    """The first 12 pictures of the test part, then the first 6 of which the answer `p` is wrong."""
    wrong = (p.argmax(1) != test.labels).nonzero()[:6, 0].tolist()
    first = list(range(min(12, len(test))))
    figure, grid = plt.subplots(3, 6, figsize=(WIDE, 5.0))
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in [*zip(grid[:2].flat, first, strict=False), *zip(grid[2], wrong, strict=False)]:
        value, guess = p[i].max(0)
        right = bool(guess == test.labels[i])
        said = f"{classes[guess][:12]} {100 * value:.0f} %"
        if not right:
            said += f"\nnot {classes[test.labels[i]][:12]}"
        show(axes, test.images[i])
        axes.set_title(said, fontsize=SMALL, pad=3, color=GOOD if right else BAD)
    said = "answer and its probability; green: right, red: wrong"
    figure.suptitle(said, fontsize=SMALL + 1, y=0.99)
    figure.text(0.5, 0.312, "the first mistakes in the test part", ha="center", fontsize=SMALL + 1)
    figure.subplots_adjust(wspace=0.15, hspace=0.45, left=0.02, right=0.98, bottom=0.02, top=0.9)
    return finish(figure, target / "grid.png", 90)


def of_run(
    loaded: checkpoint.Loaded, test: data.Split, p: torch.Tensor, target: Path
) -> list[Path]:
    """The two pictures that every training leaves; p: the answers to the test part."""
    return [training_curve(loaded.path, target), prediction_grid(loaded.classes, test, p, target)]


def filters(axes: plt.Axes, weight: torch.Tensor) -> None:
    """The first layer's filters (O, C, k, k), each stretched to its own range."""
    low, high = weight.amin((1, 2, 3), True), weight.amax((1, 2, 3), True)
    weight = torch.nn.functional.pad((weight - low) / (high - low), (0, 1, 0, 1), value=1.0)
    rows = weight.unflatten(0, (-1, 8)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    show(axes, (255 * rows[:3]).byte())
    axes.set_title("filters of the first layer", fontsize=SMALL)


def confusion(axes: plt.Axes, classes: tuple[str, ...], test: data.Split, p: torch.Tensor) -> None:
    """How often each class (row) is called what (column), in per cent of the row."""
    n = len(classes)
    counts = torch.bincount(test.labels * n + p.argmax(1), minlength=n * n).view(n, n)
    share = counts / counts.sum(1, keepdim=True)
    axes.imshow(share.sqrt(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row in range(n):
        for column in range(n):
            value = 100 * share[row, column].item()
            if value >= 0.5:
                colour = "white" if value > 40 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour,
                          fontsize=SMALL)  # fmt: skip
    axes.set_yticks(range(n), classes, fontsize=SMALL)
    axes.set_xticks(range(n), classes, fontsize=SMALL)
    axes.set_title("per cent of each label (row) that get each answer (column)", fontsize=SMALL + 1)


def inside(loaded: checkpoint.Loaded, test: data.Split, p: torch.Tensor) -> Path:
    """What the network has learned: filters, Grad-CAM, receptive fields, confusion."""
    model, images, labels = loaded.model, test.images, test.labels
    mosaic = "ABCDE;GHIJJ;KKKKK"
    figure, grid = plt.subplot_mosaic(
        mosaic, figsize=(WIDE, 7.6), layout="constrained", height_ratios=(1, 1, 2.6)
    )
    filters(grid["A"], next(model.parameters()).detach())
    chosen = [int((labels == k).nonzero()[0, 0]) for k in (2, 5, 6, 8)]
    x = normalize(images[chosen], loaded.mean, loaded.std)
    for place, i, cam in zip("BCDE", chosen, grad_cam(model, x, labels[chosen]), strict=True):
        show(grid[place], images[i])
        grid[place].imshow(cam, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        grid[place].set_title(f"bright: for {loaded.classes[labels[i]]}", fontsize=SMALL)
    x = normalize(images[:200], loaded.mean, loaded.std)
    for place, name in zip("GHI", ("stem", "layer1", "layer2"), strict=True):
        field = receptive_field(model, model.get_submodule(name), x)
        grid[place].imshow(field.sqrt(), cmap="magma")
        grid[place].set(xticks=[], yticks=[])
        side = int((field > 0).any(0).sum())
        grid[place].set_title(f"{name} sees {side} × {side}", fontsize=SMALL)
    grid["J"].axis("off")
    said = ("above: where the network finds its\nanswer (Grad-CAM)\n\n"
            "left: how much each input pixel moves\none pixel after a stage (its receptive\n"
            "field); bright is much")  # fmt: skip
    grid["J"].text(0, 0.5, said, fontsize=SMALL, va="center")
    confusion(grid["K"], loaded.classes, test, p)
    return finish(figure, ASSETS / "inside.png")


def residual(outcomes: dict[str, list[dict]]) -> Path:
    """Training loss and validation accuracy by step, mean and range of the seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(WIDE, 3.1), layout="constrained")
    colours = {"plain20": "#e59866", "plain56": BAD, "resnet20": "#7fb3d5", "resnet56": BLUE}
    for name, runs in outcomes.items():
        for axes, key in zip(panels, ("train_curve", "valid_curve"), strict=True):
            steps = [step for step, _ in runs[0][key]]
            values = torch.tensor([[value for _, value in r[key]] for r in runs])
            axes.plot(steps, values.mean(0), color=colours[name], label=name)
            low, high = values.amin(0), values.amax(0)
            axes.fill_between(steps, low, high, color=colours[name], alpha=0.2)
    panels[0].set(xlabel="step", ylabel="training loss (nats)", ylim=(0, 3))
    panels[1].set(xlabel="step", ylabel="validation accuracy (%)")
    panels[0].legend(frameon=False, fontsize=SMALL + 1, title="mean and range of 3 seeds",
                     title_fontsize=SMALL + 1)  # fmt: skip
    return finish(figure, ASSETS / "residual.png")


def collect() -> dict:
    """Put what the README quotes of the experiments that are there into results.json.

    The JSON line of --eval and of --export --int8 is taken from runs/akamaster.json and int8.json,
    the seconds of whole default runs from runs/default_run.json, their memory from memory.json, the
    last JSON lines of the README's "change this" from changes.json.
    """
    results = read_json(ASSETS / "results.json", optional=True)
    for name in ("seeds", "residual", "ablation"):
        table = read_json(RUNS / name / "table.json", optional=True)
        if table:
            results[name] = results.get(name, {}) | table
    for name in ("bench", "akamaster", "int8", "default_run", "changes", "memory"):
        line = read_json(RUNS / f"{name}.json", optional=True)
        if line:
            results[name] = {k: v for k, v in line.items() if k not in ("weights", "data")}
    write_json(ASSETS / "results.json", results)
    return results


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    results = collect()
    loaded = checkpoint.load(getattr(args, "weights", HERE / "pretrained"))
    test = loaded.dataset().test
    p = predict(loaded.model, test.images, loaded.mean, loaded.std, loaded.views)
    files = [*of_run(loaded, test, p, ASSETS), inside(loaded, test, p)]
    if "residual" in results:
        files.append(residual(results["residual"]))
    for file in files:
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
