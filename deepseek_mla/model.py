"""DeepSeek-V3: Llama with latent attention and many small experts.

Read llama's model first; this one has two things more. Attention keeps one short vector a token in
the place of keys and values (mla.py), and from the n_dense-th block on the feed-forward layer is a
mixture of many small experts beside shared ones (moe.py). The same model is DeepSeek-V2 and
Kimi-K2, with other sizes. What predicts several tokens at once stands in mtp.py.

    DeepSeek-V3: DeepSeek-AI 2024, arXiv:2412.19437, §2 and §4.2
    Kimi-K2: Kimi Team 2025, arXiv:2507.20534, §2.3 and Table 2

Dimension key: B batch, T new tokens, S tokens seen so far (slots of the cache), D d_model, H heads,
R kv_rank, N d_nope, P d_rope; of `attention`: K key heads, G = H / K, C width of a key; F width of
a feed-forward layer, V vocab_size, E n_expert.

Left out: dropout and biases (DeepSeek has none), quantization. This file imports torch, the
standard library, mla.py, moe.py and yarn.py alone: copy the four into a project of your own.
"""

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mla import fewest
from moe import Experts, MixtureOfExperts, SharedAndRouted, SigmoidRouter
from yarn import YarnScaling, mscale, yarn_frequencies

MANY_ROWS = 64  # from here on one large product is faster than several small ones, see `project`
LATENT_EPS = 1e-6  # of the norms of latents, whatever norm_eps is


def size(default: int, help: str, least: int = 1):
    """A field that is a size: an integer from `least` to 2³¹ − 1, and a flag of `main.py`."""
    return field(default=default, metadata={"help": help, "least": least, "most": 2**31 - 1})


@dataclass(frozen=True)
class DeepseekConfig:
    """The sizes of the model.

    Raises ValueError for sizes that cannot be built.
    """

    vocab_size: int = size(1344, "number of tokens the tokenizer knows")
    seq_len: int = size(208, "longest context, in tokens")
    n_layer: int = size(4, "blocks")
    n_head: int = size(4, "heads")
    d_model: int = size(128, "width of the residual stream")
    q_rank: int = size(64, "width of the latent that queries are made of; 0 is none", least=0)
    kv_rank: int = size(64, "width of the latent that keys and values are made of")
    d_nope: int = size(16, "width of the part of a head that knows no position", least=0)
    d_rope: int = size(32, "width of the rotary part of a head, even")
    d_value: int = size(32, "width of a head's value")
    d_ff: int = size(192, "width of a dense feed-forward layer")
    n_dense: int = size(1, "first layers that have no experts", least=0)
    d_expert: int = size(64, "width of an expert")
    n_expert: int = size(8, "routed experts a layer")
    n_active: int = size(2, "routed experts that work on a token")
    n_shared: int = size(1, "experts that work on every token", least=0)
    n_group: int = size(1, "groups of experts")
    n_active_group: int = size(1, "groups that a token may choose from")
    n_ahead: int = size(1, "modules that predict one token further each, see mtp.py", least=0)
    normalize_weights: bool = True  # chosen experts' weights sum to weight_factor
    weight_factor: float = 1.0
    softmax_scores: bool = False  # DeepSeek-V2's router
    rope_theta: float = 10_000.0
    rope_scaling: YarnScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True  # one matrix both reads tokens and scores them

    def __post_init__(self):
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("least")
            if least is not None and not least <= value <= one.metadata["most"]:
                raise ValueError(f"{one.name} must be at least {least} and below 2³¹, not {value}")
        if self.n_expert % self.n_group or self.n_active_group > self.n_group:
            raise ValueError(
                f"n_expert {self.n_expert} cannot be n_group {self.n_group} equal groups of which "
                f"n_active_group {self.n_active_group} are chosen from"
            )
        if self.n_active > self.n_expert // self.n_group * self.n_active_group:
            raise ValueError(f"n_active {self.n_active} is more than n_expert in the active groups")
        if self.d_rope % 2:
            raise ValueError(f"d_rope {self.d_rope} is odd: rotary embeddings turn pairs")
        if not (1 <= self.rope_theta < math.inf and 0 <= self.norm_eps < 1):
            raise ValueError(f"rope_theta {self.rope_theta} or norm_eps {self.norm_eps} is no size")
        if not 0 < self.weight_factor < math.inf:
            raise ValueError(f"weight_factor {self.weight_factor} is no factor")

    @property
    def n_parameter(self) -> int:
        """How many parameters a model of these sizes has, without building it."""
        return self.count(self.n_expert)

    @property
    def n_active_parameter(self) -> int:
        """How many of them work on a token."""
        return self.count(self.n_active)

    def count(self, n_expert: int) -> int:
        """The parameters that are left if each layer keeps so many of its routed experts."""
        D, H, R = self.d_model, self.n_head, self.kv_rank
        attention = self.q_rank * (D + 1) + (self.q_rank or D) * H * (self.d_nope + self.d_rope)
        attention += D * (R + self.d_rope) + R  # with the gains of the latents' norms
        attention += H * (self.d_nope + self.d_value) * R + H * self.d_value * D
        experts = (3 * (n_expert + self.n_shared) * self.d_expert + self.n_expert) * D
        n_dense = min(self.n_dense, self.n_layer)
        blocks = self.n_layer * (attention + 2 * D)
        blocks += n_dense * 3 * self.d_ff * D + (self.n_layer - n_dense) * experts
        ahead = attention + 2 * D + experts + (2 * D + 3) * D
        tables = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return tables + blocks + self.n_ahead * ahead + D


