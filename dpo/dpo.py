"""Direct preference optimization: a language model learns which of two answers people prefer.

For a prompt x there is an answer y_w that was preferred (chosen) and one, y_l, that was not
(rejected). The model that learns is the policy π, what it was before is the reference π_ref. DPO
reads a reward off the two models,

    r̂(y) = β · log(π(y|x) / π_ref(y|x)),

and makes the chosen answer's reward larger than the other's by a logistic regression:

    L = −log σ(r̂(y_w) − r̂(y_l))

    DPO     Rafailov et al. 2023, arXiv:2305.18290, Eq. 7
    cDPO    Mitchell 2023, ericmitchell.ai/cdpo.pdf, Eq. 3: labels are wrong with probability ε
    rDPO    Chowdhury et al. 2024, arXiv:2403.00409, §3: unbiased under such labels
    IPO     Azar et al. 2023, arXiv:2310.12036, Eq. 17: a square in place of the logarithm
    hinge   Liu et al. 2023 (RSO), arXiv:2309.06657: SLiC's hinge (arXiv:2305.10425) on log-ratios
    KTO     Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7
    ORPO    Hong et al. 2024, arXiv:2403.07691, Eq. 4, 6 and 7: no reference
    SimPO   Meng et al. 2024, arXiv:2405.14734, Eq. 6: no reference, mean instead of sum

All log-probabilities are in nats. Key: B pairs, T tokens, V vocab_size. In tensors (B, 2) the
chosen answer is column 0, the rejected one column 1; (B, 3) has in column 2 an answer to another
prompt, which KTO alone looks at. This file imports torch alone.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOSSES = ("dpo", "cdpo", "rdpo", "ipo", "ipo-mean", "hinge", "kto", "orpo", "simpo")
NO_REFERENCE = ("orpo", "simpo")  # losses that never look at the reference


def response_logps(logits: Tensor, tokens: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """Σ log π(token | all before it) over the tokens of the responses: (B,), and how many: (B,).

    logits (B, T, V), tokens (B, T), is_response (B, T) of truth values: true at each token that the
    model answered, its end included, false at prompt and filling. logits[:, t] speaks about token
    t + 1. So the logits lose their last position, and tokens and mask both lose their first.
    Logits in 16 bits are summed in float32: a sum of −3000 in bfloat16 is off by whole nats.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = torch.log_softmax(logits[:, :-1], dim=-1, dtype=wide)  # (B, T − 1, V)
    logps = logps.gather(2, tokens[:, 1:, None]).squeeze(2)  # (B, T − 1)
    mask = is_response[:, 1:]
    return logps.masked_fill(~mask, 0.0).sum(dim=1), mask.sum(dim=1)


# ── The losses, per pair ──────────────────────────────────────────────────────────────────────────
# h is the log-ratio of the chosen answer minus that of the rejected one:
# h = log(π(y_w)/π_ref(y_w)) − log(π(y_l)/π_ref(y_l)), and β·h the difference of the rewards.


def dpo_loss(h: Tensor, beta: float) -> Tensor:
    """−log σ(β·h), Eq. 7 of DPO. ln 2 ≈ 0.693 where policy and reference are the same.

    Its gradient is −β·σ(−β·h)·(∇log π(y_w) − ∇log π(y_l)): pairs ranked wrongly count most.
    """
    return -F.logsigmoid(beta * h)


def cdpo_loss(h: Tensor, beta: float, flip: float) -> Tensor:
    """(1 − ε)·L(h) + ε·L(−h) with L of DPO: the best h is finite, β·h = log((1 − ε)/ε)."""
    return (1 - flip) * dpo_loss(h, beta) + flip * dpo_loss(-h, beta)


def rdpo_loss(h: Tensor, beta: float, flip: float) -> Tensor:
    """((1 − ε)·L(h) − ε·L(−h)) / (1 − 2ε): its mean over flipped labels is L of the true labels.

    (arXiv:2403.00409, §3; `robust` in TRL.) It has no lower bound: with few pairs, stop early.
    """
    return ((1 - flip) * dpo_loss(h, beta) - flip * dpo_loss(-h, beta)) / (1 - 2 * flip)


def ipo_loss(h: Tensor, beta: float) -> Tensor:
    """(h − 1/(2β))², Eq. 17 of IPO with β for its τ: a target for h, and no wish beyond it."""
    return (h - 1 / (2 * beta)).square()


def hinge_loss(h: Tensor, beta: float) -> Tensor:
    """max(0, 1 − β·h): nothing more to learn once the rewards differ by 1."""
    return torch.relu(1 - beta * h)


