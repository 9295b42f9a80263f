"""Write `notes.txt`: little notes from a source of which every probability is known.

The source is a table: in each state there are some pieces of text, each with its probability and
the state that follows. The state knows whose note it is, what that person has, whether a quotation
is open and how many brackets are. So there are four things to remember while reading:

    the person        decides between He and She, and between his and hers
    colour and thing  come back, at the latest at the end of the note, often 100 letters later
    the quotation     must be closed before the next sentence begins
    the brackets      up to three deep, each must be closed

`Listener` reads a text letter by letter and says how probable each letter was, given all before. It
keeps every way in which the source could have come so far, with its probability, and adds them up,
so the number is exact even where two pieces of text begin alike. The mean of −ln p is the lowest
loss that any model can expect: the floor.

    python make_notes.py          writes notes.txt and notes.json (the floor) beside this file
"""

import functools
import json
import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
N_CHAR, SEED = 1_000_000, 12
BORDERS = {"train": (0.0, 0.9), "valid": (0.9, 0.95), "test": (0.95, 1.0)}  # as text.py cuts

PEOPLE = {
    **dict.fromkeys(["Anton", "Bruno", "Karl"], ("He", "his")),
    **dict.fromkeys(["Emma", "Ida", "Nora"], ("She", "hers")),
}
FRIENDS = ["Mother", "The baker", "Uncle Leo", "An old man"]
COLOURS = ["black", "green", "red", "white"]
THINGS = ["bell", "drum", "kite", "lamp"]
VERBS = ["goes", "hurries", "jumps", "rides", "runs", "sails", "walks", "wanders"]
WE = ["go", "hurry", "jump", "ride", "run", "sail", "walk", "wander"]
PLACES = ["bridge", "castle", "church", "farm", "forest", "garden", "harbour", "market", "mill",
          "river", "school", "station", "tower", "village", "well", "windmill"]  # fmt: skip
NEAR = ["behind", "beside", "near", "past"]
DEEPEST = 3  # brackets

# A state is (what comes next, person, colour, thing, is a quotation open, open brackets).
State = tuple
START = ("person", "", "", "", False, 0)


def evenly(texts: list[str], mass: float, then: str, state: State) -> list[tuple]:
    """Each of the texts with an equal part of `mass`, followed by the state `then`."""
    return [(mass / len(texts), text, (then, *state[1:])) for text in texts]


def opening(state: State) -> list[tuple]:
    """`Nora has a red, red kite. The kite is hers. `: the beginning of a note, in three choices.

    What will have to be remembered is said twice, the second time soon, so that it pays early to
    remember it for a moment. To remember it to the end of the note is hard, see the README.
    """
    kind, person, colour = state[:3]
    if kind == "person":
        return [(1 / len(PEOPLE), f"{p} has a ", ("colour", p, *state[2:])) for p in PEOPLE]
    if kind == "colour":
        return [(1 / len(COLOURS), f"{c}, {c} ", ("thing", person, c, *state[3:])) for c in COLOURS]
    n, hers = len(THINGS), PEOPLE[person][1]
    return [
        (1 / n, f"{t}. The {t} is {hers}. ", ("sentence", person, colour, t, *state[4:]))
        for t in THINGS
    ]


def sentence(state: State) -> list[tuple]:
    """The beginning of a sentence, or the end of the note."""
    _, person, colour, thing, _, _ = state
    he = PEOPLE[person][0]
    quoted = ("verb", person, colour, thing, True, 0)
    taken = ("place", *state[1:])
    said = [(0.25 / len(FRIENDS), f'{friend} says: "We ', quoted) for friend in FRIENDS]
    end = (0.3, f"{he} still has the {colour} {thing}.\n", START)
    takes = (0.25, f"{he} takes the {colour} {thing} to the ", taken)
    return [(0.2, f"{he} ", ("verb", *state[1:])), takes, *said, end]


