"""Batches, averaged weights, losses by bucket, and that it learns."""

import copy
from dataclasses import replace

import pytest
import small
import torch

import sources
import train
from diffusion import q_sample, target_of, weight
from model import PRESETS, NetConfig, build
from options import UserError
from train import TrainConfig, even_places

TOY = NetConfig(net="mlp", d_model=32, n_layer=2, channels=2, image_height=1, image_width=1)


def trainer_for(config: TrainConfig, sizes: NetConfig = TOY) -> train.DiffusionTrainer:
    source = sources.load(config.data)
    sizes = train.sizes_for(sizes, source, config.labels)
    return train.DiffusionTrainer(config, sizes, build(sizes), source, torch.float32)


def moons(**more) -> TrainConfig:
    return TrainConfig(data="moons", **({"batch_size": 64, "steps": 20} | more))


def test_times_are_spread_evenly_over_a_batch():
    """One in each n-th, in random order, and never 1."""
    place = even_places(50, torch.Generator().manual_seed(0))
    assert (place.sort().values * 50).long().tolist() == list(range(50))
    assert not torch.equal(place, place.sort().values)
    assert all(even_places(1, torch.Generator().manual_seed(i)) < 1 for i in range(50))


def test_a_batch_depends_on_seed_and_step_alone():
    first, second = (trainer_for(moons()) for _ in range(2))
    second.batch(3), torch.randn(5)
    for one, other in zip(first.batch(7), second.batch(7), strict=True):
        assert torch.equal(one, other)
    other_seed = trainer_for(moons(seed=1)).batch(7)
    assert not torch.equal(first.batch(7)[1], other_seed[1])
    assert not torch.equal(first.batch(7)[1], first.batch(8)[1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_labels_are_hidden_as_often_as_asked(share):
    """Hidden is the label that guidance asks as well: the number of classes."""
    trainer = trainer_for(moons(drop_label=share, batch_size=500))
    labels = torch.cat([trainer.batch(step)[3] for step in range(8)])
    assert labels.max() <= 2
    assert (labels == 2).double().mean().item() == pytest.approx(share, abs=0.025)
    assert trainer.sizes.n_label == 3


def test_every_picture_comes_once_an_epoch():
    rows = torch.cat([train.batch_rows(10, 4, step, seed=0) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))


def test_buckets_are_means_and_their_mean_is_the_loss():
    """Each quarter of the times has as many rows in a batch of 64."""
    trainer = trainer_for(moons())
    numbers = trainer.step(0)
    buckets = [numbers[f"loss_{i}"] for i in range(4)]
    assert sum(buckets) / 4 == pytest.approx(numbers["loss"], rel=1e-5)
    share = trainer.batch(0)[4]
    assert share.tolist() == [4.0] * 64
    share = trainer_for(moons(batch_size=6)).batch(0)[4]
    assert sorted(share.tolist()) == [3, 3, 3, 3, 6, 6]


def test_averaged_weights_follow_as_the_table_says():
    """keep = min(ema, (1 + n) / (10 + n)): 0.1 at once, 0.5 after 8 steps, then --ema."""
    trainer = trainer_for(moons(ema=0.9))
    name = "enter.weight"
    mean = trainer.average.state_dict()[name].clone()
    for number in range(200):
        now = torch.full_like(mean, float(number))  # weights that rise by 1 a step
        trainer.model.state_dict()[name].copy_(now)
        trainer.follow(number)
        keep = min(0.9, (1 + number) / (10 + number))
        mean = keep * mean + (1 - keep) * now
        torch.testing.assert_close(trainer.average.state_dict()[name], mean)
    lag = 199 - mean.mean().item()  # of an average that keeps 0.9 a step: 0.9 / (1 − 0.9)
    assert lag == pytest.approx(9, rel=0.01)


def test_scoring_leaves_the_live_weights_as_they_are():
    """What is scored and saved is the average; the weights in training keep every bit."""
    trainer = trainer_for(moons(ema=0.99))
    for number in range(3):
        trainer.step(number)
    live = copy.deepcopy(trainer.model.state_dict())
    mean = copy.deepcopy(trainer.average.state_dict())
    score = trainer.score()
    saved = trainer.weights()
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, live[name]) and torch.equal(saved[name], mean[name])
    assert any(not torch.equal(live[name], mean[name]) for name in live)
    assert not trainer.scored.training and score["loss"] > 0


def test_validation_is_the_same_noise_each_time():
    trainer = trainer_for(moons())
    assert trainer.score() == trainer.score()


def test_micro_batches_change_nothing():
    whole, parts = (trainer_for(moons(micro_batch_size=n)) for n in (0, 7))
    parts.model.load_state_dict(whole.model.state_dict())
    for number in range(2):
        one, other = whole.step(number), parts.step(number)
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "zero-snr", "flow"])
@pytest.mark.parametrize("min_snr", [0.0, 5.0])
def test_a_small_network_learns_the_moons(schedule, min_snr):
    """150 steps: the loss falls well below what answering 0 costs, and stays above the floor."""
    config = moons(steps=150, lr=1e-2, schedule=schedule, min_snr=min_snr, batch_size=256)
    trainer = trainer_for(config)
    first = trainer.score()["loss"]
    for number in range(150):
        trainer.step(number)
    last = trainer.score()["loss"]
    assert train.source_floor(trainer.source, trainer.process) < last < 0.75 * first


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_first_loss_is_that_of_answering_zero(schedule):
    """A new MLP answers 0, so its loss is the mean square of the target."""
    trainer = trainer_for(moons(schedule=schedule))
    wanted = train.loss_of_zero(trainer.source, trainer.process)
    assert trainer.score()["loss"] == pytest.approx(wanted, rel=0.03)


