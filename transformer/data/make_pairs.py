"""Write the corpus of this folder: pairs of sentences drawn from our grammar.

    python make_pairs.py     writes train.tsv, valid.tsv, test.tsv and floor.json beside this file

A line of a .tsv file is English, a TAB, Indonesian. floor.json says for each part how good a model
can be at all: the mean of −log p(y|x) of its pairs (the floor), what that mean is expected to be
(the entropy), and the BLEU of the grammar's own likeliest translations against the drawn ones (the
ceiling): even who knows the grammar by heart cannot guess which of several ways was drawn.
"""

import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from indonesian import corpus, grammar  # noqa: E402 - its folder was put on the path first
from metrics import bleu, chrf  # noqa: E402

SIZES = {"train": 10_000, "valid": 400, "test": 400}
SEED = 11


def facts(pairs: list) -> dict:
    """What can be known of a part: counts, floor and entropy in nats per sentence, ceilings."""
    n, drawn = len(pairs), [pair.target for pair in pairs]
    known = [grammar().translations(pair.source) for pair in pairs]
    best = [next(iter(translations)) for translations in known]
    log_probs = [math.log(k[target]) for k, target in zip(known, drawn, strict=True)]
    entropies = [-p * math.log(p) for translations in known for p in translations.values()]
    return {
        "pairs": n,
        "floor": -math.fsum(log_probs) / n,
        "entropy": math.fsum(entropies) / n,
        "ceiling_bleu": bleu(best, drawn),
        "ceiling_chrf": chrf(best, drawn),
        "ceiling_exact": sum(b == d for b, d in zip(best, drawn, strict=True)) / n,
    }


def write(file: Path, text: str) -> None:
    with open(file, "w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)


def main() -> None:
    parts = corpus(SIZES, SEED)
    for part, pairs in parts.items():
        lines = (f"{pair.source}\t{pair.target}\n" for pair in pairs)
        write(HERE / f"{part}.tsv", "".join(lines))
    known = {part: facts(pairs) for part, pairs in parts.items()}
    write(HERE / "floor.json", json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
