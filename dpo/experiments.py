"""Five experiments in the enumerable world, in which every number is exact (`main.py --world`).

frontier           how near each loss comes to the best policy of equal KL
beta               what β does: reward and distance of π*
displacement       why the probability of chosen and rejected answers may fall together
overoptimisation   few labels: the loss falls on, and the true reward falls too
noise              labels flipped at a known rate: who recovers the reward?
"""

import argparse
import json

import torch
from torch import Tensor

import world
from options import say
from world import World

BETAS = (0.5, 1.0, 2.0)
FLIPS = (0.1, 0.2, 0.3)
N_LABEL, N_DRAW = 60, 12  # of overoptimisation: pairs in a data set, and data sets
OVER = {"dpo": 0.5, "ipo": 0.2}  # loss and β


def point(log_p: Tensor, here: World) -> dict[str, float]:
    """KL, expected true reward, and the largest one that is possible at this KL."""
    distance = world.kl(log_p, here)
    found = {"kl": distance, "reward": world.mean_reward(log_p, here)}
    return found | {"best": world.best_reward(here, distance)}


def frontier(here: World) -> list[dict]:
    """Each loss, trained to its end on infinite data, for several β."""
    labels, rows = world.all_labels(here), []
    least = world.floor(here, labels)
    for beta in BETAS:
        for kind, flip in (("dpo", 0.0), ("cdpo", 0.1), ("ipo", 0.0), ("reinforce", 0.0)):
            if kind == "reinforce":
                log_p = world.train_reinforce(here, beta)
            else:
                log_p = world.train(here, labels, kind, beta, flip)
            rows.append({"loss": kind, "beta": beta} | point(log_p, here))
            if kind == "dpo":
                value = world.expected_loss(log_p, here, labels, kind, beta).item()
                rows[-1] |= {"value": value, "floor": least}
    noisy = world.all_labels(here, flip=0.2)
    for beta in BETAS:
        log_p = world.train(here, noisy, "rdpo", beta, 0.2)
        rows.append({"loss": "rdpo, 20 % flipped", "beta": beta} | point(log_p, here))
    return rows


def beta_table(here: World) -> list[dict]:
    """π* for several β."""
    betas = (0.3, *BETAS, 4.0, 8.0)
    return [{"beta": beta} | point(world.optimal(here, beta), here) for beta in betas]


def counts(here: World) -> Tensor:
    """How often each letter stands in each answer, (N, 3): what a policy may learn about."""
    return torch.tensor([[y.count(x) for x in world.LETTERS] for y in here.answers]).double()


def displacement(here: World, chosen: str = "u", rejected: str = "uu") -> list[dict]:
    """DPO on one pair, with a policy that knows answers by their letters alone.

    Both answers are unkind, one less so. What can be learned from them is that u is bad, so both
    become rarer, and answers that nobody compared become more probable.
    """
    pair = [here.answers.index(chosen), here.answers.index(rejected)]
    one = torch.tensor
    labels = world.Labels(one(pair[:1]), one(pair[1:]), one([1.0]).double(), one([1.0]).double())
    features = counts(here)

    def loss(scores: Tensor) -> Tensor:
        log_p = world.policy_of(scores, here, features)
        return world.expected_loss(log_p, here, labels, "dpo", 0.5)

    rows = []
    for number, scores in enumerate(world.path(loss, len(world.LETTERS), 60, 3)):
        log_p = world.policy_of(scores, here, features)
        ratio = (log_p - here.log_ref)[pair]
        rows.append({
            "step": 3 * number, "loss": loss(scores).item(), "chosen": 0.5 * ratio[0].item(),
            "rejected": 0.5 * ratio[1].item(), "reward": world.mean_reward(log_p, here),
            "elsewhere": 1 - log_p.exp()[pair].sum().item(),
        })  # fmt: skip
    return rows


def overoptimisation(here: World) -> dict[str, list[list[dict]]]:
    """Training on few labels, on and on: a path for each loss and draw of the labels."""
    return {
        kind: [one_path(here, kind, beta, seed) for seed in range(N_DRAW)]
        for kind, beta in OVER.items()
    }


def fall(rows: list[dict]) -> float:
    """By how much the true reward ends below the best of the path."""
    return max(row["reward"] for row in rows) - rows[-1]["reward"]


def one_path(here: World, kind: str, beta: float, seed: int) -> list[dict]:
    """Step, loss on the labels, KL and true reward, while one policy is trained."""
    labels = world.drawn_labels(here, N_LABEL, seed)

    def loss(scores: Tensor) -> Tensor:
        return world.expected_loss(world.policy_of(scores, here), here, labels, kind, beta)

    rows = []
    for number, scores in enumerate(world.path(loss, len(here.answers), 400, 20, lr=0.1)):
        log_p = world.policy_of(scores, here)
        rows.append({"step": 20 * number, "loss": loss(scores).item(), "kl": world.kl(log_p, here),
                     "reward": world.mean_reward(log_p, here)})  # fmt: skip
    return rows


