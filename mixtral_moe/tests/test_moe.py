"""The layer itself, in float64: who gets which token, three ways to compute it, and balance."""

import itertools
import math
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import generate
import moe
from model import Mixtral, MixtralConfig
from moe import (
    Experts,
    MixtureOfExperts,
    Routing,
    SegmentProduct,
    SoftmaxRouter,
    balance_loss_sum,
    dense,
    grouped,
    loads,
    loop,
    recording,
    z_loss_sum,
)

WAYS = [loop, grouped, dense]


def layer(n_expert: int = 5, n_active: int = 2, d_model: int = 8, d_ff: int = 6):
    """A layer in float64, with weights of a size that makes errors visible."""
    router, experts = SoftmaxRouter(d_model, n_expert, n_active), Experts(n_expert, d_model, d_ff)
    mixture = MixtureOfExperts(router, experts).double()
    for weight in mixture.parameters():
        nn.init.normal_(weight, std=0.5)
    return mixture


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def routing_of(mixture: MixtureOfExperts, x: torch.Tensor, counted=None) -> Routing:
    with recording(mixture, counted) as record:
        mixture(x)
    return record[0]


def scores(*rows: list[float]) -> Routing:
    """The routing to 2 of the experts with these logits."""
    logits = torch.tensor(rows, dtype=torch.float64)
    best, chosen = logits.topk(2, dim=-1)
    return Routing(logits, chosen, best.softmax(dim=-1))


# ── Routing ───────────────────────────────────────────────────────────────────────────────────────


def test_routing_by_hand():
    """Scores ln 1, ln 6, ln 2, ln 3: experts 1 and 3 are chosen, with weights 6/9 and 3/9."""
    router = SoftmaxRouter(1, 4, 2).double()
    router.gate.weight.data = torch.tensor([[1.0], [6.0], [2.0], [3.0]]).log().double()
    routing = router(torch.ones(1, 1, dtype=torch.float64), None)
    assert routing.chosen.tolist() == [[1, 3]]
    assert routing.weights[0].tolist() == pytest.approx([6 / 9, 3 / 9])


def test_weights_are_a_softmax_over_the_chosen_and_sum_to_1():
    """As softmax over all experts, then the best of these divided by their sum, gives."""
    mixture, x = layer(), tokens(40, 8)
    routing = routing_of(mixture, x)
    p, chosen = routing.logits.softmax(dim=-1).topk(2, dim=-1)
    assert torch.equal(chosen, routing.chosen)
    assert torch.allclose(routing.weights, p / p.sum(dim=-1, keepdim=True), atol=1e-14)
    assert torch.allclose(routing.weights.sum(dim=-1), torch.ones(40, dtype=torch.float64))


def test_router_logits_are_no_probabilities():
    """A router that returns softmaxed scores gets them softmaxed twice in the balancing loss."""
    routing = routing_of(layer(), tokens(40, 8))
    assert (routing.logits.sum(dim=-1) - 1).abs().min() > 1e-3
    assert (routing.logits < 0).any()


def test_scores_are_worked_out_in_float32_whatever_autocast_says():
    mixture, x = layer().float(), tokens(40, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        routing = routing_of(mixture, x)
    assert torch.equal(routing.logits, F.linear(x, mixture.router.gate.weight))


def test_bias_changes_the_choice_and_not_the_weights():
    """As large as you like, and the same for all: no change at all (vllm's PR#12002)."""
    mixture, x = layer(), tokens(40, 8)
    before = routing_of(mixture, x)
    mixture.router.bias += 12.0
    after = routing_of(mixture, x)
    assert torch.equal(before.chosen, after.chosen) and torch.equal(before.weights, after.weights)
    mixture.router.bias[3] += 100.0
    moved = routing_of(mixture, x)
    assert (moved.chosen == 3).any(dim=-1).all()
    assert torch.allclose(moved.weights, moved.logits.gather(1, moved.chosen).softmax(dim=-1))


def test_bias_gets_no_gradient_and_is_no_parameter():
    mixture = layer()
    mixture(tokens(9, 8)).sum().backward()
    assert mixture.router.bias.grad is None and not mixture.router.bias.requires_grad
    assert "router.bias" not in dict(mixture.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_jitter_is_noise_on_the_routers_input_in_training_alone(training):
    mixture, x = layer().train(training), tokens(500, 8)
    plain = routing_of(mixture, x)
    mixture.router.jitter = 0.3
    noisy = routing_of(mixture, x)
    assert (noisy.logits != plain.logits).any() == training
    noise = noisy.logits - plain.logits
    assert noise.abs().max() <= 0.3 * (x.abs() @ mixture.router.gate.weight.abs().t()).max()
    assert noise.mean().abs() < 0.1
    same = torch.allclose(mixture.experts(x, plain), mixture.experts(x, plain))
    assert same  # the experts see x itself


# ── Three ways to compute it ──────────────────────────────────────────────────────────────────────


def results(mixture: MixtureOfExperts, x: torch.Tensor, way) -> list[torch.Tensor]:
    """Output and all gradients of a way to dispatch."""
    mixture.experts.dispatch = way
    y = mixture(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *mixture.parameters()])]


