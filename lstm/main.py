"""RNN, LSTM and GRU from scratch: read, write, judge and remember sequences.

python main.py --train                       two minutes on a laptop: a language model, and a sample
python main.py --train --task sentiment      a minute or two: film reviews, good or bad
python main.py --train --task adding         minutes; also --task copy: remember over long times
python main.py --sample --prompt "Nora has"  seconds; the newest run, or the shipped model
python main.py --classify "it was not bad"   seconds; likewise
python main.py --eval                        seconds; the score on the test part
python main.py --bench                       minutes; speed beside torch.nn
python main.py --experiment seeds            minutes; the README's numbers, three seeds each
python main.py --figures                     a minute; draws assets/ anew
python main.py --selfcheck                   seconds; does this machine compute right?
python main.py --weights W --export DIR      seconds; a state dict for torch.nn
"""

import argparse
import json
from pathlib import Path

import torch

import checkpoint
import data
import hardware
import options
import reviews
import sample
import tasks
import text
import train
from model import PRESETS, SequenceConfig
from options import UserError, from_options, given, say
from run import RunDirectory, read_json, write_text
from trainer import asked_for

HERE = Path(__file__).resolve().parent


def parser() -> argparse.ArgumentParser:
    """All verbs and options."""
    everything = options.Parser(__doc__)
    names = ("train", "sample", "eval", "bench", "figures", "selfcheck")
    verbs = options.add_verbs(everything, *names)
    kind = options.utf8_text
    verbs.add_argument("--classify", type=kind, metavar="TEXT", help="say what label it has")
    verbs.add_argument("--export", metavar="DIR", help="write a state dict for torch.nn")
    names = ("seeds", "changes", "long", "collect")
    verbs.add_argument("--experiment", choices=names, help="the trainings behind the README")
    verbs.add_argument("--size", choices=PRESETS, help="sizes of a language model to begin from")
    options.add_options(everything, train.TrainConfig, SequenceConfig, sample.SampleConfig)
    return everything


def do_train(args: argparse.Namespace) -> None:
    """Train; then leave a picture and, of a language model, samples in the run directory."""
    task = getattr(args, "task", "lm")
    if args.size and task != "lm":
        raise UserError(f"--size is for language models: say --d-model and so on for {task}")
    sizes = PRESETS[args.size] if args.size else train.SIZES[task]
    config, sizes = asked_for(args, train.RECIPES[task], sizes, data.INSIDE)
    loaded = None
    if config.weights and not args.resume:
        loaded = checkpoint.load(config.weights)
        sizes = loaded_sizes(loaded, config, given(args, SequenceConfig))
    train.train(config, sizes, args.resume, loaded)
    run_dir = RunDirectory(config.out)
    if run_dir.writes and train.is_tested(run_dir, config):  # else it was stopped
        leave_pictures(run_dir, config.task)


