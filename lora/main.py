"""LoRA from scratch: teach a small Llama a second style by training under 1 % of its parameters.

python main.py --train                          about two minutes; writes an adapter of 24 kB
python main.py --sample --prompt "News of Juno and a red kite:"    seconds
python main.py --eval                           seconds; style, obedience, and what was forgotten
python main.py --bench                          minutes; speed and memory, beside PEFT if installed
python main.py --figures                        a minute; draws assets/ anew
python main.py --selfcheck                      seconds; does this machine compute right?
python main.py --export DIR                     seconds; the adapter as a folder that PEFT loads
python main.py --merge --export DIR             seconds; base and adapter as one model
"""

import argparse
import json
from pathlib import Path

import torch

import checkpoint
import data
import generate
import hardware
import loading
import lora
import peft_folder
import train
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
from trainer import asked_for
from variants import AdapterConfig

HERE = Path(__file__).resolve().parent
PROMPT = "News of Juno and a red kite:"
SAMPLE_TOKENS = 160  # the longest sample that a training leaves


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = Parser(__doc__)
    verbs = add_verbs(everything, "train", "eval", "sample", "bench", "figures", "selfcheck")
    verbs.add_argument("--export", metavar="DIR", help="write an adapter, or with --merge a model")
    verbs.add_argument("--merge", action="store_true", help="add the adapter to the weights first")
    verbs.add_argument("--adapter", action="append", default=[], type=utf8_text,
                       metavar="DIR[=SHARE]", help="use it; several are added up")  # fmt: skip
    verbs.add_argument("--stop", action="append", default=[], type=utf8_text, metavar="TEXT",
                       help="ends a sample")  # fmt: skip
    configs = (train.TrainConfig, AdapterConfig, generate.SampleConfig, generate.Sampling)
    add_options(everything, *configs)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave samples and the training curve in the run directory."""
    config, settings = asked_for(
        args, train.TrainConfig(), AdapterConfig(), data.INSIDE, movable=("weights",)
    )
    if config.full and given(args, AdapterConfig):
        raise UserError("--full trains all weights: leave out what is said of the adapter")
    if config.full and config.lr_ratio != 1:
        raise UserError("--lr-ratio is of A and B, which --full does not have")
    train.train(config, settings, args.resume)
    run_dir = RunDirectory(config.out)
    if run_dir.writes and train.is_tested(run_dir, config):  # else it was stopped
        leave_samples(run_dir, config)


def leave_samples(run_dir: RunDirectory, config: train.TrainConfig) -> None:
    """Write samples.txt and the training curve, and print the first sample."""
    import figures

    loaded = loading.load_run(run_dir.path)
    prompt = data.read_parts(config.data)["test"][0].prompt
    wanted = generate.SampleConfig(prompt, num_samples=3, max_new_tokens=SAMPLE_TOKENS)
    texts = generate.write(loaded, wanted).split("\n---\n")
    write_text(run_dir.path / "samples.txt", "\n\n".join(texts) + "\n")
    say(f"picture    {figures.training_curve(run_dir.path, run_dir.path / 'figures')}")
    say(f"samples    {run_dir.path / 'samples.txt'}, the first of them:\n")
    print(texts[0])


def load(args: argparse.Namespace) -> checkpoint.Loaded:
    """--weights with --adapter; else the newest run; else the base and adapter of this folder."""
    options = from_options(train.TrainConfig(), args)
    adapters = [loading.parse_adapter(word) for word in args.adapter]
    newest = newest_run(HERE / "runs")
    if options.weights or adapters:
        folder = options.weights or loading.PRETRAINED
    elif newest:
        folder = newest
    else:
        folder, adapters = loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)]
    loaded = loading.load(folder, adapters)
    say(f"weights    {folder}" + "".join(f" + {share:g} × {path}" for path, share in adapters))
    device, _ = hardware.choose_device(options.device)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    loaded.model.to(device, dtype)
    return loading.merged(loaded) if args.merge else loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part; the last line is JSON."""
    loaded, options = load(args), from_options(train.TrainConfig(), args)
    saved = read_json(loaded.folder / "config.json", optional=True).get("train")
    name = options.data
    if loading.is_ours(loaded.folder) and "data" not in given(args, train.TrainConfig):
        name = saved["data"]
    part = data.read_parts(name)["test"]
    pairs = data.encode_part(part, loaded.tokenizer, loaded.model.config.seq_len, name)
    score = train.test_score(loaded, name, pairs, next(loaded.model.parameters()).dtype)
    print(f"test part: {train.describe(name, score, 'test')}")
    if "style" in score:
        print(f"answers: {score['style']:.1%} have the style, {score['asked']:.1%} do as asked")
    if "stories" in score:
        print(f"the base's own stories: {score['stories']:.3f} × their floor")
    print(json.dumps({"weights": str(loaded.folder), "data": name} | score))


def do_sample(args: argparse.Namespace) -> None:
    """Print samples while they are being made."""
    options = from_options(train.TrainConfig(), args)
    config = from_options(generate.SampleConfig(PROMPT), args)
    sampling = from_options(generate.Sampling(), args)
    show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
    generate.write(load(args), config, sampling, options.seed, args.stop, options.compile, show)
    print()


def do_export(args: argparse.Namespace) -> None:
    """Write a folder: the adapter for PEFT, or the whole model for transformers."""
    loaded = load(args)
    found = sorted({name for layer in lora.layers(loaded.model) for name in layer.adapters})
    if not found:
        checkpoint.export(loaded, args.export)
    elif len(found) > 1:
        raise UserError("--export writes one adapter: give one --adapter, or --merge")
    else:
        peft_folder.write(loaded.model, found[0], args.export)
    say(f"exported   {args.export}")


def do_merge(args: argparse.Namespace) -> None:
    """--merge changes what --export, --sample and --eval use; alone it would change nothing."""
    if not (args.export or args.sample or args.eval):
        raise UserError("--merge alone leaves nothing: give --export DIR too")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    machine = ("weights", "adapter", "device", "dtype")
    work = {
        "train": (do_train, train.TrainConfig, AdapterConfig),
        "merge": (do_merge, *machine),
        "eval": (do_eval, *machine, "data"),
        "sample": (do_sample, *machine, generate.SampleConfig, generate.Sampling, "stop", "seed",
                   "compile"),
        "bench": ("bench", "device", "dtype", "seed"),
        "figures": ("figures",),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *machine),
    }  # fmt: skip
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
