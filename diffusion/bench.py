"""How fast and how good, beside the library diffusers: the same U-Net, data and steps.

    train    a whole step. Ours is train.py's. diffusers' is that of its own example
             train_unconditional.py: add_noise, UNet2DModel, mean squared error, clipping, AdamW,
             EMAModel
    network  forward and backward pass of the two U-Nets alone
    sample   pictures in 20 steps of DDIM, without guidance
    quality  samples of the shipped network read as their label, and their Fréchet distance, after
             10, 20 and 50 looks at it

Both are in one process, take turns, and a time is the median. `train_vs_diffusers` and
`sample_vs_diffusers` above 1 say that ours is faster, with 16 pictures at a time, as that example
has them; the names with _96 are with our 96. With --compile ours is compiled too.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import checkpoint
import classifier
import hardware
import measure
import sources
import train
from checkpoint import Loaded, Process
from measure import SampleConfig
from model import PRESETS, NetConfig, build
from options import from_options, say
from run import write_json
from train import DiffusionTrainer, TrainConfig

HERE = Path(__file__).resolve().parent
ROUNDS, N_STEP = 9, 20
BATCHES = (16, 96)
N_JUDGED = 200


def turns(works: dict[str, Callable], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds that each of the works takes: the median of some rounds in which all take turns."""
    times = {name: [] for name in works}
    for i in range(rounds + 2):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if i >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def their_unet(sizes: NetConfig, model: nn.Module) -> nn.Module:
    """The UNet2DModel of diffusers with our weights. ImportError without diffusers."""
    from diffusers import UNet2DModel

    values = checkpoint.their_sizes(sizes)
    values.pop("_class_name")
    theirs = UNet2DModel(**values)
    theirs.load_state_dict(model.state_dict())
    return theirs


def their_step(unet: nn.Module, source, config: TrainConfig, dtype) -> Callable:
    """A step as the example of diffusers takes it, with our noise schedule and target."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel

    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, betas=(0.95, 0.999))
    average = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True)
    device = next(unet.parameters()).device
    images, labels = sources.to_unit(source.train.images).to(device), source.train.labels.to(device)

    def step() -> None:
        rows = torch.randint(len(images), (config.batch_size,), device=device)
        x0, noise = images[rows], torch.randn_like(images[rows])
        times = torch.randint(1000, (len(rows),), device=device)
        x = scheduler.add_noise(x0, noise, times)
        with hardware.autocast(device, dtype):
            out = unet(x, times, class_labels=labels[rows]).sample
        loss = F.mse_loss(out.float(), scheduler.get_velocity(x0, noise, times))
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        loss.item()

    return step


def our_step(trainer: DiffusionTrainer) -> Callable:
    number = iter(range(1 << 30))
    return lambda: trainer.step(next(number))


def pass_through(network: Callable, x, times, labels, dtype) -> Callable:
    """Forward and backward pass of a network."""

    def work() -> None:
        with hardware.autocast(x.device, dtype):
            network(x, times, labels).float().square().mean().backward()

    return work


def training(config: TrainConfig, device, dtype) -> dict[str, float]:
    """Seconds of a step, and of both passes of the network, of ours and of diffusers'."""
    source = sources.load("digits")
    sizes = train.sizes_for(PRESETS["digits"], source, True)
    model = build(sizes).to(device)
    theirs = their_unet(sizes, model).to(device).train()
    x = torch.randn(config.batch_size, *sizes.shape, device=device)
    times = torch.randint(1000, (len(x),), device=device)
    labels = torch.randint(10, (len(x),), device=device)
    trainer = DiffusionTrainer(config, sizes, model, source, dtype)
    ours = trainer.forward
    last = x.contiguous(memory_format=torch.channels_last)
    steps = {"ours": our_step(trainer), "diffusers": their_step(theirs, source, config, dtype)}
    found = {f"step {name}": seconds for name, seconds in turns(steps).items()}
    passes = {
        "ours": pass_through(ours, last, times.float(), labels, dtype),
        "diffusers": pass_through(
            lambda *rows: theirs(*rows, return_dict=False)[0], x, times, labels, dtype
        ),
    }
    return found | {f"network {name}": seconds for name, seconds in turns(passes).items()}


