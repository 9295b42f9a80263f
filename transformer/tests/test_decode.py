"""The search for translations: against every hypothesis there is, against itself, and by hand."""

import itertools
import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modelling import sentences, shaken

import data
import decode
import quick
from checkpoint import Loaded, Rules
from decode import Search, beam_search, greedy_search
from model import Transformer, TransformerConfig
from options import UserError

SMALL = TransformerConfig(  # ids: 0 padding and start, 1 the end, 2 and 3 words
    vocab_size=4, seq_len=12, n_layer=1, n_head=2, d_model=8, d_ff=8, start_id=0, end_id=1
)
FREE = Rules(start=0, end=1)  # all four tokens may be written
PLAIN = Rules(start=0, end=1, never=(0,))


def small_model(seed: int) -> Transformer:
    """A model whose probabilities are far from even, in float64."""
    torch.manual_seed(seed)
    model = Transformer(SMALL).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return model


def log_prob(model: Transformer, source: torch.Tensor, tokens: list[int], rules: Rules) -> float:
    """Σ log p of the tokens, each by a forward pass over what comes before it."""
    total = 0.0
    for n, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(source, torch.tensor([[rules.start, *tokens[:n]]]))[0, -1]
        if rules.never:
            logits[list(rules.never)] = -math.inf
        total += logits.log_softmax(-1)[token].item()
    return total


def every_hypothesis(model, source, rules: Rules, limit: int, alpha: float) -> list[tuple]:
    """(score, tokens, finished) of all there are, best first: ended, or cut at the limit."""
    words = [t for t in range(SMALL.vocab_size) if t not in (rules.end, *rules.never)]
    found = []
    for n in range(1, limit + 1):
        for tokens in itertools.product(words, repeat=n - 1):
            found.append([*tokens, rules.end])
    found += [list(tokens) for tokens in itertools.product(words, repeat=limit)]
    scored = []
    for tokens in found:
        score = log_prob(model, source, tokens, rules) / len(tokens) ** alpha
        ended = tokens[-1] == rules.end
        scored.append((score, tuple(tokens[:-1] if ended else tokens), ended))
    return sorted(scored, reverse=True)


# ── Against exhaustive search ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("rules", "limit", "seed"), [(FREE, 4, 0), (PLAIN, 5, 1), (PLAIN, 5, 2)])
def test_a_wide_beam_finds_every_hypothesis_in_order(alpha, rules, limit, seed):
    """Vocabulary 4; hypothesis by hypothesis: tokens, score, and whether it ended."""
    model, source = small_model(seed), torch.tensor([[2, 3, 1]])
    expected = every_hypothesis(model, source, rules, limit, alpha)
    search = Search(beam=len(expected), nbest=len(expected), length_penalty=alpha)
    found = beam_search(model, source, rules, torch.tensor([limit]), search)[0]
    assert len(found) == len(expected)
    for ours, (score, tokens, ended) in zip(found, expected, strict=True):
        assert ours.tokens == tokens and ours.finished == ended
        assert ours.score == pytest.approx(score, abs=1e-10)


def test_vocabulary_4_and_length_5_whole():
    """All 364 hypotheses of three words and the end, up to length 5."""
    model, source = small_model(3), torch.tensor([[3, 1]])
    expected = every_hypothesis(model, source, FREE, 5, 0.6)
    assert len(expected) == sum(3**n for n in range(6))
    search = Search(beam=len(expected), nbest=len(expected), length_penalty=0.6)
    found = beam_search(model, source, FREE, torch.tensor([5]), search)[0]
    assert [h.tokens for h in found] == [tokens for _, tokens, _ in expected]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0, -0.5])
def test_stopping_early_changes_nothing(alpha, monkeypatch):
    """What is returned is what going on to the last step returns, for narrow beams."""
    cases = [(beam, nbest, seed) for beam in (2, 3, 4) for nbest in (1, 2) for seed in range(4)]
    sources = data.pad([[2, 3, 1], [3, 1], [2, 2, 3, 1]])
    limits, steps = torch.tensor([9, 5, 11]), []
    results = {}
    for early in (True, False):
        with monkeypatch.context() as patch:
            if not early:
                patch.setattr(decode, "can_improve", lambda running, *_: running[:, 0] > -math.inf)
            calls = []

            def counted(self, usual=decode.Decoder.logits, calls=calls):
                calls.append(self)
                return usual(self)

            patch.setattr(decode.Decoder, "logits", counted)
            for beam, nbest, seed in cases:
                search = Search(beam=beam, nbest=nbest, length_penalty=alpha)
                found = beam_search(small_model(seed), sources, PLAIN, limits, search)
                results.setdefault((beam, nbest, seed), []).append(found)
            steps.append(len(calls))
    assert all(early == late for early, late in results.values())
    assert steps[0] < steps[1]  # and it does stop early


