"""Trainings side by side: is the mixture worth it, and which way of balancing?

    dense     the mixture; a dense model with as many parameters as work on a token; and a mixture
              that is told the dialect, which is as well as a router could do
    balance   the mixture with each way of balancing and with none

Three seeds each. Each training is a run of its own in runs/experiments/, and one that is there
already is not repeated. The outcome is a table, and runs/experiments/NAME.json.
"""

import dataclasses
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

import data
import train
from data import N_DIALECT
from model import PRESETS, Mixtral, MixtralConfig
from moe import Routing, SoftmaxRouter
from options import UserError, say
from run import RunDirectory, read_json, write_json
from tokenizer import Tokenizer
from trainer import asked_for

RUNS = Path(__file__).resolve().parent / "runs" / "experiments"
SEEDS = (0, 1, 2)
EXPERIMENTS = {  # the variants of each: the size and the way of balancing
    "dense": {"mixture": ("tiny", "loss"), "dense": ("dense", "none"), "told": ("tiny", "none")},
    "balance": {"mixture": ("tiny", "loss")}
    | {name: ("tiny", name) for name in train.BALANCE if name != "loss"},
}


class ToldRouter(SoftmaxRouter):
    """Sends each dialect to two experts of its own: experts 2d and 2d + 1, half and half.

    It is told no more than a reader knows: the dialect of the last word that only one of them has.
    """

    dialects: Tensor  # (N,), set by `tell` before each pass

    def forward(self, x: Tensor, counted: Tensor | None) -> Routing:
        first = 2 * self.dialects.flatten()
        chosen = torch.stack((first, first + 1), dim=-1)
        return Routing(x.new_zeros(len(x), len(self.bias)), chosen, x.new_full(chosen.shape, 0.5))


def tell(model: Mixtral, tokenizer: Tokenizer) -> None:
    """Give `model` routers that are told the dialects of the tokens it reads."""
    dialect_of = dialect_table(tokenizer, model.config.vocab_size)
    sizes = model.config
    for block in model.blocks:
        router = ToldRouter(sizes.d_model, sizes.n_expert, sizes.n_active)
        block.ffn.router = router.to(model.embedding.weight.device)

    def listen(_, inputs: tuple) -> None:
        dialects = latest_known(dialect_of.to(inputs[0].device)[inputs[0]])
        for block in model.blocks:
            block.ffn.router.dialects = dialects

    model.register_forward_pre_hook(listen)


def dialect_table(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The dialect of every token that is a word of one dialect alone, −1 for the others: (V,)."""
    table = torch.full((vocab_size,), -1)
    for dialect, words in enumerate(data.telling_words()):
        for word in words:
            for before in ("", " "):
                ids = tokenizer.encode_text(before + word)
                if len(ids) == 1:
                    table[ids[0]] = dialect
    if len(set(table.tolist())) != N_DIALECT + 1:
        raise UserError("this experiment needs a tokenizer whose tokens are the words")
    return table


def latest_known(dialects: Tensor) -> Tensor:
    """The last entry up to each place that is not −1; 0 before the first. (B, T) to (B, T)."""
    place = torch.arange(dialects.shape[1], device=dialects.device).expand_as(dialects)
    latest = place.masked_fill(dialects < 0, 0).cummax(dim=1).values
    return dialects.gather(1, latest).clamp(min=0)


def trained(name: str, config: train.TrainConfig, sizes: MixtralConfig) -> list[dict]:
    """The log of a run, trained if it is not there yet, or from where it was stopped."""
    folder = RUNS / f"{name}-{config.seed}"
    run_dir = RunDirectory(folder)
    history = run_dir.history()
    # a router that is told learns nothing, so its checkpoint has no moments to go on from
    resume = run_dir.checkpoint.exists() and name != "told"
    if not history or history[-1]["split"] != "test":
        say(f"── {folder.name}")
        config = dataclasses.replace(config, out=str(folder))
        change = tell if name == "told" else None
        history = train.train(config, sizes, resume=resume, change=change)
    if history[-1]["split"] != "test":
        raise UserError(f"{folder} is not finished: the same command goes on with it")
    return history


def outcome(history: list[dict], source: str) -> dict:
    """What tables and pictures need of one run."""
    test = history[-1]
    steps = [line for line in history if line["split"] == "train"]
    n_layer, n_expert = len(test["load"]), len(test["load"][0])
    floor = data.floor(source, "test")
    return {
        "times_floor": round(test["nats_per_char"] / floor, 4),
        "excess": round(test["nats_per_char"] - floor, 5),
        "informed": round(train.informed(test), 4),
        "busiest": round(max(test["busiest"]), 3),
        "dead": sum(test["dead_experts"]),
        "same_first": [round(x, 4) for x in test["same_first"]],
        "same_any": [round(x, 4) for x in test["same_any"]],
        "dropped": round(statistics.mean(line["dropped"] for line in steps), 4),
        "seconds": steps[-1]["train_seconds"],
        "valid": [
            (line["step"], round(line["nats_per_char"] / data.floor(source, "valid"), 4),
             round(train.informed(line), 4))
            for line in history if line["split"] == "valid"
        ],
        "load": [
            (line["step"], [round(line[f"load_{n_layer - 1}_{e}"], 3) for e in range(n_expert)])
            for line in steps[::10]
        ],
    }  # fmt: skip


def spread(values: list[float], digits: int = 3) -> str:
    """mean ± standard deviation, or the value itself where there is one alone."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(args) -> None:
    """Run one experiment and print its table; the last line is JSON."""
    base, _ = asked_for(args, train.TrainConfig(), PRESETS["tiny"], data.INSIDE)
    if not data.is_ours(base.data):
        raise UserError("--experiment compares with the entropy of --data dialects: leave --data")
    outcomes: dict[str, list[dict]] = {}
    for name, (size, balance) in EXPERIMENTS[args.experiment].items():
        outcomes[name] = []
        for seed in SEEDS:
            config = dataclasses.replace(base, seed=seed, balance=balance)
            history = trained(name, config, PRESETS[size])
            outcomes[name].append(outcome(history, base.data))
    print(f"{'':10s}{'× the floor':>16s}{'information':>16s}{'busiest':>16s}{'dead':>6s}{'s':>6s}")
    for name, runs in outcomes.items():
        columns = [spread([r[key] for r in runs]) for key in ("times_floor", "informed", "busiest")]
        dead, seconds = (statistics.mean(r[key] for r in runs) for key in ("dead", "seconds"))
        print(f"{name:10s}" + "".join(f"{c:>16s}" for c in columns) + f"{dead:6.1f}{seconds:6.0f}")
    file = RUNS / f"{args.experiment}.json"
    write_json(file, read_json(file, optional=True) | outcomes)
    print(json.dumps(outcomes))
