"""Llama: the decoder-only Transformer of Llama 2 and Llama 3, and nothing else.

A decoder-only Transformer reads a text from left to right and gives, after every token, a score
(logit) for each token that could come next. Inside it is a stack of equal blocks. A block has two
layers: attention, in which a token collects what it needs from the tokens before it, and a
feed-forward layer, which works on each token alone. Both add their result to a running sum, the
residual stream.

Llama is that with four choices of its own: RMSNorm before each layer, rotary position embeddings, a
gated feed-forward layer (SwiGLU), and grouped-query attention, where several query heads share one
key and value head so that the cache of a long conversation stays small.

    Llama 2: Touvron et al. 2023, arXiv:2307.09288, §2.2
    Llama 3: Grattafiori et al. 2024, arXiv:2407.21783, §3.2 and Table 3

Dimension key: B batch, T new tokens, S tokens seen so far (slots of the cache), D d_model, H query
heads, K key/value heads, G = H / K query heads a group, C d_head, F d_ff, V vocab_size.

Left out: dropout and biases (Llama has none), sliding windows, quantization. This file imports
torch and the standard library alone: copy it into a project of your own.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY_ROWS = 64  # from here on one large product is faster than several small ones, see `project`


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches the slow rotary frequencies, see `rotary_frequencies`."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_seq_len: int = 8192

    def __post_init__(self):
        ordered = 0 < self.low_freq_factor < self.high_freq_factor < math.inf
        long_enough = 1 <= self.original_seq_len < 2**31
        if not (1 <= self.factor < math.inf and ordered and long_enough):
            raise ValueError(f"rope scaling needs factor ≥ 1 and 0 < low < high, not {self}")


def size(default: int, help: str, least: int = 1):
    """A field that is a size: an integer from `least` to 2³¹ − 1, and a flag of `main.py`."""
    return field(default=default, metadata={"help": help, "least": least, "most": 2**31 - 1})


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of the model.

    Raises ValueError for sizes that cannot be built.
    """

    vocab_size: int = size(1344, "number of tokens the tokenizer knows")
    seq_len: int = size(176, "longest context, in tokens")
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
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least")
            if least is not None and not least <= value <= one.metadata["most"]:
                raise ValueError(f"{one.name} must be at least {least} and below 2³¹, not {value}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        if self.d_head % 2:
            raise ValueError(f"d_head {self.d_head} is odd: rotary embeddings turn pairs")
        if not (1 <= self.rope_theta < math.inf and 0 <= self.norm_eps < 1):
            raise ValueError(f"rope_theta {self.rope_theta} or norm_eps {self.norm_eps} is no size")

    @property
    def n_parameter(self) -> int:
        """How many parameters a model of these sizes has, without building it."""
        attention = 2 * (self.n_head + self.n_kv_head) * self.d_head * self.d_model
        block = attention + 3 * self.d_ff * self.d_model + 2 * self.d_model
        tables = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return tables + self.n_layer * block + self.d_model


PRESETS = {  # number of parameters in the comment; a test counts them
    "tiny": LlamaConfig(),  # 664,704; every word of the stories is one token of the 1,344
    "15m": LlamaConfig(
        vocab_size=32_000, seq_len=256, n_layer=6, n_head=6, n_kv_head=6, d_model=288, d_head=48,
        d_ff=768,
    ),  # 15,191,712
    "110m": LlamaConfig(
        vocab_size=32_000, seq_len=1024, n_layer=12, n_head=12, n_kv_head=12, d_model=768,
        d_head=64, d_ff=2048,
    ),  # 109,529,856
    "llama2-7b": LlamaConfig(
        vocab_size=32_000, seq_len=4096, n_layer=32, n_head=32, n_kv_head=32, d_model=4096,
        d_head=128, d_ff=11_008, tie_embeddings=False,
    ),  # 6,738,415,616
    "llama3-8b": LlamaConfig(
        vocab_size=128_256, seq_len=8192, n_layer=32, n_head=32, n_kv_head=8, d_model=4096,
        d_head=128, d_ff=14_336, rope_theta=500_000.0, tie_embeddings=False,
    ),  # 8,030,261,248
    "llama3.2-1b": LlamaConfig(
        vocab_size=128_256, seq_len=131_072, n_layer=16, n_head=32, n_kv_head=8, d_model=2048,
        d_head=64, d_ff=8192, rope_theta=500_000.0, rope_scaling=RopeScaling(factor=32.0),
    ),  # 1,235,814,400
}  # fmt: skip


class RMSNorm(nn.Module):
    """y = g · x / √(mean(x²) + ε) over the last axis: every token gets the same length, then gains.

    (Zhang & Sennrich 2019, arXiv:1910.07467, Eq. 4, with the ε of every implementation.) Squares
    and mean are taken in float32, since bfloat16 keeps only three digits.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))  # g
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rotary_frequencies(
    d_head: int, theta: float = 10_000.0, scaling: RopeScaling | None = None
) -> Tensor:
    """Angle per position of each pair of channels, in radians: (C/2,) float64.

        ω_i = θ^(−2i/C)        (Su et al. 2021, arXiv:2104.09864, §3.2.2)

    With `scaling` (Llama 3.1, arXiv:2407.21783 §3.4 and Meta's released code) pairs that turn less
    than `low_freq_factor` times within the original context slow down by `factor`, those that turn
    more than `high_freq_factor` times stay, and in between the two are mixed.
    """
    pair = torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu")
    frequency = theta ** (-pair / d_head)
    if scaling is None:
        return frequency
    turns = scaling.original_seq_len * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling.factor


class RotaryTable:
    """cos and sin of position · frequency for the positions of a context.

    Worked out in float64: at position 4,000 a float32 product is already wrong in the fourth
    decimal, and in bfloat16 the positions 256 and 257 are the same number. It is no module buffer,
    so `model.bfloat16()` cannot round it; each number format gets a table of its own, as long as
    the longest context so far.
    """

    def __init__(self, frequencies: Tensor):
        self.frequencies, self.tables = frequencies, {}

    def __call__(self, positions: Tensor, n_position: int, dtype: torch.dtype) -> Tensor:
        """positions: (B, T) int64, each below n_position.

        Returns (cos, cos) and (−sin, sin), as (2, B, T, 1, C).
        """
        key = (positions.device, dtype)
        if key not in self.tables or self.tables[key].shape[1] < n_position:
            self.tables[key] = self.table(n_position).to(dtype).to(positions.device)
        return self.tables[key][:, positions].unsqueeze(3)

    def table(self, n_position: int) -> Tensor:
        """(2, n_position, C) in float64, on the CPU, since some devices have no float64."""
        position = torch.arange(n_position, dtype=torch.float64, device="cpu")
        angle = torch.outer(position, self.frequencies)  # (n_position, C/2)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Turn channel pair (i, i + C/2) of each head by its position's angle.

        (a, b) ← (a·cos − b·sin, b·cos + a·sin)        (arXiv:2104.09864, Eq. 34)

    so that q_m · k_n depends on m − n alone. The paper and Meta's weights pair neighbours
    (2i, 2i + 1) instead: the same thing after a permutation of the rows of wq and wk, see
    `meta.half_split_rows`. x: (B, T, heads, C), rotary: (2, B or 1, T, 1, C).
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

    def __init__(
        self,
        n_layer: int,
        shape: tuple[int, int, int, int],
        like: Tensor,
        d_value: int | None = None,
    ):
        """shape: (B, K, n_slot, C). like: a tensor of the wanted number format and device.

        d_value: the width of a value, where it is not C.
        """
        wide = (*shape[:3], shape[3] if d_value is None else d_value)
        self.keys = [like.new_zeros(shape) for _ in range(n_layer)]
        self.values = [like.new_zeros(wide) for _ in range(n_layer)]
        self.n_slot, self.length = shape[2], 0

    def grow(self, n_token: int) -> None:
        """Take n_token more slots into use. Raises ValueError where there are no more."""
        if self.length + n_token > self.n_slot:
            raise ValueError(f"{self.length} + {n_token} tokens do not fit {self.n_slot} slots")
        self.length += n_token

    def update(self, layer: int, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, K, T, C) in slots (B or 1, 1, T, 1); return all in use (B, K, S, C)."""
        keys, values = self.keys[layer], self.values[layer]
        rows = torch.arange(len(k), device=k.device)[:, None]
        keys[rows, :, slots] = k.transpose(1, 2)
        values[rows, :, slots] = v.transpose(1, 2)
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


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale · q·kᵀ + mask)·v (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1), grouped.

    q: (B, H, T, C), k: (B, K, S, C), v: (B, K, S, any width), mask: (B or 1, T, S) or none.
    causal: T = S tokens that each see themselves and those before. Returns (B, H, T, width of v).
    The G query heads that share a key head are G·T rows of one matrix: no key is ever copied.
    """
    (B, H, T, C), (K, S) = q.shape, k.shape[1:3]
    G = H // K
    q, k, v = q.reshape(B * K, G * T, C), k.reshape(B * K, S, C), v.reshape(B * K, S, v.shape[3])
    if causal:
        mask = causal_mask(torch.arange(T, device=q.device)[None], S, q.dtype)
    elif mask is None:
        mask = q.new_zeros(1, T, S)
    mask = mask[:, None, None]  # (B or 1, 1, 1, T, S)
    if T == 1:  # in steps that torch.compile makes one kernel of
        scores = torch.bmm(q, k.mT).view(B, K, G, T, S) * scale + mask
        scores = scores.view(B * K, G, S)
    else:  # in one product that begins at the mask: a pass less over many scores
        mask = mask.expand(-1, K if len(mask) > 1 else 1, G, T, S).reshape(-1, G * T, S)
        scores = torch.baddbmm(mask, q, k.mT, alpha=scale)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, H, T, v.shape[2])


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """The same by PyTorch's kernel, which never stores the (T, S) scores."""
    mask = None if mask is None else mask.unsqueeze(1)
    gqa = q.shape[1] > k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def fastest_attention(
    device: torch.device, dtype: torch.dtype, n_query: int, n_slot: int
) -> Callable:
    """`attention` or `fused_attention`, by measurement (`main.py --bench` repeats it).

    The fused kernel is faster and rounds less, but for CPUs in bfloat16: there plain matrix
    products win up to about 512 tokens, and always for a single query. They keep the result of
    the softmax in bfloat16, so their rounding error is about twice that of the kernel.
    """
    if device.type != "cpu":
        return fused_attention
    if n_query == 1:
        wins = dtype == torch.bfloat16 or torch.compiler.is_compiling()
    else:
        wins = dtype == torch.bfloat16 and n_slot <= 512
    return attention if wins else fused_attention


@dataclass
class Context:
    """What all layers of one forward pass share."""

    rotary: Tensor  # (2, B or 1, T, 1, C)
    mask: Tensor | None  # (B or 1, T, S)
    causal: bool  # instead of a mask: T = S tokens, each sees itself and those before
    attend: Callable  # `attention` or `fused_attention`
    cache: KVCache | None
    slots: Tensor  # (B or 1, 1, T, 1), where the cache puts the new keys


def project(x: Tensor, *layers: nn.Module) -> Tensor:
    """What the layers make of x, side by side: (B, T, rows of all layers together).

    For many tokens the matrices are joined and multiplied at once, because one large product is
    faster than several small ones. For few tokens, as in decoding, reading the weights is what
    takes the time, and joining them would read and write them once more.
    """
    plain = all(type(layer) is nn.Linear and layer.bias is None for layer in layers)
    if plain and (x.shape[0] * x.shape[1] >= MANY_ROWS or torch.compiler.is_compiling()):
        return F.linear(x, torch.cat([layer.weight for layer in layers]))
    return torch.cat([layer(x) for layer in layers], dim=-1)


class GroupedQueryAttention(nn.Module):
    """H query heads over K key/value heads (Ainslie et al. 2023, arXiv:2305.13245, §2.2).

    Query head h reads key head ⌊h / G⌋.
    """

    def __init__(self, layer: int, d_model: int, n_head: int, n_kv_head: int, d_head: int):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.d_head = layer, n_head, n_kv_head, d_head
        self.wq = nn.Linear(d_model, n_head * d_head, bias=False)
        self.wk = nn.Linear(d_model, n_kv_head * d_head, bias=False)
        self.wv = nn.Linear(d_model, n_kv_head * d_head, bias=False)
        self.wo = nn.Linear(n_head * d_head, d_model, bias=False)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        (B, T, _), H, K = x.shape, self.n_head, self.n_kv_head
        heads = project(x, self.wq, self.wk, self.wv).view(B, T, H + 2 * K, self.d_head)
        qk, v = heads.split((H + K, K), dim=2)
        q, k = rotate(qk, context.rotary).split((H, K), dim=2)  # (B, T, H or K, C)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, C)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v, context.slots)  # (B, K, S, C)
        scale = self.d_head**-0.5  # keeps q·k at variance 1, whatever the width
        out = context.attend(q, k, v, context.mask, scale, context.causal)  # (B, H, T, C)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class SwiGLU(nn.Module):
    """w2·(silu(w1·x) ⊙ w3·x) (Shazeer 2020, arXiv:2002.05202, Eq. 6), silu(z) = z / (1 + e⁻ᶻ)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)
        self.w3 = nn.Linear(d_model, d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = project(x, self.w1, self.w3).chunk(2, dim=-1)  # (B, T, F) each
        return self.w2(F.silu(gate) * up)  # (B, T, D)


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, attention: nn.Module, ffn: nn.Module, d_model: int, eps: float):
        super().__init__()
        self.attention_norm = RMSNorm(d_model, eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model, eps)
        self.ffn = ffn

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
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(
            Block(
                GroupedQueryAttention(layer, c.d_model, c.n_head, c.n_kv_head, c.d_head),
                SwiGLU(c.d_model, c.d_ff),
                c.d_model,
                c.norm_eps,
            )
            for layer in range(c.n_layer)
        )
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.rotary = RotaryTable(rotary_frequencies(c.d_head, c.rope_theta, c.rope_scaling))
        self.initialize()

    def initialize(self) -> None:
        """Weights from N(0, 1/columns), so that a product has the variance of what goes in.

        The two of each block that write to the residual stream get 1/√(2·n_layer) of that: all
        2·n_layer of them together then add what one would (Radford et al. 2019, GPT-2, §2.3).
        """
        for name, weight in self.named_parameters(remove_duplicate=False):
            if weight.dim() > 1:  # matrices, and stacks of them; gains of norms stay 1
                depth = 2 * self.config.n_layer if re.search(r"\.(wo|w2)\b", name) else 1
                nn.init.normal_(weight, std=(weight.shape[-1] * depth) ** -0.5)

    def new_cache(self, batch_size: int, n_slot: int) -> KVCache:
        """An empty cache for batch_size rows of up to n_slot tokens."""
        c = self.config
        shape = (batch_size, c.n_kv_head, n_slot, c.d_head)
        return KVCache(c.n_layer, shape, like=self.embedding.weight)

    def features(
        self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """What the last block says of each token, normalised: (B, T, D). See `forward`."""
        T, start = tokens.shape[1], cache.length if cache else 0
        in_order = positions is None  # all rows are equally long
        if cache is None or in_order:
            self.refuse_too_long(start + T, positions, self.config.seq_len)
        if in_order:
            positions = torch.arange(start, start + T, device=tokens.device).unsqueeze(0)
        if in_order and cache:
            cache.grow(T)
        n_slot, n_position = T, self.config.seq_len
        if cache:
            n_slot, n_position = cache.length, min(cache.n_slot, n_position)
        elif in_order:
            n_position = T
        if cache and not in_order and not torch.compiler.is_compiling():
            self.refuse_too_long(T, positions, n_position)
        # without a cache, tokens see those before them in the row, whatever their positions
        causal = cache is None or (in_order and start == 0)
        sees_all = in_order and T == 1

        x = self.embedding(tokens)  # (B, T, D)
        dtype = compute_dtype(x)
        context = Context(
            rotary=self.rotary(positions, n_position, dtype),
            mask=None if causal or sees_all else causal_mask(positions, n_slot, dtype),
            causal=causal and T > 1,
            attend=fastest_attention(x.device, dtype, T, n_slot),
            cache=cache,
            slots=positions,
        )
        for block in self.blocks:
            x = block(x, context)
        return self.norm(x)  # (B, T, D)

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """tokens: (B, T) int64. Returns logits, (B, T, V).

        With a cache the tokens go on from what it holds, every row at slot `cache.length`. Rows of
        different length give their `positions`, (B, T) int64; who does so grows the cache himself.
        Raises ValueError for more tokens, or later positions, than the context has.
        """
        return self.head(self.features(tokens, cache, positions))  # (B, T, V)

    def refuse_too_long(self, n_token: int, positions: Tensor | None, n_position: int) -> None:
        """ValueError if n_position places are too few for so many tokens or these positions."""
        longest = n_token if positions is None else max(n_token, int(positions.max()) + 1)
        if longest > n_position:
            raise ValueError(f"{longest} tokens are more than the context of {n_position}")

    def flops_per_token(self, seq_len: int) -> int:
        """Multiply-adds × 2 to train on one token: 6 a weight, 12 a key channel and position.

        (Kaplan et al. 2020, arXiv:2001.08361, §2.1: forward 2, backward 4.) The lookup of the
        embedding costs nothing and so is not counted, its use as the head is.
        """
        c = self.config
        matrices = [m.weight for m in self.modules() if isinstance(m, nn.Linear)]
        n_weight = sum(matrix.numel() for matrix in matrices)
        return 6 * n_weight + 12 * c.n_layer * c.n_head * c.d_head * seq_len


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
