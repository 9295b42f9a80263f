"""`python main.py …` of this folder as a user types it; harness.py has what all folders share."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch

import bench
import checkpoint
import experiments
import needle
import selfcheck
from conftest import FOLDER
from run import RunDirectory


@pytest.fixture
def ready(trained) -> Path:
    """A small run with weights."""
    return trained()


def test_sample_goes_on_from_the_prompt(command, ready):
    words = ["--weights", ready, "--prompt", "Ba du", "--max-new-tokens", 5]
    outcome = command("--sample", *words)
    assert outcome.code == 0
    assert outcome.out.startswith("Ba du") and outcome.out.endswith("\n")
    assert command("--sample", *words).out == outcome.out
    assert command("--sample", *words, "--seed", 1).out != outcome.out


def test_speculate_writes_the_greedy_text_and_says_how_many_guesses_stood(command, ready):
    words = ["--weights", ready, "--prompt", "The fox", "--max-new-tokens", 12, "--temperature", 0]
    guessed, plain = command("--speculate", *words), command("--sample", *words)
    assert guessed.code == 0 and guessed.out == plain.out
    assert "% accepted" in guessed.err


def test_speculate_without_a_module_is_refused(command, trained):
    out = trained("plain", "--n-ahead", 0)
    assert "no module that looks ahead" in command("--speculate", "--weights", out).complaint
    assert (
        "prompt of"
        in command("--speculate", "--weights", trained(), "--prompt", "x" * 99).complaint
    )


def test_eval_ends_with_json(command, ready, small_data):
    outcome = command("--eval", "--weights", ready, "--data", small_data)
    score = json.loads(outcome.out.splitlines()[-1])
    assert score["loss"] * score["tokens"] == pytest.approx(score["nats_per_char"] * score["chars"])
    tested = RunDirectory(ready).history()[-1]
    assert tested["split"] == "test"
    for name in ("nats_per_char", "violation", "accepted"):
        ours, logged = torch.tensor(score[name]), torch.tensor(tested[name])
        assert torch.allclose(ours, logged, rtol=1e-4, atol=1e-6), name
    assert "the busiest has" in outcome.out and "recall" not in score


def test_export_then_load_says_the_same(command, ready, tmp_path):
    pytest.importorskip("tokenizers")  # an exported folder has a tokenizer.json
    words = ["--prompt", "The", "--max-new-tokens", 8, "--temperature", 0]
    assert command("--weights", ready, "--export", tmp_path / "hf").code == 0
    there = command("--sample", "--weights", tmp_path / "hf", *words).out
    assert there == command("--sample", "--weights", ready, *words).out


def test_fine_tuning_keeps_the_experts(command, ready, small_data, tmp_path):
    words = ["--train", "--data", small_data, "--weights", ready, "--steps", 1, "--batch-size", 4]
    assert command(*words, "--out", tmp_path / "more", "--seq-len", 20).code == 0
    assert checkpoint.load(tmp_path / "more").model.config.n_expert == 4
    line = command(*words, "--out", tmp_path / "other", "--n-expert", 8).complaint
    assert "--n-expert 8: the model in" in line and "has 4" in line


def test_bfloat16_samples_and_scores(command, ready):
    words = ["--weights", ready, "--dtype", "bfloat16"]
    assert command("--sample", *words, "--max-new-tokens", 3).code == 0
    assert command("--eval", *words).code == 0


def test_training_in_bfloat16_keeps_float32_weights(trained):
    out = trained("run", "--dtype", "bfloat16", "--checkpoint-every", 1)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_selfcheck_passes_here_and_names_a_device_that_lies(command, monkeypatch):
    outcome = command("--selfcheck", "--device", "cpu")
    assert outcome.code == 0 and "BAD" not in outcome.out
    assert outcome.out.count("ok ") >= 7
    monkeypatch.setattr(selfcheck, "TOLERANCE", -1.0)
    outcome = command("--selfcheck", "--device", "cpu")
    assert "cpu computes wrong numbers" in outcome.complaint


def test_experiment_trains_each_variant_once_and_ends_with_json(command, monkeypatch, tmp_path):
    """Two steps each; the second time nothing is trained."""
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    words = ["--experiment", "balance", "--steps", 2, "--batch-size", 2, "--dtype", "float32",
             "--eval-every", 1]  # fmt: skip
    first, second = command(*words), command(*words)
    assert first.code == 0, first.err
    found = json.loads(first.out.splitlines()[-1])
    assert set(found) == {"bias-0", "loss-0", "none-0"} and first.out == second.out
    assert first.err.count("── ") == 3 and "── " not in second.err
    assert all(run["times_floor"] > 1 and run["forms"] < 1e-10 for run in found.values())
    assert all(0 <= run["recall"] < 0.5 for run in found.values())


def test_experiment_is_of_our_text_alone(command, small_data):
    assert "leave --data" in command("--experiment", "seeds", "--data", small_data).complaint


def test_needle_experiment_leaves_a_map_and_a_model(command, monkeypatch, tmp_path):
    """With little to do; what it finds means nothing then."""
    for name, value in {
        "LENGTHS": (64, 1024),
        "ROWS": 1,
        "BATCH": 1024,
        "FOLDER": tmp_path,
    }.items():
        monkeypatch.setattr(needle, name, value)
    outcome = command("--experiment", "needle", "--steps", 2)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert {when: list(lengths) for when, lengths in found.items()} == {
        "before": ["64", "1024"], "after": ["64", "1024"]
    }  # fmt: skip
    assert found["before"]["64"] == found["after"]["64"]  # not stretched
    assert (tmp_path / "runs" / "experiments" / "needle" / "model.safetensors").exists()


def test_bench_prints_ratios_and_tables(command, monkeypatch, tmp_path):
    """With little to do; what it measures means nothing then."""
    small_sizes = {"n_layer": 2, "d_model": 32, "d_ff": 16, "n_head": 2, "vocab_size": 260}
    sizes = dataclasses.replace(bench.SIZES, **small_sizes)
    monkeypatch.setattr(bench, "SIZES", sizes)
    for name, value in {"ROWS": 2, "LENGTH": 16, "CONTEXT": 32, "STEPS": 2, "NEW": 4,
                        "CONTEXTS": (8, 32, 64), "CHUNKS": (1, 16), "RESULTS": tmp_path,
                        "ROUNDS": 1}.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    outcome = command("--bench", "--device", "cpu", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert {"absorbed_vs_naive", "speculative_vs_plain", "crossover_computed"} <= found.keys()
    assert (tmp_path / "bench-float32.json").exists()
    assert [row["context"] for row in found["contexts"]] == [8, 32, 64]
    pytest.importorskip("transformers")
    assert {"train_vs_hf", "decode_vs_hf"} <= found.keys()


def test_crossover_is_between_the_two_that_are_measured():
    rows = [
        {"new": n, "naive": a, "absorbed": b} for n, a, b in ((1, 9, 3), (10, 6, 4), (30, 5, 10))
    ]
    assert bench.measured_crossover(rows) == 20.0  # gains ½ and −½, so half-way from 10 to 30
    assert bench.measured_crossover(rows[:2]) is None


@pytest.mark.slow
def test_folder_alone_in_an_empty_place_trains(tmp_path):
    """A copy of the folder without its neighbours, with the whole program and nothing patched."""
    ignore = shutil.ignore_patterns("runs", "tests", "__pycache__", "assets", ".*")
    copy = shutil.copytree(FOLDER, tmp_path / "alone", ignore=ignore)
    words = [sys.executable, "main.py", "--train", *small.FLAGS]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=copy, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / "default" / "model.safetensors").exists()
    assert done.stdout.strip() and "step" not in done.stdout
