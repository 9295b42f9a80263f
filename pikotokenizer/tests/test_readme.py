"""The README says what the machine says: snippets, line counts, links, commands; and show.py."""

import ast
import hashlib
import json
import math
import re
import shlex

import pytest
from test_command_line import piko

import published
import show
from bpe import BPE
from conftest import HERE
from data import load_texts, split_lines
from tokenizer import load
from train import EXPECTED, TrainConfig, measure, train
from unigram import Unigram
from wordpiece import WordPiece

TEXT = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_the_default_run_gives_the_numbers_in_the_tables(algorithm, tmp_path, capsys):
    train(TrainConfig(algorithm=algorithm, out=str(tmp_path / "run")))
    log = capsys.readouterr().err
    held_out = {name: "".join(split_lines(text)[1]) for name, text in load_texts().items()}
    score = measure(load(tmp_path / "run"), held_out)
    words = [score["languages"][name]["tokens_per_word"] for name in ("english", "indonesian")]
    name = {"bpe": "BPE", "wordpiece": "WordPiece", "unigram": "Unigram"}[algorithm]
    row = f"| {name} | {score['bytes_per_token']:.2f} | {words[0]:.2f} | {words[1]:.2f} |"
    assert row in TEXT
    if algorithm == "unigram":
        shown = "\n".join(log.splitlines()[-6:-1])
        assert f"```\n{shown}\n```" in TEXT


