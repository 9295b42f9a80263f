"""Every picture of the README, from a saved run and from `assets/results.json`.

curve.png      training and held-out loss against the entropy of the translations
alignment.png  where each head of the decoder looks, and how far that is from the true alignment
recipe.png     the learning rate by step, and the vectors of the positions
lengths.png    BLEU by length of the sentence; decoding with the cache and without
"""

import json
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt

import checkpoint
import data
import decode
import indonesian
import metrics
import train
from checkpoint import Loaded
from model import dot_product_attention, sinusoids
from options import say
from run import RunDirectory, write_json

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
BLUE, PALE, RED = "#1b4f8a", "#9bb8d3", "#c0392b"
BINS = ((1, 5), (6, 7), (8, 9), (10, 12), (13, 99))  # words of a source


def finish(figure: plt.Figure, file: Path) -> Path:
    """Write the picture and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def history(folder: Path, split: str) -> list[dict]:
    """The logged lines of one split."""
    return [line for line in RunDirectory(folder).history() if line["split"] == split]


def training_curve(folder: Path, target: Path) -> Path:
    """Loss by step of the run in `folder`, in nats per token, without smoothing."""
    matplotlib.use("Agg")
    batches, valid = history(folder, "train"), history(folder, "valid")
    test = history(folder, "test")
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    axes.plot([x["step"] for x in batches], [x["nats"] for x in batches], color=PALE,
              label="training batch, with dropout")  # fmt: skip
    axes.plot([x["step"] for x in valid], [x["loss"] for x in valid], color=BLUE, marker="o",
              label="validation sentences")  # fmt: skip
    if test and "floor" in test[-1]:
        floor = test[-1]["floor"]
        axes.axhline(floor, color=RED, linestyle="--",
                     label=f"floor, the entropy of the translations: {floor:.4f}")  # fmt: skip
        gap = test[-1]["loss"] - floor
        axes.set_title(f"test part: {gap:+.4f} nats per token against the floor", fontsize=11)
    axes.set(xlabel="step", ylabel="nats per token", yscale="log")
    axes.legend(frameon=False)
    return finish(figure, target / "curve.png")


# ── Attention as alignment ────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def cross_attention(loaded: Loaded, source: list[int], target: list[int]) -> torch.Tensor:
    """The weights of all heads: (layers · H, T, S); row t is what token t is predicted from.

    source, target: token ids with the end.
    """
    import model as definition

    seen, usual = [], definition.quickest_attention

    def watched(q, k, v, mask, scale, causal):
        seen.append((scale * (q @ k.mT)).softmax(-1)[0])
        return dot_product_attention(q, k, v, mask, scale, causal)

    net = loaded.model.eval()
    memory = net.encode(torch.tensor([source]))
    definition.quickest_attention = lambda *_: watched
    try:
        net.decode(torch.tensor([[net.config.start_id, *target[:-1]]]), memory)
    finally:
        definition.quickest_attention = usual
    return torch.cat(seen[1::2])  # every other call is over the target itself


def by_words(weights: torch.Tensor, source_words: list[int], target_words: list[int]):
    """The same between words: pieces of a source word are added up, of a target word averaged.

    weights: (heads, T, S). The end's row and column are left out. Returns (heads, words, words).
    """
    n_target, n_source = max(target_words) + 1, max(source_words) + 1
    weights = weights[:, : len(target_words), : len(source_words)]
    rows = torch.zeros(n_target, len(target_words))
    rows[target_words, range(len(target_words))] = 1.0
    columns = torch.zeros(len(source_words), n_source)
    columns[range(len(source_words)), source_words] = 1.0
    return rows / rows.sum(1, keepdim=True) @ weights @ columns


def word_attention(loaded: Loaded, pair: tuple[str, str]) -> torch.Tensor:
    """What every head of the decoder looks at for a pair: (heads, target words, source words)."""
    subwords, end = loaded.subwords, loaded.model.config.end_id
    source, target = (subwords.encode(text) for text in pair)
    weights = cross_attention(loaded, [*source, end], [*target, end])
    return by_words(weights, subwords.words(source), subwords.words(target))


def error_rates(loaded: Loaded, n_pair: int = 200) -> torch.Tensor:
    """The alignment error rate of each head on the test part: (layers, H).

    A head's links: for each target word the source word with the largest weight.
    """
    pairs = data.load("grammar")
    gold, predicted = pairs.alignments("test")[:n_pair], []
    for pair in pairs.test[:n_pair]:
        best = word_attention(loaded, pair).argmax(-1)  # (heads, target words)
        predicted.append([[(i, j) for j, i in enumerate(row)] for row in best.tolist()])
    rates = [
        metrics.alignment_error_rate([one[head] for one in predicted], gold)
        for head in range(len(predicted[0]))
    ]
    return torch.tensor(rates).view(loaded.model.config.decoder_layers, -1)


def alignment(loaded: Loaded, rates: torch.Tensor) -> Path:
    """Left: the best head on one sentence, with the true links. Right: error rate per head."""
    pairs = data.load("grammar")
    lengths = [len(target.split()) for _, target in pairs.test]
    number = max((i for i, n in enumerate(lengths) if n <= 11), key=lambda i: lengths[i])
    pair, gold = pairs.test[number], pairs.alignments("test")[number]
    head = int(rates.flatten().argmin())
    weights = word_attention(loaded, pair)[head]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 4.2), width_ratios=(1.7, 1), layout="constrained"
    )
    image = left.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set_xticks(range(weights.shape[1]), pair[0].split(), rotation=60, ha="right", fontsize=10)
    left.set_yticks(range(weights.shape[0]), pair[1].split(), fontsize=10)
    left.plot([i for i, _ in gold], [j for _, j in gold], "o", markersize=14, fillstyle="none",
              color=RED)  # fmt: skip
    layer, number = divmod(head, rates.shape[1])
    left.set_title(f"weights of layer {layer}, head {number}; ○ true links", fontsize=11)
    figure.colorbar(image, ax=left, pad=0.01).set_label("attention weight", fontsize=10)
    right.imshow(rates, cmap="Blues_r", vmin=0, vmax=1, aspect="auto")
    for (i, j), rate in ((divmod(k, rates.shape[1]), r) for k, r in enumerate(rates.flatten())):
        right.text(j, i, f"{rate:.2f}", ha="center", va="center", fontsize=12,
                   color="white" if rate < 0.4 else "black")  # fmt: skip
    right.set_xticks(range(rates.shape[1]))
    right.set_yticks(range(rates.shape[0]))
    right.set(xlabel="head", ylabel="decoder layer")
    right.set_title("alignment error rate", fontsize=11)
    return finish(figure, ASSETS / "alignment.png")


# ── The recipe ────────────────────────────────────────────────────────────────────────────────────


def recipe() -> Path:
    """Left: Eq. (3) for the paper's base model and for ours. Right: the positions' vectors."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    ours = train.TrainConfig()
    base = train.TrainConfig(steps=20 * ours.warmup, warmup=4000, lr=(512 * 4000) ** -0.5)
    for config, label in ((ours, "our default"), (base, "the paper's base model")):
        steps = torch.linspace(1, 6 * config.warmup, 300).long().tolist()
        rates = [train.learning_rate(step - 1, config) for step in steps]
        left.plot([step / config.warmup for step in steps], rates, label=label)
    left.set(xlabel="step / warm-up steps", ylabel="learning rate")
    left.set_title("warm-up, then 1/√step (Eq. 3)", fontsize=11)
    left.legend(frameon=False)
    image = right.imshow(sinusoids(60, 64).T, cmap="RdBu", aspect="auto", vmin=-1, vmax=1)
    right.set(xlabel="position in the sentence", ylabel="number of the vector")
    right.set_title("sines and cosines of the position", fontsize=11)
    figure.colorbar(image, ax=right, pad=0.01)
    return finish(figure, ASSETS / "recipe.png")


