"""The parts of the training: schedule, label smoothing, averaging, batches, scores."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modelling import sentences, shaken

import checkpoint
import data
import decode
import train
from model import PRESETS, Transformer, TransformerConfig
from options import UserError
from train import Plan, TrainConfig, learning_rate, loss_sums

# ── The learning rate ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("d_model", "warmup"), [(512, 4000), (1024, 4000), (128, 200)])
def test_learning_rate_is_equation_3(d_model, warmup):
    """With lr = 1/√(d_model · warmup), the paper's highest rate."""
    config = TrainConfig(lr=(d_model * warmup) ** -0.5, warmup=warmup)
    for n in (1, 2, 17, warmup - 1, warmup, warmup + 1, 9 * warmup):
        expected = d_model**-0.5 * min(n**-0.5, n * warmup**-1.5)
        assert learning_rate(n - 1, config) == pytest.approx(expected, rel=1e-12)


def test_the_papers_highest_rate_is_the_one_that_is_said():
    assert f"{(512 * 4000) ** -0.5:.1e}" == "7.0e-04"
    assert "7.0e-4" in train.learning_rate.__doc__


# ── The loss ──────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 100), st.sampled_from([0.0, 0.1, 0.5]), st.sampled_from([0, 7]))
def test_loss_is_that_of_torch(seed, smoothing, pad_id):
    """Label smoothing over all but padding, whatever the padding's id; gradients too."""
    torch.manual_seed(seed)
    logits = torch.randn(3, 5, 11, requires_grad=True)
    targets = torch.randint(1, 7, (3, 5))
    targets[0, 3:] = targets[2, 1:] = pad_id
    ours, plain = loss_sums(logits, targets, smoothing, pad_id)
    flat = logits.flatten(0, 1), targets.flatten()
    theirs = F.cross_entropy(*flat, ignore_index=pad_id, label_smoothing=smoothing, reduction="sum")
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = F.cross_entropy(*flat, ignore_index=pad_id, reduction="sum").item()
    assert plain.item() == pytest.approx(expected, rel=1e-5)
    grads = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_label_smoothing_by_hand():
    """Two tokens with p = ¾ and ¼, ε = 0.2: −0.8 ln ¾ − 0.1 (ln ¾ + ln ¼)."""
    logits = torch.tensor([[[0.75, 0.25]]]).log()
    smoothed, plain = loss_sums(logits, torch.tensor([[0]]), 0.2, -1)
    assert plain.item() == pytest.approx(-math.log(0.75))
    expected = -0.8 * math.log(0.75) - 0.1 * (math.log(0.75) + math.log(0.25))
    assert smoothed.item() == pytest.approx(expected)


def test_columns_of_padding_change_no_loss():
    logits, targets = torch.randn(2, 4, 9), torch.randint(1, 9, (2, 4))
    wide = F.pad(logits, (0, 0, 0, 3), value=5.0), F.pad(targets, (0, 3))
    for one, other in zip(
        loss_sums(logits, targets, 0.1, 0), loss_sums(*wide, 0.1, 0), strict=True
    ):
        assert one.item() == pytest.approx(other.item(), rel=1e-6)


def test_the_loss_of_a_part_does_not_depend_on_its_batches(model, sizes):
    """Nats per token over all sentences, not a mean of means of batches; ends included."""
    encoded = list(zip(sentences([5, 9, 3, 30]), sentences([4, 20, 2, 7]), strict=True))
    score = train.evaluate(model, encoded, sizes, torch.float32)  # no autocast
    nats = 0.0
    for source, target in encoded:
        logits = model(torch.tensor([source]), torch.tensor([[2, *target[:-1]]]))[0]
        nats += F.cross_entropy(logits, torch.tensor(target), reduction="sum").item()
    assert score["tokens"] == 33
    assert score["loss"] == pytest.approx(nats / 33, rel=1e-5)
    assert score["nats_per_sentence"] == pytest.approx(nats / 4, rel=1e-5)


