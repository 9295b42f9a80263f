"""The model against PyTorch's own, against itself on other paths, and against what must hold."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from modelling import sentences, shaken
from torch import nn

import data
import model as definition
from model import (
    PRESETS,
    AddNorm,
    CrossAttention,
    FeedForward,
    LayerNorm,
    SelfAttention,
    Transformer,
    TransformerConfig,
    causal_mask,
    dot_product_attention,
    fused_attention,
    padding_mask,
    sinusoids,
)

ATTENDS = (dot_product_attention, fused_attention)


def batch(lengths=(7, 3, 5), target_lengths=(6, 9, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target with padding; the target begins with the start."""
    source = data.pad(sentences(list(lengths)))
    target = data.pad([[2, *one] for one in sentences(list(target_lengths))])
    return source, target


# ── Parity with torch.nn.Transformer ──────────────────────────────────────────────────────────────


def theirs_of(ours: Transformer) -> nn.Transformer:
    """A torch.nn.Transformer with our weights. Its post-norm stacks end with one more norm."""
    c, first = ours.config, ours.config.norm == "pre"
    shape = {"d_model": c.d_model, "nhead": c.n_head, "dim_feedforward": c.d_ff, "dropout": 0.0,
             "activation": c.activation, "layer_norm_eps": c.norm_eps, "batch_first": True,
             "norm_first": first}  # fmt: skip
    layer = nn.TransformerEncoderLayer(**shape)
    encoder = nn.TransformerEncoder(
        layer, c.n_layer, nn.LayerNorm(c.d_model) if first else None, enable_nested_tensor=False
    )
    layer = nn.TransformerDecoderLayer(**shape)
    decoder = nn.TransformerDecoder(
        layer, c.decoder_layers, nn.LayerNorm(c.d_model) if first else None
    )
    theirs = nn.Transformer(**shape, custom_encoder=encoder, custom_decoder=decoder)
    with torch.no_grad():
        for their_name, parameter in theirs.to(ours.embedding.weight.dtype).named_parameters():
            parameter.copy_(torch.cat([ours.get_parameter(n) for n in our_names(their_name)]))
    return theirs.train(ours.training)


def our_names(name: str) -> list[str]:
    """The names that a parameter of torch.nn.Transformer has in our model; some are two of ours."""
    stack, rest = name.split(".", 1)
    norms = ["attention_sum", "ffn_sum"]
    if stack == "decoder":
        norms.insert(1, "cross_sum")
    if rest.startswith("norm."):
        return [f"{stack}_norm.{rest.removeprefix('norm.')}"]
    _, layer, inner = rest.split(".", 2)
    inner = inner.replace("self_attn.in_proj_", "attention.wqkv.").replace("out_proj", "wo")
    inner = inner.replace("self_attn.", "attention.").replace("multihead_attn.", "cross.")
    inner = inner.replace("linear1", "ffn.w1").replace("linear2", "ffn.w2")
    for number, norm in enumerate(norms, 1):
        inner = inner.replace(f"norm{number}.", f"{norm}.norm.")
    before = f"{stack}.{layer}."
    if "cross.in_proj_" in inner:
        return [before + inner.replace("in_proj_", one) for one in ("wq.", "wkv.")]
    return [before + inner]


def their_logits(theirs: nn.Transformer, ours: Transformer, source, target) -> torch.Tensor:
    """What torch.nn.Transformer makes of the same tokens, with its own masks."""
    table = sinusoids(64, ours.config.d_model).to(ours.embedding.weight.dtype)

    def embed(tokens):
        return ours.embedding(tokens) * ours.config.d_model**0.5 + table[: tokens.shape[1]]

    later = torch.ones(target.shape[1], target.shape[1], dtype=torch.bool).triu(1)
    features = theirs(
        embed(source), embed(target), tgt_mask=later, src_key_padding_mask=source == 0,
        tgt_key_padding_mask=target == 0, memory_key_padding_mask=source == 0,
    )  # fmt: skip
    return F.linear(features, ours.embedding.weight)


