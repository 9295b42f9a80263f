"""BPE: the fast trainer and encoder against their definitions, ties, specials, resuming."""

import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe import BPE, merge_dropout, merge_long, merge_short, train_merges, train_naive
from conftest import HERE, hard_strings


def test_incremental_trainer_equals_the_naive_one_on_1000_random_corpora():
    """Small alphabets make overlaps ("aaa"), ties and pairs that share a token frequent."""
    rng = random.Random(0)
    for _ in range(1000):
        letters = "abc"[: rng.randint(1, 3)]
        words = {}
        for _ in range(rng.randint(1, 8)):
            word = "".join(chr(rng.randrange(len(letters))) for _ in range(rng.randint(1, 12)))
            words[word] = rng.randint(1, 4)
        floor = rng.choice([1, 1, 2, 5])
        size = rng.choice([5, 8, 12, 40])  # reached, or more than there is to merge
        fast = train_merges(words, list(letters), size, floor)
        assert fast == train_naive(words, list(letters), size, floor), words


def test_worked_example():
    """Sennrich et al.'s words: low·5 lower·2 newest·6 widest·3.

    es occurs 6 + 3 = 9 times, as do st and (after es) est; e < s in the alphabet, so (e, s) first,
    then (es, t) 9, then (l, o) 7 before (o, w) 7 by the tie rule, then (lo, w) 7.
    """
    text = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    bpe = BPE.train(text, 260, pattern=r"\w+".replace(r"\w", r"\p{L}"))
    assert bpe.merges == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]


def test_aaaa_counts_overlaps_and_merges_from_the_left():
    """aaaaa → aa aa a, where (aa, a) and (aa, aa) tie at 1: id 0 is lower than id 1."""
    pieces, merges = train_merges({"\0\0\0\0\0": 1}, ["a"], 3)
    assert pieces == ["a", "aa", "aaa"] and merges == [(0, 0, 1), (1, 0, 2)]


def test_same_merges_under_any_hash_seed_and_document_order(corpus):
    code = (
        "import sys, random; sys.path.insert(0, sys.argv[1]); from bpe import BPE\n"
        "lines = open(sys.argv[1] + '/data/english.txt', encoding='utf-8').read().split('\\n')\n"
        "random.Random(int(sys.argv[2])).shuffle(lines)\n"
        "print(BPE.train(lines, 500).merges)"
    )
    seen = set()
    for seed in "012":
        command = [sys.executable, "-c", code, str(HERE), seed]
        env = {"PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
        done = subprocess.run(command, capture_output=True, env=env, check=True)
        seen.add(done.stdout)
    assert len(seen) == 1


@given(st.text("ab ", max_size=40), st.integers(0, 2**16))
@settings(max_examples=200, deadline=None)
def test_heap_and_scan_merge_alike(text, seed):
    rng = random.Random(seed)
    ranks = {}
    for _ in range(12):
        a, b = ("".join(rng.choices("ab ", k=rng.randint(1, 3))) for _ in range(2))
        ranks[a, b] = len(ranks)
    rank = lambda a, b: ranks.get((a, b), 1 << 62)  # noqa: E731
    assert merge_short(list(text), rank) == merge_long(list(text), rank)


def test_long_runs_equal_the_naive_result(corpus):
    """The inputs that break careless encoders, short enough for the scan to answer too."""
    bpe = BPE.train(corpus + "a" * 64 + "_" * 64, 700)
    for text in ("a" * 300, "_" * 300, "ab" * 150, "lorem,ipsum" * 30):
        for word in bpe.split(text, True):
            assert merge_long(bpe.symbols(word), bpe.rank) == merge_short(
                bpe.symbols(word), bpe.rank
            )
    assert bpe.decode(bpe.encode("a" * 20_000)) == "a" * 20_000


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "whitespace"])
def test_stretches_give_the_same_ids_as_the_pattern_alone(corpus, pattern):
    """The cache between spaces is only allowed if nobody can tell; small blocks cut everywhere."""
    import base

    spaces = [" ", " ", "  ", "\n", "\n", "\t", " \n", "\xa0", "\u3000", "\x1c"]
    rng = random.Random(1)
    runs = "".join("".join(rng.choices(spaces, k=4)) + "x" for _ in range(2000))
    bpe = BPE.train(corpus[:50_000] + runs, 500, pattern=pattern)
    assert bpe.spaced == "context"
    usual = base.blocks.__defaults__
    try:
        for _ in range(4000):
            text = "".join(rng.choices([*spaces, "a", "b", "!", "1", "'s", "é", "/"], k=12))
            base.blocks.__defaults__ = (rng.choice([1, 2, 5, 1 << 20]),)
            slow = [i for word in bpe.split(text, True) for i in bpe.word_ids(word)]
            assert bpe.encode(text) == slow, ascii(text)
    finally:
        base.blocks.__defaults__ = usual


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4", "o200k", "whitespace", r"[a-z]+|\p{N}{2}"])
def test_byte_level_is_lossless(corpus, strings, pattern):
    bpe = BPE.train(corpus[:50_000], 400, pattern=pattern)
    for text in [*strings, corpus]:
        assert bpe.decode(bpe.encode(text)) == text


