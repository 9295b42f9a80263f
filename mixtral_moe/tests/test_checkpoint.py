"""Weights in and out, held to `transformers` in both directions, and its two balancing losses."""

import re

import pytest
import safetensors.torch
import torch

import checkpoint
import huggingface
from checkpoint import Loaded
from generate import Sampling, generate
from model import Mixtral, MixtralConfig, RopeScaling
from moe import balance_loss_sum, loads, recording, z_loss_sum
from options import UserError
from run import read_json, write_json
from tokenizer import ByteTokenizer

VOCAB = 300


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, **changes):
    """A random Mixtral of transformers whose constants would all show if one were ignored."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 36,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 10,  # not 48 / 8
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "attn_implementation": "eager",
    }
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # they begin at 1, which hides that they are used at all
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def save(model, folder, stacked: bool = False):
    """A folder as on the Hub, or with the experts as transformers 5 keeps them in memory."""
    model.save_pretrained(folder)
    if stacked:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    ByteTokenizer().save(folder)
    return folder


@torch.no_grad()
def difference(ours: Mixtral, theirs) -> float:
    """The largest difference of their logits over a sequence of 100 tokens."""
    rows = torch.randint(VOCAB, (2, 100))
    expected = theirs(rows).logits
    assert expected.std() > 0.3  # else closeness would mean little
    return (ours(rows) - expected).abs().max().item()


# ── In ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8, "tie_word_embeddings": True},
        {"num_key_value_heads": 1, "head_dim": None, "hidden_size": 64},
        {"num_local_experts": 8, "num_experts_per_tok": 3},
        {"num_local_experts": 4, "num_experts_per_tok": 1},
        {"num_local_experts": 2, "num_experts_per_tok": 2},
        {"sliding_window": 7},
        {"router_jitter_noise": 0.3},  # of training alone
    ],
    ids=str,
)
def test_logits_are_those_of_transformers(transformers, tmp_path, changes, stacked):
    theirs = hf_model(transformers, **changes)
    ours = checkpoint.load(save(theirs, tmp_path, stacked)).model
    assert difference(ours, theirs) <= 1e-4
    assert ours.config.window == (changes.get("sliding_window") or 0)


def test_layouts_are_two_and_both_are_tried(transformers, tmp_path):
    """Else the test above would test one of them twice."""
    names = []
    for stacked in (False, True):
        folder = save(hf_model(transformers), tmp_path / str(stacked), stacked)
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        names.append([n for n in tensors if "layers.2" in n and "experts" in n])
    assert len(names[0]) == 15 and names[0][0].endswith("weight")
    assert [n.rsplit(".", 1)[1] for n in sorted(names[1])] == ["down_proj", "gate_up_proj"]


def test_bfloat16_weights_in_old_pickles_are_read_as_float32(transformers, tmp_path):
    theirs = hf_model(transformers)
    for weight in theirs.parameters():
        weight.data = weight.data.bfloat16().float()
    save(theirs, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    ours = checkpoint.load(tmp_path).model
    assert ours.embedding.weight.dtype == torch.float32
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("window", [None, 6])
def test_greedy_text_is_that_of_transformers(transformers, tmp_path, window):
    theirs = hf_model(transformers, sliding_window=window)
    ours = checkpoint.load(save(theirs, tmp_path)).model
    prompt = [3, 141, 59, 26, 53]
    expected = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=60,
        pad_token_id=0,
    )
    steps = generate(ours, [prompt], 60, Sampling(temperature=0))
    assert prompt + [ids[0] for ids in steps] == expected[0].tolist()


# ── Balancing losses ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def routed(transformers, tmp_path) -> tuple:
    """(our routing of each layer, their router logits of each layer, their model, the rows)."""
    theirs = hf_model(transformers)
    ours = checkpoint.load(save(theirs, tmp_path)).model
    rows = torch.randint(VOCAB, (3, 40))
    with torch.no_grad(), recording(ours) as record:
        ours(rows)
        output = theirs(rows, output_router_logits=True)
    return record, output.router_logits, theirs, rows


def per_token(record, counted: torch.Tensor, pooled: bool) -> list[float]:
    """The balancing loss of each layer."""
    load = [loads(routing, counted) for routing in record]
    load = [sum(load)] * len(load) if pooled else load
    losses = [balance_loss_sum(r, counted, f) for r, f in zip(record, load, strict=True)]
    return [(loss / counted.sum()).item() for loss in losses]


@pytest.mark.parametrize("padded", [False, True])
def test_pooled_balancing_loss_is_that_of_transformers(routed, padded):
    """Their f sums to n_active, 2, ours to 1. With padding in a part of the rows too."""
    record, _, theirs, rows = routed
    mask = torch.ones_like(rows)
    if padded:
        mask[0, 20:] = mask[2, 5:] = 0
    with torch.no_grad():
        output = theirs(rows, attention_mask=mask, output_router_logits=True)
    pooled = per_token(record, mask.flatten(), pooled=True)
    assert 2 * sum(pooled) / len(pooled) == pytest.approx(output.aux_loss.item(), abs=1e-6)


def test_balancing_loss_of_a_layer_is_theirs_of_this_layer_alone(transformers, routed):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    record, logits, _, _ = routed
    ours = per_token(record, torch.ones(120), pooled=False)
    theirs = [load_balancing_loss_func((one,), 5, 2).item() for one in logits]
    assert [2 * loss for loss in ours] == pytest.approx(theirs, abs=1e-6)
    assert max(ours) - min(ours) > 0.01  # they differ, so the order was tested too


def test_layers_that_lean_opposite_ways_cancel_when_they_are_pooled(routed):
    """Pooled over layers, the work of all experts looks even (transformers' issue #31464)."""
    record, *_ = routed
    lean = torch.tensor([[4.0, 3.0, 0.0, 0.0, -9.0], [-4.0, -3.0, 0.0, 0.0, -9.0]])
    layers = []
    for logits, routing in zip(lean, record, strict=False):
        routing.logits = logits.repeat(120, 1)
        routing.chosen = routing.logits.topk(2, dim=-1).indices
        layers.append(routing)
    apart, pooled = (sum(per_token(layers, torch.ones(120), p)) for p in (False, True))
    assert apart > 1.3 * pooled


def test_z_loss_is_that_of_transformers(transformers, routed):
    """Switch's, since their Mixtral has none."""
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    record, logits, _, _ = routed
    for routing, theirs in zip(record, logits, strict=True):
        ours = z_loss_sum(routing, torch.ones(120)).item() / 120
        expected = switch.router_z_loss_func(theirs.view(3, 40, 5)).item()
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6)


