"""The model: published sizes, worked examples, causality, rotary embeddings, initialization."""

import ast
import dataclasses
import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model as model_file
from conftest import FOLDER
from model import (
    PRESETS,
    Llama,
    LlamaConfig,
    RMSNorm,
    RopeScaling,
    RotaryTable,
    SwiGLU,
    attention,
    causal_mask,
    fastest_attention,
    fused_attention,
    project,
    rotary_frequencies,
    rotate,
)

# ── Sizes ─────────────────────────────────────────────────────────────────────────────────────────

PUBLISHED = {  # the last three by Meta; 15m and 110m are the sizes of llama2.c
    "15m": 15_191_712,
    "110m": 109_529_856,
    "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3.2-1b": 1_235_814_400,
}


def counted(sizes: LlamaConfig) -> int:
    """The number of parameters, without memory for them."""
    with torch.device("meta"):
        model = Llama(sizes)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name):
    assert counted(PRESETS[name]) == PUBLISHED[name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters_is_known_without_a_model(name, tied):
    """Of the presets, and where every size is another prime."""
    sizes = dataclasses.replace(PRESETS[name], tie_embeddings=tied)
    assert sizes.n_parameter == counted(sizes)
    odd = dataclasses.replace(sizes, vocab_size=13, n_layer=3, n_head=10, n_kv_head=5, d_model=11)
    odd = dataclasses.replace(odd, d_head=14, d_ff=17)
    assert odd.n_parameter == counted(odd)


def test_comments_beside_the_presets_say_the_same():
    text = (FOLDER / "model.py").read_text(encoding="utf-8")
    tiny = sum(p.numel() for p in Llama(PRESETS["tiny"]).parameters())
    assert PUBLISHED.keys() == PRESETS.keys() - {"tiny"}
    assert all(f"# {n:,}" in text for n in (tiny, *PUBLISHED.values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"n_kv_head": 8}, "n_kv_head 8 does not divide n_head 4"),
        ({"d_head": 9}, "d_head 9 is odd"),
        ({"n_layer": 0}, "n_layer must be at least 1 and below 2³¹, not 0"),
        ({"vocab_size": -5}, "vocab_size must be at least 1 and below 2³¹, not -5"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_built_are_refused(sizes, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sizes, **change)


@pytest.mark.parametrize("values", [(0.5, 1, 4), (8, 4, 4), (8, 4, 1), (8, 0, 4), (8, -1, 4)])
def test_rope_scaling_that_makes_no_sense_is_refused(values):
    with pytest.raises(ValueError, match="rope scaling needs"):
        RopeScaling(*values)


def test_model_file_can_be_copied_alone():
    """It imports torch and the standard library, nothing of this folder."""
    tree = ast.parse((FOLDER / "model.py").read_text(encoding="utf-8"))
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in found}
    assert roots <= {"torch"} | set(sys.stdlib_module_names)


# ── Layers by hand ────────────────────────────────────────────────────────────────────────────────


def test_rms_norm_by_hand():
    """x = (3, 4): mean of squares 12.5, with ε = 12.5 the root is 5; g = (1, 2): (0.6, 1.6)."""
    norm = RMSNorm(2, eps=12.5)
    norm.weight.data = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 1.6]))


def test_rms_norm_squares_in_float32():
    """In bfloat16 a sum of 4,096 squares stands still at 256 or so: 256 + 1 is 256."""
    x = torch.ones(4096, dtype=torch.bfloat16)
    norm = RMSNorm(4096, 1e-5).bfloat16()
    assert (norm(x).float() - 1).abs().max() <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_is_that_of_torch(dtype, eps):
    """Forward and gradient; in bfloat16 torch rounds once more or less than we do, at the end."""
    norm = RMSNorm(24, eps)
    norm.weight.data = torch.rand(24) + 0.5
    norm.to(dtype)
    results = []
    for call in (norm, lambda x: F.rms_norm(x, (24,), norm.weight, eps)):
        x = (3 * torch.randn(5, 24, generator=torch.Generator().manual_seed(0))).to(dtype)
        x.requires_grad_()
        norm.weight.grad = None
        out = call(x)
        (out * torch.linspace(-1, 1, 24, dtype=dtype)).sum().backward()
        results.append((out.detach(), x.grad, norm.weight.grad))
    tolerance = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-6}[dtype]
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        difference = (ours.double() - theirs.double()).abs().max()
        assert difference <= tolerance * max(1.0, theirs.double().abs().max())


