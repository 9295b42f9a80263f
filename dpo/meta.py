"""Meta's original files: params.json and consolidated.00.pth, read into our names and our order.

Meta's q and k rows pair neighbouring channels (2i, 2i + 1) for the rotary embedding, ours and
Hugging Face's pair channel i with i + C/2: `half_split_rows` reorders them.

Key: D d_model, H heads, C d_head.
"""

from pathlib import Path

from torch import Tensor

from model import LlamaConfig
from options import UserError, make_config
from run import read_json
from weights import read_pickle, renamed

TOP = {"embedding": "tok_embeddings", "norm": "norm", "head": "output"}
BLOCK = {
    "attention.wq": "attention.wq",
    "attention.wk": "attention.wk",
    "attention.wv": "attention.wv",
    "attention.wo": "attention.wo",
    "ffn.w1": "feed_forward.w1",
    "ffn.w2": "feed_forward.w2",
    "ffn.w3": "feed_forward.w3",
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}


def read(folder: Path) -> tuple[LlamaConfig, dict[str, Tensor]]:
    """Sizes and weights of a folder, under our names and with our order of channels."""
    files = sorted(folder.glob("consolidated.*.pth"))
    if len(files) != 1:
        raise UserError(f"{folder} has {len(files)} consolidated.*.pth files, one is supported")
    tensors = read_pickle(files[0])
    tensors.pop("rope.freqs", None)
    sizes = our_config(read_json(folder / "params.json"), tensors, folder / "params.json")
    top, block = ({theirs: ours for ours, theirs in names.items()} for names in (TOP, BLOCK))
    return sizes, half_split(renamed(tensors, top, block, ("layers", "blocks")), sizes)


def our_config(params: dict, tensors: dict[str, Tensor], where: Path) -> LlamaConfig:
    """params.json as our sizes; what it leaves out is read off the weights.

    `use_scaled_rope` says that Llama 3.1's scaling is on, and not by how much: it is 8 in the
    models of width 4,096 and more (Llama 3.1), 32 in those below (1B and 3B of Llama 3.2).
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    embedding = shapes.get("tok_embeddings.weight", ())
    if len(embedding) != 2 or not shapes.get("layers.0.feed_forward.w1.weight"):
        raise UserError(
            f"the weights beside {where} are no Llama's: the first matrices are missing"
        )
    n_head, d_model = params.get("n_heads"), embedding[1]
    if type(n_head) is not int or n_head < 1 or "norm_eps" not in params:
        raise UserError(f"{where} and the weights do not fit: n_heads or norm_eps is missing")
    scaled = params.get("use_scaled_rope", False)
    if type(scaled) is not bool:
        raise UserError(f"{where}: use_scaled_rope must be true or false")
    factor = params.get("rope_scaling_factor", 8.0 if d_model >= 4096 else 32.0)
    values = {
        "vocab_size": embedding[0],
        "seq_len": params.get("max_seq_len", 131_072 if scaled else 4096),
        "n_layer": params.get("n_layers"),
        "n_head": n_head,
        "n_kv_head": n_head if params.get("n_kv_heads") is None else params["n_kv_heads"],
        "d_model": d_model,
        "d_head": d_model // n_head,
        "d_ff": shapes["layers.0.feed_forward.w1.weight"][0],
        "rope_theta": params.get("rope_theta", 10_000.0),
        "rope_scaling": {"factor": factor} if scaled else None,
        "norm_eps": params["norm_eps"],
        "tie_embeddings": "output.weight" not in tensors,
    }
    return make_config(LlamaConfig, values, where)


def half_split_rows(weight: Tensor, n_head: int) -> Tensor:
    """Rows (0, 1, 2, …) of each head to (0, 2, 4, …, 1, 3, 5, …). weight: (H·C, D).

    Then channel i is turned with i + C/2, by the angle by which 2i was turned with 2i + 1.
    """
    return weight.unflatten(0, (n_head, -1, 2)).transpose(1, 2).flatten(0, 2)


def interleaved_rows(weight: Tensor, n_head: int) -> Tensor:
    """The reverse of `half_split_rows`."""
    return weight.unflatten(0, (n_head, 2, -1)).transpose(1, 2).flatten(0, 2)


def half_split(state: dict[str, Tensor], sizes: LlamaConfig) -> dict[str, Tensor]:
    """All of Meta's wq and wk in our order."""
    heads, halved = {"wq": sizes.n_head, "wk": sizes.n_kv_head}, {}
    for name, weight in state.items():
        n_head = heads.get(name.removesuffix(".weight").split(".")[-1])
        if n_head and tuple(weight.shape) != (n_head * sizes.d_head, sizes.d_model):
            said = f"{n_head} heads of {sizes.d_head} rows and {sizes.d_model} columns"
            raise UserError(f"{name} is {tuple(weight.shape)}, params.json says {said}")
        halved[name] = half_split_rows(weight, n_head) if n_head else weight
    return halved
