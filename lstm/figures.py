"""Every picture of this folder, drawn from runs and from the models that ship with it.

training_curve   loss or accuracy of a run, beside the best that is possible
cells            a text, coloured by the cells that count its quotation marks and its brackets
jacobians        how much of a state is felt after t steps, for each kind of cell
gates            what opens and closes while a review is read
"""

import argparse
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import cell_search
import cells
import checkpoint
import data
import train
from options import UserError, from_options, say
from run import RunDirectory, read_json, whole_file

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
LINE = 62  # letters in a line of the picture of a text
REVIEW = "although the plot was brilliant , the ending was not good ."


def save(figure, folder: Path, name: str) -> Path:
    """Write folder/name.png and close the figure."""
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / f"{name}.png") as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return folder / f"{name}.png"


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def best_possible(saved: dict) -> dict[str, float]:
    """The lines to draw beside the curve of a run: what they mean, and where they are."""
    config = saved["train"]
    task = config["task"]
    if task == "lm":
        floor = data.floor(config["data"], "valid")
        return {"floor, the entropy of the source": floor} if floor else {}
    if task == "sentiment" and config["data"] == "reviews":
        ceilings = read_json(data.CEILINGS)
        return {"best possible": ceilings["bayes"], "best for who only counts words":
                ceilings["bag_of_words"]}  # fmt: skip
    if task in ("adding", "copy"):
        return {"who remembers nothing": data.trivial(task, config["seq_len"])}
    return {}


def draw_run(axes, folder: Path) -> None:
    """One run: every logged number of the training and the validation part, and the limits."""
    saved, lines = read_json(folder / "config.json"), RunDirectory(folder).history()
    task = saved["train"]["task"]
    name = {"lm": "nats_per_char", "sentiment": "expected"}.get(task, "loss")
    if not any(name in line for line in lines):
        name = "accuracy" if task == "sentiment" else "loss"
    shown = {"nats_per_char": "loss", "expected": "accuracy"}.get(name, name)
    train_lines = [line for line in lines if line["split"] == "train" and shown in line]
    valid = [line for line in lines if line["split"] == "valid" and name in line]
    axes.plot([x["step"] for x in train_lines], [x[shown] for x in train_lines], color="0.7",
              label="training batches")  # fmt: skip
    axes.plot([x["step"] for x in valid], [x[name] for x in valid], "o-", ms=4, label="validation")
    for number, (label, value) in enumerate(best_possible(saved).items()):
        axes.axhline(value, color=("tab:red", "tab:purple")[number], ls="--", lw=1.2)
        axes.text(1, value, f" {label}, {value:.3g}", va="bottom", fontsize=9)
    axes.set_xlabel("step")
    label = {"nats_per_char": "nats per character", "expected": "accuracy to expect"}
    axes.set_ylabel(label.get(name, name))
    if task != "sentiment":
        axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=9)


def training_curve(run_dir: Path, folder: Path) -> Path:
    """The curve of one run."""
    figure, axes = plt.subplots(figsize=(7, 3.6))
    draw_run(axes, run_dir)
    return save(figure, folder, "training")


