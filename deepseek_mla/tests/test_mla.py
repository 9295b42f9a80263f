"""Latent attention: three forms and one answer, the scale, the cache, and a Llama inside of it."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import convert
from forms import cached_logits, largest_difference, using
from mla import absorbed, crossover, fewest, multiplications, naive
from model import PRESETS, Deepseek, KVCache, LatentAttention, attention, causal_mask
from mtp import DeepseekMTP
from yarn import YarnScaling, mscale

FORMS = (naive, absorbed, fewest)


def plain(q, k, v):
    """softmax(q·kᵀ)·v with a causal mask, for S ≥ T."""
    T, S = q.shape[2], k.shape[2]
    mask = causal_mask(torch.arange(S - T, S)[None], S, q.dtype)
    return attention(q, k, v, mask, q.shape[3] ** -0.5 if k.shape[1] > 1 else SCALE, False)


SCALE = 10**-0.5  # of the widths below, N + P = 6 + 4


@given(
    T=st.integers(1, 5),
    before=st.integers(0, 6),
    H=st.integers(2, 4),
    V=st.sampled_from([3, 6, 15]),
)
def test_naive_and_absorbed_are_one_function(T, before, H, V):
    """With values narrower and wider than keys, in float64."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    q, rotary_q, memory = draw(2, H, T, 6), draw(2, H, T, 4), draw(2, 1, T + before, 9)
    up = draw(H, 6 + V, 5)
    first, second = (form(q, rotary_q, memory, up, plain) for form in (naive, absorbed))
    assert first.shape == (2, H, T, V)
    assert (first - second).abs().max() <= 1e-10


def test_a_score_by_hand():
    """One head, N = P = V = R = 1 (the rotary part is given as it is).

    Two tokens have latents 2 and 3 and rotary keys 1 and 0. W_uk = 0.5 and W_uv = 10, so the keys
    are [1, 1] and [1.5, 0], the values 20 and 30. The query [2, 1] has the scores 2·1 + 1·1 = 3
    and 2·1.5 + 1·0 = 3: equal, so the result is the mean of the values, 25. Absorbed: the query
    becomes [2·0.5, 1] = [1, 1], its scores with [2, 1] and [3, 0] are 3 and 3, the mean latent is
    2.5, and 10 · 2.5 = 25.
    """
    q, rotary_q = torch.tensor([[[[2.0]]]]), torch.tensor([[[[1.0]]]])
    memory, up = torch.tensor([[[[2.0, 1.0], [3.0, 0.0]]]]), torch.tensor([[[0.5], [10.0]]])
    seen = []

    def attend(q, k, v):
        scores = q @ k.mT
        seen.append(scores.flatten().tolist())
        return scores.softmax(dim=-1) @ v

    for form in (naive, absorbed):
        assert form(q, rotary_q, memory, up, attend).item() == pytest.approx(25.0)
    assert seen == [[3.0, 3.0], [3.0, 3.0]]


@pytest.mark.parametrize("yarn", [None, YarnScaling(factor=4.0, original_seq_len=12)])
@pytest.mark.parametrize("changes", [{}, {"q_rank": 0}, {"d_value": 30}, {"d_nope": 0}], ids=str)
def test_forms_are_one_in_a_model(sizes, yarn, changes):
    """Training, prefill, chunks and single tokens, to 1e-10 in float64."""
    model = DeepseekMTP(dataclasses.replace(sizes, rope_scaling=yarn, **changes)).double().eval()
    assert largest_difference(model, torch.randint(97, (2, 13))) <= 1e-10


def test_gradients_of_the_forms_are_one(model):
    model.double()
    tokens, found = torch.randint(97, (2, 9)), []
    for form in (naive, absorbed):
        with using(model, form):
            loss = model(tokens).logsumexp(dim=-1).square().sum()
        found.append(torch.autograd.grad(loss, list(model.blocks.parameters())))
    assert all(
        (a - b).abs().max() <= 1e-10 * (1 + a.abs().max()) for a, b in zip(*found, strict=True)
    )


