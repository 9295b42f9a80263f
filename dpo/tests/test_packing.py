"""Texts and answers that share a row do not see one another."""

import pytest
import torch

import dpo
from model import Llama, LlamaConfig
from packing import AnswerScorer, of_rows, of_texts, pack, visible
from selfcheck import small_texts

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402


@pytest.fixture
def scorer(base):
    return AnswerScorer(base)


def alone(model: Llama, prompt: list[int], answer: list[int]) -> float:
    """log π(answer | prompt) in a row of its own, by the model's own forward and dpo.py."""
    tokens = torch.tensor([prompt + answer])
    said = torch.arange(len(prompt) + len(answer))[None] >= len(prompt)
    return dpo.response_logps(model(tokens), tokens, said)[0].item()


ids = st.lists(st.integers(0, 96), min_size=1, max_size=6)
texts_of_any_kind = st.lists(
    st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=6
)


@hypothesis.given(texts=texts_of_any_kind, capacity=st.sampled_from([0, 12, 30, 90]))
@hypothesis.settings(max_examples=25)
def test_packed_is_apart_to_1e_12(texts, capacity):
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(vocab_size=97, seq_len=40, n_layer=2, n_head=4, n_kv_head=2, d_model=24,
                    d_head=10, d_ff=36)
    ).double()  # fmt: skip
    packed = pack(texts, capacity)
    with torch.no_grad():
        sums, counts = (of_texts(x, packed) for x in AnswerScorer(model)(*packed))
        for row, n_token, (prompt, answers) in zip(sums, counts, texts, strict=True):
            wanted = [alone(model, prompt, answer) for answer in answers]
            assert row[: len(wanted)].tolist() == pytest.approx(wanted, abs=1e-12)
            assert n_token.tolist() == [*map(len, answers), *[0] * (3 - len(answers))]


def test_gradients_are_those_of_rows_of_their_own(scorer):
    texts = small_texts()
    packed = pack(texts, 40)
    scorer(*packed)[0].sum().backward()
    found = {name: p.grad.clone() for name, p in scorer.named_parameters()}
    scorer.zero_grad()
    for prompt, answers in texts:
        for answer in answers:
            tokens = torch.tensor([prompt + answer])
            said = torch.arange(tokens.shape[1])[None] >= len(prompt)
            dpo.response_logps(scorer.llama(tokens), tokens, said)[0].sum().backward()
    for name, parameter in scorer.named_parameters():
        assert (found[name] - parameter.grad).abs().max() < 1e-11, name


def test_neither_the_other_answer_nor_another_text_is_seen(scorer):
    """Change one answer of one text: no other number may move, not by a bit."""
    texts = small_texts()
    before = scorer(*pack(texts, 90))[0]
    texts[1][1][0][-1] = (texts[1][1][0][-1] + 1) % 97
    packed = pack(texts, 90)
    changed = of_texts(scorer(*packed)[0] != before, packed)
    assert changed.tolist() == [[False] * 3, [True, False, False], [False] * 3]


def test_filling_changes_nothing(scorer):
    text = small_texts()[0]
    narrow = of_texts(*(lambda p: (scorer(*p)[0], p))(pack([text])))
    for other in range(1, 30, 7):
        wide = pack([text, ([1] * other, [[2] * 20])])
        found = of_texts(scorer(*wide)[0], wide)[:1]
        assert (found - narrow).abs().max() < 1e-12


def test_an_answer_may_hold_the_id_that_fills_up(scorer):
    """Filling is known by its place, never by its id, which is 0."""
    text = ([5, 0], [[0, 0, 7, 0], [0]])
    packed = pack([text, ([3] * 9, [[4]])])
    sums, counts = (of_texts(x, packed) for x in scorer(*packed))
    assert counts[0].tolist() == [4, 1, 0]
    wanted = [alone(scorer.llama, text[0], answer) for answer in text[1]]
    assert sums[0, :2].tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_row_by_hand():
    """Prompt 8 9 with answers 1 2 and 3, then prompt 7 with answer 4."""
    packed = pack([([8, 9], [[1, 2], [3]]), ([7], [[4]])], 8)
    assert packed.tokens.tolist() == [[8, 9, 1, 2, 3, 7, 4]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert packed.text.tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert packed.answer.tolist() == [[0, 0, 1, 1, 2, 0, 1]]
    assert packed.before.tolist() == [[0, 0, 1, 2, 1, 4, 5]]
    assert packed.number.tolist() == [[0, 1]]
    sees = visible(packed, torch.float32)[0] == 0
    assert sees.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


def test_first_fit_wastes_little_and_loses_nothing():
    texts = [([1] * n, [[2]]) for n in (5, 9, 3, 1, 7, 2)]
    packed = pack(texts, 12)
    assert sorted(x for row in packed.number.tolist() for x in row if x >= 0) == list(range(6))
    assert packed.tokens.shape == (3, 12)
    values = torch.arange(18.0).view(6, 3)
    assert torch.equal(of_texts(of_rows(values, packed), packed), values)
    assert pack([([1] * 20, [[2]]), ([1], [[2]])], 12).tokens.shape == (2, 21)  # longer than a row


def test_a_text_without_prompt_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        pack([([], [[1]])])
