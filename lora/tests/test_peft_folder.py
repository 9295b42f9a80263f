"""PEFT itself, where it is installed, and its folders both ways. Always alpha ≠ rank."""

import copy
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import same
from torch import nn

import checkpoint
import lora
import peft_folder
from model import Llama
from options import UserError
from tokenizer import ByteTokenizer
from variants import AdapterConfig

SHARED = Path(os.environ.get("PIKO_ADAPTERS", "../../shared/data/adapters"))
THEIRS = ["q_proj", "v_proj", "down_proj"]
OURS = r"\.(wq|wv|w2)$"
VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"pissa": True}]
IDS = ["lora", "rslora", "dora", "pissa"]


def settings(**changes) -> AdapterConfig:
    return AdapterConfig(**{"rank": 4, "alpha": 32.0, "targets": OURS} | changes)


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


class Angles(nn.Module):
    """Our rotary table, as transformers asks for it: cos and sin, (1, T, C) each."""

    def __init__(self, ours: Llama):
        super().__init__()
        self.table = ours.rotary

    def forward(self, x, position_ids):
        cos, sin = self.table.table(int(position_ids.max()) + 1).to(x.dtype)
        half = sin.shape[-1] // 2
        return cos[None], torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)[None]


@pytest.fixture
def pair(sizes, tmp_path, peft):
    """(our base, the same base in transformers), to be compared in float64.

    transformers takes rotary angles and norms in float32 even then, which alone makes a difference
    of 2e-6 between the two bases. So both are replaced: what is left is the adapters' own.
    """
    import transformers

    sizes = type(sizes)(**{**vars(sizes), "vocab_size": 259})
    base = Llama(sizes).eval()
    tokenizer = ByteTokenizer()
    checkpoint.export(checkpoint.Loaded(tmp_path, base, tokenizer, ()), tmp_path / "base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    theirs.model.rotary_emb = Angles(base)
    for path, module in list(theirs.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(sizes.d_model, sizes.norm_eps)
            norm.weight = module.weight
            lora.replace(theirs, path, norm)
    return base, theirs


def their_adapter(peft, theirs, **changes):
    """PEFT's adapter of the settings `changes`. The model is in float32, as its PiSSA asks."""
    names = {"rslora": "use_rslora", "dora": "use_dora"}
    more = {names[k]: v for k, v in changes.items() if k in names}
    if changes.get("pissa"):
        more["init_lora_weights"] = "pissa"
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=THEIRS, **more)
    return peft.get_peft_model(theirs, config)


def test_the_two_bases_are_one(pair):
    base, theirs = (model.double() for model in pair)
    x = torch.randint(259, (2, 19))
    assert (base(x) - theirs(x).logits).abs().max() < 1e-12


@pytest.mark.parametrize("changes", VARIANTS, ids=IDS)
def test_what_peft_writes_we_load(pair, peft, tmp_path, changes):
    """Forward and merged, to 1e-6; most are at 1e-12, PiSSA's rest of W is rounded to float32."""
    base, theirs = pair
    theirs = their_adapter(peft, theirs, **changes)
    stir(theirs)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    found = peft_folder.put_on(base, peft_folder.read(tmp_path / "adapter"), "a")
    assert len(found) == 6
    bound = 1e-6 if changes.get("pissa") else 1e-12
    x, base, theirs = torch.randint(259, (2, 19)), base.double(), theirs.double()
    want = theirs(x).logits
    assert (base(x) - want).abs().max() < bound
    lora.merge(base)
    merged = theirs.merge_and_unload()
    for ours, name in ((p, peft_folder.their_name(p)) for p in found):
        a, b = base.get_submodule(ours).base.weight, merged.get_submodule(name).weight
        assert (a - b).abs().max() < bound


@pytest.mark.parametrize("changes", VARIANTS, ids=IDS)
def test_what_we_write_peft_loads(pair, peft, tmp_path, changes):
    """PiSSA too: written as an ordinary adapter of twice the rank, for the untouched base."""
    base, theirs = (model.double() for model in pair)
    lora.adapt(base, settings(**changes))
    stir(base)
    peft_folder.write(base, "default", tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    x = torch.randint(259, (2, 19))
    assert (loaded(x).logits - base(x)).abs().max() < 1e-12


@pytest.mark.parametrize("changes", VARIANTS[:3], ids=IDS[:3])
def test_peft_on_our_own_model(base, tokens, peft, changes):
    """Both on our Llama: the same numbers in A and B, the same logits and gradients."""
    names = {"rslora": "use_rslora", "dora": "use_dora"}
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=["wq", "wv", "w2"],
                             **{names[k]: v for k, v in changes.items()})  # fmt: skip
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base))
    lora.adapt(base, settings(**changes))
    stir(base)
    pairs = []
    for path, layer in base.named_modules():
        if isinstance(layer, lora.LoraLayer):
            mine, other = layer.adapters["default"], theirs.get_submodule(path)
            pairs += [(mine.lora_a, other.lora_A["default"].weight)]
            pairs += [(mine.lora_b, other.lora_B["default"].weight)]
            if changes.get("dora"):
                pairs += [(mine.magnitude, other.lora_magnitude_vector["default"].weight)]
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours)
    ours_out, their_out = base(tokens), theirs(tokens)
    assert (ours_out - their_out).abs().max() < 1e-12
    for out in (ours_out, their_out):
        out.square().mean().backward()
    assert all((ours.grad - other.grad).abs().max() < 1e-12 for ours, other in pairs)


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
    """The same A and B and the same rest of W, both found by the same routine in float32."""
    base, theirs = pair
    weight = base.blocks[0].attention.wq.weight.detach().clone()
    lora.adapt(base, settings(pissa=True))
    theirs = their_adapter(peft, theirs, pissa=True)
    layer = theirs.base_model.model.model.layers[0].self_attn.q_proj
    adapter = base.blocks[0].attention.wq.adapters["default"]
    assert (adapter.lora_a - layer.lora_A["default"].weight).abs().max() < 1e-6
    assert (adapter.lora_b - layer.lora_B["default"].weight).abs().max() < 1e-6
    rest = weight - adapter.scale * adapter.lora_b @ adapter.lora_a
    assert (rest - layer.base_layer.weight).abs().max() < 1e-6


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
    """A random GPT-2 with the twelve blocks of the smallest."""
    transformers = pytest.importorskip("transformers")
    sizes = transformers.GPT2Config(n_layer=12, vocab_size=100, n_positions=32)
    return transformers.GPT2LMHeadModel(sizes).eval()


