"""Translation models of Hugging Face's Marian kind: config, weights and subwords, both ways.

    config.json        sizes; generation_config.json: how a translation begins and ends
    model.safetensors  weights, or pytorch_model.bin, from which nothing but tensors is read
    source.spm         SentencePiece model that cuts the source; target.spm: the target
    vocab.json         the id of every piece of both

The OPUS-MT models of the Hub are such folders. Marian is the paper's model, post-norm, with all
sines of the positions before the cosines, one more number for each logit, and the padding id as
what the decoder reads first. What a folder asks for that model.py does not have is refused by name.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from model import TransformerConfig, sinusoids
from options import UserError, make_config, shorten
from run import read_json, whole_file, write_json

SIZES = {  # our names and theirs
    "vocab_size": "vocab_size",
    "seq_len": "max_position_embeddings",
    "n_layer": "encoder_layers",
    "n_decoder_layer": "decoder_layers",
    "n_head": "encoder_attention_heads",
    "d_model": "d_model",
    "d_ff": "encoder_ffn_dim",
    "dropout": "dropout",
    "activation": "activation_function",
    "scale_embedding": "scale_embedding",
    "pad_id": "pad_token_id",
    "start_id": "decoder_start_token_id",
    "end_id": "eos_token_id",
}
EQUAL = {  # theirs that must be equal to another of theirs
    "decoder_attention_heads": "encoder_attention_heads",
    "decoder_ffn_dim": "encoder_ffn_dim",
    "decoder_vocab_size": "vocab_size",
}
FIXED = {  # theirs that model.py has in one way only
    "model_type": "marian",
    "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True,
    "normalize_before": False,
    "normalize_embedding": False,
    "add_final_layer_norm": False,
    "static_position_embeddings": True,
}
BLOCK = {  # our names and theirs of what is in a block, without .weight or .bias at the end
    "attention.wo": "self_attn.out_proj",
    "attention_sum.norm": "self_attn_layer_norm",
    "cross.wo": "encoder_attn.out_proj",
    "cross_sum.norm": "encoder_attn_layer_norm",
    "ffn.w1": "fc1",
    "ffn.w2": "fc2",
    "ffn_sum.norm": "final_layer_norm",
}
JOINED = {  # ours that hold several of theirs, one above the other: q_proj, k_proj, v_proj
    "attention.wqkv": ("self_attn", "qkv"),
    "cross.wq": ("encoder_attn", "q"),
    "cross.wkv": ("encoder_attn", "kv"),
}
TIED = ("lm_head.weight", "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
STACKS = ("encoder", "decoder")


# ── Configs ───────────────────────────────────────────────────────────────────────────────────────


def our_config(config: dict, where: Path) -> TransformerConfig:
    """A Marian config.json as our sizes. UserError for what model.py does not have."""
    for name, value in FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{where}: {name} {shorten(config[name], 40)} is not supported here")
    for name, other in EQUAL.items():
        if config.get(name) not in (None, config.get(other)):
            raise UserError(f"{where}: {name} and {other} differ, which is not supported here")
    values = {ours: config.get(theirs) for ours, theirs in SIZES.items()}
    defaults = {"dropout": 0.1, "scale_embedding": False}  # MarianConfig's own
    values = {k: defaults.get(k) if v is None else v for k, v in values.items()}
    if missing := [SIZES[name] for name, value in values.items() if value is None]:
        raise UserError(f"{where}: {missing[0]} is missing")
    if values["activation"] == "silu":  # two names of one thing
        values["activation"] = "swish"
    values |= {"positions": "sines-first", "logits_bias": True}
    return make_config(TransformerConfig, values, where)


def their_config(sizes: TransformerConfig) -> dict:
    """The reverse of `our_config`. UserError for what Marian does not have."""
    if sizes.norm != "post":
        raise UserError("a Marian folder is post-norm: this model is pre-norm")
    if sizes.norm_eps != 1e-5:
        raise UserError(f"a Marian folder has norm_eps 1e-5: this model has {sizes.norm_eps}")
    values = {theirs: getattr(sizes, ours) for ours, theirs in SIZES.items()}
    values["decoder_layers"] = sizes.decoder_layers
    values |= {name: values[other] for name, other in EQUAL.items()} | FIXED
    return values | {
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "forced_eos_token_id": sizes.end_id,
    }


def generation_rules(folder: Path, sizes: TransformerConfig) -> dict:
    """What generation_config.json, or else config.json, says of how translations begin and end."""
    said = read_json(folder / "generation_config.json", optional=True)
    said = said or read_json(folder / "config.json")
    never = {sizes.pad_id}
    for words in said.get("bad_words_ids") or []:
        if not (isinstance(words, list) and len(words) == 1 and type(words[0]) is int):
            raise UserError(f"{folder}: bad_words_ids of several tokens are not supported here")
        never.add(words[0])
    if wrong := [one for one in never if not 0 <= one < sizes.vocab_size or one == sizes.end_id]:
        raise UserError(f"{folder}: bad_words_ids {wrong[0]} is no token that can be left out")
    return {
        "start": sizes.start_id,
        "end": sizes.end_id,
        "never": tuple(sorted(never)),
        "end_at_limit": said.get("forced_eos_token_id") == sizes.end_id,
        "renormalise": bool(said.get("renormalize_logits", False)),
    }


def their_generation(rules, sizes: TransformerConfig) -> dict:
    """The reverse of `generation_rules`."""
    return {
        "bad_words_ids": [[one] for one in rules.never],
        "decoder_start_token_id": rules.start,
        "eos_token_id": rules.end,
        "forced_eos_token_id": rules.end if rules.end_at_limit else None,
        "pad_token_id": sizes.pad_id,
        "max_length": sizes.seq_len,
        "num_beams": 4,
        "renormalize_logits": rules.renormalise,
    }


# ── Weights ───────────────────────────────────────────────────────────────────────────────────────


def to_our_names(tensors: dict[str, Tensor], sizes: TransformerConfig, where: Path) -> dict:
    """Their tensors under our names. A name that is not known stays, for `fill` to report.

    UserError for position tables that are not the sinusoids.
    """
    known = {theirs: ours for ours, theirs in BLOCK.items()}
    tensors, ours = dict(tensors), {}
    for name in TIED:  # copies of the one embedding
        tensors.pop(name, None)
    for stack in STACKS:
        table = tensors.pop(f"model.{stack}.embed_positions.weight", None)
        refuse_other_positions(table, sizes, where)
    for stack, layer, joined, part in joined_parts(sizes):
        where_theirs, letters = JOINED[joined]
        before = f"model.{stack}.layers.{layer}.{where_theirs}"
        names = [f"{before}.{letter}_proj.{part}" for letter in letters]
        if all(name in tensors for name in names):
            parts = [tensors.pop(name) for name in names]
            if len({tuple(one.shape) for one in parts}) == 1:
                ours[f"{stack}.{layer}.{joined}.{part}"] = torch.cat([one.float() for one in parts])
    for name, tensor in tensors.items():
        found = re.fullmatch(
            r"model\.(encoder|decoder)\.layers\.([0-9]+)\.(.+)\.(weight|bias)", name
        )
        if found and found[3] in known:
            name = f"{found[1]}.{found[2]}.{known[found[3]]}.{found[4]}"
        elif name == "model.shared.weight":
            name = "embedding.weight"
        elif name == "final_logits_bias":
            name, tensor = "logits_bias", tensor.flatten()
        ours[name] = tensor
    ours.setdefault("logits_bias", torch.zeros(sizes.vocab_size))
    return ours


def joined_parts(sizes: TransformerConfig) -> list[tuple[str, int, str, str]]:
    """(stack, layer, name, weight or bias) of every matrix of ours that joins some of theirs."""
    encoder = [("encoder", layer, "attention.wqkv") for layer in range(sizes.n_layer)]
    decoder = [("decoder", n, name) for n in range(sizes.decoder_layers) for name in JOINED]
    return [(*one, part) for one in encoder + decoder for part in ("weight", "bias")]


def refuse_other_positions(table: Tensor | None, sizes: TransformerConfig, where: Path) -> None:
    """UserError if a folder's table of positions is not the one that model.py works out."""
    if table is None:
        return
    ours = sinusoids(min(len(table), sizes.seq_len), sizes.d_model, "sines-first")
    theirs = table[: len(ours)].double()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, atol=2e-3):  # float16 too
        raise UserError(f"{where}: its position table holds something else than sinusoids")


