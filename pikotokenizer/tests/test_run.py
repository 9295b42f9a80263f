"""What is the user's stays: kills at every file operation, damaged files, places that are taken."""

import contextlib
import json
import os
import random
import shutil
import sys
import threading
from pathlib import Path

import pytest
from test_formats import MUTATIONS, mutated

import main
import run
import train
from conftest import HERE
from options import UserError
from tokenizer import load
from train import TrainConfig

SMALL = {"vocab_size": 262, "pattern": "whitespace"}


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "t.txt"
    path.write_text("satu dua tiga satu dua\n" * 20, encoding="utf-8")
    return path


def config(place: Path, text: Path, **more) -> TrainConfig:
    return TrainConfig(**(SMALL | {"data": str(text), "out": str(place)} | more))


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def is_whole(folder: Path) -> bool:
    """Whether the files of a run are there and speak of the same tokenizer."""
    found = files(folder)
    if set(found) != {"config.json", "log.jsonl", "tokenizer.json"}:
        return False
    size = json.loads(found["config.json"])["train"]["vocab_size"]
    ids = [json.loads(line)["id"] for line in found["log.jsonl"].splitlines()]
    return len(load(folder)) == size == ids[-1] + 1 and ids == list(range(256, size))


OPERATIONS = [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree"),
              (Path, "mkdir"), (Path, "touch"), (Path, "unlink"), (Path, "write_bytes"),
              (Path, "write_text")]  # fmt: skip


def kill_at(patch, number: int, after: bool) -> list[int]:
    """Makes the `number`-th file operation the last, before or after it is done."""
    count = [0]

    def watched(usual):
        def call(*args, **options):
            count[0] += 1
            mine = count[0]
            if mine > number or (mine == number and not after):
                raise Killed
            result = usual(*args, **options)
            if mine == number:
                raise Killed
            return result

        return call

    for owner, name in OPERATIONS:
        patch.setattr(owner, name, watched(getattr(owner, name)))
    return count


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_killed_at_every_file_operation(data, tmp_path, monkeypatch, resume, after):
    """The run is the old one or the new one, whole; if it is in neither place yet, it is kept."""
    monkeypatch.setattr(run.filelock.FileLock, "release", lambda self, force=False: None)
    number = 0
    while True:
        number += 1
        out = tmp_path / f"{number}"
        train.train(config(out, data))
        old = files(out)
        with monkeypatch.context() as patch:
            count = kill_at(patch, number, after)
            with contextlib.suppress(Killed):
                train.train(config(out, data, vocab_size=264), resume)
            if count[0] < number:
                break
        previous = out.with_name(out.name + ".previous")
        here = out if out.exists() else previous
        assert is_whole(here), (number, here, sorted(files(here)))
        assert files(here) == old or len(load(here)) == 264, number
        if here == out and len(load(out)) == 264:
            assert files(previous) == old, number
    assert number > 10


def test_a_killed_run_can_be_followed_by_another(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        kill_at(patch, 4, True)
        with pytest.raises(Killed):
            train.train(config(out, data))
    train.train(config(out, data))
    assert is_whole(out) and not list(tmp_path.glob(".run.*.new"))


def test_out_that_is_something_else_is_left_alone(data, tmp_path):
    for name, content in (("notes.txt", "mine"), ("config.json", '{"model": 1}')):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match="is no run"):
            train.train(config(out, data))
        assert (out / name).read_text(encoding="utf-8") == content
    with pytest.raises(UserError, match="--out needs"):
        train.train(config(Path("x"), data, out=" "))


def test_refused_training_touches_nothing(data, tmp_path):
    out = tmp_path / "run"
    train.train(config(out, data))
    old = files(out)
    for change in ({"vocab_size": 10}, {"pattern": "("}, {"data": str(tmp_path / "none")}):
        with pytest.raises(UserError):
            train.train(config(out, data, **change))
        assert files(out) == old and not (tmp_path / "run.previous").exists()


