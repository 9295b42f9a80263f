"""Write `stories.txt`: short stories drawn from a probabilistic grammar of our own.

A story is a program: it calls `pick` for every choice and `say` for every piece of text. Run with
dice, it tells a new story. Run against a given text, it tells how probable that text is: `log_prob`
walks every sequence of choices that could have spelled it and adds up their probabilities, so the
number is exact even where two sequences spell the same words. The mean of −log p over the held-out
stories is the lowest loss that any model, of any size, can expect there: the floor.

What has to stay consistent through a story, and so must be carried by attention: who the hero is
(name and pronoun), what was found (object and colour), what went wrong with it and where,
who came to help, and that the helper's skill fits the trouble (nobody dives into an oak tree).

    python make_stories.py          writes stories.txt and floor.json beside this file
"""

import itertools
import json
import math
import random
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEPARATOR = "<|endoftext|>"  # on a line of its own between two stories
N_STORY = 3_400
SEED = 20

HE, SHE = ("he", "him", "his"), ("she", "her", "her")
NAMES = {
    **dict.fromkeys(["Bram", "Dov", "Felix", "Hugo", "Leo"], HE),
    **dict.fromkeys(["Milo", "Oscar", "Pip", "Rufus", "Walt"], HE),
    **dict.fromkeys(["Ada", "Bella", "Clara", "Dora", "Greta"], SHE),
    **dict.fromkeys(["Juno", "Lena", "Nora", "Olive", "Rosa"], SHE),
}
FRIENDS = [  # names of those who help, so that nobody is called like the hero
    *["Basil", "Boris", "Cleo", "Edda", "Fern", "Gus", "Hazel", "Iris", "Jasper", "Kiki"],
    *["Luna", "Mabel", "Ned", "Otto", "Poppy", "Quinn", "Sage", "Tilly", "Uma", "Zeno"],
]
KINDS = ["fox", "hare", "badger", "hedgehog", "rabbit", "goat", "bear", "lamb", "pony", "kitten"]
TRAITS = [
    "cheerful",
    "curious",
    "gentle",
    "hungry",
    "lonely",
    "merry",
    "quiet",
    "restless",
    "shy",
    "stubborn",
    "young",
]
HOMES = [
    "under the old mill",
    "at the edge of the forest",
    "beside a slow river",
    "behind the village church",
    "in a crooked cottage",
    "on top of a windy hill",
    "near the harbor",
    "in a hollow log",
    "below the stone bridge",
    "in the corner of a barn",
]
COLORS = ["blue", "golden", "green", "purple", "red", "silver", "striped", "white", "yellow"]
OBJECTS = [
    "ball",
    "bell",
    "button",
    "coin",
    "crown",
    "cup",
    "drum",
    "feather",
    "flute",
    "hat",
    "key",
    "kite",
    "lantern",
    "map",
    "ribbon",
    "scarf",
    "shell",
    "spoon",
    "whistle",
]
SPOTS = [
    "among the ferns",
    "behind the bakery",
    "beneath a bench",
    "beside the road",
    "in a pile of leaves",
    "in the tall grass",
    "inside an old boot",
    "near the well",
    "on the market square",
    "under a blackberry bush",
]
FOODS = [
    "an apple",
    "a bowl of soup",
    "a honey cake",
    "a pear",
    "a plum pie",
    "a slice of bread",
    "some berries",
    "some cheese",
    "some nuts",
    "a warm bun",
]
TROUBLES = {  # what takes the thing away: (where it ends up, who can help, how)
    "water": {
        "away": [
            "slipped from {his} paws and fell into {place}",
            "bounced twice and sank in {place}",
            "rolled down the bank into {place}",
        ],
        "places": ["the pond", "the stream", "the lake", "the mill pool"],
        "helpers": ["beaver", "duck", "frog", "otter", "swan"],
        "tried": [
            "{He} reached into {place} with a long stick, but the water was too deep.",
            "{He} put one foot into {place}, but the water was too cold.",
        ],
        "skill": ["dive to the bottom", "swim like a fish", "hold my breath for a long time"],
        "deed": [
            "dived into {place} and came up with the {thing}",
            "swam across {place}, took a deep breath, and brought back the {thing}",
        ],
    },
    "height": {
        "away": [
            "was carried by the wind to the top of {place}",
            "flew up in a storm and got stuck on {place}",
            "was tossed too high and landed on {place}",
        ],
        "places": ["the oak tree", "the clock tower", "the chimney", "the barn roof"],
        "helpers": ["crow", "owl", "pigeon", "sparrow", "squirrel"],
        "tried": [
            "{He} tried to climb {place}, but {he} slipped and slid down again.",
            "{He} threw a pebble at {place}, but the pebble missed.",
        ],
        "skill": ["reach any branch", "get up there in no time", "see it from here"],
        "deed": [
            "went straight up {place} and came down with the {thing}",
            "hopped up {place} from ledge to ledge and pushed the {thing} down",
        ],
    },
    "hole": {
        "away": [
            "rolled away and dropped into {place}",
            "was swallowed by {place}",
            "tumbled between two stones into {place}",
        ],
        "places": ["the dark tunnel", "the deep hole", "the narrow crack", "the empty cellar"],
        "helpers": ["mole", "mouse", "shrew", "toad", "weasel"],
        "tried": [
            "{He} pushed a paw into {place}, but the gap was too small.",
            "{He} dug at {place} until dusk, but the earth was too hard.",
        ],
        "skill": ["dig faster than anyone", "see in the dark", "fit through the smallest gap"],
        "deed": [
            "crept into {place} and pulled out the {thing}",
            "vanished into {place} and came back, dusty and proud, with the {thing}",
        ],
    },
    "thief": {
        "away": [
            "was stolen by a goose that hid in {place}",
            "was snatched by a magpie with a nest in {place}",
            "was taken by a monkey who sat in {place}",
        ],
        "places": ["the garden", "the orchard", "the windmill", "the ruined castle"],
        "helpers": ["cat", "dog", "donkey", "parrot", "turtle"],
        "tried": [
            "{He} ran to {place} and shouted, but the thief only laughed.",
            "{He} followed the thief to {place}, but the thief was faster.",
        ],
        "skill": ["talk to anybody", "make a fair trade", "tell a very good joke"],
        "deed": [
            "walked to {place}, whispered something, and returned with the {thing}",
            "made the thief laugh so hard that the {thing} dropped out of {place}",
        ],
    },
}
FEELINGS = [
    "began to cry",
    "did not know what to do",
    "felt very small",
    "kicked a stone",
    "sat down and sighed",
    "walked in circles",
]


