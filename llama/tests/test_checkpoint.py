"""Weights in and out, held to `transformers` in both directions and to Meta's definition."""

import io
import math
import pickle

import pytest
import safetensors.torch
import sentencepiece
import torch
from harness import Bomb, flip_a_bit

import checkpoint
import huggingface
import meta
from checkpoint import Loaded
from generate import SampleConfig, Sampling, generate, write
from meta import half_split_rows, interleaved_rows
from model import Llama, LlamaConfig, RopeScaling, RotaryTable, rotary_frequencies, rotate
from options import UserError
from run import read_json, write_json
from tokenizer import ByteTokenizer, CharacterTokenizer, SentencePieceTokenizer

VOCAB = 300
TEXTS = [
    "Once upon a time there was a fox.",
    "  two  spaces ",
    "lines\n\nand\ttabs\r\n",
    "é 漢字 🙂 ½",
    "12345 <not special>",
    "",
]


# ── Hugging Face in ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, **changes):
    """A random Llama of transformers whose constants would all show if one were ignored."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 10,  # not 48 / 8
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # they begin at 1, which hides that they are used at all
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    ByteTokenizer().save(folder)
    return folder


@torch.no_grad()
def difference(ours: Llama, theirs) -> float:
    """The largest difference of their logits over a sequence of 100 tokens."""
    rows = torch.randint(VOCAB, (2, 100))
    expected = theirs(rows).logits
    assert expected.std() > 0.3  # else closeness would mean little
    return (ours(rows) - expected).abs().max().item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1, "head_dim": None, "hidden_size": 64},
        {"rope_parameters": LLAMA3},  # 100 positions, beyond the original context of 32
    ],
    ids=["8/2", "8/4", "8/8", "8/1, head_dim left out", "llama3 scaling"],
)
def test_logits_are_those_of_transformers(transformers, tmp_path, changes, tied):
    theirs = hf_model(transformers, tie_word_embeddings=tied, **changes)
    ours = checkpoint.load(save(theirs, tmp_path)).model
    assert ours.config.tie_embeddings == tied
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("scaled", [False, True])
def test_old_style_config_gives_the_same_logits(transformers, tmp_path, scaled):
    """transformers 4 wrote rope_theta beside rope_scaling, transformers 5 joins the two."""
    theirs = hf_model(transformers, **({"rope_parameters": LLAMA3} if scaled else {}))
    save(theirs, tmp_path)
    config = read_json(tmp_path / "config.json")
    rope = config.pop("rope_parameters")  # the new style is what the tests above read
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if scaled else None
    write_json(tmp_path / "config.json", config)
    assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


def test_theta_beside_the_rotary_parameters_counts(transformers, tmp_path):
    """A mixture of both styles, in which transformers takes it too."""
    save(hf_model(transformers), tmp_path)
    config = read_json(tmp_path / "config.json")
    config |= {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0}
    write_json(tmp_path / "config.json", config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


def test_rope_scaling_called_type_instead_of_rope_type(transformers, tmp_path):
    theirs = hf_model(transformers, rope_parameters=LLAMA3)
    save(theirs, tmp_path)
    config = read_json(tmp_path / "config.json")
    config["rope_parameters"]["type"] = config["rope_parameters"].pop("rope_type")
    write_json(tmp_path / "config.json", config)
    assert checkpoint.load(tmp_path).model.config.rope_scaling == RopeScaling(4.0, 1.0, 4.0, 32)


def test_config_without_what_may_be_left_out(tmp_path):
    """transformers' own defaults: as many key heads as heads, θ 10,000, ε 1e-6, not tied."""
    config = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "intermediate_size": 4,
        "vocab_size": 9,
    }
    assert huggingface.our_config(config, tmp_path) == LlamaConfig(
        vocab_size=9, seq_len=2048, n_layer=1, n_head=2, n_kv_head=2, d_model=8, d_head=4, d_ff=4,
        rope_theta=10_000.0, norm_eps=1e-6, tie_embeddings=False,
    )  # fmt: skip