def test_a_second_writer_is_refused_by_name(data, tmp_path):
    out = tmp_path / "run"
    with run.RunDirectory(out).writing(), pytest.raises(UserError, match=r"another training.*run"):
        train.train(config(out, data))


def test_a_copied_run_resumes_in_itself(data, tmp_path, monkeypatch):
    """From another working directory, and with the data's own path kept whole."""
    monkeypatch.chdir(data.parent)
    out, copy = tmp_path / "run", tmp_path / "elsewhere"
    train.train(config(out, Path("t.txt")))
    shutil.copytree(out, copy)
    shutil.rmtree(out)
    monkeypatch.chdir(tmp_path)
    again = train.started_with(copy)
    train.train(config(copy, Path(again.data), vocab_size=265), resume=True)
    assert is_whole(copy) and not out.exists()
    steps = [line["step"] for line in run.RunDirectory(copy).history()]
    assert steps == list(range(1, 10))


def test_ctrl_c_keeps_what_was_learnt(data, tmp_path, monkeypatch):
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    out, seen = tmp_path / "run", []
    monkeypatch.setattr(
        train.Watcher, "__call__", interrupting(train.Watcher.__call__, seen, signal)
    )
    train.train(config(out, data))
    assert len(load(out)) == 256 + 3 and len(seen) == 3


def interrupting(usual, seen: list, signal):
    def call(self, *args):
        seen.append(args)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return usual(self, *args)

    return call


def test_training_in_a_thread(data, tmp_path):
    thread = threading.Thread(target=train.train, args=(config(tmp_path / "run", data),))
    thread.start()
    thread.join()
    assert is_whole(tmp_path / "run")


def answer(monkeypatch, capsys, *words) -> str:
    """What main.py says to a command that it must refuse with one line."""
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        main.command_line(main.main)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_exports_write_over_nothing(data, tmp_path, monkeypatch, capsys):
    out, taken = tmp_path / "run", tmp_path / "x.json"
    train.train(config(out, data))
    taken.write_text("mine", encoding="utf-8")
    (tmp_path / "encoder.json").write_text("mine", encoding="utf-8")
    for target, said in ((taken, "exists already"), (tmp_path / "vocab.bpe", "encoder.json exists"),
                         (out / "y.json", "inside a run")):  # fmt: skip
        assert said in answer(monkeypatch, capsys, "--weights", out, "--export", target)
    page = ("--encode", "a", "--html", taken)
    assert "is no page of ours" in answer(monkeypatch, capsys, "--weights", out, *page)
    assert taken.read_text(encoding="utf-8") == "mine" and not (tmp_path / "vocab.bpe").exists()


def test_damaged_files_of_a_run_are_one_line(data, tmp_path, monkeypatch, capsys):
    """config.json, the log and the data file, as --eval and --resume read them."""
    out = tmp_path / "run"
    mine = tmp_path / "t.txt"
    mine.write_bytes(data.read_bytes())
    train.train(config(out, mine))
    whole = {name: (out / name).read_bytes() for name in ("config.json", "log.jsonl")}
    rng = random.Random(0)
    for n in range(MUTATIONS):
        for name, content in whole.items():
            (out / name).write_bytes(mutated(content, rng) if n % 2 else content)
        mine.write_bytes(data.read_bytes() if n % 2 else mutated(data.read_bytes(), rng))
        try:
            held = train.started_with(out)
            run.RunDirectory(out).history()
            main.held_out_of(out, main.parser().parse_args([]))
            assert held.vocab_size >= 1
        except UserError as error:
            assert str(error)


def test_special_files_that_are_damaged_are_one_line(tmp_path, monkeypatch, capsys):
    told = tmp_path / "special.json"
    for content in (b"[1]", b"\xff", b"{", b'{"a": "b"}'):
        told.write_bytes(content)
        words = ("--weights", HERE / "pretrained", "--special", told, "--encode", "a")
        assert answer(monkeypatch, capsys, *words).startswith("error: ")
