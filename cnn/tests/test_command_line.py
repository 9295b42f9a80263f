"""What only this folder's command line does, and the one line for what it cannot do.

What every folder's does alike is in harness.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from harness import Killed, contents, kill_at, losses
from PIL import Image
from small import FLAGS, bars

import experiments
import figures
import formats
import main
import selfcheck
import train
from conftest import FOLDER


@pytest.fixture
def ready(trained) -> Path:
    """A small run with weights."""
    return trained()


@pytest.fixture
def picture(tmp_path) -> Path:
    x, _ = bars(1)
    Image.fromarray(x[0]).save(tmp_path / "bar.png")
    return tmp_path / "bar.png"


@pytest.fixture
def photos(tmp_path) -> Path:
    """Class folders of pictures of two sizes, one of them transparent."""
    x, y = bars(60)
    for i, (pixels, label) in enumerate(zip(x, y, strict=True)):
        folder = tmp_path / "photos" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        shown = Image.fromarray(pixels).resize((16, 16) if i % 2 else (20, 16))
        shown.convert("RGBA" if i == 0 else "RGB").save(folder / f"{i}.png")
    return tmp_path / "photos"


def last_json(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out.splitlines()[-1])


# ── What it does ──────────────────────────────────────────────────────────────────────────────────


def test_smoke_without_a_verb_it_says_what_there_is(command):
    for verb in ("classify", "experiment", "weights"):
        assert f"main.py --{verb} " in command().out


def test_train_says_what_it_does(command, words, tmp_path):
    outcome = command(*words, "--out", tmp_path / "run")
    for word in ("device", "config", "parameters", "multiply-adds", "expect     loss ln 3 = 1.099",
                 "step     1", "valid", "test part", "time to", "done:"):  # fmt: skip
        assert word in outcome.err


def test_parameter_counts_add_up(command, words, tmp_path):
    err = command(*words, "--out", tmp_path / "run").err
    total, groups = re.search(r"parameters ([\d,]+): (.*)\n", err).groups()
    counts = [int(n.replace(",", "")) for n in re.findall(r"\w+ ([\d,]+\d)", groups)]
    # filters 9·c·c', then two numbers a channel of batch normalisation; the last layer 16·3 + 3
    expected = [9 * 12 + 8, 9 * 32 + 16, 9 * 128 + 32, 9 * 128 + 32, 9 * 512 + 64, 51]
    assert counts == expected and sum(counts) == int(total.replace(",", ""))


def test_config_has_all_that_was_run(ready):
    config = json.loads((ready / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["width"] == 4 and config["model"]["n_class"] == 3
    assert config["train"]["steps"] == 2
    assert config["data"]["classes"] == ["0", "1", "2"] and len(config["data"]["mean"]) == 3
    assert config["views"] == ["shift"]


def test_smoke_eval_ends_with_json(command, ready, small_data):
    """The test part as at the end of training; the number is the logged one."""
    score = last_json(command("--eval", "--weights", ready))
    logged = json.loads((ready / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert logged["split"] == "test"
    assert score["accuracy"] == pytest.approx(logged["accuracy"])
    assert score["loss"] == pytest.approx(logged["loss"], rel=1e-4)
    assert score["data"] == str(small_data) and score["pictures"] == 9


def test_eval_of_the_first_pictures_of_a_file(command, ready, small_data):
    score = last_json(command("--eval", "--weights", ready, "--data", small_data, "--first", 40))
    assert score["pictures"] == 40
    assert "ceiling" not in score


def test_smoke_classify_with_the_shipped_network(command, tmp_path, monkeypatch):
    """A white ring on black: no picture of the training data, but a clear case."""
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
    monkeypatch.setattr(main, "HERE", tmp_path / "folder")
    shutil.copytree(ready, tmp_path / "folder" / "pretrained")
    assert "pretrained" in command("--classify", picture).err
    shutil.copytree(ready, tmp_path / "folder" / "runs" / "mine")
    assert str(Path("runs") / "mine") in command("--classify", picture).err


def test_export_then_load_scores_the_same(command, ready, tmp_path, small_data):
    assert command("--weights", ready, "--export", tmp_path / "out").code == 0
    there, here = (
        last_json(command("--eval", "--weights", folder, "--data", small_data))
        for folder in (tmp_path / "out", ready)
    )
    assert there | {"weights": ""} == here | {"weights": ""}


def test_export_in_eight_bits_says_how_equal_it_is(command, ready, tmp_path):
    score = last_json(command("--weights", ready, "--export", tmp_path / "out", "--int8"))
    assert score["fold_error"] < 1e-12 and score["int8_equal"] is True
    assert score["int8_bytes"] < score["bytes"] / 2
    assert command("--eval", "--weights", tmp_path / "out").code == 0
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["stem.conv1.weight"].dtype == torch.int8


@pytest.mark.parametrize("more", [[], ["--int8"]])
def test_export_never_writes_over_anything(command, ready, tmp_path, more):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    before = contents(tmp_path)
    for target in (ready, tmp_path / "mine"):
        outcome = command("--weights", ready, "--export", target, *more)
        assert "name a new folder" in outcome.complaint
    assert contents(tmp_path) == before


def test_an_experiment_is_a_table_and_repeats_nothing(command, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    assert FLAGS[0] == "--width"  # which is refused: an experiment has networks of its own
    words = ["--experiment", "seeds", *FLAGS[2:], "--data", small_data]
    first = command(*words)
    assert first.code == 0, first.err
    again = command(*words)
    assert "step     1" not in again.err
    assert again.out == first.out
    outcomes = last_json(again)
    assert [len(runs) for runs in outcomes.values()] == [3]
    saved = json.loads((tmp_path / "seeds" / "table.json").read_text(encoding="utf-8"))
    assert saved == outcomes


def test_selfcheck_passes_and_finds_a_device_that_lies(command, monkeypatch):
    outcome = command("--selfcheck")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\nok ") == 8

    def lies(model, x, labels, original=selfcheck.one_step):
        parts = original(model, x, labels)
        return parts | {"backward": parts["backward"] * (1.01 if x.dtype == torch.float32 else 1)}

    monkeypatch.setattr(selfcheck, "one_step", lies)
    outcome = command("--selfcheck")
    assert outcome.code == 2
    assert "BAD  backward in float32" in outcome.out
    assert "computes wrong numbers" in outcome.err


@pytest.mark.slow
def test_folder_alone_in_an_empty_place_trains(tmp_path):
    """A copy of the folder without its neighbours, with the whole program and nothing patched."""
    ignore = shutil.ignore_patterns("runs", "tests", "__pycache__", "assets", ".*")
    copy = shutil.copytree(FOLDER, tmp_path / "alone", ignore=ignore)
    words = [sys.executable, "main.py", "--train", *FLAGS, "--data", "data/digits.npz"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / "default" / "figures" / "grid.png").exists()
    assert (copy / "runs" / "default" / "figures" / "curve.png").exists()
    assert done.stdout == ""


# ── Pictures of one's own ─────────────────────────────────────────────────────────────────────────


def test_a_folder_of_photos_from_training_to_a_name(command, photos, tmp_path):
    """Of several sizes: refused with the mend, which works, is said, and is remembered."""
    words = ["--train", *FLAGS, "--data", photos, "--out", tmp_path / "run"]
    assert "as in --image-size 32" in command(*words).only_line
    outcome = command(*words, "--image-size", 8)
    assert outcome.code == 0, outcome.err
    said = next(line for line in outcome.err.splitlines() if line.startswith("pictures"))
    assert "60 scaled and cropped in the middle" in said
    assert "1 transparent (laid on white)" in said
    assert last_json(command("--eval", "--weights", tmp_path / "run"))["pictures"] == 6
    one = next((photos / "a").iterdir())
    assert re.search("%  [abc]", command("--classify", one, "--weights", tmp_path / "run").out)


def test_pictures_are_decoded_once(command, photos, tmp_path, monkeypatch):
    """By training; scoring, and going on after a kill, take what the run kept."""
    words = ["--train", *FLAGS, "--data", photos, "--image-size", 8, "--steps", 4]
    words += ["--checkpoint-every", 1]
    assert command(*words, "--out", tmp_path / "whole").code == 0
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        command(*words, "--out", tmp_path / "run")
    monkeypatch.setattr(formats, "read_picture", None)
    assert command("--train", "--resume", "--out", tmp_path / "run").code == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert command("--eval", "--weights", tmp_path / "run").code == 0


def test_nothing_is_kept_of_what_is_quick_to_read(ready):
    assert not (ready / train.CACHE).exists()


def test_pictures_are_drawn_from_the_answers_that_were_scored(
    command, words, tmp_path, monkeypatch
):
    """At the end of a run nothing is read or computed a second time for its pictures."""
    seen = []
    monkeypatch.setattr(main, "leave_pictures", lambda *given: seen.append(given))
    assert command(*words, "--out", tmp_path / "run").code == 0
    ((loaded, dataset, p),) = seen
    accuracy = (p.argmax(1) == dataset.test.labels).double().mean().item()
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert line["accuracy"] == pytest.approx(accuracy) and loaded.path == tmp_path / "run"
    monkeypatch.undo()
    files = figures.of_run(loaded, dataset.test, p, tmp_path / "figures")
    assert [file.name for file in files] == ["curve.png", "grid.png"]
    for file in files:
        with Image.open(file) as drawn:
            assert drawn.size[0] >= 600


def test_ctrl_c_after_training_ends_at_once(command, words, tmp_path, monkeypatch):
    """While the pictures are drawn: the network is saved and said to be, nothing goes on."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "leave_pictures", interrupted)
    outcome = command(*words, "--out", tmp_path / "run")
    assert outcome.code == 130 and "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("stopped; the trained network is in")
    assert command("--eval", "--weights", tmp_path / "run").code == 0


