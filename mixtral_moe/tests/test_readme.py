"""Every measured number in the README is the measured one, see assets/results.json."""

import difflib
import hashlib
import json
import statistics
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import experiments
import text
import train
from usage import repeats_by_chance

HERE = Path(__file__).resolve().parent.parent
LLAMA = HERE.parent / "llama" / "model.py"
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    """mean ± standard deviation, as the README writes it; of one value the value."""
    return experiments.spread([factor * value for value in values], digits)


def row(runs: list[dict]) -> str:
    """The columns of a table of runs."""
    columns = [spread([run["times_floor"] for run in runs], 3)]
    columns.append(spread([run["excess"] for run in runs], 4))
    columns.append(spread([run["informed"] for run in runs], 0, 100) + " %")
    columns.append(spread([run["busiest"] for run in runs], 2))
    columns.append(f"{statistics.mean(run['dead'] for run in runs):.1f}")
    return " | ".join(columns)


def measured() -> list[str]:
    """The numbers of the results section, as they should read."""
    texts = [row(runs) for name in ("dense", "balance") for runs in RESULTS[name].values()]
    texts.append(f"{data.floor('dialects', 'test'):.4f} nats per character")
    mixture = RESULTS["dense"]["mixture"]
    for key in ("same_first", "same_any"):
        texts.append(spread([run[key][-1] for run in mixture], 0, 100) + " %")
    texts.append(f"takes {RESULTS['timed']['float32']:.0f} s in float32")
    texts.append(f"{RESULTS['timed']['bfloat16']:.0f} s in bfloat16")
    if dropped := [run["dropped"] for run in RESULTS["balance"].get("capacity", [])]:
        texts.append(f"{100 * statistics.mean(dropped):.1f} %")
    if bench := RESULTS.get("bench-float32"):
        keys = ("train_vs_hf", "decode_vs_hf", "decode_vs_hf_b8", "grouped_vs_loop")
        texts += [f"| {bench[key]:.2f} × |" for key in keys]
        texts.append(f"| {100 * bench['train_gemm_fraction']:.0f} % |")
    return texts


@pytest.mark.parametrize("said", measured())
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


def test_the_promise_is_kept_by_every_seed():
    """What `--train` calls on track."""
    for run in RESULTS["dense"]["mixture"]:
        assert run["times_floor"] <= train.ON_TRACK and run["dead"] == 0
        assert run["informed"] >= train.INFORMED
    assert f"at most {train.ON_TRACK:.2f} × the floor" in README


def test_the_mixture_beats_the_dense_model_with_every_seed():
    runs = {
        name: [run["times_floor"] for run in RESULTS["dense"][name]]
        for name in ("mixture", "dense")
    }
    assert len(runs["mixture"]) == len(runs["dense"]) >= 2
    assert max(runs["mixture"]) < min(runs["dense"])


def test_chance_is_that_of_the_papers_table():
    first, any_choice = repeats_by_chance(8, 2)
    assert f"{100 * first:.1f} % and {100 * any_choice:.0f} % by chance" in README


@pytest.mark.skipif(not LLAMA.is_file(), reason="the folder stands alone")
def test_the_diff_to_llama_is_as_long_as_the_readme_says():
    """Lines that are in one of the two files alone."""
    files = (LLAMA, HERE / "model.py")
    lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
    marked = [x for x in difflib.unified_diff(*lines, n=0) if x[0] in "+-"][2:]  # two are names
    assert f"shows {len(marked)} lines" in README


def test_the_shipped_model_is_what_the_log_beside_it_says():
    loaded = checkpoint.load(HERE / "pretrained")
    tokens = text.tokens_of(data.measure("dialects"), loaded.tokenizer, "test")
    labels = data.labels(tokens, loaded.tokenizer)
    score = train.evaluate(loaded.model, tokens, labels, loaded.model.config.seq_len, torch.float32)
    log = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [x for x in map(json.loads, log) if x["split"] == "test"]
    assert score["nats_per_char"] == pytest.approx(logged[-1]["nats_per_char"], rel=0.005)
    assert train.informed(score) >= train.INFORMED and sum(score["dead_experts"]) == 0


def test_the_data_readme_states_sizes_and_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("dialects.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said
