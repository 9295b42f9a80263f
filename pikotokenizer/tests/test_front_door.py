"""What people bring to the front door: rank files, GPT-2's pair, SentencePiece's special pieces.

Files made here always run; with PIKO_SHARED_DATA set (README, Tests) the real ones are read too.
"""

import base64
import io
import json
import random

import pytest
from test_command_line import piko
from test_parity import COUNT, REAL, assert_equal_ids, needs_real

import published
from bpe import BPE
from characters import PATTERNS, chars_to_bytes
from conftest import HERE, hard_strings
from spm import NORMAL, UNUSED, USER_DEFINED, field, read_model
from tokenizer import load, save
from unigram import Unigram


def rank_file(tokens: list[bytes]) -> bytes:
    return b"".join((base64.b64encode(t) or b"=") + b" %d\n" % i for i, t in enumerate(tokens))


@pytest.fixture(scope="module")
def ranks(corpus) -> list[bytes]:
    """The tokens of a small byte-level BPE, by rank."""
    bpe = BPE.train(corpus[:30_000], 400, pattern="gpt2")
    return [chars_to_bytes(bpe.pieces[i]) for i in range(400)]


# ---- B.1: special tokens of rank files ----


def test_special_tokens_of_a_rank_file_as_names_texts_or_ids(ranks, tmp_path):
    file = tmp_path / "mine.tiktoken"
    file.write_bytes(rank_file(ranks))
    listed = load(file, "gpt2", ["<|a|>", "<|b|>"])
    assert listed.added_ids == {400: "<|a|>", 401: "<|b|>"} and listed.decode([401]) == "<|b|>"
    chosen = load(file, "gpt2", {"<|b|>": 777})
    assert chosen.encode("x<|b|>", "all")[-1] == 777 and 777 not in chosen.encode("x<|b|>")
    for special, words in (
        ("nobody", "no vocabulary 'nobody'"), ("llama3", "128,000 ranks, this file has 400"),
        ({"<|a|>": "7"}, "not an object of texts and ids"), ({"<|a|>": 5}, "has the id of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            load(file, "gpt2", special)
    with pytest.raises(ValueError, match="--special llama4"):
        load(file)


def test_special_tokens_on_the_command_line(ranks, tmp_path):
    file, told = tmp_path / "mine.tiktoken", tmp_path / "special.json"
    file.write_bytes(rank_file(ranks))
    told.write_text('{"<|end|>": 400}', encoding="utf-8")
    of = ("--weights", file, "--pattern", "gpt2")
    for special in (told, '{"<|end|>": 400}'):
        ids = piko(*of, "--special", special, "--encode", "a<|end|>").stdout.split()
        assert ids[-1] == "400"
        assert piko(*of, "--special", special, "--decode", "400").stdout == "<|end|>\n"
    assert "400" not in piko(*of, "--encode", "a<|end|>").stdout.split()
    assert "no vocabulary" in piko(*of, "--special", "x", "--encode", "a", check=2).stderr
    assert "no JSON" in piko(*of, "--special", "{", "--encode", "a", check=2).stderr


def test_an_empty_last_token_is_read_and_written(ranks, tmp_path):
    """Whisper's file ends in the line "= 50256": a token of no bytes, which no text becomes."""
    file = tmp_path / "w.tiktoken"
    file.write_bytes(rank_file([*ranks, b""]))
    tokenizer = load(file, "gpt2", ["<|end|>"])
    assert tokenizer.decode([400]) == "" and tokenizer.encode("a<|end|>", "all")[-1] == 401
    assert tokenizer.decode(tokenizer.encode("Halo dunia 👋")) == "Halo dunia 👋"
    save(tokenizer, tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == file.read_bytes()


def made_up(size: int, base: list[bytes]) -> list[bytes]:
    """`size` tokens: those of `base`, and then new ones of three bytes that no merge makes."""
    known, tokens, n = set(base), list(base), 0
    while len(tokens) < size:
        token = bytes([n >> 16 & 255, n >> 8 & 255, n & 255])
        n += 1
        if token not in known:
            tokens.append(token)
    return tokens


@pytest.mark.parametrize(
    "name, size, first, end",
    [("llama3", 128_000, "<|begin_of_text|>", "<|reserved_special_token_250|>"),
     ("llama3.1", 128_000, "<|begin_of_text|>", "<|reserved_special_token_247|>"),
     ("llama4", 200_000, "<|begin_of_text|>", "<|reserved_special_token_903|>")],
)  # fmt: skip
def test_llama_by_name(ranks, tmp_path, name, size, first, end):
    """A file of the right size: the ids of the special tokens, and tiktoken's ids with them."""
    library = pytest.importorskip("tiktoken")
    tokens = made_up(size, ranks)
    file = tmp_path / "tokenizer.model"  # what Meta calls it
    file.write_bytes(rank_file(tokens))
    ours = load(file, special_tokens=name)
    special = {text: i for i, text in ours.added_ids.items()}
    count = 2048 if name == "llama4" else 256
    assert len(special) == count and special[first] == size and special[end] == size + count - 1
    assert ours.decode([size]) == first
    pattern = PATTERNS["o200k" if name == "llama4" else "llama3"]
    mergeable = {token: i for i, token in enumerate(tokens)}
    tik = library.Encoding("x", pat_str=pattern, mergeable_ranks=mergeable, special_tokens=special)
    rng, texts = random.Random(name), list(special)
    for text in hard_strings(300, 31):
        text = rng.choice(texts) + text + rng.choice(texts)
        assert ours.encode(text, "all") == tik.encode(text, allowed_special="all"), ascii(text)
        assert ours.encode(text) == tik.encode_ordinary(text)


def test_published_lists():
    """Ids that the publishers' documents name, and tiktoken's own lists."""
    ids = {name: known.special() for name, known in published.PUBLISHED.items()}
    assert ids["llama3"]["<|eot_id|>"] == ids["llama3.1"]["<|eot_id|>"] == 128009
    assert ids["llama3.1"]["<|eom_id|>"] == 128008 and ids["llama3.1"]["<|python_tag|>"] == 128010
    assert (
        ids["llama4"]["<|header_start|>"] == 200005 and ids["llama4"]["<|image_start|>"] == 200080
    )
    assert ids["llama4"]["<|reasoning_thinking_end|>"] == 201143
    assert ids["whisper"]["<|startoftranscript|>"] == 50258 and ids["whisper"]["<|0.00|>"] == 50364
    assert ids["whisper-v3"]["<|yue|>"] == 50358 and ids["whisper-v3"]["<|0.00|>"] == 50365
    for known in ids.values():
        assert len(set(known.values())) == len(known)
    public = pytest.importorskip("tiktoken_ext.openai_public")
    read = {"data_gym_to_mergeable_bpe_ranks": dict, "load_tiktoken_bpe": lambda *_, **__: {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(public, "data_gym_to_mergeable_bpe_ranks", lambda *_, **__: {})
        patch.setattr(public, "load_tiktoken_bpe", read["load_tiktoken_bpe"])
        for name in ("gpt2", "p50k_base", "p50k_edit", "cl100k_base", "o200k_base"):
            assert ids[name] == getattr(public, name)()["special_tokens"]
        theirs = public.o200k_harmony()["special_tokens"]
        assert ids["o200k_harmony"] == {
            k: v for k, v in theirs.items() if k != "<|reserved_200018|>"
        }


def test_llama_3_is_recognised_by_two_of_its_ids():
    """128,000 is a size that anybody may choose, so the size alone says nothing."""
    ranks = {f"x{i}": i for i in range(127_998)}
    assert published.recognised(ranks | {"Hello": 9906, "Ġworld": 1917}) == "llama3"
    assert published.recognised(ranks | {"Hello": 1, "Ġworld": 1917}) is None
    assert published.recognised({str(i): i for i in range(200_000)}) is None


# ---- B.2: GPT-2 in every shape ----


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json"),
                                   ("small-merges.txt", "small-vocab.json")])  # fmt: skip
@pytest.mark.parametrize("header", ["#version: 0.2\n", "", "#version: 0.2 - Trained by x\r\n"])
def test_gpt2_pairs(corpus, tmp_path, names, header):
    """Other ids than GPT-2's, with and without the first line, from either of the two files."""
    bpe = BPE.train(corpus[:20_000], 320, pattern="gpt2")
    shift = {piece: i + 3 for piece, i in bpe.vocab.items()}
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, **shift, "<|endoftext|>": 323, "model": 400}
    merges, ids = (tmp_path / name for name in names)
    lines = "".join(f"{a} {b}\n" for a, b in bpe.merges)
    merges.write_text(header + lines, encoding="utf-8", newline="")
    ids.write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "added_tokens.json").write_text('{"[NEW]": 401}', encoding="utf-8")
    for path in (merges, ids) if names[0][0] != "s" else (merges,):
        tokenizer = load(path, special_tokens={"<|mine|>": 402})
        text = corpus[:2000]
        assert tokenizer.encode(text) == [i + 3 for i in bpe.encode(text)]
        special = "<pad></s><|endoftext|>[NEW]<|mine|>"
        assert tokenizer.encode(special, "all") == [1, 2, 323, 401, 402]
        assert not {0, 1, 2, 323, 401, 402} & set(tokenizer.encode(special))
    assert load(tmp_path if names[0][0] != "s" else merges).vocab == vocab


def test_a_pair_that_is_not_whole_is_refused_by_name(corpus, tmp_path):
    bpe = BPE.train(corpus[:20_000], 320, pattern="gpt2")
    save(bpe, tmp_path / "merges.txt")
    assert load(tmp_path / "vocab.json").vocab == bpe.vocab
    (tmp_path / "vocab.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="not GPT-2's own"):
        load(tmp_path / "merges.txt")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ValueError, match="the merges are not beside it"):
        load(tmp_path / "elsewhere.json")


def test_a_vocabulary_with_the_pieces_model_and_padding_is_no_tokenizer_json(tmp_path):
    """GPT-2's real encoder.json holds "model", "version" and "padding" among its pieces."""
    bpe = BPE.train("model padding version " * 9, 300, pattern="gpt2")
    vocab = bpe.vocab | {"model": 300, "padding": 301, "version": 302}
    save(bpe, tmp_path / "vocab.bpe")
    (tmp_path / "encoder.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert load(tmp_path / "encoder.json").encode("model") == [300]


# ---- B.3: truncation and padding; user-defined and unused pieces ----


def test_truncation_and_padding_are_read_and_not_applied(corpus, tmp_path, capsys):
    library = pytest.importorskip("tokenizers")
    bpe = BPE.train(corpus[:20_000], 400, special_tokens=["<pad>"])
    save(bpe, tmp_path / "t.json")
    other = library.Tokenizer.from_file(str(tmp_path / "t.json"))
    other.enable_truncation(5)
    other.enable_padding(pad_id=0, pad_token="<pad>", length=8)
    other.save(str(tmp_path / "u.json"))
    ours = load(tmp_path / "u.json")
    said = capsys.readouterr().err
    assert "truncation is not applied" in said and "padding is not applied" in said
    text = corpus[:300]
    assert ours.encode(text) == bpe.encode(text) and len(ours.encode(text)) > 8
    assert other.encode(text).ids == [*ours.encode(text)[:5], 0, 0, 0]


def with_kinds(model: Unigram, kinds: dict[str, int], path):
    """The `.model` of `model` with other types for some pieces."""
    save(model, path)
    data, end = path.read_bytes(), b""
    for piece, kind in kinds.items():
        old = field(1, piece) + field(2, float(model.scores[model.vocab[piece]])) + field(3, NORMAL)
        assert data.count(field(1, old)) == 1
        data = data.replace(field(1, old), field(1, old[:-1] + bytes([kind])))
    path.write_bytes(data + end)
    return path


def test_user_defined_and_unused_pieces_as_in_sentencepiece(corpus, tmp_path):
    library = pytest.importorskip("sentencepiece")
    model = Unigram.train(corpus[:60_000], 700)
    pieces = sorted(p for p in model.vocab if p.strip("▁").isalpha() and len(p) > 1)
    kinds = dict.fromkeys(pieces[3:99:9], USER_DEFINED) | dict.fromkeys(pieces[1:99:9], UNUSED)
    path = with_kinds(model, kinds, tmp_path / "m.model")
    ours, sp = load(path), library.SentencePieceProcessor(model_file=str(path))
    assert ours.user and ours.encode(corpus[:500]) != model.encode(corpus[:500])
    rng = random.Random(5)
    texts = ["".join(rng.choices([*kinds, " ", "e", "é"], k=rng.randint(1, 9))) for _ in range(800)]
    texts += [t for t in hard_strings(400, 32) if "<0x" not in t and "<unk>" not in t]
    assert_equal_ids(ours, sp.encode, [*texts, corpus[:60_000]], sp.decode)
    save(ours, tmp_path / "again.model")
    again = library.SentencePieceProcessor(model_file=str(tmp_path / "again.model"))
    assert all(again.encode(text) == sp.encode(text) for text in texts)


def test_the_character_map_leaves_user_defined_pieces_alone(corpus, tmp_path):
    """NFKC would make Ａ an A; as a user-defined piece it stays Ａ."""
    library = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus[:40_000].splitlines()), model_writer=out, vocab_size=400,
        user_defined_symbols=["Ａ", "(", "ﬁx"], minloglevel=2,
    )  # fmt: skip
    sp, ours = (
        library.SentencePieceProcessor(model_proto=out.getvalue()),
        read_model(out.getvalue()),
    )
    rng = random.Random(6)
    bits = ["Ａ", "Ｂ", "(", "（", "ﬁ", "ﬁx", "x", " ", "the", "e\u0301", "A"]
    texts = ["".join(rng.choices(bits, k=rng.randint(1, 8))) for _ in range(600)]
    assert_equal_ids(ours, sp.encode, texts, sp.decode)