def after_place(state: State) -> list[tuple]:
    """What follows a place: a bracket, another place, or the end of bracket or sentence."""
    _, person, colour, thing, quoted, depth = state
    can_open, choices = depth < DEEPEST, []
    if can_open:
        deeper = (person, colour, thing, quoted, depth + 1)
        choices += evenly([f" ({where} the " for where in NEAR], 0.25, "place", ("", *deeper))
    if depth:
        shallower = ("after place", person, colour, thing, quoted, depth - 1)
        choices += evenly([" and the "], 0.2, "place", state)
        return [*choices, (0.55 if can_open else 0.8, ")", shallower)]
    then = ("sentence", person, colour, thing, False, 0)
    choices += evenly([" and then "], 0.15, "verb", state)
    if quoted:
        return [*choices, (0.6, '." ', then)]
    return [*choices, (0.2, f" with the {colour} {thing}. ", then), (0.4, ". ", then)]


@functools.cache
def choices(state: State) -> tuple[tuple, ...]:
    """All (probability, text, next state) of a state; the probabilities sum to 1."""
    kind, quoted = state[0], state[4]
    if kind == "sentence":
        return tuple(sentence(state))
    if kind == "verb":
        verbs = [f"{verb} to the " for verb in (WE if quoted else VERBS)]
        return tuple(evenly(verbs, 1.0, "place", state))
    if kind == "place":
        return tuple(evenly(PLACES, 1.0, "after place", state))
    if kind == "after place":
        return tuple(after_place(state))
    return tuple(opening(state))


def write(n_char: int, seed: int) -> str:
    """Whole notes of at least n_char characters together."""
    dice, state, texts, size = random.Random(seed), START, [], 0
    while size < n_char or state != START:
        options = choices(state)
        _, text, state = dice.choices(options, [p for p, _, _ in options])[0]
        texts.append(text)
        size += len(text)
    return "".join(texts)


class Listener:
    """Reads a text letter by letter and knows how probable each was."""

    def __init__(self):
        self.ways = {("", START): 1.0}  # (text still to come, state after it): probability

    def expanded(self) -> dict:
        """The same ways, each with some text still to come."""
        ways: dict = {}
        for (left, state), p in self.ways.items():
            options = [(1.0, left, state)] if left else choices(state)
            for q, text, then in options:
                ways[text, then] = ways.get((text, then), 0.0) + p * q
        return ways

    def next_letter(self) -> dict[str, float]:
        """The probability of each letter that can come."""
        total: dict[str, float] = {}
        for (left, _), p in self.expanded().items():
            total[left[0]] = total.get(left[0], 0.0) + p
        return total

    def hear(self, letter: str) -> float:
        """ln p of this letter. ValueError if the source never writes it here."""
        fitting = {w: p for w, p in self.expanded().items() if w[0][0] == letter}
        p = sum(fitting.values())
        if not p:
            raise ValueError(f"the source does not write {letter!r} here")
        self.ways = {(left[1:], state): q / p for (left, state), q in fitting.items()}
        return math.log(p)


def log_probs(text: str) -> list[float]:
    """ln p of each letter of a text that begins with a note."""
    listener = Listener()
    return [listener.hear(letter) for letter in text]


def floor(text: str, part: str) -> dict:
    """The entropy of a part of the text: characters, and nats per character."""
    first, last = (int(len(text) * border) for border in BORDERS[part])
    note = text.rfind("\n", 0, first) + 1  # the note in which the part begins
    nats = -sum(log_probs(text[note:last])[first - note :])
    return {"chars": last - first, "nats_per_char": nats / (last - first)}


def main() -> None:
    """Write both files."""
    text = write(N_CHAR, SEED)
    (HERE / "notes.txt").write_text(text, encoding="utf-8", newline="\n")
    floors = {part: floor(text, part) for part in ("valid", "test")}
    (HERE / "notes.json").write_text(json.dumps(floors, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