def sampling(config: TrainConfig, device, dtype) -> dict[str, float]:
    """Seconds for a batch of pictures by DDIM, of ours and of the pipeline's loop of diffusers."""
    from diffusers import DDIMScheduler

    sizes = NetConfig()  # the one of the digits, without classes
    model = build(sizes).to(device).eval()
    theirs = their_unet(sizes, model).to(device).eval()
    model = model.to(memory_format=torch.channels_last)
    process = Process(schedule="cosine", target="v")
    loaded = Loaded(HERE, torch.compile(model) if config.compile else model, sizes, process)
    settings = SampleConfig(sampler="ddim", sample_steps=N_STEP)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction",
                              timestep_spacing="trailing")  # fmt: skip

    @torch.no_grad()
    def their_loop() -> None:
        x = torch.randn(config.batch_size, *sizes.shape, device=device)
        scheduler.set_timesteps(N_STEP)
        for moment in scheduler.timesteps:
            with hardware.autocast(device, dtype):
                out = theirs(x, moment).sample
            x = scheduler.step(out.float(), moment, x).prev_sample

    works = {
        "ours": lambda: measure.sample(loaded, settings, None, config.batch_size, dtype),
        "diffusers": their_loop,
    }
    return {f"sample {name}": seconds for name, seconds in turns(works).items()}


def quality(loaded: Loaded) -> list[dict]:
    """Accuracy and Fréchet distance after 10, 20 and 50 looks, by sampler."""
    source = loaded.rows()
    judge = classifier.fit(source.train, len(source.classes))
    rows = []
    for looks in (10, 20, 50):
        for name in ("ddpm", "ddim", "heun", "dpmpp"):
            n_step = looks // 2 + 1 if name == "heun" else looks  # 2S − 2 looks, see `heun`
            config = SampleConfig(num_samples=N_JUDGED, sampler=name, sample_steps=n_step)
            found = measure.quality(loaded, source, config, judge)
            rows.append({"looks": looks, "sampler": name, "accuracy": found["accuracy"],
                         "frechet": found["frechet"]})  # fmt: skip
    return rows


def show(seconds: dict[str, float], batch: int) -> dict[str, float]:
    """Print a line for each comparison. Returns diffusers' time divided by ours."""
    ratios = {}
    for what in ("step", "network", "sample"):
        ours, theirs = seconds[f"{what} ours"], seconds[f"{what} diffusers"]
        name = {"step": "train"}.get(what, what) + ("" if batch == BATCHES[0] else f"_{batch}")
        ratios[f"{name}_vs_diffusers"] = round(theirs / ours, 3)
        print(f"{what:8} {batch:3} at a time  ours {1000 * ours:8.1f} ms  diffusers "
              f"{1000 * theirs:8.1f} ms  {theirs / ours:.2f} ×")  # fmt: skip
    return ratios


def main(args: argparse.Namespace) -> None:
    """Print tables, then one JSON line, which is kept in runs/ too."""
    config = from_options(TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, _ = train.choose_dtype(config.dtype, device)
    result = {"dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
              "compiled": config.compile}  # fmt: skip
    try:
        for batch in BATCHES:
            config = replace(config, batch_size=batch)
            seconds = training(config, device, dtype) | sampling(config, device, dtype)
            result |= show(seconds, batch)
    except ImportError as error:
        say(f"diffusers is left out: {error}")
    rows = quality(checkpoint.load(HERE / "pretrained"))
    for row in rows:
        print(f"{row['looks']:3} looks  {row['sampler']:6} {100 * row['accuracy']:5.1f} % read as "
              f"their label, Fréchet distance {row['frechet']:.3f}")  # fmt: skip
    result["quality"] = rows
    (HERE / "runs").mkdir(exist_ok=True)
    name = "bench-compiled" if config.compile else "bench"
    write_json(HERE / "runs" / f"{name}-{result['dtype']}.json", result)
    print(json.dumps(result))
