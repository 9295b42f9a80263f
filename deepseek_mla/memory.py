"""What the cache of a text costs, in numbers to keep for each token, and where 93.3 % comes from.

    multi-head       2 · layers · heads · d_head              a key and a value for each head
    grouped-query    2 · layers · key/value heads · d_head    heads share them in groups
    latent           layers · (kv_rank + d_rope)              one latent and one rotary key

This file imports nothing.
"""


def grouped_numbers(n_layer: int, n_kv_head: int, d_head: int) -> int:
    """Numbers a token leaves in the cache of grouped-query attention; multi-head: all heads."""
    return 2 * n_layer * n_kv_head * d_head


def latent_numbers(n_layer: int, kv_rank: int, d_rope: int) -> int:
    """The same of latent attention."""
    return n_layer * (kv_rank + d_rope)


def famous_savings() -> dict[str, float]:
    """What DeepSeek-V2's "93.3 % smaller cache" (arXiv:2405.04434, abstract) is made of, in shares.

    It compares V2 as it is served, 60 layers and 6 bits a number (§3.2.3), with DeepSeek 67B as it
    was, 95 layers, 8 key/value heads of 128 and 16 bits. Neither fewer layers nor fewer bits are
    latent attention's doing; on the other hand 67B had grouped heads already. V2's own shape is 128
    heads with keys of 192 numbers (128 without a position and 64 with one) and values of 128.
    """
    before = grouped_numbers(95, 8, 128)
    after = latent_numbers(60, 512, 64)
    return {
        "as published, 6 bits against 16": 1 - 6 * after / (16 * before),
        "without the bits": 1 - after / before,
        "without the bits, 60 layers both": 1 - after / grouped_numbers(60, 8, 128),
        "against multi-head attention of V2's own shape": 1 - after / (60 * 128 * (192 + 128)),
    }
