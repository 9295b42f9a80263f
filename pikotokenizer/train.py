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

from base import Tokenizer
from bpe import BPE
from characters import chars_to_bytes
from data import load_texts, split_lines
from options import UserError, check, make_config, option, say
from run import RunDirectory, read_json, stop_signals, write_text
from tokenizer import load, save
from unigram import Unigram
from wordpiece import WordPiece

HERE = Path(__file__).resolve().parent
# Bytes a token on held-out lines of the default corpus at 2,048 tokens, and how far off is "off".
EXPECTED = {"bpe": 4.75, "wordpiece": 2.31, "unigram": 5.66}
TOLERANCE = 0.1
RESULTS = ("tokenizer.json", "tokenizer.model")  # what makes a run worth keeping


@dataclass(frozen=True)
class TrainConfig:
    """Training options."""

    algorithm: str = option("bpe", "what to train", ("bpe", "wordpiece", "unigram"))
    vocab_size: int = option(2048, "tokens in the vocabulary, all told", least=1)
    pattern: str = option(
        "gpt4", "bpe: gpt2, gpt4, o200k, llama3, whitespace, metaspace or a regex"
    )
    data: str | None = option(None, "a text file, a folder of *.txt, or hf:OWNER/NAME")
    held_out: int = option(10, "hold out every N-th line for measuring; 0: train on all", least=0)
    out: str = option(str(HERE / "runs" / "default"), "run directory to write")
    steps: int | None = option(None, "stop after this many merges (unigram: EM steps)", least=1)
    seed: int = option(0, "for sampled segmentations; training has no randomness")

    def __post_init__(self):
        check(self)
        if self.held_out == 1:
            raise ValueError("--held-out 1 leaves nothing to train on: 10 keeps every tenth line")


class Watcher:
    """Called at each step: keeps the log, shows the first merges and then ever fewer, and stops."""

    def __init__(self, config: TrainConfig, interrupted, done: int):
        self.config, self.interrupted, self.done = config, interrupted, done
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
            text = f"merge {step + self.done:6,}   id {first:6,}   {count:8,} times   {second!r}"
        if count is None or step & (step - 1) == 0:  # merges 1, 2, 4, 8 …
            say(text)
        seconds = round(time.perf_counter() - self.begin, 4)
        self.log.append({"step": step + self.done, "split": "train"} | line | {"seconds": seconds})
        return self.interrupted() or step == self.config.steps


def train(config: TrainConfig, resume: bool = False) -> list[dict]:
    """Trains, writes the run to `config.out` and returns its log, one line a step.

    resume: go on from the BPE in `config.out` to `config.vocab_size`. Everything is learnt in
    memory and then written in one step, so that a run is the old one or the new one and never half
    of each. Raises UserError for what the user can mend.
    """
    run_dir = RunDirectory(config.out, RESULTS)
    with run_dir.writing():
        old = extended(config) if resume else None
        run_dir.refuse_what_is_not_ours()
        config = dataclasses.replace(config, data=absolute(config.data))
        texts = load_texts(config.data)
        split = {name: split_lines(text, config.held_out) for name, text in texts.items()}
        before = run_dir.history() if resume else []
        introduce(config, texts, split)
        with stop_signals() as interrupted:
            watcher = Watcher(config, interrupted, before[-1]["step"] if before else 0)
            try:
                documents = [line for kept, _ in split.values() for line in kept]
                tokenizer = learn(config, documents, watcher, old)
            except ValueError as error:
                raise UserError(f"{error}; change --vocab-size, --pattern or --data") from None
            cut = interrupted()
            log = before + watcher.log
            run_dir.create(saved_options(config), lambda folder: fill(folder, tokenizer, log))
    conclude(config, tokenizer, split, cut)
    return log


def absolute(data: str | None) -> str | None:
    """--data as it stays right when the command is given from elsewhere."""
    return data if data is None or data.startswith("hf:") else str(Path(data).resolve())