def story(pick, say):
    """Tell one story. `pick(options)` chooses, `say(text)` speaks; see `Teller` and `Listener`."""
    name, he = opening(pick, say)
    thing = finding(pick, say, name, he)
    trouble, place = losing(pick, say, name, he, thing)
    friend = helping(pick, say, name, he, thing, trouble, place)
    closing(pick, say, name, he, thing, friend)


def opening(pick, say):
    trait_first = pick({True: 2, False: 1})
    say(pick({"Once upon a time there was ": 3, "There once was ": 2, "Long ago there lived ": 1}))
    if trait_first:
        trait = pick(TRAITS)
        say(f"a {trait} ")
    else:
        say("a ")
    say(pick(KINDS) + " ")
    say(pick({"named ": 2, "called ": 1}))
    name = pick(list(NAMES))
    say(f"{name}. ")
    he, him, his = NAMES[name]
    say(pick({f"{name} ": 1, f"{he.capitalize()} ": 2}))
    say(pick({"lived ": 3, "had a home ": 1, "slept ": 1}))
    say(pick(HOMES))
    if pick({True: 1, False: 1}):
        say(" and ")
        say(
            pick(
                [
                    "dreamed of adventures",
                    "liked to sing",
                    "loved to collect things",
                    "told stories to the moon",
                    "wished for a friend",
                ]
            )
        )
    say(". ")
    return name, (he, him, his)