def test_a_stopped_run_draws_nothing(command, words, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(main, "leave_pictures", lambda *given: drawn.append(given))

    def stop(self, number, original=train.PictureTrainer.step):
        if number == 1:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        return original(self, number)

    monkeypatch.setattr(train.PictureTrainer, "step", stop)
    outcome = command(*words, "--out", tmp_path / "run", "--steps", 9)
    assert outcome.code == 0 and not drawn
    assert outcome.err.splitlines()[-1].startswith("go on with --train --resume")


# ── What it refuses ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--eval", "--first", "-1"], "--first must be a number of pictures"),
        (["--experiment", "all"], "invalid choice: 'all'"),
        (["--export", ""], "--export"),
    ],
)
def test_words_that_cannot_be(command, words, message):
    assert message in command(*words).complaint


def test_weights_bring_their_own_network(command, ready, words, tmp_path):
    """What agrees with them is fine, what contradicts them is refused by name."""
    words += ["--weights", ready, "--out", tmp_path / "b"]
    assert command(*words, "--size", "fast").code == 0
    for more, message in ((["--width", 8], "--width 8: the network in"),
                          (["--size", "resnet20"], "--net resnet: the network in")):  # fmt: skip
        complaint = command(*words, *more).only_line
        assert message in complaint and "has" in complaint


