"""What a run says of pictures: the numbers to expect before it, and how it went after it."""

import math

from model import NetConfig, macs
from options import say

ON_TRACK = 0.01  # below the ceiling: what the default run must reach
BOARD = (0.5, 0.9, 0.95, 0.98, 0.99, 0.993, 0.995)  # validation accuracies, × the ceiling


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"


def describe(score: dict) -> str:
    """A score in words."""
    return f"{percent(score['accuracy'])}, {score['loss']:.4f} nats"


def expectations(trainer, sizes: NetConfig) -> None:
    """Print the data and the numbers to expect of it. trainer: a `train.PictureTrainer`."""
    config, dataset = trainer.config, trainer.dataset
    epochs = config.steps * config.batch_size / len(dataset.train)
    say(f"           {macs(trainer.scored, sizes) / 1e6:.1f} million multiply-adds a picture")
    say(f"data       {dataset.name}: {len(dataset.train):,} pictures, {len(dataset.valid):,} to "
        f"validate, {len(dataset.test):,} to test; {epochs:.1f} epochs")  # fmt: skip
    if dataset.notes:
        say(f"pictures   {dataset.notes}")
    mirrored = "mirrored" if trainer.flip else "not mirrored"
    if config.flip == "auto":
        mirrored += f" (left differs from right by {100 * trainer.asymmetry:.1f} %)"
    say(f"views      moved by up to {trainer.shift} pixels, {mirrored}")
    if sizes.zero_head and not config.weights:
        say(f"expect     loss ln {sizes.n_class} = {math.log(sizes.n_class):.3f} nats at step 1")
    if dataset.ceiling:
        say(f"           and at the very best {percent(dataset.ceiling)} right, the Bayes ceiling")


def board(history: list[dict], ceiling: float = 1.0) -> dict[float, float]:
    """Seconds of training until validation first reached each accuracy × the ceiling."""
    reached: dict[float, float] = {}
    for line in history:
        accuracy, seconds = line.get("accuracy"), line.get("train_seconds")
        if line["split"] != "valid" or {type(accuracy), type(seconds)} - {int, float}:
            continue  # a line that somebody else wrote
        for goal in BOARD:
            if accuracy >= goal * ceiling:
                reached.setdefault(goal, seconds)
    return reached


def verdict(dataset, accuracy: float, described: bool) -> str:
    """How a run ended; whether as it should, if it is the one that the README describes."""
    said = f"{percent(accuracy)} of the test part"
    if dataset.ceiling is None:
        return f"done: {said} (the ceiling of this data is unknown)"
    said += f", Bayes ceiling {percent(dataset.ceiling)}"
    if not described:
        return f"done: {said}"
    word = "on track" if accuracy >= dataset.ceiling - ON_TRACK else "off track"
    return f"{word}: {said}, the README promises at most 1 % less"


def conclude(dataset, history: list[dict], accuracy: float, described: bool) -> None:
    """Print how long it took to be how good, and whether it went as it should."""
    times = board(history, dataset.ceiling or 1.0)
    shown = ", ".join(f"{100 * goal:g} %: {seconds:.1f} s" for goal, seconds in times.items())
    say(f"time to    {'the ceiling × ' if dataset.ceiling else ''}{shown or 'no goal'} of training")
    say(verdict(dataset, accuracy, described))