def kto_loss(ratios: Tensor, beta: float) -> Tensor:
    """½(1 − σ(β(w − z))) + ½(1 − σ(β(z − l))), Eq. 7 of KTO, both answers counted alike.

    ratios (B, 3): log π/π_ref of chosen w, rejected l, and of an answer to another prompt. z is the
    mean of the last, at least 0 and without gradient: an estimate of KL(π‖π_ref).
    """
    chosen, rejected, other = ratios.unbind(-1)
    z = other.mean().clamp(min=0).detach()
    return 1 - (torch.sigmoid(beta * (chosen - z)) + torch.sigmoid(beta * (z - rejected))) / 2


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 − p)) from log p ≤ 0, without losing digits near p = 0 or p = 1.

    A log p that was rounded to 0 counts as just below it: the odds and their gradient stay finite.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near_one = torch.log(-torch.expm1(logp.clamp(min=-math.log(2))))
    near_zero = torch.log1p(-torch.exp(logp.clamp(max=-math.log(2))))
    return logp - torch.where(logp > -math.log(2), near_one, near_zero)


def orpo_loss(means: Tensor, beta: float) -> Tensor:
    """−w − β·log σ(log odds of w − log odds of l), Eq. 4, 6, 7 of ORPO; its λ is our β.

    means (B, 2): log π per token of the chosen answer w and the rejected l. The first term imitates
    the chosen answer, so ORPO needs no SFT stage before it.
    """
    odds = log_odds(means)
    return -means[..., 0] - beta * F.logsigmoid(odds[..., 0] - odds[..., 1])


def simpo_loss(means: Tensor, beta: float, gamma: float) -> Tensor:
    """−log σ(β·(w − l) − γ), Eq. 6 of SimPO; means (B, 2) as in `orpo_loss`."""
    return -F.logsigmoid(beta * (means[..., 0] - means[..., 1]) - gamma)


def preference_loss(
    kind: str,
    policy: Tensor,
    reference: Tensor,
    lengths: Tensor,
    beta: float = 0.1,
    flip: float = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """The loss `kind`, one of LOSSES, of each pair: (B,).

    policy, reference: log π and log π_ref of the answers, (B, 2), or (B, 3) for KTO. lengths: their
    tokens, of the same shape. A reference of zeros is "reference-free": log-ratios become log π.
    flip is ε of cDPO and rDPO, gamma the margin of SimPO. ValueError for an unknown kind.
    """
    ratios = policy - reference
    h = ratios[..., 0] - ratios[..., 1]
    if kind in ("cdpo", "rdpo"):
        return (cdpo_loss if kind == "cdpo" else rdpo_loss)(h, beta, flip)
    if kind == "ipo-mean":  # log-ratios per token, as TRL has it: long answers count no more
        means = ratios / lengths
        return ipo_loss(means[..., 0] - means[..., 1], beta)
    if kind == "kto":
        return kto_loss(ratios, beta)
    if kind == "orpo":
        return orpo_loss(policy[..., :2] / lengths[..., :2], beta)
    if kind == "simpo":
        return simpo_loss(policy[..., :2] / lengths[..., :2], beta, gamma)
    simple = {"dpo": dpo_loss, "ipo": ipo_loss, "hinge": hinge_loss}
    if kind not in simple:
        raise ValueError(f"there is no loss {kind}, only {', '.join(LOSSES)}")
    return simple[kind](h, beta)


# ── What to look at ───────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def metrics(policy: Tensor, reference: Tensor, beta: float) -> dict[str, Tensor]:
    """What the log shows, each (B,). policy and reference as in `preference_loss`.

    reward_chosen, reward_rejected   r̂ = β·log(π/π_ref): β included, so that −log σ(margin) is L
    margin                           their difference
    accuracy                         1 where the margin is positive, ½ where it is 0 (a tie)
    logp_chosen, logp_rejected       log π of the answers
    """
    rewards = beta * (policy - reference)
    margin = rewards[..., 0] - rewards[..., 1]
    return {
        "reward_chosen": rewards[..., 0],
        "reward_rejected": rewards[..., 1],
        "margin": margin,
        "accuracy": (1 + margin.sign()) / 2,
        "logp_chosen": policy[..., 0],
        "logp_rejected": policy[..., 1],
    }


def monte_carlo_kl(policy: Tensor, reference: Tensor) -> tuple[float, float]:
    """KL(π‖π_ref) in nats per answer, and its standard error, from answers that π wrote.

    The mean of log π − log π_ref over samples of π; both (N,), of the same answers.
    """
    ratios = policy - reference
    return ratios.mean().item(), ratios.std().item() / math.sqrt(len(ratios))


def bradley_terry(gap: Tensor) -> Tensor:
    """p(y_1 preferred over y_2) = σ(r(y_1) − r(y_2)) (Bradley & Terry 1952)."""
    return torch.sigmoid(gap)


def bradley_terry_floor(gap: Tensor) -> Tensor:
    """The least loss that DPO can expect on a pair with this difference of true rewards.

    It is the entropy of the label, −p·log p − (1 − p)·log(1 − p): ln 2 for equally good answers,
    whose label is a coin toss, and near 0 where one is far better.
    """
    p = bradley_terry(gap)
    return -p * F.logsigmoid(gap) - (1 - p) * F.logsigmoid(-gap)
