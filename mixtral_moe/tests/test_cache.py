"""Every way to feed tokens through the cache gives what one pass without it gives, in float64.

With windows too: the rolling cache holds the last tokens alone.
"""

import dataclasses
import itertools

import pytest
import torch

import generate as generation
import model as model_file
from generate import Sampling, generate, prefill
from model import Mixtral, MixtralConfig, attention, fused_attention, window_mask

T = 13
PROMPTS = [[5], [7, 11, 13, 17, 19], [23, 29, 31, 37, 41, 43, 47, 53, 59], [61, 67, 71]]


@pytest.fixture(params=[attention, fused_attention], autouse=True)
def attend(request, monkeypatch):
    """Both ways to compute attention, whichever this machine prefers."""
    monkeypatch.setattr(model_file, "fastest_attention", lambda *_: request.param)


def mixtral(n_kv_head: int = 2, window: int = 0, seq_len: int = 40) -> Mixtral:
    sizes = MixtralConfig(
        vocab_size=97,
        seq_len=seq_len,
        n_layer=2,
        n_head=4,
        n_kv_head=n_kv_head,
        d_model=24,
        d_head=10,
        d_ff=18,
        n_expert=5,
        n_active=2,
        window=window,
    )
    return Mixtral(sizes).double().eval()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-10)


def tokens(batch_size: int, n_token: int = T) -> torch.Tensor:
    return torch.randint(97, (batch_size, n_token))


@torch.no_grad()
def in_chunks(model: Mixtral, rows: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    """Logits of rows fed through a cache in pieces that end at `cuts`."""
    cache = model.new_cache(len(rows), rows.shape[1])
    pieces = itertools.pairwise([0, *cuts, rows.shape[1]])
    return torch.cat([model(rows[:, a:b], cache) for a, b in pieces if a < b], dim=1)


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_every_split_into_prefill_and_chunks_gives_the_same_logits(n_kv_head):
    model, rows = mixtral(n_kv_head), tokens(2)
    whole = model(rows).detach()
    for first, chunk in itertools.product(range(1, T + 1), range(1, 5)):
        cuts = list(range(first, T, chunk))
        assert same(in_chunks(model, rows, cuts), whole), f"prefill {first}, chunks of {chunk}"


@torch.no_grad()
def test_rows_at_different_positions_step_as_they_would_alone():
    """Row 0 has 3 tokens, row 1 has 8: the next token of each goes to its own slot."""
    model, rows, lengths = mixtral(), tokens(2), [3, 8]
    cache, _ = prefill(model, [rows[0, :3].tolist(), rows[1, :8].tolist()], n_slot=12)
    for i in range(4):
        positions = torch.tensor([[n + i] for n in lengths])
        cache.length += 1
        step = model(rows.gather(1, positions), cache, positions)
        for row, n in enumerate(lengths):
            assert same(step[row, -1], model(rows[row : row + 1, : n + i + 1])[0, -1])


@pytest.mark.parametrize("chunk", [1, 2, 4, 512])
@torch.no_grad()
def test_prefill_returns_the_logits_after_each_prompt(chunk, monkeypatch):
    monkeypatch.setattr(generation, "CHUNK", chunk)
    model = mixtral()
    _, last = prefill(model, PROMPTS, n_slot=12)
    for row, prompt in zip(last, PROMPTS, strict=True):
        assert same(row, model(torch.tensor([prompt]))[0, -1])


def greedy(model: Mixtral, prompts: list[list[int]], **how) -> list[list[int]]:
    steps = list(generate(model, prompts, 12, Sampling(temperature=0), **how))
    return [list(row) for row in zip(*steps, strict=True)]


def test_ragged_batch_is_each_prompt_alone():
    model = mixtral()
    together = greedy(model, PROMPTS)
    assert together == [greedy(model, [prompt])[0] for prompt in PROMPTS]
    assert len(set(map(tuple, together))) == len(PROMPTS)  # and they do differ


def test_greedy_text_is_that_of_a_whole_pass_for_each_token():
    model, text = mixtral(), list(PROMPTS[1])
    for token in greedy(model, [PROMPTS[1]])[0]:
        with torch.no_grad():
            assert token == model(torch.tensor([text]))[0, -1].argmax()
        text.append(token)


def test_a_row_does_not_see_its_neighbours_even_when_dice_are_thrown():
    model, hot = mixtral(), Sampling(temperature=1.0)
    rows = [
        [ids[1] for ids in generate(model, [first, PROMPTS[1], last], 12, hot, seed=3)]
        for first, last in itertools.permutations([PROMPTS[0], PROMPTS[2]])
    ]
    assert rows[0] == rows[1]


def test_one_prefill_forked_is_as_many_prefills():
    model, hot = mixtral(), Sampling(temperature=1.0)
    forked = list(generate(model, PROMPTS[:2], 12, hot, seed=3, n_sample=3))
    separate = list(generate(model, [p for p in PROMPTS[:2] for _ in range(3)], 12, hot, seed=3))
    assert forked == separate
    assert len(set(zip(*forked, strict=True))) == 6  # six rows that differ


def test_fork_leaves_the_original_as_it_was():
    model = mixtral()
    cache, _ = prefill(model, [PROMPTS[1]], n_slot=8)
    before = [keys.clone() for keys in cache.keys + cache.values]
    twin = cache.fork(2)
    with torch.no_grad():
        model(tokens(2, 1), twin)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys + cache.values, strict=True))
    assert (cache.length, twin.length) == (5, 6)


