"""One training step, shown on the smallest model there is, see line.py."""

import argparse
import dataclasses
import json
import math

import pytest
import torch
from line import Line, LineTrainer, line, numbers
from torch import nn

import hardware
import trainer
from options import UserError, option
from trainer import CommonConfig, Trainer, as_described, asked_for, facts, parameter_groups

# ── The step ──────────────────────────────────────────────────────────────────────────────────────


def test_step_by_hand():
    """w ← w − lr · ∂/∂w Σ off² / n, and the same with 10 · lr for b, whose group says so."""
    it = line()
    x, wanted = it.batch(3)
    off = (0.5 * x - wanted).nan_to_num(0.0)
    n = 11  # 3 + 4 · 2 targets
    logged = it.step(3)
    assert logged["loss"] == pytest.approx(off.square().sum().item() / n)
    assert logged["absolute"] == pytest.approx(off.abs().sum().item() / n)
    w = 0.5 - 0.04 * (2 * off * x).sum().item() / n
    b = 0.0 - 0.4 * (2 * off).sum().item() / n
    assert numbers(it).tolist() == pytest.approx([w, b], rel=1e-5)


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 99])
def test_step_does_not_depend_on_the_micro_batch(micro):
    """Rows have different numbers of targets, so that a mean of means would differ."""
    whole, parts = line(), line(micro_batch_size=micro)
    for step in range(3):
        a, b = whole.step(step), parts.step(step)
        assert a == pytest.approx(b, rel=1e-5)
    assert (numbers(whole) - numbers(parts)).abs().max() < 1e-6
    assert whole.model.calls == 3 and parts.model.calls == 3 * math.ceil(5 / micro)


@pytest.mark.parametrize(("n_row", "world", "micro"), [(5, 2, 2), (7, 3, 1), (4, 4, 0), (9, 2, 99)])
def test_ranks_take_each_row_once_in_equally_many_parts(monkeypatch, n_row, world, micro):
    """Else some rank would wait for ever for a partner of its last exchange."""
    it = line(batch_size=n_row, micro_batch_size=micro)
    rows = (torch.arange(n_row), torch.arange(n_row) + 100)
    monkeypatch.setattr(hardware, "world", lambda: world)
    taken, n_part = [], set()
    for rank in range(world):
        monkeypatch.setattr(hardware, "rank", lambda rank=rank: rank)
        parts = it.parts(rows)
        n_part.add(len(parts))
        assert all(len(a) <= (micro or n_row) for a, _ in parts)
        assert all(torch.equal(a + 100, b) for a, b in parts)
        taken += [i for a, _ in parts for i in a.tolist()]
    assert sorted(taken) == list(range(n_row))
    assert len(n_part) == 1


def test_gradient_is_clipped_to_its_largest_norm():
    free, clipped = line(), line(grad_clip=0.5)
    for it in (free, clipped):
        it.optimizer.step = lambda: None  # keep the gradients for us to see
        it.optimizer.zero_grad = lambda: None
        it.step(0)
    a, b = (torch.cat([p.grad for p in it.model.parameters()]) for it in (free, clipped))
    assert a.norm() > 0.5
    torch.testing.assert_close(b, a * 0.5 / a.norm())


def test_gradient_below_its_largest_norm_stays_as_it_is():
    assert torch.equal(numbers(after_one_step()), numbers(after_one_step(grad_clip=1e6)))


def after_one_step(**changes) -> LineTrainer:
    it = line(**changes)
    it.step(0)
    return it


