"""State dicts of torch.nn.Embedding, LSTM, GRU, RNN and Linear: read by shape and name, written.

torch.nn calls the weights of layer k weight_ih_lk, weight_hh_lk, bias_ih_lk, bias_hh_lk and, with a
projection, weight_hr_lk; those of the direction that walks backwards end in _reverse. Whatever
stands before these names is a prefix that somebody chose. The order of the gates is ours: i, f, g,
o and r, z, n.

torch has two biases, of input and state, which are only ever added: ours is their sum. (cuDNN asked
for two.) For the n of a GRU they differ, since r multiplies one of them. Written out, ours is the
first and the second is zero. Key: H d_model, P size of h, D size of the input.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

import cells
from model import SequenceConfig, SequenceModel
from options import UserError, shorten
from weights import fill

KIND_OF = {1: "rnn", 4: "lstm", 3: "gru"}  # by the number of gates
NAME = re.compile(r"(.*)weight_ih_l([0-9]{1,3})(_reverse)?")


def build(tensors: dict[str, Tensor], where: Path) -> SequenceModel:
    """The network whose weights these are. UserError if they are not of such a network."""
    prefix = recurrent_prefix(tensors, where)
    sizes, outer = sizes_of(tensors, prefix, where)
    state = dict(outer)
    for layer, direction, end in places(sizes):
        ours = f"layers.{layer}.directions.{direction}."
        found = from_torch(tensors, f"{prefix}{{}}_{end}", sizes, where)
        state |= {ours + name: tensor for name, tensor in found.items()}
    return fill(lambda: SequenceModel(sizes), state, where)


def recurrent_prefix(tensors: dict[str, Tensor], where: Path) -> str:
    """What stands before weight_ih_l0. UserError unless there is exactly one."""
    found = {match[1] for name in tensors if (match := NAME.fullmatch(name))}
    if len(found) != 1:
        what = f"{len(found)} recurrent parts" if found else "no weight_ih_l0"
        raise UserError(f"{where} has {what}: one LSTM, GRU or RNN of torch.nn is expected")
    return found.pop()


def places(sizes: SequenceConfig) -> list[tuple[int, int, str]]:
    """(layer, direction, end of torch's names) of every cell."""
    ends = ("", "_reverse") if sizes.bidirectional else ("",)
    return [(k, d, f"l{k}{end}") for k in range(sizes.n_layer) for d, end in enumerate(ends)]


def needed(tensors: dict[str, Tensor], name: str, where: Path, n_dim: int = 2) -> Tensor:
    """A tensor by name. UserError if it is missing or no matrix (or vector)."""
    if name not in tensors:
        raise UserError(f"the weights in {where} lack {shorten(name, 80)}")
    if tensors[name].dim() != n_dim or not tensors[name].numel():
        raise UserError(f"{where}: {shorten(name, 80)} has the shape {tuple(tensors[name].shape)}")
    return tensors[name]


def sizes_of(tensors: dict[str, Tensor], prefix: str, where: Path) -> tuple[SequenceConfig, dict]:
    """The configuration that the shapes tell, and embedding and head by our names."""
    w_input = needed(tensors, f"{prefix}weight_ih_l0", where)
    w_state = needed(tensors, f"{prefix}weight_hh_l0", where)
    projection = tensors.get(f"{prefix}weight_hr_l0")
    d_model = w_state.shape[1] if projection is None else projection.shape[-1]
    kind = KIND_OF.get(w_state.shape[0] // d_model)
    if kind is None or w_state.shape[0] % d_model:
        raise UserError(f"{where}: {w_state.shape[0]} rows in {prefix}weight_hh_l0 are no cell")
    numbers = [int(m[2]) for name in tensors if (m := NAME.fullmatch(name))]
    both = f"{prefix}weight_ih_l0_reverse" in tensors
    d_proj = 0 if projection is None else projection.shape[0]
    d_out = (2 if both else 1) * (d_proj or d_model)
    embedding, head = outer_names(tensors, prefix, w_input.shape[1], d_out, where)
    weight = needed(tensors, head + "weight", where)
    outer = {"head.weight": weight}
    outer["head.bias"] = tensors.get(head + "bias", weight.new_zeros(len(weight)))
    if embedding:
        outer["embedding.weight"] = tensors[embedding]
    n_token = len(tensors[embedding]) if embedding else 0
    every = n_token == len(weight) and not both
    try:
        sizes = SequenceConfig(
            d_model=d_model, n_layer=max(numbers) + 1, d_embed=w_input.shape[1], cell=kind,
            bidirectional=both, d_proj=d_proj, vocab_size=n_token,
            n_number=0 if embedding else w_input.shape[1], n_answer=len(weight),
            answer="every" if every else "last",
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return sizes, outer


def outer_names(
    tensors: dict[str, Tensor], prefix: str, d_in: int, d_out: int, where: Path
) -> tuple[str | None, str]:
    """The name of the embedding (None without one) and what stands before the head's names.

    Both are matrices outside of the recurrent part. A head has d_out columns, an embedding d_in,
    and only a head has a bias. Where head and embedding are one (tied), there is one matrix alone.
    """
    inside = re.compile(re.escape(prefix) + r"(weight|bias)_(ih|hh|hr)_l[0-9]+(_reverse)?")
    outside = [n for n, t in tensors.items() if not inside.fullmatch(n) and t.dim() == 2]
    heads = [n for n in outside if n.endswith("weight") and tensors[n].shape[1] == d_out]
    with_bias = [n for n in heads if n.removesuffix("weight") + "bias" in tensors]
    heads = with_bias or heads[-1:]
    if len(heads) != 1:
        raise UserError(f"{where}: {len(heads)} matrices with {d_out} columns could be the head")
    rest = [n for n in outside if n != heads[0] and tensors[n].shape[1] == d_in]
    if len(rest) > 1:
        raise UserError(f"{where}: {len(rest)} matrices with {d_in} columns could be the embedding")
    extra = tensors.keys() - {n for n in tensors if inside.fullmatch(n)} - {*heads, *rest}
    if extra := sorted(extra - {heads[0].removesuffix("weight") + "bias"}):
        raise UserError(f"{where} has {shorten(extra[0], 80)}: embedding, cells and head alone fit")
    return (rest[0] if rest else None), heads[0].removesuffix("weight")


def from_torch(
    tensors: dict[str, Tensor], name: str, sizes: SequenceConfig, where: Path
) -> dict[str, Tensor]:
    """One cell by our names. name: torch's, with {} for weight_ih and the like."""
    cell = {
        "w_input": needed(tensors, name.format("weight_ih"), where),
        "w_state": needed(tensors, name.format("weight_hh"), where),
    }
    rows = len(cell["w_state"])
    biases = [
        tensors.get(name.format(f"bias_{part}"), cell["w_state"].new_zeros(rows))
        for part in ("ih", "hh")
    ]
    if any(bias.shape != (rows,) for bias in biases):
        raise UserError(f"{where}: a bias of {name.format('bias')} has not {rows} numbers")
    cell["bias"] = biases[0] + biases[1]
    if sizes.cell == "gru":
        new = slice(2 * sizes.d_model, None)
        cell["bias"][new] = biases[0][new]
        cell["bias_n"] = biases[1][new].clone()
    if sizes.d_proj:
        cell["w_proj"] = needed(tensors, name.format("weight_hr"), where)
    return cell


def to_torch(model: SequenceModel) -> dict[str, Tensor]:
    """All weights as `embedding`, `rnn` and `head` of a torch module would have them.

    UserError for peepholes and layer norm, which torch.nn does not have.
    """
    sizes = model.config
    if sizes.peephole or sizes.layer_norm:
        raise UserError("torch.nn has no LSTM with peepholes or layer norm: it cannot be exported")
    tensors = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("layers.")}
    tensors["head.weight"] = model.head.weight.detach().clone()  # also where it is the embedding
    for layer, direction, end in places(sizes):
        cell = model.layers[layer].directions[direction]
        tensors |= {f"rnn.{n}_{end}": t for n, t in cell_to_torch(cell).items()}
    return tensors


@torch.no_grad()
def cell_to_torch(cell: cells.Cell) -> dict[str, Tensor]:
    """One cell by torch's names, without their ends."""
    second = torch.zeros_like(cell.bias)
    if isinstance(cell, cells.GRU):
        second.view(3, -1)[2] = cell.bias_n
    named = {"weight_ih": cell.w_input, "weight_hh": cell.w_state, "bias_ih": cell.bias}
    named["bias_hh"] = second
    if getattr(cell, "w_proj", None) is not None:
        named["weight_hr"] = cell.w_proj
    return {name: tensor.detach() for name, tensor in named.items()}
