"""Every picture of the README and assets/results.json, anew from runs and from the theory.

The runs are those that the README tells how to make: runs/default, seed1 and seed2 with an adapter,
runs/full0, full1 and full2 with all weights. What was not run is left as it was drawn before.
"""

import argparse
import json
import re
from pathlib import Path

import torch

import data
import loading
import lora
import spectra
import theory
import train
from options import say
from run import RunDirectory, read_json, write_json
from variants import AdapterConfig

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
KINDS = {"lora": ("default", "seed1", "seed2"), "full": ("full0", "full1", "full2")}
COLORS = {"lora": "#1f77b4", "full": "#d95f02"}
NAMES = {"lora": "adapter (LoRA)", "full": "all weights"}
SHOWN = "blocks.1.attention.wv"  # the matrix whose singular values are drawn


def plotting():
    """matplotlib without a window, imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure, file: Path) -> Path:
    """Write a picture and forget it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plotting().close(figure)
    return file


def training_curve(run: Path, folder: Path) -> Path:
    """Validation loss of one run by step."""
    lines = [line for line in RunDirectory(run).history() if line["split"] == "valid"]
    figure, axes = plotting().subplots(figsize=(7, 4), layout="constrained")
    axes.plot([x["step"] for x in lines], [x["nats_per_char"] for x in lines], marker="o")
    axes.set(xlabel="step", ylabel="validation loss, nats per character", yscale="log")
    return save(figure, folder / "curve.png")


def collect() -> dict:
    """What the runs measured: for each kind, of each seed, validation losses and the test line."""
    found = {}
    for kind, names in KINDS.items():
        logs = [RunDirectory(RUNS / name).history() for name in names]
        if not all(any(line["split"] == "test" for line in log) for log in logs):
            say(f"runs/{', '.join(names)}: not all there, so {kind} is left as it was")
            continue
        found[kind] = {
            "valid": [{str(x["step"]): x["nats_per_char"] for x in log if x["split"] == "valid"}
                      for log in logs],
            "test": [[x for x in log if x["split"] == "test"][-1] for log in logs],
            "seconds": [max(x.get("seconds", 0.0) for x in log) for log in logs],
            "spectra": [spectra_of(RUNS / name) for name in names],
        }  # fmt: skip
    for file in sorted(RUNS.glob("bench-*.json")):
        found[file.stem] = read_json(file)
    return found


def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The matrices that an adapter changes by default, by name."""
    weights = {name.removesuffix(".weight"): w for name, w in model.state_dict().items()}
    wanted = AdapterConfig().targets
    return {name: w.double() for name, w in weights.items() if re.search(wanted, name)}


def spectra_of(run: Path) -> dict:
    """What a run changed in its base's matrices, and singular values of one of them."""
    loaded = loading.load_run(run)
    if lora.layers(loaded.model):
        loading.merged(loaded)
    before = matrices(loading.load_base(loading.read_run(run).base).model)
    after = matrices(loaded.model)
    changes = {"before": before[SHOWN], "change": after[SHOWN] - before[SHOWN]}
    shown = {name: torch.linalg.svdvals(w).tolist() for name, w in changes.items()}
    return spectra.compare(before, after) | shown


def base_score() -> dict:
    """What the base scores on the task before any training."""
    base = loading.load_base("")
    seq_len, test = base.model.config.seq_len, data.read_parts("news")["test"]
    pairs = data.encode_part(test, base.tokenizer, seq_len, "news")
    return train.test_score(base, "news", pairs, torch.float32)


