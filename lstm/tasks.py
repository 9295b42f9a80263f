"""The four tasks: what a batch is, what its loss is, and what a score means.

    lm         the next token of a text, in rows that go on where they stopped
    sentiment  the label of a text
    adding     the sum of two marked numbers among many
    copy       ten symbols, to be repeated after a long silence

trainer.py has the step that these are parts of. Key: B rows, T seq_len, V vocab_size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import hardware
from reviews import FILLING, UNKNOWN, Reviews
from text import IGNORE, Tokens
from trainer import Trainer

N_VALID, N_TEST, N_AT_ONCE = 500, 2000, 250  # rows that adding and copy are scored on
SHORTEST = 1 / 50  # of seq_len, where rows begin to grow


def learning_rate(step: int, config) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth (Loshchilov & Hutter 2017, Eq. 5)."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * rise * (0.02 + 0.98 * fall)


def cross_entropy_sum(answers: Tensor, targets: Tensor) -> Tensor:
    """Σ −ln p(target) in nats. answers (…, V), targets (…); targets IGNORE do not count."""
    return F.cross_entropy(
        answers.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


class SequenceTrainer(Trainer):
    """What the tasks share: AdamW, and decay of matrices alone."""

    def __init__(self, config, model: nn.Module, dtype: torch.dtype):
        self.sizes = model.config
        self.flops_per_unit = 6 * (self.sizes.n_recurrent + self.sizes.d_out * self.sizes.n_answer)
        super().__init__(config, model, list(model.layers), dtype)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        decayed = [p for name, p in model.named_parameters() if "w_" in name]
        kept = [p for name, p in model.named_parameters() if "w_" not in name]
        groups = [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]
        decay = self.config.weight_decay
        return torch.optim.AdamW(groups, self.config.lr, (0.9, 0.99), weight_decay=decay)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config)

    def test_score(self, model: nn.Module) -> dict:
        """The numbers of the test part, with the weights `model`."""
        raise NotImplementedError


# ── Language model ────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def evaluate_text(model: nn.Module, tokens: Tokens, dtype: torch.dtype) -> dict:
    """Score all of `tokens`, with a state of its own. Returns nats per token and per character."""
    device = next(model.parameters()).device
    model.eval()
    nats, state = torch.zeros((), dtype=torch.float64), None
    rows = data.scoring_rows(tokens)
    for inputs, targets in data.chunks(*rows):
        with hardware.autocast(device, dtype):
            logits, state = model(inputs.to(device), state)
        nats += cross_entropy_sum(logits, targets.to(device)).cpu()
    n_token, nats = int((rows[1] != IGNORE).sum()), nats.item()
    return {
        "loss": nats / n_token,
        "nats_per_char": nats / tokens.n_char,
        "tokens": n_token,
        "chars": tokens.n_char,
    }


class LanguageTrainer(SequenceTrainer):
    """Truncated backpropagation through time with a carried state.

    The gradient reaches back to the beginning of a step's T tokens, and no further (truncated). The
    state reaches on: what a row ends with is what it begins the next step with (carried), as long
    as the text goes on. It is kept as a buffer of the model, so that a checkpoint has it.
    """

    unit = "tokens"

    def __init__(self, config, model: nn.Module, dtype: torch.dtype, parts: dict[str, Tokens]):
        self.tokens = parts
        self.stream = data.Stream(parts["train"].ids, config.batch_size, config.seq_len)
        self.carried = model.start(config.batch_size)  # each (L, B, ·)
        for number, part in enumerate(self.carried):
            model.register_buffer(f"carried_{number}", part)
        super().__init__(config, model, dtype)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.stream.batch(step, self.config.seed)

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        return rows[0][:, 1:].numel()

    def batch_loss(
        self, forward: Callable, rows: Tensor, numbers: Tensor, begins: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        """rows (B, T + 1); numbers (B,): which rows of the stream they are; begins (B,)."""
        fresh = begins if self.config.carry else torch.ones_like(begins)
        state = tuple(part[:, numbers].masked_fill(fresh[:, None], 0) for part in self.carried)
        logits, state = forward(rows[:, :-1], state)
        with torch.no_grad():  # what is kept is numbers: no gradient goes back across the border
            for part, new in zip(self.carried, state, strict=True):
                part.index_copy_(1, numbers, new.detach().to(part.dtype))
        targets = rows[:, 1:]
        return cross_entropy_sum(logits, targets), torch.tensor(targets.numel()), {}

    def step(self, number: int) -> dict[str, float]:
        """A step of all ranks; after it every rank knows the state of every row."""
        numbers = super().step(number)
        if hardware.world() > 1:
            for part in self.carried:
                mine = torch.zeros_like(part)
                share = slice(hardware.rank(), None, hardware.world())
                mine[:, share] = part[:, share]
                part.copy_(hardware.sum_over_ranks(mine))
        return numbers

    def score(self) -> dict[str, float]:
        return evaluate_text(self.scored, self.tokens["valid"], self.dtype)

    def test_score(self, model: nn.Module) -> dict:
        return evaluate_text(model, self.tokens["test"], self.dtype)

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe_text(self.config.data, score, part)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        tied = ["head.weight"] if self.sizes.tie_embeddings else []
        names = [name for name in weights if name.startswith("carried_")]
        return {name: w for name, w in weights.items() if name not in (*names, *tied)}


def describe_text(source: str, score: dict, part: str) -> str:
    """A score in words, beside the floor where one is known."""
    said, floor = f"{score['nats_per_char']:.4f} nats per character", data.floor(source, part)
    return said if floor is None else f"{said} = {score['nats_per_char'] / floor:.3f} × the floor"


# ── Sentiment ─────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def evaluate_reviews(model: nn.Module, part: Reviews, dtype: torch.dtype) -> dict:
    """Loss and accuracy of one part and, where P(label 1) is known, the accuracy to expect.

    `expected` is what the same answers would score on the average over the dice that threw the
    labels: the mean of P(label = answer). It is comparable with `bayes` without their luck.
    """
    device = next(model.parameters()).device
    model.eval()
    loss, right, expected = 0.0, 0, 0.0
    for which in torch.arange(len(part)).split(500):
        ids, lengths, labels = (one.to(device) for one in part.rows(which.numpy()))
        with hardware.autocast(device, dtype):
            answers, _ = model(ids, None, lengths)
        loss += cross_entropy_sum(answers, labels).item()
        guess = answers.argmax(dim=-1)
        right += (guess == labels).sum().item()
        p = torch.from_numpy(part.p[which.numpy()])
        expected += torch.where(guess.cpu() == 1, p, 1 - p).sum().item()
    score = {"loss": loss / len(part), "accuracy": right / len(part), "texts": len(part)}
    if part.bayes is not None:
        score |= {"expected": expected / len(part), "bayes": part.bayes}
    return score


class ReviewTrainer(SequenceTrainer):
    """A label for each text."""

    unit = "words"

    def __init__(self, config, model: nn.Module, dtype: torch.dtype, parts: dict[str, Reviews]):
        self.reviews = parts
        super().__init__(config, model, dtype)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Ids (B, T), lengths (B,), labels (B,); some words are made unknown, if so asked."""
        config = self.config
        ids, *rest = self.reviews["train"].training_rows(step, config.batch_size, config.seed)
        if config.word_drop:
            dice = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            dropped = torch.rand(ids.shape, generator=dice) < config.word_drop
            ids = ids.masked_fill(dropped & (ids != FILLING), UNKNOWN)
        return ids, *rest

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        return int(rows[1].sum())

    def batch_loss(
        self, forward: Callable, ids: Tensor, lengths: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        answers, _ = forward(ids, None, lengths)
        right = (answers.argmax(dim=-1) == labels).sum()
        return cross_entropy_sum(answers, labels), torch.tensor(len(labels)), {"accuracy": right}

    def score(self) -> dict[str, float]:
        return evaluate_reviews(self.scored, self.reviews["valid"], self.dtype)

    def test_score(self, model: nn.Module) -> dict:
        return evaluate_reviews(model, self.reviews["test"], self.dtype)

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe_reviews(score)


def describe_reviews(score: dict) -> str:
    """A score in words."""
    said = f"{score['accuracy']:.2%} right, loss {score['loss']:.4f}"
    if "bayes" in score:
        said += f"; {score['expected']:.2%} to expect, best possible {score['bayes']:.2%}"
    return said


# ── Adding and copy ───────────────────────────────────────────────────────────────────────────────


class DiceTrainer(SequenceTrainer):
    """Adding and copy: rows that are thrown anew for every step.

    grow: the share of the steps in which the rows grow from a fiftieth of seq_len to all of it, by
    the same factor at each step (a curriculum). Scores are always of the full length.
    """

    def batch(self, step: int) -> tuple[Tensor, ...]:
        seed = self.config.seed * 1_000_003 + step
        return self.rows(self.config.batch_size, self.length(step), seed)

    def length(self, step: int) -> int:
        """How long the rows of a step are."""
        last = self.config.grow * self.config.steps
        left = max(0.0, 1 - step / last) if last else 0.0
        return max(2, round(self.config.seq_len * SHORTEST**left))

    def rows(self, n_row: int, seq_len: int, seed: int) -> tuple[Tensor, Tensor]:
        """Inputs and answers from the dice `seed`."""
        make = data.adding if self.config.task == "adding" else data.copying
        return make(n_row, seq_len, torch.Generator().manual_seed(seed))

    def batch_loss(
        self, forward: Callable, inputs: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        answers, _ = forward(inputs)
        if self.config.task == "adding":
            return (answers[:, 0].float() - targets).square().sum(), torch.tensor(len(targets)), {}
        return cross_entropy_sum(answers, targets), torch.tensor(targets.numel()), {}

    def score(self) -> dict[str, float]:
        return self.score_of(self.scored, N_VALID, 2**62)

    def test_score(self, model: nn.Module) -> dict:
        return self.score_of(model, N_TEST, 2**62 + 10**6)

    @torch.no_grad()
    def score_of(self, model: nn.Module, n_row: int, seed: int) -> dict:
        """The loss on rows of full length from other dice than those of training."""
        model.eval()
        total = count = 0
        for i in range(n_row // N_AT_ONCE):
            rows = self.rows(N_AT_ONCE, self.config.seq_len, seed + i)
            with hardware.autocast(self.device, self.dtype):
                loss, n, _ = self.batch_loss(model, *(one.to(self.device) for one in rows))
            total, count = total + loss.item(), count + n.item()
        trivial = data.trivial(self.config.task, self.config.seq_len)
        return {"loss": total / count, "trivial": trivial}

    def describe(self, score: dict, part: str = "valid") -> str:
        return f"loss {score['loss']:.5f}; who remembers nothing has {score['trivial']:.5f}"
