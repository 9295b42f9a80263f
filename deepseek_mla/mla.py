"""Multi-head latent attention: the keys and values of all heads, made of one short vector a token.

Ordinary attention remembers a key and a value for every head and token. Here a token leaves two
things alone in the cache, whatever the number of heads:

    c = norm(W_dkv·x)      the latent, R numbers, of which head h makes key and value:
                           k_h = W_uk,h·c  and  v_h = W_uv,h·c
    r = rotate(W_kr·x)     one rotary key of P numbers for all heads, which knows the position

The query of a head has two parts as well, q_h of N numbers and the rotary s_h of P. A score is

    score = (q_h·k_h + s_h·r) · scale,    scale = (N + P)^−½, with YaRN times mscale², see yarn.py

The rotation must stay outside of the latent. If k_h were rotated, k_h = Ω·W_uk,h·c with another Ω
at every position, and what follows would not work.

**Naive**: make k_h and v_h of every token in the cache, then attend as ever.

**Absorbed**: a product of three may be worked out from either side,

    q_h·(W_uk,h·c) = (W_uk,hᵀ·q_h)·c                  for the scores, and
    Σ_t p_t·(W_uv,h·c_t) = W_uv,h·(Σ_t p_t·c_t)       for the result, with p_t the attention weights

so the query is carried into the space of c once, attention works there with the one key [c ; r] and
the one value c for all heads, and what comes out is carried back once. Keys and values of the past
are never made. Both forms give the same numbers but for rounding.

    DeepSeek-V2: arXiv:2405.04434, §2.1 and appendix C; DeepSeek-V3: arXiv:2412.19437, §2.1.1

Dimension key: B batch, T new tokens, S tokens in the cache, H heads, R kv_rank, N d_nope, P d_rope,
V d_value. Left out: a cache in fewer bits. This file imports torch alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def naive(q: Tensor, rotary_q: Tensor, memory: Tensor, up: Tensor, attend: Callable) -> Tensor:
    """Make all keys and values, then attend (arXiv:2412.19437, Eq. 1 to 11).

    q: (B, H, T, N). rotary_q: (B, H, T, P). memory: (B, 1, S, R + P), what the cache holds.
    up: (H, N + V, R), W_uk and W_uv of each head, one below the other.
    attend(q, k, v) is attention. Returns (B, H, T, V).
    """
    N, P, R = q.shape[3], rotary_q.shape[3], up.shape[2]
    V = up.shape[1] - N
    latent, rotary_k = memory.split((R, P), dim=3)
    k, v = (latent @ up.mT).split((N, V), dim=3)  # (B, H, S, N), (B, H, S, V)
    k = torch.cat((k, rotary_k.expand(-1, k.shape[1], -1, -1)), dim=3)  # (B, H, S, N + P)
    v = F.pad(v, (0, max(0, N + P - V)))  # PyTorch's fast kernel wants values as wide as keys
    return attend(torch.cat((q, rotary_q), dim=3), k, v)[..., :V]


def absorbed(q: Tensor, rotary_q: Tensor, memory: Tensor, up: Tensor, attend: Callable) -> Tensor:
    """The same without ever making a key or a value (arXiv:2405.04434, §2.1.2, at its end)."""
    N, R = q.shape[3], up.shape[2]
    up_k, up_v = up.split((N, up.shape[1] - N), dim=1)  # (H, N, R), (H, V, R)
    q = torch.cat((q @ up_k, rotary_q), dim=3)  # (B, H, T, R + P)
    return attend(q, memory, memory[..., :R]) @ up_v.mT  # (B, H, T, V)


def multiplications(form: Callable, n_query: int, n_slot: int, widths: tuple) -> int:
    """How many multiplications a head needs for n_query new tokens and n_slot in the cache.

    widths: (N, P, V, R). Naive expands n_slot tokens, absorbed carries n_query there and back.
    """
    N, P, V, R = widths
    expanded, width = (n_slot, N + P + V) if form is naive else (n_query, R + P + R)
    return expanded * R * (N + V) + n_query * n_slot * width


def fewest(q: Tensor, rotary_q: Tensor, memory: Tensor, up: Tensor, attend: Callable) -> Tensor:
    """The form that needs fewer multiplications: absorbed to write a token, naive to read many."""
    N, P, R = q.shape[3], rotary_q.shape[3], up.shape[2]
    shape = q.shape[2], memory.shape[2], (N, P, up.shape[1] - N, R)
    better = multiplications(absorbed, *shape) < multiplications(naive, *shape)
    return (absorbed if better else naive)(q, rotary_q, memory, up, attend)


def crossover(widths: tuple[int, int, int, int]) -> float:
    """From how many new tokens on naive needs fewer multiplications, in a very long cache.

    T·(2R + P) = R·(N + V) + T·(N + P + V), so T = R·(N + V) / (2R − N − V): 171 for DeepSeek-V3;
    ∞ where the latent is so small that absorbed is always better. widths: (N, P, V, R).
    """
    N, _, V, R = widths
    return R * (N + V) / (2 * R - N - V) if 2 * R > N + V else float("inf")
