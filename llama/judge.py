"""Scores of what a model writes by itself: how many of its stories could the grammar have told?

A story that the grammar cannot tell has a slip in it: a name, a thing or a sentence that does not
go with what came before. Loss on existing stories says little about such slips, since one wrong
word among a hundred costs it almost nothing.
"""

import math
import runpy
from pathlib import Path

from checkpoint import Loaded
from generate import Sampling, generate

GRAMMAR = str(Path(__file__).resolve().parent / "data" / "make_stories.py")
N_SAMPLE = 200
TEMPERATURES = (1.0, 0.7)


def stories(loaded: Loaded, temperature: float, n_sample: int, seed: int = 0) -> list[str]:
    """Stories from nothing but the beginning of a document."""
    prompt, sampling = loaded.tokenizer.encode(""), Sampling(temperature=temperature)
    rows: list[list[int]] = [[] for _ in range(n_sample)]
    longest = loaded.model.config.seq_len
    for ids in generate(loaded.model, [prompt], longest, sampling, loaded.stop_ids, seed, n_sample):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return [loaded.tokenizer.decode(row) for row in rows]


def share_told(loaded: Loaded, temperature: float, n_sample: int = N_SAMPLE) -> float:
    """The share of sampled stories that the grammar of data/make_stories.py can tell."""
    grammar = runpy.run_path(GRAMMAR)
    texts = stories(loaded, temperature, n_sample)
    told = [text for text in texts if grammar["log_prob"](text) > -math.inf]
    return len(told) / n_sample
