"""Fine-tuning: AdamW on the answers, with an adapter or with all weights, resumable to the bit.

`train(config, settings)` is the whole story and returns the log. trainer.py has the step that its
parts are of, loop.py the steps one after another, lora.py the idea.

Key: B rows, T tokens, V vocab_size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import hardware
import judge
import loading
import memory
import text
from checkpoint import Loaded
from data import Pairs
from loop import run_loop
from options import UserError, option, say
from run import RunDirectory, read_json
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with
from variants import AdapterConfig, learning_groups

ON_TRACK = 0.95  # of the answers have the style in every run that the README tells of
BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("news", "news, a .jsonl of prompt and response, texts, or hf:OWNER/NAME")
    steps: int = option(1000, "optimizer steps", least=1)
    batch_size: int = option(16, "rows per step, over all ranks", least=1)
    lr: float = option(1e-2, "highest learning rate; for all weights take 1e-3", above=0)
    lr_ratio: float = option(1.0, "LoRA+: B learns this many times as fast as A", above=0)
    warmup: int = option(20, "steps in which the learning rate rises", least=0)
    weight_decay: float = option(0.0, "AdamW's", least=0)
    full: bool = option(False, "train all weights, without an adapter, to compare")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth (Loshchilov & Hutter 2017, Eq. 5)."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * rise * (0.02 + 0.98 * fall)


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Multiply-adds × 2 to train on one token: a frozen weight takes 4, one that learns takes 6.

    A frozen weight passes gradients on to the layer before, and has none of its own.
    """
    learns, there = memory.trainable(model)
    return model.flops_per_token(seq_len) * (4 + 2 * learns / there) / 6


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log p(target) in nats, over all targets but IGNORE. logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=text.IGNORE, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: nn.Module, batches, n_char: int, dtype: torch.dtype) -> dict[str, float]:
    """Nats per token and per character of all (inputs, targets) in `batches`."""
    device = next(model.parameters()).device
    model.eval()
    nats, n_token = 0.0, 0
    for inputs, targets in batches:
        with hardware.autocast(device, dtype):
            logits = model(inputs.to(device))
        nats += loss_sum(logits, targets.to(device)).item()
        n_token += int((targets != text.IGNORE).sum())
    return {"loss": nats / n_token, "nats_per_char": nats / n_char, "tokens": n_token}


