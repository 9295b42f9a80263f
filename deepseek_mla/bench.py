"""Speed beside `transformers`, of the forms of attention, and of writing with guesses.

    train        one step of training, ours and DeepseekV3ForCausalLM's, same sizes and weights
    decode       one token more in a context of 2,048: transformers expands all keys and values of
                 the past at each step, absorbed attention never does
    forms        the same by the length of the context, naive and absorbed, of our model alone; and
                 a chunk of T new tokens behind 2,048, with the T from which naive is faster
    speculative  the shipped model writes 200 tokens, token by token and with guesses

Variants take turns in one process, and the median counts. A table, then one line of JSON, which is
also kept in runs/; its *_vs_* keys are ratios, above 1 = ours (or the first named) is faster.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import checkpoint
import generate
import hardware
import speculative
import train
from forms import using
from mla import absorbed, crossover, naive
from model import DeepseekConfig, LatentAttention
from mtp import DeepseekMTP
from options import from_options, say
from run import write_json
from tokenizer import ByteTokenizer

SIZES = DeepseekConfig(
    vocab_size=2048, seq_len=8320, n_layer=4, n_head=8, d_model=256, q_rank=96, kv_rank=128,
    d_nope=64, d_rope=32, d_value=64, d_ff=512, n_dense=1, d_expert=64, n_expert=32, n_active=4,
    n_ahead=0, tie_embeddings=False,
)  # fmt: skip
FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "runs"
ROWS, LENGTH = 8, 256  # of a training batch
CONTEXT, STEPS = 2048, 8  # of decoding: tokens there before, and written in a measurement
CONTEXTS = (8, 32, 128, 512, 2048, 8192)
CHUNKS = (1, 8, 32, 64, 128, 256, 512)
NEW, ROUNDS = 200, 7
THEIR_WAYS = ("eager", "grouped_mm")  # how transformers can dispatch to experts


def seconds(variants: dict[str, Callable], rounds: int = 0) -> dict[str, float]:
    """Median seconds of each variant; in every round each has one turn. Failing ones drop out."""
    times: dict[str, list[float]] = {}
    for name, work in variants.items():
        try:
            for _ in range(2):  # allocate, warm up
                work()
            times[name] = []
        except Exception as error:  # a kernel that this machine does not have, say
            say(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    for _ in range(rounds or ROUNDS):
        for name, mine in times.items():
            start = time.perf_counter()
            variants[name]()
            mine.append(time.perf_counter() - start)
    return {name: statistics.median(mine) for name, mine in times.items()}


def both_models(device: torch.device) -> dict[str, torch.nn.Module]:
    """Ours and, where transformers is installed, theirs with the same weights."""
    models = {"ours": DeepseekMTP(SIZES).to(device)}
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: no side-by-side numbers")
        return models
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "exported"
        checkpoint.export(checkpoint.Loaded(folder, models["ours"], ByteTokenizer(), ()), folder)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return models | {"transformers": theirs.to(device)}


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


def training_step(model: torch.nn.Module, loss: Callable, dtype: torch.dtype) -> Callable:
    """A function that does one whole step of `loss(rows)`."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(SIZES.vocab_size, (ROWS, LENGTH + 1), device=device)

    def step() -> None:
        with hardware.autocast(device, dtype):
            value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()

    return step


