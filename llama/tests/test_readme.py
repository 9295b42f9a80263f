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
import torch

import main
from model import PRESETS, Llama

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_file_table_has_every_file_and_its_length():
    rows = dict(
        re.findall(r"^\| \[[^\]]+\]\(([^)]+\.py)\) \| (\d+) \|", README, flags=re.MULTILINE)
    )
    files = [*HERE.glob("*.py"), HERE / "data" / "make_stories.py"]
    lengths = {
        file.relative_to(HERE).as_posix(): len(file.read_text(encoding="utf-8").splitlines())
        for file in files
    }
    assert {name: int(n) for name, n in rows.items()} == lengths


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
        words = shlex.split(command.replace("$s", "1"), comments=True)
        main.parser().parse_args(words[2:])


def test_the_experiments_are_options():
    section = README[README.index("Change this") : README.index("Questions people ask")]
    flags = re.findall(r"`(--[^`]*)`", section)
    assert len(flags) >= 4
    for text in flags:
        main.parser().parse_args(shlex.split(text))


def measured() -> list[str]:
    """Every number of the results section as it should read, from assets/results.json."""
    stories, shakespeare, bench = (RESULTS[key] for key in ("stories", "tinyshakespeare", "bench"))
    steps = stories["times_floor"][0]
    texts = []
    for step in steps:
        values = [run[step] for run in stories["times_floor"]]
        texts.append(f"| {step} | {statistics.mean(values):.3f} ± {statistics.stdev(values):.3f} |")
    texts += [f"{stories['first_loss']:.2f} nats", f"{stories['seconds']:.0f} s"]
    texts += [f"**{shakespeare['nats_per_char']:.3f}**", f"{shakespeare['seconds']:.0f} s"]
    ratios = ("train_vs_hf", "decode_vs_hf", "decode_vs_hf_b8")
    texts += [f"{bench[key]:.2f} ×" for key in ratios]
    with torch.device("meta"):
        n_parameter = sum(weight.numel() for weight in Llama(PRESETS["tiny"]).parameters())
    texts.append(f"| {n_parameter / 1e6:.2f} M |")
    fractions = ("train_gemm_fraction", "decode_bandwidth_fraction")
    return texts + [f"{100 * bench[key]:.0f} %" for key in fractions]


def test_every_measured_number_is_the_measured_one():
    missing = [text for text in measured() if text not in README]
    assert not missing


def test_the_shipped_model_is_what_the_log_beside_it_says():
    """float16 storage costs next to nothing: the held-out loss is the logged one within 1 %."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main.do_eval(main.parser().parse_args(["--weights", str(HERE / "pretrained")]))
    score = json.loads(out.getvalue().splitlines()[-1])
    log = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    best = min(x["nats_per_char"] for x in map(json.loads, log) if x["split"] == "valid")
    assert score["nats_per_char"] == pytest.approx(best, rel=0.01)
    assert score["nats_per_char"] <= 1.10 * score["floor_nats_per_char"]


def test_the_data_readme_states_sizes_and_checksums():
    text = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("stories.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in text
        assert hashlib.sha256(content).hexdigest() in text
