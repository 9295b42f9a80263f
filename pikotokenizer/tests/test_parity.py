"""The same ids as the libraries: same vocabulary, same text, nothing written here on their side.

With PIKO_SHARED_DATA set to a folder of real vocabularies (see README), those are compared as well.
"""

import io
import json
import os
from pathlib import Path

import pytest

from base import sentencepiece_pipeline
from bpe import BPE
from characters import PATTERNS, chars_to_bytes
from conftest import hard_strings
from formats import read_tokenizer_json
from tokenizer import load, save
from unigram import Unigram
from wordpiece import WordPiece

REAL = Path(os.environ.get("PIKO_SHARED_DATA", "nothing"))
COUNT = int(os.environ.get("PIKO_STRINGS", "1500"))


def in_tokenizers(tokenizer, path: Path):
    """What we export, loaded by Hugging Face's library."""
    library = pytest.importorskip("tokenizers")
    save(tokenizer, path)
    other = library.Tokenizer.from_file(str(path))
    other.encode_special_tokens = True  # as ours: special tokens in the text are text
    return other


def in_tiktoken(tokenizer, pattern: str):
    library = pytest.importorskip("tiktoken")
    ranks = {
        chars_to_bytes(p): i for p, i in tokenizer.vocab.items() if i not in tokenizer.added_ids
    }
    special = {t.content: t.id for t in tokenizer.pipeline.added}
    return library.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def in_sentencepiece(tokenizer, path: Path):
    library = pytest.importorskip("sentencepiece")
    save(tokenizer, path)
    return library.SentencePieceProcessor(model_file=str(path))


def assert_equal_ids(tokenizer, encode, texts, decode=None):
    """Equal ids on every text, and equal text back."""
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encode(text), ascii(text)[:200]
        if decode:
            assert tokenizer.decode(ids) == decode(ids), ascii(text)[:200]


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_byte_level_bpe(corpus, tmp_path, pattern):
    bpe = BPE.train(corpus, 1500, pattern=pattern, special_tokens=["<|endoftext|>"])
    texts = [*hard_strings(COUNT, 1), corpus]
    other = in_tokenizers(bpe, tmp_path / "t.json")
    assert_equal_ids(bpe, lambda t: other.encode(t, add_special_tokens=False).ids, texts)
    tik = in_tiktoken(bpe, PATTERNS[pattern])
    assert_equal_ids(bpe, tik.encode_ordinary, texts, tik.decode)
    for text in texts[:300]:
        assert bpe.encode(text, "all") == tik.encode(text, allowed_special="all")
    save(bpe, tmp_path / "t.tiktoken")
    again = load(tmp_path / "t.tiktoken", pattern)
    assert all(again.encode(text) == bpe.encode(text) for text in texts)
    save(again, tmp_path / "again.json")
    twice = load(tmp_path / "again.json")
    assert all(twice.encode(text) == bpe.encode(text) for text in texts)
    save(bpe, tmp_path / "vocab.bpe")
    gpt2 = load(tmp_path / "vocab.bpe")
    assert gpt2.merges == bpe.merges and gpt2.vocab == bpe.vocab


@pytest.mark.parametrize("size", [512, 2048])
def test_bpe_training_equals_hugging_face(corpus, size):
    library = pytest.importorskip("tokenizers")
    other = library.Tokenizer(library.models.BPE())
    other.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<a>"],
    )
    other.train_from_iterator([corpus], trainer)
    model = json.loads(other.to_str())["model"]
    ours = BPE.train(corpus, size, pattern="gpt2", special_tokens=["<a>"])
    assert [tuple(m) for m in model["merges"]] == ours.merges and model["vocab"] == ours.vocab


def test_metaspace_bpe(corpus, tmp_path):
    bpe = BPE.train(corpus, 1500, pattern="metaspace")
    texts = [t for t in hard_strings(COUNT, 2) if "<0x" not in t]
    other = in_tokenizers(bpe, tmp_path / "t.json")
    encode = lambda t: other.encode(t, add_special_tokens=False).ids  # noqa: E731
    assert_equal_ids(
        bpe, encode, [*texts, corpus], lambda ids: other.decode(ids, skip_special_tokens=False)
    )
    sp = in_sentencepiece(bpe, tmp_path / "t.model")
    assert_equal_ids(load(tmp_path / "t.model"), sp.encode, [*texts, corpus], sp.decode)
    assert_equal_ids(bpe, sp.encode, [*texts, corpus])


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_unigram(corpus, tmp_path, byte_fallback):
    model = Unigram.train(corpus, 1500, byte_fallback=byte_fallback)
    texts = [t for t in hard_strings(COUNT, 3) if "<0x" not in t and "<unk>" not in t]
    sp = in_sentencepiece(model, tmp_path / "t.model")
    assert_equal_ids(model, sp.encode, [*texts, corpus], sp.decode)
    assert_equal_ids(load(tmp_path / "t.model"), sp.encode, texts)
    other = in_tokenizers(model, tmp_path / "t.json")
    assert_equal_ids(model, lambda t: other.encode(t, add_special_tokens=False).ids, texts)
    best = sp.nbest_encode_as_ids("perpustakaan", 4)
    assert [ids for ids, _ in model.n_best("perpustakaan", 4)] == best


