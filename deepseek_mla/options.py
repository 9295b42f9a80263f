"""The command line: flags made from dataclasses, and one line of complaint for what cannot be done.

    option         a field of a dataclass that is also a flag, with the range it must lie in
    add_options    the flags of some dataclasses; from_options: the dataclass with what was given
    make_config    the same dataclass from the JSON object in a file, checked as strictly
    dispatch       do what the verbs on the command line say
    command_line   run a program: exit code 0, or 2 after one line that names the thing and the mend

This file is the same in every folder of Piko and imports the standard library alone.
"""

import argparse
import contextlib
import dataclasses
import importlib
import math
import operator
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path

LARGEST_INT = 2**31 - 1  # what an integer option may be, unless it says otherwise


class UserError(Exception):
    """Something that the user can mend. The message names the thing and the mend in one line."""


# ── Saying and complaining ────────────────────────────────────────────────────────────────────────


def rank_asked() -> int:
    """Which of torchrun's processes this is, 0 without torchrun."""
    number = os.environ.get("RANK", "") or "0"
    if not number.isdecimal():
        raise UserError(f"RANK={shorten(number, 20)} in the environment is no number: unset it")
    return int(number)


def say(text: str = "") -> None:
    """Print to stderr, once however many ranks there are: stdout is for results alone.

    A closed or full stderr, as behind `2>&1 | head`, is no reason to stop a training.
    """
    if rank_asked() == 0:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def shorten(value, longest: int = 300) -> str:
    """`value` as text of one line, cut in the middle where it is very long."""
    text = " ".join(str(value).split())
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"


def command_line(main: Callable[[], None]) -> None:
    """Run `main()` and exit: 0, or 2 after one line of complaint, or 130 after Ctrl-C."""
    if sys.stderr is None:  # closed by the shell, as `2>&-` does
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr.reconfigure(encoding="utf-8", errors="replace")  # Windows consoles often are not
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed, so no result could be printed")
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output left, as in `main.py --sample | head`
        give_up_stdout()
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        line = "error: " + shorten(complaint(error), 600)
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)
        give_up_stdout()
        sys.exit(2)


def give_up_stdout() -> None:
    """Forget output that cannot be written, which Python would try again, and report, at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complaint(error: Exception) -> str:
    """What to tell the user of `error`. Errors that he cannot mend are raised again."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a full disk, a name that is too long, no permission
        what = f"{error.filename}: " if error.filename else ""
        return what + (error.strerror or str(error))
    words = ("allocate memory", "out of memory", "OutOfMemory")  # torch has no one class for it
    if isinstance(error, MemoryError) or any(word in f"{error!r}" for word in words):
        return f"the memory is full; smaller sizes or batches need less ({error})"
    raise error


# ── Options ───────────────────────────────────────────────────────────────────────────────────────

RANGES = {  # the limits that an option may state
    "above": (operator.gt, "more than"),
    "least": (operator.ge, "at least"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def option(default, help: str, choices: tuple | None = None, **limits):
    """A dataclass field that is also a command-line flag.

    limits: any of above=, least=, most=, below=, which `check` holds the value to. Integers are at
    most LARGEST_INT unless `most` says otherwise.
    """
    if unknown := limits.keys() - RANGES.keys():
        raise TypeError(f"an option has no limit {sorted(unknown)}, only {sorted(RANGES)}")
    if type(default) is int:
        limits = {"most": LARGEST_INT} | limits
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices} | limits)


def check(config) -> None:
    """ValueError for the first field of a dataclass that is out of the range its option states."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        if plain_type(hint) in (int, float, bool) and not fits(value, hint):
            raise ValueError(f"{field.name} must be a number, not {value!r}")
        choices = field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number, not {value}")
        for word, (holds, phrase) in RANGES.items():
            limit = field.metadata.get(word)
            if limit is not None and value is not None and not holds(value, limit):
                raise ValueError(f"{field.name} must be {phrase} {limit}, not {shorten(value, 40)}")


class Parser(argparse.ArgumentParser):
    """argparse that complains like everything else here, and never guesses shortened flags."""

    def __init__(self, doc: str):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_known_args(self, args=None, namespace=None):
        """Refuse `--flag=--`, whose value Python up to 3.12 drops without a word."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--") and word.count("=") == 1:
                self.error(f"argument {word.removesuffix('=--')}: -- is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message} (`python main.py` lists the options)")


def utf8_text(value: str) -> str:
    """A word of the command line, refused if it is no UTF-8."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("this is no UTF-8 text") from None
    return value


def plain_type(hint) -> type:
    """int for int | None, and any other type as it is."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    return kinds[0] if kinds else hint


