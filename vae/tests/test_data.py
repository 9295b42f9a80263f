"""Pictures: parts, binarising, and what is known of the data. formats.py is cnn's, tested there."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import bars

import data
import sprites
from options import UserError

HERE = Path(__file__).resolve().parent.parent


def test_digits_are_split_without_overlap():
    dataset = data.load("digits")
    sizes = [len(part) for part in (dataset.train, dataset.valid, dataset.test)]
    assert sizes == [1455, 162, 180] and dataset.shape == (1, 8, 8)
    other = data.load("digits", seed=1)
    assert torch.equal(dataset.test.images, other.test.images)  # whatever the seed
    assert not torch.equal(dataset.valid.images, other.valid.images)


def test_binarising_by_hand():
    """Byte 255 is always 1, byte 0 never, 51 in a fifth of 40,000 throws."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(40_000, 1, 1, 3)
    x = data.as_x(images, "bernoulli", np.random.default_rng(0))
    assert x.dtype == torch.float32 and set(x.unique().tolist()) == {0.0, 1.0}
    shares = x.mean((0, 1, 2))
    assert shares[0] == 0 and shares[2] == 1 and shares[1].item() == pytest.approx(0.2, abs=0.01)


def test_grey_levels_keep_their_bytes():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    dice = np.random.default_rng(0)
    assert torch.equal((data.as_x(images, "logistic", dice) * 255).round().byte(), images)
    x = data.as_x(images, "gaussian", dice)
    assert torch.equal((x * 256).floor().byte(), images) and 0 <= x.min() and x.max() < 1


def test_test_pictures_are_binarised_once_for_all():
    """1509.00519, §5: the same dice for every model and every look."""
    images = data.load("digits").test.images
    first, second = (torch.cat(list(data.fixed(images, "bernoulli"))) for _ in range(2))
    assert torch.equal(first, second) and len(first) == len(images)
    parts = torch.cat(list(data.fixed(images, "bernoulli", rows=7)))
    assert torch.equal(first, parts)  # however many are looked at together


def test_floor_and_coins_by_hand():
    """One pixel of p = 1/5 (h = 0.5004 nats) and one of 1: nobody beats 0.5004 a picture."""
    images = torch.tensor([51, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    h = -0.2 * math.log(0.2) - 0.8 * math.log(0.8)
    assert data.floor(images) == pytest.approx(h)
    assert data.alone(torch.tensor([0.5, 0.5]).view(1, 1, 2), images) == pytest.approx(
        2 * math.log(2)
    )


def test_coins_cannot_beat_the_floor():
    dataset = data.load("digits")
    images = dataset.test.images
    assert data.floor(images) < data.alone(dataset.mean, images) < 64 * math.log(2)


def test_one_folder_of_pictures_is_enough(tmp_path):
    """Labels only colour pictures: a single class is fine, unlike in cnn."""
    (tmp_path / "all").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 7), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "all" / f"{i}.png")
    dataset = data.load(str(tmp_path))
    assert dataset.classes == ("all",) and dataset.shape == (1, 9, 7)
    assert len(dataset.train) + len(dataset.valid) + len(dataset.test) == 12
    assert data.load(str(tmp_path), image_size=4).shape == (1, 4, 4)


