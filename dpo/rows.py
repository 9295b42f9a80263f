"""Examples as tokens: encoded, cut to the context, put into batches, kept in the run.

    examples ──▶ ids of prompt and answers ──▶ train, valid, test.bin ──▶ batches of similar length

A batch is a function of (seed, step) alone, so a resumed run and any number of ranks see the same
rows, and there is no sampler state to save.
"""

import functools
import itertools
import math
from pathlib import Path

import numpy as np

from chat import answer_ids, prompt_ids, texts_of
from data import PARTS, Example
from options import UserError
from packing import N_ANSWER, Packed, Text, length, pack
from run import read_json, whole_file, write_json
from tokenizer import Tokenizer

NEAR = 16  # so many batches are sorted by length together


def encode(example: Example, tokenizer: Tokenizer, longest: int) -> Text | None:
    """The ids of prompt and answers, or None if nothing can be learned from them.

    An answer that reaches beyond `longest` tokens is cut, and then has no end-of-text token.
    Nothing can be learned where the prompt leaves no room for an answer, or where two answers are
    the same once they are cut.
    """
    prompt, answers = example.prompt, list(example.answers)
    if not isinstance(prompt, str):
        both = [texts_of(prompt, answer, tokenizer) for answer in answers]
        prompt, answers = both[0][0], [answer for _, answer in both]
    given = prompt_ids(prompt, tokenizer)
    room = longest - len(given)
    if not given or room < 1:
        return None
    learned = [answer_ids(answer, tokenizer)[:room] for answer in answers]
    cut_alike = len(learned) == 2 and learned[0] == learned[1]
    return (given, learned) if all(learned) and not cut_alike else None


def chunks(items: list[int], size: int) -> list[list[int]]:
    """The items, `size` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]


class Examples:
    """One part as tokens. texts: prompt and one or two answers of each."""

    def __init__(self, texts: list[Text]):
        self.texts = texts
        self.pairs = [i for i, (_, answers) in enumerate(texts) if len(answers) == 2]
        alone = [i for i, (_, answers) in enumerate(texts) if len(answers) == 1]
        self.demonstrations = alone or self.pairs  # what the first stage imitates

    def numbers(self, kind: str, step: int, batch_size: int, seed: int) -> list[int]:
        """The texts of a step: a function of its arguments alone. kind: an attribute above."""
        n_batch = len(self.epoch(kind, 0, batch_size, seed))
        return self.epoch(kind, step // n_batch, batch_size, seed)[step % n_batch]

    @functools.lru_cache(maxsize=4)  # noqa: B019 - there are three Examples in a program
    def epoch(self, kind: str, number: int, batch_size: int, seed: int) -> list[list[int]]:
        """All texts of a kind once, in batches of similar length, which fill up little.

        A batch has batch_size texts, or a few less where they cannot be divided evenly.
        """
        dice = np.random.default_rng((seed, number))
        order = dice.permutation(getattr(self, kind)).tolist()
        batches: list[list[int]] = []
        groups = chunks(order, NEAR * batch_size)
        if len(groups) > 1 and len(groups[-1]) < batch_size:
            left_over = groups.pop()  # too few for a step
            groups[-1] += left_over
        for near in groups:
            near = sorted(near, key=lambda i: length(self.texts[i]))
            n_batch = math.ceil(len(near) / batch_size)
            batches += [part.tolist() for part in np.array_split(near, n_batch)]
        return [batches[i] for i in dice.permutation(len(batches))]

    def in_order(self, kind: str, batch_size: int) -> list[list[int]]:
        """All texts of a kind once, shortest first."""
        order = sorted(getattr(self, kind), key=lambda i: length(self.texts[i]))
        return chunks(order, batch_size)

    def packed(self, numbers: list[int], kind: str, capacity: int, n_answer: int) -> Packed:
        """Rows of these texts with the first n_answer answers of each.

        The third answer, for KTO, is the chosen one of the text before it in the list; in a list
        of one text, that of another pair of the part, if there is one.
        """
        texts = []
        for place, i in enumerate(numbers):
            prompt, answers = self.texts[i]
            answers = answers[:1] if kind == "demonstrations" else answers[:n_answer]
            if n_answer == N_ANSWER and kind == "pairs":
                other = numbers[place - 1]
                if len(numbers) == 1:
                    other = self.pairs[self.pairs.index(i) - 1]
                answers = [*answers, self.texts[other][1][0]]
            texts.append((prompt, answers))
        return pack(texts, capacity)


# ── A part, and the files of a run ────────────────────────────────────────────────────────────────


def encode_part(examples: list[Example], tokenizer: Tokenizer, longest: int) -> Examples:
    """A part as tokens, without the examples that do not fit."""
    found = (encode(example, tokenizer, longest) for example in examples)
    return Examples([text for text in found if text])


def write_examples(parts: dict[str, Examples], folder: Path) -> None:
    """Write the tokens of each part into a run, so that resuming needs the data no more."""
    sizes = {}
    for part, examples in parts.items():
        ids = [i for prompt, answers in examples.texts for i in itertools.chain(prompt, *answers)]
        with whole_file(folder / f"{part}.bin") as file:
            file.write_bytes(np.array(ids, dtype=np.int32).tobytes())
        sizes[part] = [[len(p), *map(len, answers)] for p, answers in examples.texts]
    write_json(folder / "tokens.json", sizes)


def load_examples(folder: Path, vocab_size: int) -> dict[str, Examples]:
    """The reverse of `write_examples`. UserError for files that are damaged."""
    sizes = read_json(folder / "tokens.json")
    try:
        return {part: load_part(folder, part, sizes[part], vocab_size) for part in PARTS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokens of the run in {folder} are damaged: {error}") from None


def load_part(folder: Path, part: str, sizes: list[list[int]], vocab_size: int) -> Examples:
    """One part. ValueError or TypeError for what cannot be."""
    ids, texts, start = np.fromfile(folder / f"{part}.bin", dtype=np.int32), [], 0
    for lengths in sizes:
        if len(lengths) not in (2, 3) or not all(type(n) is int and n > 0 for n in lengths):
            raise ValueError(f"{lengths} of {part} are no lengths")
        ends = [start, *(start + n for n in itertools.accumulate(lengths))]
        prompt, *answers = (ids[a:b].tolist() for a, b in itertools.pairwise(ends))
        texts.append((prompt, answers))
        start = ends[-1]
    if start != len(ids) or not texts:
        raise ValueError(f"{part}.bin does not hold {start} ids")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{part}.bin holds ids of another tokenizer")
    return Examples(texts)
