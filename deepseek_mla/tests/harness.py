"""What every folder is tested for alike: its command line, what is the user's, kills and resume.

This file is the same in every folder of Piko that trains with torch. `small.py` beside it says what
is particular:

    FLAGS              the flags of a training run that takes a moment
    MANY               flags for one of twelve steps, which scores every 3 and saves every 2
    write_data(folder) writes data for such a run below `folder` and returns its path
    hurry(monkeypatch) leaves out what only takes time, such as pictures
    SAMPLE             the flags of a verb that uses a run, such as --sample
    REFUSED            (words after --train …, what the complaint says) of this folder alone

conftest.py imports the fixtures, test_common.py the tests. Tests that start processes are marked
`slow`: `python -m pytest -m "not slow"` leaves them out.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import small
import torch

import loop
import options
import run
import trainer

FOLDER = Path(__file__).resolve().parent.parent
posix = pytest.mark.skipif(os.name != "posix", reason="no such thing on this system")
no_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may do it all")


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@dataclasses.dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line of a refused command; AssertionError if it was not refused properly."""
        assert self.code == 2 and "Traceback" not in self.err, self
        lines = self.err.splitlines()
        assert lines[-1].startswith("error: ") and len(lines[-1]) < 700, self.err
        return lines[-1]

    @property
    def only_line(self) -> str:
        """The complaint of a command that was refused before it did or said anything."""
        assert self.out == "" and len(self.err.splitlines()) == 1, self
        return self.complaint


# ── Fixtures ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("--train", …)` is `python main.py --train …` without the seconds to import torch."""
    import hardware
    import main

    monkeypatch.setattr(hardware, "matmul_rate", lambda *_: 1e11)  # a clock is no matter of tests
    small.hurry(monkeypatch)

    def call(*words) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
        capsys.readouterr()
        code, streams = 0, (sys.stdout, sys.stderr)
        try:
            options.command_line(main.main)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stdout, sys.stderr = streams
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """The data of `small.write_data`."""
    return small.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def words(small_data) -> list:
    """The beginning of a command that trains: --train, small sizes, small data."""
    return ["--train", *small.FLAGS, "--data", small_data]


@pytest.fixture
def trained(command, words, tmp_path):
    """`trained("name", flags…)` trains a small run in tmp_path/name and returns that path."""

    def call(name: str = "run", *flags) -> Path:
        outcome = command(*words, "--out", tmp_path / name, *flags)
        assert outcome.code == 0, outcome.err
        return tmp_path / name

    return call


@pytest.fixture
def every_step_is_logged(monkeypatch):
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


@pytest.fixture
def whole(trained, every_step_is_logged) -> Path:
    """A run of twelve steps that was left alone."""
    return trained("whole", *small.MANY)


def kill_at(monkeypatch, step: int) -> None:
    """Let the process 'die' when this step is about to begin, once."""

    def dying(self, number, original=trainer.Trainer.step):
        if number == step and not killed:
            killed.append(number)
            raise Killed
        return original(self, number)

    killed: list[int] = []
    monkeypatch.setattr(trainer.Trainer, "step", dying)


