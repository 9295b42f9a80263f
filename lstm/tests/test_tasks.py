"""Batches, carried state, scores: where state goes, and where it must not go."""

import dataclasses
import gc

import numpy as np
import pytest
import torch

import data
import hardware
import tasks
import train
from model import SequenceConfig, SequenceModel
from options import UserError
from text import IGNORE, Tokens
from tokenizer import CharacterTokenizer

LETTERS = CharacterTokenizer("abcdefgh")  # 11 ids with unknown, begin and end


def tokens_of(n: int, seed: int = 0) -> Tokens:
    ids = np.random.default_rng(seed).integers(0, 8, n).astype(np.uint16)
    return Tokens(ids, n, LETTERS)


def make_trainer(sizes: SequenceConfig, n: int = 203, **more) -> tasks.LanguageTrainer:
    """A language model on n ids, 4 rows of 10 a step, in float64 and without dropout."""
    config = dataclasses.replace(
        train.TrainConfig(), batch_size=4, seq_len=10, device="cpu", dtype="float32", **more
    )
    parts = {"train": tokens_of(n), "valid": tokens_of(90, 1), "test": tokens_of(80, 2)}
    torch.manual_seed(0)
    model = SequenceModel(sizes).double()
    return tasks.LanguageTrainer(config, model, torch.float32, parts)


# ── Contiguous batches ────────────────────────────────────────────────────────────────────────────


def test_rows_go_on_where_they_stopped():
    """The last target of row i is the first input of row i in the next step."""
    stream = data.Stream(np.arange(1000), 4, 10)
    assert stream.n_step == 24
    for step in range(23):
        rows, numbers, begins = stream.batch(step, 0)
        after, _, _ = stream.batch(step + 1, 0)
        assert torch.equal(rows[:, -1], after[:, 0]) and numbers.tolist() == [0, 1, 2, 3]
        assert begins.tolist() == [step == 0] * 4


def test_rows_lie_apart_and_cover_the_text():
    stream = data.Stream(np.arange(1000), 4, 10)
    seen = torch.cat([stream.batch(step, 0)[0][:, 1:] for step in range(24)], dim=1)
    assert seen.shape == (4, 240) and seen.unique().numel() == 960
    assert (seen // 250 == torch.arange(4)[:, None]).all()  # row i stays in the i-th quarter


def test_epochs_begin_anew_and_elsewhere():
    stream = data.Stream(np.arange(1000), 4, 10)
    starts = [stream.batch(epoch * 24, 0)[0][0, 0].item() for epoch in range(20)]
    assert all(stream.batch(epoch * 24, 0)[2].all() for epoch in range(20))
    assert len(set(starts)) > 3 and max(starts) <= 9


def test_text_that_is_too_short_is_refused():
    with pytest.raises(UserError, match="needs 44 or more"):
        data.Stream(np.arange(43), 4, 10)


# ── Carried state ─────────────────────────────────────────────────────────────────────────────────


def test_training_carries_the_state(sizes):
    """With a learning rate of nothing, steps 0, 1, 2 end with the state of one pass over 30."""
    trainer = make_trainer(sizes, lr=1e-30, weight_decay=0.0)
    rows = torch.cat([trainer.batch(0)[0], *(trainer.batch(k)[0][:, 1:] for k in (1, 2))], dim=1)
    for step in range(3):
        trainer.step(step)
    _, state = trainer.model(rows[:, :-1])
    for carried, part in zip(trainer.carried, state, strict=True):
        assert (carried - part).abs().max() < 1e-12


def test_without_carry_every_step_begins_with_nothing(sizes):
    trainer = make_trainer(sizes, lr=1e-30, weight_decay=0.0, carry=False)
    for step in range(3):
        trainer.step(step)
    _, state = trainer.model(trainer.batch(2)[0][:, :-1])
    assert (trainer.carried[0] - state[0]).abs().max() < 1e-12


def test_state_is_reset_where_the_text_begins_anew(sizes):
    trainer = make_trainer(sizes, n=90, lr=1e-30, weight_decay=0.0)  # two steps an epoch
    for step in range(3):
        trainer.step(step)
    _, state = trainer.model(trainer.batch(2)[0][:, :-1])
    assert (trainer.carried[0] - state[0]).abs().max() < 1e-12


def test_no_gradient_crosses_the_boundary(sizes):
    """The gradient of step 1 is that of its own 10 tokens with the carried numbers as constants."""
    trainer = make_trainer(sizes)
    trainer.accumulate(trainer.parts(trainer.batch(0)))
    trainer.optimizer.zero_grad()
    before = tuple(part.clone() for part in trainer.carried)
    assert all(part.abs().max() > 0 and not part.requires_grad for part in trainer.carried)
    trainer.accumulate(trainer.parts(trainer.batch(1)))
    found = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    rows = trainer.batch(1)[0]
    logits, _ = trainer.model(rows[:, :-1], before)
    tasks.cross_entropy_sum(logits, rows[:, 1:]).backward()
    expected = [p.grad for p in trainer.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def live_tensors() -> int:
    """How many tensors there are in memory."""
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_memory_is_constant_over_many_steps(sizes):
    """A graph that grew from step to step would keep the tensors of every step alive."""
    trainer = make_trainer(sizes)
    for step in range(3):
        trainer.step(step)
    before = live_tensors()
    for step in range(3, 103):
        trainer.step(step)
    assert live_tensors() == before
    assert all(part.grad_fn is None for part in trainer.carried)


def test_no_state_goes_from_validation_into_training(sizes):
    """Scoring in between changes neither the carried state nor the next step."""
    trainer, other = make_trainer(sizes), make_trainer(sizes)
    for one in (trainer, other):
        one.step(0)
    before = [part.clone() for part in trainer.carried]
    trainer.score()
    assert all(torch.equal(a, b) for a, b in zip(trainer.carried, before, strict=True))
    assert trainer.step(1) == other.step(1)
    assert all(torch.equal(a, b) for a, b in zip(trainer.carried, other.carried, strict=True))


def test_no_state_goes_from_training_into_validation(sizes):
    """The score depends on the weights alone, not on what the carried state is."""
    trainer = make_trainer(sizes)
    score = trainer.score()
    for part in trainer.carried:
        part.normal_()
    assert trainer.score() == score


def test_micro_batches_carry_alike(sizes):
    whole, parts = make_trainer(sizes), make_trainer(sizes, micro_batch_size=3)
    for step in range(3):
        a, b = whole.step(step), parts.step(step)
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
    for one, other in zip(whole.carried, parts.carried, strict=True):
        assert (one - other).abs().max() < 1e-10


def test_carried_state_is_in_the_checkpoint_and_not_in_the_weights(sizes):
    trainer = make_trainer(sizes)
    trainer.step(0)
    assert not [name for name in trainer.weights() if "carried" in name]
    state = hardware.full_state(trainer.model, trainer.optimizer)
    assert torch.equal(state["model"]["carried_0"], trainer.carried[0])


# ── Scores ────────────────────────────────────────────────────────────────────────────────────────


def test_scoring_rows_hold_every_target_once():
    tokens = tokens_of(101)
    inputs, targets = data.scoring_rows(tokens, n_row=7, n_context=20)
    counted = targets != IGNORE
    assert counted.sum() == 100
    assert sorted(targets[counted].tolist()) == sorted(tokens.ids[1:].tolist())
    assert counted[1].int().argmax() == 14 and inputs.shape == targets.shape


def test_score_with_all_the_past_is_one_long_pass(sizes):
    """Where rows reach back to the beginning, cutting changes nothing."""
    model, tokens = SequenceModel(sizes).double(), tokens_of(600)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))[None]
    expected = tasks.cross_entropy_sum(model(ids[:, :-1])[0].double(), ids[:, 1:]).item()
    nats = torch.zeros((), dtype=torch.float64)
    state = None
    rows = data.scoring_rows(tokens, n_context=600)
    for inputs, targets in data.chunks(*rows, size=100):
        logits, state = model(inputs, state)
        nats += tasks.cross_entropy_sum(logits.double(), targets).double()
    assert nats.item() == pytest.approx(expected, rel=1e-6)