@pytest.mark.parametrize(
    ("norm", "activation", "dtype", "limit"),
    [("post", "relu", torch.float64, 1e-10), ("pre", "relu", torch.float64, 1e-10),
     ("post", "gelu", torch.float32, 1e-5), ("pre", "relu", torch.float32, 1e-5)],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_torch(norm, activation, dtype, limit):
    """With masks and padding, forward and backward, relative to the largest number."""
    config = TransformerConfig(
        vocab_size=37, n_layer=2, n_decoder_layer=3, n_head=3, d_model=24, d_ff=20, dropout=0.0,
        norm=norm, activation=activation, norm_eps=1e-5,
    )  # fmt: skip
    ours = shaken(Transformer(config)).to(dtype)
    theirs, (source, target) = theirs_of(ours), batch()
    logits, real = ours(source, target), target != 0
    expected = their_logits(theirs, ours, source, target)
    weight = torch.randn_like(logits)
    assert (logits[real] - expected[real]).abs().max() <= limit * max(1.0, expected.abs().max())
    (logits * weight)[real].sum().backward()
    found = {
        name: torch.cat([ours.get_parameter(one).grad for one in our_names(name)])
        for name, _ in theirs.named_parameters()
    }
    (expected * weight)[real].sum().backward()
    for name, parameter in theirs.named_parameters():
        error = (found[name] - parameter.grad).abs().max()
        assert error <= limit * max(1.0, parameter.grad.abs().max()), name


def test_every_weight_of_the_stacks_took_part_in_that_comparison(model):
    names = {one for name, _ in theirs_of(model).named_parameters() for one in our_names(name)}
    ours = {name for name, _ in model.named_parameters()}
    assert names == ours - {"embedding.weight"}


# ── Parts ─────────────────────────────────────────────────────────────────────────────────────────


def test_attention_by_hand():
    """q·k = (ln 9, 0): weights 0.9 and 0.1, values 10 and 20: 0.9 · 10 + 0.1 · 20 = 11."""
    q = torch.tensor([[math.log(9), 0.0]])[None, None]
    k, v = torch.eye(2)[None, None], torch.tensor([[10.0], [20.0]])[None, None]
    for attend in ATTENDS:
        v_wide = v.expand(-1, -1, -1, 2)
        assert attend(q, k, v_wide, None, 1.0, False)[..., 0].item() == pytest.approx(11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_written_out_attention_is_the_kernels(causal, masked):
    """Outputs and gradients, in float64; a mask per row as padding gives it."""
    if causal and masked:
        pytest.skip("no layer has both")
    T, S = (5, 5) if causal else (3, 7)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    mask = None
    if masked:
        mask = padding_mask(torch.tensor([[1] * S, [1] * 2 + [0] * (S - 2)]), 0, torch.float64)
    outs = [attend(q, k, v, mask, 0.3, causal) for attend in ATTENDS]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)
    weight = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in outs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_multi_head_attention_is_one_head_at_a_time():
    """Head h is columns h·C … of queries, keys and values; the heads are joined by wo (§3.2.2)."""
    layer, x = shaken(SelfAttention(12, 3)).double(), torch.randn(2, 5, 12).double()
    ours = layer(*layer.queries_keys_values(x), None, False, dot_product_attention)
    wq, wk, wv = layer.wqkv.weight.chunk(3)
    bq, bk, bv = layer.wqkv.bias.chunk(3)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        q, k, v = x @ wq[part].T + bq[part], x @ wk[part].T + bk[part], x @ wv[part].T + bv[part]
        heads.append((q @ k.mT / math.sqrt(4)).softmax(-1) @ v)
    torch.testing.assert_close(ours, layer.wo(torch.cat(heads, -1)), rtol=0, atol=1e-12)


def test_cross_attention_of_a_sentence_with_itself_is_self_attention():
    one, other = shaken(SelfAttention(12, 3)).double(), CrossAttention(12, 3).double()
    state = {"wo.weight": one.wo.weight, "wo.bias": one.wo.bias}
    for part in ("weight", "bias"):
        tensor = getattr(one.wqkv, part)
        state |= {f"wq.{part}": tensor[:12], f"wkv.{part}": tensor[12:]}
    other.load_state_dict(state)
    x = torch.randn(2, 5, 12).double()
    apart = (other.queries(x), *other.keys_values(x))
    for a, b in zip(one.queries_keys_values(x), apart, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("d_model", [2, 3, 64])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm_written_out(d_model, eps):
    """Against PyTorch's, constant rows and two numbers too: variance over D, ε under the root."""
    layer = shaken(LayerNorm(d_model, eps)).double()
    x = torch.cat((torch.randn(5, d_model), torch.full((2, d_model), 3.0))).double()
    theirs = F.layer_norm(x, (d_model,), layer.weight, layer.bias, eps)
    torch.testing.assert_close(layer.written_out(x), theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x), theirs, rtol=0, atol=0)


def test_layer_norm_by_hand():
    """(1, 3): mean 2, variance 1: (−1, 1)."""
    assert LayerNorm(2, 0.0)(torch.tensor([1.0, 3.0])).tolist() == pytest.approx([-1, 1])


@pytest.mark.parametrize("activation", ["relu", "swish", "gelu"])
def test_feed_forward_is_equation_2(activation):
    layer, x = FeedForward(6, 9, activation).double(), torch.randn(4, 6).double()
    inner = x @ layer.w1.weight.T + layer.w1.bias
    inner = {"relu": inner.clamp(min=0), "swish": inner * inner.sigmoid(),
             "gelu": inner * 0.5 * (1 + (inner / math.sqrt(2)).erf())}[activation]  # fmt: skip
    expected = inner @ layer.w2.weight.T + layer.w2.bias
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_positions_are_the_papers():
    """PE(pos, 2i) = sin(pos / 10000^(2i/D)); sines first is the same, permuted."""
    table = sinusoids(300, 10)
    for pos, i in itertools.product((0, 1, 7, 299), range(5)):
        angle = pos / 10_000 ** (2 * i / 10)
        assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
        assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)
    other = sinusoids(300, 10, "sines-first")
    assert torch.equal(other, torch.cat((table[:, 0::2], table[:, 1::2]), dim=1))