def result_picture(results: dict) -> None:
    """Loss by step, style and forgetting: the adapter beside all weights."""
    floor = read_json(HERE / "data" / "floor.json")
    figure, (left, middle, right) = plotting().subplots(
        1, 3, figsize=(11, 4), layout="constrained", width_ratios=(2.2, 1, 1)
    )
    for kind in KINDS:
        for number, seed in enumerate(results[kind]["valid"]):
            steps = sorted(map(int, seed))
            ratio = [seed[str(s)] / floor["valid"]["nats_per_char"] for s in steps]
            left.plot(steps, ratio, color=COLORS[kind], label=None if number else NAMES[kind])
    left.axhline(1, color="gray", linestyle="--", label="lowest possible")
    left.set(xlabel="training step", ylabel="loss on unseen news, × lowest")
    left.legend(frameon=False)
    bars(middle, results, "style", 100, "answers in the new style, %")
    bars(right, results, "stories", 1, "loss on old stories, × lowest")
    save(figure, ASSETS / "result.png")


def bars(axes, results: dict, key: str, factor: float, label: str) -> None:
    """A bar for each kind, the mean, with a dot for each seed."""
    for place, kind in enumerate(KINDS):
        values = [factor * x[key] for x in results[kind]["test"]]
        axes.bar(place, sum(values) / len(values), color=COLORS[kind], alpha=0.5)
        axes.plot([place] * len(values), values, "o", color=COLORS[kind])
    axes.set_xticks(range(len(KINDS)), ["adapter", "all"])
    axes.set_ylabel(label)


def theory_picture(panel: list) -> None:
    """The error that is left by rank, and the least that is possible."""
    figure, axes = plotting().subplots(figsize=(7, 4), layout="constrained")
    ranks = [r for r, _, _ in panel]
    axes.bar(
        ranks,
        [least for _, least, _ in panel],
        color="#cccccc",
        label="least possible: Σ σᵢ², i > r",
    )
    axes.plot(
        ranks,
        [learned for _, _, learned in panel],
        "o",
        color=COLORS["lora"],
        label="LoRA, trained",
    )
    axes.set(xlabel="rank r of the correction", ylabel="squared error that is left")
    axes.set_xticks(ranks)
    axes.legend(frameon=False)
    save(figure, ASSETS / "rank.png")


def spectra_picture(results: dict) -> None:
    """Singular values of one correction, and how like the old ones the new directions are."""
    figure, (left, right) = plotting().subplots(1, 2, figsize=(11, 4), layout="constrained")
    before = results["lora"]["spectra"][0]["before"]
    left.plot(range(1, len(before) + 1), before, color="gray", label="the base's matrix")
    for kind in KINDS:
        first = results[kind]["spectra"][0]["change"]
        left.plot(range(1, len(first) + 1), first, ".", color=COLORS[kind],
                  label=f"its change: {NAMES[kind]}")  # fmt: skip
        for number, seed in enumerate(results[kind]["spectra"]):
            places = range(1, len(seed["likeness"]) + 1)
            right.plot(places, seed["likeness"], ".-", color=COLORS[kind],
                       label=None if number else NAMES[kind])  # fmt: skip
    left.set(ylim=(-0.2, None), xlabel="number of the singular value", ylabel="singular value")
    right.axhline(spectra.UNLIKE, color="gray", linestyle="--", label="below: an intruder")
    right.set(ylim=(0, 1), xlabel="direction of the new matrix, strongest first",
              ylabel="likeness to a direction of the base")  # fmt: skip
    right.set_xticks(range(1, 21, 3))
    for axes in (left, right):
        axes.legend(frameon=False)
    save(figure, ASSETS / "spectra.png")


def main(args: argparse.Namespace) -> None:
    """Redraw assets/ and write assets/results.json."""
    file = ASSETS / "results.json"
    results = read_json(file, optional=True) | collect()
    results["panel"] = theory.panel()
    results["before"] = base_score()
    ASSETS.mkdir(exist_ok=True)
    write_json(file, results)
    theory_picture(results["panel"])
    if all(kind in results for kind in KINDS):
        result_picture(results)
        spectra_picture(results)
    print(json.dumps({"drawn": sorted(path.name for path in ASSETS.glob("*.png"))}))
