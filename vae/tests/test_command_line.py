"""The verbs of this folder; what all folders share is in harness.py."""

import json

import pytest
import torch
from PIL import Image

import main


def test_samples_are_printed_and_nothing_else(command, trained):
    out = trained("run")
    outcome = command("--sample", "--weights", out, "--num-samples", 3)
    assert outcome.code == 0 and set(outcome.out) <= set(main.SHADES + "\n")
    assert len(outcome.out.splitlines()) == 8  # three pictures of 8 rows side by side
    again = command("--sample", "--weights", out, "--num-samples", 3)
    assert outcome.out == again.out


def test_a_seed_chooses_the_samples(command):
    """Of the shipped network; one of two steps decodes every z alike."""
    words = ["--sample", "--weights", main.HERE / "pretrained", "--num-samples", 3, "--seed"]
    first, second, again = (command(*words, seed).out for seed in (0, 1, 0))
    assert first == again != second


def test_samples_as_a_picture_never_overwrite(command, trained, tmp_path):
    out, file = trained("run"), tmp_path / "new.png"
    words = ["--sample", "--weights", out, "--num-samples", 10, "--picture", file]
    assert command(*words).code == 0
    with Image.open(file) as picture:
        assert picture.size[0] > 300
    before = file.read_bytes()
    assert "name a new file" in command(*words).complaint and file.read_bytes() == before
    words[-1] = tmp_path / "new.jpg"
    assert "ends in .png" in command(*words).complaint


@pytest.mark.parametrize("n", [0, -1, 10**9])
def test_numbers_of_samples_that_cannot_be(command, trained, n):
    said = command("--sample", "--weights", trained("run"), f"--num-samples={n}").complaint
    assert "--num-samples must be" in said


def test_samples_of_a_codebook_are_refused(command, trained):
    out = trained("run", "--net", "conv", "--n-code", 4)
    assert "has a codebook" in command("--sample", "--weights", out).complaint
    outcome = command("--eval", "--weights", out)
    line = json.loads(outcome.out.splitlines()[-1])
    assert outcome.code == 0 and 1 <= line["perplexity"] <= 4 and "nll" not in line


def test_eval_says_it_in_nats_and_json(command, trained):
    out = trained("run")
    outcome = command("--eval", "--weights", out, "--importance", 7)
    line = json.loads(outcome.out.splitlines()[-1])
    assert line["importance"] == 7 and line["pictures"] == 9
    assert f"{line['nll']:.2f} nats" in outcome.out.splitlines()[0]


def test_text_pictures_by_hand():
    """White, half and black pixels, each two letters wide."""
    picture = torch.tensor([1.0, 0.5, 0.0]).view(1, 1, 1, 3)
    assert main.as_text(picture) == "██▒▒"
    wide = main.as_text(torch.ones(3, 3, 60, 60))
    assert max(map(len, wide.splitlines())) <= main.COLUMNS
    assert main.as_text(torch.ones(2, 1, 1, 1)) == "██  ██"


def test_a_run_ends_with_a_verdict_and_pictures(command, small_data, tmp_path, monkeypatch):
    """The real pictures this time."""
    import figures

    monkeypatch.setattr(
        main, "leave_pictures",
        lambda loaded, dataset: figures.of_run(loaded, dataset, loaded.path / "figures"),
    )  # fmt: skip
    from small import FLAGS

    outcome = command("--train", *FLAGS, "--data", small_data, "--out", tmp_path / "run")
    assert outcome.code == 0 and "done: " in outcome.err
    for name in ("grid.png", "curve.png"):
        with Image.open(tmp_path / "run" / "figures" / name) as picture:
            assert 600 < picture.width < 900


def test_codebook_and_colour_runs_leave_pictures_too(command, tmp_path):
    import numpy as np

    import checkpoint
    import figures

    x = np.random.default_rng(0).integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "colour.npz", x=x, y=np.zeros(30, int))
    words = ["--train", "--data", tmp_path / "colour.npz", "--steps", 2, "--width", 4]
    words += ["--net", "conv", "--device", "cpu", "--dtype", "float32", "--importance", 2]
    for more in (["--n-code", 4], ["--likelihood", "logistic"]):
        out = tmp_path / str(more[1])
        assert command(*words, "--out", out, *more).code == 0
        loaded = checkpoint.load(out)
        assert figures.grid(loaded, loaded.dataset(), tmp_path / "grid.png").exists()


def test_selfcheck_knows_a_device_that_lies(monkeypatch):
    import selfcheck
    from options import UserError

    monkeypatch.setattr(selfcheck, "checks", lambda device: iter([("forward", 0.5, 1e-4)]))
    with pytest.raises(UserError, match="computes wrong numbers"):
        selfcheck.main(main.parser().parse_args(["--selfcheck", "--device", "cpu"]))