@pytest.fixture
def half(command, words, monkeypatch, tmp_path, every_step_is_logged) -> Path:
    """A run of twelve steps that was killed after six."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 6)
        command(*words, "--out", tmp_path / "half", *small.MANY)
    return tmp_path / "half"


# ── Looking at a run ──────────────────────────────────────────────────────────────────────────────


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def losses(folder: Path) -> list[tuple]:
    """The log without its times: (step, split, loss)."""
    return [(x["step"], x["split"], x["loss"]) for x in run.RunDirectory(folder).history()]


def same_run(a: Path, b: Path) -> bool:
    return weights(a) == weights(b) and losses(a) == losses(b)


def state(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, with its bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def start_main(*words, program: tuple = (), **environment) -> subprocess.Popen:
    """A process of its own."""
    return subprocess.Popen(
        [sys.executable, *program, str(FOLDER / "main.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def wait_for(condition, process: subprocess.Popen) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)


# ── What a run is ─────────────────────────────────────────────────────────────────────────────────


def test_smoke_train_leaves_a_run(trained):
    out = trained()
    wanted = {"config.json", "log.jsonl", "model.safetensors", "checkpoint.pt"}
    assert wanted <= {file.name for file in out.iterdir()}
    assert not [name for name in contents(out.parent) if name.endswith((".part", ".new"))]
    saved = run.read_json(out / "config.json")
    assert saved["versions"]["torch"] == torch.__version__
    assert "out" not in saved["train"]  # a copied run is a run of its own
    assert losses(out)[0][0] == 1


def test_no_rubbish_beyond_what_runs_are_known_to_leave(trained):
    """RunDirectory.FILES lists it; a folder with other things in it is never deleted."""
    out = trained()
    known = {file for pattern in run.RunDirectory.FILES for file in out.glob(pattern)}
    assert set(out.iterdir()) <= known


def test_results_go_to_stdout_and_nothing_else_does(command, trained, words, tmp_path):
    outcome = command(*words, "--out", tmp_path / "a")
    assert "step" in outcome.err and "step" not in outcome.out


def test_same_seed_same_bits(trained):
    a, b, other = trained("a"), trained("b"), trained("c", "--seed", 1)
    assert weights(a) == weights(b) != weights(other)


def test_two_smoke_steps_are_neither_on_nor_off_track(command, words, tmp_path):
    err = command(*words, "--out", tmp_path / "run").err
    assert "on track" not in err and "off track" not in err


def test_help_names_every_verb(command):
    outcome = command()
    assert outcome.code == 0 and outcome.err == ""
    for verb in ("--train", "--eval", "--bench", "--figures", "--selfcheck"):
        assert f"main.py {verb} " in outcome.out


# ── What is the user's stays ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("inside", [[], ["notes.txt"], ["config.json", "model.safetensors"]])
def test_out_that_is_no_run_is_refused_and_left_alone(command, words, tmp_path, inside):
    out = tmp_path / "mine"
    out.mkdir()
    for name in inside:
        (out / name).write_text('{"model_type": "llama"}', encoding="utf-8")
    before = contents(tmp_path)
    assert "exists and is no run" in command(*words, "--out", out).only_line
    assert {k: v for k, v in contents(tmp_path).items() if not k.endswith(".lock")} == before


@pytest.mark.parametrize("name", ["", " ", ".", "..", os.path.abspath(os.sep)])
def test_out_that_names_no_new_directory_is_refused(command, words, tmp_path, monkeypatch, name):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    assert "--out" in command(*words, "--out", name).only_line


def test_out_inside_of_data_is_refused(command, words, small_data, tmp_path):
    """Where the next training would take the run for data."""
    folder = tmp_path / "texts"
    shutil.copytree(small_data.parent, folder)
    line = command(*words, "--data", folder, "--out", folder / "run").only_line
    assert "is inside of --data" in line and not (folder / "run").exists()


@posix
def test_place_whose_name_is_no_utf8_is_refused(command, words, tmp_path, monkeypatch):
    """safetensors could not write there, which a long training would learn at its end."""
    try:
        (odd := tmp_path / os.fsdecode(b"\xff")).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    monkeypatch.chdir(odd)
    assert "no UTF-8" in command(*words, "--out", "run").only_line


def test_out_that_is_a_file_is_refused(command, words, tmp_path):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    assert command(*words, "--out", tmp_path / "run").only_line
    assert command(*words, "--out", tmp_path / "run" / "deeper").only_line
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


def test_former_run_is_kept_once(command, trained, words):
    out = trained("run")
    first = weights(out)
    outcome = command(*words, "--out", out, "--seed", 1)
    assert "is kept as" in outcome.err
    assert weights(out.with_name("run.previous")) == first != weights(out)
    trained("run", "--seed", 2)
    assert sorted(p.name for p in out.parent.iterdir() if p.is_dir()) == ["run", "run.previous"]


def test_former_run_with_something_of_the_users_in_it_is_not_deleted(trained, command, words):
    out = trained("run")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    trained("run", "--seed", 1)
    assert "notes.txt" in command(*words, "--out", out).only_line
    assert (out.with_name("run.previous") / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_refused_training_leaves_the_former_run_alone(command, trained, words, tmp_path):
    out = trained("run")
    before = contents(out)
    for wrong in (["--data", tmp_path / "nowhere"], ["--steps", 0], ["--weights", tmp_path / "no"]):
        assert command(*words, "--out", out, *wrong).complaint
        assert contents(out) == before
    assert not out.with_name("run.previous").exists()


def test_diverging_training_leaves_the_former_run_as_previous(command, trained, words, monkeypatch):
    out = trained("run")
    first = weights(out)
    monkeypatch.setattr(trainer.Trainer, "step", lambda self, number: {"loss": float("nan")})
    assert "not finite at step 1" in command(*words, "--out", out).complaint
    assert weights(out.with_name("run.previous")) == first
    assert "not finite" in command(*words, "--out", out).complaint
    assert weights(out.with_name("run.previous")) == first  # a run without weights displaces none


def test_killed_while_a_former_run_is_deleted(command, trained, words, monkeypatch):
    """It has another name by then: what is left of it stands in nobody's way and goes later."""
    out = trained("run")
    trained("run", "--seed", 1)

    def dying(folder):
        (folder / "config.json").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dying)
        command(*words, "--out", out, "--seed", 2)
    kept = weights(out.with_name("run.previous"))
    assert command(*words, "--out", out, "--seed", 3).code == 0
    assert weights(out.with_name("run.previous")) == kept  # the killed one had no result yet
    assert sorted(p.name for p in out.parent.iterdir() if p.is_dir()) == ["run", "run.previous"]


