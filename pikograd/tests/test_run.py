"""Runs: what is the user's stays, kills at any moment, rates that count steps, one writer."""

import json
import os
import random
import shutil

import pytest
from test_pictures import mutated

import data
import main
import run
import tensor as pg
import train
from options import UserError


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


def config(out, **changes):
    return train.TrainConfig(
        **{"model": "mlp", "steps": 12, "batch_size": 8, "out": str(out)} | changes
    )


def bits(folder):
    """Weights, checkpoint, and the logged losses."""
    names = ("model.safetensors", "checkpoint.safetensors")
    losses = [(x["step"], x["split"], x["loss"]) for x in run.RunDirectory(folder).history()]
    return [(folder / name).read_bytes() for name in names], losses


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# ── Kills ─────────────────────────────────────────────────────────────────────────────────────────


def test_killed_before_any_file_gets_its_name_and_resumed_is_bit_identical(tmp_path, monkeypatch):
    """For every rename of a run, die just before it, resume: nothing is lost or stale."""
    train.train(config(tmp_path / "whole"))
    originals, resumed = {name: getattr(os, name) for name in ("replace", "rename")}, 0
    for fatal in range(1, 100):
        out, done = tmp_path / f"killed{fatal}", []

        def dying(a, b, how, done=done, fatal=fatal):
            done.append(b)
            if len(done) == fatal:
                raise Killed
            originals[how](a, b)

        for name in originals:
            monkeypatch.setattr(run.os, name, lambda a, b, name=name, f=dying: f(a, b, name))
        try:
            train.train(config(out))
            break  # there are no more
        except Killed:
            for name, function in originals.items():
                monkeypatch.setattr(run.os, name, function)
        pg.manual_seed(999)  # a new process has another state
        if not (out / "config.json").exists():
            with pytest.raises(UserError, match="nothing to resume"):
                train.train(config(out, steps=None, batch_size=None), resume=True)
            continue
        train.train(config(out, steps=None, batch_size=None), resume=True)
        assert bits(out) == bits(tmp_path / "whole"), f"killed before {done[-1]} got its name"
        resumed += 1
    assert resumed >= 20  # two files at each of 12 logged steps


def test_resume_of_a_finished_run_repairs_stale_weights_and_changes_nothing_else(tmp_path):
    train.train(config(tmp_path / "run"))
    before = bits(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"stale")
    train.train(config(tmp_path / "run", steps=None, batch_size=None), resume=True)
    assert bits(tmp_path / "run") == before


def test_a_copied_run_resumes_in_itself(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(data.TEXT.read_text(encoding="utf-8")[:2000], encoding="utf-8")
    train.train(config(tmp_path / "a", model="gpt", data=str(text), steps=2))
    saved = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    assert "out" not in saved["train"] and saved["train"]["data"] == str(text)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    before = contents(tmp_path / "a")
    train.train(train.TrainConfig(out=str(tmp_path / "b"), steps=4), resume=True)
    assert contents(tmp_path / "a") == before
    assert run.RunDirectory(tmp_path / "b").history()[-1]["step"] == 4


# ── What is the user's ────────────────────────────────────────────────────────────────────────────


def test_out_that_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="exists and is no run"):
        train.train(config(tmp_path / "mine"))
    assert contents(tmp_path / "mine") == {"config.json": b"{}"}
    for name in ("", " "):
        with pytest.raises(UserError, match="--out"):
            train.train(config(name))


def test_a_former_run_is_kept_once_and_a_refused_training_touches_nothing(tmp_path):
    out = tmp_path / "run"
    train.train(config(out, steps=1))
    first = contents(out)
    for wrong in ({"data": str(tmp_path / "nowhere")}, {"model": "moons", "data": "x"}):
        with pytest.raises(UserError):
            train.train(config(out, **wrong))
        assert contents(out) == first and not (tmp_path / "run.previous").exists()
    train.train(config(out, steps=1, seed=1))
    assert contents(tmp_path / "run.previous") == first != contents(out)


