"""What makes a step of the search quick: packed matrices, and a step that is compiled.

Nothing here changes a result; decode.py is the search itself, and can be read without this file.
A step has a few rows of tokens for each matrix of the model. So the time goes into calling sixty
small operations, and into products that the usual routines do not do well for so few rows.
"""

import copy
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model import (
    DecoderCache,
    DecoderContext,
    Memory,
    Transformer,
    causal_mask,
    compute_dtype,
    dot_product_attention,
)


class PackedLinear(nn.Module):
    """A linear layer whose matrix lies in memory as oneDNN, the CPU's library, wants it.

    For the few rows of a search the usual product leaves most of the processor idle: with 4 rows
    it took two to five times as long here. The function is PyTorch's own for compiled models.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Has this PyTorch the packed product, for this device and number format?"""
    there = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and torch.backends.mkldnn.enabled
    return there and weight.device.type == "cpu" and weight.dtype == torch.float32


PACKED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # what `pack` made of each model


def pack(model: Transformer) -> tuple[Transformer, Callable]:
    """(the model, what makes logits) for a search: the decoder's matrices packed where they can be.

    The model itself stays as it is; what is not packed is shared with it. Packing takes as long as
    a few steps, so it is kept until a weight is another one or has been changed.
    """
    weight = model.embedding.weight
    if not can_pack(weight):
        return model, model.head
    if weight.is_inference():  # nobody counts the changes of such tensors
        return pack_anew(model)
    state = [(p.data_ptr(), p._version) for p in model.parameters()]
    if model not in PACKED or PACKED[model][0] != state:
        PACKED[model] = (state, pack_anew(model))
    return PACKED[model][1]


def pack_anew(model: Transformer) -> tuple[Transformer, Callable]:
    """The same, whatever was kept."""
    shared = {id(p): p for p in (*model.parameters(), model.table)}
    twin = copy.deepcopy(model, shared)  # what the memo knows is not copied
    for module in list(twin.decoder.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                setattr(module, name, PackedLinear(layer.weight, layer.bias))
    return twin, PackedLinear(model.embedding.weight, model.logits_bias)


# ── A compiled step ───────────────────────────────────────────────────────────────────────────────


class WholeCache(DecoderCache):
    """A cache that gives out all its slots at every step, so that the shapes stay the same.

    `length` is a tensor, (1,) int64; a number would be a constant to the compiler, which would
    then have a new step to compile for every token.
    """

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (R, H, 1, C) in slot `length`; return all slots, (R, H, n_slot, C)."""
        both = torch.stack((k, v)).squeeze(3)  # (2, R, H, C)
        own = self.own[:, 2 * layer : 2 * layer + 2]
        own.index_put_((self.length,), both.unsqueeze(0))
        return own[:, 0].permute(1, 2, 0, 3), own[:, 1].permute(1, 2, 0, 3)

    def reorder(self, rows: Tensor) -> None:
        """As before, for all slots."""
        if self.spare is None:
            self.spare = torch.empty_like(self.own)
        torch.index_select(self.own, 2, rows, out=self.spare)
        self.own, self.spare = self.spare, self.own


def whole_cache(model: Transformer, memory: Memory, n_beam: int, n_slot: int) -> WholeCache:
    """An empty one, as `Transformer.new_cache` makes it."""
    plain = model.new_cache(memory, n_beam, n_slot)
    cache = WholeCache(plain.source, plain.mask, plain.own.shape[2], n_slot)
    cache.length = torch.zeros(1, dtype=torch.int64, device=cache.own.device)
    return cache


def one_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """`dot_product_attention`, written so that the compiler makes one piece of it for one query."""
    if q.shape[2] > 1:
        return dot_product_attention(q, k, v, mask, scale, causal)
    scores = scale * (q * k).sum(dim=-1)  # (B, H, S)
    if mask is not None:
        scores = scores + mask  # (B or 1, 1, S)
    return (scores.softmax(dim=-1).unsqueeze(-1) * v).sum(dim=2, keepdim=True)


@functools.cache
def compiled_step(model: Transformer) -> Callable[[Tensor, WholeCache], Tensor]:
    """A function of the last tokens, (R, 1), and the cache that returns logits, (R, V).

    The weights are constants to it: it is for a model that is not trained any more.
    """
    import torch._inductor.config  # seconds to import, so only who compiles pays for it

    torch._inductor.config.freezing = True  # weights are constants; no effect as a mere option

    @torch.compile
    def step(tokens: Tensor, cache: WholeCache, table: Tensor) -> Tensor:
        x = model.embedding(tokens)  # (R, 1, D)
        if model.config.scale_embedding:
            x = x * model.config.d_model**0.5
        x = x + table[cache.length]
        mask = causal_mask(cache.length[None], len(cache.own), compute_dtype(x))  # (1, 1, n_slot)
        context = DecoderContext(mask, False, one_query_attention, None, cache)
        for block in model.decoder:
            x = block(x, context)
        return model.head(model.decoder_norm(x)[:, 0])

    def call(tokens: Tensor, cache: WholeCache) -> Tensor:
        table = model.table(0, model.config.seq_len, model.embedding.weight)
        logits = step(tokens, cache, table)
        cache.length = cache.length + 1
        return logits

    return call
