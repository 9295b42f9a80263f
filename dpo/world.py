"""A world so small that the truth can be computed: every answer, its probability, its reward.

An answer is a word of up to four letters: k (somebody is kind), u (unkind), o (neither). There are
1 + 3 + 9 + 27 + 81 = 121 of them. The true reward is r(y) = number of k − number of u. The
reference π_ref writes letter by letter, with the probabilities of a random table. So nothing has to
be sampled or judged: sums over 121 answers give every expectation exactly.

What a policy can reach is known. Among all policies with the same KL(π‖π_ref), which is how far it
went from the reference, the largest expected reward has

    π*(y) ∝ π_ref(y) · exp(r(y) / β)        (Rafailov et al. 2023, arXiv:2305.18290, Eq. 4)

for some β. Small β: far away and high reward. The curve of these policies is the frontier.

All numbers are float64. Key: N = 121 answers.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo import bradley_terry, bradley_terry_floor, preference_loss

LETTERS, LONGEST = "kou", 4
VALUES = {"k": 1.0, "o": 0.0, "u": -1.0}


@dataclass(frozen=True)
class World:
    """answers: N texts; log_ref, reward: (N,), the reference's log-probabilities and the truth."""

    answers: tuple[str, ...]
    log_ref: Tensor
    reward: Tensor


def make_world(seed: int = 0) -> World:
    """The world whose reference has this seed."""
    answers = tuple(
        "".join(word) for n in range(LONGEST + 1) for word in itertools.product(LETTERS, repeat=n)
    )
    dice = torch.Generator().manual_seed(seed)
    table = torch.randn(LONGEST, 1 + len(LETTERS), len(LETTERS) + 1, generator=dice).double() / 2
    log_table = table.log_softmax(dim=-1)  # (place, letter before or none, next letter or end)
    log_ref = torch.stack([log_prob(answer, log_table) for answer in answers])
    reward = torch.tensor([sum(VALUES[x] for x in y) for y in answers], dtype=torch.float64)
    return World(answers, log_ref, reward)


def log_prob(answer: str, log_table: Tensor) -> Tensor:
    """log π_ref(answer) by the chain rule, letter by letter; after four letters it has to end."""
    total, before = torch.zeros((), dtype=torch.float64), len(LETTERS)
    for place, letter in enumerate(answer):
        number = LETTERS.index(letter)
        total = total + log_table[place, before, number]
        before = number
    if len(answer) < LONGEST:
        total = total + log_table[len(answer), before, len(LETTERS)]
    return total


# ── The truth ─────────────────────────────────────────────────────────────────────────────────────


def kl(log_p: Tensor, world: World) -> float:
    """KL(p‖π_ref) = Σ p·(log p − log π_ref), in nats."""
    return (log_p.exp() * (log_p - world.log_ref)).sum().item()


def mean_reward(log_p: Tensor, world: World) -> float:
    """Σ p·r."""
    return (log_p.exp() * world.reward).sum().item()


def optimal(world: World, beta: float) -> Tensor:
    """log π* for this β."""
    return (world.log_ref + world.reward / beta).log_softmax(dim=0)


def best_reward(world: World, wanted: float) -> float:
    """The largest expected reward of any policy with KL = `wanted` nats: the frontier.

    Found by bisection, since the KL of π* falls as β grows.
    """
    low, high = 1e-3, 1e6
    for _ in range(200):
        beta = math.sqrt(low * high)
        if kl(optimal(world, beta), world) > wanted:
            low = beta
        else:
            high = beta
    return mean_reward(optimal(world, beta), world)


# ── Preferences ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Labels:
    """first, second: (M,) numbers of answers; weight: (M,) how often they are compared, Σ = 1;
    wins: (M,) how often the first is then called the better one."""

    first: Tensor
    second: Tensor
    weight: Tensor
    wins: Tensor


def all_labels(world: World, flip: float = 0.0) -> Labels:
    """Every pair, as often as π_ref would write it, with the Bradley–Terry labels of infinite data.

    flip: the probability with which a label is turned round afterwards.
    """
    first, second = torch.triu_indices(len(world.answers), len(world.answers), 1)
    weight = (world.log_ref[first] + world.log_ref[second]).exp()
    wins = bradley_terry(world.reward[first] - world.reward[second])
    wins = (1 - flip) * wins + flip * (1 - wins)
    return Labels(first, second, weight / weight.sum(), wins)


