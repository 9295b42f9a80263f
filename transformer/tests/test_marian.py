"""Marian folders: logits, greedy search and beams against transformers, and back again."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from modelling import shaken

import checkpoint
import data
import decode
import marian
from checkpoint import Loaded
from decode import Search
from model import Transformer, TransformerConfig
from options import UserError

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

no_moses = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
PAIRS = [
    ("The dog sees a big cat .", "Anjing itu melihat kucing besar ."),
    ("She buys two red books .", "Dia membeli dua buku merah ."),
    ("We do not eat rice .", "Kami tidak makan nasi ."),
]
SHAPES = [
    {"encoder_layers": 2, "decoder_layers": 2},
    {"encoder_layers": 3, "decoder_layers": 1, "d_model": 24, "activation_function": "relu",
     "encoder_attention_heads": 3, "decoder_attention_heads": 3},
    {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20,
     "scale_embedding": False, "activation_function": "gelu"},
]  # fmt: skip


@pytest.fixture(scope="module")
def subwords():
    """Some pieces of a few words, bytes for the rest."""
    return data.Subwords.train(PAIRS * 3, 300)


def their_model(vocab_size: int, seed: int = 0, **shape):
    """A MarianMTModel with random weights, none of them 0 or 1, and padding as the start."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocab_size, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": vocab_size - 1,
        "eos_token_id": 0, "decoder_start_token_id": vocab_size - 1, "forced_eos_token_id": 0,
        "activation_function": "swish", "scale_embedding": True, "init_std": 0.3,
    }  # fmt: skip
    config = transformers.MarianConfig(**(values | shape))
    theirs = shaken(transformers.MarianMTModel(config)).eval()
    with torch.no_grad():
        theirs.final_logits_bias.normal_()
        for table in (theirs.model.encoder.embed_positions, theirs.model.decoder.embed_positions):
            table.weight.copy_(table.create_weight())  # which the shaking has shaken
    return theirs


def write_folder(folder: Path, subwords, seed: int = 0, binary: bool = False, **shape):
    """A Marian folder as the Hub has them. Its ids are not those of its SentencePiece models."""
    pieces = ["</s>", "<unk>", *[p for p in subwords.pieces if p not in ("</s>", "<unk>", "<pad>")]]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<pad>"])}
    theirs = their_model(len(vocab), seed, **shape)
    theirs.generation_config.bad_words_ids = [[len(vocab) - 1]]
    theirs.save_pretrained(folder)
    if binary:
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(subwords.model)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return theirs


def their_logits(theirs, source, target) -> torch.Tensor:
    pad_id = theirs.config.pad_token_id
    with torch.no_grad():
        return theirs(
            input_ids=source, attention_mask=(source != pad_id).long(), decoder_input_ids=target
        ).logits


def random_batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    source, target = torch.randint(1, vocab_size - 1, (2, 5, 9))
    source[0, 6:] = source[3, 2:] = vocab_size - 1
    target[:, 0] = vocab_size - 1
    return source, target


# ── In ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))
def test_logits_are_theirs(tmp_path, subwords, shape, binary):
    theirs = write_folder(tmp_path, subwords, binary=binary, **shape)
    loaded = checkpoint.load(tmp_path)
    source, target = random_batch(theirs.config.vocab_size)
    ours, expected = loaded.model(source, target), their_logits(theirs, source, target)
    assert (ours - expected).abs().max() <= 1e-4
    expected = their_logits(theirs.double(), source, target)
    assert (
        loaded.model.double()(source, target) - expected
    ).abs().max() <= 2e-6  # their positions are rounded to float32


def generated(theirs, source, search: Search, **more) -> list[tuple[list[int], float]]:
    """(tokens without start and end, score) of each of theirs."""
    pad_id, end = theirs.config.pad_token_id, theirs.config.eos_token_id
    out = theirs.generate(
        input_ids=source, attention_mask=(source != pad_id).long(), num_beams=search.beam,
        length_penalty=search.length_penalty, max_new_tokens=search.max_new_tokens,
        do_sample=False, return_dict_in_generate=True, output_scores=True, **more,
    )  # fmt: skip
    found = []
    scores = out.sequences_scores.tolist() if search.beam > 1 else [0.0] * len(out.sequences)
    for ids, score in zip(out.sequences[:, 1:].tolist(), scores, strict=True):
        found.append((ids[: ids.index(end)] if end in ids else ids, score))
    return found


