"""The codebook: choice, gradient, moving averages, dead codes."""

import copy
import math

import pytest
import torch

from vq import Codebook, perplexity


@pytest.fixture
def book():
    """Four codes on the corners of a square."""
    book = Codebook(4, 2, decay=0.5)
    book.codes.copy_(torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]]))
    book.count.fill_(1.0)
    book.total.copy_(book.codes)
    return book


def test_each_vector_gets_its_nearest_code(book):
    vectors = torch.tensor([[[0.1, 0.2], [0.9, 0.8], [0.2, 0.9]]])
    chosen, commitment, numbers = book(vectors)
    assert numbers.tolist() == [[0, 3, 1]]
    torch.testing.assert_close(chosen, book.codes[numbers])
    # squared distances: 0.01 + 0.04, 0.01 + 0.04, 0.04 + 0.01
    assert commitment.item() == pytest.approx(0.15)


def test_nearest_is_that_of_cdist():
    book, vectors = Codebook(11, 5), torch.randn(3, 7, 5)
    assert torch.equal(book.nearest(vectors), torch.cdist(vectors, book.codes).argmin(-1))


def test_the_gradient_goes_straight_through(book):
    vectors = torch.tensor([[[0.1, 0.2]]], requires_grad=True)
    chosen = book(vectors)[0]
    (chosen * torch.tensor([3.0, 5.0])).sum().backward()
    assert vectors.grad.tolist() == [[[3.0, 5.0]]]
    vectors.grad = None
    book(vectors)[1].sum().backward()  # commitment: 2 (v − e)
    torch.testing.assert_close(vectors.grad, torch.tensor([[[0.2, 0.4]]]))


def test_codes_follow_the_mean_of_their_vectors(book):
    """Code 0 had count 1 and total (0, 0); two vectors of sum (0.2, 0.2) come, decay ½:
    count (1 + 2) / 2 = 1.5, total (0.1, 0.1), code (0.0667, 0.0667)."""
    book.train()(torch.tensor([[[0.2, 0.0], [0.0, 0.2]]]))
    assert book.codes[0].tolist() == [0, 0]  # not yet
    book.follow()
    assert book.count[0].item() == 1.5
    torch.testing.assert_close(book.codes[0], torch.full((2,), 1 / 15))


def test_the_decay_is_the_share_that_is_kept():
    """Decay 0.9, count 1: no vector leaves 0.9, and one vector keeps it at 1. A second call of
    `follow` finds nothing noted and moves nothing."""
    book = Codebook(2, 1, decay=0.9)
    book.codes.copy_(torch.tensor([[0.0], [1.0]]))
    book.total.copy_(book.codes)
    book.train()(torch.tensor([[[0.9]]]))
    for _ in range(2):
        book.follow()
        torch.testing.assert_close(book.count, torch.tensor([0.9, 1.0]))
        assert book.codes[1].item() == pytest.approx(0.9 * 1 + 0.1 * 0.9)


def test_a_dead_code_is_put_on_the_first_vector():
    """Nobody chose code 1 for long: it gets the mean count, and the place of the first vector."""
    book = Codebook(2, 1, decay=0.5)
    book.codes.copy_(torch.tensor([[0.0], [50.0]]))
    book.count.copy_(torch.tensor([7.0, 1e-3]))
    book.total.copy_(book.codes * book.count[:, None])
    book.train()(torch.tensor([[[0.5], [0.1], [0.0]]]))
    book.follow()
    assert book.count[1].item() == pytest.approx((5 + 0.0005) / 2)  # counts 5 and 0.0005
    assert book.codes[1].item() == pytest.approx(0.5)


def test_two_processes_move_the_codes_as_one_does():
    """Each notes every second picture; sums go over both, and the spare vector is the first's."""
    vectors, one = torch.randn(8, 3, 2), Codebook(4, 2)
    one.codes[3] = 100.0  # nobody chooses it
    one.count[3] = 1e-4
    first, second = copy.deepcopy(one), copy.deepcopy(one)
    for book, rows in ((one, vectors), (first, vectors[0::2]), (second, vectors[1::2])):
        book.train()(rows)
    one.follow()
    sent = []
    second.follow(lambda tensor: sent.append(tensor.clone()) or tensor, first=False)
    parts = iter(sent)
    first.follow(lambda tensor: tensor + next(parts))
    torch.testing.assert_close(first.codes, one.codes)
    torch.testing.assert_close(first.codes[3], vectors[0, 0])
    torch.testing.assert_close(first.count, one.count)


def test_bfloat16_products_choose_the_same_codes():
    """Codes far from 0 and close together: |e|² − 2 v·e in three digits would choose others."""
    book, vectors = Codebook(32, 8), 5 + torch.randn(64, 4, 8)
    book.codes += 5
    wanted = torch.cdist(vectors.double(), book.codes.double()).argmin(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(book.nearest(vectors), wanted)


def test_a_batch_in_parts_moves_the_codes_as_the_whole_one_does():
    vectors = torch.randn(8, 3, 2)
    whole, parts = Codebook(4, 2), Codebook(4, 2)
    whole.codes[2] = 100.0  # dead: it takes the first vector of the batch, not of the last part
    whole.count[2] = 1e-4
    parts.load_state_dict(whole.state_dict())
    whole.train()(vectors)
    parts.train()(vectors[:5])
    parts(vectors[5:])
    whole.follow(), parts.follow()
    torch.testing.assert_close(whole.codes, parts.codes)


def test_scoring_moves_nothing(book):
    book.eval()(torch.randn(4, 3, 2))
    before = book.codes.clone()
    book.follow()
    assert torch.equal(book.codes, before) and book.noted == []


def test_a_code_that_nobody_chooses_is_put_where_vectors_are(book):
    book.codes[3] = 100.0
    book.train()
    for _ in range(12):
        book(torch.rand(16, 4, 2))
        book.follow()
    assert book.codes.abs().max() < 2
    assert len(book(torch.rand(99, 4, 2))[2].unique()) == 4


def test_perplexity_by_hand():
    """Two codes used alike of four: exp(ln 2) = 2. One alone: 1."""
    assert perplexity(torch.tensor([0, 1, 1, 0]), 4) == pytest.approx(2)
    assert perplexity(torch.tensor([3, 3]), 4) == pytest.approx(1)
    assert perplexity(torch.arange(4), 4) == pytest.approx(math.exp(math.log(4)))
