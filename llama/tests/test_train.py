"""Training: the schedule, the groups, and that how a batch is split never changes the result."""

import dataclasses
import itertools
import math
import re
import types

import numpy as np
import pytest
import torch
from torch import nn

import checkpoint
import data
import hardware
import loop
import run
import train
from model import PRESETS, Llama, LlamaConfig
from text import IGNORE, Tokens
from tokenizer import ByteTokenizer
from train import LlamaTrainer, TrainConfig, decay_groups, evaluate, learning_rate, loss_sum

SIZES = LlamaConfig(
    vocab_size=258, seq_len=12, n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_head=10, d_ff=36
)


def tokens(n: int = 600) -> Tokens:
    ids = np.random.default_rng(0).integers(0, 256, n).astype(np.uint16)
    ids[::50] = 257
    return Tokens(ids, n_char=n, tokenizer=ByteTokenizer())


def config(**changes) -> TrainConfig:
    defaults = {"steps": 10, "batch_size": 5, "lr": 1e-2, "warmup": 0, "grad_clip": 1e9}
    return TrainConfig(**defaults | {"device": "cpu", "dtype": "float32"} | changes)


def trainer(model: nn.Module | None = None, **changes) -> LlamaTrainer:
    """Without `model` a Llama that stays in eval() mode: a fork's dropout would be noise here."""
    if model is None:
        torch.manual_seed(0)
        model = Llama(SIZES).eval()
        model.train = lambda mode=True: model
    return LlamaTrainer(config(**changes), model, {"train": tokens()}, torch.float32)


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
    matrices = {f"attention.{name}" for name in ("wq", "wk", "wv", "wo")}
    matrices |= {"ffn.w1", "ffn.w2", "ffn.w3"}
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
        it.step(number)
        assert {g["lr"] for g in it.optimizer.param_groups} == {learning_rate(number, it.config)}


# ── Loss and gradient ─────────────────────────────────────────────────────────────────────────────


def test_loss_by_hand():
    """Two logits (ln 3, 0): −ln ¾ for target 0, −ln ¼ for target 1, nothing for IGNORE."""
    logits = torch.tensor([[[math.log(3), 0.0]] * 3])
    targets = torch.tensor([[0, 1, IGNORE]])
    assert loss_sum(logits, targets).item() == pytest.approx(-math.log(3 / 16), rel=1e-6)


def gradients(it: LlamaTrainer, number: int = 0) -> tuple[float, list[torch.Tensor]]:
    """The loss and the gradients of one step, taken where the optimizer would."""
    found = []
    it.optimizer.step = lambda: found.extend(p.grad.clone() for p in it.model.parameters())
    return it.step(number)["loss"], found


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
            it.step(number)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert (a - b).abs().max() <= 1e-6


def test_ranks_share_the_rows_and_their_gradients_average_to_the_whole(monkeypatch):
    """Rank r takes rows r, r + 2, …; DistributedDataParallel averages what the two have."""
    _, whole = gradients(trainer())
    monkeypatch.setattr(hardware, "world", lambda: 2)
    parts, count = [], 0
    for rank in range(2):
        monkeypatch.setattr(hardware, "rank", lambda rank=rank: rank)
        it = trainer()
        rows = it.batch(0)
        sums = it.accumulate(it.parts(rows))
        count += int(sums["count"])
        parts.append([p.grad for p in it.model.parameters()])
    assert count == rows[0][:, 1:].numel() == 60
    for parameter, *grads in zip(it.model.parameters(), *parts, strict=True):
        parameter.grad = sum(grads) / 2
    it.finish_gradient(hardware.world() / count)
    for expected, parameter in zip(whole, it.model.parameters(), strict=True):
        assert (expected - parameter.grad).abs().max() <= 1e-6


def test_loss_is_nats_per_token_of_the_batch():
    it = trainer()
    rows = it.tokens["train"].training_rows(3, 5, 12, it.config.seed)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(it.model(rows[:, :-1]).mT, rows[:, 1:]).item()
    assert it.step(3)["loss"] == pytest.approx(expected, rel=1e-5)


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
    it.step(0)
    assert all(p.grad is None for p in it.model.parameters())


def test_step_with_a_loss_that_is_not_finite_changes_no_weight():
    it = trainer()
    with torch.no_grad():
        it.model.norm.weight[0] = math.inf
    before = [p.clone() for p in it.model.parameters()]
    assert not math.isfinite(it.step(0)["loss"])
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))