class LoraTrainer(Trainer):
    """What of a training step is this folder's: answers as targets, and which weights learn."""

    unit = "tokens"

    def __init__(self, config: TrainConfig, model: nn.Module, parts: dict[str, Pairs], dtype):
        super().__init__(config, model, list(model.blocks), dtype)
        self.pairs, self.tied = parts, model.config.tie_embeddings
        self.flops_per_unit = flops_per_token(model, 64)
        self.loss_sum = torch.compile(loss_sum) if config.compile else loss_sum

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = [g for g in learning_groups(model, self.config.lr_ratio) if g["params"]]
        decay = self.config.weight_decay
        return torch.optim.AdamW(
            groups, lr=self.config.lr, betas=BETAS, weight_decay=decay, fused=True
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        return self.pairs["train"].training_rows(step, self.config.batch_size, self.config.seed)

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        return rows[0].numel()

    def batch_loss(self, forward: Callable, inputs: Tensor, targets: Tensor) -> tuple:
        return self.loss_sum(forward(inputs), targets), (targets != text.IGNORE).sum(), {}

    def score(self, part: str = "valid") -> dict[str, float]:
        pairs = self.pairs[part]
        return evaluate(self.scored, pairs.batches(64), pairs.n_char, self.dtype)

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe(self.config.data, score, part)

    def weights(self) -> dict[str, Tensor]:
        """The adapter alone, or with `full` all weights but a tied head."""
        weights = super().weights()
        if not self.config.full:
            return {name: x for name, x in weights.items() if ".adapters." in name}
        return {n: x for n, x in weights.items() if not (self.tied and n == "head.weight")}


def describe(source: str, score: dict, part: str) -> str:
    """A score in words, beside the floor where one is known."""
    said, floor = f"{score['nats_per_char']:.4f} nats per character", data.floor(source, part)
    return said if floor is None else f"{said} = {score['nats_per_char'] / floor:.3f} × the floor"


def begin(
    config: TrainConfig, settings: AdapterConfig, base: Loaded, run_dir: RunDirectory, known: str
) -> None:
    """Check all that can be wrong, then put the tokenizer and the tokens into a new run.

    known: the fingerprint of the base.
    """
    run_dir.refuse_what_is_not_ours(config.data)
    seq_len = base.model.config.seq_len
    parts = {
        part: data.encode_part(pairs, base.tokenizer, seq_len, config.data)
        for part, pairs in data.read_parts(config.data).items()
    }

    def fill(folder: Path) -> None:
        base.tokenizer.save(folder)
        data.write_pairs(parts, folder)

    run_dir.create(facts(config, settings, base=known), fill)


def check_memory(config: TrainConfig, base: Loaded) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    sizes, rows = base.model.config, config.micro_batch_size or config.batch_size
    needed = (16 if config.full else 5) * sizes.n_parameter
    needed += 8 * rows * sizes.seq_len * sizes.vocab_size  # logits and their gradient
    needed += 40 * config.batch_size * sizes.seq_len  # the ids of a batch
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def build(config: TrainConfig, settings: AdapterConfig, base: Loaded) -> nn.Module:
    """The base with what is to be learned."""
    if not config.full:
        loading.attach(base.model, settings)
    return base.model


def expectations(config: TrainConfig, parts: dict[str, Pairs], model: nn.Module) -> None:
    """Print the data, what learns, and the numbers to expect."""
    train, (learns, there) = parts["train"], memory.trainable(model)
    epochs = config.steps * config.batch_size / len(train.bounds)
    uses = zip(("train on", "choose the best", "test"), parts.values(), strict=True)
    rows = ", ".join(f"{len(part.bounds):,} to {use}" for use, part in uses)
    say(f"data       rows: {rows}; {epochs:.1f} epochs")
    say(f"learns     {learns:,} of {there:,} parameters, {learns / there:.2%}")
    say(f"memory     {memory.in_words(memory.planned(model))}")
    if floor := data.floor(config.data, "test"):
        say(f"expect     at the very best {floor:.4f} nats per character, the grammar's entropy")


def conclude(trainer: LoraTrainer, settings: AdapterConfig, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config = trainer.config
    loaded = loading.load_run(run_dir.path)
    loaded.model.to(trainer.device)
    score = test_score(loaded, config.data, trainer.pairs["test"], trainer.dtype)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {describe(config.data, score, 'test')}")
    if "style" not in score:
        return
    say(f"answers    {score['style']:.1%} have the style, {score['asked']:.1%} do as asked")
    if "stories" in score:
        say(f"forgetting the base's stories cost {score['stories']:.3f} × their floor")
    if as_described(config, settings, (TrainConfig(), AdapterConfig())):
        word = "on track" if score["style"] >= ON_TRACK else "off track"
        say(f"{word}: {score['style']:.1%} have the style, the README promises ≥ {ON_TRACK:.0%}")


def test_score(loaded: Loaded, source: str, pairs: Pairs, dtype: torch.dtype) -> dict:
    """Loss on the test part; for the news also style, obedience, and loss on old stories."""
    score = evaluate(loaded.model, pairs.batches(64), pairs.n_char, dtype)
    if data.floor(source, "test"):
        score |= judge.judge(loaded, data.read_parts(source)["test"])
        if knows_the_stories(loaded):
            score["stories"] = stories_score(loaded, dtype)
    return score


def knows_the_stories(loaded: Loaded) -> bool:
    """Does the model read the tokens of the shipped base, whose stories it may have learned?"""
    ours, n_token = loading.load_base("").tokenizer, loaded.model.config.vocab_size
    same = loaded.tokenizer.encode("One day") == ours.encode("One day")
    return same and ours.vocab_size <= n_token


def stories_score(loaded: Loaded, dtype: torch.dtype) -> float:
    """Loss on unseen stories of the base's own kind, × their floor: 1.02 before any fine-tuning."""
    tokens = data.story_tokens(loaded.tokenizer)
    rows = tokens.evaluation_rows(64, loaded.model.config.seq_len)
    score = evaluate(loaded.model, rows, tokens.n_char, dtype)
    return score["nats_per_char"] / data.floor("news", "stories")


def resumed_base(config: TrainConfig) -> Loaded:
    """The base of the run in `config.out`, which may have moved to `config.weights`."""
    known = read_json(Path(config.out) / "config.json").get("base", "")
    return loading.base_of(Path(config.out), config.weights, "" if config.full else known)


def started_from(config: TrainConfig, settings: AdapterConfig) -> tuple:
    """(config, settings, base, the run whose adapter is trained on, or None) of --weights.

    UserError for a run with another adapter than is asked for.
    """
    folder = Path(config.weights) if config.weights else None
    if folder is None or not folder.is_dir() or not loading.is_ours(folder):
        return config, settings, loading.load_base(config.weights), None
    former = loading.read_run(folder)
    if former.full:
        raise UserError(
            f"--weights {folder} trained all weights: --export it, and take that folder"
        )
    if settings not in (AdapterConfig(), former.settings):
        raise UserError(f"--weights {folder} brings its own adapter: leave its settings out")
    config = replace(config, weights=former.base)
    base = loading.base_of(folder, former.base, former.fingerprint)
    return config, former.settings, base, former


def train(config: TrainConfig, settings: AdapterConfig, resume: bool = False) -> list[dict]:
    """Fine-tune, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    Raises UserError for data, settings or files that will not do and for a loss that is not finite.
    """
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = hardware.choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    run_dir = RunDirectory(config.out)
    with hardware.ranks(device), run_dir.writing():
        if resume:
            base, former = resumed_base(config), None
        else:
            config, settings, base, former = started_from(config, settings)
        check_memory(config, base)
        model, known = base.model, loading.fingerprint(base.model)
        hardware.seed_everything(config.seed)
        model = build(config, settings, base).to(device)
        if former:
            loading.fill(model, former)
        if run_dir.writes and resume:
            run_dir.save_config(facts(config, settings, base=known))
        elif run_dir.writes:
            begin(config, settings, base, run_dir, known)
        hardware.barrier()
        started_with(run_dir.path, TrainConfig, AdapterConfig)
        parts = data.load_pairs(run_dir.path, base.tokenizer.vocab_size)
        trainer = LoraTrainer(config, model, parts, dtype)
        announce(config, settings, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(config, parts, model)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, settings, run_dir)
        return run_dir.history()


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
