"""Tokenizers from scratch: BPE, WordPiece and Unigram, with the ids of the real ones.

python main.py --train                         a second; the corpus in data/, 2,048 tokens
python main.py --encode "Halo, dunia!"         at once; the newest run, or the shipped tokenizer
python main.py --encode "Halo, dunia!" --tokens --color
python main.py --decode "39 283 78 11 267 270 1988 0"
python main.py --explain "perpustakaan"        at once; why is it cut like this?
python main.py --eval                          a second; bytes a token on held-out text
python main.py --bench                         minutes; beside tiktoken, tokenizers, sentencepiece
python main.py --figures                       half a minute; draws assets/ anew
python main.py --selfcheck                     seconds; the oracles, on this machine
python main.py --weights FILE --export FILE2   seconds; tokenizer.json, *.tiktoken, *.model,
                                               vocab.txt, merges.txt or vocab.bpe, by the name
python main.py --weights tokenizer.model --special llama3 --encode "<|begin_of_text|>Halo"
                                               a downloaded rank file, and whose it is
"""

import argparse
import functools
import json
import os
from pathlib import Path

import run
import show
from base import Tokenizer
from data import load_texts, read_text, split_lines
from options import (
    Parser,
    UserError,
    add_options,
    add_verbs,
    command_line,
    dispatch,
    from_options,
    say,
    utf8_text,
)
from tokenizer import load, save
from train import TrainConfig, absolute, measure, started_with, train

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    parser = Parser(__doc__)
    verbs = add_verbs(parser, "train", "eval", "bench", "figures", "selfcheck")
    add = functools.partial(verbs.add_argument, type=utf8_text)
    text = verbs.add_mutually_exclusive_group()
    text.add_argument("--encode", type=utf8_text, metavar="TEXT", help="print its ids")
    text.add_argument("--encode-file", metavar="FILE", help="print the ids of a text file")
    add("--decode", metavar="IDS", help="print the text of ids like '72 101'")
    add("--explain", metavar="WORD", help="say why it is cut as it is")
    add("--export", metavar="FILE", help="write the tokenizer as a new file, format by the name")
    add("--weights", metavar="PATH", help="a run, or a file in any of the formats")
    verbs.add_argument("--tokens", action="store_true", help="print pieces instead of ids")
    verbs.add_argument("--color", action="store_true", help="print the text with coloured tokens")
    add("--html", metavar="FILE", help="write the coloured text as a page")
    which = (
        "special tokens in TEXT count as such; for a rank file: whose they are (llama3, llama4, "
    )
    which += 'whisper-v3 …), or which ({"<|end|>": 300}, also as a JSON file)'
    add("--special", metavar="WHICH", nargs="?", const="", help=which.replace("%", "%%"))
    add_options(parser, TrainConfig)
    return parser


def mendable(work):
    """`work`, with what the library refuses (a ValueError with a sentence) told as a UserError."""

    @functools.wraps(work)
    def wrapped(args: argparse.Namespace) -> None:
        try:
            work(args)
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise UserError(str(error)) from None

    return wrapped


def special_tokens(which: str | None):
    """What --special tells of a rank file: nothing, a name, or an object of texts and ids."""
    if not which:
        return None
    if not which.lstrip().startswith("{"):
        return run.read_json(Path(which)) if os.path.isfile(which) else which
    try:
        return json.loads(which)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--special is no JSON object of texts and ids: {error}") from None


def chosen(args: argparse.Namespace) -> tuple[Tokenizer, Path]:
    """--weights, else the newest run, else the tokenizer that ships with the folder."""
    newest = run.newest_run(HERE / "runs", "tokenizer.*") or HERE / "pretrained"
    path = Path(newest if args.weights is None else args.weights)
    if not path.exists():
        raise UserError(f"--weights {path} does not exist: give a run or a tokenizer file")
    say(f"weights    {path}")
    return load(path, getattr(args, "pattern", None), special_tokens(args.special)), path