def test_foreign_weights_are_not_scored_on_pictures_that_nobody_named(command, tmp_path):
    """A .th file says nothing about its pictures: shapes-10 would be a guess."""
    from model import PRESETS, build

    torch.save({"state_dict": build(PRESETS["resnet20"]).state_dict()}, tmp_path / "foreign.th")
    for verb in (["--eval"], ["--export", tmp_path / "out", "--int8"]):
        complaint = command(*verb, "--weights", tmp_path / "foreign.th").complaint
        assert "does not say which pictures" in complaint and "--data" in complaint
    score = command("--eval", "--weights", tmp_path / "foreign.th", "--data", "shapes-10")
    assert last_json(score)["data"] == "shapes-10"


def test_pictures_that_the_network_cannot_read(command, ready, tmp_path):
    x, y = bars(30)
    np.savez(tmp_path / "large.npz", x=np.repeat(x, 2, axis=1), y=y)
    np.savez(tmp_path / "grey.npz", x=x[..., 0], y=y)
    np.savez(tmp_path / "two.npz", x=x, y=y % 2)
    for name, message in (("large", r"\(3, 16, 8\) .* the network wants \(3, 8, 8\)"),
                          ("grey", r"\(1, 8, 8\) .* the network wants \(3, 8, 8\)"),
                          ("two", "2 classes, the network has 3")):  # fmt: skip
        outcome = command("--eval", "--weights", ready, "--data", tmp_path / f"{name}.npz")
        assert re.search(message, outcome.complaint)
    file = tmp_path / "large.npz"
    assert command("--eval", "--weights", ready, "--data", file, "--image-size", 8).code == 0


def test_no_picture(command, ready, tmp_path):
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    for name in ("a.png", "none.png"):
        outcome = command("--classify", tmp_path / name, "--weights", ready)
        assert name in outcome.complaint and outcome.out == ""
