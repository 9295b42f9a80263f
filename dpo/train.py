"""Training in two stages: imitate answers (SFT), then prefer the better of two (DPO and others).

    stage 1, supervised fine-tuning   the loss is −log π of the answers; the prompts are given
    stage 2, preferences              what stage 1 left becomes the reference; the loss is dpo.py's

`train(config, sizes)` is the whole story and returns the log. Both stages are one run with one log:
`sft_steps` steps of the first, then the rest. trainer.py has the step that its parts are of,
loop.py the steps one after another. At the border the weights are kept as reference.safetensors;
the reference's log-probabilities of all answers are computed once, so no step pays for them.

Key: B rows, S texts in a row, see packing.py.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
import data
import dpo
import hardware
import judge
import rows
from chat import adopt_template
from checkpoint import Loaded, refuse_too_large
from loop import run_loop, save_tensors
from model import Llama, LlamaConfig
from options import UserError, make_config, option, say
from packing import N_ANSWER, AnswerScorer, Packed, length, of_rows, of_texts
from rows import Examples
from run import RunDirectory, is_run, read_json
from tokenizer import load_tokenizer
from trainer import CommonConfig, Trainer, announce, as_described, facts, started_with
from weights import read_safetensors

BASE = Path(__file__).resolve().parent / "pretrained" / "base"
REFERENCE = "reference.safetensors"
ON_TRACK = 0.8  # share of comparisons with the reference that are to be won
BETAS = (0.9, 0.99)
SHOWN = ("reward_chosen", "reward_rejected", "margin", "accuracy")


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("tales", "tales, a .jsonl or .json of preferences, or hf:OWNER/NAME")
    steps: int = option(200, "optimizer steps, of both stages", least=1)
    sft_steps: int | None = option(None, "of these, the first that imitate; half of them if not "
                                   "given", least=0, most=2**31 - 1)  # fmt: skip
    batch_size: int = option(16, "texts or pairs per step, over all ranks", least=1)
    lr: float = option(3e-4, "highest learning rate of the second stage", above=0)
    sft_lr: float = option(2e-3, "highest learning rate of the first stage", above=0)
    eval_every: int = option(20, "steps between looks at the validation part", least=1)
    loss: str = option("dpo", "of the second stage", dpo.LOSSES)
    beta: float = option(0.5, "strength of the pull back to the reference", above=0)
    flip: float = option(0.0, "share of wrong labels, for cdpo and rdpo", least=0, below=0.5)
    gamma: float = option(0.5, "margin of simpo", least=0)
    nll: float = option(0.0, "add this × the loss of imitating the chosen answer", least=0)
    reference_free: bool = option(False, "leave the reference out of the loss")
    pack: int = option(0, "put short texts together into rows of so many tokens; 0: one a row",
                       least=0)  # fmt: skip
    max_length: int = option(0, "longest prompt with answer, in tokens; 0 is the model's", least=0)
    warmup: int = option(20, "steps in which the learning rate rises, in each stage", least=0)
    weight_decay: float = option(0.0, "AdamW's", least=0)

    def __post_init__(self):
        super().__post_init__()
        if self.flip and self.loss not in ("cdpo", "rdpo"):
            raise ValueError("flip is for the losses cdpo and rdpo")

    @property
    def n_answer(self) -> int:
        """Answers of a pair that are looked at."""
        return N_ANSWER if self.loss == "kto" else 2

    @property
    def needs_reference(self) -> bool:
        """Does the loss look at the reference?"""
        return not self.reference_free and self.loss not in dpo.NO_REFERENCE

    @property
    def is_plain_dpo(self) -> bool:
        """Is the loss DPO's alone, of which the start, ln 2, and the floor are known?"""
        return self.loss == "dpo" and not self.nll and not self.reference_free


def learning_rate(step: int, config: TrainConfig) -> float:
    """In each stage half a cosine, from its first step, down to a fiftieth, times a linear warm-up.

    The cosine falls during the warm-up too, so with 20 steps of 100 the top is 0.92 of the highest.
    """
    first, steps = step < config.sft_steps, config.sft_steps
    if not first:
        step, steps = step - config.sft_steps, config.steps - config.sft_steps
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / max(steps, step + 1)))
    return (config.sft_lr if first else config.lr) * rise * (0.02 + 0.98 * fall)


