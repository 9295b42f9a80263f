"""Training as in the paper: Adam with a warm-up, label smoothing, batches by number of tokens.

`train(config, sizes)` is the whole story and returns the log. What is the Transformer's stands
here: the options, the schedule of the learning rate, the loss, averaging of the last snapshots, and
how a score reads. trainer.py has the step that these are parts of, loop.py one step after another.

Key: B sentence pairs, S source tokens, T target tokens, V vocab_size.
"""

import bisect
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import checkpoint
import data
import decode
import hardware
import indonesian
import metrics
from loop import run_loop
from model import PRESETS, Transformer, TransformerConfig
from options import UserError, option, say
from run import RunDirectory, write_text
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with

GAP = 0.02  # nats per token above the floor: what the default run must reach
BLEU = 95.0  # of the test part: likewise
BETAS, EPS = (0.9, 0.98), 1e-9  # Adam's, §5.3
Encoded = list[tuple[list[int], list[int]]]  # (source ids, target ids), each with the end


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("grammar", "grammar, a file of lines source TAB target, or hf:OWNER/NAME")
    steps: int = option(800, "optimizer steps", least=1)
    batch_size: int = option(2048, "tokens per step with padding, over all ranks", least=1)
    micro_batch_size: int = option(0, "pairs at a time, to save memory; 0 is all", least=0)
    lr: float = option(4e-3, "highest learning rate, reached after the warm-up", above=0)
    warmup: int = option(300, "steps in which the learning rate rises", least=1)
    smoothing: float = option(0.1, "label smoothing", least=0, below=1)
    smooth_part: float = option(0.6, "share of the steps that have it", least=0, most=1)
    average: int = option(5, "snapshots at the end to average; 1 is none", least=1, most=1000)
    average_every: int = option(20, "steps between these snapshots", least=1)


def learning_rate(step: int, config: TrainConfig) -> float:
    """lr · min(√(warmup / n), n / warmup) at step n = 1, 2, …: Eq. (3) of §5.3.

    The paper's highest rate, reached at n = warmup, is 1 / √(d_model · warmup): 7.0e-4 for its base
    model. Here it is `lr`, since small models bear more.
    """
    n = step + 1
    return config.lr * min((config.warmup / n) ** 0.5, n / config.warmup)


def smoothing_at(step: int, config: TrainConfig) -> float:
    """The label smoothing of a step: as asked in the first part of the steps, then none.

    Smoothing teaches to be unsure on purpose: who gives the right token 0.9 where 1 were right
    pays −ln 0.9 = 0.105 nats for it. The paper smooths to the end, since its aim is BLEU
    (`--smooth-part 1`); here the last part makes the probabilities true again.
    """
    return config.smoothing if step < config.smooth_part * config.steps else 0.0


def loss_sums(
    logits: Tensor, targets: Tensor, smoothing: float, pad_id: int
) -> tuple[Tensor, Tensor]:
    """(smoothed, plain) Σ −log p(target) in nats over all targets but padding.

    Label smoothing (§5.4; Szegedy et al. 2016, arXiv:1512.00567, §7) asks for the target with
    probability 1 − ε and for each of the V tokens with ε / V besides:

        loss = −(1 − ε)·log p(target) − ε/V · Σ_v log p(v)

    and −log p(v) = log Σ exp(logits) − logit_v. logits: (B, T, V), targets: (B, T).
    """
    kept = targets != pad_id
    logits = logits.float()
    log_total = logits.logsumexp(dim=-1)  # (B, T)
    plain = log_total - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    plain_sum = plain.masked_fill(~kept, 0.0).sum()
    if not smoothing:
        return plain_sum, plain_sum.detach()
    even = (log_total - logits.mean(dim=-1)).masked_fill(~kept, 0.0).sum()
    return (1 - smoothing) * plain_sum + smoothing * even, plain_sum.detach()


# ── Sentence pairs as tokens ──────────────────────────────────────────────────────────────────────


