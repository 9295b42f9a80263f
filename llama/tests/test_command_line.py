"""`python main.py …` as a user types it: what it does, and one line for whatever cannot be done."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from conftest import FOLDER


@pytest.fixture
def ready(trained) -> Path:
    """A small run with weights."""
    return trained()


# ── What it does ──────────────────────────────────────────────────────────────────────────────────


def test_without_a_verb_it_says_what_there_is(command):
    outcome = command()
    assert outcome.code == 0 and outcome.err == ""
    for verb in ("--train", "--sample", "--eval", "--bench", "--figures", "--selfcheck"):
        assert f"main.py {verb} " in outcome.out


def test_train_says_what_it_does_and_leaves_a_run(command, small, text_file, tmp_path):
    outcome = command("--train", *small, "--data", text_file, "--out", tmp_path / "run")
    assert outcome.code == 0
    for word in ("device", "config", "parameters", "ln V", "step     1", "held out", "samples"):
        assert word in outcome.err
    names = {file.name for file in (tmp_path / "run").iterdir()}
    wanted = {"config.json", "log.jsonl", "model.safetensors", "checkpoint.pt", "samples.txt"}
    assert wanted <= names
    assert not [name for name in names if name.endswith(".part")]
    assert outcome.out.strip() in (tmp_path / "run" / "samples.txt").read_text(encoding="utf-8")


def test_parameter_counts_add_up(command, small, text_file, tmp_path):
    err = command("--train", *small, "--data", text_file, "--out", tmp_path / "run").err
    total, groups = re.search(r"parameters ([\d,]+): (.*)", err).groups()
    counts = {name: int(n.replace(",", "")) for name, n in re.findall(r"(\w+) ([\d,]+\d)", groups)}
    assert sum(counts.values()) == int(total.replace(",", ""))
    # 258·32; wqkv (4 + 2·2)·8·32 and wo 32·32; 3·48·32; three norms of 32
    assert counts == {"embedding": 8256, "attention": 3072, "ffn": 4608, "norm": 96}


def test_config_has_all_that_was_run(ready):
    config = json.loads((ready / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["d_ff"] == 48
    assert config["train"]["steps"] == 2
    assert config["versions"]["torch"] == torch.__version__


def test_sample_goes_on_from_the_prompt(command, ready):
    words = ["--weights", ready, "--prompt", "One day", "--max-new-tokens", 5]
    outcome = command("--sample", *words)
    assert outcome.code == 0
    assert outcome.out.startswith("One day") and outcome.out.endswith("\n")
    assert command("--sample", *words).out == outcome.out
    assert command("--sample", *words, "--seed", 1).out != outcome.out


def test_samples_stand_between_lines(command, ready):
    words = ["--weights", ready, "--prompt", "é", "--num-samples", 3, "--max-new-tokens", 2]
    outcome = command("--sample", *words)
    assert outcome.out.count("\n---\n") == 2
    assert all(part.startswith("é") for part in outcome.out.split("\n---\n"))


def test_temperature_zero_is_greedy(command, ready):
    words = ["--weights", ready, "--prompt", "One", "--max-new-tokens", 9, "--temperature", 0]
    assert command("--sample", *words, "--seed", 1).out == command("--sample", *words).out


def test_stop_text_ends_a_sample(command, ready):
    words = ["--weights", ready, "--prompt", "One", "--max-new-tokens", 30, "--temperature", 0]
    said = command("--sample", *words).out[len("One") :]
    stop = said[4:6]
    until = said[: said.index(stop)]
    assert command("--sample", *words, "--stop", stop).out == f"One{until}\n"


def test_eval_ends_with_json(command, ready, text_file):
    outcome = command("--eval", "--weights", ready, "--data", text_file)
    score = json.loads(outcome.out.splitlines()[-1])
    assert score["loss"] * score["tokens"] == pytest.approx(score["nats_per_char"] * score["chars"])
    logged = json.loads((ready / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert score["nats_per_char"] == pytest.approx(logged["nats_per_char"], rel=1e-5)


def test_eval_without_data_takes_that_of_the_run(command, ready, text_file):
    score = json.loads(command("--eval", "--weights", ready).out.splitlines()[-1])
    assert score["data"] == str(text_file)


def test_export_then_load_says_the_same(command, ready, tmp_path):
    pytest.importorskip("tokenizers")  # an exported folder has a tokenizer.json
    words = ["--prompt", "One", "--max-new-tokens", 8, "--temperature", 0]
    assert command("--weights", ready, "--export", tmp_path / "hf").code == 0
    there = command("--sample", "--weights", tmp_path / "hf", *words).out
    assert there == command("--sample", "--weights", ready, *words).out


def test_training_goes_on_from_given_weights(command, ready, small, text_file, tmp_path):
    """A run from a run: its first loss is that of the weights, not ln V + ½."""
    longer = tmp_path / "longer"
    words = [*small, "--data", text_file]
    command("--train", *words, "--out", ready, "--steps", 80, "--lr", 0.02, "--warmup", 5)
    outcome = command("--train", *words, "--weights", ready, "--out", longer)
    assert outcome.code == 0, outcome.err
    first = json.loads((longer / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["loss"] < 4.5


def test_paths_are_kept_whole_so_that_resume_works_from_elsewhere(
    command, small, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(text_file.parent)
    words = ["--train", *small, "--data", text_file.name, "--out", tmp_path / "run"]
    assert command(*words).code == 0
    monkeypatch.chdir(tmp_path)
    assert command("--train", "--resume", "--out", "run", "--steps", 3).code == 0


def test_newest_run_is_used_and_else_the_shipped_weights(command, ready, monkeypatch, tmp_path):
    import main

    monkeypatch.setattr(main, "HERE", tmp_path / "folder")
    shutil.copytree(ready, tmp_path / "folder" / "pretrained")
    assert "pretrained" in command("--sample", "--max-new-tokens", 1).err
    shutil.copytree(ready, tmp_path / "folder" / "runs" / "mine")
    assert str(Path("runs") / "mine") in command("--sample", "--max-new-tokens", 1).err


def test_bfloat16_samples_and_scores(command, ready):
    words = ["--weights", ready, "--dtype", "bfloat16"]
    assert command("--sample", *words, "--max-new-tokens", 3).code == 0
    assert command("--eval", *words).code == 0


def test_training_in_bfloat16_keeps_float32_weights(trained):
    out = trained("run", "--dtype", "bfloat16", "--checkpoint-every", 1)
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_folder_alone_in_an_empty_place_trains(tmp_path, small):
    """A copy of the folder without its neighbours, with the whole program and nothing patched."""
    ignore = shutil.ignore_patterns("runs", "tests", "__pycache__", "assets", ".*")
    copy = shutil.copytree(FOLDER, tmp_path / "alone", ignore=ignore)
    words = [sys.executable, "main.py", "--train", *small, "--steps", "2"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        words, cwd=copy, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert (copy / "runs" / "default" / "model.safetensors").exists()
    assert done.stdout.strip() and "step" not in done.stdout


# ── What it refuses: one line, exit code 2 ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trian"], "unrecognized arguments: --trian"),
        (["train"], "unrecognized arguments: train"),
        (["--train", "--step", "2"], "--step"),  # no guessing of shortened flags
        (["--train", "--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--train", "--steps"], "--steps: expected one argument"),
        (["--train", "--steps", "0"], "steps must be more than 0"),
        (["--train", "--batch-size", "-1"], "batch_size must be more than 0"),
        (["--train", "--micro-batch-size", "-1"], "micro_batch_size must not be negative"),
        (["--train", "--lr", "nan"], "lr must be more than 0, not nan"),
        (["--train", "--lr", "inf"], "lr must be more than 0, not inf"),
        (["--train", "--weight-decay", "-1"], "weight_decay must not be negative"),
        (["--train", "--seed", "-1"], "seed must not be negative"),
        (["--train", "--seed", "99999999999999999999999"], "seed"),
        (["--train", "--tokenizer", "words"], "invalid choice: 'words'"),
        (["--train", "--dtype", "float64"], "invalid choice: 'float64'"),
        (["--train", "--size", "huge"], "invalid choice: 'huge'"),
        (["--train", "--device", "mps"], "--device mps: this torch sees none here"),
        (["--train", "--n-head", "4", "--n-kv-head", "3"], "n_kv_head 3 does not divide n_head 4"),
        (["--train", "--d-head", "7"], "d_head 7 is odd"),
        (["--train", "--n-layer", "0"], "n_layer must be at least 1"),
        (["--train", "--seq-len", "0"], "seq_len must be at least 1"),
        (["--train", "--tokenizer", "sentencepiece", "--vocab-size", "50"], "--vocab-size 50"),
        (["--train", "--data", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["--train", "--weights", "nowhere"], "nowhere"),
        (["--resume"], "--resume goes with --train"),
        (["--sample", "--temperature", "-1"], "temperature must be 0 or more"),
        (["--sample", "--top-p", "0"], r"top_p must be in \(0, 1\]"),
        (["--sample", "--top-k", "-3"], "top_k must be 0 or more"),
        (["--sample", "--min-p", "2"], r"min_p must be in \[0, 1\]"),
        (["--sample", "--num-samples", "0"], "num_samples must be at least 1"),
        (["--sample", "--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["--sample", "--weights", "nowhere"], "nowhere: there is no such folder"),
        (["--eval", "--weights", "nowhere"], "nowhere: there is no such folder"),
        (["--weights", "nowhere", "--export", "x"], "nowhere: there is no such folder"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_words_that_cannot_be(command, small, text_file, tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "--train" in words:
        words = ["--train", *small, "--data", text_file, "--out", "run", *words[1:]]
    if "mps" in words and torch.backends.mps.is_available():
        pytest.skip("there is one here")
    assert re.search(message, command(*words).complaint)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def spoilt_text(kind: str, folder: Path) -> Path:
    """A --data that is wrong in the way that `kind` says."""
    file = folder / "text"
    content = {"empty": b"", "blank": b"\n", "Latin-1": "ça va".encode("latin-1") * 99,
               "short": b"Once.", "shorter than two rows": b"x" * 45}.get(kind)  # fmt: skip
    if kind in ("empty folder", "folder of nothing"):
        file.mkdir()
        if kind == "folder of nothing":
            (file / "a.txt").touch()
    else:
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "is empty"),
        ("blank", "is empty"),
        ("empty folder", "is empty"),
        ("folder of nothing", "is empty"),
        ("Latin-1", r"is not UTF-8 text \(at byte 0\)"),
        ("short", "--seq-len 24 needs 49 or more"),
        ("shorter than two rows", "--seq-len 24 needs 49 or more"),
    ],
)
def test_text_that_cannot_be_trained_on(command, small, tmp_path, kind, message):
    data = spoilt_text(kind, tmp_path)
    words = ["--train", *small, "--data", data, "--out", tmp_path / "run"]
    assert re.search(message, command(*words).complaint)


def test_hub_data_set_that_is_not_there(command, small, tmp_path):
    pytest.importorskip("datasets")
    words = ["--train", *small, "--data", f"hf:{tmp_path}/nothing", "--out", tmp_path / "run"]
    assert "cannot load --data hf:" in command(*words).complaint


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_out_that_is_a_file(command, small, text_file, tmp_path, inside):
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    words = ["--train", *small, "--data", text_file, "--out", tmp_path / "run" / inside]
    assert "cannot write a run to --out" in command(*words).complaint
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


def test_export_to_a_file(command, ready, tmp_path):
    (tmp_path / "there").touch()
    outcome = command("--weights", ready, "--export", tmp_path / "there")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "cannot write to --export" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "a file", "exported", "no checkpoint"])
def test_resume_of_nothing(command, ready, tmp_path, kind):
    out = tmp_path / "there"
    if kind == "empty folder":
        out.mkdir()
    elif kind == "a file":
        out.touch()
    elif kind == "exported":
        command("--weights", ready, "--export", out)
    elif kind == "no checkpoint":
        out = ready
        (out / "checkpoint.pt").unlink()
    assert "nothing to resume in" in command("--train", "--resume", "--out", out).complaint


@pytest.mark.parametrize(
    "words",
    [
        ["--seed", 1],
        ["--n-layer", 2],
        ["--lr", 0.5],
        ["--dtype", "bfloat16"],
        ["--tokenizer", "characters"],
        ["--batch-size", 8],
    ],
    ids=str,
)
def test_resume_as_another_run(command, ready, words):
    complaint = command("--train", "--resume", "--out", ready, *words).complaint
    assert words[0] in complaint and "leave it out" in complaint


def test_resume_with_the_same_flags_once_more(command, ready, small, text_file):
    words = ["--train", "--resume", "--out", ready, *small, "--data", text_file]
    assert command(*words).code == 0


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_the_bomb_does_go_off(tmp_path):
    """Else the next tests would show nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("as_torch", [True, False])
