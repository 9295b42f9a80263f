"""Whole files, JSON that anybody may have written, and what a run directory does to others."""

import errno
import os
import signal
import threading

import pytest
from harness import posix

import run
from options import UserError
from run import RunDirectory, is_run, newest_run, place_to_export, read_json, whole_file

# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


def test_file_appears_whole_in_the_end(tmp_path):
    file = tmp_path / "file"
    with whole_file(file) as part:
        part.write_text("new", encoding="utf-8")
        assert not file.exists()
    assert file.read_text(encoding="utf-8") == "new" and list(tmp_path.iterdir()) == [file]


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(ZeroDivisionError), whole_file(file) as part:
        part.write_text("ne", encoding="utf-8")
        raise ZeroDivisionError
    assert file.read_text(encoding="utf-8") == "old" and list(tmp_path.iterdir()) == [file]


def test_failure_before_anything_was_written_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_the_users_error_and_leaves_nothing(tmp_path):
    refused = pytest.raises(UserError, match="cannot write .*file: No space left")
    with refused, whole_file(tmp_path / "file") as part:
        part.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under the right name."""
    order = []
    replace, fsync = run.os.replace, run.os.fsync
    monkeypatch.setattr(run.os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(run.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with whole_file(tmp_path / "file") as part:
        part.write_text("x", encoding="utf-8")
    assert order == ["fsync", "replace"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1]", b"7", b"null", b'"text"', b"\xff", b'{"a": 1} more', b"[" * 100_000,
     b'{"a":' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff\xfe{\x00}\x00"],
    ids=lambda x: repr(x[:12]),
)  # fmt: skip
def test_json_that_is_no_object_is_the_users_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json (is damaged or no JSON|holds no JSON object)"):
        read_json(tmp_path / "a.json")


def test_json_that_is_not_there(tmp_path):
    assert read_json(tmp_path / "a.json", optional=True) == {}
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(UserError, match="is missing or no file"):
            read_json(path)


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "a.json").write_text('{"a": 123}' + " ", encoding="utf-8")
    with pytest.raises(UserError, match="larger than 10 bytes"):
        read_json(tmp_path / "a.json")


def test_json_written_is_json_read(tmp_path):
    run.write_json(tmp_path / "a.json", {"é": [1, 2.5, None], "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5, None], "path": str(tmp_path)}


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


CONFIG = {"train": {"lr": 1.0}, "model": {"n": 1}}


@pytest.fixture
def it(tmp_path) -> RunDirectory:
    """A run that has begun."""
    it = RunDirectory(tmp_path / "run")
    it.create(CONFIG)
    return it


def test_new_run_has_its_config_with_versions_and_an_empty_log(tmp_path):
    it = RunDirectory(tmp_path / "deep" / "run")
    it.create(CONFIG, lambda folder: (folder / "train.bin").write_bytes(b"123"))
    config = read_json(it.config)
    assert config["model"] == {"n": 1} and config["versions"].keys() >= {"python", "numpy", "torch"}
    assert it.history() == [] and (it.path / "train.bin").read_bytes() == b"123"
    assert is_run(it.path) and sorted(p.name for p in it.path.parent.iterdir()) == ["run"]


def test_failure_while_a_run_begins_changes_nothing(it):
    it.weights.write_bytes(b"old")

    def fail(folder):
        (folder / "train.bin").write_bytes(b"123")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        it.create(CONFIG, fail)
    assert it.weights.read_bytes() == b"old"
    assert sorted(p.name for p in it.path.parent.iterdir()) == ["run"]


def test_former_run_moves_aside_and_the_one_before_it_goes(it):
    for content in (b"1", b"2", b"3"):
        it.weights.write_bytes(content)
        it.create(CONFIG)
    assert not it.weights.exists()
    assert (it.previous / "model.safetensors").read_bytes() == b"3"


def test_run_without_a_result_displaces_none(it):
    it.weights.write_bytes(b"1")
    it.create(CONFIG)  # which now has no result yet
    it.create(CONFIG)
    assert (it.previous / "model.safetensors").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.npz", "model.safetensors"])
def test_what_makes_a_run_worth_keeping(it, name):
    (it.path / name).touch()
    it.create(CONFIG)
    assert (it.previous / name).exists()


def test_what_is_no_run_is_refused(it, tmp_path):
    for name in ("mine", "run.previous"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="mine exists and is no run"):
        RunDirectory(tmp_path / "mine").create(CONFIG)
    with pytest.raises(UserError, match="run.previous exists and is no run"):
        it.create(CONFIG)
    os.rmdir(tmp_path / "run.previous")
    (tmp_path / "run.previous").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="run.previous exists and is no run"):
        it.create(CONFIG)


@pytest.mark.parametrize("name", ["log.jsonl", "model.safetensors"])
def test_place_that_cannot_be_moved_loses_nothing(it, monkeypatch, name):
    """A mount point, for instance."""

    def busy(a, b):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(a))

    (it.path / name).write_text("mine", encoding="utf-8")
    before = sorted(it.path.parent.rglob("*"))
    monkeypatch.setattr(run.os, "rename", busy)
    with pytest.raises(OSError, match="busy"):
        it.create(CONFIG)
    left = [path for path in sorted(it.path.parent.rglob("*")) if path.suffix != ".lock"]
    assert left == before and (it.path / name).read_text(encoding="utf-8") == "mine"


@posix
def test_link_that_leads_nowhere_is_something(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "run")
    with pytest.raises(UserError, match="run exists and is no run"):
        RunDirectory(tmp_path / "run").create(CONFIG)


@posix
def test_link_to_a_run_is_moved_and_the_run_behind_it_stays(it, tmp_path):
    it.weights.write_bytes(b"1")
    os.symlink(it.path, tmp_path / "link")
    linked = RunDirectory(tmp_path / "link")
    for _ in range(2):
        linked.create(CONFIG)
        linked.weights.write_bytes(b"2")
        linked.create(CONFIG)
    assert it.weights.read_bytes() == b"1"


def test_name_of_a_run_may_not_be_empty():
    for name in ("", "  "):
        with pytest.raises(UserError, match="--out needs the name"):
            RunDirectory(name)


def test_one_writer_a_directory(it):
    with it.writing():
        refused = pytest.raises(UserError, match="another training writes to")
        with refused, RunDirectory(it.path).writing():
            pass
        with RunDirectory(it.path.with_name("other")).writing():
            pass
    with it.writing():
        pass


def test_other_ranks_write_nothing(it, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    other = RunDirectory(it.path)
    before = {file.name: file.read_bytes() for file in it.path.iterdir()}
    with it.writing(), other.writing():  # rank 0 holds the lock, the others do not ask for it
        other.log(step=1)
        other.truncate_log(0)
    assert not other.writes
    assert {file.name: file.read_bytes() for file in it.path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, False), ("{}", False), ('{"model_type": "llama"}', False), ("[", False),
     ('{"train": {}}', False), ('{"train": {}, "versions": {}}', True)],
)  # fmt: skip
def test_run_is_known_by_its_config(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    assert is_run(tmp_path) == expected


# ── The log ───────────────────────────────────────────────────────────────────────────────────────


def test_log_and_history(it):
    for step in (1, 2, 3):
        it.log(step=step, split="train", loss=step / 2)
    expected = [{"step": s, "split": "train", "loss": s / 2} for s in (1, 2, 3)]
    assert it.history() == expected
    assert it.history() == it.history()  # reading changes nothing


def steps(it: RunDirectory) -> list[int]:
    return [line["step"] for line in it.history()]


def test_log_is_cut_behind_a_step(it):
    for step in (1, 2, 3):
        it.log(step=step, split="train")
    it.truncate_log(2)
    assert steps(it) == [1, 2]
    it.log(step=9, split="train")
    assert steps(it) == [1, 2, 9]


@pytest.mark.parametrize(
    "line", ['{"step": 2, "lo', '{"step": 2}', '{"step": 2, "split": 7}', '{"split": "train"}', "3"]
)
def test_line_that_is_none_is_passed_over_and_then_dropped(it, line):
    it.log(step=1, split="train")
    with open(it.log_file, "a", encoding="utf-8") as file:
        file.write(line)
    assert steps(it) == [1]
    it.truncate_log(1)
    it.log(step=2, split="train")
    assert steps(it) == [1, 2]


def test_log_that_cannot_be_written_is_the_users_error(it):
    it.log_file.unlink()
    it.log_file.mkdir()
    with pytest.raises(UserError, match="cannot write .*log.jsonl"):
        it.log(step=1)


# ── Where things are ──────────────────────────────────────────────────────────────────────────────


def test_newest_run_is_the_one_whose_weights_are_newest(tmp_path):
    assert newest_run(tmp_path / "nowhere") is None
    for name, when in (("a", 3000), ("b", 5000), ("c", 4000), (".b.1.new", 9000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        os.utime(tmp_path / name / "model.safetensors", (when, when))
    (tmp_path / "d").mkdir()  # without weights
    assert newest_run(tmp_path) == tmp_path / "b"
    assert newest_run(tmp_path, "other.npz") is None


def test_export_goes_to_a_new_or_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "file").touch()
    place_to_export(tmp_path / "new")
    place_to_export(tmp_path / "empty")
    for folder in (tmp_path / "full", tmp_path / "file", run.Path("")):
        with pytest.raises(UserError, match="--export .*name a new folder"):
            place_to_export(folder)


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────


STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("kind", STOPS)
def test_signal_is_noted_and_the_old_handler_comes_back(kind):
    before = signal.signal(kind, signal.SIG_DFL)  # whoever started the tests may ignore it: nohup
    try:
        with run.stop_signals() as stopped:
            assert not stopped()
            signal.raise_signal(kind)
            assert stopped()
        assert signal.getsignal(kind) == signal.SIG_DFL
    finally:
        signal.signal(kind, before)


@posix
def test_signal_that_is_ignored_stays_ignored(monkeypatch):
    """`nohup` starts a program so that it outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run.stop_signals() as stopped:
            signal.raise_signal(signal.SIGHUP)
            assert not stopped()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_get_no_signals_and_need_none():
    said = []

    def work():
        with run.stop_signals() as stopped:
            said.append(stopped())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert said == [False]


