"""The machinery: options, complaints, whole files, the run directory, random numbers."""

import argparse
import dataclasses
import json
import random
import signal

import numpy as np
import pytest
import torch

import run
from run import Parser, RunDirectory, UserError, add_options, from_options, option, whole_file

# ── Options ───────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Config:
    """Some settings.

    Raises ValueError for n = 13.
    """

    n: int = option(3, "a number, 100 % needed")
    rate: float = option(0.5, "a rate")
    kind: str = option("a", "a kind", ("a", "b"))
    fast: bool = option(False, "quicker")
    limit: int | None = option(None, "none is no limit")
    hidden: int = 7

    def __post_init__(self):
        if self.n == 13:
            raise ValueError("n must not be 13")


def parsed(*words: str) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False)
    add_options(parser, Config)
    return parser.parse_args(words)


def test_options_come_from_the_fields():
    words = ["--n", "5", "--rate", "1e-3", "--kind", "b", "--fast", "--limit", "9"]
    assert from_options(Config(), parsed(*words)) == Config(5, 1e-3, "b", True, 9)


def test_what_is_not_given_stays_as_it_is():
    assert from_options(Config(n=8, rate=2.0), parsed("--rate", "4")) == Config(n=8, rate=4.0)


def test_flag_can_be_taken_back():
    assert from_options(Config(fast=True), parsed("--no-fast")).fast is False


def test_field_without_help_is_no_option():
    with pytest.raises(UserError, match="unrecognized arguments: --hidden"):
        parsed("--hidden", "1")


@pytest.mark.parametrize("words", [["--n", "x"], ["--kind", "c"], ["--limit", "x"], ["--m", "1"]])
def test_bad_words_are_the_users_error(words):
    with pytest.raises(UserError, match="lists the options"):
        parsed(*words)


def test_value_that_the_config_refuses_is_the_users_error():
    with pytest.raises(UserError, match="n must not be 13"):
        from_options(Config(), parsed("--n", "13"))


def test_help_shows_texts_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "Some settings" in text
    assert "a number, 100 % needed (default 3)" in text and "{a,b}" in text


# ── Complaints ────────────────────────────────────────────────────────────────────────────────────


def ended(main) -> int:
    try:
        run.command_line(main)
    except SystemExit as stop:
        return stop.code
    return 0


def raising(error):
    def main():
        raise error

    return main


def test_user_error_is_one_line_and_code_2(capsys):
    assert ended(raising(UserError("first\n  second"))) == 2
    assert capsys.readouterr() == ("", "error: first second\n")


def test_ctrl_c_is_code_130(capsys):
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""


def test_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run.command_line(raising(ZeroDivisionError()))


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run.say("second")
    monkeypatch.setenv("RANK", "0")
    run.say("first")
    assert capsys.readouterr() == ("", "first\n")


# ── Hardware ──────────────────────────────────────────────────────────────────────────────────────


def test_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.choose_device("cpu") == (torch.device("cpu"), "as asked")
    with pytest.raises(UserError, match="--device cuda"):
        run.choose_device("cuda")


def test_automatic_device_is_the_processor_where_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run.choose_device("auto")[0] == torch.device("cpu")


@pytest.mark.parametrize(("gain", "expected"), [(4.0, torch.bfloat16), (1.1, torch.float32)])
def test_automatic_format_is_bfloat16_where_it_is_measured_to_be_faster(
    monkeypatch, gain, expected
):
    rate = {torch.bfloat16: gain, torch.float32: 1.0}
    monkeypatch.setattr(run, "matmul_rate", lambda device, dtype, n: rate[dtype])
    dtype, why = run.choose_dtype("auto", torch.device("cpu"))
    assert dtype == expected and f"{gain:.1f}" in why
    assert run.choose_dtype("float32", torch.device("cpu")) == (torch.float32, "as asked")


def test_measurement_throws_no_dice_of_the_run():
    before = torch.get_rng_state()
    assert run.matmul_rate(torch.device("cpu"), torch.float32, 16) > 0
    assert torch.equal(before, torch.get_rng_state())


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────


def throws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_decides_every_generator():
    run.seed_everything(5)
    first = throws()
    assert all(a != b for a, b in zip(first, throws(), strict=True))
    run.seed_everything(5)
    assert throws() == first


def test_generators_are_put_back_from_a_safe_file(tmp_path):
    throws()
    torch.save(run.rng_state(), tmp_path / "state.pt")
    expected = throws()
    run.seed_everything(99)
    run.restore_rng(torch.load(tmp_path / "state.pt", weights_only=True))
    assert throws() == expected


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


