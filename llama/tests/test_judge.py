"""Stories that a model tells, judged by the grammar that its training text comes from."""

import types

import pytest

import judge
from tokenizer import ByteTokenizer


@pytest.fixture
def loaded():
    """A model that is never asked, see `tells`."""
    model = types.SimpleNamespace(config=types.SimpleNamespace(seq_len=999))
    return types.SimpleNamespace(model=model, tokenizer=ByteTokenizer(), stop_ids=(257,))


@pytest.fixture
def tells(monkeypatch):
    """`tells(texts…)` makes `generate` yield these, and None in a row that has ended."""

    def call(*texts: str) -> list:
        rows, asked = [list(text.encode("utf-8")) for text in texts], []

        def generate(model, prompts, longest, sampling, *more):
            asked.append((prompts, longest, sampling.temperature, *more))
            for i in range(max(map(len, rows))):
                yield [row[i] if i < len(row) else None for row in rows]

        monkeypatch.setattr(judge, "generate", generate)
        return asked

    return call


def test_stories_begin_with_nothing_and_have_any_length(loaded, tells):
    asked = tells("One day", "é", "")
    assert judge.stories(loaded, 0.7, 3, seed=5) == ["One day", "é", ""]
    assert asked == [([[256]], 999, 0.7, (257,), 5, 3)]


def test_share_is_of_stories_that_the_grammar_can_tell(loaded, tells, stories):
    story = stories.split("<|endoftext|>\n")[0].removesuffix("\n")
    tells(story, story[:-1], story.replace(" ", "  ", 1), "")
    assert judge.share_told(loaded, 1.0, 4) == 0.25
