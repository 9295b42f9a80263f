"""What every training script needs and no reader came for: the same file in each Piko folder.

    options       dataclass fields become command-line flags      option, add_options, from_options
    complaints    one line on stderr and exit code 2               UserError, command_line
    hardware      the fastest device and number format, and why    choose_device, choose_dtype
    files         a file is there whole or not at all              whole_file, RunDirectory
    resuming      every random-number generator, put back          seed_everything, rng_state
    stopping      Ctrl-C ends the step that runs, then saves       ctrl_c
    many ranks    torchrun with replicated or sharded weights      ranks, distribute, full_state

Nothing in here knows a model. What a run directory holds is listed at `RunDirectory`.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import random
import signal
import sys
import time
import types
import typing
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict as dcp
from tqdm import tqdm


class UserError(Exception):
    """Something that the user can mend. The message names the thing and the mend in one line."""


def say(text: str = "") -> None:
    """Print to stderr, once however many ranks there are: stdout is for results alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text, file=sys.stderr)


def command_line(main) -> None:
    """Run `main()` and exit: 0, or 2 after one line for a UserError, or 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # Windows consoles are not UTF-8 by default
        stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        say("error: " + " ".join(str(error).split()))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout left, as in `main.py --sample | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# options


class Parser(argparse.ArgumentParser):
    """argparse that complains like everything else here: one line, exit code 2."""

    def error(self, message: str):
        raise UserError(f"{message} (`python main.py` lists the options)")


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def add_options(parser: argparse.ArgumentParser, *configs: type) -> None:
    """A flag, without a default, for each field of these dataclasses that has a help text."""
    for config in configs:
        group = parser.add_argument_group(config.__doc__.splitlines()[0].rstrip("."))
        for field in dataclasses.fields(config):
            if "help" not in field.metadata:
                continue
            kind = field.type
            if isinstance(kind, types.UnionType):  # int | None
                kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
            if kind is not bool:
                choices = field.metadata.get("choices")
                how |= {"choices": choices} if choices else {"metavar": kind.__name__.upper()}
            text = field.metadata["help"].replace("%", "%%") + f" (default {field.default})"
            flag = "--" + field.name.replace("_", "-")
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def given(args: argparse.Namespace, config: type) -> dict:
    """The fields of the dataclass `config` that stand on the command line."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in vars(args).items() if name in names}


def from_options(base, args: argparse.Namespace):
    """The instance `base` with what stands on the command line; UserError if it cannot be."""
    try:
        return dataclasses.replace(base, **given(args, type(base)))
    except ValueError as error:
        raise UserError(str(error)) from None


# hardware


def accelerators() -> list[str]:
    """The kinds of device beside the CPU that this torch can use, the fastest first."""
    mps = torch.backends.mps.is_available()
    return ["cuda"] * torch.cuda.is_available() + ["mps"] * mps


def choose_device(name: str) -> tuple[torch.device, str]:
    """The device called `name` (auto, cpu, cuda, mps) and a word on why."""
    there = [*accelerators(), "cpu"]
    if name not in ("auto", *there):
        raise UserError(f"--device {name}: this torch sees none here, use --device auto")
    why = "the fastest here" if name == "auto" else "as asked"
    name = there[0] if name == "auto" else name
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(name), why


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

    Many CPUs have no bfloat16 instructions and emulate them slowly, so on CPUs auto measures.
    Weights and optimizer state stay in float32 either way.
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


# random numbers


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
    return state | {name: getattr(torch, name).get_rng_state() for name in accelerators()}


def restore_rng(state: dict) -> None:
    """Put the generators back to where `rng_state` found them."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for name in state.keys() & set(accelerators()):
        getattr(torch, name).set_rng_state(state[name])


# files


@contextlib.contextmanager
def whole_file(path: Path):
    """Yield a temporary path beside `path` that becomes `path` in one step, on disk, or never."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    """Write `value` as JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")


