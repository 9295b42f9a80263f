"""Training: balance in all its ways, and that how a batch is split never changes the result."""

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
import hardware
import moe
import run
import text
import train
from model import PRESETS, Mixtral, MixtralConfig
from text import IGNORE, Tokens
from tokenizer import ByteTokenizer
from train import MixtralTrainer, TrainConfig, decay_groups, evaluate, loss_sum

SIZES = MixtralConfig(
    vocab_size=258,
    seq_len=12,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    d_model=24,
    d_head=10,
    d_ff=16,
    n_expert=5,
    n_active=2,
)


def tokens(n: int = 600) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    ids[::50] = 257
    return Tokens(ids, n_char=n, tokenizer=ByteTokenizer())


def config(**changes) -> TrainConfig:
    defaults = {"steps": 10, "batch_size": 5, "lr": 1e-2, "warmup": 0, "grad_clip": 1e9}
    return TrainConfig(**defaults | {"device": "cpu", "dtype": "float32"} | changes)


def sure(model: Mixtral) -> Mixtral:
    """The model with routers that are sure of what they do: else rounding decides who gets what."""
    for block in model.blocks:
        block.ffn.router.gate.weight.data.mul_(50)
    return model


def trainer(**changes) -> MixtralTrainer:
    torch.manual_seed(0)
    parts = {"train": tokens()}
    return MixtralTrainer(config(**changes), sure(Mixtral(SIZES)), parts, {}, torch.float32)


def gradients(it: MixtralTrainer, number: int = 0) -> tuple[dict, list[torch.Tensor]]:
    """What is logged and the gradients of one step, taken where the optimizer would."""
    found = []
    it.optimizer.step = lambda: found.extend(p.grad.clone() for p in it.model.parameters())
    return it.step(number), found


def with_ignored_targets(monkeypatch) -> None:
    """The rows have different numbers of targets, so that a mean of means would differ."""
    rows = tokens().training_rows(0, 5, 12, 0)
    rows[1, 4:] = rows[3, 9:] = IGNORE

    monkeypatch.setattr(MixtralTrainer, "batch", lambda self, step: (rows,))
    routed = MixtralTrainer.routed

    def clamped(self, forward, inputs, counted):
        return routed(self, forward, inputs.clamp(min=0), counted)

    monkeypatch.setattr(MixtralTrainer, "routed", clamped)


# ── A step, however it is split ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("balance", ["loss", "pooled", "bias", "none"])
@pytest.mark.parametrize("micro", [1, 2, 99])
def test_gradient_does_not_depend_on_the_micro_batch(monkeypatch, micro, balance):
    """The balancing loss asks how busy an expert is in the whole batch, in each part of it."""
    with_ignored_targets(monkeypatch)
    flags = {"balance": balance, "balance_weight": 1.0, "z_weight": 0.1}
    logged, whole = gradients(trainer(**flags))
    logged_in_parts, in_parts = gradients(trainer(micro_batch_size=micro, **flags))
    assert logged_in_parts == pytest.approx(logged, abs=1e-5)
    for a, b in zip(whole, in_parts, strict=True):
        assert (a - b).abs().max() <= 2e-6


def test_load_of_a_part_instead_of_the_whole_would_show(monkeypatch):
    """The mistake that the test above is there for."""
    flags = {"balance_weight": 1.0, "micro_batch_size": 1}
    _, right = gradients(trainer(**flags))
    it = trainer(**flags)

    def forgetful(self, parts):
        sums = {}
        for part in parts:
            self.load = None
            for name, value in super(MixtralTrainer, self).accumulate([part]).items():
                sums[name] = sums.get(name, 0) + value
        return sums

    monkeypatch.setattr(MixtralTrainer, "accumulate", forgetful)
    _, wrong = gradients(it)
    assert max((a - b).abs().max() for a, b in zip(right, wrong, strict=True)) > 1e-4