def add_options(parser: argparse.ArgumentParser, *configs: type) -> None:
    """A flag for each field of these dataclasses that has a help text.

    A flag that is not given leaves no trace in what is parsed, so that `from_options` can tell.
    """
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        hints = typing.get_type_hints(config)
        for field in dataclasses.fields(config):
            if "help" not in field.metadata:
                continue
            kind, choices = plain_type(hints[field.name]), field.metadata.get("choices")
            if kind is bool:
                more = {"action": argparse.BooleanOptionalAction}
            elif choices:
                more = {"choices": choices}
            else:
                more = {"type": utf8_text if kind is str else kind, "metavar": kind.__name__}
            text = field.metadata["help"].replace("%", "%%") + f" (default {field.default})"
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **more)


def add_verbs(parser: argparse.ArgumentParser, *verbs: str) -> argparse._ArgumentGroup:
    """The flags that say what to do, and --resume. Returns their group, for verbs with a value."""
    group = parser.add_argument_group("What to do, see above")
    for verb in verbs:
        group.add_argument(f"--{verb}", action="store_true")
    group.add_argument("--resume", action="store_true", help="with --train: go on from --out")
    return group


def given(args: argparse.Namespace, config: type) -> dict:
    """The fields of the dataclass `config` that stand on the command line."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


def from_options(base, args: argparse.Namespace):
    """The dataclass `base` with what stands on the command line. UserError if it cannot be."""
    try:
        config = dataclasses.replace(base, **given(args, type(base)))
        check(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def dispatch(parser: argparse.ArgumentParser, work: dict[str, tuple]) -> None:
    """Parse the command line and do what it says, in the order of `work`.

    work: for each verb what does it and then the options that it looks at. What does it is a
    function of the parsed options, or the name of a module whose `main` is that function. Such a
    module is imported only when it is needed: help appears at once. Options are names, or
    dataclasses for all of their fields. UserError for an option that no verb given looks at.
    """
    args = parser.parse_args()
    if args.resume and not args.train:
        raise UserError("--resume goes with --train")
    for name in ("data", "weights", "out", "export"):
        if not str(getattr(args, name, "not given")).strip():
            raise UserError(f"--{name} is empty: is a variable not set?")
    wanted = [verb for verb in work if getattr(args, verb) not in (None, False)]
    refuse_idle(parser, args, {verb: work[verb][1:] for verb in wanted})
    if not wanted:
        parser.print_help()
    for verb in wanted:
        act = work[verb][0]
        if isinstance(act, str):
            act = importlib.import_module(act).main
        act(args)


def refuse_idle(parser: argparse.ArgumentParser, args: argparse.Namespace, looks_at: dict) -> None:
    """UserError for an option on the command line that none of the verbs in `looks_at` looks at."""
    useful = {"resume", *looks_at}
    for one in sum(looks_at.values(), ()):
        useful |= {one} if isinstance(one, str) else {f.name for f in dataclasses.fields(one)}
    for name, value in vars(args).items():
        if value != parser.get_default(name) and name not in useful:
            flag, verbs = "--" + name.replace("_", "-"), " ".join(f"--{verb}" for verb in looks_at)
            if not verbs:
                raise UserError(f"{flag} alone does nothing: say what to do, such as --train")
            raise UserError(f"{flag} changes nothing in {verbs}: leave it out")


# ── Configs from files ────────────────────────────────────────────────────────────────────────────


def fits(value, hint) -> bool:
    """Is `value`, from a JSON file, of the type that a dataclass field states?"""
    if value is None:
        return types.NoneType in typing.get_args(hint)
    kind = plain_type(hint)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is (typing.get_origin(kind) or kind)


def make_config(kind: type, values, where: Path | str):
    """The dataclass `kind` from the JSON object `values`. UserError names `where` and the field.

    Fields that are left out take their defaults; unknown ones, wrong types and values out of range
    are refused. A field that is a dataclass itself is made from an object in the same way.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: an object was expected, not {shorten(values, 40)}")
    hints, made = typing.get_type_hints(kind), {}
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{where}: there is no {shorten(name, 40)} in a {kind.__name__}")
        if dataclasses.is_dataclass(plain_type(hints[name])) and value is not None:
            value = make_config(plain_type(hints[name]), value, f"{where}, {name}")
        elif not fits(value, hints[name]):
            raise UserError(f"{where}: {name} cannot be {shorten(value, 40)}")
        made[name] = value
    try:
        for name, value in made.items():
            if plain_type(hints[name]) is float and value is not None:
                made[name] = float(value)  # an integer with 400 digits is none
        config = kind(**made)
        check(config)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {error}") from None
    return config
