"""Training: AdamW on the next token and on balance, resumable to the bit, on any number of ranks.

`train(config, sizes)` is the whole story and returns the log. What is particular to a mixture of
experts stands in `MixtralTrainer`: the losses that keep the experts balanced, the biases that do it
without a loss, and the numbers that show it. trainer.py has the step that these are parts of,
loop.py the steps one after another.

Key: B rows, T seq_len, V vocab_size, N tokens, L layers, E n_expert.
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
from loop import run_loop
from model import FAINT, PRESETS, Mixtral, MixtralConfig, RMSNorm
from options import UserError, option, say
from run import RunDirectory
from text import Tokens
from tokenizer import KINDS, Tokenizer, load_tokenizer, train_tokenizer
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with
from usage import Usage

ON_TRACK = 1.06  # × the entropy of the dialects: what the default run must reach
INFORMED = 0.80  # × ln 4 nats, what the experts of the last layer must say about the dialect
BETAS = (0.9, 0.99)  # 0.95, often used, averages over too few steps for small batches
BALANCE = ("loss", "pooled", "capacity", "bias", "none")


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("dialects", "dialects, a text file, a folder of them, or hf:OWNER/NAME")
    steps: int = option(2000, "optimizer steps", least=1)
    batch_size: int = option(32, "rows per step, over all ranks", least=1)
    lr: float = option(6e-3, "highest learning rate", above=0)
    tokenizer: str = option("sentencepiece", "kind to train on the data", KINDS)
    warmup: int = option(60, "steps in which the learning rate rises", least=0)
    weight_decay: float = option(
        0.1, "AdamW's, of matrices; norms and embeddings have none", least=0
    )
    balance: str = option("loss", "what keeps the experts equally busy, see the README", BALANCE)
    balance_weight: float = option(0.01, "of the balancing loss", least=0)
    z_weight: float = option(0.001, "of the z-loss, which keeps router scores small", least=0)
    jitter: float = option(0.0, "noise on the router's input in training", least=0, below=1)
    capacity: float = option(
        1.25, "--balance capacity: most work of an expert, × its even share", above=0
    )
    bias_speed: float = option(0.001, "--balance bias: how far a bias moves in a step", least=0)


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
def evaluate(
    model: nn.Module, tokens: Tokens, labels: Tokens, seq_len: int, dtype: torch.dtype
) -> dict:
    """Score all of `tokens`. Returns nats per token and per character, how many of each, and how
    the experts were used, see usage.py. labels: the dialect of each token, see `data.labels`.
    """
    device, sizes = next(model.parameters()).device, getattr(model, "module", model).config
    model.eval()
    nats = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32)
    usage = Usage(sizes.n_layer, sizes.n_expert, sizes.n_active, data.N_DIALECT)
    rows = zip(
        tokens.evaluation_rows(64, seq_len), labels.evaluation_rows(64, seq_len), strict=True
    )
    for (inputs, targets), (dialects, _) in rows:
        counted = targets != text.IGNORE
        with hardware.autocast(device, dtype), moe.recording(model) as record:
            logits = model(inputs.to(device))
        nats += loss_sum(logits, targets.to(device)).cpu()
        usage.add(record, counted.to(device), dialects)
    nats = nats.item()
    return {
        "loss": nats / usage.n_token,
        "nats_per_char": nats / tokens.n_char,
        "tokens": usage.n_token,
        "chars": tokens.n_char,
    } | usage.numbers()


class MixtralTrainer(Trainer):
    """What of a training step is Mixtral's: rows of text, the next token, balanced experts.

    The loss that is followed is next-token loss + balance_weight · balancing loss + z_weight ·
    z-loss, the last two as means over the layers; logged as `loss` is the first alone.
    """

    unit = "tokens"

    def __init__(
        self,
        config: TrainConfig,
        model: Mixtral,
        parts: dict[str, Tokens],
        labels: dict[str, Tokens],
        dtype: torch.dtype,
    ):
        super().__init__(config, model, list(model.blocks), dtype)
        self.sizes, self.tokens, self.labels = model.config, parts, labels
        self.flops_per_unit = model.flops_per_token(model.config.seq_len)
        self.loss_sum = torch.compile(loss_sum) if config.compile else loss_sum
        self.routers = [block.ffn.router for block in model.blocks]
        for router in self.routers:
            router.jitter = config.jitter
            router.capacity = config.capacity if config.balance == "capacity" else 0.0
        self.load: Tensor | None = None  # (L, E), of the whole batch

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
        """As in trainer.py, when it is known how busy each expert is in the whole batch.

        The balancing loss of a token depends on that. One micro-batch finds out as it goes; for
        several, a pass without gradients comes first, so that their number changes no result.
        """
        self.load = self.count_loads(parts) if len(parts) > 1 else None
        return super().accumulate(parts)

    @torch.no_grad()
    def count_loads(self, parts: list[tuple[Tensor, ...]]) -> Tensor:
        """How many tokens each expert gets, (L, E), over all micro-batches and ranks."""
        total, state = 0, hardware.rng_state()
        for (rows,) in parts:
            inputs, targets = rows[:, :-1].to(self.device), rows[:, 1:]
            counted = (targets != text.IGNORE).to(self.device).flatten()
            with hardware.autocast(self.device, self.dtype):
                record = self.routed(self.model, inputs, counted)[1]
            total = total + torch.stack([moe.loads(routing, counted) for routing in record])
        hardware.restore_rng(state)  # the real pass must draw the same jitter
        return hardware.sum_over_ranks(total)

    def routed(self, forward: Callable, inputs: Tensor, counted: Tensor) -> tuple:
        """(logits, the routing of each layer)."""
        with moe.recording(self.model, counted) as record:
            return forward(inputs), record

    def batch_loss(self, forward: Callable, rows: Tensor) -> tuple[Tensor, Tensor, dict]:
        targets = rows[:, 1:]
        counted = (targets != text.IGNORE).flatten()
        logits, record = self.routed(forward, rows[:, :-1], counted)
        if self.load is None:
            load = torch.stack([moe.loads(routing, counted) for routing in record])
            self.load = hardware.sum_over_ranks(load)
        next_token = self.loss_sum(logits, targets)
        balance, z = self.router_losses(record, counted)
        logged = {"loss": next_token.detach(), "balance": balance.detach(), "z": z.detach()}
        total = next_token + self.config.z_weight * z
        if self.config.balance in ("loss", "pooled", "capacity"):
            total = total + self.config.balance_weight * balance
        return total, counted.sum(), logged | self.numbers(record, counted)

    def router_losses(self, record: list, counted: Tensor) -> tuple[Tensor, Tensor]:
        """(balancing loss, z-loss), summed over tokens, means over layers.

        Pooled, as Hugging Face does it, the load is that of all layers together.
        """
        pooled = self.load.sum(dim=0).expand_as(self.load)
        load = pooled if self.config.balance == "pooled" else self.load
        balance = [moe.balance_loss_sum(r, counted, f) for r, f in zip(record, load, strict=True)]
        z = [moe.z_loss_sum(routing, counted) for routing in record]
        return sum(balance) / len(record), sum(z) / len(record)

    def numbers(self, record: list, counted: Tensor) -> dict[str, Tensor]:
        """To log, as sums over tokens: work of each expert, × its even share, and lost choices."""
        k, E, found = self.sizes.n_active, self.sizes.n_expert, {}
        for layer, routing in enumerate(record):
            load = moe.loads(routing, counted) * E / k
            found |= {f"load_{layer}_{e}": load[e] for e in range(E)}
        lost = [((r.chosen == E).sum(dim=-1) * counted).sum() / k for r in record]
        return found | {"dropped": sum(lost) / len(record)}

    def follow(self, number: int) -> None:
        """After a step: balance by biases, where that is asked for."""
        if self.config.balance == "bias":
            for router, load in zip(self.routers, self.load, strict=True):
                moe.move_biases(router, load, self.config.bias_speed)
        super().follow(number)

    def score(self, part: str = "valid") -> dict[str, float]:
        tokens, labels = self.tokens[part], self.labels[part]
        return evaluate(self.scored, tokens, labels, self.sizes.seq_len, self.dtype)

    def describe(self, score: dict, part: str = "valid") -> str:
        return describe(self.config.data, score, part)

    def weights(self) -> dict[str, Tensor]:
        weights = super().weights()
        if self.sizes.tie_embeddings:
            weights.pop("head.weight", None)  # it is the embedding; ranks but the first have none
        return weights


def describe(source: str, score: dict, part: str) -> str:
    """A score in words, beside the floor and the dialects where they are known."""
    said, floor = f"{score['nats_per_char']:.4f} nats per character", data.floor(source, part)
    if floor is not None:
        said += f" = {score['nats_per_char'] / floor:.3f} × the floor"
    busiest, dead = max(score["busiest"]), sum(score["dead_experts"])
    said += f"; busiest expert {busiest:.2f} × its share, {dead} dead"
    if "information" in score:
        said += f"; experts know {informed(score):.0%} of the dialect"
    return said


def informed(score: dict) -> float:
    """Mutual information of expert and dialect in the last layer, as a share of its maximum."""
    return score["information"][-1] / math.log(data.N_DIALECT)


def sizes_of(loaded: checkpoint.Loaded, asked: dict, where: str) -> MixtralConfig:
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


def begin(config: TrainConfig, sizes: MixtralConfig, loaded, run_dir: RunDirectory) -> None:
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


def check_memory(config: TrainConfig, sizes: MixtralConfig) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    needed = 16 * sizes.n_parameter  # weights, gradient and two moments, four bytes each
    rows = config.micro_batch_size or config.batch_size
    needed += 8 * rows * sizes.seq_len * sizes.vocab_size  # logits and their gradient
    needed += 40 * config.batch_size * sizes.seq_len  # the ids of a batch
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def build(sizes: MixtralConfig, loaded: checkpoint.Loaded | None) -> Mixtral:
    """The model to train: with new weights, or with loaded ones and the context of `sizes`."""
    model = loaded.model if loaded else Mixtral(sizes)
    model.config = sizes
    return model


def expectations(config: TrainConfig, sizes: MixtralConfig, parts: dict[str, Tokens]) -> None:
    """Print the data, and the numbers to expect of it."""
    train = parts["train"]
    epochs = config.steps * config.batch_size * sizes.seq_len / len(train.ids)
    held = f"{parts['valid'].n_char:,} to choose the best, {parts['test'].n_char:,} to test"
    say(f"data       {train.n_char:,} characters = {len(train.ids):,} tokens to train on, {held}; "
        f"{epochs:.1f} epochs")  # fmt: skip
    say(f"experts    {sizes.n_active} of {sizes.n_expert} work on a token: "
        f"{sizes.n_active_parameter:,} of {sizes.n_parameter:,} parameters")  # fmt: skip
    if not config.weights:
        noise = FAINT**2 if sizes.tie_embeddings else 1.0
        say(f"expect     loss ln V + {noise / 2:.2g} = "
            f"{math.log(sizes.vocab_size) + noise / 2:.2f} nats at step 0")  # fmt: skip
    if floor := data.floor(config.data, "test"):
        say(f"           and at the very best {floor:.4f} nats per character, their entropy")


def conclude(trainer: MixtralTrainer, run_dir: RunDirectory, change: Callable | None) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config, best = trainer.config, checkpoint.load(run_dir.path)
    model = best.model.to(trainer.device)
    if change:
        change(model, best.tokenizer)
    tokens, labels = trainer.tokens["test"], trainer.labels["test"]
    score = evaluate(model, tokens, labels, trainer.sizes.seq_len, trainer.dtype)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {describe(config.data, score, 'test')}")
    floor, shipped = data.floor(config.data, "test"), (TrainConfig(), shipped_sizes(trainer.sizes))
    if floor and as_described(config, trainer.sizes, shipped):
        ratio, dead = score["nats_per_char"] / floor, sum(score["dead_experts"])
        good = ratio <= ON_TRACK and informed(score) >= INFORMED and dead == 0
        say(f"{'on track' if good else 'off track'}: {ratio:.3f} × the floor, experts know "
            f"{informed(score):.0%} of the dialect, {dead} are dead; the README promises "
            f"≤ {ON_TRACK:.2f}, ≥ {INFORMED:.0%} and 0")  # fmt: skip


def shipped_sizes(sizes: MixtralConfig) -> MixtralConfig:
    """The default sizes, with the vocabulary that the tokenizer really got."""
    return replace(PRESETS["tiny"], vocab_size=sizes.vocab_size)


def train(
    config: TrainConfig,
    sizes: MixtralConfig,
    resume: bool = False,
    loaded: checkpoint.Loaded | None = None,
    change: Callable | None = None,
) -> list[dict]:
    """Train, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    loaded: the model in `config.weights`, where it is at hand already.
    change: a function of model and tokenizer that changes the model before it is trained, and
    before it is tested; for experiments.
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
            _, sizes = started_with(run_dir.path, TrainConfig, MixtralConfig)
            check_memory(config, sizes)
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            begin(config, sizes, loaded, run_dir)
        hardware.barrier()
        _, sizes = started_with(run_dir.path, TrainConfig, MixtralConfig)
        tokenizer = load_tokenizer(run_dir.path)
        parts = text.load_tokens(run_dir.path, tokenizer)
        parts["train"].refuse_too_short(sizes.seq_len)
        hardware.seed_everything(config.seed)
        model = build(sizes, loaded).to(device)
        if change:
            change(model, tokenizer)
        trainer = MixtralTrainer(config, model, parts, held_out_labels(parts, tokenizer), dtype)
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(config, sizes, parts)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, run_dir, change)
        return run_dir.history()


def held_out_labels(parts: dict[str, Tokens], tokenizer: Tokenizer) -> dict[str, Tokens]:
    """The dialects of the two parts that are scored."""
    return {part: data.labels(parts[part], tokenizer) for part in ("valid", "test")}


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
