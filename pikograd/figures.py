"""`--figures`: every picture the README shows, drawn anew into assets/.

matplotlib is needed here and nowhere else; the graph of an expression is SVG written by us. Also
collects the numbers that the README quotes, from runs/NAME-SEED and the last bench, into
assets/results.json: a test holds the README against it.
"""

import html
from pathlib import Path

import numpy as np

import bench
import nn
import optim
import tensor as pg
import train
from meter import CostMeter
from options import UserError, say
from run import RunDirectory, read_json, write_json
from transforms import checkpoint
from value import Value, topological_order

ASSETS = Path(__file__).resolve().parent / "assets"


def neuron():
    """The expression of the first picture: a neuron with two inputs."""
    x1, x2 = Value(2.0, label="x1"), Value(0.0, label="x2")
    w1, w2, b = Value(-3.0, label="w1"), Value(1.0, label="w2"), Value(6.881373587, label="b")
    out = (x1 * w1 + x2 * w2 + b).tanh()
    out.label = "out"
    out.backward()
    return out


def graph_svg(root):
    """The graph below a Value as SVG: inputs left, results right, value and gradient in each.

    An input stands in the column before its first use, so that no line runs behind a box.
    """
    depth, columns, order = {}, {}, topological_order(root)
    for v in order:
        depth[v] = 1 + max((depth[c] for c in v._prev), default=-1)
    for v in sorted(order, key=depth.get, reverse=True):
        depth |= {c: depth[v] - 1 for c in v._prev if not c._prev}
    for v in order:
        columns.setdefault(depth[v], []).append(v)
    rows = max(map(len, columns.values()))
    place = {
        v: (20 + 190 * d, 20 + round(70 * (i + (rows - len(column)) / 2)))
        for d, column in columns.items()
        for i, v in enumerate(column)
    }
    width, height = 190 * len(columns), 70 * rows + 20
    lines = [f'<path d="M{a + 140} {b + 25} C{x - 25} {b + 25} {a + 165} {y + 25} {x} {y + 25}" '
             'fill="none" stroke="#888" stroke-width="1.5"/>'
             for v, (x, y) in place.items() for a, b in (place[c] for c in v._prev)]  # fmt: skip
    boxes = []
    for v, (x, y) in place.items():
        name = html.escape(" = ".join(filter(None, (v.label, v._op.replace("*", "×")))))
        colour = "#dbeafe" if v._prev else "#fef3c7"
        boxes.append(
            f'<rect x="{x}" y="{y}" width="140" height="50" rx="6" fill="{colour}" stroke="#555"/>'
            f'<text x="{x + 70}" y="{y + 16}" text-anchor="middle" font-weight="bold">{name}</text>'
            f'<text x="{x + 70}" y="{y + 31}" text-anchor="middle">value {v.data:.4f}</text>'
            f'<text x="{x + 70}" y="{y + 45}" text-anchor="middle" fill="#b91c1c">'
            f"gradient {v.grad:.4f}</text>"
        )
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    )
    return "\n".join([head, *lines, *boxes, "</svg>\n"])


def decision_boundary(plt):
    """What 337 Values have learnt about two moons (pretrained/moons)."""
    task, _ = train.load_run(train.HERE / "pretrained" / "moons")
    x, y = np.meshgrid(np.linspace(-1.6, 2.6, 200), np.linspace(-1.1, 1.6, 150))
    s = task.scores(np.stack([x.ravel(), y.ravel()], 1)).reshape(x.shape)
    fig, ax = plt.subplots(figsize=(6, 3.6))
    shown = ax.contourf(x, y, s, np.linspace(-4, 4, 17), cmap="RdBu", extend="both", alpha=0.8)
    ax.contour(x, y, s, [-1, 0, 1], colors="k", linestyles=["--", "-", "--"], linewidths=1)
    px, py = task.data.x_test, task.data.y_test
    ax.scatter(*px[py > 0].T, c="navy", s=8, label="upper moon")
    ax.scatter(*px[py < 0].T, c="darkred", s=8, label="lower moon")
    accuracy = task.evaluate()["accuracy"]
    ax.set(title=f"337 scalar Values, held-out points: {100 * accuracy:.1f} % right",
           xlabel="x₁", ylabel="x₂")  # fmt: skip
    fig.colorbar(shown, label="score (0 solid, ±1 dashed)")
    ax.legend(fontsize=8)
    return fig


def rosenbrock(p):
    """(1 − x)² + 100(y − x²)²: a bent valley with its minimum 0 at (1, 1)."""
    return (1 - p[0, 0]) ** 2 + 100 * (p[0, 1] - p[0, 0] ** 2) ** 2