def test_sharded_weights_give_the_same_logits(transformers, tmp_path):
    theirs = hf_model(transformers)
    save(theirs, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


def test_bfloat16_weights_are_read_as_float32(transformers, tmp_path):
    ours = checkpoint.load(save(hf_model(transformers).bfloat16(), tmp_path)).model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert ours.embedding.weight.dtype == torch.float32
    assert difference(ours, theirs) <= 1e-4


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_give_the_same_logits(transformers, tmp_path, sharded):
    """pytorch_model.bin, which many folders of the Hub have alone; in torch's old format too."""
    theirs = hf_model(transformers, tie_word_embeddings=True)
    save(theirs, tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        halves = {
            "pytorch_model-00001-of-00002.bin": names[:9],
            "pytorch_model-00002-of-00002.bin": names[9:],
        }
        for file, half in halves.items():
            torch.save({name: tensors[name] for name in half}, tmp_path / file)
        shard_of = {name: file for file, half in halves.items() for name in half}
        write_json(tmp_path / "pytorch_model.bin.index.json", {"weight_map": shard_of})
        assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4
        return
    for new_format in (True, False):
        file = tmp_path / "pytorch_model.bin"
        torch.save(tensors, file, _use_new_zipfile_serialization=new_format)
        assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


def test_safetensors_come_before_pickles(transformers, tmp_path):
    theirs = hf_model(transformers)
    save(theirs, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert difference(checkpoint.load(tmp_path).model, theirs) <= 1e-4


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 500.0}, LLAMA3])
def test_greedy_text_is_that_of_transformers(transformers, tmp_path, rope):
    theirs = hf_model(transformers, rope_parameters=rope)
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


# ── Hugging Face out ──────────────────────────────────────────────────────────────────────────────


def tokenizers(stories: str) -> dict:
    lines = stories.splitlines()
    return {
        "sentencepiece": SentencePieceTokenizer.train(lines, 400),
        "bytes": ByteTokenizer(),
        "characters": CharacterTokenizer("".join(sorted(set(stories)))),
    }


@pytest.fixture(scope="module", params=["sentencepiece", "bytes", "characters"])
def tokenizer(request, stories):
    return tokenizers(stories)[request.param]


def exported(tokenizer, folder, **changes) -> Loaded:
    config = {"vocab_size": tokenizer.vocab_size, "seq_len": 128, "n_layer": 2, "n_head": 4}
    config |= {"n_kv_head": 2, "d_model": 24, "d_head": 10, "d_ff": 36, "norm_eps": 1e-2}
    model = Llama(LlamaConfig(**config | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    loaded = Loaded(folder, model, tokenizer, (tokenizer.eos_id,))
    checkpoint.export(loaded, folder)
    return loaded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, RopeScaling(4.0, 1.0, 4.0, 32)])
def test_exported_model_gives_equal_logits_in_transformers(transformers, tmp_path, tied, scaling):
    loaded = exported(
        ByteTokenizer(), tmp_path, rope_theta=500.0, rope_scaling=scaling, tie_embeddings=tied
    )
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    rows = torch.randint(258, (2, 100))
    with torch.no_grad():
        assert (loaded.model(rows) - theirs(rows).logits).abs().max() <= 1e-4


def test_exported_tokenizer_gives_equal_ids_in_transformers(
    transformers, tmp_path, tokenizer, stories
):
    exported(tokenizer, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *stories.splitlines()]:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, text
        known = tokenizer.decode(ids)
        if not isinstance(tokenizer, CharacterTokenizer) or known == text:
            assert theirs.decode(ids, skip_special_tokens=True) == known, text
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_exported_folder_loads_here_too(tmp_path, tokenizer):
    loaded = exported(tokenizer, tmp_path, tie_embeddings=False)
    again = checkpoint.load(tmp_path)
    assert again.model.config == loaded.model.config
    assert again.stop_ids == loaded.stop_ids
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.parameters(), again.model.parameters(), strict=True)
    )
    assert all(again.tokenizer.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_imported_and_exported_again_is_the_same_model(transformers, tmp_path):
    theirs = hf_model(transformers, rope_parameters=LLAMA3)
    loaded = checkpoint.load(save(theirs, tmp_path / "theirs"))
    checkpoint.export(loaded, tmp_path / "again")
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(state[name], w) for name, w in theirs.state_dict().items())


# ── What ends a text ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, [128, 9], (128, 9)),
        (7, 128, (128,)),
        (None, None, ()),
        ("left out", None, (257,)),  # what the tokenizer says
    ],
)
def test_stop_ids_are_those_of_the_files(tmp_path, config, generation, expected):
    """generation_config.json has the last word, since chat models list their end of turn there."""
    exported(ByteTokenizer(), tmp_path)
    values = read_json(tmp_path / "config.json") | {"eos_token_id": config}
    if config == "left out":
        del values["eos_token_id"]
    write_json(tmp_path / "config.json", values)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": generation})
    assert checkpoint.load(tmp_path).stop_ids == expected