@pytest.mark.skipif(not (SHARED / "gpt2_r8").is_dir(), reason="set PIKO_ADAPTERS to its folder")
def test_an_adapter_that_somebody_trained(peft):
    """GPT-2's fused q, k, v in a Conv1D (fan_in_fan_out): equal to PEFT's, apart and merged."""
    model = gpt2().double()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), SHARED / "gpt2_r8").eval()
    found = peft_folder.put_on(model, peft_folder.read(SHARED / "gpt2_r8"), "a")
    assert len(found) == 24
    x = torch.randint(100, (2, 9))
    want = theirs(x).logits
    assert (model(x).logits - want).abs().max() < 1e-12
    lora.merge(model)
    assert (model(x).logits - theirs.merge_and_unload()(x).logits).abs().max() < 1e-12


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
     ({"rank_pattern": 3}, "rank_pattern"), ({"lora_bias": True}, "lora_bias"),
     ({"r": float("inf")}, "r is"), ({"lora_alpha": -1}, "lora_alpha is -1"),
     ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern q_proj is x"),
     ({"rank_pattern": {"(": 3}}, "is no pattern"), ({"use_dora": "no"}, "use_dora no"),
     ({"init_lora_weights": "olora"}, "init_lora_weights olora")],
)  # fmt: skip
def test_a_config_that_asks_for_more_is_refused(folder, changes, word):
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(good | changes), encoding="utf-8")
    with pytest.raises(UserError, match=word):
        peft_folder.read(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"r": 5}, "has rank 4, adapter_config.json says 5"),
     ({"rank_pattern": {"q_proj": 3}}, "says 3"),
     ({"use_dora": True}, "use_dora is True, the tensors differ")],
)  # fmt: skip
def test_a_config_that_the_tensors_deny_is_refused(folder, base, changes, word):
    file = folder / "adapter_config.json"
    good = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(good | changes), encoding="utf-8")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(UserError, match=word):
        peft_folder.put_on(base, peft_folder.read(folder), "x")
    assert same(base.state_dict(), before)


def test_a_rank_beyond_the_matrix_is_read(base, tokens, tmp_path):
    """A PiSSA adapter of rank 15 is written as one of 30, in a matrix of 24 columns."""
    model = copy.deepcopy(base)
    lora.adapt(model, settings(pissa=True, rank=15))
    stir(model)
    peft_folder.write(model, "default", tmp_path / "a")
    peft_folder.put_on(base, peft_folder.read(tmp_path / "a"), "x")
    assert (base(tokens) - model(tokens)).abs().max() < 1e-12


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
        "no matrix": good | {name: torch.zeros(3)},
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
