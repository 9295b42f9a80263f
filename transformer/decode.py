"""Translations from a model: greedy search and beam search, for many sentences at once.

    sources ──encode──▶ memory ──▶ cache ──▶ rows ──┬─▶ logits ─▶ best candidates ─▶ hypotheses
                                     ▲              │                  │
                                     └── reorder ◀──┴──────────────────┘

A hypothesis is a sequence of tokens that could be the translation. Greedy search takes the
likeliest next token at every step. Beam search keeps the K likeliest unfinished hypotheses, the
beam, and so can take a token that looks worse now for one that fits better later. Say the first
word can be A (p = 0.5) or B (0.4), and after A the best next word has 0.4, after B 0.9: greedy
search ends with 0.5 · 0.4 = 0.2, a beam of two finds 0.4 · 0.9 = 0.36. Sentences never see one
another: what is found for one does not depend on those beside it.

`rules` (checkpoint.py) says which token begins a translation, which ends it, and which are never
written.

Key: B sentences, K hypotheses a sentence (the beam), V vocab_size, L most tokens of a hypothesis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import quick
from checkpoint import Loaded, Rules
from data import pad
from model import Transformer
from options import UserError, check, option, say


@dataclass(frozen=True)
class Search:
    """The search for a translation.

    Raises ValueError for values out of range.
    """

    beam: int = option(
        4, "hypotheses to keep; 1 takes the likeliest token (greedy)", least=1, most=1000
    )
    length_penalty: float = option(
        1.0, "A: scores are log-probability / tokens^A; 0 favours short ones", least=-10, most=10
    )
    nbest: int = option(1, "translations of a sentence, at most the beam", least=1, most=1000)
    max_new_tokens: int = option(0, "longest translation; 0 is twice the source and 10", least=0)
    stopping: str = option(
        "exact", "end when nothing can win any more, or by the usual guess", ("exact", "usual")
    )
    too_long: str = option("refuse", "what to do with a source that is too long", ("refuse", "cut"))

    def __post_init__(self):
        check(self)
        if self.nbest > self.beam:
            raise ValueError(f"nbest {self.nbest} is more than the beam of {self.beam}")


@dataclass(frozen=True)
class Hypothesis:
    """tokens: without start and end. score: log_prob / n^length_penalty, n with the end."""

    tokens: tuple[int, ...]
    score: float
    log_prob: float
    finished: bool  # False: it was cut at the longest length


def log_probabilities(logits: Tensor, rules: Rules) -> Tensor:
    """log p of each next token, (…, V), in float32 or wider, −∞ for what is never written.

    With renormalise, ours, these are left out before the softmax; else their share is lost, which
    lowers all scores of a step by the same number and can change which hypothesis wins. The logits
    are overwritten.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if not rules.renormalise:
        logits = logits.log_softmax(dim=-1)
    for token in rules.never:
        logits[..., token] = -math.inf
    return logits.log_softmax(dim=-1) if rules.renormalise else logits


def only_the_end(log_p: Tensor, rows: Tensor, end: int) -> Tensor:
    """In these rows, (B,) bool, the end gets log p = 0 and all else −∞. log_p: (B, K, V)."""
    forced = torch.full_like(log_p[:1, :1], -math.inf)
    forced[..., end] = 0.0
    return torch.where(rows[:, None, None], forced, log_p)


class Decoder:
    """The model at work on some sentences: the logits after each row's tokens, one step at a time.

    way: how a step is worked out, the same numbers each time. "cached" keeps keys and values;
    "uncached" reads all tokens again, the slow definition; "compiled" is a cached step by
    torch.compile, which takes half a minute at the first one and half the time for all others.
    """

    def __init__(self, model: Transformer, sources: Tensor, n_beam: int, n_slot: int, start: int,
                 way: str = "cached"):  # fmt: skip
        """sources: (B, S) int64."""
        self.way, self.memory, self.cache = way, model.encode(sources), None
        self.model, self.head = quick.pack(model)
        if way == "compiled":
            self.step = quick.compiled_step(model)
            self.cache = quick.whole_cache(model, self.memory, n_beam, n_slot)
        elif way == "cached":
            self.cache = self.model.new_cache(self.memory, n_beam, n_slot)
        n_row = len(sources) * n_beam
        self.tokens = torch.full((n_row, 1), start, device=sources.device)  # (R, tokens so far)

    def logits(self) -> Tensor:
        """Of what could come next: (R, V)."""
        if self.way == "compiled":
            return self.step(self.tokens[:, -1:], self.cache)
        if self.way == "cached":
            features = self.model.decode(self.tokens[:, -1:], cache=self.cache)
        else:
            features = self.model.decode(self.tokens, self.memory)
        return self.head(features[:, -1])

    def advance(self, rows: Tensor | None, tokens: Tensor) -> None:
        """Row i goes on from what row rows[i] was, with one more token, (R,) each."""
        if rows is not None:
            if self.cache:
                self.cache.reorder(rows)
            self.tokens = self.tokens[rows]
        self.tokens = torch.cat((self.tokens, tokens[:, None]), dim=1)