def test_no_gradient_is_left_over():
    it = after_one_step()
    assert all(p.grad is None for p in it.model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_takes_no_step(value):
    it = line()
    it.model.b.data.fill_(value)
    before = it.model.w.item()
    assert math.isnan(it.step(0)["loss"]) and it.model.w.item() == before


def test_gradient_that_is_not_finite_takes_no_step(monkeypatch):
    """√x at 0: the loss is 0, its gradient infinite."""
    it = line()
    loss = lambda forward, x, y: (it.model.b.abs().sqrt().sum(), torch.tensor(3), {})  # noqa: E731
    monkeypatch.setattr(it, "batch_loss", loss)
    assert math.isnan(it.step(0)["loss"]) and it.model.b.item() == 0


def test_batch_without_a_target_takes_no_step(monkeypatch):
    it = line()
    monkeypatch.setattr(it, "batch", lambda step: (torch.ones(5, 3), torch.full((5, 3), math.nan)))
    assert math.isnan(it.step(0)["loss"])


def test_parameter_without_a_gradient_is_no_matter(monkeypatch):
    """As that of an expert that no token chose."""
    it = line()
    w = it.model.w
    loss = lambda forward, x, y: (((3 * w - 1) ** 2).sum(), torch.tensor(1), {})  # noqa: E731
    monkeypatch.setattr(it, "batch_loss", loss)
    before = w.item()
    it.step(0)
    assert it.model.b.item() == 0 and w.item() != before


def test_step_is_taken_in_training_mode():
    it = line()
    it.model.eval()
    it.step(0)
    assert it.model.training


# ── Averaged weights ──────────────────────────────────────────────────────────────────────────────


def test_average_by_hand():
    """keep = min(0.5, (1 + step)/(10 + step)): 1/10 at step 0, 2/11 at step 1, ½ from step 8 on."""
    it = line(ema=0.5)
    mean = 0.5
    for step in range(12):
        it.step(step)
        keep = min(0.5, (1 + step) / (10 + step))
        mean = keep * mean + (1 - keep) * it.model.w.item()
        assert it.average.w.item() == pytest.approx(mean, rel=1e-5)
    assert it.average.calls == it.model.calls == 12  # what is no number of weights is copied
    assert it.scored is it.average and not it.average.training
    assert it.weights()["w"].item() == it.average.w.item()


def test_without_averaging_the_model_itself_is_scored():
    it = after_one_step()
    assert it.scored is it.model and it.weights()["w"].item() == it.model.w.item()


# ── What cannot be ────────────────────────────────────────────────────────────────────────────────


def test_batch_smaller_than_the_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(hardware, "world", lambda: 6)
    with pytest.raises(UserError, match="--batch-size 5 is less than one row a rank"):
        line()


def test_sharding_and_averaging_do_not_go_together():
    with pytest.raises(UserError, match="--shard and --ema"):
        line(shard=True, ema=0.9)


def test_what_a_subclass_must_say():
    it = object.__new__(Trainer)
    for call in (lambda: it.batch(0), lambda: it.batch_loss(None), lambda: it.learning_rate(0),
                 it.score, lambda: it.make_optimizer(None)):  # fmt: skip
        with pytest.raises(NotImplementedError):
            call()
    assert it.describe({"loss": 1.5}) == "loss 1.5000"
    assert it.n_unit((torch.ones(7, 2),)) == 7


# ── Which run ─────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes."""

    width: int = option(8, "width", least=1)


def wanted(folder, *, resume=False, inside=("own",), **given):
    """What `asked_for` makes of some flags; `folder` is --out."""
    args = argparse.Namespace(resume=resume, out=str(folder), **given)
    return asked_for(args, CommonConfig(), Sizes(), inside)


@pytest.fixture
def begun(tmp_path):
    """A run that was started with some values that are not the defaults."""
    config = CommonConfig(lr=0.5, steps=7, data="/data", dtype="bfloat16")
    saved = facts(config, Sizes(width=16), extra=1) | {"versions": {}}
    (tmp_path / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    return tmp_path


def test_flags_are_asked_for(tmp_path):
    config, sizes = wanted(tmp_path, lr=0.25, width=4)
    assert (config.lr, config.out, sizes.width) == (0.25, str(tmp_path), 4)
    with pytest.raises(UserError, match="width must be at least 1"):
        wanted(tmp_path, width=0)


def test_paths_of_the_user_are_kept_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _ = wanted(tmp_path, data="a.txt", weights="w")
    assert (config.data, config.weights) == (str(tmp_path / "a.txt"), str(tmp_path / "w"))
    for name in ("own", "hf:somebody/something"):
        assert wanted(tmp_path, data=name)[0].data == name
    assert wanted(tmp_path)[0].weights == ""


def test_what_is_kept_of_a_run_is_all_but_its_place(begun):
    saved = json.loads((begun / "config.json").read_text(encoding="utf-8"))
    assert saved["model"] == {"width": 16} and saved["extra"] == 1
    assert saved["train"].keys() == vars(CommonConfig()).keys() - {"out"}


def test_resumed_run_is_as_it_was_started(begun):
    config, sizes = wanted(begun, resume=True)
    assert (config.lr, config.steps, config.data, sizes.width) == (0.5, 7, "/data", 16)
    assert config.out == str(begun)


def test_resumed_run_may_change_what_no_step_computes(begun):
    config, _ = wanted(begun, resume=True, steps=9, eval_every=3, checkpoint_every=4, lr=0.5)
    assert (config.steps, config.eval_every, config.checkpoint_every) == (9, 3, 4)
    wanted(begun, resume=True, dtype="auto", device="cpu", compile=True)


@pytest.mark.parametrize(
    "given",
    [{"lr": 0.25}, {"width": 4}, {"seed": 1}, {"batch_size": 3}, {"dtype": "float32"},
     {"micro_batch_size": 1}, {"ema": 0.5}, {"grad_clip": 2.0}, {"weights": "w"}],
    ids=str,
)  # fmt: skip
def test_resumed_run_may_not_become_another(begun, given):
    (name,) = given
    with pytest.raises(UserError, match=f"has --{name.replace('_', '-')} .* leave it out"):
        wanted(begun, resume=True, **given)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="nothing to resume"):
        wanted(tmp_path, resume=True)


def test_run_is_as_described_whatever_machine_and_seed():
    ours, shipped = CommonConfig(), (CommonConfig(), Sizes())
    free = {"out": "x", "seed": 5, "device": "cpu", "dtype": "float32", "micro_batch_size": 2}
    assert as_described(dataclasses.replace(ours, **free), Sizes(), shipped)
    for changes in ({"steps": 5}, {"lr": 0.5}, {"ema": 0.9}, {"data": "mine"}, {"batch_size": 2}):
        assert not as_described(dataclasses.replace(ours, **changes), Sizes(), shipped)
    assert not as_described(ours, Sizes(width=9), shipped)


def test_parameters_are_counted_by_what_they_belong_to():
    """blocks.0.one.weight and blocks.1.one.weight are both of one."""
    blocks = [
        nn.ModuleDict({"one": nn.Linear(2, 3), "two": nn.Linear(3, 2, bias=False)})
        for _ in range(2)
    ]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(2, 5)})
    assert parameter_groups(model) == {"one": 2 * 9, "two": 2 * 6, "head": 15}


def test_announcement_has_device_config_and_counts(capsys):
    trainer.announce(CommonConfig(lr=0.5), Sizes(), Line(), "cpu: as asked")
    err = capsys.readouterr().err
    assert "cpu: as asked; 1 rank(s)" in err and "lr=0.5" in err and "width=8" in err
    assert "parameters 2: w 1, b 1" in err
