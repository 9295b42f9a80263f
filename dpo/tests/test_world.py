"""The enumerable world: what is called exact is, and the trained policies get there."""

import itertools
import math

import pytest
import torch

import dpo
import experiments
import world


@pytest.fixture(scope="module")
def here():
    return world.make_world()


def test_all_answers_are_there_once_and_their_probabilities_sum_to_1(here):
    assert len(set(here.answers)) == len(here.answers) == 1 + 3 + 9 + 27 + 81
    assert here.log_ref.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert here.reward[here.answers.index("kkuo")] == 1


def test_the_best_policy_is_the_best(here):
    """E[r] − β·KL is largest at π*, and there it is β·log Σ π_ref·exp(r/β)."""
    beta = 0.7
    best = world.regularised_reward(world.optimal(here, beta), here, beta).item()
    value = beta * torch.logsumexp(here.log_ref + here.reward / beta, 0).item()
    assert best == pytest.approx(value, abs=1e-12)
    for _ in range(50):
        other = (here.log_ref + torch.randn(121).double()).log_softmax(0)
        assert world.regularised_reward(other, here, beta) < best


def test_the_frontier_grows_and_starts_at_the_reference(here):
    rewards = [world.best_reward(here, kl) for kl in (1e-9, 0.1, 0.5, 1, 2, 4)]
    assert rewards == sorted(rewards)
    assert rewards[0] == pytest.approx(world.mean_reward(here.log_ref, here), abs=1e-3)
    beta = 0.7
    best = world.optimal(here, beta)
    assert world.best_reward(here, world.kl(best, here)) == pytest.approx(
        world.mean_reward(best, here), abs=1e-9
    )


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_dpo_reaches_the_best_policy(here, beta):
    """Asked is within 1 % of π*'s reward at equal KL; it is within 1e-5."""
    labels = world.all_labels(here)
    log_p = world.train(here, labels, "dpo", beta)
    found = experiments.point(log_p, here)
    assert found["reward"] == pytest.approx(found["best"], rel=1e-5)
    assert found["kl"] == pytest.approx(world.kl(world.optimal(here, beta), here), rel=1e-4)
    loss = world.expected_loss(log_p, here, labels, "dpo", beta).item()
    assert loss - world.floor(here, labels) < 1e-9


def test_the_floor_is_below_every_other_policy(here):
    labels = world.all_labels(here)
    for _ in range(20):
        other = (here.log_ref + torch.randn(121).double()).log_softmax(0)
        loss = world.expected_loss(other, here, labels, "dpo", 1.0).item()
        assert loss > world.floor(here, labels)


def test_ipo_reaches_what_its_paper_says(here):
    """log π/π_ref = p(y better than an answer of π_ref)/τ + const (arXiv:2310.12036, §4)."""
    beta = 0.8
    found = world.train(here, world.all_labels(here), "ipo", beta)
    p = here.log_ref.exp()
    better = dpo.bradley_terry(here.reward[:, None] - here.reward[None]) @ p
    wanted = (here.log_ref + better / beta).log_softmax(0)
    assert (found.exp() - wanted.exp()).abs().sum() < 1e-6


def test_reinforce_with_kl_reaches_the_best_policy(here):
    log_p = world.train_reinforce(here, 1.0)
    assert (log_p.exp() - world.optimal(here, 1.0).exp()).abs().sum() < 1e-4


def test_the_gradient_of_reinforce_is_that_of_its_aim(here):
    scores = torch.randn(121, dtype=torch.float64, requires_grad=True)
    aim = world.regularised_reward(world.policy_of(scores, here), here, 0.6)
    (wanted,) = torch.autograd.grad(aim, scores)
    found = world.reinforce_gradient(world.policy_of(scores.detach(), here), here, 0.6)
    assert (found - wanted).abs().max() < 1e-12


def test_flipped_labels_only_rdpo_recovers_the_reward(here):
    """With 20 % flipped: rDPO reads the true reward, DPO less than half of it, cDPO a quarter."""
    rows = {row["loss"]: row for row in experiments.noise(here) if row["flip"] == 0.2}
    assert rows["rdpo"]["error"] < 1e-3 and rows["rdpo"]["slope"] == pytest.approx(1, abs=1e-4)
    assert 0.3 < rows["dpo"]["slope"] < 0.6 and rows["cdpo"]["slope"] < 0.7 * rows["dpo"]["slope"]
    assert rows["rdpo"]["reward"] == pytest.approx(rows["rdpo"]["best"], rel=1e-4)


def test_both_rewards_fall_while_the_policy_gets_better(here):
    """Likelihood displacement, at every step after the first."""
    rows = experiments.displacement(here)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    for a, b in itertools.pairwise(rows):
        assert b["rejected"] < b["chosen"] < 0 and b["chosen"] < a["chosen"]
        assert b["loss"] < a["loss"] and b["reward"] > a["reward"]
        assert b["elsewhere"] > a["elsewhere"]


def test_few_labels_lead_further_than_the_truth(here):
    """A draw of labels on which DPO's true reward rises and then falls below its start."""
    rows = experiments.one_path(here, "dpo", experiments.OVER["dpo"], 1)
    assert rows[-1]["loss"] < min(row["loss"] for row in rows[:-1]) + 1e-9
    assert experiments.fall(rows) > 0.5 and rows[-1]["reward"] < rows[0]["reward"]
    ipo = experiments.one_path(here, "ipo", experiments.OVER["ipo"], 1)
    assert ipo[-1]["kl"] < rows[-1]["kl"] / 2 and experiments.fall(ipo) < 0.2


def test_small_beta_goes_far(here):
    rows = experiments.beta_table(here)
    assert [row["kl"] for row in rows] == sorted((row["kl"] for row in rows), reverse=True)
    assert [row["reward"] for row in rows] == sorted((r["reward"] for r in rows), reverse=True)


def test_drawn_labels_have_the_right_frequencies(here):
    """Many draws: how often the first of a pair wins is σ(gap), turned round by flips."""
    for flip in (0.0, 0.3):
        drawn = world.drawn_labels(here, 40_000, 0, flip)
        gap = here.reward[drawn.first] - here.reward[drawn.second]
        for value in (-1.0, 0.0, 2.0):
            chance = 1 / (1 + math.exp(-value))
            wanted = (1 - flip) * chance + flip * (1 - chance)
            assert drawn.wins[gap == value].mean().item() == pytest.approx(wanted, abs=0.03)
