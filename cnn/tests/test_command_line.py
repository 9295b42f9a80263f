"""`python main.py …` as a user types it: what it does, and one line for whatever cannot be done."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import experiments
import selfcheck
from conftest import FOLDER, bars


@pytest.fixture
def ready(trained) -> Path:
    """A small run with weights."""
    return trained()


@pytest.fixture
def picture(tmp_path) -> Path:
    x, _ = bars(1)
    Image.fromarray(x[0]).save(tmp_path / "bar.png")
    return tmp_path / "bar.png"


# ── What it does ──────────────────────────────────────────────────────────────────────────────────


def test_smoke_without_a_verb_it_says_what_there_is(command):
    outcome = command()
    assert outcome.code == 0 and outcome.err == ""
    for verb in ("train", "classify", "eval", "bench", "experiment", "figures", "selfcheck"):
        assert f"main.py --{verb} " in outcome.out


def test_smoke_train_says_what_it_does_and_leaves_a_run(command, small, npz, tmp_path):
    outcome = command("--train", *small, "--data", npz, "--out", tmp_path / "run")
    assert outcome.code == 0 and outcome.out == ""
    for word in ("device", "config", "parameters", "expect     loss ln 3 = 1.099", "step     1",
                 "valid", "test", "time to", "done:", "picture"):  # fmt: skip
        assert word in outcome.err
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "model.safetensors", "checkpoint.pt"}


def test_parameter_counts_add_up(command, small, npz, tmp_path):
    err = command("--train", *small, "--data", npz, "--out", tmp_path / "run").err
    total, groups = re.search(r"parameters ([\d,]+): (.*);", err).groups()
    counts = [int(n.replace(",", "")) for n in re.findall(r"[a-z] ([\d,]+\d)", groups)]
    assert sum(counts) == int(total.replace(",", ""))
    # 9·(3·4 + 4·8 + 2·8² + 8·16 + 2·16²); 16·3; 2·(4 + 3·8 + 3·16) + 3
    assert counts == [9 * (12 + 32 + 128 + 128 + 512), 48, 155]


def test_config_has_all_that_was_run(ready):
    config = json.loads((ready / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["width"] == 4 and config["model"]["n_class"] == 3
    assert config["train"]["steps"] == 2
    assert config["data"]["classes"] == ["0", "1", "2"] and len(config["data"]["mean"]) == 3
    assert config["views"] == ["shift"]
    assert config["versions"]["torch"] == torch.__version__


def test_smoke_eval_ends_with_json(command, ready, npz):
    """The test part as at the end of training; the number is the logged one."""
    outcome = command("--eval", "--weights", ready)
    score = json.loads(outcome.out.splitlines()[-1])
    logged = json.loads((ready / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert logged["split"] == "test"
    assert score["accuracy"] == pytest.approx(logged["accuracy"])
    assert score["loss"] == pytest.approx(logged["loss"], rel=1e-4)
    assert score["data"] == str(npz) and score["pictures"] == 9


def test_eval_of_the_first_pictures_of_a_file(command, ready, npz):
    score = json.loads(
        command("--eval", "--weights", ready, "--data", npz, "--first", 40).out.splitlines()[-1]
    )
    assert score["pictures"] == 40
    assert "ceiling" not in score


def test_smoke_classify_with_the_shipped_network(command, tmp_path, monkeypatch):
    """A white ring on black: no picture of the training data, but a clear case."""
    import main

    monkeypatch.setattr(main, "HERE", tmp_path)  # no runs there
    shutil.copytree(FOLDER / "pretrained", tmp_path / "pretrained")
    y, x = np.mgrid[:64, :64] - 32
    ring = 255 * ((x * x + y * y < 24**2) & (x * x + y * y > 14**2))
    Image.fromarray(np.stack([ring] * 3, 2).astype(np.uint8)).save(tmp_path / "a.png")
    outcome = command("--classify", tmp_path / "a.png")
    assert outcome.code == 0, outcome.err
    assert re.fullmatch(r" *\d+\.\d %  ring", outcome.out.splitlines()[0])


def test_classify_gives_falling_probabilities(command, ready, picture):
    lines = command("--classify", picture, "--weights", ready).out.splitlines()
    values = [float(re.match(r" *([\d.]+) %", line)[1]) for line in lines]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(100, abs=0.5)


def test_newest_run_is_used_and_else_the_shipped_weights(
    command, ready, monkeypatch, tmp_path, picture
):
    import main

    monkeypatch.setattr(main, "HERE", tmp_path / "folder")
    shutil.copytree(ready, tmp_path / "folder" / "pretrained")
    assert "pretrained" in command("--classify", picture).err
    shutil.copytree(ready, tmp_path / "folder" / "runs" / "mine")
    assert str(Path("runs") / "mine") in command("--classify", picture).err


def test_export_then_load_scores_the_same(command, ready, tmp_path, npz):
    assert command("--weights", ready, "--export", tmp_path / "out").code == 0
    words = ["--data", npz]
    there, here = (
        json.loads(command("--eval", "--weights", w, *words).out.splitlines()[-1])
        for w in (tmp_path / "out", ready)
    )
    assert there | {"weights": ""} == here | {"weights": ""}


def test_export_in_eight_bits_says_how_equal_it_is(command, ready, tmp_path):
    outcome = command("--weights", ready, "--export", tmp_path / "out", "--int8")
    score = json.loads(outcome.out)
    assert score["fold_error"] < 1e-12 and score["int8_equal"] is True
    assert score["int8_bytes"] < score["bytes"] / 2
    assert command("--eval", "--weights", tmp_path / "out").code == 0
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["stem.conv1.weight"].dtype == torch.int8


def test_paths_are_kept_whole_so_that_resume_works_from_elsewhere(
    command, small, npz, tmp_path, monkeypatch
):
    monkeypatch.chdir(npz.parent)
    words = ["--train", *small, "--data", npz.name, "--out", tmp_path / "run"]
    assert command(*words).code == 0
    monkeypatch.chdir(tmp_path)
    assert command("--train", "--resume", "--out", "run", "--steps", 3).code == 0


def test_an_experiment_is_a_table_and_repeats_nothing(command, small, npz, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    words = ["--experiment", "seeds", *small, "--data", npz]
    first = command(*words)
    assert first.code == 0, first.err
    assert "step     1" not in command("--experiment", "seeds", *small, "--data", npz).err
    again = command(*words)
    assert again.out == first.out
    found = json.loads(again.out.splitlines()[-1])
    assert [len(runs) for runs in found.values()] == [3]
    saved = json.loads((tmp_path / "seeds" / "table.json").read_text(encoding="utf-8"))
    assert saved == found


def test_selfcheck_passes_and_finds_a_device_that_lies(command, monkeypatch):
    outcome = command("--selfcheck")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\nok ") == 8

    def lies(model, x, labels, original=selfcheck.one_step):
        found = original(model, x, labels)
        return found | {"backward": found["backward"] * (1.01 if x.dtype == torch.float32 else 1)}

    monkeypatch.setattr(selfcheck, "one_step", lies)
    outcome = command("--selfcheck")
    assert outcome.code == 2
    assert "BAD  backward in float32" in outcome.out
    assert "computes wrong numbers" in outcome.err


def test_folder_alone_in_an_empty_place_trains(tmp_path, small):
    """A copy of the folder without its neighbours, with the whole program and nothing patched."""
    ignore = shutil.ignore_patterns("runs", "tests", "__pycache__", "assets", ".*")
    copy = shutil.copytree(FOLDER, tmp_path / "alone", ignore=ignore)
    words = [sys.executable, "main.py", "--train", *small, "--data", "data/digits.npz"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=copy, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / "default" / "figures" / "grid.png").exists()
    assert (copy / "runs" / "default" / "figures" / "curve.png").exists()
    assert done.stdout == ""


# ── What it refuses: one line, exit code 2 ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trian"], "unrecognized arguments: --trian"),
        (["train"], "unrecognized arguments: train"),
        (["--train", "--step", "2"], "--step"),  # no guessing of shortened flags
        (["--train", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--train", "--steps", "0"], "steps must be more than 0"),
        (["--train", "--batch-size", "-1"], "batch_size must be more than 0"),
        (["--train", "--lr", "nan"], "lr must be more than 0, not nan"),
        (["--train", "--weight-decay", "-1"], "weight_decay must not be negative"),
        (["--train", "--momentum", "1"], r"momentum must be in \[0, 1\)"),
        (["--train", "--label-smoothing", "1"], r"label_smoothing must be in \[0, 1\)"),
        (["--train", "--ema", "-0.1"], r"ema must be in \[0, 1\)"),
        (["--train", "--shift", "-2"], "shift must not be negative"),
        (["--train", "--shift", "8"], "--shift 8 is too far for pictures of 8 pixels"),
        (["--train", "--seed", "-1"], "seed must not be negative"),
        (["--train", "--seed", "99999999999999999999999"], "seed"),
        (["--train", "--optimizer", "adam"], "invalid choice: 'adam'"),
        (["--train", "--flip", "maybe"], "invalid choice: 'maybe'"),
        (["--train", "--size", "huge"], "invalid choice: 'huge'"),
        (["--train", "--net", "resnet", "--depth", "21"], "depth 21: 3 stages need"),
        (["--train", "--net", "lenet"], "pictures of 8 × 8 are too small for the net lenet"),
        (["--train", "--width", "0"], "width must be at least 1"),
        (["--train", "--data", "nowhere.npz"], "nowhere.npz"),
        (["--train", "--weights", "nowhere"], "nowhere"),
        (["--resume"], "--resume goes with --train"),
        (["--int8"], "--int8 goes with --export"),
        (["--eval", "--first", "-1"], "--first must be a number of pictures"),
        (["--eval", "--weights", "nowhere"], "nowhere: there is no such file"),
        (["--weights", "nowhere", "--export", "x"], "nowhere: there is no such file"),
        (["--experiment", "all"], "invalid choice: 'all'"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_words_that_cannot_be(command, small, npz, tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--train" in words:
        words = ["--train", *small, "--data", npz, "--out", "run", *words[1:]]
    assert re.search(message, command(*words).complaint)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_pictures_that_the_network_cannot_read(command, ready, tmp_path):
    x, y = bars(30)
    np.savez(tmp_path / "large.npz", x=np.repeat(x, 2, axis=1), y=y)
    np.savez(tmp_path / "grey.npz", x=x[..., 0], y=y)
    np.savez(tmp_path / "two.npz", x=x, y=y % 2)
    for name, message in (("large", r"\(3, 16, 8\) .* the network wants \(3, 8, 8\)"),
                          ("grey", r"\(1, 8, 8\) .* the network wants \(3, 8, 8\)"),
                          ("two", "2 classes, the network has 3")):  # fmt: skip
        outcome = command("--eval", "--weights", ready, "--data", tmp_path / f"{name}.npz")
        assert outcome.code == 2 and re.search(message, outcome.err.splitlines()[-1])
        assert "Traceback" not in outcome.err


def test_no_picture(command, ready, tmp_path):
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    for name in ("a.png", "none.png"):
        outcome = command("--classify", tmp_path / name, "--weights", ready)
        assert outcome.code == 2 and name in outcome.err.splitlines()[-1]
        assert "Traceback" not in outcome.err and outcome.out == ""


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_out_that_is_a_file(command, small, npz, tmp_path, inside):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    words = ["--train", *small, "--data", npz, "--out", tmp_path / "run" / inside]
    assert "cannot write a run to --out" in command(*words).complaint
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "a file", "exported", "no checkpoint"])
def test_resume_of_nothing(command, ready, tmp_path, kind):
    out = tmp_path / "there"
    if kind == "empty folder":
        out.mkdir()
    elif kind == "a file":
        out.touch()
    elif kind == "exported":
        command("--weights", ready, "--export", out)
    elif kind == "no checkpoint":
        out = ready
        (out / "checkpoint.pt").unlink()
    assert "nothing to resume in" in command("--train", "--resume", "--out", out).complaint


@pytest.mark.parametrize(
    "words",
    [["--seed", 1], ["--width", 8], ["--lr", 0.5], ["--optimizer", "sgd"], ["--flip", "on"],
     ["--batch-size", 9], ["--dtype", "bfloat16"]],
    ids=str,
)  # fmt: skip
def test_resume_as_another_run(command, ready, words):
    complaint = command("--train", "--resume", "--out", ready, *words).complaint
    assert words[0] in complaint and "leave it out" in complaint


def test_resume_with_the_same_flags_once_more(command, ready, small, npz):
    assert command("--train", "--resume", "--out", ready, *small, "--data", npz).code == 0


def test_truncated_checkpoint(command, ready):
    file = ready / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert "is damaged" in command("--train", "--resume", "--out", ready).complaint


def test_loss_that_is_not_finite(command, small, npz, tmp_path):
    words = ["--train", *small, "--data", npz, "--out", tmp_path / "run", "--optimizer", "sgd"]
    outcome = command(*words, "--lr", 1e30, "--steps", 9, "--checkpoint-every", 1)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert re.search(r"error: the loss is (nan|inf) at step \d+: try --lr", last)
    assert str(tmp_path / "run" / "checkpoint.pt") in last
