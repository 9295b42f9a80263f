"""Trainings, runs and the command line beyond what every folder has."""

import copy
import json
import math
import shutil

import pytest
import safetensors.torch
import torch

import checkpoint
import data
import figures
import generate
import loading
import lora
import memory
import several
import train
from options import UserError
from run import read_json
from variants import AdapterConfig


def shipped() -> torch.nn.Module:
    return checkpoint.load(loading.PRETRAINED).model


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
    before = shipped().state_dict()
    assert base.keys() == before.keys()
    assert all(torch.equal(base[name], x) for name, x in before.items())


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


# ── The base of a run ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def on_its_own_base(command, words, tmp_path):
    """(a run that was trained on a copy of the base, the folder of that copy)."""
    place, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(loading.PRETRAINED, place)
    assert command(*words, "--weights", place, "--out", out).code == 0
    return out, place


def test_a_run_whose_base_is_gone_says_what_to_do(on_its_own_base, command, tmp_path):
    """Sampling and resuming name the mend, and the mend works: a moved base is the same base."""
    out, place = on_its_own_base
    want = logits(loading.load(out))
    place.rename(tmp_path / "moved")
    mend = f"--train --resume --out {out} --weights DIR"
    for words in (("--sample", "--weights", out), ("--train", "--resume", "--out", out)):
        complaint = command(*words).complaint
        assert f"was in {place} and is gone" in complaint and mend in complaint
    again = command("--train", "--resume", "--out", out, "--weights", tmp_path / "moved")
    assert again.code == 0, again.err
    assert torch.equal(logits(loading.load(out)), want)
    assert read_json(out / "config.json")["train"]["weights"] == str(tmp_path / "moved")


def test_another_base_of_the_same_sizes_is_no_base_of_a_run(on_its_own_base, command, tmp_path):
    """One number in a million of other weights would be noticed, or all of them a little."""
    out, place = on_its_own_base
    tensors = safetensors.torch.load_file(place / "model.safetensors")
    other = {name: 1.001 * x.float() for name, x in tensors.items()}
    safetensors.torch.save_file(other, place / "model.safetensors")
    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    for words in (("--sample", "--weights", out), ("--train", "--resume", "--out", out),
                  ("--train", "--weights", out, "--out", tmp_path / "more")):  # fmt: skip
        assert "is not the base that the run" in command(*words).complaint
    assert {file: file.read_bytes() for file in before} == before
    shown = command("--sample", "--weights", place, "--adapter", out, "--max-new-tokens", 2)
    assert shown.code == 0 and "trained on another base" in shown.err


def test_a_run_of_before_the_fingerprints_loads(trained, command):
    out = trained()
    saved = read_json(out / "config.json")
    assert len(saved.pop("base")) == 16
    (out / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    assert command("--sample", "--weights", out, "--max-new-tokens", 2).code == 0
    assert command("--train", "--resume", "--out", out, "--steps", 3).code == 0
    assert read_json(out / "config.json")["base"] == loading.fingerprint(shipped())
    (out / "config.json").write_text(json.dumps(saved | {"base": 3}), encoding="utf-8")
    assert "nothing sensible of the base" in command("--sample", "--weights", out).complaint


def test_a_fingerprint_tells_names_shapes_and_numbers(base):
    first = loading.fingerprint(base)
    assert first == loading.fingerprint(copy.deepcopy(base)) and len(first) == 16
    with torch.no_grad():
        base.blocks[1].ffn.w2.weight += 1e-6
    second = loading.fingerprint(base)
    base.head = torch.nn.Linear(24, 98, bias=False)
    assert len({first, second, loading.fingerprint(base)}) == 3


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
     (("--weights", loading.PRETRAINED, "--merge", "--sample"), "no adapter to merge"),
     (("--weights", loading.SHIPPED, "--sample"), "is an adapter: give it by --adapter"),
     (("--train", "--weights", loading.SHIPPED), "is an adapter: give it by --adapter"),
     (("--adapter", loading.PRETRAINED, "--sample"), "it is no adapter"),
     (("--adapter", "", "--sample"), "names no folder"),
     (("--adapter", "=0.5", "--sample"), "names no folder"),
     (("--adapter", f"{loading.SHIPPED}=much", "--sample"), "'much' is no number"),
     (("--train", "--full", "--lr-ratio", "2"), "of A and B, which --full does not have"),
     (("--train", "--adapter", loading.SHIPPED), "--adapter")],
)  # fmt: skip
def test_what_adapters_cannot_be(command, words, said):
    assert said in command(*words).complaint


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda x: torch.full_like(x, math.nan), "is not finite"),
     (lambda x: torch.full_like(x, math.inf), "is not finite"),
     (lambda x: x.int(), "does not fit the base"),
     (lambda x: x[:, :3].clone(), "does not fit the base"), (lambda x: None, "is missing")],
    ids=["nan", "inf", "int", "shape", "missing"],
)  # fmt: skip
def test_a_run_with_one_wrong_tensor_is_refused(trained, command, change, said):
    out = trained()
    tensors = safetensors.torch.load_file(out / "model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_a"))
    tensors[name] = change(tensors[name])
    good = {name: x for name, x in tensors.items() if x is not None}
    safetensors.torch.save_file(good, out / "model.safetensors")
    for words in (("--weights", out), ("--adapter", out)):
        assert said in command("--sample", *words).complaint