def test_loss_at_the_start_is_ln_v(sizes):
    score = make_trainer(sizes).score()
    assert score["loss"] == pytest.approx(np.log(11), abs=0.15)
    assert score["tokens"] == 89


# ── Dice ──────────────────────────────────────────────────────────────────────────────────────────


def test_adding_adds():
    inputs, answers = data.adding(200, 31, torch.Generator().manual_seed(0))
    numbers, marks = inputs.unbind(-1)
    assert (marks.sum(dim=1) == 2).all() and (marks[:, :15].sum(dim=1) == 1).all()
    assert ((numbers * marks).sum(dim=1) - answers).abs().max() < 1e-6
    always_one = (answers - 1).square().mean().item()
    assert always_one == pytest.approx(data.trivial("adding", 31), rel=0.2)


def test_copying_copies():
    inputs, targets = data.copying(50, 100, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (50, 120)
    assert torch.equal(inputs[:, :10], targets[:, -10:])
    assert (inputs[:, 10:109] == 0).all() and (inputs[:, -11:] == 9).all()
    assert (targets[:, :-10] == 0).all() and inputs[:, :10].unique().tolist() == list(range(1, 9))
    assert data.trivial("copy", 1000) == pytest.approx(0.0204, abs=5e-5)


def test_dice_of_steps_and_of_scores_differ():
    config = dataclasses.replace(
        train.RECIPES["adding"], seq_len=10, device="cpu", grow=0.5, steps=9
    )
    model = SequenceModel(dataclasses.replace(train.SIZES["adding"], d_model=8))
    trainer = tasks.DiceTrainer(config, model, torch.float32)
    assert not torch.equal(trainer.batch(8)[0], trainer.batch(7)[0])
    assert torch.equal(trainer.batch(8)[0], trainer.batch(8)[0])
    lengths = [trainer.length(step) for step in range(9)]
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[-1] == 10
    assert trainer.score()["loss"] != trainer.test_score(model)["loss"]
