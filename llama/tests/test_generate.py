"""The choice of a token, what ends a text, and that a stream never shows half a character."""

import itertools
import math

import pytest
import torch
from torch import nn

import generate as generation
from checkpoint import Loaded
from generate import (
    SampleConfig,
    Sampling,
    StopText,
    choose,
    generate,
    nucleus,
    overlap,
    probabilities,
    write,
)
from model import KVCache, Llama, LlamaConfig
from options import UserError
from tokenizer import ByteTokenizer

EOS = 257


class Scripted(nn.Module):
    """Says after position p of row b the token script[b][p + 1], whatever it reads."""

    def __init__(self, *script: list[int], seq_len: int = 64):
        super().__init__()
        self.config = LlamaConfig(vocab_size=258, seq_len=seq_len)
        self.embedding = nn.Embedding(258, 4)
        self.script = script

    def new_cache(self, batch_size, n_slot):
        return KVCache(1, (batch_size, 1, n_slot, 2), like=self.embedding.weight)

    def features(self, tokens, cache, positions=None):
        """What it says, as an id."""
        B, T = tokens.shape
        if positions is None:
            positions = torch.arange(cache.length, cache.length + T).expand(B, T)
            cache.grow(T)
        said = [[self.script[b][p + 1] for p in row] for b, row in enumerate(positions.tolist())]
        return torch.tensor(said)

    def head(self, said):
        return nn.functional.one_hot(said, 258).float() * 9

    def forward(self, tokens, cache, positions=None):
        return self.head(self.features(tokens, cache, positions))


GREEDY = Sampling(temperature=0)


# ── The distribution ──────────────────────────────────────────────────────────────────────────────


