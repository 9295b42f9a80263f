"""Every number that the README says was measured, and what it promises.

Snippets, the file table, links and commands are checked at the root of the repo.
"""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model import SIDES

import checkpoint
import figures
import results
import sources
import train
from model import PRESETS, build
from results import spread
from train import TrainConfig, forward_flops

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def test_the_table_of_sizes_is_right():
    """Parameters with ten classes, and multiply-adds in millions, of every preset."""
    rows = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d.]+) million \|", README, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(PRESETS)
    for name, n_parameter, millions in rows:
        sizes = replace(PRESETS[name], n_class=0 if name == "toy" else 10, **SIDES[name])
        network = build(sizes)
        assert sum(p.numel() for p in network.parameters()) == int(n_parameter.replace(",", ""))
        assert forward_flops(network, sizes) / 2e6 == pytest.approx(float(millions), abs=0.06)


def log(split: str, folder: str = "pretrained") -> list[dict]:
    lines = (HERE / folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == split]


def measured() -> list[str]:
    """Every number of the results section as it should read."""
    seeds, toy = RESULTS["seeds"], RESULTS["toy"]
    texts = [
        f"| read as their label | {spread([x['accuracy'] for x in seeds], 100)} % |",
        f"| copies of training pictures | {spread([x['memorised'] for x in seeds], 100)} %, "
        f"of real unseen ones {spread([x['memorised_real'] for x in seeds], 100)} % |",
        f"| Fréchet distance | {spread([x['frechet'] for x in seeds], 1, 2)}, "
        f"of real ones {spread([x['frechet_real'] for x in seeds], 1, 2)} |",
        f"| loss of the test part | {spread([x['loss'] for x in seeds], 1, 4)} |",
        f"| classifier on real test digits | "
        f"{spread([x['classifier_accuracy'] for x in seeds], 100)} % |",
        f"| spiral: samples on the curve | {spread([x['near'] for x in toy], 100)} %, "
        f"of real points {spread([x['near_real'] for x in toy], 100)} % |",
        f"| spiral: loss of the test part | {spread([x['loss'] for x in toy], 1, 4)} |",
        f"mean ± standard deviation, seeds: {len(seeds)} |",
    ]
    for line in log("valid"):
        if line["step"] in (100, TrainConfig().steps):
            texts.append(f"step {line['step']:5d}  valid {train.describe(line)}")
    for line in log("train"):
        if line["step"] in (1, 100):
            texts.append(f"step {line['step']:5d}  loss {line['loss']:.4f}  lr {line['lr']:.1e}")
    texts.append(f"test part  {train.describe(log('test')[0])}")
    for line in RESULTS["guidance"]:
        texts.append(f"| {line['guidance']:g} | {100 * line['accuracy']:.1f} % | "
                     f"{line['frechet']:.2f} | {line['distance']:.2f} |")  # fmt: skip
    bits = RESULTS["eval"]
    texts.append(f"{bits['bits_per_dim']:.2f} bits by the bound")
    texts.append(f"{bits['flow_bits_per_dim']:.2f} by the flow")
    texts += [f"{run['seconds']:.0f} s in {run['dtype']}" for run in RESULTS.get("timed", [])]
    return texts + measured_by_the_bench()


def measured_by_the_bench() -> list[str]:
    bench = RESULTS.get("bench", {}).get("float32")
    if not bench:  # then nothing of it may be quoted
        assert "as fast as that of diffusers" not in README
        return []
    names = ("train_vs_diffusers", "network_vs_diffusers", "sample_vs_diffusers")
    texts = [f"{bench[name]:.2f} ×" for name in names]
    by_looks = {}
    for row in bench["quality"]:
        by_looks.setdefault(row["sampler"], []).append(f"{100 * row['accuracy']:.1f} %")
    for looks in (10, 50):
        found = {
            row["sampler"]: row["frechet"] for row in bench["quality"] if row["looks"] == looks
        }
        texts += [f"{found['heun']:.1f}", f"{found['ddpm']:.1f}", f"{found['ddim']:.1f}"]
    return texts + [f"| {name} | {' | '.join(row)} |" for name, row in by_looks.items()]


