"""The README's snippets, file table, commands, links and checksums are what they say."""

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import statistics
from pathlib import Path

import pytest

import main
import train
from meter import gradient_cost, tape_bytes
from model import build

HERE = Path(__file__).resolve().parent.parent
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


def code_lines(path):
    """Lines that are neither blank nor comment nor docstring."""
    tree, text = ast.parse(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for i, x in lines if x.strip() and not x.strip().startswith("#") and i not in docs)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_print_what_their_comments_say(snippet):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README", "exec"), {})
    assert sum(bool(line.strip()) for line in snippet.splitlines()) <= 8
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", snippet)


def test_file_table_counts_code_lines():
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", TEXT, re.M))
    assert {name: int(n) for name, n in rows.items()} == {
        path.name: code_lines(path) for path in HERE.glob("*.py")
    }


def test_commands_and_options_exist():
    options = set(main.parser()._option_string_actions)
    for command in re.findall(r"python main\.py ([^`#\n]*)", TEXT + main.__doc__):
        flags = re.findall(r"--[\w-]+", command)
        assert flags and set(flags) <= options
    assert set(re.findall(r"`(--[\w-]+)", TEXT)) <= options


def test_links_and_pictures_are_there():
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert link.startswith("https://") or (HERE / link).exists(), link


def test_gradient_costs_in_the_text():
    found = {}
    for model in ("mlp", "cnn", "gpt"):
        task, _ = train.load_run(HERE / "pretrained" / model)
        x, y = task.data.batch(0, 64, 0)
        forward, backward = gradient_cost(lambda t=task, x=x, y=y: t.loss(x, y))
        found[model] = f"{(forward + backward) / forward:.2f} × ({model})"
    for words in found.values():
        assert words in TEXT


def test_results_are_those_of_the_runs():
    """assets/results.json is written by `--figures` from three runs a task and the last bench."""
    found = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
    texts = []
    for task in ("cnn", "mlp", "moons", "mnist"):
        scores = [100 * x for x in found[task]["accuracy"]]
        texts.append(f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f} % (3 seeds)")
    nats = found["gpt"]["loss"]
    texts.append(f"{statistics.mean(nats):.3f} ± {statistics.stdev(nats):.3f} (3 seeds)")
    bench, rows = found["bench"], found["bench"]["rows"]
    both = [
        f": {bench[f'{net}_vs_torch']:.2f} × its speed on two cores, "
        f"{bench[f'{net}_vs_torch_one_thread']:.2f} × on one"
        for net in ("mlp", "cnn", "gpt")
    ]
    for name, unit, digits, more in (
        ("mlp step, batch 128", "ms", 2, both[0]),
        ("cnn step, batch 64", "ms", 1, both[1]),
        ("gpt step, batch 32", "ms", 1, both[2]),
        ("tape overhead per operation", "µs", 1, f": {bench['overhead_vs_torch']:.2f} ×"),
        ("moons step, Value", "ms", 0, f": {bench['scalar_vs_micrograd']:.1f} × as fast"),
    ):
        ours, theirs = (f"{value:,.{digits}f} {unit}" for value in rows[name])
        texts += [f"| {ours} | ", f" {theirs}{more} |"]
    texts.append(f"{rows['moons step, tensors'][0]:.2f} ms | micrograd's algorithm")
    texts.append(f"{bench['tensor_vs_micrograd']:,.0f} × as fast")
    missing = [text for text in texts if text not in TEXT]
    assert not missing


def test_sizes_and_memory_in_the_text():
    """Weights of both mlps and of the gpt, and what a batch of 32 texts keeps on the tape."""
    task, _ = train.load_run(HERE / "pretrained" / "mlp")
    small = build(dataclasses.replace(task.model, size="small"))
    sizes = sum(p.numel() for p in small.parameters()), task.count()
    assert "{:,} weights instead of {:,}".format(*sizes) in TEXT
    assert f"{len(task.data.x):,} images are the limit" in TEXT
    task, _ = train.load_run(HERE / "pretrained" / "gpt")
    kept = tape_bytes(task.loss(*task.data.batch(0, 32, 0)))
    assert f"keeps {kept / 1e6:.0f} MB" in TEXT and f"{task.count():,} weights" in TEXT
    assert f"weights are {4 * task.count() / 1e6:.1f} MB" in TEXT


def test_the_step_by_hand():
    """w = 3, x = 2, y = 10: error −4, L = 16, slope −16, new w 4.6, new L 0.64."""
    w = 3.0
    error = w * 2 - 10
    slope = 2 * error * 2
    after = w - 0.1 * slope
    numbers = (error, error**2, slope, after, (after * 2 - 10) ** 2)
    assert numbers == pytest.approx((-4, 16, -16, 4.6, 0.64))
    for words in (
        "error is −4, L = 16",
        "∂L/∂w = −8 · 2 = −16",
        "3 + 1.6 = 4.6",
        "(9.2 − 10)² = 0.64",
    ):
        assert words in TEXT


def test_length_of_the_reading_path():
    assert f"on single numbers, {code_lines(HERE / 'value.py')} lines" in TEXT


def test_promise_in_the_log_lines():
    assert f"promises ≥ {100 * train.DEFAULTS['cnn']['promise']:g} %" in TEXT


def test_checksums_of_the_data():
    table = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name, digest in re.findall(r"^\| `([\w.]+)` .* `([0-9a-f]{64})` \|$", table, re.M):
        assert hashlib.sha256((HERE / "data" / name).read_bytes()).hexdigest() == digest
