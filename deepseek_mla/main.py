"""DeepSeek-V3 from scratch: latent attention, many small experts, and two tokens at a time.

python main.py --train                       minutes on a laptop; who has what?
python main.py --sample                      seconds; the newest run, or the shipped model
python main.py --speculate                   seconds; the same with guesses, and how many stood
python main.py --eval                        seconds; loss and right answers on unseen text
python main.py --experiment NAME             minutes; seeds, balance or needle
python main.py --bench                       minutes; speed beside transformers, if installed
python main.py --figures                     a minute; draws assets/ anew
python main.py --selfcheck                   seconds; does this machine compute right?
python main.py --weights DIR --export DIR2   seconds; a folder that transformers loads
"""

import argparse
import json
from pathlib import Path

import torch

import checkpoint
import data
import generate
import hardware
import speculative
import text
import train
from model import PRESETS, DeepseekConfig
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
from run import RunDirectory, newest_run, read_json, write_text
from tokenizer import TextStream
from trainer import asked_for

HERE = Path(__file__).resolve().parent
VERBS = ("train", "eval", "sample", "speculate", "bench", "figures", "selfcheck")


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = Parser(__doc__)
    verbs = add_verbs(everything, *VERBS)
    verbs.add_argument("--experiment", choices=("seeds", "balance", "needle"),
                       help="trainings side by side")  # fmt: skip
    verbs.add_argument("--export", metavar="DIR", help="write a folder that transformers loads")
    verbs.add_argument("--size", choices=PRESETS, help="sizes to begin from (default tiny)")
    verbs.add_argument("--stop", action="append", default=[], type=utf8_text, metavar="TEXT",
                       help="ends a sample")  # fmt: skip
    configs = (train.TrainConfig, DeepseekConfig, generate.SampleConfig, generate.Sampling)
    add_options(everything, *configs)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave samples and the training curve in the run directory."""
    start = PRESETS[args.size or "tiny"]
    config, sizes = asked_for(args, train.TrainConfig(), start, data.INSIDE)
    loaded = None
    if config.weights and not args.resume:
        if args.size or "tokenizer" in given(args, train.TrainConfig):
            raise UserError("--weights brings its own sizes and tokenizer: leave theirs out")
        loaded = checkpoint.load(config.weights)
        sizes = train.sizes_of(loaded, given(args, DeepseekConfig), config.weights)
    train.train(config, sizes, args.resume, loaded)
    run_dir = RunDirectory(config.out)
    if run_dir.writes and train.is_tested(run_dir, config):  # else it was stopped
        leave_samples(run_dir)


def leave_samples(run_dir: RunDirectory) -> None:
    """Write samples.txt and the pictures of the run, and print the first sample."""
    import figures

    loaded = checkpoint.load(run_dir.path)
    texts = [generate.write(loaded, generate.SampleConfig(), seed=i) for i in range(3)]
    write_text(run_dir.path / "samples.txt", "\n\n".join(texts) + "\n")
    say(f"picture    {figures.training_curve(run_dir.path, run_dir.path / 'figures')}")
    say(f"samples    {run_dir.path / 'samples.txt'}, the first of them:\n")
    print(texts[0])


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
    """Score the test part of the text; the last line is JSON."""
    longest = from_options(DeepseekConfig(seq_len=1024), args).seq_len
    loaded, options = load(args), from_options(train.TrainConfig(), args)
    trained_on = read_json(loaded.folder / "config.json", optional=True).get("train")
    name = trained_on.get("data") if isinstance(trained_on, dict) else None
    if "data" in given(args, train.TrainConfig) or not isinstance(name, str):
        name = options.data
    tokens = text.tokens_of(data.measure(name), loaded.tokenizer, "test")
    answers = data.answers(tokens, loaded.tokenizer)
    seq_len, dtype = min(loaded.model.config.seq_len, longest), loaded.model.embedding.weight.dtype
    score = train.evaluate(loaded.model, tokens, answers, seq_len, dtype)
    print(f"test part: {train.describe(name, score, 'test')}; {score['loss']:.4f} per token")
    for layer, uneven in enumerate(score["violation"]):
        print(f"experts of layer {layer}: the busiest has {1 + uneven:.2f} × its share")
    if floor := data.floor(name, "test"):
        score["floor_nats_per_char"] = floor
    print(json.dumps({"weights": str(loaded.folder), "data": name} | score))


def do_sample(args: argparse.Namespace) -> None:
    """Print samples while they are being made."""
    options = from_options(train.TrainConfig(), args)
    config = from_options(generate.SampleConfig(), args)
    sampling = from_options(generate.Sampling(), args)
    show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
    generate.write(load(args), config, sampling, options.seed, args.stop, options.compile, show)
    print()


def do_speculate(args: argparse.Namespace) -> None:
    """Print a sample that was written with guesses, then how many of them stood."""
    options, loaded = from_options(train.TrainConfig(), args), load(args)
    config = from_options(generate.SampleConfig(), args)
    sampling, tally = from_options(generate.Sampling(), args), speculative.Tally()
    new = speculative.speculate(
        loaded.model, loaded.tokenizer.encode(config.prompt), config.max_new_tokens,
        sampling, loaded.stop_ids, options.seed, tally,
    )  # fmt: skip
    stream = TextStream(loaded.tokenizer)
    try:
        print(config.prompt + "".join(stream.push(token) for token in new) + stream.flush())
    except ValueError as error:
        raise UserError(f"--speculate: {error}") from None
    say(f"guesses    {tally.accepted} of {tally.guessed} stood: {tally.rate:.0%} accepted")


def do_export(args: argparse.Namespace) -> None:
    """Write a folder that transformers loads."""
    checkpoint.export(load(args), args.export)
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    machine = ("weights", "device", "dtype")
    work = {
        "train": (do_train, train.TrainConfig, DeepseekConfig, "size"),
        "eval": (do_eval, *machine, "data", "seq_len"),
        "sample": (do_sample, *machine, generate.SampleConfig, generate.Sampling, "stop", "seed",
                   "compile"),
        "speculate": (do_speculate, *machine, generate.Sampling, "prompt", "max_new_tokens",
                      "seed"),
        "experiment": ("experiments", train.TrainConfig),
        "bench": ("bench", "device", "dtype", "seed", "compile"),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *machine),
    }  # fmt: skip
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
