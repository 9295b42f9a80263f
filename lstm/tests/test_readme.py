"""Every measured number in the README is the measured one, see assets/results.json."""

import json
import statistics
from pathlib import Path

import pytest

from model import SequenceModel
from train import ON_TRACK, RECIPES, SIZES, shipped_sizes

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
CEILINGS = json.loads((HERE / "data" / "reviews.json").read_text(encoding="utf-8"))
FLOOR = json.loads((HERE / "data" / "notes.json").read_text(encoding="utf-8"))["test"]


def spread(name: str, key: str, digits: int, factor: float = 1.0) -> str:
    """mean ± standard deviation over the seeds, as the README writes it."""
    values = [factor * run[key] for run in RESULTS[name]]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def measured() -> list[str]:
    """The rows of the tables of results and of speed."""
    per_char = 1 / FLOOR["nats_per_char"]
    rows = [
        f"| {spread('lm', 'nats_per_char', 4)} nats per character = "
        f"{spread('lm', 'nats_per_char', 3, per_char)} × the floor | floor "
        f"{FLOOR['nats_per_char']:.4f} |",
        f"| {spread('sentiment', 'expected', 2, 100)} % | best possible "
        f"{100 * RESULTS['sentiment'][0]['bayes']:.2f} % |",
        f"| {spread('bag', 'expected', 2, 100)} % | best possible for who only counts words "
        f"{100 * CEILINGS['bag_of_words_on_test']:.2f} % |",
    ]
    for name, trivial in (("adding600", "0.1667"), ("copy1000", "0.0204")):
        if name in RESULTS:
            rows.append(f"| {spread(name, 'loss', 5)} | {trivial} ")
    rows.append(f"| {RESULTS['adding600-0']['loss']:.5f} | 0.1667 ")
    bench = RESULTS["bench"]
    for kind, key in (("lstm", ""), ("gru", "gru_"), ("rnn", "rnn_")):
        speed, share = bench[f"train_{key}vs_torch"], bench[f"{kind}_gemm_fraction"]
        rows.append(f"| {kind.upper()} | {speed:.2f} × | {share:.0%}".replace("%", " %"))
    return rows


def test_measured_numbers_are_those_of_the_file():
    assert [row for row in measured() if row not in README] == []


def test_all_seeds_keep_the_promises():
    """What `--train` calls on track; at most 1 % below the best possible; the bag stays below."""
    assert all(run["nats_per_char"] <= ON_TRACK * FLOOR["nats_per_char"] for run in RESULTS["lm"])
    assert f"at most {ON_TRACK} × the floor" in README
    assert all(run["expected"] >= run["bayes"] - 0.01 for run in RESULTS["sentiment"])
    assert all(run["expected"] <= CEILINGS["bag_of_words_on_test"] + 0.01 for run in RESULTS["bag"])


@pytest.mark.parametrize("name", ["adding600", "copy1000"])
def test_long_tasks_are_beyond_the_trivial_lines(name):
    limit = {"adding600": 0.01, "copy1000": 0.0102}[name]
    if name not in RESULTS:
        assert name not in README  # nothing is said of what was not measured
        return
    assert all(run["loss"] <= limit for run in RESULTS[name])


def test_adding_over_600_steps_was_learned():
    assert RESULTS["adding600-0"]["loss"] <= 0.01


def test_parameters_are_counted():
    sizes = shipped_sizes("lm", SIZES["lm"])
    saved = json.loads((HERE / "pretrained" / "lm" / "config.json").read_text(encoding="utf-8"))
    n = sum(p.numel() for p in SequenceModel(type(sizes)(**saved["model"])).parameters())
    assert f"{n:,} parameters" in README


def test_shipped_models_are_the_default_runs():
    for task in ("lm", "sentiment"):
        folder = HERE / "pretrained" / task
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert saved["train"]["task"] == task and saved["train"]["steps"] == RECIPES[task].steps
