"""lora.py by itself, in float64, with alpha ≠ rank; most tests run for every variant."""

import copy
import math

import pytest
import torch
from helpers import VARIANTS, adapted, base_state, config, loss_of, same, stir, two_by_two
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import lora
import memory
import several
from lora import LoraConfig
from model import Llama
from variants import AdapterConfig, learning_groups

# ── By hand ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [LoraConfig, AdapterConfig])
def test_a_worked_example(kind):
    """x = (1, 3): W·x + b = (17, 35), A·x = −2, 6 · B · (−2) = (−6, −24), together (11, 11)."""
    out = two_by_two(kind)(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert out.tolist() == [11.0, 11.0]


def test_a_worked_example_of_the_merged_weight():
    """6 · B·A = ((3, −3), (12, −12)), so W' = ((4, −1), (15, −8))."""
    model = two_by_two()
    lora.merge(model)
    assert model[0].base.weight.tolist() == [[4.0, -1.0], [15.0, -8.0]]


def test_the_scale_is_alpha_over_rank():
    assert LoraConfig(rank=4, alpha=32.0).scale == 8.0


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
        true = rounded[path] + layer.adapters["default"].delta(layer)
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


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_training_moves_every_adapter_and_leaves_the_base_bit_equal(base, tokens, changes):
    model = copy.deepcopy(base)
    lora.adapt(model, config(**changes))
    optimizer = torch.optim.AdamW(learning_groups(model), lr=1e-2)
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


def test_dropout_is_in_training_alone_and_on_the_adapter_alone(base, tokens):
    model = adapted(base, dropout=0.5)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    several.activate(model, {})
    assert torch.equal(model(tokens), base(tokens))


def test_an_adapter_takes_the_mode_of_its_layer(base, tokens):
    """A new module is in training mode: in a model in eval() its dropout would be at work."""
    lora.adapt(base, config(dropout=0.5))
    stir(base)
    assert torch.equal(base(tokens), base(tokens))
    assert not any(module.training for module in base.modules())


# ── Targets ───────────────────────────────────────────────────────────────────────────────────────


def test_no_match_is_an_error(base):
    with pytest.raises(ValueError, match="no layer that can be adapted matches 'q_proj'"):
        lora.adapt(base, config(targets="q_proj"))
    assert all(p.requires_grad for p in base.parameters())  # and nothing was frozen


def test_patterns_choose_layers_and_the_count_is_right(base):
    found = lora.adapt(base, config(targets=r"blocks\.1\..*\.(wq|w2)$", rank=3))
    assert found == ["blocks.1.attention.wq", "blocks.1.ffn.w2"]
    assert memory.trainable(base)[0] == 3 * (24 + 40) + 3 * (36 + 24)


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
    assert not lora.layers(base) and all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"alpha": math.inf}, "alpha"),
     ({"dropout": 1.0}, "dropout"), ({"targets": "("}, "regular"),
     ({"dora": True, "pissa": True}, "together")],
)  # fmt: skip
def test_settings_that_cannot_be(changes, word):
    with pytest.raises(ValueError, match=word):
        config(**changes)


def test_the_state_of_adapters_is_all_that_was_learned(base, sizes, tokens):
    model = adapted(base, dora=True)
    other = Llama(sizes).double().eval()
    other.load_state_dict(base.state_dict())
    lora.adapt(other, config(dora=True))
    learned = {n: x for n, x in model.state_dict().items() if ".adapters." in n}
    other.load_state_dict(learned, strict=False)
    assert torch.equal(other(tokens), model(tokens))
