"""Training: two tokens to predict, busy experts, and that how a batch is split changes nothing."""

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import data
import forms
import hardware
import moe
import run
import text
import train
from model import PRESETS, DeepseekConfig
from mtp import DeepseekMTP
from text import IGNORE, Tokens
from tokenizer import ByteTokenizer
from train import DeepseekTrainer, TrainConfig, decay_groups, evaluate, loss_sum, shifted

SIZES = DeepseekConfig(
    vocab_size=258, seq_len=12, n_layer=2, n_head=2, d_model=24, q_rank=8, kv_rank=7, d_nope=6,
    d_rope=4, d_value=5, d_ff=16, n_dense=1, d_expert=8, n_expert=5, n_active=2, n_ahead=2,
)  # fmt: skip


def tokens(n: int = 600) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    ids[::50] = 257
    return Tokens(ids, n_char=n, tokenizer=ByteTokenizer())


def config(**changes) -> TrainConfig:
    defaults = {"steps": 10, "batch_size": 5, "lr": 1e-2, "warmup": 0, "grad_clip": 1e9}
    return TrainConfig(**defaults | {"device": "cpu", "dtype": "float32"} | changes)


def trainer(**changes) -> DeepseekTrainer:
    torch.manual_seed(0)
    parts, model = {"train": tokens(), "valid": tokens(90)}, DeepseekMTP(SIZES)
    none = {"valid": data.answers(parts["valid"], ByteTokenizer())}
    return DeepseekTrainer(config(**changes), model, parts, none, torch.float32)


def gradients(it: DeepseekTrainer, number: int = 0) -> tuple[dict, list[torch.Tensor]]:
    """What is logged and the gradients of one step, taken where the optimizer would."""
    found = []
    it.optimizer.step = lambda: found.extend(p.grad.clone() for p in it.model.parameters())
    return it.step(number), found


def with_ignored_targets(monkeypatch) -> None:
    """The rows have different numbers of targets, so that a mean of means would differ."""
    rows = tokens().training_rows(0, 5, 12, 0)
    targets = rows.clone()
    targets[1, 4:] = targets[3, 9:] = IGNORE
    batch_loss = DeepseekTrainer.batch_loss

    def clamped(self, forward, part):
        return batch_loss(
            self, lambda inputs, following: forward(inputs.clamp(min=0), following=following), part
        )

    monkeypatch.setattr(DeepseekTrainer, "batch", lambda self, step: (targets,))
    monkeypatch.setattr(DeepseekTrainer, "batch_loss", clamped)


# ── A step, however it is split ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("balance", train.BALANCE)
@pytest.mark.parametrize("micro", [1, 2])
def test_gradient_and_loads_do_not_depend_on_the_micro_batch(monkeypatch, micro, balance):
    with_ignored_targets(monkeypatch)
    flags = {"balance": balance, "balance_weight": 1.0, "sequence_weight": 1.0}
    whole, in_parts = trainer(**flags), trainer(micro_batch_size=micro, **flags)
    logged, expected = gradients(whole)
    logged_in_parts, found = gradients(in_parts)
    assert logged_in_parts == pytest.approx(logged, abs=1e-5)
    assert torch.equal(whole.load, in_parts.load)
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() <= 2e-6