def same(ours: list, theirs: list) -> None:
    """The same tokens and scores; two that score the same to six digits may change places."""
    assert len(ours) == len(theirs)
    for i, (hypothesis, (tokens, score)) in enumerate(zip(ours, theirs, strict=True)):
        near = [t for t, s in theirs[max(0, i - 1) : i + 2] if abs(s - score) <= 2e-6]
        assert list(hypothesis.tokens) in near or list(hypothesis.tokens) == tokens
        assert hypothesis.score == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("beam", [4, 2])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("stopping", ["exact", "usual"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_beams_are_those_of_generate(tmp_path, subwords, beam, alpha, stopping, renormalise):
    """Token by token and score by score; "exact" is early_stopping="never", "usual" its default."""
    theirs = write_folder(tmp_path, subwords, seed=beam)
    theirs.generation_config.renormalize_logits = renormalise
    theirs.save_pretrained(tmp_path)
    loaded, (source, _) = checkpoint.load(tmp_path), random_batch(theirs.config.vocab_size)
    assert loaded.rules.renormalise == renormalise
    n = beam if stopping == "usual" else 1
    search = Search(beam=beam, nbest=n, length_penalty=alpha, stopping=stopping, max_new_tokens=14)
    limits = torch.full((len(source),), 14)
    ours = decode.beam_search(loaded.model, source, loaded.rules, limits, search)
    expected = generated(theirs, source, search, num_return_sequences=n,
                         early_stopping="never" if stopping == "exact" else False)  # fmt: skip
    for row, hypotheses in enumerate(ours):
        same(hypotheses, expected[n * row : n * row + n])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_is_that_of_generate(tmp_path, subwords, seed):
    theirs = write_folder(tmp_path, subwords, seed, **SHAPES[seed])
    loaded, (source, _) = checkpoint.load(tmp_path), random_batch(theirs.config.vocab_size)
    search = Search(beam=1, max_new_tokens=14)
    limits = torch.full((len(source),), 14)
    ours = decode.greedy_search(loaded.model, source, loaded.rules, limits)
    expected = generated(theirs, source, search)
    assert [list(one[0].tokens) for one in ours] == [tokens for tokens, _ in expected]


@no_moses
def test_text_in_text_out_is_theirs(tmp_path, subwords):
    """With their tokenizer around their model: the whole way from sentence to sentence."""
    theirs = write_folder(tmp_path, subwords)
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    texts = ["The dog sees rice .", "We eat two red cats .", "öé?"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    loaded = checkpoint.load(tmp_path)
    for text, ids, mask in zip(texts, inputs.input_ids, inputs.attention_mask, strict=True):
        assert [*loaded.subwords.encode(text), 0] == ids[mask.bool()].tolist()
    out = theirs.generate(**inputs, num_beams=4, max_new_tokens=12, do_sample=False)
    expected = tokenizer.batch_decode(out, skip_special_tokens=True)
    found = decode.translate(loaded, texts, Search(max_new_tokens=12, stopping="usual"))
    assert [one[0][0] for one in found] == [text.strip() for text in expected]


def test_a_language_code_is_one_token(tmp_path, subwords):
    write_folder(tmp_path, subwords)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    table = {piece: i for piece, i in vocab.items() if piece != "▁"} | {">>ind<<": vocab["▁"]}
    theirs = marian.MarianSubwords(subwords.model, subwords.model, table)
    assert theirs.encode(">>ind<<")[0] == vocab["▁"]


# ── Out ───────────────────────────────────────────────────────────────────────────────────────────


@no_moses
@pytest.mark.parametrize("positions", ["interleaved", "sines-first"])
def test_export_loads_there_and_translates_the_same(tmp_path, subwords, positions):
    """The order of the positions is changed on the way, and nothing else."""
    config = TransformerConfig(
        vocab_size=subwords.vocab_size, seq_len=40, n_layer=2, n_decoder_layer=3, n_head=3,
        d_model=24, d_ff=20, activation="swish", positions=positions,
    )  # fmt: skip
    model = shaken(Transformer(config)).eval()
    loaded = Loaded(tmp_path, model, subwords, checkpoint.rules_of(config))
    checkpoint.export(loaded, tmp_path / "out")
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path / "out")
    texts = [source for source, _ in PAIRS]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    source = data.pad([[*subwords.encode(text), 3] for text in texts])
    assert torch.equal(inputs.input_ids, source)
    target = torch.randint(4, subwords.vocab_size, (3, 7))
    assert (model(source, target) - their_logits(theirs, source, target)).abs().max() <= 1e-4
    out = theirs.generate(**inputs, num_beams=4, max_new_tokens=12, early_stopping="never")
    expected = tokenizer.batch_decode(out, skip_special_tokens=True)
    found = decode.translate(loaded, texts, Search(max_new_tokens=12))
    assert [one[0][0].strip() for one in found] == [text.strip() for text in expected]


def test_out_and_in_again_is_the_same_model(tmp_path, subwords):
    write_folder(tmp_path / "a", subwords)
    loaded = checkpoint.load(tmp_path / "a")
    checkpoint.export(loaded, tmp_path / "b")
    again = checkpoint.load(tmp_path / "b")
    assert again.model.config == loaded.model.config and again.rules == loaded.rules
    state = loaded.model.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.model.state_dict().items())
    assert again.subwords.vocab == loaded.subwords.vocab


def test_pre_norm_is_no_marian(tmp_path, subwords):
    config = TransformerConfig(vocab_size=subwords.vocab_size, norm="pre", d_model=24, n_head=3)
    loaded = Loaded(tmp_path, Transformer(config), subwords, checkpoint.rules_of(config))
    with pytest.raises(UserError, match="post-norm"):
        checkpoint.export(loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ── What cannot be ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model_type": "bart"}, "model_type bart"), ({"normalize_before": True}, "normalize_before"),
     ({"share_encoder_decoder_embeddings": False}, "share_encoder"), ({"d_model": None}, "d_model"),
     ({"decoder_attention_heads": 2}, "decoder_attention_heads"), ({"d_model": "32"}, "d_model"),
     ({"activation_function": "tanh"}, "activation"), ({"encoder_layers": 3}, "encoder.2"),
     ({"vocab_size": 999, "decoder_vocab_size": 999}, "needs"),
     ({"pad_token_id": 9999}, "pad_id"),
     ({"encoder_layers": 10**9}, "needs"), ({"d_model": 2.5}, "d_model"),
     ({"eos_token_id": [0]}, "end_id"),
     ({"encoder_ffn_dim": 20, "decoder_ffn_dim": 20}, "ffn")],
    ids=str,
)  # fmt: skip
def test_configs_that_we_cannot_build_are_refused_by_name(tmp_path, subwords, change, message):
    write_folder(tmp_path, subwords)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


def test_other_positions_are_refused(tmp_path, subwords):
    theirs = write_folder(tmp_path, subwords, binary=True)
    state = theirs.state_dict()
    state["model.encoder.embed_positions.weight"] = torch.randn(64, 32)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="sinusoids"):
        checkpoint.load(tmp_path)


class Bomb:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_weights_with_code_in_them_do_not_run(tmp_path, subwords):
    write_folder(tmp_path, subwords, binary=True)
    torch.save({"model.shared.weight": Bomb(tmp_path / "marker")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        checkpoint.load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "marker")))
    with pytest.raises(UserError):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "marker").exists()


FILES = ["config.json", "source.spm", "target.spm", "vocab.json", "model.safetensors"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_damaged_folders_are_one_line(tmp_path, subwords, name, how):
    write_folder(tmp_path, subwords)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if how != "missing":
        (tmp_path / name).write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "vocab",
    [{}, {"<unk>": 0, "</s>": 0}, {"<unk>": "1", "</s>": 0}, {"<unk>": 10**9, "</s>": 0}],
    ids=str,
)
def test_vocabularies_that_cannot_be(tmp_path, subwords, vocab):
    write_folder(tmp_path, subwords)
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    with pytest.raises(UserError):
        checkpoint.load(tmp_path)
