"""Every picture of the README, from saved runs and from `assets/results.json`.

experts.png   a text, coloured by the expert that each word goes to first (2401.04088, Figure 8)
curve.png     mixture, dense model and told mixture against the entropy of the dialects
load.png      how the work of the experts shifts in training, with and without balancing
dispatch.png  which way to dispatch is the fastest, by tokens and experts
"""

import itertools
import json
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt

import checkpoint
import data
import text
from moe import recording
from options import say
from run import RunDirectory, read_json, write_json

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
COLOURS = ("#1b4f8a", "#e08e0b", "#2a7d46", "#b03a5b", "#6f4aa0", "#8a5a2b", "#0f8b8d", "#7a7a7a")
NAMES = {"mixture": "8 experts, 2 active", "dense": "dense, as many active parameters",
         "told": "8 experts, told the dialect"}  # fmt: skip
BALANCES = {"none": "without balancing", "mixture": "with the balancing loss"}
WIDTH, LINES = 66, 3  # of a text in the picture, in characters and lines


def finish(figure: plt.Figure, file: Path) -> Path:
    """Write the picture and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def history(folder: Path, split: str) -> list[dict]:
    """The logged lines of one split."""
    return [line for line in RunDirectory(folder).history() if line["split"] == split]


def training_curve(folder: Path, target: Path) -> Path:
    """Loss and load by step of the run in `folder`: what `--train` leaves."""
    matplotlib.use("Agg")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]
    train, valid = history(folder, "train"), history(folder, "valid")
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
    layer, n_expert = len(valid[-1]["load"]) - 1, len(valid[-1]["load"][0])
    curves = [(x["step"], [x[f"load_{layer}_{e}"] for e in range(n_expert)]) for x in train]
    draw_load(right, curves, f"work of the experts of layer {layer}")
    return finish(figure, target / "curve.png")


def draw_load(axes: plt.Axes, curves: list, title: str) -> None:
    """A line for each expert: its work × the number of experts, so that 1 is an even share."""
    steps, shares = zip(*curves, strict=True)
    for expert, line in enumerate(zip(*shares, strict=True)):
        axes.plot(steps, line, color=COLOURS[expert % len(COLOURS)], linewidth=1.2)
    axes.axhline(1.0, color="#888888", linestyle=":")
    axes.set(xlabel="step", ylabel="work, × an even share", title=title, ylim=(0, None))


@torch.no_grad()
def text_by_expert(loaded: checkpoint.Loaded) -> Path:
    """One held-out text of each dialect, each word on the colour of its first expert."""
    tokens = text.tokens_of(data.measure("dialects"), loaded.tokenizer, "test")
    labels = data.labels(tokens, loaded.tokenizer)
    figure, axes = plt.subplots(figsize=(9, 4.6))
    row = 0
    n_token = loaded.model.config.seq_len
    for dialect in range(data.N_DIALECT):
        long_enough = [
            int(begin)
            for begin, end in itertools.pairwise(tokens.bounds)
            if labels.ids[begin + 1] == dialect and end - begin > n_token
        ]
        begin = long_enough[0]
        ids = torch.from_numpy(tokens.ids[begin : begin + n_token].astype(int))[None]
        with recording(loaded.model) as record:
            loaded.model(ids)
        first = record[-1].chosen[:, 0].tolist()
        words = [loaded.tokenizer.decode([i]).strip() for i in ids[0].tolist()]
        axes.text(0, row, f"dialect {dialect}", fontsize=9, color="#555555", family="monospace")
        row = write_words(axes, words, first, row + 1) + 0.6
    for expert in range(loaded.model.config.n_expert):
        box = {"facecolor": COLOURS[expert % 8], "edgecolor": "none", "pad": 1.5}
        axes.text(2 + 8 * expert, row, f"expert {expert}", fontsize=8, color="white", bbox=box)
    axes.set(xlim=(0, WIDTH + 2), ylim=(row + 0.6, -0.8))
    axes.axis("off")
    return finish(figure, ASSETS / "experts.png")


def write_words(axes: plt.Axes, words: list[str], experts: list[int], row: float) -> float:
    """Some lines of coloured words; returns the row below them."""
    column, last = 0, row + LINES - 1
    for word, expert in zip(words, experts, strict=True):
        if not word:
            continue
        if column + len(word) > WIDTH:
            column, row = 0, row + 1
        if row > last:
            break
        box = {"facecolor": COLOURS[expert % len(COLOURS)], "edgecolor": "none", "pad": 1.2}
        axes.text(column, row, word, color="white", fontsize=9, family="monospace", bbox=box)
        column += len(word) + 1
    return last + 1


def comparison(results: dict) -> Path:
    """Left: loss by step of the three models. Right: what their experts know of the dialect."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for colour, (name, label) in zip(COLOURS, NAMES.items(), strict=False):
        for i, run in enumerate(results["dense"].get(name, [])):
            steps, ratios, known = zip(*run["valid"], strict=True)
            left.plot(steps, ratios, color=colour, linewidth=1, label=None if i else label)
            if name == "mixture":
                right.plot(steps, known, color=colour, linewidth=1, label=f"seed {i}")
    left.axhline(1.0, color="#c0392b", linestyle="--", label="floor, the entropy of the dialects")
    left.set(xlabel="step", ylabel="validation loss, × the floor", ylim=(0.98, 1.6))
    left.set_title("three seeds each", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    right.axhline(1.0, color="#c0392b", linestyle="--", label="the maximum, ln 4 nats")
    right.set(xlabel="step", ylabel="share of the maximum", ylim=(0, 1.05))
    right.set_title("information of the chosen experts about the dialect", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return finish(figure, ASSETS / "curve.png")


def load_over_time(results: dict) -> Path:
    """The last layer of one seed without and with the balancing loss."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axes, (name, title) in zip(panels, BALANCES.items(), strict=True):
        draw_load(axes, results["balance"][name][0]["load"], title)
    return finish(figure, ASSETS / "load.png")


def dispatch(results: dict) -> Path:
    """Milliseconds by tokens, a panel for each number of experts."""
    table = results["bench-float32"]["dispatch"]
    counts = sorted({row["experts"] for row in table})
    figure, panels = plt.subplots(1, len(counts), figsize=(9, 3.2), layout="constrained",
                                  sharey=True)  # fmt: skip
    for axes, n_expert in zip(panels, counts, strict=True):
        rows = [row for row in table if row["experts"] == n_expert]
        for colour, way in zip(COLOURS, ("grouped", "loop", "dense"), strict=False):
            known = [(row["tokens"], row[way]) for row in rows if way in row]
            axes.loglog(*zip(*known, strict=True), color=colour, marker="o", label=way)
        axes.set(xlabel="tokens", title=f"{n_expert} experts, 2 active")
    panels[0].set_ylabel("forward and backward, ms")
    panels[0].legend(frameon=False)
    return finish(figure, ASSETS / "dispatch.png")


def collect() -> dict:
    """Put the numbers that the README quotes from the runs that are there into results.json."""
    file = ASSETS / "results.json"
    results = read_json(file, optional=True)
    for table in (RUNS / "experiments").glob("*.json"):
        results[table.stem] = read_json(table)
    for bench in RUNS.glob("bench-*.json"):
        results[bench.stem] = read_json(bench)
    write_json(file, results)
    return results


def main(args) -> None:
    """Draw all of them, the text by --weights or else by the shipped model."""
    matplotlib.use("Agg")
    results = collect()
    loaded = checkpoint.load(Path(getattr(args, "weights", HERE / "pretrained")))
    drawn = [text_by_expert(loaded), comparison(results)]
    if "none" in results["balance"]:
        drawn.append(load_over_time(results))
    if "bench-float32" in results:
        drawn.append(dispatch(results))
    for file in drawn:
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