def test_training_from_the_run_that_it_replaces(command, trained, words):
    """The weights are read before anything moves, and the former run stays as previous."""
    out = trained("run")
    first = weights(out)
    outcome = command("--train", "--data", words[words.index("--data") + 1], "--weights", out,
                      "--out", out, "--steps", 1, "--batch-size", 4)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert weights(out.with_name("run.previous")) == first


def test_run_starts_from_an_empty_directory(trained):
    out = trained("run")
    (out / "samples.txt").write_text("old", encoding="utf-8")
    trained("run", "--seed", 1)
    left = contents(out).get("samples.txt")
    assert left != b"old"


def test_copied_run_resumes_in_itself(half, whole, command, tmp_path):
    copy = shutil.copytree(half, tmp_path / "elsewhere" / "copy")
    before = contents(half)
    assert command("--train", "--resume", "--out", copy).code == 0
    assert same_run(copy, whole)
    assert contents(half) == before


def test_second_writer_is_refused(command, trained, words):
    out = trained("run")
    with run.RunDirectory(out).writing():
        complaint = command(*words, "--out", out).only_line
        assert "another training writes to" in complaint
        assert "another training" in command("--train", "--resume", "--out", out).only_line


@posix
def test_second_writer_by_another_name_is_refused(command, trained, tmp_path):
    out = trained("run")
    os.symlink(out, tmp_path / "link")
    with run.RunDirectory(out).writing():
        outcome = command("--train", "--resume", "--out", tmp_path / "link")
    assert "another training writes to" in outcome.only_line


def test_former_run_that_somebody_writes_to_is_not_deleted(command, trained, words):
    out = trained("run")
    previous = trained("run", "--seed", 1).with_name("run.previous")
    before = contents(previous)
    with run.RunDirectory(previous).writing():
        assert "another training writes to" in command(*words, "--out", out).complaint
    assert contents(previous) == before


def test_left_overs_of_a_killed_run_are_swept_up(trained):
    out = trained("run")
    (out / ".model.safetensors.999.part").touch()
    (out.parent / ".run.999.new").mkdir()
    trained("run")
    assert not [n for n in os.listdir(out.parent) if n.endswith(".new")]
    assert not list(out.glob(".*.part"))


def test_export_writes_over_nothing(command, trained, tmp_path):
    out = trained("run")
    before = contents(out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").touch()
    (tmp_path / "file").touch()
    for target in (out, tmp_path / "mine", tmp_path / "file"):
        assert "--export" in command("--weights", out, "--export", target).complaint
    assert contents(out) == before
    assert (tmp_path / "mine" / "config.json").read_bytes() == b""


# ── Kills and resume ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("step", [1, 4, 9])
def test_killed_between_steps_and_resumed_is_bit_identical(
    whole, command, words, monkeypatch, tmp_path, step
):
    out = tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, step)
        command(*words, "--out", out, *small.MANY)
    resumed = command("--train", "--resume", "--out", out)
    assert resumed.code == 0, resumed.err
    assert same_run(out, whole)


