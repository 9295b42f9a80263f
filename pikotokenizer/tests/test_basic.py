"""The first lesson is right: its merges and ids are those of the fast tokenizer."""

import ast
import random
import subprocess
import sys

import basic
from bpe import BPE
from characters import chars_to_bytes
from conftest import HERE, hard_strings


def fast_and_basic(text: str, size: int):
    """The same training twice: the fast tokenizer, and the tokens and merges of basic.py."""
    return BPE.train(text, size, pattern="whitespace"), *basic.train(text, size)


def assert_same_training(fast: BPE, tokens, merges) -> None:
    assert [chars_to_bytes(fast.pieces[i]) for i in range(len(fast))] == tokens
    pairs = [tuple(chars_to_bytes(part) for part in pair) for pair in fast.merges]
    assert pairs == [(tokens[a], tokens[b]) for a, b in merges]


def test_training_and_ids_are_those_of_the_fast_one(corpus):
    fast, tokens, merges = fast_and_basic(corpus[:30_000], 420)
    assert_same_training(fast, tokens, merges)
    for text in [*hard_strings(400, 21), corpus[30_000:34_000]]:
        if not any("\x1c" <= char <= "\x1f" for char in text):  # white space to Python alone
            ids = basic.encode(text, merges)
            assert ids == fast.encode(text), ascii(text)
            assert basic.decode(ids, tokens) == text


def test_small_alphabets_make_overlaps_and_ties():
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choices("aab ", k=rng.randint(1, 60))) + "b"
        fast, tokens, merges = fast_and_basic(text, rng.choice([257, 262, 300]))
        assert_same_training(fast, tokens, merges)
        assert basic.encode(text, merges) == fast.encode(text)


def test_of_three_the_first_two_merge():
    assert basic.merge([7, 7, 7], (7, 7), 9) == [9, 7]


def test_it_is_one_page_that_imports_nothing_of_ours():
    source = (HERE / "basic.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    parts = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Module))]
    docs = [node.body[0] for node in parts if ast.get_docstring(node)]
    prose = {n for doc in docs for n in range(doc.lineno, doc.end_lineno + 1)}
    lines = [line for n, line in enumerate(source.splitlines(), 1)
             if n not in prose and line.strip() and not line.lstrip().startswith("#")]  # fmt: skip
    assert len(lines) <= 80
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if (HERE / f"{name}.py").exists()}


def test_it_shows_itself():
    done = subprocess.run(
        [sys.executable, "basic.py"], cwd=HERE, capture_output=True, check=True,
        env={"PYTHONUTF8": "1"},
    )  # fmt: skip
    lines = done.stdout.decode("utf-8").splitlines()
    assert len(lines) == 11 and lines[0].startswith("b'") and lines[-1].endswith("'lowest 🙂'")
