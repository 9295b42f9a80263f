"""Diffusion from scratch: train a network to turn noise into data, sample it, measure it.

python main.py --train                     a minute or two on a laptop: digits, by class
python main.py --train --size toy          a minute: noise becomes a spiral
python main.py --train --data FOLDER       your pictures; MNIST files, class folders, .npz, hf:NAME
python main.py --sample --label 3          seconds; the newest run, or the network shipped here
python main.py --eval                      a minute; quality, memorisation and bits, as JSON
python main.py --bench                     minutes; speed and quality beside diffusers
python main.py --figures                   minutes; draws assets/ anew
python main.py --selfcheck                 seconds; does this machine compute right?
python main.py --weights W --export DIR    seconds; a folder that diffusers loads
"""

import argparse
import json
from pathlib import Path

import torch

import checkpoint
import classifier
import hardware
import measure
import options
import sources
import train
from measure import SampleConfig
from model import PRESETS, NetConfig
from options import UserError, from_options, given, say
from run import is_run, newest_run
from trainer import asked_for

HERE = Path(__file__).resolve().parent
JUDGED = 500  # samples that the end of a training is judged by


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = options.Parser(__doc__)
    verbs = options.add_verbs(
        everything, "train", "sample", "eval", "bench", "figures", "selfcheck"
    )
    verbs.add_argument("--export", metavar="DIR", help="write a folder that diffusers loads")
    verbs.add_argument("--gif", action="store_true", help="with --sample: a film of it too")
    verbs.add_argument("--size", choices=PRESETS, help="network to begin from (default digits)")
    options.add_options(everything, train.TrainConfig, NetConfig, SampleConfig)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then judge samples, and leave pictures in the run directory."""
    size = args.size or "digits"
    base = train.TrainConfig(**train.RECIPES.get(size, {}))
    config, sizes = asked_for(args, base, PRESETS[size], sources.INSIDE)
    loaded = None
    if config.weights and not args.resume:
        loaded = checkpoint.load(config.weights)
        loaded.refuse_changes(given(args, NetConfig))
    train.train(config, sizes, args.resume, loaded, judge_and_draw)


def judge_and_draw(loaded: checkpoint.Loaded, source: sources.Source) -> dict:
    """Judge the samples of a finished run and draw its pictures. Returns numbers for the log."""
    import figures

    config = SampleConfig(num_samples=JUDGED)
    judge = classifier_of(loaded, source)
    found = measure.quality(loaded, source, config, judge)
    for picture in figures.of_run(loaded, source, loaded.path / "figures"):
        say(f"picture    {picture}")
    return found


def classifier_of(loaded, source: sources.Source) -> classifier.Classifier | None:
    """A classifier trained on the same pictures; None where there are no classes to tell apart."""
    if not source.is_pictures or len(source.classes) < 2:
        return None
    device = next(loaded.model.parameters()).device
    return classifier.fit(source.train, len(source.classes), device=device)


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights, else the newest run, else the network that ships with the folder."""
    asked = from_options(train.TrainConfig(), args)
    loaded = checkpoint.load(asked.weights or newest_run(HERE / "runs") or HERE / "pretrained")
    say(f"weights    {loaded.path}")
    loaded.model.to(hardware.choose_device(asked.device)[0], memory_format=torch.channels_last)
    return loaded


def do_sample(args: argparse.Namespace) -> None:
    """Draw samples into a picture, and with --gif how they came about; print their paths."""
    import figures

    loaded, config = load(args), from_options(SampleConfig(), args)
    n_class, n = loaded.sizes.n_class, config.num_samples
    if config.label and not n_class:
        raise UserError("--label: this network was trained without classes")
    labels = measure.even_labels(loaded, n)
    if config.label:
        labels = torch.full((n,), checkpoint.label_number(config.label, loaded))
    elif labels is not None:
        labels = labels.sort().values
    watcher = measure.Watcher() if args.gif else None
    x = measure.sample(loaded, config, labels, n, watch=watcher)
    own = is_run(loaded.path) and not loaded.path.resolve().is_relative_to(HERE / "pretrained")
    place = loaded.path if own else HERE / "runs"  # others' folders stay as they are
    print(figures.sample_picture(x, loaded, place / "samples.png"))
    if watcher:
        print(figures.film(watcher.seen, x, loaded, place / "samples.gif"))


def do_eval(args: argparse.Namespace) -> None:
    """Score samples and the test part; the last line is JSON."""
    loaded = load(args)
    asked = given(args, train.TrainConfig)
    config = from_options(SampleConfig(num_samples=JUDGED), args)
    source = loaded.rows(asked.get("data"), asked.get("image_size", 0))
    judge = classifier_of(loaded, source)
    loss = train.loss_of(loaded.model, loaded.process, source, source.test, torch.float32)
    found = {"weights": str(loaded.path), "data": source.name, "loss": loss}
    found |= measure.quality(loaded, source, config, judge) | measure.bits(loaded, source)
    for name, value in found.items():
        print(f"{name:20} {value:.4f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(found))


def do_export(args: argparse.Namespace) -> None:
    """Write a folder of diffusers."""
    loaded, label = load(args), from_options(SampleConfig(), args).label
    if label and not loaded.sizes.n_class:
        raise UserError("--label: this network was trained without classes")
    number = checkpoint.label_number(label, loaded) if label else None
    checkpoint.export(loaded, args.export, number)
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    chosen = ("weights", "device")
    work = {
        "train": (do_train, train.TrainConfig, NetConfig, "size"),
        "sample": (do_sample, *chosen, SampleConfig, "gif"),
        "eval": (do_eval, *chosen, SampleConfig, "data", "image_size"),
        "bench": ("bench", train.TrainConfig),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *chosen, "label"),
    }
    options.dispatch(parser(), work)


if __name__ == "__main__":
    options.command_line(main)