def do_train(args: argparse.Namespace) -> None:
    """Train; the verbs that follow use the new run."""
    base = TrainConfig()
    if args.resume:
        base = started_with(Path(getattr(args, "out", base.out)))
    config = from_options(base, args)
    fixed = (base.algorithm, base.pattern)
    if args.resume and (config.algorithm, config.pattern) != fixed:
        raise UserError(f"the run has --algorithm {base.algorithm} --pattern {base.pattern!r}: "
                        "leave them out to resume it")  # fmt: skip
    train(config, args.resume)
    args.weights = args.weights or config.out


def held_out_of(path: Path, args: argparse.Namespace) -> tuple[dict[str, str], str]:
    """The texts to score a tokenizer on, and what they are.

    What it was trained on is never scored as if it were new: of the run's own data only the lines
    that were held out. Other data is scored whole.
    """
    config = started_with(path) if (path / "config.json").is_file() else TrainConfig()
    source = absolute(getattr(args, "data", config.data))
    texts, name = load_texts(source), source or "data"
    if source != config.data:
        return texts, f"{name} (all of it)"
    if not config.held_out:
        return texts, f"{name} (what it was trained on)"
    parts = {key: "".join(split_lines(text, config.held_out)[1]) for key, text in texts.items()}
    return parts, f"{name} (held out)"


def do_eval(args: argparse.Namespace) -> None:
    """Score held-out text; the last line is JSON."""
    tokenizer, path = chosen(args)
    texts, what = held_out_of(path, args)
    score = measure(tokenizer, texts)
    for name, row in score["languages"].items():
        print(f"{name:12s} {row['bytes_per_token']:6.3f} bytes a token, "
              f"{row['tokens_per_word']:6.3f} tokens a word")  # fmt: skip
    print(json.dumps({"weights": str(path), "data": what} | score))


def do_encode(args: argparse.Namespace) -> None:
    """Print ids, pieces or colours of --encode or --encode-file, block by block."""
    tokenizer, _ = chosen(args)
    text = args.encode if args.encode is not None else read_text(Path(args.encode_file))
    if args.html:
        write_page(Path(args.html), show.page(tokenizer, text))
    if args.color:
        print(show.coloured(tokenizer, text))
        return
    ids = tokenizer.encode(text, () if args.special is None else "all")
    if args.tokens:
        print(" ".join(show.readable(tokenizer, tokenizer.pieces[i]) for i in ids))
    else:
        print(" ".join(map(str, ids)))


def write_page(path: Path, page: str) -> None:
    """Write --html, over nothing but a page that came from here."""
    if path.exists() and not (path.is_file() and path.read_bytes().startswith(show.PAGE_HEAD)):
        raise UserError(f"--html {path} exists and is no page of ours: choose another name")
    run.write_text(path, page)
    say(f"page       {path}")


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
    """Write the tokenizer in another format, as new files only."""
    if run.is_run(Path(args.export).absolute().parent):
        raise UserError(f"--export {args.export} is inside a run: name a place outside")
    tokenizer, _ = chosen(args)
    for file in save(tokenizer, args.export, new=True):
        say(f"exported   {file}")
    if args.export.endswith(".tiktoken"):
        say(
            "note       a rank file holds neither pattern nor special tokens: tell them to tiktoken"
        )


def main() -> None:
    """Do what the command line says, in the order of the help."""
    which = ("weights", "pattern", "special")
    ways = ("tokens", "color", "html")
    work = {
        "train": (mendable(do_train), TrainConfig, "weights"),
        "encode": (mendable(do_encode), *which, *ways),
        "encode_file": (mendable(do_encode), *which, *ways),
        "decode": (mendable(do_decode), *which),
        "explain": (mendable(do_explain), *which),
        "eval": (mendable(do_eval), *which, "data"),
        "export": (mendable(do_export), *which),
        "bench": ("bench", "data"),
        "figures": ("figures",),
        "selfcheck": ("selfcheck",),
    }
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