def test_a_cache_is_taken_for_the_same_source_alone(tmp_path):
    (tmp_path / "photos" / "all").mkdir(parents=True)
    for i in range(12):
        Image.new("L", (4, 4), 20 * i).save(tmp_path / "photos" / "all" / f"{i}.png")
    source, cache = str(tmp_path / "photos"), tmp_path / "pictures.npz"
    dataset = data.load(source)
    with open(cache, "wb") as file:
        dataset.save(file)
    again = data.load(source, cache=cache)
    assert torch.equal(again.train.images, dataset.train.images)
    (tmp_path / "photos" / "all" / "0.png").unlink()
    assert len(data.load(source, cache=cache).train) == len(dataset.train) - 1


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), "has 2 pictures: three parts need more"),
        (np.zeros((5, 4), np.uint8), np.zeros(5, int), "pictures (5, 4)"),
        (np.full((5, 4, 4), np.nan), np.zeros(5, int), "nan"),
        (np.full((5, 4, 4), 300), np.zeros(5, int), "to 300"),
        (np.zeros((5, 4, 4), np.uint8), np.zeros(4, int), "5 pictures but 4 labels"),
        (np.zeros((5, 4, 4), np.uint8), np.zeros(5), "labels are float64"),
        (np.zeros((5, 4, 4), np.uint8), np.full(5, -1), "out of range"),
    ],
    ids=["few", "flat", "nan", "bright", "labels", "floats", "negative"],
)
def test_pictures_that_do_not_fit_are_refused_in_one_line(tmp_path, x, y, message):
    np.savez(tmp_path / "odd.npz", x=x, y=y)
    with pytest.raises(UserError) as refused:
        data.load(str(tmp_path / "odd.npz"))
    assert message in str(refused.value) and "odd.npz" in str(refused.value)


def test_floats_and_channels_last_are_understood(tmp_path):
    x, y = bars(20)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    np.savez(tmp_path / "b.npz", x=x[..., None] / 255.0, y=y)
    a, b = (data.load(str(tmp_path / name)) for name in ("a.npz", "b.npz"))
    assert torch.equal(a.train.images, b.train.images)


# ── Sprites ───────────────────────────────────────────────────────────────────────────────────────


def test_every_combination_of_factors_is_a_picture_of_its_own():
    _, (pictures, shapes), factors = sprites.load()
    assert len(pictures) == math.prod(sprites.FACTORS.values()) == 1200
    assert len(np.unique(pictures.reshape(1200, -1), axis=0)) == 1200
    assert (factors.max(0) + 1).tolist() == list(sprites.FACTORS.values())
    assert set(np.unique(pictures)) == {0, 255} and (shapes == factors[:, 0]).all()


def test_sprites_are_the_same_on_every_machine():
    digest = hashlib.sha256(sprites.load()[1][0].tobytes()).hexdigest()
    assert digest in (HERE / "data" / "README.md").read_text(encoding="utf-8")


def test_no_sprite_is_cut_off():
    """All pictures of one shape and size have as many white pixels, wherever they are."""
    _, (pictures, _), factors = sprites.load()
    for kind in np.unique(factors[:, :2], axis=0):
        chosen = pictures[(factors[:, :2] == kind).all(1)]
        assert len(set((chosen > 0).sum((1, 2)).tolist())) == 1


def test_mutual_information_by_hand():
    """Equal lists of two alike values: ln 2. Independent ones: 0."""
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert sprites.mutual_information(a, a) == pytest.approx(math.log(2))
    assert sprites.mutual_information(a, b) == pytest.approx(0)


def test_bins_have_equal_widths():
    """20 bins from −1 to 1: 0.09 is in the one that begins at 0, the 11th; nothing varies: one."""
    values = np.array([-1.0, -0.91, -0.89, 0.0, 0.09, 1.0])
    assert sprites.binned(values).tolist() == [0, 0, 1, 10, 10, 19]
    assert sprites.binned(np.full(3, 7.0)).tolist() == [0, 0, 0]


def test_the_gap_is_1_for_the_factors_themselves_and_0_for_copies():
    factors = sprites.load()[2]
    truth = torch.from_numpy(factors).float()
    assert sprites.gap(sprites.information(truth, factors)) == pytest.approx(1)
    doubled = torch.cat([truth, truth], dim=1)  # two latents know each factor
    assert sprites.gap(sprites.information(doubled, factors)) == pytest.approx(0)
    assert sprites.gap(sprites.information(torch.randn(1200, 5), factors)) < 0.05
    assert sprites.gap(sprites.information(torch.zeros(1200, 5), factors)) == pytest.approx(0)


def test_the_data_readme_states_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    content = (HERE / "data" / "digits.npz").read_bytes()
    assert hashlib.sha256(content).hexdigest() in said and f"{len(content):,} bytes" in said