def test_second_generation_is_the_first():
    """Nothing survives a request, as a cache kept on the model would."""
    model = mixtral()
    first = greedy(model, PROMPTS)
    greedy(model, [[1, 2, 3, 4]])
    assert greedy(model, PROMPTS) == first


def test_cache_that_is_full_says_so():
    model = mixtral()
    cache = model.new_cache(1, 4)
    model(tokens(1, 3), cache)
    with pytest.raises(ValueError, match=r"3 \+ 2 tokens do not fit 4 slots"):
        model(tokens(1, 2), cache)


@pytest.mark.parametrize("n_slot", [4, 99])
def test_position_beyond_the_cache_or_the_context_is_refused(n_slot):
    model = mixtral()
    cache, last = model.new_cache(1, n_slot), min(n_slot, model.config.seq_len)
    cache.length = last
    model(tokens(1, 1), cache, torch.tensor([[last - 1]]))
    with pytest.raises(ValueError, match=f"{last + 1} tokens are more than the context of {last}"):
        model(tokens(1, 1), cache, torch.tensor([[last]]))


def test_cache_has_the_stated_size():
    """2 · n_layer · B · n_slot · K · C = 2·2·3·7·2·10 = 1,680 numbers."""
    model = mixtral()
    cache = model.new_cache(3, 7)
    assert sum(t.numel() for t in cache.keys + cache.values) == 1680
    assert {t.dtype for t in cache.keys + cache.values} == {torch.float64}


# ── Windows ───────────────────────────────────────────────────────────────────────────────────────


def test_window_mask_by_hand():
    """Three tokens see two each: themselves and the one before."""
    seen = window_mask(torch.tensor([[0, 1, 2]]), None, 2, torch.float64) == 0
    assert seen.tolist() == [[[True, False, False], [True, True, False], [False, True, True]]]


def test_token_sees_its_window_and_no_more():
    """One layer and W = 4: a change 3 tokens back shows, one 4 back does not."""
    model, rows = mixtral(window=4), tokens(1)
    model.blocks = model.blocks[:1]
    for back in range(T):
        other = rows.clone()
        other[0, T - 1 - back] = (other[0, T - 1 - back] + 1) % 97
        with torch.no_grad():
            moved = (model(rows)[0, -1] - model(other)[0, -1]).abs().max() > 1e-9
        assert moved == (back < 4)


def test_window_as_long_as_the_text_is_no_window():
    model, rows = mixtral(), tokens(2)
    whole = model(rows).detach()
    model.config = dataclasses.replace(model.config, window=T)
    assert same(model(rows), whole)