def test_overfits_one_batch(monkeypatch):
    """Random tokens, learnt by heart: from ln V + ½ to nearly nothing."""
    it = trainer(steps=150, lr=2e-2, weight_decay=0.0, batch_size=4)
    rows = torch.randint(258, (4, 13))
    rows[:, 0] = torch.arange(4)  # what tells the rows apart
    monkeypatch.setattr(it.tokens["train"], "training_rows", lambda *_: rows)
    losses = [it.step(number)["loss"] for number in range(150)]
    assert losses[0] == pytest.approx(math.log(258) + 0.5, abs=0.4)
    assert losses[-1] < 0.05


# ── Evaluation ────────────────────────────────────────────────────────────────────────────────────


def test_model_that_knows_nothing_scores_ln_v():
    """All logits 0: ln V per token. Of 90 ids all are targets but those that begin a document."""
    model, held_out = Llama(SIZES), tokens(90)
    model.head.weight.data.zero_()
    score = evaluate(model, held_out, 12, torch.float32)
    assert score["loss"] == pytest.approx(math.log(258), rel=1e-6)
    n_token = 90 - 1 - len(held_out.bounds[1:-1])
    assert (score["tokens"], score["chars"]) == (n_token, 90)
    assert score["nats_per_char"] == pytest.approx(n_token * math.log(258) / 90, rel=1e-6)


def test_score_is_the_loss_of_each_row_of_each_document():
    model, held_out, total, n = Llama(SIZES).eval(), tokens(130), 0.0, 0
    for begin, end in itertools.pairwise(held_out.bounds):
        document = torch.from_numpy(held_out.ids[begin:end].astype(np.int64))
        for start in range(0, len(document) - 1, 12):
            row = document[start : start + 13][None]
            total += loss_sum(model(row[:, :-1]), row[:, 1:]).item()
            n += row.shape[1] - 1
    score = evaluate(model, held_out, 12, torch.float32)
    assert score["tokens"] == n
    assert score["loss"] == pytest.approx(total / n, rel=1e-5)


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def logged(out) -> list[dict]:
    return run.RunDirectory(out).history()


def test_log_has_a_line_for_the_first_and_last_step_and_each_score(trained):
    lines = logged(trained("run", "--steps", 5, "--eval-every", 2))
    at = [(line["step"], line["split"]) for line in lines]
    assert at == [
        (1, "train"),
        (2, "valid"),
        (4, "valid"),
        (5, "train"),
        (5, "valid"),
        (5, "test"),
    ]
    assert {"loss", "lr", "tokens_per_second", "seconds"} <= lines[0].keys()
    assert {"loss", "nats_per_char"} <= lines[1].keys()


@pytest.fixture
def scripted_scores(monkeypatch):
    """Validation scores 3, 1, 2; returns for each scored part what was scored and by which weights.

    Weights are told by the first of them, since every step moves it.
    """
    valid, scored = iter([3.0, 1.0, 2.0]), []

    def fake(model, tokens, *_):
        assert not model.training
        score = next(valid) if len(scored) < 3 else 7.0
        scored.append((score, len(tokens.ids), model.embedding.weight.detach().clone()))
        return {"loss": score, "nats_per_char": score, "tokens": 1, "chars": 1}

    monkeypatch.setattr(train, "evaluate", fake)
    return scored


def test_weights_kept_are_the_best_on_the_validation_part(trained, scripted_scores):
    """Scores 3, 1, 2: the weights of step 4 stay."""
    out = trained("run", "--steps", 6, "--eval-every", 2)
    kept = checkpoint.load(out).model.embedding.weight
    assert [score for score, *_ in scripted_scores] == [3.0, 1.0, 2.0, 7.0]
    assert torch.equal(kept, scripted_scores[1][2])
    assert not torch.equal(kept, scripted_scores[2][2])
    assert torch.load(out / "checkpoint.pt", weights_only=True)["best"] == 1.0


def test_test_part_is_scored_once_in_the_end_with_the_best_weights(trained, scripted_scores):
    """It is not the part that chose them."""
    out = trained("run", "--steps", 6, "--eval-every", 2)
    sizes = run.read_json(out / "tokens.json")
    assert sizes["valid"]["ids"] != sizes["test"]["ids"]  # else this would show nothing
    assert [n_id for _, n_id, _ in scripted_scores] == [sizes["valid"]["ids"]] * 3 + [
        sizes["test"]["ids"]
    ]
    assert torch.equal(scripted_scores[3][2], scripted_scores[1][2])
    assert [line["split"] for line in logged(out) if line["split"] != "train"] == [
        "valid", "valid", "valid", "test"
    ]  # fmt: skip
    assert logged(out)[-1]["loss"] == 7.0


