"""The pictures: that they are drawn, from what they say, and large enough to read."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import experiments
import figures
import sprites
from model import PRESETS, VaeConfig, build, with_data

HERE = Path(__file__).resolve().parent.parent


def test_a_mosaic_by_hand():
    """Three pictures of 1 × 1 in rows of two: white, black; grey, and an empty white place."""
    pictures = torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1, 1)
    found = figures.mosaic(pictures, 2)
    assert found.shape == (3, 3, 3) and found.dtype == np.uint8
    assert found[0, :, 0].tolist() == [255, 128, 0] and found[2, :, 0].tolist() == [128, 128, 255]


def test_colour_stays_in_its_place():
    red = torch.zeros(1, 3, 2, 2)
    red[0, 0] = 1
    assert figures.mosaic(red, 1)[0, 0].tolist() == [255, 0, 0]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The shipped network, and a place for pictures that is not assets/."""
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    return checkpoint.load(HERE / "pretrained")


def readable(file: Path) -> bool:
    """About 700 pixels wide, and not all one colour."""
    with Image.open(file) as picture:
        return 650 < picture.width < 800 and len(set(picture.convert("L").tobytes())) > 5


def test_the_proof_is_drawn_from_the_results(shipped):
    results = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
    assert readable(figures.proof(results["ppca"]))


def test_a_walk_begins_and_ends_at_its_pictures(shipped):
    images = shipped.dataset().test.images
    x = next(data.fixed(images, "bernoulli"))[:2]
    model = shipped.model.eval()
    with torch.no_grad():
        pictures = figures.walk(model, x, 5)
        ends = model.picture(model.encode(x)[0])
    torch.testing.assert_close(pictures[[0, -1]], ends)


def untrained(name: str, shape: tuple) -> checkpoint.Loaded:
    sizes = with_data(PRESETS[name], shape)
    return checkpoint.Loaded(HERE / "pretrained", build(sizes), sizes, "digits")


def test_inside_shows_map_walk_latents_and_codes(shipped, monkeypatch, tmp_path):
    """With networks that were not trained: only that it can be drawn."""
    flat, codes = untrained("map", (1, 8, 8)), untrained("codes", (1, 8, 8))
    found = {"map-0": flat, "codes-0": codes}
    monkeypatch.setattr(figures, "RUNS", tmp_path)
    assert figures.inside(shipped, {}) is None  # the gallery is not there yet
    for name in found:
        (tmp_path / "gallery" / name).mkdir(parents=True)
        (tmp_path / "gallery" / name / "model.safetensors").touch()
    monkeypatch.setattr(figures.checkpoint, "load", lambda folder: found[folder.name])
    assert readable(figures.inside(shipped, {}))


def test_sprites_show_traversals_and_tables(shipped, monkeypatch, tmp_path):
    loaded = untrained("sprites", (1, sprites.S, sprites.S))
    monkeypatch.setattr(figures, "RUNS", tmp_path)
    assert figures.of_sprites({}) is None
    (tmp_path / "sprites" / "beta4-0").mkdir(parents=True)
    (tmp_path / "sprites" / "beta4-0" / "model.safetensors").touch()
    monkeypatch.setattr(figures.checkpoint, "load", lambda folder: loaded)
    table = [experiments.factors_found(copy.copy(loaded))]
    assert readable(figures.of_sprites({"sprites": {"beta1": table, "beta4": table}}))


def test_spread_is_mean_and_standard_deviation():
    assert experiments.spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert experiments.spread([1.25]) == "1.25"


def test_variants_are_networks_that_can_be_built():
    for variants in experiments.VARIANTS.values():
        for _, sizes in variants.values():
            assert isinstance(sizes, VaeConfig)


def test_a_finished_training_is_not_repeated(monkeypatch, tmp_path):
    import train

    calls = []

    def training(config, sizes):
        calls.append(config.seed)
        Path(config.out).mkdir(parents=True)
        line = {"step": 1, "split": "test", "loss": 1.0}
        (Path(config.out) / "log.jsonl").write_text(json.dumps(line), encoding="utf-8")
        return [line]

    monkeypatch.setattr(experiments, "RUNS", tmp_path)
    monkeypatch.setattr(train, "train", training)
    monkeypatch.setattr(experiments.checkpoint, "load", lambda folder: folder)
    for _ in range(2):
        found = experiments.outcomes("seeds", train.TrainConfig())
    assert calls == [0, 1, 2] and [len(scores) for scores in found.values()] == [3]
