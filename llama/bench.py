"""How fast, beside `transformers` and beside what the machine can do.

Both sides get the same sizes, weights, number format, data and optimizer, in one process, taking
turns; a side's result is its best variant's median. Each ratio is above 1 where ours is faster.

    train     a whole step: forward, backward, clipping, AdamW; 16 rows of 256 tokens
    decode    greedy, 16 prompt tokens and 128 new ones, cached; 1 row and 8
    limits    training against the matrix-product rate, decoding against the memory bandwidth

Without transformers only our own numbers and the limits are measured.
"""

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
import train
from model import Llama, LlamaConfig, attention, fused_attention
from options import from_options, say
from run import write_json
from tokenizer import ByteTokenizer

SIZES = LlamaConfig(
    vocab_size=1024, seq_len=256, n_layer=6, n_head=8, n_kv_head=8, d_model=256, d_head=32, d_ff=688
)  # 5 M: small enough for every laptop
LARGE = LlamaConfig(
    vocab_size=32_000,
    seq_len=256,
    n_layer=12,
    n_head=12,
    n_kv_head=12,
    d_model=768,
    d_head=64,
    d_ff=2048,
)  # 110 M: outgrows every CPU cache
RESULTS = Path(__file__).resolve().parent / "runs"
ROWS, PROMPT, NEW = 16, 16, 128
ROUNDS = 7


