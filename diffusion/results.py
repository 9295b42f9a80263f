"""Every number of the README in one file: assets/results.json, from runs and the shipped networks.

    seeds      the test line of runs/seed0, runs/seed1 and runs/seed2, and how long they took
    toy        the same of runs/toy0 to runs/toy2; mnist: of runs/mnist
    timed      the same of runs/timed-float32 and runs/timed-bfloat16, on an idle machine
    bench      what --bench left in runs/
    guidance   quality of the shipped network's samples for several w
    eval       what --eval says of the shipped network

What has no run keeps the numbers it had.
"""

import json
import statistics
from pathlib import Path

import checkpoint
import classifier
import measure
from measure import SampleConfig
from options import say
from run import RunDirectory, read_json, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "assets" / "results.json"
RUNS = {"seeds": "seed[0-9]", "toy": "toy[0-9]", "mnist": "mnist", "timed": "timed-*"}
SWEEP = (0.0, 1.0, 2.0, 3.0, 5.0)
N_SAMPLE = 300


def tests_of(pattern: str) -> list[dict]:
    """The test line of each finished run whose name fits, with its seed and its seconds."""
    found = []
    for folder in sorted((HERE / "runs").glob(pattern)):
        lines = RunDirectory(folder).history()
        if lines and lines[-1]["split"] == "test":
            trained = read_json(folder / "config.json")["train"]
            seconds = max(line.get("seconds", 0) for line in lines)
            kept = {name: trained[name] for name in ("seed", "dtype", "steps", "batch_size")}
            found.append(lines[-1] | kept | {"seconds": seconds})
    return found


def sweep(loaded, source, judge) -> list[dict]:
    """Quality for several strengths of guidance."""
    lines = []
    for w in SWEEP:
        config = SampleConfig(num_samples=N_SAMPLE, guidance=w)
        found = measure.quality(loaded, source, config, judge)
        lines.append({"guidance": w} | {k: round(x, 4) for k, x in found.items()})
    return lines


def collect() -> dict:
    """Write assets/results.json and return what is in it."""
    found = read_json(RESULTS, optional=True)
    for name, pattern in RUNS.items():
        if tests := tests_of(pattern):
            found[name] = tests
    for file in sorted((HERE / "runs").glob("bench*.json")):
        found.setdefault("bench", {})[file.stem.removeprefix("bench-")] = read_json(file)
    loaded = checkpoint.load(HERE / "pretrained")
    source = loaded.rows()
    judge = classifier.fit(source.train, len(source.classes))
    found["guidance"] = sweep(loaded, source, judge)
    found["eval"] = measure.bits(loaded, source)
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, found)
    say(f"written    {RESULTS}")
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def spread(values: list[float], factor: float = 1, digits: int = 1) -> str:
    """Mean ± standard deviation, as the README shows it."""
    values = [factor * value for value in values]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
