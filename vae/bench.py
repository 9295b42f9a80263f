"""How fast, beside pytorch/examples' VAE written as it is there, and how good after equal time.

All in one process, taking turns, at the example's own size: 28 × 28 pixels, 400 hidden numbers, 20
latents, batches of 128. Each ratio is above 1 where ours is faster.

    train   a whole step. Theirs: a DataLoader that makes each picture a tensor when it is its turn,
            five layers, sigmoid and binary cross-entropy on grey pixels, Adam, loss.item(). Ours:
            `train.VaeTrainer`, with binarising, averaged weights and finiteness checks
    step    the same, but their pictures lie in memory as a tensor already
    nats    −log p(x) of the test part after both trained for as many seconds

`--data FOLDER` measures on MNIST, otherwise on our digits scaled to 28 × 28.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import checkpoint
import data
import hardware
import train
from model import PRESETS, build
from options import say
from run import write_json
from trainer import asked_for

RESULT = Path(__file__).resolve().parent / "runs" / "bench.json"
ROUNDS, STEPS_A_TURN = 9, 8
SECONDS = 25  # about so long ours trains, and theirs as long as ours did
DRAWS, PICTURES = 500, 1000  # of importance sampling, for the same


class Example(nn.Module):
    """The network of pytorch/examples/vae: the same layers, names and formulas."""

    def __init__(self, n_pixel: int = 784, width: int = 400, latent: int = 20):
        super().__init__()
        self.fc1, self.fc21 = nn.Linear(n_pixel, width), nn.Linear(width, latent)
        self.fc22, self.fc3 = nn.Linear(width, latent), nn.Linear(latent, width)
        self.fc4 = nn.Linear(width, n_pixel)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = F.relu(self.fc1(x.flatten(1)))
        mu, logvar = self.fc21(hidden), self.fc22(hidden)
        std = torch.exp(0.5 * logvar)
        z = mu + torch.randn_like(std) * std
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def example_loss(found: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Cross-entropy of all pixels and KL of all latents, summed over the batch too."""
    pixels = F.binary_cross_entropy(found, x.flatten(1), reduction="sum")
    return pixels - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


class PicturesOneByOne(torch.utils.data.Dataset):
    """Grey pictures as torchvision's MNIST hands them out: an image, made a tensor on demand."""

    def __init__(self, images: Tensor):
        self.images = images[:, 0].numpy()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        array = np.array(Image.fromarray(self.images[i]))  # transforms are given images
        return torch.from_numpy(array)[:, :, None].permute(2, 0, 1).contiguous().float().div(255)