def test_killed_at_any_change_of_a_name_and_resumed_is_bit_identical(
    whole, command, words, monkeypatch, tmp_path
):
    """At the moment before a new file or directory takes its name, for every such moment."""
    originals, resumed = {"replace": os.replace, "rename": os.rename}, 0
    for fatal in range(1, 100):
        out, done = tmp_path / f"killed{fatal}", []

        def dying(a, b, how="replace", done=done, fatal=fatal):
            done.append(b)
            if len(done) == fatal:
                raise Killed
            originals[how](a, b)

        monkeypatch.setattr(run.os, "replace", dying)
        monkeypatch.setattr(run.os, "rename", lambda a, b, dying=dying: dying(a, b, "rename"))
        try:
            command(*words, "--out", out, *small.MANY)
            break  # there are no more
        except Killed:
            for name, function in originals.items():
                monkeypatch.setattr(run.os, name, function)
        if not (out / "config.json").exists():
            assert "nothing to resume" in command("--train", "--resume", "--out", out).only_line
            continue
        again = command("--train", "--resume", "--out", out)
        assert again.code == 0, again.err
        assert same_run(out, whole), f"killed before {done[-1]} got its name"
        resumed += 1
    assert resumed >= 8


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(whole, command, words, monkeypatch, tmp_path, kind):
    def step(self, number, original=trainer.Trainer.step):
        if number == 4:
            os.kill(os.getpid(), kind)
        return original(self, number)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", step)
        stopped = command(*words, "--out", out, *small.MANY, "--checkpoint-every", 100)
    assert stopped.code == 0 and stopped.out == ""
    assert f"go on with --train --resume --out {out}" in stopped.err.splitlines()[-1]
    assert state(out)["step"] == 5  # the step that ran was ended
    assert signal.getsignal(kind) in (signal.default_int_handler, signal.SIG_DFL)
    assert command("--train", "--resume", "--out", out, "--checkpoint-every", 2).code == 0
    assert same_run(out, whole)


def test_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), run.stop_signals() as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("part", ["model", "optimizer", "rng", "step", "best", "pending"])
def test_checkpoint_without_one_of_its_parts_is_refused(half, command, part):
    kept = state(half)
    del kept[part]
    torch.save(kept, half / "checkpoint.pt")
    assert "checkpoint.pt is damaged" in command("--train", "--resume", "--out", half).complaint


def wrong_values(kept: dict) -> dict:
    """What may stand in a checkpoint where something else belongs."""
    states, groups = kept["optimizer"]["state"], kept["optimizer"]["param_groups"]
    name, moments = next(iter(states.items()))
    key = next(key for key in moments if key != "step")

    def twisted(value) -> dict:
        return {"optimizer": {"state": states | {name: moments | {key: value}},
                              "param_groups": groups}}  # fmt: skip

    weight, tensor = next(iter(kept["model"].items()))
    fewer = {k: v for k, v in moments.items() if k != key}
    other = [{**group, "weight_decay": 9.0} for group in groups]
    short = [{**group, "params": group["params"][1:]} for group in groups]
    return {
        "step is text": {"step": "7"},
        "step is negative": {"step": -1},
        "best is text": {"best": "x"},
        "rng is empty": {"rng": []},
        "rng is a number": {"rng": 7},
        "model is a list": {"model": [1, 2]},
        "step is beyond the last": {"step": 2**40},
        "best is no number": {"best": math.nan},
        "a weight has another shape": {"model": kept["model"] | {weight: torch.zeros(2, 2)}},
        "a weight is of integers": {"model": kept["model"] | {weight: tensor.long()}},
        "moments have another shape": twisted(torch.zeros(3)),
        "moments have no shape": twisted(torch.tensor(0.0)),
        "moments are of integers": twisted(moments[key].long()),
        "moments are text": twisted("x"),
        "moments are missing": {
            "optimizer": {"state": states | {name: fewer}, "param_groups": groups}
        },
        "optimizer is empty": {"optimizer": {}},
        "optimizer remembers nothing": {"optimizer": {"state": {}, "param_groups": groups}},
        "optimizer is set otherwise": {"optimizer": {"state": states, "param_groups": other}},
        "optimizer has fewer weights": {"optimizer": {"state": states, "param_groups": short}},
        "pending is a number": {"pending": [1]},
        "pending holds text": {"pending": [{"loss": "x"}]},
        "pending holds other numbers": {"pending": [{"banana": 1.0}]},
    }