def test_numbers_of_the_prose_are_those_of_the_code():
    """First losses, training pictures, and how much longer the larger presets take."""
    source = sources.load("digits")
    processes = (TrainConfig(schedule=name).process for name in ("cosine", "flow"))
    zero, flow = (train.loss_of_zero(source, process) for process in processes)
    assert f"expect     loss {zero:.3f} for answering 0" in README
    assert f"(about {flow:.1f} at first)" in README
    assert f"its {len(source.train):,} training pictures" in README
    work = {}
    for name in ("digits", "mnist", "shapes"):
        sizes = replace(PRESETS[name], n_class=10, **SIDES[name])
        config = TrainConfig(**train.RECIPES.get(name, {}))
        work[name] = forward_flops(build(sizes), sizes) * config.batch_size * config.steps
    times = {name: round(work[name] / work["digits"]) for name in work}
    assert f"`mnist` has {times['mnist']} times" in README
    assert f"`shapes` {times['shapes']} times" in README


def test_memory_of_the_default_is_as_said():
    """Bytes that autograd keeps of a forward pass of the default batch, weights left out."""
    sizes, kept = train.described_sizes(), {}
    network, rows = build(sizes), torch.zeros(TrainConfig().batch_size, *sizes.shape)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        answer = network(rows, torch.zeros(len(rows)))
    said = int(re.search(r"about (\d+) MB for the default", README)[1])
    assert answer.requires_grad and sum(kept.values()) / 1e6 == pytest.approx(said, rel=0.1)


def test_every_measured_number_is_the_measured_one():
    assert [text for text in measured() if text not in README] == []


def test_what_must_be_reached_is_reached():
    """The promises of the README, by the numbers of the runs."""
    for run in RESULTS["seeds"]:
        assert run["accuracy"] >= 0.95 and run["classifier_accuracy"] >= 0.97
        assert run["memorised"] <= 0.05
        assert run["dtype"] == "float32" and run["steps"] == TrainConfig().steps
    assert all(run["seconds"] <= 180 for run in RESULTS.get("timed", []))
    assert all(run["near"] >= 0.9 for run in RESULTS["toy"])
    assert len({run["seed"] for run in RESULTS["seeds"]}) == len(RESULTS["seeds"]) >= 3


def test_shipped_networks_are_what_the_logs_beside_them_say():
    for folder in ("pretrained", "pretrained/toy"):
        loaded = checkpoint.load(HERE / folder)
        source = loaded.rows()
        loss = train.loss_of(loaded.model, loaded.process, source, source.test, train.torch.float32)
        assert loss == pytest.approx(log("test", folder)[0]["loss"], rel=0.01)


def test_the_shipped_spiral_lies_on_its_floor():
    """At every time the loss is the exact denoiser's on the same points and noise, and hardly more.

    It may be less by chance: 2,000 points each.
    """
    loaded = checkpoint.load(HERE / "pretrained" / "toy")
    source = loaded.rows()
    times = figures.curve_times(loaded, 12)
    loss, least = figures.loss_by_time(loaded, source.test, times, source.mixture)
    assert (loss > 0.995 * least).all() and (loss < 1.05 * least).all()
    assert loss.mean() < 1.02 * least.mean()


def test_the_shipped_config_is_the_default():
    config = json.loads((HERE / "pretrained" / "config.json").read_text(encoding="utf-8"))
    changed = {"out", "dtype"}
    default = {k: v for k, v in vars(TrainConfig()).items() if k not in changed}
    assert {k: v for k, v in config["train"].items() if k not in changed} == default
    assert "out" not in config["train"]
    assert config["model"] == vars(train.described_sizes())


def test_the_data_readme_states_checksums():
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("shapes10.npz", "digits.npz"):
        assert hashlib.sha256((HERE / "data" / name).read_bytes()).hexdigest() in text


def test_spread_by_hand():
    """1 and 3: mean 2, standard deviation √2."""
    assert results.spread([0.01, 0.03], 100) == "2.0 ± 1.4"