class Theirs:
    """The example's training, a step at a time."""

    def __init__(self, images: Tensor, batch_size: int, device: torch.device, loader: bool):
        torch.manual_seed(0)
        self.net = Example().to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.device, self.images, self.batch_size = device, images, batch_size
        self.rows = self.loaded() if loader else self.in_memory()

    def loaded(self) -> Iterator[Tensor]:
        """Batches of a DataLoader, epoch after epoch."""
        loader = torch.utils.data.DataLoader(
            PicturesOneByOne(self.images), batch_size=self.batch_size, shuffle=True
        )
        while True:
            yield from loader

    def in_memory(self) -> Iterator[Tensor]:
        """Batches of a tensor that is there already."""
        grey = self.images.float() / 255
        while True:
            yield grey[torch.randint(len(grey), (self.batch_size,))]

    def step(self) -> None:
        x = next(self.rows).to(self.device)
        self.optimizer.zero_grad()
        loss = example_loss(*self.answers(x))
        loss.backward()
        loss.item()  # it is added up for the log
        self.optimizer.step()

    def answers(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found, mu, logvar = self.net(x)
        return found, x, mu, logvar


class Ours:
    """Our training at the example's size, a step at a time."""

    def __init__(self, config: train.TrainConfig, dataset: data.Dataset, dtype: torch.dtype):
        hardware.seed_everything(config.seed)
        device, _ = hardware.choose_device(config.device)
        self.sizes = train.sizes_for(PRESETS["example"], dataset)
        model = train.network(self.sizes, dataset, None).to(device)
        self.trainer = train.VaeTrainer(config, self.sizes, model, dataset, dtype)
        self.n = 0

    def step(self) -> None:
        self.trainer.step(self.n % self.trainer.config.steps)
        self.n += 1


def seconds_a_step(variants: dict[str, Callable]) -> dict[str, float]:
    """Median seconds of a step of each; in every round each has one turn of several steps."""
    for step in variants.values():
        for _ in range(3):  # allocate, warm up
            step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, step in variants.items():
            start = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                step()
            times[name].append((time.perf_counter() - start) / STEPS_A_TURN)
    return {name: statistics.median(mine) for name, mine in times.items()}


def speed(config: train.TrainConfig, dataset: data.Dataset, dtype: torch.dtype) -> dict:
    """Seconds of a step, ours and theirs, with and without their loader, as ratios."""
    device, images = hardware.choose_device(config.device)[0], dataset.train.images
    ours = Ours(config, dataset, dtype)
    variants = {"ours": ours.step}
    variants["example"] = Theirs(images, config.batch_size, device, loader=True).step
    variants["in memory"] = Theirs(images, config.batch_size, device, loader=False).step
    times = seconds_a_step(variants)
    flops = ours.trainer.flops_per_unit * config.batch_size / times["ours"]
    for name, seconds in times.items():
        print(f"{name:10s} {1000 * seconds:8.2f} ms a step of {config.batch_size} pictures")
    return {
        "train_vs_example": round(times["example"] / times["ours"], 3),
        "step_vs_example": round(times["in memory"] / times["ours"], 3),
        "train_gemm_fraction": round(flops / hardware.matmul_rate(device, dtype), 3),
        "milliseconds": {name: round(1000 * s, 3) for name, s in times.items()},
    }


def for_seconds(step: Callable, seconds: float) -> int:
    """Take steps until so many seconds are over; how many it were."""
    n, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        step()
        n += 1
    return n


def equal_time(config: train.TrainConfig, dataset: data.Dataset, dtype, times: dict) -> dict:
    """−log p(x) of test pictures, binarised, after both trained for SECONDS."""
    device, _ = hardware.choose_device(config.device)
    steps = max(1, int(1000 * SECONDS / times["ours"]))  # so that the learning rate gets to its end
    ours = Ours(dataclasses.replace(config, steps=steps), dataset, dtype)
    theirs = Theirs(dataset.train.images, config.batch_size, device, loader=True)
    start = time.perf_counter()
    for _ in range(steps):
        ours.step()
    seconds = time.perf_counter() - start
    counts = {"ours": steps, "example": for_seconds(theirs.step, seconds)}
    net = checkpoint.to_our_names(theirs.net.cpu().state_dict(), Path("example"))
    copied = checkpoint.fill(build(ours.sizes), net, "example")
    nats = {}
    for name, model in (("ours", ours.trainer.scored.cpu()), ("example", copied)):
        score = train.test(model, dataset.test.images[:PICTURES], ours.sizes, DRAWS)
        nats[name] = round(score["nll"], 3)
        print(f"{name:10s} {nats[name]:8.2f} nats after {counts[name]:,} steps in {seconds:.0f} s")
    return {"nats": nats, "nats_better": round(nats["example"] - nats["ours"], 3),
            "steps": counts, "seconds": round(seconds)}  # fmt: skip


def main(args) -> None:
    """Measure all of it; print tables and, last, one line of JSON."""
    config, _ = asked_for(args, train.TrainConfig(), PRESETS["example"], data.INSIDE)
    device, _ = hardware.choose_device(config.device)
    dtype, why = hardware.choose_dtype(config.dtype, device)
    say(f"{device}, {dtype} ({why}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    dataset = data.load(config.data, image_size=28)
    line = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    line |= {"threads": torch.get_num_threads(), "data": Path(dataset.name).name}
    line |= speed(config, dataset, dtype)
    line |= equal_time(config, dataset, dtype, line["milliseconds"])
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    write_json(RESULT, line)
    print(json.dumps(line))
