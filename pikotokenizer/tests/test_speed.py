"""The fast ways give what the slow ones give: words merged together, stretches, running sums."""

import random
import threading

import numpy as np
import pytest

import bpe as bpe_module
from bpe import BPE, merge_short
from characters import chars_to_bytes
from conftest import hard_strings
from together import MULT, Hashes, RankTable, merge_together, powers
from unigram import Unigram


def rank_tables(tokenizer: BPE):
    return tokenizer.tables()


@pytest.mark.parametrize("by_ranks", [False, True])
def test_words_merged_together_are_those_merged_alone(corpus, by_ranks):
    """Merge lists and rank files; runs of one letter, where the leftmost pair must come first."""
    trained = BPE.train(corpus[:60_000] + "a" * 40 + " aaa aaaa", 700, pattern="gpt2")
    tokenizer = trained
    if by_ranks:
        ranks = dict(trained.vocab)
        tokenizer = BPE(ranks, None, trained.pipeline, ranks=ranks)
    rng = random.Random(0)
    words = ["".join(rng.choices("aab eé日r", k=rng.randint(1, 30))) for _ in range(3000)]
    words += [word for text in hard_strings(500, 40) for word in tokenizer.split(text, True)]
    words = [word for word in words if len(word.encode("utf-8")) < 120]
    together = merge_together([word.encode("utf-8") for word in words], *tokenizer.tables())
    alone = [merge_short(tokenizer.symbols(word), tokenizer.rank) for word in words]
    assert together == [tuple(tokenizer.vocab[piece] for piece in word) for word in alone]


def test_two_merges_that_make_one_piece_are_told_apart():
    """(a, bc) merges and (ab, c) does not, though both would spell abc."""
    pieces = {piece: i for i, piece in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("b", "c"), ("a", "b"), ("a", "bc")]
    left = [len(a) for a, _ in merges]
    ranks = RankTable([a + b for a, b in merges], [0, 1, 2], left)
    ids = RankTable(pieces, [*pieces.values()])
    assert merge_together([b"abc", b"abab", b"cab"], ranks, ids) == [(5,), (3, 3), (2, 3)]
    with pytest.raises(ValueError, match="one hash"):
        RankTable(["ab", "ab"], [0, 1])


def test_hashes_of_stretches():
    """Equal bytes anywhere have equal hashes; MULT^−1 undoes MULT."""
    data = b"abcXabcYabd"
    hashes = Hashes(data)
    start, end = [0, 4, 8, 0], [3, 7, 11, 2]
    a, b, c, d = hashes(np.array(start), np.array(end)).tolist()
    assert a == b and len({a, c, d}) == 3
    assert powers(MULT, 3).tolist() == [1, MULT, MULT**2 % 2**64]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "llama3", "whitespace"])
def test_new_texts_are_learnt_at_once_with_the_same_ids(corpus, strings, pattern, monkeypatch):
    """Even and odd spaces, all planes of Unicode; every block is new, and then known."""
    monkeypatch.setattr(bpe_module, "MANY", 2)
    trained = BPE.train(corpus[:50_000], 500, pattern=pattern)
    rng = random.Random(1)
    for _ in range(12):
        text = rng.choice([" ", "  ", "\n ", " \t"]).join(rng.choices(strings, k=60)) + corpus[:900]
        slow = [i for word in trained.split(text, True) for i in trained.word_ids(word)]
        fresh = BPE(trained.vocab, trained.merges, trained.pipeline)
        assert fresh.encode(text) == slow and fresh.encode(text) == slow
        whole = BPE(trained.vocab, None, trained.pipeline, trained.vocab, whole_first=True)
        words = [i for word in whole.split(text, True) for i in whole.word_ids(word)]
        assert whole.encode(text) == words and whole.encode(text) == words


def test_ids_do_not_depend_on_what_was_seen_before(corpus):
    trained = BPE.train(corpus[:50_000], 500)
    parts = [corpus[k : k + 3000] for k in range(0, 60_000, 3000)]
    alone = [BPE(trained.vocab, trained.merges, trained.pipeline).encode(part) for part in parts]
    assert [trained.encode(part) for part in parts] == alone
    model = Unigram.train(corpus[:50_000], 700)

    def fresh() -> Unigram:
        return Unigram(model.vocab, model.scores, model.pipeline, 0, True, model.hidden, True)

    assert [model.encode(part) for part in parts] == [fresh().encode(part) for part in parts]


def test_unigram_stretches_that_do_not_stand_alone(corpus):
    """A literal ▁ at an end, spaces in rows and at the ends, nothing at all."""
    model = Unigram.train(corpus[:50_000], 700)
    for text in ("a▁ b", "▁a", " a", "a ", "  a   b  ", "▁", " ", "", "a\n b", "日本 x"):
        whole = model.normalize(text)
        slow = [i for i, _, _ in model.spelled(whole, model.viterbi(whole)[0])]
        assert model.encode(text) == slow, text


def test_the_quick_search_finds_what_the_exact_one_finds(corpus):
    model = Unigram.train(corpus[:50_000], 700)
    words = {"▁" + word for word in corpus[:60_000].split()} | {"▁日", "日日", "", "▁▁x"}
    for word in words:
        path, score, margin = model.viterbi(word)
        (quick, gap), total = model.quick_viterbi(word)
        assert (
            quick == path and abs(total - score) < 1e-3 and abs(gap - margin) < 1e-3
        ) or gap > 1e9


def test_many_threads_one_tokenizer(corpus):
    """Eight threads, half of which allow special tokens, on texts that are new to the tokenizer."""
    model = BPE.train(corpus[:20_000], 400, special_tokens=["<|end|>"])
    texts = [corpus[k : k + 2000] + "<|end|>" for k in range(0, 32_000, 2000)]
    expected = {n: [model.encode(t, "all" if n % 2 else ()) for t in texts] for n in range(2)}
    shared, wrong = BPE(model.vocab, model.merges, model.pipeline), []

    def work(n: int) -> None:
        for text, ids in zip(texts, expected[n % 2], strict=True):
            if shared.encode(text, "all" if n % 2 else ()) != ids:
                wrong.append((n, text))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and 0 in expected[1][0] and 0 not in expected[0][0]


def test_pieces_of_the_tables_are_bytes(corpus):
    """A special token that is in the vocabulary as a piece is in no table."""
    vocab = BPE.train(corpus[:9000], 300).vocab | {"<|end|>": 300}
    from base import AddedToken
    from bpe import bytes_pipeline

    pipeline = bytes_pipeline(r"\S+|\s+")
    pipeline.added = [AddedToken(300, "<|end|>")]
    tokenizer = BPE(vocab, None, pipeline, vocab, whole_first=True)
    words = [f"w{i}" for i in range(99)]
    tokenizer.learn_words([*words, "<|end|>"])
    assert 300 not in tokenizer.words["<|end|>"]
    for word in words:
        spelled = b"".join(chars_to_bytes(tokenizer.pieces[i]) for i in tokenizer.words[word])
        assert spelled.decode() == word
