"""Runs: a directory each, in which every file is there whole or not at all.

    read_json      the one reader of JSON, for files that anybody may have written
    whole_file     a file that appears in one step, or never
    RunDirectory   what a run leaves behind; a former run is kept, and nothing else is ever harmed
    stop_signals   Ctrl-C ends the step that runs, then saves

This file is the same in every folder of Piko. It imports filelock and the standard library,
and nothing in it knows a model.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from options import UserError, rank_asked, say

LARGEST_JSON = 1 << 28  # bytes; the largest tokenizer.json that we know has 35 million


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that becomes `path` in one step, on disk, or never.

    UserError where it cannot be written, say because the disk is full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a JSON file; {} if it is optional and not there. UserError if it is unfit."""
    try:
        if optional and not path.exists():
            return {}
        if not path.is_file():
            raise UserError(f"{path} is missing or no file")
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} is larger than {LARGEST_JSON:,} bytes: that is no config")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, 5,000 digits, 5,000 levels
        raise UserError(f"{path} is damaged or no JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


class RunDirectory:
    """The directory of one run. Only rank 0 writes.

    config.json         what was run, with the versions of Python and of the libraries
    log.jsonl           a line for each logged step
    model.safetensors   the weights that were best on the validation part
    checkpoint.pt       everything to go on from
    """

    RESULTS = ("model.safetensors", "checkpoint.*")
    FILES = (  # what runs leave; a directory with other things in it is never deleted
        "config.json", "log.jsonl", "*.safetensors", "checkpoint.*", "*.bin", "*.npz", "*.model",
        "tokenizer*.json", "tokens.json", "alphabet.json", "samples.*", "figures/*.png", ".*.part",
    )  # fmt: skip

    def __init__(self, path: str | Path, results: tuple[str, ...] = RESULTS):
        """results: patterns of what makes a run worth keeping when another takes its place."""
        if not str(path).strip() or not Path(os.path.abspath(path)).name:
            raise UserError("--out needs the name of a directory")
        self.path, self.results = Path(os.path.abspath(path)), results
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path)):
            raise UserError("--out: the path is no UTF-8, and safetensors takes no other")
        self.config, self.log_file = self.path / "config.json", self.path / "log.jsonl"
        self.weights, self.checkpoint = self.path / "model.safetensors", self.path / "checkpoint.pt"
        self.writes = rank_asked() == 0

    @property
    def previous(self) -> Path:
        """Where the former run is kept."""
        return self.path.with_name(self.path.name + ".previous")

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only one who writes to this run; sweep up what a killed one left half written.

        UserError if another training writes there.
        """
        if not self.writes:
            yield
            return
        with only_writer(self.path):
            self.sweep()
            yield

    def sweep(self) -> None:
        """Delete what `create` and `whole_file` of a killed process left half done."""
        half_done = re.compile(rf"\.{re.escape(self.path.name)}\.\d+\.(new|old)")
        for left in self.path.parent.iterdir():
            if half_done.fullmatch(left.name):
                remove_tree(left)
        for part in self.path.iterdir() if is_run(self.path) else []:
            if re.fullmatch(r"\..+\.\d+\.part", part.name):
                part.unlink()

    def refuse_what_is_not_ours(self, data: str = "") -> None:
        """UserError if a new run could not take this place without harm to something else.

        data: a folder to train on, where a run would be read as data the next time.
        """
        if data and Path(os.path.realpath(self.path)).is_relative_to(os.path.realpath(data)):
            raise UserError(f"--out {self.path} is inside of --data: name another place")
        for path in (self.path, self.previous):
            if os.path.lexists(path) and not is_run(path):
                raise UserError(f"--out: {path} exists and is no run: choose another name")
        if os.path.lexists(self.path) and (found := self.not_ours(self.to_be_deleted())):
            raise UserError(f"{found.parent} is to be replaced, but holds {found.name}: move it")

    def to_be_deleted(self) -> Path:
        """The former run if it has no result yet, else the one before it."""
        has_result = any(list(self.path.glob(pattern)) for pattern in self.results)
        return self.previous if has_result else self.path

    def not_ours(self, folder: Path) -> Path | None:
        """A file in `folder` that no run left there."""
        ours = {file for pattern in self.FILES for file in folder.glob(pattern)}
        files = {file for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
        return min(files - ours, default=None)

    def create(self, config: dict, fill: Callable[[Path], None] = lambda folder: None) -> None:
        """Begin a new run: config.json, an empty log and what `fill(folder)` writes.

        All of it is written beside and takes its place in one step. If anything fails before that,
        nothing has changed. A former run in this place is kept, once, as `previous`.
        """
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        old = new.with_suffix(".old")
        try:
            new.mkdir(parents=True)
            RunDirectory(new).save_config(config)
            (new / "log.jsonl").touch()
            fill(new)
            self.refuse_what_is_not_ours()
            if os.path.lexists(self.path):
                with only_writer(self.previous):
                    self.make_room(old)
            os.rename(new, self.path)
        finally:
            for left in (new, old):
                if os.path.lexists(left):
                    remove_tree(left)

    def make_room(self, old: Path) -> None:
        """Move the former run to `previous`, and the one before it, or one without result, away."""
        outdated = self.to_be_deleted()
        if os.path.lexists(outdated):
            os.rename(outdated, old)
        if outdated == self.previous:
            os.rename(self.path, self.previous)
            say(f"the former run in {self.path} is kept as {self.previous}")

    def save_config(self, config: dict) -> None:
        """Write config.json: `config` and the versions it runs on."""
        versions = {"python": platform.python_version(), "platform": platform.platform()}
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions["numpy"] = importlib.metadata.version("numpy")
            versions["torch"] = importlib.metadata.version("torch")
        write_json(self.config, config | {"versions": versions})

    def log(self, **line) -> None:
        """Append one line of numbers to log.jsonl."""
        if not self.writes:
            return
        try:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.log_file}: {error.strerror}") from None

    def history(self) -> list[dict]:
        """The logged lines. What is no line of ours, such as one cut short, is passed over."""
        lines = []
        if self.log_file.exists():
            for text in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    line = json.loads(text)
                    if isinstance(line, dict) and type(line.get("step")) is int:
                        lines += [line] if isinstance(line.get("split"), str) else []
        return lines

    def truncate_log(self, step: int) -> None:
        """Forget the lines after `step`: a resumed run will write them again."""
        if self.writes:
            kept = [line for line in self.history() if line["step"] <= step]
            write_text(self.log_file, "".join(json.dumps(line) + "\n" for line in kept))


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a run directory. UserError if somebody else does."""
    real = Path(os.path.realpath(path))  # one lock, whatever link leads there
    real.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(real.with_name(f".{real.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"another training writes to {path}: take another --out") from None
    try:
        yield
    finally:
        lock.release()


def is_run(path: Path) -> bool:
    """Is this the directory of a run, to judge by its config.json?"""
    with contextlib.suppress(UserError):
        return {"train", "versions"} <= read_json(path / "config.json").keys()
    return False


def refuse_endless(path: Path) -> None:
    """UserError if `path`, or something in that folder, is a pipe or a device: it may never end."""
    for one in path.iterdir() if path.is_dir() else [path]:
        if one.exists() and not one.is_file() and not one.is_dir():
            raise UserError(f"{one} is a pipe or a device, a file was expected")


def remove_tree(path: Path) -> None:
    """Delete a directory, or the link to one."""
    delete = os.unlink if path.is_symlink() else shutil.rmtree
    delete(path)


def newest_run(folder: Path, result: str = "model.safetensors") -> Path | None:
    """The run below `folder` whose `result` is the newest."""
    found = [file for file in folder.glob(f"*/{result}") if not file.parent.name.startswith(".")]
    return max(found, key=lambda file: file.stat().st_mtime).parent if found else None


def place_to_export(folder: str) -> Path:
    """The folder to export to. UserError unless it is new or empty: nothing is written over."""
    path = Path(os.path.abspath(folder))
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"--export {folder}: name a new folder")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--export {folder}: there is something in it; name a new folder")
    if any(is_run(parent) for parent in path.parents):
        raise UserError(f"--export {folder}: this is inside of a run; name a new folder elsewhere")
    return path


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C, a polite kill or a hang-up of the terminal came.

    The same signal a second time does what it always does: it ends the program at once.
    """
    came = []

    def note(number, frame):
        came.append(number)
        signal.signal(number, usual[number])

    in_main_thread = threading.current_thread() is threading.main_thread()  # no other gets signals
    names = ("SIGINT", "SIGTERM", "SIGHUP") if in_main_thread else ()
    wanted = [getattr(signal, name, None) for name in names]  # Windows has not all of them
    heard = [one for one in wanted if one and signal.getsignal(one) != signal.SIG_IGN]  # nohup
    usual = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
