"""Every measured number in the README is the measured one, see assets/results.json."""

import hashlib
import json
import statistics
from pathlib import Path

import pytest
import torch

import checkpoint
import data
import text
import train
from model import PRESETS, Llama

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))


def spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    """mean ± standard deviation, as the README writes it."""
    values = [factor * value for value in values]
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def measured() -> list[str]:
    """The numbers of the results section, as they should read."""
    stories = RESULTS["stories"]
    texts = [
        f"| {step} | {spread([run[step] for run in stories['valid']], 3)} |"
        for step in stories["valid"][0]
        if f"\n| {step} | " in README  # not all of them
    ]
    assert len(texts) >= 5
    last = str(train.TrainConfig().steps)
    texts.append(f"| {spread([run[last] for run in stories['test']], 3)} |")
    for temperature in ("1.0", "0.7"):
        shares = [run[temperature] for run in stories["told"]]
        texts.append(f"{spread(shares, 0, 100)} % |")
    texts.append(f"{stories['first_loss']:.2f} nats")
    texts.append(f"{data.floor('stories', 'test'):.4f} nats per character")
    texts += [f"{RESULTS['timed'][dtype]:.0f} s" for dtype in ("float32", "bfloat16")]
    texts.append(f"**{RESULTS['tinyshakespeare']['nats_per_char']:.3f}**")
    benches = [RESULTS[f"bench-{dtype}"] for dtype in ("float32", "bfloat16")]
    for key in ("train_vs_hf", "decode_vs_hf", "decode_vs_hf_b8"):
        texts.append(" | ".join(f"{bench[key]:.2f} ×" for bench in benches))
    for key in ("train_gemm_fraction", "decode_bandwidth_fraction"):
        texts.append(" | ".join(f"{100 * bench[key]:.0f} %" for bench in benches))
    return texts


@pytest.mark.parametrize("said", measured())
def test_a_measured_number_is_the_measured_one(said):
    assert said in README


def test_the_promise_is_kept_by_every_seed():
    """What `--train` calls on track."""
    last = str(train.TrainConfig().steps)
    assert max(run[last] for run in RESULTS["stories"]["test"]) <= train.ON_TRACK


def test_parameters_are_counted():
    with torch.device("meta"):
        count = sum(weight.numel() for weight in Llama(PRESETS["tiny"]).parameters())
    assert f"| {count / 1e6:.2f} M |" in README


def test_the_shipped_model_is_what_the_log_beside_it_says():
    """float16 storage costs next to nothing: the loss of the test part is the logged one."""
    loaded = checkpoint.load(HERE / "pretrained")
    tokens = text.tokens_of(data.measure("stories"), loaded.tokenizer, "test")
    score = train.evaluate(loaded.model, tokens, loaded.model.config.seq_len, torch.float32)
    log = (HERE / "pretrained" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [x for x in map(json.loads, log) if x["split"] == "test"]
    assert score["nats_per_char"] == pytest.approx(logged[-1]["nats_per_char"], rel=0.005)
    assert score["nats_per_char"] <= train.ON_TRACK * data.floor("stories", "test")


def test_the_data_readme_states_sizes_and_checksums():
    said = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name in ("stories.txt", "floor.json"):
        content = (HERE / "data" / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said