def training(models: dict, dtype: torch.dtype) -> dict[str, float]:
    """Tokens per second of each variant."""
    ours, theirs = models["ours"].train(), models.get("transformers")

    def our_loss(rows: torch.Tensor) -> torch.Tensor:
        return train.loss_sum(ours(rows[:, :-1]), rows[:, 1:]) / rows[:, 1:].numel()

    variants = {"ours": training_step(ours, our_loss, dtype)}

    def their_loss(way: str) -> Callable:
        def loss(rows: torch.Tensor) -> torch.Tensor:
            theirs.set_experts_implementation(way)
            return theirs(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss

        return loss

    if theirs is not None:
        theirs.train()
        for way in THEIR_WAYS:
            variants[f"transformers {way}"] = training_step(theirs, their_loss(way), dtype)
    return {name: ROWS * LENGTH / t for name, t in seconds(variants).items()}


# ── Decoding ──────────────────────────────────────────────────────────────────────────────────────


def filled(model: DeepseekMTP, n_slot: int, length: int):
    """A cache with `length` tokens in it; what they are does not change how long a step takes."""
    cache = model.new_cache(1, n_slot)
    for keys in cache.keys:
        keys.normal_()
    cache.length = length
    return cache


def our_steps(model: DeepseekMTP, length: int, n_new: int, n_step: int) -> Callable:
    """Read n_new tokens, n_step times, behind a context of `length`."""
    cache = filled(model, length + n_new * n_step, length)
    tokens = torch.zeros(1, n_new, dtype=torch.int64, device=model.embedding.weight.device)

    def work() -> None:
        cache.length = length
        with torch.inference_mode():
            for _ in range(n_step):
                model(tokens, cache)

    return work


def their_steps(model: torch.nn.Module, way: str) -> Callable:
    """The same of transformers, one token at a time behind CONTEXT tokens."""
    device = next(model.parameters()).device
    tokens = torch.randint(SIZES.vocab_size, (1, CONTEXT), device=device)
    with torch.inference_mode():
        cache = model(tokens, use_cache=True).past_key_values

    def work() -> None:
        model.set_experts_implementation(way)
        with torch.inference_mode():
            for _ in range(STEPS):
                model(tokens[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-STEPS)  # forget what was written

    return work


def decoding(models: dict) -> dict[str, float]:
    """Tokens per second behind a context of CONTEXT tokens."""
    variants = {"ours": our_steps(models["ours"].eval(), CONTEXT, 1, STEPS)}
    if theirs := models.get("transformers"):
        theirs.eval()
        for way in THEIR_WAYS:
            variants[f"transformers {way}"] = their_steps(theirs, way)
    return {name: STEPS / t for name, t in seconds(variants).items()}


def compared(model: DeepseekMTP, length: int, n_new: int) -> dict:
    """Milliseconds of a pass over n_new tokens behind `length` tokens, naive and absorbed."""
    work = our_steps(model, length, n_new, 1)

    def as_form(form: Callable) -> Callable:
        def run() -> None:
            with using(model, form):
                work()

        return run

    times = seconds({form.__name__: as_form(form) for form in (naive, absorbed)}, 5)
    milliseconds = {name: round(1e3 * t, 3) for name, t in times.items()}
    return {"context": length, "new": n_new} | milliseconds


def measured_crossover(rows: list[dict]) -> float | None:
    """The number of new tokens at which naive overtakes absorbed, between two measured ones."""
    for before, after in itertools.pairwise(rows):
        gains = [row["naive"] / row["absorbed"] - 1 for row in (before, after)]
        if gains[0] > 0 >= gains[1]:
            share = gains[0] / (gains[0] - gains[1])
            return round(before["new"] + share * (after["new"] - before["new"]), 1)
    return None


# ── Guesses ───────────────────────────────────────────────────────────────────────────────────────


def guessing(device: torch.device) -> dict[str, dict]:
    """Tokens per second of the shipped model, plain and with guesses, and how many stood."""
    loaded = checkpoint.load(FOLDER / "pretrained")
    model, prompt = loaded.model.to(device), loaded.tokenizer.encode("")
    n_new = min(NEW, model.config.seq_len - len(prompt))
    result = {}
    for temperature in (0.0, 0.7, 1.0):
        sampling, tally = generate.Sampling(temperature=temperature), speculative.Tally()

        def plain(sampling=sampling) -> list:
            return list(generate.generate(model, [prompt], n_new, sampling))

        def guessed(sampling=sampling, tally=tally) -> list:
            return list(speculative.speculate(model, prompt, n_new, sampling, tally=tally))

        times = seconds({"plain": plain, "speculative": guessed}, 5)
        ratio = round(times["plain"] / times["speculative"], 3)
        result[str(temperature)] = {"plain": round(n_new / times["plain"]), "ratio": ratio,
                                    "accepted": round(tally.rate, 4)}  # fmt: skip
    return result


def best(result: dict[str, float], side: str) -> float:
    """The fastest variant of one side."""
    return max(value for name, value in result.items() if name.startswith(side))


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config = from_options(train.TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    hardware.seed_everything(config.seed)
    models = both_models(device)
    line = {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "speeds": {}}
    for name, measure in (("train", lambda: training(models, dtype)),
                          ("decode", lambda: decoding(models))):  # fmt: skip
        if name == "decode":
            for model in models.values():
                model.to(dtype)
        found = line["speeds"][name] = {k: round(v, 1) for k, v in measure().items()}
        for variant, speed in found.items():
            print(f"{name:8s} {variant:26s} {speed:10,.1f} tokens/s")
        if any(variant.startswith("transformers") for variant in found):
            line[f"{name}_vs_hf"] = round(best(found, "ours") / best(found, "transformers"), 3)
    print_forms(models["ours"].eval(), line)
    line["speculative"] = guessing(device)
    for temperature, found in line["speculative"].items():
        print(f"guesses  temperature {temperature}: {found['ratio']:.2f} × the speed of "
              f"{found['plain']:,} tokens/s, {found['accepted']:.0%} accepted")  # fmt: skip
    line["speculative_vs_plain"] = line["speculative"]["1.0"]["ratio"]
    file = RESULTS / f"bench-{line['dtype']}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, line)
    print(json.dumps(line))


def print_forms(model: DeepseekMTP, line: dict) -> None:
    """Measure and print naive and absorbed, and put the rows into `line`."""
    line["contexts"] = [compared(model, length, 1) for length in CONTEXTS]
    line["chunks"] = [compared(model, CONTEXT, n_new) for n_new in CHUNKS]
    for row in line["contexts"] + line["chunks"]:
        both = f"naive {row['naive']:8.2f} ms, absorbed {row['absorbed']:8.2f} ms"
        ratio = row["naive"] / row["absorbed"]
        print(f"forms    {row['new']:4d} new behind {row['context']:5d}: {both}, {ratio:6.2f} ×")
    layer = next(m for m in model.modules() if isinstance(m, LatentAttention))
    widths = (*layer.widths, SIZES.kv_rank)
    line["crossover_computed"] = round(crossover(widths), 1)
    line["crossover_measured"] = measured_crossover(line["chunks"])
    last = line["contexts"][-2]
    line["absorbed_vs_naive"] = round(last["naive"] / last["absorbed"], 3)
