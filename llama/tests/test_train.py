"""Training: the schedule, the groups, and that how a batch is split never changes the result."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import data
import run
import train
from conftest import FOLDER
from model import Llama, LlamaConfig
from tokenizer import ByteTokenizer
from train import TrainConfig, Trainer, decay_groups, evaluate, learning_rate, loss_sum

SIZES = LlamaConfig(258, 12, 2, 4, 2, 24, 10, 36)


def tokens(n: int = 600) -> data.Tokens:
    ids = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    ids[::50] = 257
    return data.Tokens(ids, n_char=n, tokenizer=ByteTokenizer())


def config(**changes) -> TrainConfig:
    defaults = {"steps": 10, "batch_size": 5, "lr": 1e-2, "warmup": 0, "grad_clip": 1e9}
    return TrainConfig(**defaults | {"device": "cpu", "dtype": "float32"} | changes)


def trainer(model: Llama | None = None, **changes) -> Trainer:
    if model is None:
        torch.manual_seed(0)
        model = Llama(SIZES)
    return Trainer(config(**changes), model, tokens(), torch.float32)


# ── Schedule and groups ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("step", "warmup", "expected"),
    [
        (0, 0, 1.0),
        (50, 0, 0.02 + 0.98 * 0.5),  # half of the cosine
        (100, 0, 0.02),
        (25, 0, 0.02 + 0.98 * (0.5 + 0.5 * math.sqrt(0.5))),
        (0, 10, 0.1),
        (4, 10, 0.5 * (0.02 + 0.98 * 0.5 * (1 + math.cos(0.04 * math.pi)))),
        (9, 10, 0.02 + 0.98 * 0.5 * (1 + math.cos(0.09 * math.pi))),
    ],
)
def test_learning_rate_by_hand(step, warmup, expected):
    """3 · rise · (0.02 + 0.98 · (1 + cos π step/steps)/2), rise = (step + 1)/warmup up to 1."""
    schedule = config(steps=100, lr=3.0, warmup=warmup)
    assert learning_rate(step, schedule) == pytest.approx(3 * expected, rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_decay_groups_by_name(tied):
    model = Llama(dataclasses.replace(SIZES, n_layer=1, tie_embeddings=tied))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = decay_groups(model, 0.3)
    block = "blocks.0."
    matrices = {"attention.wqkv", "attention.wo", "ffn.w13", "ffn.w2"}
    expected = {f"{block}{m}.weight" for m in matrices} | (set() if tied else {"head.weight"})
    assert {names[id(p)] for p in decayed["params"]} == expected
    assert decayed["weight_decay"] == 0.3 and kept["weight_decay"] == 0.0
    norms = {f"{block}attention_norm.weight", f"{block}ffn_norm.weight", "norm.weight"}
    assert {names[id(p)] for p in kept["params"]} == norms | {"embedding.weight"}


def test_each_parameter_is_in_one_group():
    model = Llama(SIZES)
    in_groups = [p for group in decay_groups(model, 0.1) for p in group["params"]]
    assert len(in_groups) == len(set(map(id, in_groups))) == len(list(model.parameters()))


def test_step_sets_the_learning_rate_of_its_number():
    it = trainer(warmup=4)
    for number in (0, 1, 7):
        it.step(number, 0, 1)
        assert {g["lr"] for g in it.optimizer.param_groups} == {learning_rate(number, it.config)}


# ── Loss and gradient ─────────────────────────────────────────────────────────────────────────────


def test_loss_by_hand():
    """Two logits (ln 3, 0): −ln ¾ for target 0, −ln ¼ for target 1, nothing for IGNORE."""
    logits = torch.tensor([[[math.log(3), 0.0]] * 3])
    targets = torch.tensor([[0, 1, data.IGNORE]])
    assert loss_sum(logits, targets).item() == pytest.approx(-math.log(3 / 16), rel=1e-6)


def gradients(it: Trainer, number: int = 0) -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of one step, taken where the optimizer would."""
    found = []
    it.optimizer.step = lambda: found.extend(p.grad.clone() for p in it.model.parameters())
    return it.step(number, 0, 1), found


