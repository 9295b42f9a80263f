"""Every picture of the README, from a saved run and from `assets/results.json`.

curve.png      training and held-out loss against the entropy of the stories
attention.png  where the names in a story look back to
memory.png     what the rotary angles do, and the bytes of the cache by the number of KV heads
roofline.png   training and decoding against what the machine can do
"""

import dataclasses
import json
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt

import checkpoint
import data
import judge
from model import PRESETS, Llama, LlamaConfig, rotary_frequencies
from options import say
from run import RunDirectory, write_json

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
STORY = (
    "Once upon a time there was a shy fox named Nora. She lived near the harbor. One morning, Nora "
    "found a red kite in the tall grass. But the kite flew up in a storm and got stuck on the oak "
    "tree. Soon an owl named Hugo came by. Hugo went straight up the oak tree and came down with "
    "the kite. Nora gave Hugo a pear."
)
REMEMBERED = ("Nora", "Hugo", "kite")
SHOWN = 46  # tokens of the story in the picture of attention


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
    """Loss by step of the run in `folder`, in nats per character where that is known."""
    matplotlib.use("Agg")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]
    train, valid = history(folder, "train"), history(folder, "valid")
    per_token = valid[-1]["nats_per_char"] / valid[-1]["loss"]
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    axes.plot([x["step"] for x in train], [x["loss"] * per_token for x in train],
              color="#9bb8d3", label="training batch")  # fmt: skip
    axes.plot([x["step"] for x in valid], [x["nats_per_char"] for x in valid],
              color="#1b4f8a", marker="o", label="validation stories")  # fmt: skip
    if floor := data.floor(config["data"], "valid"):
        axes.axhline(floor, color="#c0392b", linestyle="--",
                     label=f"floor, the entropy of the stories: {floor:.4f}")  # fmt: skip
        axes.set_title(f"validation part: {valid[-1]['nats_per_char'] / floor:.3f} × the floor")
    axes.set(xlabel="step", ylabel="nats per character", yscale="log")
    axes.legend(frameon=False)
    return finish(figure, target / "curve.png")


