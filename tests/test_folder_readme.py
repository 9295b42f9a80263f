"""What the README of a folder says is so: its snippets, file table, commands and links.

These checks are here and not in the folder, so that who copies a folder to change it does not have
to fight line counts. What a folder measured is checked by the folder's own tests.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import repo


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def snippets(text: str) -> list[str]:
    """The Python blocks of a README."""
    return re.findall(r"(?ms)^```python\n(.*?)^```", text)


def expected(snippet: str) -> list[str]:
    """What a snippet should print: whole comment lines, and comments behind a print."""
    lines = []
    for line in snippet.splitlines():
        if line.startswith("# "):
            lines.append(line.removeprefix("# "))
        elif match := re.match(r"\s*print\(.*\)  # (.*)", line):
            lines.append(match[1])
    return lines


def wrong_outputs(folder: Path, text: str) -> list[str]:
    """The snippets that do not print what they say, with what they print instead."""
    found = []
    for snippet in snippets(text):
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=folder, capture_output=True, encoding="utf-8"
        )
        if done.stdout.splitlines() != expected(snippet) or not expected(snippet):
            found.append(f"{snippet}\nprints\n{done.stdout}{done.stderr[-800:]}")
    return found


def file_table(text: str) -> dict[str, int]:
    """The rows `| [file.py](file.py) | lines |` of a README."""
    rows = re.findall(r"(?m)^\| (?:\[[^\]]+\]\(|`)([\w/]+\.py)[)`] \| ([\d,]+) \|", text)
    return {name: int(number.replace(",", "")) for name, number in rows}


def wrong_rows(folder: Path, text: str) -> list[str]:
    """Files that the table leaves out, or whose number of lines is neither all nor code lines."""
    rows, found = file_table(text), []
    names = {file.name for file in repo.python_files(folder) if file.parent == folder}
    found += [f"{name} is not in the table" for name in sorted(names - rows.keys())]
    for name, number in rows.items():
        file = folder / name
        if not file.is_file():
            found.append(f"{name} does not exist")
            continue
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if number not in (lines, repo.code_lines(file)):
            found.append(f"{name} has {lines} lines, {repo.code_lines(file)} of code")
    return found


def dead_links(folder: Path, text: str) -> list[str]:
    """Links to what is not there, and pictures from elsewhere."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    dead = [t for t in local if t and not (folder / t).exists()]
    remote = [t for t in targets if "://" in t and t.endswith((".png", ".jpg", ".svg", ".gif"))]
    return dead + remote


def commands(text: str) -> list[list[str]]:
    """The words of every `python main.py …` in blocks and between backquotes."""
    blocks = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text)
    inside = "\n".join(block for language, block in blocks if language in ("", "bash"))
    lines = [line.strip() for line in inside.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    lines = [line for line in lines if re.match(r"(python|torchrun .*) main\.py", line)]
    return [shlex.split(line, comments=True) for line in lines]


def unknown_flags(folder: Path, text: str) -> list[str]:
    """Flags of commands in the README that main.py does not know."""
    shown = subprocess.run(
        [sys.executable, "main.py"], cwd=folder, capture_output=True, encoding="utf-8"
    ).stdout
    words = [word for line in commands(text) for word in line[line.index("main.py") :]]
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    return sorted(f for f in flags if not re.search(rf"{re.escape(f)}(?![\w-])", shown))


def test_snippets_print_what_they_say(folder: Path) -> None:
    assert wrong_outputs(folder, readme(folder)) == []


def test_snippets_are_short(folder: Path) -> None:
    """Eight lines of code at most, and there are some."""
    blocks = snippets(readme(folder))
    code = [[x for x in b.splitlines() if x.strip() and not x.startswith("#")] for b in blocks]
    assert len(code) >= 3 and [block for block in code if len(block) > 8] == []


def test_the_file_table_is_right(folder: Path) -> None:
    assert wrong_rows(folder, readme(folder)) == []


def test_links_and_pictures_are_there(folder: Path) -> None:
    assert dead_links(folder, readme(folder)) == []


def test_commands_have_the_flags_that_they_use(folder: Path) -> None:
    assert len(commands(readme(folder))) >= 5 and unknown_flags(folder, readme(folder)) == []


GOOD = """
| file | lines | what |
|---|---|---|
| [main.py](main.py) | 2 | all |

```python
print(1 + 1)  # 2
```

`python main.py --train` and [the file](main.py)
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder of which GOOD says the truth."""
    (tmp_path / "main.py").write_text('"""Help."""\nprint("--train")\n', encoding="utf-8")
    return tmp_path


def findings(folder: Path, text: str) -> list[str]:
    checks = (wrong_outputs, wrong_rows, dead_links, unknown_flags)
    return [found for check in checks for found in check(folder, text)]


def test_a_true_readme_passes(tiny: Path) -> None:
    assert findings(tiny, GOOD) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [("# 2", "# 3"), ("| 2 |", "| 3 |"), ("--train", "--trian"), ("](main.py) and", "](x.py) and"),
     ("[the file](main.py)", "![a](https://x.org/a.png)"), ("print(1 + 1)  # 2", "pass")],
)  # fmt: skip
def test_a_wrong_readme_is_found(tiny: Path, old: str, new: str) -> None:
    text = GOOD.replace("and [the file](main.py)", "[the file](main.py) and")
    changed = text.replace(old, new)
    assert changed != text and findings(tiny, changed) != []
