"""Trains a tokenizer on a corpus, and measures one.

`train(config)` is importable and returns the history; it writes the run directory. What to expect
is printed first: before any merge a byte is a token, at the end EXPECTED bytes are (measured with
the defaults, on lines held out).
"""

import dataclasses
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import run
from base import Tokenizer
from bpe import BPE
from characters import chars_to_bytes
from data import load_texts, split_lines
from run import UserError, option, say
from tokenizer import load, save
from unigram import Unigram
from wordpiece import WordPiece

HERE = Path(__file__).resolve().parent
# Bytes a token on held-out lines of the default corpus at 2,048 tokens, and how far off is "off".
EXPECTED = {"bpe": 4.75, "wordpiece": 2.31, "unigram": 5.66}
TOLERANCE = 0.1


@dataclass(frozen=True)
class TrainConfig:
    """Training options."""

    algorithm: str = option("bpe", "what to train", ("bpe", "wordpiece", "unigram"))
    vocab_size: int = option(2048, "tokens in the vocabulary, all told")
    pattern: str = option("gpt4", "bpe: gpt2, gpt4, o200k, whitespace, metaspace, or a regex")
    data: str | None = option(None, "a text file, a folder of *.txt, or hf:OWNER/NAME")
    out: str = option(str(HERE / "runs" / "default"), "run directory to write")
    steps: int | None = option(None, "stop after this many merges (unigram: EM steps)")
    seed: int = option(0, "for sampled segmentations; training has no randomness")

    def __post_init__(self):
        if self.vocab_size < 1 or (self.steps is not None and self.steps < 1):
            raise ValueError("--vocab-size and --steps must be at least 1")


class Watcher:
    """Called at each step: keeps the log, shows the first merges and then ever fewer, and stops."""

    def __init__(self, config: TrainConfig, interrupted):
        self.config, self.interrupted = config, interrupted
        self.log: list[dict] = []
        self.begin = time.perf_counter()

    def __call__(self, first: int, second, count: int | None = None) -> bool:
        step = len(self.log) + 1
        if count is None:
            line = {"pieces": first, "nats_per_char": round(second, 6)}
            text = f"EM step {step:3d}   {first:6,} pieces   {second:.4f} nats a character"
        else:
            line = {"id": first, "piece": second, "count": count}
            if self.config.algorithm == "bpe" and self.config.pattern != "metaspace":
                second = chars_to_bytes(second)
            text = f"merge {step:6,}   id {first:6,}   {count:8,} times   {second!r}"
        if count is None or step & (step - 1) == 0:  # merges 1, 2, 4, 8 …
            say(text)
        seconds = round(time.perf_counter() - self.begin, 4)
        self.log.append({"step": step, "split": "train"} | line | {"seconds": seconds})
        return self.interrupted() or step == self.config.steps


def train(config: TrainConfig, resume: bool = False) -> list[dict]:
    """Trains, writes the run to `config.out` and returns its log, one line a step.

    resume: go on from the BPE in `config.out` to `config.vocab_size`. Raises UserError for what the
    user can mend.
    """
    folder = run.RunDirectory(config.out)
    if resume and not (folder.path / "tokenizer.json").exists():
        raise UserError(f"nothing to resume in {folder.path}: no tokenizer.json there, train first")
    texts = load_texts(config.data)
    split = {name: split_lines(text) for name, text in texts.items()}
    documents = [line for kept, _ in split.values() for line in kept]
    held_out = {name: "".join(rest) for name, (_, rest) in split.items()}
    folder.start()
    introduce(config, texts)
    with run.CtrlC() as interrupted:
        watcher = Watcher(config, interrupted)
        try:
            tokenizer = learn(config, documents, watcher, resume)
        except ValueError as error:
            raise UserError(f"{error}; change --vocab-size, --pattern or --data") from None
        was_interrupted = interrupted()
    names = ["tokenizer.json", "tokenizer.model"]
    name = names.pop(config.algorithm == "unigram")
    save(tokenizer, folder.path / name)
    (folder.path / names[0]).unlink(missing_ok=True)  # of another algorithm, before
    saved = dataclasses.asdict(config)
    del saved["out"]  # a run may be moved
    folder.save(saved, watcher.log)
    conclude(config, tokenizer, held_out, was_interrupted)
    return watcher.log