def noise(here: World, beta: float = 1.0) -> list[dict]:
    """Infinite data whose labels are flipped with probability ε, which the loss is told.

    slope: the reward that the policy stands for, β·log(π/π_ref), grows by this where the true one
    grows by 1, on average over π_ref. error: the root of the mean square of what is left.
    """
    rows, p = [], here.log_ref.exp()
    true = here.reward - (p * here.reward).sum()
    for flip in FLIPS:
        labels = world.all_labels(here, flip)
        for kind in ("dpo", "cdpo", "rdpo"):
            log_p = world.train(here, labels, kind, beta, 0.0 if kind == "dpo" else flip)
            read = beta * (log_p - here.log_ref)
            read = read - (p * read).sum()
            slope = ((p * true * read).sum() / (p * true * true).sum()).item()
            error = (p * (read - true).square()).sum().sqrt().item()
            rows.append({"flip": flip, "loss": kind, "slope": slope, "error": error,
                         "read": read.tolist()} | point(log_p, here))  # fmt: skip
    return rows


def run_all() -> dict:
    """All five, with the truth beside them."""
    here = world.make_world()
    return {
        "answers": len(here.answers),
        "start": world.mean_reward(here.log_ref, here),
        "true": (here.reward - (here.log_ref.exp() * here.reward).sum()).tolist(),
        "frontier": frontier(here),
        "beta": beta_table(here),
        "displacement": displacement(here),
        "overoptimisation": overoptimisation(here),
        "noise": noise(here),
    }


# ── In words ──────────────────────────────────────────────────────────────────────────────────────


def show(found: dict) -> None:
    """Print the five as tables."""
    print(f"{found['answers']} answers; mean reward of the reference {found['start']:.3f}\n")
    print("loss                  β     KL  reward  best at this KL   share of the gain")
    for row in found["frontier"]:
        share = gained(row, found["start"])
        print(f"{row['loss']:20}{row['beta']:4}{row['kl']:7.3f}{row['reward']:8.3f}"
              f"{row['best']:12.3f}{share:17.2%}")  # fmt: skip
    floors = [row for row in found["frontier"] if "floor" in row]
    off = max(row["value"] - row["floor"] for row in floors)
    print(f"loss of DPO: {floors[0]['value']:.6f}, the Bradley–Terry floor {floors[0]['floor']:.6f}"
          f" (largest difference {off:.0e})\n")  # fmt: skip
    print(
        "what β does: "
        + "; ".join(
            f"β {r['beta']}: KL {r['kl']:.2f}, reward {r['reward']:.2f}" for r in found["beta"]
        )
        + "\n"
    )
    print("one pair, both unkind (u chosen, uu rejected): β·log(π/π_ref) of each, true reward")
    for row in found["displacement"][:: len(found["displacement"]) // 5]:
        print(f"step {row['step']:3}  loss {row['loss']:.3f}  chosen {row['chosen']:6.3f}  rejected"
              f" {row['rejected']:6.3f}  true reward {row['reward']:6.3f}")  # fmt: skip
    print(f"\n{N_LABEL} labels, trained on and on, {N_DRAW} draws of the labels")
    for kind, paths in found["overoptimisation"].items():
        n_fall = sum(fall(rows) > 0.1 for rows in paths)
        kl, reward = (sum(rows[-1][key] for rows in paths) / N_DRAW for key in ("kl", "reward"))
        print(f"{kind:4} at the end: KL {kl:.2f}, true reward {reward:.3f}; in {n_fall} of {N_DRAW}"
              f" it ends more than 0.1 below its peak, at most {max(map(fall, paths)):.2f}"
        )  # fmt: skip
    print("\nflipped labels  loss  slope of the reward  error")
    for row in found["noise"]:
        print(f"{row['flip']:14.0%}  {row['loss']:5}{row['slope']:15.3f}{row['error']:12.3f}")


def gained(row: dict, start: float) -> float:
    """Which share of the reward that could be gained at this KL was gained."""
    return (row["reward"] - start) / (row["best"] - start)


def main(args: argparse.Namespace) -> None:
    """Do all five and print them; the last line is JSON."""
    say("a minute or less: every policy here is trained with exact gradients")
    found = run_all()
    show(found)
    dpo = [row for row in found["frontier"] if row["loss"] == "dpo"]
    print(json.dumps({"dpo_share_of_best": min(gained(row, found["start"]) for row in dpo)}))
