"""Write sums.txt: sentences of a tiny grammar whose entropy is known.

    python data/make_text.py

Every sentence is drawn uniformly from those of one of two templates, so no model can beat
FLOOR = (ln 2 + mean over templates of ln(number of its sentences)) / (mean length in characters)
nats per character. A sum has many words and few choices: its end follows from its beginning.
"""

import math
import random
from pathlib import Path

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
WHO = ["anna", "bela", "carl", "dora", "emil", "fara"]
SEES = ["sees", "finds", "paints"]
COLOUR = ["red", "blue", "green", "grey"]
WHAT = ["cat", "dog", "bird", "fish", "boat", "tree"]


def sums():
    """All sentences of the first template."""
    return [
        f"{NUMBERS[a]} and {NUMBERS[b]} make {NUMBERS[a + b]}.\n"
        for a in range(11)
        for b in range(11 - a)
    ]


def scenes():
    """All sentences of the second template: the plural follows the number."""
    return [
        f"{who} {sees} {n} {colour} {what if n == 'one' else plural(what)}.\n"
        for who in WHO
        for sees in SEES
        for n in NUMBERS[1:4]
        for colour in COLOUR
        for what in WHAT
    ]


def plural(what):
    return what + ("es" if what == "fish" else "s")


def floor():
    """The entropy of the text in nats per character."""
    templates = (sums(), scenes())
    nats = math.log(2) + sum(math.log(len(t)) for t in templates) / 2
    return nats / (sum(sum(map(len, t)) / len(t) for t in templates) / 2)


if __name__ == "__main__":
    draw = random.Random(0)
    templates = (sums(), scenes())
    text = "".join(draw.choice(draw.choice(templates)) for _ in range(4000))
    Path(__file__).with_name("sums.txt").write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(text):,} characters, floor {floor():.4f} nats per character")
