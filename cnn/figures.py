"""Every picture of the README, from saved runs and from `assets/results.json`.

curve.png     accuracy of training and validation against the Bayes ceiling
grid.png      pictures of the test part and what the network says
inside.png    the filters of the first layer, Grad-CAM, effective receptive fields, confusion
residual.png  residual networks against plain ones, 20 and 56 layers, on UCI digits
"""

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from PIL import Image

import checkpoint
import data
import run
from augment import normalize, predict
from explain import grad_cam, receptive_field
from run import say

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
GOOD, BAD, BLUE = "#1b7a43", "#c0392b", "#1b4f8a"


def finish(figure: plt.Figure, file: Path, dpi: int = 100) -> Path:
    """Write the picture, in 256 colours because noise compresses badly, and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(file, optimize=True)
    return file


def history(folder: Path, split: str) -> list[dict]:
    """The logged lines of one split."""
    return [line for line in run.RunDirectory(folder).history() if line["split"] == split]


def training_curve(folder: Path, target: Path) -> Path:
    """Accuracy by step of the run in `folder`."""
    facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
    train, valid, test = (history(folder, split) for split in ("train", "valid", "test"))
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    for lines, colour, label in ((train, "#9bb8d3", "training, augmented"),
                                 (valid, BLUE, "validation, averaged weights")):  # fmt: skip
        axes.plot([x["step"] for x in lines], [100 * x["accuracy"] for x in lines],
                  color=colour, label=label)  # fmt: skip
    for line in test:
        accuracy = 100 * line["accuracy"]
        axes.plot(line["step"], accuracy, "o", color=GOOD, label=f"test: {accuracy:.2f} %")
    if ceiling := facts.get("ceiling"):
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


def prediction_grid(loaded: checkpoint.Loaded, test: data.Split, target: Path) -> Path:
    """The first 16 pictures of the test part, then the first 8 of which the answer is wrong."""
    p = predict(loaded.model, test.images, loaded.mean, loaded.std, loaded.views)
    wrong = (p.argmax(1) != test.labels).nonzero()[:8, 0].tolist()
    chosen = [*range(min(16, len(test))), *wrong]
    figure, grid = plt.subplots(3, 8, figsize=(9.6, 4.4))
    for axes in grid.flat:
        axes.axis("off")
    for axes, i in zip(grid.flat, chosen, strict=False):
        value, guess = p[i].max(0)
        right = bool(guess == test.labels[i])
        said = f"{loaded.classes[guess]} {100 * value:.0f} %"
        said += "" if right else f"\nnot {loaded.classes[test.labels[i]]}"
        show(axes, test.images[i])
        axes.set_title(said, fontsize=7, pad=2, color=GOOD if right else BAD)
    figure.subplots_adjust(wspace=0.1, hspace=0.4)
    return finish(figure, target / "grid.png", 90)


def of_run(folder: Path, target: Path) -> list[Path]:
    """The two pictures that every training leaves."""
    matplotlib.use("Agg")
    loaded = checkpoint.load(folder)
    test = data.load(loaded.source).test
    return [training_curve(folder, target), prediction_grid(loaded, test, target)]


def filters(axes: plt.Axes, weight: torch.Tensor) -> None:
    """The first layer's filters (O, C, k, k), each stretched to its own range."""
    low, high = weight.amin((1, 2, 3), True), weight.amax((1, 2, 3), True)
    weight = torch.nn.functional.pad((weight - low) / (high - low), (0, 1, 0, 1), value=1.0)
    rows = weight.unflatten(0, (-1, 8)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    show(axes, (255 * rows[:3]).byte())
    axes.set_title("filters of the first layer", fontsize=8)


def confusion(axes: plt.Axes, loaded: checkpoint.Loaded, test: data.Split) -> None:
    """How often each class (row) is called what (column)."""
    names, n = loaded.classes, len(loaded.classes)
    p = predict(loaded.model, test.images, loaded.mean, loaded.std, loaded.views)
    counts = torch.bincount(test.labels * n + p.argmax(1), minlength=n * n).view(n, n)
    axes.imshow((counts / counts.sum(1, keepdim=True)).sqrt(), cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(n), names, fontsize=5)
    axes.set_xticks(range(n), names, fontsize=5, rotation=90)
    axes.set_title("label (row), answer (column)", fontsize=8)


def inside(loaded: checkpoint.Loaded, test: data.Split) -> Path:
    """What the network has learned, in eleven small pictures."""
    model, images, labels = loaded.model.eval(), test.images, test.labels
    figure, grid = plt.subplot_mosaic("ABCDEF;GHIJKK", figsize=(10.5, 3.9), layout="constrained")
    filters(grid["A"], next(model.parameters()).detach())
    chosen = [int((labels == k).nonzero()[0, 0]) for k in (2, 5, 6, 7, 8)]
    x = normalize(images[chosen], loaded.mean, loaded.std)
    for place, i, cam in zip("BCDEF", chosen, grad_cam(model, x, labels[chosen]), strict=True):
        show(grid[place], images[i])
        grid[place].imshow(cam, cmap="inferno", alpha=0.55, vmin=0, vmax=1)
        grid[place].set_title(f"speaks for {loaded.classes[labels[i]]}", fontsize=8)
    x = normalize(images[:200], loaded.mean, loaded.std)
    for place, name in zip("GHIJ", ("stem", "layer1", "layer2", "block2"), strict=True):
        field = receptive_field(model, model.get_submodule(name), x)
        grid[place].imshow(field.sqrt(), cmap="magma")
        grid[place].set(xticks=[], yticks=[])
        grid[place].set_title(f"{name} sees {int((field > 0).any(0).sum())} pixels", fontsize=8)
    confusion(grid["K"], loaded, test)
    return finish(figure, ASSETS / "inside.png")


def residual(outcomes: dict[str, list[dict]]) -> Path:
    """Training loss and validation accuracy by step, mean and range of the seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.4))
    styles = {"plain20": ("#e59866", "-"), "plain56": (BAD, "-"), "resnet20": ("#7fb3d5", "-"),
              "resnet56": (BLUE, "-")}  # fmt: skip
    for name, runs in outcomes.items():
        colour, line = styles[name]
        for axes, key in zip(panels, ("train_curve", "valid_curve"), strict=True):
            steps = [step for step, _ in runs[0][key]]
            values = torch.tensor([[value for _, value in r[key]] for r in runs])
            axes.plot(steps, values.mean(0), line, color=colour, label=name)
            axes.fill_between(steps, values.amin(0), values.amax(0), color=colour, alpha=0.2)
    panels[0].set(xlabel="step", ylabel="training loss (nats)")
    panels[1].set(xlabel="step", ylabel="validation accuracy (%)")
    panels[0].legend(frameon=False, fontsize=8)
    return finish(figure, ASSETS / "residual.png")


def collect() -> dict:
    """Put what the README quotes of the experiments that are there into results.json.

    The JSON line of --eval and of --export --int8 is taken from runs/akamaster.json and int8.json.
    """
    file = ASSETS / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in ("seeds", "residual", "ablation"):
        if (RUNS / name / "table.json").exists():
            table = json.loads((RUNS / name / "table.json").read_text(encoding="utf-8"))
            results[name] = results.get(name, {}) | table
    for name in ("bench", "akamaster", "int8"):
        if (RUNS / f"{name}.json").exists():
            line = json.loads((RUNS / f"{name}.json").read_text(encoding="utf-8"))
            results[name] = {k: v for k, v in line.items() if k not in ("weights", "data")}
    run.write_json(file, results)
    return results


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    matplotlib.use("Agg")
    results = collect()
    folder = Path(getattr(args, "weights", HERE / "pretrained"))
    loaded = checkpoint.load(folder)
    files = [*of_run(folder, ASSETS), inside(loaded, data.load(loaded.source).test)]
    if "residual" in results:
        files.append(residual(results["residual"]))
    for file in files:
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
