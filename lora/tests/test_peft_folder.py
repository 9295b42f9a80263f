"""PEFT itself, where it is installed, and its folders both ways. Always alpha ≠ rank."""

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import checkpoint
import lora
import peft_folder
from lora import LoraConfig
from model import Llama
from options import UserError
from tokenizer import ByteTokenizer

SHARED = Path(os.environ.get("PIKO_ADAPTERS", "../../shared/data/adapters"))
THEIRS = ["q_proj", "v_proj", "down_proj"]
OURS = r"\.(wq|wv|w2)$"
VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"pissa": True}]
IDS = ["lora", "rslora", "dora", "pissa"]


def settings(**changes) -> LoraConfig:
    return LoraConfig(**{"rank": 4, "alpha": 32.0, "targets": OURS} | changes)


def stir(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of PEFT


@pytest.fixture
def peft():
    pytest.importorskip("transformers")
    return pytest.importorskip("peft")


@pytest.fixture
def pair(sizes, tmp_path, peft):
    """(our base, the same base in transformers), in float32."""
    import transformers

    sizes = type(sizes)(**{**vars(sizes), "vocab_size": 259})
    base = Llama(sizes).eval()
    tokenizer = ByteTokenizer()
    checkpoint.export(checkpoint.Loaded(tmp_path, base, tokenizer, ()), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    return base, theirs.eval()


def their_adapter(peft, theirs, **changes):
    """PEFT's adapter of the settings `changes`, after something like a training."""
    names = {"rslora": "use_rslora", "dora": "use_dora"}
    more = {names[k]: v for k, v in changes.items() if k in names}
    if changes.get("pissa"):
        more["init_lora_weights"] = "pissa"
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=THEIRS, **more)
    return peft.get_peft_model(theirs, config)


@pytest.mark.parametrize("changes", [VARIANTS[0], VARIANTS[1], VARIANTS[2]], ids=IDS[:3])
def test_what_peft_writes_we_load(pair, peft, tmp_path, changes):
    """Forward and merged, to 1e-6."""
    base, theirs = pair
    theirs = their_adapter(peft, theirs, **changes)
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    found = peft_folder.put_on(base, peft_folder.read(tmp_path / "adapter"), "a")
    assert len(found) == 6
    x = torch.randint(259, (2, 19))
    want = theirs(x).logits
    assert (base(x) - want).abs().max() < 1e-6 * want.abs().max()
    lora.merge(base)
    merged = theirs.merge_and_unload()
    for ours, name in ((p, peft_folder.their_name(p)) for p in found):
        a, b = base.get_submodule(ours).base.weight, merged.get_submodule(name).weight
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize("changes", VARIANTS, ids=IDS)
def test_what_we_write_peft_loads(pair, peft, tmp_path, changes):
    """PiSSA too: written as an ordinary adapter of twice the rank, for the untouched base."""
    base, theirs = pair
    lora.adapt(base, settings(**changes))
    stir(base)
    peft_folder.write(base, "default", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    x = torch.randint(259, (2, 19))
    want = base(x)
    assert (loaded(x).logits - want).abs().max() < 2e-6 * want.abs().max()


@pytest.mark.parametrize("changes", VARIANTS[:3], ids=IDS[:3])
def test_the_names_of_tensors_are_theirs(pair, peft, tmp_path, changes):
    base, theirs = pair
    their_adapter(peft, theirs, **changes).save_pretrained(tmp_path / "theirs")
    lora.adapt(base, settings(**changes))
    peft_folder.write(base, "default", tmp_path / "ours")
    a, b = (safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
            for name in ("ours", "theirs"))  # fmt: skip
    assert {k: x.shape for k, x in a.items()} == {k: x.shape for k, x in b.items()}
    keys = (json.loads((tmp_path / n / "adapter_config.json").read_text(encoding="utf-8")).keys()
            for n in ("ours", "theirs"))  # fmt: skip
    ours, known = map(set, keys)
    assert ours <= known


def test_pissa_begins_as_in_peft(pair, peft):
    """The same A and B, but for the signs of singular vectors, and the same rest of W."""
    base, theirs = pair
    weight = base.blocks[0].attention.wq.weight.detach().clone()
    lora.adapt(base, settings(pissa=True))
    theirs = their_adapter(peft, theirs, pissa=True)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    adapter = base.blocks[0].attention.wq.adapters["default"]
    assert torch.allclose(adapter.lora_a.abs(), layer.lora_A["default"].weight.abs(), atol=1e-5)
    rest = weight - adapter.scale * adapter.lora_b @ adapter.lora_a
    assert torch.allclose(rest, layer.base_layer.weight, atol=1e-5)


def test_round_trip_to_the_bit(base, tokens, tmp_path):
    """Any variant that our model can have comes back as it was; float64 included."""
    for number, changes in enumerate(VARIANTS[:3]):
        model, other = copy.deepcopy(base), copy.deepcopy(base)
        lora.adapt(model, settings(**changes))
        stir(model)
        peft_folder.write(model, "default", tmp_path / str(number))
        peft_folder.put_on(other, peft_folder.read(tmp_path / str(number)), "x")
        assert (model(tokens) - other(tokens)).abs().max() < 1e-12


def test_embedding_and_convolution(tmp_path, peft):
    """Names and shapes of the two other kinds, both ways, on a module tree that is no Llama."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.conv = nn.Embedding(11, 6), nn.Conv2d(1, 4, 3, padding=1)

        def forward(self, ids):
            return self.conv(self.table(ids)[:, None])

    model = Small()
    theirs = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=2, lora_alpha=10, target_modules=["table", "conv"]),
    )
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "a")
    ids = torch.randint(11, (3, 5))
    ours = copy.deepcopy(model)
    peft_folder.put_on(ours, peft_folder.read(tmp_path / "a"), "a")
    assert (ours(ids) - theirs(ids)).abs().max() < 1e-6
    peft_folder.write(ours, "a", tmp_path / "b")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "b").eval()
    assert (again(ids) - theirs(ids)).abs().max() < 1e-6


def gpt2():
    """A random GPT-2 with the shapes of the smallest, of which two blocks are enough."""
    transformers = pytest.importorskip("transformers")
    sizes = transformers.GPT2Config(n_layer=12, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(sizes).eval()


@pytest.mark.skipif(not (SHARED / "gpt2_r8").is_dir(), reason="set PIKO_ADAPTERS to its folder")
def test_an_adapter_that_somebody_trained(peft):
    """GPT-2's fused q, k, v in a Conv1D (fan_in_fan_out): forward equal to PEFT's."""
    model = gpt2()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), SHARED / "gpt2_r8").eval()
    found = peft_folder.put_on(model, peft_folder.read(SHARED / "gpt2_r8"), "a")
    assert len(found) == 24
    x = torch.randint(100, (2, 9))
    want = theirs(x).logits
    assert (model(x).logits - want).abs().max() < 1e-6 * want.abs().max()
    lora.merge(model)
    assert (model(x).logits - want).abs().max() < 3e-6 * want.abs().max()


# ── What is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(base, tmp_path):
    """A good folder, for `base`."""
    lora.adapt(model := copy.deepcopy(base), settings())
    peft_folder.write(model, "default", tmp_path / "good")
    return tmp_path / "good"


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"peft_type": "IA3"}, "peft_type IA3"), ({"bias": "all"}, "bias all"), ({"r": "8"}, "r is 8"),
     ({"modules_to_save": ["head"]}, "modules_to_save"),
     ({"lora_alpha": None}, "lora_alpha is None"),
     ({"rank_pattern": 3}, "rank_pattern"), ({"lora_bias": True}, "lora_bias")],
)  # fmt: skip
def test_a_config_that_asks_for_more_is_refused(folder, changes, word):
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(good | changes), encoding="utf-8")
    with pytest.raises(UserError, match=word):
        peft_folder.read(folder)


def test_tensors_that_do_not_fit_are_refused(folder, base, tmp_path):
    file = folder / "adapter_model.safetensors"
    good = safetensors.torch.load_file(file)
    name = next(n for n in good if n.endswith("lora_B.weight"))
    wrong = {
        "shape": good | {name: torch.zeros(3, 4)},
        "no layer": good | {name.replace("layers.0", "layers.9"): good[name].clone(),
                            name.replace("layers.0", "layers.9").replace("_B", "_A"):
                            good[name].clone()},
        "only one of A and B": {k: v for k, v in good.items() if k != name},
        "no part of a LoRA": good | {"base_model.model.lm_head.weight": good[name].clone()},
        "no finite": good | {name: good[name] * float("nan")},
        "is empty": {},
    }  # fmt: skip
    words = {"shape": r"is \(3, 4\), the model needs"}
    for what, tensors in wrong.items():
        safetensors.torch.save_file(tensors, file)
        with pytest.raises(UserError, match=words.get(what, what)):
            peft_folder.put_on(copy.deepcopy(base), peft_folder.read(folder), "x")


def test_no_adapter_at_all(tmp_path):
    with pytest.raises(UserError, match="it is no adapter"):
        peft_folder.read(tmp_path)


def test_patterns_of_rank_and_alpha():
    assert peft_folder.pattern_value({"q_proj": 5}, "model.layers.0.self_attn.q_proj", 1) == 5
    assert peft_folder.pattern_value({"layers.0.q": 5}, "model.layers.1.q", 1) == 1
    assert peft_folder.pattern_value(None, "x", 1) == 1