# ── Lengths ───────────────────────────────────────────────────────────────────────────────────────


def test_translations(loaded: Loaded) -> list[str]:
    """The translations of the grammar's test part."""
    sources = [source for source, _ in data.load("grammar").test]
    return [found[0][0] for found in decode.translate(loaded, sources, decode.Search())]


def bleu_by_length(translations: list[str]) -> dict[str, list[float]]:
    """BLEU, and the number of sentences, of the test part by words of the source."""
    pairs, table = data.load("grammar").test, {}
    for low, high in BINS:
        chosen = [i for i, (source, _) in enumerate(pairs) if low <= len(source.split()) <= high]
        if chosen:
            texts = [translations[i] for i in chosen], [pairs[i][1] for i in chosen]
            name = f"{low}–{high}" if high < 99 else f"{low}+"
            table[name] = [round(metrics.bleu(*texts), 2), len(chosen)]
    return table


def some_samples(translations: list[str]) -> list[str]:
    """Three translations that are allowed, and up to three that are not, as lines of the README."""
    pairs, grammar = data.load("grammar"), indonesian.grammar()
    lines = {True: [], False: []}
    for (source, target), ours in zip(pairs.test, translations, strict=True):
        known = "" if ours == target else f" (reference: {target})"
        lines[ours in grammar.translations(source)].append(f"- {source} → {ours}{known}")
    return lines[True][:3] + lines[False][:3]


