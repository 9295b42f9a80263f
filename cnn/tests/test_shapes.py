"""shapes-10: the Bayes error is what it is said to be, and the pictures are the committed ones."""

import hashlib
import math
import sys

import make_shapes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import shapes
from conftest import FOLDER
from options import UserError


@pytest.fixture(scope="session")
def oracle() -> shapes.Oracle:
    return shapes.Oracle()


@pytest.fixture(scope="session")
def committed() -> dict[str, np.ndarray]:
    """The tables of scenes."""
    with np.load(shapes.FILE, allow_pickle=False) as file:
        return dict(file)


def halves(scenes: np.ndarray) -> np.ndarray:
    """What a scene shows: (N, 2), in order."""
    return np.sort(np.stack([scenes["left"], scenes["right"]], axis=1), axis=1)


# the Bayes error


def test_no_silhouette_shows_two_things(oracle):
    """All 10 · 10 pairs at 24 angles and 6 sizes: the pair is a function of the silhouette."""
    assert all(len(pairs) == 1 for pairs in oracle.shows.values())
    assert {next(iter(pairs)) for pairs in oracle.shows.values()} == {
        (i, j) for i in range(10) for j in range(i, 10)
    }


def test_the_oracle_reads_every_picture_right(oracle, committed):
    for scenes in committed.values():
        assert (oracle.pairs(shapes.draw(scenes)) == halves(scenes)).all()


def test_the_oracle_reaches_exactly_the_ceiling(oracle):
    """Not by knowing the labels: it sees the pixels alone."""
    _, *parts = shapes.load()
    for pictures, labels in parts:
        right = (oracle.classify(pictures) == labels).mean()
        assert right == 1 - shapes.AMBIGUITY / 2 == 0.95


@pytest.mark.parametrize("ambiguity", [0.0, 0.3, 1.0])
def test_the_ceiling_is_tunable(ambiguity, oracle):
    scenes = make_shapes.sample(400, ambiguity, seed=5)
    assert (scenes["left"] != scenes["right"]).mean() == ambiguity
    right = oracle.classify(shapes.draw(scenes)) == scenes["label"]
    assert right.mean() == 1 - ambiguity / 2


def test_the_script_writes_a_set_of_any_ambiguity(oracle, tmp_path, monkeypatch):
    monkeypatch.setattr(make_shapes, "N_TRAIN", 60)
    monkeypatch.setattr(make_shapes, "N_TEST", 20)
    file = tmp_path / "harder.npz"
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", "0.3", str(file)])
    make_shapes.main()
    found = data.load(str(file))
    assert found.classes == shapes.CLASSES and found.ceiling is None
    assert [len(part) for part in (found.train, found.valid, found.test)] == [54, 6, 20]
    right = oracle.classify(found.test.images.numpy()) == found.test.labels.numpy()
    assert right.mean() == 0.85


@pytest.mark.parametrize("words", [["x", "a.npz"], ["0.3"], ["1.5", "a.npz"], ["nan", "a.npz"]])
def test_the_script_complains(words, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", *words])
    with pytest.raises(UserError, match="from 0 to 1"):
        make_shapes.main()
    monkeypatch.setattr(make_shapes, "N_TRAIN", 6)
    monkeypatch.setattr(sys, "argv", ["make_shapes.py", "0.3", str(tmp_path / "no" / "a.npz")])
    with pytest.raises(UserError, match="a.npz: No such file"):
        make_shapes.main()


def test_the_coin_is_fair_and_independent_of_what_is_seen():
    """So nobody can guess better: of each angle, size and shape, half go to either side."""
    scenes = make_shapes.sample(20_000, 1.0, seed=6)
    earlier = scenes["label"] == halves(scenes)[:, 0]
    assert earlier.mean() == 0.5
    for field in ("angle", "size", "left", "right"):
        for value in np.unique(scenes[field]):
            those = earlier[scenes[field] == value]
            assert abs(those.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(len(those))
    assert ((scenes["label"] == scenes["left"]) | (scenes["label"] == scenes["right"])).all()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40))
def test_shape_and_background_are_on_two_sides_of_luma_128(seed, n):
    """The margin: flat colours are at most 96 or at least 159 but for rounding, the noise 16."""
    scenes = make_shapes.sample(n, 0.5, seed)
    masks = shapes.shape_masks(scenes)
    brightness = shapes.luma(shapes.draw(scenes), axis=1) / 8
    light_shape = shapes.luma(scenes["colours"][:, 1, 0], axis=-1) >= 8 * 128
    light = np.where(light_shape[:, None, None], masks, ~masks)
    assert brightness[light].min() > 128 + 13
    assert brightness[~light].max() < 128 - 13
    border = np.ones((shapes.S, shapes.S), dtype=bool)
    border[1:-1, 1:-1] = False
    assert not masks[:, border].any() and masks.any((1, 2)).all()


