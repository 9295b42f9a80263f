"""How fast is a step of DPO, beside TRL's DPOTrainer where it is installed?

Same model (5 M parameters), same pairs of the tales, same batch, number format, AdamW and clipping,
in one process, taking turns; a time is the median. Before anything is timed the losses of two steps
must agree.

train_vs_trl               pairs a second, ours / TRL's, both as they come: TRL asks the reference
                           in every step, we asked it once, before
train_vs_trl_precomputed   TRL with precompute_ref_log_probs=True
reference                  what asking once costs, in seconds a pair, so that one can add it

A row of ours holds the prompt once and both answers, TRL's batch holds it twice; and the scores of
all V tokens are computed only for tokens of answers.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import checkpoint
import data
import hardware
import train
from checkpoint import Loaded
from huggingface import their_config, to_their_names
from model import Llama, LlamaConfig
from options import from_options, say
from packing import AnswerScorer, Packed, of_rows
from rows import encode_part
from run import write_json

SIZES = LlamaConfig(
    vocab_size=1344, seq_len=176, n_layer=6, n_head=8, n_kv_head=8, d_model=256, d_head=32, d_ff=688
)
RESULTS = Path(__file__).resolve().parent / "runs"
N_PAIR, N_BATCH, ROUNDS, BETA = 16, 2, 5, 0.1


def drawn_pairs() -> list[data.Example]:
    """The pairs of both sides: some of the tales' training part."""
    pairs = [one for one in data.read_parts("tales")["train"] if len(one.answers) == 2]
    return pairs[: N_PAIR * N_BATCH]


def step_of(model: nn.Module, loss_of: Callable) -> Callable[[int], float]:
    """A function that does one whole step on the batch of this number and returns its loss."""
    learning = list(model.parameters())
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)

    def step(number: int) -> float:
        loss = loss_of(number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(llama: Llama, pairs: list, tokenizer, dtype) -> tuple[Callable, float]:
    """(our step, seconds a pair that the reference took, once)."""
    config = train.TrainConfig(beta=BETA)
    examples, device = encode_part(pairs, tokenizer, SIZES.seq_len), next(llama.parameters()).device
    scorer = AnswerScorer(llama)
    start = time.perf_counter()
    theirs = train.log_probabilities(scorer, examples, dtype)
    seconds = (time.perf_counter() - start) / len(pairs)
    batches = []
    for i in range(N_BATCH):
        numbers = list(range(i * N_PAIR, (i + 1) * N_PAIR))
        packed = examples.packed(numbers, "pairs", 0, 2)
        batches.append([x.to(device) for x in (*packed, of_rows(theirs[numbers], packed))])

    def loss_of(number: int) -> torch.Tensor:
        *rows, reference = batches[number % N_BATCH]
        with hardware.autocast(device, dtype):
            sums, counts = scorer(*rows)
        there = Packed(*rows).number >= 0
        found = train.pair_numbers(sums[there], reference[there], counts[there], config)
        return found["loss"].mean()

    return step_of(scorer, loss_of), seconds


def trl_step(llama: Llama, tokenizer, pairs: list, dtype, device, precompute: bool) -> Callable:
    """TRL's step. ImportError without TRL."""
    import datasets
    import transformers
    import trl

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**their_config(SIZES)))
    model.load_state_dict(to_their_names(llama.state_dict()))
    records = [
        {"prompt": x.prompt, "chosen": x.answers[0], "rejected": x.answers[1]} for x in pairs
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=N_PAIR, report_to=[], beta=BETA,
            use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, max_length=None,
            gradient_checkpointing=False, precompute_ref_log_probs=precompute, disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.DPOTrainer(
            model=model,
            ref_model=None if precompute else copy.deepcopy(model),
            args=settings,
            train_dataset=datasets.Dataset.from_list(records),
            processing_class=tokenizer,
        )
        rows = [trainer.train_dataset[i] for i in range(len(pairs))]
        starts = range(0, len(pairs), N_PAIR)
        batches = [trainer.data_collator(rows[start : start + N_PAIR]) for start in starts]
    trainer.model.train()

    def loss_of(number: int) -> torch.Tensor:
        batch = {k: v.to(device) for k, v in batches[number % N_BATCH].items()}
        with hardware.autocast(device, dtype):
            return trainer.compute_loss(trainer.model, batch)

    return step_of(trainer.model, loss_of)


def exported_tokenizer(loaded: Loaded):
    """The tokenizer of the base, as transformers reads it; TRL writes the eos token as text."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        checkpoint.export(loaded, Path(folder) / "base")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            Path(folder) / "base", split_special_tokens=False
        )
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def variants(device, dtype, seed: int) -> tuple[dict[str, Callable], float]:
    """(the steps that are compared, seconds a pair of asking the reference once)."""
    torch.manual_seed(seed)
    llama, base, pairs = Llama(SIZES).to(device), train.load_start(""), drawn_pairs()
    ours, seconds = our_step(copy.deepcopy(llama), pairs, base.tokenizer, dtype)
    steps = {"ours": ours}
    try:
        tokenizer = exported_tokenizer(replace(base))
        for name, precompute in (("trl", False), ("trl, precomputed", True)):
            steps[name] = trl_step(llama, tokenizer, pairs, dtype, device, precompute)
    except ImportError as error:
        say(f"TRL is left out: {error}")
    return steps, seconds


def measure(steps: dict[str, Callable], tolerance: float) -> dict[str, float]:
    """Seconds a step, medians, after two steps whose losses must agree.

    The first loss is ln 2 for everybody; the second depends on every token and gradient.
    """
    for number in range(2):
        losses = {name: step(number) for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > tolerance:
            raise RuntimeError(f"the losses of step {number + 1} differ: {losses}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(2, 2 + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step(number)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main(args: argparse.Namespace) -> None:
    """Print a table, then one JSON line, which is kept in runs/ too."""
    config = from_options(train.TrainConfig(), args)
    device, _ = hardware.choose_device(config.device)
    dtype, _ = hardware.choose_dtype(config.dtype, device)
    steps, reference = variants(device, dtype, config.seed)
    seconds = measure(steps, 5e-5 if dtype == torch.float32 else 1e-2)
    for name, x in seconds.items():
        print(f"{name:18}{1000 * x:9.1f} ms a step of {N_PAIR} pairs{N_PAIR / x:9.1f} pairs/s")
    print(f"asking the reference once took {1000 * reference:.1f} ms a pair")
    result = {}
    for name, key in (("trl", "train_vs_trl"), ("trl, precomputed", "train_vs_trl_precomputed")):
        if name in seconds:
            result[key] = round(seconds[name] / seconds["ours"], 3)
    result |= {"pairs_per_second": round(N_PAIR / seconds["ours"], 2),
               "reference_ms": round(1000 * reference, 2),
               "dtype": str(dtype).removeprefix("torch."),
               "threads": torch.get_num_threads()}  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"bench-{result['dtype']}.json", result | {"seconds": seconds})
    print(json.dumps(result))
