"""The machine: which device, which number format, random numbers, memory, and many ranks.

    choose_device, choose_dtype   the fastest that is right here, and a word on why
    check_memory                  refuse what cannot fit before any of it is built
    seed_everything, rng_state    every generator of random numbers, to be put back on resume
    ranks, distribute             torchrun: several processes ("ranks") share the work of a step

A rank is one of the processes that torchrun starts, usually one a GPU. This file is the same in
every folder of Piko that uses torch. Nothing in it knows a model.
"""

import contextlib
import os
import random
import time
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from options import UserError, rank_asked

# ── Device and number format ──────────────────────────────────────────────────────────────────────


def accelerator() -> str | None:
    """The kind of device beside the CPU that this torch can use here: cuda, mps or none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else None


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device called `name` (auto, cpu, cuda, mps) and a word on why."""
    faster = accelerator()
    if name not in ("auto", "cpu", faster):
        raise UserError(f"--device {name}: this torch sees none here, use --device auto")
    why = "the fastest here" if name == "auto" else "as asked"
    kind = (faster or "cpu") if name == "auto" else name
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(kind), why


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int = 1024) -> float:
    """FLOP/s of an n × n matrix product: the best of forty, so of a quiet moment."""
    own_dice = torch.Generator().manual_seed(0)  # a measurement must not change the run
    a = torch.randn(n, n, generator=own_dice).to(device, dtype)
    best = float("inf")
    for _ in range(40):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number format to compute in (auto, float32, bfloat16) and why.

    bfloat16 is a float32 whose fraction is cut from 23 bits to 7: half the memory, three digits.
    Many CPUs have no instructions for it and emulate it slowly, so on CPUs auto measures. Weights
    and optimizer state stay in float32 either way.
    """
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "native here") if fast else (torch.float32, "no native bfloat16")
    if device.type == "mps":
        return torch.float32, "the proven choice on mps"
    gain = matmul_rate(device, torch.bfloat16, 512) / matmul_rate(device, torch.float32, 512)
    why = f"bfloat16 products run {gain:.1f} × as fast as float32 ones on this CPU"
    return (torch.bfloat16 if gain > 1.5 else torch.float32), why


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matrix products are computed in `dtype`; nothing changes for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_memory(n_byte: int, device: torch.device, what: str) -> None:
    """UserError if `n_byte` bytes are more than the device has. Unknown sizes pass."""
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if n_byte > total:
        raise UserError(
            f"{what} needs {n_byte / 1e9:,.1f} GB or more, {device} has {total / 1e9:,.1f}: "
            "take smaller sizes"
        )


# ── Random numbers ────────────────────────────────────────────────────────────────────────────────


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """The state of every generator, as types that torch.load(weights_only=True) accepts."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = (kind, torch.from_numpy(keys.astype(np.int64)), *rest)
    if name := accelerator():
        state[name] = getattr(torch, name).get_rng_state()
    return state


def restore_rng(state: dict) -> None:
    """Put the generators back to where `rng_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if (name := accelerator()) in state:
        getattr(torch, name).set_rng_state(state[name])


# ── Many ranks ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def ranks(device: torch.device) -> Iterator[None]:
    """Join the group of processes that torchrun started, if it did."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        if rank_asked() >= int(os.environ["WORLD_SIZE"]):
            raise ValueError("RANK must be less than WORLD_SIZE")
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may tokenize for long
    except (ValueError, RuntimeError) as error:
        raise UserError(f"RANK, WORLD_SIZE, MASTER_ADDR or MASTER_PORT is wrong: {error}") from None
    try:
        yield
        barrier()  # nobody leaves before the others are done
    except RuntimeError as error:
        if any(word in str(error) for word in ("closed by peer", "Connection reset")):
            raise UserError("another rank stopped, see its message") from None
        raise
    finally:
        time.sleep(0.1)  # gloo's threads take the GIL to free their last tensors, or joining hangs
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes work together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` is true on any rank: so all ranks take the same decision."""
    return bool(sum_over_ranks(torch.tensor(float(value), device=device)) > 0)


def distribute(model: nn.Module, pieces: list[nn.Module], shard: bool) -> nn.Module:
    """The model on all ranks: weights replicated, or sharded piece by piece where they must be.

    Parameters that get no gradient in a step, such as those of an expert without tokens, are fine.
    UserError if there is nothing to shard over.
    """
    if shard and not dist.is_initialized():
        raise UserError("--shard spreads the weights over ranks: start with torchrun")
    if shard:
        from torch.distributed.fsdp import fully_shard

        for module in [*pieces, model]:
            fully_shard(module)
        return model
    if not dist.is_initialized():
        return model
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on the CPU with plain names, however the model is wrapped."""
    from torch.distributed.checkpoint import state_dict as dcp  # a second to import

    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dcp.get_model_state_dict(model, options=whole)


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Whole state of model and optimizer on the CPU, by parameter names."""
    from torch.distributed.checkpoint import state_dict as dcp

    whole = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = dcp.get_state_dict(model, optimizer, options=whole)
    return {"model": weights, "optimizer": moments}


def load_full_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """The reverse of `full_state`."""
    from torch.distributed.checkpoint import state_dict as dcp

    weights, moments = state["model"], state["optimizer"]
    options = dcp.StateDictOptions(full_state_dict=True)
    if not moments["state"]:  # plain SGD remembers nothing, which the library fails over
        dcp.set_model_state_dict(model, weights, options=options)
        return
    dcp.set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
