"""Multi-token prediction: modules that say what comes after the next token.

A language model learns from the next token alone. Here module 1 is given what the model says of
token i and the token that really came next, and predicts the one after that; module 2 goes on from
module 1. Each is one block more, with the embedding and the head of the model:

    h⁰_i = what the last block says of token i               predicts token i + 1
    hᵏ_i = block_k(W_k·[norm(embedding of token i + k) ; norm(hᵏ⁻¹_i)])   predicts token i + k + 1

It is more to learn from in training. In writing the modules may be dropped, or they guess tokens
that the model then checks, see speculative.py.

    DeepSeek-V3: arXiv:2412.19437, §2.2, Eq. 21 to 25

Dimension key: B batch, T tokens, D d_model, V vocab_size.
"""

import torch
from torch import Tensor, nn

from model import (
    Block,
    Context,
    Deepseek,
    DeepseekConfig,
    KVCache,
    RMSNorm,
    causal_mask,
    compute_dtype,
    fastest_attention,
)


class AheadModule(nn.Module):
    """hᵏ from hᵏ⁻¹ and the embedding of the token k places on (arXiv:2412.19437, Eq. 21 and 22)."""

    def __init__(self, block: Block, d_model: int, eps: float):
        super().__init__()
        self.embedding_norm = RMSNorm(d_model, eps)
        self.features_norm = RMSNorm(d_model, eps)
        self.join = nn.Linear(2 * d_model, d_model, bias=False)
        self.block = block
        self.norm = RMSNorm(d_model, eps)

    def forward(self, features: Tensor, following: Tensor, context: Context) -> Tensor:
        """features: (B, T, D), hᵏ⁻¹. following: (B, T, D), embeddings. Returns hᵏ, (B, T, D)."""
        both = torch.cat((self.embedding_norm(following), self.features_norm(features)), dim=-1)
        return self.norm(self.block(self.join(both), context))


class DeepseekMTP(Deepseek):
    """Deepseek with config.n_ahead modules that look further ahead."""

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        self.ahead = nn.ModuleList(
            AheadModule(
                Block(self.attention(i), self.experts(), config.d_model, config.norm_eps),
                config.d_model,
                config.norm_eps,
            )
            for i in range(config.n_ahead)
        )
        self.initialize()

    def new_ahead_cache(self, batch_size: int, n_slot: int) -> KVCache:
        """An empty cache for the modules, as `new_cache` makes one for the blocks."""
        c = self.config
        shape = (batch_size, 1, n_slot, c.kv_rank + c.d_rope)
        return KVCache(c.n_ahead, shape, like=self.embedding.weight, d_value=0)

    def look_ahead(
        self, features: Tensor, following: Tensor, cache: KVCache | None = None
    ) -> list[Tensor]:
        """Features of the tokens after the next: hᵏ of each module, (B, T, D).

        features: (B, T, D), of `Deepseek.features`. following: (B, T), the next tokens. Further
        tokens are those of `following` further on; at the end of the row, where there are none, a
        module's answer means nothing. With a cache the tokens go on from what it holds, and only
        the first module answers: a single step does not know what the others need.
        """
        context, found = self.context_of(features, cache), []
        for module in self.ahead if cache is None else self.ahead[:1]:
            features = module(features, self.embedding(following), context)
            found.append(features)
            following = following.roll(-1, dims=1)
        return found

    def context_of(self, features: Tensor, cache: KVCache | None) -> Context:
        """What the modules' blocks share, see `Deepseek.features`."""
        T, start, device = features.shape[1], cache.length if cache else 0, features.device
        if cache:
            cache.grow(T)
        dtype, n_slot = compute_dtype(features), start + T
        positions = torch.arange(start, n_slot, device=device).unsqueeze(0)
        sees_before = start == 0 or T == 1  # then no mask is needed
        return Context(
            rotary=self.rotary(positions, cache.n_slot if cache else T, dtype),
            mask=None if sees_before else causal_mask(positions, n_slot, dtype),
            causal=start == 0 and T > 1,
            attend=fastest_attention(device, dtype, T, n_slot),
            cache=cache,
            slots=positions,
        )

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        following: Tensor | None = None,
    ) -> Tensor | list[Tensor]:
        """As `Deepseek.forward`; given the tokens that follow, the logits of all, in a list.

        following: (B, T), the next tokens. Returns then n_ahead + 1 logits, (B, T, V): of the next
        token, of the one after it, and so on.
        """
        features = self.features(tokens, cache, positions)
        if following is None:
            return self.head(features)
        return [self.head(one) for one in (features, *self.look_ahead(features, following))]

    def flops_per_token(self, seq_len: int) -> int:
        """As `Deepseek.flops_per_token`, with the modules' use of attention and head."""
        c = self.config
        channels = c.n_head * (c.d_nope + c.d_rope + c.d_value)
        further = 6 * self.head.weight.numel() + 6 * channels * seq_len
        return super().flops_per_token(seq_len) + c.n_ahead * further
