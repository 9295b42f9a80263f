"""How fast, and how much memory: all weights, LoRA, QLoRA, and PEFT where it is installed.

    train    a whole step: forward, backward, clipping, AdamW; 8 rows of 128 tokens, 5 M parameters,
             rank 8 on all linear layers of the blocks, no dropout
    memory   bytes of weights, gradients and moments, and of what a forward pass saves for backward

All variants are in one process, take turns, and a variant's time is its median. Each ratio is above
1 where our LoRA is the faster one:

    train_vs_full                against training all weights of our Llama
    train_vs_peft                against PEFT on the same model, our Llama
    train_vs_peft_transformers   against PEFT, both on the Llama of transformers
    gemm_fraction                share of this machine's matrix-product rate that our LoRA reaches
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hardware
import loading
import lora
import memory
from huggingface import their_config, to_their_names
from model import Llama, LlamaConfig
from options import from_options, say
from run import write_json
from train import TrainConfig, flops_per_token
from variants import AdapterConfig

SIZES = LlamaConfig(
    vocab_size=1024, seq_len=128, n_layer=6, n_head=8, n_kv_head=8, d_model=256, d_head=32, d_ff=688
)
RESULTS = Path(__file__).resolve().parent / "runs"
ROWS, ROUNDS = 8, 9
OUR_NAMES = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
THEIR_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def settings(names: list[str], **more) -> AdapterConfig:
    """Our adapter for the layers with these last names."""
    return AdapterConfig(rank=8, alpha=16.0, targets=rf"\.({'|'.join(names)})$", **more)


def logits_of(model: nn.Module, rows: Tensor) -> Tensor:
    """The logits of our Llama or of one of transformers."""
    out = model(rows)
    return out if torch.is_tensor(out) else out.logits


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    logits = logits_of(model, rows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


def variants(seed: int) -> dict[str, nn.Module]:
    """The models, all with the same base."""
    torch.manual_seed(seed)
    base = Llama(SIZES)
    models = {
        "full": copy.deepcopy(base),
        "lora": copy.deepcopy(base),
        "qlora": copy.deepcopy(base),
    }
    lora.adapt(models["lora"], settings(OUR_NAMES))
    loading.attach(models["qlora"], settings(OUR_NAMES, quantize=True))
    try:
        return models | with_peft(base) | with_transformers(base)
    except ImportError as error:
        say(f"PEFT is left out: {error}")
        return models


def with_peft(base: Llama) -> dict[str, nn.Module]:
    """PEFT's adapter on our model. ImportError without it."""
    import peft

    wanted = peft.LoraConfig(r=8, lora_alpha=16, target_modules=OUR_NAMES)
    return {"peft": peft.inject_adapter_in_model(wanted, copy.deepcopy(base))}


def with_transformers(base: Llama) -> dict[str, nn.Module]:
    """PEFT's adapter, and ours, on the Llama of transformers. ImportError without them."""
    import peft
    import transformers

    config = transformers.LlamaConfig(**their_config(SIZES))
    theirs = transformers.LlamaForCausalLM(config)
    theirs.load_state_dict(to_their_names(base.state_dict()))
    theirs.config.use_cache = False
    mine = copy.deepcopy(theirs)
    lora.adapt(mine, settings(THEIR_NAMES))
    wanted = peft.LoraConfig(r=8, lora_alpha=16, target_modules=THEIR_NAMES)
    return {
        "lora in transformers": mine,
        "peft in transformers": peft.get_peft_model(theirs, wanted),
    }


def training_step(model: nn.Module, rows: Tensor, dtype: torch.dtype) -> tuple[Callable, object]:
    """(a function that does one whole step, its optimizer)."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        with hardware.autocast(rows.device, dtype):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        loss.item()

    return step, optimizer


def saved_bytes(model: nn.Module, rows: Tensor) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, weights left out."""
    weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, rows)
    total = sum(kept.values())
    del loss
    return total


def measure(models: dict, rows: Tensor, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Seconds a step, and bytes, of each variant."""
    steps, found, times = {}, {}, {}
    for name, model in models.items():
        step, optimizer = training_step(model, rows, dtype)
        for _ in range(2):
            step()
        found[name] = memory.measured(model, optimizer) | {"activations": saved_bytes(model, rows)}
        found[name]["learns"] = memory.trainable(model)[0]
        model.zero_grad()
        steps[name], times[name] = step, []
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: numbers | {"seconds": statistics.median(times[name])}
            for name, numbers in found.items()}  # fmt: skip


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """How many times as long as our LoRA each of the others takes, for those that were measured."""
    pairs = {
        "train_vs_full": ("full", "lora"),
        "train_vs_peft": ("peft", "lora"),
        "train_vs_peft_transformers": ("peft in transformers", "lora in transformers"),
    }
    return {
        name: found[other]["seconds"] / found[ours]["seconds"]
        for name, (other, ours) in pairs.items()
        if other in found
    }


def main(args: argparse.Namespace) -> None:
    """Print a table, then one JSON line, which is kept in runs/ too."""
    config = from_options(TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, _ = hardware.choose_dtype(config.dtype, device)
    models = {name: model.to(device) for name, model in variants(config.seed).items()}
    rows = torch.randint(SIZES.vocab_size, (ROWS, SIZES.seq_len + 1), device=device)
    found = measure(models, rows, dtype)
    kinds = ("weights", "gradients", "moments", "activations")
    print(
        f"{'':22}{'learns':>10}{'ms a step':>11}"
        + "".join(f"{kind + ', MB':>17}" for kind in kinds)
    )
    for name, x in found.items():
        sizes = "".join(f"{x[kind] / 1e6:17.2f}" for kind in kinds)
        print(f"{name:22}{x['learns']:10,}{1000 * x['seconds']:11.1f}{sizes}")
    result = {k: round(x, 3) for k, x in ratios(found).items()}
    flops = ROWS * SIZES.seq_len * flops_per_token(models["lora"], SIZES.seq_len)
    rate = flops / found["lora"]["seconds"]
    result["gemm_fraction"] = round(rate / hardware.matmul_rate(device, dtype), 3)
    result |= {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"bench-{result['dtype']}.json", result | {"variants": found})
    print(json.dumps(result))