def finding(pick, say, name, he):
    say(pick({"One ": 3, "Early one ": 1, "Late one ": 1}))
    say(pick(["morning", "afternoon", "evening", "spring day", "rainy day"]) + ", ")
    say(pick({name: 1, he[0]: 1}) + " ")
    say(pick({"found a ": 3, "stumbled over a ": 1, "saw a ": 1, "discovered a ": 1}))
    if pick({True: 1, False: 2}):
        say(pick(["small", "shiny", "strange"]) + " ")
    color = pick(COLORS)
    say(f"{color} ")
    thing = pick(OBJECTS)
    say(f"{thing} ")
    say(pick(SPOTS) + ". ")
    if pick({True: 1, False: 1}):
        return color, thing
    say(
        pick(
            [
                f'"What a lovely {thing}!" said {name}. ',
                f'"This {color} {thing} is mine now," said {name}. ',
                f"{he[0].capitalize()} took it everywhere. ",
                f"It was the best {thing} in the world. ",
                f"{name} showed it to everyone. ",
            ]
        )
    )
    return color, thing


def losing(pick, say, name, he, thing):
    trouble = TROUBLES[pick(list(TROUBLES))]
    say(pick({"But ": 2, "Then ": 1, "But one day ": 1}))
    say(pick({f"the {thing[0]} {thing[1]} ": 3, f"the {thing[1]} ": 1}))
    away = pick(trouble["away"])
    place = pick(trouble["places"])
    say(away.format(his=he[2], place=place) + ". ")
    if pick({True: 1, False: 1}):
        say(pick(trouble["tried"]).format(He=he[0].capitalize(), he=he[0], place=place) + " ")
    if pick({True: 1, False: 1}):
        say(pick({name: 1, f"Poor {name}": 1, he[0].capitalize(): 1}) + " ")
        say(pick(FEELINGS) + ". ")
    return trouble, place


def helping(pick, say, name, he, thing, trouble, place):
    say(pick({"Just then ": 1, "After a while ": 1, "Soon ": 1}))
    kind = pick(trouble["helpers"])
    say(("an " if kind[0] in "aeiou" else "a ") + f"{kind} named ")
    friend = pick(FRIENDS)
    say(f"{friend} ")
    say(
        pick(["came by", "heard the noise", "looked around the corner", "stopped to listen"]) + ". "
    )
    if pick({True: 2, False: 1}):
        say(pick({'"Do not worry," ': 2, '"Let me help you," ': 2, '"I know what to do," ': 1}))
        say(f'said {pick({friend: 1, f"the {kind}": 1})}. "I can ')
        say(pick(trouble["skill"]) + '." ')
    say(pick({f"{friend} ": 1, f"The {kind} ": 1}))
    say(
        pick(trouble["deed"]).format(place=place, thing=pick({" ".join(thing): 2, thing[1]: 1}))
        + ". "
    )
    return friend, kind


def closing(pick, say, name, he, thing, friend):
    color, thing = thing
    if pick({True: 1, False: 1}):
        say(
            pick(
                [
                    f'"Thank you, {friend[0]}!" said {name}',
                    f"{name} danced for joy",
                    f"{name} hugged the {friend[1]}",
                    f"{name} was happy again",
                ]
            )
            + ". "
        )
    if pick({True: 2, False: 1}):
        say(pick([f"{name} gave {friend[0]} ", "They shared ", "Together they ate "]))
        say(pick(FOODS))
        say(pick([" and walked home. ", " on the way home. ", " under the stars. "]))
    say(pick([f"That night {name} ", f"From that day on {name} ", f"Since then {he[0]} "]))
    say(
        pick(
            [
                f"kept the {color} {thing} in a box",
                f"held the {color} {thing} very tight",
                f"let {friend[0]} play with the {thing}",
                f"never left the {thing} alone",
                f"shared the {color} {thing} with {friend[0]}",
            ]
        )
        + "."
    )
    if pick({True: 1, False: 1}):
        say(" ")
        say(
            pick(
                [
                    f"And {name} and {friend[0]} were friends forever.",
                    "A friend is worth more than gold.",
                    f"{name} and the {friend[1]} were never lonely again.",
                    f"And {he[0]} never forgot the {friend[1]}.",
                ]
            )
        )


