"""Text from a model: prefill once, then one token at a time, for many rows of different length.

    prompts ──prefill in chunks──▶ cache ──fork──▶ rows ──┬─▶ logits ─▶ choose ─▶ ids ─▶ text
                                     ▲                    │                │
                                     └────── decode ◀─────┴────────────────┘

Rows never see one another: what a row says depends on its prompt, its number and the seed, not on
the rows beside it. Key: B rows, T tokens, V vocab_size.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from checkpoint import Loaded
from options import UserError, check, option
from tokenizer import TextStream

CHUNK = 512  # prompt tokens at a time: bounds the memory that prefill takes


@dataclass(frozen=True)
class Sampling:
    """The choice of the next token.

    Raises ValueError for values out of range.
    """

    temperature: float = option(0.7, "divides the logits; 0 takes the likeliest token", least=0)
    top_k: int = option(0, "only the k likeliest tokens; 0 is all", least=0)
    top_p: float = option(1.0, "only the likeliest tokens with mass p together", above=0, most=1)
    min_p: float = option(0.0, "only tokens this fraction as likely as the first", least=0, most=1)

    def __post_init__(self):
        check(self)


@dataclass(frozen=True)
class SampleConfig:
    """The text to write.

    Raises ValueError for values out of range.
    """

    prompt: str = option("", "text to go on from; without one a new document begins")
    num_samples: int = option(1, "ways to go on", least=1, most=10_000)
    max_new_tokens: int = option(256, "stop after so many, if nothing else stops it", least=1)

    def __post_init__(self):
        check(self)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that a token is drawn from, (B, V), from logits (B, V).

    Temperature comes first, then top-k, then top-p of what is left (Holtzman et al. 2020,
    arXiv:1904.09751, Eq. 2 and 3: the token that crosses p is in), then min-p (Nguyen et al. 2024,
    arXiv:2407.01082, §3). The likeliest token always stays, and of equally likely ones the first.
    """
    below = logits.double() - logits.max(dim=-1, keepdim=True).values  # 0 / T cannot overflow
    p = (below / sampling.temperature).softmax(dim=-1)
    least = sampling.min_p * p.max(dim=-1, keepdim=True).values
    if sampling.top_k or sampling.top_p < 1:
        p = nucleus(p, sampling.top_k, sampling.top_p)
    p = p.masked_fill(p < least, 0.0)
    return p / p.sum(dim=-1, keepdim=True)


def nucleus(p: Tensor, top_k: int, top_p: float) -> Tensor:
    """p with 0 for all but the top_k likeliest and, of these, the fewest with top_p of the mass.

    Sorting a vocabulary of 128,000 is slow on a CPU, so it sorts as many candidates as it needs:
    some, and ten times as many while their mass does not reach top_p.
    """
    n_token = p.shape[-1]
    wanted = min(top_k or n_token, n_token)
    n = wanted if top_k else min(1000, n_token)
    while True:
        candidates = likeliest(p, n)
        kept = p.gather(1, candidates)
        before = kept.cumsum(dim=-1) - kept  # mass of the likelier tokens
        enough = top_p * (kept.sum(dim=-1, keepdim=True) if n == wanted else 1.0)
        if n == wanted or bool((before[:, -1:] >= enough).all()):
            break
        n = min(10 * n, wanted)
    inside = (before < enough) | (before == 0)
    return torch.zeros_like(p).scatter(1, candidates, kept * inside)


def likeliest(p: Tensor, n: int) -> Tensor:
    """The ids of the n likeliest tokens, likeliest first, of equal ones the lower id: (B, n)."""
    least = p.topk(n, dim=-1).values[:, -1:]  # topk says nothing about which of equal ones it takes
    above, equal = p > least, p == least
    room = n - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    ids = chosen.nonzero()[:, 1].view(len(p), n)
    by_size = p.gather(1, ids).argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, by_size)


def choose(logits: Tensor, sampling: Sampling, dice: list[torch.Generator]) -> Tensor:
    """The next token of each row, (B,), from logits (B, V); each row throws its own dice.

    UserError for logits that are no numbers, which damaged weights give.
    """
    if not logits.max(dim=-1).values.isfinite().all():
        raise UserError("the model's scores are not finite: its weights are damaged")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    p = probabilities(logits.cpu(), sampling)
    u = torch.stack([torch.rand((), dtype=torch.float64, generator=d) for d in dice])
    reached = p.cumsum(dim=-1) / p.sum(dim=-1, keepdim=True)
    return (reached <= u[:, None]).sum(dim=-1).to(logits.device)  # first token with more than u


def prefill(model: nn.Module, prompts: list[list[int]], n_slot: int) -> tuple:
    """Read prompts of any length. Returns the cache and the logits after each prompt, (B, V).

    Short prompts are filled up on the right: their slots beyond the end are overwritten later.
    Logits are computed for the last token of each prompt alone.
    """
    device = next(model.parameters()).device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    cache = model.new_cache(len(prompts), n_slot)
    last = []  # (row, features of its last token)
    for start in range(0, longest, CHUNK):
        features = model.features(tokens[:, start : start + CHUNK].to(device), cache)  # (B, T, D)
        for row in ((lengths > start) & (lengths <= start + CHUNK)).nonzero().flatten().tolist():
            last.append((row, features[row, int(lengths[row]) - 1 - start]))
    last.sort(key=lambda pair: pair[0])
    return cache, model.head(torch.stack([features for _, features in last]))