def started_with(folder: Path) -> TrainConfig:
    """The options of the run in `folder`, but for --steps. UserError if there is none."""
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = ("algorithm", "vocab_size", "pattern", "data", "seed")
        return TrainConfig(**{name: saved[name] for name in names}, out=str(folder))
    except OSError:
        raise UserError(f"nothing to resume in {folder}: no run was started there") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}/config.json is damaged: {error}") from None


def learn(config: TrainConfig, documents: list[str], watch, resume: bool) -> Tokenizer:
    """The tokenizer that the options ask for."""
    if resume:
        old = load(config.out)
        if not isinstance(old, BPE):
            raise UserError(f"{config.out} holds no BPE: the others train in seconds, start again")
        if len(old) >= config.vocab_size:
            raise UserError(f"{config.out} has {len(old)} tokens already: raise --vocab-size")
        return old.extend(documents, config.vocab_size, watch=watch)
    if config.algorithm == "bpe":
        return BPE.train(documents, config.vocab_size, config.pattern, watch=watch)
    if config.algorithm == "wordpiece":
        return WordPiece.train(documents, config.vocab_size, watch=watch)
    return Unigram.train(documents, config.vocab_size, watch=watch)


def introduce(config: TrainConfig, texts: dict[str, str]) -> None:
    """What is run, and what to expect."""
    settings = "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    say(f"config     {settings}")
    sizes = ", ".join(f"{name} {len(text.encode('utf-8')):,} bytes" for name, text in texts.items())
    say(f"data       {sizes}; every tenth line is held out")
    say("device     the CPU, one core: plain Python and numpy")
    if usual(config):
        say(f"expect     {EXPECTED[config.algorithm]:.2f} bytes a token at the end, 1.0 before")


def usual(config: TrainConfig) -> bool:
    """Whether EXPECTED speaks of this run."""
    same = dataclasses.replace(TrainConfig(), algorithm=config.algorithm, out=config.out)
    return dataclasses.replace(config, seed=0) == same


def conclude(
    config: TrainConfig, tokenizer: Tokenizer, held_out: dict[str, str], cut: bool
) -> None:
    """What came out, beside what was expected."""
    if len(tokenizer) < config.vocab_size and not cut and config.steps is None:
        say(f"note       the text has no more to merge: {len(tokenizer):,} tokens, not "
            f"{config.vocab_size:,}")  # fmt: skip
    score = measure(tokenizer, held_out)
    got = score["bytes_per_token"]
    say(f"held out   {got:.2f} bytes a token, {score['tokens_per_word']:.2f} tokens a word")
    if usual(config) and not cut:
        expected = EXPECTED[config.algorithm]
        on = "on" if abs(got / expected - 1) < TOLERANCE else "off"
        say(f"{on} track   expected {expected:.2f}")
    if cut:
        say("stopped    --train --resume goes on from here")
    say(f"run        {config.out}")


def measure(tokenizer: Tokenizer, texts: dict[str, str]) -> dict:
    """Fertility and compression, overall and for each text; entropy of the tokens; losses.

    bits_per_byte: the order-0 entropy of the tokens, spread over the bytes of the text: what an
    ideal code for single tokens would need.
    """
    counts: Counter[int] = Counter()
    out: dict = {"vocab_size": len(tokenizer), "languages": {}}
    total_bytes = total_words = same = 0
    for name, text in texts.items():
        ids = tokenizer.encode(text)
        counts.update(ids)
        size, words = len(text.encode("utf-8")), len(text.split())
        total_bytes, total_words = total_bytes + size, total_words + words
        same += tokenizer.decode(ids) == text
        out["languages"][name] = {
            "bytes_per_token": size / max(len(ids), 1),
            "tokens_per_word": len(ids) / max(words, 1),
        }
    tokens = sum(counts.values())
    bits = sum(-n * math.log2(n / tokens) for n in counts.values())
    unknown = sum(n for i, n in counts.items() if tokenizer.pieces[i] == tokenizer.unk_piece)
    return out | {
        "bytes_per_token": total_bytes / max(tokens, 1),
        "tokens_per_word": tokens / max(total_words, 1),
        "bits_per_byte": bits / max(total_bytes, 1),
        "unknown": unknown,
        "texts_that_come_back": f"{same} of {len(texts)}",
    }