def test_metaspace_is_lossless_but_for_a_literal_mark(corpus):
    bpe = BPE.train(corpus, 1000, pattern="metaspace")
    for text in hard_strings(800, 3):
        if "▁" not in text and "<0x" not in text:
            assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode("a▁b")) == "a b"  # the format's own loss


def test_special_tokens_only_count_when_allowed(corpus):
    bpe = BPE.train(corpus, 400, special_tokens=["<|end|>", "<|a b|>", "é!č"])
    text = "x<|end|>y<|a b|>é!č"
    assert not {0, 1, 2} & set(bpe.encode(text))
    assert [i for i in bpe.encode(text, allowed_special="all") if i < 3] == [0, 1, 2]
    assert [i for i in bpe.encode(text, allowed_special=["<|end|>"]) if i < 3] == [0]
    for allowed in ((), "all", ["é!č"]):
        assert bpe.decode(bpe.encode(text, allowed)) == text
    with pytest.raises(ValueError, match="nope"):
        bpe.encode(text, ["nope"])
    assert bpe.decode(bpe.encode(text, "all"), skip_special_tokens=True) == "xy"


def test_a_special_token_is_never_learnt_from_text(corpus):
    """Its text is cut out before, as is a literal <0x41>; a piece that spells it is refused."""
    from unigram import Unigram
    from wordpiece import WordPiece

    text = "ab ab ab <0x41> <0x41> <0x41> cab cd cd "
    for train, size in ((BPE.train, 300), (Unigram.train, 400), (WordPiece.train, 40)):
        model = train(text, size, special_tokens=["ab"])
        special = model.vocab["ab"]
        assert special not in model.encode(text) and special in model.encode(text, "all")
    for marked in (BPE.train(text * 9, 400, pattern="metaspace"), Unigram.train(text * 9, 400)):
        assert marked.decode(marked.encode(text)) == text
    for special, pattern in (("a", "gpt4"), ("é", "gpt4"), ("", "gpt4"), ("<0x41>", "metaspace")):
        with pytest.raises(ValueError, match="too"):
            BPE.train("a b é", 600, pattern=pattern, special_tokens=[special])
    with pytest.raises(ValueError, match="'Ġab' would be a piece"):
        BPE.train("cd ab ab", 300, special_tokens=["Ġab"])
    with pytest.raises(ValueError, match="'##b' would be a piece"):
        WordPiece.train("ab ab", 40, special_tokens=["##b"])
    with pytest.raises(ValueError, match="'<0x41>' would be a piece"):
        Unigram.train("ab ab", 400, special_tokens=["<0x41>"])
    half = BPE.train("x", 257, special_tokens=["Ġab"])
    with pytest.raises(ValueError, match="'Ġab' would be a piece"):
        half.extend("cd ab ab", 300)


def test_lone_surrogates_become_replacement_characters():
    bpe = BPE.train("a", 256)
    assert bpe.decode(bpe.encode("a\ud800b")) == "a\ufffdb"
    assert bpe.decode(bpe.encode("\ud83d\ude00")) == "😀"
    assert bpe.sample("a\ud800b", 0.0) == bpe.encode("a\ud800b")


def test_stopping_and_extending_gives_the_merges_of_one_go(corpus):
    whole = BPE.train(corpus, 600)
    half = BPE.train(corpus, 400)
    assert half.extend(corpus, 600).merges == whole.merges
    assert half.extend(corpus, 600).vocab == whole.vocab
    with pytest.raises(ValueError, match="too small"):
        half.extend(corpus, 400)


def test_vocab_sizes_that_cannot_be(corpus):
    with pytest.raises(ValueError, match="255 is too small"):
        BPE.train(corpus, 255)
    small = BPE.train("ab ab ab", 10_000)
    assert len(small) == 258  # ab, ␣ab, and nothing left to merge
    with pytest.raises(ValueError, match="no text"):
        BPE.train("", 300)


def test_min_frequency_ends_the_training():
    assert BPE.train("abab cd", 300, min_frequency=2).merges == [("a", "b")]


def test_dropout_limits(corpus):
    """p = 0 is plain BPE, p = 1 leaves the bytes; in between the text survives and the ids vary."""
    bpe = BPE.train(corpus, 600)
    text = corpus[:500]
    assert bpe.sample(text, 0.0) == bpe.encode(text)
    assert len(bpe.sample(text, 1.0)) == len(text.encode("utf-8"))
    draws = [bpe.sample(text, 0.3, seed) for seed in range(5)]
    assert all(bpe.decode(ids) == text for ids in draws)
    assert len({tuple(ids) for ids in draws}) == 5
    assert bpe.sample(text, 0.3, 1) == draws[1]
    with pytest.raises(ValueError, match="probability"):
        bpe.sample(text, 1.5)


