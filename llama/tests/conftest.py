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
CACHE = tempfile.TemporaryDirectory(prefix="llama-tests-")
atexit.register(CACHE.cleanup)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": CACHE.name,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch

import run
from model import LlamaConfig

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` starts us deaf to it
with contextlib.suppress(ImportError):  # tests that need it skip themselves
    import hypothesis

    hypothesis.settings.register_profile("piko", max_examples=50, deadline=None, database=None)
    hypothesis.settings.load_profile("piko")


@pytest.fixture(autouse=True)
def seeded():
    run.seed_everything(0)


@pytest.fixture
def sizes():
    """A model of two layers in which no two sizes are the same by accident."""
    return LlamaConfig(
        vocab_size=97, seq_len=40, n_layer=2, n_head=4, n_kv_head=2, d_model=24, d_head=10, d_ff=36
    )


SMALL = (
    "--n-layer 1 --n-head 4 --n-kv-head 2 --d-model 32 --d-head 8 --d-ff 48 --seq-len 24 "
    "--tokenizer bytes --batch-size 4 --steps 2 --dtype float32 --device cpu"
).split()


@pytest.fixture
def small():
    """The flags of a training run that takes a moment; later flags win."""
    return SMALL


@pytest.fixture(scope="session")
def stories() -> str:
    """The first 12 of our stories, with the separators between them."""
    text = (FOLDER / "data" / "stories.txt").read_text(encoding="utf-8")
    separator = "<|endoftext|>\n"
    return separator.join(text.split(separator)[:12]) + separator


@pytest.fixture(scope="session")
def text_file(tmp_path_factory, stories) -> Path:
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    file.write_text(stories, encoding="utf-8")
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
    monkeypatch.setattr(main.figures, "training_curve", lambda run, folder: folder / "none.png")

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
def trained(command, small, text_file, tmp_path):
    """`trained("name", flags…)` trains the small model into tmp_path/name and returns that path."""

    def call(name: str = "run", *flags) -> Path:
        out = tmp_path / name
        outcome = command("--train", *small, "--data", text_file, "--out", out, *flags)
        assert outcome.code == 0, outcome.err
        return out

    return call
