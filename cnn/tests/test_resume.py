"""A run that was killed anywhere and goes on gives the weights of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import report
import run
import train
from conftest import FOLDER

STEPS = ["--steps", 8, "--eval-every", 3, "--checkpoint-every", 2, "--cutout", 2]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple]:
    """The log without its times: (step, split, loss, accuracy)."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [(x["step"], x["split"], x["loss"], x["accuracy"]) for x in map(json.loads, lines)]


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(report, "LOG_EVERY", 1)


@pytest.fixture
def whole(trained):
    """The run that was left alone."""
    return trained("whole", *STEPS)


def same_run(a: Path, b: Path) -> bool:
    a_state, b_state = state(a), state(b)
    same = all(torch.equal(a_state["average"][k], v) for k, v in b_state["average"].items())
    return same and weights(a) == weights(b) and losses(a) == losses(b)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture
def kill_at(monkeypatch, command, small, npz):
    """`kill_at(n, folder)` trains and dies before step n."""

    def call(n: int, out: Path, *flags) -> None:
        def step(self, number, *ranks, original=train.Trainer.step):
            if number == n:
                raise Killed
            return original(self, number, *ranks)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "step", step)
            with pytest.raises(Killed):
                command("--train", *small, "--data", npz, "--out", out, *STEPS, *flags)

    return call


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_run_killed_between_steps_and_resumed_is_bit_identical(
    whole, kill_at, command, tmp_path, steps
):
    out = tmp_path / "killed"
    kill_at(steps, out)
    resumed = command("--train", "--resume", "--out", out)
    if steps < 2:  # before the first checkpoint there is nothing to go on from
        assert "no checkpoint.pt" in resumed.complaint
        return
    assert resumed.code == 0, resumed.err
    assert same_run(out, whole)


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--dtype", "bfloat16", "--ema", 0]])
def test_resume_is_exact_for_other_recipes_too(trained, kill_at, command, tmp_path, flags):
    whole, out = trained("whole", *STEPS, *flags), tmp_path / "killed"
    kill_at(5, out, *flags)
    assert command("--train", "--resume", "--out", out).code == 0
    assert same_run(out, whole)


def test_run_killed_in_any_write_and_resumed_is_bit_identical(
    whole, command, monkeypatch, tmp_path, small, npz
):
    """At the moment before a new file takes its name, for every such moment of the run."""
    n_write, replace, resumed = [], os.replace, 0
    for fatal in range(1, 100):
        out = tmp_path / f"killed{fatal}"
        n_write.clear()

        def dying(a, b, n_write=n_write, fatal=fatal):
            n_write.append(b)
            if len(n_write) == fatal:
                raise Killed
            replace(a, b)

        monkeypatch.setattr(run.os, "replace", dying)
        try:
            command("--train", *small, "--data", npz, "--out", out, *STEPS)
            break  # more than there are
        except Killed:
            monkeypatch.setattr(run.os, "replace", replace)
        assert not list(out.glob("*.part"))
        if not (out / "checkpoint.pt").exists():
            assert "resume" in command("--train", "--resume", "--out", out).complaint
            continue
        again = command("--train", "--resume", "--out", out)
        assert again.code == 0, again.err
        assert same_run(out, whole), f"killed while writing {n_write[fatal - 1]}"
        resumed += 1
    assert resumed >= 4


def main_py(*words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(FOLDER / "main.py"), *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def test_kill_9_then_resume_is_bit_identical(trained, command, tmp_path, small, npz):
    """A real process and a real kill, wherever it may be."""
    long = [*STEPS, "--steps", 60, "--checkpoint-every", 1]
    whole, out = trained("whole", *long), tmp_path / "killed"
    process = main_py("--train", *small, "--data", npz, "--out", out, *long)
    wait_for(lambda: (out / "checkpoint.pt").exists(), process)
    process.kill()
    process.wait()
    process.stderr.close()
    done = state(out)["step"]
    assert command("--train", "--resume", "--out", out).code == 0
    assert weights(out) == weights(whole), f"killed after step {done}"


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    whole, command, monkeypatch, tmp_path, small, npz, kind
):
    def step(self, number, *ranks, original=train.Trainer.step):
        if number == 4:
            os.kill(os.getpid(), kind)
        return original(self, number, *ranks)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        words = [*small, "--data", npz, "--out", out, *STEPS, "--checkpoint-every", 100]
        stopped = command("--train", *words)
    assert stopped.code == 0
    assert f"go on with --train --resume --out {out}" in stopped.err
    assert state(out)["step"] == 5  # the step that ran was ended
    assert command("--train", "--resume", "--out", out).code == 0
    assert same_run(out, whole)


@pytest.mark.parametrize("part", ["model", "optimizer", "average", "rng", "step", "best"])
def test_checkpoint_without_one_of_its_parts_is_refused(kill_at, command, tmp_path, part):
    kill_at(6, tmp_path / "half")
    kept = state(tmp_path / "half")
    del kept[part]
    torch.save(kept, tmp_path / "half" / "checkpoint.pt")
    complaint = command("--train", "--resume", "--out", tmp_path / "half").complaint
    assert "checkpoint.pt is damaged" in complaint


@pytest.mark.parametrize("part", ["momentum", "average"])
def test_without_a_part_of_the_state_the_weights_would_differ(
    kill_at, whole, command, tmp_path, part
):
    out = tmp_path / "half"
    kill_at(6, out)
    kept = state(out)
    for moments in kept["optimizer"]["state"].values():
        moments["momentum_buffer"].mul_(part != "momentum")
    if part == "average":
        kept["average"] = kept["model"]
    torch.save(kept, out / "checkpoint.pt")
    assert command("--train", "--resume", "--out", out).code == 0
    assert not same_run(out, whole)


def test_log_lines_after_the_checkpoint_are_not_doubled(kill_at, whole, command, tmp_path):
    out = tmp_path / "half"
    kill_at(6, out)
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "split": "train", "loss": 1.0}\n{"step": 7, "split": "tr')
    assert command("--train", "--resume", "--out", out).code == 0
    assert same_run(out, whole)


def test_resume_of_a_finished_run_changes_nothing(whole, command):
    before = weights(whole), losses(whole)
    assert command("--train", "--resume", "--out", whole).code == 0
    assert (weights(whole), losses(whole)) == before


def test_resume_with_more_steps_goes_on_and_scores_again(whole, command):
    assert command("--train", "--resume", "--out", whole, "--steps", 10).code == 0
    assert state(whole)["step"] == 10
    assert [line[0] for line in losses(whole) if line[1] == "test"] == [8, 10]


def test_new_run_forgets_the_old_one(whole, command, small, npz):
    outcome = command("--train", *small, "--data", npz, "--out", whole, "--seed", 7)
    assert outcome.code == 0
    assert {line[0] for line in losses(whole)} == {1, 2}
    assert state(whole)["step"] == 2
