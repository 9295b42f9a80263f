"""The news, their grammar, and pairs as rows of tokens."""

import json
import math
import random

import make_news
import make_stories
import pytest
import torch

import data
import judge
import loading
from data import Pair
from options import UserError
from text import IGNORE
from tokenizer import ByteTokenizer

TEXT = (
    " Juno found a red kite near the well. The kite rolled down the bank into the pond. The frog "
)
TEXT += "Sage dived into the pond and came up with the red kite. Juno and Sage shared a pear."
FACTS = ("Juno", "red", "kite")


# ── The grammar ───────────────────────────────────────────────────────────────────────────────────


def test_the_probability_of_one_text_by_hand():
    """3 verbs, 10 spots, 4 troubles, 3 ways, 4 places, 20 friends, 5 helpers, 2 deeds, 10 foods."""
    ways = 3 * 10 * 4 * 3 * 4 * 20 * 5 * 2 * 10
    assert make_news.log_prob(TEXT, FACTS) == pytest.approx(-math.log(ways), abs=1e-12)
    facts = 20 * 9 * 19
    assert make_news.log_prob(TEXT) == pytest.approx(-math.log(ways * facts), abs=1e-12)


@pytest.mark.parametrize(
    "change",
    [("frog", "owl"), ("Sage dived", "Juno dived"), ("the red kite", "the blue kite"),
     ("pond and came", "lake and came"), (" Juno found", "Juno found"), ("a pear.", "a pear"),
     ("and Sage", "and Uma"), ("near the well", "near the moon")],
)  # fmt: skip
def test_one_slip_is_no_news(change):
    assert change[0] in TEXT
    assert make_news.log_prob(TEXT.replace(*change)) == -math.inf


def test_style_and_obedience_are_two_things():
    """News of other facts than were asked for have the style, and do not do as asked."""
    asked = [Pair(make_news.instruction(f), "") for f in (FACTS, ("Leo", "red", "kite"))]
    assert judge.shares([TEXT, TEXT], asked) == {"style": 1.0, "asked": 0.5}
    assert judge.shares(["Once upon a time", TEXT], asked) == {"style": 0.5, "asked": 0.0}


def test_a_story_of_the_base_is_no_news():
    for story in data.STORIES.read_text(encoding="utf-8").split("\n<|endoftext|>\n")[:20]:
        assert make_news.log_prob(story) == -math.inf


def test_the_shipped_files_are_what_the_script_writes(monkeypatch, tmp_path):
    monkeypatch.setattr(make_news, "HERE", tmp_path)
    make_news.main()
    for name in ("news.jsonl", "stories_test.txt", "floor.json"):
        shipped = (data.FOLDER / name).read_bytes().replace(b"\r\n", b"\n")
        assert (tmp_path / name).read_bytes() == shipped


def test_instructions_are_read_back():
    for seed in range(50):
        facts = make_news.draw_facts(make_stories.Teller(random.Random(seed)).pick)
        assert make_news.read_facts(make_news.instruction(facts)) == facts
    for wrong in ("", "News of Juno", "News of Juno and a red:", "News of Juno and a red kite"):
        with pytest.raises(ValueError, match="asks for no news"):
            make_news.read_facts(wrong)


# ── Pairs to rows ─────────────────────────────────────────────────────────────────────────────────


def test_the_prompt_is_given_and_the_answer_learned():
    """bos a b | c d eos: the targets are c, d and eos, each beside the token before it."""
    tokenizer = ByteTokenizer()
    part = data.encode_part([Pair("ab", "cd"), Pair("", "x")], tokenizer, 20, "x")
    inputs, targets = part.rows([0, 1])
    a, b, c, d, x = (tokenizer.encode_text(letter)[0] for letter in "abcdx")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert inputs[0].tolist() == [bos, a, b, c, d]
    assert targets[0].tolist() == [IGNORE, IGNORE, c, d, eos]
    assert targets[1].tolist() == [x, eos, IGNORE, IGNORE, IGNORE]


def test_filling_changes_no_loss(base):
    """The same row alone and beside a longer one."""
    part = data.encode_part([Pair("a", "bc"), Pair("a", "b" * 30)], ByteTokenizer(), 40, "x")
    sums = []
    for rows in ([0], [0, 1]):
        inputs, targets = part.rows(rows)
        logits = base(inputs % 97)
        sums.append(torch.nn.functional.cross_entropy(
            logits[0], targets[0].clamp(max=96), ignore_index=IGNORE, reduction="sum"))  # fmt: skip
    assert sums[0].item() == pytest.approx(sums[1].item(), abs=1e-10)


