"""The codebook: choice, gradient, moving averages, dead codes."""

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


def test_a_batch_in_parts_moves_the_codes_as_the_whole_one_does():
    vectors = torch.randn(8, 3, 2)
    whole, parts = Codebook(4, 2), Codebook(4, 2)
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