P = [0.15, 0.5, 0.1, 0.25]  # sorted: 0.5, 0.25, 0.15, 0.1


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, [0.15, 0.5, 0.1, 0.25]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_k": 4}, P),
        ({"top_k": 99}, P),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.6}, [0, 2 / 3, 0, 1 / 3]),  # the token that crosses 0.6 is in
        ({"top_p": 0.8}, [1 / 6, 5 / 9, 0, 5 / 18]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),  # the likeliest always stays
        ({"min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),  # at least 0.4 · 0.5 = 0.2
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # top-p is of what top-k left, 0.9 · 0.82 = 0.738: two are enough; of all, three would stay
        ({"top_k": 3, "top_p": 0.82}, [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.8, "min_p": 0.4}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 0.5}, [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),
        # temperature first: the squares are 0.725, 0.181, …, so that 0.7 is one token
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_distribution_by_hand(how, expected):
    got = probabilities(torch.tensor([P]).log(), Sampling(**{"temperature": 1.0} | how))
    torch.testing.assert_close(got, torch.tensor([expected]).double(), rtol=0, atol=1e-6)


def test_min_p_keeps_a_token_exactly_at_the_border():
    p = probabilities(torch.tensor([[1.0, 0.0, 0.0]]).log2(), Sampling(1.0, min_p=0.5))
    assert p.tolist() == [[1, 0, 0]]
    p = probabilities(torch.zeros(1, 4), Sampling(1.0, min_p=1.0))
    assert p.tolist() == [[0.25] * 4]


def test_top_p_is_the_smallest_set_with_that_mass():
    """Against all 64 subsets of six tokens, for 300 random distributions."""
    subsets = [s for n in range(1, 7) for s in itertools.combinations(range(6), n)]
    for _ in range(300):
        p = torch.rand(6, dtype=torch.float64).pow(3)
        p, top_p = p / p.sum(), torch.rand(()).item()
        enough = [s for s in subsets if p[list(s)].sum() >= top_p]
        fewest = min(map(len, enough))
        best = max((s for s in enough if len(s) == fewest), key=lambda s: p[list(s)].sum())
        kept = probabilities(p.log()[None], Sampling(1.0, top_p=top_p))[0].nonzero().flatten()
        assert kept.tolist() == sorted(best)


def by_full_sort(p: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """What `nucleus` must give, from all tokens sorted: plain, and slow for a large vocabulary."""
    kept, order = p.sort(dim=-1, descending=True, stable=True)
    kept[:, top_k or p.shape[1] :] = 0
    before = kept.cumsum(dim=-1) - kept
    inside = before < top_p * kept.sum(dim=-1, keepdim=True)
    inside[:, 0] = True
    return torch.zeros_like(p).scatter(1, order, kept * inside)


def some_distributions(n_row: int, n_token: int, sharpness: float, ties: bool) -> torch.Tensor:
    logits = sharpness * torch.randn(n_row, n_token, dtype=torch.float64)
    if ties:  # steps of a half: thousands of tokens are exactly as likely as others
        logits = (2 * logits).round() / 2
    return logits.softmax(dim=-1)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sharpness", [0.0, 0.3, 1.0, 3.0, 8.0])
def test_nucleus_is_that_of_a_full_sort(sharpness, ties):
    """30 distributions for each of the ten cases, flat and sharp ones, over 5,000 tokens."""
    p = some_distributions(30, 5000, sharpness, ties)
    for top_k, top_p in [(0, 0.9), (0, 0.5), (0, 0.999), (7, 1.0), (50, 0.8), (4000, 0.9),
                         (1, 0.5), (5000, 0.95), (9999, 0.3), (0, 1e-9)]:  # fmt: skip
        got = nucleus(p, top_k, top_p)
        assert torch.equal(got, by_full_sort(p, top_k, top_p)), (top_k, top_p)


def test_nucleus_of_a_large_vocabulary_is_that_of_a_full_sort():
    p = some_distributions(2, 128_256, 2.0, ties=True)
    for top_k, top_p in [(0, 0.9), (40, 0.9), (0, 0.9999)]:
        assert torch.equal(nucleus(p, top_k, top_p), by_full_sort(p, top_k, top_p))


def test_of_equally_likely_tokens_the_first_are_kept():
    p = torch.full((2, 3000), 1 / 3000, dtype=torch.float64)
    assert nucleus(p, 3, 1.0).nonzero()[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert nucleus(p, 0, 0.5)[0].nonzero().flatten().tolist() == list(range(1500))
    assert nucleus(p.flip(0), 2000, 0.5)[1].nonzero().flatten().tolist() == list(range(1000))


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(temperature, bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        choose(logits, Sampling(temperature), dice(2))
    logits[1, 3] = -math.inf  # a token that never comes is fine
    assert 3 not in choose(logits, Sampling(temperature), dice(2)).tolist()[1:]


def test_rows_are_filtered_each_by_itself():
    logits, how = torch.randn(5, 20), Sampling(0.7, top_k=9, top_p=0.8, min_p=0.05)
    alone = torch.cat([probabilities(row[None], how) for row in logits])
    assert torch.equal(probabilities(logits, how), alone)


def test_no_filter_is_plain_softmax():
    logits = torch.randn(3, 50)
    p = probabilities(logits, Sampling(1.0, top_k=0, top_p=1.0, min_p=0.0))
    torch.testing.assert_close(p, logits.double().softmax(-1), rtol=0, atol=1e-15)


def test_smallest_temperature_there_is_takes_the_likeliest():
    """Not 0/0: dividing 30 by 1e-310 overflows."""
    p = probabilities(torch.tensor([[20.0, 30.0, -5.0]]), Sampling(temperature=1e-310))
    assert p.tolist() == [[0, 1, 0]]


def dice(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def test_temperature_zero_takes_the_likeliest_and_throws_no_dice():
    logits = torch.tensor([[0.0, 3.0, 3.0], [9.0, 1.0, 2.0]])
    assert choose(logits, GREEDY, []).tolist() == [1, 0]


def test_tokens_come_as_often_as_they_are_likely():
    """5 standard deviations of a binomial around each."""
    n, p = 4000, torch.tensor(P)
    drawn = choose(p.log().expand(n, 4), Sampling(1.0), dice(n)).bincount(minlength=4)
    assert ((drawn - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all()


def test_what_was_filtered_out_never_comes():
    n = 2000
    drawn = choose(torch.tensor(P).log().expand(n, 4), Sampling(1.0, top_k=2), dice(n))
    assert set(drawn.tolist()) == {1, 3}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**how)


@pytest.mark.parametrize("how", [{"num_samples": 0}, {"max_new_tokens": 0}], ids=str)
def test_samples_of_nothing_are_refused(how):
    with pytest.raises(ValueError, match="at least 1"):
        SampleConfig(**how)


# ── What ends a text ──────────────────────────────────────────────────────────────────────────────


def said(*script: list[int], prompts=None, **how) -> list[list[int | None]]:
    prompts = prompts or [[1, 2]] * len(script)
    n = how.pop("max_new_tokens", 10)
    return list(generate(Scripted(*script), prompts, n, GREEDY, **how))


def test_text_ends_before_the_stop_id():
    assert said([1, 2, 70, 71, 72, EOS, 99, 99], stop_ids=(EOS,)) == [[70], [71], [72]]


def test_any_of_several_stop_ids_ends_a_text():
    assert said([1, 2, 70, 128, 72, EOS], stop_ids=(EOS, 128)) == [[70]]


def test_without_stop_ids_the_length_ends_it():
    assert said([1, 2, *range(100, 130)], max_new_tokens=4) == [[100], [101], [102], [103]]


def test_each_row_ends_by_itself():
    a, b = [1, 2, 70, EOS, 98, 98, 98], [1, 2, 80, 81, 82, EOS, 98]
    assert said(a, b, stop_ids=(EOS,)) == [[70, 80], [None, 81], [None, 82]]


def test_row_that_stops_at_once_yields_nothing():
    assert said([1, 2, EOS, 9], stop_ids=(EOS,)) == []


def test_stop_id_in_the_prompt_does_not_count():
    assert said([1, EOS, 70, EOS], prompts=[[1, EOS]], stop_ids=(EOS,)) == [[70]]


def test_full_context_ends_a_text():
    script = list(range(10))
    steps = list(generate(Scripted(script, seq_len=5), [[0, 1]], 99, GREEDY))
    assert steps == [[2], [3], [4]]


def test_longest_row_decides_when_the_context_is_full():
    scripts = [list(range(10)), list(range(20, 30))]
    steps = list(generate(Scripted(*scripts, seq_len=6), [[0, 1, 2, 3], [20]], 99, GREEDY))
    assert steps == [[4, 21], [5, 22]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "no tokens"),
        ([[1], []], "no tokens"),
        ([[1] * 5], "prompt of 5 tokens, context of 5"),
    ],
)
def test_prompt_that_cannot_go_on_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        next(generate(Scripted([1] * 9, [1] * 9, seq_len=5), prompts, 4, GREEDY))


def test_seed_decides_what_is_drawn():
    model = Llama(LlamaConfig(vocab_size=97, seq_len=40, n_layer=1)).eval()
    first, again, other = (list(generate(model, [[3]], 20, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_generation_leaves_the_global_dice_alone():
    model = Scripted([1] * 40)
    before = torch.get_rng_state()
    list(generate(model, [[3]], 5))
    assert torch.equal(before, torch.get_rng_state())


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


def loaded(text: str, prompt: str = "", seq_len: int = 200) -> Loaded:
    """A model that says `text` after `prompt`, byte by byte, and then its end."""
    script = [256, *f"{prompt}{text}".encode(), *[EOS] * seq_len]
    model = Scripted(*[script] * 3, seq_len=seq_len)
    return Loaded(None, model, ByteTokenizer(), (EOS,))


def written(text: str, stops: list[str] | None = None, prompt: str = "", **config):
    """What `write` returns, and the pieces that it showed."""
    pieces = []
    whole = write(
        loaded(text, prompt), SampleConfig(prompt, **config), GREEDY, 0, stops, show=pieces.append
    )
    return whole, pieces


def test_text_is_prompt_and_continuation():
    assert written("bc", prompt="a")[0] == "abc"


def test_what_is_shown_is_what_is_returned():
    for n in (1, 3):
        whole, pieces = written("é🙂 end", ["en"], "Once ", num_samples=n)
        assert "".join(pieces) == whole == "\n---\n".join(["Once é🙂 "] * n)


def test_stop_text_that_comes_in_several_tokens_is_not_shown():
    whole, pieces = written("Hello.\n\nEND more", ["\n\nEND"])
    assert whole == "Hello."
    assert "".join(pieces) == "Hello."


def test_first_of_several_stop_texts_ends_it():
    assert written("one two three", ["three", "two"])[0] == "one "


def test_what_only_began_like_a_stop_text_is_shown_in_the_end():
    assert written("a, EN", ["END"])[0] == "a, EN"


def test_one_character_of_several_tokens_is_shown_whole():
    assert "🙂" in written("🙂x")[1]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in written("é漢🙂x")[1])


def test_character_cut_off_at_the_end_is_a_replacement_character():
    assert written("é🙂", max_new_tokens=3)[0] == "é\N{REPLACEMENT CHARACTER}"


def test_first_sample_is_shown_while_it_is_made(monkeypatch):
    """Not only in the end: the text so far is shown before the next token is asked for."""
    shown, seen = [], []

    def steps(*_, **__):
        for token in b"abc":
            seen.append("".join(shown))
            yield [token]

    monkeypatch.setattr(generation, "generate", steps)
    write(loaded("abc"), SampleConfig(), GREEDY, 0, [], show=shown.append)
    assert seen == ["", "a", "ab"]


def test_prompt_longer_than_the_context_is_the_users_error():
    with pytest.raises(UserError, match="--prompt: prompt of 9 tokens, context of 9"):
        write(loaded("x", seq_len=9), SampleConfig("12345678"), GREEDY)


@pytest.mark.parametrize(
    ("text", "stop", "n"),
    [("abc", "cde", 1), ("abc", "bcd", 2), ("abc", "abcd", 3), ("abc", "x", 0), ("", "x", 0)],
)
def test_overlap(text, stop, n):
    assert overlap(text, stop) == n


def test_stop_text_in_any_pieces_is_the_text_before_it():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.given(st.lists(st.text("ab", max_size=3)), st.text("ab", min_size=1, max_size=4))
    def check(pieces, stop):
        gate = StopText([stop])
        passed = [gate.push(piece) for piece in pieces]
        assert not any(stop in "".join(passed[:i]) for i in range(len(passed) + 1))
        assert "".join(passed) + gate.flush() == "".join(pieces).partition(stop)[0]
        assert gate.done == (stop in "".join(pieces))

    check()


def test_no_stop_text_is_ever_shown():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    stops = st.lists(st.text("ab", max_size=4), max_size=3)

    @hypothesis.given(st.text("abc", max_size=30), stops)
    def check(text, stops):
        gate = StopText(stops)
        passed = "".join(map(gate.push, text)) + gate.flush()
        assert text.startswith(passed)
        assert not any(stop in passed for stop in stops if stop)

    check()