# ── Out ───────────────────────────────────────────────────────────────────────────────────────────


def exported(folder, **changes) -> Loaded:
    config = {"vocab_size": 258, "seq_len": 128, "n_layer": 2, "n_head": 4, "n_kv_head": 2}
    config |= {"d_model": 24, "d_head": 10, "d_ff": 20, "n_expert": 5, "norm_eps": 1e-2}
    model = Mixtral(MixtralConfig(**config | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    loaded = Loaded(folder, model, ByteTokenizer(), (ByteTokenizer.eos_id,))
    checkpoint.export(loaded, folder)
    return loaded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("scaling", [None, RopeScaling(4.0, 1.0, 4.0, 32)])
def test_exported_model_gives_equal_logits_in_transformers(
    transformers, tmp_path, tied, scaling, window
):
    loaded = exported(
        tmp_path, rope_theta=500.0, rope_scaling=scaling, tie_embeddings=tied, window=window
    )
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rows = torch.randint(258, (2, 100))
    with torch.no_grad():
        assert (loaded.model(rows) - theirs(rows).logits).abs().max() <= 1e-4


def test_exported_tokenizer_gives_equal_ids_in_transformers(transformers, tmp_path):
    exported(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("Vis fal tis é")["input_ids"] == ByteTokenizer().encode("Vis fal tis é")


def test_exported_folder_loads_here_too(tmp_path):
    loaded = exported(tmp_path, tie_embeddings=False, window=9)
    again = checkpoint.load(tmp_path)
    assert (again.model.config, again.stop_ids) == (loaded.model.config, loaded.stop_ids)
    both = zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


def test_imported_and_exported_again_is_the_same_model(transformers, tmp_path):
    theirs = hf_model(transformers)
    loaded = checkpoint.load(save(theirs, tmp_path / "theirs"))
    checkpoint.export(loaded, tmp_path / "again")
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(state[name], w) for name, w in theirs.state_dict().items())


def test_model_that_was_balanced_by_biases_is_not_exported(tmp_path):
    """transformers has no such biases: the copy would route otherwise and say nothing."""
    loaded = exported(tmp_path / "plain")
    loaded.model.blocks[1].ffn.router.bias[2] = 0.25
    with pytest.raises(UserError, match="was balanced by biases"):
        checkpoint.export(loaded, tmp_path / "biased")
    assert not (tmp_path / "biased").exists()


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    """A good Hugging Face folder, to be spoilt."""
    exported(tmp_path, tie_embeddings=False)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, 'model_type "llama" is not supported'),
        ({"attention_bias": True}, "attention_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": [3]}, "the rotary parameters are no object"),
        ({"num_key_value_heads": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"num_experts_per_tok": 6}, "n_active 6 is more than n_expert 5"),
        ({"num_experts_per_tok": 0}, "n_active must be at least 1"),
        ({"num_local_experts": 4}, "is of 5 experts, not 4"),
        ({"num_local_experts": 6}, "is of 5 experts, not 6"),
        ({"sliding_window": -3}, "window must be at least 0"),
        ({"sliding_window": "wide"}, "window cannot be wide"),
        ({"head_dim": 9}, "odd"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 26}, r"is \(258, 24\), the configuration needs \(258, 26\)"),
        ({"num_hidden_layers": 3}, "lack blocks.2"),
        ({"num_hidden_layers": 1}, "have blocks.1"),
        ({"num_hidden_layers": 10**9}, "the model in .* needs [0-9,.]+ GB"),
        ({"num_local_experts": 10**9}, "the model in .* needs [0-9,.]+ GB"),
    ],
    ids=str,
)
def test_config_that_asks_for_something_else_is_refused_by_name(folder, change, message):
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)


