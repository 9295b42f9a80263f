"""Trainings, runs and the command line beyond what every folder has."""

import json

import pytest
import safetensors.torch
import torch

import checkpoint
import data
import generate
import loading
import lora
import train
from lora import LoraConfig
from options import UserError
from run import read_json


def shipped_weights() -> dict:
    return checkpoint.load(loading.PRETRAINED).model.state_dict()


def test_a_run_holds_the_adapter_alone(trained):
    out = trained()
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    assert all(".adapters.default." in name for name in tensors)
    # four blocks of rank 2 · (wq 256 + wk 192 + wv 192 + wo 256 + w2 320)
    assert sum(x.numel() for x in tensors.values()) == 9_728
    assert (out / "model.safetensors").stat().st_size < 50_000


def test_the_base_of_a_training_is_bit_equal_afterwards(trained):
    saved = torch.load(trained() / "checkpoint.pt", weights_only=True)["model"]
    base = {n.replace(".base.", "."): x for n, x in saved.items() if ".adapters." not in n}
    shipped = shipped_weights()
    assert base.keys() == shipped.keys()
    assert all(torch.equal(base[name], x) for name, x in shipped.items())


def test_training_says_what_learns_and_what_it_costs(command, words, tmp_path):
    err = command(*words, "--out", tmp_path / "run").err
    assert "learns     9,728 of 674,432 parameters, 1.44%" in err
    assert "memory     weights" in err


@pytest.mark.parametrize("flag", ["--dora", "--pissa", "--rslora", "--quantize", "--full"])
def test_every_variant_trains_resumes_and_loads(command, words, tmp_path, flag):
    out = tmp_path / "run"
    base = words
    if flag == "--full":  # which has no rank
        base = ["--train", "--data", words[-1], "--batch-size", 4, "--steps", 2, "--device", "cpu"]
    assert command(*base, "--out", out, flag).code == 0
    assert command("--train", "--resume", "--out", out, "--steps", 3).code == 0
    assert command("--sample", "--weights", out, "--max-new-tokens", 2).code == 0
    saved = torch.load(out / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 3


def test_lora_plus_and_dropout_change_the_run(trained):
    names = [trained(n, *more) / "model.safetensors" for n, more in (
        ("a", ()), ("b", ("--lr-ratio", 16)), ("c", ("--dropout", 0.5)))]  # fmt: skip
    assert len({file.read_bytes() for file in names}) == 3


def test_going_on_from_a_run_keeps_its_base_and_adapter(trained, command, words, tmp_path):
    out = trained("first")
    more = ["--train", "--data", words[-1], "--steps", 1, "--batch-size", 4, "--weights", out]
    assert command(*more, "--out", tmp_path / "second").code == 0
    saved = read_json(tmp_path / "second" / "config.json")
    assert saved["train"]["weights"] == "" and saved["model"]["rank"] == 2
    assert (
        "brings its own adapter" in command(*more, "--rank", 5, "--out", tmp_path / "x").complaint
    )


def test_a_run_whose_base_is_gone_says_so(trained, command, tmp_path):
    out = trained()
    saved = read_json(out / "config.json")
    saved["train"]["weights"] = str(tmp_path / "moved")
    (out / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    assert "moved" in command("--sample", "--weights", out).complaint


# ── Adapters on the command line ──────────────────────────────────────────────────────────────────


@pytest.fixture
def two(trained):
    return trained("a", "--steps", 4), trained("b", "--seed", 3, "--targets", "w2$", "--steps", 4)


def logits(loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.arange(40)[None])


def test_several_adapters_add_up(two):
    a, b = map(str, two)
    base = logits(loading.load(loading.PRETRAINED))
    alone = logits(loading.load(loading.PRETRAINED, [(a, 1.0)]))
    assert torch.equal(alone, logits(loading.load(a)))
    both = loading.load(loading.PRETRAINED, [(a, 0.7), (b, 0.3)])
    assert (logits(both) - alone).abs().max() > 1e-4
    apart = logits(both)
    assert (logits(loading.merged(both)) - apart).abs().max() < 1e-4
    none = loading.load(loading.PRETRAINED, [(a, 0.0), (b, 0.0)])
    assert torch.equal(logits(none), base)


def test_words_of_adapter(tmp_path):
    assert loading.parse_adapter("x=0.3") == ("x", 0.3)
    assert loading.parse_adapter("some/where") == ("some/where", 1.0)
    (tmp_path / "a=1").mkdir()
    assert loading.parse_adapter(str(tmp_path / "a=1")) == (str(tmp_path / "a=1"), 1.0)
    for wrong in ("x=y", "x=nan"):
        with pytest.raises(UserError, match="--adapter"):
            loading.parse_adapter(wrong)


def test_export_of_an_adapter_and_of_a_merged_model(two, command, tmp_path):
    """Both are the run: the adapter on its base, and the model without any."""
    run = two[0]
    want = logits(loading.load(run))
    assert command("--weights", run, "--export", tmp_path / "adapter").code == 0
    again = loading.load(loading.PRETRAINED, [(str(tmp_path / "adapter"), 1.0)])
    assert torch.equal(logits(again), want)
    assert command("--weights", run, "--merge", "--export", tmp_path / "whole").code == 0
    whole = loading.load(tmp_path / "whole")
    assert not lora.layers(whole.model)
    assert (logits(whole) - want).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--adapter", "nowhere", "--sample"), "there is no such folder"),
     (("--merge",), "--merge alone leaves nothing"),
     (("--weights", loading.PRETRAINED, "--merge", "--sample"), "no adapter to merge")],
)  # fmt: skip
def test_what_adapters_cannot_be(command, words, said):
    assert said in command(*words).complaint


