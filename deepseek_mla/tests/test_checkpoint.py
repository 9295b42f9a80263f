"""Weights in and out, held to `transformers` in both directions, with both orders of channels."""

import pytest
import safetensors.torch
import torch

import checkpoint
import huggingface
from checkpoint import Loaded
from conftest import uneven
from generate import Sampling, generate
from model import DeepseekConfig
from mtp import DeepseekMTP
from options import UserError
from run import read_json, write_json
from tokenizer import ByteTokenizer
from yarn import YarnScaling

VOCAB = 300
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 20.0,
        "beta_slow": 2.0, "original_max_position_embeddings": 32, "mscale": 0.7,
        "mscale_all_dim": 0.7}  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, **changes):
    """A random DeepseekV3 of transformers whose constants would all show if one were ignored."""
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 30,
        "moe_intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 3,
        "num_key_value_heads": 3, "n_shared_experts": 2, "n_routed_experts": 8,
        "routed_scaling_factor": 2.5, "kv_lora_rank": 14, "q_lora_rank": 20,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 10, "n_group": 4,
        "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-2, "num_mtp_layers": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "initializer_range": 0.15, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "attn_implementation": "eager",
    }  # fmt: skip
    config = transformers.DeepseekV3Config(**sizes | changes)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # they begin at 1, which hides that they are used at all
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
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
def difference(ours: DeepseekMTP, theirs) -> float:
    """The largest difference of their logits over a sequence of 100 tokens."""
    rows = torch.randint(VOCAB, (2, 100))
    expected = theirs(rows).logits
    assert expected.std() > 0.3  # else closeness would mean little
    return (ours(rows) - expected).abs().max().item()


# ── In ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"rope_parameters": YARN},
        {"tie_word_embeddings": True, "first_k_dense_replace": 0},
        {"norm_topk_prob": False, "n_group": 1, "topk_group": 1},
        {"v_head_dim": 20, "first_k_dense_replace": 3},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_logits_are_those_of_transformers(transformers, tmp_path, changes, interleave):
    theirs = hf_model(transformers, rope_interleave=interleave, **changes)
    ours = checkpoint.load(save(theirs, tmp_path)).model
    assert difference(ours, theirs) <= 1e-4


def test_experts_in_one_tensor_are_read_too(transformers, tmp_path):
    theirs = hf_model(transformers)
    one, other = (save(theirs, tmp_path / str(s), stacked=s) for s in (False, True))
    names = [safetensors.torch.load_file(f / "model.safetensors").keys() for f in (one, other)]
    assert "model.layers.2.mlp.experts.5.gate_proj.weight" in names[0]
    assert "model.layers.2.mlp.experts.gate_up_proj" in names[1]
    assert difference(checkpoint.load(other).model, theirs) <= 1e-4


@pytest.mark.parametrize("interleave", [True, False])
def test_the_order_of_rotary_channels_matters(transformers, tmp_path, interleave):
    """Read in the wrong order the same weights say something else: a test can see it."""
    theirs = hf_model(transformers, rope_interleave=interleave)
    config = read_json(save(theirs, tmp_path) / "config.json")
    assert config["rope_interleave"] is interleave
    write_json(tmp_path / "config.json", config | {"rope_interleave": not interleave})
    assert difference(checkpoint.load(tmp_path).model, theirs) > 1e-2


def test_folders_that_do_not_say_are_interleaved(transformers, tmp_path):
    """As DeepSeek's own on the Hub, whose config.json has no such word."""
    theirs = hf_model(transformers, rope_interleave=True)
    config = read_json(save(theirs, tmp_path) / "config.json")
    del config["rope_interleave"]
    write_json(tmp_path / "config.json", config)
    assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


def test_modules_behind_the_last_layer_are_left_out(transformers, tmp_path):
    theirs = hf_model(transformers)
    file = save(theirs, tmp_path) / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors |= {"model.layers.3.enorm.weight": torch.ones(48),
                "model.layers.3.mlp.experts.0.gate_proj.weight": torch.ones(12, 48)}  # fmt: skip
    safetensors.torch.save_file(tensors, file)
    ours = checkpoint.load(tmp_path).model
    assert ours.config.n_ahead == 0 and difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": YARN, "q_lora_rank": None}], ids=["plain", "yarn"]
)
def test_greedy_text_is_that_of_transformers(transformers, tmp_path, changes):
    theirs = hf_model(transformers, **changes)
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


# ── Out ───────────────────────────────────────────────────────────────────────────────────────────


