"""What the tests share: the folder on the path, fixed seeds, small sizes, the harness' fixtures.

One thread, so that a number is the same number in a subprocess and beside other work. The libraries
of Hugging Face are kept off the network and out of the user's cache.
"""

import atexit
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(FOLDER / "data"))
sys.path.insert(0, str(FOLDER))
CACHE = tempfile.TemporaryDirectory(prefix="piko-tests-")
atexit.register(CACHE.cleanup)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": CACHE.name,
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest

pytest.register_assert_rewrite("harness")

import torch
from harness import command, every_step_is_logged, half, small_data, trained, whole, words

import hardware
from model import SequenceConfig

__all__ = ["command", "every_step_is_logged", "half", "small_data", "trained", "whole", "words"]

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` starts us deaf to it
with contextlib.suppress(ImportError):  # tests that need it skip themselves
    import hypothesis

    hypothesis.settings.register_profile("piko", max_examples=50, deadline=None, database=None)
    hypothesis.settings.load_profile("piko")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes of its own")


@pytest.fixture(autouse=True)
def seeded():
    hardware.seed_everything(0)


@pytest.fixture
def sizes():
    """A language model of two layers in which no two sizes are the same by accident."""
    return SequenceConfig(d_model=7, n_layer=2, d_embed=5, vocab_size=11, n_answer=11)