def drawn_labels(world: World, n_pair: int, seed: int, flip: float = 0.0) -> Labels:
    """Few pairs, written by π_ref and labelled once each, as real data are."""
    dice = torch.Generator().manual_seed(seed)
    p = world.log_ref.exp()
    first = torch.multinomial(p, n_pair, replacement=True, generator=dice)
    second = torch.multinomial(p, n_pair, replacement=True, generator=dice)
    gap = world.reward[first] - world.reward[second]
    chance = (1 - flip) * bradley_terry(gap) + flip * bradley_terry(-gap)
    wins = (torch.rand(n_pair, generator=dice, dtype=torch.float64) < chance).double()
    return Labels(first, second, torch.full((n_pair,), 1 / n_pair, dtype=torch.float64), wins)


def floor(world: World, labels: Labels) -> float:
    """The least DPO loss on such pairs with no label flipped: the labels' entropy, in nats."""
    gap = world.reward[labels.first] - world.reward[labels.second]
    return (labels.weight * bradley_terry_floor(gap)).sum().item()


def expected_loss(
    log_p: Tensor, world: World, labels: Labels, kind: str, beta: float, flip: float = 0.0
) -> Tensor:
    """The loss `kind` of dpo.py, averaged over the pairs and over both labels of each.

    Any kind but KTO, which needs an answer to another prompt: here there is one prompt alone.
    """
    policy = torch.stack((log_p[labels.first], log_p[labels.second]), dim=-1)  # (M, 2)
    reference = torch.stack((world.log_ref[labels.first], world.log_ref[labels.second]), dim=-1)
    ones = torch.ones_like(policy)
    won = preference_loss(kind, policy, reference, ones, beta, flip)
    lost = preference_loss(kind, policy.flip(-1), reference.flip(-1), ones, beta, flip)
    return (labels.weight * (labels.wins * won + (1 - labels.wins) * lost)).sum()


def regularised_reward(log_p: Tensor, world: World, beta: float) -> Tensor:
    """E[r] − β·KL, which reinforcement learning from feedback climbs (Eq. 3); its top is π*."""
    p = log_p.exp()
    return (p * world.reward).sum() - beta * (p * (log_p - world.log_ref)).sum()


def reinforce_gradient(log_p: Tensor, world: World, beta: float) -> Tensor:
    """E_π[(r − β·log(π/π_ref) − b)·∇log π] with respect to the scores of a softmax: (N,).

    REINFORCE (Williams 1992) with its expectation taken exactly, instead of from samples; b is the
    mean of what stands before it. ∇log π(y) is (one at y) − π.
    """
    p = log_p.exp()
    gain = world.reward - beta * (log_p - world.log_ref)
    return p * (gain - (p * gain).sum())


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def policy_of(scores: Tensor, world: World, features: Tensor | None = None) -> Tensor:
    """log π = log softmax(log π_ref + scores): zeros are the reference.

    features: (N, F) makes answers share what is learned: the scores are features @ scores.
    """
    change = scores if features is None else features @ scores
    return (world.log_ref + change).log_softmax(dim=0)


def solve(loss: Callable[[Tensor], Tensor], n: int, steps: int = 2000) -> Tensor:
    """The n scores that make `loss` least, by L-BFGS with exact gradients from zeros."""
    scores = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores], max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-16, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(scores)
        value.backward()
        return value

    optimizer.step(closure)
    return scores.detach()


def train(world: World, labels: Labels, kind: str, beta: float, flip: float = 0.0) -> Tensor:
    """log π after training with a loss of dpo.py to its end."""
    scores = solve(
        lambda s: expected_loss(policy_of(s, world), world, labels, kind, beta, flip),
        len(world.answers),
    )
    return policy_of(scores, world)


def train_reinforce(world: World, beta: float) -> Tensor:
    """log π after climbing E[r] − β·KL to its top, on the gradient of `reinforce_gradient`.

    Autograd computes the same gradient from the expectation itself (a test compares the two).
    """
    scores = solve(
        lambda s: -regularised_reward(policy_of(s, world), world, beta), len(world.answers)
    )
    return policy_of(scores, world)


def path(
    loss: Callable[[Tensor], Tensor], n: int, steps: int, every: int, lr: float = 0.05
) -> list[Tensor]:
    """The scores on the way, by Adam with exact gradients: at step 0 and after each `every`."""
    scores = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    optimizer, found = torch.optim.Adam([scores], lr=lr), [scores.detach().clone()]
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss(scores).backward()
        optimizer.step()
        if step % every == 0:
            found.append(scores.detach().clone())
    return found
