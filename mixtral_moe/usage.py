"""How the experts are used: load, certainty, dead experts, who repeats, who speaks which dialect.

A router is right or wrong in no visible way: the loss falls even when half the experts sleep. These
are the numbers that show it, all counted over the tokens of a whole part of the text.

Key: L layers, N tokens, E n_expert, k n_active, K dialects.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from moe import Routing, loads


class Usage:
    """Counts over as many batches as `add` is called for; `numbers` gives the result."""

    def __init__(self, n_layer: int, n_expert: int, n_active: int, n_label: int):
        """n_label: how many dialects there are; tokens with a higher label have none."""
        self.n_expert, self.n_active, self.n_label = n_expert, n_active, n_label
        self.met: list[Counter] = [Counter() for _ in range(n_layer)]  # (*experts, dialect)
        self.load = torch.zeros(n_layer, n_expert, dtype=torch.float64)
        self.entropy = torch.zeros(n_layer, dtype=torch.float64)
        self.same = torch.zeros(n_layer, 2, dtype=torch.float64)  # first choice; any choice
        self.n_token = self.n_pair = 0

    def add(self, record: Sequence[Routing], counted: Tensor, labels: Tensor) -> None:
        """record: a Routing of each layer. counted, labels: (B, T), bool and int64."""
        flat, both = counted.flatten().cpu(), (counted[:, 1:] & counted[:, :-1]).cpu()
        known = flat & (labels.flatten().cpu() < self.n_label)
        self.n_token, self.n_pair = self.n_token + int(flat.sum()), self.n_pair + int(both.sum())
        for layer, routing in enumerate(record):
            chosen, p = routing.chosen.cpu(), routing.logits.float().softmax(dim=-1).cpu()
            self.load[layer] += loads(routing, counted.flatten()).cpu()
            self.met[layer].update(meetings(chosen[known], labels.flatten().cpu()[known]))
            self.entropy[layer] += (torch.special.entr(p).sum(dim=-1) * flat).sum()
            self.same[layer] += repeats(chosen.view(*counted.shape, -1), both)

    def numbers(self) -> dict[str, list]:
        """For the log, a number or a list of numbers for each layer, see the README."""
        shares = self.load / self.load.sum(dim=-1, keepdim=True)
        found = {
            "load": shares.tolist(),
            "dead_experts": (shares == 0).sum(dim=-1).tolist(),
            "busiest": (shares.max(dim=-1).values * self.n_expert).tolist(),
            "router_entropy": (self.entropy / max(1, self.n_token)).tolist(),
            "same_first": (self.same[:, 0] / max(1, self.n_pair)).tolist(),
            "same_any": (self.same[:, 1] / max(1, self.n_pair)).tolist(),
        }
        if any(self.met):
            found["information"] = [mutual_information(met) for met in self.met]
        return found


def meetings(chosen: Tensor, labels: Tensor) -> dict[tuple, int]:
    """How often each set of experts met each label: {(experts in order …, label): count}.

    chosen: (N, k). labels: (N,).
    """
    rows = torch.cat((chosen.sort(dim=-1).values, labels[:, None]), dim=-1)
    found, counts = rows.unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))


def repeats(chosen: Tensor, both: Tensor) -> Tensor:
    """(neighbours with the same first choice, neighbours that share any expert) (2,).

    Table 5 of arXiv:2401.04088. chosen: (B, T, k). both: (B, T − 1), whether token and successor
    count.
    """
    first = chosen[:, 1:, 0] == chosen[:, :-1, 0]
    shared = (chosen[:, 1:, :, None] == chosen[:, :-1, None, :]).flatten(2).any(dim=-1)
    counts = torch.stack([(first & both).sum(), (shared & both).sum()])
    return counts.cpu().double()  # MPS has no float64


def repeats_by_chance(n_expert: int, n_active: int) -> tuple[float, float]:
    """What `repeats` gives per pair if every token chooses at random: 1/8 and 46 % for 2 of 8."""
    apart = math.comb(n_expert - n_active, n_active) / math.comb(n_expert, n_active)
    return 1 / n_expert, 1 - apart


def mutual_information(met: dict[tuple, int]) -> float:
    """I(experts; dialect) in nats from `meetings`: Σ p(s, d) · log p(s, d) / (p(s) · p(d)).

    s is the set of experts that a token went to. It is 0 if the experts say nothing about the
    dialect. At most it is the entropy of the dialect, ln K for equally frequent ones: then one can
    tell the dialect from the experts.
    """
    total, sets, labels = sum(met.values()), Counter(), Counter()
    for (*experts, label), count in met.items():
        sets[tuple(experts)] += count
        labels[label] += count
    return sum(
        count / total * math.log(count * total / (sets[tuple(experts)] * labels[label]))
        for (*experts, label), count in met.items()
    )