def bench(name: str) -> dict:
    return json.loads((HERE / "assets" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_speeds_are_those_of_the_last_bench():
    """Both were measured on an idle machine."""
    idle = bench("bench-tinyshakespeare")
    found, many = idle["milliseconds"], bench("bench-udhr_sample")["milliseconds"]
    warm, tik = found["encode_vs_tiktoken"], "tiktoken"
    rows = [
        ("BPE warm, against tiktoken", warm["ours"], warm[tik]),
        ("BPE cold, against tiktoken", found["cold"]["ours"], warm[tik]),
        ("200 languages, against tiktoken", many["cold"]["ours"], many["encode_vs_tiktoken"][tik]),
        ("load a rank file, against tiktoken", found["load"]["ours"], found["load"][tik]),
        ("BPE warm, against tokenizers", *found["encode_vs_hf"].values()),
        ("train BPE, against tokenizers", found["train"]["ours"], found["train"]["tokenizers"]),
    ]
    unigram = found["unigram"]
    for how, key in (("warm", "ours"), ("cold", "ours, cold")):
        peer = unigram["sentencepiece"]
        rows.append((f"Unigram {how}, against sentencepiece", unigram[key], peer))
    texts = [f"{what} | {a:,.0f} ms | {b:,.0f} ms | {b / a:.2f} |" for what, a, b in rows]
    texts.append(f"would take {found['minbpe']['minbpe'] / 1000:,.0f} s")
    ids = idle["memory_growth_mb"] / idle["memory_growth_over_ids"]
    texts.append(f"a list of ids of {ids:.0f} MB")
    assert idle["memory_growth_over_ids"] < 1.1  # and hardly more
    texts.append(f"at most {idle['worst_doubling']:.2f} times as long")
    missing = [text for text in texts if text not in " ".join(TEXT.split("\n"))]
    assert not missing


def test_the_numbers_that_the_prose_explains():
    """1,791 pieces and 257 more; 0.08 and 0.5; e^1.05; the sizes in the tables of others."""
    assert 2048 - 256 - 1 == 1791 and "1,791" in TEXT and "other 257" in TEXT
    assert f"{4 / (8 * 6):.2f}" == "0.08" and 2 / (2 * 2) == 0.5
    assert f"{math.exp(1.05):.1f}" == "2.9" and f"{math.log(2):.2f}" == "0.69"
    for name in re.findall(
        r"`([\w.-]+)`", TEXT.split("knows them by name: ")[1].split(" and some")[0]
    ):
        assert name in published.PUBLISHED


def test_the_toy_text_of_the_prose():
    """Nine words; the best two pieces against ab and abab, which BPE learns."""
    words = {"abab": 4, "abba": 3, "baba": 2}
    text = " ".join(word for word, n in words.items() for _ in range(n))
    learnt = {a + b for a, b in BPE.train(text, 258, pattern=r"\p{L}+").merges}
    best = show.optimal_vocabulary(words, 2)[0]
    greedy = sum(n * show.fewest_tokens(word, learnt) for word, n in words.items())
    assert sum(words.values()) == 9 and (best, greedy) == (15, 19)
    assert "needs 15 for the text, BPE's first two need 19" in TEXT


def test_a_token_of_1_000_tokens_context():
    """4.75 bytes a token: 4,750 bytes are 1,000 tokens."""
    assert EXPECTED["bpe"] * 1000 == 4750 and "4,750 bytes is 1,000 tokens" in TEXT


def test_the_ten_questions_of_a_newcomer_are_answered():
    """Words that the answers must hold: what is it, why not words, by hand, the space, …"""
    flat = " ".join(TEXT.split())
    for words in (
        "A **token** is a piece of text that has an id", "the vocabulary never ends",
        "6 + 3 = 9 times", "The space belongs to the word behind it",
        "A special token is a command", "Which of the three?", "A downloaded model's tokenizer",
        "What the measures mean", "*Why 1,791 pieces, when 2,048 were asked for?*",
        '`"perpustakaan"` and `" perpustakaan"` are two words', "Your own data", "*How large?*",
        "**lattice**: ", "called **EM**: ", "**Viterbi**'s algorithm", "the standard form **NFC**",
    ):  # fmt: skip
        assert words in flat, words


def test_the_commands_for_your_own_data_run(tmp_path, monkeypatch):
    """Those of the README, into another place."""
    block = TEXT.split("The folder ships an example:")[1].split("```")[1]
    lines = [line for line in block.splitlines() if line.startswith("python")]
    assert len(lines) == 3
    for line in lines:
        piko(*[word.replace("runs/", f"{tmp_path}/") for word in shlex.split(line)[2:]])


def test_the_corpus_is_what_its_script_writes():
    """Byte for byte, with the sums of data/README.md; "a" and "an" as English wants them."""
    make: dict = {"__name__": "make_corpus", "__file__": str(HERE / "data" / "make_corpus.py")}
    exec((HERE / "data" / "make_corpus.py").read_text(encoding="utf-8"), make)
    facts = (HERE / "data" / "README.md").read_text(encoding="utf-8")
    for name, grammar, money in make["FILES"]:
        text = make["corpus"](grammar, 0, money)
        data = (HERE / "data" / f"{name}.txt").read_bytes()
        assert text.encode("utf-8") == data
        assert f"| {len(data):,} | `{hashlib.sha256(data).hexdigest()}` |" in facts
    english = load_texts()["english"]
    assert not re.search(r"\b([Aa] [aeio]|[Aa] un|[Aa]n [^aeiou]|[Aa]n us)", english)


def test_no_control_characters_in_docstrings():
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node, clean=False) or ""
                assert not re.search(r"[\x00-\x09\x0b-\x1f]", text), (path.name, node)


def test_greedy_is_never_better_than_optimal():
    for words in ({"abab": 4, "abba": 3, "baba": 2}, {"abcabc": 2, "bcd": 5, "cab": 3}):
        for size in (1, 2):
            text = " ".join(w for w, n in words.items() for _ in range(n))
            bpe = BPE.train(text, 256 + size, pattern=r"\p{L}+")
            greedy = sum(n * len(bpe.word_ids(w)) for w, n in words.items())
            best, chosen = show.optimal_vocabulary(words, size)
            assert best <= greedy and len(chosen) == size
            assert best == sum(n * show.fewest_tokens(w, chosen) for w, n in words.items())


def test_tokens_cannot_cost_less_than_the_entropy_of_the_source():
    """And cost it, within a few percent, once every word is a token."""
    text, entropy = show.word_source(50, 20_000)
    costs = [show.bits_per_word(BPE.train(text, size, "gpt2"), text) for size in (256, 300, 420)]
    assert costs[0] > costs[1] > costs[2] > entropy - 0.05
    assert costs[2] < 1.06 * entropy


def test_explanations_end_in_the_ids(corpus):
    word = "perpustakaan"
    for tokenizer in (
        BPE.train(corpus, 700),
        WordPiece.train(corpus, 700),
        Unigram.train(corpus, 700),
    ):
        lines = show.explain(tokenizer, word).splitlines()
        assert lines[-1] == "ids " + " ".join(map(str, tokenizer.encode(word)))
    bpe = BPE.train(corpus, 700)
    steps = show.merge_steps(bpe, word)
    assert steps[-1][3] == bpe.merged(word)
    assert [rank for rank, *_ in steps] == [bpe.merges.index((a, b)) for _, a, b, _ in steps]
    for piece in bpe.merged(word):
        drawn = show.draw_tree(bpe, piece, show.merge_tree(bpe, word))
        leaves = [line.strip() for line in drawn if "merge" not in line]
        assert "".join(leaves) == piece


def test_coloured_text_is_the_text(corpus):
    bpe = BPE.train(corpus, 400)
    for text in ("Halo dunia", "a👋b é", "日本 x"):
        assert "".join(part for part, _ in show.stretches(bpe, text)) == text
        assert [i for _, ids in show.stretches(bpe, text) for i in ids] == bpe.encode(text)
        plain = re.sub(r"\x1b\[[\d;]*m", "", show.coloured(bpe, text))
        assert plain == text
        assert re.sub(r"<[^>]*>", "", show.page(bpe, text)).strip() == "tokens" + text
