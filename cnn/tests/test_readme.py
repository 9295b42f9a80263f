"""What the README says is true: lines, links, snippets, commands and every measured number."""

import contextlib
import hashlib
import io
import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

import experiments
import main
import report
import train

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_file_table_has_every_file_and_its_length():
    rows = dict(
        re.findall(r"^\| \[[^\]]+\]\(([^)]+\.py)\) \| (\d+) \|", README, flags=re.MULTILINE)
    )
    lengths = {
        file.relative_to(HERE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in [*HERE.glob("*.py"), *(HERE / "data").glob("*.py")]
    }
    assert {name: int(n) for name, n in rows.items()} == lengths


def test_the_readme_is_of_a_size_and_begins_with_a_picture_and_a_command():
    lines = README.splitlines()
    assert 120 <= len(lines) <= 220
    assert any("![" in line for line in lines[:5])
    assert any(line.startswith("python main.py --train") for line in lines[:25])


def test_links_and_pictures_exist_and_pictures_are_local():
    links = [x for x in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in x]
    assert links
    for link in links:
        assert (HERE / link).exists() or link.startswith("../"), link
    assert not re.findall(r"!\[[^\]]*\]\(http", README)


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_prints_what_its_comment_says(code, monkeypatch):
    monkeypatch.chdir(HERE)
    lines = code.splitlines()
    expected = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    assert expected
    assert len(lines) - len(expected) <= 8
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    assert out.getvalue().splitlines() == expected


def test_every_command_parses():
    blocks = "\n".join(block for block in README.split("```")[1::2] if block.startswith("\n"))
    inline = re.findall(r"`(python main\.py[^`]*)`", README)
    commands = [line for line in blocks.splitlines() if line.startswith("python main.py")] + inline
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command.split(" && ")[0], comments=True)
        main.parser().parse_args(words[2:])


def test_the_experiments_are_options():
    section = README[README.index("Change this") : README.index("Questions people ask")]
    flags = re.findall(r"`(--[^`]*)`", section)
    assert len(flags) >= 4
    for text in flags:
        main.parser().parse_args(shlex.split(text))


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
        loss = experiments.spread([r["train_loss"] for r in runs], 1)
        texts.append(f"| {name} | {loss} | {train_} % | {test} % |")
    for runs in RESULTS["ablation"].values():
        texts.append(f"| {experiments.spread([r['test'] for r in runs])} % |")
    for line in log("valid"):
        if line["step"] in (100, 400):
            texts.append(f"step {line['step']:5d}  valid {report.percent(line['accuracy'])}")
    for line in log("train"):
        if line["step"] in (1, 100):
            texts.append(
                f"step {line['step']:5d}  loss {line['loss']:.4f}  lr {line['lr']:.1e}  "
                f"{line['pictures_per_second']:,} pictures/s"
            )
    end = log("test")[0]
    texts.append(f"trains for {end['seconds']:.0f} s on two cores")
    texts.append(f"{end['train_seconds']:.0f} s of them steps")
    texts.append(f"on track: {report.percent(log('test')[0]['accuracy'])} of the test part")
    texts.append(f"{100 * RESULTS['akamaster']['accuracy']:.1f} % of the first 1,000")
    int8 = RESULTS["int8"]
    texts.append(f"{100 * int8['int8_accuracy']:.2f} % in eight bits")
    texts.append(f"{int8['bytes'] / int8['int8_bytes']:.1f} times smaller")
    texts.append(f"changes logits by {int8['fold_error']:.0e} in float64")
    bench = RESULTS["bench"]
    ours, plain = (
        ", ".join(f"{one[who]:.0f}" for one in bench["seconds_to_goal"])
        for who in ("ours", "plain")
    )
    texts.append(f"3 seeds: {ours} s against {plain} s")
    texts += [f"{bench[key]:.2f} ×" for key in (
        "train_vs_torch", "time_to_accuracy_vs_torch", "scratch_conv_vs_torch")]  # fmt: skip
    fractions = ("train_gemm_fraction", "scratch_conv_gemm_fraction")
    return texts + [f"{100 * bench[key]:.0f} %" for key in fractions]


def test_every_measured_number_is_the_measured_one():
    missing = [text for text in measured() if text not in README]
    assert not missing


def test_what_must_be_reached_is_reached():
    """The promises of the README, by the numbers of the runs."""
    means = {
        data: statistics.mean(run["test"] for run in runs)
        for data, runs in RESULTS["seeds"].items()
    }
    assert means["shapes-10"] >= 0.95 - report.ON_TRACK
    assert means["mnist"] >= 0.993
    assert means["digits.npz"] >= 0.985
    assert RESULTS["akamaster"]["accuracy"] >= 0.995
    assert all(len(runs) == 3 for runs in RESULTS["seeds"].values())
    assert RESULTS["bench"]["train_vs_torch"] >= 1


def test_the_shipped_network_is_what_the_log_beside_it_says():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.do_eval(main.parser().parse_args(["--eval", "--weights", str(HERE / "pretrained")]))
    score = json.loads(out.getvalue().splitlines()[-1])
    assert score["accuracy"] == pytest.approx(log("test")[0]["accuracy"], abs=0.003)
    assert score["accuracy"] >= score["ceiling"] - report.ON_TRACK


def test_the_shipped_config_is_the_default():
    config = json.loads((HERE / "pretrained" / "config.json").read_text(encoding="utf-8"))
    changed = {"out", "dtype"}
    default = {k: v for k, v in vars(train.TrainConfig()).items() if k not in changed}
    assert {k: v for k, v in config["train"].items() if k not in changed} == default
    assert not Path(config["train"]["out"]).is_absolute()


def test_the_data_readme_states_checksums():
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("shapes10.npz", "digits.npz"):
        assert hashlib.sha256((HERE / "data" / name).read_bytes()).hexdigest() in text
