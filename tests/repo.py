"""What the root checks know about the repo: its folders, their files, and how to read code."""

import ast
import fnmatch
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root: Path = ROOT) -> list[Path]:
    """All files below `root` that are part of the repo, in git or about to be, none ignored.

    Without git (a downloaded archive) the names in .gitignore are left out.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        found = [root / name for name in listed.decode().split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
        ignored = [line.strip("/") for line in lines] + [".git"]
        found = [
            file
            for file in root.rglob("*")
            if not any(fnmatch.fnmatch(p, i) for p in file.relative_to(root).parts for i in ignored)
        ]
    return sorted(file for file in set(found) if file.is_file())


def folders() -> list[str]:
    """The names of the project folders: those with a main.py."""
    inside = [file.relative_to(ROOT).parts for file in files()]
    return [parts[0] for parts in inside if parts[1:] == ("main.py",)]


def python_files(folder: Path) -> list[Path]:
    """The Python files of `folder`."""
    return [file for file in files(folder) if file.suffix == ".py"]


def parse(file: Path) -> ast.Module:
    """The syntax tree of a Python file."""
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def code_lines(file: Path) -> int:
    """Lines of `file` that are not blank, comment or docstring."""
    documentation: set[int] = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(parse(file)):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            documentation.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
    stripped = [line.strip() for number, line in lines if number not in documentation]
    return sum(bool(line) and not line.startswith("#") for line in stripped)


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Each call below `tree` with the text of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)
