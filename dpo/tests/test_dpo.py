"""dpo.py against its formulas in float64, by hand, and by its own gradients."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dpo

LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def numbers():
    """policy, reference (7, 3) and lengths (7, 3) of made-up answers, float64."""
    policy = -20 * torch.rand(7, 3, dtype=torch.float64) - 0.1
    reference = -20 * torch.rand(7, 3, dtype=torch.float64) - 0.1
    return policy, reference, torch.randint(1, 9, (7, 3)).double()


def test_the_idea_imports_torch_alone():
    tree = ast.parse(Path(dpo.__file__).read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"math", "torch", "torch.nn.functional"}


# ── Log-probabilities ─────────────────────────────────────────────────────────────────────────────


def lookup_logits(tokens: torch.Tensor) -> torch.Tensor:
    """A model of 3 tokens that looks at one token only: after 0 come 0, 1, 2 as 1:2:1."""
    table = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    return table.log()[tokens] + 3.0  # scores need not be normalised


def test_log_probability_by_hand():
    """Tokens 1 | 2 0: p(2 after 1) = 2/4, p(0 after 2) = 6/8, so Σ log p = log(1/2 · 3/4)."""
    tokens = torch.tensor([[1, 2, 0]])
    said = torch.tensor([[False, True, True]])
    total, count = dpo.response_logps(lookup_logits(tokens), tokens, said)
    assert total.item() == pytest.approx(math.log(0.5 * 0.75), abs=1e-12) and count.item() == 2


def test_the_mask_is_shifted_with_the_tokens():
    """Only the last prompt position and the answer's own, but for its last, can matter."""
    tokens = torch.randint(5, (1, 8))
    said = torch.arange(8)[None] >= 4
    logits = torch.randn(1, 8, 5, dtype=torch.float64)
    first, _ = dpo.response_logps(logits, tokens, said)
    for place in range(8):
        other = logits.clone()
        other[0, place] += torch.randn(5, dtype=torch.float64)
        changed = dpo.response_logps(other, tokens, said)[0] != first
        assert bool(changed) == (3 <= place <= 6), place


@pytest.mark.parametrize("filling", [0, 1])
def test_filling_counts_for_nothing_and_id_0_counts(filling):
    """As `label != 0` and `label != pad` have it wrong: an answer may hold the id that fills up."""
    tokens = torch.tensor([[1, 2, 0, 0, 1]])
    said = torch.tensor([[False, True, True, True, True]])
    short, count = dpo.response_logps(lookup_logits(tokens), tokens, said)
    assert count.item() == 4
    by_hand = math.log(2 / 4) + math.log(6 / 8) + math.log(1 / 4) + math.log(2 / 4)
    assert short.item() == pytest.approx(by_hand, abs=1e-12)
    for more in (1, 7):
        wide = F.pad(tokens, (0, more), value=filling)
        long, _ = dpo.response_logps(lookup_logits(wide), wide, F.pad(said, (0, more)))
        assert long.item() == short.item()


def test_sums_of_16_bit_logits_are_float32():
    """In bfloat16 the sum of 300 such numbers, about −3000, is off by nats."""
    logits = (3 * torch.randn(1, 400, 500)).bfloat16()
    tokens, said = torch.randint(500, (1, 400)), torch.arange(400)[None] >= 100
    found, _ = dpo.response_logps(logits, tokens, said)
    wanted, _ = dpo.response_logps(logits.double(), tokens, said)
    assert found.dtype == torch.float32 and abs(found.item() - wanted.item()) < 0.01


# ── Losses ────────────────────────────────────────────────────────────────────────────────────────


