"""Every picture of the README and assets/results.json, anew from runs and from the world.

The runs are those that the README tells how to make: runs/default, seed1, seed2, and runs/llama for
the real preferences. What was not run is left as it was drawn before.

result.png        the tales: rewards while training, and how kind the answers are before and after
frontier.png      the enumerable world: what each loss reaches, and what happens with few labels
displacement.png  both rewards fall and all is well
noise.png         the reward that is read off a policy, with flipped labels
"""

import argparse
import json
from pathlib import Path

import experiments
import world
from options import say
from run import RunDirectory, read_json, write_json

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
SEEDS = ("default", "seed1", "seed2")
COLORS = {"dpo": "#1b6ca8", "cdpo": "#d95f02", "ipo": "#7570b3", "reinforce": "#444444",
          "rdpo": "#1b9e77", "rdpo, 20 % flipped": "#1b9e77"}  # fmt: skip
MARKS = {"dpo": "o", "cdpo": "s", "ipo": "^", "reinforce": "x", "rdpo, 20 % flipped": "+"}
NAMES = {"dpo": "DPO", "cdpo": "cDPO (ε = 0.1)", "ipo": "IPO", "reinforce": "REINFORCE with KL",
         "rdpo, 20 % flipped": "rDPO, 20 % of labels flipped"}  # fmt: skip


def plotting():
    """matplotlib without a window, imported only where something is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def save(figure, file: Path) -> Path:
    """Write a picture and forget it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plotting().close(figure)
    return file


def training_curve(run: Path, folder: Path) -> Path:
    """Rewards of chosen and rejected answers of the validation part, by step."""
    lines = [line for line in RunDirectory(run).history() if line["split"] == "valid"]
    figure, axes = plotting().subplots(figsize=(7, 4), layout="constrained")
    reward_lines(axes, lines, label=True)
    axes.set(xlabel="step", ylabel="β·log(π/π_ref), held-out pairs")
    axes.legend(frameon=False)
    return save(figure, folder / "curve.png")


def reward_lines(axes, lines: list[dict], label: bool) -> None:
    """The two rewards of one run, from the end of imitation on, where both are 0."""
    start = [line["step"] for line in lines if "margin" not in line][-1:]
    lines = [line for line in lines if "margin" in line]
    steps = start + [line["step"] for line in lines]
    for key, color, name in (("reward_chosen", "#1b9e77", "chosen"),
                             ("reward_rejected", "#d95f02", "rejected")):  # fmt: skip
        values = [0.0 for _ in start] + [line[key] for line in lines]
        axes.plot(steps, values, color=color, marker="o", markersize=3,
                  label=name if label else None)  # fmt: skip