def test_noise_is_bounded_and_even():
    noise = shapes.noise(np.arange(50, dtype=np.uint32))
    assert (noise.min(), noise.max()) == (-shapes.NOISE, shapes.NOISE - 1)
    counts = np.bincount(noise.flatten() + shapes.NOISE)
    assert abs(counts / counts.mean() - 1).max() < 0.05
    across = np.corrcoef(noise.reshape(50, -1))
    assert abs(across - np.eye(50)).max() < 0.1


# the pictures


def test_the_file_is_what_the_script_writes(committed):
    for name, scenes in make_shapes.parts(shapes.AMBIGUITY).items():
        assert (scenes == committed[name]).all()


def test_the_pictures_are_the_same_on_every_machine():
    """The sum was taken on Linux with numpy 2.4."""
    _, *parts = shapes.load()
    digest = hashlib.sha256(b"".join(pictures.tobytes() for pictures, _ in parts)).hexdigest()
    assert digest == DIGEST
    assert digest in (FOLDER / "data" / "README.md").read_text(encoding="utf-8")


DIGEST = "4d0ddc2e81bb6c6b8b595f871052b62300add40e5f5e5cbdd65243a8351b1a7b"


def test_all_classes_angles_sizes_and_places_occur(committed):
    scenes = committed["train"]
    counts = np.bincount(scenes["label"])
    assert len(counts) == 10 and abs(counts / counts.mean() - 1).max() < 0.1
    assert len(np.unique(scenes["angle"])) == 24 and len(np.unique(scenes["size"])) == 6
    room = shapes.S // 2 - 1 - max(shapes.SIZES)
    assert (scenes["place"].min(0) <= -room).all() and (scenes["place"].max(0) >= room - 1).all()


def test_training_and_test_scenes_are_different(committed):
    seen = {scene.tobytes() for scene in committed["train"]}
    assert len(seen) == len(committed["train"])
    assert not seen & {scene.tobytes() for scene in committed["test"]}


def test_shapes_are_mirror_images_of_themselves(oracle):
    """So a network may train on flipped pictures. Halves change places, which changes no label."""
    scenes = make_shapes.sample(300, 0.5, seed=7)
    mirrored = shapes.draw(scenes)[:, :, :, ::-1]
    found = [oracle.shows.get(oracle.name(mask)) for mask in masks_of(mirrored)]
    known = [
        (pairs, pair) for pairs, pair in zip(found, halves(scenes).tolist(), strict=True) if pairs
    ]
    assert len(known) > 30 and all(pairs == {tuple(pair)} for pairs, pair in known)


def masks_of(pictures: np.ndarray) -> np.ndarray:
    light = shapes.luma(pictures, axis=1) >= 8 * 128
    return light != light[:, :1, :1]


def test_upright_shapes_by_points():
    """A few points of each shape that can be checked on paper, in hundredths of the radius."""
    points = {
        "circle": ([(0, 0), (87, 0), (60, 60)], [(89, 0), (66, 66)]),
        "ring": ([(0, 60), (-94, 0)], [(0, 0), (0, 53), (0, 96)]),
        "moon": ([(0, -50), (-85, 20)], [(0, 0), (0, 90)]),
        "square": ([(69, 69), (-69, -69)], [(71, 0), (0, -71)]),
        "triangle": ([(0, 99), (80, -49), (0, 0)], [(40, 50), (0, -51)]),
        "star": (
            [(0, 99), (90, 31), (-90, 31), (55, -75), (0, -40)],
            [(60, 60), (0, -45), (70, -10)],
        ),
        "cross": ([(0, 94), (94, 29), (-94, -29), (29, -94)], [(31, 31), (-40, 40)]),
        "heart": ([(0, 40), (45, 80), (0, -94)], [(0, 50), (60, -40)]),
        "arrow": ([(0, 97), (75, 11), (29, -91)], [(31, 0), (50, 50)]),
        "hourglass": ([(0, 0), (55, 79), (13, 0), (-55, -79)], [(20, 0), (59, 60)]),
    }
    assert tuple(points) == shapes.CLASSES
    for name, sides in points.items():
        for expected, side in zip((True, False), sides, strict=True):
            for u, v in side:
                assert shapes.inside(name, np.array(10 * u), np.array(10 * v)) == expected, (
                    name,
                    u,
                    v,
                )
                assert shapes.inside(name, np.array(-10 * u), np.array(10 * v)) == expected


def test_the_set_is_not_linear():
    """A linear classifier stays far below the ceiling: least squares on the pixels."""
    _, (x, y), (x_test, y_test) = shapes.load()
    x, x_test = (torch.from_numpy(p).flatten(1).float() / 255 - 0.5 for p in (x, x_test))
    gram = x.T @ x + 100 * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, x.T @ torch.eye(10)[torch.from_numpy(y).long()])
    right = ((x_test @ weights).argmax(1) == torch.from_numpy(y_test)).float().mean()
    assert right < 0.25
