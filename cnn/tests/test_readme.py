"""Every number that the README says was measured, and what it promises.

Snippets, the file table, links and commands are checked at the root of the repo.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import math
import re
import statistics
from pathlib import Path

import pytest

import checkpoint
import data
import experiments
import main
import report
import shapes
import train
from augment import predict
from model import PRESETS, build, macs

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def test_the_table_of_networks_is_right():
    """Parameters, and multiply-adds in millions, of every network that it names."""
    rows = re.findall(r"^\| ([a-z0-9-]+) \| ([\d,]+) \| ([\d.]+) million \|", README, re.MULTILINE)
    assert len(rows) >= 6
    for name, n_parameter, millions in rows:
        network = build(PRESETS[name])
        assert sum(p.numel() for p in network.parameters()) == int(n_parameter.replace(",", ""))
        assert macs(network, PRESETS[name]) / 1e6 == pytest.approx(float(millions), abs=0.06)
    large = dataclasses.replace(PRESETS["resnet18-imagenet"], image_height=224, image_width=224)
    assert f"{macs(build(large), large) / 1e6:,.0f} million" in README


def shown(data: str, key: str = "test") -> str:
    return experiments.spread([run[key] for run in RESULTS["seeds"][data]])


def log(split: str) -> list[dict]:
    lines = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def measured() -> list[str]:
    """Every number of the results section as it should read, from assets and pretrained."""
    texts = [f"| {shown(data)} % |" for data in ("shapes-10", "mnist", "digits.npz")]
    for name, runs in RESULTS["residual"].items():
        train_, test = (experiments.spread([r[key] for r in runs]) for key in ("train", "test"))
        loss = experiments.spread([r["train_loss"] for r in runs], 1, 4)
        texts.append(f"| {name} | {loss} | {train_} % | {test} % |")
    for line in log("valid"):
        if line["step"] in (50, 100, 400):
            texts.append(f"step {line['step']:5d}  valid {report.describe(line)}")
    for line in log("train"):
        if line["step"] in (1, 100):
            texts.append(
                f"step {line['step']:5d}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  "
                f"{line['pictures_per_second']:,} pictures/s"
            )
    texts += [f"{n:.0f} s in {name}" for name, n in RESULTS["default_run"].items()]
    texts.append(f"on track: {report.percent(log('test')[0]['accuracy'])} of the test part")
    texts.append(f"{100 * RESULTS['akamaster']['accuracy']:.1f} % of 1,000 CIFAR-10 pictures")
    int8 = RESULTS["int8"]
    texts.append(
        f"{100 * int8['accuracy']:.2f} %, and {100 * int8['int8_accuracy']:.2f} % in eight bits"
    )
    texts.append(f"{int8['bytes'] / int8['int8_bytes']:.1f} times smaller")
    changes = RESULTS["changes"]
    for name in ("resnet20 --zero-init", "--flip on"):
        texts.append(f"{100 * changes[name]['accuracy']:.1f} % of the test part")
    learned = statistics.mean(run["train"] for run in RESULTS["seeds"]["shapes-10"])
    early = statistics.mean(run["train"] for run in RESULTS["ablation"]["the recipe"])
    texts += [f"(the default) of {100 * learned:.1f} %", f"{100 * early:.1f} % of the training"]
    texts.append(f"{RESULTS['memory']['default_run']:.1f} GB of memory")
    return texts + measured_by_the_bench()


def measured_by_the_bench() -> list[str]:
    """The numbers of the table of speeds; both ratios of a step, in bfloat16 and in float32."""
    bench = RESULTS["bench"]
    ratios = ("train_vs_torch", "train_float32_vs_torch", "scratch_conv_vs_torch")
    fractions = ("train_gemm_fraction", "scratch_conv_gemm_fraction")
    texts = [f"{bench[key]:.2f} × as fast" for key in ratios]
    return texts + [f"{100 * bench[key]:.0f} %" for key in fractions]


def test_every_measured_number_is_the_measured_one():
    missing = [text for text in measured() if text not in README]
    assert not missing


def test_what_must_be_reached_is_reached():
    """The promises of the README, by the numbers of the runs."""
    assert RESULTS["changes"]["plain20 --zero-init"]["loss"] == pytest.approx(
        math.log(10), abs=0.02
    )
    means = {
        data: statistics.mean(run["test"] for run in runs)
        for data, runs in RESULTS["seeds"].items()
    }
    assert means["shapes-10"] >= 0.95 - report.ON_TRACK
    assert means["mnist"] >= 0.993
    assert means["digits.npz"] >= 0.985
    assert RESULTS["akamaster"]["accuracy"] >= 0.995
    assert [len(RESULTS["seeds"][data]) for data in ("shapes-10", "digits.npz")] == [3, 3]
    assert RESULTS["bench"]["train_vs_torch"] >= 1
    assert max(RESULTS["default_run"].values()) <= 180  # seconds, float32 too


def test_depth_hurts_plain_networks_and_not_residual_ones():
    """§4.2 of arXiv:1512.03385, in every seed: what the README's table claims."""
    for key in ("train", "test"):
        by_name = {name: [run[key] for run in runs] for name, runs in RESULTS["residual"].items()}
        assert all(len(values) == 3 for values in by_name.values())
        assert max(by_name["plain56"]) < min(by_name["plain20"]) - 0.1
        assert min(by_name["resnet56"]) > max(by_name["plain56"]) + 0.1
        assert min(by_name["resnet20"]) > 0.98


def test_the_shipped_network_is_what_the_log_beside_it_says():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.do_eval(main.parser().parse_args(["--eval", "--weights", str(HERE / "pretrained")]))
    score = json.loads(out.getvalue().splitlines()[-1])
    assert score["accuracy"] == pytest.approx(log("test")[0]["accuracy"], abs=0.003)
    assert score["accuracy"] >= score["ceiling"] - report.ON_TRACK


def test_most_mistakes_of_the_picture_are_chimeras():
    """The first six in the test part: what the README says under its first picture."""
    loaded, test = checkpoint.load(HERE / "pretrained"), data.load().test[:150]
    p = predict(loaded.model, test.images, loaded.mean, loaded.std, loaded.views)
    wrong = (p.argmax(1) != test.labels).nonzero()[:6, 0]
    pairs = shapes.Oracle().pairs(test.images[wrong].numpy())
    assert len(pairs) == 6 and (pairs[:, 0] != pairs[:, 1]).sum() >= 4


def test_the_shipped_config_is_the_default():
    config = json.loads((HERE / "pretrained" / "config.json").read_text(encoding="utf-8"))
    changed = {"out", "dtype"}
    default = {k: v for k, v in vars(train.TrainConfig()).items() if k not in changed}
    assert {k: v for k, v in config["train"].items() if k not in changed} == default
    assert "out" not in config["train"] and config["model"] == vars(PRESETS["fast"])


def test_the_data_readme_states_checksums():
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("shapes10.npz", "digits.npz"):
        assert hashlib.sha256((HERE / "data" / name).read_bytes()).hexdigest() in text
