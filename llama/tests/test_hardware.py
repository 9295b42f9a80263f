"""The machine: device and number format, memory, random numbers, ranks."""

import random

import numpy as np
import pytest
import torch

import hardware
from options import UserError

CPU = torch.device("cpu")


@pytest.fixture
def only_a_processor(monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda: None)


def test_device_that_is_not_there_is_refused(only_a_processor):
    assert hardware.choose_device("cpu") == (CPU, "as asked")
    for name in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {name}"):
            hardware.choose_device(name)


def test_automatic_device_is_the_processor_where_there_is_nothing_else(only_a_processor):
    assert hardware.choose_device("auto") == (CPU, "the fastest here")


def test_automatic_device_is_the_accelerator_where_there_is_one(monkeypatch):
    monkeypatch.setattr(hardware, "accelerator", lambda: "mps")
    assert hardware.choose_device("auto")[0] == torch.device("mps")
    assert hardware.choose_device("mps") == (torch.device("mps"), "as asked")
    assert hardware.choose_device("cpu")[0] == CPU
    with pytest.raises(UserError, match="--device cuda"):
        hardware.choose_device("cuda")


@pytest.mark.parametrize(("gain", "expected"), [(4.0, torch.bfloat16), (1.1, torch.float32)])
def test_automatic_format_is_bfloat16_where_it_is_measured_to_be_faster(
    monkeypatch, gain, expected
):
    rate = {torch.bfloat16: gain, torch.float32: 1.0}
    monkeypatch.setattr(hardware, "matmul_rate", lambda device, dtype, n: rate[dtype])
    dtype, why = hardware.choose_dtype("auto", CPU)
    assert dtype == expected and f"{gain:.1f}" in why
    assert hardware.choose_dtype("float32", CPU) == (torch.float32, "as asked")
    assert hardware.choose_dtype("auto", torch.device("mps"))[0] == torch.float32


def test_measurement_throws_no_dice_of_the_run():
    before = torch.get_rng_state()
    assert hardware.matmul_rate(CPU, torch.float32, 16) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_changes_products_and_nothing_for_float32():
    a = torch.randn(4, 4)
    with hardware.autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with hardware.autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.skipif(not hasattr(hardware.os, "sysconf"), reason="this system does not tell")
def test_what_cannot_be_in_memory_is_refused(monkeypatch):
    monkeypatch.setattr(hardware.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.get)
    hardware.check_memory(4096_000, CPU, "this")
    with pytest.raises(UserError, match="this needs 0.0 GB or more, cpu has 0.0: take smaller"):
        hardware.check_memory(4096_001, CPU, "this")


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────


def throws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_seed_decides_every_generator():
    hardware.seed_everything(5)
    first = throws()
    assert all(a != b for a, b in zip(first, throws(), strict=True))
    hardware.seed_everything(5)
    assert throws() == first


def test_generators_are_put_back_from_a_safe_file(tmp_path):
    throws()
    torch.save(hardware.rng_state(), tmp_path / "state.pt")
    expected = throws()
    hardware.seed_everything(99)
    hardware.restore_rng(torch.load(tmp_path / "state.pt", weights_only=True))
    assert throws() == expected


# ── Ranks ─────────────────────────────────────────────────────────────────────────────────────────


def test_without_torchrun_there_is_one_rank():
    with hardware.ranks(CPU):
        assert (hardware.rank(), hardware.world()) == (0, 1)
        hardware.barrier()
    model = torch.nn.Linear(2, 2)
    assert hardware.distribute(model, [], shard=False) is model
    assert hardware.sum_over_ranks(torch.tensor(3.0)).item() == 3.0
    assert hardware.any_rank(True, CPU) is True and hardware.any_rank(False, CPU) is False


@pytest.fixture
def torchrun(monkeypatch):
    """torchrun's variables, and a group of processes that is none."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(hardware.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(hardware.dist, "destroy_process_group", lambda: None)


@pytest.mark.parametrize("words", ["Connection closed by peer [::1]:1", "Connection reset by peer"])
def test_rank_that_waits_for_one_that_stopped_says_so(torchrun, words):
    with pytest.raises(UserError, match="another rank stopped"), hardware.ranks(CPU):
        raise RuntimeError(words)


def test_other_errors_of_a_rank_are_not_hidden(torchrun):
    with pytest.raises(RuntimeError, match="shapes differ"), hardware.ranks(CPU):
        raise RuntimeError("shapes differ")


def test_shards_need_torchrun():
    with pytest.raises(UserError, match="start with torchrun"):
        hardware.distribute(torch.nn.Linear(2, 2), [], shard=True)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_full_state_goes_around(tmp_path, optimizer):
    """Weights and moments (SGD has none), through a file, into a fresh model and optimizer."""
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        pairs.append((model, optimizer(model.parameters(), lr=0.1)))
    model, optimizer = pairs[0]
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(hardware.full_state(model, optimizer), tmp_path / "state.pt")
    hardware.load_full_state(*pairs[1], torch.load(tmp_path / "state.pt", weights_only=True))
    for model, optimizer in pairs:
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    for a, b in zip(pairs[0][0].parameters(), pairs[1][0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert hardware.full_weights(model).keys() == {"weight", "bias"}
