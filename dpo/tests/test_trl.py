"""Every loss against the code of TRL, where it is installed.

TRL's trainers compute a loss from a model's log-probabilities inside of long methods. Here those
very methods run, with a stand-in for the model that gives made-up log-probabilities.
"""

import copy
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import dpo
from huggingface import their_config, to_their_names
from model import Llama
from packing import AnswerScorer, of_texts, pack

pytest.importorskip("trl")
import trl

B, WIDTH = 5, 9


class SameOnAllRanks:
    """What of an Accelerator the losses use, on one machine."""

    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def made_up(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities of tokens (rows, WIDTH − 1), mask of completions (rows, WIDTH))."""
    lengths = torch.randint(2, 6, (rows, 1))
    mask = (torch.arange(WIDTH) >= 3) & (torch.arange(WIDTH) < 3 + lengths)
    logps = -3 * torch.rand(rows, WIDTH - 1) * mask[:, 1:]
    return logps, mask.long()


class FakeModel(torch.nn.Module):
    """Answers each call with the next of its log-probabilities."""

    def __init__(self, *log_probs):
        super().__init__()
        self.log_probs = list(log_probs)

    def forward(self, **_):
        logps = self.log_probs.pop(0)
        like = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=like, mean_logits=like, is_top1=like.bool())


def stub(cls, **more):
    """An instance of a trainer that was never set up, with these attributes."""
    made = SimpleNamespace(accelerator=SameOnAllRanks(), _metrics={"train": defaultdict(list)},
                           aux_loss_enabled=False, precompute_ref_logps=False,
                           _total_train_tokens=0, _tp_size=1, **more)  # fmt: skip
    made.args = SimpleNamespace(gradient_checkpointing_kwargs=None)
    return made


def sums(logps: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ log π, tokens) of each row."""
    return logps.sum(1), mask.sum(1).float()


@pytest.fixture
def no_checkpointing(monkeypatch):
    """Their context manager wants a real model."""
    import contextlib

    import trl.trainer.dpo_trainer as theirs
    import trl.trainer.kto_trainer as other

    for module in (theirs, other):
        monkeypatch.setattr(
            module, "disable_gradient_checkpointing", lambda *_: contextlib.nullcontext()
        )


NAMES = {"dpo": "sigmoid", "rdpo": "robust", "ipo-mean": "ipo", "hinge": "hinge"}


@pytest.mark.parametrize("ours", NAMES)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_of_their_dpo_trainer(ours, beta, no_checkpointing):
    (policy, mask), (reference, _) = made_up(2 * B), made_up(2 * B)
    reference = reference * mask[:, 1:]
    trainer = stub(
        trl.DPOTrainer, beta=beta, label_smoothing=0.2, loss_types=[NAMES[ours]],
        loss_weights=[1.0], ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
        ref_model=FakeModel(reference), model=FakeModel(),
    )  # fmt: skip
    inputs = {"input_ids": torch.ones(2 * B, WIDTH, dtype=torch.long), "completion_mask": mask,
              "attention_mask": torch.ones(2 * B, WIDTH)}  # fmt: skip
    wanted = trl.DPOTrainer._compute_loss(trainer, FakeModel(policy), inputs, False)
    total, count = sums(policy, mask)
    pairs = [x.view(2, B).T for x in (total, reference.sum(1), count)]
    found = dpo.preference_loss(ours, *pairs, beta=beta, flip=0.2).mean()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
    shown, theirs = dpo.metrics(pairs[0], pairs[1], beta), trainer._metrics["train"]
    for our_name, their_name in (("reward_chosen", "rewards/chosen"), ("margin", "rewards/margins"),
                                 ("reward_rejected", "rewards/rejected"),
                                 ("accuracy", "rewards/accuracies"),
                                 ("logp_chosen", "logps/chosen")):  # fmt: skip
        assert shown[our_name].mean().item() == pytest.approx(theirs[their_name][0], abs=1e-5)


def test_plain_ipo_is_theirs_where_answers_have_one_token(no_checkpointing):
    policy, reference, ones = -torch.rand(B, 2), -torch.rand(B, 2), torch.ones(B, 2)
    both = [dpo.preference_loss(kind, policy, reference, ones, 0.3) for kind in ("ipo", "ipo-mean")]
    assert torch.equal(*both)