def sines_first(state: dict[str, Tensor], d_model: int) -> dict[str, Tensor]:
    """Our weights with the D numbers of every vector in another order: all even ones, then the odd.

    Positions in the paper's order become positions with sines first. Whatever reads a vector has
    its columns in the new order, whatever writes one has its rows, so the model computes the same.
    """
    order = torch.cat((torch.arange(0, d_model, 2), torch.arange(1, d_model, 2)))
    reads = ("embedding.weight", "wqkv.weight", "wq.weight", "wkv.weight", "w1.weight")
    writes = ("wo.weight", "wo.bias", "w2.weight", "w2.bias", "norm.weight", "norm.bias")
    return {
        name: tensor[:, order] if name.endswith(reads)
        else tensor[order] if name.endswith(writes) else tensor
        for name, tensor in state.items()
    }  # fmt: skip


def to_their_names(state: dict[str, Tensor], sizes: TransformerConfig) -> dict[str, Tensor]:
    """Our tensors under their names."""
    if sizes.positions == "interleaved":
        state = sines_first(state, sizes.d_model)
    theirs = {"model.shared.weight": state["embedding.weight"]}
    bias = state.get("logits_bias")
    bias = torch.zeros(sizes.vocab_size) if bias is None else bias
    theirs["final_logits_bias"] = bias[None]
    for name, tensor in state.items():
        found = re.fullmatch(r"(encoder|decoder)\.([0-9]+)\.(.+)\.(weight|bias)", name)
        if not found:
            continue
        stack, layer, inner, part = found.groups()
        before = f"model.{stack}.layers.{layer}"
        if inner in JOINED:
            where_theirs, letters = JOINED[inner]
            for letter, rows in zip(letters, tensor.chunk(len(letters)), strict=True):
                theirs[f"{before}.{where_theirs}.{letter}_proj.{part}"] = rows.clone()
        else:
            theirs[f"{before}.{BLOCK[inner]}.{part}"] = tensor
    return theirs