# ── Log-probabilities ─────────────────────────────────────────────────────────────────────────────


def scored(
    scorer: nn.Module, examples: Examples, kind: str, n_answer: int, dtype: torch.dtype
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (numbers of some texts, log π of their answers, tokens of these), each (b, 3)."""
    device = next(scorer.parameters()).device
    for numbers in examples.in_order(kind, 32):
        packed = examples.packed(numbers, kind, 0, n_answer)
        with hardware.autocast(device, dtype):
            sums, counts = scorer(*(x.to(device) for x in packed))
        yield numbers, *(of_texts(x.cpu(), packed) for x in (sums, counts))


@torch.no_grad()
def log_probabilities(
    scorer: nn.Module, examples: Examples, dtype: torch.dtype, n_answer: int = 2
) -> Tensor:
    """log π of the answers of every pair, (number of texts, 3), 0 for texts that are no pairs.

    n_answer: 3 also has the answers to other prompts that `preference_score` shows KTO.
    """
    wide = torch.promote_types(next(scorer.parameters()).dtype, torch.float32)
    found = torch.zeros(len(examples.texts), N_ANSWER, dtype=wide)
    for numbers, sums, _ in scored(scorer, examples, "pairs", n_answer, dtype):
        found[numbers] = sums
    return found


@torch.no_grad()
def imitation_loss(scorer: nn.Module, examples: Examples, dtype: torch.dtype) -> float:
    """Nats per token of the answers that are to be imitated."""
    nats = n_token = 0.0
    for _, sums, counts in scored(scorer, examples, "demonstrations", 1, dtype):
        nats, n_token = nats - sums.sum().item(), n_token + counts.sum().item()
    return nats / n_token


@torch.no_grad()
def preference_score(
    scorer: nn.Module, reference: Tensor, examples: Examples, config: TrainConfig, dtype
) -> dict[str, float]:
    """Loss and metrics of all pairs, means. reference: (number of texts, 3)."""
    totals: dict[str, float] = {}
    for numbers, policy, counts in scored(scorer, examples, "pairs", config.n_answer, dtype):
        theirs = reference[numbers]
        for name, values in pair_numbers(policy, theirs, counts, config).items():
            totals[name] = totals.get(name, 0.0) + values.sum().item()
    return {name: total / len(examples.pairs) for name, total in totals.items()}


def pair_numbers(policy: Tensor, reference: Tensor, counts: Tensor, config: TrainConfig) -> dict:
    """The loss of each pair, (b,), and what is to be looked at. All three are (b, 3)."""
    seen = reference if config.needs_reference else torch.zeros_like(reference)
    loss = dpo.preference_loss(
        config.loss, policy, seen, counts.clamp(min=1), config.beta, config.flip, config.gamma
    )
    imitated = -policy[..., 0] / counts[..., 0].clamp(min=1)
    shown = dpo.metrics(policy, reference, config.beta)
    return {"loss": loss + config.nll * imitated} | shown | {"imitation": imitated.detach()}


# ── A step ────────────────────────────────────────────────────────────────────────────────────────


class PreferenceTrainer(Trainer):
    """What of a training step is this folder's: two stages, and the reference between them."""

    unit = "tokens"

    def __init__(self, config: TrainConfig, llama: Llama, parts: dict, dtype, run_dir):
        super().__init__(config, AnswerScorer(llama), list(llama.blocks), dtype)
        self.parts_of_data, self.run_dir, self.sizes = parts, run_dir, llama.config
        self.tied, self.reference = llama.config.tie_embeddings, None
        self.flops_per_unit = llama.flops_per_token(64)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        decay = self.config.weight_decay
        return torch.optim.AdamW(
            model.parameters(), lr=self.config.lr, betas=BETAS, weight_decay=decay, fused=True
        )

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.config)

    def batch(self, step: int) -> tuple[Tensor, ...]:
        config, train = self.config, self.parts_of_data["train"]
        if step < config.sft_steps:
            kind, n_answer = "demonstrations", 1
        else:
            kind, n_answer = "pairs", config.n_answer
            self.settle_reference(step)
        numbers = train.numbers(kind, step, config.batch_size, config.seed)
        packed = train.packed(numbers, kind, config.pack, n_answer)
        if len(packed.tokens) < hardware.world():
            raise UserError("a step has fewer rows than ranks: more pairs, or --pack 0, are needed")
        if kind == "demonstrations":
            return tuple(packed)
        theirs = self.reference["train"][numbers]
        if config.loss == "kto":  # the reference's opinion on answers to other prompts
            theirs = self.score_with_reference(packed)
        return *packed, of_rows(theirs, packed)

    def n_unit(self, tensors: tuple[Tensor, ...]) -> int:
        return tensors[0].numel()

    def batch_loss(self, forward: Callable, *tensors: Tensor) -> tuple[Tensor, Tensor, dict]:
        packed, theirs = Packed(*tensors[:6]), tensors[6:]
        sums, counts = forward(*packed)
        if not theirs:  # stage 1: a model that is its own reference prefers nothing
            count = counts.sum()
            return -sums.sum(), count, dict.fromkeys(SHOWN, 0 * count) | {"accuracy": count / 2}
        there = packed.number >= 0
        numbers = pair_numbers(sums[there], theirs[0][there], counts[there], self.config)
        return (numbers["loss"].sum(), there.sum(), {name: numbers[name].sum() for name in SHOWN})

    # ── The reference ──

    def settle_reference(self, step: int) -> None:
        """Have the reference's log-probabilities of all answers.

        At the first step of stage 2 the weights of that moment become the reference, and are kept
        in the run; a run that is resumed later reads them there.
        """
        if self.reference is not None:
            return
        file = self.run_dir.path / REFERENCE
        if step == self.config.sft_steps:
            weights = self.plain(hardware.full_weights(self.model))
            if self.run_dir.writes:
                save_tensors(file, weights)
            for state in self.optimizer.state.values():  # moments of another loss
                for moment in state.values():
                    moment.zero_()
        hardware.barrier()
        like = next(self.model.parameters())
        frozen = AnswerScorer(frozen_copy(file, self.sizes)).to(like.device, like.dtype).eval()
        self.reference = {
            part: log_probabilities(frozen, examples, self.dtype, self.config.n_answer)
            for part, examples in self.parts_of_data.items()
        }
        self.frozen = frozen if self.config.loss == "kto" else None  # KTO alone asks it further

    @torch.no_grad()
    def score_with_reference(self, packed: Packed) -> Tensor:
        """log π_ref of packed answers, (N, 3)."""
        with hardware.autocast(self.device, self.dtype):
            sums, _ = self.frozen(*(x.to(self.device) for x in packed))
        return of_texts(sums.cpu(), packed)

    def plain(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the scorer under the names of the Llama in it, without a tied head."""
        names = {name.removeprefix("llama."): x for name, x in weights.items()}
        return {n: x for n, x in names.items() if not (self.tied and n == "head.weight")}

    def weights(self) -> dict[str, Tensor]:
        return self.plain(super().weights())

    # ── Scores ──

    def score(self) -> dict[str, float]:
        """In stage 2 what `preference_score` says; in stage 1 what `imitation_score` says."""
        valid = self.parts_of_data["valid"]
        if self.reference is None:
            return imitation_score(imitation_loss(self.scored, valid, self.dtype), self.config)
        theirs = self.reference["valid"]
        return preference_score(self.scored, theirs, valid, self.config, self.dtype)

    def describe(self, score: dict) -> str:
        return describe(score, self.config, "valid")


def start_loss(config: TrainConfig) -> float:
    """The loss of a pair where policy and reference agree and both answers are equally likely."""
    even = torch.full((1, N_ANSWER), -1.0)
    return dpo.preference_loss(
        config.loss, even, even, torch.ones(1, N_ANSWER), config.beta, config.flip, config.gamma
    ).item()


def imitation_score(nats: float, config: TrainConfig) -> dict[str, float]:
    """The score of stage 1 from nats per token.

    To the loss of imitating is added what a pair costs before any preference is learned, with the
    share --nll of imitating in it. So weights of stage 2 are taken for better than any of stage 1,
    unless they are worse than their start.
    """
    return {"loss": (1 + config.nll) * nats + start_loss(config), "imitation": nats}


def frozen_copy(file: Path, sizes: LlamaConfig) -> Llama:
    """The Llama whose weights are in a file. UserError if they are missing or do not fit."""
    state = read_safetensors(file)
    llama = Llama(sizes)
    if sizes.tie_embeddings and "embedding.weight" in state:
        state["head.weight"] = state["embedding.weight"]
    try:
        llama.load_state_dict(state)
    except RuntimeError:
        raise UserError(f"{file} is damaged or of another run") from None
    return llama.requires_grad_(False).eval()


def describe(score: dict, config: TrainConfig, part: str) -> str:
    """A score in words, beside the limits where they are known."""
    if "margin" not in score:
        return f"answers {score['imitation']:.4f} nats per token"
    said = f"{config.loss} {score['loss']:.4f}, accuracy {score['accuracy']:.1%}"
    limits = data.limits(config.data, part)
    if limits and config.is_plain_dpo:
        said = (f"{config.loss} {score['loss']:.4f} (floor {limits['floor']:.4f}), "
                f"accuracy {score['accuracy']:.1%} (at best {limits['accuracy']:.1%})")  # fmt: skip
    return (
        f"{said}, rewards {score['reward_chosen']:+.2f} chosen, {score['reward_rejected']:+.2f} not"
    )


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def load_start(folder: str) -> Loaded:
    """What a training begins with: a run, a folder of Hugging Face, or the base of this folder."""
    loaded = checkpoint.load(folder or BASE)
    adopt_template(loaded.tokenizer, loaded.folder)
    return loaded


def load_stopped(run_dir: RunDirectory, sizes: LlamaConfig) -> Loaded:
    """The model and tokenizer of a run to resume, whose weights its checkpoint will bring."""
    refuse_too_large(sizes, run_dir.path)
    return Loaded(run_dir.path, Llama(sizes), load_tokenizer(run_dir.path), ())


def longest_text(config: TrainConfig, sizes: LlamaConfig) -> int:
    """The longest prompt with one answer that is taken, in tokens."""
    return min(config.max_length or sizes.seq_len, sizes.seq_len)


def encode_parts(config: TrainConfig, start: Loaded) -> dict[str, Examples]:
    """The data as tokens. UserError if too little of it fits the context."""
    longest = longest_text(config, start.model.config)
    given = data.read_parts(config.data)
    parts = {part: rows.encode_part(x, start.tokenizer, longest) for part, x in given.items()}
    n_given = sum(map(len, given.values()))
    if dropped := n_given - sum(len(part.texts) for part in parts.values()):
        say(f"left out   {dropped} of {n_given} examples: no answer fits {longest} tokens")
    if not all(part.pairs for part in parts.values()):
        raise UserError(f"--data {config.data}: the prompts fill the context of {longest} tokens")
    return parts


def check_memory(config: TrainConfig, sizes: LlamaConfig, parts: dict | None) -> None:
    """UserError if the training cannot fit, before any of it is built.

    Of a run whose data are not read yet only what is sure is counted.
    """
    texts = [text for part in (parts or {}).values() for text in part.texts]
    longest = max(map(length, texts), default=2)
    n_row = config.micro_batch_size or config.batch_size
    if texts:  # there is no step of more than all texts
        n_row = min(n_row, len(texts))
    needed = 20 * sizes.n_parameter + 8 * n_row * longest * (longest + sizes.vocab_size)
    needed += 40 * config.batch_size * longest
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def begin(config: TrainConfig, start: Loaded, run_dir: RunDirectory) -> None:
    """Check all that can be wrong, then put the tokenizer and the tokens into a new run."""
    run_dir.refuse_what_is_not_ours(config.data)
    parts = encode_parts(config, start)
    check_memory(config, start.model.config, parts)

    def fill(folder: Path) -> None:
        start.tokenizer.save(folder)
        rows.write_examples(parts, folder)

    run_dir.create(facts(config, start.model.config), fill)


def expectations(config: TrainConfig, parts: dict[str, Examples]) -> None:
    """Print the data and the numbers to expect."""
    uses = zip(("train on", "choose the best", "test"), parts.values(), strict=True)
    pairs = ", ".join(f"{len(part.pairs):,} to {use}" for use, part in uses)
    say(f"data       pairs: {pairs}; {len(parts['train'].demonstrations):,} texts to imitate first")
    say(f"stages     {config.sft_steps} steps of imitation, then preferences")
    limits = data.limits(config.data, "test")
    if limits and config.is_plain_dpo:
        say(f"expect     loss ln 2 = {math.log(2):.4f} at the first step of preferences, and at"
            f" the very best {limits['floor']:.4f}, the entropy of the labels")  # fmt: skip


def conclude(trainer: PreferenceTrainer, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config = trainer.config
    best = checkpoint.load(run_dir.path)
    best.model.to(trainer.device)
    file = run_dir.path / REFERENCE
    reference = None
    if trainer.reference is not None:
        reference = replace(best, model=frozen_copy(file, best.model.config).to(trainer.device))
    score = test_score(best, reference, trainer.parts_of_data["test"], config, trainer.dtype)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {describe(score, config, 'test')}")
    if "win_rate" not in score:
        return
    say(judge.in_words(score))
    asked = config
    if config.sft_steps == config.steps // 2:  # as if it had been left open
        asked = replace(config, sft_steps=None)
    if as_described(asked, best.model.config, (TrainConfig(), best.model.config)):
        word = "on track" if score["win_rate"] >= ON_TRACK else "off track"
        say(f"{word}: {score['win_rate']:.1%} won, the README promises ≥ {ON_TRACK:.0%}")


def test_score(
    best: Loaded, reference: Loaded | None, test: Examples, config: TrainConfig, dtype: torch.dtype
) -> dict[str, float]:
    """Loss and metrics of the test part; for the tales also who wins, KL and fluency."""
    scorer = AnswerScorer(best.model.eval())
    if reference is None:
        return imitation_score(imitation_loss(scorer, test, dtype), config)
    other = AnswerScorer(reference.model.eval())
    theirs = log_probabilities(other, test, dtype, config.n_answer)
    score = preference_score(scorer, theirs, test, config, dtype)
    if data.limits(config.data, "test"):
        score |= judge.compare(best, reference, test, config.seed, dtype)
    return score


def train(
    config: TrainConfig, sizes: LlamaConfig | None = None, resume: bool = False
) -> list[dict]:
    """Train, and return the log. With `resume`, go on from the last checkpoint in `config.out`.

    sizes: what a run to resume says of its model; a new run has those of its start.
    Raises UserError for data, settings or files that will not do and for a loss that is not finite.
    """
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = hardware.choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    if config.sft_steps is None:
        config = replace(config, sft_steps=config.steps // 2)
    run_dir = RunDirectory(config.out)
    with hardware.ranks(device), run_dir.writing():
        if resume and run_dir.checkpoint.exists():
            start = load_stopped(run_dir, sizes)
        else:
            start = load_start(config.weights)
        check_memory(config, start.model.config, None)
        if run_dir.writes and resume:
            run_dir.save_config(facts(config, start.model.config))
        elif run_dir.writes:
            begin(config, start, run_dir)
        hardware.barrier()
        started_with(run_dir.path, TrainConfig, LlamaConfig)
        parts = rows.load_examples(run_dir.path, start.tokenizer.vocab_size)
        check_memory(config, start.model.config, parts)
        hardware.seed_everything(config.seed)
        llama = start.model.to(device)
        trainer = PreferenceTrainer(config, llama, parts, dtype, run_dir)
        why = f"{device}: {why_device}; {config.dtype}: {why_dtype}"
        announce(config, llama.config, llama, why)
        expectations(config, parts)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            if trainer.reference is None and config.steps > config.sft_steps:
                trainer.settle_reference(config.steps)  # it was resumed after its last step
            conclude(trainer, run_dir)
        return run_dir.history()


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)


def config_of(folder: Path) -> TrainConfig:
    """How the run in `folder` was trained; the default for weights that are no run of ours."""
    if not is_run(folder):
        return TrainConfig()
    saved, where = read_json(folder / "config.json")["train"], f"{folder}/config.json, train"
    known = {field.name for field in fields(TrainConfig)}
    if not isinstance(saved, dict) or "sft_steps" not in saved or not saved.keys() <= known:
        return TrainConfig()
    return make_config(TrainConfig, saved, where)