def test_a_longer_one_that_wins_by_its_length_is_found():
    """The bug of stopping when the best hypothesis ends: log p −1 at length 1, −1.5 at length 3.

    With A = 1 the scores are −1 and −0.5. Greedy search and A = 0 take the short one.
    """

    first, then = math.exp(-0.6), math.exp(-0.45)
    table = {
        1: [0.04, math.exp(-1), first, 1 - 0.04 - math.exp(-1) - first],
        2: [0.1, 0.1, then, 0.8 - then],
        3: [0.1, then, 0.1, 0.8 - then],
    }

    class Script:
        """Next-token probabilities by hand, of the tokens 0, end, 2, 3."""

        def __init__(self, model, sources, n_beam, n_slot, start, way):
            self.tokens = torch.zeros(len(sources) * n_beam, 1, dtype=torch.int64)

        def logits(self):
            p = table.get(self.tokens.shape[1], [0.25] * 4)
            return torch.tensor([p]).double().log().expand(len(self.tokens), -1)

        def advance(self, rows, tokens):
            self.tokens = torch.cat((self.tokens[rows], tokens[:, None]), 1)

    model, usual = small_model(0), decode.Decoder
    decode.Decoder = Script
    try:
        for alpha, length in ((0.0, 0), (1.0, 2)):
            search = Search(beam=2, length_penalty=alpha)
            best = beam_search(model, torch.tensor([[2, 1]]), FREE, torch.tensor([6]), search)[0][0]
            assert len(best.tokens) == length, alpha
    finally:
        decode.Decoder = usual


# ── Two paths, one answer ─────────────────────────────────────────────────────────────────────────


@pytest.fixture
def loaded(model):
    """A model of 37 tokens without subwords, in float64."""
    return Loaded(None, model, None, Rules(2, 3, (0, 2)))


