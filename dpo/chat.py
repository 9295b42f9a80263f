"""From messages to the text of a prompt and of an answer, with a boundary that no token crosses.

    [{"role": "user", "content": "Hi"}]  ─▶  "User: Hi\\nAssistant:"
    [{"role": "assistant", "content": "Hello"}]  ─▶  " Hello"

A model that comes with a chat template (the Jinja text `chat_template` in the tokenizer_config.json
of a Hugging Face folder) is spoken to in its own way, any other one as above.

Prompt and answer are turned into tokens apart. So the tokens that the model is trained on are those
that it sees in use, where the answer is not there yet. And an answer ends with exactly one
end-of-text token, whether or not its text already has one.
"""

from pathlib import Path

from options import UserError, shorten
from tokenizer import Tokenizer

Messages = list[dict[str, str]]
NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


def template_of(tokenizer: Tokenizer) -> str | None:
    """The chat template that came with a tokenizer."""
    template = getattr(tokenizer, "settings", {}).get("chat_template")
    return template if isinstance(template, str) and template else None


def adopt_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Put a template that lies in a file of its own, as newer folders have it, to the settings."""
    file = folder / "chat_template.jinja"
    if file.is_file() and isinstance(getattr(tokenizer, "settings", None), dict):
        tokenizer.settings["chat_template"] = file.read_text(encoding="utf-8")


def texts_of(messages: Messages, answer: Messages, tokenizer: Tokenizer) -> tuple[str, str]:
    """(prompt, answer) as text. UserError for a template that will not do."""
    before, template = prompt_of(messages, tokenizer), template_of(tokenizer)
    if template is None:
        return before, " " + answer[-1]["content"]
    whole = render(template, [*messages, *answer], tokenizer, to_answer=False)
    if not whole.startswith(before):
        raise UserError(
            "the chat template writes a prompt otherwise once its answer is there: "
            f"{shorten(before[-60:], 80)}"
        )
    return before, whole[len(before) :]


def prompt_of(messages: Messages, tokenizer: Tokenizer) -> str:
    """What the model reads before it answers these messages."""
    template = template_of(tokenizer)
    if template is None:
        return plain_prompt(messages)
    return render(template, messages, tokenizer, to_answer=True)


def plain_prompt(messages: Messages) -> str:
    """`User: …` and `Assistant: …`, a line each, and a last line that the answer goes on in."""
    lines = [f"{NAMES.get(m['role'], m['role'])}: {m['content']}" for m in messages]
    return "\n".join([*lines, "Assistant:"])


def render(template: str, messages: Messages, tokenizer: Tokenizer, to_answer: bool) -> str:
    """Run a Jinja template as transformers does, in Jinja's sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    specials = {name: word_of(tokenizer, name) for name in ("bos_token", "eos_token")}
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=to_answer, **specials
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise UserError(f"the chat template does not take these messages: {error}") from None


def word_of(tokenizer: Tokenizer, role: str) -> str:
    """The text of bos_token or eos_token in a tokenizer's settings."""
    word = getattr(tokenizer, "settings", {}).get(role)
    word = word.get("content") if isinstance(word, dict) else word
    return word if isinstance(word, str) else ""


def prompt_ids(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a prompt: one bos at its start, whether or not its text begins with one."""
    ids = tokenizer.encode_text(prompt)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return ids if begin and ids[:1] == begin else begin + ids


def answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of an answer: up to its first eos, or to its end and one eos behind it."""
    ids, end = tokenizer.encode_text(answer), tokenizer.eos_id
    if end is None:
        return ids
    return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]
