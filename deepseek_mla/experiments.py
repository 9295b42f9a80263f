"""Trainings side by side, and the needle.

    seeds     the default run with three seeds: the table of the README
    balance   the experts balanced by biases, by a loss, by nothing, one seed each
    needle    long texts before and after YaRN, see needle.py

Each training is a run of its own in runs/experiments/, and one that is there already is not
repeated. The outcome is a table, and runs/experiments/NAME.json.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import data
import needle
import train
from model import PRESETS
from options import UserError, say
from run import RunDirectory, write_json
from trainer import asked_for

RUNS = Path(__file__).resolve().parent / "runs" / "experiments"
EXPERIMENTS = {  # (way of balancing, seed) of each run
    "seeds": {f"bias-{seed}": ("bias", seed) for seed in (0, 1, 2)},
    "balance": {f"{balance}-0": (balance, 0) for balance in train.BALANCE},
}


def trained(name: str, config: train.TrainConfig) -> list[dict]:
    """The log of a run, trained if it is not there yet, or from where it was stopped."""
    run_dir = RunDirectory(RUNS / name)
    history = run_dir.history()
    if not history or history[-1]["split"] != "test":
        say(f"── {name}")
        config = dataclasses.replace(config, out=str(RUNS / name))
        history = train.train(config, PRESETS["tiny"], resume=run_dir.checkpoint.exists())
    if history[-1]["split"] != "test":
        raise UserError(f"{RUNS / name} is not finished: the same command goes on with it")
    return history


def outcome(history: list[dict], source: str) -> dict:
    """What tables and pictures need of one run."""
    test, valid = history[-1], [line for line in history if line["split"] == "valid"]
    steps = [line for line in history if line["split"] == "train"]
    n_layer = sum(name.startswith("violation_") for name in steps[0])
    floor = data.floor(source, "valid")
    return {
        "times_floor": round(test["nats_per_char"] / data.floor(source, "test"), 4),
        "recall": round(test["recall"], 4),
        "accepted": round(test["accepted"], 4),
        "violation": round(max(test["violation"]), 3),
        "forms": max(line["forms"] for line in valid),
        "seconds": steps[-1]["train_seconds"],
        "valid": [
            (line["step"], round(line["nats_per_char"] / floor, 4), round(line["recall"], 4),
             round(line["accepted"], 4))
            for line in valid
        ],
        "steps": [
            (line["step"], *(round(line[f"violation_{i}"], 3) for i in range(n_layer)))
            for line in steps
        ],
    }  # fmt: skip


def spread(values: list[float], digits: int = 3) -> str:
    """mean ± standard deviation, or the value itself where there is one alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(args) -> None:
    """Run one experiment and print its table; the last line is JSON."""
    if args.experiment == "needle":
        needle.main(args)
        return
    base, _ = asked_for(args, train.TrainConfig(), PRESETS["tiny"], data.INSIDE)
    if not data.is_ours(base.data):
        raise UserError("--experiment compares with the entropy of --data recall: leave --data")
    outcomes: dict[str, dict] = {}
    print(
        f"{'':10s}{'× the floor':>14s}{'recall':>10s}{'accepted':>10s}{'violation':>11s}{'s':>6s}"
    )
    for name, (balance, seed) in EXPERIMENTS[args.experiment].items():
        config = dataclasses.replace(base, seed=seed, balance=balance)
        found = outcomes[name] = outcome(trained(name, config), base.data)
        print(f"{name:10s}{found['times_floor']:14.3f}{found['recall']:10.0%}"
              f"{found['accepted']:10.0%}{found['violation']:11.2f}"
              f"{found['seconds']:6.0f}")  # fmt: skip
    write_json(RUNS / f"{args.experiment}.json", outcomes)
    print(json.dumps(outcomes))
