"""What a model writes, judged by the grammar of the news: exact, with no other model as a judge.

style    the share of answers that the grammar could have told, about whatever
asked    the share that it could have told about the name, color and thing of the instruction
"""

import math
import sys
from pathlib import Path

from checkpoint import Loaded
from data import Pair
from generate import Sampling, generate

sys.path.append(str(Path(__file__).resolve().parent / "data"))
import make_news

TEMPERATURE = 0.7


def answers(
    loaded: Loaded, pairs: list[Pair], temperature: float = TEMPERATURE, seed: int = 0
) -> list[str]:
    """What the model answers to the prompts of these pairs."""
    prompts = [loaded.tokenizer.encode(pair.prompt) for pair in pairs]
    rows: list[list[int]] = [[] for _ in prompts]
    sampling, longest = Sampling(temperature=temperature), loaded.model.config.seq_len
    for ids in generate(loaded.model, prompts, longest, sampling, loaded.stop_ids, seed):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return [loaded.tokenizer.decode(row) for row in rows]


def shares(texts: list[str], pairs: list[Pair]) -> dict[str, float]:
    """{"style", "asked"}: which share of the texts has the style, and which does as asked."""
    asked = [make_news.read_facts(pair.prompt) for pair in pairs]
    style = [make_news.log_prob(text) > -math.inf for text in texts]
    done = [make_news.log_prob(t, f) > -math.inf for t, f in zip(texts, asked, strict=True)]
    return {"style": sum(style) / len(texts), "asked": sum(done) / len(texts)}


def judge(loaded: Loaded, pairs: list[Pair]) -> dict[str, float]:
    """The same of what the model answers to these pairs."""
    return shares(answers(loaded, pairs), pairs)
