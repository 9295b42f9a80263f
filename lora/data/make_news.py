"""Writes the second style of stories: village news, each with an instruction before it.

    News of Juno and a red ribbon:                  the instruction
     Juno found a red ribbon near the well. …       the answer, four sentences

As in make_stories.py the grammar is one function of (pick, say), run by a Teller to write and by a
Listener to find the probability of a text. So it can be decided exactly whether an answer has the
style, and whether it is about what the instruction asked for.
"""

import itertools
import json
import math
import random
from pathlib import Path

import make_stories
from make_stories import COLORS, FOODS, FRIENDS, NAMES, OBJECTS, SPOTS, TROUBLES

HERE = Path(__file__).resolve().parent
SEED = 7
N_NEWS = 2400
HELD_OUT = {"valid": (0.9, 0.95), "test": (0.95, 1.0)}  # from where to where, of all the news
Facts = tuple[str, str, str]  # the hero's name, and color and thing that the hero finds


def draw_facts(pick) -> Facts:
    """What a piece of news is about."""
    return pick(list(NAMES)), pick(COLORS), pick(OBJECTS)


def instruction(facts: Facts) -> str:
    """The text that asks for the news of these facts."""
    name, color, thing = facts
    return f"News of {name} and a {color} {thing}:"


def news(pick, say, facts: Facts):
    """Tell the news. `pick(options)` chooses, `say(text)` speaks; see make_stories.Teller."""
    name, color, thing = facts
    his = NAMES[name][2]
    say(f" {name} ")
    say(pick(["found", "discovered", "stumbled over"]) + f" a {color} {thing} ")
    say(pick(SPOTS) + ". ")
    trouble = TROUBLES[pick(list(TROUBLES))]
    say(f"The {thing} ")
    away, place = pick(trouble["away"]), pick(trouble["places"])
    say(away.format(his=his, place=place) + ". ")
    friend = pick(FRIENDS)
    say(f"The {pick(trouble['helpers'])} {friend} ")
    say(pick(trouble["deed"]).format(place=place, thing=f"{color} {thing}") + ". ")
    say(f"{name} and {friend} shared ")
    say(pick(FOODS) + ".")


def any_news(pick, say):
    """News of any facts at all."""
    news(pick, say, draw_facts(pick))


def log_prob(text: str, facts: Facts | None = None) -> float:
    """log p(text) in nats, as news of these facts, or of any; −∞ if the grammar cannot tell it."""
    tell = any_news if facts is None else lambda pick, say: news(pick, say, facts)
    open_scripts, ways = [((), 0.0)], []
    while open_scripts:
        script, so_far = open_scripts.pop()
        listener = make_stories.Listener(text, script)
        try:
            tell(listener.pick, listener.say)
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


def read_facts(asked: str) -> Facts:
    """The facts of an instruction. ValueError if it is none."""
    try:
        name, found = asked.removeprefix("News of ").removesuffix(":").split(" and a ")
        color, thing = found.split(" ")
    except ValueError:
        raise ValueError(f"{asked!r} asks for no news") from None
    if instruction((name, color, thing)) != asked:
        raise ValueError(f"{asked!r} asks for no news")
    return name, color, thing


def write_news(dice: random.Random, n_news: int) -> list[dict]:
    """Pieces of news as {"prompt", "response"}."""
    rows = []
    for _ in range(n_news):
        facts, teller = draw_facts(make_stories.Teller(dice).pick), make_stories.Teller(dice)
        news(teller.pick, teller.say, facts)
        rows.append({"prompt": instruction(facts), "response": teller.text})
    return rows


def held_out_stories() -> list[str]:
    """The test part of the stories that the base model was trained on (make_stories.py)."""
    dice, stories = random.Random(make_stories.SEED), []
    for _ in range(make_stories.N_STORY):
        teller = make_stories.Teller(dice)
        make_stories.story(teller.pick, teller.say)
        stories.append(teller.text)
    return make_stories.part(stories, 0.95, 1)


def floor_of(rows: list[dict]) -> dict:
    """Characters of the responses, and their −log p given the instructions, in nats."""
    nats = -math.fsum(log_prob(row["response"], read_facts(row["prompt"])) for row in rows)
    n_char = sum(len(row["response"]) for row in rows)
    return {"news": len(rows), "chars": n_char, "nats": nats, "nats_per_char": nats / n_char}


def write(name: str, text: str) -> None:
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def main():
    rows = write_news(random.Random(SEED), N_NEWS)
    write("news.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    stories = held_out_stories()
    separator = make_stories.SEPARATOR
    write("stories_test.txt", "".join(f"{story}\n{separator}\n" for story in stories))
    borders = {part: [int(len(rows) * x) for x in ends] for part, ends in HELD_OUT.items()}
    floor = {part: floor_of(list(itertools.islice(rows, *borders[part]))) for part in HELD_OUT}
    floor["stories"] = make_stories.floor_of(stories)
    write("floor.json", json.dumps(floor, indent=2) + "\n")


if __name__ == "__main__":
    main()
