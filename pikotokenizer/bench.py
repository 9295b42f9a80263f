"""Side by side with tiktoken, tokenizers and sentencepiece: one process, one thread, taking turns.

The peers are optional; a ratio above 1 means that ours is faster. Every encoding compared has the
same vocabulary (trained here) and must give the same ids, or the bench stops.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from base import count_words
from bpe import BPE, bytes_pipeline
from characters import PATTERNS, chars_to_bytes
from data import load_texts
from options import UserError, say
from run import write_json
from tokenizer import load, save
from unigram import Unigram

os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROUNDS = 11
SIZE = 8192
RUNS = Path(__file__).resolve().parent / "runs"  # bench-NAME.json there, by the name of the data


def clock(work) -> tuple[float, object]:
    """CPU seconds of this process, and what the work returned.

    What else runs on the machine does not count, and everything here has one thread.
    """
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def take_turns(works: dict, rounds: int = ROUNDS) -> dict[str, float]:
    """The median seconds of each, run one after the other `rounds` times.

    Python's garbage collector rests meanwhile, as in `timeit`: it would bill what ran before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(clock(work)[0])
    gc.enable()
    return {name: statistics.median(values) for name, values in seconds.items()}


def minbpe_step_seconds(text: str, steps: int = 3) -> float:
    """Seconds a merge of minbpe's algorithm: count the pairs of the whole text, then rewrite it.

    (karpathy/minbpe `RegexTokenizer.train`: lists of ids, one a word of the pattern, all recounted
    for every merge.)
    """
    words = [list(w.encode("utf-8")) for w in BPE.train("a", 256, pattern="gpt2").split(text, True)]

    def merges():
        nonlocal words
        for new in range(256, 256 + steps):
            counts: dict[tuple[int, int], int] = {}
            for ids in words:
                for pair in pairwise(ids):
                    counts[pair] = counts.get(pair, 0) + 1
            best = max(counts, key=counts.get)
            words = [replaced(ids, best, new) for ids in words]

    return clock(merges)[0] / steps


