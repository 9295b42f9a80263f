"""Two stages in one run, the reference between them, and folders of Hugging Face."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import safetensors.torch
import small
import torch
from hf_folder import TEMPLATE, write_llama

import checkpoint
import data
import dpo
import hardware
import main
import rows
import train
from options import UserError
from packing import AnswerScorer
from run import RunDirectory, read_json
from train import PreferenceTrainer, TrainConfig


@pytest.fixture
def make_trainer(small_data, tmp_path):
    """`make_trainer(option=value, …)`: a trainer on the small data, in float64, that writes."""

    def call(**options) -> PreferenceTrainer:
        given = {"data": str(small_data), "out": str(tmp_path / "run"), "steps": 6, "sft_steps": 0,
                 "batch_size": 4, "device": "cpu", "dtype": "float32", "warmup": 1,
                 "weights": small.FLAGS[1]}  # fmt: skip
        config = TrainConfig(**(given | options))
        start = train.load_start(config.weights)
        parts = train.encode_parts(config, start)
        run_dir = RunDirectory(config.out)
        run_dir.path.mkdir(exist_ok=True)
        hardware.seed_everything(0)
        return PreferenceTrainer(config, start.model.double(), parts, torch.float32, run_dir)

    return call


def test_the_first_step_of_preferences_costs_ln_2(make_trainer):
    for beta in (0.1, 2.0):
        numbers = make_trainer(beta=beta).step(0)
        assert numbers["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(numbers["margin"]) < 1e-6


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_reference_is_bit_equal_after_training_and_has_no_gradient(make_trainer, loss):
    """KTO asks the reference in each step; of the others' only its answers are kept."""
    trainer = make_trainer(lr=1e-2, loss=loss)
    before = {k: x.clone() for k, x in trainer.model.llama.state_dict().items()}
    kept = None
    for step in range(4):
        trainer.step(step)
        kept = kept or {part: x.clone() for part, x in trainer.reference.items()}
    if loss == "kto":
        for name, tensor in trainer.frozen.llama.state_dict().items():
            assert torch.equal(tensor, before[name].to(tensor.dtype)), name
        assert not any(p.requires_grad or p.grad is not None for p in trainer.frozen.parameters())
        assert not trainer.frozen.training
    else:
        assert trainer.frozen is None
    assert all(torch.equal(trainer.reference[part], x) for part, x in kept.items())
    learned = trainer.model.llama.state_dict()
    assert all(not torch.equal(learned[name], x) for name, x in before.items())
    file = safetensors.torch.load_file(trainer.run_dir.path / train.REFERENCE)
    assert all(torch.equal(x, before[name]) for name, x in file.items())


@pytest.mark.parametrize("loss", dpo.LOSSES)
def test_every_loss_overfits_one_batch(make_trainer, loss):
    """The margin of rewards becomes positive on the pairs that are learned."""
    options = {"flip": 0.1} if loss in ("cdpo", "rdpo") else {}
    options["lr"] = 1e-4 if loss == "ipo" else 1e-3  # a square of sums is steep: it would overshoot
    trainer = make_trainer(loss=loss, steps=30, batch_size=2, weights="", **options)
    train_part = trainer.parts_of_data["train"]
    train_part.pairs = train_part.pairs[:2]
    first = trainer.step(0)
    for step in range(1, 16 if loss == "ipo" else 8):
        last = trainer.step(step)
    assert last["loss"] < first["loss"] and last["margin"] > 0 and last["accuracy"] == 1


@pytest.mark.parametrize("loss", ["dpo", "ipo-mean", "orpo", "simpo"])
@pytest.mark.parametrize("sft_steps", [0, 6])
def test_micro_batches_and_packing_change_nothing(make_trainer, loss, sft_steps):
    """After a step in either stage the weights are the same, however the rows are laid."""
    weights = []
    for options in ({}, {"micro_batch_size": 1}, {"micro_batch_size": 3}, {"pack": 500},
                    {"pack": 300, "micro_batch_size": 1}):  # fmt: skip
        trainer = make_trainer(loss=loss, sft_steps=sft_steps, batch_size=5, **options)
        trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=1e-2)
        if sft_steps == 0:  # away from the point where all losses have one gradient
            trainer.settle_reference(0)
            trainer.reference["train"] -= torch.rand(len(trainer.reference["train"]), 1)
        trainer.step(0)
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters()]).detach())
    for other in weights[1:]:
        assert (other - weights[0]).abs().max() < 1e-9


