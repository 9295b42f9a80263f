"""The grammar of the tales: rewards, probabilities, what the best policy reaches, and the judge."""

import hashlib
import itertools
import json
import math
import random

import make_tales
import pytest
import torch

import checkpoint
import data
import judge
import main
import train
from packing import pack
from rows import encode_part

START = (
    "There once was a fox named Ada. Ada lived near the harbor. One morning, Ada found a red coin "
    "near the well. But the red coin rolled down the bank into the pond."
)
KIND = (
    " Soon a frog named Otto came by. Otto dived into the pond and came up with the red coin. "
    '"Thank you, Otto!" said Ada. A friend is worth more than gold.'
)
UNKIND = (
    " Soon a frog named Otto came by. Otto threw a pebble at Ada. Ada pushed Otto away. They never "
    "walked home together again."
)


@pytest.fixture(scope="module")
def lines():
    return [json.loads(x) for x in data.TALES.read_text(encoding="utf-8").splitlines()]


def test_the_reward_by_hand():
    assert make_tales.reward(KIND) == 3 and make_tales.reward(UNKIND) == -3
    mixed = KIND.replace(
        "A friend is worth more than gold", "They never walked home together again"
    )
    assert make_tales.reward(mixed) == 1
    assert make_tales.reward("") == make_tales.reward("nonsense. A. B. C.") == 0
    assert make_tales.reward(KIND * 2) == 3  # more sentences earn nothing


def test_the_reward_of_a_text_is_what_the_grammar_meant():
    dice = random.Random(5)
    for _ in range(300):
        _, facts = make_tales.draw_prompt(dice)
        teller = make_tales.make_stories.Teller(dice)
        meant = make_tales.ending(teller.pick, teller.say, *facts)
        assert make_tales.reward(" " + teller.text) == meant


def test_every_line_can_be_told_and_one_slip_cannot(lines):
    for row in random.Random(0).sample(lines, 60):
        for answer in [row[key] for key in ("completion", "chosen", "rejected") if key in row]:
            assert math.isfinite(make_tales.log_prob(row["prompt"] + answer))
            slip = answer.replace(" named ", " called ")
            assert make_tales.log_prob(row["prompt"] + slip) == -math.inf


def test_the_probability_of_an_ending_by_hand():
    """Both say who came by alike. Then KIND: ½·½ (two ways to get the coin) · ½·⅓ · ½·⅓, and
    UNKIND: ½·⅓ · ½·⅓ · ½·⅓. The coin is called by color and name; the grammar has no other way."""
    kind, unkind = (make_tales.log_prob(START + answer) for answer in (KIND, UNKIND))
    assert kind - unkind == pytest.approx(math.log((1 / 2) / (1 / 3)), abs=1e-12)
    assert make_tales.log_prob(START + KIND.replace("red coin", "coin")) == -math.inf


def test_labels_follow_bradley_and_terry(lines):
    """Of pairs with this gap the better one was chosen as often as σ says, to 3 standard errors."""
    pairs = [row for row in lines if "chosen" in row]
    gaps = [make_tales.reward(x["chosen"]) - make_tales.reward(x["rejected"]) for x in pairs]
    for size in (2, 4):
        n_right, n = gaps.count(size), gaps.count(size) + gaps.count(-size)
        p = 1 / (1 + math.exp(-size))
        assert abs(n_right / n - p) < 3 * math.sqrt(p * (1 - p) / n)
    assert 0.2 < gaps.count(0) / len(gaps) < 0.42  # 20/64 of the pairs are equally good


def test_the_limits_are_those_of_the_parts(lines):
    floor = json.loads((data.FOLDER / "floor.json").read_text(encoding="utf-8"))
    parts = data.read_parts("tales")
    for part in data.PARTS:
        pairs = [{"chosen": x.answers[0], "rejected": x.answers[1]}
                 for x in parts[part] if len(x.answers) == 2]  # fmt: skip
        assert make_tales.limits(pairs) == {k: pytest.approx(v) for k, v in floor[part].items()}
    assert data.limits("elsewhere.jsonl", "test") is None