def test_the_floor_is_shared_out_over_the_same_tokens():
    pairs = data.load("grammar")
    score = {"loss": 0.5, "nats_per_sentence": 6.0}  # 12 tokens a sentence
    assert train.floor_per_token(pairs, "test", score) == pytest.approx(pairs.floor("test") / 12)
    assert train.floor_per_token(dataclasses.replace(pairs, name="x"), "test", score) is None


# ── Accumulation ──────────────────────────────────────────────────────────────────────────────────


def a_trainer(small_data, **changes) -> train.TransformerTrainer:
    """A trainer of a small model on the small data."""
    config = TrainConfig(data=str(small_data), **({"batch_size": 400, "average": 1} | changes))
    pairs = data.load(config.data)
    subwords = data.Subwords.train(pairs.train, 450)
    sizes = TransformerConfig(vocab_size=450, n_layer=1, d_model=32, d_ff=48, dropout=0.0)
    _, parts = train.load_parts(config.data, subwords, sizes)
    torch.manual_seed(0)
    return train.TransformerTrainer(config, Transformer(sizes), pairs, parts, torch.float32)


def test_micro_batches_change_nothing(small_data):
    """Rows of very different length: the gradient is that of the mean over all tokens."""
    weights = []
    for micro in (0, 1, 3):
        trainer = a_trainer(small_data, micro_batch_size=micro)
        for step in range(3):
            trainer.step(step)
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]))
    # Adam divides by the size of the gradient, so a rounding error of a tiny one becomes visible
    assert (weights[0] - weights[1]).abs().max() <= 2e-4 * weights[0].abs().max()
    assert (weights[0] - weights[2]).abs().max() <= 2e-4 * weights[0].abs().max()


# ── Averaging ─────────────────────────────────────────────────────────────────────────────────────


def snapshots(config: TrainConfig) -> list[int]:
    """The steps after which a snapshot is taken."""
    return [n for n in range(1, config.steps + 1) if train.snapshots_taken(n, config)]


@pytest.mark.parametrize(
    ("steps", "average", "every", "expected"),
    [(100, 5, 10, [60, 70, 80, 90, 100]), (25, 5, 10, [5, 15, 25]), (2, 5, 20, [2]),
     (7, 3, 2, [3, 5, 7]), (4, 9, 1, [1, 2, 3, 4])],
)  # fmt: skip
def test_which_snapshots_are_averaged(steps, average, every, expected):
    config = TrainConfig(steps=steps, average=average, average_every=every)
    assert snapshots(config) == expected
    assert [train.snapshots_taken(n, config) for n in expected] == list(range(1, len(expected) + 1))
    assert train.first_snapshot(config) == expected[0]


def test_the_average_is_the_mean_of_the_snapshots(small_data):
    trainer = a_trainer(small_data, steps=7, average=3, average_every=2)
    kept = []
    for step in range(7):
        trainer.step(step)
        if step + 1 in (3, 5, 7):
            kept.append([p.detach().clone() for p in trainer.model.parameters()])
        assert trainer.scored is (trainer.model if step < 2 else trainer.average)
    for mean, *three in zip(trainer.average.parameters(), *kept, strict=True):
        torch.testing.assert_close(mean, torch.stack(three).mean(0), rtol=1e-5, atol=1e-6)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def test_every_pair_comes_once_an_epoch_and_resume_finds_its_place():
    encoded = list(zip(sentences([4] * 30 + [9] * 20), sentences([5] * 50), strict=True))
    plan, steps = Plan(encoded, 40, 3), []
    while len(plan.starts) < 4:
        steps.append(plan(len(steps)))
    for start, stop in zip(plan.starts, plan.starts[1:], strict=False):
        if stop <= len(steps):
            assert sorted(i for batch in steps[start:stop] for i in batch) == list(range(50))
    late = Plan(encoded, 40, 3)
    assert [late(n) for n in (len(steps) - 1, 0, 3)] == [steps[-1], steps[0], steps[3]]
    assert [Plan(encoded, 40, 4)(n) for n in range(5)] != steps[:5]