def test_every_split_of_a_text_gives_the_same_logits(model):
    model.double()
    tokens = torch.randint(97, (2, 11))
    with torch.no_grad():
        whole = model(tokens)
        for form in FORMS:
            with using(model, form):
                for chunk in range(1, 12):
                    assert (cached_logits(model, tokens, chunk) - whole).abs().max() <= 1e-10


def test_rows_of_different_length_do_not_see_each_other(model):
    """As generate.py uses it: a short row's slots beyond its end are overwritten."""
    model.double()
    long, short = torch.randint(97, (9,)), torch.randint(97, (5,))
    cache = model.new_cache(2, 12)
    both = torch.stack((long, torch.cat((short, torch.zeros(4, dtype=torch.int64)))))
    with torch.no_grad():
        model(both, cache)
        cache.length += 1
        step = model(torch.tensor([[7], [8]]), cache, torch.tensor([[9], [5]]))
        for row, text, token in ((0, long, 7), (1, short, 8)):
            alone = model(torch.cat((text, torch.tensor([token])))[None])[0, -1]
            assert (step[row, 0] - alone).abs().max() <= 1e-10


def test_the_future_changes_nothing(model):
    model.double()
    tokens = torch.randint(97, (1, 12))
    other = tokens.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 97
    with torch.no_grad():
        for form in FORMS:
            with using(model, form):
                difference = (model(tokens) - model(other))[:, :8].abs().max()
                assert difference <= 1e-12  # products of other sizes round otherwise


def test_scale_is_that_of_the_whole_key_and_of_yarn(sizes):
    """(N + P)^−½ · mscale², not the default of PyTorch's kernel for [c ; r] or values."""
    scaling = YarnScaling(factor=40.0, mscale=0.707)
    for yarn, factor in ((None, 1.0), (scaling, (0.1 * 0.707 * 3.6888794541) + 1)):
        attention = Deepseek(dataclasses.replace(sizes, rope_scaling=yarn)).blocks[0].attention
        assert attention.scale == pytest.approx(18**-0.5 * factor**2, rel=1e-9)
    assert mscale(None) == 1.0 and mscale(YarnScaling(factor=1.0)) == 1.0


def test_fewest_is_the_cheaper_of_the_two_and_counts_right():
    """By hand: N = 2, P = 1, V = 3, R = 4, two new tokens, five in the cache.

    naive: 5 keys and values of 4·(2 + 3) = 100, then 2·5·(2 + 1 + 3) = 60. Absorbed: 2·20 = 40 to
    carry there and back, then 2·5·(4 + 1 + 4) = 90.
    """
    assert multiplications(naive, 2, 5, (2, 1, 3, 4)) == 160
    assert multiplications(absorbed, 2, 5, (2, 1, 3, 4)) == 130
    v3 = (128, 64, 128, 512)
    counts = lambda T, S: [multiplications(f, T, S, v3) for f in (naive, absorbed)]  # noqa: E731
    assert min(counts(1, 2048)) == counts(1, 2048)[1]  # to write: absorbed
    assert min(counts(2048, 2048)) == counts(2048, 2048)[0]  # to read: naive


def test_crossover_is_where_the_counts_meet():
    v3, endless = (128, 64, 128, 512), 10**7
    assert crossover(v3) == pytest.approx(170.67, abs=0.01)
    for T, expected in ((170, absorbed), (172, naive)):
        best = min((naive, absorbed), key=lambda form: multiplications(form, T, endless, v3))
        assert best is expected
    assert crossover((32, 16, 32, 32)) == float("inf")


def test_absorbed_never_makes_a_key(model, monkeypatch):
    """No tensor of S rows and H heads comes to be: that is the point of it."""
    shapes = []
    original = torch.Tensor.__matmul__

    def watched(a, b):
        result = original(a, b)
        shapes.append(tuple(result.shape))
        return result

    with torch.no_grad():
        cache = model.new_cache(1, 30)
        model(torch.randint(97, (1, 29)), cache)
        monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
        model(torch.randint(97, (1, 1)), cache)
    heads = [shape for shape in shapes if len(shape) == 4]  # (B, H, T, …)
    assert len(heads) == 2 * 3 and all(shape[2] == 1 for shape in heads)


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measured_cache_bytes_are_the_formula(sizes, dtype):
    from memory import latent_numbers

    model = Deepseek(sizes).to(dtype)
    cache = model.new_cache(2, 30)
    measured = sum(t.untyped_storage().nbytes() for t in cache.keys + cache.values)
    numbers = latent_numbers(sizes.n_layer, sizes.kv_rank, sizes.d_rope)
    assert measured == 2 * 30 * numbers * torch.finfo(dtype).bits // 8


