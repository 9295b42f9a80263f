"""Every measured number in the README is the measured one, see assets/results.json."""

import hashlib
import json
import statistics
from pathlib import Path

import pytest

import loading
import lora
import train

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def spread(kind: str, key: str, digits: int, factor: float = 1.0) -> str:
    """mean ± standard deviation over the seeds, as the README writes it."""
    values = [factor * run[key] for run in RESULTS[kind]["test"]]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def measured() -> list[str]:
    """The numbers of the results table, as they should read."""
    floor = json.loads((HERE / "data" / "floor.json").read_text(encoding="utf-8"))
    per_char = 1 / floor["test"]["nats_per_char"]
    return [
        f"| {' | '.join(spread(kind, key, digits, factor) + unit for kind in ('lora', 'full'))} |"
        for key, digits, factor, unit in (
            ("style", 1, 100, " %"),
            ("asked", 1, 100, " %"),
            ("nats_per_char", 3, per_char, " ×"),
            ("stories", 3, 1, " ×"),
        )
    ]


@pytest.mark.parametrize("said", measured())
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


def test_the_number_that_learns_is_counted():
    base = loading.load_base("").model
    n_base = sum(p.numel() for p in base.parameters())
    loading.attach(base, lora.LoraConfig())
    learns, _ = lora.trainable(base)
    assert f"{learns:,} ({learns / n_base:.2%})" in README and learns < 0.01 * n_base


def test_the_promise_is_what_the_seeds_reached():
    """What `--train` calls on track."""
    assert min(run["style"] for run in RESULTS["lora"]["test"]) >= train.ON_TRACK


def test_the_panel_is_within_a_percent():
    for _, least, learned in RESULTS["panel"]:
        assert least - 1e-9 <= learned <= 1.01 * least + 1e-6


def test_the_data_readme_states_sizes_and_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("news.jsonl", "stories_test.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said
