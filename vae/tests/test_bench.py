"""bench.py compares with what the example does, on the same work."""

import numpy as np
import pytest
import torch

import bench
import data
import train
from model import PRESETS


@pytest.fixture
def dataset(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "grey.npz", x=x, y=np.zeros(40, int))
    return data.load(str(tmp_path / "grey.npz"))


def test_both_have_the_same_network(dataset):
    ours = bench.Ours(train.TrainConfig(batch_size=8), dataset, torch.float32)
    theirs = bench.Example()
    count = [sum(p.numel() for p in m.parameters()) for m in (ours.trainer.model, theirs)]
    assert count[0] == count[1] == 652_824
    assert (ours.sizes.latent, ours.sizes.width) == (20, 400) and PRESETS["example"].depth == 1


def test_the_loader_hands_out_the_pictures(dataset):
    images = dataset.train.images
    one_by_one = bench.PicturesOneByOne(images)
    assert len(one_by_one) == len(images)
    torch.testing.assert_close(one_by_one[3], images[3].float() / 255)


@pytest.mark.parametrize("loader", [True, False])
def test_the_example_learns(dataset, loader):
    theirs = bench.Theirs(dataset.train.images, 8, torch.device("cpu"), loader)
    before = theirs.net.fc4.weight.clone()
    for _ in range(3):
        theirs.step()
    assert not torch.equal(theirs.net.fc4.weight, before)


def test_the_numbers_of_the_bench(dataset, monkeypatch, capsys):
    """A tiny run of all of it: what it prints and returns."""
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setattr(bench, "STEPS_A_TURN", 1)
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "DRAWS", 2)
    monkeypatch.setattr(bench.hardware, "matmul_rate", lambda *_: 1e11)
    config = train.TrainConfig(batch_size=8, device="cpu")
    found = bench.speed(config, dataset, torch.float32)
    assert found["train_vs_example"] > 0 and found["step_vs_example"] > 0
    found |= bench.equal_time(config, dataset, torch.float32, found["milliseconds"])
    assert found["nats"]["ours"] > 0 and found["nats"]["example"] > 0
    assert "ms a step" in capsys.readouterr().out