def replaced(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """minbpe's merge of one list."""
    out, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            out.append(new)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


def bench_training(text: str, ratios: dict, ms: dict) -> None:
    """Training at 8,192 tokens; the merges must be Hugging Face's."""
    ours = lambda: BPE.train(text, SIZE, pattern="gpt2")  # noqa: E731
    works, theirs = {"ours": ours}, None
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        def theirs():
            other = Tokenizer(models.BPE())
            other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            options = {"initial_alphabet": alphabet, "show_progress": False}
            other.train_from_iterator([text], trainers.BpeTrainer(vocab_size=SIZE, **options))
            return other

        works["tokenizers"] = theirs
    except ImportError:
        say("tokenizers is not installed: no train_vs_hf")
    tokenizer = ours()
    if theirs and json.loads(theirs().to_str())["model"]["vocab"] != tokenizer.vocab:
        raise UserError("tokenizers learnt another vocabulary")
    seconds = take_turns(works, 5)
    for name, value in seconds.items():
        print(f"train {len(tokenizer):,} tokens   {name:12s} {value * 1000:9.1f} ms")
    ms["train"] = {name: 1000 * value for name, value in seconds.items()}
    if theirs:
        ratios["train_vs_hf"] = seconds["tokenizers"] / seconds["ours"]


def bench_minbpe(tokenizer: BPE, text: str, ratios: dict, ms: dict) -> None:
    """minbpe's way of training, measured on its first merges (later ones are faster)."""
    ours = clock(lambda: BPE.train(text, SIZE, pattern="gpt2"))[0]
    minbpe = minbpe_step_seconds(text) * len(tokenizer.merges)
    print(
        f"train {len(tokenizer):,} tokens   {'minbpe':12s} {minbpe * 1000:9.1f} ms (3 merges · all)"
    )
    ms["minbpe"] = {"ours": 1000 * ours, "minbpe": 1000 * minbpe}
    ratios["train_vs_minbpe_algorithm"] = minbpe / ours


def peers(tokenizer: BPE, folder: Path) -> dict:
    """The same vocabulary in the libraries that are installed: name → encode."""
    found = {}
    try:
        import tiktoken

        ranks = {chars_to_bytes(piece): i for piece, i in tokenizer.vocab.items()}
        found["tiktoken"] = tiktoken.Encoding(
            "bench", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary
    except ImportError:
        say("tiktoken is not installed: no encode_vs_tiktoken")
    try:
        from tokenizers import Tokenizer

        save(tokenizer, folder / "bench.json")
        other = Tokenizer.from_file(str(folder / "bench.json"))
        found["tokenizers"] = lambda text: other.encode(text).ids
    except ImportError:
        pass
    return found


def bench_encoding(tokenizer: BPE, text: str, folder: Path, ratios: dict, ms: dict) -> None:
    """Encoding, with warm caches and from a cold start."""
    size = len(text.encode("utf-8")) / 1e6
    ids = tokenizer.encode(text)
    cold = []
    for _ in range(5):
        fresh = BPE(tokenizer.vocab, tokenizer.merges, bytes_pipeline(PATTERNS["gpt2"]))
        cold.append(clock(lambda fresh=fresh: fresh.encode(text))[0])
    show_speed("ours, cold", size, statistics.median(cold))
    ms["cold"] = {"ours": 1000 * statistics.median(cold)}
    for name, encode in peers(tokenizer, folder).items():
        if encode(text) != ids:
            raise UserError(f"{name} gives other ids")
        # one peer at a time: a third in the round would leave its memory in the CPU's caches
        works = {"ours": lambda: tokenizer.encode(text), name: lambda e=encode: e(text)}
        seconds = take_turns(works)
        for who, value in seconds.items():
            show_speed(who, size, value)
        short = {"tokenizers": "hf"}.get(name, name)
        ms[f"encode_vs_{short}"] = {who: 1000 * value for who, value in seconds.items()}
        ratios[f"encode_vs_{short}"] = seconds[name] / seconds["ours"]
        ratios[f"encode_cold_vs_{short}"] = seconds[name] / statistics.median(cold)


def bench_loading(tokenizer: BPE, folder: Path, ratios: dict, ms: dict) -> None:
    """A rank file read by us and by tiktoken, pattern and all."""
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        return
    path = folder / "bench.tiktoken"
    save(tokenizer, path)

    def theirs():
        return tiktoken.Encoding(
            "bench", pat_str=PATTERNS["gpt2"], mergeable_ranks=load_tiktoken_bpe(str(path)),
            special_tokens={},
        )  # fmt: skip

    seconds = take_turns({"ours": lambda: load(path, "gpt2"), "tiktoken": theirs}, 11)
    print_pair(f"load {len(tokenizer):,} ranks", seconds)
    ms["load"] = {who: 1000 * value for who, value in seconds.items()}
    ratios["load_vs_tiktoken"] = seconds["tiktoken"] / seconds["ours"]


def bench_unigram(text: str, folder: Path, ratios: dict, ms: dict) -> None:
    """A Unigram model of 1,000 pieces, learnt from the beginning of the text, on all of it."""
    try:
        import sentencepiece
    except ImportError:
        say("sentencepiece is not installed: no unigram_vs_sentencepiece")
        return
    path = folder / "bench.model"
    characters = len(set(text))
    save(Unigram.train(text[:100_000] + "".join(set(text)), 1000 + characters), path)
    ours, peer = load(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    cold = []
    for _ in range(3):
        fresh = load(path)
        cold.append(clock(lambda fresh=fresh: fresh.encode(text))[0])
    if ours.encode(text) != peer.encode(text):
        raise UserError("sentencepiece gives other ids")
    seconds = take_turns(
        {"ours": lambda: ours.encode(text), "sentencepiece": lambda: peer.encode(text)}, 7
    )
    seconds["ours, cold"] = statistics.median(cold)
    print_pair("unigram encode", seconds)
    ms["unigram"] = {who: 1000 * value for who, value in seconds.items()}
    ratios["unigram_vs_sentencepiece"] = seconds["sentencepiece"] / seconds["ours"]
    ratios["unigram_cold_vs_sentencepiece"] = seconds["sentencepiece"] / seconds["ours, cold"]


def print_pair(what: str, seconds: dict[str, float]) -> None:
    for who, value in seconds.items():
        print(f"{what:22s} {who:14s} {value * 1000:9.1f} ms")


def show_speed(name: str, megabytes: float, seconds: float) -> None:
    rate = megabytes / seconds
    print(f"encode {megabytes:.2f} MB       {name:12s} {seconds * 1000:9.1f} ms   {rate:7.1f} MB/s")


def bench_worst_cases(tokenizer: BPE, ratios: dict) -> None:
    """Inputs that make careless encoders quadratic: doubling the text should double the time."""
    cases = {
        "a": ("a", 1_000_000),
        "_": ("_", 100_000),
        "no space": ("lorem,ipsum;dolor:", 1_000_000),
    }
    worst = 0.0
    for name, (unit, size) in cases.items():
        text = (unit * (size // len(unit) + 1))[:size]
        half = clock(lambda text=text: tokenizer.encode(text[: len(text) // 2]))[0]
        whole = clock(lambda text=text: tokenizer.encode(text))[0]
        worst = max(worst, whole / half)
        print(
            f"worst case {name!r:12} {size:9,} characters {whole:6.2f} s, {whole / half:.2f} × half"
        )
    ratios["worst_doubling"] = worst


MEMORY = """
import re, sys
sys.path.insert(0, {here!r})
from tokenizer import load
def peak():
    with open("/proc/self/status", encoding="utf-8") as file:
        return 1024 * int(re.search("VmHWM: *\\t* *([0-9]+)", file.read())[1])
tokenizer = load({weights!r})
text = open({text!r}, encoding="utf-8").read()
text = text * (100_000_000 // len(text) + 1)
tokenizer.encode(text[:2_000_000])
before = peak()
ids = tokenizer.encode(text)
print(len(text), sys.getsizeof(ids), peak() - before)
"""


def bench_memory(text: str, folder: Path, ratios: dict) -> None:
    """The peak memory of encoding 100 MB, beside what the list of ids needs."""
    (folder / "bench.txt").write_text(text, encoding="utf-8", newline="")
    here = str(Path(__file__).resolve().parent)
    files = {"weights": str(folder / "bench.json"), "text": str(folder / "bench.txt")}
    code = MEMORY.format(here=here, **files)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        say("no /proc here, as on macOS and Windows: memory not measured")
        return
    size, ids, grown = map(int, done.stdout.split())
    print(f"memory     {size / 1e6:.0f} MB of text: the ids take {ids / 1e6:.0f} MB, the peak grew "
          f"by {grown / 1e6:.0f} MB")  # fmt: skip
    ratios["memory_growth_over_ids"] = grown / ids
    ratios["memory_growth_mb"] = grown / 1e6


def keep(source: str | None, line: dict, ms: dict) -> None:
    """Write what was measured so far into runs/."""
    RUNS.mkdir(exist_ok=True)
    name = Path(source or "data").stem.replace(":", "-")
    write_json(RUNS / f"bench-{name}.json", line | {"milliseconds": ms})


def main(args) -> None:
    """Runs all of it on --data (default: the corpus in data/); the last line is JSON.

    The line is kept in runs/ too, from where `--figures` takes the README's numbers.
    """
    source = getattr(args, "data", None)
    text = "".join(load_texts(source).values())
    ratios: dict[str, float] = {}
    ms: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(BPE.train(text, SIZE, pattern="gpt2"), folder / "bench.json")
        tokenizer = load(folder / "bench.json")
        # Encoding comes first: a dozen trainings would leave the heap in pieces, and a lookup is
        # as fast as the memory that it touches is compact.
        bench_encoding(tokenizer, text, folder, ratios, ms)
        bench_loading(tokenizer, folder, ratios, ms)
        bench_unigram(text, folder, ratios, ms)
        keep(source, ratios, ms)
        bench_training(text, ratios, ms)
        bench_worst_cases(tokenizer, ratios)
        bench_memory(text, folder, ratios)
        bench_minbpe(tokenizer, text, ratios, ms)
    words = len(count_words(tokenizer, text))
    facts = {
        "data": Path(source or "data").name,
        "distinct_words": words,
        "vocab_size": len(tokenizer),
    }
    line = facts | {name: round(value, 3) for name, value in ratios.items()}
    keep(source, line, ms)
    print(json.dumps(line))
