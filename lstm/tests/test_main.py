"""The command line beyond what every folder has: classify, sample, eval, export, other tasks."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import checkpoint
import data
import reviews
import sample
import train
from model import SequenceConfig, SequenceModel
from options import UserError
from run import RunDirectory

TINY = ["--d-model", 6, "--d-embed", 5, "--steps", 3, "--batch-size", 4, "--dtype", "float32",
        "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def review_file(tmp_path_factory):
    """A hundred of our reviews in one file."""
    lines = (data.REVIEWS / "dev.tsv").read_text(encoding="utf-8").splitlines()[:100]
    file = tmp_path_factory.mktemp("reviews") / "some.tsv"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def classifier(command, review_file, tmp_path):
    """A small classifier, hardly trained."""
    out = tmp_path / "classifier"
    words = ["--train", "--task", "sentiment", "--data", review_file, "--out", out, *TINY]
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    return out


def last_json(outcome) -> dict:
    assert outcome.code == 0, outcome.err
    return json.loads(outcome.out.splitlines()[-1])


# ── Sentiment ─────────────────────────────────────────────────────────────────────────────────────


def test_sentiment_trains_scores_and_classifies(command, classifier, review_file):
    score = last_json(command("--eval", "--weights", classifier))
    assert score["task"] == "sentiment" and score["texts"] == 5 and score["bayes"] <= 1
    logged = RunDirectory(classifier).history()[-1]
    assert logged["split"] == "test" and logged["loss"] == pytest.approx(score["loss"], abs=1e-5)
    outcome = command("--classify", "the plot was a banana .", "--weights", classifier)
    lines = outcome.out.splitlines()
    assert len(lines) == 2 and "unknown    a, banana" in outcome.err
    assert sum(float(line.split()[0]) for line in lines) == pytest.approx(100, abs=0.2)


def test_sentiment_resumes_to_the_same_bits(command, classifier, review_file, tmp_path):
    words = ["--train", "--task", "sentiment", "--data", review_file, *TINY, "--word-drop", 0.2]
    assert command(*words, "--out", tmp_path / "whole", "--steps", 6, "--ema", 0.5).code == 0
    first = [*words, "--out", tmp_path / "half", "--steps", 6, "--ema", 0.5]
    import trainer

    usual = trainer.Trainer.step

    def dying(self, number):
        if number == 4:
            raise KeyboardInterrupt
        return usual(self, number)

    trainer.Trainer.step = dying
    try:
        command(*first, "--checkpoint-every", 2)
    finally:
        trainer.Trainer.step = usual
    assert command("--train", "--resume", "--out", tmp_path / "half").code == 0
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "half"))
    assert a.read_bytes() == b.read_bytes()


def test_labels_that_the_weights_do_not_know(command, classifier, tmp_path):
    file = tmp_path / "other.tsv"
    file.write_text("good\tyes\nbad\tno\n" * 20, encoding="utf-8")
    outcome = command("--eval", "--weights", classifier, "--data", file)
    assert "label 'no', the weights do not know" in outcome.complaint
    words = ["--train", "--task", "sentiment", "--data", file, "--weights", classifier]
    assert "--weights does not know" in command(*words, "--out", tmp_path / "x").complaint


def test_damaged_words_and_reviews_are_one_line(command, classifier):
    words = classifier / "tokenizer_words.json"
    good = words.read_text(encoding="utf-8")
    for bad in (
        "{}",
        '{"words": ["a"], "classes": [1]}',
        '{"words": ["a", "a"], "classes": ["0"]}',
    ):
        words.write_text(bad, encoding="utf-8")
        assert "damaged" in command("--classify", "x", "--weights", classifier).complaint
    words.write_text(good, encoding="utf-8")
    (classifier / "reviews.npz").write_bytes(b"PK nothing")
    outcome = command("--train", "--resume", "--out", classifier, "--steps", 4)
    assert "reviews.npz is damaged" in outcome.complaint


# ── Adding and copy ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task", ["adding", "copy"])
def test_dice_tasks_train_and_score(command, tmp_path, monkeypatch, task):
    import tasks

    monkeypatch.setattr(tasks, "N_TEST", 250)
    monkeypatch.setattr(tasks, "N_VALID", 250)
    out = tmp_path / task
    words = ["--train", "--task", task, "--seq-len", 12, "--chrono", 12, "--out", out]
    outcome = command(*words, *[w for w in TINY if w not in ("--d-embed", 5)])
    assert outcome.code == 0 and "remembers nothing" in outcome.err
    assert "on track" not in outcome.err
    score = last_json(command("--eval", "--weights", out))
    assert score["trivial"] == pytest.approx(data.trivial(task, 12)) and score["loss"] > 0
    longer = last_json(command("--eval", "--weights", out, "--seq-len", 30))
    assert longer["trivial"] == pytest.approx(data.trivial(task, 30))


# ── Language model ────────────────────────────────────────────────────────────────────────────────


def test_score_of_a_run_is_the_score_of_its_end(command, trained):
    out = trained()
    score = last_json(command("--eval", "--weights", out))
    logged = RunDirectory(out).history()[-1]
    assert logged["split"] == "test" and logged["loss"] == pytest.approx(score["loss"], abs=1e-5)
    assert score["last_tenth_nats_per_char"] > 0


def test_samples_go_on_from_the_prompt(command, trained):
    out = trained()
    words = ["--sample", "--weights", out, "--prompt", "Nora", "--max-new-tokens", 8]
    first, second = command(*words, "--num-samples", 2), command(*words, "--num-samples", 2)
    assert first.out == second.out and first.out.startswith("Nora") and "\n---\nNora" in first.out
    assert command(*words, "--num-samples", 2, "--seed", 1).out != first.out


def test_temperature_zero_takes_the_likeliest(sizes):
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 1.0, 0.0]])
    assert sample.choose(logits, 0.0, torch.Generator()).tolist() == [1, 0]
    drawn = torch.stack([sample.choose(logits, 1.0, torch.Generator().manual_seed(i))
                         for i in range(400)])  # fmt: skip
    share = (drawn[:, 0] == 1).float().mean().item()
    assert share == pytest.approx(logits[0].softmax(-1)[1].item(), abs=0.06)
    with pytest.raises(UserError, match="not finite"):
        sample.choose(logits * torch.nan, 1.0, torch.Generator())


def test_sampling_reads_each_token_once(sizes):
    """Token by token with the state gives what the whole text gives at once."""
    model = SequenceModel(sizes).double().eval()
    config = sample.SampleConfig(temperature=0.0, max_new_tokens=9)
    new = [row[0] for row in sample.generate(model, [3, 1, 4], config, seed=0)]
    text = [3, 1, 4]
    for token in new:
        logits, _ = model(torch.tensor([text]))
        assert logits[0, -1].argmax().item() == token
        text.append(token)


def test_classifier_cannot_write(command, classifier):
    assert "no language model" in command("--sample", "--weights", classifier).complaint
    outcome = command("--train", "--weights", classifier, "--out", classifier.parent / "x", *TINY)
    assert "are of --task sentiment" in outcome.complaint


def test_other_sizes_than_those_of_the_weights(command, trained, words):
    out = trained()
    line = command(
        "--train", *words[1:], "--d-model", 9, "--weights", out, "--out", out.parent / "x"
    )
    assert "--d-model 9: --weights bring 8" in line.complaint


def test_size_is_for_language_models(command):
    line = command("--train", "--task", "adding", "--size", "tiny").only_line
    assert "--size is for language models" in line


# ── The ecosystem ─────────────────────────────────────────────────────────────────────────────────


def test_export_is_loaded_by_torch_and_by_us(command, trained, tmp_path):
    out = trained()
    assert command("--weights", out, "--export", tmp_path / "theirs").code == 0
    state = safetensors.torch.load_file(tmp_path / "theirs" / "model.safetensors")
    ours = checkpoint.load(out)
    sizes = ours.model.config
    core = nn.LSTM(sizes.d_embed, sizes.d_model, sizes.n_layer, batch_first=True)
    core.load_state_dict({n[4:]: t for n, t in state.items() if n.startswith("rnn.")})
    tokens = torch.randint(sizes.vocab_size, (2, 9))
    y = core(nn.functional.embedding(tokens, state["embedding.weight"]))[0]
    expected = nn.functional.linear(y, state["head.weight"], state["head.bias"])
    assert (ours.model(tokens)[0] - expected).abs().max() < 1e-5
    again = checkpoint.load(tmp_path / "theirs")
    assert again.task == "lm" and (again.model(tokens)[0] - expected).abs().max() < 1e-5
    words = ["--sample", "--max-new-tokens", 5, "--seed", 3]
    one, other = (command(*words, "--weights", w).out for w in (out, tmp_path / "theirs"))
    assert one == other


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_file_of_a_torch_script_is_read(command, tmp_path, name):
    """As torch.save and safetensors write it, whatever the modules are called."""
    modules = nn.ModuleDict(
        {"wte": nn.Embedding(7, 4), "net": nn.GRU(4, 5), "out": nn.Linear(5, 7)}
    )
    state = modules.state_dict()
    save = torch.save if name.endswith("pt") else safetensors.torch.save_file
    save(state, tmp_path / name)
    loaded = checkpoint.load(tmp_path / name)
    assert loaded.task == "lm" and loaded.model.config.cell == "gru"
    assert "has no alphabet.json" in command("--sample", "--weights", tmp_path / name).complaint
    outcome = command("--weights", tmp_path / name, "--export", tmp_path / "out")
    assert outcome.code == 0, outcome.err


def test_tied_embeddings_are_stored_once_and_load(command, words, tmp_path):
    out = tmp_path / "tied"
    assert command(*words, "--tie-embeddings", "--d-embed", 8, "--out", out).code == 0
    state = safetensors.torch.load_file(out / "model.safetensors")
    assert "head.weight" not in state and "embedding.weight" in state
    model = checkpoint.load(out).model
    assert model.head.weight is model.embedding.weight


def test_alphabet_that_does_not_fit_is_refused(trained):
    out = trained()
    (out / "alphabet.json").write_text('{"kind": "characters", "alphabet": "ab"}', encoding="utf-8")
    with pytest.raises(UserError, match="5 words or letters, but weights for"):
        checkpoint.load(out)


# ── What ships ────────────────────────────────────────────────────────────────────────────────────


def test_shipped_classifier_reads_negation_and_contrast():
    """Three pairs of the same words in another order."""
    loaded = checkpoint.load(checkpoint.Path(data.HERE.parent / "pretrained" / "sentiment"))
    pairs = [
        ("the plot was not bad , and the cast was superb .",
         "the plot was bad , and the cast was not superb ."),
        ("the music was dull , but the ending was good .",
         "the music was good , but the ending was dull ."),
        ("although the music was awful , the plot was nice .",
         "the music was awful , although the plot was nice ."),
    ]  # fmt: skip
    for good, bad in pairs:
        assert sorted(reviews.words_of(good)) == sorted(reviews.words_of(bad))
        p = [loaded.model(torch.tensor([loaded.words.encode(t)]))[0].softmax(-1)[0, 1].item()
             for t in (good, bad)]  # fmt: skip
        assert p[0] > 0.7 and p[1] < 0.3, (good, p)


def test_shipped_language_model_is_near_the_floor(command):
    folder = data.HERE.parent / "pretrained" / "lm"
    score = last_json(command("--eval", "--weights", folder, "--task", "lm"))
    assert score["nats_per_char"] <= train.ON_TRACK * score["floor_nats_per_char"]


@pytest.mark.slow
def test_folder_alone_in_an_empty_place(tmp_path):
    """Copied without tests, runs and git, it still classifies."""
    import shutil

    folder = data.HERE.parent
    shutil.copytree(
        folder, tmp_path / "alone", ignore=shutil.ignore_patterns("tests", "runs", "__*")
    )
    done = subprocess.run(
        [sys.executable, "main.py", "--classify", "the plot was not bad ."],
        cwd=tmp_path / "alone", capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0 and "%" in done.stdout, done.stderr


def test_selfcheck(command):
    outcome = command("--selfcheck", "--device", "cpu")
    assert outcome.code == 0 and "FAIL" not in outcome.out and outcome.out.count("ok") >= 8


def test_bench_on_small_sizes(command, monkeypatch, tmp_path):
    import bench

    for name, value in {"T": 5, "B": 3, "H": 4, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "RESULT", tmp_path / "bench.json")
    monkeypatch.setattr("hardware.matmul_rate", lambda *_: 1e11)
    result = last_json(command("--bench", "--device", "cpu"))
    keys = {"train_vs_torch", "train_gru_vs_torch", "train_rnn_vs_torch", "packed_vs_torch"}
    assert keys <= result.keys() and all(result[key] > 0 for key in keys)


def test_answers_that_do_not_fit_the_task(command, words, tmp_path):
    line = command(*words, "--answer", "mean", "--out", tmp_path / "x").complaint
    assert "--answer mean does not fit --task lm" in line


def test_sequence_config_refuses_what_cannot_be():
    for wrong in ({"vocab_size": -1}, {}, {"vocab_size": 3, "n_answer": 0}):
        with pytest.raises(ValueError):
            SequenceConfig(**wrong)
