"""Training: AdamW on the next token, resumable to the bit, on any number of ranks.

`train(config, sizes)` is the whole story and returns the log. What is Llama's stands here: the
options, the schedule of the learning rate, which parameters decay, the loss of a batch, and how a
score reads. trainer.py has the step that these are parts of, loop.py the steps one after another.

Key: B rows, T seq_len, V vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import hardware
import text
from loop import run_loop
from model import PRESETS, Llama, LlamaConfig, RMSNorm
from options import UserError, option, say
from run import RunDirectory
from text import Tokens
from tokenizer import KINDS, load_tokenizer, train_tokenizer
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with

ON_TRACK = 1.04  # × the entropy of the stories: what the default run must reach
BETAS = (0.9, 0.99)  # 0.95, often used, averages over too few steps for batches of 12 stories


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("stories", "stories, a text file, a folder of them, or hf:OWNER/NAME")
    steps: int = option(1100, "optimizer steps", least=1)
    batch_size: int = option(12, "rows per step, over all ranks", least=1)
    lr: float = option(3e-3, "highest learning rate", above=0)
    tokenizer: str = option("sentencepiece", "kind to train on the data", KINDS)
    warmup: int = option(60, "steps in which the learning rate rises", least=0)
    weight_decay: float = option(
        0.1, "AdamW's, of matrices; norms and embeddings have none", least=0
    )


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth (Loshchilov & Hutter 2017, Eq. 5)."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * rise * (0.02 + 0.98 * fall)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay; gains of norms, biases and embeddings do not.

    A tied head is the embedding itself.
    """
    kept = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | RMSNorm)]
    kept += [p for name, p in model.named_parameters() if name.endswith("bias")]
    kept_ids = {id(p) for p in kept}
    decayed = [p for p in model.parameters() if id(p) not in kept_ids]
    return [
        {"params": [p for p in decayed if p.requires_grad], "weight_decay": weight_decay},
        {"params": [p for p in kept if p.requires_grad], "weight_decay": 0.0},
    ]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log p(target) in nats, over all targets but IGNORE. logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=text.IGNORE, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: nn.Module, tokens: Tokens, seq_len: int, dtype: torch.dtype) -> dict:
    """Score all of `tokens`. Returns nats per token and per character, and how many of each."""
    device = next(model.parameters()).device
    model.eval()
    nats = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32)
    n_token = 0
    for inputs, targets in tokens.evaluation_rows(64, seq_len):
        with hardware.autocast(device, dtype):
            logits = model(inputs.to(device))
        nats += loss_sum(logits, targets.to(device)).cpu()
        n_token += int((targets != text.IGNORE).sum())
    nats = nats.item()
    return {
        "loss": nats / n_token,
        "nats_per_char": nats / tokens.n_char,
        "tokens": n_token,
        "chars": tokens.n_char,
    }


class LlamaTrainer(Trainer):
    """What of a training step is Llama's: rows of text, and the loss of the next token."""

    unit = "tokens"

    def __init__(self, config: TrainConfig, model: Llama, parts: dict[str, Tokens], dtype):
        super().__init__(config, model, list(model.blocks), dtype)
        self.sizes, self.tokens = model.config, parts
        self.flops_per_unit = model.flops_per_token(model.config.seq_len)
        self.loss_sum = torch.compile(loss_sum) if config.compile else loss_sum

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = decay_groups(model, self.config.weight_decay)
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=BETAS, fused=True)

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """One tensor of rows, (B, T + 1): inputs and, shifted by one, targets."""
        config, train = self.config, self.tokens["train"]
        return (train.training_rows(step, config.batch_size, self.sizes.seq_len, config.seed),)

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        return rows[0][:, 1:].numel()

    def batch_loss(self, forward: Callable, rows: Tensor) -> tuple[Tensor, Tensor, dict]:
        targets = rows[:, 1:]
        return self.loss_sum(forward(rows[:, :-1]), targets), (targets != text.IGNORE).sum(), {}

    def score(self, part: str = "valid") -> dict[str, float]:
        return evaluate(self.scored, self.tokens[part], self.sizes.seq_len, self.dtype)

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe(self.config.data, score, part)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        if self.sizes.tie_embeddings:
            weights.pop("head.weight", None)  # it is the embedding; ranks but the first have none
        return weights


def describe(source: str, score: dict, part: str) -> str:
    """A score in words, beside the floor where one is known."""
    said, floor = f"{score['nats_per_char']:.4f} nats per character", data.floor(source, part)
    return said if floor is None else f"{said} = {score['nats_per_char'] / floor:.3f} × the floor"