def test_ranks_sum_their_loads_and_their_gradients_average_to_the_whole(monkeypatch):
    """Rank r takes rows r, r + 2, …; what each would sum over the ranks is put in by hand."""
    _, whole = gradients(trainer(balance_weight=1.0))
    monkeypatch.setattr(hardware, "world", lambda: 2)
    own = []
    for rank in range(2):
        monkeypatch.setattr(hardware, "rank", lambda rank=rank: rank)
        it = trainer(balance_weight=1.0)
        it.accumulate(it.parts(it.batch(0)))
        own.append(it.load)
    assert not torch.equal(*own)
    monkeypatch.setattr(hardware, "sum_over_ranks", lambda x: sum(own) if x.dim() == 2 else x)
    parts, count = [], 0
    for rank in range(2):
        monkeypatch.setattr(hardware, "rank", lambda rank=rank: rank)
        it = trainer(balance_weight=1.0)
        count += int(it.accumulate(it.parts(it.batch(0)))["count"])
        parts.append([p.grad for p in it.model.parameters()])
    for parameter, *grads in zip(it.model.parameters(), *parts, strict=True):
        parameter.grad = sum(grads) / 2
    it.finish_gradient(hardware.world() / count)
    for expected, parameter in zip(whole, it.model.parameters(), strict=True):
        assert (expected - parameter.grad).abs().max() <= 2e-6


def test_jitter_is_the_same_in_the_counting_pass_and_behind_it():
    """The pass that counts loads draws no dice of the run."""
    it = trainer(jitter=0.3, micro_batch_size=2)
    it.model.train()
    parts = it.parts(it.batch(0))
    before = torch.get_rng_state()
    load = it.count_loads(parts)
    assert torch.equal(before, torch.get_rng_state())
    counted = torch.ones(24, dtype=torch.bool)
    real = sum(
        torch.stack([moe.loads(r, counted[: rows[:, 1:].numel()]) for r in record])
        for (rows,) in parts
        for record in [it.routed(it.model, rows[:, :-1], counted[: rows[:, 1:].numel()])[1]]
    )
    assert torch.equal(load, real)


# ── What is followed and what is logged ───────────────────────────────────────────────────────────


def test_logged_loss_is_that_of_the_next_token_alone():
    it = trainer(balance_weight=100.0, z_weight=100.0)
    rows = it.batch(3)[0]
    with torch.no_grad():
        expected = nn.functional.cross_entropy(it.model(rows[:, :-1]).mT, rows[:, 1:]).item()
    assert it.step(3)["loss"] == pytest.approx(expected, rel=1e-5)


def test_losses_of_the_router_are_means_over_the_layers_per_token():
    it = trainer()
    rows = it.batch(0)[0]
    with torch.no_grad(), moe.recording(it.model) as record:
        it.model(rows[:, :-1])
    ones = torch.ones(60)
    balance = [moe.balance_loss_sum(r, ones, moe.loads(r, ones)).item() / 60 for r in record]
    z = [moe.z_loss_sum(r, ones).item() / 60 for r in record]
    logged = it.step(0)
    assert logged["balance"] == pytest.approx(sum(balance) / 2, rel=1e-5)
    assert logged["z"] == pytest.approx(sum(z) / 2, rel=1e-5)


def test_logged_work_is_times_an_even_share_and_adds_up():
    logged = trainer().step(0)
    for layer in range(2):
        work = [logged[f"load_{layer}_{e}"] for e in range(5)]
        assert sum(work) / 5 == pytest.approx(1.0) and max(work) > 1.1


@pytest.mark.parametrize("balance", train.BALANCE)
def test_gradient_of_the_router_feels_the_balancing_loss_where_it_is_asked_for(balance):
    slopes = []
    for weight in (0.0, 1.0):
        it = trainer(balance=balance, balance_weight=weight)
        _, found = gradients(it)
        names = [name for name, _ in it.model.named_parameters()]
        slopes.append(found[names.index("blocks.0.ffn.router.gate.weight")])
    assert torch.equal(*slopes) == (balance in ("bias", "none"))


@pytest.mark.parametrize("balance", train.BALANCE)
def test_tokens_are_dropped_by_capacity_alone(balance):
    assert (trainer(balance=balance, capacity=0.8).step(0)["dropped"] > 0) == (
        balance == "capacity"
    )


@pytest.mark.parametrize("balance", train.BALANCE)
def test_biases_move_by_bias_alone_and_never_learn(balance):
    it = trainer(balance=balance, bias_speed=0.5)
    it.step(0)
    load, biases = it.load, [router.bias for router in it.routers]
    for of_layer, bias in zip(load, biases, strict=True):
        expected = 0.5 * (of_layer.mean() - of_layer).sign() if balance == "bias" else 0 * of_layer
        assert torch.equal(bias, expected) and bias.grad is None