@torch.inference_mode()
def generate(
    model: nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    n_sample: int = 1,
    compile: bool = False,
) -> Iterator[list[int | None]]:
    """Yield one new token a row at a time; None once a row has met one of stop_ids.

    There are len(prompts) · n_sample rows: the samples of a prompt share one prefill and stand side
    by side. Ends when all rows have, after max_new_tokens, or where the context is full.
    Raises ValueError for an empty prompt and for one that fills the context.
    """
    model.eval()
    sampling = sampling or Sampling()
    lengths = [len(prompt) for prompt in prompts for _ in range(n_sample)]
    room = model.config.seq_len - max(lengths)
    if min(lengths) == 0:
        raise ValueError("a prompt has no tokens: there is nothing to go on from")
    if room < 1:
        raise ValueError(f"prompt of {max(lengths)} tokens, context of {model.config.seq_len}")
    n_new = min(max_new_tokens, room)
    cache, logits = prefill(model, prompts, max(lengths) + n_new)
    cache, logits = cache.fork(n_sample), logits.repeat_interleave(n_sample, dim=0)
    dice = [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in range(len(lengths))]
    positions = torch.tensor(lengths, device=logits.device)[:, None]  # (B, 1)
    step, apart = model, min(lengths) < max(lengths)
    if compile:  # all slots at every step, since a compiled step has fixed shapes
        step, apart, cache.length = compiled(model), True, cache.n_slot
    open_rows = set(range(len(lengths)))
    for i in range(n_new):
        tokens = choose(logits, sampling, dice)
        ids = tokens.tolist()
        open_rows -= {row for row in open_rows if ids[row] in stop_ids}
        if not open_rows:
            return
        yield [token if row in open_rows else None for row, token in enumerate(ids)]
        if i + 1 < n_new:
            if apart:  # rows that are equally long need no positions, and then no mask
                cache.length = min(cache.length + 1, cache.n_slot)
            logits = step(tokens[:, None], cache, positions if apart else None)[:, -1]
            positions = positions + 1


@functools.cache
def compiled(model: nn.Module) -> Callable:
    """One decoding step by torch.compile, with the weights as constants, packed for its kernels."""
    import torch._inductor.config  # seconds to import, so only who compiles pays for it

    torch._inductor.config.freezing = True  # weights are constants; no effect as a mere option
    torch._inductor.config.autotune_num_choices_displayed = 0  # and no tables of trials
    options = {"max_autotune": True}
    weight, capability = next(model.parameters()), torch.backends.cpu.get_cpu_capability()
    if weight.device.type == "cpu" and capability.startswith("AVX") and weight.itemsize < 8:
        # trials have the weights in the cache and choose MKL; read from memory, as a step reads
        # them, they are 1.6 × as fast in torch's own kernels (8 rows, float32)
        options["max_autotune_gemm_backends"] = "CPP"
    return torch.compile(model, options=options)


class StopText:
    """Passes text on until one of `stops` comes, holding back what may be the start of one."""

    def __init__(self, stops: list[str]):
        self.stops, self.held, self.done = [s for s in stops if s], "", False

    def push(self, text: str) -> str:
        """The part of the text so far that certainly comes before a stop."""
        if self.done:
            return ""
        self.held += text
        found = [i for stop in self.stops if (i := self.held.find(stop)) >= 0]
        if found:
            self.done = True
            return self.held[: min(found)]
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure

    def flush(self) -> str:
        """What was held back and was no stop after all."""
        return "" if self.done else self.held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for n in range(min(len(text), len(stop)), 0, -1):
        if stop.startswith(text[len(text) - n :]):
            return n
    return 0


def stream_text(
    loaded: Loaded,
    config: SampleConfig,
    sampling: Sampling,
    seed: int,
    stops: list[str],
    compile: bool,
) -> Iterator[tuple[int, str]]:
    """Yield (row, piece of text) as the continuations of the prompt become certain."""
    tokenizer, n = loaded.tokenizer, config.num_samples
    rows = [(TextStream(tokenizer), StopText(stops)) for _ in range(n)]
    prompt = tokenizer.encode(config.prompt)
    new = generate(
        loaded.model,
        [prompt],
        config.max_new_tokens,
        sampling,
        stop_ids=loaded.stop_ids,
        seed=seed,
        n_sample=n,
        compile=compile,
    )
    for ids in new:
        for row, (token, (text, stop)) in enumerate(zip(ids, rows, strict=True)):
            if token is not None and not stop.done:
                yield row, stop.push(text.push(token))
        if all(stop.done for _, stop in rows):
            return
    for row, (text, stop) in enumerate(rows):
        yield row, stop.push(text.flush()) + stop.flush()


def write(
    loaded: Loaded,
    config: SampleConfig,
    sampling: Sampling | None = None,
    seed: int = 0,
    stops: list[str] | None = None,
    compile: bool = False,
    show: Callable[[str], None] = lambda text: None,
) -> str:
    """The prompt and its continuation, as often as asked, with lines `---` between.

    `show` gets the text piece by piece: the first one live, the others when they are all done.
    Raises UserError for a prompt that is empty or fills the context.
    """
    texts, shown = [config.prompt] * config.num_samples, False
    try:
        pieces = stream_text(loaded, config, sampling or Sampling(), seed, stops or [], compile)
        for row, text in pieces:
            texts[row] += text
            if row == 0:
                show(text if shown else texts[0])  # a prompt that is refused is not shown
                shown = True
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from None
    if not shown:
        show(texts[0])
    show("".join(f"\n---\n{text}" for text in texts[1:]))
    return "\n---\n".join(texts)
