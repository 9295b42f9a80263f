"""Write `recall.txt`: llama's stories, each with a question about its beginning, asked twice.

    Once upon a time there was a stubborn badger named Dora. She lived in a hollow log. Who was it?
    Dora, a stubborn badger in a hollow log. One rainy day, … (the rest of the story, about 110
    words) Who was it? Dora, a stubborn badger in a hollow log.

The story comes from the grammar in make_stories.py, which is llama's to the letter. What kind of
animal the hero is, and where it lives, is said at the beginning and not again before the end, so
there only a model that looks back over the whole story can answer. One that cannot pays ln 10 nats
for the kind alone, there being ten of them. The first question is easy, as the words that answer it
stand close by: from it a model learns what to look for. Without it, most trainings of a few minutes
never found out.

The answers follow from the story: p(text) is the story's own, and 0 with a wrong answer. The mean
of −log p over the held-out texts is the lowest loss that any model can expect: the floor.

    python make_recall.py          writes recall.txt and floor.json beside this file
"""

import json
import math
import random
import re
from pathlib import Path

import make_stories
from make_stories import HOMES, KINDS, TRAITS, Teller, part

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"  # on a line of its own between two texts
N_TEXT = 2_900
QUESTION = " Who was it?"
SEED = 13
HERO = re.compile(
    rf"\b(a (?:(?:{'|'.join(TRAITS)}) )?(?:{'|'.join(KINDS)})) (?:named|called) (\w+)"
)
HOME = re.compile("|".join(HOMES))


def answer(story: str) -> str:
    """' Dora, a stubborn badger in a hollow log.': name, kind and home of the story's hero.

    Raises ValueError for a text that does not say them.
    """
    hero, home = HERO.search(story), HOME.search(story)
    if not hero or not home:
        raise ValueError("the story does not say who lived where")
    return f" {hero[2]}, {hero[1]} {home[0]}."


def asked(story: str) -> str:
    """The story with the question and its answer behind the second sentence and at the end."""
    first, second, rest = story.split(". ", 2)
    question = QUESTION + answer(story)
    return f"{first}. {second}.{question} {rest}{question}"


def tell(dice: random.Random) -> str:
    """One text."""
    teller = Teller(dice)
    make_stories.story(teller.pick, teller.say)
    return asked(teller.text)


def log_prob(text: str) -> float:
    """log p(text) in nats; −inf for what the dice cannot say."""
    story = re.sub(rf"{re.escape(QUESTION)} .*?\.", "", text)
    told = make_stories.log_prob(story)
    return told if told > -math.inf and asked(story) == text else -math.inf


def floor_of(texts: list[str]) -> dict:
    """How much text that is, and its −log p in nats: in all and per character."""
    n_char, nats = sum(map(len, texts)), -math.fsum(map(log_prob, texts))
    return {"texts": len(texts), "chars": n_char, "nats": nats, "nats_per_char": nats / n_char}


def main():
    dice = random.Random(SEED)
    texts = [tell(dice) for _ in range(N_TEXT)]
    content = "".join(f"{text}\n{SEPARATOR}\n" for text in texts)
    (HERE / "recall.txt").write_text(content, encoding="utf-8", newline="\n")
    floor = {"valid": floor_of(part(texts, 0.9, 0.95)), "test": floor_of(part(texts, 0.95, 1))}
    content = json.dumps(floor, indent=2) + "\n"
    (HERE / "floor.json").write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
