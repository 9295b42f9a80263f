"""What every training script needs and no reader came for, on numpy alone.

    options      dataclass fields become command-line flags    option, add_options, from_options
    complaints   one line on stderr and exit code 2             UserError, command_line
    files        a file is there whole or not at all            whole_file, RunDirectory
    weights      safetensors, read and written here             save_tensors, load_tensors
    stopping     Ctrl-C ends the step that runs, then saves     ctrl_c

Nothing in here knows a model. The siblings' run.py has the same names and manners with torch.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import struct
import sys
import types
import typing
from pathlib import Path

import numpy as np


class UserError(Exception):
    """Something that the user can mend. The message names the thing and the mend in one line."""


def say(text=""):
    """Print to stderr: stdout is for results alone."""
    print(text, file=sys.stderr, flush=True)


def command_line(main):
    """Run `main()` and exit: 0, or 2 after one line for a UserError, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles are not UTF-8 by default
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our stdout left, as in `main.py --sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError) as error:  # OSError: a full disk, a directory that went away
        say("error: " + " ".join(str(error).split()))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# options


class Parser(argparse.ArgumentParser):
    """argparse that complains like everything else here: one line, exit code 2."""

    def error(self, message):
        raise UserError(f"{message} (`python main.py` lists the options)")


def option(default, help, choices=None):
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_options(parser, config):
    """A flag for each field of the dataclass `config`; none has a default."""
    group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
    for field in dataclasses.fields(config):
        kind = field.type
        if isinstance(kind, types.UnionType):  # int | None
            kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        choices = field.metadata["choices"]
        how = {"choices": choices} if choices else {"metavar": kind.__name__.upper()}
        default = "by model" if field.default is None else field.default
        text = f"{field.metadata['help']} (default {default})".replace("%", "%%")
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, type=kind, default=argparse.SUPPRESS, help=text, **how)


def given(args, config):
    """The fields of the dataclass `config` that stand on the command line."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


def from_options(base, args):
    """The dataclass `base` with what stands on the command line; UserError if it cannot be."""
    try:
        return dataclasses.replace(base, **given(args, type(base)))
    except ValueError as error:
        raise UserError(str(error)) from None


# files


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path` that becomes `path` in one step, on disk, or never."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    """The object in a JSON file. UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: give a run directory") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


DTYPES = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8"), "I64": np.dtype("<i8")}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def save_tensors(path, arrays, metadata=None):
    """Write name → array in the safetensors format, whole or not at all.

    Format (github.com/huggingface/safetensors): the length of the header as 8 little-endian bytes,
    a JSON header name → {dtype, shape, data_offsets}, then the bytes of all arrays.
    """
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name, a in arrays.items():
        header[name] = {
            "dtype": CODES[a.dtype],
            "shape": a.shape,
            "data_offsets": [at, at + a.nbytes],
        }
        at += a.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for a in arrays.values():
            file.write(np.ascontiguousarray(a).tobytes())


def load_tensors(path):
    """(name → array, metadata) of a safetensors file. UserError if missing or damaged."""
    try:
        raw = path.read_bytes()
    except OSError:
        raise UserError(
            f"{path} is missing or unreadable: train first, or give --weights"
        ) from None
    try:
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        metadata, body, arrays = header.pop("__metadata__", {}), raw[8 + size :], {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            array = np.frombuffer(body[first:last], DTYPES[entry["dtype"]])
            arrays[name] = array.reshape(entry["shape"]).copy()
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        raise UserError(f"{path} is damaged or no safetensors file of float32/64, int64") from None
    return arrays, metadata


class RunDirectory:
    """The files of one run.

    config.json              what was run, with the versions it ran on
    log.jsonl                a line for each logged step
    model.safetensors        the weights of the last step
    checkpoint.safetensors   everything to go on from: weights, optimizer, random generator, step
    """

    def __init__(self, path):
        self.path = Path(path)
        self.config, self.log_file = self.path / "config.json", self.path / "log.jsonl"
        self.weights = self.path / "model.safetensors"
        self.checkpoint = self.path / "checkpoint.safetensors"

    def start(self):
        """Make the directory and forget the run that it held before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.checkpoint, self.weights, self.log_file, *self.path.glob(".*.part")):
                file.unlink(missing_ok=True)
            self.log_file.touch()
        except OSError as error:
            raise UserError(f"cannot write a run to --out {self.path}: {error.strerror}") from None

    def save_config(self, config):
        """Write config.json: `config` and the versions it runs on."""
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        write_json(self.config, config | {"versions": versions | {"platform": platform.platform()}})

    def log(self, **line):
        """Append one line of numbers to log.jsonl."""
        with open(self.log_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def history(self, before=float("inf")):
        """The logged lines up to step `before`; later ones, and a line cut short, are dropped."""
        kept = []
        if self.log_file.exists():
            for text in self.log_file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    kept += [line] if (line := json.loads(text))["step"] <= before else []
        if before != float("inf"):
            with whole_file(self.log_file) as part:
                part.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
        return kept

    def load_checkpoint(self):
        """(arrays, metadata) of the checkpoint. UserError if there is none."""
        if not self.checkpoint.exists():
            raise UserError(f"nothing to resume in {self.path}: no checkpoint there, train first")
        return load_tensors(self.checkpoint)


def newest_run(folder):
    """The run directories below `folder` that hold weights, newest first."""
    found = folder.glob("*/model.safetensors")
    return [f.parent for f in sorted(found, key=lambda f: f.stat().st_mtime, reverse=True)]


# stopping


@contextlib.contextmanager
def ctrl_c():
    """Yield a function that says whether Ctrl-C or a polite kill came; a second ends at once."""
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, previous[number])

    previous = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