def test_loss_is_above_the_floor_at_every_time():
    """No network, trained or not, is better than the exact denoiser."""
    import exact

    trainer = trainer_for(moons(steps=100, lr=1e-2, labels=False))
    for number in range(100):
        trainer.step(number)
    source, schedule = trainer.source, trainer.schedule
    mixture = replace(source.mixture, labels=None)
    part = sources.Split(*mixture.draw(3000, torch.Generator().manual_seed(1)))
    for time in (20, 200, 500, 900):
        times, noise = torch.full((3000,), time), torch.randn(part.images.shape)
        with torch.no_grad():
            errors = train.errors_at(
                trainer.model, trainer.process, schedule, part, times, noise, torch.float32
            )
        floor = exact.floor(mixture, schedule, torch.tensor([time]), "v", 3000)
        assert errors.mean() > 0.98 * floor.item()  # both are means of chance


def test_learning_rate_rises_and_falls():
    trainer = trainer_for(moons(steps=100, lr=1.0, warmup=0.1))
    rates = [trainer.learning_rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.05, abs=0.01)


def test_target_auto_fits_the_schedule():
    assert TrainConfig().process.target == "v"
    assert TrainConfig(schedule="flow").process.target == "flow"
    assert TrainConfig(schedule="zero-snr", target="x0").process.target == "x0"


def test_sizes_that_do_not_fit_the_data_are_one_line():
    source = sources.load("moons")
    with pytest.raises(UserError, match="--data moons: pictures of 1 × 1"):
        train.sizes_for(PRESETS["digits"], source, True)


def test_shard_is_refused():
    with pytest.raises(UserError, match="start with torchrun"):
        trainer_for(moons(shard=True, ema=0.0))


def test_labels_can_be_left_out():
    assert trainer_for(moons(labels=False)).sizes.n_class == 0
    assert trainer_for(moons()).sizes.n_class == 2


def test_the_small_run_of_the_tests_is_a_picture_run(tmp_path):
    source = sources.load(str(small.write_data(tmp_path)))
    assert source.is_pictures and source.shape == (1, 8, 8) and len(source.classes) == 3


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_loss_of_a_batch_is_the_weighted_error_at_the_time_that_is_told(schedule):
    """A network that answers 0: Σ w (target)², of rows that are α x0 + σ ε at the times it gets."""
    trainer = trainer_for(moons(schedule=schedule, min_snr=5.0))
    x0, noise, place, labels, share = trainer.batch(0)
    asked = {}

    def zero(x, times, labels):
        asked.update(x=x, times=times, labels=labels)
        return torch.zeros_like(x)

    total, _, _ = trainer.batch_loss(zero, x0, noise, place, labels, share)
    alpha, sigma = trainer.schedule.at(asked["times"])
    torch.testing.assert_close(asked["x"], q_sample(x0, noise, alpha, sigma))
    assert torch.equal(asked["labels"], labels)
    target = trainer.process.target
    square = target_of(target, x0, noise, alpha, sigma).square().flatten(1).mean(1)
    wanted = (weight(target, alpha, sigma, 5.0) * square).sum()
    assert total.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_floor_without_labels_is_higher():
    """A network that is not told the moon cannot be as sure of where a point was."""
    source, process = sources.load("moons"), moons().process
    told, untold = (train.source_floor(source, process, labels) for labels in (True, False))
    assert untold > 1.1 * told


def test_scoring_works_where_there_is_no_float64(monkeypatch):
    """On mps a tensor cannot be made float64 before it is on the CPU."""

    class Elsewhere(torch.Tensor):
        def double(self):
            raise TypeError("no float64 here")

        def cpu(self):
            return self.as_subclass(torch.Tensor)

    trainer = trainer_for(moons())
    usual = train.errors_at
    monkeypatch.setattr(train, "errors_at", lambda *rest: usual(*rest).as_subclass(Elsewhere))
    assert trainer.score()["loss"] > 0