def loaded_sizes(loaded: checkpoint.Loaded, config, asked: dict) -> SequenceConfig:
    """The sizes of --weights. UserError if others are asked for."""
    sizes = loaded.model.config
    if loaded.task != config.task:
        raise UserError(f"--weights {loaded.folder} are of --task {loaded.task}")
    for name, value in asked.items():
        if value != getattr(sizes, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {value}: --weights bring {getattr(sizes, name)}")
    return sizes


def leave_pictures(run_dir: RunDirectory, task: str) -> None:
    """Write the training curve and, of a language model, samples.txt; print the first sample."""
    import figures

    say(f"picture    {figures.training_curve(run_dir.path, run_dir.path / 'figures')}")
    if task == "lm":
        loaded = checkpoint.load(run_dir.path)
        texts = [sample.write(loaded, sample.SampleConfig(), seed=seed) for seed in range(3)]
        write_text(run_dir.path / "samples.txt", "\n\n".join(texts) + "\n")
        say(f"samples    {run_dir.path / 'samples.txt'}, the first of them:\n")
        print(texts[0])


def load(args: argparse.Namespace, task: str | None = None) -> checkpoint.Loaded:
    """--weights, else the newest run (of this task), else the model that ships with the folder."""
    asked = from_options(train.TrainConfig(), args)
    folder = asked.weights or newest(task) or HERE / "pretrained" / (task or "lm")
    loaded = checkpoint.load(folder)
    say(f"weights    {folder}")
    device, _ = hardware.choose_device(asked.device)
    loaded.model.to(device)
    return loaded


def newest(task: str | None) -> Path | None:
    """The newest run of a task, or of any."""
    found = list((HERE / "runs").glob("[!.]*/model.safetensors"))
    for file in sorted(found, key=lambda file: file.stat().st_mtime, reverse=True):
        trained = read_json(file.parent / "config.json", optional=True).get("train")
        if isinstance(trained, dict) and task in (None, trained.get("task")):
            return file.parent
    return None


def do_sample(args: argparse.Namespace) -> None:
    """Print samples while they are being made."""
    config, seed = from_options(sample.SampleConfig(), args), getattr(args, "seed", 0)
    show = lambda piece: print(piece, end="", flush=True)  # noqa: E731
    sample.write(load(args, "lm"), config, seed, show)
    print()


def do_classify(args: argparse.Namespace) -> None:
    """Print the probability of each label of a text."""
    loaded = load(args, "sentiment")
    if not isinstance(loaded.words, reviews.Vocabulary):
        raise UserError(f"{loaded.folder} is no classifier of text with its words")
    ids = loaded.words.encode(args.classify)
    if unknown := [w for w in reviews.words_of(args.classify) if w not in loaded.words.id_of]:
        say(f"unknown    {', '.join(unknown)}")
    with torch.no_grad():
        device = loaded.model.head.weight.device
        answers, _ = loaded.model(torch.tensor([ids], device=device))
    p = answers[0].double().softmax(dim=-1).tolist()
    for value, name in sorted(zip(p, loaded.words.classes, strict=True), reverse=True):
        print(f"{100 * value:5.1f} %  {name}")


def do_eval(args: argparse.Namespace) -> None:
    """Score the test part; the last line is JSON."""
    loaded, asked = load(args, getattr(args, "task", None)), given(args, train.TrainConfig)
    trained = (
        read_json(loaded.folder / "config.json", optional=True) if loaded.folder.is_dir() else {}
    )
    dtype = torch.bfloat16 if asked.get("dtype") == "bfloat16" else torch.float32
    if loaded.task in ("adding", "copy"):
        base = options.make_config(
            train.TrainConfig, trained["train"], f"{loaded.folder}/config.json"
        )
        name, score = "dice", dice_score(loaded, from_options(base, args), dtype)
    else:
        name = asked.get("data") or trained.get("train", {}).get("data")
        if not name:
            raise UserError(f"{loaded.folder} does not say what to score it on: name --data")
        score = text_score(loaded, name, dtype)
    print(json.dumps({"weights": str(loaded.folder), "task": loaded.task, "data": name} | score))


def dice_score(loaded: checkpoint.Loaded, config, dtype: torch.dtype) -> dict:
    """The score of adding or copy, at the length that --seq-len says."""
    trainer = tasks.DiceTrainer(config, loaded.model, dtype)
    score = trainer.test_score(loaded.model)
    print(trainer.describe(score))
    return score


def text_score(loaded: checkpoint.Loaded, name: str, dtype: torch.dtype) -> dict:
    """The score of a language model or classifier on the test part of `name`."""
    if loaded.words is None:
        raise UserError(f"{loaded.folder} has no alphabet.json or tokenizer_words.json")
    if loaded.task == "sentiment":
        lines = reviews.read(name)["test"]
        if other := {label for _, label, _ in lines} - set(loaded.words.classes):
            raise UserError(f"--data has the label {min(other)!r}, the weights do not know it")
        part = reviews.encode(lines, loaded.words)
        score = tasks.evaluate_reviews(loaded.model, part, dtype)
        print(tasks.describe_reviews(score))
        return score
    source, scores = data.measure(name), {}
    for part in ("valid", "test"):
        tokens = text.tokens_of(source, loaded.words, part)
        scores[part] = tasks.evaluate_text(loaded.model, tokens, dtype)
    score = scores["test"]
    n = [scores[part]["chars"] for part in ("valid", "test")]
    nats = sum(scores[part]["nats_per_char"] * scores[part]["chars"] for part in scores)
    score["last_tenth_nats_per_char"] = nats / sum(n)  # validation and test part together
    print(f"test part: {tasks.describe_text(name, score, 'test')}; with the validation part, the "
          f"last tenth: {score['last_tenth_nats_per_char']:.4f}")  # fmt: skip
    if floor := data.floor(name, "test"):
        score["floor_nats_per_char"] = floor
    return score


def do_export(args: argparse.Namespace) -> None:
    """Write a state dict that torch.nn modules load."""
    checkpoint.export(load(args, getattr(args, "task", None)), args.export)
    say(f"exported   {args.export}")


def main() -> None:
    """Do what the command line says, in the order of the help."""
    machine = ("weights", "device")
    work = {
        "train": (do_train, train.TrainConfig, SequenceConfig, "size"),
        "sample": (do_sample, *machine, sample.SampleConfig, "seed"),
        "classify": (do_classify, *machine),
        "eval": (do_eval, *machine, "data", "task", "dtype", "seq_len"),
        "bench": ("bench", "device"),
        "experiment": ("experiments",),
        "figures": ("figures", "weights"),
        "selfcheck": ("selfcheck", "device"),
        "export": (do_export, *machine, "task"),
    }
    options.dispatch(parser(), work)


if __name__ == "__main__":
    options.command_line(main)
