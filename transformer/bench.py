"""How fast, beside PyTorch's own Transformer, beside `transformers`, and beside the machine.

Both sides get the same sizes, weights where they can, number format, data and optimizer, in one
process, taking turns; a side's result is its best variant's median. Ratios above 1: ours is faster.

    train      a whole step: forward, loss with label smoothing, backward, clipping, Adam; against
               torch.nn.Transformer with its masks; without dropout, the eager ones alone
    decode     beam 4, 64 new tokens, 1 sentence and 8, with the sizes of our default model, and 1
               with the 7 million parameters of `train`; against MarianMTModel.generate
    cache      greedy, 32 and 128 new tokens, with our cache and without
    limits     training against the matrix-product rate

Without transformers only what does not need it is measured.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import decode
import hardware
import train
from checkpoint import Loaded
from loop import save_tensors
from model import Transformer, TransformerConfig, sinusoids
from options import from_options, say
from run import write_json

SIZES = TransformerConfig(
    vocab_size=4000,
    seq_len=160,
    n_layer=3,
    n_head=4,
    d_model=256,
    d_ff=1024,
    positions="sines-first",
)  # 7 M: small enough for every laptop
DEFAULT = TransformerConfig(positions="sines-first")  # 0.8 M, what --train trains
RESULTS = Path(__file__).resolve().parent / "runs"
ROWS, LENGTH, NEW, ROUNDS = 32, 32, 64, 5


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


# ── Training ──────────────────────────────────────────────────────────────────────────────────────


class TorchModel(nn.Module):
    """What one writes around torch.nn.Transformer: embeddings, positions, masks, tied head."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.config = c
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        shape = {"d_model": c.d_model, "nhead": c.n_head, "dim_feedforward": c.d_ff,
                 "dropout": c.dropout, "batch_first": True}  # fmt: skip
        encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**shape), c.n_layer, enable_nested_tensor=False
        )
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape), c.decoder_layers)
        self.stacks = nn.Transformer(**shape, custom_encoder=encoder, custom_decoder=decoder)
        self.dropout = nn.Dropout(c.dropout)
        self.register_buffer("table", sinusoids(c.seq_len, c.d_model).float(), persistent=False)
        nn.init.normal_(self.embedding.weight, std=c.d_model**-0.5)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) * self.config.d_model**0.5
        return self.dropout(x + self.table[: tokens.shape[1]])

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(
            target.shape[1], device=target.device
        )
        padding = torch.zeros(source.shape, device=source.device).masked_fill(
            source == 0, -math.inf
        )
        features = self.stacks(
            self.embed(source), self.embed(target), tgt_mask=later, tgt_is_causal=True,
            src_key_padding_mask=padding, memory_key_padding_mask=padding,
        )  # fmt: skip
        return F.linear(features, self.embedding.weight)


def sentence_pairs(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """ROWS pairs of about LENGTH tokens, as batches by length have them: little padding."""
    lengths = LENGTH - torch.arange(ROWS) % 4
    source, target = torch.randint(4, SIZES.vocab_size, (2, ROWS, LENGTH + 1))
    source = source[:, :LENGTH].masked_fill(torch.arange(LENGTH) >= lengths[:, None], 0)
    target = target.masked_fill(torch.arange(LENGTH + 1) > lengths.flip(0)[:, None], 0)
    return source.to(device), target.to(device)


def training_step(model: nn.Module, forward: Callable, loss: Callable, dtype) -> Callable:
    """A function that does one whole step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), fused=True)
    source, target = sentence_pairs(device)

    def step() -> None:
        with hardware.autocast(device, dtype):
            value = loss(forward(source, target[:, :-1]), target[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        value.item()

    return step


def our_loss(loss_sums: Callable) -> Callable:
    """Mean smoothed loss as `train.py` works it out."""
    return lambda logits, targets: loss_sums(logits, targets, 0.1, 0)[0] / (targets != 0).sum()


def their_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same by PyTorch's one function for it."""
    return F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=0, label_smoothing=0.1
    )


def training(
    device: torch.device, dtype: torch.dtype, sizes: TransformerConfig, compiled: bool
) -> dict[str, float]:
    """Target tokens per second of each variant; the compiled ones if asked to."""
    ours, theirs = Transformer(sizes).to(device).train(), TorchModel(sizes).to(device).train()
    variants = {
        "ours eager": training_step(ours, ours, our_loss(train.loss_sums), dtype),
        "torch eager": training_step(theirs, theirs, their_loss, dtype),
    }
    if compiled:
        sums, loss = torch.compile(train.loss_sums), torch.compile(their_loss)
        forward = torch.compile(ours), torch.compile(theirs)
        variants["ours compiled"] = training_step(ours, forward[0], our_loss(sums), dtype)
        variants["torch compiled"] = training_step(theirs, forward[1], loss, dtype)
    return {name: ROWS * LENGTH / t for name, t in seconds(variants).items()}


# ── Decoding ──────────────────────────────────────────────────────────────────────────────────────


