"""Variational autoencoders from scratch: learn what pictures look like, and draw new ones.

python main.py --train                       a minute or two on a laptop: handwritten digits
python main.py --train --data FOLDER         minutes; MNIST files, folders of pictures, .npz
python main.py --sample                      seconds; new pictures as text, or --picture FILE.png
python main.py --eval                        seconds; -log p(x) of the test part in nats
python main.py --experiment NAME             minutes; ppca, annealed, sprites, gallery or seeds
python main.py --bench                       minutes; speed beside pytorch/examples' VAE
python main.py --figures                     a minute; draws assets/ anew
python main.py --selfcheck                   seconds; does this machine compute right?
python main.py --weights W --export DIR      seconds; a state dict for torch
"""

import argparse
import json
from pathlib import Path

import torch

import checkpoint
import data
import hardware
import options
import train
from model import PRESETS, VaeConfig
from options import UserError, given, say
from run import newest_run, whole_file
from trainer import asked_for

HERE = Path(__file__).resolve().parent
SHADES = " ░▒▓█"
COLUMNS = 100  # of a terminal, that pictures as text may take


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = options.Parser(__doc__)
    verbs = options.add_verbs(
        everything, "train", "sample", "eval", "bench", "figures", "selfcheck"
    )
    names = ("ppca", "annealed", "sprites", "gallery", "seeds")
    verbs.add_argument("--experiment", choices=names, help="what the README's pictures are made of")
    verbs.add_argument("--export", metavar="DIR", help="write weights.pth, a state dict")
    verbs.add_argument("--num-samples", type=int, default=8, metavar="N", help="with --sample")
    verbs.add_argument("--picture", metavar="FILE", help="with --sample: a new .png to write")
    verbs.add_argument("--size", choices=PRESETS, help="network to begin from (default digits)")
    options.add_options(everything, train.TrainConfig, VaeConfig)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave the curve and a grid of pictures in the run directory."""
    sizes = PRESETS[args.size or "digits"]
    config, sizes = asked_for(args, train.TrainConfig(), sizes, data.INSIDE)
    loaded = None
    if config.weights and not args.resume:
        loaded = checkpoint.load(config.weights)
        loaded.refuse_changes(given(args, VaeConfig), PRESETS.get(args.size))
    train.train(config, sizes, args.resume, loaded, leave_pictures)


def leave_pictures(loaded: checkpoint.Loaded, dataset: data.Dataset) -> None:
    """Draw the training curve, reconstructions and samples into the run."""
    import figures

    for picture in figures.of_run(loaded, dataset, loaded.path / "figures"):
        say(f"picture    {picture}")


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the network that ships with the folder."""
    asked = options.from_options(train.TrainConfig(), args)
    loaded = checkpoint.load(asked.weights or newest_run(HERE / "runs") or HERE / "pretrained")
    say(f"weights    {loaded.path}")
    loaded.model.to(hardware.choose_device(asked.device)[0]).eval()
    return loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part; the last line is JSON."""
    loaded, asked = load(args), options.from_options(train.TrainConfig(), args)
    source = given(args, train.TrainConfig).get("data") or loaded.source
    if not source:
        raise UserError(
            f"{loaded.path} does not say which pictures it was trained on: name some with --data"
        )
    dataset = loaded.dataset(source, asked.image_size)
    loaded.refuse_misfits(source, dataset.test.images)
    score = train.test(loaded.model, dataset.test.images, loaded.sizes, asked.importance)
    print(f"{train.describe(score)}, {score['pictures']:,} pictures")
    print(json.dumps({"weights": str(loaded.path), "data": source} | score))


@torch.no_grad()
def do_sample(args: argparse.Namespace) -> None:
    """Draw z from the prior and print the pictures, or write them to --picture."""
    if not 1 <= args.num_samples <= 10_000:
        raise UserError(f"--num-samples must be 1 to 10,000, not {args.num_samples}")
    loaded, seed = load(args), options.from_options(train.TrainConfig(), args).seed
    if loaded.sizes.n_code:
        raise UserError(f"{loaded.path} has a codebook, and which codes go together is another "
                        "model's task (README): --sample needs normal latents")  # fmt: skip
    dice = torch.Generator().manual_seed(seed)
    z = torch.randn(args.num_samples, loaded.sizes.latent, generator=dice)
    pictures = loaded.model.picture(z.to(next(loaded.model.parameters()).device)).cpu()
    if args.picture is None:
        print(as_text(pictures))
        return
    import figures

    file = Path(args.picture)
    if file.exists() or file.suffix != ".png":
        raise UserError(f"--picture {file}: name a new file that ends in .png")
    with whole_file(file) as part:
        figures.tiled(pictures).save(part, format="png")
    say(f"picture    {file}")


def as_text(pictures: torch.Tensor) -> str:
    """Pictures (N, C, H, W) of 0 … 1 in five shades, as many in a row as fit, two letters a pixel.

    Large ones are made smaller first.
    """
    grey = pictures.mean(1, keepdim=True)
    if max(grey.shape[2:]) > COLUMNS // 4:
        grey = torch.nn.functional.interpolate(grey, size=(COLUMNS // 4,) * 2, mode="area")
    shades = (grey[:, 0] * len(SHADES)).long().clamp(0, len(SHADES) - 1)
    per_row = max(1, COLUMNS // (2 * shades.shape[2] + 2))
    rows = []
    for some in shades.split(per_row):
        for line in some.transpose(0, 1).tolist():  # the same line of each picture
            texts = ["".join(2 * SHADES[shade] for shade in one) for one in line]
            rows.append("  ".join(texts).rstrip())
        rows.append("")
    return "\n".join(rows[:-1])


def do_export(args: argparse.Namespace) -> None:
    """Write weights.pth and say whose names are in it."""
    names = checkpoint.export(load(args), args.export)
    say(f"exported   {args.export}, with the names of {names}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    work = {
        "train": (do_train, train.TrainConfig, VaeConfig, "size"),
        "sample": (do_sample, "weights", "device", "seed", "num_samples", "picture"),
        "eval": (do_eval, "weights", "device", "data", "image_size", "importance"),
        "experiment": ("experiments", train.TrainConfig),
        "bench": ("bench", train.TrainConfig),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, "weights", "device"),
    }
    options.dispatch(parser(), work)


if __name__ == "__main__":
    options.command_line(main)
