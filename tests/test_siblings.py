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
DECODERS = ("llama", "mixtral_moe", "deepseek_mla", "lora", "dpo")
LLAMAS = ("llama", "lora", "dpo")
PICTURES = ("cnn", "diffusion", "vae")
SAME = {  # files that are the same in every folder that has them, and in which folders they may be
    "options.py": None,  # None: in all
    "run.py": None,
    "hardware.py": None,
    "trainer.py": None,
    "loop.py": None,
    "tests/harness.py": None,
    "text.py": (*DECODERS, "lstm"),
    "tokenizer.py": (*DECODERS, "lstm"),
    "tokenizer_json.py": DECODERS,
    "generate.py": DECODERS,
    "weights.py": (*DECODERS, "transformer", "lstm"),
    "model.py": LLAMAS,
    "huggingface.py": LLAMAS,
    "meta.py": LLAMAS,
    "checkpoint.py": LLAMAS,
    "data/make_stories.py": LLAMAS,
    "formats.py": PICTURES,
    "data.py": ("cnn", "diffusion"),
}
EVERYWHERE = ("options.py", "run.py")
WITH_TORCH = ("hardware.py", "trainer.py", "loop.py", "tests/harness.py")


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


def copies(name: str) -> list[Path]:
    """The copies of a common file, in the folders where it may be."""
    homes = SAME[name] or repo.folders()
    return [file for home in homes if (file := repo.ROOT / home / name).is_file()]


@pytest.mark.parametrize("name", SAME)
def test_a_common_file_is_one_file(name: str) -> None:
    files = copies(name)
    assert [file for file in files if file.read_bytes() != files[0].read_bytes()] == []


def test_a_folder_has_the_common_files(folder: Path) -> None:
    """Those of every folder, and where train.py needs torch those of training with torch."""
    needed = EVERYWHERE + (WITH_TORCH if imports_torch(folder / "train.py") else ())
    assert [name for name in needed if not (folder / name).is_file()] == []


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