@pytest.mark.parametrize("beam", [1, 3])
def test_cached_is_uncached(loaded, beam):
    search = Search(beam=beam, nbest=beam, max_new_tokens=12)
    sources = sentences([6, 2, 9])
    found = decode.search_translations(loaded, sources, search)
    slow = decode.search_translations(loaded, sources, search, way="uncached")
    for one, other in zip(itertools.chain(*found), itertools.chain(*slow), strict=True):
        assert one.tokens == other.tokens
        assert one.score == pytest.approx(other.score, abs=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports old parts
def test_compiled_is_cached(loaded):
    """For a batch of another size too, which is compiled anew."""
    search = Search(beam=3, nbest=3, max_new_tokens=9)
    for lengths in ([6, 2, 9], [4]):
        sources = sentences(lengths)
        found = decode.search_translations(loaded, sources, search)
        quickly = decode.search_translations(loaded, sources, search, way="compiled")
        for one, other in zip(itertools.chain(*found), itertools.chain(*quickly), strict=True):
            assert one.tokens == other.tokens
            assert one.score == pytest.approx(other.score, abs=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_packed_matrices_are_the_matrices(sizes, bias):
    """The product that the search uses on CPUs in float32, and the model is not changed by it."""
    import dataclasses

    model = shaken(Transformer(dataclasses.replace(sizes, logits_bias=bias))).eval()
    if not quick.can_pack(model.embedding.weight):
        pytest.skip("this PyTorch has no packed product")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sources, target = data.pad(sentences([6, 2])), torch.randint(4, 37, (2, 5))
    twin, head = quick.pack(model)
    with torch.no_grad():
        memory = model.encode(sources)
        expected = model.head(model.decode(target, memory))
        found = head(twin.decode(target, memory))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert sum(type(m) is quick.PackedLinear for m in twin.modules()) == 3 * 7
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_search_after_the_weights_changed_uses_the_new_ones(sizes):
    """What was packed for the first search is not what the second one uses."""
    model, sources = shaken(Transformer(sizes)).eval(), data.pad(sentences([6]))
    rules, limits = Rules(2, 3, (0, 2)), torch.tensor([9])
    first = beam_search(model, sources, rules, limits, Search())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    second = beam_search(model, sources, rules, limits, Search())
    quick.PACKED.clear()
    assert beam_search(model, sources, rules, limits, Search()) == second != first


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_many_sentences_are_each_alone(loaded, beam):
    """Whatever their lengths and limits."""
    search, sources = Search(beam=beam, nbest=beam), sentences([6, 2, 9, 4])
    together = decode.search_translations(loaded, sources, search)
    for source, found in zip(sources, together, strict=True):
        alone = decode.search_translations(loaded, [source], search)[0]
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        for one, other in zip(found, alone, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_a_beam_of_one_is_greedy(seed):
    """For A = 0, where nothing can overtake a hypothesis that has ended."""
    model, sources = small_model(seed), data.pad([[2, 3, 1], [3, 1]])
    limits = torch.tensor([8, 8])
    greedy = greedy_search(model, sources, PLAIN, limits)
    search = Search(beam=1, length_penalty=0.0)
    beam = beam_search(model, sources, PLAIN, limits, search)
    for one, other in zip(greedy, beam, strict=True):
        assert one[0].tokens == other[0].tokens
        assert one[0].log_prob == pytest.approx(other[0].log_prob, abs=1e-9)


@given(st.integers(0, 50), st.sampled_from([0.0, 0.6, 1.0]))
def test_hypotheses_are_what_they_say(seed, alpha):
    """Sorted, different, none with a token that may not be, and scored as a forward pass scores."""
    model, source = small_model(seed), torch.tensor([[2, 3, 3, 1]])
    search = Search(beam=3, nbest=3, length_penalty=alpha)
    found = beam_search(model, source, PLAIN, torch.tensor([6]), search)[0]
    scores = [h.score for h in found]
    assert scores == sorted(scores, reverse=True) and len({h.tokens for h in found}) == len(found)
    for h in found:
        tokens = [*h.tokens, 1] if h.finished else list(h.tokens)
        assert 0 not in h.tokens and 1 not in h.tokens and len(tokens) <= 6
        assert h.log_prob == pytest.approx(log_prob(model, source, tokens, PLAIN), abs=1e-9)
        assert h.score == pytest.approx(h.log_prob / len(tokens) ** alpha, abs=1e-9)


def test_a_wider_beam_is_not_worse_here():
    """Not a law, but with an exhaustive beam at the end of the row it holds for the last one."""
    model, source = small_model(5), torch.tensor([[2, 3, 1]])
    best = every_hypothesis(model, source, PLAIN, 5, 1.0)[0][0]
    for beam in (2, 4, 64):
        search = Search(beam=beam)
        score = beam_search(model, source, PLAIN, torch.tensor([5]), search)[0][0].score
        assert score <= best + 1e-10
    assert score == pytest.approx(best, abs=1e-10)


def test_the_end_can_be_forced_at_the_limit():
    """As Marian folders ask: at the last place the end comes, at no cost."""
    model, source = small_model(1), torch.tensor([[2, 3, 1]])
    rules = Rules(0, 1, (0,), end_at_limit=True)
    for beam in (1, 2):
        search = greedy_search if beam == 1 else lambda *a: beam_search(*a, Search(beam=2))
        (found,) = search(model, source, rules, torch.tensor([3]))
        assert all(h.finished and len(h.tokens) <= 2 for h in found)
        for h in found:
            tokens = [*h.tokens, 1] if len(h.tokens) < 2 else list(h.tokens)
            assert h.log_prob == pytest.approx(log_prob(model, source, tokens, rules), abs=1e-9)


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────


class Letters:
    """Subwords for a test: one letter, one id."""

    def encode(self, text, target=False):
        return [4 + "abcdefghij ".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abcdefghijklmnopqrstuvwxyz0123456"[i - 4] for i in ids if i > 3)


@pytest.fixture
def letters(loaded):
    loaded.subwords = Letters()
    return loaded


def test_translate_keeps_the_order_and_passes_over_nothing(letters):
    texts = ["abc", "", "jihgf", "a", "  ", "bcd"]
    found = decode.translate(letters, texts, Search(beam=2), n_token=20)
    alone = [decode.translate(letters, [text], Search(beam=2))[0] for text in texts]
    assert [one[0][0] for one in found] == [one[0][0] for one in alone]
    assert found[1] == found[4] == [("", 0.0)]


def test_too_long_is_refused_or_cut_with_a_word(letters, capsys):
    text = "abcdefghij" * 5
    with pytest.raises(UserError, match="sentence 2 has 51 tokens, the model reads 40"):
        decode.translate(letters, ["ab", text], Search())
    found = decode.translate(letters, [text], Search(too_long="cut", max_new_tokens=3))
    assert "sentence 1 has 51 tokens" in capsys.readouterr().err
    expected = decode.translate(letters, [text[:39]], Search(max_new_tokens=3))
    assert found == expected


def test_nbest_gives_so_many_different_ones(letters):
    found = decode.translate(letters, ["abc"], Search(beam=5, nbest=5))[0]
    scores = [score for _, score in found]
    assert len(found) == 5 and scores == sorted(scores, reverse=True)


def test_weights_that_are_no_numbers_are_refused(letters):
    with torch.no_grad():
        letters.model.embedding.weight[5] = math.nan
    for beam in (1, 3):
        with pytest.raises(UserError, match="not finite"):
            decode.translate(letters, ["abc"], Search(beam=beam))


def test_searching_leaves_dropout_off(letters):
    """Even if somebody left the model in train() mode."""
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocab_size=37, seq_len=40, dropout=0.5)).train()
    letters.model = shaken(model)
    first = decode.translate(letters, ["abc"], Search(beam=3))
    assert decode.translate(letters, ["abc"], Search(beam=3)) == first


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"beam": 0}, "beam must be at least 1"), ({"nbest": 5}, "nbest 5 is more than the beam of 4"),
     ({"stopping": "soon"}, "stopping must be one of"), ({"length_penalty": math.nan}, "finite")],
)  # fmt: skip
def test_searches_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        Search(**wrong)