def test_targets_begin_with_the_start_and_end_with_the_end():
    sizes = TransformerConfig(vocab_size=37)
    source, target = train.rows([([5, 6, 3], [7, 3]), ([5, 3], [8, 9, 3])], [1, 0], sizes)
    assert source.tolist() == [[5, 3, 0], [5, 6, 3]]
    assert target.tolist() == [[2, 8, 9, 3], [2, 7, 3, 0]]


def test_long_pairs_are_left_out_of_training_with_a_word_and_cut_for_scoring(capsys):
    sizes = TransformerConfig(vocab_size=37, seq_len=4)
    encoded = [([5, 6, 3], [7, 3]), ([5, 6, 7, 8, 3], [7, 3])]
    assert train.short_enough(encoded, 4) == encoded[:1]
    assert "1 pairs of more than 4 tokens" in capsys.readouterr().err
    assert train.cut(encoded, sizes) == [encoded[0], ([5, 6, 7, 3], [7, 3])]
    assert "1 pairs" in capsys.readouterr().err
    with pytest.raises(UserError, match="the shortest pair needs 3"):
        train.short_enough(encoded, 2)


def test_subwords_are_learned_from_the_training_part_alone(monkeypatch, tmp_path, small_data):
    seen = []
    usual = data.Subwords.train.__func__
    learn = classmethod(lambda cls, pairs, n: (seen.extend(pairs), usual(cls, pairs, n))[1])
    monkeypatch.setattr(data.Subwords, "train", learn)
    config = TrainConfig(data=str(small_data), out=str(tmp_path / "run"))
    sizes = TransformerConfig(vocab_size=450, d_model=32, n_layer=1)
    train.begin(config, sizes, None, train.RunDirectory(config.out))
    assert seen == data.load(str(small_data)).train


# ── Scores and fine-tuning ────────────────────────────────────────────────────────────────────────


def test_bleu_is_of_the_whole_part(trained, small_data, monkeypatch):
    """All pairs are translated, in their order, and scored together."""
    loaded = checkpoint.load(trained())
    pairs = data.load(str(small_data)).train
    seen = []
    monkeypatch.setattr(train.metrics, "bleu", lambda *texts: seen.append(texts) or 50.0)
    monkeypatch.undo()
    monkeypatch.setattr(train.metrics, "bleu", lambda *texts: seen.append(texts) or 50.0)
    search = decode.Search(beam=1, max_new_tokens=2)
    score = train.translation_scores(loaded, pairs, search)
    (hypotheses, references), bleu = seen[0], score["bleu"]
    assert len(hypotheses) == len(pairs) and references == [target for _, target in pairs]
    assert bleu == 50.0


def test_weights_bring_their_sizes(sizes, model):
    loaded = checkpoint.Loaded(None, model, None, None)
    assert train.sizes_of(loaded, {"seq_len": 20, "dropout": 0.3}, "x").seq_len == 20
    for asked in ({"seq_len": 41}, {"n_layer": 5}, {"norm": "pre"}):
        with pytest.raises(UserError, match="the model in x has"):
            train.sizes_of(loaded, asked, "x")


def test_dropout_is_on_in_training_and_off_in_scores(small_data):
    trainer = a_trainer(small_data)
    model = Transformer(dataclasses.replace(trainer.sizes, dropout=0.3))
    encoded, args = trainer.encoded["valid"], (trainer.sizes, torch.float32)
    model.train()
    assert train.evaluate(model, encoded, *args) == train.evaluate(model, encoded, *args)
    shaken(model.train())
    source, target = train.rows(encoded, [0], trainer.sizes)
    assert not torch.equal(model(source, target), model(source, target))


def test_default_sizes_fit_the_default_data():
    """The subwords give as many pieces as asked, and nothing is longer than seq_len."""
    pairs = data.load("grammar")
    sizes = PRESETS["tiny"]
    subwords = data.Subwords.train(pairs.train, sizes.vocab_size)
    assert subwords.vocab_size == sizes.vocab_size
    for part in ("train", "valid", "test"):
        encoded = train.encode_pairs(subwords, getattr(pairs, part), sizes)
        assert max(max(map(len, pair)) for pair in encoded) <= sizes.seq_len
