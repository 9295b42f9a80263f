"""The README says what the machine says: snippets, line counts, links, commands; and show.py."""

import ast
import contextlib
import hashlib
import io
import json
import re

import pytest

import show
from bpe import BPE
from conftest import HERE
from data import load_texts, split_lines
from tokenizer import load
from train import TrainConfig, measure, train
from unigram import Unigram
from wordpiece import WordPiece

TEXT = (HERE / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_print_what_they_say(snippet, monkeypatch):
    monkeypatch.chdir(HERE)
    expected = [line[2:] for line in snippet.splitlines() if line.startswith("# ")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet, "README.md", "exec"), {})
    assert out.getvalue().splitlines() == expected
    assert len(snippet.splitlines()) - len(expected) <= 8


def test_table_counts_lines():
    rows = re.findall(r"^\| (\[.*?\)) \| ([\d,]+) \|", TEXT, re.MULTILINE)
    named = {name for row, _ in rows for name in re.findall(r"\]\((\w+\.py)\)", row)}
    assert named == {path.name for path in HERE.glob("*.py")}
    for row, count in rows:
        names = re.findall(r"\]\((\w+\.py)\)", row)
        total = sum(len((HERE / n).read_text(encoding="utf-8").splitlines()) for n in names)
        assert int(count.replace(",", "")) == total, names


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_the_default_run_gives_the_numbers_in_the_tables(algorithm, tmp_path, capsys):
    train(TrainConfig(algorithm=algorithm, out=str(tmp_path)))
    log = capsys.readouterr().err
    held_out = {name: "".join(split_lines(text)[1]) for name, text in load_texts().items()}
    score = measure(load(tmp_path), held_out)
    words = [score["languages"][name]["tokens_per_word"] for name in ("english", "indonesian")]
    name = {"bpe": "BPE", "wordpiece": "WordPiece", "unigram": "Unigram"}[algorithm]
    row = f"| {name} | {score['bytes_per_token']:.2f} | {words[0]:.2f} | {words[1]:.2f} |"
    assert row in TEXT
    if algorithm == "unigram":
        shown = "\n".join(log.splitlines()[-6:-1])
        assert f"```\n{shown}\n```" in TEXT


def test_the_speeds_are_those_of_the_last_bench():
    found = json.loads((HERE / "assets" / "results.json").read_text(encoding="utf-8"))
    assert "tinyshakespeare" in found["data"] and found["vocab_size"] == 8192
    ms, rows = found["milliseconds"], []
    for label, key, peer, ratio in (
        ("encode, against tiktoken", "encode_vs_tiktoken", "tiktoken", "encode_vs_tiktoken"),
        ("encode, against tokenizers", "encode_vs_hf", "tokenizers", "encode_vs_hf"),
        ("train, against tokenizers", "train", "tokenizers", "train_vs_hf"),
    ):
        ours, theirs = f"{ms[key]['ours']:.0f} ms", f"{ms[key][peer]:.0f} ms"
        rows.append(f"| {label} | {ours} | {theirs} | {found[ratio]:.2f} |")
    cold, seconds = ms["cold"]["ours"], ms["minbpe"]["minbpe"] / 1000
    tiktoken = ms["encode_vs_tiktoken"]["tiktoken"]
    rows.append(
        f"| encode from a cold start, against tiktoken | {cold:.0f} ms | {tiktoken:.0f} ms "
        f"| {found['encode_cold_vs_tiktoken']:.2f} |"
    )
    rows.append(
        f"| train, against minbpe's algorithm in the same Python | {ms['minbpe']['ours']:.0f} ms "
        f"| {seconds:,.0f} s | {found['train_vs_minbpe_algorithm']:,.0f} |"
    )
    ids = found["memory_growth_mb"] / found["memory_growth_over_ids"]
    texts = [f"grows by {found['memory_growth_mb']:.0f} MB", f"the list of ids takes {ids:.0f}"]
    texts.append(f"at most {found['worst_doubling']:.2f} times as long")
    missing = [text for text in rows + texts if text not in " ".join(TEXT.split("\n"))]
    assert not missing


def test_links_and_commands_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("https://") or (HERE / link).exists(), link
    files = (HERE / "main.py", HERE / "train.py")
    help_text = "".join(file.read_text(encoding="utf-8") for file in files)
    for flag in set(re.findall(r"python main\.py[^`\n]*?(--[a-z-]+)", TEXT)):
        assert flag[2:] in help_text or flag[2:].replace("-", "_") in help_text, flag
    assert not re.search(r"\b(LOG|TABLE|BENCH|COLD|MEMORY|N_TESTS|WPFAIL|BPEOK)\b", TEXT)


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
