"""What this folder's verbs do, beyond what all folders are tested for alike."""

import json

import numpy as np
import pytest
import small
import torch
from PIL import Image

import checkpoint
import classifier
import figures
import main
import sources

JUDGE = main.judge_and_draw  # before `hurry` takes it away


@pytest.fixture
def toy(command, tmp_path):
    """A few steps on the moons."""
    words = "--train --size toy --data moons --steps 3 --batch-size 8 --d-model 16 --device cpu"
    command(*words.split(), "--dtype", "float32", "--out", tmp_path / "runs" / "toy")
    return tmp_path / "runs" / "toy"


def test_samples_are_written_where_the_line_says(trained, command):
    run = trained("pictures")
    for flags in ([], ["--label", "1"], ["--guidance", "0"], ["--sampler", "ddpm"],
                  ["--sampler", "ddim", "--eta", "1"], ["--sampler", "heun"]):  # fmt: skip
        found = command(*small.SAMPLE, "--weights", run, *flags)
        file = found.out.strip()
        assert found.code == 0 and file.endswith("samples.png")
        with Image.open(file) as picture:
            assert picture.mode == "L" and picture.width >= 18


def test_film_of_pictures_and_of_points(trained, toy, command):
    for run in (trained("pictures"), toy):
        found = command(*small.SAMPLE, "--gif", "--weights", run)
        png, gif = found.out.split()
        with Image.open(gif) as film:
            assert film.format == "GIF" and film.n_frames >= 3
        with Image.open(png) as picture:
            assert picture.size > (20, 20)


def test_films_show_all_batches_together():
    """Two batches of two rows, three looks each."""
    looks = [(sigma, torch.full((2, 1), float(batch)), None)
             for batch in (1, 2) for sigma in (1.0, 0.5, 0.5)]  # fmt: skip
    found = figures.stages(looks)
    assert [rows.flatten().tolist() for rows in found] == [[1, 1, 2, 2]] * 3


def test_same_seed_same_picture(trained, command):
    run = trained("pictures")
    pictures = []
    for seed in (1, 1, 2):
        file = command(*small.SAMPLE, "--weights", run, "--seed", seed).out.strip()
        with Image.open(file) as picture:
            pictures.append(np.array(picture))
    assert np.array_equal(*pictures[:2]) and not np.array_equal(*pictures[1:])


@pytest.mark.parametrize(("flags", "complaint"), [
    (["--label", "7"], "--label 7: the network's classes are 0, 1, 2"),
    (["--sampler", "flow"], "--sampler flow is for networks trained with --schedule flow"),
    (["--sampler", "euler"], "invalid choice: 'euler'"),
    (["--eta", "0.5"], "--eta is for --sampler ddim"),
    (["--eta", "2"], "eta must be at most 1"),
    (["--sample-steps", "1001"], "knows 1000 noise levels"),
    (["--sample-steps", "0"], "sample_steps must be at least 1"),
    (["--num-samples", "0"], "num_samples must be at least 1"),
    (["--guidance", "nan"], "guidance must be a finite number"),
])  # fmt: skip
def test_sampling_that_cannot_be_is_one_line(trained, command, flags, complaint):
    run = trained("pictures")
    assert complaint in command(*small.SAMPLE, "--weights", run, *flags).complaint


def test_label_of_a_network_without_classes(command, tmp_path):
    words = "--train --size toy --data fish --steps 2 --batch-size 8 --d-model 16 --device cpu"
    command(*words.split(), "--dtype", "float32", "--out", tmp_path / "fish")
    for verb in (["--sample"], ["--export", tmp_path / "x"]):
        line = command(*verb, "--label", "1", "--weights", tmp_path / "fish").complaint
        assert "trained without classes" in line


def test_eval_of_pictures_is_json(trained, command, monkeypatch):
    import measure

    monkeypatch.setattr(classifier, "STEPS", 20)
    monkeypatch.setattr(measure, "bits", lambda *_: {"bits_per_dim": 1.0, "flow_bits_per_dim": 1.0})
    flags = ["--num-samples", "40", "--sample-steps", "2"]
    found = command("--eval", "--weights", trained("pictures"), *flags)
    score = json.loads(found.out.splitlines()[-1])
    wanted = {"accuracy", "frechet", "frechet_real", "classifier_accuracy", "memorised",
              "memorised_real", "distance", "bits_per_dim", "flow_bits_per_dim"}  # fmt: skip
    assert wanted <= score.keys() and found.code == 0


def test_eval_of_points_says_how_many_samples_are_where_data_are(toy, command):
    found = command("--eval", "--weights", toy, "--num-samples", "50", "--sample-steps", "3")
    score = json.loads(found.out.splitlines()[-1])
    assert score["near"] < 0.9 < 0.99 < score["near_real"] and "accuracy" not in score
    assert {"bits_per_dim", "flow_bits_per_dim"} <= score.keys()


