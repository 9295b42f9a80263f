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
from model import DeepseekConfig, RMSNorm
from moe import SigmoidRouter
from mtp import DeepseekMTP

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


@pytest.fixture(scope="session")
def texts(small_data) -> str:
    """The text of the small data: a few of our texts, with the separators between them."""
    return small_data.read_text(encoding="utf-8")


@pytest.fixture
def sizes():
    """A model of two layers in which no two sizes are the same by accident."""
    return DeepseekConfig(
        vocab_size=97, seq_len=40, n_layer=3, n_head=3, d_model=28, q_rank=20, kv_rank=14,
        d_nope=10, d_rope=8, d_value=12, d_ff=30, n_dense=1, d_expert=11, n_expert=8, n_active=3,
        n_shared=2, n_group=4, n_active_group=2, n_ahead=1, weight_factor=2.5, norm_eps=1e-2,
        tie_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def model(sizes) -> DeepseekMTP:
    """A model of these sizes whose gains and biases would all show if one were ignored."""
    return uneven(DeepseekMTP(sizes)).eval()


def uneven(model):
    """The same model with gains that are not 1 and biases that are not 0."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, SigmoidRouter):
            module.bias.normal_(std=0.3)
    return model