@torch.inference_mode()
def greedy_search(
    model: Transformer, sources: Tensor, rules: Rules, limits: Tensor, way: str = "cached"
) -> list[list[Hypothesis]]:
    """The likeliest token at every step: one hypothesis a sentence.

    sources: (B, S) int64, filled up with the padding id. limits: (B,) int64, the most tokens of
    each, the end included. Raises UserError for logits that are no numbers.
    """
    B, L = len(sources), int(limits.max())
    decoder = Decoder(model.eval(), sources, 1, L, rules.start, way)
    log_probs, lengths = [0.0] * B, [0] * B
    total = torch.zeros(B, dtype=torch.float64, device="cpu")
    is_open = torch.ones(B, dtype=torch.bool, device=sources.device)
    ended = torch.zeros_like(is_open)
    for step in range(L):
        log_p = refuse_nan(log_probabilities(decoder.logits(), rules))
        if rules.end_at_limit:
            log_p = only_the_end(log_p[:, None], limits == step + 1, rules.end)[:, 0]
        best, token = log_p.max(dim=-1)
        total += torch.where(is_open, best, 0.0).cpu().double()
        ended |= is_open & (token == rules.end)
        closing = is_open & ((token == rules.end) | (limits == step + 1))
        for row in closing.nonzero().flatten().tolist():
            lengths[row], log_probs[row] = step + 1, total[row].item()
        is_open = is_open & ~closing
        decoder.advance(None, token)
        if not is_open.any():
            break
    found = []
    for row, (n, end) in enumerate(zip(lengths, ended.tolist(), strict=True)):
        tokens = decoder.tokens[row, 1 : 1 + (n - 1 if end else n)].tolist()
        found.append([Hypothesis(tuple(tokens), log_probs[row] / n, log_probs[row], end)])
    return found


def refuse_nan(log_p: Tensor) -> Tensor:
    """log_p as it is. UserError for logits that are no numbers, which damaged weights give."""
    if log_p.max().isnan():
        raise UserError("the model's scores are not finite: its weights are damaged")
    return log_p


