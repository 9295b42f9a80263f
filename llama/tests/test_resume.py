"""A run that was killed anywhere and goes on gives the weights of one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run
import train
from conftest import FOLDER

STEPS = ["--steps", 12, "--eval-every", 3, "--checkpoint-every", 2]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple]:
    """The log without its times: (step, split, loss)."""
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [(x["step"], x["split"], x["loss"]) for x in map(json.loads, lines)]


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture(autouse=True)
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)


@pytest.fixture
def whole(trained):
    """The run that was left alone."""
    return trained("whole", *STEPS)


def same_run(a: Path, b: Path) -> bool:
    return weights(a) == weights(b) and losses(a) == losses(b)


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("steps", [1, 4, 6, 9, 11])
def test_run_killed_between_steps_and_resumed_is_bit_identical(
    whole, trained, command, monkeypatch, tmp_path, small, text_file, steps
):
    def step(self, number, *ranks, original=train.Trainer.step):
        if number == steps and not (tmp_path / "was killed").exists():
            (tmp_path / "was killed").touch()
            raise Killed
        return original(self, number, *ranks)

    monkeypatch.setattr(train.Trainer, "step", step)
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        command("--train", *small, "--data", text_file, "--out", out, *STEPS)
    resumed = command("--train", "--resume", "--out", out)
    if steps < 2:  # before the first checkpoint there is nothing to go on from
        assert "no checkpoint.pt" in resumed.complaint
        return
    assert resumed.code == 0, resumed.err
    assert same_run(out, whole)


def test_run_killed_in_any_write_and_resumed_is_bit_identical(
    whole, command, monkeypatch, tmp_path, small, text_file
):
    """At the moment before a new file takes its name, for every such moment of the run."""
    n_write, replace = [], os.replace
    resumed = 0
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
            command("--train", *small, "--data", text_file, "--out", out, *STEPS)
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
    assert resumed >= 8


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


def test_kill_9_at_random_moments_then_resume_is_bit_identical(
    trained, command, tmp_path, small, text_file
):
    """A real process and a real kill, twice; the third time it may end."""
    long = [*STEPS, "--steps", 80, "--checkpoint-every", 1]
    whole, out = trained("whole", *long), tmp_path / "killed"
    words, log = ["--train", *small, "--data", text_file, "--out", out, *long], out / "log.jsonl"
    for _ in range(2):
        process = main_py(*words)
        before = log.stat().st_size if "--resume" in words else 0
        wait_for(lambda: (out / "checkpoint.pt").exists(), process)
        wait_for(lambda before=before: log.stat().st_size > before, process)
        time.sleep(random.SystemRandom().uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stderr.close()
        assert state(out)["step"] <= 80  # the checkpoint itself is never lost
        words = ["--train", "--resume", "--out", out]
    done = state(out)["step"]
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    assert weights(out) == weights(whole), f"killed at step {done}"
    logged = {line[:2]: line for line in losses(whole)}
    assert all(logged.get(line[:2], line) == line for line in losses(out))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(
    whole, command, monkeypatch, tmp_path, small, text_file, kind
):
    def step(self, number, *ranks, original=train.Trainer.step):
        if number == 4:
            os.kill(os.getpid(), kind)
        return original(self, number, *ranks)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        words = [*small, "--data", text_file, "--out", out, *STEPS, "--checkpoint-every", 100]
        stopped = command("--train", *words)
    assert stopped.code == 0
    assert f"go on with --train --resume --out {out}" in stopped.err
    assert state(out)["step"] == 5  # the step that ran was ended
    assert signal.getsignal(kind) in (signal.default_int_handler, signal.SIG_DFL)
    assert command("--train", "--resume", "--out", out).code == 0
    assert same_run(out, whole)


def test_ctrl_c_in_a_real_process_ends_with_a_checkpoint(tmp_path, small, text_file):
    out = tmp_path / "stopped"
    words = ["--data", text_file, "--out", out, "--steps", 10**6, "--checkpoint-every", 10**6]
    process = main_py("--train", *small, *words)
    log = out / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "--train --resume --out" in err and "Traceback" not in err
    assert 0 < state(out)["step"] < 10**6


def test_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), run.ctrl_c() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)


# ── What a checkpoint must hold ───────────────────────────────────────────────────────────────────


@pytest.fixture
def half(command, monkeypatch, tmp_path, small, text_file):
    """A run of 12 steps, stopped after 6."""
    out = tmp_path / "half"
    with monkeypatch.context() as patch:

        def step(self, number, *ranks, original=train.Trainer.step):
            if number == 6:
                raise Killed
            return original(self, number, *ranks)

        patch.setattr(train.Trainer, "step", step)
        with pytest.raises(Killed):
            command("--train", *small, "--data", text_file, "--out", out, *STEPS)
    return out


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "step", "best"])
def test_checkpoint_without_one_of_its_parts_is_refused(half, command, part):
    kept = state(half)
    del kept[part]
    torch.save(kept, half / "checkpoint.pt")
    assert "checkpoint.pt is damaged" in command("--train", "--resume", "--out", half).complaint


def test_without_the_optimizers_moments_the_weights_would_differ(half, whole, command):
    kept = state(half)
    for moments in kept["optimizer"]["state"].values():
        moments["exp_avg"].zero_()
    torch.save(kept, half / "checkpoint.pt")
    assert command("--train", "--resume", "--out", half).code == 0
    assert weights(half) != weights(whole)


def test_random_numbers_after_a_resume_are_those_of_the_run_left_alone(whole, command, monkeypatch):
    """The model throws no dice of its own, so a step that does stands in for one with dropout."""
    thrown, fatal = {}, [None]

    def step(self, number, *ranks, original=train.Trainer.step):
        if number == fatal[0]:
            raise Killed
        thrown.setdefault(number, []).append((torch.rand(()).item(), random.random()))
        return original(self, number, *ranks)

    monkeypatch.setattr(train.Trainer, "step", step)
    config, sizes = train.started_with(whole)
    train.train(config, sizes)
    fatal[0] = 7
    with pytest.raises(Killed):
        train.train(config, sizes)
    fatal[0] = None
    assert command("--train", "--resume", "--out", whole).code == 0
    assert [len(throws) for throws in thrown.values()] == [2] * 6 + [3] + [2] * 5
    assert all(len(set(throws)) == 1 for throws in thrown.values())


def test_log_line_cut_short_is_tolerated(half, whole, command):
    with open(half / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "split": "tr')
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)


def test_log_lines_after_the_checkpoint_are_not_doubled(half, whole, command):
    with open(half / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "split": "train", "loss": 1.0}\n')
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)


def test_resume_of_a_finished_run_changes_nothing(whole, command):
    before = weights(whole), losses(whole)
    assert command("--train", "--resume", "--out", whole).code == 0
    assert (weights(whole), losses(whole)) == before


def test_resume_with_more_steps_goes_on(whole, command):
    assert command("--train", "--resume", "--out", whole, "--steps", 14).code == 0
    assert state(whole)["step"] == 14
    assert losses(whole)[-1][0] == 14


def test_resume_does_not_read_the_text_again(half, whole, command, text_file, stories):
    """The tokens lie in the run; so the text may move, and cannot change under a run."""
    text_file.write_text("something else", encoding="utf-8")
    try:
        assert command("--train", "--resume", "--out", half).code == 0
    finally:
        text_file.write_text(stories, encoding="utf-8")
    assert same_run(half, whole)


def test_new_run_forgets_the_old_one(whole, command, small, text_file):
    outcome = command("--train", *small, "--data", text_file, "--out", whole, "--seed", 7)
    assert outcome.code == 0
    assert {line[0] for line in losses(whole)} == {1, 2}
    assert state(whole)["step"] == 2
