"""Llama: the decoder-only Transformer of Llama 2 and Llama 3, and nothing else.

Four changes turn the decoder of "Attention Is All You Need" into it: RMSNorm before each layer
instead of LayerNorm after it, rotary position embeddings instead of added ones, a gated
feed-forward layer (SwiGLU) instead of ReLU, and grouped-query attention, where several query heads
share one key and value head so that the cache of a long conversation stays small.

    Llama 2: Touvron et al. 2023, arXiv:2307.09288, §2.2
    Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, §3.2 and Table 3

Dimension key: B batch, T new tokens, S tokens seen so far (slots of the cache), D d_model, H query
heads, K key/value heads, G = H / K query heads a group, C d_head, F d_ff, V vocab_size.

Left out: dropout and biases (Llama has none), sliding windows, quantization. This file imports
torch and the standard library alone: copy it into a project of your own.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches the slow rotary frequencies, see `rotary_frequencies`."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_seq_len: int = 8192

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"rope scaling needs factor ≥ 1 and 0 < low < high, not {self}")


def size(default: int, help: str):
    """A field that `main.py` offers as a flag."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of the model.

    Raises ValueError for sizes that cannot be built.
    """

    vocab_size: int = size(1024, "number of tokens the tokenizer knows")
    seq_len: int = size(192, "longest context, in tokens")
    n_layer: int = size(4, "blocks")
    n_head: int = size(4, "query heads")
    n_kv_head: int = size(2, "key/value heads: n_head is multi-head, 1 is multi-query attention")
    d_model: int = size(128, "width of the residual stream")
    d_head: int = size(32, "width of a head, even; often d_model / n_head, but free")
    d_ff: int = size(192, "width of the feed-forward layer; Llama takes about 8/3 d_model")
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True  # one matrix both reads tokens and scores them

    def __post_init__(self):
        for name in (f.name for f in self.__dataclass_fields__.values() if "help" in f.metadata):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.d_head % 2:
            raise ValueError(f"d_head {self.d_head} is odd: rotary embeddings turn pairs")


LLAMA3_SCALING = RopeScaling(8.0, 1.0, 4.0, 8192)
PRESETS = {  # number of parameters in the comment; a test counts them
    "tiny": LlamaConfig(),  # 623,744; a wider d_ff would learn the few stories by heart
    "15m": LlamaConfig(32_000, 256, 6, 6, 6, 288, 48, 768),  # 15,191,712
    "110m": LlamaConfig(32_000, 1024, 12, 12, 12, 768, 64, 2048),  # 109,529,856
    "llama2-7b": LlamaConfig(
        32_000, 4096, 32, 32, 32, 4096, 128, 11_008, tie_embeddings=False
    ),  # 6,738,415,616
    "llama3-8b": LlamaConfig(
        128_256, 8192, 32, 32, 8, 4096, 128, 14_336, 500_000.0, tie_embeddings=False
    ),  # 8,030,261,248
    "llama3.2-1b": LlamaConfig(
        128_256, 131_072, 16, 32, 8, 2048, 64, 8192, 500_000.0, RopeScaling(32.0)
    ),  # 1,235,814,400
}


class RMSNorm(nn.Module):
    """y = g · x / √(mean(x²) + ε) over the last axis.

    (Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4, with the ε of every implementation.) The mean
    is taken in float32, since bfloat16 keeps only three digits.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_frequencies(config: LlamaConfig) -> Tensor:
    """Angle per position of each pair of channels, in radians: (C/2,) float64.

        ω_i = θ^(−2i/C)        (Su et al. 2021, arXiv:2104.09864, §3.2.2)

    With `rope_scaling` (Llama 3.1, arXiv:2407.21783 §3.4 and Meta's released code) pairs that turn
    less than `low_freq_factor` times within the original context slow down by `factor`, those that
    turn more than `high_freq_factor` times stay, and in between the two are mixed.
    """
    pair = torch.arange(0, config.d_head, 2, dtype=torch.float64, device="cpu")
    frequency = config.rope_theta ** (-pair / config.d_head)
    if config.rope_scaling is None:
        return frequency
    s = config.rope_scaling
    turns = s.original_seq_len * frequency / (2 * math.pi)
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / s.factor