def test_resumed_end_of_a_run_is_tested_once(trained, command):
    """Also where the run was killed after its last step and before the test part was scored."""
    out = trained("run")
    run_dir = run.RunDirectory(out)
    whole = [line["split"] for line in logged(out)]
    run.write_text(run_dir.log_file, "".join(
        line + "\n" for line in run_dir.log_file.read_text(encoding="utf-8").splitlines()[:-1]
    ))  # fmt: skip
    for _ in range(2):
        assert command("--train", "--resume", "--out", out).code == 0
        assert [line["split"] for line in logged(out)] == whole


def test_training_learns(trained):
    lines = logged(trained("run", "--steps", 60, "--lr", 0.02, "--warmup", 5))
    assert lines[0]["loss"] == pytest.approx(math.log(258) + 0.5, abs=0.35)
    assert lines[-1]["loss"] < 4.0


def test_training_says_what_it_does(command, words, tmp_path):
    outcome = command(*words, "--out", tmp_path / "run")
    for word in ("device", "config", "parameters", "ln V", "step     1", "to test", "samples"):
        assert word in outcome.err
    samples = (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")
    assert outcome.out.strip() and outcome.out.strip() in samples


def test_parameter_counts_add_up(command, words, tmp_path):
    err = command(*words, "--out", tmp_path / "run").err
    total, groups = re.search(r"parameters ([\d,]+): (.*)", err).groups()
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"(\w+) ([\d,]+\d)", groups)}
    assert sum(counts.values()) == int(total.replace(",", ""))
    # 258·32; wq, wk, wv (4 + 2·2)·8·32 and wo 32·32; 3·48·32; three norms of 32
    norms = {"attention_norm": 32, "ffn_norm": 32, "norm": 32}
    assert counts == {"embedding": 8256, "attention": 3072, "ffn": 4608} | norms


# ── On and off track ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def verdict(monkeypatch, tmp_path, capsys):
    """`verdict(times_floor, changes…)`: what the end of the default run says of a test score."""

    def call(times_floor: float, sizes: LlamaConfig = PRESETS["tiny"], **changes) -> str:
        config = TrainConfig(**{"device": "cpu", "dtype": "float32"} | changes)
        score = times_floor * data.floor("stories", "test")
        monkeypatch.setattr(train, "evaluate", lambda *_: {"loss": 1.0, "nats_per_char": score})
        loaded = types.SimpleNamespace(model=nn.Linear(1, 1))
        monkeypatch.setattr(checkpoint, "load", lambda folder: loaded)
        it = types.SimpleNamespace(config=config, device="cpu", sizes=sizes, dtype=torch.float32)
        it.tokens = {"test": None}
        train.conclude(it, run.RunDirectory(tmp_path))
        return capsys.readouterr().err

    return call


def test_verdict_is_by_the_floor(verdict):
    limit = train.ON_TRACK
    assert f"\non track: {limit - 0.001:.3f} × the floor" in verdict(limit - 0.001)
    assert f"\noff track: {limit + 0.001:.3f} × the floor" in verdict(limit + 0.001)
    assert "\non track" in verdict(limit - 0.001, seed=7, dtype="bfloat16", out="elsewhere")


@pytest.mark.parametrize(
    "changes",
    [{"steps": 700}, {"lr": 1e-3}, {"batch_size": 8}, {"data": "other"}, {"weights": "w"},
     {"sizes": dataclasses.replace(PRESETS["tiny"], n_layer=2)}, {"ema": 0.9}],
    ids=str,
)  # fmt: skip
def test_no_verdict_on_a_run_that_the_readme_does_not_describe(verdict, changes):
    said = verdict(1.0, **changes)
    assert "test part" in said and "track" not in said


def test_score_in_words():
    floor = data.floor("stories", "test")
    said = train.describe("stories", {"nats_per_char": 1.5 * floor}, "test")
    assert said.endswith("nats per character = 1.500 × the floor")
    assert (
        train.describe("other.txt", {"nats_per_char": 1.5}, "test") == "1.5000 nats per character"
    )


# ── From weights that are there ───────────────────────────────────────────────────────────────────