@torch.inference_mode()
def beam_search(
    model: Transformer,
    sources: Tensor,
    rules: Rules,
    limits: Tensor,
    search: Search,
    way: str = "cached",
) -> list[list[Hypothesis]]:
    """The `nbest` hypotheses of highest score that a beam of K finds, best first, a sentence each.

    score = log p(y | x) / n^A, n the number of tokens with the end. Every further token makes log p
    smaller, so without the division short translations would win. (It is the penalty of Hugging
    Face's `generate`; GNMT, arXiv:1609.08144, Eq. 14, and with it the paper, divide by
    ((5 + n) / 6)^A, so the same A is a different penalty there.)

    At each step every hypothesis of the beam is continued by every token, and the 2K best of all
    these are looked at. A hypothesis can end in one way only, by the end token, so no more than K
    of the 2K end, and K stay to go on with. Those that end and are among the K best are finished;
    the others that end would not have been in the beam. Stopping, for each sentence alone:
      exact: log p can only fall, so the best unfinished hypothesis can reach log p / n^A at most,
             with n the longest length for A > 0; for A ≤ 0 more tokens only lower the score, so n
             is the present length. If this is not more
             than the worst of the nbest finished ones, nothing can change any more.
      usual: n is the present length for every A, and all K must be finished: `generate` does so
             unless early_stopping="never" (which is "exact"). For A > 0 a longer hypothesis that
             would win may be missed.

    sources: (B, S) int64, filled up with the padding id. limits: (B,) int64, the most tokens of
    each. Raises UserError for logits that are no numbers.
    """
    (B, K), L = (len(sources), search.beam), int(limits.max())
    decoder = Decoder(model.eval(), sources, K, L, rules.start, way)
    first_row = K * torch.arange(B, device=sources.device)[:, None]  # (B, 1)
    running, finished, going = None, Finished(B, K, L, sources.device), limits > 0
    for step in range(L):
        logits = decoder.logits().view(B, K, -1)
        log_p = refuse_nan(log_probabilities(logits, rules))  # (B, K, V)
        last = limits == step + 1  # (B,), sentences whose hypotheses end here
        if rules.end_at_limit:
            log_p = only_the_end(log_p, last, rules.end)
        if running is None:  # all rows are the same, so only the first may go on
            running = torch.full((B, K), -math.inf, dtype=log_p.dtype, device=log_p.device)
            running[:, 0] = 0.0
        scores, rows, tokens = candidates(running, log_p, min(2 * K, K * log_p.shape[-1]))
        ending = (tokens == rules.end) | last[:, None]
        may_finish = ending & going[:, None]
        may_finish[:, K:] = False  # not among the K best
        histories = decoder.tokens.view(B, K, -1)
        finished.add(scores, may_finish, rows, tokens, histories, search.length_penalty)
        running, kept = scores.masked_fill(ending, -math.inf).topk(K, dim=1)
        going = going & ~last & can_improve(running, finished, search, step + 1, limits)
        if not going.any():
            break
        rows, tokens = rows.gather(1, kept), tokens.gather(1, kept)  # (B, K)
        decoder.advance((first_row + rows).flatten(), tokens.flatten())
    return finished.hypotheses(search.nbest, rules.end)


