"""Training: AdamW on the next token and the one after, with balanced experts.

`train(config, sizes)` is the whole story and returns the log. What is DeepSeek's stands in
`DeepseekTrainer`: the loss of the modules that look ahead, the biases that balance the experts, and
the check that naive, cached and absorbed attention are one. trainer.py has the step that these are
parts of, loop.py the steps one after another.

Key: B rows, T seq_len, V vocab_size, N tokens, L layers with experts, E n_expert.
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
import moe
import text
from forms import largest_difference
from loop import run_loop
from model import PRESETS, DeepseekConfig, RMSNorm
from moe import SigmoidRouter
from mtp import DeepseekMTP
from options import UserError, option, say
from run import RunDirectory
from text import Tokens
from tokenizer import KINDS, Tokenizer, load_tokenizer, train_tokenizer
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with

ON_TRACK = 1.25  # × the entropy of the texts: what the default run must reach
SAME = 1e-10  # how far apart naive, cached and absorbed may be in float64
LEVEL = 0.5  # of the steps, in which the learning rate does not fall
CHECKED = 48  # tokens of the row on which that is checked
BALANCE = ("bias", "loss", "none")
BETAS = (0.9, 0.99)  # 0.95, often used, averages over too few steps for small batches


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("recall", "recall, a text file, a folder of them, or hf:OWNER/NAME")
    steps: int = option(1050, "optimizer steps", least=1)
    batch_size: int = option(6, "rows per step, over all ranks", least=1)
    lr: float = option(3e-3, "highest learning rate", above=0)
    tokenizer: str = option("sentencepiece", "kind to train on the data", KINDS)
    warmup: int = option(60, "steps in which the learning rate rises", least=0)
    weight_decay: float = option(
        0.1, "AdamW's, of matrices; norms and embeddings have none", least=0
    )
    ahead_weight: float = option(0.3, "of the loss of the modules that look ahead", least=0)
    balance: str = option("bias", "what keeps the experts equally busy, see the README", BALANCE)
    bias_speed: float = option(0.003, "--balance bias: how far a bias moves in a step", least=0)
    sequence_weight: float = option(1e-4, "--balance bias: of the loss of each row", least=0)
    balance_weight: float = option(0.01, "--balance loss: of the same loss, alone", least=0)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then level, then over the second half a cosine down to a fiftieth.

    As DeepSeek-V3 was trained (arXiv:2412.19437, §4.2): a level rate leaves time for attention to
    learn to look back, which comes late and all of a sudden.
    """
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fallen = max(0.0, step / config.steps - LEVEL) / (1 - LEVEL)
    return config.lr * rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fallen)))


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
def evaluate(
    model: nn.Module, tokens: Tokens, answers: Tokens, seq_len: int, dtype: torch.dtype
) -> dict:
    """Score all of `tokens`. Returns nats per token and per character, how many of each, how uneven
    the experts' work is in each layer, how often the first module that looks ahead would say what
    the model says (`accepted`), and the share of right answers (`recall`), where there are any.
    answers: which tokens are answers, see `data.answers`.
    """
    device, n_ahead = next(model.parameters()).device, model_of(model).config.n_ahead
    model.eval()
    sums, load = torch.zeros(6, dtype=torch.float64), 0
    rows = zip(
        tokens.evaluation_rows(64, seq_len), answers.evaluation_rows(64, seq_len), strict=True
    )
    for (inputs, targets), (_, is_answer) in rows:
        counted = targets != text.IGNORE
        following = targets.where(counted, 0).to(device)
        with hardware.autocast(device, dtype), moe.recording(model) as record:
            logits = model(inputs.to(device), following=following)
        said = [one.argmax(dim=-1).cpu() for one in logits]
        right = (said[0] == targets) & (is_answer == 1)
        pairs, same = counted[:, 1:], torch.zeros(())
        if n_ahead:
            same = ((said[1][:, :-1] == said[0][:, 1:]) & pairs).sum()
        nats = loss_sum(logits[0], targets.to(device)).cpu()
        counts = (counted.sum(), (is_answer == 1).sum(), right.sum(), pairs.sum(), same)
        sums += torch.stack([nats.double(), *(count.double() for count in counts)])
        load = load + loads(record, counted.to(device)).cpu()
    return scored(sums.tolist(), load, tokens.n_char, n_ahead)


def scored(sums: list[float], load: Tensor, n_char: int, n_ahead: int) -> dict:
    """The sums of `evaluate` as numbers for the log."""
    nats, n_token, n_answer, n_right, n_pair, n_same = sums
    score = {
        "loss": nats / n_token,
        "nats_per_char": nats / n_char,
        "tokens": int(n_token),
        "chars": n_char,
        "violation": moe.max_violation(load).tolist(),
    }
    if n_ahead:
        score["accepted"] = n_same / max(1, n_pair)
    return score | ({"recall": n_right / n_answer} if n_answer else {})


