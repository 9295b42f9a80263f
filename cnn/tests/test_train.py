"""Training: batches, steps by hand, ranks, averages; it learns, and the same each time."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from harness import Killed, kill_at, same_run, state
from small import MANY, bars

import data
import loop
import report
import train
from augment import normalize
from model import NetConfig, build
from options import UserError
from run import RunDirectory
from train import PictureTrainer, TrainConfig, batch_rows, evaluate


@pytest.fixture
def dataset(small_data) -> data.Dataset:
    return data.load(str(small_data))


SIZES = NetConfig(width=4, image_height=8, image_width=8, n_class=3)


def trainer(dataset, **changes) -> PictureTrainer:
    torch.manual_seed(0)
    defaults = {"steps": 10, "batch_size": 8, "lr": 0.1, "device": "cpu", "flip": "off", "shift": 0}
    config = TrainConfig(**defaults | changes)
    return PictureTrainer(config, SIZES, build(SIZES), dataset, torch.float32)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (7, 7), (5, 12), (9, 1), (10, 9)])
def test_every_epoch_has_every_picture_once(n, batch_size):
    stream = torch.cat([batch_rows(n, batch_size, step, 1) for step in range(4 * n)])
    assert all(len(batch_rows(n, batch_size, step, 1)) == batch_size for step in range(9))
    epochs = stream[: 3 * n].view(3, n)
    assert all(sorted(epoch.tolist()) == list(range(n)) for epoch in epochs)
    assert n == 1 or not torch.equal(epochs[0], epochs[1])


def test_batches_depend_on_seed_and_step_alone():
    rows = batch_rows(100, 10, 7, 1)
    batch_rows(50, 3, 2, 0)
    assert torch.equal(batch_rows(100, 10, 7, 1), rows)
    assert not torch.equal(batch_rows(100, 10, 7, 2), rows)


# ── Steps ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_is_what_the_docstring_says(dataset):
    """The same step by torch's SGD, without augmentation."""
    ours = trainer(dataset, optimizer="sgd", weight_decay=0.01, label_smoothing=0.2, ema=0.0)
    model = copy.deepcopy(ours.model)
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    lr = 0.1 * 0.5 / 2  # half a step into a rise of two
    optimizer = torch.optim.SGD(
        [{"params": decay, "weight_decay": 0.01}, {"params": others}], lr, 0.9, nesterov=True
    )
    rows = batch_rows(len(dataset.train), 8, 0, 0)
    x = normalize(dataset.train.images[rows], dataset.mean, dataset.std)
    logits, labels = model(x), dataset.train.labels[rows]
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    expected.backward()
    optimizer.step()
    numbers = ours.step(0)
    loss, accuracy = numbers["loss"], numbers["accuracy"]
    assert loss == pytest.approx(expected.item(), abs=1e-6) == pytest.approx(math.log(3), abs=1e-6)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    for found, wanted in zip(ours.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_the_average_follows(dataset):
    """After step i it keeps min(ema, (1 + i) / (10 + i)) of itself: 0.1, 2/11, then 0.15."""
    ours = trainer(dataset, ema=0.15)
    expected = {k: v.clone() for k, v in ours.average.state_dict().items()}
    for number, keep in enumerate((0.1, 0.15, 0.15)):
        ours.step(number)
        for name, now in ours.model.state_dict().items():
            old = expected[name]
            expected[name] = keep * old + (1 - keep) * now if old.is_floating_point() else now
    for name, found in ours.average.state_dict().items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)
    assert ours.scored is ours.average and not ours.average.training
    assert not torch.equal(ours.average.fc.weight, ours.model.fc.weight)


def test_without_average_the_model_is_its_own(dataset):
    ours = trainer(dataset, ema=0.0)
    assert ours.average is None and ours.scored is ours.model


