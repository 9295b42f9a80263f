"""The Transformer of "Attention Is All You Need": an encoder, a decoder, and nothing else.

Sentences are cut into tokens, words and pieces of words:

    Budi reads a book. ─encoder─▶ a vector for each token ─decoder─▶ Budi membaca sebuah buku.

The encoder reads the whole sentence. The decoder writes the translation from left to right: after
every token it gives a score (logit) to each token that could come next. Both are stacks of equal
blocks, and a block has layers of two kinds. In attention a token collects what it needs from other
tokens: its query is compared with the key of each of them, and it takes the mean of their values,
weighted by how well query and key fit. A feed-forward layer works on each token alone. A decoder
block has two attention layers: one over the translation so far, and one over what the encoder made
of the source, the cross-attention. Every layer adds its result to what it read; the vector that is
added to from layer to layer is called the residual stream.

    Vaswani et al. 2017, arXiv:1706.03762, §3 and Figure 1

Dimension key: B sentences, S source tokens, T target tokens, D d_model, H heads, C = D / H d_head,
F d_ff, V vocab_size, R rows of the decoder. In training R = B. In the search for a translation
(decode.py) each sentence has N candidates, its beams, which stand side by side: R = B · N.

Left out: dropout on attention weights, which the paper does not name and many programs have. This
file imports torch and the standard library alone: copy it into a project of your own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "swish": F.silu, "gelu": F.gelu}
LAYOUTS = ("interleaved", "sines-first")
NORMS = ("post", "pre")


def size(default: int, help: str, least: int = 1):
    """A field that is a size: an integer from `least` to 2³¹ − 1, and a flag of `main.py`."""
    return field(default=default, metadata={"help": help, "least": least, "most": 2**31 - 1})


def choice(default: str, help: str, choices: tuple[str, ...]):
    """A field that is one of some words, and a flag of `main.py`."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes of the model.

    Raises ValueError for sizes that cannot be built.
    """

    vocab_size: int = size(1000, "number of tokens, of both languages together", least=4)
    seq_len: int = size(128, "longest sentence in tokens, source and target alike", least=2)
    n_layer: int = size(2, "blocks of the encoder, and of the decoder")
    n_decoder_layer: int = size(0, "blocks of the decoder, where it has not n_layer", least=0)
    n_head: int = size(4, "attention heads")
    d_model: int = size(128, "width of the residual stream, even")
    d_ff: int = size(256, "width of the feed-forward layer; the paper takes 4 d_model")
    dropout: float = field(
        default=0.1, metadata={"help": "share of numbers set to 0", "least": 0, "below": 1}
    )
    norm: str = choice("post", "normalise after each layer (the paper) or before", NORMS)
    activation: str = choice("relu", "of the feed-forward layer", tuple(ACTIVATIONS))
    positions: str = choice("interleaved", "sines and cosines in turn, or all sines first", LAYOUTS)
    scale_embedding: bool = True  # multiply embeddings by √d_model, §3.4
    logits_bias: bool = False  # a number added to each logit, which Marian has
    norm_eps: float = 1e-5
    pad_id: int = 0  # fills up short sentences
    start_id: int = 2  # what the decoder reads first, before there is a translation to go on from
    end_id: int = 3  # ends every sentence

    def __post_init__(self):
        for one in fields(self):
            value, most = getattr(self, one.name), one.metadata.get("most")
            if most is not None and not one.metadata["least"] <= value <= most:
                least = one.metadata["least"]
                raise ValueError(f"{one.name} must be at least {least} and below 2³¹, not {value}")
            words = one.metadata.get("choices")
            if words and value not in words:
                raise ValueError(f"{one.name} must be one of {', '.join(words)}, not {value!r}")
        if self.d_model % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide d_model {self.d_model}")
        if self.d_model % 2:
            raise ValueError(f"d_model {self.d_model} is odd: positions are sines and cosines")
        if not (0 <= self.dropout < 1 and 0 <= self.norm_eps < math.inf):
            raise ValueError(f"dropout {self.dropout} or norm_eps {self.norm_eps} is out of range")
        for name in ("pad_id", "start_id", "end_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name} {getattr(self, name)} is not in the vocabulary")
        if self.end_id in (self.pad_id, self.start_id):
            raise ValueError(f"end_id {self.end_id} is the padding or the start as well")

    @property
    def d_head(self) -> int:
        """C, the width of a head."""
        return self.d_model // self.n_head

    @property
    def decoder_layers(self) -> int:
        """How many blocks the decoder has."""
        return self.n_decoder_layer or self.n_layer

    @property
    def n_parameter(self) -> int:
        """How many parameters a model of these sizes has, without building it."""
        d = self.d_model
        attention, ffn, norm = 4 * (d * d + d), 2 * d * self.d_ff + self.d_ff + d, 2 * d
        count = self.n_layer * (attention + ffn + 2 * norm)
        count += self.decoder_layers * (2 * attention + ffn + 3 * norm)
        if self.norm == "pre":
            count += 2 * norm
        return count + self.vocab_size * (d + 1 if self.logits_bias else d)


PRESETS = {  # number of parameters in the comment; a test counts them
    "tiny": TransformerConfig(),
    "base": TransformerConfig(
        vocab_size=37_000, seq_len=512, n_layer=6, n_head=8, d_model=512, d_ff=2048
    ),
    "big": TransformerConfig(
        vocab_size=37_000, seq_len=512, n_layer=6, n_head=16, d_model=1024, d_ff=4096, dropout=0.3
    ),
}


class LayerNorm(nn.Module):
    """y = g · (x − mean) / √(variance + ε) + b over the last axis, for each token alone.

    (Ba et al. 2016, arXiv:1607.06450, Eq. 4.) The variance is the mean square, divided by D and not
    by D − 1, and ε stands under the root. `forward` is PyTorch's kernel; `written_out` is the
    same step by step, and a test holds the two together.
    """

    def __init__(self, d_model: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))  # g
        self.bias = nn.Parameter(torch.zeros(d_model))  # b
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def written_out(self, x: Tensor) -> Tensor:
        """The definition, (…, D) to (…, D)."""
        centred = x - x.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        return self.weight * centred / (variance + self.eps).sqrt() + self.bias


def sinusoids(n_position: int, d_model: int, layout: str = "interleaved") -> Tensor:
    """A vector for each position, the same for every sentence: (n_position, D) float64.

    Attention sees its tokens in no order: without positions "dog bites man" were "man bites dog".

        PE(pos, 2i) = sin(pos / 10000^(2i/D)),  PE(pos, 2i+1) = cos(pos / 10000^(2i/D))    (§3.5)

    Pairs of numbers turn like the hands of many clocks, from fast to slow, so that going k places
    on turns each pair by an angle that depends on k alone. layout: "interleaved" is the paper's
    order, sine and cosine in turn; "sines-first" has all sines and then all cosines, as Marian
    does. The two differ by a permutation of the D numbers.
    """
    position = torch.arange(n_position, dtype=torch.float64, device="cpu")
    pair = torch.arange(0, d_model, 2, dtype=torch.float64, device="cpu")
    angle = torch.outer(position, 10_000.0 ** (-pair / d_model))  # (n_position, D/2)
    both = torch.stack((angle.sin(), angle.cos()), dim=-1)  # (n_position, D/2, 2)
    if layout == "sines-first":
        both = both.mT
    return both.flatten(1)


class PositionTable:
    """The sinusoids, in each number format and on each device that asks.

    Worked out in float64 and rounded once, since in bfloat16 the positions 256 and 257 are the same
    number. It is no module buffer, so `model.bfloat16()` cannot round it.
    """

    def __init__(self, d_model: int, layout: str):
        self.d_model, self.layout, self.tables = d_model, layout, {}

    def __call__(self, start: int, n_token: int, like: Tensor) -> Tensor:
        """The vectors of the positions start … start + n_token − 1: (n_token, D)."""
        key, stop = (like.device, like.dtype), start + n_token
        if key not in self.tables or len(self.tables[key]) < stop:
            longer = max(stop, 128)
            table = sinusoids(longer, self.d_model, self.layout)
            self.tables[key] = table.to(like.dtype).to(like.device)
        return self.tables[key][start:stop]


def causal_mask(positions: Tensor, n_slot: int, dtype: torch.dtype) -> Tensor:
    """What queries at `positions` (B or 1, T) add to their scores: (B or 1, T, S).

    0 for the slots 0 … position, which they may see, −∞ for later ones.
    """
    later = torch.arange(n_slot, device=positions.device) > positions.unsqueeze(-1)
    return torch.zeros(later.shape, dtype=dtype, device=later.device).masked_fill(later, -math.inf)


def padding_mask(tokens: Tensor, pad_id: int, dtype: torch.dtype) -> Tensor | None:
    """What every query adds to its scores for these tokens, (B, 1, S): −∞ for padding, else 0.

    The 1 is the axis of the queries: the same for all of them. None where there is no padding. A
    row that is padding and nothing else, as when a batch is filled up to a fixed size, is left
    open: a softmax over scores that are all −∞ would be 0/0, and its NaN would reach every weight
    by the gradient.
    """
    padding = tokens == pad_id
    if not torch.compiler.is_compiling() and not padding.any():
        return None  # a compiled model has no such branch, since it would fall in two pieces
    hidden = padding & ~padding.all(dim=1, keepdim=True)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=tokens.device)
    return mask.masked_fill(hidden, -math.inf).unsqueeze(1)


def dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """softmax(scale · q·kᵀ + mask)·v, Eq. (1) of §3.2.1, written out.

    q: (B, H, T, C), k and v: (B, H, S, C), mask: (B or 1, T or 1, S) or none.
    causal: T = S tokens that each see themselves and those before. Returns (B, H, T, C).
    """
    scores = scale * (q @ k.mT)  # (B, H, T, S)
    if causal:
        mask = causal_mask(torch.arange(q.shape[2], device=q.device)[None], k.shape[2], q.dtype)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    return scores.softmax(dim=-1) @ v


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """The same by PyTorch's kernel, which never stores the (T, S) scores."""
    mask = None if mask is None else mask.unsqueeze(1)
    gqa = q.shape[1] > k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa
    )


