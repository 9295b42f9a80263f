"""How fast, beside `transformers` and beside what the machine can do; and which dispatcher when.

Both sides get the same sizes, weights, number format, data and optimizer, in one process, taking
turns; a side's result is its best variant's median. Each ratio is above 1 where ours is faster.

    train     a whole step: forward, backward, clipping, AdamW; 16 rows of 256 tokens
    decode    greedy, 16 prompt tokens and 128 new ones, cached; 1 row and 8
    dispatch  one layer, forward and backward, by the number of tokens and of experts
    limits    training against the matrix-product rate

With --compile the variants compiled by torch.compile take part as well, which takes minutes more.
Without transformers only our own numbers, the dispatchers and the limits are measured.
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
from model import Mixtral, MixtralConfig
from moe import Experts, MixtureOfExperts, SoftmaxRouter, dense, grouped, loop
from options import from_options, say
from run import write_json
from tokenizer import ByteTokenizer

SIZES = MixtralConfig(
    vocab_size=1024,
    seq_len=256,
    n_layer=4,
    n_head=8,
    n_kv_head=8,
    d_model=256,
    d_head=32,
    d_ff=344,
    n_expert=8,
    n_active=2,
)  # 10 M, of which 3.4 M work on a token: small enough for every laptop
RESULTS = Path(__file__).resolve().parent / "runs"
ROWS, PROMPT, NEW = 16, 16, 128
ROUNDS = 7
THEIR_WAYS = ("eager", "grouped_mm", "batched_mm")  # how transformers can dispatch to experts
OUR_WAYS = {"loop": loop, "grouped": grouped, "dense": dense}
TOKENS, EXPERTS = (1, 16, 128, 1024, 8192), (4, 8, 32)


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


def with_experts(model: torch.nn.Module, way: str, loss: Callable) -> Callable:
    """`loss` with the dispatcher of transformers called `way`."""

    def call(rows: torch.Tensor) -> torch.Tensor:
        model.set_experts_implementation(way)
        return loss(rows)

    return call


def training(
    models: dict, device: torch.device, dtype: torch.dtype, compiling: bool
) -> dict[str, float]:
    """Tokens per second of each variant."""
    variants, losses = {}, {}
    ours = models["ours"].train()
    losses["ours eager"] = ours, our_loss(ours, train.loss_sum)
    if compiling:
        compiled = our_loss(torch.compile(ours), torch.compile(train.loss_sum))
        losses["ours compiled"] = ours, compiled
    if theirs := models.get("transformers"):
        theirs.train()
        for way in THEIR_WAYS[:2]:  # the third copies the weights for every token: 20 GB here
            loss = with_experts(theirs, way, their_loss(theirs))
            losses[f"transformers {way}"] = theirs, loss
        if compiling:
            loss = with_experts(theirs, "grouped_mm", their_loss(torch.compile(theirs)))
            losses["transformers grouped_mm compiled"] = theirs, loss
    for name, (model, loss) in losses.items():
        variants[name] = training_step(model, loss, dtype)
    n_token = ROWS * SIZES.seq_len
    return {name: n_token / t for name, t in seconds(variants).items()}


def decoding(models: dict, n_row: int, compiling: bool) -> dict[str, float]:
    """New tokens per second of each variant, prefill included."""
    device = next(models["ours"].parameters()).device
    prompts = torch.randint(SIZES.vocab_size, (n_row, PROMPT), device=device)
    greedy, variants = generate.Sampling(temperature=0), {}
    ours = models["ours"].eval()
    for way, compiled in (("eager", False), ("compiled", True))[: 2 if compiling else 1]:
        variants[f"ours {way}"] = lambda compiled=compiled: list(
            generate.generate(ours, prompts.tolist(), NEW, greedy, compile=compiled)
        )
    if theirs := models.get("transformers"):
        how = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        how |= {"attention_mask": torch.ones_like(prompts)}
        eager = theirs.eval().forward

        def call(forward: Callable, way: str, **more) -> None:
            theirs.forward = forward
            theirs.set_experts_implementation(way)
            with torch.inference_mode():
                theirs.generate(prompts, **how, **more)

        for way in THEIR_WAYS:
            variants[f"transformers {way}"] = lambda way=way: call(eager, way)
        if compiling:
            forward, static = torch.compile(eager), {"cache_implementation": "static"}
            work = lambda: call(forward, "batched_mm", **static)  # noqa: E731
            variants["transformers batched_mm compiled"] = work
    result = {name: n_row * NEW / t for name, t in seconds(variants, 5).items()}
    if theirs:
        theirs.forward = eager
    return result


def dispatching(device: torch.device) -> list[dict]:
    """Milliseconds of one layer forward and backward, for each way, tokens and experts."""
    found = []
    for n_expert in EXPERTS:
        router = SoftmaxRouter(SIZES.d_model, n_expert, SIZES.n_active)
        experts = Experts(n_expert, SIZES.d_model, SIZES.d_ff)
        layer = MixtureOfExperts(router, experts).to(device)
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for n_token in TOKENS:
            x = torch.randn(n_token, SIZES.d_model, device=device, requires_grad=True)

            def once(way: Callable, layer=layer, x=x) -> None:
                layer.experts.dispatch = way
                layer(x).sum().backward()

            ways = {
                n: w for n, w in OUR_WAYS.items() if n != "dense" or n_token * n_expert < 20_000
            }
            work = {name: lambda way=way, once=once: once(way) for name, way in ways.items()}
            times = {name: round(1e3 * t, 3) for name, t in seconds(work, 5).items()}
            found.append({"tokens": n_token, "experts": n_expert} | times)
    return found


def best(result: dict[str, float], side: str) -> float:
    """The fastest variant of one side."""
    return max(value for name, value in result.items() if name.startswith(side))


def both_models(device: torch.device) -> dict[str, torch.nn.Module]:
    """Ours and, where transformers is installed, theirs with the same weights."""
    models = {"ours": Mixtral(SIZES).to(device)}
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
    """What the machine can do, and the share of it that training reaches."""
    peak = hardware.matmul_rate(device, dtype)
    per_token = Mixtral(SIZES).flops_per_token(SIZES.seq_len)
    trained = best(results["train"], "ours") * per_token
    return {"train_gemm_fraction": round(trained / peak, 3), "matmul_flops": round(peak)}


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config = from_options(train.TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    hardware.seed_everything(config.seed)
    models = both_models(device)
    results = {"train": training(models, device, dtype, config.compile)}
    for model in models.values():
        model.to(dtype)
    for name, n_row in (("decode", 1), ("decode_b8", 8)):
        results[name] = decoding(models, n_row, config.compile)
    for name, variants in results.items():
        for variant, speed in variants.items():
            print(f"{name:10s} {variant:34s} {speed:10,.0f} tokens/s")
    found = limits(results, device, dtype)
    table = dispatching(device)
    for row in table:
        times = "  ".join(f"{way} {row[way]:8.2f} ms" for way in OUR_WAYS if way in row)
        print(f"dispatch   {row['tokens']:5d} tokens, {row['experts']:2d} experts:  {times}")
    main_row = next(r for r in table if (r["tokens"], r["experts"]) == (TOKENS[-1], 8))
    found["grouped_vs_loop"] = round(main_row["loop"] / main_row["grouped"], 3)
    named = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    named["compiled"] = config.compile
    speeds = {
        name: {v: round(x) for v, x in variants.items()} for name, variants in results.items()
    }
    line = named | ratios(results) | found | {"speeds": speeds, "dispatch": table}
    file = RESULTS / f"bench-{named['dtype']}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, line)
    print(json.dumps(line))
