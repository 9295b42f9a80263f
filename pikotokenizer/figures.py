"""Draws assets/: what the README shows. Everything is computed here, from the corpus in data/.

merges.png       the merge tree of a word, and its tokens
compression.png  bytes a token of the three algorithms by vocabulary size, in both languages
floor.png        a source of words whose entropy is known, and what tokens cost above it
bench-*.json     what `--bench` measured: the README's speeds are held against it
"""

from pathlib import Path

import bench
import show
from bpe import BPE
from data import load_texts, split_lines
from options import UserError, say
from run import write_text
from tokenizer import load
from unigram import Unigram
from wordpiece import WordPiece

HERE = Path(__file__).resolve().parent
ASSETS = HERE / "assets"
TREE_WORDS = ("perpustakaan", "photographer")
SIZES = (512, 768, 1024, 1536, 2048, 3072)


def pyplot():
    """matplotlib without a window; UserError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures needs `pip install matplotlib`") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def place(piece: str, tree: dict, x: list[int], spots: dict, path: str = "") -> tuple[float, int]:
    """Gives each node of a merge tree an (x, height); leaves stand side by side."""
    if piece not in tree:
        x[0] += 1
        spots[path] = (piece, x[0], 0, None)
        return x[0], 0
    left, right, rank = tree[piece]
    a, high_a = place(left, tree, x, spots, path + "0")
    b, high_b = place(right, tree, x, spots, path + "1")
    height = max(high_a, high_b) + 1
    spots[path] = (piece, (a + b) / 2, height, rank)
    return (a + b) / 2, height


def draw_merges(plt) -> Path:
    """The merge trees of TREE_WORDS under the shipped tokenizer."""
    tokenizer = load(HERE / "pretrained")
    figure, axes = plt.subplots(1, len(TREE_WORDS), figsize=(9, 3.6))
    for axis, word in zip(axes, TREE_WORDS, strict=True):
        tree, x = show.merge_tree(tokenizer, word), [0]
        for n, token in enumerate(tokenizer.merged(word)):
            spots: dict = {}
            place(token, tree, x, spots)
            for path, (piece, at, height, rank) in spots.items():
                for child in (path + "0", path + "1"):
                    if child in spots:
                        axis.plot([at, spots[child][1]], [height, spots[child][2]], "#999", lw=1)
                text = piece if rank is None else f"{piece}\n{rank}"
                box = {"fc": show.COLOURS[n % len(show.COLOURS)], "ec": "none", "pad": 1.5}
                axis.text(at, height, text, ha="center", va="center", fontsize=9, bbox=box)
        axis.set_title(f"“{word}”", pad=14)
        axis.margins(x=0.09, y=0.08)
        axis.axis("off")
    figure.suptitle("The number under a merge is its rank: 0 was learnt first. One colour a token.")
    return finish(plt, figure, "merges.png")


def draw_compression(plt) -> Path:
    """Bytes a token on held-out lines by vocabulary size."""
    split = {name: split_lines(text) for name, text in load_texts().items()}
    train = [line for kept, _ in split.values() for line in kept]
    trainers = {"BPE": BPE.train, "WordPiece": WordPiece.train, "Unigram": Unigram.train}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for name, trainer in trainers.items():
        curves: dict[str, list[float]] = {language: [] for language in split}
        for size in SIZES:
            tokenizer = trainer(train, size)
            for language, (_, rest) in split.items():
                text = "".join(rest)
                curves[language].append(len(text.encode("utf-8")) / len(tokenizer.encode(text)))
        for axis, (language, values) in zip(axes, curves.items(), strict=True):
            axis.plot(SIZES, values, "o-", label=name)
            axis.set(title=language.capitalize(), xlabel="vocabulary (tokens)", xscale="log")
            axis.set_xticks(SIZES, map(str, SIZES))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0].set_ylabel("bytes a token, held out")
    axes[0].legend()
    return finish(plt, figure, "compression.png")


def draw_floor(plt) -> Path:
    """Bits a word under an ideal code of BPE's tokens, above the entropy of the source."""
    text, entropy = show.word_source(200, 60_000)
    sizes = (257, 264, 272, 288, 320, 352, 384, 448, 512, 640)
    bits = [show.bits_per_word(BPE.train(text, size, "gpt2"), text) for size in sizes]
    figure, axis = plt.subplots(figsize=(6, 3.4))
    axis.plot(sizes, bits, "o-", label="tokens a word × entropy of a token")
    axis.axhline(entropy, color="k", ls="--", label=f"entropy of the source, {entropy:.3f} bits")
    axis.set(xlabel="vocabulary (tokens)", ylabel="bits a word", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    return finish(plt, figure, "floor.png")


def finish(plt, figure, name: str) -> Path:
    """Saves a picture into assets/."""
    ASSETS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(ASSETS / name, dpi=110)
    plt.close(figure)
    return ASSETS / name


def main(args=None) -> None:
    """All pictures, and the numbers of the last bench."""
    for file in bench.RUNS.glob("bench-*.json"):
        write_text(ASSETS / file.name, file.read_text(encoding="utf-8"))
    plt = pyplot()
    for draw in (draw_merges, draw_compression, draw_floor):
        say(f"picture    {draw(plt)}")