class RunDirectory:
    """The files of one run. Only rank 0 writes.

    config.json         what was run, with the versions it ran on
    log.jsonl           a line for each logged step
    model.safetensors   the weights that were best on validation
    checkpoint.pt       everything to go on from: loads with torch.load(weights_only=True)
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config, self.log_file = self.path / "config.json", self.path / "log.jsonl"
        self.weights, self.checkpoint = self.path / "model.safetensors", self.path / "checkpoint.pt"
        self.writes = int(os.environ.get("RANK", 0)) == 0

    def start(self) -> None:
        """Make the directory and forget the run that it held before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for file in (self.checkpoint, self.weights, self.log_file, *self.path.glob(".*.part")):
                file.unlink(missing_ok=True)
            self.log_file.touch()
        except OSError as error:
            raise UserError(f"cannot write a run to --out {self.path}: {error.strerror}") from None

    def save_config(self, config: dict) -> None:
        """Write config.json: `config` and the versions it runs on."""
        if self.writes:
            versions = {"python": platform.python_version(), "torch": torch.__version__}
            versions |= {"numpy": np.__version__, "platform": platform.platform()}
            write_json(self.config, config | {"versions": versions})

    def log(self, **line) -> None:
        """Append one line of numbers to log.jsonl."""
        if self.writes:
            with open(self.log_file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def history(self, before: float = float("inf")) -> list[dict]:
        """The logged lines up to step `before`; later ones, and a line cut short, are dropped."""
        lines = []
        if self.log_file.exists():
            for text in self.log_file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
        kept = [line for line in lines if line["step"] <= before]
        if self.writes and before != float("inf"):
            with whole_file(self.log_file) as part:
                part.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
        return kept

    def save_weights(self, tensors: dict[str, torch.Tensor]) -> None:
        """Write model.safetensors."""
        if self.writes:
            with whole_file(self.weights) as part:
                tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
                safetensors.torch.save_file(tensors, part, metadata={"format": "pt"})

    def save_checkpoint(self, state: dict) -> None:
        """Write checkpoint.pt: `state` and the generators of every rank. All ranks must call it."""
        rngs = [rng_state()]
        if dist.is_initialized():
            rngs = [None] * dist.get_world_size()
            dist.all_gather_object(rngs, rng_state())
        if self.writes:
            with whole_file(self.checkpoint) as part:
                torch.save(state | {"rng": rngs}, part)

    def load_checkpoint(self) -> dict:
        """Read checkpoint.pt and put this rank's generators back. UserError if there is none."""
        if not self.checkpoint.exists():
            raise UserError(f"nothing to resume in {self.path}: there is no checkpoint.pt")
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            rngs = state.pop("rng")
            restore_rng(rngs[int(os.environ.get("RANK", 0)) % len(rngs)])
        except Exception as error:
            raise UserError(f"{self.checkpoint} is damaged ({type(error).__name__})") from None
        return state


def newest_run(folder: Path) -> Path | None:
    """The directory below `folder` whose model.safetensors is the newest."""
    found = folder.glob("*/model.safetensors")
    newest = max(found, key=lambda file: file.stat().st_mtime, default=None)
    return newest and newest.parent


# stopping and showing


@contextlib.contextmanager
def ctrl_c():
    """Yield a function that says whether Ctrl-C (or a polite kill) came; a second one ends at once.

    Under torchrun the signals keep their usual meaning: ranks that stopped at different steps
    would wait for one another for ever.
    """
    asked = []

    def note(number, frame):
        asked.append(number)
        signal.signal(number, previous[number])

    wanted = [] if dist.is_initialized() else [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, note) for number in wanted}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Progress:
    """A bar with rate and ETA on a terminal, a plain line for each `note` elsewhere."""

    def __init__(self, total: int, done: int = 0):
        silent = not sys.stderr.isatty() or int(os.environ.get("RANK", 0)) > 0
        self.bar = tqdm(total=total, initial=done, disable=silent, file=sys.stderr, unit="step")

    def step(self) -> None:
        self.bar.update()

    def note(self, text: str) -> None:
        say(text)

    def close(self) -> None:
        self.bar.close()


# many ranks


@contextlib.contextmanager
def ranks(device: torch.device):
    """Join torchrun's process group, if there is one. Yields (rank, number of ranks)."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        time.sleep(0.1)  # gloo's threads take the GIL to free their last tensors, or joining hangs
        dist.destroy_process_group()


def distribute(model: torch.nn.Module, pieces: list, shard: bool) -> torch.nn.Module:
    """The model on all ranks: weights replicated, or sharded piece by piece to fit."""
    if shard:
        from torch.distributed.fsdp import fully_shard

        for module in [*pieces, model]:
            fully_shard(module)
        return model
    return torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model


def barrier() -> None:
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over all ranks, on each of them."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


WHOLE = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on the CPU with plain names, however the model is wrapped."""
    return dcp.get_model_state_dict(model, options=WHOLE)


def full_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Whole state of model and optimizer on the CPU, by parameter names."""
    weights, moments = dcp.get_state_dict(model, optimizer, options=WHOLE)
    return {"model": weights, "optimizer": moments}


def load_full_state(model, optimizer, state: dict) -> None:
    """The reverse of `full_state`."""
    options = dcp.StateDictOptions(full_state_dict=True)
    weights, moments = state["model"], state["optimizer"]
    dcp.set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options
    )
