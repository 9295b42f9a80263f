"""Tokenizers from scratch: BPE, WordPiece and Unigram, with the ids of the real ones.

python main.py --train                         a second; the corpus in data/, 2,048 tokens
python main.py --encode "Halo, dunia!"         at once; the newest run, or the shipped tokenizer
python main.py --encode "Halo, dunia!" --tokens --color
python main.py --decode "72 97 108 111"        at once
python main.py --explain "perpustakaan"        at once; why is it cut like this?
python main.py --eval                          a second; bytes a token on held-out text
python main.py --bench                         a minute; beside tiktoken and tokenizers
python main.py --figures                       half a minute; draws assets/ anew
python main.py --selfcheck                     seconds; the oracles, on this machine
python main.py --weights FILE --export FILE2   seconds; tokenizer.json, *.tiktoken, *.model,
                                               vocab.txt or vocab.bpe, by the name
"""

import argparse
import json
from pathlib import Path

import run
import show
from base import Tokenizer
from data import load_texts, read_text, split_lines
from run import UserError, say
from tokenizer import load, save
from train import TrainConfig, measure, started_with, train

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    parser = run.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_argument_group("What to do, see above")
    for verb in ("train", "eval", "bench", "figures", "selfcheck"):
        verbs.add_argument(f"--{verb}", action="store_true")
    text = verbs.add_mutually_exclusive_group()
    text.add_argument("--encode", metavar="TEXT", help="print its ids")
    text.add_argument("--encode-file", metavar="FILE", help="print the ids of a text file")
    verbs.add_argument("--decode", metavar="IDS", help="print the text of ids like '72 101'")
    verbs.add_argument("--explain", metavar="WORD", help="say why it is cut as it is")
    verbs.add_argument("--export", metavar="FILE", help="write the tokenizer, format by the name")
    verbs.add_argument("--weights", metavar="PATH", help="a run, or a file in any of the formats")
    verbs.add_argument(
        "--resume", action="store_true", help="with --train: extend the BPE in --out"
    )
    verbs.add_argument("--tokens", action="store_true", help="print pieces instead of ids")
    verbs.add_argument("--color", action="store_true", help="print the text with coloured tokens")
    verbs.add_argument("--html", metavar="FILE", help="write the coloured text as a page")
    verbs.add_argument(
        "--special", action="store_true", help="special tokens in TEXT count as such"
    )
    run.add_options(parser, TrainConfig)
    return parser


def chosen(args: argparse.Namespace) -> tuple[Tokenizer, Path]:
    """--weights, else the newest run, else the tokenizer that ships with the folder."""
    newest = run.newest_run(HERE / "runs") or HERE / "pretrained"
    path = Path(newest if args.weights is None else args.weights)
    if not path.exists():
        raise UserError(f"--weights {path} does not exist: give a run or a tokenizer file")
    say(f"weights    {path}")
    return load(path, getattr(args, "pattern", None)), path


def do_train(args: argparse.Namespace) -> None:
    """Train; the verbs that follow use the new run."""
    base = TrainConfig()
    if args.resume:
        base = started_with(Path(getattr(args, "out", base.out)))
    config = run.from_options(base, args)
    if args.resume and (config.algorithm, config.pattern) != (base.algorithm, base.pattern):
        raise UserError(f"the run has --algorithm {base.algorithm} --pattern {base.pattern!r}: "
                        "leave them out to resume it")  # fmt: skip
    train(config, args.resume)
    args.weights = args.weights or config.out


def do_eval(args: argparse.Namespace) -> None:
    """Score held-out text; the last line is JSON."""
    tokenizer, path = chosen(args)
    source = getattr(args, "data", None)
    texts = load_texts(source)
    if source is None:  # the default corpus was trained on: measure on what was held out of it
        texts = {name: "".join(split_lines(text)[1]) for name, text in texts.items()}
    score = measure(tokenizer, texts)
    for name, row in score["languages"].items():
        print(f"{name:12s} {row['bytes_per_token']:6.3f} bytes a token, "
              f"{row['tokens_per_word']:6.3f} tokens a word")  # fmt: skip
    print(json.dumps({"weights": str(path), "data": source or "data (held out)"} | score))


def do_encode(args: argparse.Namespace) -> None:
    """Print ids, pieces or colours of --encode or --encode-file, block by block."""
    tokenizer, _ = chosen(args)
    text = args.encode if args.encode is not None else read_text(Path(args.encode_file))
    if args.html:
        run.write_whole(Path(args.html), show.page(tokenizer, text).encode("utf-8"))
        say(f"page       {args.html}")
    if args.color:
        print(show.coloured(tokenizer, text))
        return
    ids = tokenizer.encode(text, "all" if args.special else ())
    if args.tokens:
        print(" ".join(show.readable(tokenizer, tokenizer.pieces[i]) for i in ids))
    else:
        print(" ".join(map(str, ids)))


def do_decode(args: argparse.Namespace) -> None:
    """Print the text of ids."""
    try:
        ids = [int(word) for word in args.decode.replace(",", " ").split()]
    except ValueError:
        raise UserError(
            f"--decode {args.decode!r}: give whole numbers with spaces between"
        ) from None
    print(chosen(args)[0].decode(ids))


def do_explain(args: argparse.Namespace) -> None:
    print(show.explain(chosen(args)[0], args.explain))


def do_export(args: argparse.Namespace) -> None:
    """Write the tokenizer in another format."""
    tokenizer, _ = chosen(args)
    for file in save(tokenizer, args.export):
        say(f"exported   {file}")
    if args.export.endswith(".tiktoken"):
        say(
            "note       a rank file holds neither pattern nor special tokens: tell them to tiktoken"
        )


def do_bench(args: argparse.Namespace) -> None:
    import bench

    bench.main(getattr(args, "data", None))


def do_figures(args: argparse.Namespace) -> None:
    import figures

    figures.main()


def do_selfcheck(args: argparse.Namespace) -> None:
    import selfcheck

    selfcheck.main()


def main() -> None:
    """Do what the command line says, in the order of the help."""
    everything = parser()
    args = everything.parse_args()
    if args.resume and not args.train:
        raise UserError("--resume goes with --train")
    work = {
        "train": do_train, "encode": do_encode, "encode_file": do_encode, "decode": do_decode,
        "explain": do_explain, "eval": do_eval, "bench": do_bench, "figures": do_figures,
        "selfcheck": do_selfcheck, "export": do_export,
    }  # fmt: skip
    wanted = [verb for verb in work if getattr(args, verb) not in (None, False)]
    if not wanted:
        everything.print_help()
    for verb in wanted:
        work[verb](args)


if __name__ == "__main__":
    run.command_line(main)
