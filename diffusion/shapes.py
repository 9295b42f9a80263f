"""shapes-10: pictures of ten shapes, with a Bayes error that is known exactly.

A picture shows one shape, anywhere, at any of 24 angles and 6 sizes, in any colours, on a patterned
background with confetti. Some are chimeras: the left half of one shape joined to the right half of
another, and a fair coin says which of the two is the label. Nobody can do better than guess:

    Bayes error = ½ P(chimera)        least cross-entropy = ln 2 · P(chimera)

if only the halves can be told from the pixels, always. They can. The shape is on one side of luma
128 and all the rest on the other, whatever the noise, and the border of a picture is background:
so the silhouette is known to the pixel. Up to shifts there are 14,400 ways to make one, and no two
that show different shapes look the same. `Oracle` looks them up; the tests go through all of them.

Everything is drawn in integers from a table of scenes, `data/shapes10.npz`, so the pictures are the
same on every machine. All shapes are mirror images of themselves: flips keep the label.

Key: N pictures, S = 32 their height and width, A = 24 angles, R = 6 sizes.
"""

import functools
import itertools
import math
from pathlib import Path

import numpy as np

FILE = Path(__file__).resolve().parent / "data" / "shapes10.npz"
AMBIGUITY = 0.1  # the fraction of chimeras in the file
S = 32
ANGLES = 24
SIZES = range(8, 14)  # radius in pixels
NOISE = 16  # added to each value: −16 … 15

# Right halves of outlines, in hundredths of the radius, top to bottom: (right, up).
OUTLINES = {
    "square": [(0, 70), (70, 70), (70, -70), (0, -70)],
    "triangle": [(0, 100), (87, -50), (0, -50)],
    "star": [(0, 100), (24, 33), (95, 31), (39, -13), (59, -81), (0, -41)],
    "cross": [(0, 95), (30, 95), (30, 30), (95, 30), (95, -30), (30, -30), (30, -95), (0, -95)],
    "heart": [(0, 45), (18, 72), (45, 82), (72, 66), (82, 35), (65, -8), (0, -95)],
    "arrow": [(0, 98), (80, 10), (30, 10), (30, -92), (0, -92)],
    "hourglass": [(0, 80), (60, 80), (14, 0), (60, -80), (0, -80)],
}
CLASSES = ("circle", "ring", "moon", *OUTLINES)

SCENE = np.dtype(
    [
        ("left", "u1"),  # the class of the left half, and of the right one; mostly the same
        ("right", "u1"),
        ("label", "u1"),
        ("angle", "u1"),  # in steps of 15°
        ("size", "u1"),  # an index of SIZES
        ("place", "i1", 2),  # of the centre, (down, right) of the middle of the picture
        ("pattern", "u1", 2),  # indices of `patterns()`: background, shape
        ("colours", "u1", (2, 2, 3)),  # two of the background, two of the shape
        ("confetti", "u1", (3, 4)),  # y, x, half height, half width
        ("confetti_colours", "u1", (3, 3)),
        ("noise", "u4"),  # where the noise begins
    ]
)


def inside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u right, v up, in thousandths of the radius) belong to the upright shape."""
    square = u * u + v * v
    if name == "circle":
        return square <= 880**2
    if name == "ring":
        return (square <= 950**2) & (square >= 540**2)
    if name == "moon":
        return (square <= 950**2) & (u * u + (v - 450) ** 2 >= 720**2)
    outline, found = OUTLINES[name], np.zeros(u.shape, dtype=bool)
    u = abs(u)
    for (u0, v0), (u1, v1) in itertools.pairwise(outline):
        # A ray to the right crosses an odd number of edges, if and only if it starts inside.
        u0, v0, u1, v1 = 10 * u0, 10 * v0, 10 * u1, 10 * v1
        beside = (u - u0) * (v1 - v0) < (u1 - u0) * (v - v0)
        found ^= ((v0 > v) != (v1 > v)) & (beside == (v1 > v0))
    return found


@functools.cache
def silhouettes() -> np.ndarray:
    """Both halves of each shape at each angle and size, in the middle: (10, A, R, 2, S, S) bool."""
    steps = np.arange(S) - S // 2
    down, right = steps[:, None], steps[None, :]
    masks = np.zeros((len(CLASSES), ANGLES, len(SIZES), 2, S, S), dtype=bool)
    for angle in range(ANGLES):
        turn = 2 * math.pi * angle / ANGLES
        cos, sin = round(1000 * math.cos(turn)), round(1000 * math.sin(turn))
        for i, radius in enumerate(SIZES):
            u = (right * cos - down * sin) // radius
            v = (-right * sin - down * cos) // radius
            for k, name in enumerate(CLASSES):
                whole = inside(name, u, v)
                masks[k, angle, i] = whole & (u < 0), whole & (u >= 0)
    return masks


@functools.cache
def patterns() -> np.ndarray:
    """How much of the second colour, in eighths: (8, S, S)."""
    y, x = np.mgrid[:S, :S]
    slopes = [0 * x, x >> 2, y >> 2, (x + y) >> 3]
    stripes = [x >> 2, y >> 2, (x + y) >> 2, (x >> 2) + (y >> 2)]
    return np.array(slopes + [8 * (s & 1) for s in stripes], dtype=np.int16)


def luma(rgb: np.ndarray, axis: int) -> np.ndarray:
    """Eight times the brightness, (2 R + 5 G + B): the integer cousin of Rec. 601's."""
    red, green, blue = np.moveaxis(rgb.astype(np.int32), axis, 0)
    return 2 * red + 5 * green + blue