def test_positions_are_not_rounded_with_the_weights(sizes):
    """In bfloat16 the positions 256 and 257 are one number; their vectors must not be."""
    table = definition.PositionTable(24, "interleaved")
    vectors = table(0, 300, torch.zeros(1, dtype=torch.bfloat16))
    assert not torch.equal(vectors[256], vectors[257])
    exact = sinusoids(300, 24)
    assert (vectors.double() - exact).abs().max() <= 2**-8  # rounded once


@pytest.mark.parametrize("before", [False, True])
def test_residual_sum(before):
    layer, x = AddNorm(6, 1e-5, 0.0, before), torch.randn(3, 6)
    ours = layer(x, torch.sin)
    expected = x + torch.sin(layer.norm(x)) if before else layer.norm(x + torch.sin(x))
    assert torch.equal(ours, expected)


def test_dropout_is_where_the_paper_has_it(sizes):
    """After each layer and on the sum of embedding and position, and nowhere else (§5.4)."""
    model = Transformer(sizes)
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    sums = {"attention_sum", "ffn_sum"}
    expected = {f"encoder.{i}.{s}.dropout" for i in range(2) for s in sums}
    expected |= {f"decoder.{i}.{s}.dropout" for i in range(3) for s in sums | {"cross_sum"}}
    assert names == expected | {"dropout"}


# ── Masks: nothing leaks, nothing is NaN ──────────────────────────────────────────────────────────


def test_a_later_token_changes_nothing_before_it(model):
    """Bit-equal, for every place."""
    source, target = batch((7, 7), (9, 9))
    target = target[:, :-1]
    before = model(source, target)
    for t in range(1, target.shape[1]):
        changed = target.clone()
        changed[:, t:] = (changed[:, t:] + 5) % 30 + 4
        after = model(source, changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_random_targets_cannot_be_learned_by_looking_ahead(sizes):
    """With a leak the loss of random tokens would fall to 0; without one it stays at ln V."""
    model = Transformer(sizes)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):  # new random tokens each step: nothing to learn by heart
        target = torch.randint(4, 37, (32, 12))
        logits = model(torch.full((32, 2), 5), target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[-10:]) > math.log(33) - 0.15