@pytest.mark.parametrize("micro", [1, 2, 5, 99])
def test_gradient_does_not_depend_on_the_micro_batch(micro):
    """5 rows as 1+1+1+1+1, 2+2+1, and whole: 2+2+1 catches a mean of means."""
    loss, whole = gradients(trainer())
    loss_in_parts, in_parts = gradients(trainer(micro_batch_size=micro))
    assert loss_in_parts == pytest.approx(loss, abs=1e-6)
    for a, b in zip(whole, in_parts, strict=True):
        assert (a - b).abs().max() <= 1e-6


@pytest.mark.parametrize("micro", [1, 2])
def test_weights_after_steps_do_not_depend_on_the_micro_batch(micro):
    """With ε so large that Adam does not divide rounding noise by itself."""
    whole, parts = trainer(), trainer(micro_batch_size=micro)
    for it in (whole, parts):
        for group in it.optimizer.param_groups:
            group["eps"] = 1e-3
        for number in range(3):
            it.step(number, 0, 1)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_ranks_share_the_rows_and_their_gradients_average_to_the_whole():
    """Rank r takes rows r, r + 2, …; what DistributedDataParallel averages is world · each part."""
    _, whole = gradients(trainer())
    parts = []
    for rank in range(2):
        it, found = trainer(), []
        it.optimizer.step = lambda found=found, it=it: found.extend(
            p.grad.clone() for p in it.model.parameters()
        )
        it.step(0, rank, 2)
        parts.append(found)
    for a, *b in zip(whole, *parts, strict=True):
        assert (a - sum(b) / 2).abs().max() <= 1e-6


def test_loss_is_nats_per_token_of_the_batch():
    it = trainer()
    rows = it.tokens.training_rows(3, 5, 12, it.config.seed)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(it.model(rows[:, :-1]).mT, rows[:, 1:]).item()
    assert it.step(3, 0, 1) == pytest.approx(expected, rel=1e-5)


def test_gradient_is_clipped():
    _, free = gradients(trainer())
    _, clipped = gradients(trainer(grad_clip=0.01))
    norm = torch.cat([g.flatten() for g in free]).norm()
    assert norm > 0.1
    for a, b in zip(free, clipped, strict=True):
        torch.testing.assert_close(b, a * 0.01 / norm, rtol=1e-3, atol=1e-9)


def test_no_gradient_is_left_over():
    """A gradient that stayed would be part of the next step."""
    it = trainer()
    it.step(0, 0, 1)
    assert all(p.grad is None for p in it.model.parameters())


def test_step_with_a_loss_that_is_not_finite_changes_no_weight():
    it = trainer()
    with torch.no_grad():
        it.model.norm.weight[0] = math.inf
    before = [p.clone() for p in it.model.parameters()]
    assert not math.isfinite(it.step(0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))


def test_overfits_one_batch(monkeypatch):
    """Random tokens, learnt by heart: from ln V + ½ to nearly nothing."""
    it = trainer(steps=150, lr=2e-2, weight_decay=0.0, batch_size=4)
    rows = torch.randint(258, (4, 13))
    rows[:, 0] = torch.arange(4)  # what tells the rows apart
    monkeypatch.setattr(it.tokens, "training_rows", lambda *_: rows)
    losses = [it.step(number, 0, 1) for number in range(150)]
    assert losses[0] == pytest.approx(math.log(258) + 0.5, abs=0.4)
    assert losses[-1] < 0.05


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_model_that_knows_nothing_scores_ln_v():
    """All logits 0: ln V per token. Of 90 ids all are targets but those that begin a document."""
    model, held_out = Llama(SIZES), tokens(90)
    model.head.weight.data.zero_()
    score = evaluate(model, held_out, 12, torch.float32)
    assert score["loss"] == pytest.approx(math.log(258), rel=1e-6)
    n_token = 90 - 1 - len(held_out.begins[1:])
    assert (score["tokens"], score["chars"]) == (n_token, 90)
    assert score["nats_per_char"] == pytest.approx(n_token * math.log(258) / 90, rel=1e-6)