class RotaryTable:
    """cos and sin of position · frequency for every position of the context.

    Worked out once, in float64: at position 4,000 a float32 product is already wrong in the fourth
    decimal, and in bfloat16 the positions 256 and 257 are the same number. It is no module buffer,
    so `model.bfloat16()` cannot round it; each use gets a copy in the precision it computes in.
    """

    def __init__(self, config: LlamaConfig):
        position = torch.arange(config.seq_len, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, rotary_frequencies(config))  # (seq_len, C/2)
        cos, sin = angle.cos(), angle.sin()
        self.table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))
        self.copies = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """positions: (B, T) int64. Returns (cos, cos) and (−sin, sin), (2, B, T, 1, C)."""
        key = (positions.device, dtype)
        if key not in self.copies:
            self.copies[key] = self.table.to(dtype).to(positions.device)  # mps has no float64
        return self.copies[key][:, positions].unsqueeze(3)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel pair (i, i + C/2) of each head by its position's angle.

        (a, b) ← (a·cos − b·sin, b·cos + a·sin)        (arXiv:2104.09864, Eq. 34)

    so that q_m · k_n depends on m − n alone. The paper and Meta's weights pair neighbours
    (2i, 2i + 1) instead: the same thing after a permutation of the rows of wq and wk, see
    `checkpoint.half_split_rows`. x: (B, T, heads, C), rotary: (2, B or 1, T, 1, C).
    """
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class KVCache:
    """Keys and values of all layers, allocated once: a new token costs one token's work.

    Slot j of row b holds the token at position j of sequence b. A query at position p sees the
    slots 0 … p and no other. That one rule covers prefill, chunks, and rows of different length:
    what a short row's later slots hold is overwritten before any query of that row can see it.
    Size: 2 · n_layer · B · n_slot · K · C numbers. `length` is how many slots are in use.
    """

    def __init__(self, config: LlamaConfig, batch_size: int, n_slot: int, like: Tensor):
        shape = (batch_size, config.n_kv_head, n_slot, config.d_head)
        self.keys = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.n_slot, self.length = n_slot, 0

    def grow(self, n_token: int) -> None:
        """Take n_token more slots into use. Raises ValueError where there are no more."""
        if self.length + n_token > self.n_slot:
            raise ValueError(f"{self.length} + {n_token} tokens do not fit {self.n_slot} slots")
        self.length += n_token

    def update(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, C) in slots (B or 1, 1, T, 1); return all in use (B, K, S, C)."""
        index = slots.expand_as(k)
        keys = self.keys[layer].scatter_(2, index, k)
        values = self.values[layer].scatter_(2, index, v)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def fork(self, n: int) -> "KVCache":
        """A cache that has each row n times: one prefill, n ways to go on."""
        twin = copy.copy(self)
        twin.keys = [keys.repeat_interleave(n, dim=0) for keys in self.keys]
        twin.values = [values.repeat_interleave(n, dim=0) for values in self.values]
        return twin


def causal_mask(positions: Tensor, n_slot: int, dtype: torch.dtype) -> Tensor:
    """What queries at `positions` (B or 1, T) add to their scores: (B or 1, T, S).

    0 for the slots 0 … position, which they may see, −∞ for later ones.
    """
    later = torch.arange(n_slot, device=positions.device) > positions.unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype, device=later.device).masked_fill(later, -math.inf)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q·kᵀ/√C + mask)·v (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1), grouped.

    q: (B, T, H, C), k and v: (B, K, S, C), mask: (B or 1, T, S). Returns (B, T, H, C).
    The G query heads that share a key head are G·T rows of one matrix: no key is ever copied.
    """
    (B, T, H, C), (K, S) = q.shape, k.shape[1:3]
    G = H // K
    q = q.view(B, T, K, G, C).permute(0, 2, 3, 1, 4).reshape(B * K, G * T, C)
    k, v = k.reshape(B * K, S, C), v.reshape(B * K, S, C)
    mask = mask[:, None, None].expand(-1, K if len(mask) > 1 else 1, G, T, S)
    scores = torch.baddbmm(mask.reshape(-1, G * T, S), q, k.mT, alpha=C**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), v)  # (B·K, G·T, C)
    return out.view(B, K, G, T, C).permute(0, 3, 1, 2, 4).reshape(B, T, H, C)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The same by PyTorch's kernel, which never stores the (T, S) scores.

    Without a mask T = S tokens see those before them, and a single one (T = 1) sees all.
    """
    mask = None if mask is None else mask.unsqueeze(1)
    causal, gqa = mask is None and q.shape[1] > 1, q.shape[2] > k.shape[1]
    q = q.transpose(1, 2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa
    ).transpose(1, 2)


