"""Points of the plane whose distribution is known: mixtures of small round Gaussians.

Each toy is a set of centres, drawn as a curve or an area, and one standard deviation. So any number
of fresh points can be drawn, and density, best possible denoiser and least possible loss are known
at every noise level (see exact.py). All toys fit into about −1 … 1, like pixels.

    moons         two half circles, the classes of a well-known exercise; labels 0 and 1
    spiral        one arm of one and three quarter turns
    checkerboard  eight of sixteen squares, filled
    fish          a picture of our own, drawn as points

Key: K centres, B points.
"""

import math

import torch
from torch import Tensor

from exact import Mixture

FISH = (  # a row of text is a row of the picture; # is a centre
    "                #######              ",
    "             ####     ####           ",
    "##         ###           ###         ",
    "####     ###               ###       ",
    "## ##  ###             ##    ##      ",
    "##  ####       #       ##     ##     ",
    "##   ##         #              ##    ",
    "##              #           #####    ",
    "##   ##         #              ##    ",
    "##  ####       #              ##     ",
    "## ##  ###                   ##      ",
    "####     ###               ###       ",
    "##         ###           ###         ",
    "             ####     ####           ",
    "                #######              ",
)


def moons() -> tuple[Tensor, Tensor]:
    angle = torch.linspace(0, math.pi, 200, dtype=torch.float64)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    lower = torch.stack([0.5 - angle.cos(), 0.25 - angle.sin()], dim=1)
    return torch.cat([upper, lower]) * 0.6, torch.arange(2).repeat_interleave(200)


def spiral() -> tuple[Tensor, Tensor]:
    turn = torch.linspace(0.08, 1, 400, dtype=torch.float64).sqrt()  # evenly along the arm
    angle = 3.5 * math.pi * turn
    return torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1), torch.zeros(400).long()


def checkerboard() -> tuple[Tensor, Tensor]:
    line = (torch.arange(40, dtype=torch.float64) + 0.5) / 20 - 1
    x, y = torch.meshgrid(line, line, indexing="xy")
    dark = ((2 * x).floor() + (2 * y).floor()) % 2 == 0
    return torch.stack([x[dark], y[dark]], dim=1), torch.zeros(int(dark.sum())).long()


def fish() -> tuple[Tensor, Tensor]:
    height, width = len(FISH), len(FISH[0])
    marks = [
        (column, height - 1 - row)
        for row, text in enumerate(FISH)
        for column, mark in enumerate(text)
        if mark == "#"
    ]
    points = torch.tensor(marks, dtype=torch.float64) - torch.tensor([width, height]) / 2
    return points / (width / 2), torch.zeros(len(points)).long()


SPREADS = {"moons": 0.05, "spiral": 0.03, "checkerboard": 0.02, "fish": 0.02}
DRAW = {"moons": moons, "spiral": spiral, "checkerboard": checkerboard, "fish": fish}


def mixture(name: str) -> Mixture:
    """The distribution of a toy, with centres (K, 2, 1, 1). KeyError for an unknown name."""
    centres, labels = DRAW[name]()
    return Mixture(centres[:, :, None, None].float(), SPREADS[name], labels)
