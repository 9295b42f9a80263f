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

import checkpoint
import data
import hardware
import options
import report
import train
from augment import normalize
from model import PRESETS, NetConfig
from options import UserError, given, say
from run import newest_run
from trainer import asked_for

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = options.Parser(__doc__)
    verbs = options.add_verbs(everything, "train", "eval", "bench", "figures", "selfcheck")
    verbs.add_argument("--classify", metavar="PICTURE", help="say what is on it")
    names = ("residual", "ablation", "seeds")
    verbs.add_argument("--experiment", choices=names, help="trainings side by side, three seeds")
    verbs.add_argument("--export", metavar="DIR", help="write weights.pth, a state dict")
    verbs.add_argument("--int8", action="store_true", help="with --export: eight bits, BN folded")
    first = "with --eval: the first N pictures of a file, as they stand"
    verbs.add_argument("--first", type=int, default=0, metavar="N", help=first)
    verbs.add_argument("--size", choices=PRESETS, help="network to begin from (default fast)")
    options.add_options(everything, train.TrainConfig, NetConfig)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave the curve and a grid of pictures in the run directory."""
    sizes = PRESETS[args.size or "fast"]
    config, sizes = asked_for(args, train.TrainConfig(), sizes, ("shapes-10",))
    loaded = None
    if config.weights and not args.resume:
        loaded = checkpoint.load(config.weights)
        loaded.refuse_changes(given(args, NetConfig), PRESETS.get(args.size))
    train.train(config, sizes, args.resume, loaded, leave_pictures)


def leave_pictures(loaded: checkpoint.Loaded, dataset: data.Dataset, p: torch.Tensor) -> None:
    """Draw the training curve and some of the answers `p` to the test part into the run."""
    import figures

    for picture in figures.of_run(loaded, dataset.test, p, loaded.path / "figures"):
        say(f"picture    {picture}")


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the network that ships with the folder."""
    asked = options.from_options(train.TrainConfig(), args)
    loaded = checkpoint.load(asked.weights or newest_run(HERE / "runs") or HERE / "pretrained")
    say(f"weights    {loaded.path}")
    loaded.model.to(hardware.choose_device(asked.device)[0])
    return loaded


def data_for(loaded: checkpoint.Loaded, args: argparse.Namespace) -> tuple[str, int]:
    """The pictures to score a network on, and the size to bring them to.

    --data, else what it was trained on. UserError if nobody says.
    """
    asked = given(args, train.TrainConfig)
    source = asked.get("data") or loaded.source
    if not source:
        raise UserError(
            f"{loaded.path} does not say which pictures it was trained on: name some with --data"
        )
    return source, asked.get("image_size", loaded.image_size)


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part, or with --first pictures as they stand; the last line is JSON."""
    if args.first < 0:
        raise UserError(f"--first must be a number of pictures, not {args.first}")
    loaded = load(args)
    source, size = data_for(loaded, args)
    if args.first:
        raw = data.read(source, size)
        classes, pictures, ceiling = raw.classes, raw.train[: args.first], None
    else:
        dataset = loaded.dataset(source, size)
        classes, pictures, ceiling = dataset.classes, dataset.test, dataset.ceiling
    loaded.refuse_misfits(source, classes, pictures.images)
    bfloat16 = given(args, train.TrainConfig).get("dtype") == "bfloat16"
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    score = train.evaluate(loaded.model, pictures, loaded, dtype, loaded.views)
    print(f"{report.describe(score)}, {score['pictures']:,} pictures")
    if ceiling:
        score["ceiling"] = ceiling
    print(json.dumps({"weights": str(loaded.path), "data": source} | score))


def do_classify(args: argparse.Namespace) -> None:
    """Print the likely classes of a picture, the likeliest first."""
    loaded = load(args)
    sizes = loaded.sizes
    size = (sizes.image_height, sizes.image_width)
    picture = data.read_picture(args.classify, sizes.channels, size)
    p = train.answers(loaded.model, picture, loaded, torch.float32, loaded.views)[0]
    for value, index in zip(*p.sort(descending=True), strict=True):
        if value >= 0.001:
            print(f"{100 * value:5.1f} %  {loaded.classes[index]}")


def do_export(args: argparse.Namespace) -> None:
    """Write weights.pth, or with --int8 an eight-bit network, and say how equal it is."""
    import quantize

    loaded = load(args)
    if not args.int8:
        checkpoint.export(loaded, args.export)
    else:
        source, size = data_for(loaded, args)
        dataset = loaded.dataset(source, size)
        loaded.refuse_misfits(dataset.name, dataset.classes, dataset.test.images)
        seen = normalize(dataset.train.images[:500], loaded.mean, loaded.std)
        small = checkpoint.export_int8(loaded, seen, args.export)
        print(json.dumps(quantize.compare(loaded.model, small.model, dataset, loaded)))
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    pictures = ("weights", "device", "data", "image_size")
    work = {
        "train": (do_train, train.TrainConfig, NetConfig, "size"),
        "eval": (do_eval, *pictures, "dtype", "first"),
        "classify": (do_classify, "weights", "device"),
        "bench": ("bench", train.TrainConfig),
        "experiment": ("experiments", train.TrainConfig),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *pictures, "int8"),
    }
    options.dispatch(parser(), work)


if __name__ == "__main__":
    options.command_line(main)