def test_imitation_learns_from_the_answers_alone(make_trainer):
    """Its gradient is that of −log π of the answers / their tokens; prompts are given."""
    trainer = make_trainer(sft_steps=6, batch_size=4)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    part = trainer.parts_of_data["train"]
    numbers = part.numbers("demonstrations", 0, 4, 0)
    nats, n_token = 0.0, 0
    with torch.no_grad():
        for i in numbers:
            prompt, (answer,) = part.texts[i]
            tokens = torch.tensor([prompt + answer])
            said = torch.arange(tokens.shape[1])[None] >= len(prompt)
            total, count = dpo.response_logps(trainer.model.llama(tokens), tokens, said)
            nats, n_token = nats - total.item(), n_token + count.item()
    assert trainer.step(0)["loss"] == pytest.approx(nats / n_token, abs=1e-6)


def test_the_score_of_stage_1_is_worse_than_any_start_of_stage_2(make_trainer):
    for loss in dpo.LOSSES:
        trainer = make_trainer(loss=loss, sft_steps=3)
        trainer.model.eval()
        first = trainer.score()
        assert first["loss"] > train.start_loss(trainer.config) and "margin" not in first
        if loss in ("dpo", "cdpo", "rdpo", "ipo", "ipo-mean", "hinge"):
            trainer.settle_reference(3)
            assert trainer.score()["loss"] == pytest.approx(train.start_loss(trainer.config), 1e-5)


@pytest.mark.parametrize("nll", [1.0, 5.0])
def test_imitating_in_stage_2_does_not_hide_it(make_trainer, nll):
    """However large --nll is: else the run would keep the weights of stage 1 as its best."""
    trainer = make_trainer(nll=nll, sft_steps=3)
    trainer.model.eval()
    first = trainer.score()["loss"]
    trainer.settle_reference(3)
    assert trainer.score()["loss"] < first


def test_kto_is_scored_with_its_estimate_of_kl(make_trainer):
    """Log-ratios 3 of the chosen answer and 5 of the other: z is 5, and not 0 by a clamp."""
    trainer = make_trainer(loss="kto", beta=0.4)
    trainer.model.eval()
    trainer.settle_reference(0)
    trainer.reference["valid"] -= torch.tensor([3.0, 0.0, 5.0])
    good, bad = (1 / (1 + math.exp(-0.4 * x)) for x in (3 - 5, 5 - 0))
    assert trainer.score()["loss"] == pytest.approx(1 - (good + bad) / 2, abs=1e-5)


def test_limits_are_told_of_the_plain_loss_alone(make_trainer, monkeypatch, capsys):
    """With --nll or without reference the loss starts elsewhere, and the floor is another."""
    monkeypatch.setattr(data, "limits", lambda *_: {"floor": 0.4, "accuracy": 0.8})
    score = {"loss": 0.5, "accuracy": 0.7, "margin": 1.0, "reward_chosen": 0.0,
             "reward_rejected": -1.0}  # fmt: skip
    for options, told in (({}, True), ({"nll": 1.0}, False), ({"reference_free": True}, False),
                          ({"loss": "ipo"}, False)):  # fmt: skip
        trainer = make_trainer(**options)
        capsys.readouterr()
        train.expectations(trainer.config, trainer.parts_of_data)
        assert ("ln 2" in capsys.readouterr().err) == told
        assert ("floor" in train.describe(score, trainer.config, "test")) == told


def test_stage_2_begins_with_a_fresh_optimizer(make_trainer):
    """AdamW's means of stage 1 are of another loss: after a step they know stage 2 alone."""
    trainer = make_trainer(sft_steps=2)
    for step in range(3):
        trainer.step(step)
    assert all(state["step"] == 1 for state in trainer.optimizer.state.values())


def test_reference_free_leaves_the_reference_out(make_trainer):
    trainer = make_trainer(reference_free=True)
    part = trainer.parts_of_data["train"]
    policy = train.log_probabilities(trainer.model, part, torch.float32)[part.pairs]
    lengths = torch.ones(len(policy), 3)
    found = train.pair_numbers(policy, 0 * policy - 7, lengths, trainer.config)["loss"]
    wanted = dpo.dpo_loss(policy[:, 0] - policy[:, 1], trainer.config.beta)
    assert torch.equal(found, wanted)


def test_nll_adds_the_loss_of_the_chosen_answer(make_trainer):
    trainer = make_trainer(nll=0.3)
    policy, lengths = torch.tensor([[-4.0, -9.0]]), torch.tensor([[2.0, 3.0]])
    found = train.pair_numbers(policy, policy, lengths, trainer.config)["loss"]
    assert found.item() == pytest.approx(math.log(2) + 0.3 * 4 / 2, abs=1e-6)