def candidates(running: Tensor, log_p: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The n best continuations of each sentence: (log p, row in the beam, token), (B, n) each.

    running: (B, K) log p of the hypotheses, log_p: (B, K, V) of their next tokens. No more than n
    continuations of one hypothesis can be among the n best of all, which spares a large sort.
    """
    V = log_p.shape[-1]
    best, tokens = log_p.topk(min(n, V), dim=-1)  # (B, K, n)
    scores, index = (running.unsqueeze(-1) + best).flatten(1).topk(n, dim=1)  # (B, n)
    return scores, index // best.shape[-1], tokens.flatten(1).gather(1, index)


def can_improve(running: Tensor, finished: "Finished", search: Search, length: int,
                limits: Tensor) -> Tensor:  # fmt: skip
    """Can an unfinished hypothesis still change what is returned? (B,) bool, see `beam_search`."""
    exact = search.stopping == "exact"
    longest = torch.full_like(limits, length)
    if exact and search.length_penalty > 0:
        longest = limits
    bound = running[:, 0] / longest.to(running.dtype) ** search.length_penalty
    worst = finished.scores[:, (search.nbest if exact else search.beam) - 1]
    return bound > worst


class Finished:
    """The K best finished hypotheses of each sentence, best first."""

    def __init__(self, B: int, K: int, L: int, device: torch.device):
        self.scores = torch.full((B, K), -math.inf, device=device)
        self.log_probs = self.scores.clone()
        self.lengths = torch.zeros(B, K, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(B, K, L, dtype=torch.int64, device=device)

    def add(self, log_probs: Tensor, may_finish: Tensor, rows: Tensor, tokens: Tensor,
            histories: Tensor, length_penalty: float) -> None:  # fmt: skip
        """Take in those of the n candidates that may finish, (B, n) each, and keep the K best.

        histories: (B, K, step + 1), the start and the tokens that the candidates go on from.
        """
        K = self.scores.shape[1]
        length = histories.shape[2]  # without the start, but with the new token
        if self.scores.dtype != log_probs.dtype:
            self.scores, self.log_probs = self.scores.to(log_probs), self.log_probs.to(log_probs)
        if not may_finish.any():
            return
        scores = (log_probs / length**length_penalty).masked_fill(~may_finish, -math.inf)
        self.scores, kept = torch.cat((self.scores, scores), dim=1).topk(K, dim=1)
        self.log_probs = torch.cat((self.log_probs, log_probs), dim=1).gather(1, kept)
        lengths = torch.full_like(rows, length)
        self.lengths = torch.cat((self.lengths, lengths), dim=1).gather(1, kept)
        texts = torch.zeros(
            *rows.shape, self.tokens.shape[2], dtype=torch.int64, device=rows.device
        )
        index = rows.unsqueeze(-1).expand(-1, -1, length)
        texts[:, :, : length - 1] = histories.gather(1, index)[:, :, 1:]
        texts[:, :, length - 1] = tokens
        together = torch.cat((self.tokens, texts), dim=1)
        self.tokens = together.gather(1, kept.unsqueeze(-1).expand(-1, -1, texts.shape[2]))

    def hypotheses(self, n: int, end: int) -> list[list[Hypothesis]]:
        """The n best of each sentence; fewer where there are no more."""
        tables = (self.scores, self.log_probs, self.lengths, self.tokens)
        found = []
        for columns in zip(*(table[:, :n].tolist() for table in tables), strict=True):
            mine = []
            for score, log_prob, length, tokens in zip(*columns, strict=True):
                if score == -math.inf:
                    break  # there are no more
                ended = tokens[length - 1] == end
                kept = tokens[: length - 1] if ended else tokens[:length]
                mine.append(Hypothesis(tuple(kept), score, log_prob, ended))
            found.append(mine)
        return found


def longest_translations(sources: list[list[int]], search: Search, model: Transformer) -> Tensor:
    """The most tokens that the translation of each source may have, the end included: (B,)."""
    if search.max_new_tokens:
        limits = [search.max_new_tokens] * len(sources)
    else:
        limits = [2 * len(source) + 10 for source in sources]
    return torch.tensor(limits).clamp(max=model.config.seq_len)


def search_translations(
    loaded: Loaded, sources: list[list[int]], search: Search, way: str = "cached"
) -> list[list[Hypothesis]]:
    """The hypotheses of each source, (token ids with the end), found in one batch.

    Raises ValueError for a source that is longer than the model can read.
    """
    model, device = loaded.model, loaded.model.embedding.weight.device
    tokens = pad(sources, model.config.pad_id).to(device)
    limits = longest_translations(sources, search, model).to(device)
    if search.beam == 1:  # with one hypothesis nothing is left to go on with when it ends
        return greedy_search(model, tokens, loaded.rules, limits, way)
    return beam_search(model, tokens, loaded.rules, limits, search, way)


def encode_sources(loaded: Loaded, texts: list[str], too_long: str) -> list[list[int]]:
    """Token ids of each text with the end. Too long ones are refused, or cut with a word."""
    most, sources = loaded.model.config.seq_len, []
    for number, text in enumerate(texts, 1):
        ids = [*loaded.subwords.encode(" ".join(text.split())), loaded.model.config.end_id]
        if len(ids) > most:
            what = f"sentence {number} has {len(ids)} tokens, the model reads {most}"
            if too_long == "refuse":
                raise UserError(f"{what}: shorten it, or add --too-long cut")
            say(f"{what}: cut")
            ids = [*ids[: most - 1], loaded.model.config.end_id]
        sources.append(ids)
    return sources


def translate(
    loaded: Loaded,
    texts: list[str],
    search: Search,
    n_token: int = 4096,
    progress: Callable[[int], None] = lambda n: None,
    compile: bool = False,
) -> list[list[tuple[str, float]]]:
    """For each text its `nbest` translations with their scores, best first.

    Sentences of like length are searched together, as many as fill n_token tokens. An empty text
    has one translation, the empty one. Raises UserError for a source that is too long, if asked to.
    """
    loaded.model.eval()
    way = "compiled" if compile else "cached"
    sources = encode_sources(loaded, texts, search.too_long)
    found: list = [[("", 0.0)] for _ in texts]
    todo = [i for i in range(len(texts)) if texts[i].strip()]
    todo.sort(key=lambda i: len(sources[i]))
    while todo:
        width = len(sources[todo[-1]])  # longest first: a full memory shows at once
        n = max(1, n_token // (width * search.beam))
        batch, todo = todo[-n:], todo[:-n]
        best = search_translations(loaded, [sources[i] for i in batch], search, way)
        for i, hypotheses in zip(batch, best, strict=True):
            found[i] = [(loaded.subwords.decode(list(h.tokens)), h.score) for h in hypotheses]
        progress(len(batch))
    return found