@pytest.mark.parametrize("end", ["x", 1.5, True, [7, "8"], {}], ids=str)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_stop_id_that_is_no_number_is_refused(tmp_path, file, end):
    exported(ByteTokenizer(), tmp_path)
    (tmp_path / "generation_config.json").unlink()
    values = read_json(tmp_path / file, optional=True)
    write_json(tmp_path / file, values | {"eos_token_id": end})
    with pytest.raises(UserError, match="eos_token_id .* is no token"):
        checkpoint.load(tmp_path)


def test_several_stop_ids_survive_an_export(tmp_path):
    loaded = exported(ByteTokenizer(), tmp_path / "a")
    loaded.stop_ids = (257, 10)
    checkpoint.export(loaded, tmp_path / "b")
    assert checkpoint.load(tmp_path / "b").stop_ids == (257, 10)


# ── Meta in ───────────────────────────────────────────────────────────────────────────────────────


def test_half_split_rows_by_hand():
    """Two heads of four rows: (0 1 2 3 | 4 5 6 7) becomes (0 2 1 3 | 4 6 5 7)."""
    rows = torch.arange(8.0)[:, None]
    assert half_split_rows(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("n_head", "d_head"), [(1, 2), (2, 6), (8, 10), (3, 64)])
def test_converter_and_its_reverse_cancel(n_head, d_head):
    weight = torch.randn(n_head * d_head, 5)
    assert torch.equal(half_split_rows(interleaved_rows(weight, n_head), n_head), weight)
    assert torch.equal(interleaved_rows(half_split_rows(weight, n_head), n_head), weight)


def test_converted_rows_give_the_attention_scores_of_metas_definition():
    """Meta's apply_rotary_emb: neighbours are a complex number, times exp(i · position · ω)."""
    wq, wk, x = torch.randn(24, 12), torch.randn(24, 12), torch.randn(1, 16, 12)
    omega = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(16, 4), torch.outer(torch.arange(16.0), omega))[:, None]

    def theirs(w):
        pairs = torch.view_as_complex((x @ w.mT).view(1, 16, 3, 4, 2))
        return torch.view_as_real(pairs * turn).flatten(3)

    def ours(w):
        rotary = RotaryTable(rotary_frequencies(8))(torch.arange(16)[None], 16, torch.float32)
        return rotate((x @ half_split_rows(w, 3).mT).view(1, 16, 3, 8), rotary)

    scores = [torch.einsum("bthc,bshc->bhts", f(wq), f(wk)) for f in (theirs, ours)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-4)


def meta_weights(model: Llama) -> dict[str, torch.Tensor]:
    """Our weights under Meta's names, q and k interleaved."""
    sizes, state = model.config, model.state_dict()
    weights = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in meta.TOP.items()}
    if sizes.tie_embeddings:
        del weights["output.weight"]
    for layer in range(sizes.n_layer):
        for ours, theirs in meta.BLOCK.items():
            weight = state[f"blocks.{layer}.{ours}.weight"]
            n_head = {"wq": sizes.n_head, "wk": sizes.n_kv_head}.get(ours.split(".")[-1])
            if n_head:
                weight = interleaved_rows(weight, n_head)
            weights[f"layers.{layer}.{theirs}.weight"] = weight.clone()
    return weights


