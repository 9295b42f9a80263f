"""The machinery no reader came for: options from dataclasses, complaints, whole files, runs.

The same names and manners as in Piko's other folders, less what needs torch: this folder runs on
the standard library and numpy.
"""

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import types
import typing
from pathlib import Path

import numpy as np


class UserError(Exception):
    """Something that the user can mend. The message names the thing and the mend in one line."""


def say(text: str = "") -> None:
    """Print to stderr: stdout is for results alone."""
    print(text, file=sys.stderr, flush=True)


def command_line(main) -> None:
    """Run `main()` and exit: 0, or 2 after one line for a UserError, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles are not UTF-8 by default
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
    except (UserError, ValueError) as error:
        say("error: " + " ".join(str(error).split()))
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our stdout left: `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        say(f"error: {error.filename or 'file'}: {error.strerror or error}")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse that complains like everything else here: one line, exit code 2."""

    def error(self, message: str):
        raise UserError(f"{message} (`python main.py` lists the options)")


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_options(parser: argparse.ArgumentParser, *configs: type) -> None:
    """A flag for each field of the dataclasses `configs`; no flag has a default of its own."""
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for field in dataclasses.fields(config):
            kind = field.type
            if isinstance(kind, types.UnionType):  # int | None
                kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
            if kind is not bool:
                choices = field.metadata.get("choices")
                how |= {"choices": choices} if choices else {"metavar": kind.__name__.upper()}
            text = field.metadata["help"].replace("%", "%%") + f" (default {field.default})"
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def from_options(base, args: argparse.Namespace):
    """`base` with what stands on the command line. UserError if it cannot be."""
    names = {field.name for field in dataclasses.fields(base)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        return dataclasses.replace(base, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


class RunDirectory:
    """The files of one run.

    config.json       what was run, with the versions it ran on
    log.jsonl         a line for each merge or EM step
    tokenizer.json    the tokenizer (Unigram: tokenizer.model)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def start(self) -> None:
        """Make the directory, so that an --out that cannot be written fails before the work."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".part"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"cannot write a run to --out {self.path}: {error.strerror}") from None

    def save(self, config: dict, log: list[dict]) -> None:
        """Write config.json and log.jsonl."""
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        content = json.dumps(config | {"versions": versions}, indent=2, default=str) + "\n"
        write_whole(self.path / "config.json", content.encode("utf-8"))
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in log)
        write_whole(self.path / "log.jsonl", lines.encode("utf-8"))


def newest_run(folder: Path) -> Path | None:
    """The directory below `folder` whose tokenizer is the newest."""
    found = [*folder.glob("*/tokenizer.json"), *folder.glob("*/tokenizer.model")]
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    return newest and newest.parent


class CtrlC:
    """Within `with CtrlC() as stop`, stop() says whether Ctrl-C came; a second one ends at once."""

    def __enter__(self):
        self.asked: list[int] = []
        try:
            self.previous = signal.signal(signal.SIGINT, self.note)
        except ValueError:  # not in the main thread, where no signal arrives
            self.previous = None
        return lambda: bool(self.asked)

    def note(self, number, frame) -> None:
        self.asked.append(number)
        signal.signal(number, self.previous)

    def __exit__(self, *_) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)
