"""The text of this folder: stories of known probability, each with a question about its beginning.

`--data recall` is what this file adds to text.py, which reads, cuts and batches every text.
"""

import copy
import itertools
from pathlib import Path

import numpy as np

import text
from run import read_json
from text import Tokens
from tokenizer import Tokenizer

RECALL = Path(__file__).resolve().parent / "data" / "recall.txt"
FLOOR = RECALL.with_name("floor.json")
INSIDE = ("recall",)  # names of data that come with the folder
QUESTION = " Who was it?"
KINDS = tuple(
    f" {kind}" for kind in "fox hare badger hedgehog rabbit goat bear lamb pony kitten".split()
)


def measure(name: str) -> text.Source:
    """The source called `name`: recall, a file, a folder, or hf:OWNER/NAME."""
    return text.Source.measure(str(RECALL) if name == "recall" else name)


def is_ours(name: str) -> bool:
    """Is `name` the text that comes with the folder?"""
    return name == "recall" or Path(name) == RECALL


def floor(name: str, part: str) -> float | None:
    """The least loss that can be expected on a part of our text, in nats per character.

    It is −log p(text) by the dice that told it, per character; for other text it is unknown.
    No model has a lower expected loss. On this sample of texts one could, by luck, be lower by a
    few tenths of a percent.
    """
    return read_json(FLOOR)[part]["nats_per_char"] if is_ours(name) else None


def answers(tokens: Tokens, tokenizer: Tokenizer) -> Tokens:
    """1 for each token that answers the question of one of our texts, else 0, in rows as `tokens`.

    That is the kind of animal behind the question. In other texts, and with tokenizers whose tokens
    are shorter than words, there is none.
    """
    question = tokenizer.encode_text(QUESTION)
    kinds = [ids[0] for ids in map(tokenizer.encode_text, KINDS) if len(ids) == 1]
    twin, n = copy.copy(tokens), len(question)
    twin.ids = np.zeros(len(tokens.ids), dtype=np.uint16)
    for begin, end in itertools.pairwise(tokens.bounds.tolist()):
        ids = tokens.ids[begin:end].tolist()
        asked = [i for i in range(len(ids) - n) if ids[i : i + n] == question]
        if asked:
            after = np.arange(begin + asked[-1] + n, end)
            twin.ids[after] = np.isin(tokens.ids[after], kinds)
    return twin
