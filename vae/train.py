"""Training: Adam on a bound of log p(x), resumable to the bit, on any number of ranks.

`train(config, sizes)` is the whole story and returns the log. What is a VAE's stands here: the
options, what a batch is (pictures and the dice for z), its loss, how parts are scored, and the
numbers to expect. trainer.py has the step that these are parts of, loop.py the steps one after
another.

A batch, its binarising and its dice depend on (seed, step) alone. The validation part decides which
weights are best; the test part is looked at once, in the end.

Key: B pictures, K draws of z for each, C channels, H and W height and width, D latents.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import data
import hardware
import likelihood
import vae
from loop import run_loop
from model import PRESETS, VaeConfig, begin_at_mean, build, macs, with_data
from options import UserError, option, say
from run import RunDirectory, whole_file
from trainer import CommonConfig, Trainer, announce, as_described, facts
from vq import perplexity

ON_TRACK = 22.7  # nats a test picture of the default run, by importance sampling
BETAS = (0.9, 0.999)
COMMITMENT = 0.25  # the paper's beta, 1711.00937, §3.2
CACHE = "pictures.npz"  # in a run: the decoded pictures, where reading them takes a while


@dataclass(frozen=True)
class TrainConfig(CommonConfig):
    """The training.

    Raises ValueError for values that make no sense.
    """

    data: str = option("digits", "digits, sprites, a folder, an .npz file, or hf:OWNER/NAME")
    image_size: int = option(
        0, "scale and crop pictures to this many pixels a side; 0 takes them as they are",
        least=0, most=1024,
    )  # fmt: skip
    steps: int = option(5000, "optimizer steps", least=1)
    batch_size: int = option(128, "pictures per step, over all ranks", least=1)
    lr: float = option(2e-3, "highest learning rate", above=0)
    bound: str = option("elbo", "what to climb", ("elbo", "iwae"))
    samples: int = option(1, "draws of z for each picture: the k of IWAE", least=1, most=10_000)
    beta: float = option(1.0, "weight of the KL; 1 is the bound", least=0)
    warmup: float = option(0.1, "part of the steps in which beta rises from 0", least=0, most=1)
    free_bits: float = option(0.0, "nats that each latent may carry at no cost", least=0)
    grad_clip: float = option(0.0, "largest norm of the gradient; 0 is no limit", least=0)
    ema: float = option(0.99, "score averaged weights that keep this much a step", least=0, below=1)
    eval_every: int = option(250, "steps between looks at the validation part", least=1)
    checkpoint_every: int = option(1000, "steps between checkpoints", least=1)
    importance: int = option(
        5000, "draws for each picture of the test part, for its log p(x)", least=1
    )

    def __post_init__(self):
        super().__post_init__()
        if self.bound == "iwae" and self.free_bits:
            raise ValueError("free_bits belongs to bound elbo: IWAE has no KL of its own")


# ── Batches and scores ────────────────────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=2)
def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """All n pictures in the order of an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(n)


