"""Trainings side by side: what shortcuts are for, what each part of the recipe is worth.

    residual   the claim of arXiv:1512.03385 §4.2, small: deeper plain networks train worse, deeper
               residual ones do not. The paper's networks of 20 and 56 layers, its optimizer and
               initialisation, on UCI digits instead of CIFAR-10; three seeds each
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
import train
from model import PRESETS, NetConfig
from options import UserError, say
from run import RunDirectory, read_json, write_json
from trainer import asked_for

RUNS = Path(__file__).resolve().parent / "runs"
SEEDS = (0, 1, 2)
DIGITS = Path(__file__).resolve().parent / "data" / "digits.npz"
# As in arXiv:1512.03385 §4.2: momentum 0.9, decay 1e-4, batches of 128, a rate of 0.1 divided by
# ten after half and three quarters of the steps. Not as there: 1,200 steps instead of 64,000;
# digits of 8 × 8 instead of CIFAR-10, neither moved nor mirrored; norms and biases do not decay.
PAPER = {"data": str(DIGITS), "optimizer": "sgd", "nesterov": False, "momentum": 0.9, "lr": 0.1,
         "schedule": "step", "batch_size": 128, "steps": 1200, "weight_decay": 1e-4,
         "label_smoothing": 0.0, "ema": 0.0, "views": False, "shift": 0, "flip": "off",
         "dtype": "float32"}  # fmt: skip
HE = {"zero_head": False}  # the last layer too begins with the variance of He et al.
RESIDUAL = ("plain20", "plain56", "resnet20", "resnet56")
ABLATION = {
    "the recipe": {},
    "sgd for muon": {"optimizer": "sgd", "lr": 0.4},
    "no average of views": {"views": False},
    "no mirror images": {"flip": "off"},
    "no shifts": {"shift": 0},
    "constant rate": {"schedule": "constant"},
    "no label smoothing": {"label_smoothing": 0.0},
}


def trained(folder: Path, config: train.TrainConfig, sizes: NetConfig) -> list[dict]:
    """The log of a run, trained if it is not there yet."""
    config = dataclasses.replace(config, out=str(folder))
    history = RunDirectory(folder).history()
    if not history or history[-1]["split"] != "test":
        say(f"── {folder.name}")
        history = train.train(config, sizes)
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
        "seconds": steps[-1]["train_seconds"],
        "first_loss": steps[0]["loss"],
        "board": report.board(history),
        "train_curve": [(line["step"], round(line["loss"], 4)) for line in steps],
        "valid_curve": [
            (line["step"], round(100 * line["accuracy"], 2))
            for line in history
            if line["split"] == "valid"
        ],
    }


def variants(name: str, base: train.TrainConfig) -> dict[str, tuple[dict, NetConfig]]:
    """What an experiment compares: the name of each variant, its changes of `base`, its network."""
    if name == "residual":
        return {size: (PAPER, dataclasses.replace(PRESETS[size], **HE)) for size in RESIDUAL}
    if name == "ablation":
        return {part: (changes, PRESETS["fast"]) for part, changes in ABLATION.items()}
    return {Path(base.data).name: ({}, PRESETS["fast"])}


def table(name: str, base: train.TrainConfig) -> dict[str, list[dict]]:
    """All outcomes of an experiment by the name of the variant, a run for each seed."""
    outcomes: dict[str, list[dict]] = {}
    for variant, (changes, sizes) in variants(name, base).items():
        outcomes[variant] = []
        for seed in SEEDS:
            folder = RUNS / name / f"{re.sub('[^a-z0-9]+', '-', variant)}-{seed}"
            config = dataclasses.replace(base, seed=seed, **changes)
            outcomes[variant].append(outcome(trained(folder, config, sizes)))
    return outcomes


def spread(values: list[float], scale: float = 100, digits: int = 2) -> str:
    """mean ± standard deviation."""
    mean, std = statistics.mean(values), statistics.stdev(values)
    return f"{scale * mean:.{digits}f} ± {scale * std:.{digits}f}"


def main(args) -> None:
    """Run one experiment and print its table; the last line is JSON."""
    base, _ = asked_for(args, train.TrainConfig(), PRESETS["fast"], ("shapes-10",))
    outcomes = table(args.experiment, base)
    print(f"{'':24s} {'train %':>16s} {'test %':>16s} {'seconds':>8s}")
    for variant, runs in outcomes.items():
        train_, test = (spread([r[key] for r in runs]) for key in ("train", "test"))
        seconds = statistics.mean(r["seconds"] for r in runs)
        print(f"{variant:24s} {train_:>16s} {test:>16s} {seconds:8.1f}")
    file = RUNS / args.experiment / "table.json"
    write_json(file, read_json(file, optional=True) | outcomes)
    print(json.dumps(outcomes))