def test_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under the right name."""
    order = []
    replace, fsync = run.os.replace, run.os.fsync
    monkeypatch.setattr(run.os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(run.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    with whole_file(tmp_path / "file") as part:
        part.write_text("x", encoding="utf-8")
    assert order == ["fsync", "replace"]


def test_log_and_history(tmp_path):
    it = RunDirectory(tmp_path / "run")
    it.start()
    for step in (1, 2, 3):
        it.log(step=step, loss=step / 2)
    assert it.history() == [{"step": s, "loss": s / 2} for s in (1, 2, 3)]


def test_history_before_a_step_forgets_the_later_lines(tmp_path):
    it = RunDirectory(tmp_path / "run")
    it.start()
    for step in (1, 2, 3):
        it.log(step=step)
    assert it.history(before=2) == [{"step": 1}, {"step": 2}]
    it.log(step=9)
    assert [x["step"] for x in it.history()] == [1, 2, 9]


def test_line_cut_short_is_dropped(tmp_path):
    it = RunDirectory(tmp_path / "run")
    it.start()
    it.log(step=1)
    with open(it.log_file, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    assert it.history() == [{"step": 1}]
    it.history(before=1)
    it.log(step=2)
    assert it.history() == [{"step": 1}, {"step": 2}]


def test_start_forgets_the_run_before_and_torn_files(tmp_path):
    it = RunDirectory(tmp_path)
    old = [it.checkpoint, it.weights, tmp_path / ".checkpoint.pt.77.part"]
    for file in old:
        file.touch()
    it.log_file.write_text('{"step": 1}\n', encoding="utf-8")
    (tmp_path / "mine.txt").touch()
    it.start()
    assert not any(file.exists() for file in old)
    assert it.history() == [] and (tmp_path / "mine.txt").exists()


def test_config_is_saved_with_versions(tmp_path):
    it = RunDirectory(tmp_path)
    it.save_config({"model": {"n": 1}})
    config = json.loads(it.config.read_text(encoding="utf-8"))
    assert config["model"] == {"n": 1}
    assert config["versions"]["torch"] == torch.__version__


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    it = RunDirectory(tmp_path)
    it.save_config({})
    it.log(step=1)
    it.save_weights({"a": torch.ones(2)})
    it.save_checkpoint({"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_weights_of_any_layout_are_saved(tmp_path):
    import safetensors.torch

    it, w = RunDirectory(tmp_path), torch.arange(6.0).view(2, 3)
    it.save_weights({"turned": w.mT, "part": w[:, :2]})
    got = safetensors.torch.load_file(it.weights)
    assert torch.equal(got["turned"], w.mT) and torch.equal(got["part"], w[:, :2])


def test_checkpoint_comes_back_with_the_generators(tmp_path):
    it = RunDirectory(tmp_path)
    throws()
    it.save_checkpoint({"step": 4})
    expected = throws()
    run.seed_everything(99)
    assert it.load_checkpoint()["step"] == 4
    assert throws() == expected


def test_newest_run_is_the_one_whose_weights_are_newest(tmp_path):
    import os

    assert run.newest_run(tmp_path / "nowhere") is None
    for name, when in (("a", 3000), ("b", 5000), ("c", 4000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
        os.utime(tmp_path / name / "model.safetensors", (when, when))
    (tmp_path / "d").mkdir()  # without weights
    assert run.newest_run(tmp_path) == tmp_path / "b"


# ── Stopping ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_and_the_old_handler_comes_back(kind):
    before = signal.getsignal(kind)
    with run.ctrl_c() as stopped:
        assert not stopped()
        signal.raise_signal(kind)
        assert stopped()
    assert signal.getsignal(kind) == before


def test_without_torchrun_there_is_one_rank():
    with run.ranks(torch.device("cpu")) as (rank, world):
        assert (rank, world) == (0, 1)
    model = torch.nn.Linear(2, 2)
    assert run.distribute(model, [], shard=False) is model
    assert run.sum_over_ranks(torch.tensor(3.0)).item() == 3.0


def test_full_state_goes_around(tmp_path):
    """Weights and moments, through a file, into a fresh model and optimizer."""
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        pairs.append((model, torch.optim.AdamW(model.parameters(), lr=0.1)))
    model, optimizer = pairs[0]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(run.full_state(model, optimizer), tmp_path / "state.pt")
    run.load_full_state(*pairs[1], torch.load(tmp_path / "state.pt", weights_only=True))
    for model, optimizer in pairs:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    for a, b in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_machinery_knows_no_model():
    with open(run.__file__, encoding="utf-8") as file:
        text = file.read().lower()
    assert not [word for word in ("llama", "token", "vocab", "attention") if word in text]