def test_user_defined_pieces_of_a_bpe_are_refused_by_name(corpus, tmp_path):
    bpe = BPE.train(corpus[:20_000], 400, pattern="metaspace")
    save(bpe, tmp_path / "m.model")
    extra = field(1, field(1, "x!") + field(2, 0.0) + field(3, USER_DEFINED))
    with pytest.raises(ValueError, match="'x!' of a BPE is not supported"):
        read_model((tmp_path / "m.model").read_bytes() + extra)


# ---- B.4: two callers at once ----


@pytest.mark.parametrize("late", [False, True])
def test_a_call_that_allows_special_tokens_does_not_open_them_to_another(corpus, late, monkeypatch):
    """Another encode(…, "all") comes in between, as a second thread might: plain stays plain."""
    bpe = BPE.train(corpus[:9000], 300, special_tokens=["<|end|>"])
    token = bpe.pipeline.added[0]
    pipeline = bpe.pipeline
    pipeline.normalizer = {"type": "NFC"}
    pipeline.added = [type(token)(token.id, token.content, normalized=late)]
    tokenizer = BPE(bpe.vocab, bpe.merges, pipeline)
    usual, inside = tokenizer.normalize, []

    def interrupted(text):
        if not inside:
            inside.append(True)
            assert 0 in tokenizer.encode("a<|end|>", "all")
        return usual(text)

    monkeypatch.setattr(tokenizer, "normalize", interrupted)
    assert 0 not in tokenizer.encode("b <|end|> c") and inside