def test_checkpoint_with_code_in_it_does_not_run(command, ready, tmp_path, as_torch):
    bomb = {"model": Bomb(tmp_path / "marker")}
    if as_torch:
        torch.save(bomb, ready / "checkpoint.pt")
    else:
        (ready / "checkpoint.pt").write_bytes(pickle.dumps(bomb))
    complaint = command("--train", "--resume", "--out", ready).complaint
    assert "checkpoint.pt is damaged" in complaint
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("as_torch", [True, False])
def test_meta_weights_with_code_in_them_do_not_run(command, tmp_path, as_torch):
    bomb, folder = {"norm.weight": Bomb(tmp_path / "marker")}, tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(
        '{"n_heads": 2, "n_layers": 1, "norm_eps": 1e-5}', encoding="utf-8"
    )
    if as_torch:
        torch.save(bomb, folder / "consolidated.00.pth")
    else:
        (folder / "consolidated.00.pth").write_bytes(pickle.dumps(bomb))
    complaint = command("--sample", "--weights", folder).complaint
    assert "damaged or holds more than tensors" in complaint
    assert not (tmp_path / "marker").exists()


def test_truncated_checkpoint(command, ready):
    file = ready / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    assert "is damaged" in command("--train", "--resume", "--out", ready).complaint


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(file: Path, **changes) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content), encoding="utf-8")