def both_curves(language: Path, sentiment: Path) -> Path:
    """The two default runs side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for axes, folder, title in (
        (left, language, "language model"),
        (right, sentiment, "sentiment"),
    ):
        draw_run(axes, folder)
        axes.set_title(title)
    return save(figure, ASSETS, "training")


# ── Cells over text ───────────────────────────────────────────────────────────────────────────────


def note_to_show(text: str) -> str:
    """A note with a quotation and brackets in brackets, of some six lines."""
    for note in text.split("\n"):
        fits = 250 < len(note) < 6 * LINE and note.count('"') == 2 and "))" in note
        if fits and ")" in note[note.index('"') : note.rindex('"')]:
            return note + "\n"
    raise UserError("no note shows all that the picture is for")


def draw_text(axes, text: str, values: torch.Tensor, title: str) -> None:
    """Letters in lines, each on the colour of a value between −1 and 1."""
    n_line = math.ceil(len(text) / LINE)
    table = torch.full((n_line * LINE,), math.nan)
    table[: len(text)] = values
    axes.imshow(table.view(n_line, LINE), cmap="RdBu_r", vmin=-1.3, vmax=1.3, aspect="auto")
    for i, letter in enumerate(text.replace("\n", "↵")):
        axes.text(i % LINE, i // LINE, letter, ha="center", va="center", family="DejaVu Sans Mono",
                  fontsize=9)  # fmt: skip
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=11, loc="left")


def cells_over_text(loaded: checkpoint.Loaded) -> Path:
    """The cells that count quotations and brackets, over a note of the test part."""
    text = data.NOTES.read_text(encoding="utf-8")[-40_000:]
    text = text[text.index("\n") + 1 :]
    found = {one.quantity: one for one in cell_search.search(loaded, text[:8000])}
    note = note_to_show(text[8000:])
    start = text.index(note)
    values = cell_search.cell_values(loaded, text[start - 600 : start + len(note)])[:, -len(note) :]
    quantities = cell_search.quantities(note)
    figure, rows = plt.subplots(2, 1, figsize=(10, 4.6))
    for axes, name in zip(rows, cell_search.QUANTITIES[:2], strict=True):
        one, quantity = found[name], quantities[cell_search.QUANTITIES.index(name)]
        sign = 1 if (values[one.cell] * (quantity - quantity.mean())).sum() >= 0 else -1
        title = (
            f"cell {one.cell} of {len(values)} follows: {name} (correlation {one.correlation:.2f})"
        )
        draw_text(axes, note, sign * values[one.cell], title)
        say(f"           {title}")
    figure.tight_layout()
    return save(figure, ASSETS, "cells")


# ── Gradients through time ────────────────────────────────────────────────────────────────────────


def starting_cells(d_model: int = 64, longest: int = 200) -> dict[str, cells.Cell]:
    """New cells, as training would begin with them."""
    torch.manual_seed(0)
    made = {"RNN": cells.RNN(8, d_model), "GRU": cells.GRU(8, d_model)}
    for name, bias in (("LSTM, forget bias 0", 0.0), ("LSTM, forget bias 1", 1.0)):
        made[name] = cells.LSTM(8, d_model)
        cells.set_forget_bias(made[name], bias)
    made["LSTM, chrono"] = cells.LSTM(8, d_model)
    cells.set_chrono_bias(made["LSTM, chrono"], longest)
    made["GRU, chrono"] = cells.GRU(8, d_model)
    cells.set_chrono_bias(made["GRU, chrono"], longest)
    return {name: cell.double() for name, cell in made.items()}


def jacobian_norms(n_step: int = 200) -> dict[str, torch.Tensor]:
    """‖∂h_T/∂s_t‖ of new cells over random inputs, by the distance T − t: (T,) each."""
    x = torch.randn(n_step, 8, generator=torch.Generator().manual_seed(1)).double()
    return {name: cells.jacobians(cell, x).flip(0) for name, cell in starting_cells().items()}


def jacobian_curves() -> Path:
    """How the gradient fades with the distance."""
    figure, axes = plt.subplots(figsize=(7.5, 4))
    for name, norms in jacobian_norms().items():
        axes.semilogy(range(1, len(norms) + 1), norms.clamp(min=1e-30), label=name)
    axes.set(xlabel="steps between cause and effect, T − t", ylabel="‖∂h_T / ∂(state at t)‖",
             ylim=(1e-16, 10))  # fmt: skip
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left")
    return save(figure, ASSETS, "jacobians")


# ── Gates ─────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def gates_of(loaded: checkpoint.Loaded, review: str) -> tuple[list[str], dict, list[float]]:
    """(words, the gates i, f, o and the cell c after each, (T, H), and P(label 1) after each).

    UserError for a network that is not one layer of plain LSTM.
    """
    model, sizes = loaded.model, loaded.model.config
    if sizes.cell != "lstm" or sizes.n_layer > 1 or sizes.bidirectional or sizes.d_proj:
        raise UserError("gates are drawn for one layer of LSTM")
    ids = torch.tensor(loaded.words.encode(review))
    cell, found, likely = model.layers[0].directions[0], [], []
    state = cell.start(1)
    for a in cell.inputs(model.embedding(ids)):
        i, f, _, o, c = cell.gates(a[None], state)
        state = (o * torch.tanh(c), c)
        found.append((i[0], f[0], o[0], c[0]))
        likely.append(model.head(state[0]).softmax(dim=-1)[0, 1].item())
    parts = [torch.stack(part) for part in zip(*found, strict=True)]
    return review.split(), dict(zip("ifoc", parts, strict=True)), likely


def gates_over_review(loaded: checkpoint.Loaded) -> Path:
    """The gates of the cells that change most, and the verdict after each word."""
    words, gates, likely = gates_of(loaded, REVIEW)
    busiest = gates["c"].std(dim=0).argsort(descending=True)[:16]
    titles = {"i": "write: i", "f": "keep: f", "o": "show: o", "c": "the cell: tanh c"}
    figure, rows = plt.subplots(1, 5, figsize=(13, 4), sharey=True, width_ratios=[1, 1, 1, 1, 0.8])
    for axes, (name, title) in zip(rows, titles.items(), strict=False):
        values, low = gates[name][:, busiest], 0
        if name == "c":
            values, low = torch.tanh(values), -1
        axes.imshow(values, cmap="RdBu_r" if low else "viridis", vmin=low, vmax=1, aspect="auto")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("16 cells")
        axes.set_xticks([])
    rows[0].set_yticks(range(len(words)), words, fontsize=11)
    rows[-1].barh(range(len(words)), likely, color="tab:green")
    rows[-1].axvline(0.5, color="0.4", lw=1)
    rows[-1].set(xlim=(0, 1), title="P(positive) so far")
    rows[-1].title.set_fontsize(11)
    figure.tight_layout()
    return save(figure, ASSETS, "gates")


def main(args: argparse.Namespace) -> None:
    """Draw assets/ anew, from the shipped models or, of a language model, from --weights."""
    asked = from_options(train.TrainConfig(), args).weights
    shipped = HERE / "pretrained"
    language = checkpoint.load(asked or shipped / "lm")
    sentiment = checkpoint.load(shipped / "sentiment")
    drawn = [
        cells_over_text(language),
        both_curves(language.folder, sentiment.folder),
        jacobian_curves(),
        gates_over_review(sentiment),
    ]
    for picture in drawn:
        say(f"picture    {picture}")