def shape_masks(scenes: np.ndarray) -> np.ndarray:
    """The pixels that belong to the shape: (N, S, S) bool."""
    halves = [
        silhouettes()[scenes[side], scenes["angle"], scenes["size"], i]
        for i, side in enumerate(("left", "right"))
    ]
    down, right = ((np.arange(S) - scenes["place"][:, i, None]) % S for i in (0, 1))
    rows = np.arange(len(scenes))[:, None, None]
    return (halves[0] | halves[1])[rows, down[:, :, None], right[:, None, :]]


def noise(seeds: np.ndarray) -> np.ndarray:
    """(N, 3, S, S) numbers −16 … 15: the last steps of murmur3 hash seed and place."""
    h = seeds[:, None] + np.arange(3 * S * S, dtype=np.uint32) * np.uint32(0x9E3779B9)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    return (h >> np.uint32(27)).astype(np.int16).reshape(-1, 3, S, S) - NOISE


def backgrounds(scenes: np.ndarray, paint: np.ndarray) -> np.ndarray:
    """`paint` (N, 3, S, S) with the confetti of the scenes on it."""
    steps = np.arange(S, dtype=np.int16)
    for i in range(3):
        y, x, height, width = scenes["confetti"][:, i].astype(np.int16).T[..., None]
        rows, columns = abs(steps - y) <= height, abs(steps - x) <= width  # (N, S) each
        here = (rows[:, :, None] & columns[:, None, :])[:, None]
        paint = np.where(here, scenes["confetti_colours"][:, i, :, None, None], paint)
    return paint


def draw(scenes: np.ndarray) -> np.ndarray:
    """The pictures of the scenes: (N, 3, S, S) uint8, red, green, blue."""
    pictures = np.empty((len(scenes), 3, S, S), dtype=np.uint8)
    for start in range(0, len(scenes), 256):  # few enough to stay in the cache
        part = scenes[start : start + 256]
        weight = patterns()[part["pattern"]][:, :, None]  # (N, 2, 1, S, S)
        colours = part["colours"].astype(np.int16)[..., None, None]  # (N, 2, 2, 3, 1, 1)
        paint = (colours[:, :, 0] * (8 - weight) + colours[:, :, 1] * weight) // 8
        ground = backgrounds(part, paint[:, 0])  # (N, 3, S, S)
        clean = np.where(shape_masks(part)[:, None], paint[:, 1], ground)
        pictures[start : start + 256] = np.clip(clean + noise(part["noise"]), 0, 255)
    return pictures


def load() -> tuple:
    """(CLASSES, training pictures and labels, the same to test on) of the committed scenes."""
    with np.load(FILE, allow_pickle=False) as file:
        parts = file["train"], file["test"]
    return CLASSES, *((draw(scenes), scenes["label"]) for scenes in parts)


class Oracle:
    """The classifier that no other can beat: it looks silhouettes up.

    shows: what a silhouette, named by its bounding box and the bits in there, can show: pairs of
    classes in their order, mostly one class twice. The tests check that there is one pair each.
    """

    def __init__(self):
        every = np.indices((len(CLASSES), len(CLASSES), ANGLES, len(SIZES))).reshape(4, -1)
        scenes = np.zeros(every.shape[1], dtype=SCENE)
        for field, values in zip(("left", "right", "angle", "size"), every, strict=True):
            scenes[field] = values
        self.shows: dict[bytes, set[tuple[int, int]]] = {}
        pairs = np.sort(every[:2], axis=0).T.tolist()
        for mask, pair in zip(shape_masks(scenes), pairs, strict=True):
            self.shows.setdefault(self.name(mask), set()).add(tuple(pair))

    @staticmethod
    def name(mask: np.ndarray) -> bytes:
        """What stays the same when the mask (S, S) is shifted."""
        down, right = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box = mask[down[0] : down[-1] + 1, right[0] : right[-1] + 1]
        return bytes(box.shape) + np.packbits(box).tobytes()

    def pairs(self, pictures: np.ndarray) -> np.ndarray:
        """The classes of the two halves, (N, 2) in their order. KeyError for other pictures."""
        light = luma(pictures, axis=1) >= 8 * 128  # (N, S, S)
        masks = light != light[:, :1, :1]  # the corner is background
        return np.array([min(self.shows[self.name(mask)]) for mask in masks])  # there is one each

    def classify(self, pictures: np.ndarray) -> np.ndarray:
        """A best guess at the labels, (N,): the earlier of the two classes."""
        return self.pairs(pictures)[:, 0]
