"""The bench: who gets to a goal when, in turns, and that all of it runs on small data."""

import json
import math

import pytest

import bench
from model import NetConfig


class Side:
    """Reaches 1.0 after so many steps; each step is one second of a clock of its own."""

    def __init__(self, clock: list[float], after: int, cost: float):
        self.clock, self.after, self.cost, self.n = clock, after, cost, 0

    def step(self) -> None:
        self.clock[0] += self.cost
        self.n += 1

    def accuracy(self) -> float:
        self.clock[0] += 100  # a look is not training
        return float(self.n >= self.after)


def test_race_counts_training_alone_and_stops_who_is_there(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(bench, "PATIENCE", 100)
    sides = {
        "ours": Side(clock, 26, 1.0),
        "plain": Side(clock, 75, 3.0),
        "never": Side(clock, 101, 1.0),
    }
    found = bench.race(0.9, sides)
    assert (found["ours"], found["plain"]) == (50.0, 225.0)
    assert math.isnan(found["never"])
    assert [side.n for side in sides.values()] == [50, 75, 100]


def test_bench_ends_with_its_ratios(command, small_data, tmp_path, monkeypatch):
    small = NetConfig(width=4)
    monkeypatch.setitem(bench.PRESETS, "fast", small)
    monkeypatch.setattr(bench, "RESULT", tmp_path / "bench.json")
    monkeypatch.setattr(bench, "CONVOLUTIONS", ((4, 4, 8),))
    for name, value in (("ROUNDS", 1), ("SEEDS", (0,)), ("PATIENCE", 25), ("GOAL", 0.1)):
        monkeypatch.setattr(bench, name, value)
    outcome = command("--bench", "--data", small_data, "--batch-size", 8, "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    line = json.loads(outcome.out.splitlines()[-1])
    assert line == json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    ratios = [name for name in line if "_vs_" in name]
    assert len(ratios) == 4 and all(line[name] > 0 for name in ratios)
    assert line["seconds_to_goal"][0]["ours"] > 0
    assert "ours in float32" in outcome.out and "× the plain script" in outcome.out
    assert {"train_vs_torch", "train_float32_vs_torch"} <= line.keys()


def test_seconds_are_medians_of_turns(monkeypatch):
    clock, costs = [0.0], iter([9, 9, 9, 1, 5, 2])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(costs)

    assert bench.seconds({"a": work}, rounds=3) == {"a": pytest.approx(2)}
