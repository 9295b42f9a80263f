"""Data: two moons, images of digits, characters of a text. Load, split, batch.

A batch depends on (seed, step) alone: that is what makes resuming exact. The files of other people
are read in pictures.py. N images, H = W their size, B batch, T time.
"""

import runpy
from pathlib import Path

import numpy as np

from options import UserError, say
from pictures import read_idx_pair

HERE = Path(__file__).resolve().parent
DIGITS, TEXT = HERE / "data" / "digits.npz", HERE / "data" / "sums.txt"


def moons(n, noise=0.1, seed=0):
    """Two interleaved half circles: points (n, 2), labels ±1 in equal numbers."""
    rng = np.random.default_rng(seed)
    t = np.pi * np.arange(n // 2) / (n // 2 - 1)
    upper = np.stack([np.cos(t), np.sin(t)], 1)
    lower = np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1)
    x = np.concatenate([upper, lower]) + noise * rng.standard_normal((2 * (n // 2), 2))
    return x, np.repeat([1.0, -1.0], n // 2)


class Examples:
    """Inputs x and targets y, split; batches are drawn epoch by epoch without repetition.

    classes: how many different targets there are.
    """

    def __init__(self, train, held_out, classes):
        (self.x, self.y), (self.x_test, self.y_test), self.classes = train, held_out, classes

    def batch(self, step, size, seed):
        """(x, y) number `step`: part of the permutation of its epoch."""
        size = min(size, len(self.x))
        per_epoch = len(self.x) // size
        order = np.random.default_rng((seed, step // per_epoch)).permutation(len(self.x))
        rows = order[(step % per_epoch) * size :][:size]
        return self.x[rows], self.y[rows]

    def held_out(self, size=500):
        """(x, y) in pieces of `size`."""
        for i in range(0, len(self.x_test), size):
            yield self.x_test[i : i + size], self.y_test[i : i + size]


def load_moons(path):
    """400 points to learn from and 400 others; `path` must be empty."""
    if path:
        raise UserError("--data: the moons are made by formula, leave it out")
    return Examples(moons(400, seed=1), moons(400, seed=2), 2)


def load_images(path, scale=None):
    """The UCI digits with a random fifth held out, or MNIST idx files with their own test set.

    x (N, 1, H, W) float32, (pixel − mean)/std with scale = (mean, std), by default those of the
    training images; y (N,) integers.
    """
    if path:
        (x, y), (x_test, y_test) = (read_idx_pair(Path(path), p) for p in ("train", "t10k"))
    else:
        with np.load(DIGITS) as file:
            x, y = file["images"], file["labels"]
        order = np.random.default_rng(0).permutation(len(x))
        rest, fifth = order[len(x) // 5 :], order[: len(x) // 5]
        (x, x_test), (y, y_test) = (x[rest], x[fifth]), (y[rest], y[fifth])
    if x.shape[1:] != x_test.shape[1:]:
        raise UserError(f"{path}: training images {x.shape[1:]}, test images {x_test.shape[1:]}")
    mean, std = scale or (float(x.mean()), float(x.std()) or 1.0)
    x, x_test = (((a.astype(np.float32) - mean) / std)[:, None] for a in (x, x_test))
    y, y_test = y.astype(np.int64), y_test.astype(np.int64)
    out = Examples((x, y), (x_test, y_test), int(max(y.max(), y_test.max())) + 1)
    out.mean, out.std = mean, std
    return out


class Text:
    """Characters of a text as numbers; the last tenth is held out.

    vocab: the distinct characters of the training part, sorted. Raises UserError for files that
    cannot be read, are not UTF-8, or are shorter than a few sequences.
    """

    def __init__(self, path, seq_len, vocab=None):
        self.path, self.seq_len = Path(path or TEXT), seq_len
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise UserError(f"--data {self.path}: {what}; give a text file in UTF-8") from None
        cut = len(text) * 9 // 10
        self.vocab = vocab or "".join(sorted(set(text[:cut])))
        if len(text) - cut <= seq_len or len(self.vocab) < 2:
            raise UserError(
                f"--data {self.path}: {len(text)} characters; {10 * (seq_len + 1)} are needed"
            )
        unknown = sum(c not in self.vocab for c in text[cut:])
        if unknown:
            say(
                f"note       {unknown:,} held-out characters are unknown and count as the first one"
            )
        ids = encode(text, self.vocab)
        self.train, self.test = ids[:cut], ids[cut:]

    def batch(self, step, size, seed):
        """(inputs, targets) number `step`: (B, T) each, the target being the next character."""
        starts = np.random.default_rng((seed, step)).integers(
            0, len(self.train) - self.seq_len, size
        )
        rows = self.train[starts[:, None] + np.arange(self.seq_len + 1)]
        return rows[:, :-1], rows[:, 1:]

    def held_out(self, size=64):
        """The whole held-out text in rows of T; targets that fill up the last row are −100."""
        n = -(-(len(self.test) - 1) // self.seq_len)
        inputs = np.zeros(n * self.seq_len, np.int64)
        targets = np.full(n * self.seq_len, -100)
        inputs[: len(self.test) - 1], targets[: len(self.test) - 1] = self.test[:-1], self.test[1:]
        inputs, targets = inputs.reshape(n, -1), targets.reshape(n, -1)
        for i in range(0, n, size):
            yield inputs[i : i + size], targets[i : i + size]

    def floor(self):
        """Nats per character that nobody can beat, known for our own text only."""
        if self.path != TEXT:
            return None
        return runpy.run_path(str(HERE / "data" / "make_text.py"))["floor"]()


def encode(text, vocab):
    """Characters as their places in vocab, those outside it as that of the first character."""
    place = {c: i for i, c in enumerate(vocab)}
    return np.array([place.get(c, 0) for c in text], np.int64)
