"""lora.py by itself: every kind of layer and variant, in float64, with alpha ≠ rank."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import lora
from lora import LoraConfig
from model import Llama

EVERY = r"\.(wq|wk|wv|wo|w1|w2|w3)$"
VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"pissa": True}]


def config(**changes) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 32.0, "targets": EVERY} | changes)


def stir(model: nn.Module, std: float = 0.05) -> nn.Module:
    """Stands for a training: other numbers in whatever learns."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * std)
    return model


def adapted(base: nn.Module, name: str = "default", **changes) -> nn.Module:
    model = base if lora.layers(base) else copy.deepcopy(base)
    lora.adapt(model, config(**changes), name)
    return stir(model).eval()


def base_state(model: nn.Module) -> dict:
    """The state of the base inside an adapted model, under the base's own names."""
    state = model.state_dict().items()
    return {n.replace(".base.", "."): x for n, x in state if ".adapters." not in n}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ── By hand ───────────────────────────────────────────────────────────────────────────────────────


def two_by_two(**changes) -> nn.Module:
    """W = ((1, 2), (3, 4)) with A = (1, −1) and B = (½, 2)ᵀ, alpha 6, rank 1."""
    model = nn.Sequential(nn.Linear(2, 2, bias=True)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([10.0, 20.0]))
    lora.adapt(model, LoraConfig(rank=1, alpha=6.0, targets="0", **changes))
    with torch.no_grad():
        model[0].adapters["default"].lora_a.copy_(torch.tensor([[1.0, -1.0]]))
        model[0].adapters["default"].lora_b.copy_(torch.tensor([[0.5], [2.0]]))
    return model