def layers(*heights: int) -> list[nn.Linear]:
    return [nn.Linear(12, height, bias=False).double() for height in heights]


@pytest.mark.parametrize("n_token", [1, 31, 32, 33])
def test_joined_product_is_the_products_apart(monkeypatch, n_token):
    """2 rows of a batch: 64 tokens are many. Forward and gradient."""
    x, three = torch.randn(2, n_token, 12).double(), layers(20, 8, 8)
    apart = torch.cat([layer(x) for layer in three], dim=-1)
    assert (project(x, *three) - apart).abs().max() < 1e-14
    weights = [layer.weight for layer in three]
    expected = torch.autograd.grad(apart.square().sum(), weights)
    found = torch.autograd.grad(project(x, *three).square().sum(), weights)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_many_tokens_take_one_product_and_few_several(monkeypatch):
    products = []
    linear = F.linear
    monkeypatch.setattr(
        F, "linear", lambda x, w, b=None: (products.append(len(w)), linear(x, w, b))[1]
    )
    for n_token, expected in ((model_file.MANY_ROWS, [36]), (model_file.MANY_ROWS - 1, [20, 8, 8])):
        products.clear()
        project(torch.randn(1, n_token, 12).double(), *layers(20, 8, 8))
        assert products == expected


def test_layers_that_are_not_plain_are_called(monkeypatch):
    """A LoRA layer, say, or one with a bias, keeps what it adds however many tokens there are."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    x = torch.randn(3, 50, 12)
    plain, twice, biased = nn.Linear(12, 4, bias=False), Twice(12, 4, bias=False), nn.Linear(12, 4)
    out = project(x, plain, twice, biased)
    torch.testing.assert_close(out, torch.cat([plain(x), twice(x), biased(x)], dim=-1))


def test_swiglu_by_hand():
    """w1·x = 0 gives silu(0) = 0; w1·x = ln 3 gives ln 3 · ¾; times w3·x = 2, times w2 = 4."""
    ffn = SwiGLU(d_model=2, d_ff=1)
    ffn.w1.weight.data = torch.tensor([[1.0, 0.0]])
    ffn.w3.weight.data = torch.tensor([[0.0, 1.0]])
    ffn.w2.weight.data = torch.tensor([[4.0], [0.0]])
    x = torch.tensor([[0.0, 2.0], [math.log(3), 2.0]])
    expected = torch.tensor([[0.0, 0.0], [math.log(3) * 0.75 * 8, 0.0]])
    torch.testing.assert_close(ffn(x), expected)


ATTENTIONS = pytest.mark.parametrize("attend", [attention, fused_attention])


@ATTENTIONS
def test_attention_by_hand(attend):
    """q·k = 2 ln 3 and 0, over √4: ln 3 and 0; softmax ¾ and ¼; of the values 4 and 8: 5."""
    q = torch.tensor([2 * math.log(3), 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    k = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]).view(1, 1, 2, 4)
    v = torch.tensor([[4.0] * 4, [8.0] * 4]).view(1, 1, 2, 4)
    for mask in (torch.zeros(1, 1, 2), None):
        out = attend(q, k, v, mask, scale=0.5, causal=False)
        torch.testing.assert_close(out, torch.full((1, 1, 1, 4), 5.0))


@ATTENTIONS
def test_query_head_reads_the_key_head_of_its_group(attend):
    """Of 6 heads over 3: ⌊h/2⌋. Each value head says its number."""
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 3, 4, 8)
    v = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 4, 8)
    mask = causal_mask(torch.arange(4)[None], 4, torch.float32)
    out = attend(q, k, v, mask, 8**-0.5, False)
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([0.0, 0, 1, 1, 2, 2]))


def loops(q, k, v, mask, scale):
    """Attention head by head and position by position, from the formula."""
    B, H, T, _ = q.shape
    out = q.new_empty(B, H, T, v.shape[3])
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        head = h // (H // k.shape[1])
        scores = scale * k[b, head] @ q[b, h, t] + mask[b if len(mask) > 1 else 0, t]
        out[b, h, t] = scores.softmax(0) @ v[b, head]
    return out


MASKS = {
    "whole": (5, torch.arange(5)[None]),
    "chunk": (9, torch.arange(4, 9)[None]),
    "one token": (7, torch.tensor([[6]])),
    "ragged": (9, torch.tensor([[3, 4, 5], [0, 1, 2], [6, 7, 8]])),
    "ragged, one token": (9, torch.tensor([[3], [0], [8]])),
}


@ATTENTIONS
@pytest.mark.parametrize("width", [6, 3])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("n_head", "n_kv_head"), [(8, 1), (8, 2), (8, 4), (8, 8)])
def test_attention_is_the_formula(attend, kind, n_head, n_kv_head, width):
    """Also where values are of another width than keys, and with a scale of one's own."""
    n_slot, positions = MASKS[kind]
    q = torch.randn(3, n_head, positions.shape[1], 6).double()
    k = torch.randn(3, n_kv_head, n_slot, 6).double()
    v = torch.randn(3, n_kv_head, n_slot, width).double()
    mask = causal_mask(positions, n_slot, torch.float64)
    out = attend(q, k, v, mask, 0.3, False)
    assert out.shape == (3, n_head, positions.shape[1], width)
    assert (out - loops(q, k, v, mask, 0.3)).abs().max() < 1e-12


