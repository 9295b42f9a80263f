"""Each folder, copied alone to an empty place, trains and passes its smoke tests there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import repo


def command(arguments: list[str], home: Path) -> subprocess.CompletedProcess:
    """Run Python in `home`, with nothing of the repo in sight. The output is kept for messages."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=home,
        env=env | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The files of `folder` that are part of the repo, alone below a directory with a space."""
    home = tmp_path / "a copy" / folder.name
    for file in repo.files(folder):
        target = home / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    return home


def test_a_copy_trains_two_steps(copy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = command(["main.py", "--train", "--steps", "2", "--out", str(out)], copy)
    assert done.returncode == 0, done.stdout
    assert (out / "config.json").is_file(), f"no config.json in the run directory\n{done.stdout}"


def test_a_copy_passes_its_smoke_tests(copy: Path) -> None:
    """The tests called smoke; where none is, all tests can at least be collected."""
    pytest_ = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = command([*pytest_, "-k", "smoke"], copy)
    if done.returncode == 5:
        done = command([*pytest_, "--collect-only"], copy)
    assert done.returncode == 0, done.stdout