def test_caches_of_the_picture_are_the_formulas():
    import figures

    sizes = figures.caches()
    assert all(measured == computed for measured, computed in sizes.values())
    assert [measured for measured, _ in sizes.values()] == [3_997_696, 249_856, 70_272]


def test_where_93_percent_come_from():
    """95 layers · 2 · 8 heads · 128 = 194,560 numbers; 60 · (512 + 64) = 34,560."""
    from memory import famous_savings, grouped_numbers, latent_numbers

    assert grouped_numbers(95, 8, 128) == 194_560 and latent_numbers(60, 512, 64) == 34_560
    shares = [round(100 * share, 1) for share in famous_savings().values()]
    assert shares == [93.3, 82.2, 71.9, 98.6]
    v3 = PRESETS["v3"]  # keys of 192 and values of 128 are 160 twice
    of_v3 = latent_numbers(61, 512, 64) / grouped_numbers(61, v3.n_head, 160)
    assert round(1 / of_v3, 1) == 71.1


# ── A Llama inside ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_a_llama_is_a_deepseek(n_kv_head):
    """transformers' Llama, converted: the same logits to 1e-10 and a cache as large."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=40, intermediate_size=30, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=n_kv_head, max_position_embeddings=64,
        rms_norm_eps=1e-2, initializer_range=0.2, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    ours = convert.llama_to_deepseek(theirs.state_dict(), config.to_dict()).eval()
    tokens = torch.randint(61, (2, 50))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        for form in FORMS:
            with using(ours, form):
                # transformers' rotary angles are float32, so they differ by more than rounding
                assert (ours(tokens) - expected).abs().max() <= 1e-5
                assert (cached_logits(ours, tokens, 7) - expected).abs().max() <= 1e-5
    like = torch.empty(0, dtype=torch.float64)
    grouped = KVCache(2, (1, n_kv_head, 64, 10), like)
    latent = ours.new_cache(1, 64)
    assert sum(t.nbytes for t in latent.keys) == sum(
        t.nbytes for t in grouped.keys + grouped.values
    )


def test_grouped_attention_is_latent_attention_to_the_last_digit():
    """Without transformers' float32 angles: written out here in float64."""
    from model import RotaryTable, rotate
    from yarn import yarn_frequencies

    H, K, C, D, T = 6, 3, 4, 10, 7
    wq, wk, wv = (torch.randn(n * C, D, dtype=torch.float64) for n in (H, K, K))
    x = torch.randn(1, T, D, dtype=torch.float64)
    positions = torch.arange(T)[None]
    rotary = RotaryTable(yarn_frequencies(C, 100.0, None))(positions, T, torch.float64)
    q, k = (rotate((x @ w.T).view(1, T, -1, C), rotary).transpose(1, 2) for w in (wq, wk))
    v = (x @ wv.T).view(1, T, K, C).transpose(1, 2)
    expected = attention(q, k, v, None, C**-0.5, True).transpose(1, 2).flatten(2)

    layer = LatentAttention(0, D, H, (0, K * C), (0, K * C, C), (K * C) ** -0.5).double()
    layer.kv_norm, layer.wo = torch.nn.Identity(), torch.nn.Identity()
    layer.load_state_dict(convert.grouped_to_latent(wq, wk, wv, H, K))
    from model import Context

    wide = RotaryTable(yarn_frequencies(C, 100.0, None).repeat(K))(positions, T, torch.float64)
    for form in FORMS:
        layer.form = form
        found = layer(x, Context(wide, None, True, attention, None, positions))
        assert (found - expected).abs().max() <= 1e-12