@pytest.mark.parametrize("balance", ["loss", "pooled", "capacity", "bias"])
def test_each_way_of_balancing_evens_out_a_skewed_router(balance):
    """A router that prefers expert 0 by far: its share falls in 60 steps, and not without."""
    ends = {}
    for way in (balance, "none"):
        it = trainer(
            balance=way, balance_weight=1.0, bias_speed=0.1, lr=3e-3, batch_size=20, z_weight=0.0
        )
        for router in it.routers:
            router.gate.weight.data[0] += 0.1
            router.gate.weight.data[0] *= 4
        for number in range(60):
            logged = it.step(number)
        ends[way] = max(logged[f"load_{layer}_{e}"] for layer in range(2) for e in range(5))
    # pooled, a layer may lean as long as another one leans the other way
    limit = 1.0 if balance == "pooled" else 0.8
    assert ends[balance] < limit * ends["none"]


def test_decay_groups_by_name():
    """Experts and routers decay; embeddings and gains do not."""
    model = Mixtral(dataclasses.replace(SIZES, tie_embeddings=False))
    name_of = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ([name_of[id(p)] for p in g["params"]] for g in decay_groups(model, 0.1))
    assert len(decayed) + len(kept) == len(name_of)
    assert "blocks.0.ffn.experts.w2" in decayed and "blocks.1.ffn.router.gate.weight" in decayed
    assert set(kept) == {n for n in name_of.values() if "norm" in n or "embedding" in n}


def test_overfits_one_batch(monkeypatch):
    """Random tokens, learnt by heart: from ln V to nearly nothing."""
    it = trainer(steps=200, lr=2e-2, weight_decay=0.0, batch_size=4)
    rows = torch.randint(258, (4, 13))
    rows[:, 0] = torch.arange(4)  # what tells the rows apart
    monkeypatch.setattr(it.tokens["train"], "training_rows", lambda *_: rows)
    losses = [it.step(number)["loss"] for number in range(200)]
    assert losses[0] == pytest.approx(math.log(258) + 0.045, abs=0.1)
    assert losses[-1] < 0.05


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def labels_of(held_out: Tokens) -> Tokens:
    return data.labels(held_out, ByteTokenizer())


def test_score_is_the_loss_of_each_row_of_each_document():
    model, held_out, total, n = Mixtral(SIZES), tokens(130), 0.0, 0
    for begin, end in itertools.pairwise(held_out.bounds):
        document = torch.from_numpy(held_out.ids[begin:end].astype(np.int64))
        for start in range(0, len(document) - 1, 12):
            row = document[start : start + 13][None]
            total += loss_sum(model(row[:, :-1]), row[:, 1:]).item()
            n += row.shape[1] - 1
    score = evaluate(model, held_out, labels_of(held_out), 12, torch.float32)
    assert score["tokens"] == n
    assert score["loss"] == pytest.approx(total / n, rel=1e-5)


def test_padding_of_the_last_rows_is_not_counted_in_the_load():
    """Each row alone, without padding, gives the same shares."""
    model, held_out = sure(Mixtral(SIZES)), tokens(130)
    score = evaluate(model, held_out, labels_of(held_out), 12, torch.float32)
    load = torch.zeros(2, 5)
    for begin, end in itertools.pairwise(held_out.bounds):
        document = torch.from_numpy(held_out.ids[begin:end].astype(np.int64))
        for start in range(0, len(document) - 1, 12):
            row = document[start : start + 13][None, :-1]
            with torch.no_grad(), moe.recording(model) as record:
                model(row)
            load += torch.stack([moe.loads(r, torch.ones(row.numel())) for r in record])
    assert torch.allclose(torch.tensor(score["load"]), load / load.sum(dim=1, keepdim=True))
    assert "information" not in score  # nobody knows the dialect of random bytes


def test_capacity_and_jitter_do_not_change_a_score():
    model, held_out = sure(Mixtral(SIZES)), tokens(130)
    before = evaluate(model, held_out, labels_of(held_out), 12, torch.float32)
    for block in model.train().blocks:
        block.ffn.router.capacity, block.ffn.router.jitter = 0.5, 0.3
    assert evaluate(model, held_out, labels_of(held_out), 12, torch.float32) == before


