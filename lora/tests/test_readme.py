"""Every measured number in the README is the measured one, see assets/results.json."""

import hashlib
import json
import statistics
from pathlib import Path

import pytest

import bench
import loading
import memory
import train
from model import PRESETS, LlamaConfig
from variants import AdapterConfig

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def spread(kind: str, key: str, digits: int, factor: float = 1.0) -> str:
    """mean ± standard deviation over the seeds, as the README writes it."""
    values = [factor * run[key] for run in RESULTS[kind]["test"]]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def row(cells) -> str:
    """The end of a row of a table."""
    return "| " + " | ".join(cells) + " |"


def measured() -> list[str]:
    """The numbers of the results table, as they should read."""
    floor = json.loads((HERE / "data" / "floor.json").read_text(encoding="utf-8"))
    per_char, before = 1 / floor["test"]["nats_per_char"], RESULTS["before"]
    rows = [
        ("style", 1, 100, " %", 1),
        ("asked", 1, 100, " %", 1),
        ("nats_per_char", 3, per_char, " ×", 2),
        ("stories", 3, 1, " ×", 3),
    ]
    return [
        row([f"{factor * before[key]:.{first}f}{unit}",
             *(spread(kind, key, digits, factor) + unit for kind in ("lora", "full"))])
        for key, digits, factor, unit, first in rows
    ]  # fmt: skip


def compared() -> list[str]:
    """The table of spectra, over all matrices and seeds."""
    found = [RESULTS[kind]["spectra"] for kind in ("lora", "full")]
    total = lambda runs, key: sum(run[key] for run in runs)  # noqa: E731
    mean = lambda runs, key: statistics.mean(run[key] for run in runs)  # noqa: E731
    return [
        row(f"{total(runs, 'intruders')} of {total(runs, 'looked_at')}" for runs in found),
        row(f"{mean(runs, 'directions'):.1f}" for runs in found),
        row(f"{mean(runs, 'size'):.2f}" for runs in found),
    ]


def timed() -> list[str]:
    """The table of the bench, and the ratios below it."""
    wide, narrow = RESULTS["bench-float32"], RESULTS["bench-bfloat16"]
    found = [
        f"{wide['train_vs_full']:.2f} × as fast as training all weights",
        f"{wide['train_vs_peft']:.2f} × as fast as PEFT on the same model",
        f"({narrow['train_vs_peft']:.2f} × in bfloat16)",
        f"{wide['train_vs_peft_transformers']:.2f} × inside of the Llama of transformers",
        f"It reaches {wide['gemm_fraction']:.2f} of this machine's rate",
    ]
    for name, numbers in wide["variants"].items():
        times = [1000 * x["variants"][name]["seconds"] for x in (wide, narrow)]
        found.append(row([*(f"{t:.0f}" for t in times), f"{numbers['activations'] / 1e6:.0f}"]))
    return found


@pytest.mark.parametrize("said", [*measured(), *compared(), *timed()])
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


def test_the_number_that_learns_is_counted():
    base = loading.load_base("").model
    n_base = sum(p.numel() for p in base.parameters())
    loading.attach(base, AdapterConfig())
    learns, _ = memory.trainable(base)
    assert f"{learns:,} ({learns / n_base:.2%})" in README and learns < 0.01 * n_base
    assert f"| {sum(memory.planned(base).values()) / 1e6:.2f} MB |" in README
    kept = (loading.SHIPPED / "adapter_model.safetensors").stat().st_size
    assert f"| {kept / 1e3:.0f} kB |" in README


def styles() -> list[float]:
    """Of the three seeds, and of the run on two threads."""
    return [run["style"] for run in (*RESULTS["lora"]["test"], RESULTS["fourth"])]


def test_the_fourth_run_is_told():
    fourth = RESULTS["fourth"]
    assert f"{fourth['seconds']} s in all" in README and f"came to {fourth['style']:.1%}" in README
    assert f"the mean of the four is {statistics.mean(styles()):.1%}" in README


def needed(sizes: LlamaConfig, kind: str) -> int:
    """Bytes of weights, gradients and moments in float32, by arithmetic; of LoRA the rank is 8."""
    d, h, f = sizes.d_model, sizes.n_head * sizes.d_head, sizes.d_ff
    k = sizes.n_kv_head * sizes.d_head
    matrices = [(h, d), (k, d), (k, d), (d, h), (f, d), (d, f), (f, d)]
    adapted = sizes.n_layer * sum(rows * columns for rows, columns in matrices)
    learns = sizes.n_layer * sum(8 * (rows + columns) for rows, columns in matrices)
    if kind == "full":
        return 16 * sizes.n_parameter
    bits = 32 if kind == "lora" else 4 + 8 / 64 + 32 / (64 * 256)
    return 4 * (sizes.n_parameter - adapted) + adapted * bits / 8 + 16 * learns


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_the_memory_is_by_arithmetic(kind):
    """The same rule gives what the bench measured on the small model and what 7 B would need."""
    numbers = RESULTS["bench-float32"]["variants"][kind]
    parts = [numbers[name] for name in ("weights", "gradients", "moments")]
    assert needed(bench.SIZES, kind) == pytest.approx(sum(parts), rel=1e-3)
    large = needed(PRESETS["llama2-7b"], kind)
    cells = [f"{numbers['learns']:,}", *(f"{x / 1e6:.2f}" for x in parts),
             f"{sum(parts) / 1e6:.1f} MB", f"{large / 1e9:.1f} GB"]  # fmt: skip
    assert row(cells) in README


def test_the_promise_is_what_the_seeds_reached():
    """What `--train` calls on track."""
    assert min(styles()) >= train.ON_TRACK and statistics.mean(styles()) >= 0.98


def test_the_panel_is_within_a_percent():
    for _, least, learned in RESULTS["panel"]:
        assert least - 1e-9 <= learned <= 1.01 * least + 1e-6


def test_the_data_readme_states_sizes_and_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("news.jsonl", "stories_test.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said