def test_last_line_of_a_run_is_the_test_part(toy):
    lines = [json.loads(x) for x in (toy / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[-1]["split"] == "test" and lines[-1]["loss"] > 0
    assert {f"loss_{i}" for i in range(4)} <= lines[0].keys()


@pytest.mark.parametrize("kind", ["pictures", "points"])
def test_end_of_a_run_judges_samples_and_draws(trained, toy, monkeypatch, kind):
    """What `hurry` leaves out of the other tests."""
    monkeypatch.setattr(main, "JUDGED", 30)
    monkeypatch.setattr(classifier, "STEPS", 10)
    loaded = checkpoint.load(trained("pictures") if kind == "pictures" else toy)
    found = JUDGE(loaded, loaded.rows())
    assert {"memorised", "distance"} <= found.keys()
    assert ("accuracy" in found) == (kind == "pictures") == ("near" not in found)
    wanted = {"samples.png", "loss.png"} | ({"strip.png"} if kind == "pictures" else set())
    assert {file.name for file in (loaded.path / "figures").iterdir()} == wanted


def test_run_goes_on_from_weights(trained, command, words, tmp_path):
    first = trained("pictures")
    second = command(*words, "--out", tmp_path / "b", "--weights", first, "--lr", "1e-9")
    assert second.code == 0
    ours, theirs = (checkpoint.load(path).model.state_dict() for path in (first, tmp_path / "b"))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-6)


def test_weights_of_another_network_are_refused(trained, command, words, tmp_path):
    line = command(*words, "--widths", "16,16", "--out", tmp_path / "b", "--weights",
                   trained("pictures")).only_line  # fmt: skip
    assert "--widths 16,16: the network in --weights" in line


def test_exported_folder_samples_here_too(trained, command, tmp_path):
    run = trained("pictures")
    assert command("--export", tmp_path / "out", "--label", "2", "--weights", run).code == 0
    found = command(*small.SAMPLE, "--weights", tmp_path / "out")
    assert found.code == 0 and found.out.strip().endswith("samples.png")


def test_odd_sizes_work_where_the_network_does_not_halve(command, tmp_path):
    """Nine pixels a side: with one resolution; the message of `REFUSED` says so."""
    x, y = small.bars(60)
    np.savez(tmp_path / "odd.npz", x=np.pad(x, ((0, 0), (0, 1), (0, 3))), y=y)
    words = ["--train", *small.FLAGS, "--data", tmp_path / "odd.npz", "--out", tmp_path / "odd"]
    line = command(*words).only_line
    assert "pictures of 9 × 11" in line and "multiples of 2" in line
    assert command(*words, "--widths", "8", "--attention", "0").code == 0
    assert checkpoint.load(tmp_path / "odd").sizes.shape == (1, 9, 11)


def test_resume_takes_the_data_from_the_run(trained, command):
    run = trained("pictures")
    assert command("--train", "--resume", "--out", run, "--steps", "3").code == 0
    assert sources.INSIDE[0] == "digits"


def test_selfcheck_finds_nothing_wrong_here(command):
    found = command("--selfcheck", "--device", "cpu")
    lines = found.out.splitlines()
    assert found.code == 0 and len(lines) == 9 and all(x.startswith("ok ") for x in lines[1:])


def test_selfcheck_names_what_is_wrong(command, monkeypatch):
    import selfcheck

    monkeypatch.setattr(selfcheck, "true_noise_error", lambda: 0.1)
    assert "DDIM with the true noise" in command("--selfcheck", "--device", "cpu").complaint


def test_bench_ratios_are_time_of_theirs_over_ours(capsys):
    """Above 1 ours is faster; the names without a number are of the first batch."""
    import bench

    seconds = {"step ours": 1.0, "step diffusers": 2.0, "network ours": 1.0,
               "network diffusers": 1.5, "sample ours": 4.0, "sample diffusers": 2.0}  # fmt: skip
    assert bench.show(seconds, 16) == {
        "train_vs_diffusers": 2.0,
        "network_vs_diffusers": 1.5,
        "sample_vs_diffusers": 0.5,
    }
    assert bench.show(seconds, 96)["train_96_vs_diffusers"] == 2.0
    assert "1.50 ×" in capsys.readouterr().out


def test_bench_compares_the_same_network():
    """Ours and diffusers' with the same weights answer the same."""
    pytest.importorskip("diffusers")
    import bench
    import train
    from model import PRESETS, build

    sizes = train.sizes_for(PRESETS["digits"], sources.load("digits"), True)
    ours = build(sizes).eval()
    theirs = bench.their_unet(sizes, ours).eval()
    x, times, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 10])
    with torch.no_grad():
        found, wanted = ours(x, times, labels), theirs(x, times, labels).sample
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