def encode_pairs(subwords, pairs: list[tuple[str, str]], sizes: TransformerConfig) -> Encoded:
    """The token ids of each pair, both sides with the end. None is left out."""
    end = sizes.end_id
    return [
        ([*subwords.encode(source), end], [*subwords.encode(target, target=True), end])
        for source, target in pairs
    ]


def short_enough(encoded: Encoded, seq_len: int) -> Encoded:
    """The pairs to train on: those of which neither side is longer than seq_len.

    UserError if there are none.
    """
    kept = [pair for pair in encoded if max(map(len, pair)) <= seq_len]
    if not kept:
        shortest = min(max(map(len, pair)) for pair in encoded)
        raise UserError(f"--seq-len {seq_len} is too short: the shortest pair needs {shortest}")
    if left := len(encoded) - len(kept):
        say(f"left out   {left:,} pairs of more than {seq_len} tokens")
    return kept


def cut(encoded: Encoded, sizes: TransformerConfig) -> Encoded:
    """The pairs to score: a side that is too long is cut, with a word, and none is left out."""
    most, end = sizes.seq_len, sizes.end_id
    n = sum(max(map(len, pair)) > most for pair in encoded)
    if n:
        say(f"cut        {n:,} pairs of more than {most} tokens")
    shorten = lambda ids: ids if len(ids) <= most else [*ids[: most - 1], end]  # noqa: E731
    return [(shorten(source), shorten(target)) for source, target in encoded]


def rows(encoded: Encoded, indices: list[int], sizes: TransformerConfig) -> tuple[Tensor, Tensor]:
    """(source (B, S), target (B, T + 1) with the start) of some pairs, filled up with padding."""
    source = data.pad([encoded[i][0] for i in indices], sizes.pad_id)
    target = data.pad([[sizes.start_id, *encoded[i][1]] for i in indices], sizes.pad_id)
    return source, target


class Plan:
    """Which pairs a step takes: epoch after epoch of shuffled batches, a function of the seed."""

    def __init__(self, encoded: Encoded, n_token: int, seed: int):
        longest = max(max(map(len, pair)) for pair in encoded)
        self.n_token = max(n_token, longest + 1)  # a batch holds one pair at least
        self.encoded, self.seed = encoded, seed
        self.starts, self.batches = [0], []  # first step of each epoch; batches of the last one
        self.current = -1

    def __call__(self, step: int) -> list[int]:
        """The indices of the pairs of a step."""
        while step >= self.starts[-1]:
            self.open(len(self.starts) - 1)
            self.starts.append(self.starts[-1] + len(self.batches))
        epoch = bisect.bisect_right(self.starts, step) - 1
        if epoch != self.current:
            self.open(epoch)
        return self.batches[step - self.starts[epoch]]

    def open(self, epoch: int) -> None:
        """Work out the batches of an epoch."""
        self.batches = data.batches(self.encoded, self.n_token, self.seed, epoch)
        self.current = epoch


# ── Scores ────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def evaluate(model: nn.Module, encoded: Encoded, sizes: TransformerConfig, dtype) -> dict:
    """Nats per target token and per sentence without smoothing, ends included, and their number."""
    device = next(model.parameters()).device
    model.eval()
    nats, n_token = 0.0, 0
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i][1]))
    for start in range(0, len(by_length), 64):
        source, target = rows(encoded, by_length[start : start + 64], sizes)
        targets = target[:, 1:].to(device)
        with hardware.autocast(device, dtype):
            logits = model(source.to(device), target[:, :-1].to(device))
        nats += loss_sums(logits, targets, 0.0, sizes.pad_id)[0].item()
        n_token += int((targets != sizes.pad_id).sum())
    return {"loss": nats / n_token, "nats_per_sentence": nats / len(encoded), "tokens": n_token}