def test_the_same_adapter_twice_is_twice_the_correction(two, command, tmp_path):
    run = str(two[0])
    twice = loading.load(loading.PRETRAINED, [(run, 1.0), (run, 1.0)])
    once = loading.load(loading.PRETRAINED, [(run, 2.0)])
    assert (logits(twice) - logits(once)).abs().max() < 1e-4
    words = ("--adapter", run, "--adapter", run, "--export", tmp_path / "x")
    assert "writes one adapter" in command(*words).complaint


def test_an_adapter_of_all_weights_is_none(command, words, tmp_path):
    base = ["--train", "--data", words[-1], "--batch-size", 4, "--steps", 1, "--device", "cpu"]
    assert command(*base, "--out", tmp_path / "run", "--full").code == 0
    outcome = command("--sample", "--adapter", tmp_path / "run")
    assert "trained all weights" in outcome.complaint


def test_a_run_as_base_and_another_adapter_is_refused(two, command):
    outcome = command("--sample", "--weights", two[0], "--adapter", two[1])
    assert "give the base, and --adapter" in outcome.complaint


def test_the_spectra_of_a_run(trained, command, words, tmp_path):
    """Of an adapter of rank 2: what it added to each matrix has two directions."""
    found = figures.spectra_of(trained())
    assert found["looked_at"] == 200 and 1 <= found["directions"] <= 2 and found["size"] > 0
    first, rest = found["change"][:2], found["change"][2:]
    assert min(first) > 0 and max(rest) < 1e-5 * first[0] < 1e-5 * found["before"][0]


# ── The shipped adapter ───────────────────────────────────────────────────────────────────────────


def test_the_shipped_adapter_does_as_asked():
    """The first prompts of the test part, at temperature 0."""
    loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
    assert memory.trainable(loaded.model)[0] < 0.01 * 664_704
    pairs = data.read_parts("news")["test"][:20]
    import judge

    texts = judge.answers(loaded, pairs, temperature=0)
    assert judge.shares(texts, pairs)["style"] >= 0.95


def test_without_the_adapter_nothing_is_forgotten():
    """The base inside of an adapted model gives the base's own logits, to the bit."""
    loaded = loading.load(loading.PRETRAINED, [(str(loading.SHIPPED), 1.0)])
    several.activate(loaded.model, {})
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
    loading.attach(base.model, AdapterConfig(rank=2))
    config = train.TrainConfig(device="cpu", dtype="float32")
    it = train.LoraTrainer(config, base.model, {}, torch.float32)
    share = it.flops_per_unit / base.model.flops_per_token(64)
    assert 4 / 6 < share < 4.1 / 6