def quickest_attention(device: torch.device, n_query: int, n_slot: int) -> Callable:
    """`dot_product_attention` or `fused_attention`: the same numbers, the quicker one here.

    By measurement: on CPUs plain products win for a few queries that look at more than a few
    tokens, as in the search for a translation.
    """
    few = device.type == "cpu" and n_query <= 4 and n_slot >= 16
    return dot_product_attention if few else fused_attention


class DecoderCache:
    """What decoding keeps, so that a new token costs one token's work.

    It may be kept because a token of the translation sees those before it alone: what comes later
    never changes its keys and values.

    own: keys and values of the translation so far, (n_slot, 2·layers, R, H, C): slot t of row r
    holds the token at position t. A query at position p sees the slots 0 … p.
    source: per decoder layer, keys and values of the source, (B, H, S, C), computed once. The N
    beams of a sentence share them, so nothing of it is copied and re-ordering beams leaves it be.
    Slots come first so that those in use are one piece of memory, which `reorder` copies at once.
    """

    def __init__(
        self, source: list[tuple[Tensor, Tensor]], mask: Tensor | None, n_row: int, n_slot: int
    ):
        """mask: the padding of the source, (B, 1, S) or none. n_row: R, a multiple of B."""
        self.source, self.mask, self.length, self.n_slot = source, mask, 0, n_slot
        keys = source[0][0]
        shape = (n_slot, 2 * len(source), n_row, keys.shape[1], keys.shape[3])
        self.own, self.spare = keys.new_zeros(shape), None

    def grow(self, n_token: int) -> None:
        """Take n_token more slots into use. Raises ValueError where there are no more."""
        if self.length + n_token > self.n_slot:
            raise ValueError(f"{self.length} + {n_token} tokens do not fit {self.n_slot} slots")
        self.length += n_token

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (R, H, T, C) in the last T slots in use; return all in use (R, H, t, C)."""
        own = self.own[: self.length, 2 * layer : 2 * layer + 2].permute(1, 2, 3, 0, 4)
        own[0, :, :, -k.shape[2] :], own[1, :, :, -k.shape[2] :] = k, v
        return own[0], own[1]

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row rows[i] was, (R,) int64. Rows stay with their sentence.

        Not while gradients are recorded.
        """
        if self.spare is None:
            self.spare = torch.empty_like(self.own)
        torch.index_select(self.own[: self.length], 2, rows, out=self.spare[: self.length])
        self.own, self.spare = self.spare, self.own