def test_score_is_the_loss_of_each_row_of_each_document():
    model, held_out, total, n = Llama(SIZES), tokens(130), 0.0, 0
    bounds = [*held_out.begins, len(held_out.ids)]
    for begin, end in itertools.pairwise(bounds):
        document = torch.from_numpy(held_out.ids[begin:end].astype(np.int64))
        for start in range(0, len(document) - 1, 12):
            row = document[start : start + 13][None]
            total += loss_sum(model(row[:, :-1]), row[:, 1:]).item()
            n += row.shape[1] - 1
    score = evaluate(model, held_out, 12, torch.float32)
    assert score["tokens"] == n
    assert score["loss"] == pytest.approx(total / n, rel=1e-5)


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def test_same_seed_same_bits(trained):
    files = [trained(name, "--steps", 5) / "model.safetensors" for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = trained("c", "--steps", 5, "--seed", 1) / "model.safetensors"
    assert other.read_bytes() != files[0].read_bytes()


def test_log_has_a_line_for_the_first_and_last_step_and_each_score(trained):
    out = trained("run", "--steps", 5, "--eval-every", 2)
    lines = [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    at = [(line["step"], line["split"]) for line in lines]
    assert at == [
        (1, "train"),
        (2, "valid"),
        (4, "valid"),
        (5, "train"),
        (5, "valid"),
    ]
    assert {"loss", "lr", "tokens_per_second", "seconds"} <= lines[0].keys()
    assert {"loss", "nats_per_char"} <= lines[1].keys()


def test_weights_kept_are_the_best_on_held_out_text(trained, monkeypatch):
    """Scores 3, 1, 2: the weights of step 4 stay."""
    scores = iter([3.0, 1.0, 2.0])
    kept = {}

    def fake(model, *_):
        score = next(scores)
        kept[score] = model.embedding.weight.detach().clone()
        return {"loss": score, "nats_per_char": score, "tokens": 1, "chars": 1}

    monkeypatch.setattr(train, "evaluate", fake)
    out = trained("run", "--steps", 6, "--eval-every", 2)
    import checkpoint

    assert torch.equal(checkpoint.load(out).model.embedding.weight, kept[1.0])
    assert torch.load(out / "checkpoint.pt", weights_only=True)["best"] == 1.0


def test_training_learns(trained):
    out = trained("run", "--steps", 60, "--lr", 0.02, "--warmup", 5)
    lines = [
        json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert lines[0]["loss"] == pytest.approx(math.log(258) + 0.5, abs=0.35)
    assert lines[-1]["loss"] < 4.0


def test_verdict_is_by_the_floor():
    floor = data.floor_nats_per_char("stories")
    assert train.verdict("stories", 1.09 * floor).startswith("on track: 1.090 × the floor")
    assert train.verdict("stories", 1.11 * floor).startswith("off track: 1.110 × the floor")
    assert train.verdict("other.txt", 1.5).startswith("done: 1.5000 nats per character")
    assert "1.500 × the floor" in train.describe("stories", {"nats_per_char": 1.5 * floor})


def torchrun(*words) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [sys.executable, *launcher, str(FOLDER / "main.py"), *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
@pytest.mark.parametrize("shard", [[], ["--shard"]], ids=["replicated", "sharded"])
def test_two_ranks_give_the_loss_curve_of_one(trained, small, text_file, tmp_path, shard):
    """5 rows over two ranks, 3 and 2, in micro-batches of 2 and 1."""
    flags = ["--steps", 4, "--batch-size", 5, "--eval-every", 1, "--warmup", 0, "--lr", 0.01]
    alone = trained("alone", *flags)
    out = tmp_path / "ranks"
    words = ["--train", *small, "--data", text_file, "--out", out, *flags, *shard]
    done = torchrun(*words, "--micro-batch-size", 2)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stderr

    def curve(folder):
        lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
        return [(x["step"], x["split"], x["loss"]) for x in lines]

    assert [x[:2] for x in curve(out)] == [x[:2] for x in curve(alone)]
    for ours, expected in zip(curve(out), curve(alone), strict=True):
        assert ours[2] == pytest.approx(expected[2], abs=1e-4)
    states = [torch.load(f / "checkpoint.pt", weights_only=True) for f in (out, alone)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert len(states[0]["rng"]) == 2
    resumed = run.RunDirectory(out).load_checkpoint()
    assert resumed["step"] == 4