PRESETS = {  # all parameters, and those that work on a token; a test counts them
    "tiny": DeepseekConfig(),  # 1,476,992 and 887,168
    "v2-lite": DeepseekConfig(
        vocab_size=102_400, seq_len=163_840, n_layer=27, n_head=16, d_model=2048, q_rank=0,
        kv_rank=512, d_nope=128, d_rope=64, d_value=128, d_ff=10_944, d_expert=1408, n_expert=64,
        n_active=6, n_shared=2, n_ahead=0, normalize_weights=False, softmax_scores=True,
        rope_scaling=YarnScaling(mscale=0.707), tie_embeddings=False,
    ),  # 15,706,484,224 and 2,661,150,208
    "v3": DeepseekConfig(
        vocab_size=129_280, seq_len=163_840, n_layer=61, n_head=128, d_model=7168, q_rank=1536,
        kv_rank=512, d_nope=128, d_rope=64, d_value=128, d_ff=18_432, n_dense=3, d_expert=2048,
        n_expert=256, n_active=8, n_group=8, n_active_group=4, n_ahead=0, weight_factor=2.5,
        rope_scaling=YarnScaling(), tie_embeddings=False,
    ),  # 671,026,404,352 and 37,552,282,624
    "kimi-k2": DeepseekConfig(
        vocab_size=163_840, seq_len=131_072, n_layer=61, n_head=64, d_model=7168, q_rank=1536,
        kv_rank=512, d_nope=128, d_rope=64, d_value=128, d_ff=18_432, d_expert=2048, n_expert=384,
        n_active=8, n_ahead=0, weight_factor=2.827, rope_theta=50_000.0,
        rope_scaling=YarnScaling(factor=32.0, high_turns=1.0), tie_embeddings=False,
    ),  # 1,026,408,209,408 and 32,861,477,888
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


class LatentAttention(nn.Module):
    """H heads whose keys and values are made of one latent vector a token, see mla.py.

    Queries come of a latent too, where q_rank is not 0: it saves weights, not cache.
    """

    def __init__(
        self,
        layer: int,
        d_model: int,
        n_head: int,
        ranks: tuple[int, int],
        widths: tuple[int, int, int],
        scale: float,
    ):
        """ranks: (q_rank, kv_rank). widths: (d_nope, d_rope, d_value)."""
        super().__init__()
        (q_rank, kv_rank), (d_nope, d_rope, d_value) = ranks, widths
        self.layer, self.n_head, self.widths, self.scale = layer, n_head, widths, scale
        self.down = (q_rank or d_model, kv_rank, d_rope)
        self.wq_a = nn.Linear(d_model, q_rank, bias=False) if q_rank else nn.Identity()
        self.q_norm = RMSNorm(q_rank, LATENT_EPS) if q_rank else nn.Identity()
        self.wq_b = nn.Linear(q_rank or d_model, n_head * (d_nope + d_rope), bias=False)
        self.wkv_a = nn.Linear(d_model, kv_rank + d_rope, bias=False)
        self.kv_norm = RMSNorm(kv_rank, LATENT_EPS)
        self.wkv_b = nn.Linear(kv_rank, n_head * (d_nope + d_value), bias=False)
        self.wo = nn.Linear(n_head * d_value, d_model, bias=False)
        self.form: Callable = fewest  # or naive, or absorbed

    def forward(self, x: Tensor, context: Context) -> Tensor:
        (B, T, _), H, (d_nope, d_rope, d_value) = x.shape, self.n_head, self.widths
        q, latent, rotary_k = project(x, self.wq_a, self.wkv_a).split(self.down, dim=2)
        q = self.wq_b(self.q_norm(q)).view(B, T, H, d_nope + d_rope)
        q, rotary_q = q.split((d_nope, d_rope), dim=3)  # (B, T, H, N), (B, T, H, P)
        rotary = torch.cat((rotary_q, rotary_k.unsqueeze(2)), dim=2)
        rotary_q, rotary_k = rotate(rotary, context.rotary).split((H, 1), dim=2)
        latent = self.kv_norm(latent).unsqueeze(2).to(rotary_k.dtype)
        memory = torch.cat((latent, rotary_k), dim=3).transpose(1, 2)  # (B, 1, T, R + P)
        if context.cache is not None:
            none = memory[..., :0]  # what values are, the latent is
            memory, _ = context.cache.update(self.layer, memory, none, context.slots)
        up = self.wkv_b.weight.view(H, d_nope + d_value, -1).to(memory.dtype)
        q, rotary_q = q.transpose(1, 2), rotary_q.transpose(1, 2)
        out = self.form(q, rotary_q, memory, up, self.attend(context))  # (B, H, T, d_value)
        return self.wo(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def attend(self, context: Context) -> Callable:
        """Attention of this pass as a function of q, k and v alone."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shared = k.shape[1] < q.shape[1]  # PyTorch's kernel would copy a key head for each head
            how = attention if shared else context.attend
            return how(q, k, v, context.mask, self.scale, context.causal)

        return attend


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


class Deepseek(nn.Module):
    """Tokens to next-token logits.

    Untrained, the logits are noise of variance 1, which says nothing about the next token and costs
    half a nat more than saying so: the loss is ln V + ½.
    """

    def __init__(self, config: DeepseekConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(
            Block(
                self.attention(layer),
                self.experts() if layer >= c.n_dense else SwiGLU(c.d_model, c.d_ff),
                c.d_model,
                c.norm_eps,
            )
            for layer in range(c.n_layer)
        )
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.rotary = RotaryTable(yarn_frequencies(c.d_rope, c.rope_theta, c.rope_scaling))
        self.initialize()

    def attention(self, layer: int) -> LatentAttention:
        """The attention of a block; `layer` is its place in the cache."""
        c = self.config
        ranks, widths = (c.q_rank, c.kv_rank), (c.d_nope, c.d_rope, c.d_value)
        scale = (c.d_nope + c.d_rope) ** -0.5 * mscale(c.rope_scaling) ** 2
        return LatentAttention(layer, c.d_model, c.n_head, ranks, widths, scale)

    def experts(self) -> MixtureOfExperts:
        """The feed-forward layer of all but the first blocks."""
        c = self.config
        router = SigmoidRouter(c.d_model, c.n_expert, c.n_active)
        router.n_group, router.n_active_group = c.n_group, c.n_active_group
        router.normalize, router.factor = c.normalize_weights, c.weight_factor
        router.softmax = c.softmax_scores
        experts = Experts(c.n_expert, c.d_model, c.d_expert)
        if not c.n_shared:
            return MixtureOfExperts(router, experts)
        return SharedAndRouted(router, experts, SwiGLU(c.d_model, c.n_shared * c.d_expert))

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
        shape = (batch_size, 1, n_slot, c.kv_rank + c.d_rope)
        return KVCache(c.n_layer, shape, like=self.embedding.weight, d_value=0)

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
        experts = [p for m in self.modules() if isinstance(m, Experts) for p in m.parameters()]
        n_weight = sum(matrix.numel() for matrix in matrices)
        n_weight += sum(stack.numel() for stack in experts) * c.n_active // c.n_expert
        d_head = (c.d_nope + c.d_rope + c.d_value) / 2  # the mean of keys and values
        return 6 * n_weight + int(12 * c.n_layer * c.n_head * d_head * seq_len)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