def right_shares(pairs: data.Pairs, part: str, translations: list[str]) -> dict[str, float]:
    """The shares of translations that our grammar allows; {} for other data.

    right: of all of the part; right_unseen: of those with a combination of words that the training
    part never has, so that they cannot be known by heart.
    """
    if not pairs.is_grammar:
        return {}
    grammar, sources = indonesian.grammar(), [source for source, _ in getattr(pairs, part)]
    right = [
        ours in grammar.translations(source)
        for source, ours in zip(sources, translations, strict=True)
    ]
    new = [fine for fine, unseen in zip(right, pairs.unseen(part), strict=True) if unseen]
    return {"right": sum(right) / len(right), "right_unseen": sum(new) / max(1, len(new))}


def translation_scores(loaded: checkpoint.Loaded, pairs: list, search: decode.Search) -> dict:
    """BLEU and chrF of the translations of all of these pairs, and the translations."""
    search = replace(search, nbest=1, too_long="cut")
    found = decode.translate(loaded, [source for source, _ in pairs], search)
    hypotheses, references = [best[0][0] for best in found], [target for _, target in pairs]
    return {
        "bleu": metrics.bleu(hypotheses, references),
        "chrf": metrics.chrf(hypotheses, references),
        "translations": hypotheses,
    }


def floor_per_token(pairs: data.Pairs, part: str, score: dict) -> float | None:
    """The least loss to expect on a part, in nats per token, where the data knows it.

    It is the mean of −log p(translation | source) by the grammar, exact, shared out over as many
    tokens as the score counted.
    """
    per_sentence = pairs.floor(part)
    if per_sentence is None:
        return None
    return per_sentence * score["loss"] / score["nats_per_sentence"]


def describe(score: dict, floor: float | None) -> str:
    """A score in words, beside the floor where one is known."""
    said = f"{score['loss']:.4f} nats per token, perplexity {math.exp(min(score['loss'], 50)):.2f}"
    return said if floor is None else f"{said}, {score['loss'] - floor:+.4f} against the floor"


# ── The training ──────────────────────────────────────────────────────────────────────────────────