def by_formula(kind, w, v, rw, rv, nw, nv, beta, flip, gamma, z):
    """The loss of one pair, from floats, as the papers write it."""
    h = (w - rw) - (v - rv)
    good, bad = -math.log(sigmoid(beta * h)), -math.log(sigmoid(-beta * h))
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (w / nw, v / nv)]
    return {
        "dpo": good,
        "cdpo": (1 - flip) * good + flip * bad,
        "rdpo": ((1 - flip) * good - flip * bad) / (1 - 2 * flip),
        "ipo": (h - 1 / (2 * beta)) ** 2,
        "ipo-mean": ((w - rw) / nw - (v - rv) / nv - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - beta * h),
        "kto": (2 - sigmoid(beta * (w - rw - z)) - sigmoid(beta * (z - (v - rv)))) / 2,
        "orpo": -w / nw - beta * math.log(sigmoid(odds[0] - odds[1])),
        "simpo": -math.log(sigmoid(beta * (w / nw - v / nv) - gamma)),
    }[kind]


@pytest.mark.parametrize("kind", dpo.LOSSES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_every_loss_is_its_formula(numbers, kind, beta):
    policy, reference, lengths = numbers
    flip, gamma = 0.2, 0.4
    found = dpo.preference_loss(kind, policy, reference, lengths, beta, flip, gamma)
    z = max(0.0, (policy - reference)[:, 2].mean().item())
    for i in range(7):
        (w, v, _), (rw, rv, _) = policy[i].tolist(), reference[i].tolist()
        nw, nv, _ = lengths[i].tolist()
        wanted = by_formula(kind, w, v, rw, rv, nw, nv, beta, flip, gamma, z)
        assert found[i].item() == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_an_unknown_loss_is_refused(numbers):
    with pytest.raises(ValueError, match="there is no loss ppo"):
        dpo.preference_loss("ppo", *numbers)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_the_loss_starts_at_ln_2(numbers, beta):
    policy, _, lengths = numbers
    for kind in ("dpo", "cdpo", "rdpo"):
        loss = dpo.preference_loss(kind, policy, policy.clone(), lengths, beta, flip=0.3)
        assert (loss - LN2).abs().max() < 1e-12, kind


def test_large_margins_stay_finite():
    h = torch.tensor([-1e4, 0.0, 1e4])
    assert dpo.dpo_loss(h, 1.0).tolist() == [1e4, pytest.approx(LN2), 0.0]
    assert dpo.log_odds(torch.tensor([-1e-9, -1e-3, -50.0], dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("p", [1e-12, 0.2, 0.5, 0.9, 1 - 1e-9])
def test_log_odds_keeps_its_digits(p):
    logp = torch.tensor(math.log(p), dtype=torch.float64)
    wanted = math.log(p) - math.log(-math.expm1(math.log(p)))
    assert dpo.log_odds(logp).item() == pytest.approx(wanted, rel=1e-9)
    leaf = logp.clone().requires_grad_()
    dpo.log_odds(leaf).backward()
    assert leaf.grad.item() == pytest.approx(-1 / math.expm1(math.log(p)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_answer_that_is_certain_has_a_finite_gradient(dtype):
    """log p is rounded to 0 where p is nearly 1, and 1 − p to 0 with it."""
    means = torch.tensor([[0.0, -1.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    loss = dpo.orpo_loss(means, 0.5)
    loss.sum().backward()
    assert loss.isfinite().all() and means.grad.isfinite().all()


def test_gradient_identity():
    """∇L = −β·σ(−β·h)·(∇log π(y_w) − ∇log π(y_l)), on a table of scores, by autograd."""
    scores = torch.randn(6, dtype=torch.float64, requires_grad=True)
    reference, beta = torch.randn(6, dtype=torch.float64).log_softmax(0), 0.3

    def logp(y):
        return scores.log_softmax(0)[y]

    h = (logp(1) - reference[1]) - (logp(4) - reference[4])
    (found,) = torch.autograd.grad(dpo.dpo_loss(h, beta), scores)
    (chosen,) = torch.autograd.grad(logp(1), scores)
    (rejected,) = torch.autograd.grad(logp(4), scores)
    wanted = -beta * torch.sigmoid(-beta * h) * (chosen - rejected)
    assert (found - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("kind", dpo.LOSSES)
def test_gradients_by_finite_differences(numbers, kind):
    """KTO's z is meant to have none, so its estimate is held at 0 here."""
    policy, reference, lengths = numbers
    if kind == "kto":
        policy[:, 2] = reference[:, 2] - 1.0
    policy = policy.requires_grad_()
    loss = lambda x: dpo.preference_loss(kind, x, reference, lengths, 0.3, 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (policy,))


def test_the_estimate_of_kto_has_no_gradient():
    ratios = torch.tensor([[0.5, -0.2, 2.0]], requires_grad=True)
    dpo.kto_loss(ratios, 0.3).sum().backward()
    assert ratios.grad[0, 2] == 0 and (ratios.grad[0, :2] != 0).all()


def test_rdpo_is_unbiased_and_cdpo_is_not():
    """Of a label that is flipped with probability ε: E[rDPO] is DPO of the true label."""
    h, flip = torch.randn(9, dtype=torch.float64), 0.2
    true = dpo.dpo_loss(h, 0.5)
    for loss, holds in ((dpo.rdpo_loss, True), (dpo.cdpo_loss, False)):
        mean = (1 - flip) * loss(h, 0.5, flip) + flip * loss(-h, 0.5, flip)
        assert torch.allclose(mean, true, atol=1e-12) == holds


def test_where_cdpo_and_ipo_stop():
    """The best h of cDPO is log((1 − ε)/ε)/β, that of IPO 1/(2β)."""
    beta, flip = 0.4, 0.1
    for h, loss in ((math.log(0.9 / 0.1) / beta, lambda x: dpo.cdpo_loss(x, beta, flip)),
                    (1 / (2 * beta), lambda x: dpo.ipo_loss(x, beta))):  # fmt: skip
        at = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        loss(at).backward()
        assert abs(at.grad.item()) < 1e-12


# ── Metrics ───────────────────────────────────────────────────────────────────────────────────────


def test_metrics_by_hand():
    """β = 0.5; log-ratios 2 and −1: rewards 1 and −0.5, margin 1.5, and −log σ(1.5) is the loss."""
    policy, reference = torch.tensor([[-3.0, -6.0]]), torch.tensor([[-5.0, -5.0]])
    found = {k: x.item() for k, x in dpo.metrics(policy, reference, 0.5).items()}
    assert found == {"reward_chosen": 1.0, "reward_rejected": -0.5, "margin": 1.5, "accuracy": 1.0,
                     "logp_chosen": -3.0, "logp_rejected": -6.0}  # fmt: skip
    loss = dpo.preference_loss("dpo", policy, reference, torch.ones(1, 2), 0.5)
    assert loss.item() == pytest.approx(-math.log(sigmoid(found["margin"])), abs=1e-6)


def test_a_tie_is_half_right():
    policy = torch.tensor([[-1.0, -1.0], [-1.0, -2.0], [-2.0, -1.0]])
    assert dpo.metrics(policy, torch.zeros(3, 2), 0.1)["accuracy"].tolist() == [0.5, 1.0, 0.0]


def test_kl_from_samples_is_the_exact_one():
    dice = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, generator=dice, dtype=torch.float64).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(p.exp(), 40_000, replacement=True, generator=dice)
    found, error = dpo.monte_carlo_kl(p[drawn], q[drawn])
    assert abs(found - (p.exp() * (p - q)).sum().item()) < 4 * error < 0.1


def test_the_floor_by_hand():
    """A gap of ln 3: p = 3/4, and the entropy is −¾·ln ¾ − ¼·ln ¼."""
    gap = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    wanted = [LN2, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)]
    assert dpo.bradley_terry_floor(gap).tolist() == pytest.approx(wanted, abs=1e-12)
    assert torch.equal(dpo.bradley_terry_floor(gap), dpo.bradley_terry_floor(-gap))
