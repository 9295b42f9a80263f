"""Pairs of instruction and answer: read, cut into parts, and turned into rows of tokens.

    {"prompt": "News of Juno and a red ribbon:", "response": " Juno …"}     a line of a .jsonl file
    prompt and response ─▶ ids ─▶ row (T + 1) with targets; those of the prompt are IGNORE

Only the answer is learned: what the user asks is given, and predicting it would take strength from
what matters. A plain text is a pair with an empty prompt, and a long one is cut into rows.

Key: B rows, T seq_len.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import text
from options import UserError, shorten
from run import read_json, whole_file, write_json
from text import IGNORE, PARTS
from tokenizer import Tokenizer

FOLDER = Path(__file__).resolve().parent / "data"
NEWS, STORIES = FOLDER / "news.jsonl", FOLDER / "stories_test.txt"
INSIDE = ("news",)  # names of data that come with the folder
NAMES = (("prompt", "response"), ("instruction", "output"))  # keys or columns that are understood


@dataclasses.dataclass(frozen=True)
class Pair:
    """An instruction and its answer."""

    prompt: str
    response: str


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def read_parts(name: str) -> dict[str, list[Pair]]:
    """The pairs of a source in its three parts: `news`, a .jsonl file, hf:OWNER/NAME, or texts.

    UserError for what is missing, damaged or too short.
    """
    path = NEWS if name == "news" else Path(name)
    if name.startswith("hf:"):
        rows = hub_rows(name)
    elif path.suffix == ".jsonl":
        rows = file_rows(path)
    else:
        return text_parts(name)
    pairs = [pair_of(row, where) for row, where in rows]
    if len(pairs) < len(PARTS):
        raise UserError(f"--data {name} is too short: three pairs or more are needed")
    return cut(pairs)


def cut(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """The first 90 % to train on, then 5 % to choose the best by, then 5 % to test."""
    ends = [int(len(pairs) * border) for border in text.BORDERS]
    ends = [min(ends[0], len(pairs) - 2), min(max(ends[1], ends[0] + 1), len(pairs) - 1)]
    return dict(
        zip(PARTS, (pairs[: ends[0]], pairs[ends[0] : ends[1]], pairs[ends[1] :]), strict=True)
    )


def file_rows(file: Path) -> Iterator[tuple[dict, str]]:
    """The JSON objects of a .jsonl file, each with the place where it stands."""
    if not file.is_file():
        raise UserError(f"--data {file}: there is no such file")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (at byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line), f"{file}, line {number}"
            except (ValueError, RecursionError):
                raise UserError(f"{file}, line {number} is no JSON") from None


def hub_rows(name: str) -> Iterator[tuple[dict, str]]:
    """The rows of a Hub data set (split train), or of a local copy of one."""
    import datasets

    try:
        rows = datasets.load_dataset(name.removeprefix("hf:"), split="train")
    except Exception as error:  # the library raises many kinds
        raise UserError(f"cannot load --data {name}: {error}") from None
    yield from ((row, name) for row in rows)


def pair_of(row, where: str) -> Pair:
    """The pair of a JSON object. A row with `text` alone has no prompt."""
    row = row if isinstance(row, dict) else {}
    for prompt, response in NAMES:
        if isinstance(row.get(response), str) and isinstance(row.get(prompt), str):
            more = row.get("input") or ""  # the data sets of Alpaca's kind have a second field
            asked = f"{row[prompt]}\n{more}" if more else row[prompt]
            return refuse_empty(Pair(asked, row[response]), where)
    if isinstance(row.get("text"), str):
        return refuse_empty(Pair("", row["text"]), where)
    found = shorten(", ".join(map(str, row)) or "none", 80)
    raise UserError(f"{where}: texts `prompt` and `response`, or `text`, are needed, not {found}")


def refuse_empty(pair: Pair, where: str) -> Pair:
    if not pair.response:
        raise UserError(f"{where}: the response is empty: there is nothing to learn")
    return pair


def text_parts(name: str) -> dict[str, list[Pair]]:
    """The documents of text files, without prompts."""
    source, parts, held = text.Source.measure(name), {part: [] for part in PARTS}, ""
    for piece, ends, part in source.pieces():
        held += piece
        if ends and held:
            parts[part].append(Pair("", held))
            held = ""
    if not all(parts.values()):
        raise UserError(f"--data {name} is too short: nothing is left to test on")
    return parts


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────


def encode(pair: Pair, tokenizer: Tokenizer) -> list[int]:
    """The ids of a pair between bos and eos. Those that are given and not learned are −1 − id."""
    prompt, response = tokenizer.encode_text(pair.prompt), tokenizer.encode_text(pair.response)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return [-1 - i for i in [*begin, *prompt]] + response + end


class Pairs:
    """One part as tokens. ids: (N,) int32, all rows one after another, negative where given."""

    def __init__(self, ids: np.ndarray, lengths: np.ndarray, n_char: int):
        self.ids, self.n_char = ids, n_char
        ends = np.cumsum(lengths)
        self.bounds = list(zip((ends - lengths).tolist(), ends.tolist(), strict=True))

    def rows(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows, (B, T) int64, filled up to the longest of them."""
        found = [self.ids[slice(*self.bounds[i])].astype(np.int64) for i in numbers]
        width = max(len(row) for row in found) - 1
        inputs = np.zeros((len(found), width), dtype=np.int64)
        targets = np.full_like(inputs, IGNORE)
        for row, (into, onto) in zip(found, zip(inputs, targets, strict=True), strict=True):
            into[: len(row) - 1] = np.where(row < 0, -1 - row, row)[:-1]
            onto[: len(row) - 1] = np.where(row < 0, IGNORE, row)[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def training_rows(self, step: int, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
        """The rows of one step: a function of its arguments alone."""
        places = range(step * batch_size, (step + 1) * batch_size)
        n_row = len(self.bounds)
        return self.rows([int(self.epoch(i // n_row, seed)[i % n_row]) for i in places])

    @functools.lru_cache(maxsize=2)  # noqa: B019 - there are three Pairs in a program
    def epoch(self, number: int, seed: int) -> np.ndarray:
        """The order of the rows in an epoch."""
        return np.random.default_rng((seed, number)).permutation(len(self.bounds))

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows once, in order."""
        for start in range(0, len(self.bounds), batch_size):
            yield self.rows(list(range(start, min(start + batch_size, len(self.bounds)))))


def encode_part(pairs: list[Pair], tokenizer: Tokenizer, seq_len: int, name: str) -> Pairs:
    """A part as tokens. UserError for a prompt that leaves no room for its answer.

    A long answer is cut. A text without prompt goes on in the next row instead, which begins with
    the token where the last one ended.
    """
    rows = []
    for pair in pairs:
        ids = encode(pair, tokenizer)
        given = sum(i < 0 for i in ids)
        if given > seq_len:
            raise UserError(f"--data {name}: a prompt of {given} tokens fills the context of "
                            f"{seq_len}: {shorten(pair.prompt, 60)}")  # fmt: skip
        last = 1 if pair.prompt else max(1, len(ids) - 1)
        rows += [ids[i : i + seq_len + 1] for i in range(0, last, seq_len)]
    rows = [row for row in rows if len(row) > 1]
    if not any(i >= 0 for row in rows for i in row[1:]):
        raise UserError(f"--data {name} is too short: a part has no token to learn")
    lengths, ids = (
        np.array([len(row) for row in rows]),
        np.array(list(itertools.chain(*rows)), dtype=np.int32),
    )
    return Pairs(ids, lengths, sum(len(pair.response) for pair in pairs))


def write_pairs(parts: dict[str, Pairs], folder: Path) -> None:
    """Write the tokens of each part into a run, so that resuming needs the data no more."""
    for part, pairs in parts.items():
        with whole_file(folder / f"{part}.bin") as file:
            file.write_bytes(pairs.ids.tobytes())
    counts = {
        part: {"lengths": [b - a for a, b in pairs.bounds], "chars": pairs.n_char}
        for part, pairs in parts.items()
    }
    write_json(folder / "tokens.json", counts)


def load_pairs(folder: Path, vocab_size: int) -> dict[str, Pairs]:
    """The reverse of `write_pairs`. UserError for files that are damaged."""
    counts, parts = read_json(folder / "tokens.json"), {}
    try:
        for part in PARTS:
            lengths, n_char = counts[part]["lengths"], counts[part]["chars"]
            ids = np.fromfile(folder / f"{part}.bin", dtype=np.int32)
            if not all(type(x) is int and x > 1 for x in lengths) or type(n_char) is not int:
                raise ValueError(f"the lengths of {part} are no sizes")
            if sum(lengths) != len(ids) or not lengths or n_char < 1:
                raise ValueError(f"{part}.bin does not hold {sum(lengths)} ids")
            if max(ids.max(), -1 - ids.min()) >= vocab_size:
                raise ValueError(f"{part}.bin holds ids of another tokenizer")
            parts[part] = Pairs(ids, np.array(lengths), n_char)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokens of the run in {folder} are damaged: {error}") from None
    return parts


def floor(name: str, part: str) -> float | None:
    """The least loss that can be expected on a part of the news, in nats per character.

    It is −log p(answer) by the grammar that told it; for other data it is unknown. "stories" is the
    part of the base model's stories that it was not trained on.
    """
    if name != "news" and Path(name) != NEWS:
        return None
    return read_json(FOLDER / "floor.json")[part]["nats_per_char"]


def story_tokens(tokenizer: Tokenizer) -> text.Tokens:
    """Stories of the base model's own kind that it has not seen: what forgetting is measured on."""
    ids = []
    for story in STORIES.read_text(encoding="utf-8").split(f"\n{text.SEPARATOR}\n"):
        if story:
            ids += [tokenizer.bos_id, *tokenizer.encode_text(story), tokenizer.eos_id]
    n_char = read_json(FOLDER / "floor.json")["stories"]["chars"]
    return text.Tokens(np.array(ids, dtype=text.id_type(tokenizer)), n_char, tokenizer)