def test_a_worked_example():
    """x = (1, 3): W·x + b = (17, 35), A·x = −2, 6 · B · (−2) = (−6, −24), together (11, 11)."""
    out = two_by_two()(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert out.tolist() == [11.0, 11.0]


def test_a_worked_example_of_the_merged_weight():
    """6 · B·A = ((3, −3), (12, −12)), so W' = ((4, −1), (15, −8))."""
    model = two_by_two()
    lora.merge(model)
    assert model[0].base.weight.tolist() == [[4.0, -1.0], [15.0, -8.0]]


def test_a_worked_example_of_dora():
    """Row 1 of W is √5 long and of W + ΔW √17: its output is scaled by √(5/17). b is not."""
    out = two_by_two(dora=True)(torch.tensor([1.0, 3.0], dtype=torch.float64))
    first = (4 * 1 - 1 * 3) * math.sqrt(5 / 17) + 10
    second = (15 * 1 - 8 * 3) * math.sqrt(25 / 289) + 20
    assert out.tolist() == pytest.approx([first, second], abs=1e-12)


def test_scales():
    assert config().scale == 8.0
    assert config(rslora=True).scale == 16.0


# ── Start, merge, unmerge ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_start_is_the_base(base, tokens, changes):
    """B = 0, so ΔW = 0 exactly; DoRA divides the length by itself, which may round once."""
    model = copy.deepcopy(base)
    lora.adapt(model, config(**changes))
    layer = lora.layers(model)[0].adapters["default"]
    assert layer.lora_a.abs().max() > 0
    assert (model(tokens) - base(tokens)).abs().max() <= (1e-12 if changes.get("dora") else 0.0)


@pytest.mark.parametrize("changes", [*VARIANTS, {"dropout": 0.3}], ids=str)
def test_merged_is_unmerged_and_back_to_the_bit(base, tokens, changes):
    model = adapted(base, **changes)
    before, plain = copy.deepcopy(model.state_dict()), base(tokens)
    apart = model(tokens)
    assert (apart - plain).abs().max() > 1e-2
    lora.merge(model)
    assert (model(tokens) - apart).abs().max() < 1e-12
    once = copy.deepcopy(model.state_dict())
    lora.merge(model)
    assert same(model.state_dict(), once)  # a second merge adds nothing
    lora.unmerge(model)
    lora.unmerge(model)
    assert same(model.state_dict(), before)
    assert torch.equal(model(tokens), apart)


@pytest.mark.parametrize("merged", [False, True])
def test_eval_and_train_do_not_merge(base, tokens, merged):
    """loralib merges in `train(False)`, which its `eval()` did not reach for years."""
    model = adapted(base)
    if merged:
        lora.merge(model)
    state, out = copy.deepcopy(model.state_dict()), model(tokens)
    for change in (model.eval, model.eval, model.train, model.train, model.eval):
        change()
        assert same(model.state_dict(), state)
        assert torch.equal(model(tokens), out)
    assert all((layer.saved is not None) == merged for layer in lora.layers(model))


def test_merging_in_bfloat16_rounds_once(base, tokens):
    """ΔW in float32, one rounding: the merged weight is the nearest bfloat16 to the true sum."""
    model = adapted(base).float()
    exact = [p for p, layer in model.named_modules() if isinstance(layer, lora.LoraLayer)]
    for layer in lora.layers(model):
        layer.base.bfloat16()
    rounded = {p: model.get_submodule(p).base.weight.float() for p in exact}
    lora.merge(model)
    for path, layer in ((p, model.get_submodule(p)) for p in exact):
        true = rounded[path] + layer.delta(layer.adapters["default"])
        # `delta` is taken of the merged weight only with DoRA, so it is still the same here
        assert torch.equal(layer.base.weight, true.bfloat16())
        assert layer.base.weight.dtype == torch.bfloat16


def test_merging_in_float32_is_exact_enough(base, tokens):
    """The bound of the pitfall list: |Δ logit| < 1e-5."""
    model = adapted(base).float()
    apart = model(tokens)
    lora.merge(model)
    assert (model(tokens) - apart).abs().max() < 1e-5


def test_bfloat16_base_keeps_the_adapter_in_float32():
    model = nn.Sequential(nn.Linear(6, 5)).bfloat16()
    lora.adapt(model, config(targets="0", rank=2))
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    assert lora.layers(model)[0].adapters["default"].lora_a.dtype == torch.float32
    assert model(x).dtype == torch.bfloat16


# ── Learning ──────────────────────────────────────────────────────────────────────────────────────


def loss_of(model: nn.Module, tokens) -> torch.Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_training_moves_every_adapter_and_leaves_the_base_bit_equal(base, tokens, changes):
    model = copy.deepcopy(base)
    lora.adapt(model, config(**changes))
    optimizer = torch.optim.AdamW(lora.learning_groups(model), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = loss_of(model.train(), tokens)
        loss.backward()
        if not losses:
            assert all(layer.adapters["default"].lora_b.grad.norm() > 0
                       for layer in lora.layers(model))  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert same(base_state(model), base.state_dict())


class Recomputed(nn.Module):
    """A block that keeps no activations, and computes them again in the backward pass."""

    def __init__(self, block: nn.Module, reentrant: bool):
        super().__init__()
        self.block, self.reentrant = block, reentrant

    def forward(self, x, context):
        return recompute(self.block, x, context, use_reentrant=self.reentrant)


def gradients(base, tokens, wrap, hook: bool) -> list:
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    lora.adapt(model, config())
    stir(model)
    model.blocks = nn.ModuleList(map(wrap, model.blocks))
    if hook:
        lora.let_gradients_in(model.embedding)
    loss = loss_of(model, tokens)
    if loss.requires_grad:
        loss.backward()
    return [layer.adapters["default"].lora_b.grad for layer in lora.layers(model)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(base, tokens, reentrant):
    plain = gradients(base, tokens, lambda block: block, hook=False)
    found = gradients(base, tokens, lambda block: Recomputed(block, reentrant), hook=True)
    assert all(a.norm() > 0 and torch.allclose(a, b, atol=1e-12)
               for a, b in zip(plain, found, strict=True))  # fmt: skip


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_what_the_hook_is_for(base, tokens):
    """Reentrant checkpointing with a frozen embedding and no hook: nothing would train."""
    found = gradients(base, tokens, lambda block: Recomputed(block, True), hook=False)
    assert all(grad is None for grad in found)


def test_lora_plus_has_two_rates(base):
    model = copy.deepcopy(base)
    lora.adapt(model, config(dora=True))
    others, b = lora.learning_groups(model, 16.0)
    assert (others["scale"], b["scale"]) == (1.0, 16.0)
    assert {id(p) for p in b["params"]} == {
        id(layer.adapters["default"].lora_b) for layer in lora.layers(model)
    }
    assert len(others["params"]) == 2 * len(b["params"])  # A and the lengths
    learning = [p for p in model.parameters() if p.requires_grad]
    assert len(learning) == 3 * len(b["params"])


def test_dropout_is_in_training_alone_and_on_the_adapter_alone(base, tokens):
    model = adapted(base, dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    lora.activate(model, {})
    assert torch.equal(model(tokens), base(tokens))


# ── Targets ───────────────────────────────────────────────────────────────────────────────────────


def test_no_match_is_an_error(base):
    with pytest.raises(ValueError, match="no layer that can be adapted matches 'q_proj'"):
        lora.adapt(base, config(targets="q_proj"))
    assert all(p.requires_grad for p in base.parameters())  # and nothing was frozen


def test_patterns_choose_layers_and_the_count_is_right(base):
    found = lora.adapt(base, config(targets=r"blocks\.1\..*\.(wq|w2)$", rank=3))
    assert found == ["blocks.1.attention.wq", "blocks.1.ffn.w2"]
    assert lora.trainable(base)[0] == 3 * (24 + 40) + 3 * (36 + 24)


def test_tied_weights_are_refused_or_untied(base, tokens):
    """Merging into a tied head would change the embedding as well (peft#2018)."""
    for target in ("^head$", "^embedding$"):
        with pytest.raises(ValueError, match="shares its weight"):
            lora.adapt(base, config(targets=target))
    want, table = base(tokens), base.embedding.weight.detach().clone()
    lora.untie(base, "head")
    lora.adapt(base, config(targets="^head$"))
    assert torch.equal(base(tokens), want)
    stir(base)
    apart = base(tokens)
    lora.merge(base)
    assert torch.equal(base.embedding.weight, table)
    assert (base(tokens) - apart).abs().max() < 1e-12


def test_rank_beyond_the_matrix_is_refused(base):
    with pytest.raises(ValueError, match="rank 21 is more than"):
        lora.adapt(base, config(rank=21))  # wk is 20 × 24


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"alpha": math.inf}, "alpha"),
     ({"dropout": 1.0}, "dropout"), ({"targets": "("}, "regular"),
     ({"dora": True, "pissa": True}, "together")],
)  # fmt: skip
def test_settings_that_cannot_be(changes, word):
    with pytest.raises(ValueError, match=word):
        config(**changes)