def lengths(table: dict, bench: dict | None) -> Path:
    """Left: BLEU by length. Right: time by tokens, with the cache and without."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.4), layout="constrained")
    bars = left.bar(list(table), [bleu for bleu, _ in table.values()], color=BLUE)
    left.bar_label(bars, [f"{bleu:.1f}\n({n})" for bleu, n in table.values()], fontsize=9,
                   label_type="center", color="white")  # fmt: skip
    left.set(xlabel="words of the English sentence (how many sentences)", ylabel="BLEU")
    left.set_title("test part by length of the sentence", fontsize=11)
    times = bench["cache_ms"] if bench else {}
    for name, color in (("uncached", RED), ("cached", BLUE)):
        points = [(int(k.split()[0]), ms) for k, ms in times.items() if k.split()[1] == name]
        right.plot(*zip(*points, strict=True), "o-", color=color, label=name) if points else None
    right.set(xlabel="tokens of the translation", ylabel="milliseconds")
    right.set_title("greedy search with and without the cache", fontsize=11)
    if times:
        right.legend(frameon=False)
    return finish(figure, ASSETS / "lengths.png")


# ── Numbers ───────────────────────────────────────────────────────────────────────────────────────


def collect(loaded: Loaded) -> dict:
    """Put the numbers that the README quotes from the runs that are there into results.json."""
    file = ASSETS / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    seeds = [RUNS / name for name in ("default", "seed1", "seed2")]
    seeds = [folder for folder in seeds if history(folder, "test")]
    if len(seeds) == 3:
        keep = ("loss", "floor", "bleu", "chrf")
        results["grammar"] = [{k: history(f, "test")[-1][k] for k in keep} for f in seeds]
        results["valid"] = [{x["step"]: x["loss"] for x in history(f, "valid")} for f in seeds]
        results["first_loss"] = history(seeds[0], "train")[0]["nats"]
    for folder in RUNS.glob("timed-*"):
        if history(folder, "test"):
            name = folder.name.removeprefix("timed-")
            results.setdefault("timed", {})[name] = history(folder, "valid")[-1]["seconds"]
    for bench in RUNS.glob("bench-*.json"):
        results[bench.stem] = json.loads(bench.read_text(encoding="utf-8"))
    results["error_rates"] = [[round(x, 3) for x in row] for row in error_rates(loaded).tolist()]
    translations = test_translations(loaded)
    results["bleu_by_length"] = bleu_by_length(translations)
    results["right"] = train.right_shares(data.load("grammar"), "test", translations)
    results["samples"] = some_samples(translations)
    ASSETS.mkdir(exist_ok=True)
    write_json(file, results)
    return results


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    matplotlib.use("Agg")
    folder = Path(getattr(args, "weights", HERE / "pretrained"))
    loaded = checkpoint.load(folder)
    results = collect(loaded)
    rates = torch.tensor(results["error_rates"])
    for file in (training_curve(folder, ASSETS), alignment(loaded, rates), recipe(),
                 lengths(results["bleu_by_length"], results.get("bench-float32"))):  # fmt: skip
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
