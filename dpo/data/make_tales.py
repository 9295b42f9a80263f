"""Writes `tales.jsonl`: beginnings of stories, and endings in which people are kind or not.

    prompt      Once upon a time there was a shy fox named Ada. … But the coin fell into the pond.
    answer       Soon a frog named Otto came by. Otto … Ada … And …

The beginning is that of make_stories.py, which the base model was trained on. An answer says who
came by, and then has three sentences, in each of which somebody is kind (+1) or unkind (−1), each
with probability ½. The sum of the three is the true reward of an answer: −3, −1, 1 or 3.

Two kinds of lines: {"prompt", "completion"} to learn from what an answer looks like, and
{"prompt", "chosen", "rejected"}, two answers to one beginning, of which a person who follows the
model of Bradley and Terry (1952) chose one: the first with probability σ(r_1 − r_2).
"""

import itertools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import make_stories
from make_stories import FOODS, FRIENDS, TROUBLES, finding, losing, opening

HERE = Path(__file__).resolve().parent
SEED = 11
N_COMPLETION, N_PAIR = 900, 1800
BORDERS = (0.8, 0.9)  # where the parts valid and test begin, in either kind of lines
COMES = ["came by", "heard the noise", "looked around the corner", "stopped to listen"]
DEEDS = sorted({deed for trouble in TROUBLES.values() for deed in trouble["deed"]})
KIND = (  # what is said where somebody is kind: the one who comes by, the hero, and in the end
    [f"{{friend}} {deed}" for deed in DEEDS],
    ['"Thank you, {friend}!" said {name}', "{name} hugged the {helper}",
     "{name} gave {friend} {food}"],
    ["And {name} and {friend} were friends forever", "A friend is worth more than gold",
     "They shared {food} and walked home"],
)  # fmt: skip
UNKIND = (
    ["{friend} laughed at {name} and walked away", "{friend} threw a pebble at {name}",
     "{friend} saw it but did not help"],
    ["{name} kicked the {helper}", "{name} pushed {friend} away", "{name} shouted at the {helper}"],
    ["They never walked home together again", "That night {name} and {friend} were very lonely",
     "And {name} never told {friend} a story again"],
)  # fmt: skip
N_SITE = len(KIND)


def tale(pick, say) -> int:
    """Tell a whole tale, and return its reward. `pick`, `say` as in make_stories.py."""
    name, he = opening(pick, say)
    thing = finding(pick, say, name, he)
    trouble, place = losing(pick, say, name, he, thing)
    return ending(pick, say, name, thing, trouble, place)


def ending(pick, say, name: str, thing: tuple[str, str], trouble: dict, place: str) -> int:
    """Tell the answer to such a beginning, and return its reward."""
    say(pick({"Just then ": 1, "After a while ": 1, "Soon ": 1}))
    helper = pick(trouble["helpers"])
    say(("an " if helper[0] in "aeiou" else "a ") + f"{helper} named ")
    friend = pick(FRIENDS)
    say(f"{friend} ")
    say(pick(COMES) + ". ")
    facts = {"name": name, "friend": friend, "helper": helper, "place": place}
    reward = 0
    for site in range(N_SITE):
        is_kind = pick([True, False])
        reward += 1 if is_kind else -1
        options = KIND[site] if is_kind else UNKIND[site]
        if site == 0 and is_kind:
            options = [f"{{friend}} {deed}" for deed in trouble["deed"]]
        words = pick(options)
        food = pick(FOODS) if "{food}" in words else ""
        say(words.format(**facts, food=food, thing=" ".join(thing)))
        say(". " if site < N_SITE - 1 else ".")
    return reward


# ── The true reward, and who wins ─────────────────────────────────────────────────────────────────


def pattern(words: str) -> re.Pattern:
    """What a sentence of this kind looks like, whoever it is about."""
    parts = re.split(r"\{\w+\}", words)
    return re.compile(".+".join(map(re.escape, parts)))


PATTERNS = [
    [(pattern(words), value) for value, options in ((1, KIND[site]), (-1, UNKIND[site]))
     for words in options]
    for site in range(N_SITE)
]  # fmt: skip


def reward(answer: str) -> int:
    """Kind minus unkind sentences, from the second to the fourth; others count as 0. Any text."""
    sentences = answer.strip().removesuffix(".").split(". ")[1 : 1 + N_SITE]
    total = 0
    for sentence, patterns in zip(sentences, PATTERNS, strict=False):
        total += next((value for p, value in patterns if p.fullmatch(sentence)), 0)
    return total