def test_training_goes_on_from_given_weights(command, trained, small_data, tmp_path):
    """A run from a run: its first loss is that of the weights, not ln V + ½."""
    learnt = trained("learnt", "--steps", 80, "--lr", 0.02, "--warmup", 5)
    longer = tmp_path / "longer"
    words = ["--data", small_data, "--steps", 2, "--batch-size", 4, "--dtype", "float32"]
    outcome = command("--train", *words, "--weights", learnt, "--out", longer)
    assert outcome.code == 0, outcome.err
    assert logged(longer)[0]["loss"] < 4.5
    assert "ln V" not in outcome.err  # which is the loss of fresh weights


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "tiny"], "leave theirs out"),
        (["--tokenizer", "bytes"], "leave theirs out"),
        (["--n-layer", "2"], "--n-layer 2: the model in .* has 1"),
        (["--d-model", "64"], "--d-model 64: the model in .* has 32"),
        (["--vocab-size", "300"], "--vocab-size 300: the model in .* has 258"),
        (["--seq-len", "25"], "--seq-len 25: the model in .* has 24"),
    ],
    ids=str,
)
def test_sizes_that_the_given_weights_contradict_are_refused(
    command, trained, small_data, tmp_path, more, message
):
    words = ["--train", "--data", small_data, "--weights", trained("run"), "--out", tmp_path / "b"]
    assert re.search(message, command(*words, *more).only_line)
    assert not (tmp_path / "b").exists()


def test_smaller_context_than_that_of_the_given_weights(command, trained, small_data, tmp_path):
    """And what the weights say too may be said once more."""
    out = tmp_path / "shorter"
    words = ["--data", small_data, "--steps", 2, "--weights", trained("run"), "--out", out]
    outcome = command("--train", *words, "--seq-len", 9, "--d-model", 32)
    assert outcome.code == 0, outcome.err
    assert checkpoint.load(out).model.config.seq_len == 9
    assert "d_model=32" in outcome.err and "seq_len=9" in outcome.err


# ── A fork with dropout ───────────────────────────────────────────────────────────────────────────


class WithDropout(Llama):
    """What a learner may make of it."""

    def features(self, *tokens):
        return nn.functional.dropout(super().features(*tokens), 0.5, self.training)


def test_model_with_dropout_scores_the_same_three_times(monkeypatch):
    """Everything that scores puts the model in eval() mode, and the next step back in train()."""
    it = trainer(WithDropout(SIZES))
    it.tokens["valid"] = tokens(90)
    seen = []
    monkeypatch.setattr(it.model, "train", lambda mode=True: (seen.append(mode), set_mode(mode)))

    def set_mode(mode):
        nn.Module.train(it.model, mode)

    a = loop.scores(it)
    it.model.training = True
    b = it.score()
    it.model.training = True
    c = evaluate(it.model, tokens(90), 12, torch.float32)
    assert a == b == c
    assert True not in seen
    it.step(0)
    assert seen[-1] is True and it.model.training
    it.model.training = True
    noisy = loss_sum(
        it.model(tokens(13).training_rows(0, 1, 12, 0)[:, :-1]), torch.zeros(1, 12).long()
    )
    again = loss_sum(
        it.model(tokens(13).training_rows(0, 1, 12, 0)[:, :-1]), torch.zeros(1, 12).long()
    )
    assert noisy != again  # the dropout is there


def test_training_with_dropout_differs_from_training_without(trained, monkeypatch):
    """So the steps are taken in train() mode, though scores come between them."""
    plain = logged(trained("plain", "--steps", 4, "--eval-every", 1))
    monkeypatch.setattr(train, "Llama", WithDropout)
    forked = logged(trained("forked", "--steps", 4, "--eval-every", 1))
    assert [a["loss"] != b["loss"] for a, b in zip(plain, forked, strict=True)] == [True] * len(
        plain
    )


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────


def test_memory_is_estimated_before_anything_is_built(command, words, tmp_path, monkeypatch):
    """A model that cannot fit is refused though its construction would fail the test."""
    monkeypatch.setattr(Llama, "__init__", None)
    outcome = command(*words, "--out", tmp_path / "run", "--d-model", 100_000, "--d-ff", 10**6)
    assert re.search(r"training this needs [\d,.]+ GB or more, cpu has", outcome.complaint)
    assert not (tmp_path / "run").exists()


def test_memory_of_the_logits_counts_too(command, words, tmp_path, small_data):
    """10⁸ rows of 24 tokens: 258 logits, twice four bytes each, and 40 bytes an id: 5,049.6 GB."""
    outcome = command(*words, "--out", tmp_path / "run", "--batch-size", 10**8)
    assert "training this needs 5,049.6 GB" in outcome.complaint
    large = ["--batch-size", 2**31 - 1, "--micro-batch-size", 1]  # few logits, and a list of rows
    assert "training this needs" in command(*words, "--out", tmp_path / "run", *large).complaint
    assert command(*words, "--out", tmp_path / "run", "--batch-size", 4).code == 0
