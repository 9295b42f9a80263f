"""The router, its bias and its groups; the experts; three ways of balancing on skewed data."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe import (
    Experts,
    MixtureOfExperts,
    Routing,
    SharedAndRouted,
    SigmoidRouter,
    dense,
    grouped,
    loads,
    loop,
    max_violation,
    move_biases,
    pairwise,
    recording,
    sequence_balance_sum,
)
from skew import WAYS, skewed_violations


def router(scores: list[float], n_active: int = 2, **changes) -> SigmoidRouter:
    """A router that gives a token with x = 1 these sigmoids."""
    it = SigmoidRouter(1, len(scores), n_active)
    it.gate.weight.data = torch.tensor(scores).logit()[:, None]
    for name, value in changes.items():
        assert hasattr(it, name)
        setattr(it, name, value)
    return it


def routed(it: SigmoidRouter) -> dict[int, float]:
    """Expert → weight for the token x = 1."""
    routing = it(torch.ones(1, 1), None)
    return dict(zip(routing.chosen[0].tolist(), routing.weights[0].tolist(), strict=True))


# ── The router ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("normalize", "factor", "expected"),
    [
        (True, 1.0, {3: 0.8 / 1.4, 1: 0.6 / 1.4}),
        (True, 2.5, {3: 2.5 * 0.8 / 1.4, 1: 2.5 * 0.6 / 1.4}),
        (False, 1.0, {3: 0.8, 1: 0.6}),
        (False, 2.5, {3: 2.0, 1: 1.5}),  # the factor counts without renormalising too
    ],
)
def test_four_flag_combinations_against_a_table(normalize, factor, expected):
    """Sigmoids 0.1, 0.6, 0.2 and 0.8; the best two are experts 3 and 1."""
    found = routed(router([0.1, 0.6, 0.2, 0.8], normalize=normalize, factor=factor))
    assert list(found) == [3, 1] and found == pytest.approx(expected, rel=1e-5)


def test_softmax_scores_are_those_of_deepseek_v2():
    """Logits ln 1, ln 6, ln 2 and ln 3 make softmax scores of twelfths, used as they are."""
    it = router([0.5] * 4, normalize=False, softmax=True)
    it.gate.weight.data = torch.tensor([[1.0], [6.0], [2.0], [3.0]]).log()
    assert routed(it) == pytest.approx({1: 0.5, 3: 0.25})


def test_bias_chooses_and_never_weighs():
    """Expert 0 is lifted over expert 1; its weight is made of its own 0.1."""
    it = router([0.1, 0.6, 0.2, 0.8])
    it.bias[0] = 0.6
    assert routed(it) == pytest.approx({3: 0.8 / 0.9, 0: 0.1 / 0.9}, rel=1e-5)


@given(shift=st.floats(-12, 12))
def test_a_constant_added_to_all_biases_changes_no_weight(shift):
    it, x = SigmoidRouter(6, 8, 3), torch.randn(20, 6)
    it.n_group, it.n_active_group, it.factor = 4, 2, 2.5
    it.double()
    it.bias.normal_(std=0.1)
    before = it(x.double(), None)
    it.bias += shift
    after = it(x.double(), None)
    assert torch.equal(before.chosen, after.chosen) and torch.equal(before.weights, after.weights)


@pytest.mark.parametrize("bias", [12.0, -12.0])
def test_weights_are_not_what_is_left_when_the_bias_is_taken_off(bias):
    """Scores of 1e-8 beside a bias of ±12: score + bias − bias would be 0 in float32."""
    found = routed(router([1e-8, 3e-8, 1e-9], normalize=False) if bias > 0 else lifted(bias))
    assert sorted(found.values()) == pytest.approx([1e-8, 3e-8], rel=1e-3)
    it = router([1e-8, 3e-8, 1e-9], normalize=True)
    it.bias += bias
    it.bias[2] -= 1
    assert sorted(routed(it).values()) == pytest.approx([0.25, 0.75], rel=1e-3)


def lifted(bias: float) -> SigmoidRouter:
    it = router([1e-8, 3e-8, 1e-9], normalize=False)
    it.bias += torch.tensor([bias, bias, bias - 1])
    return it


def brute_force(scores: torch.Tensor, k: int, n_group: int, n_active_group: int) -> set[int]:
    """The k best of the groups with the largest sum of their two best, by trying them all."""
    size = len(scores) // n_group
    groups = [range(g * size, (g + 1) * size) for g in range(n_group)]
    worth = [sum(sorted((scores[e].item() for e in group), reverse=True)[:2]) for group in groups]
    allowed = max(
        itertools.combinations(range(n_group), n_active_group),
        key=lambda gs: sum(worth[g] for g in gs),
    )
    members = [e for g in allowed for e in groups[g]]
    return set(
        max(itertools.combinations(members, k), key=lambda es: sum(scores[e].item() for e in es))
    )


@pytest.mark.parametrize(
    ("n_group", "n_active_group", "k"), [(4, 2, 3), (4, 1, 2), (2, 1, 4), (8, 3, 3), (1, 1, 3)]
)
def test_grouped_choice_is_that_of_brute_force(n_group, n_active_group, k):
    """Global expert numbers, negative scores too; groups of a single expert as well."""
    it = SigmoidRouter(5, 8, k)
    it.n_group, it.n_active_group = n_group, n_active_group
    it.bias.normal_()
    x = torch.randn(50, 5)
    routing = it(x, None)
    choice = it.scores(routing.logits) + it.bias
    for scores, chosen in zip(choice, routing.chosen.tolist(), strict=True):
        assert set(chosen) == brute_force(scores, k, n_group, n_active_group)


def test_tiny_sizes_have_the_bias_too():
    """DeepSeek's own code makes it for one width alone (`if self.dim == 7168`)."""
    assert SigmoidRouter(2, 3, 1).bias.shape == (3,)
    assert "bias" in SigmoidRouter(2, 3, 1).state_dict()


