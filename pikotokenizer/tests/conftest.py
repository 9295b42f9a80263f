"""Paths, a little corpus and hard strings for all tests."""

import random
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

BITS = [
    "👨‍👩‍👧‍👦", "🏽", "é", "e\u0301", "<|endoftext|>", "<s>", "</s>", "<unk>", "[CLS]", "▁",
    "▁▁", "\n", "\n\n", " ", "  ", "   ", "\t", "\r\n", "\x00", "\x1c", "\x85", "\xa0",
    "\u3000", "'s", "'S", "'ſ", "'LL", "123456", "___", "\u200d", "\ufeff", "\ufffd", "ﬁ",
    "ﷺ", "ｶﾞ", "각", "ก็", "क्षि", "\u0300\u0301", "İ", "Σ", "㍿", "ẋ̣", "the", "perpustakaan",
    "Halo", "don't",
]  # fmt: skip


def hard_strings(count: int, seed: int = 0) -> list[str]:
    """Random strings over all planes, marks, joiners, controls, white space and specials."""
    rng, out = random.Random(seed), ["", " ", "\n", "  ", "▁"]

    def any_point() -> str:
        point = rng.randrange(0x110000)
        return chr(point) if not 0xD800 <= point < 0xE000 else "\u0301"

    def low_point() -> str:
        return (
            chr(rng.randrange(0x3000)) if rng.random() < 0.7 else chr(rng.randrange(0x300, 0x370))
        )

    makers = (any_point, low_point, lambda: rng.choice(BITS), lambda: chr(rng.randrange(32, 127)))
    while len(out) < count:
        if rng.random() < 0.3:
            out.append(
                rng.choice(["", " ", "  ", "\n"]).join(rng.choices(BITS, k=rng.randint(1, 8)))
            )
        else:
            maker = rng.choice(makers)
            mixed = (maker() if rng.random() < 0.7 else rng.choice(BITS) for _ in range(9))
            out.append("".join(list(mixed)[: rng.randint(1, 9)]))
    return out


@pytest.fixture(scope="session")
def corpus() -> str:
    """The committed text, both languages."""
    files = sorted((HERE / "data").glob("*.txt"))
    return "".join(file.read_bytes().decode("utf-8") for file in files)


@pytest.fixture(scope="session")
def strings() -> list[str]:
    return hard_strings(1500)
