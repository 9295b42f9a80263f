"""The Transformer from scratch: train it to translate English to Indonesian, or load a real one.

python main.py --train                        two or three minutes on a laptop
python main.py --translate "The cats are chasing a big dog."   the newest run, or the shipped model
python main.py --eval                         a minute; BLEU, chrF and loss on unseen sentences
python main.py --bench                        minutes; speed beside PyTorch's and transformers'
python main.py --figures                      a minute; draws assets/ anew
python main.py --selfcheck                    seconds; does this machine compute right?
python main.py --weights DIR --export DIR2    seconds; a Marian folder that transformers loads
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

import checkpoint
import data
import decode
import hardware
import train
from model import PRESETS, TransformerConfig
from options import (
    Parser,
    UserError,
    add_options,
    add_verbs,
    command_line,
    dispatch,
    from_options,
    given,
    say,
    utf8_text,
)
from run import RunDirectory, newest_run, read_json
from trainer import asked_for

HERE = Path(__file__).resolve().parent
LINES = 64  # lines of standard input that are translated together


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = Parser(__doc__)
    verbs = add_verbs(everything, "train", "eval", "bench", "figures", "selfcheck")
    verbs.add_argument("--translate", metavar="TEXT", type=utf8_text,
                       help="translate a sentence; - is all lines of standard input")  # fmt: skip
    verbs.add_argument("--export", metavar="DIR", help="write a folder that transformers loads")
    verbs.add_argument("--size", choices=PRESETS, help="sizes to begin from (default tiny)")
    add_options(everything, train.TrainConfig, TransformerConfig, decode.Search)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave the training curve in the run directory."""
    start = PRESETS[args.size or "tiny"]
    config, sizes = asked_for(args, train.TrainConfig(), start, data.INSIDE)
    loaded = None
    if config.weights and not args.resume:
        if args.size:
            raise UserError("--weights brings its own sizes: leave --size out")
        loaded = checkpoint.load(config.weights)
        sizes = train.sizes_of(loaded, given(args, TransformerConfig), config.weights)
    train.train(config, sizes, args.resume, loaded)
    run_dir = RunDirectory(config.out)
    if run_dir.writes and train.is_tested(run_dir, config):  # else it was stopped
        leave_picture(run_dir)


def leave_picture(run_dir: RunDirectory) -> None:
    """Draw the training curve, and print the first translations."""
    import figures

    say(f"picture    {figures.training_curve(run_dir.path, run_dir.path / 'figures')}")
    samples = run_dir.path / "samples.txt"
    say(f"samples    {samples}, the first of them:\n")
    print("\n".join(samples.read_text(encoding="utf-8").splitlines()[:7]))


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the model that ships with the folder, ready for use."""
    options = from_options(train.TrainConfig(), args)
    folder = options.weights or newest_run(HERE / "runs") or HERE / "pretrained"
    loaded = checkpoint.load(folder)
    say(f"weights    {folder}")
    device, _ = hardware.choose_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    loaded.model.to(device, dtype)
    return loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part, or all pairs of --data; the last line is JSON."""
    options, search = from_options(train.TrainConfig(), args), from_options(decode.Search(), args)
    loaded = load(args)
    dtype = loaded.model.embedding.weight.dtype
    trained_on = read_json(loaded.folder / "config.json", optional=True).get("train")
    name = trained_on.get("data") if isinstance(trained_on, dict) else None
    if "data" in given(args, train.TrainConfig):
        name, part = options.data, "all"
        pairs = data.Pairs(name, [], [], data.read_pairs(name))
        if name in data.INSIDE:
            part, pairs = "test part", data.load(name)
    else:
        name, part = name if isinstance(name, str) else options.data, "test part"
        pairs = data.load(name)
    score = train.test_scores(loaded, pairs, "test", dtype, search)
    translations = score.pop("translations")
    score["perplexity"] = math.exp(min(score["loss"], 700))
    show_some(pairs.test, translations)
    print(f"{part} of {name}, {len(pairs.test):,} pairs: BLEU {score['bleu']:.2f}, "
          f"chrF {score['chrf']:.2f}, {train.describe(score, score.get('floor'))}")  # fmt: skip
    if "right" in score:
        print(f"{score['right']:.1%} are translations that the grammar allows; of those with a new "
              f"combination of words {score['right_unseen']:.1%}")  # fmt: skip
    facts = {"weights": str(loaded.folder), "data": name, "pairs": len(pairs.test)}
    print(json.dumps(facts | {"beam": search.beam} | score))


def show_some(pairs: list, translations: list[str], n: int = 3) -> None:
    """Print the first translations beside their references."""
    for (source, target), ours in list(zip(pairs, translations, strict=True))[:n]:
        print(f"source      {source}\nreference   {target}\ntranslation {ours}\n")


def do_translate(args: argparse.Namespace) -> None:
    """Print the translation of a sentence, or of each line of standard input."""
    search = from_options(decode.Search(), args)
    compile, loaded = from_options(train.TrainConfig(), args).compile, load(args)

    def work(texts: list[str]) -> None:
        show(decode.translate(loaded, texts, search, compile=compile), search.nbest)

    if args.translate != "-":
        work([args.translate])
        return
    lines: list[str] = []
    for line in standard_input():
        lines.append(line.rstrip("\n"))
        if len(lines) == LINES:
            work(lines)
            lines = []
    if lines:
        work(lines)


def standard_input():
    """The lines of standard input. UserError if they are no UTF-8."""
    if sys.stdin is None:
        raise UserError("--translate -: standard input is closed")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(
            f"--translate -: standard input is no UTF-8 text ({error.reason})"
        ) from None


def show(found: list[list[tuple[str, float]]], nbest: int) -> None:
    """One line a translation; with several of a sentence, the score and a TAB before each."""
    for translations in found:
        for text, score in translations:
            print(f"{score:.4f}\t{text}" if nbest > 1 else text, flush=True)


def do_export(args: argparse.Namespace) -> None:
    """Write a folder that transformers loads."""
    checkpoint.export(load(args), args.export)
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    machine = ("weights", "device", "dtype")
    work = {
        "train": (do_train, train.TrainConfig, TransformerConfig, "size"),
        "translate": (do_translate, *machine, "compile", decode.Search),
        "eval": (do_eval, *machine, decode.Search, "data"),
        "bench": ("bench", "device", "dtype", "seed"),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *machine),
    }
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