def never_ending(sizes: TransformerConfig, device: torch.device, dtype: torch.dtype) -> Loaded:
    """Random weights, and a number on the end's logit that keeps both sides from ever ending."""
    sizes = replace(sizes, logits_bias=True)
    model = Transformer(sizes).to(device, dtype).eval()
    with torch.no_grad():
        model.logits_bias[sizes.end_id] = -1e4
    rules = checkpoint.Rules(sizes.start_id, sizes.end_id, (sizes.pad_id,))
    return Loaded(None, model, None, rules)


def their_twin(loaded: Loaded):
    """A MarianMTModel with the same weights, or None without transformers."""
    try:
        import transformers
    except ImportError:
        say("transformers is not installed: no side-by-side numbers")
        return None
    import marian

    sizes = loaded.model.config
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as place:
        save_tensors(
            Path(place) / "model.safetensors",
            marian.to_their_names(loaded.model.state_dict(), sizes),
        )
        write_json(Path(place) / "config.json", marian.their_config(sizes))
        generation = marian.their_generation(loaded.rules, sizes)
        write_json(Path(place) / "generation_config.json", generation)
        theirs = transformers.MarianMTModel.from_pretrained(place)
    return theirs.to(loaded.model.embedding.weight).eval()


def decoding(loaded: Loaded, theirs, n_row: int) -> dict[str, float]:
    """New tokens per second of each variant, encoding included; beam 4."""
    device = loaded.model.embedding.weight.device
    vocab_size = loaded.model.config.vocab_size
    sources = torch.randint(4, vocab_size, (n_row, LENGTH), device=device)
    search = decode.Search(beam=4, max_new_tokens=NEW)
    limits = torch.full((n_row,), NEW, device=device)
    model, variants = loaded.model, {}
    for way in ("cached", "compiled"):
        variants[f"ours {way}"] = lambda way=way: decode.beam_search(
            model, sources, loaded.rules, limits, search, way
        )
    if theirs:
        how = {"max_new_tokens": NEW, "num_beams": 4, "do_sample": False}
        how |= {"attention_mask": torch.ones_like(sources), "early_stopping": "never"}

        def call() -> None:
            with torch.inference_mode():
                theirs.generate(sources, **how)

        variants["transformers"] = call
    return {name: n_row * NEW / t for name, t in seconds(variants, 5).items()}


def cache_gain(loaded: Loaded) -> dict[str, float]:
    """Seconds of greedy search, 1 sentence: {"32 cached": …, "32 uncached": …, …}."""
    device = loaded.model.embedding.weight.device
    source = torch.randint(4, loaded.model.config.vocab_size, (1, LENGTH), device=device)
    variants = {}
    for n in (4, 8, 16, 32, 64, 128):
        limits = torch.full((1,), n, device=device)
        for way in ("cached", "uncached"):
            variants[f"{n} {way}"] = lambda limits=limits, way=way: decode.greedy_search(
                loaded.model, source, loaded.rules, limits, way
            )
    return seconds(variants, 5)


def best(result: dict[str, float], side: str) -> float:
    """The fastest variant of one side."""
    return max(value for name, value in result.items() if name.startswith(side))


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """The fastest of ours over the fastest of theirs; nothing where theirs was not measured."""
    keys = {
        "train": ("train_vs_torch", "torch"),
        "train_no_dropout": ("train_vs_torch_no_dropout", "torch"),
        "decode": ("decode_vs_hf", "transformers"),
        "decode_b8": ("decode_vs_hf_b8", "transformers"),
        "decode_7m": ("decode_vs_hf_7m", "transformers"),
    }
    return {
        key: round(best(results[name], "ours") / best(results[name], side), 3)
        for name, (key, side) in keys.items()
        if any(variant.startswith(side) for variant in results[name])
    }


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config = from_options(train.TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    hardware.seed_everything(config.seed)
    calm, results = replace(SIZES, dropout=0.0), {}
    loaded, large = (never_ending(sizes, device, dtype) for sizes in (DEFAULT, SIZES))
    theirs = their_twin(loaded)
    work = {
        "decode": lambda: decoding(loaded, theirs, 1),
        "decode_b8": lambda: decoding(loaded, theirs, 8),
        "decode_7m": lambda: decoding(large, their_twin(large), 1),
        "train_no_dropout": lambda: training(device, dtype, calm, False),
        "train": lambda: training(device, dtype, SIZES, True),
    }
    for name, measure in work.items():
        results[name] = measure()
        for variant, speed in results[name].items():
            print(f"{name:16s} {variant:16s} {speed:10,.0f} tokens/s", flush=True)
    cache = cache_gain(large)
    for name, time_taken in cache.items():
        print(f"greedy           {name:16s} {1e3 * time_taken:10.1f} ms")
    peak = hardware.matmul_rate(device, dtype)
    per_token = Transformer(SIZES).flops(LENGTH, LENGTH) / LENGTH
    line = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    line |= ratios(results)
    for n in (32, 128):
        gain = cache[f"{n} uncached"] / cache[f"{n} cached"]
        line[f"decode_cached_vs_uncached_{n}"] = round(gain, 3)
    line |= {
        "train_gemm_fraction": round(best(results["train"], "ours") * per_token / peak, 3),
        "cache_ms": {name: round(1e3 * value, 2) for name, value in cache.items()},
        "tokens_per_second": results,
    }
    file = RESULTS / f"bench-{line['dtype']}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, line)
    print(json.dumps(line))
