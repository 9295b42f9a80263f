"""Fifty steps of a router on skewed data, balanced by a bias, by a loss, or by nothing.

Random tokens, all with a constant beside them for which the router has a liking: it gives the first
of eight experts high scores and the last one low scores. A second of work, and the smallest case in
which the ways of balancing can be told apart; `--experiment balance` compares them in training.
"""

import torch

from moe import SigmoidRouter, loads, max_violation, move_biases, sequence_balance_sum

SKEW = torch.linspace(1.5, -1.5, 8)  # added to the scores of eight experts, before the sigmoid
N_STEP, ROWS, LENGTH = 50, 8, 32
WAYS = ("none", "loss", "bias")


def skewed_violations(way: str, bias_speed: float = 0.02, lr: float = 2.0) -> list[float]:
    """MaxVio of each step; `loss` follows the loss of each row by plain gradient descent."""
    dice = torch.Generator().manual_seed(0)
    router, found = SigmoidRouter(9, 8, 2), []
    weight = torch.randn(8, 9, generator=dice) / 3
    weight[:, 8] = SKEW
    router.gate.weight.data = weight
    optimizer = torch.optim.SGD(router.parameters(), lr=lr)
    counted = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    for _ in range(N_STEP):
        noise = torch.randn(counted.numel(), 8, generator=dice)
        routing = router(torch.cat((noise, torch.ones(len(noise), 1)), dim=1), None)
        load = loads(routing, counted.flatten())
        found.append(round(max_violation(load).item(), 4))
        if way == "bias":
            move_biases(router, load, bias_speed)
        elif way == "loss":
            balance = sequence_balance_sum(routing, router.scores(routing.logits), counted)
            (balance / counted.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found