def test_a_gradient_that_is_not_finite_moves_nothing(dataset):
    ours = trainer(dataset)
    weight = ours.model.stem.conv1.weight
    weight.register_hook(lambda g: g * math.nan)
    before = weight.detach().clone()
    assert math.isnan(ours.step(0)["loss"])
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("changes", "shift", "flip", "averaged"),
    [
        ({}, 1, False, ("shift",)),  # 8/14 is 0.57; a bright corner has a left and a right
        ({"shift": 0}, 0, False, ()),
        ({"flip": "on", "shift": 3}, 3, True, ("flip", "shift")),
        ({"flip": "on", "shift": 0}, 0, True, ("flip",)),
        ({"flip": "off"}, 1, False, ("shift",)),
    ],
)
def test_augmentation_is_chosen_by_the_data(dataset, changes, shift, flip, averaged):
    ours = trainer(dataset, **{"shift": -1, "flip": "auto"} | changes)
    assert (ours.shift, ours.flip) == (shift, flip)
    assert ours.averaged == averaged


def test_evaluate_by_hand(dataset):
    """A network that always says class 1 with probability 1/2, the others 1/4."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([0.0, math.log(2), 0.0]))

        def forward(self, x):
            return self.weight.expand(len(x), 3)

    score = evaluate(Constant(), dataset.valid, dataset, torch.float32)
    ones = (dataset.valid.labels == 1).double().mean().item()
    assert score["accuracy"] == pytest.approx(ones)
    assert score["loss"] == pytest.approx(ones * math.log(2) + (1 - ones) * math.log(4))
    assert score["pictures"] == len(dataset.valid) == 8


# ── Whole runs ────────────────────────────────────────────────────────────────────────────────────


def logged(folder) -> list[dict]:
    return RunDirectory(folder).history()


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_training_learns(trained, optimizer):
    out = trained("run", "--steps", 60, "--batch-size", 16, "--optimizer", optimizer)
    lines = logged(out)
    assert lines[0]["loss"] == pytest.approx(math.log(3), abs=1e-6)
    assert lines[-1]["split"] == "test"
    assert lines[-1]["accuracy"] >= 0.85
    assert [line for line in lines if line["split"] == "train"][-1]["accuracy"] > 0.9


def test_bfloat16_keeps_float32_weights(trained):
    out = trained("run", "--dtype", "bfloat16")
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32, torch.int64}


def test_our_own_layers_train_to_the_same_weights(trained):
    a, b = (
        safetensors.torch.load_file(trained(name, "--layers", name) / "model.safetensors")
        for name in ("torch", "scratch")
    )
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flags", [["--optimizer", "sgd"], ["--dtype", "bfloat16", "--ema", 0]])
def test_resume_is_exact_for_other_recipes_too(
    trained, command, words, monkeypatch, tmp_path, flags, every_step_is_logged
):
    out = tmp_path / "killed"
    whole = trained("whole", *MANY, *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        command(*words, "--out", out, *MANY, *flags)
    assert command("--train", "--resume", "--out", out).code == 0
    assert same_run(out, whole)


@pytest.mark.parametrize("part", ["momentum", "average"])
def test_without_a_part_of_the_state_the_weights_would_differ(half, whole, command, part):
    kept = state(half)
    for moments in kept["optimizer"]["state"].values():
        moments["momentum_buffer"].mul_(part != "momentum")
    if part == "average":
        kept["average"] = kept["model"]
    torch.save(kept, half / "checkpoint.pt")
    assert command("--train", "--resume", "--out", half).code == 0
    assert not same_run(half, whole)


def test_test_part_is_scored_once_and_its_labels_change_nothing(trained, monkeypatch):
    """Other labels in the test part: another score there, the same weights to the bit."""
    first, load = trained("a", "--steps", 4), data.load

    def swapped(*args):
        whole = load(*args)
        test = data.Split(whole.test.images, (whole.test.labels + 1) % 3)
        return dataclasses.replace(whole, test=test)

    monkeypatch.setattr(data, "load", swapped)
    second = trained("b", "--steps", 4)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    scores = [[x for x in logged(out) if x["split"] == "test"] for out in (first, second)]
    assert len(scores[0]) == len(scores[1]) == 1
    assert scores[0][0]["loss"] != scores[1][0]["loss"]


def test_best_weights_are_those_of_the_best_validation(trained, monkeypatch):
    """The smallest loss: of these four looks the third, so weights are written three times."""
    nats = iter([1.0, 0.9, 0.8, 0.85])
    monkeypatch.setattr(
        train.PictureTrainer, "score", lambda self: {"accuracy": 0.5, "loss": next(nats)}
    )
    kept, save = [], loop.save_weights
    monkeypatch.setattr(loop, "save_weights", lambda *args: (kept.append(1), save(*args)))
    out = trained("run", "--steps", 4, "--eval-every", 1, "--checkpoint-every", 1)
    assert len(kept) == 3
    assert torch.load(out / "checkpoint.pt", weights_only=True)["best"] == 0.8


def test_training_goes_on_from_given_weights_with_a_new_head(trained, command, tmp_path):
    """From three classes to two: the filters stay, the last layer begins anew."""
    first, second = trained("first", "--steps", 30), tmp_path / "second"
    x, y = bars(40, seed=1)
    np.savez(tmp_path / "two.npz", x=x, y=y % 2)
    flags = ["--batch-size", 8, "--dtype", "float32", "--lr", 1e-6, "--steps", 1]
    words = ["--data", tmp_path / "two.npz", "--out", second, "--weights", first]
    outcome = command("--train", *flags, *words)
    assert outcome.code == 0, outcome.err
    assert "knows 3 classes: the last layer begins anew" in outcome.err
    assert "expect     loss ln" not in outcome.err  # nobody knows what to expect
    a, b = (safetensors.torch.load_file(f / "model.safetensors") for f in (first, second))
    torch.testing.assert_close(a["stem.conv1.weight"], b["stem.conv1.weight"], atol=1e-5, rtol=1e-4)
    assert logged(second)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_board_has_the_first_time_each_goal_was_reached():
    line = lambda split, accuracy, seconds: {  # noqa: E731
        "split": split, "accuracy": accuracy, "train_seconds": seconds}  # fmt: skip
    history = [line("train", 1.0, 1), line("valid", 0.4, 2), line("valid", 0.91, 3),
               line("valid", 0.8, 4), line("valid", 0.96, 5)]  # fmt: skip
    assert report.board(history) == {0.5: 3, 0.9: 3, 0.95: 5}
    assert report.board(history, 0.5)[0.9] == 3
    assert report.board(history, 0.5)[0.5] == 2


def test_verdict_is_by_the_ceiling_and_for_the_readmes_run_alone(dataset):
    known = dataclasses.replace(dataset, ceiling=0.95)
    assert report.verdict(known, 0.941, True).startswith("on track: 94.10 %")
    assert report.verdict(known, 0.939, True).startswith("off track: 93.90 %")
    assert report.verdict(known, 0.5, False).startswith("done: 50.00 % of the test part, Bayes")
    assert report.verdict(dataset, 0.99, True).startswith("done: 99.00 %")


def test_memory_is_counted_before_anything_is_built():
    """16 bytes a parameter alone are 2.6 TB for this one; a count of shapes takes none of it."""
    huge = dataclasses.replace(SIZES, width=50_000)
    with pytest.raises(UserError, match=r"training this needs [\d,]+\.\d GB or more"):
        train.check_memory(TrainConfig(), huge, torch.device("cpu"))
    train.check_memory(TrainConfig(), SIZES, torch.device("cpu"))


def test_board_passes_over_lines_that_it_does_not_know():
    good = {"split": "valid", "accuracy": 0.97, "train_seconds": 3.0}
    odd = [{"split": "valid"}, {"split": "valid", "accuracy": "x", "train_seconds": 1.0}]
    assert report.board([*odd, good]) == report.board([good]) != {}