def rounded(value):
    """Numbers with six digits, in lists and dictionaries too."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def collect() -> dict:
    """What the runs measured."""
    found, logs = {}, {name: RunDirectory(RUNS / name).history() for name in (*SEEDS, "llama")}
    done = {name for name, log in logs.items() if any(line["split"] == "test" for line in log)}
    if done.isdisjoint(SEEDS):
        say(f"runs/{', '.join(SEEDS)}: none is there, so the tales are left as they were")
    else:
        found["tales"] = [
            {
                "valid": [line for line in logs[name] if line["split"] == "valid"],
                "test": [line for line in logs[name] if line["split"] == "test"][-1],
                "seconds": max(line.get("seconds", 0.0) for line in logs[name]),
            }
            for name in SEEDS
            if name in done
        ]
    if "llama" in done:
        found["llama"] = [line for line in logs["llama"] if line["split"] == "test"][-1]
    for file in sorted(RUNS.glob("bench-*.json")):
        found[file.stem] = read_json(file)
    return found


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────


def result_picture(runs: list[dict]) -> None:
    """Rewards by step, and the true reward of the answers, before and after."""
    figure, (left, right) = plotting().subplots(
        1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2)
    )
    for number, run in enumerate(runs):
        reward_lines(left, run["valid"], label=number == 0)
    left.axhline(0, color="gray", linewidth=1, linestyle="--")
    left.set(xlabel="training step", ylabel="reward β·log(π/π_ref), held-out pairs")
    left.legend(frameon=False)
    for place, key in enumerate(("true_reward_reference", "true_reward")):
        values = [run["test"][key] for run in runs]
        right.bar(place, sum(values) / len(values), color="#1b6ca8", alpha=0.5)
        right.plot([place] * len(values), values, "o", color="#1b6ca8")
    right.axhline(0, color="gray", linewidth=1)
    right.set_xticks((0, 1), ["before (SFT)", "after (DPO)"])
    right.set_ylim(-0.5, 3)
    right.set_ylabel("kind − unkind sentences")
    save(figure, ASSETS / "result.png")


def frontier_picture(found: dict) -> None:
    """Reward by KL: the best policies, what the losses reach, and training on few labels."""
    here = world.make_world()
    kls = [0.005 * 1.2**i for i in range(40)]
    kls = [0.0, *(kl for kl in kls if kl < 5.5)]
    best = [world.best_reward(here, kl) for kl in kls]
    figure, (left, right) = plotting().subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes in (left, right):
        axes.plot(kls, best, color="black", label="frontier: π*")
        axes.set(xlabel="KL(π‖π_ref), nats", ylabel="expected true reward")
    for kind in MARKS:
        rows = [row for row in found["frontier"] if row["loss"] == kind and row["kl"] < 3.2]
        left.plot([row["kl"] for row in rows], [row["reward"] for row in rows], MARKS[kind],
                  color=COLORS[kind], markersize=9, fillstyle="none",
                  label=NAMES[kind])  # fmt: skip
    left.set(title="infinitely many labels", xlim=(-0.1, 3.2), ylim=(-0.4, 3.1))
    left.legend(frameon=False, fontsize=11)
    for kind, paths in found["overoptimisation"].items():
        for number, rows in enumerate(paths):
            right.plot([row["kl"] for row in rows], [row["reward"] for row in rows], linewidth=1.2,
                       color=COLORS[kind],
                       label=None if number else f"{kind.upper()}, while training")  # fmt: skip
    right.set(title=f"{experiments.N_LABEL} labels, trained on and on")
    right.legend(frameon=False, fontsize=11)
    save(figure, ASSETS / "frontier.png")


def displacement_picture(rows: list[dict]) -> None:
    """One pair: the two rewards, and the true reward of the policy."""
    figure, axes = plotting().subplots(figsize=(7.5, 4), layout="constrained")
    steps = [row["step"] for row in rows]
    for key, color, name in (("chosen", "#1b9e77", "reward of the chosen answer, “u”"),
                             ("rejected", "#d95f02", "reward of the rejected answer, “uu”"),
                             ("reward", "black", "expected true reward")):  # fmt: skip
        axes.plot(steps, [row[key] for row in rows], color=color, label=name,
                  linestyle="--" if key == "reward" else "-")  # fmt: skip
    axes.axhline(0, color="gray", linewidth=1)
    axes.set(xlabel="training step on this one pair", ylabel="reward")
    axes.legend(frameon=False)
    save(figure, ASSETS / "displacement.png")


def noise_picture(found: dict, flip: float = 0.2) -> None:
    """The reward that is read off a policy by the true one, for each loss."""
    figure, axes = plotting().subplots(figsize=(7.5, 4.4), layout="constrained")
    axes.plot((-4, 5), (-4, 5), color="gray", linewidth=1, label="read = true")
    for row in found["noise"]:
        if row["flip"] == flip:
            name = {"dpo": "DPO", "cdpo": "cDPO", "rdpo": "rDPO"}[row["loss"]]
            axes.plot(found["true"], row["read"], ".", color=COLORS[row["loss"]], markersize=9,
                      label=f"{name}: slope {row['slope']:.2f}")  # fmt: skip
    axes.set(xlabel="true reward of an answer, around its mean",
             ylabel="β·log(π/π_ref)", title=f"{flip:.0%} of the labels flipped")  # fmt: skip
    axes.legend(frameon=False)
    save(figure, ASSETS / "noise.png")


def main(args: argparse.Namespace) -> None:
    """Redraw assets/ and write assets/results.json."""
    file = ASSETS / "results.json"
    results = read_json(file, optional=True) | collect()
    results["world"] = experiments.run_all()
    ASSETS.mkdir(exist_ok=True)
    results = rounded(results)
    write_json(file, results)
    frontier_picture(results["world"])
    displacement_picture(results["world"]["displacement"])
    noise_picture(results["world"])
    if "tales" in results:
        result_picture(results["tales"])
    print(json.dumps({"drawn": sorted(path.name for path in ASSETS.glob("*.png"))}))
