"""Every folder has the same files, headings and sizes, so that who knows one knows all."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import repo
from test_siblings import EVERYWHERE, WITH_TORCH

FILES = (
    "README.md", "main.py", "train.py", "data.py", "options.py", "run.py", "figures.py",
    "bench.py", "data/README.md",
)  # fmt: skip
DIRECTORIES = ("tests", "data", "assets", "pretrained")
HEADINGS = [
    "## 💡 The Big Idea",
    "## 🛠️ Our Piko Approach",
    "## 🚀 Key Concepts & Learnings",
    "## 📦 How to Get Started",
]
COMMANDS = {"--train", "--eval", "--bench", "--figures", "--selfcheck"} | {
    "--steps", "--seed", "--data", "--out", "--resume", "--weights", "--export"
}  # fmt: skip
LIMITS = {"assets": 150_000, "data": 2_000_000, "pretrained": 3_000_000}  # bytes a file
OTHERS = 200_000  # bytes a file elsewhere in a folder: code and prose
COMMON_LINES = 200  # of code, in each file that all folders share


def missing(folder: Path) -> list[str]:
    """The files that `folder` lacks; a directory needs at least one file."""
    there = {file.relative_to(folder).as_posix() for file in repo.files(folder)}
    directories = {name.split("/")[0] for name in there if "/" in name}
    return [f for f in FILES if f not in there] + [d for d in DIRECTORIES if d not in directories]


def headings(text: str) -> list[str]:
    """The second-level headings of a README, outside of code."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    return [line.rstrip() for line in text.splitlines() if line.startswith("## ")]


def too_large(folder: Path) -> list[str]:
    """The files of `folder` above their limit."""
    sizes = {file.relative_to(folder): file.stat().st_size for file in repo.files(folder)}
    return [f"{f}: {size:,} bytes" for f, size in sizes.items()
            if size > LIMITS.get(f.parts[0] if len(f.parts) > 1 else "", OTHERS)]  # fmt: skip


def test_the_files_are_there(folder: Path) -> None:
    assert missing(folder) == []


def test_the_readme_has_the_four_headings(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert headings(text) == HEADINGS
    assert text.startswith(f"# {folder.name}: ")


def test_the_readme_shows_and_starts_early(folder: Path) -> None:
    """A picture by line 5 and the first command by line 25."""
    lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    assert any(re.search(r"!\[|<img", line) for line in lines[:5])
    assert any("python main.py" in line for line in lines[:25])


def test_no_file_is_too_large(folder: Path) -> None:
    assert too_large(folder) == []


def test_common_files_are_short(folder: Path) -> None:
    files = [folder / name for name in (*EVERYWHERE, *WITH_TORCH) if not name.startswith("tests/")]
    long = {f.name: repo.code_lines(f) for f in files if f.is_file()}
    assert {name: n for name, n in long.items() if n > COMMON_LINES} == {}


def test_modules_say_what_they_are(folder: Path) -> None:
    """Each module opens with a docstring."""
    files = repo.python_files(folder)
    silent = [f.name for f in files if not f.read_text(encoding="utf-8").lstrip().startswith(
        ('"""', 'r"""', "#!"))]  # fmt: skip
    assert silent == []


def main_py(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the folder's main.py from somewhere else."""
    command = [sys.executable, str(folder / "main.py"), *arguments]
    return subprocess.run(command, cwd="/", capture_output=True, encoding="utf-8")


def test_the_help_names_the_commands(folder: Path) -> None:
    done = main_py(folder)
    flags = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
    assert done.returncode == 0 and flags >= COMMANDS, COMMANDS - flags


def test_an_unknown_flag_gets_one_line(folder: Path) -> None:
    done = main_py(folder, "--no-such-flag")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--no-such-flag" in done.stderr


@pytest.fixture
def perfect(tmp_path: Path) -> Path:
    """A folder that has all it needs."""
    for name in (*FILES, *(f"{directory}/a" for directory in DIRECTORIES)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_nothing_is_missing_where_all_is(perfect: Path) -> None:
    assert missing(perfect) == too_large(perfect) == []


@pytest.mark.parametrize("name", ["train.py", "data/README.md", "pretrained/a"])
def test_a_missing_file_is_found(name: str, perfect: Path) -> None:
    (perfect / name).unlink()
    assert missing(perfect) == [name.removesuffix("/a")]


@pytest.mark.parametrize(
    ("name", "size"), [(f"{d}/a", n) for d, n in LIMITS.items()] + [("main.py", OTHERS)]
)
def test_a_large_file_is_found(name: str, size: int, perfect: Path) -> None:
    (perfect / name).write_bytes(b"\0" * size)
    assert too_large(perfect) == []
    (perfect / name).write_bytes(b"\0" * (size + 1))
    assert too_large(perfect) == [f"{name}: {size + 1:,} bytes"]


def test_headings_in_code_are_none() -> None:
    assert headings("## A\n```bash\n## not one\n```\n## B\n") == ["## A", "## B"]
