"""Records of all forms, what is wrong with others, and how they become tokens."""

import json

import pytest
import torch

import chat
import data
import rows
from data import Example, example_of
from options import UserError
from packing import length
from tokenizer import ByteTokenizer

USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (
    ("user", "Hi"), ("assistant", "Hello!"), ("assistant", "Go away.")))  # fmt: skip
WANTED = Example([USER], ([GOOD], [BAD]))


# ── Forms ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "Hi"}],
         "chosen": {"from": "gpt", "value": "Hello!"},
         "rejected": {"from": "gpt", "value": "Go away."}},
    ],
    ids=["TRL", "TRL, one message", "TRL, prompt inside", "ShareGPT"],
)  # fmt: skip
def test_conversations_of_all_forms(record):
    assert example_of(record, "x") == WANTED


def test_texts_of_all_forms():
    plain = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert example_of(plain, "x") == Example("a", ("b", "c"))
    alpaca = {"instruction": "a", "input": "d", "output": "e", "chosen": "b", "rejected": "c"}
    assert example_of(alpaca, "x") == Example("a\nd\n", ("b", "c"))
    assert example_of(alpaca | {"input": ""}, "x") == Example("a\n", ("b", "c"))
    for name in ("completion", "response"):
        assert example_of({"prompt": "a", name: "b"}, "x") == Example("a", ("b",))
    assert example_of({"instruction": "a", "output": "b"}, "x") == Example("a\n", ("b",))
    assert example_of({"prompt": [USER], "completion": [GOOD]}, "x") == Example([USER], ([GOOD],))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1], "an object was expected, not [1]"),
        ({}, "are needed, not none"),
        ({"prompt": "a"}, "are needed, not prompt"),
        ({"prompt": "a", "chosen": "b"}, "there is chosen, but no rejected"),
        ({"prompt": "a", "rejected": "b", "chosen": None}, "there is rejected, but no chosen"),
        ({"chosen": "b", "rejected": "c"}, "there is no prompt"),
        ({"prompt": 1, "chosen": "b", "rejected": "c"}, "prompt is no text and no list"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        ({"prompt": "a", "chosen": " ", "rejected": "c"}, "an answer is empty"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "must both be texts"),
        ({"prompt": [{"role": "user"}], "chosen": [GOOD], "rejected": [BAD]},
         "prompt, message 1 has no text"),
        ({"prompt": [{"role": "king", "content": "x"}], "chosen": [GOOD], "rejected": [BAD]},
         "prompt, message 1 has no role that is known, but king"),
        ({"prompt": [7], "chosen": [GOOD], "rejected": [BAD]}, "prompt, message 1 is no object"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "one message of the assistant"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "chosen is no text"),
        ({"instruction": 1, "chosen": "b", "rejected": "c"}, "must be texts"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_a_malformed_record_is_named(tmp_path, record, words, form):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file = tmp_path / f"x.{form}"
    records = [good, record, good]
    lines = "\n".join(map(json.dumps, records)) if form == "jsonl" else json.dumps(records)
    file.write_text(lines, encoding="utf-8")
    place = "line 2" if form == "jsonl" else "record 2"
    with pytest.raises(UserError) as error:
        data.read_parts(str(file))
    assert f"{file}, {place}: " in str(error.value) and words in str(error.value)


def test_files_that_cannot_be(tmp_path):
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    two = f"{good}\n{good}".encode()
    for content, words in ((b"{", "line 1 is no JSON"), (b"[1", "is no JSON"), (b"\xff", "UTF-8"),
                           (two, "too short"), (b"", "too short")):  # fmt: skip
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=words):
            data.read_parts(str(tmp_path / "x.jsonl"))
    with pytest.raises(UserError, match="is no file"):
        data.read_parts(str(tmp_path))


def test_a_line_ends_at_its_newline_alone(tmp_path):
    """JSON may hold U+2028 and U+0085 as they are, which `splitlines` takes for ends of lines."""
    pair = {"prompt": "a\u2028b\u0085c", "chosen": "b", "rejected": "c"}
    lines = [json.dumps(pair, ensure_ascii=False) for _ in range(3)]
    file = tmp_path / "x.jsonl"
    file.write_bytes("\r\n".join(lines).encode())
    assert [x.prompt for part in data.read_parts(str(file)).values() for x in part] == [
        pair["prompt"]
    ] * 3


def test_pairs_of_equal_answers_are_left_out_and_counted(tmp_path, capsys):
    records = [{"prompt": f"p{i}", "chosen": "b", "rejected": "b" * (1 + i % 4)} for i in range(12)]
    (tmp_path / "x.json").write_text(json.dumps(records), encoding="utf-8")
    parts = data.read_parts(str(tmp_path / "x.json"))
    assert sum(map(len, parts.values())) == 9
    assert "left out   3 pairs" in capsys.readouterr().err


def test_a_hub_data_set_from_a_local_copy(tmp_path):
    datasets = pytest.importorskip("datasets")
    pairs = [{"prompt": f"p{i}", "chosen": "b", "rejected": "c"} for i in range(10)]
    datasets.Dataset.from_list(pairs).to_parquet(tmp_path / "train.parquet")
    parts = data.read_parts(f"hf:{tmp_path}")
    assert [len(parts[part]) for part in data.PARTS] == [8, 1, 1]
    with pytest.raises(UserError, match="cannot load --data hf:"):
        data.read_parts(f"hf:{tmp_path}/nowhere")


def test_a_tenth_of_either_kind_is_held_out_and_no_text_is_in_two_parts(tmp_path):
    records = [{"prompt": f"d{i}", "completion": "x"} for i in range(20)]
    records += [{"prompt": f"p{i}", "chosen": "b", "rejected": "c"} for i in range(30)]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    parts = data.read_parts(str(file))
    kinds = [[len(x.answers) for x in parts[part]] for part in data.PARTS]
    assert [(k.count(1), k.count(2)) for k in kinds] == [(16, 24), (2, 3), (2, 3)]
    prompts = [x.prompt for part in data.PARTS for x in parts[part]]
    assert sorted(prompts) == sorted(r["prompt"] for r in records)


# ── Templates and tokens ──────────────────────────────────────────────────────────────────────────


def test_plain_conversations_by_hand():
    tokenizer = ByteTokenizer()
    system = {"role": "system", "content": "Be kind."}
    prompt, answer = chat.texts_of([system, USER], [GOOD], tokenizer)
    assert prompt == "System: Be kind.\nUser: Hi\nAssistant:" and answer == " Hello!"
    text = rows.encode(WANTED, tokenizer, 99)
    assert tokenizer.decode(text[0] + text[1][0]) == "User: Hi\nAssistant: Hello!"


def test_exactly_one_bos_and_one_eos():
    tokenizer = ByteTokenizer()
    ids = chat.prompt_ids("ab", tokenizer)
    assert ids == [256, 97, 98]
    assert chat.answer_ids("c", tokenizer) == [99, 257]
    tokenizer.encode_text = lambda text: [256, 97] if text == "p" else [99, 257, 10, 257]
    assert chat.prompt_ids("p", tokenizer) == [256, 97]  # the template had one already
    assert chat.answer_ids("a", tokenizer) == [99, 257]  # and what follows the end is no answer


def test_a_tokenizer_without_bos_and_eos():
    tokenizer = ByteTokenizer()
    tokenizer.bos_id = tokenizer.eos_id = None
    assert chat.prompt_ids("a", tokenizer) == [97] and chat.answer_ids("b", tokenizer) == [98]


def test_the_boundary_is_one_of_tokens():
    """Prompt and answer apart are the input, also where their letters would merge into a token."""
    tokenizer = data_tokenizer()
    whole = tokenizer.encode_text("One day")
    text = rows.encode(Example("One d", ("ay", "og")), tokenizer, 99)
    assert text[0] + text[1][0] == [1, *tokenizer.encode_text("One d"),
                                    *tokenizer.encode_text("ay"), tokenizer.eos_id]  # fmt: skip
    assert text[0][1:] + text[1][0][:-1] != whole  # here they would have merged


def data_tokenizer():
    import train

    return train.load_start("").tokenizer


def test_truncation_keeps_a_token_of_the_answer_or_drops_the_pair():
    tokenizer = ByteTokenizer()

    def encode(*texts, longest):
        return rows.encode(Example(texts[0], texts[1:]), tokenizer, longest)

    assert encode("ab", "cd", "ef", longest=4) == ([256, 97, 98], [[99], [101]])
    assert encode("ab", "cd", "ef", longest=3) is None
    assert encode("ab", "cd", "cf", longest=4) is None  # the same, once they are cut
    assert encode("ab", "cd", "cf", longest=6) == ([256, 97, 98], [[99, 100, 257], [99, 102, 257]])


def test_templates_of_hugging_face(tmp_path):
    """Prompt and whole as transformers renders them, and ids with one bos and one eos."""
    transformers = pytest.importorskip("transformers")
    from hf_folder import TEMPLATE, write_llama

    from tokenizer import load_tokenizer

    write_llama(tmp_path / "llama", ["Hi Hello Go away"], TEMPLATE)
    tokenizer = load_tokenizer(tmp_path / "llama")
    chat.adopt_template(tokenizer, tmp_path / "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    turns = [USER, GOOD, {"role": "user", "content": "And now?"}]
    prompt, answer = chat.texts_of(turns, [BAD], tokenizer)
    render = lambda messages, more: theirs.apply_chat_template(  # noqa: E731
        messages, tokenize=False, add_generation_prompt=more
    )
    assert prompt == render(turns, True) and prompt + answer == render([*turns, BAD], False)
    text = rows.encode(Example(turns, ([GOOD], [BAD])), tokenizer, 99)
    whole = theirs.apply_chat_template([*turns, BAD], return_dict=True)["input_ids"]
    assert text[0] + text[1][1] == whole
    assert text[0].count(tokenizer.bos_id) == 1 and text[1][1].count(tokenizer.eos_id) == 1
    with pytest.raises(UserError, match="the chat template does not take"):
        chat.render("{{ raise_exception('no') }}", turns, tokenizer, True)
    tokenizer.settings["chat_template"] = "{{ messages|length }}"
    with pytest.raises(UserError, match="writes a prompt otherwise"):
        chat.texts_of(turns, [BAD], tokenizer)


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def examples():
    """Twelve texts to imitate and twenty-one pairs, of many lengths."""
    dice = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        n = int(torch.randint(1, 20, (), generator=dice))
        return torch.randint(9, (n,), generator=dice).tolist()

    alone = [(ids(), [ids()]) for _ in range(12)]
    return rows.Examples(alone + [(ids(), [ids(), ids()]) for _ in range(21)])


@pytest.mark.parametrize("kind", ["demonstrations", "pairs"])
def test_every_text_comes_once_an_epoch(examples, kind):
    for seed in (0, 1):
        n_batch = len(examples.epoch(kind, 0, 4, seed))
        for epoch in range(3):
            steps = range(epoch * n_batch, (epoch + 1) * n_batch)
            seen = [i for step in steps for i in examples.numbers(kind, step, 4, seed)]
            assert sorted(seen) == getattr(examples, kind)
    assert examples.numbers(kind, 3, 4, 0) != examples.numbers(kind, 3, 4, 1)


@pytest.mark.parametrize("n", [3, 16, 17, 81, 160, 161, 240])
def test_no_batch_is_nearly_empty(n):
    """As 81 texts in batches of 5 would leave one over: then a second rank had nothing to do."""
    texts = rows.Examples([([1] * (1 + i % 7), [[2], [3]]) for i in range(n)])
    sizes = [len(batch) for batch in texts.epoch("pairs", 0, 5, 0)]
    assert sum(sizes) == n and max(sizes) <= 5 and min(sizes) >= min(n, 3)


def test_batches_are_of_similar_length(examples):
    spreads = []
    for batch in examples.epoch("pairs", 0, 3, 0):
        sizes = [length(examples.texts[i]) for i in batch]
        spreads.append(max(sizes) - min(sizes))
    assert max(spreads) < 20 and sum(spreads) / len(spreads) < 8


def test_kto_sees_the_answer_of_another_prompt(examples):
    packed = examples.packed([20, 15, 30], "pairs", 0, 3)
    for row, number in enumerate((30, 20, 15)):
        found = packed.tokens[row][packed.answer[row] == 3].tolist()
        assert found == examples.texts[number][1][0]
    assert int(examples.packed([20, 15], "pairs", 0, 2).answer.max()) == 2
    for number, other in ((20, 19), (examples.pairs[0], examples.pairs[-1])):  # alone in a list
        packed = examples.packed([number], "pairs", 0, 3)
        assert packed.tokens[packed.answer == 3].tolist() == examples.texts[other][1][0]


def test_without_demonstrations_the_chosen_answers_are_imitated(examples):
    alone = rows.Examples([text for text in examples.texts if len(text[1]) == 2])
    packed = alone.packed([3], "demonstrations", 0, 1)
    assert packed.tokens[0][packed.answer[0] == 1].tolist() == alone.texts[3][1][0]
    assert int(packed.answer.max()) == 1


def test_tokens_of_a_run_come_back(examples, tmp_path):
    parts = dict.fromkeys(data.PARTS, examples)
    rows.write_examples(parts, tmp_path)
    again = rows.load_examples(tmp_path, 9)
    assert all(again[part].texts == examples.texts for part in data.PARTS)
    with pytest.raises(UserError, match="another tokenizer"):
        rows.load_examples(tmp_path, 5)
    for wrong in ([[1, 0]], [[1, 2, 3, 4]], [["1", 1]], [], "x", [[2**40, 1]], [[1, 1]]):
        sizes = dict.fromkeys(data.PARTS, wrong)
        (tmp_path / "tokens.json").write_text(json.dumps(sizes), encoding="utf-8")
        with pytest.raises(UserError, match="damaged"):
            rows.load_examples(tmp_path, 9)