def test_dropout_leaves_out_the_stated_share():
    """With one possible merge, "ab" stays apart with probability p: 400 of 2,000 at p = 0.2.

    Binomial: standard deviation √(2000 · 0.2 · 0.8) = 17.9; four of them allowed.
    """
    rng = random.Random(5)
    rank = lambda a, b: 0 if a + b == "ab" else 1 << 62  # noqa: E731
    apart = sum(len(merge_dropout(["a", "b"], rank, 0.2, rng)) == 2 for _ in range(2000))
    assert abs(apart - 400) < 72


def test_streaming_never_shows_half_a_character(corpus, strings):
    bpe = BPE.train(corpus, 300)
    for text in strings[:400]:
        stream = bpe.stream()
        parts = [stream.feed(i) for i in bpe.encode(text)]
        assert "".join(parts) + stream.flush() == text
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_streaming_of_pieces_and_bytes(corpus):
    bpe = BPE.train(corpus, 700, pattern="metaspace")
    for text in ("Halo dunia 👋 ", "  é", "日本", " a"):
        ids = bpe.encode(text)
        stream = bpe.stream()
        assert "".join([*map(stream.feed, ids), stream.flush()]) == bpe.decode(ids) == text


def test_ids_out_of_range_are_named(corpus):
    bpe = BPE.train(corpus, 300)
    for bad in (300, -1, "x"):
        with pytest.raises(ValueError, match="not in the vocabulary of 300"):
            bpe.decode([0, bad])


def test_the_cache_is_bounded(corpus):
    bpe = BPE.train(corpus, 300)
    bpe.cache_size = bpe.words.limit = 10
    for start in range(0, 5000, 50):
        assert bpe.decode(bpe.encode(corpus[start : start + 50])) == corpus[start : start + 50]
        assert len(bpe.stretches) <= 20 and len(bpe.words) <= 10
    bpe.encode("y " + "x" * 100 + " y")
    assert all(len(key) <= 64 for key in [*bpe.words, *bpe.stretches])


def test_bytes_of_a_character_share_its_place(corpus):
    """▁ is put in before (0, 0); the three bytes of 日 all stand for text[1:2]."""
    from offsets import encode_with_offsets

    bpe = BPE.train(corpus, 700, pattern="metaspace")
    ids, spans = encode_with_offsets(bpe, "a日b")
    assert bpe.decode(ids) == "a日b"
    assert spans[-4:] == [(1, 2), (1, 2), (1, 2), (2, 3)]


def test_byte_fallback_needs_all_256_bytes():
    """As in tokenizers: with one byte missing, what is no piece is the unknown token."""
    from base import Pipeline

    vocab = {"<unk>": 0, "a": 1} | {f"<0x{b:02X}>": 2 + b for b in range(256)}
    full = BPE(vocab, [], Pipeline(), byte_level=False, byte_fallback=True, unk="<unk>")
    del vocab["<0x00>"]
    part = BPE(vocab, [], Pipeline(), byte_level=False, byte_fallback=True, unk="<unk>")
    assert full.encode("aé") == [1, 2 + 0xC3, 2 + 0xA9] and part.encode("aé") == [1, 0]


def test_merges_decide_even_where_the_whole_word_is_a_piece():
    """No merge makes the piece abc: a text becomes it only with whole_first (ignore_merges)."""
    from base import Pipeline

    vocab = {piece: i for i, piece in enumerate(["a", "b", "c", "bc", "abc"])}
    plain, whole = (
        BPE(vocab, [("b", "c")], Pipeline(), byte_level=False, whole_first=first)
        for first in (False, True)
    )
    assert plain.encode("abc") == [0, 3] and whole.encode("abc") == [4]


def test_a_suffix_marks_the_last_character_as_in_tokenizers():
    """CLIP's </w>: here "ab" ends in b</w>, and "a" alone is a</w>."""
    library = pytest.importorskip("tokenizers")
    from base import Pipeline

    vocab = {p: i for i, p in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "ba", "bab</w>"])}
    merges = [("a", "b</w>"), ("b", "a"), ("b", "ab</w>")]
    ours = BPE(vocab, merges, Pipeline(), byte_level=False, suffix="</w>")
    model = library.models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>")
    other = library.Tokenizer(model)
    for word in ("a", "b", "ab", "ba", "bab", "baba", "abba", "bbab"):
        assert ours.encode(word) == other.encode(word).ids, word
    assert ours.encode("ab") == [4]
