"""Preferences from files or the Hub: prompts with a chosen and a rejected answer.

    {"prompt": "…", "chosen": "…", "rejected": "…"}                       TRL, plain
    {"prompt": [messages], "chosen": [messages], "rejected": [messages]}  TRL, conversational
    {"chosen": [messages], "rejected": [messages]}                        TRL, both with the prompt
    {"conversations": [turns], "chosen": {turn}, "rejected": {turn}}      ShareGPT
    {"instruction": "…", "input": "…", "chosen": "…", "rejected": "…"}    Alpaca
    {"prompt": …, "completion": …}, {"instruction": …, "output": …}       one answer, to imitate

A message is {"role", "content"}, a turn of ShareGPT {"from", "value"}. A file is .jsonl, with one
object a line, or .json, with a list of them. What cannot be read is refused with the number of its
record.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from chat import Messages
from options import UserError, say, shorten
from run import LARGEST_JSON, read_json

FOLDER = Path(__file__).resolve().parent / "data"
TALES, STORIES = FOLDER / "tales.jsonl", FOLDER / "stories_test.txt"
INSIDE = ("tales",)  # names of data that come with the folder
PARTS = ("train", "valid", "test")
BORDERS = (0.8, 0.9)  # of the records, where valid and test begin
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant",
         "system": "system", "tool": "tool"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt with one answer to imitate, or with two, of which the first was preferred.

    Either all are texts, or all are lists of messages.
    """

    prompt: str | Messages
    answers: tuple[str | Messages, ...]


class Malformed(Exception):
    """Why a record is no example."""


# ── Sources ───────────────────────────────────────────────────────────────────────────────────────


def read_parts(name: str) -> dict[str, list[Example]]:
    """The examples of a source in three parts. UserError for what is missing or damaged."""
    records = hub_records(name) if name.startswith("hf:") else file_records(name)
    examples = [example_of(record, where) for record, where in records]
    alike = [number for number, one in enumerate(examples, 1) if prefers_nothing(one)]
    if alike:
        say(f"left out   {len(alike)} pairs of equal answers, the first is number {alike[0]}")
        examples = [one for one in examples if not prefers_nothing(one)]
    pairs = [one for one in examples if len(one.answers) == 2]
    if len(pairs) < len(PARTS):
        raise UserError(f"--data {name} is too short: three pairs or more are needed")
    alone = cut([one for one in examples if len(one.answers) == 1])
    return {part: alone[part] + found for part, found in cut(pairs).items()}


def prefers_nothing(example: Example) -> bool:
    """Are both answers the same?"""
    return len(example.answers) == 2 and example.answers[0] == example.answers[1]


def cut(examples: list[Example]) -> dict[str, list[Example]]:
    """The first 80 % to train on, a tenth to choose the best weights by, and a tenth to test."""
    ends = [int(len(examples) * border) for border in BORDERS]
    if len(examples) >= len(PARTS):  # no part may be empty
        ends = [min(ends[0], len(examples) - 2), min(max(ends[1], ends[0] + 1), len(examples) - 1)]
    parts = examples[: ends[0]], examples[ends[0] : ends[1]], examples[ends[1] :]
    return dict(zip(PARTS, parts, strict=True))


def file_records(name: str) -> Iterator[tuple[object, str]]:
    """The records of a .jsonl or .json file, each with the place where it stands."""
    file = TALES if name == "tales" else Path(name)
    if file.exists() and not file.is_file():
        raise UserError(f"--data {file} is no file: a .jsonl or .json of preferences is needed")
    if not file.exists():
        raise UserError(f"--data {file}: there is no such file")
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"--data {file} is larger than {LARGEST_JSON:,} bytes: cut it up")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (at byte {error.start})") from None
    if text.lstrip().startswith("["):
        yield from list_records(text, file)
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut at U+2028 too
        if line.strip():
            yield parse(line, f"{file}, line {number}"), f"{file}, line {number}"


def list_records(text: str, file: Path) -> Iterator[tuple[object, str]]:
    """The records of a JSON list."""
    records = parse(text, str(file))
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield record, f"{file}, record {number}"


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON: {shorten(error, 80)}") from None