def test_checkpoint_with_wrong_values_is_refused(half, command):
    good = state(half)
    for name, changes in wrong_values(good).items():
        torch.save(good | changes, half / "checkpoint.pt")
        outcome = command("--train", "--resume", "--out", half)
        assert "checkpoint.pt is damaged" in outcome.complaint, name


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_checkpoint_with_code_in_it_does_not_run(half, command, tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "armed")))
    assert (tmp_path / "armed").exists()  # the bomb does go off where pickles are trusted
    for save in (torch.save, lambda bomb, file: file.write_bytes(pickle.dumps(bomb))):
        save({"model": Bomb(tmp_path / "marker")}, half / "checkpoint.pt")
        assert "damaged" in command("--train", "--resume", "--out", half).complaint
        assert not (tmp_path / "marker").exists()


def test_damaged_checkpoints_are_refused(half, command):
    good, dice = (half / "checkpoint.pt").read_bytes(), random.Random(0)
    for _ in range(30):
        bad = bytearray(good)
        at = dice.randrange(len(bad))
        bad = bad[:at] if dice.random() < 0.5 else bad[:at] + dice.randbytes(50) + bad[at + 50 :]
        (half / "checkpoint.pt").write_bytes(bad)
        outcome = command("--train", "--resume", "--out", half)
        if outcome.code:  # between the parts of the file there are bytes that nobody reads
            assert "damaged" in outcome.complaint or "not finite" in outcome.complaint
        assert "Traceback" not in outcome.err