@ATTENTIONS
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_causal_is_the_causal_mask_and_no_mask_is_none(attend, n_kv_head):
    q, (k, v) = torch.randn(2, 4, 5, 6).double(), torch.randn(2, 2, n_kv_head, 5, 6).double()
    mask = causal_mask(torch.arange(5)[None], 5, torch.float64)
    causal, plain = attend(q, k, v, None, 0.3, True), attend(q, k, v, None, 0.3, False)
    assert (causal - loops(q, k, v, mask, 0.3)).abs().max() < 1e-12
    assert (plain - loops(q, k, v, torch.zeros_like(mask), 0.3)).abs().max() < 1e-12
    assert (plain[:, :, -1] - causal[:, :, -1]).abs().max() < 1e-12  # the last token sees all


ONE_ROW = causal_mask(torch.arange(5)[None], 5, torch.float64)
TWO_ROWS = causal_mask(torch.arange(10).view(2, 5), 10, torch.float64)
GRADIENTS = {  # H, K, width of the values, mask, causal
    "grouped and causal": (4, 2, 6, None, True),
    "one key head": (4, 1, 6, None, True),
    "not grouped": (4, 4, 6, None, True),
    "masked": (4, 2, 6, ONE_ROW, False),
    "masked row by row": (4, 2, 6, TWO_ROWS, False),
    "values of another width": (4, 2, 3, None, True),
    "values of another width, masked": (4, 2, 9, torch.eye(5).double()[None], False),
}  # fmt: skip


