"""How fast, beside a plain torch script of the same network and beside what the machine can do.

All in one process, taking turns. Each ratio is above 1 where ours is faster.

    train      a whole step. Ours: `train.PictureTrainer` with all the default recipe has
               (augmentation, Muon, averaged weights), in this machine's number format and in
               float32. Theirs: the same network in torch.nn, float32, NCHW, SGD
    time       seconds of training until validation reaches 99 % (of the ceiling, where one is
               known). Theirs: Adam at 1e-3, batches of 128, as most scripts begin
    scratch    our own convolution against torch's, forward and backward, float32
    limits     both against the rate of matrix products

`--data hf:ylecun/mnist` measures on MNIST, otherwise on shapes-10.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import hardware
import layers
import train
from model import PRESETS, NetConfig, build, macs
from options import say
from run import write_json
from trainer import asked_for

RESULT = Path(__file__).resolve().parent / "runs" / "bench.json"
ROUNDS, GOAL, SEEDS, PATIENCE = 7, 0.99, (0, 1, 2), 2000
CONVOLUTIONS = ((64, 64, 8), (32, 64, 16))  # channels in, out, and side, as in the fast network


class PlainBlock(nn.Module):
    """What PlainNet needs and nn.Sequential cannot say: a sum."""

    def __init__(self, c: int):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.b, self.norm_b = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + x)


def plain_net(sizes: NetConfig) -> nn.Sequential:
    """The fast network as a plain script has it. Same weights, in the same order."""

    def halving(c_in: int, c_out: int) -> list[nn.Module]:
        conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

    w = sizes.width
    return nn.Sequential(
        *halving(sizes.channels, w), *halving(w, 2 * w), PlainBlock(2 * w),
        *halving(2 * w, 4 * w), PlainBlock(4 * w),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, sizes.n_class),
    )  # fmt: skip


def copied(net: nn.Module, model: nn.Module) -> nn.Module:
    """`net` with the weights of `model`, one after the other."""
    values = model.state_dict().values()
    net.load_state_dict(dict(zip(net.state_dict(), values, strict=True)))
    return net


def seconds(variants: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each variant; in every round each has one turn."""
    for work in variants.values():
        for _ in range(3):  # allocate, warm up
            work()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, work in variants.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(mine) for name, mine in times.items()}


class Ours:
    """The default training, a step at a time."""

    def __init__(self, config: train.TrainConfig, dataset: data.Dataset, dtype: torch.dtype):
        hardware.seed_everything(config.seed)
        device, _ = hardware.choose_device(config.device)
        self.sizes = train.sizes_for(PRESETS["fast"], dataset)
        model = train.network(config, self.sizes).to(device)
        self.trainer = train.PictureTrainer(config, self.sizes, model, dataset, dtype)
        self.n, self.batch_size = 0, config.batch_size

    def step(self) -> None:
        self.trainer.step(self.n % self.trainer.config.steps)
        self.n += 1

    def accuracy(self) -> float:
        return self.trainer.score()["accuracy"]