# ── Other layers ──────────────────────────────────────────────────────────────────────────────────


class Conv1D(nn.Module):
    """GPT-2's linear layer, whose weight is (I, O)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))

    def forward(self, x):
        return x @ self.weight + self.bias


OTHERS = {
    "linear": (lambda: nn.Linear(6, 9), lambda: torch.randn(2, 3, 6)),
    "Conv1D": (Conv1D, lambda: torch.randn(2, 3, 6)),
    "embedding": (lambda: nn.Embedding(7, 5), lambda: torch.randint(7, (2, 3))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 8)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, bias=False),
               lambda: torch.randn(2, 4, 9, 9)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
                        lambda: torch.randn(2, 4, 5, 5)),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_layer(kind):
    """Start = base; merged = apart; the change has at most the rank that it should have."""
    make, draw = OTHERS[kind]
    model, x = nn.Sequential(make()).double(), draw()
    x = x.double() if x.is_floating_point() else x
    plain, weight = model(x), model[0].weight.detach().clone()
    lora.adapt(model, config(targets="0", rank=2, alpha=5.0))
    assert torch.equal(model(x), plain)
    stir(model, 1.0)
    apart = model(x)
    assert (apart - plain).abs().max() > 1e-2
    lora.merge(model)
    assert (model(x) - apart).abs().max() < 1e-11
    change = (model[0].base.weight - weight).flatten(1)
    assert torch.linalg.matrix_rank(change, atol=1e-9) == 2
    lora.unmerge(model)
    assert torch.equal(model[0].base.weight, weight)


def test_dora_and_pissa_of_transposed_layers():
    for changes in ({"dora": True}, {"pissa": True}):
        model, x = nn.Sequential(Conv1D()).double(), torch.randn(2, 6, dtype=torch.float64)
        lora.adapt(model, config(targets="0", rank=2, **changes))
        stir(model, 0.3)
        apart = model(x)
        lora.merge(model)
        assert (model(x) - apart).abs().max() < 1e-11


def test_layers_that_cannot_be_adapted_are_no_match():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 4, 3), nn.LayerNorm(4)
    )
    with pytest.raises(ValueError, match="no layer"):
        lora.adapt(model, config(targets="."))


@pytest.mark.parametrize(
    "enabled", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)]
)
def test_parts_of_a_fused_layer(enabled):
    """q (8 rows), k (4), v (4) in one matrix: only rows of adapted parts change, by rank 2."""
    sizes, x = (8, 4, 4), torch.randn(3, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 16)).double()
    weight, plain = model[0].weight.detach().clone(), model(x)
    parts = [(size, bool(on)) for size, on in zip(sizes, enabled, strict=True)]
    lora.adapt(model, config(targets="0", rank=2, alpha=5.0), parts=parts)
    learns = sum(2 * (6 + size) for size, on in parts if on)
    assert torch.equal(model(x), plain) and lora.trainable(model)[0] == learns
    stir(model, 1.0)
    apart = model(x)
    lora.merge(model)
    assert (model(x) - apart).abs().max() < 1e-11
    changes = (model[0].base.weight - weight).split(sizes)
    for change, on in zip(changes, enabled, strict=True):
        assert torch.linalg.matrix_rank(change, atol=1e-9) == (2 if on else 0)


def test_parts_must_fill_the_layer():
    with pytest.raises(ValueError, match="must have 16 rows"):
        lora.adapt(nn.Sequential(nn.Linear(6, 16)), config(targets="0"), parts=[(8, True)])


# ── Several adapters ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two(base):
    """A model with adapters a and b of different rank, scale and layers."""
    model = adapted(copy.deepcopy(base), "a", rank=2, alpha=6.0)
    return adapted(model, "b", rank=3, alpha=30.0, targets=r"\.(wv|w2)$")


def merged_weights(model, shares) -> list:
    lora.activate(model, shares)
    lora.merge(model)
    found = [layer.base.weight.detach().clone() for layer in lora.layers(model)]
    lora.unmerge(model)
    return found


def test_switching(two, base, tokens):
    lora.activate(two, {})
    assert torch.equal(two(tokens), base(tokens))
    outs = []
    for shares in ({"a": 1.0}, {"b": 1.0}, {"a": 0.7, "b": 0.3}, {"a": 1.0}):
        lora.activate(two, shares)
        outs.append(two(tokens))
    assert torch.equal(outs[0], outs[3])
    assert all((x - y).abs().max() > 1e-3 for x, y in itertools.pairwise(outs))


def test_a_weighted_sum_is_the_sum_of_the_changes(two):
    plain, a, b = (merged_weights(two, shares) for shares in ({}, {"a": 1.0}, {"b": 1.0}))
    both = merged_weights(two, {"a": 0.7, "b": -0.3})
    for w, one, other, mixed in zip(plain, a, b, both, strict=True):
        assert torch.allclose(mixed, w + 0.7 * (one - w) - 0.3 * (other - w), atol=1e-12)


def test_several_adapters_in_one_batch(two):
    """Each row with its own adapter is the same as each row alone with that adapter."""
    names, rows = ["b", None, "a", "b", "a"], torch.randint(97, (5, 11))
    with lora.one_adapter_a_row(two, names):
        together = two(rows)
    for i, name in enumerate(names):
        lora.activate(two, {name: 1.0} if name else {})
        assert (two(rows[i : i + 1])[0] - together[i]).abs().max() < 1e-12
    with lora.one_adapter_a_row(two, ["a"]), pytest.raises(ValueError, match="1 names"):
        two(rows)


def test_only_the_newest_adapter_learns(two):
    learning = {n.split(".adapters.")[1][0] for n, p in two.named_parameters() if p.requires_grad}
    assert learning == {"b"}


def test_names_that_cannot_be(two):
    for name in ("a", "x.y", ""):
        with pytest.raises(ValueError, match="cannot be called"):
            lora.adapt(two, config(), name)
    with pytest.raises(ValueError, match="no adapter 'c'"):
        lora.activate(two, {"c": 1.0})
    lora.merge(two)
    with pytest.raises(ValueError, match="unmerge first"):
        lora.activate(two, {"a": 1.0})


def test_strip_leaves_the_base_or_the_merged_model(two, base, tokens):
    lora.activate(two, {"a": 1.0})
    want, other = two(tokens), copy.deepcopy(two)
    lora.strip(other)
    assert same(other.state_dict(), base.state_dict())
    lora.merge(two)
    lora.strip(two)
    assert not lora.layers(two) and (two(tokens) - want).abs().max() < 1e-12


def test_the_state_of_adapters_is_all_that_was_learned(base, sizes, tokens):
    model = adapted(base, dora=True)
    other = Llama(sizes).double().eval()
    other.load_state_dict(base.state_dict())
    lora.adapt(other, config(dora=True))
    other.load_state_dict(lora.adapter_state(model), strict=False)
    assert torch.equal(other(tokens), model(tokens))


# ── Against PiSSA's and LoRA's theory ─────────────────────────────────────────────────────────────


def test_pissa_begins_with_the_best_approximation(base):
    """‖W − scale·B·A‖² is Σ σ² beyond the rank: no matrix of it comes nearer (Eckart–Young)."""
    weights = [p.detach().clone() for n, p in base.named_parameters() if n.endswith("wq.weight")]
    model = copy.deepcopy(base)
    lora.adapt(model, config(pissa=True, targets="wq$"))
    for weight, layer in zip(weights, lora.layers(model), strict=True):
        adapter = layer.adapters["default"]
        rest = weight - adapter.scale * adapter.lora_b @ adapter.lora_a
        tail = torch.linalg.svdvals(weight)[4:].square().sum()
        assert rest.square().sum().item() == pytest.approx(tail.item(), rel=1e-10)