def exported(folder, **changes) -> Loaded:
    config = {
        "vocab_size": 258, "seq_len": 128, "n_layer": 2, "n_head": 3, "d_model": 24, "q_rank": 10,
        "kv_rank": 9, "d_nope": 6, "d_rope": 4, "d_value": 5, "d_ff": 20, "d_expert": 8,
        "n_expert": 6, "n_active": 2, "n_group": 3, "n_active_group": 2, "weight_factor": 1.7,
        "norm_eps": 1e-2,
    }  # fmt: skip
    model = uneven(DeepseekMTP(DeepseekConfig(**config | changes))).eval()
    loaded = Loaded(folder, model, ByteTokenizer(), (ByteTokenizer.eos_id,))
    checkpoint.export(loaded, folder)
    return loaded


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": False, "q_rank": 0},
        {"rope_scaling": YarnScaling(4.0, 2.0, 20.0, 32, 0.7), "rope_theta": 500.0},
        {"n_ahead": 0, "n_shared": 2, "normalize_weights": False},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_exported_model_gives_equal_logits_in_transformers(transformers, tmp_path, changes):
    """Biases of balance and all: transformers has them too."""
    loaded = exported(tmp_path, **changes)
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
    assert theirs("The fox é")["input_ids"] == ByteTokenizer().encode("The fox é")


def test_exported_folder_loads_here_too(tmp_path):
    loaded = exported(tmp_path, tie_embeddings=False, n_ahead=0)
    again = checkpoint.load(tmp_path)
    assert (again.model.config, again.stop_ids) == (loaded.model.config, loaded.stop_ids)
    ours, theirs = loaded.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("changes", [{"softmax_scores": True}, {"n_shared": 0}], ids=str)
def test_what_transformers_does_not_know_is_not_exported(tmp_path, changes):
    with pytest.raises(UserError, match="which Hugging Face's DeepSeek-V3 does not know"):
        exported(tmp_path / "hf", **changes)
    assert not (tmp_path / "hf").exists()


def test_orders_of_rotary_channels_undo_each_other():
    rows = torch.arange(8.0)[:, None]
    assert huggingface.half_split(rows).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert torch.equal(huggingface.neighbours(huggingface.half_split(rows)), rows)


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
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"scoring_func": "softmax"}, 'scoring_func "softmax"'),
        ({"topk_method": "greedy"}, 'topk_method "greedy"'),
        ({"moe_layer_freq": 2}, "moe_layer_freq 2"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_type llama3"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "is missing"),
        ({"rope_scaling": YARN | {"mscale": 0.5}}, "mscale 0.5 is not supported"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
        ({"rope_parameters": [3]}, "the rotary parameters are no object"),
        ({"num_experts_per_tok": 6}, "n_active 6 is more than n_expert"),
        ({"num_experts_per_tok": 0}, "n_active must be at least 1"),
        ({"n_routed_experts": 9}, "is of 6 experts, not 9"),
        ({"n_routed_experts": 8}, "n_expert 8 cannot be n_group 3"),
        ({"qk_rope_head_dim": 5}, "odd"),
        ({"qk_rope_head_dim": 6}, "rows, not"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 3}, "lack blocks.2"),
        ({"num_hidden_layers": 10**9}, "the model in .* needs [0-9,.]+ GB"),
        ({"n_routed_experts": 3 * 10**8}, "the model in .* needs [0-9,.]+ GB"),
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


E3 = "model.layers.1.mlp.experts.3.gate_proj.weight"
STACKED = "model.layers.1.mlp.experts.gate_up_proj"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack norm.weight"),
        (lambda t: t.pop(E3), "w1 is of 5 experts, not 6"),
        (lambda t: t.update({E3: torch.ones(8, 25)}), "differ in shape"),
        (lambda t: t.update({E3: torch.ones(8, 24).half()}), "differ in shape or number format"),
        (lambda t: t.update({STACKED: torch.ones(6, 7, 24)}), "no pairs of matrices"),
        (lambda t: t.pop(BIAS), "lack blocks.1.ffn.router.bias"),
        (lambda t: t.update({"extra.bias": torch.ones(1)}), "have extra.bias"),
    ],
    ids=["norm", "expert", "shape", "format", "odd", "bias", "extra"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    respoil(folder, change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)


def test_folder_without_a_config_is_refused_and_says_so(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config.json: neither a run nor a DeepSeek"):
        checkpoint.load(folder)


def test_names_of_theirs_cover_the_model(sizes):
    """Every tensor of ours has a name of theirs, and comes back under its own."""
    state = DeepseekMTP(sizes).state_dict()
    theirs = huggingface.to_their_names(state, sizes)
    assert all(name.startswith(("model.", "lm_head.")) for name in theirs)
    back = huggingface.to_our_names(theirs, sizes, True, "here")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("ahead.")}
    assert back.keys() == kept.keys()
    assert all(torch.equal(back[name], kept[name]) for name in kept)
