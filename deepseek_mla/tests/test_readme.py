"""Every measured number in the README is the measured one, see assets/results.json."""

import difflib
import hashlib
import json
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import text
import train
from experiments import spread
from mla import crossover
from model import PRESETS

HERE = Path(__file__).resolve().parent.parent
LLAMA = HERE.parent / "llama" / "model.py"
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def row(runs: list[dict]) -> str:
    """The columns of a table of runs."""
    columns = [spread([run["times_floor"] for run in runs])]
    for key in ("recall", "accepted"):
        columns.append(spread([100 * run[key] for run in runs], 1) + " %")
    return " | ".join([*columns, spread([run["violation"] for run in runs], 2)])


def measured() -> list[str]:
    """The numbers of the results section, as they should read."""
    texts = [f"{data.floor('recall', 'test'):.4f} nats per character"]
    texts += [f"| {row(list(runs.values()))} |" for runs in [RESULTS.get("seeds")] if runs]
    texts.append(f"| {row([RESULTS['shipped']])} |")
    texts.append("ended at {:.2f}, {:.2f} and {:.2f}".format(*RESULTS["seeds_1150_steps"]))
    timed = RESULTS["timed"]
    texts.append(f"took {timed['seconds']} s, all included, in {timed['dtype']} on two idle cores")
    texts.append(f"ended at {timed['times_floor']:.3f} × the floor")
    texts += [f"| {row([run])} |" for run in RESULTS.get("balance", {}).values()]
    for when, lengths in RESULTS.get("needle", {}).items():
        share = 100 * sum(lengths["8192"]) / len(lengths["8192"])
        texts.append(f"{share:.0f} % {when} YaRN")
    for name in ("bench-float32", "bench-bfloat16"):
        if bench := RESULTS.get(name):
            keys = ("train_vs_hf", "decode_vs_hf", "absorbed_vs_naive")
            texts += [f"{bench[key]:.2f} ×" for key in keys]
            texts += [f"{found['ratio']:.2f} ×" for found in bench["speculative"].values()]
    for run in RESULTS["skew"].values():
        texts.append(f"{sum(run[:5]) / 5:.2f} and {sum(run[-5:]) / 5:.2f} with")
    for name, c in PRESETS.items():
        numbers = c.n_layer * (c.kv_rank + c.d_rope)
        sizes = f"{c.n_parameter:,} | {c.n_active_parameter:,} | {numbers:,} |"
        texts.append(f"| `{name}` | {sizes}")
    return texts


@pytest.mark.parametrize("said", measured())
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


@pytest.mark.skipif("seeds" not in RESULTS, reason="--experiment seeds was not run to its end")
def test_the_promise_is_kept_by_every_seed():
    """What `--train` calls on track; and the forms were one at every look."""
    runs = RESULTS["seeds"].values()
    assert all(run["times_floor"] <= train.ON_TRACK for run in runs)
    assert all(run["forms"] <= train.SAME for run in runs)
    assert f"at most {train.ON_TRACK:.2f} × the floor" in README


def test_needles_far_beyond_training_are_lost_before_yarn_and_found_after():
    before, after = (sum(RESULTS["needle"][when]["8192"]) / 8 for when in ("before", "after"))
    at_home = sum(RESULTS["needle"]["before"]["512"]) / 8
    assert before < 0.5 * at_home < 0.8 * at_home < after


def test_crossover_of_v3_is_what_the_readme_says():
    c = PRESETS["v3"]
    T = crossover((c.d_nope, c.d_rope, c.d_value, c.kv_rank))
    assert f"meet at {T:.0f} new tokens" in README


@pytest.mark.skipif(not LLAMA.is_file(), reason="the folder stands alone")
def test_the_diff_to_llama_is_as_long_as_the_readme_says():
    """Lines that are in one of the two files alone."""
    files = (LLAMA, HERE / "model.py")
    lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
    marked = [x for x in difflib.unified_diff(*lines, n=0) if x[0] in "+-"][2:]  # two are names
    assert f"shows {len(marked)} lines" in README


def test_the_shipped_model_is_what_its_log_and_the_readme_say():
    loaded = checkpoint.load(HERE / "pretrained")
    log = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    valid = [line for line in map(json.loads, log) if line["split"] == "valid"]
    best = min(valid, key=lambda line: line["loss"])
    expected = {"valid": best["nats_per_char"] / data.floor("recall", "valid")}
    expected["test"] = RESULTS["shipped"]["times_floor"]
    for part, times_floor in expected.items():
        tokens = text.tokens_of(data.measure("recall"), loaded.tokenizer, part)
        answers = data.answers(tokens, loaded.tokenizer)
        seq_len = loaded.model.config.seq_len
        score = train.evaluate(loaded.model, tokens, answers, seq_len, torch.float32)
        found = score["nats_per_char"] / data.floor("recall", part)
        assert found == pytest.approx(times_floor, rel=0.005)


def test_the_data_readme_states_sizes_and_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("recall.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said
