"""The command line beyond what every folder has: --translate, --eval, --weights, --export."""

import io
import json
import sys

import harness
import pytest

import checkpoint
import data


@pytest.fixture
def stdin(monkeypatch):
    """`stdin(bytes)` is what standard input will hold."""

    def call(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))

    return call


def test_one_line_in_one_line_out(command, trained):
    out = trained()
    outcome = command("--translate", "The dog sleeps.", "--weights", out, "--max-new-tokens", 3)
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 1


def test_standard_input_line_by_line(command, trained, stdin):
    """Empty lines stay empty, the last line needs no end, and the order stays."""
    lines = ["The dog sleeps.", "", "A cat chases the monkeys.", "é ü"]
    stdin("\n".join(lines).encode())
    flags = ["--weights", trained(), "--max-new-tokens", 4]
    found = command("--translate", "-", *flags).out.split("\n")
    assert len(found) == 5 and found[1] == found[4] == ""
    for line, ours in zip(lines, found, strict=False):
        if line:
            assert command("--translate", line, *flags).out == ours + "\n"


def test_more_lines_than_one_batch(command, trained, stdin):
    stdin(b"The dog sleeps.\n" * 130)
    outcome = command(
        "--translate", "-", "--weights", trained(), "--beam", 1, "--max-new-tokens", 2
    )
    assert outcome.code == 0 and len(outcome.out.splitlines()) == 130


def test_standard_input_that_is_no_text(command, trained, stdin):
    stdin(b"\xff\xfe")
    assert "no UTF-8" in command("--translate", "-", "--weights", trained()).complaint


def test_nbest_has_scores(command, trained):
    flags = ["--weights", trained(), "--nbest", 3, "--max-new-tokens", 3]
    lines = command("--translate", "The dog sleeps.", *flags).out.splitlines()
    scores = [float(line.split("\t")[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)


def test_too_long_is_refused_or_cut_with_a_word(command, trained):
    text, flags = "dog " * 200, ["--weights", trained(), "--max-new-tokens", 2]
    assert "--too-long cut" in command("--translate", text, *flags).complaint
    outcome = command("--translate", text, *flags, "--too-long", "cut")
    assert outcome.code == 0 and "cut" in outcome.err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--beam", 0], "beam must be at least 1"), (["--nbest", 9], "nbest 9 is more than the beam"),
     (["--length-penalty", "nan"], "finite"), (["--steps", 3], "--steps changes nothing"),
     (["--data", "x"], "--data changes nothing")],
)  # fmt: skip
def test_words_that_do_not_go_with_translate(command, more, message):
    assert message in command("--translate", "a", *more).only_line


def test_eval_ends_with_json(command, trained, small_data):
    out = trained()
    outcome = command("--eval", "--weights", out)
    facts = json.loads(outcome.out.splitlines()[-1])
    assert {"bleu", "chrf", "loss", "perplexity", "pairs", "tokens"} <= facts.keys()
    assert facts["pairs"] == len(data.load(str(small_data)).test)


def test_eval_of_a_file_scores_all_of_it(command, trained, tmp_path):
    file = tmp_path / "two.tsv"
    file.write_text("A dog.\tSeekor anjing.\nA cat.\tSeekor kucing.\n", encoding="utf-8")
    outcome = command("--eval", "--weights", trained(), "--data", file)
    assert json.loads(outcome.out.splitlines()[-1])["pairs"] == 2


def test_exported_run_is_read_again(command, trained, tmp_path):
    out = trained()
    assert command("--weights", out, "--export", tmp_path / "theirs").code == 0
    flags = ["--translate", "The dog sleeps.", "--max-new-tokens", 4, "--weights"]
    ours, theirs = (command(*flags, folder).out for folder in (out, tmp_path / "theirs"))
    assert ours == theirs


def test_fine_tuning_a_marian_folder(command, trained, small_data, tmp_path):
    """Its subwords go with it: the run translates, resumes and exports by itself."""
    command("--weights", trained(), "--export", tmp_path / "theirs")
    words = ["--train", "--weights", tmp_path / "theirs", "--data", small_data, "--steps", 2,
             "--batch-size", 300, "--out", tmp_path / "tuned"]  # fmt: skip
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    flags = ["--max-new-tokens", 2, "--weights", tmp_path / "tuned"]
    assert command("--translate", "The dog sleeps.", *flags).code == 0
    assert command("--train", "--resume", "--out", tmp_path / "tuned", "--steps", 3).code == 0
    assert command("--weights", tmp_path / "tuned", "--export", tmp_path / "again").code == 0
    assert checkpoint.load(tmp_path / "again").subwords.vocab


def test_weights_and_other_sizes_are_refused(command, trained, small_data):
    words = ["--train", "--weights", trained(), "--data", small_data]
    assert "--n-layer 3" in command(*words, "--n-layer", 3).complaint
    assert "leave --size out" in command(*words, "--size", "base").complaint


def test_newest_run_is_found_when_nothing_is_said(command, monkeypatch, trained, tmp_path):
    import main

    out = trained("newest")
    monkeypatch.setattr(main, "HERE", tmp_path)
    (tmp_path / "runs").mkdir()
    out.rename(tmp_path / "runs" / "newest")
    outcome = command("--translate", "a", "--max-new-tokens", 2)
    assert f"weights    {tmp_path / 'runs' / 'newest'}" in outcome.err


def test_selfcheck_says_ok(command):
    outcome = command("--selfcheck")
    assert outcome.code == 0, outcome.err
    assert "BAD" not in outcome.out and outcome.out.count("ok ") >= 6


def test_selfcheck_finds_a_search_that_is_wrong(command, monkeypatch):
    """One that stops after its first step."""
    import decode

    monkeypatch.setattr(decode, "can_improve", lambda running, *_: running[:, 0] > 1)
    assert "exhaustive" in command("--selfcheck").complaint


def test_sharding_and_averaging_do_not_go_together(command, words, monkeypatch, tmp_path):
    import hardware

    monkeypatch.setattr(hardware, "distribute", lambda model, pieces, shard: model)
    outcome = command(*words, "--shard", "--out", tmp_path / "run")
    assert "add --average 1" in outcome.complaint


@pytest.mark.slow
@harness.gloo
def test_two_sharded_ranks_give_the_loss_curve_of_one(trained, words, tmp_path):
    flags = ["--steps", 4, "--batch-size", 5, "--eval-every", 1, "--average", 1]
    alone, out = trained("alone", *flags), tmp_path / "ranks"
    process = harness.torchrun(*words, "--out", out, *flags, "--shard", "--micro-batch-size", 2)
    _, err = process.communicate()
    assert process.returncode == 0, err
    for ours, expected in zip(harness.losses(out), harness.losses(alone), strict=True):
        assert ours[:2] == expected[:2] and ours[2] == pytest.approx(expected[2], abs=1e-4)