def log_prob(text: str) -> float:
    """log p(prompt and answer) in nats; −∞ if the grammar cannot tell it, word for word."""
    open_scripts, ways = [((), 0.0)], []
    while open_scripts:
        script, so_far = open_scripts.pop()
        listener = make_stories.Listener(text, script)
        try:
            tale(listener.pick, listener.say)
        except make_stories.Contradiction:
            continue
        except make_stories.Crossroads as stop:
            open_scripts += [((*script, v), so_far + math.log(p)) for v, p in stop.args[0]]
            continue
        if listener.said == len(text):
            ways.append(so_far)
    best = max(ways, default=-math.inf)
    if best == -math.inf:
        return best
    return best + math.log(sum(math.exp(way - best) for way in ways))


def best_policy(beta: float) -> dict[str, float]:
    """What π* ∝ π_ref·exp(r/β) would reach: KL in nats, mean reward, win rate against π_ref.

    π* is kind at each of the three places with probability σ(2/β), and all else is unchanged.
    """
    kind = 1 / (1 + math.exp(-2 / beta))
    entropy = -sum(p * math.log(p) for p in (kind, 1 - kind) if p > 0)
    share = [math.comb(N_SITE, k) * kind**k * (1 - kind) ** (N_SITE - k) for k in range(N_SITE + 1)]
    even = [math.comb(N_SITE, k) * 0.5**N_SITE for k in range(N_SITE + 1)]
    win = sum(p * (sum(even[:k]) + even[k] / 2) for k, p in enumerate(share))  # a tie is half
    kl = N_SITE * (math.log(2) - entropy)
    return {"kl": kl, "reward": N_SITE * (2 * kind - 1), "win_rate": win}


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def draw_prompt(dice: random.Random) -> tuple[str, tuple]:
    """A beginning, and what its endings are about: name, thing, trouble, place."""
    teller = make_stories.Teller(dice)
    name, he = opening(teller.pick, teller.say)
    thing = finding(teller.pick, teller.say, name, he)
    trouble, place = losing(teller.pick, teller.say, name, he, thing)
    return teller.text.removesuffix(" "), (name, thing, trouble, place)


def draw_answer(dice: random.Random, facts: tuple) -> str:
    """An answer to a beginning."""
    teller = make_stories.Teller(dice)
    ending(teller.pick, teller.say, *facts)
    return " " + teller.text


def draw_pair(dice: random.Random) -> dict[str, str]:
    """Two answers to one beginning, and which of them was chosen."""
    prompt, facts = draw_prompt(dice)
    one, other = draw_answer(dice, facts), draw_answer(dice, facts)
    if dice.random() >= 1 / (1 + math.exp(reward(other) - reward(one))):
        one, other = other, one
    return {"prompt": prompt, "chosen": one, "rejected": other}


def draw_rows(dice: random.Random) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for _ in range(N_COMPLETION):
        prompt, facts = draw_prompt(dice)
        rows.append({"prompt": prompt, "completion": draw_answer(dice, facts)})
    return rows + [draw_pair(dice) for _ in range(N_PAIR)]


def limits(pairs: list[dict[str, str]]) -> dict[str, float]:
    """The least preference loss and the highest accuracy that any model can expect on pairs.

    Both follow from p = σ(difference of true rewards): the entropy of p, and the larger of p and
    1 − p.
    """
    gaps = [abs(reward(pair["chosen"]) - reward(pair["rejected"])) for pair in pairs]
    shares = [1 / (1 + math.exp(-gap)) for gap in gaps]
    nats = [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares]
    return {
        "pairs": len(pairs),
        "floor": math.fsum(nats) / len(pairs),
        "accuracy": math.fsum(shares) / len(pairs),
    }


def held_out_stories() -> list[str]:
    """The test part of the stories that the base model was trained on (make_stories.py)."""
    dice, stories = random.Random(make_stories.SEED), []
    for _ in range(make_stories.N_STORY):
        teller = make_stories.Teller(dice)
        make_stories.story(teller.pick, teller.say)
        stories.append(teller.text)
    return make_stories.part(stories, 0.95, 1)


def write(name: str, text: str) -> None:
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def limits_of_parts(rows: list[dict[str, str]]) -> dict[str, dict]:
    """`limits` of the parts of the pairs."""
    pairs = [row for row in rows if "chosen" in row]
    ends = [0, *(int(border * len(pairs)) for border in BORDERS), len(pairs)]
    parts = zip(("train", "valid", "test"), itertools.pairwise(ends), strict=True)
    return {part: limits(pairs[a:b]) for part, (a, b) in parts}


def main(stories: Callable[[], list[str]] = held_out_stories):
    rows = draw_rows(random.Random(SEED))
    write("tales.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    told = stories()
    separator = make_stories.SEPARATOR
    write("stories_test.txt", "".join(f"{story}\n{separator}\n" for story in told))
    floor = limits_of_parts(rows) | {"stories": make_stories.floor_of(told)}
    write("floor.json", json.dumps(floor, indent=2) + "\n")


if __name__ == "__main__":
    main()
