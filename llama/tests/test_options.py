"""The command line: flags from dataclasses, and one line for what cannot be done."""

import argparse
import dataclasses
import errno
import io
import json
import os
import sys

import pytest
import torch

import options
from options import (
    LARGEST_INT,
    Parser,
    UserError,
    add_options,
    add_verbs,
    check,
    dispatch,
    from_options,
    given,
    make_config,
    option,
    shorten,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Some settings.

    Raises ValueError for n = 13.
    """

    n: int = option(3, "a number, 100 % needed")
    rate: float = option(0.5, "a rate", above=0, most=10)
    kind: str = option("a", "a kind", ("a", "b"))
    fast: bool = option(False, "quicker")
    limit: int | None = option(None, "none is no limit", least=1)
    hidden: int = 7

    def __post_init__(self):
        if self.n == 13:
            raise ValueError("n must not be 13")


# ── Options ───────────────────────────────────────────────────────────────────────────────────────


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser("what it does")
    add_options(parser, Config)
    return parser.parse_args(words)


def test_options_come_from_the_fields():
    words = ["--n", "5", "--rate", "1e-3", "--kind", "b", "--fast", "--limit", "9"]
    assert from_options(Config(), parsed(*words)) == Config(5, 1e-3, "b", True, 9)


def test_what_is_not_given_stays_as_it_is():
    assert from_options(Config(n=8, rate=2.0), parsed("--rate", "4")) == Config(n=8, rate=4.0)
    assert given(parsed("--rate", "4"), Config) == {"rate": 4.0}
    assert given(parsed("--n", "3"), Config) == {"n": 3}  # given, though it is the default


def test_flag_can_be_taken_back():
    assert from_options(Config(fast=True), parsed("--no-fast")).fast is False


def test_field_without_help_is_no_option():
    with pytest.raises(UserError, match="unrecognized arguments: --hidden"):
        parsed("--hidden", "1")


@pytest.mark.parametrize(
    "words",
    [["--n", "x"], ["--kind", "c"], ["--limit", "x"], ["--m", "1"], ["--kin", "a"], ["word"]],
    ids=str,
)
def test_bad_words_are_the_users_error(words):
    with pytest.raises(UserError, match="lists the options"):
        parsed(*words)


def test_value_that_the_config_refuses_is_the_users_error():
    with pytest.raises(UserError, match="n must not be 13"):
        from_options(Config(), parsed("--n", "13"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.0}, "rate must be more than 0, not 0.0"),
        ({"rate": 10.5}, "rate must be at most 10, not 10.5"),
        ({"rate": float("nan")}, "rate must be a finite number, not nan"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"n": LARGEST_INT + 1}, f"n must be at most {LARGEST_INT}, not 2147483648"),
        ({"kind": "c"}, "kind must be one of a, b, not 'c'"),
    ],
    ids=str,
)
def test_value_out_of_its_range_is_named(changes, message):
    """Not by the class here, whose __post_init__ checks one thing alone, but by `check`."""
    with pytest.raises(ValueError, match="^" + message):
        check(Config(**changes))


def test_values_at_the_ends_of_a_range_are_in_or_out_as_it_says():
    check(Config(rate=10.0, limit=1, n=LARGEST_INT))

    @dataclasses.dataclass
    class Open:
        share: float = option(0.0, "a share", least=0, below=1)

    check(Open(0.0))
    with pytest.raises(ValueError, match="share must be less than 1, not 1.0"):
        check(Open(1.0))


def test_integer_option_may_say_how_large_it_may_be():
    @dataclasses.dataclass
    class Seed:
        seed: int = option(0, "a seed", most=2**40)

    check(Seed(2**40))
    with pytest.raises(ValueError, match="at most 1099511627776"):
        check(Seed(2**40 + 1))


def test_value_of_another_type_is_no_number():
    with pytest.raises(ValueError, match=r"rate must be a number, not \[\]"):
        check(Config(rate=[]))


@pytest.mark.parametrize("flag", ["--n", "--rate", "--kind", "--limit"])
def test_two_dashes_are_no_value(flag):
    """Python up to 3.12 would drop them and hand on an empty list."""
    with pytest.raises(UserError, match=f"argument {flag}: -- is no value"):
        parsed(f"{flag}=--")


def test_limit_that_does_not_exist_is_the_programmers_error():
    with pytest.raises(TypeError, match=r"no limit \['atleast'\]"):
        option(3, "a number", atleast=1)


def test_help_shows_texts_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "what it does" in text and "Some settings" in text
    assert "a number, 100 % needed (default 3)" in text and "{a,b}" in text


# ── Verbs ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def program(monkeypatch):
    """`program(words…)`: which verbs were done, in order."""

    def call(*words: str) -> list[str]:
        done = []
        parser = Parser("nothing much")
        verbs = add_verbs(parser, "train", "show", "bench")
        verbs.add_argument("--export", metavar="DIR")
        module = type(sys)("piko_bench_of_a_test")
        module.main = lambda args: done.append("bench")
        monkeypatch.setitem(sys.modules, "piko_bench_of_a_test", module)
        monkeypatch.setattr(sys, "argv", ["main.py", *words])
        verbs.add_argument("--loud", action="store_true")
        add_options(parser, Config)
        work = {"train": (lambda args: done.append("train"), Config),
                "show": (lambda args: done.append("show"), "loud"),
                "bench": ("piko_bench_of_a_test",),
                "export": (lambda args: done.append(f"export {args.export}"),)}  # fmt: skip
        dispatch(parser, work)
        return done

    return call


def test_verbs_are_done_in_the_order_of_the_help(program):
    assert program("--show", "--train") == ["train", "show"]
    assert program("--bench") == ["bench"]
    assert program("--export", "there") == ["export there"]


@pytest.mark.parametrize("empty", ["", "  "])
def test_place_that_is_empty_is_refused(program, empty):
    """As `--export "$FOLDER"` gives where the variable is not set."""
    with pytest.raises(UserError, match="--export is empty"):
        program("--export", empty)


def test_without_a_verb_there_is_help(program, capsys):
    assert program() == []
    assert "nothing much" in capsys.readouterr().out


def test_resume_goes_with_train(program):
    with pytest.raises(UserError, match="--resume goes with --train"):
        program("--resume", "--show")
    assert program("--resume", "--train") == ["train"]


def test_option_that_no_verb_looks_at_is_refused(program):
    with pytest.raises(UserError, match="--n changes nothing in --show --bench: leave it out"):
        program("--show", "--bench", "--n", "4")
    with pytest.raises(UserError, match="--loud changes nothing in --train"):
        program("--train", "--loud")
    with pytest.raises(UserError, match="--n alone does nothing: say what to do"):
        program("--n", "4")
    assert program("--train", "--show", "--n", "4", "--loud") == ["train", "show"]


def test_module_of_a_verb_that_is_not_asked_for_is_not_imported(monkeypatch):
    parser = Parser("x")
    add_verbs(parser, "train", "bench")
    monkeypatch.setattr(sys, "argv", ["main.py", "--train"])
    done = []
    dispatch(parser, {"train": (done.append,), "bench": ("no_module_has_this_name",)})
    assert len(done) == 1


# ── Complaints ────────────────────────────────────────────────────────────────────────────────────


def ended(main) -> int:
    try:
        options.command_line(main)
    except SystemExit as stop:
        return stop.code
    return 0


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("first\n  second"), "first second"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.txt"), "a.txt: No space left"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a.txt"), "a.txt: No such"),
        (OSError("something odd"), "something odd"),
        (MemoryError(), "the memory is full"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "the memory is full"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you"), "the memory"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_the_user_can_mend_is_one_line_and_code_2(capsys, error, line):
    assert ended(raising(error)) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    assert err.startswith(f"error: {line}")


def test_very_long_complaint_is_cut_in_the_middle(capsys):
    assert ended(raising(UserError("begin " + "x" * 5000 + " end"))) == 2
    err = capsys.readouterr().err
    assert len(err) < 700 and err.startswith("error: begin") and err.endswith("end\n")


def test_ctrl_c_is_code_130(capsys):
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bug", [ZeroDivisionError(), RuntimeError("shapes differ"), KeyError("x")])
def test_bug_is_not_hidden(bug):
    with pytest.raises(type(bug)):
        options.command_line(raising(bug))


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    options.say("second")
    monkeypatch.setenv("RANK", "0")
    options.say("first")
    assert capsys.readouterr() == ("", "first\n")


class Full(io.StringIO):
    """A stream on a full disk."""

    def write(self, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reconfigure(self, **_):
        pass


def test_words_that_cannot_be_said_end_nothing(monkeypatch):
    """As behind `2>&1 | head`: a training goes on, and a complaint is still exit code 2."""
    monkeypatch.setattr(sys, "stderr", Full())
    options.say("step 1")
    assert ended(lambda: options.say("step 2")) == 0
    assert ended(raising(UserError("x"))) == 2


@pytest.mark.parametrize("rank", ["x", "-1", "1.5"])
def test_rank_that_is_no_number_is_the_users_error(monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(UserError, match=f"RANK={rank} in the environment"):
        options.say("x")


def test_text_is_shortened_to_one_line():
    assert shorten("a\n  b") == "a b"
    assert shorten("x" * 300) == "x" * 300
    assert shorten("ab" * 100, 10) == "ababa … babab"


# ── Configs from files ────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Nested:
    """A config with another one in it."""

    inner: Config | None = None
    outer: float = 1.0


def test_config_from_a_file_is_what_stands_in_it():
    values = json.loads('{"n": 5, "rate": 2, "kind": "b", "fast": true, "limit": null}')
    assert make_config(Config, values, "f") == Config(5, 2, "b", True, None)
    assert make_config(Config, {}, "f") == Config()
    assert make_config(Nested, {"inner": {"n": 4}}, "f") == Nested(Config(4))
    assert make_config(Nested, {"inner": None}, "f") == Nested()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], r"f: an object was expected, not \[1\]"),
        (None, "f: an object was expected"),
        ({"banana": 1}, "f: there is no banana in a Config"),
        ({"n": "5"}, "f: n cannot be 5"),
        ({"n": 5.0}, "f: n cannot be 5.0"),
        ({"n": True}, "f: n cannot be True"),
        ({"n": None}, "f: n cannot be None"),
        ({"n": [5]}, r"f: n cannot be \[5\]"),
        ({"fast": 1}, "f: fast cannot be 1"),
        ({"rate": "x"}, "f: rate cannot be x"),
        ({"rate": 1e400}, "f: rate must be a finite number"),
        ({"rate": 10**400}, "f: int too large to convert to float"),
        ({"kind": "c"}, "f: kind must be one of a, b"),
        ({"n": 13}, "f: n must not be 13"),
        ({"n": 10**20}, "f: n must be at most"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_config_that_a_file_cannot_hold_is_the_users_error(values, message):
    with pytest.raises(UserError, match=message):
        make_config(Config, values, "f")


@pytest.mark.parametrize("inner", [3, [], {"banana": 1}, {"n": "x"}, {"rate": -1.0}], ids=str)
def test_error_in_a_nested_config_says_where(inner):
    with pytest.raises(UserError, match="f, inner: "):
        make_config(Nested, {"inner": inner}, "f")