def batch_rows(n: int, batch_size: int, step: int, seed: int) -> Tensor:
    """The pictures of a step (batch_size,): epochs follow one another without a break.

    So every batch is whole, whatever n is.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = range(places[0] // n, places[-1] // n + 1)
    return torch.from_numpy(
        np.concatenate([order(n, seed, e)[places[places // n == e] % n] for e in epochs])
    )


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, sizes: VaeConfig) -> dict:
    """The negative ELBO of pictures (N, C, H, W) of bytes and its two parts, in nats a picture.

    Always with the same binarising and the same dice, so that two scores compare.
    """
    model.eval()
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(data.FIXED)
    draws = 1 + 1000 // len(images)  # of few pictures more draws, against the noise
    parts = []
    for x in data.fixed(images, sizes.likelihood):
        eps = torch.randn(len(x), draws, sizes.latent, generator=dice)
        parts.append([tensor.cpu() for tensor in model(x.to(device), eps.to(device))[:3]])
    log_px, *rest = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    score = {"reconstruction": -log_px.double().mean().item(), "pictures": len(images)}
    score |= codes_used(rest[1], sizes) if sizes.n_code else latents_used(*rest)
    return {"loss": score["reconstruction"] + score["kl"]} | score


def latents_used(mu: Tensor, logvar: Tensor) -> dict:
    """The KL in nats a picture, of each latent too, and how many latents say anything."""
    kl = vae.kl_closed(mu.double(), logvar.double())
    each = [round(value, 4) for value in kl.mean(0).tolist()]
    used = int((~vae.collapsed(kl)).sum())
    active = int(vae.active_units(mu).sum()) if len(mu) > 1 else 0
    return {"kl": kl.sum(1).mean().item(), "active": active, "used": used, "kl_each": each}


def codes_used(numbers: Tensor, sizes: VaeConfig) -> dict:
    """The KL of certain choices from a uniform prior, and how many codes are in use."""
    kl = numbers.shape[1] * math.log(sizes.n_code)
    return {"kl": kl, "perplexity": perplexity(numbers, sizes.n_code)}


@torch.no_grad()
def test(model: nn.Module, images: Tensor, sizes: VaeConfig, k: int) -> dict:
    """`evaluate`, and where latents are normal −log p(x) by k draws for each picture: `nll`."""
    score = evaluate(model, images, sizes)
    if not sizes.n_code:
        device, dice = next(model.parameters()).device, torch.Generator().manual_seed(data.FIXED)
        found = []
        for x in data.fixed(images, sizes.likelihood):
            for part in x.to(device).split(16):
                found.append(likelihood.importance(model, part, k, dice))
        found = torch.cat(found)
        score |= {"nll": -found.mean().item(), "importance": k}
        score["nll_error"] = (found.std() / math.sqrt(len(found))).item() if len(found) > 1 else 0.0
    if sizes.likelihood != "bernoulli":
        nats = score.get("nll", score["loss"])
        score["bits_per_dim"] = nats / sizes.n_pixel / math.log(2)
    return score


def describe(score: dict) -> str:
    """A score in words."""
    text = f"{score['loss']:.2f} nats = {score['reconstruction']:.2f} pixels + {score['kl']:.2f} KL"
    if "perplexity" in score:
        text += f", {score['perplexity']:.1f} codes in use"
    else:
        text += f", {score['used']} of {len(score['kl_each'])} latents in use"
    if "nll" in score:
        text += f"; -log p(x) {score['nll']:.2f} nats"
    if "bits_per_dim" in score:
        text += f" = {score['bits_per_dim']:.3f} bits a value"
    return text


class VaeTrainer(Trainer):
    """What of a training step is special about a VAE: its batch with dice, and its bound."""

    unit = "pictures"

    def __init__(self, config: TrainConfig, sizes: VaeConfig, model: nn.Module, dataset, dtype):
        if config.shard:
            raise UserError("--shard is for weights that outgrow a device, and these networks are "
                            "small: leave it out and start with torchrun")  # fmt: skip
        asked = (config.bound, config.samples, config.beta, config.free_bits)
        if sizes.n_code and asked != ("elbo", 1, 1.0, 0.0):
            raise UserError("--bound, --samples, --beta and --free-bits are about normal latents, "
                            "and with --n-code there are none: leave them out")  # fmt: skip
        super().__init__(config, model, [], dtype)
        self.dataset, self.sizes = dataset, sizes
        self.images = dataset.train.images.to(self.device)
        self.beta = config.beta
        self.flops_per_unit = 6 * macs_of_picture(self.scored, sizes, config.samples)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.config.lr, betas=BETAS, fused=True)

    def learning_rate(self, step: int) -> float:
        """A short rise, then half a cosine down to nearly nothing."""
        rise = min(1.0, (step + 1) / 100)
        return (
            self.config.lr
            * rise
            * max(0.01, 0.5 + 0.5 * math.cos(math.pi * step / self.config.steps))
        )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Pictures as x (B, C, H, W), binarised anew, and the dice of their latents (B, K, D)."""
        config, sizes = self.config, self.sizes
        self.beta = vae.beta_at(step, config.warmup * config.steps, config.beta)
        rows = batch_rows(len(self.images), config.batch_size, step, config.seed).to(self.device)
        dice = np.random.default_rng((config.seed, 1, step))
        x = data.as_x(self.images[rows], sizes.likelihood, dice)
        shape = (len(rows), config.samples, sizes.latent)
        return x, torch.from_numpy(dice.standard_normal(shape, dtype=np.float32))

    def batch_loss(self, forward: Callable, x: Tensor, eps: Tensor) -> tuple:
        """Minus the sum of the bounds of the pictures, their number, and its parts to log."""
        if self.sizes.n_code:
            log_px, commitment, numbers = forward(x, eps)
            log_px, kl = log_px.mean(1), numbers.shape[1] * math.log(self.sizes.n_code)
            loss = (COMMITMENT * commitment + kl - log_px).sum()
            return loss, len(x), {"reconstruction": -log_px.detach().sum(), "kl": kl * len(x)}
        log_px, mu, logvar, z = forward(x, eps)
        kl = vae.kl_closed(mu, logvar)
        if self.config.bound == "iwae":
            bound = vae.iwae(log_px - self.beta * vae.kl_sampled(z, mu, logvar))
        else:
            bound = vae.elbo(log_px, kl, self.beta, self.config.free_bits)
        numbers = {"reconstruction": -log_px.detach().mean(1).sum(), "kl": kl.detach().sum()}
        return -bound.sum(), len(x), numbers

    @torch.no_grad()
    def follow(self, number: int) -> None:
        """After a step: the codes follow the vectors that chose them."""
        if self.sizes.n_code:
            codebook = getattr(self.model, "module", self.model).codebook
            codebook.follow(hardware.sum_over_ranks, first=hardware.rank() == 0)
        super().follow(number)

    def score(self) -> dict:
        return evaluate(self.scored, self.dataset.valid.images, self.sizes)

    def describe(self, score: dict) -> str:
        return describe(score)


