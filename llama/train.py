"""Training: AdamW on the next token, resumable to the bit, on any number of ranks.

`train(config, model_config)` is the whole story and returns the log. Per step: a batch of rows that
depends on (seed, step) alone, split over micro-batches and ranks, each adding its part of

    loss = Σ −log p(target) / number of targets in the whole batch

so that how the batch is split changes the speed and never the result. Key: B rows, T seq_len.
"""

import contextlib
import dataclasses
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import data
import run as machinery
from model import Llama, LlamaConfig
from run import RunDirectory, UserError, option, say
from tokenizer import KINDS, load_tokenizer, read_json, train_tokenizer

HERE = Path(__file__).resolve().parent
ON_TRACK = 1.10  # × the entropy of the stories: what the default run must reach
LOG_EVERY = 20  # steps
RESUMABLE = {"out", "data", "steps", "device", "compile", "shard", "eval_every", "checkpoint_every"}


@dataclass(frozen=True)
class TrainConfig:
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("stories", "stories, a text file, a folder of them, or hf:OWNER/NAME")
    out: str = option(str(HERE / "runs" / "default"), "run directory")
    tokenizer: str = option("sentencepiece", "kind to train on the data", KINDS)
    steps: int = option(600, "optimizer steps")
    batch_size: int = option(16, "rows per step, over all ranks")
    micro_batch_size: int = option(0, "rows at a time, to save memory; 0 is all")
    lr: float = option(5e-3, "highest learning rate")
    warmup: int = option(40, "steps in which the learning rate rises")
    weight_decay: float = option(1.2, "AdamW's, of matrices; norms and embeddings have none")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    eval_every: int = option(100, "steps between looks at the held-out text")
    checkpoint_every: int = option(100, "steps between checkpoints")
    seed: int = option(0, "of weights and batches")
    device: str = option("auto", "where to compute", ("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "number format of products", ("auto", "float32", "bfloat16"))
    weights: str = option("", "begin with these weights and their tokenizer")
    compile: bool = option(False, "torch.compile: a minute of waiting, then faster steps")
    shard: bool = option(False, "under torchrun: shard weights and optimizer instead of copying")

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "checkpoint_every", "lr", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("micro_batch_size", "warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be less than 2³², not {self.seed}")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth (Loshchilov & Hutter 2017, Eq. 5)."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / config.steps))
    return config.lr * rise * (0.02 + 0.98 * fall)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: matrices decay, norms and embeddings do not."""
    decayed, kept = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.dim() == 2 and "embedding" not in name else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ −log p(target) in nats, over all targets but IGNORE. logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=data.IGNORE, reduction="sum"
    )


@torch.no_grad()
def evaluate(model: nn.Module, tokens: data.Tokens, seq_len: int, dtype: torch.dtype) -> dict:
    """Score all held-out text. Returns nats per token and per character, and how many of each."""
    device = next(model.parameters()).device
    nats = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32)
    n_token = 0
    for inputs, targets in tokens.evaluation_rows(64, seq_len):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(inputs.to(device))
        nats += loss_sum(logits, targets.to(device)).cpu()
        n_token += int((targets != data.IGNORE).sum())
    nats = nats.item()
    return {
        "loss": nats / n_token,
        "nats_per_char": nats / tokens.n_char,
        "tokens": n_token,
        "chars": tokens.n_char,
    }


class Trainer:
    """Model, optimizer and data of one run, and the step that joins them."""

    def __init__(self, config: TrainConfig, model: Llama, tokens: data.Tokens, dtype: torch.dtype):
        tokens.n_row(model.config.seq_len)  # complains if there are none
        self.config, self.tokens, self.dtype = config, tokens, dtype
        self.sizes, self.device = model.config, next(model.parameters()).device
        self.flops_per_token = model.flops_per_token(model.config.seq_len)
        self.model = machinery.distribute(model, list(model.blocks), config.shard)
        self.optimizer = torch.optim.AdamW(
            decay_groups(model, config.weight_decay), lr=config.lr, betas=(0.9, 0.95), fused=True
        )
        self.forward, self.loss_sum = self.model, loss_sum
        if config.compile:
            self.forward, self.loss_sum = torch.compile(self.model), torch.compile(loss_sum)

    def step(self, number: int, rank: int, world: int) -> float:
        """One optimizer step. Returns the loss of the whole batch in nats per token.

        NaN, and no step, if the gradient is not finite.
        """
        config = self.config
        rows = self.tokens.training_rows(number, config.batch_size, self.sizes.seq_len, config.seed)
        n_target = rows[:, 1:].numel()
        n_part = math.ceil(math.ceil(len(rows) / world) / (config.micro_batch_size or len(rows)))
        parts = rows[rank::world].tensor_split(n_part)  # as many on each rank: they work in step
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(parts):
            wait = i + 1 < len(parts) and isinstance(self.model, DistributedDataParallel)
            with self.model.no_sync() if wait else contextlib.nullcontext():
                part = part.to(self.device)
                with torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                    logits = self.forward(part[:, :-1])
                loss = self.loss_sum(logits, part[:, 1:]) / n_target
                (loss * world).backward()  # times world: gradients are averaged over the ranks
            total += loss.detach()
        loss = machinery.sum_over_ranks(total).item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip).item()
        if not math.isfinite(loss + norm):
            return math.nan
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def save(self, run: RunDirectory, step: int, best: float) -> None:
        """Write checkpoint.pt: all that `restore` needs to go on as if nothing had happened."""
        state = machinery.full_state(self.model, self.optimizer)
        run.save_checkpoint(state | {"step": step, "best": best})

    def restore(self, run: RunDirectory) -> tuple[int, float]:
        """Go back to the last checkpoint. Returns the steps done and the best held-out loss."""
        state = run.load_checkpoint()
        try:
            machinery.load_full_state(self.model, self.optimizer, state)
            done, best = state["step"], state["best"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{run.checkpoint} is damaged or of another run: {error}") from None
        run.history(before=done)
        return done, best

    def save_best(self, run: RunDirectory) -> None:
        """Write model.safetensors."""
        weights = machinery.full_weights(self.model)
        if self.sizes.tie_embeddings:
            weights.pop("head.weight", None)  # ranks but the first have none
        run.save_weights(weights)


def corpus(config: TrainConfig, vocab_size: int, run: RunDirectory, resume: bool):
    """Tokenizer, training tokens and held-out tokens of a run; rank 0 makes them if it is new."""
    if run.writes and not resume:
        source = data.Source.measure(config.data)
        if config.weights:
            tokenizer = load_tokenizer(Path(config.weights))
        else:
            lines = source.training_lines()
            tokenizer = train_tokenizer(config.tokenizer, lines, vocab_size)
        run.start()
        tokenizer.save(run.path)
        data.write_tokens(source, tokenizer, run.path)
    machinery.barrier()
    tokenizer = load_tokenizer(run.path)
    return tokenizer, *data.load_tokens(run.path, tokenizer)


def announce(model: Llama, config: TrainConfig, tokens: data.Tokens, held_out: data.Tokens):
    """Print what is about to happen and the numbers to expect."""
    groups = dict.fromkeys(("embedding", "attention", "ffn", "norm", "head"), 0)
    for name, parameter in model.named_parameters():
        groups[next(g for g in ("norm", *groups) if g in name)] += parameter.numel()
    shown = ", ".join(f"{name} {n:,}" for name, n in groups.items() if n)
    epochs = config.steps * config.batch_size * model.config.seq_len / len(tokens.ids)
    say(f"config     {config}")
    say(f"           {model.config}")
    say(f"parameters {sum(groups.values()):,}: {shown}")
    say(f"data       {tokens.n_char:,} characters = {len(tokens.ids):,} tokens, "
        f"{held_out.n_char:,} held out; {epochs:.1f} epochs")  # fmt: skip
    say(f"expect     loss ln V + ½ = {math.log(model.config.vocab_size) + 0.5:.2f} nats per token "
        "at step 0")  # fmt: skip
    if floor := data.floor_nats_per_char(config.data):
        say(
            f"           and at the very best {floor:.4f} nats per character, the grammar's entropy"
        )


def describe(source: str, score: dict) -> str:
    """A held-out score in words, beside the floor where one is known."""
    text = f"{score['nats_per_char']:.4f} nats per character"
    floor = data.floor_nats_per_char(source)
    return text if floor is None else f"{text} = {score['nats_per_char'] / floor:.3f} × the floor"


def verdict(source: str, best: float) -> str:
    """Whether a run on our stories came as near to the floor as the README says it should."""
    floor = data.floor_nats_per_char(source)
    if floor is None:
        return f"done: {best:.4f} nats per character at best (no reference for this text)"
    word = "on track" if best <= ON_TRACK * floor else "off track"
    return f"{word}: {best / floor:.3f} × the floor at best, the README promises ≤ {ON_TRACK:.2f}"


class Log:
    """Writes log.jsonl and shows it: rates count training alone, not looks at held-out text."""

    def __init__(self, run: RunDirectory, config: TrainConfig, trainer: Trainer, done: int):
        self.run, self.config = run, config
        self.n_token = config.batch_size * trainer.sizes.seq_len
        peak = machinery.matmul_rate(trainer.device, trainer.dtype)
        self.tokens_at_peak = peak / trainer.flops_per_token
        self.begin, self.busy, self.since = time.perf_counter(), 0.0, done
        self.progress = machinery.Progress(config.steps, done)

    def step(self, done: int, loss: float, seconds: float) -> None:
        """One training step is done."""
        self.busy += seconds
        self.progress.step()
        if done % LOG_EVERY == 0 or done in (1, self.config.steps):
            speed = (done - self.since) * self.n_token / self.busy
            self.since, self.busy = done, 0.0
            lr = learning_rate(done - 1, self.config)
            self.write(done, "train", loss=loss, lr=lr, tokens_per_second=round(speed),
                       gemm_fraction=round(speed / self.tokens_at_peak, 4))  # fmt: skip
            text = f"step {done:5d}  loss {loss:.4f}  lr {lr:.1e}  {speed:,.0f} tokens/s"
            self.progress.note(text)

    def score(self, done: int, score: dict) -> None:
        """The held-out text was scored."""
        self.write(done, "valid", **score)
        self.progress.note(f"step {done:5d}  held out {describe(self.config.data, score)}")

    def write(self, done: int, split: str, **numbers) -> None:
        seconds = round(time.perf_counter() - self.begin, 2)
        self.run.log(step=done, split=split, **numbers, seconds=seconds)


def absolute(config: TrainConfig) -> TrainConfig:
    """The same with whole paths, so that a run is found again from another folder."""
    paths = {name: getattr(config, name) for name in ("out", "data", "weights")}
    named = ("stories", "hf:")  # what is no path
    whole = {k: str(Path(v).resolve()) for k, v in paths.items() if v and not v.startswith(named)}
    return dataclasses.replace(config, **whole)


def started_with(folder: Path) -> tuple[TrainConfig, LlamaConfig]:
    """What the run in `folder` was started with. UserError if there is none."""
    saved = read_json(folder / "config.json")
    if "train" not in saved:
        raise UserError(f"nothing to resume in {folder}: no run was started there")
    try:
        return TrainConfig(**saved["train"]), checkpoint.read_sizes(saved["model"], folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from None


def refuse_changes(started: tuple, asked: tuple) -> None:
    """UserError if the command line asks a resumed run to be another one."""
    was, now = ({**vars(config), **vars(sizes)} for config, sizes in (started, asked))
    for name, value in was.items():
        if now[name] not in (value, "auto") and name not in RESUMABLE:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"the run to resume has {flag} {value}, not {now[name]}: leave it out")


def train(config: TrainConfig, sizes: LlamaConfig, resume: bool = False) -> list[dict]:
    """Train, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    Raises UserError for data, sizes or files that will not do and for a loss that is not finite.
    """
    device, why_device = machinery.choose_device(config.device)
    dtype, why_dtype = machinery.choose_dtype(config.dtype, device)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    run = RunDirectory(config.out)
    with machinery.ranks(device) as (rank, world), machinery.ctrl_c() as stopped:
        machinery.seed_everything(config.seed)
        tokenizer, tokens, held_out = corpus(config, sizes.vocab_size, run, resume)
        if config.weights:
            model = checkpoint.load(config.weights).model
        else:
            model = Llama(dataclasses.replace(sizes, vocab_size=tokenizer.vocab_size))
        trainer = Trainer(config, model.to(device), tokens, dtype)
        done, best = trainer.restore(run) if resume else (0, math.inf)
        say(f"device     {device}: {why_device}; {config.dtype}: {why_dtype}; {world} rank(s)")
        announce(model, config, tokens, held_out)
        run.save_config({"model": asdict(model.config), "train": asdict(config)})
        log = Log(run, config, trainer, done)
        while done < config.steps and not stopped():
            start = time.perf_counter()
            loss = trainer.step(done, rank, world)
            if not math.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {done + 1}: try --lr {config.lr / 4:g}; the last "
                    f"good state is {run.checkpoint if run.checkpoint.exists() else 'the start'}"
                )
            done += 1
            log.step(done, loss, time.perf_counter() - start)
            if done % config.eval_every == 0 or done == config.steps:
                score = evaluate(trainer.model, held_out, trainer.sizes.seq_len, dtype)
                log.score(done, score)
                if score["nats_per_char"] < best:
                    best = score["nats_per_char"]
                    trainer.save_best(run)
            if done % config.checkpoint_every == 0 or done == config.steps:
                trainer.save(run, done, best)
        log.progress.close()
        if done < config.steps:
            trainer.save(run, done, best)
            say(f"stopped at step {done} and saved; go on with --train --resume --out {run.path}")
        else:
            say(verdict(config.data, best))
        return run.history()
