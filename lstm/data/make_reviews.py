"""Write `reviews/{train,dev,test}.tsv`: film reviews of which the best possible accuracy is known.

A review has one or two clauses, such as `the plot was not good`. An adjective is worth +1 or −1,
a strong one +2 or −2, and a negation right before it turns the sign around. What joins the clauses
says how they weigh:

    A .                  a          A , and B .       a + b
    A , but B .          a + 3 b    although A , B .  a + 3 b
    B , although A .     3 b + a

Sometimes a sentence stands before or after that has a negation and no opinion (`we had never been
there .`). The label is drawn by dice: positive with probability p = σ(1.5 s), where s is the sum.
So nobody who reads can be right more often than E max(p, 1 − p), the **Bayes accuracy**.

Who only counts words does not know which adjective the `not` belongs to, nor which clause comes
after the `but`. All that counts can tell is in `bag`: what joins the clauses, the kinds of the
adjectives, and how many negations there are. (Which noun or which adjective of a kind it is says
nothing of the label.) `ceilings` goes through every kind of review and adds up both numbers.

    python make_reviews.py        writes the three files and reviews.json (the ceilings)
"""

import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
SIZES, SEED = {"train": 16_000, "dev": 2_000, "test": 4_000}, 18
SHARPNESS = 1.5  # of the label: p = σ(1.5 s)

ADJECTIVES = {
    1: ["decent", "fine", "good", "nice", "pleasant", "solid"],
    2: ["brilliant", "gorgeous", "superb", "thrilling", "touching", "wonderful"],
    -1: ["bad", "bland", "dull", "slow", "stale", "weak"],
    -2: ["awful", "dreadful", "horrible", "painful", "terrible", "unbearable"],
}
NEGATIONS = ["hardly", "never", "not"]
NOUNS = ["acting", "camera", "cast", "dialogue", "ending", "music", "plot", "story"]
P_NEGATION = 0.4
JOINS = {  # how the clauses A and B are joined: (probability, weight of A, weight of B)
    "{a} .": (0.2, 1, 0),
    "{a} , and {b} .": (0.3, 1, 1),
    "{a} , but {b} .": (0.2, 1, 3),
    "although {a} , {b} .": (0.15, 1, 3),
    "{b} , although {a} .": (0.15, 1, 3),
}
ASIDES = {  # sentences without an opinion, {n} is a negation: (probability)
    "{r}": 0.5,
    "we had {n} been there . {r}": 0.25,
    "{r} it {n} rained that day .": 0.25,
}


def positive(s: float) -> float:
    """P(label 1) of a review whose clauses sum to s."""
    return 1 / (1 + math.exp(-SHARPNESS * s))


def review(dice: random.Random) -> tuple[str, float]:
    """A new review and its P(label 1)."""
    join = dice.choices(list(JOINS), [p for p, _, _ in JOINS.values()])[0]
    aside = dice.choices(list(ASIDES), list(ASIDES.values()))[0]
    clauses, values = [], []
    for noun in dice.sample(NOUNS, 2):
        value, negated = dice.choice(list(ADJECTIVES)), dice.random() < P_NEGATION
        words = [dice.choice(NEGATIONS)] if negated else []
        clauses.append(" ".join(["the", noun, "was", *words, dice.choice(ADJECTIVES[value])]))
        values.append(-value if negated else value)
    _, weight_a, weight_b = JOINS[join]
    text = aside.format(r=join.format(a=clauses[0], b=clauses[1]), n=dice.choice(NEGATIONS))
    return text, positive(weight_a * values[0] + weight_b * values[1])


def kinds() -> Iterator[tuple[float, float, tuple]]:
    """Every kind of review: (its probability, P(label 1), what a count of its words tells)."""
    clauses = list(itertools.product(ADJECTIVES, (False, True)))  # (value, negated)
    for join, (p_join, weight_a, weight_b) in JOINS.items():
        connective = "".join(word for word in ("and", "but", "although") if word in join)
        seconds = clauses if weight_b else [(0, False)]
        used = itertools.product(clauses, seconds)
        for (a, not_a), (b, not_b) in used:
            p = p_join / len(ADJECTIVES) ** (2 if weight_b else 1)
            for negated in (not_a, not_b) if weight_b else (not_a,):
                p *= P_NEGATION if negated else 1 - P_NEGATION
            s = weight_a * (-a if not_a else a) + weight_b * (-b if not_b else b)
            for aside, p_aside in ASIDES.items():
                n_negation = sum([not_a, not_b, "{n}" in aside])
                bag = (connective, tuple(sorted((a, b))), n_negation, aside)
                yield p * p_aside, positive(s), bag


def bags() -> dict[tuple, list[float]]:
    """What counts of words tell: P(bag, label 0) and P(bag, label 1) for each bag."""
    found: dict[tuple, list[float]] = {}
    for p, p_positive, bag in kinds():
        both = found.setdefault(bag, [0.0, 0.0])
        both[0] += p * (1 - p_positive)
        both[1] += p * p_positive
    return found


def bag_of(text: str) -> tuple:
    """The bag of a review, from its words in any order."""
    words = text.split()
    value_of = {word: v for v, list_ in ADJECTIVES.items() for word in list_}
    values = [value_of[word] for word in words if word in value_of]
    values += [0] * (2 - len(values))
    connective = next((word for word in ("and", "but", "although") if word in words), "")
    mark = next((word for word in ("there", "rained") if word in words), "")
    aside = next(one for one in ASIDES if mark in one)
    n_negation = sum(word in NEGATIONS for word in words)
    return connective, tuple(sorted(values)), n_negation, aside


def ceilings() -> dict[str, float]:
    """The highest accuracy that can be expected of a reader, and of one who counts words."""
    bayes = sum(p * max(p_positive, 1 - p_positive) for p, p_positive, _ in kinds())
    return {"bayes": bayes, "bag_of_words": sum(map(max, bags().values()))}


def ceiling_of_counts(lines: list[tuple[str, float]]) -> float:
    """What the best rule over counts scores on these (text, P(label 1)), on the average."""
    found = bags()
    votes = [found[bag_of(text)] for text, _ in lines]
    chosen = [p if one[1] >= one[0] else 1 - p for one, (_, p) in zip(votes, lines, strict=True)]
    return sum(chosen) / len(chosen)


def main() -> None:
    """Write text, label and P(label 1), with tabs between.

    Each review is drawn for itself, so that the ceilings hold. A short one can come twice, and then
    its label is drawn twice: who remembers the first knows nothing of the second.
    """
    dice = random.Random(SEED)
    (HERE / "reviews").mkdir(exist_ok=True)
    for part, size in SIZES.items():
        drawn = (review(dice) for _ in range(size))
        lines = [f"{text}\t{int(dice.random() < p)}\t{p:.6f}\n" for text, p in drawn]
        file = HERE / "reviews" / f"{part}.tsv"
        file.write_text("".join(lines), encoding="utf-8", newline="\n")
    drawn = [line.split("\t") for line in lines]  # of the test part, the last one
    on_test = ceiling_of_counts([(text, float(p)) for text, _, p in drawn])
    text = json.dumps(ceilings() | {"bag_of_words_on_test": on_test}, indent=2)
    (HERE / "reviews.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