def sizes_of(loaded: checkpoint.Loaded, asked: dict, where: str) -> LlamaConfig:
    """The sizes of loaded weights with what is `asked` of them: nothing but a shorter context.

    UserError for anything else, and for a context that is longer than theirs.
    """
    there = loaded.model.config
    for name, value in asked.items():
        fits = value <= there.seq_len if name == "seq_len" else value == getattr(there, name)
        if not fits:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: the model in {where} has {getattr(there, name)}")
    return replace(there, **asked)


def begin(config: TrainConfig, sizes: LlamaConfig, loaded, run_dir: RunDirectory) -> None:
    """Check all that can be wrong, then put the tokenizer and the tokens into a new run.

    loaded: the model of --weights, or None.
    """
    run_dir.refuse_what_is_not_ours(config.data)
    source = data.measure(config.data)
    if loaded:
        tokenizer = loaded.tokenizer
    else:
        tokenizer = train_tokenizer(config.tokenizer, source.training_lines(), sizes.vocab_size)
        sizes = replace(sizes, vocab_size=tokenizer.vocab_size)
    check_memory(config, sizes)

    def fill(folder: Path) -> None:
        tokenizer.save(folder)
        text.write_tokens(source, tokenizer, sizes.seq_len, folder)

    run_dir.create(facts(config, sizes), fill)


def check_memory(config: TrainConfig, sizes: LlamaConfig) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    needed = 16 * sizes.n_parameter  # weights, gradient and two moments, four bytes each
    rows = config.micro_batch_size or config.batch_size
    needed += 8 * rows * sizes.seq_len * sizes.vocab_size  # logits and their gradient
    needed += 40 * config.batch_size * sizes.seq_len  # the ids of a batch
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def build(sizes: LlamaConfig, loaded: checkpoint.Loaded | None) -> Llama:
    """The model to train: with new weights, or with loaded ones and the context of `sizes`."""
    model = loaded.model if loaded else Llama(sizes)
    model.config = sizes
    return model


def expectations(config: TrainConfig, sizes: LlamaConfig, parts: dict[str, Tokens]) -> None:
    """Print the data, and the numbers to expect of it."""
    train = parts["train"]
    epochs = config.steps * config.batch_size * sizes.seq_len / len(train.ids)
    held = f"{parts['valid'].n_char:,} to choose the best, {parts['test'].n_char:,} to test"
    say(f"data       {train.n_char:,} characters = {len(train.ids):,} tokens to train on, {held}; "
        f"{epochs:.1f} epochs")  # fmt: skip
    if not config.weights:
        say(f"expect     loss ln V + ½ = {math.log(sizes.vocab_size) + 0.5:.2f} nats at step 0")
    if floor := data.floor(config.data, "test"):
        say(
            f"           and at the very best {floor:.4f} nats per character, the grammar's entropy"
        )


def conclude(trainer: LlamaTrainer, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config, model = trainer.config, checkpoint.load(run_dir.path).model.to(trainer.device)
    score = evaluate(model, trainer.tokens["test"], trainer.sizes.seq_len, trainer.dtype)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {describe(config.data, score, 'test')}")
    floor, shipped = data.floor(config.data, "test"), (TrainConfig(), shipped_sizes(trainer.sizes))
    if floor and as_described(config, trainer.sizes, shipped):
        ratio = score["nats_per_char"] / floor
        word = "on track" if ratio <= ON_TRACK else "off track"
        say(f"{word}: {ratio:.3f} × the floor, the README promises ≤ {ON_TRACK:.2f}")


def shipped_sizes(sizes: LlamaConfig) -> LlamaConfig:
    """The default sizes, with the vocabulary that the tokenizer really got."""
    return replace(PRESETS["tiny"], vocab_size=sizes.vocab_size)


def train(
    config: TrainConfig,
    sizes: LlamaConfig,
    resume: bool = False,
    loaded: checkpoint.Loaded | None = None,
) -> list[dict]:
    """Train, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    loaded: the model in `config.weights`, where it is at hand already.
    Raises UserError for data, sizes or files that will not do and for a loss that is not finite.
    """
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = hardware.choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    run_dir = RunDirectory(config.out)
    with hardware.ranks(device), run_dir.writing():
        at_start = not (resume and run_dir.checkpoint.exists())
        if config.weights and at_start and not loaded:
            loaded = checkpoint.load(config.weights)
        if run_dir.writes and resume:
            _, sizes = started_with(run_dir.path, TrainConfig, LlamaConfig)
            check_memory(config, sizes)
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            begin(config, sizes, loaded, run_dir)
        hardware.barrier()
        _, sizes = started_with(run_dir.path, TrainConfig, LlamaConfig)
        parts = text.load_tokens(run_dir.path, load_tokenizer(run_dir.path))
        parts["train"].refuse_too_short(sizes.seq_len)
        hardware.seed_everything(config.seed)
        model = build(sizes, loaded).to(device)
        trainer = LlamaTrainer(config, model, parts, dtype)
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(config, sizes, parts)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, run_dir)
        return run_dir.history()


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