def trajectories(plt):
    """300 steps of each optimizer from (−1.5, 2) on Rosenbrock's valley, one picture each."""
    choices = {
        "SGD": lambda p: optim.SGD(p, lr=1.2e-3),
        "Momentum 0.9": lambda p: optim.SGD(p, lr=4e-4, momentum=0.9),
        "Nesterov 0.9": lambda p: optim.SGD(p, lr=4e-4, momentum=0.9, nesterov=True),
        "RMSprop": lambda p: optim.RMSprop(p, lr=1e-2, alpha=0.9),
        "Adagrad": lambda p: optim.Adagrad(p, lr=0.3),
        "Adam": lambda p: optim.Adam(p, lr=5e-2),
        "Lion": lambda p: optim.Lion(p, lr=1e-2),
        "Muon": lambda p: optim.Muon(p, lr=2e-2, weight_decay=0.0),
    }
    fig, axes = plt.subplots(2, 4, figsize=(9, 4.2), sharex=True, sharey=True)
    x, y = np.meshgrid(np.linspace(-2, 1.7, 100), np.linspace(-0.6, 2.8, 100))
    height = np.log10((1 - x) ** 2 + 100 * (y - x**2) ** 2 + 1e-3)
    for (name, make), ax in zip(choices.items(), axes.flat, strict=True):
        p = pg.Tensor(np.array([[-1.5, 2.0]]), requires_grad=True)
        optimizer, path = make([p]), [p.tolist()[0]]
        for _ in range(300):
            optimizer.zero_grad()
            rosenbrock(p).backward()
            optimizer.step()
            path.append(p.tolist()[0])
        ax.contourf(x, y, height, 8, cmap="Greys_r", alpha=0.6)
        ax.plot(*np.array(path).T, "C3", lw=1)
        ax.plot(1, 1, "C0*", ms=9)
        ax.set_title(f"{name} (lr {optimizer.lr:g}): {rosenbrock(p).item():.1e}", fontsize=8)
    axes[0, 0].set(ylabel="y", xlim=(-2, 1.7), ylim=(-0.6, 2.8))
    axes[1, 0].set(xlabel="x", ylabel="y")
    fig.suptitle("(1 − x)² + 100(y − x²)² after 300 steps; start (−1.5, 2), minimum ★", fontsize=10)
    return fig


def live_bytes(wrap, depth=24):
    """(operations, bytes) after every operation of one forward and backward of a deep MLP."""
    pg.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh())
              for _ in range(depth)]  # fmt: skip
    x = pg.randn(512, 128)
    meter = CostMeter(memory=True)
    with meter.measure():
        for block in blocks:
            x = wrap(block, x)
        x.square().sum().backward()
    flops, live = np.array(meter.live).T
    return flops / 1e9, live / 1e6


def memory_curve(plt):
    """What checkpoint saves, and what it costs."""
    fig, ax = plt.subplots(figsize=(6.4, 3.6))
    for name, wrap in {"all kept": lambda f, x: f(x), "checkpoint per block": checkpoint}.items():
        flops, live = live_bytes(wrap)
        ax.plot(flops, live, label=f"{name}: peak {live.max():.1f} MB, {flops[-1]:.2f} GFLOP")
    ax.set(title="24 blocks of two layers, batch 512: forward, then backward",
           xlabel="operations done (10⁹)", ylabel="live bytes (10⁶)")  # fmt: skip
    ax.legend(fontsize=8)
    return fig


def collect():
    """Three seeds' scores of each task, the seconds of the first, and the bench: what is there."""
    file, runs = ASSETS / "results.json", bench.RESULT.parent
    found = read_json(file) if file.exists() else {}
    for task in ("cnn", "mlp", "moons", "mnist", "gpt"):
        logs = [RunDirectory(runs / f"{task}-{seed}").history() for seed in range(3)]
        if all(logs):
            last = [[x for x in log if x["split"] == "held out"][-1] for log in logs]
            key = "loss" if task == "gpt" else "accuracy"
            scores, seconds = [line[key] for line in last], last[0]["seconds"]
            found[task] = {key: scores, "seconds": seconds}
    if bench.RESULT.exists():
        found["bench"] = read_json(bench.RESULT)
    write_json(file, found)


def main(args=None):
    try:
        import matplotlib
    except ImportError:
        raise UserError("--figures draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ASSETS.mkdir(exist_ok=True)
    collect()
    (ASSETS / "graph.svg").write_text(graph_svg(neuron()), encoding="utf-8")
    for name, draw in {"moons": decision_boundary, "optimizers": trajectories,
                       "memory": memory_curve}.items():  # fmt: skip
        fig = draw(plt)
        fig.tight_layout()
        fig.savefig(ASSETS / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(fig)
        say(f"drawn      {ASSETS / name}.png")