def products_are_faster(x: Tensor, dtype: torch.dtype, n_slot: int) -> bool:
    """Whether `attention` beats `fused_attention`, by measurement (`main.py --bench` repeats it).

    On GPUs never. On CPUs in bfloat16 up to about 512 tokens, where the kernel's backward pass and
    its single-token case are slow, and `attention` is ordinary matrix products.
    """
    short = dtype == torch.bfloat16 and n_slot <= 512
    return x.device.type == "cpu" and short and (torch.is_grad_enabled() or x.shape[1] == 1)


@dataclass
class Context:
    """What all layers of one forward pass share."""

    rotary: Tensor  # (2, B or 1, T, 1, C)
    mask: Tensor | None  # (B or 1, T, S)
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    cache: KVCache | None
    slots: Tensor  # (B or 1, 1, T, 1), where the cache puts the new keys


class GroupedQueryAttention(nn.Module):
    """H query heads over K key/value heads (Ainslie et al. 2023, arXiv:2305.13245, §2.2).

    Query head h reads key head ⌊h / G⌋. The three projections are one matrix, because one large
    product is faster than three small ones: H heads of queries, then K of keys, then K of values.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = config.n_head, config.n_kv_head, config.d_head
        self.layer = layer
        n_row = (config.n_head + 2 * config.n_kv_head) * config.d_head
        self.wqkv = nn.Linear(config.d_model, n_row, bias=False)
        self.wo = nn.Linear(config.n_head * config.d_head, config.d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        (B, T, _), H, K = x.shape, self.n_head, self.n_kv_head
        heads = self.wqkv(x).view(B, T, H + 2 * K, self.d_head)
        qk, v = heads.split((H + K, K), dim=2)
        q, k = rotate(qk, context.rotary).split((H, K), dim=2)  # (B, T, H or K, C)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, C)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v, context.slots)  # (B, K, S, C)
        return self.wo(context.attend(q, k, v, context.mask).reshape(B, T, -1))  # (B, T, D)


class SwiGLU(nn.Module):
    """w2·(silu(w1·x) ⊙ w3·x) (Shazeer 2020, arXiv:2002.05202, Eq. 6), w1 above w3 in one matrix."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w13 = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.w2 = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.w2(F.silu(gate) * up)  # (B, T, D)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = GroupedQueryAttention(config, layer)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attention(self.attention_norm(x), context)
        return x + self.ffn(self.ffn_norm(x))


class Llama(nn.Module):
    """Tokens to next-token logits.

    Untrained, the logits are noise of variance 1, which says nothing about the next token and costs
    half a nat more than saying so: the loss is ln V + ½.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.rotary = RotaryTable(config)
        self.initialize()

    def initialize(self) -> None:
        """Weights from N(0, 1/columns), so that a product has the variance of what goes in.

        The two that write to the residual stream get 1/√(2·n_layer) of that: all 2·n_layer of them
        together then add what one would (Radford et al. 2019, GPT-2, §2.3).
        """
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                writes = name.endswith(("wo.weight", "w2.weight"))
                depth = 2 * self.config.n_layer if writes else 1
                nn.init.normal_(weight, std=(weight.shape[1] * depth) ** -0.5)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """tokens: (B, T) int64. Returns logits, (B, T, V).

        With a cache the tokens go on from what it holds, every row at slot `cache.length`. Rows of
        different length give their `positions`, (B, T) int64; who does so grows the cache himself.
        """
        T, start = tokens.shape[1], cache.length if cache else 0
        same = positions is None  # all rows are equally long
        if same:
            positions = torch.arange(start, start + T, device=tokens.device).unsqueeze(0)
        if same and cache:
            cache.grow(T)
        n_slot = cache.length if cache else T

        x = self.embedding(tokens)  # (B, T, D)
        dtype = compute_dtype(x)
        products = products_are_faster(x, dtype, n_slot)
        plain = same and (start == 0 or T == 1) and not products
        context = Context(
            rotary=self.rotary(positions, dtype),
            mask=None if plain else causal_mask(positions, n_slot, dtype),
            attend=attention if products else fused_attention,
            cache=cache,
            slots=positions[:, None, :, None],
        )
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x))  # (B, T, V)

    def flops_per_token(self, seq_len: int) -> int:
        """Multiply-adds × 2 to train on one token: 6 a weight, 12 a key channel and position.

        (Kaplan et al. 2020, arXiv:2001.08361, §2.1: forward 2, backward 4.) The lookup of the
        embedding costs nothing and so is not counted, its use as the head is.
        """
        sizes = self.config
        n_weight = sum(weight.numel() for weight in self.parameters() if weight.dim() == 2)
        if not sizes.tie_embeddings:
            n_weight -= self.embedding.weight.numel()
        return 6 * n_weight + 12 * sizes.n_layer * sizes.n_head * sizes.d_head * seq_len


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
