"""From step to step: what is logged and kept, on the smallest model there is, see line.py."""

import math
import types

import pytest
import safetensors.torch
import torch
from line import line

import loop
from options import UserError
from run import RunDirectory


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch):
    monkeypatch.setattr(loop.hardware, "matmul_rate", lambda *_: 1e11)


@pytest.fixture
def run_dir(tmp_path) -> RunDirectory:
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.create({"train": {}})
    return run_dir


def lines(run_dir: RunDirectory, split: str) -> list[dict]:
    return [line for line in run_dir.history() if line["split"] == split]


@pytest.fixture
def clock(monkeypatch):
    """A clock that one step moves by a second and nothing else does."""
    now = types.SimpleNamespace(time=100.0)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now.time)
    return now


def timed(it, clock, seconds: float = 1.0):
    """The same trainer, whose steps take that long."""
    step = it.step

    def slow(number):
        clock.time += seconds
        return step(number)

    it.step = slow
    return it


# ── The log ───────────────────────────────────────────────────────────────────────────────────────


def test_a_line_for_the_first_step_for_every_twentieth_and_for_the_last(run_dir):
    assert loop.run_loop(line(steps=47), run_dir, resume=False)
    assert [x["step"] for x in lines(run_dir, "train")] == [1, 20, 40, 47]


def test_line_has_the_means_since_the_line_before(run_dir):
    """Steps 2 to 20, 21 to 22."""
    it, losses = line(steps=22), []
    step = it.step

    def seen(number):
        losses.append(step(number))
        return losses[-1]

    it.step = seen
    loop.run_loop(it, run_dir, resume=False)
    for name in ("loss", "absolute"):
        values = [x[name] for x in losses]
        means = [values[0], sum(values[1:20]) / 19, sum(values[20:]) / 2]
        assert [x[name] for x in lines(run_dir, "train")] == pytest.approx(means, rel=1e-9)
    rates = [it.learning_rate(step) for step in (0, 19, 21)]
    assert [x["lr"] for x in lines(run_dir, "train")] == rates


def test_rates_count_the_time_of_steps_alone(run_dir, clock):
    """5 rows in half a second; 2·10⁹ FLOPs a row of 10¹¹ a second are 0.2 of what is possible."""
    it = timed(line(steps=20, eval_every=7), clock, 0.5)
    it.flops_per_unit = 2e9

    def score():
        clock.time += 1000.0
        return {"loss": 1.0}

    it.score = score
    loop.run_loop(it, run_dir, resume=False)
    for found in lines(run_dir, "train"):
        assert (found["rows_per_second"], found["gemm_fraction"]) == (10, 0.2)
    last = run_dir.history()[-1]
    assert (last["train_seconds"], last["seconds"]) == (10.0, 3010.0)


def test_times_go_on_after_a_resume(run_dir, clock):
    loop.run_loop(timed(line(steps=20), clock), run_dir, resume=False)
    clock.time += 9999.0  # while nothing ran
    loop.run_loop(timed(line(steps=40), clock), run_dir, resume=True)
    assert [x["train_seconds"] for x in lines(run_dir, "train")] == [1.0, 20.0, 40.0]
    assert run_dir.history()[-1]["seconds"] == 40.0


def test_words_on_the_way(run_dir, capsys):
    loop.run_loop(line(steps=1), run_dir, resume=False)
    err = capsys.readouterr().err
    assert "step     1  loss" in err and "rows/s" in err
    assert "step     1  valid loss 1.0000" in err


# ── What is scored and kept ───────────────────────────────────────────────────────────────────────


def test_scores_are_taken_in_evaluation_mode_and_without_gradients(run_dir):
    it, modes = line(steps=3, eval_every=1), []

    def score():
        modes.append((it.model.training, torch.is_grad_enabled()))
        return {"loss": 1.0}

    it.score = score
    loop.run_loop(it, run_dir, resume=False)
    assert modes == [(False, False)] * 3


def kept_w(run_dir: RunDirectory) -> float:
    return safetensors.torch.load_file(run_dir.weights)["w"].item()


def scripted(it, scores: list[float], seen: list[float]):
    """The same trainer with these scores; `seen` gets the weight at each."""
    values = iter(scores)

    def score():
        seen.append(it.scored.w.item())
        return {"loss": next(values)}

    it.score = score
    return it


