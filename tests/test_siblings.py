"""What is meant to be the same in several folders is the same, to the letter.

Copies drift when nobody looks. Here somebody does: `diff ../llama/model.py model.py` then shows the
new idea and nothing else.
"""

import ast
import itertools
from pathlib import Path

import pytest

import repo

SIBLINGS = ("transformer", "llama", "mixtral_moe", "deepseek_mla")


def definitions(source: str) -> dict[str, str]:
    """The text of each class and function at the top level of `source`, by name.

    With decorators, with the comment lines right above and with all comments inside.
    """
    lines, texts = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            last = node.end_lineno
            while last < len(lines) and (not lines[last] or lines[last][0].isspace()):
                last += 1  # comments that end the body belong to it
            texts[node.name] = "\n".join(lines[first:last]).rstrip()
    return texts


def differences(sources: dict[str, str]) -> list[str]:
    """Where two of the sources (by folder) give one name two texts."""
    found = []
    for (one, first), (other, second) in itertools.combinations(sources.items(), 2):
        ours, theirs = definitions(first), definitions(second)
        shared = [name for name in ours if name in theirs]
        found += [f"{n} in {one} and {other}" for n in shared if ours[n] != theirs[n]]
    return found


def imports_torch(file: Path) -> bool:
    """Does the file import torch, anywhere?"""
    for node in ast.walk(repo.parse(file)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if "torch" in {name.split(".")[0] for name in names}:
            return True
    return False


def test_run_py_is_one_file() -> None:
    """In all folders whose run.py imports torch."""
    files = [repo.ROOT / name / "run.py" for name in repo.folders()]
    files = [file for file in files if file.is_file() and imports_torch(file)]
    if files:
        first = files[0].read_bytes()
        assert [file for file in files if file.read_bytes() != first] == []


def test_blocks_of_siblings_are_the_same() -> None:
    """A class or function with the same name in two siblings' model.py has the same text."""
    files = {name: repo.ROOT / name / "model.py" for name in SIBLINGS}
    sources = {n: f.read_text(encoding="utf-8") for n, f in files.items() if f.is_file()}
    assert not differences(sources), "the same name needs the same text, or another name"


BLOCK = '''
# Normalise, then attend.
@dataclass
class Block(nn.Module):
    """x + f(x)."""

    def forward(self, x):
        return x + self.f(x)  # (B, T, D)
        # the residual stream

EPS = 1e-5

def loss(x):
    return x.sum()
'''


def test_a_copy_is_the_same() -> None:
    """Blank lines and other code around the definitions do not count."""
    other = BLOCK.replace("EPS = 1e-5", "EPS = 1e-6\n\n\nclass New:\n    pass\n")
    assert set(definitions(BLOCK)) == {"Block", "loss"}
    assert differences({"llama": BLOCK, "mixtral_moe": "import torch\n" + other}) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + self.f(x)", "self.f(x) + x"),
        ("(B, T, D)", "(B, D, T)"),
        ("x + f(x).", "x + f(x)"),
        ("@dataclass", "@final"),
        ("Normalise, then", "First normalise, then"),
        ("# the residual stream", "# the stream"),
        ("        return x +", "        return x  +"),
    ],
)
def test_a_planted_difference_is_found(old: str, new: str) -> None:
    assert old in BLOCK
    sources = {"transformer": "", "llama": BLOCK, "deepseek_mla": BLOCK.replace(old, new)}
    assert differences(sources) == ["Block in llama and deepseek_mla"]
