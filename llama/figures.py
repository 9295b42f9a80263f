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
import run
from model import PRESETS, Llama, LlamaConfig, rotary_frequencies
from run import say

HERE = Path(__file__).resolve().parent
ASSETS, RUNS = HERE / "assets", HERE / "runs"
STORY = (
    "Once upon a time there was a shy fox named Nora. She lived near the harbor. One morning, Nora "
    "found a red kite in the tall grass. But the kite flew up in a storm and got stuck on the oak "
    "tree. Soon an owl named Hugo came by. Hugo went straight up the oak tree and came down with "
    "the kite. Nora gave Hugo a pear. Since then Nora let Hugo play with the kite."
)
REMEMBERED = ("Nora", "Hugo", "kite")


def finish(figure: plt.Figure, file: Path) -> Path:
    """Write the picture and forget the figure."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return file


def history(folder: Path, split: str) -> list[dict]:
    """The logged lines of one split."""
    return [line for line in run.RunDirectory(folder).history() if line["split"] == split]


def training_curve(folder: Path, target: Path) -> Path:
    """Loss by step of the run in `folder`, in nats per character where that is known."""
    matplotlib.use("Agg")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["train"]
    train, valid = history(folder, "train"), history(folder, "valid")
    per_token = valid[-1]["nats_per_char"] / valid[-1]["loss"]
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    axes.plot([x["step"] for x in train], [x["loss"] * per_token for x in train],
              color="#9bb8d3", label="training batch")  # fmt: skip
    axes.plot([x["step"] for x in valid], [x["nats_per_char"] for x in valid],
              color="#1b4f8a", marker="o", label="held-out text")  # fmt: skip
    if floor := data.floor_nats_per_char(config["data"]):
        axes.axhline(floor, color="#c0392b", linestyle="--",
                     label=f"entropy of the grammar: {floor:.4f}")  # fmt: skip
        axes.set_title(f"held out: {valid[-1]['nats_per_char'] / floor:.3f} × the floor")
    axes.set(xlabel="step", ylabel="nats per character", yscale="log")
    axes.legend(frameon=False)
    return finish(figure, target / "curve.png")


@torch.no_grad()
def attention_weights(model: Llama, tokens: torch.Tensor) -> torch.Tensor:
    """What every query head of every layer looks at: (n_layer, H, T, T), rows sum to 1."""
    import model as definition

    seen, original = [], definition.fused_attention

    def spy(q, k, v, mask):
        scores = torch.einsum("bthc,bhsc->hts", q, k.repeat_interleave(q.shape[2] // k.shape[1], 1))
        later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
        seen.append((scores * q.shape[3] ** -0.5).masked_fill(later, -torch.inf).softmax(-1))
        return original(q, k, v, mask)

    definition.fused_attention = spy
    try:
        model(tokens)
    finally:
        definition.fused_attention = original
    return torch.stack(seen)


def attention_map(loaded: checkpoint.Loaded) -> Path:
    """Rows: words that stood before and must be remembered. Columns: the story."""
    ids = loaded.tokenizer.encode(STORY)
    pieces = [loaded.tokenizer.decode([i]).strip() for i in ids]
    weights = attention_weights(loaded.model, torch.tensor([ids])).flatten(0, 1)
    first = {word: pieces.index(word) for word in REMEMBERED}
    # the token before a word has to predict it, so it is the one that must look back
    queries = [i - 1 for i, word in enumerate(pieces) if word in first and first[word] < i]
    rows, names = [], []
    for query in queries:
        at_word = [i for i in range(query + 1) if pieces[i] == pieces[query + 1]]
        head = int(weights[:, query, at_word].sum(-1).argmax())
        layer, number = divmod(head, loaded.model.config.n_head)
        rows.append(weights[head, query])
        names.append(f"… {pieces[query]} [{pieces[query + 1]}]   layer {layer} head {number}")
    figure, axes = plt.subplots(figsize=(11, 0.28 * len(rows) + 0.6))
    axes.imshow(torch.stack(rows), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(pieces)), pieces, rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_title("what the model looks at just before it says a [word] again", fontsize=9)
    return finish(figure, ASSETS / "attention.png")


def memory() -> Path:
    """Left: q·k of one vector with itself by distance. Right: cache bytes by KV heads."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
    names = {"llama3-8b": "θ = 500,000", "llama3.2-1b": "θ = 500,000, scaled × 32",
             "llama2-7b": "θ = 10,000"}  # fmt: skip
    distance = torch.logspace(0, 5, 400, dtype=torch.float64)
    for name, label in names.items():
        angle = torch.outer(distance, rotary_frequencies(PRESETS[name]))
        left.semilogx(distance, angle.cos().mean(1), label=label, linewidth=1)
    left.set(xlabel="distance between query and key (tokens)", ylabel="mean cos of the angles")
    left.set_title("rotary: equal vectors at a distance", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    length = torch.tensor([1024, 8192, 131_072])
    for label, n_kv_head in (("MHA: 32", 32), ("GQA: 8", 8), ("MQA: 1", 1)):
        sizes = dataclasses.replace(PRESETS["llama3-8b"], n_kv_head=n_kv_head)
        right.loglog(length, length * cache_bytes(sizes) / 2**30, marker="o", label=label)
    with torch.device("meta"):
        weights = 2 * sum(p.numel() for p in Llama(PRESETS["llama3-8b"]).parameters()) / 2**30
    right.axhline(weights, color="#888888", linestyle=":", label="all its weights in bfloat16")
    right.set(xlabel="tokens in the cache", ylabel="GiB in bfloat16, one sequence")
    right.set_title("KV heads of an 8 B model", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    return finish(figure, ASSETS / "memory.png")


def cache_bytes(sizes: LlamaConfig, item: int = 2) -> int:
    """Bytes a token takes in the cache: 2 · n_layer · K · C · item."""
    return 2 * sizes.n_layer * sizes.n_kv_head * sizes.d_head * item


def roofline() -> Path:
    """FLOP/s by FLOPs per byte of weights, from the saved bench.

    Decoding B rows does 2·B FLOPs with each weight it reads, training on N tokens 6·N.
    """
    bench = json.loads((ASSETS / "results.json").read_text(encoding="utf-8"))["bench"]
    peak, bandwidth, item = bench["matmul_flops"], bench["bytes_per_second"], bench["item_bytes"]
    intensity = torch.logspace(-1, 5, 200)
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
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
        floor = data.floor_nats_per_char("stories")
        scores = [
            {x["step"]: round(x["nats_per_char"] / floor, 4) for x in history(folder, "valid")}
            for folder in seeds
        ]
        results["stories"] = {
            "times_floor": scores,
            "first_loss": history(seeds[0], "train")[0]["loss"],
        }
        results["stories"]["seconds"] = history(seeds[0], "valid")[-1]["seconds"]
    if (RUNS / "tinyshakespeare" / "log.jsonl").exists():
        last = history(RUNS / "tinyshakespeare", "valid")[-1]
        results["tinyshakespeare"] = {
            key: last[key] for key in ("nats_per_char", "seconds", "step")
        }
    if (RUNS / "bench.json").exists():
        results["bench"] = json.loads((RUNS / "bench.json").read_text(encoding="utf-8"))
    run.write_json(file, results)


def main(args) -> None:
    """Draw all of them from --weights, else from the shipped run."""
    matplotlib.use("Agg")
    collect()
    folder = Path(getattr(args, "weights", HERE / "pretrained"))
    for file in (training_curve(folder, ASSETS), attention_map(checkpoint.load(folder)),
                 memory(), roofline()):  # fmt: skip
        say(f"{file} {file.stat().st_size / 1000:.0f} kB")