def saved_options(config: TrainConfig) -> dict:
    """What config.json says of a run: all but where it lies, which may change."""
    options = dataclasses.asdict(config)
    del options["out"]
    return {"train": options}


def fill(folder: Path, tokenizer: Tokenizer, log: list[dict]) -> None:
    """The files of a run beside config.json: the tokenizer, and a line for each step."""
    unigram = tokenizer.algorithm == "unigram"
    save(tokenizer, folder / ("tokenizer.model" if unigram else "tokenizer.json"))
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in log)
    write_text(folder / "log.jsonl", lines)


def started_with(folder: Path) -> TrainConfig:
    """The options of the run in `folder`. UserError if there is none, or if it is damaged."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"nothing to resume in {folder}: no run was started there")
    config = make_config(TrainConfig, read_json(path).get("train"), path)
    return dataclasses.replace(config, out=str(folder), steps=None)


def extended(config: TrainConfig) -> BPE:
    """The BPE of the run to resume; UserError if there is none that could grow."""
    file = Path(config.out) / "tokenizer.json"
    if config.algorithm != "bpe":
        raise UserError(f"{config.out} holds no BPE: the others train in seconds, start again")
    if not file.is_file():
        raise UserError(f"nothing to resume in {config.out}: no tokenizer.json there, train first")
    try:
        old = load(file)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(old, BPE):
        raise UserError(f"{config.out} holds no BPE: the others train in seconds, start again")
    if len(old) >= config.vocab_size:
        raise UserError(f"{config.out} has {len(old)} tokens already: raise --vocab-size")
    return old


def learn(config: TrainConfig, documents: list[str], watch, old: BPE | None) -> Tokenizer:
    """The tokenizer that the options ask for, or `old` made larger."""
    if old is not None:
        return old.extend(documents, config.vocab_size, watch=watch)
    if config.algorithm == "bpe":
        return BPE.train(documents, config.vocab_size, config.pattern, watch=watch)
    if config.algorithm == "wordpiece":
        return WordPiece.train(documents, config.vocab_size, watch=watch)
    return Unigram.train(documents, config.vocab_size, watch=watch)


def introduce(config: TrainConfig, texts: dict[str, str], split: dict) -> None:
    """What is run, and what to expect."""
    settings = "  ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items())
    say(f"config     {settings}")
    sizes = ", ".join(f"{name} {len(text.encode('utf-8')):,} bytes" for name, text in texts.items())
    part = (
        f"one line in {config.held_out} is held out" if config.held_out else "nothing is held out"
    )
    say(f"data       {sizes}; {part}")
    if config.held_out and (short := [name for name, (a, b) in split.items() if a is b]):
        say(
            f"note       {', '.join(short)}: too few lines to hold any out, measured on all of them"
        )
    say("device     the CPU, one core: plain Python and numpy")
    if usual(config):
        say(f"expect     {EXPECTED[config.algorithm]:.2f} bytes a token at the end, 1.0 before")


def usual(config: TrainConfig) -> bool:
    """Whether EXPECTED speaks of this run."""
    same = dataclasses.replace(TrainConfig(), algorithm=config.algorithm, out=config.out)
    return dataclasses.replace(config, seed=0) == same


def conclude(config: TrainConfig, tokenizer: Tokenizer, split: dict, cut: bool) -> None:
    """What came out, beside what was expected."""
    if len(tokenizer) < config.vocab_size and not cut and config.steps is None:
        say(f"note       the text has no more to merge: {len(tokenizer):,} tokens, not "
            f"{config.vocab_size:,}")  # fmt: skip
    score = measure(tokenizer, {name: "".join(rest) for name, (_, rest) in split.items()})
    got, where = score["bytes_per_token"], "held out   " if config.held_out else "on the text"
    say(f"{where}{got:.2f} bytes a token, {score['tokens_per_word']:.2f} tokens a word")
    if usual(config) and not cut:
        expected = EXPECTED[config.algorithm]
        on = "on" if abs(got / expected - 1) < TOLERANCE else "off"
        say(f"{on} track   expected {expected:.2f}")
    if cut and config.algorithm == "bpe":
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
