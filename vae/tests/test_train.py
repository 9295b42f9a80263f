"""Training: batches with their dice, what is climbed, what is scored, and that it learns."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from small import bars

import data
import train
import vae
from model import VaeConfig
from options import UserError

SIZES = VaeConfig(latent=3, width=16, image_height=8, image_width=6)


@pytest.fixture
def dataset(tmp_path):
    x, y = bars(90)
    np.savez(tmp_path / "bars.npz", x=x, y=y)
    return data.load(str(tmp_path / "bars.npz"))


def trainer_of(dataset, sizes=SIZES, **options):
    config = train.TrainConfig(batch_size=16, **options)
    model = train.network(sizes, dataset, None)
    return train.VaeTrainer(config, sizes, model, dataset, torch.float32)


def test_every_epoch_takes_every_picture_once():
    rows = torch.cat([train.batch_rows(10, 4, step, seed=0) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_a_batch_is_a_function_of_seed_and_step(dataset):
    one, other = trainer_of(dataset), trainer_of(dataset)
    other.batch(3)
    for a, b in zip(one.batch(7), other.batch(7), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.batch(7)[1], one.batch(8)[1])
    assert not torch.equal(one.batch(7)[1], trainer_of(dataset, seed=1).batch(7)[1])


def test_training_pictures_are_binarised_anew_at_each_visit(dataset):
    """All 73 pictures in a batch, twice: the same pictures, other black and white."""
    trainer = trainer_of(dataset)
    n = len(dataset.train)
    trainer.config = dataclasses.replace(trainer.config, batch_size=n)
    first, second = (trainer.batch(step)[0] for step in (0, 1))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    order = [train.batch_rows(n, n, step, 0).argsort() for step in (0, 1)]
    assert not torch.equal(first[order[0]], second[order[1]])
    mean = dataset.train.images.float().mean() / 255
    assert first.mean().item() == pytest.approx(mean.item(), abs=0.02)


def test_the_loss_is_minus_the_mean_bound(dataset):
    trainer = trainer_of(dataset, samples=3, warmup=0.0)
    x, eps = trainer.batch(0)
    loss, count, numbers = trainer.batch_loss(trainer.model, x, eps)
    log_px, mu, logvar, _ = trainer.model(x, eps)
    bound = log_px.mean(1) - vae.kl_closed(mu, logvar).sum(1)
    assert count == 16 and loss.item() == pytest.approx(-bound.sum().item())
    assert numbers["reconstruction"] + numbers["kl"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"bound": "iwae", "samples": 4}, {"free_bits": 0.2}])
def test_the_loss_does_not_depend_on_how_a_batch_is_split(dataset, options):
    """Parameters after one step at micro-batches of 16, 5 and 1."""
    found = []
    for micro in (0, 5, 1):
        torch.manual_seed(0)
        trainer = trainer_of(dataset, micro_batch_size=micro, warmup=0.0, lr=0.1, **options)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
        loss = trainer.step(0)["loss"]
        found.append((loss, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])))
    for loss, weights in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        torch.testing.assert_close(weights, found[0][1], rtol=1e-5, atol=1e-6)


def test_the_size_of_the_batch_does_not_change_the_loss_of_a_picture(dataset):
    """AntixK scales the KL by batch size / data size (M_N); here a picture costs what it costs."""
    trainer = trainer_of(dataset, warmup=0.0)
    x, eps = trainer.batch(0)
    once, _, _ = trainer.batch_loss(trainer.model, x, eps)
    twice, count, _ = trainer.batch_loss(trainer.model, x.repeat(2, 1, 1, 1), eps.repeat(2, 1, 1))
    assert count == 32 and twice.item() == pytest.approx(2 * once.item(), rel=1e-6)


def test_iwae_with_one_draw_is_the_sampled_elbo(dataset):
    trainer = trainer_of(dataset, bound="iwae", warmup=0.0)
    x, eps = trainer.batch(0)
    loss, _, _ = trainer.batch_loss(trainer.model, x, eps)
    log_px, mu, logvar, z = trainer.model(x, eps)
    wanted = vae.kl_sampled(z, mu, logvar) - log_px
    assert loss.item() == pytest.approx(wanted.sum().item(), rel=1e-6)


def test_beta_weighs_the_sampled_kl_of_iwae(dataset):
    trainer = trainer_of(dataset, bound="iwae", samples=3, beta=0.5, warmup=0.0)
    x, eps = trainer.batch(0)
    loss, _, _ = trainer.batch_loss(trainer.model, x, eps)
    log_px, mu, logvar, z = trainer.model(x, eps)
    wanted = (log_px - 0.5 * vae.kl_sampled(z, mu, logvar)).exp().mean(1).log()
    assert loss.item() == pytest.approx(-wanted.sum().item(), rel=1e-5)


def test_free_bits_reach_the_loss(dataset):
    """Below a floor of 5 nats each, three latents cost 15 whatever they say."""
    trainer = trainer_of(dataset, free_bits=5.0, warmup=0.0)
    x, eps = trainer.batch(0)
    loss, count, numbers = trainer.batch_loss(trainer.model, x, eps)
    assert loss.item() == pytest.approx(numbers["reconstruction"].item() + 15 * count, rel=1e-6)


def test_the_loss_of_codes_by_hand(dataset):
    """2 · 2 places of ln 8 nats each, and a quarter of the commitment. A step moves the codes."""
    sizes = dataclasses.replace(SIZES, net="conv", patch=4, n_code=8)
    trainer = trainer_of(dataset, sizes)
    x, eps = trainer.batch(0)
    loss, count, numbers = trainer.batch_loss(trainer.model, x, eps)
    log_px, commitment, _ = trainer.model(x)
    wanted = (0.25 * commitment + 4 * math.log(8) - log_px[:, 0]).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert numbers["kl"] == pytest.approx(count * 4 * math.log(8))
    score = train.evaluate(trainer.model, dataset.valid.images, sizes)
    assert score["kl"] == pytest.approx(4 * math.log(8)) and 1 <= score["perplexity"] <= 8
    before = trainer.model.codebook.codes.clone()
    trainer.step(0)
    assert not torch.equal(trainer.model.codebook.codes, before)


@pytest.mark.parametrize(
    "options", [{"beta": 4.0}, {"samples": 2}, {"bound": "iwae"}, {"free_bits": 0.1}], ids=str
)
def test_options_of_normal_latents_are_refused_for_codes(dataset, options):
    sizes = dataclasses.replace(SIZES, net="conv", n_code=8)
    with pytest.raises(UserError, match="about normal latents"):
        trainer_of(dataset, sizes, **options)


def test_latents_used_by_hand():
    """mu = ±1 and ±0.1, sigma = 1: KL ½ and 0.005; variances 2 and 0.02, one used, both active."""
    mu = torch.tensor([[1.0, 0.1], [-1.0, -0.1]])
    found = train.latents_used(mu, torch.zeros(2, 2))
    assert found["kl_each"] == [0.5, 0.005] and found["kl"] == pytest.approx(0.505)
    assert (found["used"], found["active"]) == (1, 2)


def test_the_error_of_a_score_is_that_of_a_mean(dataset, monkeypatch):
    """log p(x) of 0, 1 … 8: mean 4, standard deviation 2.739, a third of it for nine pictures."""

    def known(model, x, k, dice):
        return torch.arange(len(x)).double()

    monkeypatch.setattr(train.likelihood, "importance", known)
    score = train.test(trainer_of(dataset).model, dataset.test.images, SIZES, 3)
    assert score["nll"] == -4 and score["nll_error"] == pytest.approx(7.5**0.5 / 3)


def test_beta_rises_and_stays(dataset):
    trainer = trainer_of(dataset, steps=100, warmup=0.1, beta=3.0)
    seen = []
    for step in (0, 4, 9, 50):
        trainer.batch(step)
        seen.append(trainer.beta)
    assert seen == pytest.approx([0.3, 1.5, 3.0, 3.0])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        (SIZES, {}),
        (SIZES, {"bound": "iwae", "samples": 3}),
        (dataclasses.replace(SIZES, net="conv"), {}),
        (dataclasses.replace(SIZES, likelihood="logistic"), {}),
        (dataclasses.replace(SIZES, likelihood="gaussian"), {}),
        (dataclasses.replace(SIZES, net="conv", patch=4, n_code=8), {}),
    ],
    ids=["elbo", "iwae", "conv", "logistic", "gaussian", "codes"],
)
def test_it_learns(dataset, sizes, options):
    """300 steps make pictures that were not trained on likelier, by a nat or more."""
    torch.manual_seed(0)
    trainer = trainer_of(dataset, sizes, steps=300, lr=1e-2, ema=0.0, warmup=0.9, **options)
    trainer.model.eval()
    before = trainer.score()["reconstruction"]
    for step in range(300):
        trainer.step(step)
    assert trainer.score()["reconstruction"] < before - 1


def test_a_collapsed_network_is_reported(dataset, capsys):
    """A KL that is weighted with 1,000 leaves no latent in use, and a line says so."""
    trainer = trainer_of(dataset, steps=60, beta=1000.0, warmup=0.0, lr=1e-2, ema=0.0)
    for step in range(60):
        trainer.step(step)
    score = train.evaluate(trainer.model, dataset.valid.images, SIZES)
    assert score["used"] == 0 and len(score["kl_each"]) == 3
    train.warn_of_collapse(score)
    assert "posterior collapse" in capsys.readouterr().err
    train.warn_of_collapse(score | {"kl_each": [0.0, 1.0, 1.0]})
    assert "1 of 3 carry less" in capsys.readouterr().err


def test_scores_are_the_same_twice(dataset):
    trainer = trainer_of(dataset)
    assert trainer.score() == trainer.score()


def test_the_test_score_is_between_elbo_and_nothing(dataset):
    trainer = trainer_of(dataset, steps=100, lr=1e-2, ema=0.0)
    for step in range(100):
        trainer.step(step)
    score = train.test(trainer.model, dataset.test.images, SIZES, 500)
    assert 0 < score["nll"] <= score["loss"] + 0.05
    assert score["loss"] == pytest.approx(score["reconstruction"] + score["kl"])
    assert score["importance"] == 500 and "bits_per_dim" not in score


def test_bits_per_value_of_grey_pictures(dataset):
    sizes = dataclasses.replace(SIZES, likelihood="logistic")
    trainer = trainer_of(dataset, sizes)
    score = train.test(trainer.model, dataset.test.images, sizes, 10)
    assert score["bits_per_dim"] == pytest.approx(score["nll"] / 48 / math.log(2))


def test_weights_of_another_picture_size_are_refused(command, trained, tmp_path):
    out = trained("run")
    np.savez(tmp_path / "other.npz", x=np.zeros((20, 4, 4), np.uint8), y=np.zeros(20, int))
    words = ["--train", "--weights", out, "--data", tmp_path / "other.npz", "--out", tmp_path / "b"]
    assert "the network wants (1, 8, 6)" in command(*words).complaint
    words = ["--train", "--weights", out, "--latent", 7, "--out", tmp_path / "b"]
    assert "--latent 7: the network in --weights" in command(*words).complaint


def test_shard_is_refused(dataset):
    with pytest.raises(UserError, match="small"):
        trainer_of(dataset, shard=True)


def test_codes_resume_to_the_bit(command, trained, words, monkeypatch, tmp_path):
    """The codebook moves outside of the optimizer; it is in the checkpoint all the same."""
    from harness import Killed, kill_at, weights

    more = ["--net", "conv", "--n-code", "4", "--steps", "8", "--checkpoint-every", "2"]
    whole, out = trained("whole", *more), tmp_path / "killed"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 5)
        command(*words, "--out", out, *more)
    assert command("--train", "--resume", "--out", out).code == 0
    assert weights(out) == weights(whole)
