"""`python main.py …` of this folder as a user types it; harness.py has what all folders share."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch
from harness import Bomb

from conftest import FOLDER
from run import RunDirectory


@pytest.fixture
def ready(trained) -> Path:
    """A small run with weights."""
    return trained()


# ── What it does ──────────────────────────────────────────────────────────────────────────────────


def test_sample_goes_on_from_the_prompt(command, ready):
    words = ["--weights", ready, "--prompt", "One day", "--max-new-tokens", 5]
    outcome = command("--sample", *words)
    assert outcome.code == 0
    assert outcome.out.startswith("One day") and outcome.out.endswith("\n")
    assert command("--sample", *words).out == outcome.out
    assert command("--sample", *words, "--seed", 1).out != outcome.out


def test_samples_stand_between_lines(command, ready):
    words = ["--weights", ready, "--prompt", "é", "--num-samples", 3, "--max-new-tokens", 2]
    outcome = command("--sample", *words)
    assert outcome.out.count("\n---\n") == 2
    assert all(part.startswith("é") for part in outcome.out.split("\n---\n"))


def test_temperature_zero_is_greedy(command, ready):
    words = ["--weights", ready, "--prompt", "One", "--max-new-tokens", 9, "--temperature", 0]
    assert command("--sample", *words, "--seed", 1).out == command("--sample", *words).out


def test_stop_text_ends_a_sample(command, ready):
    words = ["--weights", ready, "--prompt", "One", "--max-new-tokens", 30, "--temperature", 0]
    said = command("--sample", *words).out[len("One") :]
    stop = said[4:6]
    until = said[: said.index(stop)]
    assert command("--sample", *words, "--stop", stop).out == f"One{until}\n"


def test_eval_ends_with_json(command, ready, small_data):
    outcome = command("--eval", "--weights", ready, "--data", small_data)
    score = json.loads(outcome.out.splitlines()[-1])
    assert score["loss"] * score["tokens"] == pytest.approx(score["nats_per_char"] * score["chars"])
    tested = RunDirectory(ready).history()[-1]
    assert tested["split"] == "test"
    assert score["nats_per_char"] == pytest.approx(tested["nats_per_char"], rel=1e-5)


def test_eval_without_data_takes_that_of_the_run(command, ready, small_data):
    score = json.loads(command("--eval", "--weights", ready).out.splitlines()[-1])
    assert score["data"] == str(small_data)


def test_export_then_load_says_the_same(command, ready, tmp_path):
    pytest.importorskip("tokenizers")  # an exported folder has a tokenizer.json
    words = ["--prompt", "One", "--max-new-tokens", 8, "--temperature", 0]
    assert command("--weights", ready, "--export", tmp_path / "hf").code == 0
    there = command("--sample", "--weights", tmp_path / "hf", *words).out
    assert there == command("--sample", "--weights", ready, *words).out


def test_newest_run_is_used_and_else_the_shipped_weights(command, ready, monkeypatch, tmp_path):
    import main

    monkeypatch.setattr(main, "HERE", tmp_path / "folder")
    shutil.copytree(ready, tmp_path / "folder" / "pretrained")
    assert "pretrained" in command("--sample", "--max-new-tokens", 1).err
    shutil.copytree(ready, tmp_path / "folder" / "runs" / "mine")
    assert str(Path("runs") / "mine") in command("--sample", "--max-new-tokens", 1).err


def test_bfloat16_samples_and_scores(command, ready):
    words = ["--weights", ready, "--dtype", "bfloat16"]
    assert command("--sample", *words, "--max-new-tokens", 3).code == 0
    assert command("--eval", *words).code == 0


def test_training_in_bfloat16_keeps_float32_weights(trained):
    out = trained("run", "--dtype", "bfloat16", "--checkpoint-every", 1)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


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


# ── What it refuses: one line, exit code 2 ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--sample", "--temperature", "-1"], "temperature must be at least 0"),
        (["--sample", "--temperature", "nan"], "temperature must be a finite number"),
        (["--sample", "--top-p", "0"], "top_p must be more than 0"),
        (["--sample", "--top-p", "1.1"], "top_p must be at most 1"),
        (["--sample", "--top-k", "-3"], "top_k must be at least 0"),
        (["--sample", "--top-k", "9" * 20], "top_k must be at most"),
        (["--sample", "--min-p", "2"], "min_p must be at most 1"),
        (["--sample", "--num-samples", "0"], "num_samples must be at least 1"),
        (["--sample", "--num-samples", "10001"], "num_samples must be at most 10000"),
        (["--sample", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--sample", "--prompt", "\udcff"], "--prompt: this is no UTF-8 text"),
        (["--sample", "--stop", "\udcff"], "--stop: this is no UTF-8 text"),
        (["--sample", "--weights", "nowhere"], "nowhere: there is no such folder"),
        (["--eval", "--weights", "nowhere"], "nowhere: there is no such folder"),
        (["--weights", "nowhere", "--export", "x"], "nowhere: there is no such folder"),
        (["--eval", "--seq-len", "0"], "seq_len"),
    ],
    ids=lambda x: (
        " ".join(x)[:40].encode("ascii", "replace").decode() if isinstance(x, list) else ""
    ),
)
def test_words_of_this_folder_that_cannot_be(command, monkeypatch, tmp_path, ready, asked, message):
    monkeypatch.chdir(tmp_path)
    if "--weights" not in asked:
        asked = [*asked, "--weights", ready]
    assert re.search(message, command(*asked).complaint)


def spoilt_text(kind: str, folder: Path) -> Path:
    """A --data that is wrong in the way that `kind` says."""
    file = folder / "text"
    content = {"empty": b"", "blank": b"\n", "Latin-1": "ça va".encode("latin-1") * 99,
               "short": b"Once.", "shorter than a row": b"x" * 24}.get(kind)  # fmt: skip
    if kind in ("empty folder", "folder of nothing"):
        file.mkdir()
        if kind == "folder of nothing":
            (file / "a.txt").touch()
    else:
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("blank", "is empty"),
        ("empty folder", "is empty"),
        ("folder of nothing", "is empty"),
        ("Latin-1", r"is not UTF-8 text \(at byte 0\)"),
        ("short", "is too short: nothing is left to test on"),
        ("shorter than a row", "--seq-len 24 needs 25 or more"),
    ],
)
def test_text_that_cannot_be_trained_on(command, tmp_path, kind, message):
    data = spoilt_text(kind, tmp_path)
    words = ["--train", *small.FLAGS, "--data", data, "--out", tmp_path / "run"]
    assert re.search(message, command(*words).complaint)


def test_hub_data_set_that_is_not_there(command, tmp_path):
    pytest.importorskip("datasets")
    words = ["--train", *small.FLAGS, "--data", f"hf:{tmp_path}/nothing", "--out", tmp_path / "run"]
    assert "cannot load --data hf:" in command(*words).complaint


@pytest.mark.parametrize("as_torch", [True, False])
def test_meta_weights_with_code_in_them_do_not_run(command, tmp_path, as_torch):
    bomb, folder = {"norm.weight": Bomb(tmp_path / "marker")}, tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(
        '{"n_heads": 2, "n_layers": 1, "norm_eps": 1e-5}', encoding="utf-8"
    )
    if as_torch:
        torch.save(bomb, folder / "consolidated.00.pth")
    else:
        (folder / "consolidated.00.pth").write_bytes(pickle.dumps(bomb))
    complaint = command("--sample", "--weights", folder).complaint
    assert "damaged or holds more than tensors" in complaint
    assert not (tmp_path / "marker").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(file: Path, **changes) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")


def misshape(run: Path) -> None:
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    tensors["norm.weight"] = torch.ones(5)
    safetensors.torch.save_file(tensors, run / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: cut(run / "model.safetensors"), "model.safetensors is damaged"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x80\x04."), "is damaged"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
        (misshape, r"norm.weight is \(5,\), the configuration needs \(32,\)"),
        (lambda run: (run / "config.json").unlink(), "has no config.json"),
        (lambda run: cut(run / "config.json"), "config.json is damaged"),
        (lambda run: rewrite(run / "config.json", model={"d_head": 7}), "odd"),
        (lambda run: rewrite(run / "config.json", model={"d_hat": 7}), "d_hat"),
        (lambda run: (run / "alphabet.json").unlink(), "no tokenizer in"),
        (lambda run: (run / "alphabet.json").write_bytes(b"{"), "alphabet.json is damaged"),
    ],
    ids=["cut", "pickle", "no weights", "shape", "no config", "cut config", "odd", "unknown size",
         "no tokenizer", "cut tokenizer"],
)  # fmt: skip
def test_weights_that_cannot_be_loaded(command, ready, spoil, message):
    spoil(ready)
    assert re.search(message, command("--sample", "--weights", ready).complaint)


def test_damaged_sentencepiece_tokenizer(command, ready):
    (ready / "alphabet.json").unlink()
    (ready / "tokenizer.model").write_bytes(b"nonsense")
    assert "tokenizer.model is damaged" in command("--sample", "--weights", ready).complaint


def test_tokenizer_json_without_the_library(command, ready, monkeypatch):
    (ready / "alphabet.json").unlink()
    (ready / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in command("--sample", "--weights", ready).complaint


@pytest.mark.parametrize(("seq_len", "message"), [(100_000, "--seq-len 100000"), (10**9, "needs")])
def test_resumed_run_that_asks_for_a_longer_context(command, ready, seq_len, message):
    """Its config.json was edited; without a word every step would take minutes."""
    config = json.loads((ready / "config.json").read_text(encoding="utf-8"))
    rewrite(ready / "config.json", model=config["model"] | {"seq_len": seq_len})
    assert message in command("--train", "--resume", "--out", ready, "--steps", 3).complaint


def test_tokens_of_a_run_that_are_gone(command, ready):
    (ready / "train.bin").unlink()
    assert "are damaged" in command("--train", "--resume", "--out", ready).complaint


def test_prompt_longer_than_the_context(command, ready):
    """It is refused before it is printed, however long."""
    outcome = command("--sample", "--weights", ready, "--prompt", "x" * 24)
    assert outcome.code == 2 and outcome.out == ""
    assert "--prompt: prompt of 25 tokens, context of 24" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err
