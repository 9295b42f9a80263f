"""main.py as a user meets it: smoke, one-line complaints, a copy of the folder elsewhere."""

import json
import shutil
import subprocess
import sys

import pytest

from conftest import HERE


def piko(*args, cwd=HERE, check=0):
    """Runs main.py; asserts the exit code and that no traceback is shown."""
    command = [sys.executable, "main.py", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_help_names_every_verb():
    text = piko().stdout
    for verb in ("--train", "--encode", "--decode", "--explain", "--eval", "--bench", "--export"):
        assert verb in text


def test_encode_and_decode_with_the_shipped_tokenizer():
    shipped = ("--weights", HERE / "pretrained")
    ids = piko("--encode", "Halo, dunia! 👋", *shipped).stdout
    assert [int(word) for word in ids.split()]
    assert piko("--decode", ids.strip(), *shipped).stdout == "Halo, dunia! 👋\n"
    assert "al o , ␣d" in piko("--encode", "Halo, dunia!", "--tokens", *shipped).stdout
    assert "merge" in piko("--explain", "perpustakaan", *shipped).stdout


def test_shipped_tokenizer_is_what_the_default_training_makes(tmp_path):
    piko("--train", "--out", tmp_path / "run")
    made = json.loads((tmp_path / "run/tokenizer.json").read_text(encoding="utf-8"))
    assert made == json.loads((HERE / "pretrained/tokenizer.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_train_eval_export(tmp_path, algorithm):
    out = tmp_path / "run"
    done = piko("--train", "--algorithm", algorithm, "--out", out)
    assert "on track" in done.stderr and done.stdout == ""
    names = {"config.json", "log.jsonl"}
    names.add("tokenizer.model" if algorithm == "unigram" else "tokenizer.json")
    assert {p.name for p in out.iterdir()} == names
    log = [json.loads(x) for x in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in log] == list(range(1, len(log) + 1))
    score = json.loads(piko("--eval", "--weights", out).stdout.splitlines()[-1])
    assert score["vocab_size"] == 2048 and score["bytes_per_token"] > 2
    piko("--weights", out, "--export", tmp_path / "x.json")
    text = "The librarian."
    old, new = (piko("--weights", w, "--encode", text).stdout for w in (out, tmp_path / "x.json"))
    assert old == new


def test_steps_and_resume(tmp_path):
    out = tmp_path / "run"
    piko("--train", "--steps", 2, "--out", out)
    assert len((out / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    piko("--train", "--resume", "--vocab-size", 300, "--out", out)
    whole = tmp_path / "whole"
    piko("--train", "--vocab-size", 300, "--out", whole)
    assert (out / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    done = piko("--train", "--resume", "--vocab-size", 300, "--out", out, check=2)
    assert "raise --vocab-size" in done.stderr
    assert len(piko("--train", "--algorithm", "unigram", "--steps", 1, "--out", out).stderr) > 0


def test_resuming_keeps_the_run_as_it_was(tmp_path):
    """Another algorithm or pattern is refused before anything is lost; --data is remembered."""
    out, data = tmp_path / "run", tmp_path / "t.txt"
    data.write_text("satu dua tiga\n" * 20, encoding="utf-8")
    piko("--train", "--pattern", "gpt2", "--data", data, "--steps", 2, "--out", out)
    before = (out / "tokenizer.json").read_bytes()
    for change in (("--algorithm", "unigram"), ("--pattern", "gpt4")):
        done = piko("--train", "--resume", *change, "--out", out, check=2)
        assert "leave them out" in done.stderr
    assert (out / "tokenizer.json").read_bytes() == before
    done = piko("--train", "--resume", "--out", out, "--encode", "tiga")
    assert f"data={data}" in done.stderr and len(done.stdout.split()) == 1
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["train"]["pattern"] == "gpt2"
    config["train"]["vocab_size"] = "many"
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "vocab_size cannot be many" in piko("--train", "--resume", "--out", out, check=2).stderr


def test_pages_and_colours(tmp_path):
    page = tmp_path / "page.html"
    done = piko("--encode", "a <b>", "--html", page, "--color", "--weights", HERE / "pretrained")
    assert "\x1b[" in done.stdout
    text = page.read_text(encoding="utf-8")
    assert "&lt;" in text and "<b>" not in text


def test_encode_file_equals_encode(tmp_path):
    text = "Satu dua.\r\n  tiga\n"
    (tmp_path / "t.txt").write_bytes(text.encode("utf-8"))
    shipped = ("--weights", HERE / "pretrained")
    a, b = piko("--encode-file", tmp_path / "t.txt", *shipped), piko("--encode", text, *shipped)
    assert a.stdout == b.stdout


@pytest.mark.parametrize(
    "args, name",
    [
        (["--nope"], "--nope"),
        (["--train", "--algorithm", "magic"], "magic"),
        (["--train", "--vocab-size", "10"], "10 is too small"),
        (["--train", "--vocab-size", "x"], "x"),
        (["--train", "--steps", "0"], "steps must be at least 1"),
        (["--train", "--data", "/nowhere"], "/nowhere"),
        (["--train", "--pattern", "("], "does not compile"),
        (["--resume"], "--train"),
        (["--encode", "a", "--encode-file", "b"], "--encode-file"),
        (["--encode", "a", "--weights", ""], "--weights is empty"),
        (["--decode", "1 x"], "whole numbers"),
        (["--decode", "999999"], "999999"),
        (["--weights", "/nowhere", "--encode", "a"], "/nowhere"),
        (["--encode-file", "/nowhere"], "/nowhere"),
        (["--export", "x.bin"], "must end in"),
        (["--export", "x.model"], "not bytes"),
        (["--export", "main.py/x.json"], "main.py"),
        (["--train", "--out", "main.py/x"], "main.py"),
        (["--train", "--out", ""], "--out is empty"),
        (["--train", "--resume", "--out", "runs/none"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_that_names_the_thing(args, name):
    done = piko(
        *args, *(() if "--weights" in args else ("--weights", HERE / "pretrained")), check=2
    )
    assert name in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith(
        "error: "
    )


def test_bad_data_files(tmp_path):
    for content, name in ((b"", "empty"), (b"\xff\xfe\x00a", "UTF-8"), (b" \n ", "empty")):
        (tmp_path / "t.txt").write_bytes(content)
        assert name in piko("--train", "--data", tmp_path / "t.txt", check=2).stderr
    (tmp_path / "t.txt").unlink()
    assert "no *.txt" in piko("--train", "--data", tmp_path, check=2).stderr
    blocked = tmp_path / "file"
    blocked.write_text("x", encoding="utf-8")
    assert str(blocked) in piko("--train", "--out", blocked / "run", check=2).stderr


def test_selfcheck():
    assert piko("--selfcheck").stdout.splitlines()[-1] == "this machine computes right"


def test_the_folder_alone_elsewhere(tmp_path):
    """Copied to an empty place, without tests and runs, it still trains and encodes."""
    ignore = shutil.ignore_patterns("runs", "tests", "__pycache__", ".*", "assets")
    home = tmp_path / "alone"
    shutil.copytree(HERE, home, ignore=ignore)
    piko("--train", "--steps", 5, cwd=home)
    assert "runs" in piko("--encode", "a", cwd=home).stderr