def macs_of_picture(model: nn.Module, sizes: VaeConfig, samples: int) -> int:
    """Multiply-adds of one picture through the encoder, and of its draws through the decoder."""
    device = next(model.parameters()).device
    x = torch.zeros(1, *sizes.shape, device=device)
    z = torch.zeros(1, *((sizes.n_place,) if sizes.n_code else ()), sizes.latent, device=device)
    return macs(model.encoder, x) + samples * macs(model.decoder, z)


# ── What to expect ────────────────────────────────────────────────────────────────────────────────


def expectations(trainer: VaeTrainer) -> None:
    """Print the data and the numbers to expect of it."""
    config, dataset, sizes = trainer.config, trainer.dataset, trainer.sizes
    epochs = config.steps * config.batch_size / len(dataset.train)
    say(f"data       {dataset.name}: {len(dataset.train):,} pictures, {len(dataset.valid):,} to "
        f"validate, {len(dataset.test):,} to test; {epochs:.1f} epochs")  # fmt: skip
    if dataset.notes:
        say(f"pictures   {dataset.notes}")
    if sizes.likelihood == "bernoulli":
        say("pixels     black or white, by dice at each visit (--likelihood logistic keeps greys)")
        coin = data.alone(dataset.mean, dataset.test.images)
        say(f"expect     {coin:.2f} nats of reconstruction at step 1: each pixel a coin of its own")
        least, why = floor_of(dataset)
        say(f"           and never below {least:.2f} nats: {why}")


def floor_of(dataset: data.Dataset) -> tuple[float, str]:
    """Nats a test picture that no model can go below, and why."""
    if dataset.name == "sprites":
        n = sum(len(part) for part in (dataset.train, dataset.valid, dataset.test))
        return math.log(n), f"ln {n:,}, as there are so many sprites, all alike in number"
    return data.floor(dataset.test.images), "the entropy of the binarising dice"


def verdict(score: dict, described: bool) -> str:
    """How a run ended; whether as it should, if it is the one that the README describes."""
    if not described:
        return f"done: {describe(score)}"
    word = "on track" if score["nll"] <= ON_TRACK else "off track"
    return (f"{word}: -log p(x) of the test part is {score['nll']:.2f} nats a picture, the README "
            f"promises at most {ON_TRACK:g}")  # fmt: skip


def warn_of_collapse(score: dict) -> None:
    """Say it where latents carry nothing: posterior collapse."""
    each = score.get("kl_each", [1.0])
    silent = [i for i, kl in enumerate(each) if kl < vae.ACTIVE]
    if len(silent) == len(each):
        say("warning    posterior collapse: no latent says anything about a picture, so the "
            "decoder ignores z; try a longer --warmup or --free-bits 0.5")  # fmt: skip
    elif silent:
        say(f"latents    {len(silent)} of {len(each)} carry less than {vae.ACTIVE} nats: they are "
            "not needed (README, Key Concepts)")  # fmt: skip


# ── A run ─────────────────────────────────────────────────────────────────────────────────────────


def network(sizes: VaeConfig, dataset: data.Dataset, loaded: checkpoint.Loaded | None) -> nn.Module:
    """The network to train: loaded, or fresh and saying the mean picture whatever z is."""
    model = build(sizes)
    if loaded:
        return checkpoint.fill(model, loaded.model.state_dict(), loaded.path)
    begin_at_mean(model.decoder, dataset.mean, sizes)
    return model