def test_no_gradient_reaches_the_bias():
    """Not a parameter; and where one asks for its gradient, there is none to give."""
    it = SigmoidRouter(6, 8, 3)
    assert [name for name, _ in it.named_parameters()] == ["gate.weight"]
    it.bias.requires_grad_()
    it(torch.randn(20, 6), None).weights.sum().backward()
    assert it.bias.grad is None and it.gate.weight.grad is not None


def test_scores_are_float32_under_autocast():
    it = SigmoidRouter(6, 8, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert it(torch.randn(4, 6), None).logits.dtype == torch.float32


# ── The experts ───────────────────────────────────────────────────────────────────────────────────


def experts(n_expert: int = 5) -> Experts:
    it = Experts(n_expert, 6, 7)
    for weight in it.parameters():
        nn.init.normal_(weight)
    return it.double()


def test_ways_to_dispatch_are_one():
    it, x = experts(), torch.randn(30, 6, dtype=torch.float64)
    chosen = torch.rand(30, 5).topk(3).indices
    routing = Routing(torch.zeros(30, 5), chosen, torch.rand(30, 3, dtype=torch.float64))
    expected = loop(it, x, routing)
    for way in (grouped, dense):
        assert torch.allclose(way(it, x, routing), expected, rtol=0, atol=1e-12)
    assert torch.allclose(pairwise(it, x, routing), expected, rtol=0, atol=1e-12)


def test_shared_experts_work_on_every_token():
    """Routed weights of 0 leave the shared layer alone."""
    routed_layer, shared = experts(), nn.Linear(6, 6).double()
    layer = SharedAndRouted(SigmoidRouter(6, 5, 2).double(), routed_layer, shared)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    plain = MixtureOfExperts(layer.router, routed_layer)
    assert torch.allclose(layer(x), plain(x) + shared(x), atol=1e-12)
    layer.router.factor = 0.0
    assert torch.equal(layer(x), shared(x))


def test_one_expert_for_all_is_a_plain_layer():
    """One routed expert with weight 1: the mixture is a feed-forward layer."""
    it, x = experts(1), torch.randn(4, 6, dtype=torch.float64)
    layer = MixtureOfExperts(SigmoidRouter(6, 1, 1).double(), it)
    expected = (nn.functional.silu(x @ it.w1[0].T) * (x @ it.w3[0].T)) @ it.w2[0].T
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_a_recording_has_every_layer_once():
    layers = nn.Sequential(*(SharedAndRouted(SigmoidRouter(6, 5, 2).double(), experts(),
                                             nn.Identity()) for _ in range(3)))  # fmt: skip
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    with recording(layers) as record:
        layers(x)
    assert len(record) == 3 and all(layer.record is None for layer in layers)


# ── Balance ───────────────────────────────────────────────────────────────────────────────────────


def test_sequence_loss_by_hand():
    """Two experts, one of them chosen. Row 1: expert 0 twice; row 2: expert 0, then expert 1.

    Row 1 has f = (2/1·2/2, 0) = (2, 0) and P = (0.75, 0.25): 1.5 a token. Row 2 has f = (1, 1):
    1 a token whatever P is. Two tokens each: 2·1.5 + 2·1 = 5.
    """
    scores = torch.tensor([[0.6, 0.2], [0.6, 0.2], [0.6, 0.2], [0.2, 0.6]])
    routing = Routing(scores, torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1))
    counted = torch.ones(2, 2, dtype=torch.bool)
    assert sequence_balance_sum(routing, scores, counted).item() == pytest.approx(5.0)


def test_padding_counts_in_no_loss_and_no_load():
    scores = torch.rand(12, 5)
    routing = Routing(scores, scores.topk(2).indices, torch.ones(12, 2))
    counted = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    short = Routing(scores[6:8], routing.chosen[6:8], routing.weights[6:8])
    first = Routing(scores[:6], routing.chosen[:6], routing.weights[:6])
    alone = sequence_balance_sum(first, scores[:6], counted[:1])
    alone = alone + sequence_balance_sum(short, scores[6:8], counted[1:, :2])
    assert sequence_balance_sum(routing, scores, counted).item() == pytest.approx(alone.item())
    assert loads(routing, counted.flatten()).sum() == 2 * 8


def test_violation_by_hand():
    assert max_violation(torch.tensor([4.0, 2.0, 0.0, 2.0])).item() == 1.0
    assert max_violation(torch.full((2, 4), 3.0)).tolist() == [0.0, 0.0]


def test_bias_of_the_busy_falls_and_that_of_the_idle_rises():
    it = SigmoidRouter(2, 4, 1)
    move_biases(it, torch.tensor([9.0, 3.0, 0.0, 0.0]), 0.01)
    assert it.bias.tolist() == pytest.approx([-0.01, 0.0, 0.01, 0.01])


def test_bias_and_loss_lower_the_violation_within_50_skewed_steps_and_nothing_does_not():
    runs = {way: skewed_violations(way) for way in WAYS}
    begin, end = (
        {w: sum(r[at]) / 5 for w, r in runs.items()} for at in (slice(5), slice(-5, None))
    )
    assert begin["none"] > 1.0 and end["none"] > 0.8 * begin["none"]
    assert end["bias"] < 0.4 * begin["bias"]
    assert end["loss"] < 0.7 * begin["loss"]
    assert end["bias"] < end["none"] and end["loss"] < end["none"]