def loads(record: list, counted: Tensor) -> Tensor:
    """How many of the counted tokens (B, T) each expert of each layer got: (L, E)."""
    found = [moe.loads(routing, counted.flatten()) for routing in record]
    return torch.stack(found) if found else torch.zeros(0, 1)


def model_of(model: nn.Module) -> DeepseekMTP:
    """The model itself, where ranks have wrapped it."""
    return getattr(model, "module", model)


class DeepseekTrainer(Trainer):
    """What of a training step is DeepSeek's: rows of text, two tokens to predict, busy experts.

    The loss that is followed is next-token loss + ahead_weight · mean loss of the modules that look
    ahead + weight · balance, a mean over layers (arXiv:2412.19437, Eq. 17 and 25); logged as `loss`
    is the first alone.
    """

    unit = "tokens"

    def __init__(
        self,
        config: TrainConfig,
        model: DeepseekMTP,
        parts: dict[str, Tokens],
        answers: dict[str, Tokens],
        dtype: torch.dtype,
    ):
        super().__init__(config, model, [*model.blocks, *model.ahead], dtype)
        self.sizes, self.tokens, self.answers = model.config, parts, answers
        self.flops_per_unit = model.flops_per_token(model.config.seq_len)
        self.loss_sum = torch.compile(loss_sum) if config.compile else loss_sum
        self.routers = [m for m in model.modules() if isinstance(m, SigmoidRouter)]
        self.load: Tensor | float = 0.0  # (L, E), of the whole batch, once a step is done
        weights = {"bias": config.sequence_weight, "loss": config.balance_weight, "none": 0.0}
        self.balance_weight = weights[config.balance]

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

    def accumulate(self, parts: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """As in trainer.py; it begins to count the experts' work anew."""
        self.load = 0.0
        return super().accumulate(parts)

    def batch_loss(self, forward: Callable, rows: Tensor) -> tuple[Tensor, Tensor, dict]:
        inputs, targets = rows[:, :-1], rows[:, 1:]
        counted = targets != text.IGNORE
        with moe.recording(self.model) as record:
            logits, *further = forward(inputs, following=targets.where(counted, 0))
        self.load = self.load + loads(record, counted).detach()
        next_token = self.loss_sum(logits, targets)
        ahead = [self.loss_sum(x, shifted(targets, k)) for k, x in enumerate(further, 1)]
        ahead = sum(ahead) / max(1, len(ahead)) + next_token.new_zeros(())
        balance = self.balance(record, counted)
        total = next_token + self.config.ahead_weight * ahead + self.balance_weight * balance
        logged = {"loss": next_token.detach(), "ahead": ahead.detach(), "balance": balance.detach()}
        return total, counted.sum(), logged

    def balance(self, record: list, counted: Tensor) -> Tensor:
        """The balancing loss of each row, summed over tokens, a mean over layers."""
        pairs = zip(self.routers, record, strict=True)
        found = [
            moe.sequence_balance_sum(routing, router.scores(routing.logits), counted)
            for router, routing in pairs
        ]
        return sum(found) / max(1, len(found)) + torch.zeros((), device=self.device)

    def follow(self, number: int) -> None:
        """After a step: balance by biases, where that is asked for."""
        if self.routers:
            self.load = hardware.sum_over_ranks(self.load)
        if self.config.balance == "bias":
            for router, load in zip(self.routers, self.load, strict=True):
                moe.move_biases(router, load, self.config.bias_speed)
        super().follow(number)

    def step(self, number: int) -> dict[str, float]:
        """As in trainer.py, with how uneven the work of each layer's experts was."""
        numbers = super().step(number)
        if not math.isfinite(numbers["loss"]) or not self.routers:
            return numbers
        uneven = moe.max_violation(self.load).tolist()
        return numbers | {f"violation_{layer}": value for layer, value in enumerate(uneven)}

    def score(self, part: str = "valid") -> dict[str, float]:
        tokens, answers = self.tokens[part], self.answers[part]
        score = evaluate(self.scored, tokens, answers, self.sizes.seq_len, self.dtype)
        return score | self.forms(tokens)

    def forms(self, tokens: Tokens) -> dict[str, float]:
        """How far apart naive, cached and absorbed attention are now, see forms.py."""
        state = super().weights()
        if not state:
            return {}  # the first rank alone has them
        with torch.random.fork_rng(devices=[]):  # initial weights must not change what follows
            model = DeepseekMTP(self.sizes)
        model.load_state_dict(state, strict=False)
        row = torch.from_numpy(tokens.ids[: min(CHECKED, self.sizes.seq_len)].astype("int64"))
        return {"forms": largest_difference(model.double().eval(), row[None])}

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe(self.config.data, score, part)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        if self.sizes.tie_embeddings:
            weights.pop("head.weight", None)  # it is the embedding; ranks but the first have none
        return weights


def shifted(targets: Tensor, k: int) -> Tensor:
    """The targets k places further on, (B, T); IGNORE where the row has ended."""
    return F.pad(targets[:, k:], (0, min(k, targets.shape[1])), value=text.IGNORE)


def describe(source: str, score: dict, part: str) -> str:
    """A score in words, beside the floor where one is known."""
    said, floor = f"{score['nats_per_char']:.4f} nats per character", data.floor(source, part)
    if floor is not None:
        said += f" = {score['nats_per_char'] / floor:.3f} × the floor"
    if "recall" in score:
        said += f"; {score['recall']:.0%} of the answers right"
    if "accepted" in score:
        said += f"; {score['accepted']:.0%} of the guesses would be accepted"
    if "forms" in score:
        word = "=" if score["forms"] <= SAME else "≠"
        said += f"; naive {word} cached {word} absorbed ({score['forms']:.0e})"
    return said


def sizes_of(loaded: checkpoint.Loaded, asked: dict, where: str) -> DeepseekConfig:
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


def begin(config: TrainConfig, sizes: DeepseekConfig, loaded, run_dir: RunDirectory) -> None:
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


def check_memory(config: TrainConfig, sizes: DeepseekConfig) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    needed = 16 * sizes.n_parameter  # weights, gradient and two moments, four bytes each
    rows = config.micro_batch_size or config.batch_size
    needed += 8 * rows * sizes.seq_len * sizes.vocab_size  # logits and their gradient
    needed += 40 * config.batch_size * sizes.seq_len  # the ids of a batch
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def build(sizes: DeepseekConfig, loaded: checkpoint.Loaded | None) -> DeepseekMTP:
    """The model to train: with new weights, or with loaded ones and the context of `sizes`."""
    model = loaded.model if loaded else DeepseekMTP(sizes)
    model.config = sizes
    return model


def expectations(config: TrainConfig, sizes: DeepseekConfig, parts: dict[str, Tokens]) -> None:
    """Print the data, and the numbers to expect of it."""
    train = parts["train"]
    epochs = config.steps * config.batch_size * sizes.seq_len / len(train.ids)
    held = f"{parts['valid'].n_char:,} to choose the best, {parts['test'].n_char:,} to test"
    say(f"data       {train.n_char:,} characters = {len(train.ids):,} tokens to train on, {held}; "
        f"{epochs:.1f} epochs")  # fmt: skip
    say(f"experts    {sizes.n_active} of {sizes.n_expert} and {sizes.n_shared} for all work on a "
        f"token: {sizes.n_active_parameter:,} of {sizes.n_parameter:,} parameters")  # fmt: skip
    if not config.weights:
        say(f"expect     loss ln V + ½ = {math.log(sizes.vocab_size) + 0.5:.2f} nats at step 0")
    if floor := data.floor(config.data, "test"):
        say(f"           and at the very best {floor:.4f} nats per character, their entropy")


def conclude(trainer: DeepseekTrainer, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config, model = trainer.config, checkpoint.load(run_dir.path).model.to(trainer.device)
    tokens, answers = trainer.tokens["test"], trainer.answers["test"]
    score = evaluate(model, tokens, answers, trainer.sizes.seq_len, trainer.dtype)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {describe(config.data, score, 'test')}")
    floor, shipped = data.floor(config.data, "test"), (TrainConfig(), shipped_sizes(trainer.sizes))
    if floor and as_described(config, trainer.sizes, shipped):
        ratio = score["nats_per_char"] / floor
        word = "on track" if ratio <= ON_TRACK else "off track"
        say(f"{word}: {ratio:.3f} × the floor, the README promises ≤ {ON_TRACK:.2f}")


def shipped_sizes(sizes: DeepseekConfig) -> DeepseekConfig:
    """The default sizes, with the vocabulary that the tokenizer really got."""
    return replace(PRESETS["tiny"], vocab_size=sizes.vocab_size)


def train(
    config: TrainConfig,
    sizes: DeepseekConfig,
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
            _, sizes = started_with(run_dir.path, TrainConfig, DeepseekConfig)
            check_memory(config, sizes)
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            begin(config, sizes, loaded, run_dir)
        hardware.barrier()
        _, sizes = started_with(run_dir.path, TrainConfig, DeepseekConfig)
        tokenizer = load_tokenizer(run_dir.path)
        parts = text.load_tokens(run_dir.path, tokenizer)
        parts["train"].refuse_too_short(sizes.seq_len)
        hardware.seed_everything(config.seed)
        model = build(sizes, loaded).to(device)
        trainer = DeepseekTrainer(config, model, parts, held_out(parts, tokenizer), dtype)
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(config, sizes, parts)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, run_dir)
        return run_dir.history()


def held_out(parts: dict[str, Tokens], tokenizer: Tokenizer) -> dict[str, Tokens]:
    """Which tokens are answers, of the two parts that are scored."""
    return {part: data.answers(parts[part], tokenizer) for part in ("valid", "test")}


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
