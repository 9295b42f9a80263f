"""Every measured number in the README is the measured one, see assets/results.json."""

import json
import statistics
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import train
from model import PRESETS

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def spread(values: list[float], digits: int) -> str:
    """mean ± standard deviation, as the README writes it."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def measured() -> list[str]:
    """The numbers of the results section, as they should read."""
    runs, texts = RESULTS["grammar"], []
    gaps = [run["loss"] - run["floor"] for run in runs]
    texts.append(f"| {spread(gaps, 4)} |")
    texts.append(f"| {spread([run['bleu'] for run in runs], 2)} |")
    texts.append(f"| {spread([run['chrf'] for run in runs], 2)} |")
    texts.append(f"| {data.load('grammar').ceiling('test'):.2f} |")
    texts += [f"{seconds:.0f} s" for seconds in RESULTS["timed"].values()]
    texts.append(f"{RESULTS['first_loss']:.2f} nats")
    best = min(min(row) for row in RESULTS["error_rates"])
    texts.append(f"{best:.2f}")
    bench = RESULTS.get("bench-float32", {})
    names = ("train_vs_torch", "train_vs_torch_no_dropout",
             "decode_cached_vs_uncached_32", "decode_cached_vs_uncached_128")  # fmt: skip
    texts += [f"{bench[name]:.2f} ×" for name in names if name in bench]
    decoding = RESULTS["bench-decode-float32"]
    names = ("decode_vs_hf", "decode_vs_hf_b8", "decode_vs_hf_7m")
    return texts + [f"| {decoding[name]:.2f} × |" for name in names]


@pytest.mark.parametrize("said", measured())
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


def test_the_promise_is_kept_by_every_seed():
    """What `--train` calls on track."""
    for run in RESULTS["grammar"]:
        assert run["loss"] - run["floor"] <= train.GAP and run["bleu"] >= train.BLEU


def test_parameters_are_counted():
    for name in ("base", "big"):
        assert f"{PRESETS[name].n_parameter / 1e6:.1f}" in README
    assert f"{PRESETS['tiny'].n_parameter / 1e6:.1f} million" in README


def test_the_shipped_model_is_what_the_log_beside_it_says():
    """float16 storage costs next to nothing: loss of the test part, and its BLEU by beam search."""
    loaded = checkpoint.load(HERE / "pretrained")
    score = train.test_scores(loaded, data.load("grammar"), "test", torch.float32)
    log = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [x for x in map(json.loads, log) if x["split"] == "test"][-1]
    assert score["loss"] == pytest.approx(logged["loss"], abs=0.001)
    assert score["bleu"] == pytest.approx(logged["bleu"], abs=0.3)
    assert score["loss"] - score["floor"] <= train.GAP and score["bleu"] >= train.BLEU


def test_the_shipped_model_is_small():
    size = sum(file.stat().st_size for file in (HERE / "pretrained").iterdir())
    assert size < 3_000_000