CASES = {
    "2 of 5": {},
    "1 of 5": {"n_active": 1},
    "all of 5": {"n_active": 5},
    "1 of 1": {"n_expert": 1, "n_active": 1},
    "3 of 16": {"n_expert": 16, "n_active": 3},
}


@pytest.mark.parametrize("capacity", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [grouped, dense])
def test_ways_to_dispatch_agree_in_output_and_gradients(way, case, capacity):
    mixture, x = layer(**CASES[case]), tokens(3, 7, 8)
    mixture.router.capacity = capacity
    for ours, expected in zip(results(mixture, x, way), results(mixture, x, loop), strict=True):
        assert (ours - expected).abs().max() < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_output_is_the_formula(way):
    """Σ over the two best of softmax(scores)_e · w2_e·(silu(w1_e·x) ⊙ w3_e·x), token by token."""
    mixture, x = layer(), tokens(11, 8)
    mixture.experts.dispatch = way
    w1, w2, w3 = mixture.experts.w1, mixture.experts.w2, mixture.experts.w3
    for one, got in zip(x, mixture(x), strict=True):
        scores = mixture.router.gate.weight @ one
        best = scores.argsort(descending=True)[:2]
        weights = scores[best].softmax(dim=0)
        parts = [w2[e] @ (F.silu(w1[e] @ one) * (w3[e] @ one)) for e in best]
        assert torch.allclose(got, weights[0] * parts[0] + weights[1] * parts[1], atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_expert_without_a_token_gets_no_gradient_and_harms_nothing(way):
    mixture, x = layer(), tokens(3, 8)
    mixture.router.bias -= torch.tensor([0.0, 1e6, 0.0, 1e6, 0.0], dtype=torch.float64)
    y, _, _, w1, w2, w3 = results(mixture, x, way)
    assert torch.isfinite(y).all()
    for slope in (w1, w2, w3):
        assert slope[[1, 3]].abs().max() == 0 and slope[[0, 2, 4]].abs().amax((1, 2)).min() > 0


@pytest.mark.parametrize("way", WAYS)
def test_one_expert_is_the_plain_feed_forward_layer(way):
    """Weight softmax(one score) = 1, and the router's own gradient is 0."""
    mixture, x = layer(n_expert=1, n_active=1), tokens(9, 8)
    y, _, gate, *_ = results(mixture, x, way)
    w1, w2, w3 = mixture.experts.w1[0], mixture.experts.w2[0], mixture.experts.w3[0]
    assert torch.allclose(y, F.linear(F.silu(x @ w1.t()) * (x @ w3.t()), w2), atol=1e-12)
    assert gate.abs().max() == 0


@pytest.mark.parametrize("way", WAYS)
def test_order_of_the_tokens_does_not_matter(way):
    mixture, x, order = layer(), tokens(30, 8), torch.randperm(30)
    mixture.experts.dispatch = way
    assert torch.allclose(mixture(x[order]), mixture(x)[order], atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_order_of_the_experts_does_not_matter(way):
    mixture, x, order = layer(), tokens(30, 8), torch.randperm(5)
    mixture.experts.dispatch = way
    before = mixture(x)
    for weight in mixture.parameters():
        weight.data = weight.data[order]
    assert torch.allclose(mixture(x), before, atol=1e-12)


@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_pairs_one_by_one_are_the_loop_and_take_over_for_few_tokens(capacity):
    mixture, x = layer().train(capacity > 0), tokens(9, 8).detach()
    mixture.router.capacity = capacity
    with torch.no_grad():
        mixture.experts.dispatch = loop
        expected = mixture(x)
        mixture.experts.dispatch = moe.pairwise
        assert torch.allclose(mixture(x), expected, atol=1e-12)
        mixture.experts.dispatch = moe.fastest
        for n in (1, 2, 3, 9):
            assert torch.allclose(mixture.eval()(x[:n]), mixture(x)[:n], atol=1e-12)


def test_matrices_side_by_side_are_the_loop():
    """What a compiled step does for few tokens."""
    mixture, x = layer().eval(), tokens(9, 8).detach()
    mixture.experts.dispatch = loop
    expected = mixture(x)
    mixture.experts.dispatch = moe.gathered
    assert torch.allclose(mixture(x), expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports old parts
def test_a_compiled_text_is_the_plain_one():
    """With a window, so that the ring goes round."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "seq_len": 64, "n_layer": 1, "d_model": 16, "d_head": 8, "d_ff": 8}
    sizes |= {"n_head": 2, "n_kv_head": 1, "n_expert": 4, "window": 5, "tie_embeddings": False}
    model, greedy = Mixtral(MixtralConfig(**sizes)).eval(), generate.Sampling(temperature=0)
    texts = [
        list(generate.generate(model, [[1, 2, 3], [4]], 20, greedy, compile=compiled))
        for compiled in (False, True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens_at_all(way):
    mixture = layer()
    mixture.experts.dispatch = way
    assert mixture(tokens(0, 8)).shape == (0, 8)


def test_gradient_of_the_segment_product_is_the_measured_one():
    """Segments of 3, 0 and 2 rows against finite differences."""
    rows, w = tokens(5, 4), tokens(3, 2, 4)
    assert torch.autograd.gradcheck(lambda a, b: SegmentProduct.apply(a, b, [3, 0, 2]), (rows, w))


def test_segment_product_by_hand():
    rows, w = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[[1.0, 1.0]], [[10.0, 0.0]]])
    assert SegmentProduct.apply(rows, w, [1, 1]).tolist() == [[3.0], [30.0]]


@pytest.mark.parametrize("way", WAYS)
def test_autocast_is_float32_with_fewer_digits(way):
    mixture, x = layer().float(), tokens(50, 8).float()
    exact = results(mixture, x, way)
    with torch.autocast("cpu", torch.bfloat16):
        rough = results(mixture, x, way)
    assert (rough[0] - exact[0]).abs().max() < 0.05 * exact[0].abs().max()
    for a, b in zip(rough, exact, strict=True):
        assert a.dtype == b.dtype == torch.float32


# ── Capacity ──────────────────────────────────────────────────────────────────────────────────────


def crowd(capacity: float, n_token: int = 4) -> Routing:
    """All tokens want expert 0, and expert 1 as the second choice, of 4 experts."""
    router = SoftmaxRouter(1, 4, 2).double()
    router.gate.weight.data = torch.tensor([[4.0], [3.0], [2.0], [1.0]]).double()
    router.capacity = capacity
    return router(torch.ones(n_token, 1, dtype=torch.float64), None)


def test_capacity_by_hand():
    """4 tokens with 2 choices on 4 experts: 2 are an even share. Later tokens find no room."""
    assert crowd(1.0).chosen.tolist() == [[0, 1], [0, 1], [4, 4], [4, 4]]
    assert crowd(1.5).chosen.tolist() == [[0, 1], [0, 1], [0, 1], [4, 4]]
    assert crowd(2.0).chosen.tolist() == [[0, 1]] * 4
    assert crowd(0.1).chosen.tolist() == [[0, 1], [4, 4], [4, 4], [4, 4]]  # ⌈0.2⌉ = 1


def test_first_choices_come_before_second_choices():
    """Expert 0 has room for 2: the first choices of tokens 1 and 2, not token 0's second one."""
    logits = torch.tensor([[2.0, 3.0, 0, 0], [3.0, 2.0, 0, 0], [3.0, 0, 2.0, 0], [0, 0, 2.0, 3.0]])
    chosen = logits.topk(2, dim=-1).indices
    kept = moe.within_capacity(chosen, None, 4, 1.0)
    assert kept.tolist() == [[1, 4], [0, 1], [0, 2], [3, 2]]


def test_dropped_token_gets_nothing_from_the_layer_and_the_rest_is_as_before():
    mixture, x = layer(), tokens(40, 8)
    free, routing = mixture(x), routing_of(mixture, x)
    mixture.router.capacity = 0.5
    limited, y = routing_of(mixture, x), mixture(x)
    dropped = (limited.chosen == 5).all(dim=-1)
    untouched = (limited.chosen == routing.chosen).all(dim=-1)
    assert dropped.any() and untouched.any()
    assert y[dropped].abs().max() == 0 and torch.allclose(y[untouched], free[untouched])
    assert torch.equal(limited.weights, routing.weights)  # a lost choice is not made up for
    assert loads(limited, torch.ones(40)).max() <= 8  # half of 40 · 2 / 5


def test_capacity_is_of_training_alone():
    """A text must not depend on its neighbours in the batch, nor a token on those behind it."""
    mixture, x = layer().eval(), tokens(40, 8)
    free = mixture(x)
    mixture.router.capacity = 0.5
    assert torch.equal(mixture(x), free)


def test_padding_takes_no_room():
    """As many tokens of padding in between: the others keep the places that they had."""
    mixture, x = layer(), tokens(40, 8)
    mixture.router.capacity = 1.0
    alone = mixture(x)
    both = torch.stack((tokens(40, 8), x), dim=1).flatten(0, 1)  # padding, token, padding, …
    counted = torch.tensor([False, True] * 40)
    with recording(mixture, counted):
        assert torch.allclose(mixture(both)[counted], alone, atol=1e-12)


# ── Balance ───────────────────────────────────────────────────────────────────────────────────────


def balance(routing: Routing, counted: torch.Tensor | None = None) -> float:
    """The balancing loss per token."""
    counted = torch.ones(len(routing.logits)) if counted is None else counted
    return (balance_loss_sum(routing, counted, loads(routing, counted)) / counted.sum()).item()


def test_loads_by_hand():
    routing = scores([3, 2, 1, 0], [0, 3, 2, 1], [3, 0, 2, 0])
    assert loads(routing, torch.tensor([1, 1, 1])).tolist() == [2, 2, 2, 0]
    assert loads(routing, torch.tensor([1, 0, 1])).tolist() == [2, 1, 1, 0]


def test_balancing_loss_by_hand():
    """Two tokens with p = (.4, .3, .2, .1) choose experts 0 and 1: f = (1/2, 1/2, 0, 0).

    E · Σ f·P = 4 · (0.4 + 0.3) / 2 = 1.4.
    """
    routing = scores(*[[math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]] * 2)
    assert balance(routing) == pytest.approx(1.4)


@pytest.mark.parametrize("n_active", [1, 2, 4])
@pytest.mark.parametrize("n_expert", [4, 8])
def test_router_that_knows_nothing_costs_1_whatever_it_chooses(n_expert, n_active):
    """The documented constant: equal scores give p = 1/E, so E · Σ f/E = Σ f = 1."""
    chosen = torch.arange(n_active).repeat(6, 1)
    weights = torch.full((6, n_active), 1 / n_active)
    assert balance(Routing(torch.zeros(6, n_expert), chosen, weights)) == pytest.approx(1.0)


def test_all_work_to_experts_that_are_sure_of_it_is_the_worst():
    """E / k: 8 for one of 8 experts, 4 for two of 8."""
    sure = torch.zeros(6, 8)
    sure[:, 3] = 1e4
    one = Routing(sure, torch.full((6, 1), 3), torch.ones(6, 1))
    assert balance(one) == pytest.approx(8.0)
    sure[:, 5] = 1e4
    two = Routing(sure, torch.tensor([[3, 5]] * 6), torch.full((6, 2), 0.5))
    assert balance(two) == pytest.approx(4.0)


def test_means_are_over_all_experts_and_not_the_chosen_ones():
    """P counts the probability of experts that were not chosen too (aprender's PR#2162)."""
    routing = routing_of(layer(), tokens(40, 8))
    p, load = routing.logits.softmax(dim=-1), loads(routing, torch.ones(40)).double()
    expected = 5 * (load / load.sum() * p.mean(dim=0)).sum()
    assert balance(routing) == pytest.approx(expected.item(), abs=1e-12)
    assert load.sum() == 80  # f sums to 1, not to k (transformers' PR#43775)


def test_half_padding_changes_nothing():
    mixture, x = layer(), tokens(4, 10, 8)
    alone = routing_of(mixture, x)
    padded = routing_of(mixture, torch.cat((x, tokens(4, 10, 8)), dim=1))
    counted = torch.tensor([1.0] * 10 + [0.0] * 10).repeat(4)
    ones = torch.ones(40)
    assert torch.equal(loads(padded, counted), loads(alone, ones))
    assert balance(padded, counted) == pytest.approx(balance(alone), abs=1e-12)
    assert z_loss_sum(padded, counted).item() == pytest.approx(z_loss_sum(alone, ones).item())


def test_balancing_loss_of_parts_with_the_load_of_all_is_that_of_all():
    """What micro-batches and ranks rely on."""
    routing, counted = routing_of(layer(), tokens(40, 8)), torch.ones(40)
    load = loads(routing, counted)
    whole = balance_loss_sum(routing, counted, load)
    parts = [
        Routing(routing.logits[a:b], routing.chosen[a:b], routing.weights[a:b])
        for a, b in itertools.pairwise((0, 13, 14, 40))
    ]
    split = sum(balance_loss_sum(r, torch.ones(len(r.logits)), load) for r in parts)
    assert split.item() == pytest.approx(whole.item(), abs=1e-12)


def test_gradient_of_the_balancing_loss_is_the_measured_one():
    """Of the scores, with the load held fast. A softmax too many would show here."""
    logits, counted = tokens(6, 5), torch.ones(6)
    chosen = logits.topk(2, dim=-1).indices
    weights = torch.ones(6, 2)
    load = loads(Routing(logits, chosen, weights), counted)

    def loss(x):
        return balance_loss_sum(Routing(x, chosen, weights), counted, load)

    assert torch.autograd.gradcheck(loss, logits)
    (slope,) = torch.autograd.grad(loss(logits), logits)
    p = logits.softmax(dim=-1)
    f = load / load.sum()
    assert torch.allclose(slope, 5 * p * (f - (p * f).sum(dim=-1, keepdim=True)), atol=1e-12)


def test_balancing_loss_pushes_the_busiest_expert_down():
    mixture, x = layer(n_expert=4), tokens(200, 8).detach() + 1.0
    optimizer = torch.optim.SGD(mixture.router.parameters(), lr=1.0)
    counted, before = torch.ones(200), None
    for _ in range(200):
        routing = routing_of(mixture, x)
        load = loads(routing, counted)
        before = load.max() if before is None else before
        loss = balance_loss_sum(routing, counted, load) / 200
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 140 and load.max() < 115  # 100 are an even share


def test_z_loss_by_hand():
    """Scores ln 1, ln 2, ln 3, ln 4 and twice ln ¼: log² 10 and log² 1."""
    rows = [[math.log(i) for i in (1, 2, 3, 4)], [math.log(0.25)] * 4]
    both, first = torch.ones(2), torch.tensor([1.0, 0.0])
    assert z_loss_sum(scores(*rows), both).item() == pytest.approx(math.log(10) ** 2)
    assert z_loss_sum(scores(*rows), first).item() == pytest.approx(math.log(10) ** 2)
    assert z_loss_sum(scores(*rows), 1 - first).item() == pytest.approx(0, abs=1e-12)


def test_biases_move_towards_the_experts_that_have_too_little_to_do():
    router = SoftmaxRouter(8, 4, 2)
    moe.move_biases(router, torch.tensor([10.0, 2.0, 6.0, 6.0]), 0.01)
    assert router.bias.tolist() == pytest.approx([-0.01, 0.01, 0.0, 0.0])


def test_biases_balance_without_a_loss():
    """The load of the busiest expert falls in 300 steps although no weight moves."""
    mixture, x, counted = layer(), tokens(400, 8).detach() + 0.7, torch.ones(400)
    first = loads(routing_of(mixture, x), counted)
    for _ in range(300):
        moe.move_biases(mixture.router, loads(routing_of(mixture, x), counted), 0.02)
    last = loads(routing_of(mixture, x), counted)
    assert first.max() > 230 and last.max() < 180  # 160 are an even share


# ── Recording ─────────────────────────────────────────────────────────────────────────────────────


def test_recording_ends_with_its_block_and_leaves_nothing_behind():
    mixture = layer()
    with pytest.raises(KeyError), recording(mixture) as record:
        mixture(tokens(3, 8))
        raise KeyError
    mixture(tokens(3, 8))
    assert len(record) == 1 and mixture.record is None and mixture.counted is None


def test_layers_are_recorded_from_the_first_to_the_last():
    model = nn.Sequential(layer(n_expert=3), layer(n_expert=4))
    with recording(model) as record:
        model(tokens(2, 5, 8))
    assert [r.logits.shape for r in record] == [(10, 3), (10, 4)]