# ── Subwords ──────────────────────────────────────────────────────────────────────────────────────


class MarianSubwords:
    """Two SentencePiece models, one a language, and one table of ids."""

    FILES = ("source.spm", "target.spm", "vocab.json")
    IN_RUN = ("source.model", "target.model", "tokenizer_vocab.json")

    def __init__(self, source: bytes, target: bytes, vocab: dict[str, int]):
        """source, target: the files' bytes. vocab: id by piece. Raises ValueError if unfit."""
        import sentencepiece

        self.serialized, self.vocab = (source, target), vocab
        self.models = []
        for content in self.serialized:
            model = sentencepiece.SentencePieceProcessor()
            model.LoadFromSerializedProto(content)
            self.models.append(model)
        ids = list(vocab.values())
        whole = all(type(one) is int and one >= 0 for one in ids)
        if not whole or not {"<unk>", "</s>"} <= vocab.keys() or len(set(ids)) < len(ids):
            raise ValueError("vocab.json gives no id of its own to each piece, <unk> and </s>")
        self.pieces = {one: piece for piece, one in vocab.items()}
        self.special = {vocab.get(name) for name in ("<unk>", "</s>", "<pad>")}
        self.vocab_size = max(ids) + 1

    def encode(self, text: str, target: bool = False) -> list[int]:
        """The ids of a text, without an end. A text may begin with a language as >>ind<<."""
        code = re.match(r">>[^<>]*<<", text)
        pieces = [code[0]] if code else []
        pieces += self.models[target].encode(text[len(code[0]) if code else 0 :], out_type=str)
        return [self.vocab.get(piece, self.vocab["<unk>"]) for piece in pieces]

    def decode(self, ids: list[int]) -> str:
        """The text of ids; those without a text of their own are passed over."""
        pieces = [self.pieces.get(one, "") for one in ids if one not in self.special]
        return self.models[0].decode_pieces(pieces).replace("▁", " ").strip()

    def save(self, folder: Path, names: tuple[str, ...] = IN_RUN) -> None:
        """Write the three files."""
        for name, content in zip(names, self.serialized, strict=False):
            with whole_file(Path(folder) / name) as part:
                part.write_bytes(content)
        write_json(Path(folder) / names[2], self.vocab)

    @classmethod
    def load(cls, folder: Path, names: tuple[str, ...] = FILES) -> "MarianSubwords":
        """Read the three files. UserError if one is missing or damaged."""
        contents, vocab = [], read_json(Path(folder) / names[2])
        for name in names[:2]:
            try:
                contents.append((Path(folder) / name).read_bytes())
            except FileNotFoundError:
                raise UserError(f"{Path(folder) / name} is missing") from None
        try:
            return cls(*contents, vocab)
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise UserError(
                f"the subwords in {folder} are damaged: {shorten(error, 200)}"
            ) from None


def export_subwords(subwords, folder: Path) -> None:
    """Write the three files of subwords of either kind; one model of ours serves both languages."""
    if isinstance(subwords, MarianSubwords):
        subwords.save(folder, MarianSubwords.FILES)
        return
    vocab = {piece: i for i, piece in enumerate(subwords.pieces)}
    both = (subwords.model, subwords.model)
    MarianSubwords(*both, vocab).save(folder, MarianSubwords.FILES)
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": "MarianTokenizer"})