def test_weights_of_the_best_score_are_kept(run_dir):
    seen = []
    loop.run_loop(scripted(line(steps=4, eval_every=1), [3, 1, 2, 1], seen), run_dir, False)
    assert kept_w(run_dir) == seen[1] and len(set(seen)) == 4  # of equal ones the first
    assert [x["loss"] for x in lines(run_dir, "valid")] == [3, 1, 2, 1]


def test_best_score_is_known_after_a_resume(run_dir):
    seen = []
    loop.run_loop(scripted(line(steps=2, eval_every=1), [3, 1], seen), run_dir, False)
    loop.run_loop(scripted(line(steps=4, eval_every=1), [2, 0.5], seen), run_dir, True)
    assert kept_w(run_dir) == seen[3]
    loop.run_loop(scripted(line(steps=5, eval_every=1), [0.75], seen), run_dir, True)
    assert kept_w(run_dir) == seen[3] != seen[4]


def test_some_weights_are_kept_even_if_no_score_is_a_number(run_dir):
    loop.run_loop(scripted(line(steps=1), [math.nan], []), run_dir, False)
    assert run_dir.weights.exists()


def test_averaged_weights_are_scored_kept_and_resumed(run_dir, tmp_path):
    whole = RunDirectory(tmp_path / "whole")
    whole.create({"train": {}})
    seen = []
    loop.run_loop(scripted(line(steps=6, ema=0.5), [1], []), whole, False)
    loop.run_loop(scripted(line(steps=3, ema=0.5), [1], seen), run_dir, False)
    assert kept_w(run_dir) == seen[0]
    loop.run_loop(scripted(line(steps=6, ema=0.5), [0.5], seen), run_dir, True)
    assert kept_w(run_dir) == kept_w(whole) == seen[1] != seen[0]


@pytest.mark.parametrize("spoil", [{}, {"w": torch.ones(3)}, None], ids=str)
def test_checkpoint_without_a_fitting_average_is_refused(run_dir, spoil):
    loop.run_loop(line(steps=1, ema=0.5), run_dir, False)
    state = torch.load(run_dir.checkpoint, weights_only=True) | {"average": spoil}
    torch.save(state, run_dir.checkpoint)
    with pytest.raises(UserError, match="checkpoint.pt is damaged or of another run"):
        loop.run_loop(line(steps=2, ema=0.5), run_dir, True)


def test_checkpoint_of_another_model_is_refused(run_dir):
    loop.run_loop(line(steps=1), run_dir, False)
    state = torch.load(run_dir.checkpoint, weights_only=True)
    state["model"]["more"] = torch.ones(1)
    torch.save(state, run_dir.checkpoint)
    with pytest.raises(UserError, match="checkpoint.pt is damaged or of another run"):
        loop.run_loop(line(steps=2), run_dir, True)


def test_checkpoints_come_as_often_as_asked_and_in_the_end(run_dir, monkeypatch):
    saved = []
    monkeypatch.setattr(loop, "save", lambda trainer, run_dir, done, *_: saved.append(done))
    loop.run_loop(line(steps=10, checkpoint_every=4), run_dir, False)
    assert saved == [4, 8, 10]


def test_loss_that_is_not_finite_names_step_remedy_and_last_good_state(run_dir):
    it = line(steps=9, checkpoint_every=2, lr=0.5)
    step = it.step
    it.step = lambda number: {"loss": math.nan} if number == 5 else step(number)
    with pytest.raises(UserError, match="not finite at step 6: try --lr 0.125; .*checkpoint.pt"):
        loop.run_loop(it, run_dir, False)
    assert torch.load(run_dir.checkpoint, weights_only=True)["step"] == 4


def test_loss_that_is_not_finite_before_the_first_checkpoint(run_dir):
    it = line(steps=9)
    it.step = lambda number: {"loss": math.nan}
    with pytest.raises(
        UserError, match="not finite at step 1: .* the last good state is the start"
    ):
        loop.run_loop(it, run_dir, False)


def test_weights_of_any_layout_are_saved(tmp_path):
    w = torch.arange(6.0).view(2, 3)
    loop.save_tensors(tmp_path / "w.safetensors", {"turned": w.mT, "part": w[:, :2]})
    got = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(got["turned"], w.mT) and torch.equal(got["part"], w[:, :2])


def test_other_ranks_write_nothing(run_dir, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    other = RunDirectory(run_dir.path)
    before = sorted(run_dir.path.iterdir())
    loop.run_loop(line(steps=1), other, False)
    assert sorted(run_dir.path.iterdir()) == before and run_dir.history() == []