def test_machinery_knows_no_model():
    for name in ("run", "options", "hardware", "loop", "trainer"):
        text = run.Path(run.__file__).with_name(f"{name}.py").read_text(encoding="utf-8").lower()
        assert not [word for word in ("llama", "vocab", "attention") if word in text], name


def test_sweep_leaves_what_others_named_alike(tmp_path):
    """Only `.run.<digits>.new` and `.old`, and `.part` files of a run, are ours to delete."""
    kept = [tmp_path / name for name in (".run.my.new", ".run.b.12.new", "run/.film.part")]
    for path in kept:
        path.mkdir(parents=True)
    (tmp_path / ".run.12.new").mkdir()
    (tmp_path / ".run.12.old").mkdir()
    with RunDirectory(tmp_path / "run").writing():
        pass
    assert all(path.exists() for path in kept)
    assert not (tmp_path / ".run.12.new").exists() and not (tmp_path / ".run.12.old").exists()


def test_folders_inside_a_run_are_the_users(tmp_path):
    """`figures/paper.tex` and `samples_mine/x` lie where runs leave files; no run wrote them."""
    for name in ("figures/paper.tex", "samples_mine/x"):
        it = RunDirectory(tmp_path / name.replace("/", "_"))
        it.create({"train": {}})
        file = it.path / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
        with pytest.raises(UserError, match="is to be replaced, but holds"):
            it.refuse_what_is_not_ours()


def test_nothing_is_exported_into_a_run(tmp_path):
    it = RunDirectory(tmp_path / "run")
    it.create({"train": {}})
    with pytest.raises(UserError, match="inside of a run"):
        place_to_export(it.path / "sub")