def test_the_best_policy_by_walking_all_eight_outcomes():
    beta = 0.5
    outcomes = list(itertools.product((1, -1), repeat=3))
    weight = [math.exp(sum(o) / beta) for o in outcomes]
    p = [w / sum(weight) for w in weight]
    kl = sum(x * math.log(8 * x) for x in p)
    win = sum(x * sum((1 + (sum(a) > sum(b)) - (sum(a) < sum(b))) / 2 for b in outcomes) / 8
              for a, x in zip(outcomes, p, strict=True))  # fmt: skip
    reward = sum(x * sum(o) for o, x in zip(outcomes, p, strict=True))
    best = make_tales.best_policy(beta)
    assert best == {"kl": pytest.approx(kl), "reward": pytest.approx(reward),
                    "win_rate": pytest.approx(win)}  # fmt: skip


def test_the_shipped_files_are_what_the_script_writes(monkeypatch, tmp_path):
    wanted = {name: (data.FOLDER / name).read_bytes()
              for name in ("tales.jsonl", "floor.json", "stories_test.txt")}  # fmt: skip
    monkeypatch.setattr(make_tales, "HERE", tmp_path)
    make_tales.main()
    for name, content in wanted.items():
        assert (tmp_path / name).read_bytes() == content.replace(b"\r\n", b"\n"), name


def test_the_data_readme_states_sizes_and_checksums():
    said = (data.FOLDER / "README.md").read_text(encoding="utf-8")
    for name in ("tales.jsonl", "stories_test.txt", "floor.json"):
        content = (data.FOLDER / name).read_bytes().replace(b"\r\n", b"\n")
        assert f"{len(content):,} bytes" in said
        assert hashlib.sha256(content).hexdigest() in said


# ── The judge ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def shipped():
    return checkpoint.load(main.PRETRAINED)


def few_prompts(loaded, n: int):
    pairs = [x for x in data.read_parts("tales")["test"] if len(x.answers) == 2][:n]
    return encode_part(pairs, loaded.tokenizer, loaded.model.config.seq_len)


def test_a_model_against_itself_is_even(shipped):
    found = judge.compare(shipped, shipped, few_prompts(shipped, 12), 0, torch.float32)
    assert found["kl"] == 0 and found["fluency"] == 1
    assert found["win_low"] <= 0.5 <= found["win_high"]


def test_answers_are_drawn_from_the_models_own_probabilities(shipped, monkeypatch):
    """The KL is about these: temperature 1, and no unlikely token is left out."""
    drawn = []
    monkeypatch.setattr(judge, "generate", lambda *args: drawn.append(args[3]) or [])
    judge.answers(shipped, [[1]], 0)
    assert vars(drawn[0]) == {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_answers_end_with_one_eos_and_log_probs_are_those_of_the_model(shipped):
    texts = few_prompts(shipped, 5)
    prompts = [texts.texts[i][0] for i in texts.pairs]
    found = judge.answers(shipped, prompts, 0)
    end = shipped.tokenizer.eos_id
    assert len(found) == 5 * judge.N_SAMPLE
    assert all(ids.count(end) == 1 and ids[-1] == end for ids in found if len(ids) < judge.LONGEST)
    text = (prompts[0], [found[0]])
    tokens = torch.tensor([prompts[0] + found[0]])
    with torch.no_grad():
        logps = shipped.model(tokens).log_softmax(-1)[0]
    by_hand = sum(logps[len(prompts[0]) + i - 1, t].item() for i, t in enumerate(found[0]))
    assert judge.log_probs(shipped, [text], torch.float32).item() == pytest.approx(
        by_hand, abs=1e-3
    )
    assert pack([text]).tokens.shape[1] == len(prompts[0]) + len(found[0])


def test_the_shipped_policy_is_kind(shipped):
    """It beats its reference on the first prompts of the test part."""
    reference = checkpoint.load(main.PRETRAINED)
    reference.model = train.frozen_copy(main.PRETRAINED / train.REFERENCE, shipped.model.config)
    found = judge.compare(shipped, reference, few_prompts(shipped, 20), 0, torch.float32)
    assert found["win_rate"] >= 0.75 and found["true_reward"] > 1.5
    assert found["kl"] > 4 * found["kl_error"] > 0 and 1 < found["stories"] < 2
    assert found["fluency"] < 1.05
