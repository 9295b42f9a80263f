"""Convolutional networks from scratch: train one on pictures, score it, let it name a picture.

python main.py --train                       a minute or two on a laptop: ten shapes, ceiling known
python main.py --train --data FOLDER         minutes; MNIST files, CIFAR-10, class folders, .npz
python main.py --classify PICTURE            seconds; the newest run, or the shipped network
python main.py --eval                        seconds; accuracy on the test part
python main.py --bench                       minutes; speed beside a plain torch script
python main.py --experiment NAME             half an hour; residual, ablation or seeds
python main.py --figures                     a minute; draws assets/ anew
python main.py --selfcheck                   seconds; does this machine compute right?
python main.py --weights W --export DIR      seconds; a state dict for torch, or --int8
"""

import argparse
import json
from pathlib import Path

import torch

import bench
import checkpoint
import data
import experiments
import figures
import quantize
import report
import run
import selfcheck
import train
from augment import normalize, predict
from model import PRESETS, NetConfig
from run import UserError, say

HERE = Path(__file__).resolve().parent
VERBS = ("train", "eval", "bench", "figures", "selfcheck")


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    parser = run.Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_argument_group("What to do, see above")
    for verb in VERBS:
        verbs.add_argument(f"--{verb}", action="store_true")
    verbs.add_argument("--classify", metavar="PICTURE", help="say what is on it")
    verbs.add_argument("--experiment", choices=("residual", "ablation", "seeds"),
                       help="trainings side by side, three seeds each")  # fmt: skip
    verbs.add_argument("--export", metavar="DIR", help="write weights.pth, a state dict")
    verbs.add_argument("--int8", action="store_true", help="with --export: eight bits, BN folded")
    first = "with --eval: the first N pictures of a file, as they stand"
    verbs.add_argument("--first", type=int, default=0, metavar="N", help=first)
    verbs.add_argument("--resume", action="store_true", help="with --train: go on from --out")
    verbs.add_argument("--size", choices=PRESETS, default="fast", help="network to begin from")
    run.add_options(parser, train.TrainConfig, NetConfig)
    return parser


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave the curve and a grid of pictures in the run directory."""
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
        for picture in figures.of_run(folder.path, folder.path / "figures"):
            say(f"picture    {picture}")


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the network that ships with the folder."""
    given = run.given(args, train.TrainConfig)
    path = given.get("weights") or run.newest_run(HERE / "runs") or HERE / "pretrained"
    loaded = checkpoint.load(path)
    say(f"weights    {path}")
    device, _ = run.choose_device(given.get("device", "auto"))
    loaded.model.to(device)
    return loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part, or with --first pictures as they stand; the last line is JSON."""
    loaded, given = load(args), run.given(args, train.TrainConfig)
    source = given.get("data") or loaded.source
    if args.first:
        raw = data.read(source)
        classes, pictures, ceiling = raw.classes, raw.train[: args.first], None
    else:
        found = data.load(source)
        classes, pictures, ceiling = found.classes, found.test, found.ceiling
    loaded.refuse_misfits(source, classes, pictures.images)
    dtype = getattr(torch, given.get("dtype", "auto").replace("auto", "float32"))
    score = train.evaluate(loaded.model, pictures, loaded, dtype, loaded.views)
    score |= {"ceiling": ceiling} if ceiling else {}
    print(f"{report.percent(score['accuracy'])} of {score['pictures']:,} pictures, "
          f"{score['loss']:.4f} nats")  # fmt: skip
    print(json.dumps({"weights": str(loaded.path), "data": source or "shapes-10"} | score))


def do_classify(args: argparse.Namespace) -> None:
    """Print the likely classes of a picture, the likeliest first."""
    loaded = load(args)
    sizes = loaded.sizes
    size = (sizes.image_height, sizes.image_width)
    picture = data.read_picture(args.classify, sizes.channels, size)
    p = predict(loaded.model, picture, loaded.mean, loaded.std, loaded.views)[0]
    for value, index in zip(*p.sort(descending=True), strict=True):
        if value >= 0.001:
            print(f"{100 * value:5.1f} %  {loaded.classes[index]}")


def do_export(args: argparse.Namespace) -> None:
    """Write weights.pth, or with --int8 an eight-bit network, and say how equal it is."""
    loaded = load(args)
    if not args.int8:
        checkpoint.export(loaded, args.export)
    else:
        found = data.load(run.given(args, train.TrainConfig).get("data") or loaded.source)
        loaded.refuse_misfits(found.name, found.classes, found.test.images)
        seen = normalize(found.train.images[:500], loaded.mean, loaded.std)
        small = checkpoint.export_int8(loaded, seen, args.export)
        print(json.dumps(quantize.compare(loaded.model, small.model, found, loaded)))
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    everything = parser()
    args = everything.parse_args()
    if args.resume and not args.train:
        raise UserError("--resume goes with --train")
    if args.int8 and not args.export:
        raise UserError("--int8 goes with --export DIR")
    if args.first < 0:
        raise UserError(f"--first must be a number of pictures, not {args.first}")
    work = {"train": do_train, "eval": do_eval, "classify": do_classify, "bench": bench.main,
            "experiment": experiments.main, "figures": figures.main, "selfcheck": selfcheck.main,
            "export": do_export}  # fmt: skip
    wanted = [verb for verb in work if getattr(args, verb)]
    if not wanted:
        everything.print_help()
    for verb in wanted:
        work[verb](args)


if __name__ == "__main__":
    run.command_line(main)