def test_a_run_as_base_and_another_adapter_is_refused(two, command):
    outcome = command("--sample", "--weights", two[0], "--adapter", two[1])
    assert "give the base, and --adapter" in outcome.complaint


# ── The shipped adapter ───────────────────────────────────────────────────────────────────────────


def test_the_shipped_adapter_does_as_asked():
    """The first prompts of the test part, at temperature 0."""
    loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
    assert lora.trainable(loaded.model)[0] < 0.01 * 664_704
    pairs = data.read_parts("news")["test"][:20]
    import judge

    texts = judge.answers(loaded, pairs, temperature=0)
    assert judge.shares(texts, pairs)["style"] >= 0.95


def test_without_the_adapter_nothing_is_forgotten():
    """The base inside of an adapted model gives the base's own logits, to the bit."""
    loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
    lora.activate(loaded.model, {})
    assert torch.equal(logits(loaded), logits(loading.load(loading.PRETRAINED)))


def test_decoding_with_a_cache_is_decoding_without():
    loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
    model, tokens = loaded.model.double(), torch.randint(1344, (2, 40))
    cache = model.new_cache(2, 40)
    with torch.no_grad():
        pieces = torch.cat([model(tokens[:, i : i + 9], cache) for i in range(0, 40, 9)], dim=1)
        assert (pieces - model(tokens)).abs().max() < 1e-10


def test_sampling_is_the_same_merged_or_not():
    texts = []
    for merge in (False, True):
        loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
        loaded = loading.merged(loaded) if merge else loaded
        config = generate.SampleConfig("News of Juno and a red kite:")
        texts.append(generate.write(loaded, config, generate.Sampling(temperature=0)))
    assert texts[0] == texts[1]


def test_frozen_weights_cost_four_operations_of_six(trained):
    base = checkpoint.load(loading.PRETRAINED)
    loading.attach(base.model, LoraConfig(rank=2))
    config = train.TrainConfig(device="cpu", dtype="float32")
    it = train.LoraTrainer(config, base.model, {}, torch.float32)
    share = it.flops_per_unit / base.model.flops_per_token(64)
    assert 4 / 6 < share < 4.1 / 6
