"""Llama from scratch: train one on little stories, let it tell some, load and export real weights.

python main.py --train                       a minute or two on a laptop, story included
python main.py --sample --prompt "One day"   seconds; the newest run, or the shipped model
python main.py --eval                        seconds; nats per character of held-out text
python main.py --bench                       minutes; speed beside transformers, if installed
python main.py --figures                     a minute; draws assets/ anew
python main.py --selfcheck                   seconds; does this machine compute right?
python main.py --weights DIR --export DIR2   seconds; a folder that transformers loads
"""

import argparse
import json
from pathlib import Path

import torch

import bench
import checkpoint
import data
import figures
import generate
import run
import selfcheck
import train
from model import PRESETS, LlamaConfig
from run import UserError, say
from tokenizer import read_json

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    parser = run.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_argument_group("What to do, see above")
    for verb in ("train", "eval", "sample", "bench", "figures", "selfcheck"):
        verbs.add_argument(f"--{verb}", action="store_true")
    verbs.add_argument("--export", metavar="DIR", help="write a folder that transformers loads")
    verbs.add_argument("--resume", action="store_true", help="with --train: go on from --out")
    verbs.add_argument("--size", choices=PRESETS, default="tiny", help="sizes to begin from")
    verbs.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a sample")
    configs = (train.TrainConfig, LlamaConfig, generate.SampleConfig, generate.Sampling)
    run.add_options(parser, *configs)
    return parser


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave samples and the training curve in the run directory."""
    config, sizes = train.TrainConfig(), PRESETS[args.size]
    if args.resume:
        config, sizes = train.started_with(Path(getattr(args, "out", config.out)))
    asked = train.absolute(run.from_options(config, args)), run.from_options(sizes, args)
    if args.resume:
        train.refuse_changes((config, sizes), asked)
    config, sizes = asked
    train.train(config, sizes, args.resume)
    folder = run.RunDirectory(config.out)
    if folder.writes and folder.weights.exists():
        loaded = checkpoint.load(folder.path)
        texts = [generate.write(loaded, generate.SampleConfig(), seed=i) for i in range(3)]
        with run.whole_file(folder.path / "samples.txt") as part:
            part.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
        picture = figures.training_curve(folder.path, folder.path / "figures")
        say(f"picture    {picture}\nsamples    {folder.path / 'samples.txt'}, the first of them:\n")
        print(texts[0])


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the model that ships with the folder, ready for use."""
    given = run.given(args, train.TrainConfig)
    folder = given.get("weights") or run.newest_run(HERE / "runs") or HERE / "pretrained"
    loaded = checkpoint.load(folder)
    say(f"weights    {folder}")
    device, _ = run.choose_device(given.get("device", "auto"))
    loaded.model.to(device, torch.bfloat16 if given.get("dtype") == "bfloat16" else torch.float32)
    return loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score held-out text; the last line is JSON."""
    loaded, given = load(args), run.given(args, train.TrainConfig)
    trained = read_json(loaded.folder / "config.json").get("train", {})
    source = data.Source.measure(given.get("data", trained.get("data", "stories")))
    tokens = data.held_out_tokens(source, loaded.tokenizer)
    seq_len = min(loaded.model.config.seq_len, getattr(args, "seq_len", 1024))
    score = train.evaluate(loaded.model, tokens, seq_len, loaded.model.embedding.weight.dtype)
    score["floor_nats_per_char"] = data.floor_nats_per_char(source.name)
    print(f"held out: {train.describe(source.name, score)}, {score['loss']:.4f} per token")
    print(json.dumps({"weights": str(loaded.folder), "data": source.name} | score))


def do_sample(args: argparse.Namespace) -> None:
    """Print samples while they are being made."""
    config = run.from_options(generate.SampleConfig(), args)
    sampling = run.from_options(generate.Sampling(), args)
    seed = run.from_options(train.TrainConfig(), args).seed
    show = lambda text: print(text, end="", flush=True)  # noqa: E731
    generate.write(load(args), config, sampling, seed, args.stop, show)
    print()


def main() -> None:
    """Do what the command line says, in the order of the help."""
    everything = parser()
    args = everything.parse_args()
    if args.resume and not args.train:
        raise UserError("--resume goes with --train")
    work = {"train": do_train, "eval": do_eval, "sample": do_sample, "bench": bench.main,
            "figures": figures.main, "selfcheck": selfcheck.main}  # fmt: skip
    wanted = [verb for verb in work if getattr(args, verb)]
    if not wanted and not args.export:
        everything.print_help()
    for verb in wanted:
        work[verb](args)
    if args.export:
        checkpoint.export(load(args), args.export)
        say(f"exported   {args.export}")


if __name__ == "__main__":
    run.command_line(main)
