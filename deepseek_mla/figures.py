"""Every picture of the README, from saved runs and from `assets/results.json`.

cache.png    left: bytes a token leaves in the cache; right: time of a token by length of context
curve.png    loss, right answers and accepted guesses in training
balance.png  how uneven the experts' work is, balanced by biases, by a loss, by nothing
needle.png   needles found, by depth and length of the text, before and after YaRN
"""

import itertools
import json
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt

import data
from memory import grouped_numbers, latent_numbers
from model import PRESETS, KVCache
from options import say
from run import RunDirectory, read_json, write_json
from skew import skewed_violations

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
COLOURS = ("#1b4f8a", "#e08e0b", "#2a7d46", "#b03a5b", "#6f4aa0")
WAYS = {"none": "nothing", "loss": "an auxiliary loss", "bias": "a bias"}


def finish(figure: plt.Figure, file: Path) -> Path:
    """Write the picture and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def training_curve(folder: Path, target: Path) -> Path:
    """Loss, answers and guesses by step of the run in `folder`: what `--train` leaves."""
    matplotlib.use("Agg")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]
    history = RunDirectory(folder).history()
    train, valid = ([x for x in history if x["split"] == part] for part in ("train", "valid"))
    per_token = valid[-1]["nats_per_char"] / valid[-1]["loss"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot([x["step"] for x in train], [x["loss"] * per_token for x in train],
              color="#9bb8d3", label="training batch")  # fmt: skip
    left.plot([x["step"] for x in valid], [x["nats_per_char"] for x in valid],
              color=COLOURS[0], marker="o", label="validation part")  # fmt: skip
    if floor := data.floor(config["data"], "valid"):
        left.axhline(floor, color="#c0392b", linestyle="--", label="floor, the entropy")
    left.set(xlabel="step", ylabel="nats per character", yscale="log")
    left.legend(frameon=False)
    labels = {"recall": "answers right", "accepted": "guesses that would be accepted"}
    for colour, (name, label) in zip(COLOURS, labels.items(), strict=False):
        points = [(x["step"], x[name]) for x in valid if name in x]
        if points:
            right.plot(*zip(*points, strict=True), color=colour, marker="o", label=label)
    right.set(xlabel="step", ylabel="share of the validation part", ylim=(0, 1.03))
    right.legend(frameon=False)
    return finish(figure, target / "curve.png")


def cache_bytes(n_layer: int, shape: tuple[int, int, int, int], d_value: int | None) -> int:
    """Bytes that a token takes in a cache of this shape (1, heads, 1, width), in bfloat16."""
    like = torch.empty(0, dtype=torch.bfloat16)
    cache = KVCache(n_layer, shape, like, d_value)
    return sum(tensor.nbytes for tensor in cache.keys + cache.values)


def caches() -> dict[str, tuple[int, int]]:
    """(measured, computed) bytes a token of DeepSeek-V3's 61 layers, by kind of attention."""
    c = PRESETS["v3"]
    found = {}
    for name, heads in (("multi-head\n128 heads", c.n_head), ("grouped-query\n8 heads", 8)):
        measured = cache_bytes(c.n_layer, (1, heads, 1, 128), None)
        found[name] = measured, 2 * grouped_numbers(c.n_layer, heads, 128)
    measured = cache_bytes(c.n_layer, (1, 1, 1, c.kv_rank + c.d_rope), 0)
    found["latent\n512 + 64"] = measured, 2 * latent_numbers(c.n_layer, c.kv_rank, c.d_rope)
    return found