def save_meta(model: Llama, folder, **params):
    """A folder as Meta hands it out."""
    sizes = model.config
    values = {"dim": sizes.d_model, "n_layers": sizes.n_layer, "n_heads": sizes.n_head}
    values |= {"n_kv_heads": sizes.n_kv_head, "norm_eps": sizes.norm_eps, "vocab_size": -1}
    folder.mkdir(exist_ok=True)
    write_json(folder / "params.json", values | {"rope_theta": sizes.rope_theta} | params)
    weights = meta_weights(model) | {"rope.freqs": torch.ones(5)}
    torch.save(weights, folder / "consolidated.00.pth")
    ByteTokenizer().save(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_metas_layout_gives_the_same_logits(tmp_path, n_kv_head, scaled, tied):
    sizes = LlamaConfig(
        vocab_size=258,
        seq_len=64,
        n_layer=2,
        n_head=4,
        n_kv_head=n_kv_head,
        d_model=40,
        d_head=10,
        d_ff=36,
        rope_theta=500.0,
        norm_eps=1e-2,
        rope_scaling=RopeScaling(32.0) if scaled else None,
        tie_embeddings=tied,
    )
    ours = Llama(sizes).eval()
    params = {"max_seq_len": 64, "use_scaled_rope": scaled, "rope_scaling_factor": 32.0}
    loaded = checkpoint.load(save_meta(ours, tmp_path, **params)).model
    rows = torch.randint(258, (2, 50))
    assert loaded.config == sizes
    assert torch.equal(loaded(rows), ours(rows))


def test_metas_older_params_leave_out_the_key_heads_and_the_scaling(tmp_path):
    sizes = LlamaConfig(
        vocab_size=258, seq_len=4096, n_layer=1, n_head=4, n_kv_head=4, d_model=40, d_head=10,
        d_ff=36, rope_theta=10_000.0, tie_embeddings=False,
    )  # fmt: skip
    folder = save_meta(Llama(sizes), tmp_path)
    params = read_json(folder / "params.json")
    del params["n_kv_heads"], params["rope_theta"]
    write_json(folder / "params.json", params)
    assert checkpoint.load(folder).model.config == sizes


def test_scaling_that_metas_params_do_not_number(tmp_path):
    """use_scaled_rope alone: 32 in the 1B and 3B of Llama 3.2, 8 in the wider ones of Llama 3.1."""
    for d_model, factor in ((2048, 32.0), (3072, 32.0), (4094, 32.0), (4096, 8.0), (16_384, 8.0)):
        tensors = {"tok_embeddings.weight": torch.empty(9, d_model, device="meta")}
        tensors["layers.0.feed_forward.w1.weight"] = torch.empty(3, d_model, device="meta")
        params = {"n_heads": 1, "n_layers": 1, "norm_eps": 1e-5, "use_scaled_rope": True}
        where = tmp_path / "params.json"
        assert meta.our_config(params, tensors, where).rope_scaling == RopeScaling(factor)
        assert meta.our_config(
            params | {"rope_scaling_factor": 4.0}, tensors, where
        ).rope_scaling == (RopeScaling(4.0))
        params["use_scaled_rope"] = False
        assert meta.our_config(params, tensors, where).rope_scaling is None


@pytest.fixture(scope="module")
def llama2_tokenizer(stories) -> bytes:
    """A tokenizer.model as Llama 2 has one: a space before each text, spaces kept."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stories.splitlines()),
        model_writer=file,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return file.getvalue()


def test_exported_meta_folder_is_the_same_in_transformers(transformers, tmp_path, llama2_tokenizer):
    """Meta's folders have a tokenizer.model and not a word to transformers."""
    ours = Llama(LlamaConfig(vocab_size=400, n_layer=1))
    folder = save_meta(ours, tmp_path / "meta")
    (folder / "alphabet.json").unlink()
    (folder / "tokenizer.model").write_bytes(llama2_tokenizer)
    loaded = checkpoint.load(folder)
    checkpoint.export(loaded, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    special = ["<s>", "</s> a", "a <unk> b", "<0x41>", "\N{LOWER ONE EIGHTH BLOCK}a", " ", "   a"]
    for text in [*TEXTS, *special]:
        ids = loaded.tokenizer.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == loaded.tokenizer.decode(ids)
        assert checkpoint.load(tmp_path / "hf").tokenizer.encode(text) == ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    rows = torch.randint(400, (2, 50))
    with torch.no_grad():
        assert (ours(rows) - theirs(rows).logits).abs().max() <= 1e-4


# ── Ids beyond the tokenizer ──────────────────────────────────────────────────────────────────────


class SaysAlways(torch.nn.Module):
    """Logits that make one token certain."""

    def __init__(self, token: int, vocab_size: int):
        super().__init__()
        self.logits = torch.nn.functional.one_hot(torch.tensor(token), vocab_size).float()

    def forward(self, x):
        return self.logits.expand(*x.shape[:-1], -1)


def test_ids_beyond_the_tokenizer_are_no_text(tmp_path, tokenizer):
    """Vocabularies are padded to round numbers: a model may say an id that stands for nothing."""
    n = tokenizer.vocab_size
    exported(tokenizer, tmp_path, vocab_size=n + 50)
    loaded = checkpoint.load(tmp_path)
    ids = loaded.tokenizer.encode_text("One day")
    assert loaded.tokenizer.decode([*ids, n, n + 49]) == tokenizer.decode(ids)
    loaded.model.head = SaysAlways(n + 49, n + 50)
    assert write(loaded, SampleConfig("One", max_new_tokens=20), Sampling(0)) == "One"


# ── Refusals ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    """A good Hugging Face folder, to be spoilt."""
    exported(ByteTokenizer(), tmp_path, tie_embeddings=False)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, 'model_type "mistral" is not supported'),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type linear"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "config.json: low_freq_factor is missing",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"num_key_value_heads": 3}, "n_kv_head 3 does not divide n_head 4"),
        ({"head_dim": 9}, "odd"),
        ({"rope_theta": None}, "config.json: rope_theta is missing"),
        ({"rope_theta": 10**400}, "config.json: int too large"),
        ({"rms_norm_eps": 10**400}, "config.json: int too large"),
        ({"rms_norm_eps": 2.0}, "norm_eps 2.0 is no size"),
        ({"rope_theta": 0.5}, "rope_theta 0.5 or"),
        ({"num_attention_heads": 0}, "n_head must be at least 1"),
        ({"num_key_value_heads": 0}, "n_kv_head must be at least 1"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json"),
        ({"hidden_size": "wide"}, "config.json"),
        ({"hidden_size": 26}, r"is \(258, 24\), the configuration needs \(258, 26\)"),
        ({"vocab_size": 300}, "the configuration needs"),
        ({"num_hidden_layers": 3}, "lack blocks.2"),
        ({"num_hidden_layers": 1}, "have blocks.1"),
        ({"num_hidden_layers": 10**9}, "the model in .* needs [0-9,.]+ GB"),
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


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "lack norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "lack head.weight"),
        (lambda t: t.pop(Q), "lack blocks.0.attention.wq.weight"),
        (lambda t: t.update({Q: torch.ones(40, 25)}), r"attention.wq.weight is \(40, 25\)"),
        (lambda t: t.update({Q: torch.ones(39, 24)}), r"attention.wq.weight is \(39, 24\)"),
        (lambda t: t.update({"model.norm.weight": torch.ones(23)}), r"norm.weight is \(23,\)"),
        (lambda t: t.update({"extra.bias": torch.ones(1)}), "have extra.bias"),
    ],
    ids=["no norm", "no head", "no q", "q too wide", "q too short", "norm too short", "extra"],
)
def test_weights_that_do_not_fit_are_refused_by_name(folder, change, message):
    respoil(folder, change)
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)