def flip_a_bit(file: Path) -> None:
    """Change one weight a little in a file of torch.save, so that it still reads as one."""
    with zipfile.ZipFile(file) as archive:
        tensors = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    numbers = max(tensors, key=len)
    damaged = bytearray(file.read_bytes())
    damaged[damaged.index(numbers) + len(numbers) // 2] ^= 1
    file.write_bytes(damaged)
    torch.load(file, weights_only=True)  # without a word


def test_flipped_bit_in_a_checkpoint_is_refused(half, command):
    flip_a_bit(half / "checkpoint.pt")
    outcome = command("--train", "--resume", "--out", half)
    assert "checkpoint.pt is damaged" in outcome.complaint and "checksum" in outcome.complaint


def test_checkpoint_without_checksums_is_taken(half, whole, command):
    """torch.save writes zeros in their place where it is told to be quick."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(half), half / "checkpoint.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)


@pytest.mark.parametrize("left", ["nothing", "empty", "file", "no run"])
def test_resume_of_nothing(command, tmp_path, left):
    out = tmp_path / "there"
    if left in ("empty", "no run"):
        out.mkdir()
    if left == "no run":
        (out / "config.json").write_text("{}", encoding="utf-8")
    if left == "file":
        out.touch()
    assert "nothing to resume in" in command("--train", "--resume", "--out", out).only_line


@pytest.mark.parametrize("more", [["--seed", 1], ["--lr", 0.5], ["--batch-size", 7]], ids=str)
def test_resume_as_another_run_is_refused(half, command, more):
    complaint = command("--train", "--resume", "--out", half, *more).only_line
    assert str(more[0]) in complaint and "leave it out" in complaint


def test_resume_with_the_same_flags_once_more(half, whole, command, words):
    outcome = command(*words, "--resume", "--out", half, *small.MANY)
    assert outcome.code == 0, outcome.err
    assert same_run(half, whole)


def test_resume_of_a_finished_run_changes_nothing(whole, command):
    before = weights(whole), losses(whole)
    assert command("--train", "--resume", "--out", whole).code == 0
    assert (weights(whole), losses(whole)) == before


@pytest.mark.parametrize("log", ["", '{"step": 9}\n', '{"step": 1, "split": "valid"}\n'])
def test_resume_of_a_finished_run_without_its_log(trained, command, log):
    """The test part is scored once more, since nobody knows its score."""
    out = trained("run")
    (out / "log.jsonl").write_text(log, encoding="utf-8")
    outcome = command("--train", "--resume", "--out", out)
    assert outcome.code == 0, outcome.err
    last = run.RunDirectory(out).history()[-1]
    assert (last["step"], last["split"]) == (2, "test")


def test_log_with_times_that_are_none(half, command):
    with open(half / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 6, "split": "x", "loss": 1, "seconds": null, "train_seconds": "x"}\n')
        file.write('{"step": 6, "split": "x", "loss": 1, "seconds": 1e999, "train_seconds": [1]}\n')
    assert command("--train", "--resume", "--out", half).code == 0
    times = [x.get("seconds", 0) for x in run.RunDirectory(half).history() if x["step"] > 6]
    assert times and all(map(math.isfinite, times))


def test_resume_with_more_steps_goes_on(whole, command):
    assert command("--train", "--resume", "--out", whole, "--steps", 14).code == 0
    assert state(whole)["step"] == 14
    assert losses(whole)[-1][0] == 14


@pytest.mark.parametrize(
    "line",
    ['{"step": 7, "split": "tr', "[]", "7", "null", '{"step": "7"}', "[" * 9999, '{"loss": 1}',
     '{"step": 7, "split": "train", "loss": 1.0}', "\x00\xff", '{"step": ' + "9" * 5000 + "}"],
    ids=range(10),
)  # fmt: skip
def test_log_lines_that_are_none_are_passed_over(half, whole, command, line):
    with open(half / "log.jsonl", "a", encoding="latin-1") as file:
        file.write(line)
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)


# ── Files that anybody may have written ───────────────────────────────────────────────────────────


def spoilt_configs(good: dict) -> dict[str, str]:
    """config.json of a run, wrong in many ways."""
    train, model = good["train"], good["model"]
    text = json.dumps(good)
    number = next(k for k, v in model.items() if type(v) is int and v > 1)
    wrong = {
        "not JSON": text[:-5],
        "no object": "[1]",
        "deep": "[" * 100_000,
        "long number": text.replace(f'"{number}": {model[number]}', f'"{number}": ' + "9" * 5000),
        "not UTF-8": "\udcff",
    }
    for value in (0, -1, None, "2", 2.5, True, [], {}, 10**20, 1e300):
        wrong[f"{number} {value!r}"] = json.dumps(good | {"model": model | {number: value}})
    for value in (0, -1, None, "2", [], 10**20):
        wrong[f"steps {value!r}"] = json.dumps(good | {"train": train | {"steps": value}})
    for key in ("model", "train"):
        wrong[f"{key} is a list"] = json.dumps(good | {key: [1]})
        wrong[f"{key} has more"] = json.dumps(good | {key: good[key] | {"banana": 1}})
    wrong["lr is huge"] = json.dumps(good | {"train": train | {"lr": float("inf")}})
    return wrong


@posix
@pytest.mark.parametrize("name", ["checkpoint.pt", "log.jsonl", "model.safetensors"])
def test_pipe_in_the_place_of_a_file_is_refused(half, command, name):
    """Else the program waits for ever for somebody to write to it."""
    (half / name).unlink()
    os.mkfifo(half / name)
    for words in (["--train", "--resume", "--out", half], [*small.SAMPLE, "--weights", half]):
        assert f"{name} is a pipe or a device" in command(*words).only_line


def test_config_that_asks_for_more_memory_than_there_is(half, command):
    """A batch of 2³¹ rows: refused at once, not when the memory is full."""
    good = run.read_json(half / "config.json")
    good["train"]["batch_size"] = 2**31 - 1
    run.write_json(half / "config.json", good)
    assert "training this needs" in command("--train", "--resume", "--out", half).only_line


def test_run_whose_config_lacks_something_is_not_resumed(half, command):
    """A default in its place would make another run of it without a word."""
    good, before = run.read_json(half / "config.json"), state(half)["step"]
    for part, values in (("train", good["train"]), ("model", good["model"])):
        for name in values:
            rest = {key: value for key, value in values.items() if key != name}
            run.write_json(half / "config.json", good | {part: rest})
            outcome = command("--train", "--resume", "--out", half)
            assert f"config.json, {part}: {name} is missing" in outcome.only_line
    assert state(half)["step"] == before


def test_damaged_config_is_one_line(half, command):
    good = run.read_json(half / "config.json")
    for name, text in spoilt_configs(good).items():
        (half / "config.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
        outcome = command("--train", "--resume", "--out", half)
        assert outcome.code == 2, name
        assert "config.json" in outcome.complaint or "memory" in outcome.complaint, name
        outcome = command(*small.SAMPLE, "--weights", half)
        if not name.startswith(("steps", "lr", "train")):  # which only training reads
            assert outcome.code == 2 and outcome.complaint, name


# ── Words that cannot be ──────────────────────────────────────────────────────────────────────────

REFUSED = [
    (["--trian"], "unrecognized arguments: --trian"),
    (["train"], "unrecognized arguments: train"),
    (["--step", "2"], "--step"),  # no guessing of shortened flags
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps"], "--steps: expected one argument"),
    (["--steps", "0"], "steps must be at least 1"),
    (["--steps", "1" + "0" * 400], "steps must be at most"),
    (["--steps", "9" * 5000], "--steps: invalid int value"),
    (["--steps", "1" + "0" * 20], "steps must be at most"),
    (["--batch-size", "-1"], "batch_size must be at least"),
    (["--batch-size", "1" + "0" * 20], "batch_size must be at most"),
    (["--lr", "nan"], "lr must be a finite number, not nan"),
    (["--lr", "inf"], "lr must be a finite number, not inf"),
    (["--lr", "0"], "lr must be more than 0"),
    (["--seed", "-1"], "seed must be at least 0"),
    (["--seed", "9" * 30], "seed must be at most"),
    (["--dtype", "float64"], "invalid choice: 'float64'"),
    (["--device", "tpu"], "invalid choice: 'tpu'"),
    (["--data", "nowhere"], "nowhere"),
    (["--data", "x" * 5000], "name too long"),
    (["--data", "loop"], "loop"),
    (["--data", "\udcff"], "no UTF-8"),
    (["--out", "x" * 5000], "name too long"),
    (["--shard"], "start with torchrun"),
]


@pytest.mark.parametrize(
    ("more", "message"),
    [*REFUSED, *small.REFUSED],
    ids=lambda x: str(x)[:40].encode("ascii", "replace").decode(),
)
def test_words_that_cannot_be(command, words, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    if "loop" in more:
        os.symlink("loop", "loop")
    outcome = command(*words, "--out", "run", *more)
    assert message.lower() in outcome.complaint.lower()
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    "kind", ["nowhere", "loop", "x" * 5000, "empty", "file"], ids=lambda k: k[:9]
)
def test_weights_that_are_none(command, small_data, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"PK\x03\x04 no weights")
    words = ["--train", "--data", small_data, "--out", "run", "--weights", kind]
    for line in (words, [*small.SAMPLE, "--weights", kind]):
        assert kind[:9] in command(*line).complaint
    assert not (tmp_path / "run").exists()


def test_option_that_the_verb_does_not_look_at_is_refused(command):
    """Else `--eval --width 7` scores a network that is 4 wide, and says nothing."""
    assert "--steps changes nothing in --" in command(*small.SAMPLE, "--steps", "3").only_line
    assert "--steps alone does nothing" in command("--steps", "3").only_line


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("RANK", "7"), ("WORLD_SIZE", "x"), ("MASTER_PORT", "x")],
)
def test_torchruns_variables_that_are_wrong(command, words, tmp_path, monkeypatch, name, value):
    """As schedulers and old shells leave them."""
    for other, good in TORCHRUN.items():
        monkeypatch.setenv(other, good)
    monkeypatch.setenv(name, value)
    assert name in command(*words, "--out", tmp_path / "run").complaint


def test_rank_alone_is_no_torchrun(trained, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert (trained() / "model.safetensors").exists()


def test_resume_goes_with_train(command):
    assert "--resume goes with --train" in command("--resume").only_line


@no_root
def test_read_only_place(command, words, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "ermission" in command(*words, "--out", tmp_path / "locked" / "run").complaint


def test_training_in_a_thread(words, monkeypatch, tmp_path):
    """As in a notebook or a server: signals belong to the main thread, and nothing breaks."""
    import threading

    import main

    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words), "--out", str(tmp_path / "run")])
    small.hurry(monkeypatch)
    failed = []
    threading.excepthook, usual = failed.append, threading.excepthook
    thread = threading.Thread(target=main.main)
    thread.start()
    thread.join()
    threading.excepthook = usual
    assert failed == [] and (tmp_path / "run" / "model.safetensors").exists()


# ── Full disks ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def largest_file(n_byte: int):
    """No file may grow beyond n_byte: the kernel says EFBIG where a full disk says ENOSPC."""
    import resource

    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_byte, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)


@posix
def test_full_disk_is_one_line_and_tears_nothing(command, words, whole, tmp_path):
    largest = max(len(data) for data in contents(whole).values())
    sizes = [
        0,
        10,
        200,
        1000,
        3000,
        10_000,
        *(int(largest * x) for x in (0.1, 0.3, 0.6, 0.9, 0.99)),
    ]
    refused = 0
    for n_byte in sizes:
        out = tmp_path / f"full{n_byte}"
        with largest_file(n_byte):
            outcome = command(*words, "--out", out, *small.MANY)
        if outcome.code == 0:
            continue
        refused += 1
        assert "cannot write" in outcome.complaint, outcome.err
        assert not [name for name in contents(tmp_path) if name.endswith((".part", ".new"))]
        if (out / "config.json").exists():
            assert command("--train", "--resume", "--out", out).code == 0
            assert same_run(out, whole), n_byte
    assert refused >= 5


# ── Processes of their own ────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_kill_9_at_random_moments_then_resume_is_bit_identical(trained, command, words, tmp_path):
    """A real process and a real kill, twice; the third time it may end."""
    long = [*small.MANY, "--steps", 40, "--checkpoint-every", 1]
    whole, out = trained("whole", *long), tmp_path / "killed"
    again, log = [*words, "--out", out, *long], out / "log.jsonl"
    for _ in range(2):
        process = start_main(*again)
        before = log.stat().st_size if "--resume" in again else 0
        wait_for(lambda: (out / "checkpoint.pt").exists(), process)
        wait_for(lambda before=before: log.stat().st_size > before, process)
        time.sleep(random.SystemRandom().uniform(0, 0.3))
        process.kill()
        process.communicate()
        assert state(out)["step"] <= 40  # the checkpoint itself is never lost
        again = ["--train", "--resume", "--out", out]
    outcome = command(*again)
    assert outcome.code == 0, outcome.err
    assert weights(out) == weights(whole)


@pytest.mark.slow
@posix
def test_ctrl_c_in_a_real_process_ends_with_a_checkpoint(words, tmp_path):
    out = tmp_path / "stopped"
    process = start_main(*words, "--out", out, "--steps", 10**6, "--checkpoint-every", 10**6)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 0 and "Traceback" not in err, err
    assert "--train --resume --out" in err
    assert 0 < state(out)["step"] < 10**6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_cannot_be_written_is_one_line(trained):
    out = trained()
    main = f"{sys.executable} {FOLDER / 'main.py'} {' '.join(small.SAMPLE)} --weights {out}"
    for where in (">/dev/full", ">&-"):
        done = subprocess.run(["bash", "-c", f"{main} {where}"], capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done
        assert done.stderr.splitlines()[-1].startswith("error: ")


def torchrun(*words) -> subprocess.Popen:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return start_main(*words, program=launcher)


gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")


@pytest.mark.slow
@gloo
@pytest.mark.parametrize("more", small.RANKS, ids=lambda more: " ".join(more) or "replicated")
def test_two_ranks_give_the_loss_curve_of_one(trained, words, tmp_path, more):
    flags = ["--steps", 4, "--batch-size", 5, "--eval-every", 1]
    alone, out = trained("alone", *flags), tmp_path / "ranks"
    process = torchrun(*words, "--out", out, *flags, *more)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "2 rank(s)" in err
    assert [line[:2] for line in losses(out)] == [line[:2] for line in losses(alone)]
    for ours, expected in zip(losses(out), losses(alone), strict=True):
        assert ours[2] == pytest.approx(expected[2], abs=1e-4)
    assert state(out)["model"].keys() == state(alone)["model"].keys()
    assert len(state(out)["rng"]) == 2


@pytest.mark.slow
@gloo
@posix
def test_ranks_agree_on_the_stop(words, tmp_path):
    """torchrun passes a SIGTERM on to its ranks; they end the same step, save, and can go on."""
    out = tmp_path / "ranks"
    process = torchrun(*words, "--out", out, "--steps", 10**6, "--checkpoint-every", 10**6)
    wait_for(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert f"go on with --train --resume --out {out}" in err
    done = state(out)["step"]
    assert 0 < done < 10**6
    assert len(state(out)["rng"]) == 2
    process = torchrun("--train", "--resume", "--out", out, "--steps", done + 2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert state(out)["step"] == done + 2
