"""Grouped-query attention is a special case of latent attention: a Llama as a DeepSeek, exactly.

With K key/value heads of C channels, take as latent the values of all K heads, K·C numbers, and as
the one rotary key the keys of all K heads side by side, K·C numbers. Query head h is then 0 but for
the channels of its own key head ⌊h / G⌋, and reads its value off the latent with a matrix of ones
and zeros. Nothing is left out: the cache is as large as before, 2·K·C numbers a token and layer,
and the result is the same. (Where the keys and values have a low rank, fewer numbers would do: Meng
et al. 2025, TransMLA, arXiv:2502.07864, §4. This file shows the exact case alone.)

Key: H heads, K key/value heads, G = H / K, C channels a head, D d_model.
"""

import torch
from torch import Tensor, nn

from model import Deepseek, DeepseekConfig, LatentAttention, RotaryTable
from yarn import yarn_frequencies


def grouped_to_latent(
    wq: Tensor, wk: Tensor, wv: Tensor, n_head: int, n_kv_head: int
) -> dict[str, Tensor]:
    """The weights of a LatentAttention that does what grouped-query attention does.

    wq: (H·C, D). wk, wv: (K·C, D), rotary channels in pairs (i, i + C/2). The latent must not be
    normalised, and the rotary frequencies are those of one head, K times over.
    """
    (D, C), H, K = (wq.shape[1], len(wq) // n_head), n_head, n_kv_head
    group = torch.arange(H) // (H // K)  # the key head of each head
    one = torch.eye(K, dtype=wq.dtype)[group]  # (H, K)
    halves = wk.view(K, 2, C // 2, D).transpose(0, 1)  # first halves of all heads, then second
    # √K, since scores are divided by √(K·C) and not by √C
    queries = K**0.5 * wq.view(H, 2, 1, C // 2, D) * one.view(H, 1, K, 1, 1)
    values = torch.einsum("hk,vc->hvkc", one, torch.eye(C, dtype=wq.dtype))
    return {
        "wq_b.weight": queries.reshape(H * K * C, D),
        "wkv_a.weight": torch.cat((wv, halves.reshape(K * C, D))),
        "wkv_b.weight": values.reshape(H * C, K * C),
    }


def llama_to_deepseek(tensors: dict[str, Tensor], config: dict) -> Deepseek:
    """A Llama of transformers as a Deepseek without experts, which gives the same logits.

    tensors: its state_dict. config: its config.json, without rotary scaling.
    """
    n_head, K = config["num_attention_heads"], config["num_key_value_heads"]
    C, theta = config["hidden_size"] // n_head, config["rope_parameters"]["rope_theta"]
    sizes = DeepseekConfig(
        vocab_size=config["vocab_size"], seq_len=config["max_position_embeddings"],
        n_layer=config["num_hidden_layers"], n_head=n_head, d_model=config["hidden_size"],
        q_rank=0, kv_rank=K * C, d_nope=0, d_rope=K * C, d_value=C,
        d_ff=config["intermediate_size"], n_dense=config["num_hidden_layers"], n_ahead=0,
        norm_eps=config["rms_norm_eps"], tie_embeddings=config["tie_word_embeddings"],
    )  # fmt: skip
    model = Deepseek(sizes).to(tensors["model.norm.weight"].dtype)
    model.rotary = RotaryTable(yarn_frequencies(C, theta, None).repeat(K))
    model.embedding.weight.data = tensors["model.embed_tokens.weight"].clone()
    model.norm.weight.data = tensors["model.norm.weight"].clone()
    model.head.weight.data = tensors["lm_head.weight"].clone()
    for i, block in enumerate(model.blocks):
        before = f"model.layers.{i}."
        inside = {k.removeprefix(before): v for k, v in tensors.items() if k.startswith(before)}
        q, k, v, o = (inside[f"self_attn.{x}_proj.weight"] for x in "qkvo")
        block.attention.kv_norm = nn.Identity()
        fill(block.attention, grouped_to_latent(q, k, v, n_head, K) | {"wo.weight": o})
        block.attention_norm.weight.data = inside["input_layernorm.weight"].clone()
        block.ffn_norm.weight.data = inside["post_attention_layernorm.weight"].clone()
        for ours, theirs in {"w1": "gate", "w2": "down", "w3": "up"}.items():
            fill(getattr(block.ffn, ours), {"weight": inside[f"mlp.{theirs}_proj.weight"]})
    return model


def fill(module: nn.Module | LatentAttention, state: dict[str, Tensor]) -> None:
    """Load all weights of a module. Raises RuntimeError for names and shapes that do not fit."""
    module.load_state_dict(state)