def test_inverse_frequencies_of_old_checkpoints_are_ignored(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = checkpoint.load(folder).model.state_dict()
    respoil(folder, lambda t: t.update({name: torch.ones(5)}))
    after = checkpoint.load(folder).model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("keep", [0, 7, 100, -10])
def test_truncated_weights_are_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(folder)


@pytest.mark.parametrize("bin_name", ["pytorch_model.bin", "shard.bin"])
@pytest.mark.parametrize("as_torch", [True, False])
def test_pickled_weights_with_code_in_them_do_not_run(folder, tmp_path, bin_name, as_torch):
    (folder / "model.safetensors").unlink()
    if bin_name == "shard.bin":
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "shard.bin"}})
    bomb = {"model.norm.weight": Bomb(tmp_path / "marker")}
    if as_torch:
        torch.save(bomb, folder / bin_name)
    else:
        (folder / bin_name).write_bytes(pickle.dumps(bomb))
    with pytest.raises(UserError, match="damaged or holds more than tensors"):
        checkpoint.load(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "something else than named tensors"),
        ({3: torch.ones(2)}, "something else than named tensors"),
        ({"a": 3}, "a is no tensor"),
        ({"model.norm.weight": torch.ones(24).to_sparse()}, "lack|sparse"),
    ],
    ids=str,
)
def test_pickle_of_something_else_is_refused(folder, content, message):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        checkpoint.load(folder)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_sparse_weight_is_refused(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    nested = torch.nested.nested_tensor([torch.ones(24)])
    for spoilt in (torch.ones(24).to_sparse(), torch.empty(24, device="meta"), nested):
        torch.save(tensors | {"model.norm.weight": spoilt}, folder / "pytorch_model.bin")
        with pytest.raises(UserError, match="norm.weight is sparse, nested or has no values"):
            checkpoint.load(folder)


def test_flipped_bit_in_a_pickle_is_refused(folder):
    torch.save(
        safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    checkpoint.load(folder)
    flip_a_bit(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged .* checksum"):
        checkpoint.load(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
@pytest.mark.parametrize("pickled", [False, True])
def test_weights_of_eight_bits_are_refused(folder, pickled, dtype):
    """They stand for other numbers, by scales that are kept beside them."""
    respoil(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    if pickled:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"norm.weight holds {dtype}: quantized"):
        checkpoint.load(folder)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_weights_quantized_by_torch_are_one_line(folder, recwarn):
    """Reading them, torch warns of what it will leave out one day."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    small = torch.quantize_per_tensor(tensors["model.norm.weight"], 0.1, 0, torch.qint8)
    torch.save(tensors | {"model.norm.weight": small}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    recwarn.clear()
    with pytest.raises(UserError, match="norm.weight holds torch.qint8: quantized"):
        checkpoint.load(folder)
    assert not recwarn.list


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weight_that_is_not_finite_is_refused(folder, value):
    respoil(folder, lambda t: t["model.norm.weight"].__setitem__(0, value))
    with pytest.raises(UserError, match="norm.weight holds numbers that are not finite"):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}},
     {"weight_map": {"a": "../elsewhere.bin"}}, {"weight_map": {"a": "/etc/passwd"}},
     {"weight_map": {"a": ""}}, {"weight_map": {"a": ".."}}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_that_names_no_files_of_its_folder_is_refused(folder, kind, index):
    (folder / "model.safetensors").unlink()
    write_json(folder / f"{kind}.index.json", index)
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.load(folder)


def test_memory_is_estimated_before_weights_are_read_or_built(folder, monkeypatch):
    """A width of 10⁸ asks for more than any machine has; nothing else is looked at."""
    for name in ("read_tensors", "fill"):
        monkeypatch.setattr(checkpoint, name, None)
    config = read_json(folder / "config.json") | {"hidden_size": 10**8}
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=r"the model in .* needs [0-9,.]+ GB or more"):
        checkpoint.load(folder)


def test_layers_that_the_weights_lack_are_noticed_before_they_are_built(folder, monkeypatch):
    """A hundred thousand little layers fit, and would take minutes."""
    monkeypatch.setattr(checkpoint, "fill", None)
    config = read_json(folder / "config.json") | {"num_hidden_layers": 100_000}
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match="lack blocks.99999.attention_norm.weight"):
        checkpoint.load(folder)


def test_missing_shard_is_named(folder):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    write_json(folder / "model.safetensors.index.json", index)
    with pytest.raises(UserError, match="model-00001-of-00001.safetensors is missing"):
        checkpoint.load(folder)


def test_tokenizer_with_more_ids_than_the_weights_is_refused(tmp_path):
    exported(ByteTokenizer(), tmp_path)
    CharacterTokenizer("".join(map(chr, range(300, 600)))).save(tmp_path)
    with pytest.raises(UserError, match="the tokenizer has 303 ids, the weights only 258"):
        checkpoint.load(tmp_path)


def test_meta_file_of_something_else_is_refused(tmp_path):
    folder = save_meta(Llama(LlamaConfig(vocab_size=258)), tmp_path)
    for content in ([torch.ones(2)], {"iteration": 3}, {"tok_embeddings.weight": torch.ones(2)}):
        torch.save(content, folder / "consolidated.00.pth")
        with pytest.raises(UserError, match=r"params\.json|consolidated"):
            checkpoint.load(folder)


def test_meta_folder_in_several_parts_is_refused(tmp_path):
    folder = save_meta(Llama(LlamaConfig(vocab_size=258)), tmp_path)
    (folder / "consolidated.01.pth").touch()
    with pytest.raises(UserError, match="has 2 consolidated"):
        checkpoint.load(folder)


def test_names_of_both_layouts_cover_the_model(sizes):
    names = set(Llama(sizes).state_dict())
    for file in (huggingface, meta):
        ours = {f"{name}.weight" for name in file.TOP}
        ours |= {f"blocks.{i}.{name}.weight" for i in range(2) for name in file.BLOCK}
        assert ours == names
