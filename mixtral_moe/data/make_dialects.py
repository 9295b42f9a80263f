"""Write `dialects.txt`: texts in four dialects that share their words and differ in their grammar.

A dialect is a table: after each word one of four words comes, with probability 1/2, 1/4, 1/8 or
1/8. 80 words are common to all dialects, 110 more are its own, and the table has nothing to do with
those of the others. Each sentence begins with one of the dialect's eight particles, small
capitalised words that no other dialect has. So whoever wants to know what comes after the common
word `ba` must remember in which dialect he is.

    a text      in one dialect; after each of its sentences it ends with probability 1/16
    a sentence  a particle, each with probability 1/8, then 3 to 6 words, each length equally likely

In the file the texts stand in chapters, CHAPTER of one dialect after the other, so that a row of
training text that goes on in the next text seldom changes the dialect.

No two ways of throwing these dice spell the same text. So p(text) is one product, and the mean of
−log p over the held-out texts is the lowest loss that any model can expect there: the floor.

    python make_dialects.py          writes dialects.txt and floor.json beside this file
"""

import itertools
import json
import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"  # on a line of its own between two texts
N_DIALECT, N_COMMON, N_OWN, N_PARTICLE = 4, 80, 110, 8
PROBABILITIES = (1 / 2, 1 / 4, 1 / 8, 1 / 8)  # of the four words that may follow
CHAPTER = 10  # texts
LENGTHS = range(3, 7)  # words of a sentence after its particle
END = 1 / 16  # the probability that a text ends after a sentence
N_CHAR = 1_800_000
SEED = 4


def syllables(dice: random.Random) -> list[str]:
    """Short words that can be spoken, in random order: ba, dom, ris."""
    words = ["".join(x) for x in itertools.product("bdfgklmnprstvz", "aeiou", ("", *"klmnrst"))]
    dice.shuffle(words)
    return words


def make_tables() -> tuple[list[list[str]], list[dict[str, list[str]]]]:
    """(particles of each dialect, for each dialect the four words that may follow a word)."""
    dice = random.Random(SEED)
    names = syllables(dice)
    common, particles, after = [names.pop() for _ in range(N_COMMON)], [], []
    for _ in range(N_DIALECT):
        particles.append([names.pop().capitalize() for _ in range(N_PARTICLE)])
        words = common + [names.pop() for _ in range(N_OWN)]
        after.append({w: dice.sample(words, len(PROBABILITIES)) for w in words + particles[-1]})
    return particles, after


PARTICLES, AFTER = make_tables()


def tell(dialect: int, dice: random.Random) -> str:
    """One text."""
    said, ends = [], False
    while not ends:
        said.append(dice.choice(PARTICLES[dialect]))
        for _ in range(dice.choice(LENGTHS)):
            said += dice.choices(AFTER[dialect][said[-1]], PROBABILITIES)
        ends = dice.random() < END
    return " ".join(said)


def dialect_of(text: str) -> int | None:
    """The dialect of a text, by its first particle; None without one."""
    for word in text.split():
        for dialect, particles in enumerate(PARTICLES):
            if word in particles:
                return dialect
    return None


def log_prob(text: str) -> float:
    """log p(text) in nats; −inf for what is no text of these dialects."""
    dialect, words = dialect_of(text), text.split()
    if dialect is None or text != " ".join(words):
        return -math.inf
    begins = [i for i, word in enumerate(words) if word in PARTICLES[dialect]]
    total = -math.log(N_DIALECT) + math.log(END) + (len(begins) - 1) * math.log(1 - END)
    if begins[0] != 0:
        return -math.inf
    for first, last in itertools.pairwise([*begins, len(words)]):
        total += sentence_log_prob(words[first:last], AFTER[dialect])
    return total


def sentence_log_prob(words: list[str], after: dict[str, list[str]]) -> float:
    """log p of a particle and the words behind it; −inf if they cannot be."""
    if len(words) - 1 not in LENGTHS:
        return -math.inf
    total = -math.log(N_PARTICLE) - math.log(len(LENGTHS))
    for word, following in itertools.pairwise(words):
        if following not in after[word]:
            return -math.inf
        total += math.log(PROBABILITIES[after[word].index(following)])
    return total


def part(texts: list[str], begin: float, end: float) -> list[str]:
    """The texts that begin between these shares of all characters, as `text.Source` cuts them."""
    begins = [0, *itertools.accumulate(map(len, texts))]
    first, last = int(begin * begins[-1]), int(end * begins[-1])
    return [text for at, text in zip(begins, texts, strict=False) if first <= at < last]


def floor_of(texts: list[str]) -> dict:
    """How much text that is, and its −log p in nats: in all and per character."""
    n_char, nats = sum(map(len, texts)), -math.fsum(map(log_prob, texts))
    n_word = sum(len(text.split()) for text in texts)
    found = {"texts": len(texts), "words": n_word, "chars": n_char, "nats": nats}
    return found | {"nats_per_char": nats / n_char}


def main():
    dice, texts = random.Random(SEED), []
    while sum(map(len, texts)) < N_CHAR:
        for dialect in dice.sample(range(N_DIALECT), N_DIALECT):
            texts += [tell(dialect, dice) for _ in range(CHAPTER)]
    content = "".join(f"{text}\n{SEPARATOR}\n" for text in texts)
    (HERE / "dialects.txt").write_text(content, encoding="utf-8", newline="\n")
    floor = {"valid": floor_of(part(texts, 0.9, 0.95)), "test": floor_of(part(texts, 0.95, 1))}
    content = json.dumps(floor, indent=2) + "\n"
    (HERE / "floor.json").write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
