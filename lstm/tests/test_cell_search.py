"""The search for cells that count, the bag of words, and what the pictures are drawn from."""

import dataclasses

import numpy as np
import pytest
import torch

import bag
import cell_search
import cells
import figures
from checkpoint import Loaded
from model import SequenceConfig, SequenceModel
from options import UserError
from reviews import Reviews, Vocabulary
from tokenizer import ByteTokenizer, CharacterTokenizer

TEXT = 'He (a (b) c) says: "We go." \nShe (x) "y" z.\n'


def counting_model() -> Loaded:
    """An LSTM of which cell 0 counts brackets, written by hand: i = f = 1, g = ±0.1 at ( and )."""
    letters = CharacterTokenizer("".join(sorted(set(TEXT))))
    n = letters.vocab_size
    model = SequenceModel(SequenceConfig(d_model=3, d_embed=n, vocab_size=n, n_answer=n))
    cell = model.layers[0].directions[0]
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(n))
        for parameter in cell.parameters():
            parameter.zero_()
        cell.bias[:6] = 50.0  # i and f are open
        cell.w_input[6, letters.id_of["("]] = 0.1
        cell.w_input[6, letters.id_of[")"]] = -0.1
    return Loaded("here", model, "lm", letters)


def test_quantities_by_hand():
    quotes, depth, since = cell_search.quantities('a(("b")\n"')
    assert quotes.tolist() == [0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert depth.tolist() == [0, 1, 2, 2, 2, 2, 1, 1, 1]
    assert since.tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 1]


def test_search_finds_the_cell_that_counts_brackets():
    found = {one.quantity: one for one in cell_search.search(counting_model(), TEXT)}
    brackets = found["open brackets"]
    assert brackets.cell == 0 and brackets.correlation > 0.999
    assert found["open quotation"].correlation < 0.9


def test_values_are_those_of_a_walk_of_the_whole_model():
    loaded = counting_model()
    values = cell_search.cell_values(loaded, TEXT)
    ids = torch.tensor([loaded.words.encode(TEXT)])
    _, state = loaded.model(ids)
    assert values.shape == (3, len(TEXT))
    assert (torch.tanh(state[1][0, 0]) - values[:, -1]).abs().max() < 1e-6


def test_correlation_of_a_cell_that_never_moves_is_zero():
    values = torch.stack([torch.ones(9), torch.arange(9.0), -torch.arange(9.0)])
    assert cell_search.correlations(values, torch.arange(9.0)).tolist() == pytest.approx([0, 1, -1])


def test_bytes_are_no_characters():
    loaded = counting_model()
    with pytest.raises(UserError, match="characters"):
        cell_search.cell_values(dataclasses.replace(loaded, words=ByteTokenizer()), "é")
    with pytest.raises(UserError, match="no language model"):
        cell_search.cell_values(dataclasses.replace(loaded, words=None), TEXT)


def order_matters(n: int, seed: int) -> Reviews:
    """Two words each, 2 and 3 in either order, and 4 or 5: the label is order XOR word."""
    dice = np.random.default_rng(seed)
    swap, third = dice.integers(0, 2, n), dice.integers(0, 2, n)
    ids = np.stack([2 + swap, 3 - swap, 4 + third], axis=1).astype(np.int32)
    return Reviews(ids.ravel(), np.full(n, 3), swap, np.where(swap == 1, 1.0, 0.0))


def test_bag_of_words_counts_and_cannot_see_order():
    part = order_matters(6, 0)
    table = bag.counts(part, 6)
    assert table.sum(dim=1).tolist() == [3.0] * 6 and (table[:, 2:4] == 1).all()
    parts = {name: order_matters(400, seed) for seed, name in enumerate(("train", "valid", "test"))}
    answers = bag.train(parts, vocab_size=6, n_class=2)
    assert bag.score(answers, parts["test"])["expected"] == pytest.approx(0.5, abs=0.08)


def test_gates_are_those_of_the_walk():
    words = Vocabulary(("a", "b"), ("0", "1"))
    sizes = SequenceConfig(d_model=5, vocab_size=4, n_answer=2, answer="last")
    loaded = Loaded("here", SequenceModel(sizes).eval(), "sentiment", words)
    _, gates, likely = figures.gates_of(loaded, "a b b")
    answers, state = loaded.model(torch.tensor([words.encode("a b b")]))
    assert likely[-1] == pytest.approx(answers.softmax(-1)[0, 1].item(), abs=1e-6)
    assert (gates["c"][-1] - state[1][0, 0]).abs().max() < 1e-6
    assert 0 < gates["f"].min() and gates["f"].max() < 1


def test_jacobians_of_the_picture():
    """What the caption says: the LSTM's fade by its forget gate, chrono's hardly at all."""
    norms = figures.jacobian_norms(60)
    assert norms["LSTM, forget bias 0"][-1] < norms["LSTM, forget bias 1"][-1]
    assert norms["LSTM, forget bias 1"][-1] < norms["LSTM, chrono"][-1]
    assert isinstance(figures.starting_cells()["RNN"], cells.RNN)