def test_ranks_average_to_the_whole_and_sum_their_loads(monkeypatch):
    """Rank r takes rows r, r + 2, …"""
    flags = {"sequence_weight": 1.0}
    it = trainer(**flags)
    _, whole = gradients(it)
    load, own, parts, count = it.load, [], [], 0
    monkeypatch.setattr(hardware, "world", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(hardware, "rank", lambda rank=rank: rank)
        it = trainer(**flags)
        count += int(it.accumulate(it.parts(it.batch(0)))["count"])
        own.append(it.load)
        parts.append([p.grad for p in it.model.parameters()])
    assert torch.equal(own[0] + own[1], load) and not torch.equal(*own)
    for parameter, *grads in zip(it.model.parameters(), *parts, strict=True):
        parameter.grad = sum(grads) / 2
    it.finish_gradient(hardware.world() / count)
    for expected, parameter in zip(whole, it.model.parameters(), strict=True):
        assert (expected - parameter.grad).abs().max() <= 2e-6
    monkeypatch.setattr(hardware, "sum_over_ranks", lambda x: own[0] + own[1])
    it.follow(0)
    expected = 0.003 * (load.mean(dim=1, keepdim=True) - load).sign()
    assert all(torch.equal(r.bias, row) for r, row in zip(it.routers, expected, strict=True))


# ── What is followed and what is logged ───────────────────────────────────────────────────────────


def test_the_loss_is_the_sum_that_it_is_said_to_be():
    """Next token + 0.3 · mean of the two modules + weight · mean of the layers, Eq. 17 and 25."""
    it = trainer(balance="loss", balance_weight=0.7)
    rows = it.batch(0)[0]
    inputs, targets, ones = rows[:, :-1], rows[:, 1:], torch.ones(5, 12, dtype=torch.bool)
    with moe.recording(it.model) as record:
        logits = it.model(inputs, following=targets)
    ahead = [loss_sum(x, shifted(targets, k)) for k, x in ((1, logits[1]), (2, logits[2]))]
    balance = [moe.sequence_balance_sum(r, r.logits.sigmoid(), ones) for r in record]
    expected = loss_sum(logits[0], targets) + 0.3 * sum(ahead) / 2 + 0.7 * sum(balance) / 3
    total, count, logged = it.batch_loss(it.model, rows)
    assert count == 60 and total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logged["loss"].item() == pytest.approx(loss_sum(logits[0], targets).item(), rel=1e-6)
    assert len(record) == 3  # a block and two modules have experts


@pytest.mark.parametrize("balance", train.BALANCE)
def test_biases_move_by_bias_alone_and_never_learn(balance):
    it = trainer(balance=balance, bias_speed=0.5)
    it.step(0)
    assert it.load.sum(dim=1).tolist() == [120.0] * 3
    for load, router in zip(it.load, it.routers, strict=True):
        expected = 0.5 * (load.mean() - load).sign() if balance == "bias" else 0 * load
        assert torch.equal(router.bias, expected) and router.bias.grad is None


@pytest.mark.parametrize("balance", train.BALANCE)
def test_router_feels_the_balancing_loss_where_it_is_asked_for(balance):
    names = {"bias": "sequence_weight", "loss": "balance_weight", "none": "balance_weight"}
    slopes = []
    for weight in (0.0, 1.0):
        it = trainer(balance=balance, **{names[balance]: weight})
        found = dict(
            zip((n for n, _ in it.model.named_parameters()), gradients(it)[1], strict=True)
        )
        slopes.append(found["blocks.1.ffn.router.gate.weight"])
    assert torch.equal(*slopes) == (balance == "none")


def test_logged_violation_is_that_of_the_batch():
    it = trainer()
    logged = it.step(0)
    expected = moe.max_violation(it.load).tolist()
    assert [logged[f"violation_{layer}"] for layer in range(3)] == expected and max(expected) > 0


def test_a_model_without_experts_and_modules_trains_too():
    plain = dataclasses.replace(SIZES, n_dense=2, n_ahead=0)
    it = DeepseekTrainer(config(), DeepseekMTP(plain), {"train": tokens()}, {}, torch.float32)
    logged = it.step(0)
    assert math.isfinite(logged["loss"]) and not any("violation" in name for name in logged)


def test_decay_groups_by_name():
    """Experts and routers decay; embeddings and gains do not."""
    model = DeepseekMTP(dataclasses.replace(SIZES, tie_embeddings=False))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([name_of[id(p)] for p in g["params"]] for g in decay_groups(model, 0.1))
    assert len(decayed) + len(kept) == len(name_of)
    assert "blocks.1.ffn.experts.w2" in decayed and "ahead.0.join.weight" in decayed
    assert set(kept) == {n for n in name_of.values() if "norm" in n or "embedding" in n}


# ── Scores ────────────────────────────────────────────────────────────────────────────────────────


def test_score_is_the_loss_of_each_row_of_each_document():
    model, held_out, total, n, same, pairs = DeepseekMTP(SIZES), tokens(130), 0.0, 0, 0, 0
    for begin, end in itertools.pairwise(held_out.bounds):
        document = torch.from_numpy(held_out.ids[begin:end].astype(np.int64))
        for start in range(0, len(document) - 1, 12):
            row = document[start : start + 13][None]
            with torch.no_grad():
                logits = model(row[:, :-1], following=row[:, 1:])
            said = [x.argmax(dim=-1)[0] for x in logits]
            total += loss_sum(logits[0], row[:, 1:]).item()
            n, pairs = n + row.shape[1] - 1, pairs + row.shape[1] - 2
            same += int((said[1][:-1] == said[0][1:]).sum())
    none = data.answers(held_out, ByteTokenizer())
    score = evaluate(model, held_out, none, 12, torch.float32)
    assert score["tokens"] == n and score["loss"] == pytest.approx(total / n, rel=1e-5)
    assert score["accepted"] == pytest.approx(same / pairs) and "recall" not in score


def test_recall_counts_the_answers_that_are_right():
    """A model that always says token 7; 2 of the 3 answers are a 7."""

    class Seven(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.weight = SIZES, nn.Parameter(torch.zeros(1))

        def forward(self, inputs, following):
            logits = torch.zeros(*inputs.shape, 258)
            logits[..., 7] = 1.0
            return [logits] * 3

    held_out = Tokens(np.array([5, 7, 9, 7, 7, 3], dtype=np.uint16), 6, ByteTokenizer())
    marks = Tokens(np.array([0, 1, 1, 0, 1, 0], dtype=np.uint16), 6, ByteTokenizer())
    score = evaluate(Seven(), held_out, marks, 12, torch.float32)
    assert score["recall"] == pytest.approx(2 / 3) and score["accepted"] == 1.0


def test_forms_are_checked_on_the_model_that_is_scored(monkeypatch):
    it = trainer()
    state, before = {k: v.clone() for k, v in it.model.state_dict().items()}, torch.get_rng_state()
    score = it.score()
    assert 0 < score["forms"] <= train.SAME
    assert "naive = cached = absorbed" in it.describe(score)
    assert torch.equal(before, torch.get_rng_state())  # a look changes no later step
    assert all(torch.equal(state[k], v) for k, v in it.model.state_dict().items())
    monkeypatch.setattr(forms, "absorbed", lambda *args: 1.001 * forms.naive(*args))
    assert "naive ≠ cached ≠ absorbed" in it.describe(it.score())


def test_score_in_words():
    score = {"nats_per_char": 1.5 * data.floor("recall", "test"), "recall": 0.5, "accepted": 0.75}
    said = train.describe("recall", score, "test")
    assert said.endswith(
        "= 1.500 × the floor; 50% of the answers right; 75% of the guesses would be accepted"
    )
    assert "floor" not in train.describe("other.txt", score, "test")


# ── On and off track ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def verdict(monkeypatch, tmp_path, capsys):
    """`verdict(times_floor, changes…)`: what the end of the default run says of a test score."""

    def call(times_floor, sizes=PRESETS["tiny"], **changes) -> str:
        settings = TrainConfig(**{"device": "cpu", "dtype": "float32"} | changes)
        score = {"loss": 1.0, "nats_per_char": times_floor * data.floor("recall", "test")}
        monkeypatch.setattr(train, "evaluate", lambda *_: score)
        loaded = types.SimpleNamespace(model=nn.Linear(1, 1))
        monkeypatch.setattr(checkpoint, "load", lambda folder: loaded)
        it = types.SimpleNamespace(config=settings, device="cpu", sizes=sizes, dtype=torch.float32)
        it.tokens = it.answers = {"test": None}
        train.conclude(it, run.RunDirectory(tmp_path))
        return capsys.readouterr().err

    return call


def test_verdict_is_by_the_floor(verdict):
    assert f"\non track: {train.ON_TRACK - 0.001:.3f} × the floor" in verdict(
        train.ON_TRACK - 0.001
    )
    assert "\noff track" in verdict(train.ON_TRACK + 0.001)
    assert "\non track" in verdict(1.0, seed=7, dtype="bfloat16", out="elsewhere")


@pytest.mark.parametrize(
    "changes",
    [{"steps": 7}, {"balance": "none"}, {"batch_size": 7}, {"data": "other"}, {"weights": "w"},
     {"sizes": dataclasses.replace(PRESETS["tiny"], kv_rank=8)}, {"ema": 0.9}],
    ids=str,
)  # fmt: skip
def test_no_verdict_on_a_run_that_the_readme_does_not_describe(verdict, changes):
    said = verdict(1.0, **changes)
    assert "test part" in said and "track" not in said


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def test_test_part_is_scored_once_in_the_end_with_the_best_weights(trained):
    out = trained("run", "--steps", 5, "--eval-every", 2)
    lines = run.RunDirectory(out).history()
    tests = [line for line in lines if line["split"] == "test"]
    assert len(tests) == 1 and lines[-1] is tests[0]
    loaded = checkpoint.load(out)
    source = data.measure(str(run.read_json(out / "config.json")["train"]["data"]))
    held_out = text.tokens_of(source, loaded.tokenizer, "test")
    score = evaluate(
        loaded.model, held_out, data.answers(held_out, loaded.tokenizer), 24, torch.float32
    )
    assert score["loss"] == pytest.approx(tests[0]["loss"], rel=1e-6)


def test_every_look_at_the_validation_part_checks_the_forms(trained):
    lines = run.RunDirectory(trained("run", "--steps", 4, "--eval-every", 2)).history()
    valid = [line for line in lines if line["split"] == "valid"]
    assert len(valid) == 2 and all(0 < line["forms"] <= train.SAME for line in valid)


@pytest.mark.parametrize("balance", train.BALANCE)
def test_each_way_of_balancing_trains_and_resumes_to_the_bit(
    command, trained, words, monkeypatch, tmp_path, balance
):
    """Biases are part of what a checkpoint keeps."""
    from harness import Killed, kill_at, same_run

    flags = ["--balance", balance, "--bias-speed", 0.1, "--steps", 6]
    flags += ["--eval-every", 3, "--checkpoint-every", 1]
    whole, half = trained("whole", *flags), tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        command(*words, "--out", half, *flags)
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)


def test_learning_rate_rises_stays_and_falls():
    """900 steps: up in 60, level to step 450, half-way down at 675, a fiftieth at the end."""
    settings = TrainConfig(steps=900)
    rates = [train.learning_rate(step, settings) / settings.lr for step in (0, 59, 300, 450, 675)]
    assert rates == pytest.approx([1 / 60, 1.0, 1.0, 1.0, 0.51])
    assert train.learning_rate(900, settings) == pytest.approx(0.02 * settings.lr)