def cache(results: dict) -> Path:
    """Left: memory by kind of attention. Right: time by length of context, naive and absorbed."""
    bench = results.get("bench-float32") or results.get("bench-bfloat16")
    n_panel = 2 if bench else 1
    figure, panels = plt.subplots(1, n_panel, figsize=(9, 3.6), layout="constrained", squeeze=False)
    left, sizes = panels[0, 0], caches()
    bars = left.bar(list(sizes), [measured / 1e3 for measured, _ in sizes.values()],
                    color=("#7a7a7a", COLOURS[1], COLOURS[0]))  # fmt: skip
    left.bar_label(bars, [f"{measured / 1e3:,.0f} kB" for measured, _ in sizes.values()])
    left.set(yscale="log", ylim=(20, 12_000), ylabel="kB a token leaves in the cache")
    left.set_title("DeepSeek-V3's 61 layers, bfloat16", fontsize=10)
    if bench:
        right = panels[0, 1]
        for colour, form in zip((COLOURS[1], COLOURS[0]), ("naive", "absorbed"), strict=True):
            points = [(row["context"], row[form]) for row in bench["contexts"]]
            right.loglog(*zip(*points, strict=True), color=colour, marker="o", label=form)
        right.set(xlabel="tokens in the cache", ylabel="milliseconds for one more token")
        right.set_title("our model of --bench, measured", fontsize=10)
        right.legend(frameon=False)
    return finish(figure, ASSETS / "cache.png")


def balance(results: dict) -> Path:
    """MaxVio by step: 50 steps on skewed data, and in training where that was run."""
    trained = results.get("balance")
    figure, panels = plt.subplots(
        1, 2 if trained else 1, figsize=(9, 3.4), layout="constrained", squeeze=False
    )
    for colour, (way, label) in zip(("#7a7a7a", *COLOURS[1::-1]), WAYS.items(), strict=True):
        panels[0, 0].plot(results["skew"][way], color=colour, label=f"balanced by {label}")
        if trained:
            points = [(step, max(layers)) for step, *layers in trained[f"{way}-0"]["steps"]]
            panels[0, 1].plot(*zip(*points, strict=True), color=colour)
            panels[0, 1].set_title("in training, the worst layer", fontsize=10)
    panels[0, 0].set_title("a router on skewed data", fontsize=10)
    panels[0, 0].legend(frameon=False)
    for axes in panels[0]:
        axes.set(xlabel="step", ylabel="busiest expert above its share (MaxVio)", ylim=(0, None))
    return finish(figure, ASSETS / "balance.png")


def needle(results: dict) -> Path:
    """Two maps: share of needles found, by length of the text and depth of the needle."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axes, (when, found) in zip(panels, results["needle"].items(), strict=True):
        lengths = list(found)
        table = torch.tensor([found[length] for length in lengths]).T  # (depth, length)
        image = axes.imshow(table, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
        for row, column in itertools.product(*map(range, table.shape)):
            share = f"{100 * table[row, column]:.0f}"
            axes.text(column, row, share, ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
        axes.set_yticks((0, 7), ("begin", "end"))
        axes.set(xlabel="tokens of the text (512 in training)", title=f"{when} YaRN")
    panels[0].set_ylabel("where the needle lies")
    figure.colorbar(image, ax=panels, label="share found")
    return finish(figure, ASSETS / "needle.png")


def collect() -> dict:
    """Put the numbers that the README quotes from the runs that are there into results.json."""
    file = ASSETS / "results.json"
    results = read_json(file, optional=True)
    for table in (RUNS / "experiments").glob("*.json"):
        results[table.stem] = read_json(table)
    for bench in RUNS.glob("bench-*.json"):
        results[bench.stem] = read_json(bench)
    results["skew"] = {way: skewed_violations(way) for way in WAYS}
    write_json(file, results)
    return results


def main(args) -> None:
    """Draw all for which there are results, the curve from --weights or the shipped run."""
    matplotlib.use("Agg")
    results = collect()
    folder = Path(getattr(args, "weights", "") or HERE / "pretrained")
    drawn = [cache(results)]
    if (folder / "log.jsonl").exists():
        drawn.append(training_curve(folder, ASSETS))
    drawn.append(balance(results))
    if "needle" in results:
        drawn.append(needle(results))
    for file in drawn:
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