@torch.no_grad()
def attention_weights(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """What every query head of every layer looks at: (n_layer, H, T, T), rows sum to 1."""
    import model as definition

    seen, usual = [], definition.fastest_attention

    def watched(q, k, v, mask, scale, causal):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        scores = scale * torch.einsum("bhtc,bhsc->hts", q, keys)
        seen.append(scores.masked_fill(later, -torch.inf).softmax(-1))
        return definition.fused_attention(q, k, v, mask, scale, causal)

    definition.fastest_attention = lambda *_: watched
    try:
        model(tokens)
    finally:
        definition.fastest_attention = usual
    return torch.stack(seen)


def attention_map(loaded: checkpoint.Loaded) -> Path:
    """Rows: words that stood before and must be remembered. Columns: the story."""
    ids = loaded.tokenizer.encode(STORY)
    pieces = [loaded.tokenizer.decode([i]).strip() for i in ids]
    weights = attention_weights(loaded.model, torch.tensor([ids])).flatten(0, 1)
    first = {word: pieces.index(word) for word in REMEMBERED if word in pieces}
    # the token before a word has to predict it, so it is the one that must look back
    queries = [i - 1 for i, word in enumerate(pieces) if word in first and first[word] < i]
    rows, names = [], []
    for query in (query for query in queries if query < SHOWN):
        at_word = [i for i in range(query + 1) if pieces[i] == pieces[query + 1]]
        head = int(weights[:, query, at_word].sum(-1).argmax())
        layer, number = divmod(head, loaded.model.config.n_head)
        rows.append(weights[head, query, :SHOWN])
        names.append(f"{pieces[query]} ▸ {pieces[query + 1]}\nlayer {layer}, head {number}")
    figure, axes = plt.subplots(figsize=(8.6, 0.5 * len(rows) + 1.9))
    image = axes.imshow(torch.stack(rows), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(SHOWN), pieces[:SHOWN], rotation=90, fontsize=9)
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.set_title(
        "one head's weights at the token before ▸ the word that it must repeat", fontsize=11
    )
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("attention weight", fontsize=10)
    return finish(figure, ASSETS / "attention.png")


def memory() -> Path:
    """Left: q·k of one vector with itself by distance. Right: cache bytes by KV heads."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    names = {"llama3-8b": "θ = 500,000", "llama3.2-1b": "θ = 500,000, scaled × 32",
             "llama2-7b": "θ = 10,000"}  # fmt: skip
    distance = torch.logspace(0, 5, 400, dtype=torch.float64)
    for name, label in names.items():
        c = PRESETS[name]
        angle = torch.outer(distance, rotary_frequencies(c.d_head, c.rope_theta, c.rope_scaling))
        left.semilogx(distance, angle.cos().mean(1), label=label, linewidth=1)
    left.set(xlabel="distance between query and key (tokens)", ylabel="mean cos of the angles")
    left.set_title("rotary: equal vectors at a distance", fontsize=11)
    left.legend(frameon=False, fontsize=9)
    length = torch.tensor([1024, 8192, 131_072])
    for label, n_kv_head in (("MHA: 32", 32), ("GQA: 8", 8), ("MQA: 1", 1)):
        sizes = dataclasses.replace(PRESETS["llama3-8b"], n_kv_head=n_kv_head)
        right.loglog(length, length * cache_bytes(sizes) / 2**30, marker="o", label=label)
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in Llama(PRESETS["llama3-8b"]).parameters()) / 2**30
    right.axhline(weights, color="#888888", linestyle=":", label="all its weights in bfloat16")
    right.set(xlabel="tokens in the cache", ylabel="GiB in bfloat16, one sequence")
    right.set_title("KV heads of an 8 B model", fontsize=10)
    right.legend(frameon=False, fontsize=9)
    return finish(figure, ASSETS / "memory.png")


def cache_bytes(sizes: LlamaConfig, item: int = 2) -> int:
    """Bytes a token takes in the cache: 2 · n_layer · K · C · item."""
    return 2 * sizes.n_layer * sizes.n_kv_head * sizes.d_head * item


def roofline() -> Path:
    """FLOP/s by FLOPs per byte of weights, from the saved bench.

    Decoding B rows does 2·B FLOPs with each weight it reads, training on N tokens 6·N.
    """
    bench = json.loads((ASSETS / "results.json").read_text(encoding="utf-8"))["bench-float32"]
    peak, bandwidth, item = bench["matmul_flops"], bench["bytes_per_second"], bench["item_bytes"]
    intensity = torch.logspace(-1, 5, 200)
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    axes.loglog(intensity, (intensity * bandwidth).clamp(max=peak) / 1e9, color="#c0392b",
                label=f"limit: {bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s")  # fmt: skip
    for point in bench["points"]:
        x, y = point["flops_per_weight"] / item, point["flops"] / 1e9
        axes.plot(x, y, "o", label=point["name"])
    axes.set(xlabel="FLOPs per byte of weights read", ylabel="GFLOP/s")
    axes.legend(frameon=False, fontsize=8)
    return finish(figure, ASSETS / "roofline.png")


def collect() -> None:
    """Put the numbers that the README quotes from the runs that are there into results.json."""
    file = ASSETS / "results.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    seeds = [RUNS / name for name in ("default", "seed1", "seed2")]
    if all((folder / "log.jsonl").exists() for folder in seeds):
        results["stories"] = {
            "valid": [by_step(folder, "valid") for folder in seeds],
            "test": [by_step(folder, "test") for folder in seeds],
            "first_loss": history(seeds[0], "train")[0]["loss"],
            "told": [told(folder) for folder in seeds],
        }
    for name in ("tinyshakespeare",):
        if history(RUNS / name, "test"):
            score = history(RUNS / name, "test")[-1]
            results[name] = {"nats_per_char": score["nats_per_char"], "step": score["step"]}
    timed = [folder for folder in RUNS.glob("timed-*") if history(folder, "test")]
    results["timed"] = results.get("timed", {}) | {
        folder.name.removeprefix("timed-"): history(folder, "valid")[-1]["seconds"]
        for folder in timed
    }
    for file_of_bench in RUNS.glob("bench-*.json"):
        results[file_of_bench.stem] = json.loads(file_of_bench.read_text(encoding="utf-8"))
    write_json(file, results)


def by_step(folder: Path, split: str) -> dict[int, float]:
    """The scores of a part of the stories, × its floor."""
    floor = data.floor("stories", split)
    return {x["step"]: round(x["nats_per_char"] / floor, 4) for x in history(folder, split)}


def told(folder: Path) -> dict[str, float]:
    """The share of samples of a run that the grammar can tell, by temperature."""
    loaded = checkpoint.load(folder)
    return {str(t): judge.share_told(loaded, t) for t in judge.TEMPERATURES}


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    matplotlib.use("Agg")
    collect()
    folder = Path(getattr(args, "weights", HERE / "pretrained"))
    for file in (training_curve(folder, ASSETS), attention_map(checkpoint.load(folder)),
                 memory(), roofline()):  # fmt: skip
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
