"""Text from a language model: it reads the prompt, then one token at a time what it drew itself.

The state is all that is carried from token to token, so a text of any length takes the same memory.
Key: B texts, V vocab_size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from checkpoint import Loaded
from model import SequenceModel
from options import UserError, check, option
from tokenizer import TextStream


@dataclass(frozen=True)
class SampleConfig:
    """The text to write.

    Raises ValueError for values out of range.
    """

    prompt: str = option("", "text to go on from (priming)")
    temperature: float = option(1.0, "divides the logits; 0 takes the likeliest token", least=0)
    num_samples: int = option(1, "ways to go on", least=1, most=10_000)
    max_new_tokens: int = option(400, "how many tokens to write", least=1)

    def __post_init__(self):
        check(self)


def choose(logits: Tensor, temperature: float, dice: torch.Generator) -> Tensor:
    """The next token of each row, (B,), from logits (B, V): drawn from softmax(logits / t).

    UserError for logits that are no numbers, which damaged weights give.
    """
    if not torch.isfinite(logits).all():
        raise UserError("the model's scores are not finite: its weights are damaged")
    if temperature == 0:
        return logits.argmax(dim=-1)
    below = logits.double().cpu() - logits.max(dim=-1, keepdim=True).values.double().cpu()
    p = (below / temperature).softmax(dim=-1)  # the largest is 0, so that 0 / t cannot overflow
    return torch.multinomial(p, 1, generator=dice)[:, 0].to(logits.device)


@torch.inference_mode()
def generate(
    model: SequenceModel, prompt: list[int], config: SampleConfig, seed: int
) -> Iterator[list[int]]:
    """Yield the next token of every sample, again and again."""
    model.eval()
    device, dice = model.head.weight.device, torch.Generator().manual_seed(seed)
    tokens = torch.tensor([prompt] * config.num_samples, device=device)
    state = None
    for _ in range(config.max_new_tokens):
        logits, state = model(tokens, state)
        new = choose(logits[:, -1], config.temperature, dice)
        yield new.tolist()
        tokens = new[:, None]


def write(
    loaded: Loaded, config: SampleConfig, seed: int = 0, show: Callable = lambda text: None
) -> str:
    """The prompt and its continuation, as often as asked, with lines `---` between.

    `show` gets the text piece by piece: the first one live, the others when all are done.
    UserError for a network that writes no text or has no alphabet, and for an empty prompt.
    """
    if loaded.task != "lm" or loaded.words is None:
        what = "is no language model" if loaded.task != "lm" else "has no alphabet.json"
        raise UserError(f"{loaded.folder} {what}: it cannot write")
    tokenizer, n = loaded.words, config.num_samples
    prompt = tokenizer.encode(config.prompt)
    if not prompt:
        raise UserError("--prompt is empty, and these weights know no beginning of a text")
    texts, streams = [config.prompt] * n, [TextStream(tokenizer) for _ in range(n)]
    open_rows = set(range(n))
    show(config.prompt)
    for tokens in generate(loaded.model, prompt, config, seed):
        open_rows -= {row for row in open_rows if tokens[row] == tokenizer.eos_id}
        if not open_rows:
            break
        for row in sorted(open_rows):
            piece = streams[row].push(tokens[row])
            texts[row] += piece
            if row == 0:
                show(piece)
    show("".join(f"\n---\n{text}" for text in texts[1:]))
    return "\n---\n".join(texts)