@pytest.mark.parametrize("lowercase", [True, False])
def test_wordpiece(corpus, tmp_path, lowercase):
    model = WordPiece.train(corpus, 1500, lowercase=lowercase)
    other = in_tokenizers(model, tmp_path / "t.json")
    texts = [*hard_strings(COUNT, 4), corpus]
    decode = lambda ids: other.decode(ids, skip_special_tokens=False)  # noqa: E731
    assert_equal_ids(model, lambda t: other.encode(t, add_special_tokens=False).ids, texts, decode)
    assert other.encode("a b").ids == model.encode("a b", add_special_tokens=True)
    save(model, tmp_path / "vocab.txt")
    again = load(tmp_path / "vocab.txt")
    assert all(again.encode(text) == model.encode(text) for text in texts)


def test_sentencepiece_models_with_a_character_map(corpus, tmp_path):
    """Their trainer, their NFKC table with collapsed spaces: our reader must honour all of it."""
    library = pytest.importorskip("sentencepiece")
    for kind, rule in (("unigram", "nmt_nfkc_cf"), ("bpe", "nmt_nfkc")):
        out = io.BytesIO()
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus.splitlines()),
            model_writer=out,
            vocab_size=900,
            model_type=kind,
            normalization_rule_name=rule,
            minloglevel=2,
        )
        (tmp_path / "m.model").write_bytes(out.getvalue())
        sp = library.SentencePieceProcessor(model_proto=out.getvalue())
        ours = load(tmp_path / "m.model")
        assert_equal_ids(ours, sp.encode, [*hard_strings(COUNT, 5), corpus], sp.decode)
        save(ours, tmp_path / "again.model")
        again = library.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
        assert_equal_ids(ours, again.encode, hard_strings(300, 6))


def test_unigram_is_as_good_as_sentencepieces(corpus):
    """Bits a character on held-out lines, both models in our lattice: within 1 %, or better."""
    library = pytest.importorskip("sentencepiece")
    lines = [line for line in corpus.splitlines() if line]
    train = [line for i, line in enumerate(lines) if i % 10]
    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(train),
        model_writer=out,
        vocab_size=600,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    sp = library.SentencePieceProcessor(model_proto=out.getvalue())
    ours = Unigram.train(train, 600, byte_fallback=False)
    pieces = {sp.id_to_piece(i): i for i in range(len(sp))}
    scores = [sp.get_score(i) for i in range(len(sp))]
    theirs = Unigram(pieces, scores, ours.pipeline, hidden=[0])
    assert len(ours) == len(theirs) == 600
    loss = [-sum(map(m.log_likelihood, lines[::10])) for m in (ours, theirs)]
    assert loss[0] < 1.01 * loss[1]


def test_offsets(corpus, tmp_path):
    """Equal to Hugging Face's where the two agree on what an offset is (no ▁ put in, no marks)."""
    from offsets import encode_with_offsets

    bpe, wordpiece = BPE.train(corpus, 800), WordPiece.train(corpus, 800, lowercase=True)
    for tokenizer in (bpe, wordpiece):
        other = in_tokenizers(tokenizer, tmp_path / "t.json")
        for text in [t for t in hard_strings(COUNT, 7) if t.isascii() or tokenizer is bpe]:
            ids, spans = encode_with_offsets(tokenizer, text)
            assert ids == tokenizer.encode(text)
            assert spans == other.encode(text, add_special_tokens=False).offsets, ascii(text)


def test_offsets_through_normalization(corpus):
    from offsets import encode_with_offsets

    model = Unigram.train(corpus, 700)
    for tokenizer in (model, WordPiece.train(corpus, 700, lowercase=True)):
        for text in hard_strings(500, 8):
            ids, spans = encode_with_offsets(tokenizer, text)
            assert ids == tokenizer.encode(text)
            assert all(0 <= a <= b <= len(text) for a, b in spans)
            assert spans == sorted(spans)
    ids, spans = encode_with_offsets(model, "ada rumah")
    assert "".join("ada rumah"[a:b] for a, b in spans) == "ada rumah"