@pytest.mark.parametrize("window", [1, 4, 12, 13])
@pytest.mark.parametrize("chunk", range(1, 8))
def test_rolling_cache_is_the_full_mask_for_every_chunk(monkeypatch, chunk, window):
    """W = 4, T = 13 and others, with no slot more than needed: the ring goes round three times."""
    monkeypatch.setattr(model_file, "RING", chunk)
    model, rows = mixtral(window=window), tokens(2)
    whole = model(rows).detach()
    assert torch.isfinite(whole).all()
    cache = model.new_cache(2, T)
    assert cache.keys[0].shape[2] == min(T, window + chunk)
    pieces = [model(rows[:, i : i + chunk], cache) for i in range(0, T, chunk)]
    assert same(torch.cat(pieces, dim=1), whole)


@torch.no_grad()
def test_rolling_cache_for_every_split_into_prefill_and_chunks(monkeypatch):
    monkeypatch.setattr(model_file, "RING", 7)
    model, rows = mixtral(window=4), tokens(2)
    whole = model(rows)
    for first, chunk in itertools.product(range(1, 8), range(1, 8)):
        cache = model.new_cache(2, T)
        cuts = [0, *range(first, T, chunk), T]
        pieces = [model(rows[:, a:b], cache) for a, b in itertools.pairwise(cuts)]
        assert same(torch.cat(pieces, dim=1), whole), f"prefill {first}, chunks of {chunk}"


def test_greedy_text_far_beyond_the_ring_is_that_of_whole_passes(monkeypatch):
    monkeypatch.setattr(model_file, "RING", 3)
    monkeypatch.setattr(generation, "CHUNK", 3)
    model, text = mixtral(window=4), list(PROMPTS[2])
    steps = list(generate(model, [PROMPTS[2]], 30, Sampling(temperature=0)))
    for (token,) in steps:
        with torch.no_grad():
            assert token == model(torch.tensor([text]))[0, -1].argmax()
        text.append(token)
    assert len(text) == 39


@pytest.mark.parametrize("ring", [5, 8, 512])
def test_ragged_batch_with_a_window_is_each_prompt_alone(monkeypatch, ring):
    """Prompts of 1 to 9 tokens."""
    monkeypatch.setattr(model_file, "RING", ring)
    monkeypatch.setattr(generation, "CHUNK", min(ring, 512))
    model = mixtral(window=4)
    if ring < 8:  # the row of one token is filled up with eight
        with pytest.raises(ValueError, match="differ by at most 5 tokens"):
            greedy(model, PROMPTS)
        return
    assert greedy(model, PROMPTS) == [greedy(model, [prompt])[0] for prompt in PROMPTS]


def test_compiled_step_sees_the_same_slots(monkeypatch):
    """A compiled step has all slots in use from the start; here it is only told so."""
    monkeypatch.setattr(model_file, "RING", 5)
    monkeypatch.setattr(generation, "CHUNK", 5)
    monkeypatch.setattr(generation, "compiled", lambda model: model)
    for window in (0, 4):
        model = mixtral(window=window)
        plain, told = (greedy(model, [PROMPTS[2]], compile=c) for c in (False, True))
        assert plain == told


def test_memory_does_not_grow_with_the_text(monkeypatch):
    monkeypatch.setattr(model_file, "RING", 3)
    short, long = (mixtral(window=4, seq_len=n).new_cache(1, n) for n in (40, 4_000))
    assert short.keys[0].shape == long.keys[0].shape == (1, 2, 7, 10)


def test_more_tokens_at_a_time_than_the_ring_has_room_for_are_refused(monkeypatch):
    monkeypatch.setattr(model_file, "RING", 3)
    model = mixtral(window=4)
    with pytest.raises(ValueError, match="5 tokens at a time are more than 3"):
        model(tokens(1, 5), model.new_cache(1, 40))


def test_fork_of_a_rolling_cache_goes_on_as_the_original(monkeypatch):
    monkeypatch.setattr(model_file, "RING", 5)
    model, rows = mixtral(window=4), tokens(1)
    whole = model(rows.expand(3, -1)).detach()
    cache = model.new_cache(1, T)
    for i in (0, 5):
        model(rows[:, i : i + 5], cache)
    assert same(model(rows[:, 10:].expand(3, -1), cache.fork(3)), whole[:, 10:])
