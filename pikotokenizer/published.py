"""Published vocabularies whose rank file says neither its pattern nor its special tokens.

A rank file (tiktoken's format) is a list of tokens and no more. Which regular expression cut the
training text into words, and which special tokens get the ids behind the last rank, stands in the
source code of each publisher: OpenAI's `tiktoken_ext/openai_public.py` and `whisper/tokenizer.py`,
Meta's `llama-models/models/llama4/tokenizer.py`, and for Llama 3 the lists that the converted
checkpoints on the Hub carry. They are written down here once, under the names that people use.
"""

from collections.abc import Callable
from dataclasses import dataclass

END, PROMPT_END = "<|endoftext|>", "<|endofprompt|>"
FILL = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"]  # "fill in the middle" of a program
# Whisper's languages in the order of their ids; the large-v3 model has the last one as well.
LANGUAGES = (
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th "
    "ur hr bg lt la mi ml cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr "
    "pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt "
    "haw ln ha ba jw su yue"
).split()


def numbered(first: int, tokens: list[str]) -> dict[str, int]:
    """Text → id, the ids one after the other from `first`."""
    return {token: first + i for i, token in enumerate(tokens)}


def reserved(first: int, count: int, group: str = "") -> list[str]:
    """Meta's names for ids that are kept free, such as <|reserved_special_token_5|>."""
    return [f"<|{group}reserved_special_token_{i}|>" for i in range(first, first + count)]


def whisper(first: int, languages: int) -> dict[str, int]:
    """The language, the task, and 1,501 time stamps in steps of 0.02 seconds."""
    spoken = [f"<|{code}|>" for code in LANGUAGES[:languages]]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    times = [f"<|{0.02 * i:.2f}|>" for i in range(1501)]
    start = [END, "<|startoftranscript|>"]
    return numbered(first, [*start, *spoken, *tasks, "<|notimestamps|>", *times])


def llama3() -> list[str]:
    """Llama 3 of April 2024: 256 of them, most of them unused."""
    head = ["<|begin_of_text|>", "<|end_of_text|>", *reserved(0, 4)]
    turns = ["<|start_header_id|>", "<|end_header_id|>", *reserved(4, 1), "<|eot_id|>"]
    return [*head, *turns, *reserved(5, 246)]


def llama3_1() -> list[str]:
    """Llama 3.1 to 3.3: four of the reserved ones got a meaning, and the others moved up."""
    head = ["<|begin_of_text|>", "<|end_of_text|>", *reserved(0, 2), "<|finetune_right_pad_id|>"]
    turns = [*reserved(2, 1), "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    return [*head, *turns, "<|eot_id|>", "<|python_tag|>", *reserved(3, 245)]


def llama4() -> list[str]:
    """Llama 4: 2,048 of them, for text, pictures and reasoning."""
    basic = ["<|begin_of_text|>", "<|end_of_text|>", *FILL]
    turns = ["<|header_start|>", "<|header_end|>", "<|eom|>", "<|eot|>", "<|step|>"]
    turns += reserved(0, 6, "text_post_train_")
    turns += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    turns += reserved(8, 61, "text_post_train_")
    pictures = ["<|image_start|>", "<|image_end|>", *reserved(0, 2, "vision_")]
    pictures += ["<|tile_x_separator|>", "<|tile_y_separator|>", *reserved(2, 4, "vision_")]
    pictures += [
        "<|image|>",
        *reserved(6, 1, "vision_"),
        "<|patch|>",
        *reserved(7, 1041, "vision_"),
    ]
    thoughts = reserved(0, 8, "reasoning_")
    thoughts += ["<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    named = [*basic, *turns, *pictures, *thoughts]
    return [*named, *reserved(0, 2048 - len(named))]


def harmony() -> dict[str, int]:
    """gpt-oss: o200k_base with the marks of a conversation, all other ids up to 201,087 reserved.

    (tiktoken gives the id 200018 a second name, <|reserved_200018|>; here it has one.)
    """
    ids = {"<|startoftext|>": 199998, END: 199999, "<|return|>": 200002, "<|constrain|>": 200003,
           "<|channel|>": 200005, "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008,
           "<|call|>": 200012, PROMPT_END: 200018}  # fmt: skip
    named = set(ids.values())
    return ids | {f"<|reserved_{i}|>": i for i in range(200000, 201088) if i not in named}


@dataclass(frozen=True)
class Published:
    """ranks: how many tokens the file lists; pattern: a name in PATTERNS; special: text → id."""

    ranks: int
    pattern: str
    special: Callable[[], dict[str, int]]


PUBLISHED = {
    "gpt2": Published(50256, "gpt2", lambda: {END: 50256}),
    "p50k_base": Published(50280, "gpt2", lambda: {END: 50256}),
    "p50k_edit": Published(50280, "gpt2", lambda: {END: 50256} | numbered(50281, FILL)),
    "cl100k_base": Published(
        100256, "gpt4", lambda: numbered(100257, [END, *FILL]) | {PROMPT_END: 100276}
    ),
    "o200k_base": Published(199998, "o200k", lambda: {END: 199999, PROMPT_END: 200018}),
    "o200k_harmony": Published(199998, "o200k", harmony),
    "whisper": Published(50257, "gpt2", lambda: whisper(50257, 99)),
    "whisper-v3": Published(50257, "gpt2", lambda: whisper(50257, 100)),
    "whisper.en": Published(50256, "gpt2", lambda: whisper(50256, 99)),
    "llama3": Published(128000, "llama3", lambda: numbered(128000, llama3())),
    "llama3.1": Published(128000, "llama3", lambda: numbered(128000, llama3_1())),
    "llama4": Published(200000, "o200k", lambda: numbered(200000, llama4())),
}
# Who else may have used the same ranks with other special tokens.
OTHERS = {
    "whisper": "read as Whisper's with 99 languages; for large-v3 say special_tokens='whisper-v3' "
    "(--special whisper-v3)",
    "llama3": "read as Llama 3's of April 2024; for 3.1 to 3.3 say special_tokens='llama3.1' "
    "(--special llama3.1)",
}


def recognised(ranks: dict[str, int]) -> str | None:
    """The name of the published vocabulary that a rank file surely is, else None.

    OpenAI's sizes are odd enough to tell. 128,000 is a size that anybody may choose, so two tokens
    must have Llama 3's ids as well; 200,000 may be Llama 4's and has to be named.
    """
    if len(ranks) == 50257:
        return "whisper" if "" in ranks else None
    if len(ranks) == 128000:
        return "llama3" if (ranks.get("Hello"), ranks.get("Ġworld")) == (9906, 1917) else None
    names = ("gpt2", "p50k_base", "cl100k_base", "o200k_base")
    return next((name for name in names if PUBLISHED[name].ranks == len(ranks)), None)
