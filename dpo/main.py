"""Direct preference optimization from scratch: teach a small Llama which answers people prefer.

python main.py --train                          a minute or two; imitation, then preferences
python main.py --sample                         seconds; the newest run, else the one that ships
python main.py --chat                           talk to it: a line in, an answer out
python main.py --eval                           seconds; accuracy, margins, win rate, KL, fluency
python main.py --world                          a minute; five exact experiments, nothing sampled
python main.py --bench                          minutes; speed, beside TRL if it is installed
python main.py --figures                        a minute; draws assets/ anew
python main.py --selfcheck                      seconds; does this machine compute right?
python main.py --export DIR                     seconds; a folder that transformers loads
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import chat
import checkpoint
import data
import generate
import hardware
import judge
import rows
import train
from checkpoint import Loaded
from model import LlamaConfig
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
from run import RunDirectory, newest_run, write_text
from trainer import asked_for

HERE = Path(__file__).resolve().parent
PRETRAINED = HERE / "pretrained"
PROMPT = (
    "Once upon a time there was a shy fox named Ada. She lived near the harbor. One morning, Ada "
    "found a silver coin beside the road. But the coin was swallowed by the deep hole."
)
VERBS = ("train", "sample", "chat", "eval", "world", "bench", "figures", "selfcheck")
SAMPLE_TOKENS = 80  # the longest sample that a training leaves


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = Parser(__doc__)
    verbs = add_verbs(everything, *VERBS)
    verbs.add_argument("--export", metavar="DIR", help="write a folder for transformers")
    verbs.add_argument("--stop", action="append", default=[], type=utf8_text, metavar="TEXT",
                       help="ends a sample")  # fmt: skip
    add_options(everything, train.TrainConfig, generate.SampleConfig, generate.Sampling)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave samples and the training curve in the run directory."""
    config, sizes = asked_for(args, train.TrainConfig(), LlamaConfig(), data.INSIDE)
    train.train(config, sizes, args.resume)
    run_dir = RunDirectory(config.out)
    if run_dir.writes and train.is_tested(run_dir, train.config_of(run_dir.path)):
        leave_samples(run_dir)


def leave_samples(run_dir: RunDirectory) -> None:
    """Write samples.txt and the training curve, and print the first sample."""
    import figures

    loaded = checkpoint.load(run_dir.path)
    test = rows.load_examples(run_dir.path, loaded.tokenizer.vocab_size)["test"]
    prompt = loaded.tokenizer.decode(test.texts[test.pairs[0]][0])
    wanted = generate.SampleConfig(prompt, num_samples=3, max_new_tokens=SAMPLE_TOKENS)
    texts = generate.write(loaded, wanted).split("\n---\n")
    write_text(run_dir.path / "samples.txt", "\n\n".join(texts) + "\n")
    say(f"picture    {figures.training_curve(run_dir.path, run_dir.path / 'figures')}")
    say(f"samples    {run_dir.path / 'samples.txt'}, the first of them:\n")
    print(texts[0])


def folder_of(args: argparse.Namespace) -> Path:
    """--weights, else the newest run, else what ships with this folder."""
    weights = from_options(train.TrainConfig(), args).weights
    return Path(weights) if weights else newest_run(HERE / "runs") or PRETRAINED


def load(args: argparse.Namespace) -> Loaded:
    """The model of `folder_of`, on the device and in the number format that are asked for."""
    folder, options = folder_of(args), from_options(train.TrainConfig(), args)
    loaded = checkpoint.load(folder)
    say(f"weights    {folder}")
    chat.adopt_template(loaded.tokenizer, loaded.folder)
    device, _ = hardware.choose_device(options.device)
    loaded.model.to(device, torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    return loaded


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part; the last line is JSON."""
    loaded = load(args)
    config = train.config_of(loaded.folder)
    if "data" in given(args, train.TrainConfig):
        config = from_options(config, argparse.Namespace(data=args.data))
    longest = train.longest_text(config, loaded.model.config)
    part = rows.encode_part(data.read_parts(config.data)["test"], loaded.tokenizer, longest)
    if not part.pairs:
        raise UserError(f"--data {config.data}: no pair fits in {longest} tokens")
    device, dtype = next((p.device, p.dtype) for p in loaded.model.parameters())
    file, reference = loaded.folder / train.REFERENCE, None
    if file.exists():
        model = train.frozen_copy(file, loaded.model.config).to(device, dtype)
        reference = Loaded(loaded.folder, model, loaded.tokenizer, loaded.stop_ids)
    score = train.test_score(loaded, reference, part, config, dtype)
    print(f"test part: {train.describe(score, config, 'test')}")
    if "win_rate" in score:
        print(judge.in_words(score))
    print(json.dumps({"weights": str(loaded.folder), "data": config.data} | score))


def do_sample(args: argparse.Namespace) -> None:
    """Print samples while they are being made."""
    options = from_options(train.TrainConfig(), args)
    config = from_options(generate.SampleConfig(PROMPT), args)
    sampling = from_options(generate.Sampling(), args)
    show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
    generate.write(load(args), config, sampling, options.seed, args.stop, options.compile, show)
    print()


def do_chat(args: argparse.Namespace) -> None:
    """Answer each line of the input.

    A model that was trained on conversations hears all that was said before; one that goes on with
    stories hears the line alone.
    """
    loaded, options = load(args), from_options(train.TrainConfig(), args)
    wanted = from_options(generate.SampleConfig(), args)
    sampling = from_options(generate.Sampling(), args)
    talks = of_conversations(loaded)
    say("type the beginning of a story, or a question; an empty line or Ctrl-D ends")
    said: chat.Messages = []
    for line in map(str.strip, sys.stdin):
        if not line:
            return
        said.append({"role": "user", "content": line})
        prompt = line
        if talks:
            prompt = chat.prompt_of(said, loaded.tokenizer)
        ids, new = chat.prompt_ids(prompt, loaded.tokenizer), []
        if len(ids) >= loaded.model.config.seq_len:
            raise UserError("what was said fills the context of the model: begin anew")
        for (token,) in generate.generate(loaded.model, [ids], wanted.max_new_tokens, sampling,
                                          loaded.stop_ids, options.seed):  # fmt: skip
            new.append(token)
        answer = loaded.tokenizer.decode(new).strip()
        print(answer, flush=True)
        said.append({"role": "assistant", "content": answer})


def of_conversations(loaded: Loaded) -> bool:
    """Was the model trained on messages, or does it bring a chat template?"""
    config = train.config_of(loaded.folder)
    if chat.template_of(loaded.tokenizer):
        return True
    if config.data in data.INSIDE or not Path(config.data).is_file():
        return False
    return not isinstance(data.read_parts(config.data)["test"][0].prompt, str)


def do_export(args: argparse.Namespace) -> None:
    """Write a folder that transformers loads."""
    checkpoint.export(load(args), args.export)
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    machine = ("weights", "device", "dtype")
    work = {
        "train": (do_train, train.TrainConfig),
        "eval": (do_eval, *machine, "data"),
        "sample": (do_sample, *machine, generate.SampleConfig, generate.Sampling, "stop", "seed",
                   "compile"),
        "chat": (do_chat, *machine, "max_new_tokens", generate.Sampling, "seed"),
        "world": ("experiments",),
        "bench": ("bench", "device", "dtype", "seed"),
        "figures": ("figures",),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *machine),
    }  # fmt: skip
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
