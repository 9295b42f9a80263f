"""pikograd: what PyTorch does underneath, on numpy alone. Train four small models with it.

python main.py --train                    3 s on two cores: handwritten digits, a small CNN
python main.py --train --model gpt        1-2 minutes: a character model of a tiny grammar
python main.py --train --model moons      10 s: two moons, every number a Value
python main.py --train --model mlp --data FOLDER      15 s: MNIST's four idx files
python main.py --sample                   at once: held-out digits and what the net sees
python main.py --sample --model gpt       at once: text
python main.py --classify data/seven.pgm  at once: one picture, .pgm or .npy
python main.py --eval                     seconds; the last line is JSON
python main.py --bench                    a minute; beside torch, if it is installed
python main.py --figures                  a minute; draws assets/ anew
python main.py --selfcheck                2 s; every operation against finite differences
"""

import json
import os
import shutil
from pathlib import Path

# OpenBLAS reads this when numpy is imported. Its threads spin while they wait for each other: for
# products as small as these two are no faster than one, and several times slower on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import data
import pictures
import tensor as pg
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
)
from run import place_to_export, read_json, whole_file
from tasks import show

HERE = Path(__file__).resolve().parent


def parser():
    """All verbs and options."""
    everything = Parser(__doc__)
    verbs = add_verbs(everything, "train", "sample", "eval", "bench", "figures", "selfcheck")
    verbs.add_argument("--classify", metavar="FILE", help="name the digit in a picture")
    verbs.add_argument("--export", metavar="DIR", help="write weights that torch loads")
    verbs.add_argument("--weights", metavar="DIR", help="a run directory instead of the newest")
    verbs.add_argument(
        "--prompt", default="", metavar="TEXT", help="what a gpt's sample begins with"
    )
    verbs.add_argument("--temperature", type=float, default=0.7, help="of a gpt's sample (0.7)")
    add_options(everything, train.TrainConfig)
    return everything


def load(args, kinds=train.MODELS):
    """The task of --weights, else of the newest run of a fitting model, else the one shipped."""
    asked = given(args, train.TrainConfig)
    config = from_options(train.TrainConfig(), args)  # complains of values that make no sense
    kinds = (asked["model"],) if asked.get("model") in kinds else kinds
    folder = Path(args.weights or config.out) if args.weights or args.train else newest(kinds)
    say(f"weights    {folder}")
    changes = {"data": asked["data"]} if "data" in asked else {}
    task, _ = train.load_run(folder, changes)
    if task.model.kind not in kinds:
        raise UserError(f"{folder} holds a {task.model.kind}, needed is {' or '.join(kinds)}")
    return task, folder


def newest(kinds):
    """The newest run of one of these models, else the shipped one."""
    runs = [file.parent for file in (HERE / "runs").glob("*/model.safetensors")]
    fitting = [run for run in runs if not run.name.startswith(".") and kind_of(run) in kinds]
    if fitting:
        return max(fitting, key=lambda run: (run / "model.safetensors").stat().st_mtime)
    first = next(kind for kind in ("cnn", "gpt", "mlp", "moons") if kind in kinds)
    return HERE / "pretrained" / first


def kind_of(folder):
    """Which model a run holds, None if it cannot be read."""
    try:
        model = read_json(folder / "config.json").get("model")
    except UserError:
        return None
    return model.get("kind") if isinstance(model, dict) else None


def do_train(args):
    """Train."""
    if args.weights:
        raise UserError("--weights goes with --sample, --classify, --eval and --export")
    config = from_options(train.TrainConfig(), args)
    train.train(config, args.resume)
    say(f"written    {config.out}")


def do_eval(args):
    """Score the held-out data; the last line is JSON."""
    task, folder = load(args)
    score = task.evaluate()
    print(show(score))
    print(json.dumps({"weights": str(folder), "model": task.model.kind, **score}))


def do_sample(args):
    """Digits with the net's opinion, text, or a map of the moons."""
    task, _ = load(args)
    seed = getattr(args, "seed", 0)
    if task.model.kind == "gpt":
        print(write(task, args.prompt, args.temperature, seed))
    elif task.model.kind == "moons":
        print(moon_map(task))
    else:
        rows = np.random.default_rng(seed).permutation(len(task.data.y_test))[:4]
        for i in rows:
            print(f"{picture(task.data.x_test[i, 0])}\nis a {task.data.y_test[i]}; "
                  f"the net says {opinion(task, task.data.x_test[i])}\n")  # fmt: skip


def do_classify(args):
    """One picture from a file."""
    task, _ = load(args, ("cnn", "mlp"))
    image = pictures.read_image(args.classify)
    image = pictures.resized(image, task.model.image, args.classify)
    top = 16.0 if tuple(task.model.image) == (8, 8) else 255.0  # what full brightness is there
    x = ((image * top - task.model.mean) / task.model.std)[None]
    print(f"{picture(x[0])}\nthe net says {opinion(task, x)}")


def opinion(task, x):
    """The two likeliest classes of one image (1, H, W)."""
    task.net.eval()
    with pg.no_grad():
        p = pg.softmax(task.logits(x[None]), 1)[0].numpy()
    best = np.argsort(-p)[:2]
    return ", ".join(f"{k} ({100 * p[k]:.1f} %)" for k in best)


def picture(x):
    """An image in characters, two per pixel."""
    shades = " .:-=+*#%@"
    level = (x - x.min()) / ((x.max() - x.min()) or 1) * (len(shades) - 1)
    return "\n".join("".join(shades[round(float(v))] * 2 for v in row) for row in level)


def moon_map(task, columns=60, rows=20):
    """The decision of the scalar net over the plane: # upper moon, · lower moon."""
    x, y = np.meshgrid(np.linspace(-1.5, 2.5, columns), np.linspace(1.5, -1.0, rows))
    s = task.scores(np.stack([x.ravel(), y.ravel()], 1)).reshape(rows, columns)
    return "\n".join("".join("#" if v > 0 else "·" for v in row) for row in s)


def write(task, prompt, temperature, seed, length=300):
    """`length` characters after the prompt (a line break if there is none)."""
    if not temperature > 0:
        raise UserError(f"--temperature must be more than 0, not {temperature}")
    vocab, rng = task.model.vocab, np.random.default_rng(seed)
    strange = sorted(set(prompt) - set(vocab))
    if strange:
        raise UserError(f"--prompt: this model knows no {strange[0]!r}, only {vocab!r}")
    text = prompt or vocab[0]
    task.net.eval()
    with pg.no_grad():
        for _ in range(length):
            ids = data.encode(text[-task.model.seq_len :], vocab)[None]
            x = task.net(pg.Tensor(ids))[0, -1].double()
            p = pg.softmax((x - x.max()) / temperature, 0).numpy()
            text += vocab[rng.choice(len(vocab), p=p / p.sum())]
    return text.strip("\n")


def do_export(args):
    """config.json and model.safetensors: tensor names and shapes are torch's."""
    target = place_to_export(args.export)
    _, folder = load(args)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        with whole_file(target / name) as part:
            shutil.copyfile(folder / name, part)
    say(f"exported   {target}")


def main():
    """Do what the command line says, in the order of the help."""
    which = ("weights", "model", "data", "out")
    work = {
        "train": (do_train, train.TrainConfig),
        "sample": (do_sample, *which, "prompt", "temperature", "seed"),
        "eval": (do_eval, *which),
        "bench": ("bench",),
        "figures": ("figures",),
        "selfcheck": ("selfcheck",),
        "classify": (do_classify, *which),
        "export": (do_export, *which),
    }
    dispatch(parser(), work)


if __name__ == "__main__":
    command_line(main)