def weighted(options):
    """The options of a `pick` as [(value, probability)]: a list is uniform, a dict has weights."""
    weights = options if isinstance(options, dict) else dict.fromkeys(options, 1)
    total = sum(weights.values())
    return [(value, weight / total) for value, weight in weights.items()]


class Teller:
    """Tells a story with dice, and adds up the log-probability of the throws (nats)."""

    def __init__(self, dice: random.Random):
        self.dice, self.text, self.log_prob = dice, "", 0.0

    def pick(self, options):
        values, probabilities = zip(*weighted(options), strict=True)
        i = self.dice.choices(range(len(values)), probabilities)[0]
        self.log_prob += math.log(probabilities[i])
        return values[i]

    def say(self, text: str):
        self.text += text


class Contradiction(Exception):
    """What the story says is not what the text says."""


class Crossroads(Exception):
    """The script of choices ran out at a `pick`."""


class Listener:
    """Runs a story along a script of choices for as long as it says the same as `text`."""

    def __init__(self, text: str, script: tuple):
        self.text, self.script, self.said, self.picked = text, script, 0, 0

    def pick(self, options):
        if self.picked == len(self.script):
            raise Crossroads(weighted(options))
        self.picked += 1
        return self.script[self.picked - 1]

    def say(self, text: str):
        if not self.text.startswith(text, self.said):
            raise Contradiction
        self.said += len(text)


def log_prob(text: str) -> float:
    """log p(text) in nats, over every sequence of choices that spells it; −inf if none does."""
    open_scripts, ways = [((), 0.0)], []
    while open_scripts:
        script, so_far = open_scripts.pop()
        listener = Listener(text, script)
        try:
            story(listener.pick, listener.say)
        except Contradiction:
            continue
        except Crossroads as stop:
            open_scripts += [((*script, v), so_far + math.log(p)) for v, p in stop.args[0]]
            continue
        if listener.said == len(text):
            ways.append(so_far)
    if not ways:
        return -math.inf
    best = max(ways)
    return best + math.log(sum(math.exp(way - best) for way in ways))


def main():
    dice = random.Random(SEED)
    stories = []
    for _ in range(N_STORY):
        teller = Teller(dice)
        story(teller.pick, teller.say)
        stories.append(teller.text)
    text = "".join(f"{story}\n{SEPARATOR}\n" for story in stories)
    with open(HERE / "stories.txt", "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
    floor = {"valid": floor_of(part(stories, 0.9, 0.95)), "test": floor_of(part(stories, 0.95, 1))}
    with open(HERE / "floor.json", "w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(floor, indent=2) + "\n")


def part(stories: list[str], begin: float, end: float) -> list[str]:
    """The stories that begin between these shares of all characters, as `data.Source` cuts them."""
    begins = [0, *itertools.accumulate(map(len, stories))]
    first, last = int(begin * begins[-1]), int(end * begins[-1])
    return [text for at, text in zip(begins, stories, strict=False) if first <= at < last]


def floor_of(stories: list[str]) -> dict:
    """How much text that is, and its −log p in nats: in all and per character."""
    n_char, nats = sum(map(len, stories)), -math.fsum(map(log_prob, stories))
    return {"stories": len(stories), "chars": n_char, "nats": nats, "nats_per_char": nats / n_char}


if __name__ == "__main__":
    main()