def test_a_second_writer_is_refused(tmp_path):
    train.train(config(tmp_path / "run", steps=1))
    with run.RunDirectory(tmp_path / "run").writing():
        for resume in (False, True):
            with pytest.raises(UserError, match="another training writes to"):
                train.train(config(tmp_path / "run", steps=1), resume)


def test_the_verdict_is_only_of_the_run_that_the_readme_describes():
    usual, score = train.TrainConfig(seed=3, out="x").complete(), {"loss": 0.1, "accuracy": 0.99}
    assert train.verdict(usual, score).startswith("on track")
    assert train.verdict(usual, score | {"accuracy": 0.5}).startswith("off track")
    for change in ({"steps": 901}, {"lr": 0.1}, {"size": "small"}, {"dtype": "float64"}):
        other = train.TrainConfig(**change).complete()
        assert "promises nothing" in train.verdict(other, score)


# ── Rates ─────────────────────────────────────────────────────────────────────────────────────────


def test_rates_and_the_time_left_count_steps(tmp_path, monkeypatch, capsys):
    """A clock that goes on by 1 s a call: a step takes 1 s, so 8 examples a step are 8 a second,
    at the odd end (23 = 11·2 + 1) and after a resume from step 12 as well."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train.time, "perf_counter", lambda: float(next(ticks)))
    train.train(config(tmp_path / "run", steps=23))
    lines = [x for x in run.RunDirectory(tmp_path / "run").history() if x["split"] == "train"]
    assert [x["step"] for x in lines] == [1, *range(2, 23, 2), 23]
    assert {x["examples_per_second"] for x in lines} == {8.0}
    assert [x["seconds"] for x in lines] == [x["step"] for x in lines]
    capsys.readouterr()
    train.train(config(tmp_path / "run", steps=30, batch_size=None), resume=True)
    said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
    assert [line.split("  ")[-2:] for line in said] == [
        ["8/s", f"{30 - step} s left"] for step in (24, 27, 30)
    ]


# ── Command line ──────────────────────────────────────────────────────────────────────────────────


def test_export_is_a_new_folder_and_never_the_run_itself(tmp_path):
    train.train(config(tmp_path / "run", steps=1))
    before = contents(tmp_path / "run")
    args = main.parser().parse_args(
        ["--export", str(tmp_path / "run"), "--weights", str(tmp_path / "run")]
    )
    with pytest.raises(UserError, match="there is something in it"):
        main.do_export(args)
    assert contents(tmp_path / "run") == before


def test_ctrl_c_saves_and_a_resume_ends_with_the_same_bits(tmp_path, monkeypatch, capsys):
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    train.train(config(tmp_path / "whole"))
    task, step = train.TASKS["mlp"], train.TASKS["mlp"].step

    def interrupted(self, number):
        if number == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(task, "step", interrupted)
    train.train(config(tmp_path / "run"))
    assert "stopped at step 8 and saved; go on with --train --resume" in capsys.readouterr().err
    monkeypatch.setattr(task, "step", step)
    train.train(config(tmp_path / "run", steps=None, batch_size=None), resume=True)
    assert bits(tmp_path / "run")[0] == bits(tmp_path / "whole")[0]


# ── Damaged files ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "checkpoint.safetensors"])
def test_mutated_files_of_a_run_are_refused_or_whole(tmp_path, name):
    """200 mutations of each file (PIKOGRAD_MUTATIONS: ten times as many by default for pictures):
    loading and resuming work or end in a UserError, never in another exception."""
    out, pick, refused = tmp_path / "run", random.Random(0), 0
    train.train(config(out, steps=1))
    good = contents(out)
    n = int(os.environ.get("PIKOGRAD_MUTATIONS", "2000")) // 10
    for _ in range(n):
        for file, raw in good.items():
            (out / file).write_bytes(raw)
        (out / name).write_bytes(mutated(pick, good[name]))
        try:
            if name.startswith("checkpoint"):
                train.train(train.TrainConfig(out=str(out)), resume=True)
            else:
                train.load_run(out)
        except UserError as error:
            assert len(" ".join(str(error).split())) < 2000
            refused += 1
    assert refused > n // 4
