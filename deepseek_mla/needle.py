"""A needle in a haystack, with a known answer: how far back does a model find what it was told?

    haystack of filler, with 8 needles [key value] in it   …   then all 8 keys: which value?

A small model learns this on texts of up to 512 tokens. Then it is asked in texts of up to 8,192,
first as it is, then with YaRN (yarn.py), which makes the angles of a long text those of a short
one; no step is trained in between. Keys, values and filler are three alphabets, places and pairs
are drawn anew for each text, so nothing can be learned by heart: a guess is right 1 in 24 times.

Key: B rows, T tokens, n needles.
"""

import dataclasses
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import hardware
import train
from loop import save_tensors
from model import Deepseek, DeepseekConfig, RotaryTable
from options import from_options, say
from run import write_json
from weights import read_safetensors
from yarn import YarnScaling, mscale, yarn_frequencies

N_SYMBOL, N_NEEDLE = 24, 8  # of each alphabet; of a text
SHORT, TRAINED, LENGTHS = 64, 512, (512, 1024, 2048, 4096, 8192)
STEPS, BATCH, LR, ROWS = 700, 4096, 3e-3, 8  # BATCH in tokens
SIZES = DeepseekConfig(
    vocab_size=3 * N_SYMBOL, seq_len=TRAINED, n_layer=2, n_head=4, d_model=64, q_rank=0,
    kv_rank=32, d_nope=16, d_rope=16, d_value=16, d_ff=128, n_dense=2, n_ahead=0,
)  # fmt: skip
FOLDER = Path(__file__).resolve().parent
SHIPPED = FOLDER / "pretrained" / "needle" / "model.safetensors"


def texts(n_row: int, length: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens (B, T), depth of the needle that each question asks for (B, n), 0 the first).

    The last 2·n tokens are the questions: key, value, key, value, … One needle lies in each n-th
    of the haystack, at a random place.
    """
    n, hay = N_NEEDLE, length - 2 * N_NEEDLE
    tokens = torch.randint(N_SYMBOL, (n_row, hay), generator=dice)
    pairs = torch.rand(2, n_row, N_SYMBOL, generator=dice).argsort(dim=-1)[..., :n]
    pairs = pairs + torch.tensor([N_SYMBOL, 2 * N_SYMBOL])[:, None, None]  # keys, values
    room = hay // n
    places = torch.rand(n_row, n, generator=dice).mul(room - 1).long() + room * torch.arange(n)
    tokens.scatter_(1, places, pairs[0]).scatter_(1, places + 1, pairs[1])
    order = torch.rand(n_row, n, generator=dice).argsort(dim=-1)
    asked = pairs.gather(2, order.expand(2, -1, -1))  # (2, B, n)
    return torch.cat((tokens, asked.permute(1, 2, 0).flatten(1)), dim=1), order


def answers(model: Deepseek, tokens: Tensor) -> Tensor:
    """Logits at the keys of the questions, (B, n, V)."""
    return model.head(model.features(tokens)[:, -2 * N_NEEDLE :: 2])


def step_loss(model: Deepseek, tokens: Tensor) -> Tensor:
    """Mean −log p of the right values."""
    targets = tokens[:, -2 * N_NEEDLE + 1 :: 2]
    return F.cross_entropy(answers(model, tokens).flatten(0, 1), targets.flatten())


def train_needle(steps: int, seed: int, device: torch.device) -> Deepseek:
    """A model that finds needles in texts of up to TRAINED tokens. One length a step."""
    hardware.seed_everything(seed)
    dice, model = torch.Generator().manual_seed(seed), Deepseek(SIZES).to(device)
    groups = train.decay_groups(model, 0.1)
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=train.BETAS, fused=True)
    schedule = train.TrainConfig(steps=steps, lr=LR)
    for step in range(steps):
        # short texts first: of these there are many in a batch, and what to look for is learned
        grown = min(1.0, max(0.0, 2 * step / steps - 0.6))  # from 0.3 to 0.8 of the steps
        longest = SHORT + int((TRAINED - SHORT) * grown)
        length = int(torch.randint(SHORT // 2, longest + 1, (), generator=dice))
        for group in optimizer.param_groups:
            group["lr"] = train.learning_rate(step, schedule)
        loss = step_loss(model, texts(BATCH // length, length, dice)[0].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            say(f"step {step + 1:5d}  length {length:4d}  loss {loss.item():.4f}")
    return model.eval()


def stretched(model: Deepseek, length: int, yarn: bool) -> Deepseek:
    """The model with a context of `length`, with or without YaRN. Its weights are shared."""
    c = dataclasses.replace(model.config, seq_len=length)
    scaling = None
    if yarn and length > TRAINED:
        scaling = YarnScaling(factor=length / TRAINED, original_seq_len=TRAINED)
    model.config = dataclasses.replace(c, rope_scaling=scaling)
    model.rotary = RotaryTable(yarn_frequencies(c.d_rope, c.rope_theta, scaling))
    for block in model.blocks:
        block.attention.scale = (c.d_nope + c.d_rope) ** -0.5 * mscale(scaling) ** 2
    return model


@torch.no_grad()
def found(model: Deepseek, length: int, n_row: int, seed: int = 1) -> list[float]:
    """The share of right answers for each depth, from the beginning of the text to its end."""
    device, right = model.embedding.weight.device, torch.zeros(N_NEEDLE)
    dice = torch.Generator().manual_seed(seed)
    for _ in range(n_row):  # one at a time: memory
        tokens, order = texts(1, length, dice)
        said = answers(model, tokens.to(device)).argmax(dim=-1).cpu()
        right.index_add_(0, order[0], (said == tokens[:, -2 * N_NEEDLE + 1 :: 2])[0].float())
    return [round(x, 4) for x in (right / n_row).tolist()]


def needle_map(model: Deepseek, lengths: tuple[int, ...], n_row: int) -> dict[str, dict]:
    """{"before" or "after" YaRN: {length: share found at each depth}}."""
    result: dict[str, dict] = {"before": {}, "after": {}}
    for length in lengths:
        for when in result:
            shares = found(stretched(model, length, when == "after"), length, n_row)
            result[when][str(length)] = shares
            say(f"{length:5d} tokens, {when:6s} YaRN: {sum(shares) / N_NEEDLE:.0%} found")
    return result


def load(file: Path) -> Deepseek:
    """A model that was trained before. UserError for a file that cannot be read."""
    model, state = Deepseek(SIZES), read_safetensors(file)
    model.load_state_dict(state | {"head.weight": state["embedding.weight"]})
    return model.eval()


def main(args) -> None:
    """Train, unless that was done before, ask, and write runs/experiments/needle.json.

    The last line is JSON.
    """
    config = from_options(train.TrainConfig(steps=STEPS), args)
    device, _ = hardware.choose_device(config.device)
    runs = FOLDER / "runs" / "experiments"
    file = runs / "needle" / "model.safetensors"
    if not file.exists():
        model = train_needle(config.steps, config.seed, device)
        state = {name: t for name, t in model.state_dict().items() if name != "head.weight"}
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(file, state)
    result = needle_map(load(file).to(device), LENGTHS, ROWS)
    write_json(runs / "needle.json", result)
    print(json.dumps(result))