def test_learning_rates_of_two_stages():
    config = TrainConfig(steps=100, sft_steps=40, warmup=4, lr=1e-3, sft_lr=5e-3)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(5e-3 / 4) and max(rates[:40]) > 4.9e-3
    assert rates[39] < 3e-4 and rates[40] == pytest.approx(1e-3 / 4)
    assert max(rates[40:]) <= 1e-3 and 0 < rates[99] < 5e-5


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_has_both_stages_and_its_reference(trained, every_step_is_logged):
    out = trained("run", "--steps", 6, "--sft-steps", 4)
    lines = [x for x in RunDirectory(out).history() if x["split"] == "train"]
    assert [x["margin"] == 0 for x in lines][:4] == [True] * 4
    assert lines[4]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (out / train.REFERENCE).exists() and read_json(out / "config.json")["train"][
        "sft_steps"
    ] == 4
    test = RunDirectory(out).history()[-1]
    assert test["split"] == "test" and {"accuracy", "margin", "logp_chosen"} <= test.keys()


@pytest.mark.parametrize("sft_steps", [0, 1])
def test_a_run_on_the_tales_may_have_stages_of_any_length(
    command, words, tmp_path, monkeypatch, sft_steps
):
    """Whether it is the run of the README is asked at its end, where a half is the default."""
    wins = dict.fromkeys(
        "win_rate win_low win_high ties kl kl_error true_reward true_reward_reference fluency told "
        "told_reference n_comparison".split(), 0.9,
    )  # fmt: skip
    monkeypatch.setattr(data, "limits", lambda *_: {"floor": 0.4, "accuracy": 0.8})
    monkeypatch.setattr(train.judge, "compare", lambda *_: wins)
    asked = []
    described = lambda config, *_: asked.append(config.sft_steps) or True  # noqa: E731
    monkeypatch.setattr(train, "as_described", described)
    outcome = command(*words, "--out", tmp_path / "run", "--sft-steps", sft_steps)
    assert outcome.code == 0 and "on track: 90.0% won" in outcome.err, outcome.err
    assert asked == [None if sft_steps == 1 else 0]


def test_a_run_is_scored_again_on_the_same_pairs(trained, command):
    """--eval leaves out the pairs that --max-length left out of the training."""
    out = trained("run", "--max-length", 85)
    test = RunDirectory(out).history()[-1]
    found = json.loads(command("--eval", "--weights", out).out.splitlines()[-1])
    assert found["loss"] == pytest.approx(test["loss"], abs=1e-6)
    assert found["logp_chosen"] == pytest.approx(test["logp_chosen"], abs=1e-4)


def test_stage_1_alone(trained, command):
    out = trained("run", "--steps", 3, "--sft-steps", 3)
    assert not (out / train.REFERENCE).exists()
    assert "imitation" in RunDirectory(out).history()[-1]
    assert command("--eval", "--weights", out).code == 0


def test_preferences_on_what_a_run_left(trained, command, words, tmp_path):
    """--weights RUN --sft-steps 0: the reference is that run, bit for bit."""
    first = trained("first", "--sft-steps", 2)
    outcome = command(*words, "--out", tmp_path / "second", "--weights", first, "--sft-steps", 0)
    assert outcome.code == 0, outcome.err
    ours, theirs = (safetensors.torch.load_file(file) for file in (
        tmp_path / "second" / train.REFERENCE, first / "model.safetensors"))  # fmt: skip
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_a_run_without_its_reference_says_so(half, command):
    (half / train.REFERENCE).unlink(missing_ok=True)
    config = read_json(half / "config.json")
    config["train"]["sft_steps"] = 1
    (half / "config.json").write_text(json.dumps(config), encoding="utf-8")
    outcome = command("--train", "--resume", "--out", half)
    assert "reference.safetensors is missing" in outcome.complaint


@pytest.mark.parametrize("loss", ["kto", "orpo", "ipo-mean"])
def test_other_losses_resume_to_the_bit(command, words, tmp_path, loss, monkeypatch):
    import harness

    flags = ["--loss", loss, "--steps", 5, "--sft-steps", 2, "--checkpoint-every", 1, "--ema", 0.5]
    assert command(*words, "--out", tmp_path / "a", *flags).code == 0
    with monkeypatch.context() as patch, pytest.raises(harness.Killed):
        harness.kill_at(patch, 4)
        command(*words, "--out", tmp_path / "b", *flags)
    assert command("--train", "--resume", "--out", tmp_path / "b").code == 0
    assert harness.weights(tmp_path / "a") == harness.weights(tmp_path / "b")


