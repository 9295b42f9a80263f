"""The text of this folder: four dialects whose exact probabilities, and whose names, are known.

`--data dialects` is what this file adds to text.py, which reads, cuts and batches every text.
"""

import copy
import itertools
import runpy
from pathlib import Path

import numpy as np

import text
from run import read_json
from text import Tokens
from tokenizer import Tokenizer

DIALECTS = Path(__file__).resolve().parent / "data" / "dialects.txt"
FLOOR = DIALECTS.with_name("floor.json")
SOURCE = DIALECTS.with_name("make_dialects.py")
INSIDE = ("dialects",)  # names of data that come with the folder
N_DIALECT = 4
UNKNOWN = N_DIALECT  # the label of tokens of which nobody knows the dialect


def measure(name: str) -> text.Source:
    """The source called `name`: dialects, a file, a folder, or hf:OWNER/NAME."""
    return text.Source.measure(str(DIALECTS) if name == "dialects" else name)


def is_ours(name: str) -> bool:
    """Is `name` the text that comes with the folder?"""
    return name == "dialects" or Path(name) == DIALECTS


def floor(name: str, part: str) -> float | None:
    """The least loss that can be expected on a part of our text, in nats per character.

    It is −log p(text) by the dice that told it, per character; for other text it is unknown.
    No model has a lower expected loss. On this sample of texts one could, by luck, be lower by a
    few tenths of a percent.
    """
    return read_json(FLOOR)[part]["nats_per_char"] if is_ours(name) else None


def telling_words() -> list[set[str]]:
    """The words that give each dialect away: its particles, and all others that it has alone."""
    words = [set(after) for after in runpy.run_path(str(SOURCE))["AFTER"]]
    return [own - set().union(*(w for w in words if w is not own)) for own in words]


def labels(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """The dialect of every token, cut into the same rows as the tokens themselves.

    Ids 0 … N_DIALECT − 1; UNKNOWN in texts that begin with no particle of ours, and for the token
    that begins a text, since nobody can know the dialect there.
    """
    dialect_of = runpy.run_path(str(SOURCE))["dialect_of"]
    twin = copy.copy(tokens)
    twin.ids = np.full(len(tokens.ids), UNKNOWN, dtype=np.uint16)
    for begin, end in itertools.pairwise(tokens.bounds.tolist()):
        dialect = dialect_of(tokenizer.decode(tokens.ids[begin : min(end, begin + 8)].tolist()))
        twin.ids[begin:end] = UNKNOWN if dialect is None else dialect
        if tokens.ids[begin] == tokenizer.bos_id:
            twin.ids[begin] = UNKNOWN
    return twin