@dataclass
class Memory:
    """What the encoder made of the sources."""

    features: Tensor  # (B, S, D)
    mask: Tensor | None  # (B, 1, S), −∞ at padding; none without padding


@dataclass
class DecoderContext:
    """What all layers of one pass through the decoder share."""

    mask: Tensor | None  # (1, T, t), what the target tokens may see of the target
    causal: bool  # instead of a mask: T tokens that each see themselves and those before
    attend: Callable  # `dot_product_attention` or `fused_attention`
    memory: Memory | None  # the sources, where there is no cache
    cache: DecoderCache | None


class MultiHeadAttention(nn.Module):
    """Concat(head_1 … head_H)·W^O, head_h = attention(x·W^Q_h, y·W^K_h, y·W^V_h)   (§3.2.2).

    The matrices of all heads stand one above the other in one matrix. What x and y are is the
    subclasses' part; here heads are compared, mixed and joined.
    """

    def __init__(self, d_model: int, n_head: int):
        super().__init__()
        self.n_head, self.d_head = n_head, d_model // n_head
        self.wo = nn.Linear(d_model, d_model)

    def heads(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
        """Cut (B, T, n·D) into n tensors (B, H, T, C)."""
        B, T, _ = x.shape
        x = x.view(B, T, n, self.n_head, self.d_head)  # (B, T, n, H, C)
        return x.permute(2, 0, 3, 1, 4).unbind(0)  # n of (B, H, T, C)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        attend: Callable,
    ) -> Tensor:
        """q: (B, H, T, C), k and v: (B, H, S, C). Returns (B, T, D)."""
        # q·k is a sum of C products: its variance is C, and large scores would leave the softmax
        # at 0 and 1, where it has no gradient (§3.2.1)
        scale = q.shape[-1] ** -0.5
        out = attend(q, k, v, mask, scale, causal)  # (B, H, T, C)
        return self.wo(out.transpose(1, 2).flatten(2))  # (B, T, D)