def misshape(run: Path) -> None:
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    tensors["norm.weight"] = torch.ones(5)
    safetensors.torch.save_file(tensors, run / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: cut(run / "model.safetensors"), "model.safetensors is damaged"),
        (lambda run: (run / "model.safetensors").write_bytes(b"\x80\x04."), "is damaged"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors is missing"),
        (misshape, r"norm.weight is \(5,\), the configuration needs \(32,\)"),
        (lambda run: (run / "config.json").unlink(), "has no config.json"),
        (lambda run: cut(run / "config.json"), "config.json is damaged"),
        (lambda run: rewrite(run / "config.json", model={"d_head": 7}), "odd"),
        (lambda run: rewrite(run / "config.json", model={"d_hat": 7}), "d_hat"),
        (lambda run: (run / "alphabet.json").unlink(), "no tokenizer in"),
        (lambda run: (run / "alphabet.json").write_bytes(b"{"), "alphabet.json is damaged"),
    ],
    ids=["cut", "pickle", "no weights", "shape", "no config", "cut config", "odd", "unknown size",
         "no tokenizer", "cut tokenizer"],
)  # fmt: skip
def test_weights_that_cannot_be_loaded(command, ready, spoil, message):
    spoil(ready)
    assert re.search(message, command("--sample", "--weights", ready).complaint)