def test_offsets_find_the_right_place(corpus):
    """Regex replacements, strips, spaces that collapse, and a ▁ that no tokenizer put there."""
    from offsets import encode_with_offsets

    library = pytest.importorskip("tokenizers")
    norms, pres = library.normalizers, library.pre_tokenizers
    other = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}))
    regex = library.Regex(r"\s+")
    for norm in (
        norms.Sequence([norms.Strip(), norms.Replace(regex, " ")]),
        norms.Sequence([norms.Replace("b", ""), norms.Strip(left=False)]),
        norms.Lowercase(),
    ):
        other.normalizer, other.pre_tokenizer = norm, pres.WhitespaceSplit()
        ours = read_tokenizer_json(json.loads(other.to_str()))
        for text in (" \t ab ▁ b  AB \n", "▁ ▁", "ab", "  ", "a b" * 3):
            assert encode_with_offsets(ours, text)[1] == other.encode(text).offsets, (norm, text)
    collapsing = Unigram.train(corpus, 700)
    collapsing = Unigram(collapsing.vocab, collapsing.scores, sentencepiece_pipeline(collapse=True))
    text = "  ada   rumah "
    ids, spans = encode_with_offsets(collapsing, text)
    assert ids == collapsing.encode(text)
    assert [text[a:b] for a, b in spans] == ["ada", "   rumah"]


# ---- real vocabularies, if there are any ----

needs_real = pytest.mark.skipif(not (REAL / "tok").is_dir(), reason="PIKO_SHARED_DATA is not set")


def real_texts() -> list[str]:
    files = [f.read_bytes().decode("utf-8") for f in sorted(REAL.glob("*.txt"))]
    return [*hard_strings(COUNT, 9), *files]


@needs_real
def test_real_cl100k():
    library = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    ours, path = load(REAL / "tok/cl100k_base.tiktoken"), str(REAL / "tok/cl100k_base.tiktoken")
    pattern = (  # as in tiktoken's own openai_public.py
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    special = {t.content: t.id for t in ours.pipeline.added}
    ranks = load_tiktoken_bpe(path)
    tik = library.Encoding("c", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    texts = real_texts()
    assert_equal_ids(ours, tik.encode_ordinary, texts, tik.decode)
    assert all(ours.encode(t, "all") == tik.encode(t, allowed_special="all") for t in texts)
    assert all(ours.decode(ours.encode(t)) == t for t in texts)


@needs_real
@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_real_tokenizer_json(name):
    library = pytest.importorskip("tokenizers")
    path = REAL / f"tok/{name}.tokenizer.json"
    ours, other = load(path), library.Tokenizer.from_file(str(path))
    texts = real_texts()
    assert all(ours.encode(t, "all", True) == other.encode(t).ids for t in texts)
    other.encode_special_tokens = True
    encode = lambda t: other.encode(t, add_special_tokens=False).ids  # noqa: E731
    assert_equal_ids(ours, encode, texts, lambda ids: other.decode(ids, skip_special_tokens=False))


@needs_real
def test_real_bert():
    library = pytest.importorskip("tokenizers")
    path = REAL / "tok/bert_uncased.vocab.txt"
    ours, other = load(path), library.BertWordPieceTokenizer(str(path), lowercase=True)
    texts = real_texts()
    assert all(ours.encode(t, "all", True) == other.encode(t).ids for t in texts)


@needs_real
@pytest.mark.parametrize("name", ["mistral", "unigram1000"])
def test_real_sentencepiece(name):
    library = pytest.importorskip("sentencepiece")
    path = REAL / f"tok/{name}.sentencepiece.model"
    sp = library.SentencePieceProcessor(model_file=str(path))
    assert_equal_ids(load(path), sp.encode, real_texts(), sp.decode)


@needs_real
def test_real_unigram_in_tokenizers(tmp_path):
    """The pieces and the character map of a real model, in the way tokenizers uses them."""
    import base64

    library = pytest.importorskip("tokenizers")
    model = load(REAL / "tok/unigram1000.sentencepiece.model")
    pieces = [(model.pieces[i], model.scores[i]) for i in range(len(model))]
    other = library.Tokenizer(library.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    charsmap = base64.b64decode(model.pipeline.normalizer["charsmap"])
    other.normalizer = library.normalizers.Precompiled(charsmap)
    other.pre_tokenizer = library.pre_tokenizers.Metaspace()
    other.decoder = library.decoders.Metaspace()
    other.save(str(tmp_path / "u.json"))
    assert_equal_ids(
        load(tmp_path / "u.json"), lambda t: other.encode(t).ids, real_texts(), other.decode
    )


@needs_real
@pytest.mark.parametrize("name", ["tinyshakespeare", "botchan"])
def test_real_training(name):
    library = pytest.importorskip("tokenizers")
    text = (REAL / f"{name}.txt").read_text(encoding="utf-8")
    for size in (1024, 8192):
        other = library.Tokenizer(library.models.BPE())
        other.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, show_progress=False
        )
        other.train_from_iterator([text], trainer)
        model, ours = json.loads(other.to_str())["model"], BPE.train(text, size, pattern="gpt2")
        assert [tuple(m) for m in model["merges"]] == ours.merges and model["vocab"] == ours.vocab
        assert other.encode(text).ids == ours.encode(text)
