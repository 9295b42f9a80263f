"""The text of this folder: stories from a grammar that knows their exact probability.

`--data stories` is what this file adds to text.py, which reads, cuts and batches every text.
"""

from pathlib import Path

import text
from run import read_json

STORIES = Path(__file__).resolve().parent / "data" / "stories.txt"
FLOOR = STORIES.with_name("floor.json")
INSIDE = ("stories",)  # names of data that come with the folder


def measure(name: str) -> text.Source:
    """The source called `name`: stories, a file, a folder, or hf:OWNER/NAME."""
    return text.Source.measure(str(STORIES) if name == "stories" else name)


def floor(name: str, part: str) -> float | None:
    """The least loss that can be expected on a part of our stories, in nats per character.

    It is −log p(text) by the grammar that told them, per character; for other text it is unknown.
    No model has a lower expected loss. On this sample of stories one could, by luck, be lower by a
    few tenths of a percent.
    """
    if name != "stories" and Path(name) != STORIES:
        return None
    return read_json(FLOOR)[part]["nats_per_char"]
