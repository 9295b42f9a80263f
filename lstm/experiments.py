"""The trainings behind the numbers of the README, three seeds each, and assets/results.json.

seeds   the default language model, the default sentiment model, and a bag of words (10 minutes)
changes what other cells and recipes do, one seed each (10 minutes)
long    adding over 600 steps and copy over 1,000 (an hour)
collect reads what is there already

A run that has reached its end is not trained again, so an experiment that was stopped goes on.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import bag
import reviews
import train
from model import SequenceConfig
from options import say
from run import RunDirectory, read_json, write_json

HERE = Path(__file__).resolve().parent
RUNS, RESULTS = HERE / "runs", HERE / "assets" / "results.json"
SEEDS = (0, 1, 2)
Recipe = tuple[train.TrainConfig, SequenceConfig]
LONG: dict[str, Recipe] = {
    "adding600": (
        replace(train.RECIPES["adding"], seq_len=600, steps=3000, eval_every=500),
        replace(train.SIZES["adding"], chrono=600),
    ),
    "copy1000": (
        replace(train.RECIPES["copy"], seq_len=1000, steps=4000, eval_every=500),
        replace(train.SIZES["copy"], chrono=1000),
    ),
}
SHORT: dict[str, Recipe] = {name: (train.RECIPES[name], train.SIZES[name])
                            for name in ("lm", "sentiment")}  # fmt: skip
SENTIMENT, ADDING = (
    (train.RECIPES["sentiment"], train.SIZES["sentiment"]),
    (
        replace(train.RECIPES["adding"], seq_len=100),
        replace(train.SIZES["adding"], chrono=100),
    ),
)
CHANGES: dict[str, Recipe] = {  # by the flags that make them out of the default
    "sentiment --cell rnn": (SENTIMENT[0], replace(SENTIMENT[1], cell="rnn")),
    "sentiment --cell gru": (SENTIMENT[0], replace(SENTIMENT[1], cell="gru")),
    "sentiment --forget-bias -2": (SENTIMENT[0], replace(SENTIMENT[1], forget_bias=-2.0)),
    "adding --chrono 100": ADDING,
    "adding --chrono 0": (ADDING[0], replace(ADDING[1], chrono=0)),
    "lm --no-carry": (replace(train.RECIPES["lm"], carry=False), train.SIZES["lm"]),
}
OTHERS = ("shakespeare", "sst2", "adding600-0")  # single runs, see the README


def finished(run_dir: RunDirectory) -> dict | None:
    """The test score of a run that reached its end, else None."""
    lines = [line for line in run_dir.history() if line["split"] == "test"]
    return lines[-1] if lines else None


def place(name: str, seed: int) -> RunDirectory:
    """Where the run of a recipe is."""
    return RunDirectory(RUNS / f"{name.replace(' --', '_').replace(' ', '_')}-{seed}")


def train_all(recipes: dict[str, Recipe], seeds: tuple[int, ...] = SEEDS) -> None:
    """Train what is not there yet, in float32."""
    for name, (config, sizes) in recipes.items():
        for seed in seeds:
            run_dir = place(name, seed)
            if finished(run_dir):
                say(f"there       {run_dir.path}")
                continue
            more = {"out": str(run_dir.path), "seed": seed, "dtype": "float32"}
            train.train(replace(config, **more), sizes, resume=run_dir.checkpoint.exists())


def bags() -> list[dict]:
    """The scores of the bag of words on our reviews."""
    lines = reviews.read("reviews")
    vocabulary = reviews.make_vocabulary(lines["train"], 1)
    parts = {part: reviews.encode(one, vocabulary) for part, one in lines.items()}
    n, n_class = vocabulary.vocab_size, len(vocabulary.classes)
    torch.set_num_threads(1)
    return [bag.score(bag.train(parts, n, n_class, seed), parts["test"]) for seed in SEEDS]


def collect() -> dict:
    """Write the scores of all runs that are there into results.json; keep what it has of others."""
    results = read_json(RESULTS, optional=True)
    for name in (*SHORT, *LONG):
        scores = [finished(place(name, seed)) for seed in SEEDS]
        if all(scores):
            results[name] = scores
    changes = {name: finished(place(name, 0)) for name in CHANGES}
    if all(changes.values()):
        results["changes"] = changes
    for name in OTHERS:
        if score := finished(RunDirectory(RUNS / name)):
            results[name] = score
    bench = read_json(RUNS / "bench.json", optional=True)
    if bench:
        results["bench"] = bench
    write_json(RESULTS, results)
    return results


def main(args: argparse.Namespace) -> None:
    """Do one of them; the last line is JSON."""
    if args.experiment == "long":
        train_all(LONG)
    if args.experiment == "changes":
        train_all(CHANGES, seeds=(0,))
    if args.experiment == "seeds":
        train_all(SHORT)
        write_json(RESULTS, read_json(RESULTS, optional=True) | {"bag": bags()})
    print(json.dumps(collect()))
