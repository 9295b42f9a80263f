"""Writing two tokens in a step: a module guesses one more, the model checks it.

    the model says of the last token    ─▶ next token t    (drawn from its distribution: certain)
    module 1 is given that and t        ─▶ guess d         (drawn from the module's, q)
    the model reads [t, d] at once      ─▶ p after t, and what comes after d, if d stands

Reading two tokens takes hardly longer than one, since most of the time goes into fetching weights
and cache. The guess is accepted with probability min(1, p(d) / q(d)); if it is refused, the token
is drawn from max(p − q, 0), made to sum to 1. What is written is then distributed as if each token
had been drawn from p, whatever q is: a token d comes with probability

    q(d)·min(1, p(d)/q(d))  +  (1 − Σ min(p, q)) · max(p(d) − q(d), 0) / Σ max(p − q, 0)
    =  min(p(d), q(d))      +  max(p(d) − q(d), 0)                                         =  p(d).

A bad guess costs time, never quality. With temperature 0 the text is the greedy one.

    Leviathan et al. 2023, arXiv:2211.17192, Algorithm 1 and appendix A.1
    with modules of the model itself: DeepSeek-V3, arXiv:2412.19437, §5.4.3

Key: V vocab_size, D d_model. One text at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from generate import CHUNK, Sampling, probabilities
from mtp import DeepseekMTP


@dataclass
class Tally:
    """How many guesses were made, and how many of them stood."""

    guessed: int = 0
    accepted: int = 0

    @property
    def rate(self) -> float:
        """Share of the guesses that stood; 0 without any."""
        return self.accepted / max(1, self.guessed)


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from, (V,) float64; with temperature 0 all on the likeliest."""
    if sampling.temperature == 0:
        certain = torch.zeros(logits.shape[-1], dtype=torch.float64)
        certain[logits.argmax()] = 1.0
        return certain
    return probabilities(logits.cpu()[None], sampling)[0]


def draw(p: Tensor, dice: torch.Generator) -> int:
    """A token from p (V,): the first one with more than a random share of the mass before it."""
    reached = p.cumsum(dim=0)
    u = torch.rand((), dtype=torch.float64, generator=dice) * reached[-1]
    return min(int((reached <= u).sum()), int(p.nonzero()[-1]))


def verdict(p: Tensor, q: Tensor, guess: int, dice: torch.Generator) -> tuple[bool, int]:
    """(does the guess stand, the token that is written instead of it or itself).

    p, q: (V,), distributions of model and module. guess: a token drawn from q.
    """
    if torch.rand((), dtype=torch.float64, generator=dice) * q[guess] < p[guess]:
        return True, guess
    return False, draw((p - q).clamp(min=0), dice)


def read(model: DeepseekMTP, tokens: list[int], cache) -> Tensor:
    """Features of tokens that go on from the cache, (1, T, D), in chunks."""
    device = model.embedding.weight.device
    parts = torch.tensor([tokens], device=device).split(CHUNK, dim=1)
    return torch.cat([model.features(part, cache) for part in parts], dim=1)


class Writer:
    """One text in the writing: the caches, and where module and model stand."""

    def __init__(self, model: DeepseekMTP, prompt: list[int], n_slot: int, sampling: Sampling):
        """Reads the prompt. n_slot: the most tokens, prompt and all."""
        self.model, self.sampling = model, sampling
        self.cache, self.ahead = model.new_cache(1, n_slot), model.new_ahead_cache(1, n_slot)
        self.features = read(model, prompt, self.cache)  # of tokens that the module has not met
        self.following = prompt[1:]  # the tokens after these, but for the newest

    def first(self, dice: torch.Generator) -> int:
        """The token after the prompt. It is written, but not read yet."""
        self.newest = draw(self.distribution(self.features[0, -1]), dice)
        return self.newest

    def distribution(self, features: Tensor) -> Tensor:
        """What a token is drawn from, (V,), by features (D,) of model or module."""
        return distribution(self.model.head(features), self.sampling)

    def guess(self) -> Tensor:
        """The module's distribution of the token after the newest, (V,)."""
        following = torch.tensor([[*self.following, self.newest]], device=self.features.device)
        hint = self.model.look_ahead(self.features, following, self.ahead)[0]
        return self.distribution(hint[0, -1])

    def step(self, dice: torch.Generator, tally: Tally) -> list[int]:
        """One pass of the model. Returns the tokens that it makes certain, one or two."""
        q = self.guess()
        guess = draw(q, dice)
        features = read(self.model, [self.newest, guess], self.cache)  # (1, 2, D)
        stands, token = verdict(self.distribution(features[0, 0]), q, guess, dice)
        tally.guessed, tally.accepted = tally.guessed + 1, tally.accepted + stands
        if not stands:
            self.cache.length -= 1  # the guess was never read
            self.features, self.following, self.newest = features[:, :1], [], token
            return [token]
        self.features, self.following = features, [guess]
        self.newest = draw(self.distribution(features[0, 1]), dice)
        return [guess, self.newest]


@torch.inference_mode()
def speculate(
    model: DeepseekMTP,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: tuple[int, ...] = (),
    seed: int = 0,
    tally: Tally | None = None,
) -> Iterator[int]:
    """Yield new tokens, as `generate.generate` does for one row; count guesses in `tally`.

    Ends before one of stop_ids, after max_new_tokens, or where the context is full.
    Raises ValueError for an empty prompt, one that fills the context, and a model without modules.
    """
    room = model.config.seq_len - len(prompt)
    if not model.config.n_ahead:
        raise ValueError("the model has no module that looks ahead: train one with --n-ahead 1")
    if not prompt or room < 1:
        raise ValueError(f"prompt of {len(prompt)} tokens, context of {model.config.seq_len}")
    n_new, dice = min(max_new_tokens, room), torch.Generator().manual_seed(seed)
    writer = Writer(model.eval(), prompt, len(prompt) + n_new, sampling or Sampling())
    certain, tally = [writer.first(dice)], tally if tally is not None else Tally()
    for _ in range(n_new):
        certain = certain or writer.step(dice, tally)
        token = certain.pop(0)
        if token in stop_ids:
            return
        yield token
