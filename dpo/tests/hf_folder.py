"""A Llama folder of Hugging Face with random weights, and a tokenizer that some texts made.

`python tests/hf_folder.py TARGET DATA` writes one from a .json or .jsonl of preferences: a stand-in
for a downloaded model where there is no network.
"""

import sys
from pathlib import Path

TEMPLATE = (  # as chat models have it: every message ends with the end-of-text token
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_llama(folder: Path, texts: list[str], template: str | None = None, **sizes) -> Path:
    """Write config.json, model.safetensors and a byte-level BPE tokenizer of these texts."""
    import tokenizers
    import torch
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.pop("vocab_size", 400), special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    given = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 160} | sizes  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True, **given,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def main(target: str, source: str) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import data

    texts = [
        str(text)
        for example in data.read_parts(source)["train"]
        for text in (example.prompt, *example.answers)
    ]
    write_llama(
        Path(target), texts, vocab_size=2000, hidden_size=128, intermediate_size=256,
        num_hidden_layers=4, max_position_embeddings=192,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
