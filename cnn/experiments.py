"""Trainings side by side: what shortcuts are for, what each part of the recipe is worth.

    residual   the claim of arXiv:1512.03385 §4.2, small: deeper plain networks train worse, deeper
               residual ones do not. The paper's networks of 20 and 56 layers on UCI digits,
               three seeds each
    ablation   the default recipe less one part at a time, three seeds each
    seeds      the default recipe with three seeds, on --data too if given

Each training is a run of its own in runs/NAME/, and one that is there already is not repeated. The
outcome is a table, and runs/NAME/table.json.
"""

import dataclasses
import json
import re
import statistics
from pathlib import Path

import report
import run
import train
from model import PRESETS
from run import UserError, say

RUNS = Path(__file__).resolve().parent / "runs"
SEEDS = (0, 1, 2)
DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
# The paper's optimizer and learning rate (0.1 for 128 pictures), none of our tricks, 200 steps.
PAPER = {"data": str(DIGITS), "optimizer": "sgd", "lr": 0.05, "batch_size": 64, "steps": 200,
         "weight_decay": 1e-4, "label_smoothing": 0.0, "ema": 0.0, "views": False}  # fmt: skip
RESIDUAL = {f"{kind}{depth}": (kind, depth) for kind in ("plain", "resnet") for depth in (20, 56)}
ABLATION = {
    "the recipe": {},
    "sgd for muon": {"optimizer": "sgd", "lr": 0.4},
    "no average of views": {"views": False},
    "no mirror images": {"flip": "off"},
    "no shifts": {"shift": 0},
    "constant rate": {"schedule": "constant"},
    "no label smoothing": {"label_smoothing": 0.0},
}


def trained(folder: Path, config: train.TrainConfig, size: str) -> list[dict]:
    """The log of a run, trained if it is not there yet."""
    config = dataclasses.replace(config, out=str(folder))
    history = run.RunDirectory(folder).history()
    if not history or history[-1]["split"] != "test":
        say(f"── {folder.name}")
        history = train.train(config, PRESETS[size])
    if history[-1]["split"] != "test":
        raise UserError(
            f"{folder} is not finished: the same command begins it anew, after the rest"
        )
    return history


def outcome(history: list[dict]) -> dict:
    """What a table needs of one run. Training loss and accuracy: means of the last tenth."""
    steps = [line for line in history if line["split"] == "train"]
    last = steps[-max(1, len(steps) // 10) :]
    return {
        "test": history[-1]["accuracy"],
        "train": statistics.mean(line["accuracy"] for line in last),
        "train_loss": statistics.mean(line["loss"] for line in last),
        "seconds": history[-1]["train_seconds"],
        "first_loss": steps[0]["loss"],
        "board": report.board(history),
        "train_curve": [(line["step"], round(line["loss"], 4)) for line in steps],
        "valid_curve": [
            (line["step"], round(100 * line["accuracy"], 2))
            for line in history
            if line["split"] == "valid"
        ],
    }


def table(name: str, base: train.TrainConfig) -> dict[str, list[dict]]:
    """All outcomes of an experiment by the name of the variant."""
    if name == "residual":
        variants = {v: (PAPER, v) for v in RESIDUAL}
    elif name == "ablation":
        variants = {v: (changes, "fast") for v, changes in ABLATION.items()}
    else:
        variants = {Path(base.data).name: ({}, "fast")}
    found = {}
    for variant, (changes, size) in variants.items():
        found[variant] = [
            outcome(
                trained(
                    RUNS / name / f"{re.sub('[^a-z0-9]+', '-', variant)}-{seed}",
                    dataclasses.replace(base, seed=seed, **changes),
                    size,
                )
            )
            for seed in SEEDS
        ]
    return found


def spread(values: list[float], scale: float = 100, digits: int = 2) -> str:
    """mean ± standard deviation."""
    mean, std = statistics.mean(values), statistics.stdev(values)
    return f"{scale * mean:.{digits}f} ± {scale * std:.{digits}f}"


def main(args) -> None:
    """Run one experiment and print its table; the last line is JSON."""
    base = train.absolute(run.from_options(train.TrainConfig(), args))
    found = table(args.experiment, base)
    print(f"{'':24s} {'train %':>16s} {'test %':>16s} {'seconds':>8s}")
    for variant, runs in found.items():
        train_, test = (spread([r[key] for r in runs]) for key in ("train", "test"))
        seconds = statistics.mean(r["seconds"] for r in runs)
        print(f"{variant:24s} {train_:>16s} {test:>16s} {seconds:8.1f}")
    file = RUNS / args.experiment / "table.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    run.write_json(file, before | found)
    print(json.dumps(found))