def sizes_for(sizes: VaeConfig, dataset: data.Dataset) -> VaeConfig:
    """`sizes` with what the data decides. UserError if there is no such network."""
    try:
        return with_data(sizes, dataset.shape)
    except ValueError as error:
        raise UserError(f"--data {dataset.name}: {error}") from None


def check_memory(config: TrainConfig, sizes: VaeConfig, device: torch.device) -> None:
    """UserError if the training cannot fit, before any of it is built.

    Counted are the weights with gradient, two moments and average, and for each picture and draw
    its pixels and hidden layers, four bytes a number.
    """
    with torch.device("meta"):  # shapes without memory
        n_parameter = sum(p.numel() for p in build(sizes).parameters())
    n_activation = config.batch_size * (sizes.n_pixel + sizes.width)
    n_activation += config.batch_size * config.samples * (2 * sizes.n_pixel + sizes.width)
    hardware.check_memory(20 * n_parameter + 4 * n_activation, device, "training this")


def keep_pictures(dataset: data.Dataset, folder) -> None:
    """Write the decoded pictures into a run, if decoding them took a while."""
    if dataset.stamp:
        with whole_file(folder / CACHE) as part, open(part, "wb") as file:
            dataset.save(file)


def finish(trainer: VaeTrainer, run_dir: RunDirectory, at_end: Callable | None) -> None:
    """Look at the test part, once, with the weights that were best on validation."""
    config, dataset, sizes = trainer.config, trainer.dataset, trainer.sizes
    try:
        loaded = checkpoint.load(run_dir.path)
        model = loaded.model.to(trainer.device)
        if not sizes.n_code:
            flops = 2 * len(dataset.test) * macs_of_picture(model, sizes, config.importance)
            say(f"test part  {config.importance:,} draws for each of {len(dataset.test):,} "
                f"pictures: {flops / 1e12:.1f} TFLOP")  # fmt: skip
        score = test(model, dataset.test.images, sizes, config.importance)
        run_dir.log(step=config.steps, split="test", **score)
        say(f"test part  {describe(score)}")
        warn_of_collapse(score)
        say(verdict(score, as_described(config, sizes, (TrainConfig(), PRESETS["digits"]))))
        if at_end:
            at_end(loaded, dataset)
    except KeyboardInterrupt:
        say(f"stopped; the trained network is in {run_dir.path}: --eval and --sample use it")
        raise


def train(
    config: TrainConfig,
    sizes: VaeConfig,
    resume: bool = False,
    loaded: checkpoint.Loaded | None = None,
    at_end: Callable | None = None,
) -> list[dict]:
    """Train a network of these sizes, and return the log.

    resume: go on from the last checkpoint in `config.out`.
    loaded: the network in `config.weights`, where it is at hand already.
    at_end: called with the trained network and the data.

    UserError for data, sizes or files that will not do, and for a loss that is not finite.
    """
    run_dir = RunDirectory(config.out)
    device, why_device = hardware.choose_device(config.device)
    dtype, why_dtype = hardware.choose_dtype(config.dtype, device)
    config = replace(config, dtype=str(dtype).removeprefix("torch."))
    with hardware.ranks(device), run_dir.writing():
        if run_dir.writes and not resume:
            run_dir.refuse_what_is_not_ours(config.data)
        at_start = not (resume and run_dir.checkpoint.exists())
        if config.weights and at_start and not loaded:
            loaded = checkpoint.load(config.weights)
        cache = run_dir.path / CACHE if resume else None
        dataset = data.load(config.data, config.seed, config.image_size, cache)
        if loaded:
            loaded.refuse_misfits(dataset.name, dataset.train.images)
        sizes = sizes_for(loaded.sizes if loaded else sizes, dataset)
        check_memory(config, sizes, device)
        hardware.seed_everything(config.seed)
        model = network(sizes, dataset, loaded).to(device)
        trainer = VaeTrainer(config, sizes, model, dataset, dtype)
        if run_dir.writes and resume:
            run_dir.save_config(facts(config, sizes))
        elif run_dir.writes:
            run_dir.create(facts(config, sizes), lambda folder: keep_pictures(dataset, folder))
        hardware.barrier()
        why = f"{device}: {why_device}; {config.dtype}: {why_dtype}"
        announce(config, sizes, model, why)
        expectations(trainer)
        finished = run_loop(trainer, run_dir, resume)
        scored = {(line["split"], line["step"]) for line in run_dir.history()}
        if finished and run_dir.writes and ("test", config.steps) not in scored:
            finish(trainer, run_dir, at_end)
        return run_dir.history()