class TransformerTrainer(Trainer):
    """What of a training step is the Transformer's: pairs of sentences, and their loss."""

    unit = "tokens"

    def __init__(self, config: TrainConfig, model: Transformer, pairs: data.Pairs, parts: dict,
                 dtype: torch.dtype):  # fmt: skip
        """parts: the encoded pairs of "train" and "valid"."""
        super().__init__(config, model, [*model.encoder, *model.decoder], dtype)
        self.sizes, self.pairs, self.encoded = model.config, pairs, parts
        self.plan, self.done = Plan(parts["train"], config.batch_size, config.seed), 0
        n_source, n_target = mean_lengths(parts["train"])
        self.flops_per_unit = model.flops(n_source, n_target) / (n_source + n_target)
        self.loss_sums = torch.compile(loss_sums) if config.compile else loss_sums
        if config.average > 1 and not config.ema:
            if config.shard:
                raise UserError("--shard does not average snapshots: add --average 1")
            self.average = copy.deepcopy(model).eval()

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(
            model.parameters(), lr=self.config.lr, betas=BETAS, eps=EPS, fused=True
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """(source (B, S), target (B, T + 1)): inputs and, shifted by one, targets."""
        self.smoothing = smoothing_at(step, self.config)
        return rows(self.encoded["train"], self.plan(step), self.sizes)

    def n_unit(self, rows: tuple[Tensor, ...]) -> int:
        source, target = rows
        pad_id = self.sizes.pad_id
        return int((source != pad_id).sum() + (target[:, 1:] != pad_id).sum())

    def batch_loss(
        self, forward: Callable, source: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, dict]:
        """The smoothed loss; `nats` is the plain one, which the floor is compared with."""
        logits, targets = forward(source, target[:, :-1]), target[:, 1:]
        smoothed, plain = self.loss_sums(logits, targets, self.smoothing, self.sizes.pad_id)
        return smoothed, (targets != self.sizes.pad_id).sum(), {"nats": plain}

    def follow(self, number: int) -> None:
        """Checkpoint averaging, §6.1: keep the mean of the last snapshots of the weights."""
        self.done = number + 1
        if self.config.ema or self.average is None:
            super().follow(number)
        elif taken := snapshots_taken(self.done, self.config):
            pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
            with torch.no_grad():
                for mean, current in pairs:
                    mean.lerp_(current, 1 / taken)

    @property
    def scored(self) -> nn.Module:
        """The averaged weights, as soon as there are any."""
        if self.config.ema or self.average is None:
            return super().scored
        return self.model if self.done < first_snapshot(self.config) else self.average

    def score(self) -> dict[str, float]:
        return evaluate(self.scored, self.encoded["valid"], self.sizes, self.dtype)

    def describe(self, score: dict) -> str:
        return describe(score, floor_per_token(self.pairs, "valid", score))


def mean_lengths(encoded: Encoded) -> tuple[int, int]:
    """The mean number of tokens of source and target."""
    sums = (sum(len(pair[side]) for pair in encoded) for side in (0, 1))
    return tuple(max(1, round(one / len(encoded))) for one in sums)


def first_snapshot(config: TrainConfig) -> int:
    """The number of steps done when the first of the snapshots to average is taken."""
    room = (config.steps - 1) // config.average_every  # how many fit before the last one
    return config.steps - min(config.average - 1, room) * config.average_every


def snapshots_taken(done: int, config: TrainConfig) -> int:
    """How many snapshots there are when one is taken after `done` steps; 0 if none is."""
    since = done - first_snapshot(config)
    if since < 0 or since % config.average_every:
        return 0
    return since // config.average_every + 1


def sizes_of(loaded: checkpoint.Loaded, asked: dict, where: str) -> TransformerConfig:
    """The sizes of loaded weights with what is `asked` of them: dropout, or shorter sentences.

    UserError for anything else, and for sentences that are longer than theirs.
    """
    there = loaded.model.config
    for name, value in asked.items():
        if name == "seq_len":
            fits = value <= there.seq_len
        else:
            fits = name == "dropout" or value == getattr(there, name)
        if not fits:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: the model in {where} has {getattr(there, name)}")
    return replace(there, **asked)


def begin(config: TrainConfig, sizes: TransformerConfig, loaded, run_dir: RunDirectory) -> None:
    """Check all that can be wrong, then put the subwords into a new run.

    loaded: the model of --weights, or None.
    """
    run_dir.refuse_what_is_not_ours(config.data)
    check_memory(config, sizes)
    pairs = data.load(config.data)
    if loaded:
        subwords = loaded.subwords
    else:
        subwords = data.Subwords.train(pairs.train, sizes.vocab_size)
        sizes = replace(sizes, vocab_size=subwords.vocab_size)
    short_enough(encode_pairs(subwords, pairs.train, sizes), sizes.seq_len)
    run_dir.create(facts(config, sizes), subwords.save)


def check_memory(config: TrainConfig, sizes: TransformerConfig) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    needed = 16 * sizes.n_parameter  # weights, gradient and two moments, four bytes each
    needed += 12 * config.batch_size * sizes.vocab_size  # logits, their exponents and gradient
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def build(sizes: TransformerConfig, loaded: checkpoint.Loaded | None) -> Transformer:
    """The model to train: with new weights, or with loaded ones and what `sizes` changes."""
    if not loaded:
        return Transformer(sizes)
    model = Transformer(sizes)
    model.load_state_dict(loaded.model.state_dict())
    return model


def expectations(config: TrainConfig, sizes: TransformerConfig, trainer) -> None:
    """Print the data, and the numbers to expect of it."""
    pairs, train_part = trainer.pairs, trainer.encoded["train"]
    held = f"{len(pairs.valid):,} to choose the best, {len(pairs.test):,} to test"
    say(f"data       {len(train_part):,} sentence pairs to train on, {held}")
    if not config.weights:
        guess = math.log(sizes.vocab_size) + 0.5
        say(f"expect     loss about ln V + ½ = {guess:.2f} nats at step 0")
    if pairs.floor("test") is not None:
        say(f"           and at the very best {pairs.floor('test'):.3f} nats per sentence, "
            "the entropy of the grammar's translations")  # fmt: skip


def conclude(trainer: TransformerTrainer, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config, loaded = trainer.config, checkpoint.load(run_dir.path)
    loaded.model.to(trainer.device)
    score = test_scores(loaded, trainer.pairs, "test", trainer.dtype)
    translations = score.pop("translations")
    write_samples(run_dir, trainer.pairs.test, translations)
    run_dir.log(step=config.steps, split="test", **score)  # last: from here on it counts as tested
    say(f"test part  {describe(score, score.get('floor'))}, BLEU {score['bleu']:.2f}")
    shipped = TrainConfig(), replace(PRESETS["tiny"], vocab_size=trainer.sizes.vocab_size)
    if "floor" in score and as_described(config, trainer.sizes, shipped):
        gap = score["loss"] - score["floor"]
        word = "on track" if gap <= GAP and score["bleu"] >= BLEU else "off track"
        say(f"{word}: {gap:+.4f} nats per token against the floor and BLEU {score['bleu']:.1f}, "
            f"the README promises ≤ {GAP} and ≥ {BLEU:.0f}")  # fmt: skip


def test_scores(loaded: checkpoint.Loaded, pairs: data.Pairs, part: str, dtype,
                search: decode.Search | None = None) -> dict:  # fmt: skip
    """Loss, floor, BLEU and chrF of a whole part, and its translations."""
    sizes, texts = loaded.model.config, getattr(pairs, part)
    encoded = cut(encode_pairs(loaded.subwords, texts, sizes), sizes)
    score = evaluate(loaded.model, encoded, sizes, dtype)
    floor = floor_per_token(pairs, part, score)
    if floor is not None:
        score["floor"] = floor
    score |= translation_scores(loaded, texts, search or decode.Search())
    return score | right_shares(pairs, part, score["translations"])


def write_samples(run_dir: RunDirectory, pairs: list, translations: list[str], n: int = 20) -> None:
    """samples.txt: the first n sources of a part, their references and translations."""
    lines = []
    for (source, target), ours in list(zip(pairs, translations, strict=True))[:n]:
        lines += [f"source      {source}", f"reference   {target}", f"translation {ours}", ""]
    write_text(run_dir.path / "samples.txt", "\n".join(lines))


def train(
    config: TrainConfig,
    sizes: TransformerConfig,
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
            _, sizes = started_with(run_dir.path, TrainConfig, TransformerConfig)
            check_memory(config, sizes)
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            begin(config, sizes, loaded, run_dir)
        hardware.barrier()
        _, sizes = started_with(run_dir.path, TrainConfig, TransformerConfig)
        pairs, parts = load_parts(config.data, checkpoint.load_subwords(run_dir.path), sizes)
        hardware.seed_everything(config.seed)
        model = build(sizes, loaded).to(device)
        trainer = TransformerTrainer(config, model, pairs, parts, dtype)
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        expectations(config, sizes, trainer)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, run_dir)
        return run_dir.history()


def load_parts(name: str, subwords, sizes: TransformerConfig) -> tuple[data.Pairs, dict]:
    """The pairs of a data set, and those to train on and to choose the best by as token ids."""
    if subwords.vocab_size > sizes.vocab_size:
        ids = subwords.vocab_size
        raise UserError(f"the subwords have {ids} ids, the model only {sizes.vocab_size}")
    pairs = data.load(name)
    train_part = encode_pairs(subwords, pairs.train, sizes)
    valid_part = cut(encode_pairs(subwords, pairs.valid, sizes), sizes)
    return pairs, {"train": short_enough(train_part, sizes.seq_len), "valid": valid_part}


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