def test_kto_of_theirs(no_checkpointing):
    """Their batch is unpaired: here the chosen answers, then the rejected ones."""
    beta, (policy, mask), (reference, _) = 0.3, made_up(2 * B), made_up(2 * B)
    reference = reference * mask[:, 1:]
    (other, other_mask), (other_reference, _) = made_up(2 * B), made_up(2 * B)
    other_reference = other_reference * other_mask[:, 1:] * 3
    trainer = stub(
        trl.KTOTrainer, beta=beta, loss_type="kto", desirable_weight=1.0, undesirable_weight=1.0,
        calculate_KL=True, ref_model=FakeModel(other_reference, reference), model=FakeModel(),
    )  # fmt: skip
    trainer._compute_kl_logps = lambda *x: trl.KTOTrainer._compute_kl_logps(trainer, *x)
    ids = torch.ones(2 * B, WIDTH, dtype=torch.long)
    inputs = {"input_ids": ids, "completion_mask": mask, "attention_mask": ids,
              "KL_input_ids": ids, "KL_completion_mask": other_mask, "KL_attention_mask": ids,
              "label": torch.arange(2 * B) < B}  # fmt: skip
    wanted = trl.KTOTrainer._compute_loss(trainer, FakeModel(other, policy), inputs, False)
    ratios = (policy - reference).sum(1).view(2, B).T
    z = (other - other_reference).sum(1).mean()
    assert z > 0.1  # else it is clamped, and says nothing
    found = dpo.kto_loss(torch.cat((ratios, z.expand(B, 1)), 1), beta).mean()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_orpo_and_simpo_and_cdpo_of_theirs():
    """Their ORPO and CPO give a loss of each pair from log-probabilities."""
    orpo_trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    cpo_trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    means, beta = -3 * torch.rand(B, 2) - 0.01, 0.4
    lengths = torch.full((B, 2), 7.0)
    odds = orpo_trainer.odds_ratio_loss(stub(orpo_trainer, beta=beta), means[:, 0], means[:, 1])[0]
    ours = dpo.preference_loss("orpo", means * 7, means, lengths, beta)
    assert (ours - (-means[:, 0] - odds)).abs().max() < 1e-6
    simpo = stub(cpo_trainer, beta=beta, alpha=0.0, loss_type="simpo", simpo_gamma=0.5,
                 label_smoothing=0.0)  # fmt: skip
    wanted = cpo_trainer.cpo_loss(simpo, means[:, 0], means[:, 1])[0]
    ours = dpo.preference_loss("simpo", means * 7, means, lengths, beta, gamma=0.5)
    assert (ours - wanted).abs().max() < 1e-6
    # their CPO is reference-free: given log-ratios it is DPO, with label_smoothing cDPO
    ratios = torch.randn(B, 2)
    smooth = stub(cpo_trainer, beta=beta, alpha=0.0, loss_type="sigmoid", label_smoothing=0.2)
    wanted = cpo_trainer.cpo_loss(smooth, ratios[:, 0], ratios[:, 1])[0]
    ours = dpo.preference_loss("cdpo", ratios, torch.zeros(B, 2), lengths, beta, flip=0.2)
    assert (ours - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["dpo", "ipo-mean"])
def test_their_trainer_and_our_rows_agree_on_a_model(sizes, no_checkpointing, kind):
    """A policy and another reference, pairs of different lengths: the loss of TRL's own batch."""
    transformers = pytest.importorskip("transformers")
    texts = [([5, 0, 3], [[0, 7], [9, 9, 9, 1]]), ([8], [[4, 4, 4], [1]])]
    models, scorers = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        ours = Llama(sizes)
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**their_config(sizes)))
        theirs.load_state_dict(to_their_names(ours.state_dict()))
        models.append(theirs.double().eval())
        scorers.append(AnswerScorer(ours.double()))
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.utils import add_fused_lm_head

    for model in models:
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    rows = [{"prompt_ids": p, "chosen_ids": w, "rejected_ids": v} for p, (w, v) in texts]
    batch = DataCollatorForPreference(pad_token_id=0)(rows)
    trainer = stub(
        trl.DPOTrainer, beta=0.3, label_smoothing=0.0, loss_types=[NAMES[kind]], loss_weights=[1.0],
        ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False, ref_model=models[1],
        model=copy.copy(models[0]).train(),
    )  # fmt: skip
    wanted = trl.DPOTrainer._compute_loss(trainer, models[0], batch, False)
    packed = pack(texts)
    with torch.no_grad():
        policy, counts = (of_texts(x, packed)[:, :2] for x in scorers[0](*packed))
        reference = of_texts(scorers[1](*packed)[0], packed)[:, :2]
    found = dpo.preference_loss(kind, policy, reference, counts, 0.3).mean()
    assert found.item() == pytest.approx(wanted.item(), abs=1e-6)