# ── On and off track ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def verdict(monkeypatch, tmp_path, capsys):
    """`verdict(times_floor, changes…)`: what the end of the default run says of a test score."""

    def call(times_floor, informed=1.0, dead=0, sizes=PRESETS["tiny"], **changes) -> str:
        settings = TrainConfig(**{"device": "cpu", "dtype": "float32"} | changes)
        score = {"loss": 1.0, "nats_per_char": times_floor * data.floor("dialects", "test")}
        score |= {"busiest": [1.5, 2.0], "dead_experts": [0, dead]}
        score |= {"information": [0.1, informed * math.log(4)]}
        monkeypatch.setattr(train, "evaluate", lambda *_: score)
        loaded = types.SimpleNamespace(model=nn.Linear(1, 1), tokenizer=None)
        monkeypatch.setattr(checkpoint, "load", lambda folder: loaded)
        it = types.SimpleNamespace(config=settings, device="cpu", sizes=sizes, dtype=torch.float32)
        it.tokens = it.labels = {"test": None}
        train.conclude(it, run.RunDirectory(tmp_path), None)
        return capsys.readouterr().err

    return call


def test_verdict_is_by_the_floor_the_dialects_and_the_dead(verdict):
    limit, least = train.ON_TRACK, train.INFORMED
    assert f"\non track: {limit - 0.001:.3f} × the floor" in verdict(limit - 0.001, least + 0.01)
    assert "\noff track" in verdict(limit + 0.001)
    assert "\noff track" in verdict(limit - 0.001, least - 0.01)
    assert "\noff track" in verdict(limit - 0.001, dead=1)
    assert "\non track" in verdict(limit - 0.001, seed=7, dtype="bfloat16", out="elsewhere")


@pytest.mark.parametrize(
    "changes",
    [{"steps": 700}, {"balance": "none"}, {"batch_size": 8}, {"data": "other"}, {"weights": "w"},
     {"sizes": PRESETS["dense"]}, {"ema": 0.9}],
    ids=str,
)  # fmt: skip
def test_no_verdict_on_a_run_that_the_readme_does_not_describe(verdict, changes):
    said = verdict(1.0, **changes)
    assert "test part" in said and "track" not in said


def test_score_in_words():
    score = {"nats_per_char": 1.5 * data.floor("dialects", "test"), "busiest": [1.25, 2.0]}
    score |= {"dead_experts": [1, 2], "information": [0.0, 0.5 * math.log(4)]}
    said = train.describe("dialects", score, "test")
    assert "= 1.500 × the floor; busiest expert 2.00 × its share, 3 dead" in said
    assert said.endswith("experts know 50% of the dialect")
    del score["information"]
    assert "dialect" not in train.describe("other.txt", score, "test")


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def test_test_part_is_scored_once_in_the_end_with_the_best_weights(trained):
    out = trained("run", "--steps", 5, "--eval-every", 2)
    lines = run.RunDirectory(out).history()
    tests = [line for line in lines if line["split"] == "test"]
    assert len(tests) == 1 and lines[-1] is tests[0]
    loaded = checkpoint.load(out)
    source = data.measure(str(run.read_json(out / "config.json")["train"]["data"]))
    held_out = text.tokens_of(source, loaded.tokenizer, "test")
    labels = data.labels(held_out, loaded.tokenizer)
    score = evaluate(loaded.model, held_out, labels, 24, torch.float32)
    assert score["loss"] == pytest.approx(tests[0]["loss"], rel=1e-6)
    assert score["load"] == tests[0]["load"]


@pytest.mark.parametrize("balance", train.BALANCE)
def test_each_way_of_balancing_trains_and_resumes_to_the_bit(
    command, trained, words, monkeypatch, tmp_path, balance
):
    """Biases and jitter are part of what a checkpoint keeps."""
    from harness import Killed, kill_at, same_run

    flags = ["--balance", balance, "--jitter", 0.1, "--bias-speed", 0.1, "--steps", 6]
    flags += ["--eval-every", 3, "--checkpoint-every", 1]
    whole, half = trained("whole", *flags), tmp_path / "half"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3)
        command(*words, "--out", half, *flags)
    assert command("--train", "--resume", "--out", half).code == 0
    assert same_run(half, whole)
