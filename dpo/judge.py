"""Who writes the better tales? Decided by the grammar, exactly, with no other model as a judge.

Policy and reference answer the same prompts, at temperature 1, so that they are the distributions
that KL(π‖π_ref) is about. An answer's true reward is counted by data/make_tales.py.

win_rate   the share of comparisons that the policy wins; a tie counts half
kl         how far the policy is from the reference, in nats per answer, from its own answers
fluency    loss on stories of the base model's own grammar, divided by the reference's loss
told       the share of answers that the grammar could have told, word for word
"""

import itertools
import math
import sys
from pathlib import Path

import torch

import dpo
import hardware
import text
from checkpoint import Loaded
from data import STORIES
from generate import Sampling, generate
from packing import AnswerScorer, Text, of_texts, pack
from rows import Examples

sys.path.append(str(Path(__file__).resolve().parent / "data"))
import make_tales

N_SAMPLE = 2  # answers to a prompt
LONGEST = 80  # tokens of an answer
Z = 1.96  # standard errors, for 95 % confidence


def answers(loaded: Loaded, prompts: list[list[int]], seed: int, temperature: float = 1.0) -> list:
    """Ids that the model answers, N_SAMPLE to a prompt, with the end-of-text token if it came."""
    found: list[list[int]] = [[] for _ in prompts for _ in range(N_SAMPLE)]
    room = loaded.model.config.seq_len - max(map(len, prompts))
    n_new, sampling = min(LONGEST, room), Sampling(temperature=temperature)
    for ids in generate(loaded.model, prompts, n_new, sampling, loaded.stop_ids, seed, N_SAMPLE):
        for row, token in enumerate(ids):
            if token is not None:
                found[row].append(token)
    end = loaded.tokenizer.eos_id
    return [[*ids, end] if len(ids) < n_new else ids for ids in found]


@torch.no_grad()
def log_probs(loaded: Loaded, texts: list[Text], dtype: torch.dtype) -> torch.Tensor:
    """log π of the one answer of each text, (N,)."""
    device, found = next(loaded.model.parameters()).device, []
    scorer = AnswerScorer(loaded.model)
    for start in range(0, len(texts), 64):
        packed = pack(texts[start : start + 64])
        with hardware.autocast(device, dtype):
            sums, _ = scorer(*(x.to(device) for x in packed))
        found.append(of_texts(sums.cpu(), packed)[:, 0])
    return torch.cat(found)


def compare(
    policy: Loaded, reference: Loaded, test: Examples, seed: int, dtype: torch.dtype
) -> dict[str, float]:
    """All numbers above, on the prompts of a part of the tales."""
    prompts = [test.texts[i][0] for i in test.pairs]
    numbers = {"reference": (reference, seed + 1), "policy": (policy, seed + 2)}
    ids = {who: answers(one, prompts, own_seed) for who, (one, own_seed) in numbers.items()}
    decode = policy.tokenizer.decode
    said = {who: [decode(x) for x in found] for who, found in ids.items()}
    rewards = {
        who: torch.tensor([make_tales.reward(x) for x in found], dtype=torch.float64)
        for who, found in said.items()
    }
    beginnings = [decode(prompt) for prompt in prompts for _ in range(N_SAMPLE)]
    repeated = itertools.chain.from_iterable([prompt] * N_SAMPLE for prompt in prompts)
    written = [(prompt, [answer]) for prompt, answer in zip(repeated, ids["policy"], strict=True)]
    kl = dpo.monte_carlo_kl(log_probs(policy, written, dtype), log_probs(reference, written, dtype))
    wins = (1 + (rewards["policy"] - rewards["reference"]).sign()) / 2
    spread = Z * wins.std().item() / math.sqrt(len(wins))
    story_loss = {who: stories_loss(one, dtype) for who, (one, _) in numbers.items()}
    return {
        "win_rate": wins.mean().item(),
        "win_low": wins.mean().item() - spread,
        "win_high": wins.mean().item() + spread,
        "ties": (wins == 0.5).double().mean().item(),
        "kl": kl[0],
        "kl_error": kl[1],
        "true_reward": rewards["policy"].mean().item(),
        "true_reward_reference": rewards["reference"].mean().item(),
        "fluency": story_loss["policy"] / story_loss["reference"],
        "stories": story_loss["policy"],
        "told": told(beginnings, said["policy"]),
        "told_reference": told(beginnings, said["reference"]),
        "n_comparison": len(wins),
    }


def told(beginnings: list[str], said: list[str]) -> float:
    """The share of answers that the grammar could have told after these beginnings."""
    good = [make_tales.log_prob(x + y) > -math.inf for x, y in zip(beginnings, said, strict=True)]
    return sum(good) / len(good)


@torch.no_grad()
def stories_loss(loaded: Loaded, dtype: torch.dtype) -> float:
    """Nats per token of whole stories of the base's grammar, which nobody was trained on."""
    device, tokenizer = next(loaded.model.parameters()).device, loaded.tokenizer
    texts = []
    for story in STORIES.read_text(encoding="utf-8").split(f"\n{text.SEPARATOR}\n"):
        if story:
            ids = [*tokenizer.encode_text(story), tokenizer.eos_id]
            texts.append(([tokenizer.bos_id], [ids]))
    nats, scorer = 0.0, AnswerScorer(loaded.model)
    for start in range(0, len(texts), 64):
        with hardware.autocast(device, dtype):
            sums, _ = scorer(*(x.to(device) for x in pack(texts[start : start + 64])))
        nats -= sums.sum().item()
    return nats / sum(len(ids[0]) for _, ids in texts)


def in_words(score: dict[str, float]) -> str:
    """The numbers of `compare`, two lines."""
    return (
        f"answers    {score['win_rate']:.1%} of {score['n_comparison']} comparisons with the "
        f"reference won ({score['win_low']:.1%} to {score['win_high']:.1%}), {score['ties']:.0%} "
        f"tied; KL {score['kl']:.2f} ± {score['kl_error']:.2f} nats; true reward "
        f"{score['true_reward_reference']:+.2f} → {score['true_reward']:+.2f}\n"
        f"fluency    the base's own stories cost {score['fluency']:.3f} × the reference's loss; "
        f"{score['told']:.0%} of the answers are in the grammar (reference "
        f"{score['told_reference']:.0%})"
    )