class Plain:
    """The same network trained by a plain script."""

    def __init__(self, ours: Ours, batch_size: int, optimizer: Callable):
        trainer = ours.trainer
        self.trainer, self.device = trainer, trainer.device
        self.net = copied(plain_net(ours.sizes), trainer.scored).to(self.device)
        mean, std = (torch.tensor(x, device=self.device).view(-1, 1, 1)
                     for x in (trainer.dataset.mean, trainer.dataset.std))  # fmt: skip
        self.normalize = lambda images: (images.float() / 255 - mean) / std
        self.optimizer, self.batch_size = optimizer(self.net.parameters()), batch_size

    def step(self) -> None:
        rows = torch.randint(len(self.trainer.labels), (self.batch_size,), device=self.device)
        images, labels = self.trainer.images[rows], self.trainer.labels[rows]
        loss = F.cross_entropy(self.net(self.normalize(images)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        loss.item()

    @torch.no_grad()
    def accuracy(self) -> float:
        valid = self.trainer.dataset.valid
        self.net.eval()
        right = 0
        for images, labels in zip(valid.images.split(500), valid.labels.split(500), strict=True):
            guess = self.net(self.normalize(images.to(self.device))).argmax(1)
            right += (guess == labels.to(self.device)).sum().item()
        self.net.train()
        return right / len(valid)


def race(goal: float, sides: dict[str, Ours | Plain]) -> dict[str, float]:
    """Seconds of training until validation reaches `goal`, a step of each side in turn.

    Validation is looked at every 25 steps and costs nothing here. NaN for who never gets there.
    """
    total, reached = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, float("nan"))
    running = dict(sides)
    for step in range(1, PATIENCE + 1):
        for name, side in list(running.items()):
            start = time.perf_counter()
            side.step()
            total[name] += time.perf_counter() - start
            if step % 25 == 0 and side.accuracy() >= goal:
                reached[name] = round(total[name], 2)
                del running[name]
    return reached


def time_to_accuracy(config: train.TrainConfig, dataset, dtype: torch.dtype) -> dict:
    """Both sides with each seed."""
    goal, found = GOAL * (dataset.ceiling or 1.0), []
    for seed in SEEDS:
        ours = Ours(dataclasses.replace(config, seed=seed), dataset, dtype)
        plain = Plain(ours, 128, lambda p: torch.optim.Adam(p, 1e-3))
        found.append(race(goal, {"ours": ours, "plain": plain}))
        print(f"time       to {100 * goal:.2f} %, seed {seed}: ours {found[-1]['ours']} s, "
              f"plain {found[-1]['plain']} s")  # fmt: skip
    return {
        "goal": goal,
        "seconds_to_goal": found,
        "time_to_accuracy_vs_torch": round(
            statistics.median(one["plain"] / one["ours"] for one in found), 3
        ),
    }


def training(config: train.TrainConfig, dataset, dtype: torch.dtype) -> dict:
    """Whole steps side by side: ours, ours in float32, and the plain script."""
    ours, exact = (Ours(config, dataset, kind) for kind in (dtype, torch.float32))
    sgd = lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True)  # noqa: E731
    plain = Plain(ours, config.batch_size, sgd)
    sides = {"ours": ours, "ours in float32": exact, "plain torch": plain}
    times = seconds({name: side.step for name, side in sides.items()})
    speed = {name: config.batch_size / t for name, t in times.items()}
    for name, value in speed.items():
        ratio = times["plain torch"] / times[name]
        print(f"train      {name:16s} {value:9,.0f} pictures/s, {ratio:.2f} × the plain script")
    flops = 6 * macs(ours.trainer.scored, ours.sizes) * speed["ours"]
    peak = hardware.matmul_rate(ours.trainer.device, dtype)
    return {
        "train_vs_torch": round(times["plain torch"] / times["ours"], 3),
        "train_float32_vs_torch": round(times["plain torch"] / times["ours in float32"], 3),
        "train_pictures_per_second": round(speed["ours"]),
        "train_gemm_fraction": round(flops / peak, 3),
    }


def scratch(device: torch.device) -> dict:
    """Our convolution and torch's, forward and backward, on 64 pictures."""
    ratios, fractions = [], []
    peak = hardware.matmul_rate(device, torch.float32)
    for c_in, c_out, side in CONVOLUTIONS:
        x = torch.randn(64, c_in, side, side, device=device, requires_grad=True)
        work = {}
        for name, kind in (("torch", nn.Conv2d), ("scratch", layers.Conv2d)):
            conv = kind(c_in, c_out, 3, padding=1, bias=False).to(device)
            work[name] = lambda conv=conv, x=x: conv(x).square().sum().backward()
        times = seconds(work)
        flops = 6 * 64 * 9 * c_in * c_out * side**2  # forward 2 per product, backward 4
        ratios.append(times["torch"] / times["scratch"])
        fractions.append(flops / times["scratch"] / peak)
        print(f"scratch    {c_in} → {c_out} at {side} × {side}: {ratios[-1]:.2f} × torch, "
              f"{100 * fractions[-1]:.0f} % of matrix products")  # fmt: skip
    return {
        "scratch_conv_vs_torch": round(statistics.mean(ratios), 3),
        "scratch_conv_gemm_fraction": round(statistics.mean(fractions), 3),
    }


def same_numbers() -> None:
    """AssertionError if the plain network is another one than ours."""
    sizes = PRESETS["fast"]
    model = build(sizes)
    nn.init.normal_(model.fc.weight)
    x = torch.randn(4, sizes.channels, sizes.image_height, sizes.image_width)
    torch.testing.assert_close(copied(plain_net(sizes), model)(x), model(x))


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config, _ = asked_for(args, train.TrainConfig(), PRESETS["fast"], ("shapes-10",))
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    hardware.seed_everything(config.seed)
    same_numbers()
    dataset = data.load(config.data)
    line = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    line |= {"data": Path(dataset.name).name}
    line |= training(config, dataset, dtype) | scratch(device)
    line |= time_to_accuracy(config, dataset, dtype)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULT, line)
    print(json.dumps(line))
