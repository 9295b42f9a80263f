"""run_tests.py on a small tree: it counts right, it ends with one line, it fails when it should."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import repo

GOOD = """
import pytest, model

def test_model(): assert model.NAME == "good"
def test_more(): assert model.__file__
@pytest.mark.skip
def test_later(): pass
"""
BAD = """
import pytest, model

@pytest.fixture
def broken():
    yield
    raise OSError("teardown")

def test_model(): assert model.NAME == "bad"
def test_fails(): assert False
def test_error(broken): pass
@pytest.mark.xfail(strict=True)
def test_known(): assert False
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """run_tests.py beside a good and a bad folder and a root check."""
    shutil.copy(repo.ROOT / "run_tests.py", tmp_path)
    for name, test in {"good": GOOD, "bad": BAD}.items():
        add(tmp_path, name, test)
    check = "def test_root(request): assert True\n"
    option = "def pytest_addoption(parser): parser.addoption('--folder', action='append')\n"
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_root.py").write_text(check, encoding="utf-8")
    (tmp_path / "tests" / "conftest.py").write_text(option, encoding="utf-8")
    return tmp_path


def add(tree: Path, name: str, test: str) -> None:
    """A folder with a model.py of its own and one test file."""
    (tree / name / "tests").mkdir(parents=True)
    for file, text in {
        "main.py": "",
        "model.py": f"NAME = {name!r}\n",
        f"tests/test_{name}.py": test,
    }.items():
        (tree / name / file).write_text(text, encoding="utf-8")


def run_tests(tree: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, last line and all the output of run_tests.py in `tree`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, str(tree / "run_tests.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        encoding="utf-8",
    )
    return done.returncode, done.stdout.rstrip("\n").split("\n")[-1], done.stdout


def test_counts_of_all(tree: Path) -> None:
    """good: 2 passed, 1 skipped. bad: 1 passed, 2 failed (one in teardown), 1 known. Root: 1."""
    code, last, output = run_tests(tree)
    assert (code, last) == (1, "4 passed, 2 failed, 2 skipped")
    folders = output.index("── bad"), output.index("── good")
    assert max(folders) < output.index("── the repo")
    assert sum(line == last for line in output.splitlines()) == 1


def test_one_folder_that_passes(tree: Path) -> None:
    assert run_tests(tree, "good/")[:2] == (0, "3 passed, 0 failed, 1 skipped")


def test_arguments_for_pytest(tree: Path) -> None:
    """-k reaches every process; where it selects nothing, nothing fails."""
    assert run_tests(tree, "--", "-k", "test_more")[:2] == (0, "1 passed, 0 failed")
    code, last, output = run_tests(tree, "good", "--", "-k", "nowhere")
    assert (code, last) == (1, "0 passed, 1 failed") and "nothing was run" in output


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("import os\ndef test_exit(): os._exit(0)", "left no report"),
        ("import os\ndef test_crash(): os.abort()", "ended early"),
        ("", "no test was found"),
    ],
    ids=["exit", "crash", "empty"],
)
def test_a_folder_that_cannot_count_has_failed(tree: Path, test: str, why: str) -> None:
    add(tree, "ugly", test)
    code, last, output = run_tests(tree, "good", "ugly")
    assert (code, last) == (1, "3 passed, 1 failed, 1 skipped")
    assert f"ugly: {why}" in output or why in output


def test_a_file_that_cannot_be_imported_has_failed(tree: Path) -> None:
    add(tree, "ugly", "import no_such_module")
    assert run_tests(tree, "ugly")[:2] == (1, "1 passed, 1 failed")


def test_an_unknown_folder_is_refused(tree: Path) -> None:
    code, last, _ = run_tests(tree, "goood")
    assert code == 2 and "goood" in last