def respoil(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


E3 = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack norm.weight"),
        (lambda t: t.pop(E3), "w1 is of 4 experts, not 5"),
        (lambda t: t.update({E3.replace("3.w", "7.w"): t.pop(E3)}), "w1 is of 5 experts, not 5"),
        (lambda t: t.update({E3: torch.ones(20, 25)}), "differ in shape"),
        (lambda t: t.update({E3: torch.ones(20, 24).half()}), "differ in shape or number format"),
        (lambda t: t.update({STACKED: torch.ones(5, 7, 24)}), "no pairs of matrices"),
        (lambda t: t.update({STACKED: torch.ones(40, 24)}), "no pairs of matrices"),
        (lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"), "lack blocks.1.ffn"),
        (lambda t: t.update({"extra.bias": torch.ones(1)}), "have extra.bias"),
    ],
    ids=["norm", "expert", "number", "shape", "format", "odd", "flat", "gate", "extra"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    respoil(folder, change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)


def test_llama_folder_is_refused_and_says_so(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json: neither a run nor a Mixtral"):
        checkpoint.load(folder)


def test_memory_is_estimated_before_weights_are_read_or_built(folder, monkeypatch):
    for name in ("read_tensors", "fill"):
        monkeypatch.setattr(checkpoint, name, None)
    config = read_json(folder / "config.json") | {"hidden_size": 10**8}
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=r"the model in .* needs [0-9,.]+ GB or more"):
        checkpoint.load(folder)


def test_names_of_both_layouts_cover_the_model(sizes):
    """Every tensor of ours has a name of theirs, and comes back under its own."""
    state = Mixtral(sizes).state_dict()
    theirs = huggingface.to_their_names(state, "here")
    assert all(name.startswith(("model.", "lm_head.")) for name in theirs)
    assert sum(bool(re.search(r"experts\.\d\.w[123]\.", n)) for n in theirs) == 2 * 5 * 3
    back = huggingface.to_our_names(theirs, sizes, "here")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