class SelfAttention(MultiHeadAttention):
    """y = x: queries, keys and values are made of the same tokens, by one product."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__(d_model, n_head)
        self.wqkv = nn.Linear(d_model, 3 * d_model)  # rows of queries, then keys, then values

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, T, D) to three tensors (B, H, T, C)."""
        return self.heads(self.wqkv(x), 3)


class CrossAttention(MultiHeadAttention):
    """x is the target, which asks; y is the source as the encoder left it, which answers."""

    def __init__(self, d_model: int, n_head: int):
        super().__init__(d_model, n_head)
        self.wq = nn.Linear(d_model, d_model)
        self.wkv = nn.Linear(d_model, 2 * d_model)  # rows of keys, then values

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, C)."""
        return self.heads(self.wq(x), 1)[0]

    def keys_values(self, memory: Tensor) -> tuple[Tensor, ...]:
        """(B, S, D) to two tensors (B, H, S, C)."""
        return self.heads(self.wkv(memory), 2)


class FeedForward(nn.Module):
    """w2·activation(w1·x), Eq. (2) of §3.3."""

    def __init__(self, d_model: int, d_ff: int, activation: str):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff)
        self.w2 = nn.Linear(d_ff, d_model)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))  # (B, T, D), (B, T, F) in between


class AddNorm(nn.Module):
    """norm(x + dropout(layer(x))), §3.1 and §5.4; before ("pre"): x + dropout(layer(norm(x))).

    Post-norm is the paper's. At the start of training its gradients are large near the output, so
    the learning rate has to begin small; pre-norm leaves the sum x itself alone, has no such need,
    and gets one more norm at the end of a stack (Xiong et al. 2020, arXiv:2002.04745, §3.3).
    """

    def __init__(self, d_model: int, eps: float, dropout: float, before: bool):
        super().__init__()
        self.norm, self.dropout, self.before = LayerNorm(d_model, eps), nn.Dropout(dropout), before

    def forward(self, x: Tensor, layer: Callable) -> Tensor:
        if self.before:
            return x + self.dropout(layer(self.norm(x)))
        return self.norm(x + self.dropout(layer(x)))


def add_norm(c: TransformerConfig) -> AddNorm:
    """The sum and norm around one layer of a model of these sizes."""
    return AddNorm(c.d_model, c.norm_eps, c.dropout, c.norm == "pre")


class EncoderBlock(nn.Module):
    """Attention of the source over itself, then the feed-forward layer (§3.1)."""

    def __init__(self, c: TransformerConfig):
        super().__init__()
        self.attention, self.attention_sum = SelfAttention(c.d_model, c.n_head), add_norm(c)
        self.ffn, self.ffn_sum = FeedForward(c.d_model, c.d_ff, c.activation), add_norm(c)

    def forward(self, x: Tensor, mask: Tensor | None, attend: Callable) -> Tensor:
        """x: (B, S, D), mask: (B, 1, S) or none."""

        def attention(y: Tensor) -> Tensor:
            q, k, v = self.attention.queries_keys_values(y)
            return self.attention(q, k, v, mask, False, attend)

        return self.ffn_sum(self.attention_sum(x, attention), self.ffn)


class DecoderBlock(nn.Module):
    """Attention over the target so far, attention over the source, feed-forward layer (§3.1)."""

    def __init__(self, c: TransformerConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.attention, self.attention_sum = SelfAttention(c.d_model, c.n_head), add_norm(c)
        self.cross, self.cross_sum = CrossAttention(c.d_model, c.n_head), add_norm(c)
        self.ffn, self.ffn_sum = FeedForward(c.d_model, c.d_ff, c.activation), add_norm(c)

    def attend_target(self, x: Tensor, context: DecoderContext) -> Tensor:
        """Masked self-attention, §3.2.3."""
        q, k, v = self.attention.queries_keys_values(x)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)  # (R, H, all tokens so far, C)
        return self.attention(q, k, v, context.mask, context.causal, context.attend)

    def attend_source(self, x: Tensor, context: DecoderContext) -> Tensor:
        """Cross-attention, §3.2.3. The beams of a sentence are so many more queries of it."""
        if context.cache is not None:
            (k, v), mask = context.cache.source[self.layer], context.cache.mask
        else:
            (k, v), mask = self.cross.keys_values(context.memory.features), context.memory.mask
        B, (R, T, D) = len(k), x.shape
        q = self.cross.queries(x.view(B, R * T // max(1, B), D))  # (B, H, N·T, C)
        return self.cross(q, k, v, mask, False, context.attend).view(x.shape)

    def forward(self, x: Tensor, context: DecoderContext) -> Tensor:
        """x: (R, T, D)."""
        x = self.attention_sum(x, lambda y: self.attend_target(y, context))
        x = self.cross_sum(x, lambda y: self.attend_source(y, context))
        return self.ffn_sum(x, self.ffn)


class Transformer(nn.Module):
    """Source and target tokens to next-token logits.

    One matrix reads the tokens of both languages and scores them (§3.4).
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = c = config
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.encoder = nn.ModuleList(EncoderBlock(c) for _ in range(c.n_layer))
        self.decoder = nn.ModuleList(DecoderBlock(c, layer) for layer in range(c.decoder_layers))
        if c.norm == "pre":
            self.encoder_norm = LayerNorm(c.d_model, c.norm_eps)
            self.decoder_norm = LayerNorm(c.d_model, c.norm_eps)
        else:
            self.encoder_norm, self.decoder_norm = nn.Identity(), nn.Identity()
        self.logits_bias = nn.Parameter(torch.zeros(c.vocab_size)) if c.logits_bias else None
        self.dropout = nn.Dropout(c.dropout)
        self.table = PositionTable(c.d_model, c.positions)
        self.initialize()

    def initialize(self) -> None:
        """Weights from N(0, 2/(rows + columns)) (Glorot & Bengio 2010), embeddings N(0, 1/D).

        `wqkv` is three square matrices one above the other, `wkv` two. Multiplied by √D,
        embeddings are about as large as the positions that are added to them.
        """
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                if name.endswith("bias"):
                    nn.init.zeros_(weight)
                continue  # gains stay 1
            rows, columns = weight.shape
            if name == "embedding.weight":
                nn.init.normal_(weight, std=columns**-0.5)
                continue
            if name.endswith(("wqkv.weight", "wkv.weight")):
                rows = columns
            nn.init.normal_(weight, std=(2 / (rows + columns)) ** 0.5)

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Embeddings and positions, from position `start` on: (B, T) to (B, T, D)."""
        n_token = tokens.shape[1]
        if start + n_token > self.config.seq_len:
            raise ValueError(
                f"{start + n_token} tokens are more than the longest, {self.config.seq_len}"
            )
        x = self.embedding(tokens)  # (B, T, D)
        if self.config.scale_embedding:
            x = x * self.config.d_model**0.5
        return self.dropout(x + self.table(start, n_token, x))

    def encode(self, source: Tensor) -> Memory:
        """source: (B, S) int64, short rows filled up with pad_id.

        Raises ValueError for more tokens than seq_len.
        """
        x = self.embed(source)  # (B, S, D)
        mask = padding_mask(source, self.config.pad_id, compute_dtype(x))
        attend = quickest_attention(x.device, source.shape[1], source.shape[1])
        for block in self.encoder:
            x = block(x, mask, attend)
        return Memory(self.encoder_norm(x), mask)

    def new_cache(self, memory: Memory, n_beam: int, n_slot: int) -> DecoderCache:
        """An empty cache for n_beam rows of each sentence and up to n_slot tokens."""
        source = [tuple(block.cross.keys_values(memory.features)) for block in self.decoder]
        return DecoderCache(source, memory.mask, len(memory.features) * n_beam, n_slot)

    def decode(
        self, target: Tensor, memory: Memory | None = None, cache: DecoderCache | None = None
    ) -> Tensor:
        """What the last block says of each target token: (R, T, D).

        target: (R, T) int64. With a cache these tokens go on from what it holds, and the sources
        are in it. Padding at the end of a row needs no mask: nothing before it can see it.
        """
        T, start = target.shape[1], cache.length if cache else 0
        x = self.embed(target, start)  # (R, T, D)
        n_slot, mask = start + T, None
        if cache:
            cache.grow(T)
        if start and T > 1:  # a chunk that goes on; one token alone may see all there is
            positions = torch.arange(start, n_slot, device=target.device).unsqueeze(0)
            mask = causal_mask(positions, n_slot, compute_dtype(x))
        context = DecoderContext(
            mask=mask,
            causal=start == 0 and T > 1,
            attend=quickest_attention(x.device, T, n_slot),
            memory=memory,
            cache=cache,
        )
        for block in self.decoder:
            x = block(x, context)
        return self.decoder_norm(x)  # (R, T, D)

    def head(self, features: Tensor) -> Tensor:
        """Logits, (…, D) to (…, V)."""
        return F.linear(features, self.embedding.weight, self.logits_bias)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """source: (B, S), target: (B, T) int64, both filled up with pad_id. Logits: (B, T, V).

        The logits at target token t score token t + 1, and depend on the tokens 0 … t alone. So
        in training the target is given twice, shifted by one: the decoder reads `<s> Budi membaca`
        and is to score `Budi membaca buku`, all tokens at once.
        Raises ValueError for more tokens than seq_len.
        """
        return self.head(self.decode(target, self.encode(source)))

    def flops(self, n_source: int, n_target: int) -> int:
        """Operations to train on a sentence pair: 6 a weight and token, and attention.

        (6 = 2, a product and a sum, × 3, forward once and backward twice; Kaplan et al. 2020,
        arXiv:2001.08361, §2.1.) Attention costs 12 · D for each query and key. Looking up an
        embedding costs nothing; its use as the head counts.
        """
        c, d = self.config, self.config.d_model
        ffn = 2 * d * c.d_ff
        encoder = n_source * (4 * d * d + ffn) + 2 * d * n_source * n_source
        decoder = n_target * (6 * d * d + ffn) + n_source * 2 * d * d
        decoder += 2 * d * (n_target * n_target + n_target * n_source)
        head = n_target * d * c.vocab_size
        return 6 * (c.n_layer * encoder + c.decoder_layers * decoder + head)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The number format of matrix products: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