def test_every_row_comes_once_an_epoch():
    pairs = [Pair("", letter) for letter in "abcdefghij"]
    part = data.encode_part(pairs, ByteTokenizer(), 5, "x")
    for seed in (0, 1):
        found = [part.training_rows(step, 5, seed)[1][:, 0].tolist() for step in range(4)]
        assert sorted(found[0] + found[1]) == sorted(found[2] + found[3])
        assert len(set(found[0] + found[1])) == 10
    assert not torch.equal(part.training_rows(0, 5, 0)[0], part.training_rows(0, 5, 1)[0])


def test_long_texts_go_on_in_the_next_row_and_long_answers_are_cut():
    tokenizer = ByteTokenizer()
    part = data.encode_part([Pair("", "abcdefghij")], tokenizer, 4, "x")
    learned = [t for i in range(len(part.bounds)) for row in [part.rows([i])[1]]
               for t in row[row != IGNORE].tolist()]  # fmt: skip
    assert learned == [*tokenizer.encode_text("abcdefghij"), tokenizer.eos_id]
    part = data.encode_part([Pair("ab", "cdefgh")], tokenizer, 4, "x")
    assert part.rows([0])[1].tolist() == [[IGNORE, IGNORE, *tokenizer.encode_text("cd")]]
    with pytest.raises(UserError, match="fills the context"):
        data.encode_part([Pair("abcdefgh", "i")], tokenizer, 4, "x")


def write(folder, *rows) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def test_files_of_pairs(tmp_path):
    """Both pairs of names, Alpaca's `input`, and texts without prompt."""
    rows = [{"prompt": "a", "response": "b"}, {"instruction": "c", "input": "d", "output": "e"},
            {"text": "f"}, {"instruction": "g", "input": "", "output": "h"}]  # fmt: skip
    parts = data.read_parts(write(tmp_path, *rows))
    assert [p for part in parts.values() for p in part] == [
        Pair("a", "b"), Pair("c\nd", "e"), Pair("", "f"), Pair("g", "h")]  # fmt: skip
    assert all(parts.values())


@pytest.mark.parametrize(
    ("row", "word"),
    [({"prompt": "a"}, "are needed, not prompt"), ([1], "are needed, not none"),
     ({"prompt": "a", "response": ""}, "response is empty"),
     ({"prompt": 1, "response": "b"}, "needed")],
)  # fmt: skip
def test_rows_that_are_no_pairs(tmp_path, row, word):
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(UserError, match=f"line 2.*{word}"):
        data.read_parts(write(tmp_path, good, row, good))


def test_files_that_cannot_be(tmp_path):
    good = {"prompt": "a", "response": "b"}
    with pytest.raises(UserError, match="too short"):
        data.read_parts(write(tmp_path, good, good))
    (tmp_path / "x.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="line 1 is no JSON"):
        data.read_parts(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        data.read_parts(str(tmp_path / "x.jsonl"))


def test_texts_have_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text(
        "one\n<|endoftext|>\ntwo\n<|endoftext|>\nthree", encoding="utf-8"
    )
    parts = data.read_parts(str(tmp_path / "a.txt"))
    assert [p for part in parts.values() for p in part] == [
        Pair("", "one"), Pair("", "two"), Pair("", "three")]  # fmt: skip


def test_tokens_of_a_run_come_back(tmp_path):
    parts = {part: data.encode_part([Pair("ab", "cd")] * n, ByteTokenizer(), 9, "x")
             for n, part in enumerate(("train", "valid", "test"), 1)}  # fmt: skip
    data.write_pairs(parts, tmp_path)
    again = data.load_pairs(tmp_path, 259)
    for part, pairs in parts.items():
        assert again[part].bounds == pairs.bounds and again[part].n_char == pairs.n_char
        assert (again[part].ids == pairs.ids).all()
    with pytest.raises(UserError, match="another tokenizer"):
        data.load_pairs(tmp_path, 50)
    (tmp_path / "valid.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="damaged"):
        data.load_pairs(tmp_path, 259)


def test_no_word_of_the_news_is_new_to_the_base():
    """Style without new words: nearly every token of an answer is in the base's own text."""
    tokenizer = loading.load_base("").tokenizer
    known = set(data.story_tokens(tokenizer).ids.tolist())
    lines = [json.loads(x) for x in data.NEWS.read_text(encoding="utf-8").splitlines()[:300]]
    used = {i for row in lines for i in tokenizer.encode_text(row["response"])}
    assert len(used - known) <= 0.02 * len(used)
