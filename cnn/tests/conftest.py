"""What the tests share: the folder on the path, fixed seeds, small sizes, an in-process command.

One thread, so that a number is the same number in a subprocess and beside other work. The libraries
of Hugging Face are kept off the network and out of the user's cache.
"""

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER / "data"))
sys.path.insert(0, str(FOLDER))
CACHE = tempfile.TemporaryDirectory(prefix="cnn-tests-")
atexit.register(CACHE.cleanup)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": CACHE.name,
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

import numpy as np
import pytest
import torch

import run

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` starts us deaf to it
with contextlib.suppress(ImportError):  # tests that need it skip themselves
    import hypothesis

    hypothesis.settings.register_profile("piko", max_examples=50, deadline=None, database=None)
    hypothesis.settings.load_profile("piko")


@pytest.fixture(autouse=True)
def seeded():
    run.seed_everything(0)


SMALL = "--width 4 --batch-size 8 --steps 2 --dtype float32 --device cpu".split()


@pytest.fixture
def small():
    """The flags of a training run that takes a moment; later flags win."""
    return SMALL


def bars(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Colour pictures (n, 8, 8, 3) of a bright row (0), column (1) or corner (2) in noise."""
    dice = np.random.default_rng(seed)
    x, y = dice.integers(0, 60, (n, 8, 8, 3)), dice.integers(0, 3, n)
    for picture, label, place in zip(x, y, dice.integers(1, 7, n), strict=True):
        part = [picture[place], picture[:, place], picture[:4, :4]][label]
        part += 150
    return x.astype(np.uint8), y


@pytest.fixture(scope="session")
def npz(tmp_path_factory) -> Path:
    """A data set of three classes that a small network learns."""
    file = tmp_path_factory.mktemp("data") / "bars.npz"
    x, y = bars(90)
    np.savez(file, x=x, y=y)
    return file


@dataclasses.dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a refused command; AssertionError if it was not refused just so."""
        assert self.code == 2, self
        assert self.out == "", self
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0]


@pytest.fixture
def command(monkeypatch, capsys):
    """`command("--train", …)` is `python main.py --train …` without the seconds to import torch."""
    import main

    monkeypatch.setattr(run, "matmul_rate", lambda *_: 1e11)  # a clock is no matter of these tests
    monkeypatch.setattr(main.figures, "of_run", lambda run, folder: [folder / "none.png"])

    def call(*words) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            run.command_line(main.main)
        except SystemExit as stop:
            code = stop.code
        return Outcome(code, *capsys.readouterr())

    return call


@pytest.fixture
def trained(command, small, npz, tmp_path):
    """`trained("name", flags…)` trains the small network into tmp_path/name, returns that path."""

    def call(name: str = "run", *flags) -> Path:
        out = tmp_path / name
        outcome = command("--train", *small, "--data", npz, "--out", out, *flags)
        assert outcome.code == 0, outcome.err
        return out

    return call