# ---- the real files ----


def in_library(ours, path, pattern: str):
    """tiktoken's encoding of the same rank file with the special tokens that we know."""
    library = pytest.importorskip("tiktoken")
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {t.content: t.id for t in ours.pipeline.added}
    return library.Encoding("r", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@needs_real
@pytest.mark.parametrize("name", ["p50k_base", "whisper_multilingual", "cl100k_base"])
def test_real_rank_files(name):
    path = REAL / f"tok/{name}.tiktoken"
    ours = load(path)
    tik = in_library(ours, path, PATTERNS["gpt4" if name == "cl100k_base" else "gpt2"])
    rng, special = random.Random(1), list(ours.special)
    texts = hard_strings(COUNT, 33)
    assert_equal_ids(ours, tik.encode_ordinary, texts, tik.decode)
    for text in texts:
        text = text + rng.choice(special) + " " + rng.choice(special)
        assert ours.encode(text, "all") == tik.encode(text, allowed_special="all"), ascii(text)


@needs_real
@pytest.mark.parametrize("file", ["gpt2.encoder.json", "gpt2.vocab.bpe"])
def test_real_gpt2_pair(file):
    library = pytest.importorskip("tokenizers")
    ours = load(REAL / "tok" / file)
    other = library.Tokenizer.from_file(str(REAL / "tok/gpt2.tokenizer.json"))
    texts = hard_strings(COUNT, 34)
    assert all(ours.encode(t + "<|endoftext|>", "all") == other.encode(t + "<|endoftext|>").ids
               for t in texts)  # fmt: skip
    other.encode_special_tokens = True
    assert_equal_ids(ours, lambda text: other.encode(text).ids, texts)


@needs_real
def test_real_albert():
    library = pytest.importorskip("sentencepiece")
    path = REAL / "tok/albert.sentencepiece.model"
    ours, sp = load(path), library.SentencePieceProcessor(model_file=str(path))
    rng, bits = random.Random(2), [*'()"-.–£€', "．", "（", "£\u0301", " ", "the", "e\u0301"]
    texts = ["".join(rng.choices(bits, k=rng.randint(1, 9))) for _ in range(COUNT)]
    assert len(ours.user) == 8
    assert_equal_ids(ours, sp.encode, [*texts, *hard_strings(COUNT, 35)], sp.decode)
    for file in REAL.glob("*.txt"):
        text = file.read_bytes().decode("utf-8")
        assert ours.encode(text) == sp.encode(text), file.name


# ---- B.6: eval, help, held-out ----


def test_the_help_decodes_to_what_it_encodes():
    """The examples of the help, with the tokenizer that ships, print what they promise."""
    import main

    ids = main.__doc__.split('--decode "')[1].split('"')[0]
    shipped = ("--weights", HERE / "pretrained")
    assert piko("--decode", ids, *shipped).stdout == "Halo, dunia!\n"
    assert piko("--encode", "Halo, dunia!", *shipped).stdout.strip() == ids


def test_eval_scores_the_runs_own_held_out_lines(tmp_path):
    """Twenty lines of which the first and the eleventh are held out; elsewhere all of it counts."""
    data, other, out = tmp_path / "t.txt", tmp_path / "u.txt", tmp_path / "run"
    lines = [f"baris {word} dan kata\n" for word in "abcdefghijklmnopqrst"]
    data.write_text("".join(lines), encoding="utf-8", newline="")
    other.write_text("lain lagi\n" * 30, encoding="utf-8", newline="")
    piko("--train", "--data", data, "--vocab-size", 280, "--out", out)
    tokenizer = load(out)

    def score(*args):
        return json.loads(piko("--eval", "--weights", out, *args).stdout.splitlines()[-1])

    held = score()
    assert held["data"] == f"{data} (held out)" == score("--data", data)["data"]
    ids = tokenizer.encode(lines[0] + lines[10])
    assert held["bytes_per_token"] == len((lines[0] + lines[10]).encode()) / len(ids)
    assert score("--data", other)["data"] == f"{other} (all of it)"
    piko("--train", "--data", data, "--vocab-size", 280, "--held-out", 0, "--out", tmp_path / "all")
    whole = json.loads(piko("--eval", "--weights", tmp_path / "all").stdout.splitlines()[-1])
    assert whole["data"] == f"{data} (what it was trained on)"


def test_training_on_all_of_a_text(tmp_path):
    data = tmp_path / "t.txt"
    lines = ["satu satu satu\n", *["dua\n"] * 30]
    data.write_text("".join(lines), encoding="utf-8", newline="")
    options = ("--train", "--data", data, "--pattern", "whitespace", "--vocab-size", 300)
    piko(*options, "--out", tmp_path / "part")
    done = piko(*options, "--out", tmp_path / "all", "--held-out", 0)
    assert "nothing is held out" in done.stderr and "on the text" in done.stderr
    text = "satu satu satu"
    part, whole = (load(tmp_path / name).encode(text) for name in ("part", "all"))
    assert len(whole) < len(part)  # the first line is among those held out
    assert "leaves nothing" in piko(*options, "--held-out", 1, check=2).stderr