@pytest.mark.parametrize("kind", GRADIENTS)
def test_both_attentions_have_the_same_gradient(kind):
    n_head, n_kv_head, width, mask, causal = GRADIENTS[kind]
    n_slot = 5 if mask is None else mask.shape[2]
    q = torch.randn(2, n_head, 5, 6).double()
    k = torch.randn(2, n_kv_head, n_slot, 6).double()
    v = torch.randn(2, n_kv_head, n_slot, width).double()
    outs, gradients = [], []
    for attend in (attention, fused_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        outs.append(attend(*leaves, mask, 0.4, causal))
        outs[-1].square().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert (outs[0] - outs[1]).abs().max() < 1e-12
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 1e-3
        assert (a - b).abs().max() < 1e-12


@torch.no_grad()
def test_attention_of_short_rows_in_bfloat16_on_a_cpu_is_by_products_else_fused():
    """What `fastest_attention` says, so that a number that moved is noticed."""
    cpu = torch.device("cpu")
    assert fastest_attention(cpu, torch.bfloat16, 2, 512) is attention
    assert fastest_attention(cpu, torch.bfloat16, 2, 513) is fused_attention
    assert fastest_attention(cpu, torch.bfloat16, 1, 513) is attention
    assert fastest_attention(cpu, torch.float32, 1, 8) is fused_attention
    assert fastest_attention(torch.device("cuda"), torch.bfloat16, 1, 8) is fused_attention


def test_causal_mask_by_hand():
    """Query positions 1 and 2 among four slots."""
    x = -math.inf
    mask = causal_mask(torch.tensor([[1, 2]]), 4, torch.float32)
    assert mask.tolist() == [[[0, 0, x, x], [0, 0, 0, x]]]


# ── Rotary embeddings ─────────────────────────────────────────────────────────────────────────────


def turned(x: torch.Tensor, position: int, scaling: RopeScaling | None = None) -> torch.Tensor:
    """x as one head, turned to where it stands at `position`."""
    table = RotaryTable(rotary_frequencies(len(x), scaling=scaling))
    return rotate(x.view(1, 1, 1, -1), table(torch.tensor([[position]]), 500, x.dtype)).flatten()


def test_rotation_by_hand():
    """C = 4, θ = 10,000: channels (0, 2) turn by 1 radian a position, (1, 3) by 0.01."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    got = turned(x, 3)
    expected = [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_rotation_at_position_0_is_none():
    x = torch.randn(10)
    assert torch.equal(turned(x, 0), x)


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 64)])
def test_score_depends_on_the_distance_alone(scaling):
    q, k = torch.randn(2, 10).double()
    for distance in (0, 1, 7, 100):
        scores = [
            turned(q, m, scaling) @ turned(k, m - distance, scaling) for m in (distance, 123, 499)
        ]
        assert max(scores) - min(scores) < 1e-12
    assert abs(turned(q, 9, scaling) @ turned(k, 8, scaling) - q @ k) > 1e-3


def test_angles_are_exact_at_far_positions_even_in_a_bfloat16_model():
    model = Llama(LlamaConfig(seq_len=4096, n_layer=1, d_head=16)).bfloat16()
    got = model.rotary(torch.tensor([[4095]]), 4096, torch.float32)[:, 0, 0, 0]
    for i in range(8):
        angle = 4095 * 10_000.0 ** (-2 * i / 16)
        assert abs(got[0, i] - math.cos(angle)) <= 1e-6 and abs(got[0, i + 8] - got[0, i]) == 0
        assert abs(got[1, i + 8] - math.sin(angle)) <= 1e-6 and got[1, i] == -got[1, i + 8]


def test_neighbouring_positions_differ_in_bfloat16():
    """As bfloat16 numbers 256 and 257 are one."""
    model = Llama(LlamaConfig(seq_len=300, n_layer=1)).bfloat16()
    a, b = model.rotary(torch.tensor([[256, 257]]), 258, torch.bfloat16)[:, 0].unbind(1)
    assert not torch.equal(a, b)


def test_scaled_frequencies_by_hand():
    """Original context 20π: ω turns 10 ω times. ω = 0.9 turns 9 > 4 and stays; ω = 0.01 turns
    0.1 < 1 and slows to a half; ω = 0.25 turns 2.5, half way from 1 to 4: (0.25 + 0.125)/2."""
    scaling = RopeScaling(2.0, 1.0, 4.0, 20 * math.pi)

    def scaled(omega):
        return rotary_frequencies(4, omega**-2, scaling)[1].item()

    assert scaled(0.9) == pytest.approx(0.9)
    assert scaled(0.01) == pytest.approx(0.005)
    assert scaled(0.25) == pytest.approx(0.1875)


def test_scaling_by_one_is_none():
    scaled = rotary_frequencies(32, scaling=RopeScaling(1.0, 1.0, 4.0, 64))
    torch.testing.assert_close(rotary_frequencies(32), scaled)


def test_scaled_frequencies_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    theirs = transformers.LlamaConfig(head_dim=64, rope_parameters=rope)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    preset = PRESETS["llama3.2-1b"]
    got = rotary_frequencies(preset.d_head, preset.rope_theta, preset.rope_scaling)
    torch.testing.assert_close(got.float(), expected, rtol=1e-5, atol=0)


# ── The whole ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=[attention, fused_attention])
def attend(request, monkeypatch):
    monkeypatch.setattr(model_file, "fastest_attention", lambda *_: request.param)


@torch.no_grad()
def test_no_token_sees_a_later_one(sizes, attend):
    model, rows = Llama(sizes).double().eval(), torch.randint(97, (2, 12))
    before = model(rows)
    for t in range(1, 12):
        changed = rows.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(90, (2, 12 - t))) % 97
        after = model(changed)
        assert (after[:, :t] - before[:, :t]).abs().max() < 1e-12
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@torch.no_grad()
def test_no_token_sees_a_later_one_whatever_the_positions(sizes, attend):
    """Positions without a cache say how far keys turn, and nothing about who sees whom."""
    model, rows = Llama(sizes).double().eval(), torch.randint(97, (2, 12))
    plain = model(rows)
    in_order = torch.arange(12).expand(2, 12)
    assert (model(rows, positions=in_order) - plain).abs().max() < 1e-12
    shifted = torch.stack((torch.arange(5, 17), torch.arange(28, 40)))  # distances are the same
    assert (model(rows, positions=shifted) - plain).abs().max() < 1e-9
    shuffled = torch.stack([torch.randperm(40)[:12] for _ in range(2)])
    before = model(rows, positions=shuffled)
    assert (before - plain).abs().max() > 1e-3
    for t in range(1, 12):
        changed = rows.clone()
        changed[:, t:] = (changed[:, t:] + 1 + torch.randint(90, (2, 12 - t))) % 97
        after = model(changed, positions=shuffled)
        assert (after[:, :t] - before[:, :t]).abs().max() < 1e-12
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@torch.no_grad()
def test_more_tokens_than_the_context_are_refused(sizes):
    """Context of 40: at once, in a cache that is larger, and by position."""
    model, rows = Llama(sizes).eval(), torch.randint(97, (1, 41))
    assert model(rows[:, :40]).shape == (1, 40, 97)
    with pytest.raises(ValueError, match="41 tokens are more than the context of 40"):
        model(rows)
    cache = model.new_cache(1, 50)
    model(rows[:, :39], cache)
    with pytest.raises(ValueError, match="41 tokens are more than the context of 40"):
        model(rows[:, :2], cache)
    assert cache.length == 39  # nothing happened
    model(rows[:, :1], cache)
    with pytest.raises(ValueError, match="41 tokens are more than the context of 40"):
        model(rows[:, :2], positions=torch.tensor([[3, 40]]))
    with pytest.raises(ValueError, match="41 tokens are more than the context of 40"):
        model(rows, positions=torch.zeros(1, 41, dtype=torch.int64))


@pytest.mark.parametrize("n_token", [12, 40])
def test_logits_do_not_depend_on_whether_gradients_are_on(sizes, n_token):
    """In bfloat16, by autocast and by conversion: the same kernel, so the same bits."""
    model, rows = Llama(sizes).eval(), torch.randint(97, (2, n_token))
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(rows).detach()
        with torch.no_grad():
            scored = model(rows)
        with torch.inference_mode():
            sampled = model(rows)
    assert torch.equal(trained, scored) and torch.equal(trained, sampled)
    model.bfloat16()
    with torch.no_grad():
        scored = model(rows)
    assert torch.equal(model(rows), scored)


@torch.no_grad()
def test_every_token_sees_every_earlier_one(sizes, attend):
    model, rows = Llama(sizes).double().eval(), torch.randint(97, (1, 12))
    before = model(rows)[0, -1]
    for t in range(12):
        changed = rows.clone()
        changed[0, t] = (changed[0, t] + 1) % 97
        assert (model(changed)[0, -1] - before).abs().max() > 1e-6, t


@torch.no_grad()
def test_both_ways_to_attend_give_the_same_logits(sizes, monkeypatch):
    model, rows = Llama(sizes).double().eval(), torch.randint(97, (2, 12))
    logits = []
    for wanted in (attention, fused_attention):
        monkeypatch.setattr(model_file, "fastest_attention", lambda *_, w=wanted: w)
        logits.append(model(rows))
    assert (logits[0] - logits[1]).abs().max() < 1e-12


@torch.no_grad()
def test_order_matters(sizes):
    model = Llama(sizes).eval()
    a, b = model(torch.tensor([[1, 2, 3, 9], [2, 1, 3, 9]]))[:, -1]
    assert (a - b).abs().max() > 1e-3


def test_spread_of_the_initial_weights():
    """1/√columns; the two that write to the stream 1/√(columns · 2 · n_layer), n_layer = 3."""
    model = Llama(
        LlamaConfig(
            vocab_size=1000, n_layer=3, d_model=192, d_head=40, d_ff=500, tie_embeddings=False
        )
    )
    expected = {"wq": 192, "wk": 192, "wv": 192, "wo": 160 * 6}
    expected |= {"w1": 192, "w3": 192, "w2": 500 * 6}
    for block in model.blocks:
        for name, variance in expected.items():
            layer = block.ffn if hasattr(block.ffn, name) else block.attention
            weight = getattr(layer, name).weight
            assert weight.std().item() == pytest.approx(variance**-0.5, rel=0.03), name
            assert abs(weight.mean()) < 0.02 * weight.std()
    for weight in (model.embedding.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(192**-0.5, rel=0.03)
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_loss_before_training_is_ln_v_and_a_half(tied):
    """ln 1024 + ½ = 7.43: noise of variance 1 in the logits costs half its variance."""
    sizes = dataclasses.replace(PRESETS["tiny"], vocab_size=1024, tie_embeddings=tied)
    model = Llama(sizes).eval()
    rows = torch.randint(1024, (8, 129))  # within any preset's context
    loss = F.cross_entropy(model(rows[:, :-1]).mT, rows[:, 1:]).item()
    assert loss == pytest.approx(math.log(1024) + 0.5, abs=0.06)


def test_tied_weights_are_one_and_stay_one(sizes):
    model = Llama(sizes)
    n = sum(p.numel() for p in model.parameters())
    untied = Llama(dataclasses.replace(sizes, tie_embeddings=False))
    assert sum(p.numel() for p in untied.parameters()) == n + 97 * 24
    assert untied.head.weight.data_ptr() != untied.embedding.weight.data_ptr()
    for again in (model, model.to(torch.float64), model.bfloat16()):
        assert again.head.weight is again.embedding.weight
    model.load_state_dict(Llama(sizes).state_dict())
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_every_weight_gets_a_gradient(sizes):
    model = Llama(sizes)
    model(torch.randint(97, (2, 12))).square().mean().backward()
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.abs().max() > 0, name


@torch.no_grad()
def test_bfloat16_is_float32_with_fewer_digits(sizes):
    """By autocast and by conversion; logits have a spread of 1."""
    model, rows = Llama(sizes).eval(), torch.randint(97, (2, 12))
    exact = model(rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(rows) - exact).abs().max() < 0.1
    assert (model.bfloat16()(rows).float() - exact).abs().max() < 0.1


def test_flops_by_hand():
    """One layer, D 4, H 2, K 1, C 6, F 3, V 7: wq, wk, wv 24·4, wo 4·12, w1, w3 6·4, w2 4·3,
    head 7·4: 208 weights.

    6 · 208 + 12 · 1 layer · 2 heads · 6 channels · 10 positions = 1,248 + 1,440 = 2,688."""
    for tied in (True, False):
        sizes = LlamaConfig(
            vocab_size=7, n_layer=1, n_head=2, n_kv_head=1, d_model=4, d_head=6, d_ff=3,
            tie_embeddings=tied,
        )  # fmt: skip
        model = Llama(sizes)
        assert model.flops_per_token(10) == 2688


def test_head_width_is_free():
    model = Llama(LlamaConfig(vocab_size=11, n_layer=1, d_model=10, d_head=6, d_ff=12))
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 11)


@torch.no_grad()
def test_cache_goes_on_from_where_it_is(sizes):
    """Two calls without positions: the second begins at slot 3."""
    model, rows = Llama(sizes).eval(), torch.randint(97, (1, 6))
    cache = model.new_cache(1, 6)
    parts = [model(rows[:, :3], cache), model(rows[:, 3:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), model(rows), rtol=0, atol=1e-5)