def test_more_padding_changes_nothing(model):
    source, target = batch()
    before = model(source, target)
    wider = F.pad(source, (0, 6)), F.pad(target, (0, 4))
    after = model(*wider)[:, : target.shape[1]]
    real = target != 0
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=1e-12)


def test_a_sentence_alone_is_the_sentence_beside_others(model):
    source, target = batch()
    together = model(source, target)
    for row in range(3):
        s, t = source[row][source[row] != 0][None], target[row][target[row] != 0][None]
        alone = model(s, t)[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=0, atol=1e-12)


def test_no_sentence_at_all(model):
    """A rank's share of a batch can be empty, and has to take part in the step all the same."""
    logits = model(torch.zeros(0, 4, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64))
    assert logits.shape == (0, 3, 37)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_what_padding_embeds_to_reaches_no_real_token(model):
    source, target = batch()
    real = target != 0
    before = model(source, target)[real][:, 1:]
    with torch.no_grad():
        model.embedding.weight[0] += 100.0
    torch.testing.assert_close(model(source, target)[real][:, 1:], before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attend", ATTENDS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_row_of_nothing_but_padding_is_finite(dtype, attend, norm, monkeypatch):
    """Outputs and gradients; a softmax over −∞ alone would be NaN."""
    monkeypatch.setattr(definition, "quickest_attention", lambda *_: attend)
    config = TransformerConfig(vocab_size=37, n_layer=2, n_head=3, d_model=24, d_ff=20, norm=norm)
    model = shaken(Transformer(config)).to(dtype)
    source, target = batch()
    source[1], target[2] = 0, 0
    logits = model(source, target)
    assert logits.isfinite().all()
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_formats_hide_padding_as_well(dtype):
    """A large negative number in place of −∞ would let padding through, or overflow, in half."""
    tokens = torch.tensor([[5, 6, 0, 0]])
    mask = padding_mask(tokens, 0, dtype)
    q, k, v = (50 * torch.randn(1, 2, 4, 8).to(dtype) for _ in range(3))
    for attend in ATTENDS:
        out = attend(q, k, v, mask, 1.0, False)
        v_changed = v.clone()
        v_changed[:, :, 2:] = 1000
        assert torch.equal(out, attend(q, k, v_changed, mask, 1.0, False))


def test_masks_by_hand():
    inf = -math.inf
    assert causal_mask(torch.tensor([[1, 2]]), 3, torch.float32).tolist() == [
        [[0, 0, inf], [0, 0, 0]]
    ]
    tokens = torch.tensor([[5, 0], [0, 0], [5, 6]])
    mask = padding_mask(tokens, 0, torch.float32)
    assert mask.tolist() == [[[0, inf]], [[0, 0]], [[0, 0]]]
    assert padding_mask(tokens[2:], 0, torch.float32) is None


# ── The cache ─────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.booleans())
def test_cached_is_uncached_for_every_split(chunks, pre_norm):
    torch.manual_seed(0)
    config = TransformerConfig(
        vocab_size=37, n_layer=1, n_decoder_layer=2, n_head=3, d_model=24, d_ff=20,
        norm="pre" if pre_norm else "post",
    )  # fmt: skip
    model = shaken(Transformer(config)).double().eval()
    source, target = data.pad(sentences([6, 2])), torch.randint(4, 37, (2, sum(chunks)))
    memory = model.encode(source)
    expected, cache = model.decode(target, memory), model.new_cache(memory, 1, sum(chunks))
    found = [model.decode(part, cache=cache) for part in target.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_beams_share_the_source_and_can_be_reordered(model):
    """Three rows a sentence; after re-ordering, each goes on from the row that it was given."""
    source = data.pad(sentences([6, 2]))
    memory = model.encode(source)
    target = torch.randint(4, 37, (6, 5))
    cache = model.new_cache(memory, 3, 10)
    model.decode(target, cache=cache)
    order = torch.tensor([2, 2, 0, 4, 5, 4])
    cache.reorder(order)
    more = torch.randint(4, 37, (6, 2))
    found = model.decode(more, cache=cache)
    for row in range(6):
        alone = model.encode(source[row // 3][source[row // 3] != 0][None])
        whole = torch.cat((target[order[row]], more[row]))[None]
        expected = model.decode(whole, alone)[0, 5:]
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_full_cache_is_refused(model):
    cache = model.new_cache(model.encode(torch.tensor([[5, 3]])), 1, 2)
    model.decode(torch.tensor([[2, 5]]), cache=cache)
    with pytest.raises(ValueError, match="2 \\+ 1 tokens do not fit 2 slots"):
        model.decode(torch.tensor([[5]]), cache=cache)


# ── Sizes ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_parameters_are_counted(name, norm):
    import dataclasses

    config = dataclasses.replace(PRESETS[name], norm=norm, logits_bias=norm == "pre")
    with torch.device("meta"):
        count = sum(p.numel() for p in Transformer(config).parameters())
    assert count == config.n_parameter


@pytest.mark.parametrize(
    ("name", "papers", "tolerance"), [("base", 65e6, 0.03), ("big", 213e6, 0.01)]
)
def test_parameters_are_those_of_the_paper(name, papers, tolerance):
    """Table 3 says 65 and 213 million, rounded, with about 37,000 tokens (§5.1).

    Ours are 63.1 and 214.2 million. No one vocabulary gives both of the paper's numbers.
    """
    count = PRESETS[name].n_parameter
    assert count == {"base": 63_082_496, "big": 214_245_376}[name]
    assert abs(count / papers - 1) <= tolerance


def test_untrained_loss_is_a_little_more_than_a_blind_guess():
    """ln V for the guess, and about half a nat for the noise in the logits."""
    model = Transformer(PRESETS["tiny"]).eval()
    source, target = torch.randint(4, 1000, (2, 16, 12))
    logits = model(source, target[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten()).item()
    assert loss == pytest.approx(math.log(1000) + 0.55, abs=0.25)


def test_initial_spread_of_the_weights():
    """N(0, 2/(rows + columns)); wqkv is three square matrices."""
    model = Transformer(TransformerConfig(d_model=96, n_head=4, d_ff=200))
    block = model.encoder[0]
    assert block.attention.wqkv.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    cross = model.decoder[0].cross
    assert cross.wkv.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert block.ffn.w1.weight.std().item() == pytest.approx((2 / 296) ** 0.5, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(96**-0.5, rel=0.05)
    assert block.ffn.w1.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"n_head": 3}, "n_head 3 does not divide"), ({"d_model": 9, "n_head": 1}, "d_model 9 is odd"),
     ({"n_layer": 0}, "n_layer must be at least 1"), ({"norm": "both"}, "norm must be one of"),
     ({"dropout": 1.0}, "dropout 1.0"), ({"pad_id": 1000}, "pad_id 1000 is not in"),
     ({"end_id": 2}, "end_id 2 is the padding or"), ({"activation": "tanh"}, "activation"),
     ({"d_ff": 2**31}, "d_ff must be at least 1 and below")],
)  # fmt: skip
def test_sizes_that_cannot_be_built(wrong, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**wrong)


def test_too_many_tokens_are_refused(model):
    with pytest.raises(ValueError, match="41 tokens are more than the longest, 40"):
        model.encode(torch.full((1, 41), 5))
    with pytest.raises(ValueError, match="41 tokens"):
        model(torch.full((1, 4), 5), torch.full((1, 41), 5))


def test_overfits_one_batch(sizes):
    """Five sentence pairs by heart, in a hundred steps."""
    model = Transformer(sizes)
    source, target = (
        data.pad(sentences([5, 7, 4, 6, 3])),
        data.pad([[2, *one] for one in sentences([6, 3, 5, 8, 4])]),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, betas=(0.9, 0.98))
    for _ in range(120):
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_flops_are_those_of_the_products(monkeypatch):
    """Counted by PyTorch on a real step; softmax, norms and the like are no products."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(definition, "quickest_attention", lambda *_: dot_product_attention)
    config = TransformerConfig(vocab_size=50, d_model=24, n_head=3, d_ff=40, n_decoder_layer=3)
    model = Transformer(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.full((1, 9), 5), torch.full((1, 7), 5)).sum().backward()
    assert counter.get_total_flops() == model.flops(9, 7)