def test_eval_of_what_ships(command):
    outcome = command("--eval", "--weights", main.PRETRAINED)
    found = json.loads(outcome.out.splitlines()[-1])
    assert outcome.code == 0 and found["win_rate"] >= 0.8 and found["fluency"] < 1.05
    assert found["accuracy"] > 0.7 and found["data"] == "tales"


def test_chat_answers_each_line(command, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{main.PROMPT}\n\n"))
    outcome = command("--chat", "--weights", main.PRETRAINED, "--temperature", 0)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1
    assert "Ada" in outcome.out


# ── Folders of Hugging Face, real forms of data ───────────────────────────────────────────────────


def write_pairs(file: Path, form: str) -> Path:
    """Twenty pairs: who is polite is preferred."""
    records = []
    for i in range(20):
        asked, good, bad = f"What is {i} and 1?", f"It is {i + 1}.", f"It is {i + 1}, you fool."
        if form == "alpaca":
            records.append({"instruction": asked, "input": "", "chosen": good, "rejected": bad})
        else:
            said = [{"role": "assistant", "content": text} for text in (good, bad)]
            records.append({"prompt": [{"role": "user", "content": asked}], "chosen": said[:1],
                            "rejected": said[1:]})  # fmt: skip
    lines = map(json.dumps, records)
    text = f"[{','.join(lines)}]" if form == "alpaca" else "\n".join(lines)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("form", ["alpaca", "conversations"])
def test_a_llama_of_hugging_face_learns_real_forms(command, tmp_path, form, monkeypatch):
    """Train, test on the held-out tenth, talk, export, and load that in transformers."""
    import io

    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "llama"
    write_llama(folder, ["What is 1 and 1? It is 2, you fool."], TEMPLATE)
    file = write_pairs(tmp_path / "pairs.json", form)
    words = ["--train", "--weights", folder, "--data", file, "--out", tmp_path / "run",
             "--steps", 40, "--sft-steps", 20, "--batch-size", 8, "--lr", 3e-3, "--device", "cpu",
             "--dtype", "float32"]  # fmt: skip
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    test = RunDirectory(tmp_path / "run").history()[-1]
    assert test["accuracy"] == 1 and test["margin"] > 0.5 and test["loss"] < math.log(2)
    assert "accuracy 100.0%" in outcome.err
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3 and 1?\n"))
    outcome = command("--chat", "--weights", tmp_path / "run", "--max-new-tokens", 4)
    assert outcome.code == 0, outcome.err
    assert command("--weights", tmp_path / "run", "--export", tmp_path / "out").code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = checkpoint.load(tmp_path / "run")
    ids = ours.tokenizer.encode("What is 3")
    assert (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("What is 3")["input_ids"]
        == ids
    )
    with torch.no_grad():
        difference = theirs(torch.tensor([ids])).logits - ours.model(torch.tensor([ids]))
    assert difference.abs().max() < 1e-4


SHARED = os.environ.get("PIKO_SHARED_DATA", "")


@pytest.mark.skipif(not SHARED, reason="PIKO_SHARED_DATA names no folder with preferences/")
def test_real_preferences_are_read_whole():
    parts = data.read_parts(f"{SHARED}/preferences/instruction_pairs.json")
    n = [len(parts[part]) for part in data.PARTS]
    assert sum(n) > 1000 and n[2] == pytest.approx(sum(n) / 10, abs=2)


def test_pairs_that_do_not_fit_are_left_out_and_counted(small_data, capsys):
    config = TrainConfig(data=str(small_data), max_length=80)
    parts = train.encode_parts(config, train.load_start(""))
    n = sum(len(part.texts) for part in parts.values())
    assert 0 < n < 30 and f"{30 - n} of 30 examples" in capsys.readouterr().err
    with pytest.raises(UserError, match="fill the context of 9 tokens"):
        train.encode_parts(dataclasses.replace(config, max_length=9), train.load_start(""))


def test_log_probabilities_are_those_of_rows_of_their_own(small_data):
    start = train.load_start("")
    part = train.encode_parts(TrainConfig(data=str(small_data)), start)["train"]
    model = start.model.double()
    found = train.log_probabilities(AnswerScorer(model), part, torch.float32)
    for i in part.pairs[:5]:
        prompt, answers = part.texts[i]
        for j, answer in enumerate(answers):
            tokens = torch.tensor([prompt + answer])
            said = torch.arange(tokens.shape[1])[None] >= len(prompt)
            with torch.no_grad():
                wanted = dpo.response_logps(model(tokens), tokens, said)[0].item()
            assert found[i, j].item() == pytest.approx(wanted, abs=1e-4)
    assert isinstance(part, rows.Examples) and (found[part.demonstrations[0]] == 0).all()