def test_damaged_sentencepiece_tokenizer(command, ready):
    (ready / "alphabet.json").unlink()
    (ready / "tokenizer.model").write_bytes(b"nonsense")
    assert "tokenizer.model is damaged" in command("--sample", "--weights", ready).complaint


def test_tokenizer_json_without_the_library(command, ready, monkeypatch):
    (ready / "alphabet.json").unlink()
    (ready / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in command("--sample", "--weights", ready).complaint


def test_tokens_of_a_run_that_are_gone(command, ready):
    (ready / "train.bin").unlink()
    assert "are damaged" in command("--train", "--resume", "--out", ready).complaint


def test_prompt_longer_than_the_context(command, ready):
    """The prompt itself has been shown by then; no word of the model's has."""
    outcome = command("--sample", "--weights", ready, "--prompt", "x" * 24)
    assert outcome.code == 2
    assert "--prompt: prompt of 25 tokens, context of 24" in outcome.err.splitlines()[-1]
    assert "Traceback" not in outcome.err


def test_loss_that_is_not_finite(command, small, text_file, tmp_path):
    words = ["--train", *small, "--data", text_file, "--out", tmp_path / "run"]
    outcome = command(*words, "--lr", 1e30, "--warmup", 0, "--steps", 9, "--checkpoint-every", 1)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    last = outcome.err.splitlines()[-1]
    assert re.search(r"error: the loss is (nan|inf) at step \d+: try --lr", last)
    assert str(tmp_path / "run" / "checkpoint.pt") in last
