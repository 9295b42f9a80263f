"""Training, whatever the task: `train(config, sizes)` is the whole story and returns the log.

What is trained on and how it is scored stands in tasks.py, the step in trainer.py, the steps one
after another in loop.py. Here are the options, the recipe of each task, and what surrounds a run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import checkpoint
import data
import hardware
import reviews
import text
from loop import run_loop
from model import PRESETS, SequenceConfig, SequenceModel
from options import UserError, option, say
from run import RunDirectory
from tasks import DiceTrainer, LanguageTrainer, ReviewTrainer, SequenceTrainer
from tokenizer import load_tokenizer, train_tokenizer
from trainer import CommonConfig, announce, as_described, facts, started_with

TASKS = ("lm", "sentiment", "adding", "copy")
ON_TRACK = 1.25  # × the entropy of the notes: what the default language model must reach
NEAR_BAYES = 0.01  # what the default sentiment model may be below the best possible accuracy


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    task: str = option("lm", "what to learn", TASKS)
    data: str = option("notes", "notes, a text file, a folder of them, hf:OWNER/NAME; or for "
                       "sentiment reviews, or a TSV file or folder")  # fmt: skip
    steps: int = option(12_000, "optimizer steps", least=1)
    batch_size: int = option(8, "rows per step, over all ranks", least=1)
    seq_len: int = option(
        64, "steps in time: of truncated backpropagation, or of adding and copy", least=2
    )
    lr: float = option(8e-3, "highest learning rate", above=0)
    warmup: int = option(50, "steps in which the learning rate rises", least=0)
    weight_decay: float = option(0.01, "AdamW's, of the cells' matrices", least=0)
    carry: bool = option(True, "lm: rows go on with the state that they stopped with")
    tokenizer: str = option("characters", "lm: kind of token", ("characters", "bytes"))
    min_count: int = option(1, "sentiment: how often a word must come to get an id", least=1)
    word_drop: float = option(0.0, "sentiment: share of words made unknown", least=0, below=1)
    grow: float = option(0.0, "adding, copy: share of steps in which rows grow", least=0, most=1)


RECIPES = {  # what each task is trained with where nothing else is said
    "lm": TrainConfig(eval_every=1000, checkpoint_every=500),
    "sentiment": TrainConfig(
        task="sentiment", data="reviews", steps=700, batch_size=64, lr=4e-3, weight_decay=0.05,
        ema=0.99,
    ),
    "adding": TrainConfig(
        task="adding", data="dice", steps=1500, batch_size=50, seq_len=200, lr=1e-2, grow=0.8,
        weight_decay=0.0, eval_every=200,
    ),
    "copy": TrainConfig(
        task="copy", data="dice", steps=2000, batch_size=50, seq_len=100, lr=1e-2, grow=0.8,
        weight_decay=0.0, eval_every=200,
    ),
}  # fmt: skip
SIZES = {  # the network of each task; vocab_size 1 is a place to be filled by the data
    "lm": PRESETS["small"],
    "sentiment": SequenceConfig(d_model=64, vocab_size=1, n_answer=2, answer="last"),
    "adding": SequenceConfig(d_model=64, n_number=2, answer="last", chrono=200),
    "copy": SequenceConfig(
        d_model=128, d_embed=16, vocab_size=10, n_answer=10, forget_bias=1.0, chrono=100
    ),
}


# ── Before the first step ─────────────────────────────────────────────────────────────────────────


def prepare(config: TrainConfig, sizes: SequenceConfig, loaded) -> tuple[SequenceConfig, Callable]:
    """Read --data. Returns the sizes that fit it, and what puts it into the folder of a run.

    loaded: the model of --weights, or None. UserError for data that will not do.
    """
    at_every_step = config.task in ("lm", "copy")
    if at_every_step != (sizes.answer == "every"):
        raise UserError(f"--answer {sizes.answer} does not fit --task {config.task}")
    if config.task == "lm":
        return prepare_text(config, sizes, loaded)
    if config.task == "sentiment":
        return prepare_reviews(config, sizes, loaded)
    if config.data != "dice":
        raise UserError(f"--data changes nothing in --task {config.task}, whose rows are thrown")
    return sizes, lambda folder: None


def prepare_text(config: TrainConfig, sizes: SequenceConfig, loaded) -> tuple:
    source = data.measure(config.data)
    tokenizer = loaded.words if loaded else None
    if tokenizer is None:
        tokenizer = train_tokenizer(config.tokenizer, source.training_lines(), 0)
        n = tokenizer.vocab_size
        if loaded and loaded.model.config.vocab_size != n:
            n_theirs = loaded.model.config.vocab_size
            raise UserError(f"--weights has {n_theirs} tokens, the text {n}: add an alphabet.json")
        sizes = replace(sizes, vocab_size=n, n_answer=n)

    def fill(folder: Path) -> None:
        tokenizer.save(folder)
        text.write_tokens(source, tokenizer, config.seq_len, folder)
        ids = text.load_tokens(folder, tokenizer)["train"].ids
        data.Stream(ids, config.batch_size, config.seq_len)  # refuses a text that is too short

    return sizes, fill


def prepare_reviews(config: TrainConfig, sizes: SequenceConfig, loaded) -> tuple:
    lines = reviews.read(config.data)
    vocabulary = loaded.words if loaded else None
    vocabulary = vocabulary or reviews.make_vocabulary(lines["train"], config.min_count)
    if other := {label for _, label, _ in lines["train"]} - set(vocabulary.classes):
        raise UserError(f"--data has the label {min(other)!r}, --weights does not know it")
    n_class = len(vocabulary.classes)
    if not loaded:
        sizes = replace(sizes, vocab_size=vocabulary.vocab_size, n_answer=n_class)

    def fill(folder: Path) -> None:
        vocabulary.save(folder)
        parts = {part: reviews.encode(one, vocabulary) for part, one in lines.items()}
        reviews.save(parts, folder)

    return sizes, fill


def begin(config: TrainConfig, sizes: SequenceConfig, loaded, run_dir: RunDirectory) -> None:
    """Check all that can be wrong, then put the data and their words into a new run."""
    run_dir.refuse_what_is_not_ours("" if config.data in data.INSIDE else config.data)
    sizes, fill = prepare(config, sizes, loaded)
    check_memory(config, sizes)
    run_dir.create(facts(config, sizes), fill)


def check_memory(config: TrainConfig, sizes: SequenceConfig) -> None:
    """UserError if the training cannot fit, before any of it is built."""
    needed = 16 * sizes.n_parameter  # weights, gradient and two moments, four bytes each
    rows = config.micro_batch_size or config.batch_size
    steps = config.seq_len if config.task != "sentiment" else 1
    kept = 2 * sizes.n_layer * 12 * sizes.d_model + 2 * sizes.n_answer  # gates, states, factors
    needed += 4 * rows * steps * kept + 16 * config.batch_size * steps
    hardware.check_memory(needed, hardware.choose_device(config.device)[0], "training this")


def make_trainer(config: TrainConfig, sizes: SequenceConfig, run_dir: RunDirectory, loaded, dtype):
    """The trainer of a run: its data, and a model with new weights or loaded ones."""
    device, _ = hardware.choose_device(config.device)
    if config.task == "lm":
        parts = text.load_tokens(run_dir.path, load_tokenizer(run_dir.path))
        data.Stream(parts["train"].ids, config.batch_size, config.seq_len)
    elif config.task == "sentiment":
        parts = reviews.load(run_dir.path, reviews.Vocabulary.load(run_dir.path))
    hardware.seed_everything(config.seed)
    model = (loaded.model if loaded else SequenceModel(sizes)).to(device)
    model.config = sizes
    if config.task == "lm":
        return LanguageTrainer(config, model, dtype, parts)
    if config.task == "sentiment":
        return ReviewTrainer(config, model, dtype, parts)
    return DiceTrainer(config, model, dtype)


def expectations(config: TrainConfig, sizes: SequenceConfig) -> None:
    """Print the numbers to expect."""
    at_start = {"lm": "ln V", "sentiment": "ln of the labels", "copy": "ln 10"}
    if config.task == "adding":
        say("expect     loss 1 + 1/6 = 1.17 at step 0, 1/6 of who always answers 1, and then 0")
        return
    nats = math.log(sizes.n_answer)
    say(f"expect     loss {at_start[config.task]} = {nats:.2f} nats at step 0")
    if config.task == "lm" and (floor := data.floor(config.data, "test")):
        say(f"           and at the very best {floor:.4f} nats per character, the entropy")
    if config.task == "copy":
        nothing = data.trivial("copy", config.seq_len)
        say(f"           then {nothing:.4f}, of who remembers nothing, and then 0")


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def conclude(trainer: SequenceTrainer, run_dir: RunDirectory) -> None:
    """Score the test part once, with the weights that were best on the validation part."""
    config, model = trainer.config, checkpoint.load(run_dir.path).model.to(trainer.device)
    score = trainer.test_score(model)
    run_dir.log(step=config.steps, split="test", **score)
    say(f"test part  {trainer.describe(score, 'test')}")
    shipped = (RECIPES[config.task], shipped_sizes(config.task, trainer.sizes))
    if config.task in ("adding", "copy") or not as_described(config, trainer.sizes, shipped):
        return
    if config.task == "lm" and (floor := data.floor(config.data, "test")):
        ratio = score["nats_per_char"] / floor
        word = "on track" if ratio <= ON_TRACK else "off track"
        say(f"{word}: {ratio:.3f} × the floor, the README promises ≤ {ON_TRACK:.2f}")
    if config.task == "sentiment":
        below = score["bayes"] - score["expected"]
        word = "on track" if below <= NEAR_BAYES else "off track"
        say(f"{word}: {below:.2%} below the best possible, the README promises ≤ {NEAR_BAYES:.0%}")


def shipped_sizes(task: str, sizes: SequenceConfig) -> SequenceConfig:
    """The default sizes of a task, with the vocabulary that the data really have."""
    return replace(SIZES[task], vocab_size=sizes.vocab_size, n_answer=sizes.n_answer)


def train(
    config: TrainConfig,
    sizes: SequenceConfig,
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
            _, sizes = started_with(run_dir.path, TrainConfig, SequenceConfig)
            check_memory(config, sizes)
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            begin(config, sizes, loaded, run_dir)
        hardware.barrier()
        _, sizes = started_with(run_dir.path, TrainConfig, SequenceConfig)
        trainer = make_trainer(config, sizes, run_dir, loaded, dtype)
        model = getattr(trainer.model, "module", trainer.model)
        announce(config, sizes, model, f"{device}: {why_device}; {config.dtype}: {why_dtype}")
        if not config.weights:
            expectations(config, sizes)
        finished = run_loop(trainer, run_dir, resume)
        if finished and run_dir.writes and not is_tested(run_dir, config):
            conclude(trainer, run_dir)
        return run_dir.history()


def is_tested(run_dir: RunDirectory, config: TrainConfig) -> bool:
    """Has the run been scored on the test part, which happens once, at its end?"""
    lines = run_dir.history()
    return any(line["split"] == "test" and line["step"] == config.steps for line in lines)
