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
import selfcheck
from conftest import FOLDER
from options import UserError
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


def test_sample_longer_than_the_window(command, trained):
    """A run with a window of 4 writes 20 tokens, greedy text as from whole passes."""
    out = trained("window", "--window", 4)
    words = ["--weights", out, "--prompt", "ba", "--max-new-tokens", 18, "--temperature", 0]
    said = command("--sample", *words).out
    loaded = checkpoint.load(out)
    assert loaded.model.config.window == 4
    text = loaded.tokenizer.encode("ba")
    for _ in range(18):
        with torch.no_grad():
            text.append(int(loaded.model(torch.tensor([text]))[0, -1].argmax()))
        if text[-1] in loaded.stop_ids:
            text.pop()
            break
    assert said == loaded.tokenizer.decode(text) + "\n"


def test_eval_ends_with_json(command, ready, small_data):
    outcome = command("--eval", "--weights", ready, "--data", small_data)
    score = json.loads(outcome.out.splitlines()[-1])
    assert score["loss"] * score["tokens"] == pytest.approx(score["nats_per_char"] * score["chars"])
    tested = RunDirectory(ready).history()[-1]
    assert tested["split"] == "test"
    for name in ("nats_per_char", "load", "router_entropy", "information", "same_first"):
        ours, logged = torch.tensor(score[name]), torch.tensor(tested[name])
        assert torch.allclose(ours, logged, rtol=1e-4, atol=1e-6), name
    assert "share of the work" in outcome.out


def test_eval_of_a_text_without_dialects(command, ready, tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("Nobody knows in which dialect this is written. " * 40, encoding="utf-8")
    outcome = command("--eval", "--weights", ready, "--data", file)
    score = json.loads(outcome.out.splitlines()[-1])
    assert outcome.code == 0 and "information" not in score and "floor_nats_per_char" not in score


def test_export_then_load_says_the_same(command, ready, tmp_path):
    pytest.importorskip("tokenizers")  # an exported folder has a tokenizer.json
    words = ["--prompt", "Ba", "--max-new-tokens", 8, "--temperature", 0]
    assert command("--weights", ready, "--export", tmp_path / "hf").code == 0
    there = command("--sample", "--weights", tmp_path / "hf", *words).out
    assert there == command("--sample", "--weights", ready, *words).out


def test_run_balanced_by_biases_is_not_exported(command, trained, tmp_path):
    out = trained("biased", "--balance", "bias")
    outcome = command("--weights", out, "--export", tmp_path / "hf")
    assert "was balanced by biases" in outcome.complaint


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
    assert outcome.out.count("ok ") >= 6
    monkeypatch.setattr(selfcheck, "TOLERANCE", -1.0)
    outcome = command("--selfcheck", "--device", "cpu")
    assert "cpu computes wrong numbers" in outcome.complaint


def test_experiment_trains_each_variant_once_and_ends_with_json(command, monkeypatch, tmp_path):
    """Two steps each; the second time nothing is trained."""
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(experiments, "SEEDS", (0, 1))
    words = ["--experiment", "dense", "--steps", 2, "--batch-size", 2, "--dtype", "float32",
             "--eval-every", 1]  # fmt: skip
    first, second = command(*words), command(*words)
    assert first.code == 0, first.err
    found = json.loads(first.out.splitlines()[-1])
    assert set(found) == {"mixture", "dense", "told"} and first.out == second.out
    assert first.err.count("── ") == 6 and "── " not in second.err
    assert all(run["times_floor"] > 1 for runs in found.values() for run in runs)
    assert found["told"][0]["informed"] > 0.9 and found["dense"][0]["informed"] == 0
    assert found["told"][0]["same_first"][-1] > 0.8  # one dialect for a long time


def test_experiment_is_of_our_text_alone(command, small_data):
    assert "leave --data" in command("--experiment", "dense", "--data", small_data).complaint


def test_told_router_needs_words_as_tokens(small_data):
    from tokenizer import ByteTokenizer

    with pytest.raises(UserError, match="tokens are the words"):
        experiments.dialect_table(ByteTokenizer(), 258)


def test_bench_prints_ratios_and_a_table_of_dispatchers(command, monkeypatch, tmp_path):
    """With little to do; what it measures means nothing then."""
    small_sizes = {"n_layer": 1, "d_model": 32, "d_ff": 16, "n_head": 2, "n_kv_head": 2}
    sizes = dataclasses.replace(bench.SIZES, d_head=16, seq_len=32, vocab_size=260, **small_sizes)
    monkeypatch.setattr(bench, "SIZES", sizes)
    for name, value in {"ROWS": 2, "PROMPT": 3, "NEW": 2, "TOKENS": (2, 8192), "EXPERTS": (8,),
                        "RESULTS": tmp_path, "ROUNDS": 1}.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    outcome = command("--bench", "--device", "cpu", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])
    assert {"train_gemm_fraction", "grouped_vs_loop", "dispatch"} <= found.keys()
    assert (tmp_path / "bench-float32.json").exists()
    assert [set(row) >= {"loop", "grouped"} for row in found["dispatch"]] == [True, True]


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