def hub_records(name: str) -> Iterator[tuple[object, str]]:
    """The rows of a Hub data set (split train), or of a local copy of one."""
    import datasets

    try:
        rows = datasets.load_dataset(name.removeprefix("hf:"), split="train")
    except Exception as error:  # the library raises many kinds
        raise UserError(f"cannot load --data {name}: {error}") from None
    for number, row in enumerate(rows, 1):
        yield row, f"{name}, record {number}"


# ── Records ───────────────────────────────────────────────────────────────────────────────────────


def example_of(record, where: str) -> Example:
    """A record as an example. UserError names the record and what is wrong with it."""
    try:
        if not isinstance(record, dict):
            raise Malformed(f"an object was expected, not {shorten(record, 40)}")
        example = read_record(record)
        refuse_empty(example)
        return example
    except Malformed as error:
        raise UserError(f"{where}: {error}") from None


def read_record(record: dict) -> Example:
    """The example of a record, whichever form it has."""
    names = [name for name in ("chosen", "rejected") if record.get(name) is not None]
    if len(names) == 1:
        missing = "rejected" if names == ["chosen"] else "chosen"
        raise Malformed(f"there is {names[0]}, but no {missing}")
    if not names:
        names = [name for name in ("completion", "response", "output") if name in record][:1]
    if not names:
        found = shorten(", ".join(map(str, record)) or "none", 80)
        raise Malformed(f"`chosen` and `rejected`, or `completion`, are needed, not {found}")
    answers = tuple(text_or_messages(record[name], name) for name in names)
    prompt = prompt_of(record)
    if prompt is None:
        prompt, answers = shared_start(answers)
    kinds = {type(one) for one in (prompt, *answers)}
    if len(kinds) > 1:
        raise Malformed(f"prompt and {names[0]} must both be texts, or both lists of messages")
    return Example(prompt, answers)


def prompt_of(record: dict) -> str | Messages | None:
    """What stands before the answers; None if the answers hold it themselves."""
    if "prompt" in record:
        return text_or_messages(record["prompt"], "prompt")
    if "conversations" in record:
        return text_or_messages(record["conversations"], "conversations")
    if "instruction" not in record:
        return None
    asked, more = record["instruction"], record.get("input") or ""
    if not isinstance(asked, str) or not isinstance(more, str):
        raise Malformed("instruction and input must be texts")
    return f"{asked}\n{more}\n" if more else f"{asked}\n"


def text_or_messages(value, name: str) -> str | Messages:
    """A text as it is; a message or turn, or a list of them, as messages."""
    if isinstance(value, str):
        return value
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise Malformed(f"{name} is no text and no list of messages")
    return [message(one, f"{name}, message {number}") for number, one in enumerate(value, 1)]


def message(value, name: str) -> dict[str, str]:
    """{"role", "content"}, from that form or from ShareGPT's {"from", "value"}."""
    if not isinstance(value, dict):
        raise Malformed(f"{name} is no object")
    role = value.get("role", value.get("from"))
    content = value.get("content", value.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise Malformed(f"{name} has no role that is known, but {shorten(role, 40)}")
    if not isinstance(content, str):
        raise Malformed(f"{name} has no text")
    return {"role": ROLES[role], "content": content}


def shared_start(answers: tuple) -> tuple[Messages, tuple]:
    """The messages that both answers begin with, and what is left of each."""
    if not all(isinstance(one, list) for one in answers):
        raise Malformed("there is no prompt")
    n_same, shortest = 0, min(len(one) for one in answers)
    if len(answers) == 1:
        n_same = shortest - 1
    else:
        while n_same < shortest - 1 and answers[0][n_same] == answers[1][n_same]:
            n_same += 1
    return answers[0][:n_same], tuple(one[n_same:] for one in answers)


def refuse_empty(example: Example) -> None:
    """Malformed if there is nothing to go on from, or nothing to say."""
    if not example.prompt:
        raise Malformed("the prompt is empty")
    for answer in example.answers:
        said = answer if isinstance(answer, str) else answer[-1]["content"]
        if not said.strip():
            raise Malformed("an answer is empty")
        if not isinstance(answer, str) and [m["role"] for m in answer] != ["assistant"]:
            raise Malformed("an answer must be one message of the assistant")


def limits(name: str, part: str) -> dict[str, float] | None:
    """{"floor", "accuracy"}: the best loss and accuracy to be expected on a part of the tales.

    They follow from how the labels were drawn; for other data they are unknown.
    """
    if name != "tales" and Path(name) != TALES:
        return None
    return read_json(FOLDER / "floor.json")[part]