def seconds(variants: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each variant; in every round each has one turn. Failing ones drop out."""
    times: dict[str, list[float]] = {}
    for name, work in variants.items():
        try:
            for _ in range(3):  # compile, allocate, warm up
                work()
            times[name] = []
        except Exception as error:  # no compiler here, say
            say(f"{name}: left out, {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    for _ in range(rounds):
        for name, mine in times.items():
            start = time.perf_counter()
            variants[name]()
            mine.append(time.perf_counter() - start)
    return {name: statistics.median(mine) for name, mine in times.items()}


def training_step(model: torch.nn.Module, loss: Callable, dtype: torch.dtype) -> Callable:
    """A function that does one whole step of `loss(rows)`."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(SIZES.vocab_size, (ROWS, SIZES.seq_len + 1), device=device)

    def step() -> None:
        with hardware.autocast(device, dtype):
            value = loss(rows)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()

    return step


def our_loss(forward: Callable, loss_sum: Callable) -> Callable:
    """Mean next-token loss as `train.py` works it out."""
    return lambda rows: loss_sum(forward(rows[:, :-1]), rows[:, 1:]) / rows[:, 1:].numel()


def their_loss(forward: Callable) -> Callable:
    """The same as transformers does: the labels are shifted inside, so the rows are one shorter."""
    return lambda rows: forward(input_ids=rows[:, :-1], labels=rows[:, :-1]).loss


def training(models: dict, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Tokens per second of each variant."""
    variants = {}
    for name, model in models.items():
        model.train()
        forward = torch.compile(model)
        if name == "ours":
            fast_sum = torch.compile(train.loss_sum)
            pairs = our_loss(model, train.loss_sum), our_loss(forward, fast_sum)
        else:
            pairs = their_loss(model), their_loss(forward)
        for way, loss in zip(("eager", "compiled"), pairs, strict=True):
            variants[f"{name} {way}"] = training_step(model, loss, dtype)
    n_token = ROWS * SIZES.seq_len
    return {name: n_token / t for name, t in seconds(variants).items()}


def decoding(models: dict, n_row: int) -> dict[str, float]:
    """New tokens per second of each variant, prefill included."""
    device = next(models["ours"].parameters()).device
    prompts = torch.randint(SIZES.vocab_size, (n_row, PROMPT), device=device)
    greedy, variants = generate.Sampling(temperature=0), {}
    ours = models["ours"].eval()
    for way, compiled in (("eager", False), ("compiled", True)):
        variants[f"ours {way}"] = lambda compiled=compiled: list(
            generate.generate(ours, prompts.tolist(), NEW, greedy, compile=compiled)
        )
    if theirs := models.get("transformers"):
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(prompts)}
        eager, forward = theirs.eval().forward, torch.compile(theirs.forward)

        def call(forward: Callable, **more) -> None:
            theirs.forward = forward
            with torch.inference_mode():
                theirs.generate(prompts, **how, **more)

        variants["transformers eager"] = lambda: call(eager)
        variants["transformers compiled"] = lambda: call(forward, cache_implementation="static")
    result = {name: n_row * NEW / t for name, t in seconds(variants, 5).items()}
    if theirs:
        theirs.forward = eager
    return result


def attention_table(device: torch.device) -> None:
    """The measurement behind `model.fastest_attention`: forward and backward, milliseconds."""
    say("attention, forward + backward   products    fused")
    for dtype in (torch.bfloat16, torch.float32):
        for n_token in (128, 256, 512, 1024):
            shape = (max(1, 4096 // n_token), 8, n_token, 32)
            q, k, v = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
            for tensor in (q, k, v):
                tensor.requires_grad_()

            def pair(attend: Callable, q=q, k=k, v=v) -> Callable:
                return lambda: attend(q, k, v, None, 32**-0.5, True).sum().backward()

            work = {"products": pair(attention), "fused": pair(fused_attention)}
            t = {name: 1e3 * value for name, value in seconds(work, 5).items()}
            name = f"  {str(dtype).removeprefix('torch.')} {n_token:5d} tokens"
            say(f"{name:30s} {t['products']:8.1f} {t['fused']:8.1f}")


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second of reading: the best of ten sums over 256 MB."""
    data = torch.ones(1 << 26, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        data.sum().item()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def large_decoding(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """(tokens per second, bytes that a token must read) with weights that outgrow every cache.

    The bytes are all weights (the embedding is one of them, being the head too) and the keys and
    values so far.
    """
    model = Llama(LARGE).to(device, dtype).eval()
    prompt, greedy = [list(range(PROMPT))], generate.Sampling(temperature=0)
    work = {
        way: lambda c=c: list(generate.generate(model, prompt, 32, greedy, compile=c))
        for way, c in (("eager", False), ("compiled", True))
    }
    cache = model.new_cache(1, PROMPT + 16)
    n_byte = sum(p.nbytes for p in model.parameters())
    n_byte += sum(x.nbytes for x in (*cache.keys, *cache.values))
    return 32 / min(seconds(work, 5).values()), n_byte


def best(result: dict[str, float], side: str) -> float:
    """The fastest variant of one side."""
    return max(value for name, value in result.items() if name.startswith(side))


def both_models(device: torch.device) -> dict[str, torch.nn.Module]:
    """Ours and, where transformers is installed, theirs with the same weights."""
    models = {"ours": Llama(SIZES).to(device)}
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


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The fastest of ours over the fastest of theirs; nothing where theirs was not measured."""
    keys = {"train": "train_vs_hf", "decode": "decode_vs_hf", "decode_b8": "decode_vs_hf_b8"}
    return {
        key: round(best(results[name], "ours") / best(results[name], "transformers"), 3)
        for name, key in keys.items()
        if any(variant.startswith("transformers") for variant in results[name])
    }


def limits(results: dict, device: torch.device, dtype: torch.dtype) -> dict:
    """What the machine can do, the share of it that we reach, and the points of the roofline."""
    peak, bandwidth = hardware.matmul_rate(device, dtype), memory_bandwidth(device)
    per_token = Llama(SIZES).flops_per_token(SIZES.seq_len)
    speed, n_byte = large_decoding(device, dtype)
    print(f"decode     ours, 110 M parameters {speed:9,.0f} tokens/s")
    forward = per_token / 3  # a training token costs one forward pass and twice that backward
    trained = best(results["train"], "ours") * per_token
    points = [("train 5 M", 6 * ROWS * SIZES.seq_len, trained),
              ("decode 5 M, 1 row", 2, best(results["decode"], "ours") * forward),
              ("decode 5 M, 8 rows", 16, best(results["decode_b8"], "ours") * forward),
              ("decode 110 M, 1 row", 2, speed * n_byte / dtype.itemsize * 2)]  # fmt: skip
    return {
        "train_gemm_fraction": round(trained / peak, 3),
        "decode_bandwidth_fraction": round(speed * n_byte / bandwidth, 3),
        "matmul_flops": round(peak),
        "bytes_per_second": round(bandwidth),
        "item_bytes": dtype.itemsize,
        "points": [
            dict(zip(("name", "flops_per_weight", "flops"), p, strict=True)) for p in points
        ],
    }


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config = from_options(train.TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    hardware.seed_everything(config.seed)
    models = both_models(device)
    results = {"train": training(models, device, dtype)}
    for model in models.values():
        model.to(dtype)
    results |= {"decode": decoding(models, 1), "decode_b8": decoding(models, 8)}
    for name, variants in results.items():
        for variant, speed in variants.items():
            print(f"{name:10s} {variant:22s} {speed:10,.0f} tokens/s")
    found = limits(results, device, dtype)
    attention_table(device)
    named = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    line = named | ratios(results) | found
    file = RESULTS / f"bench-{named['dtype']}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, line)
    print(json.dumps(line))
