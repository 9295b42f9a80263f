"""The root README says what is so: its gallery, links, commands, template and every number."""

import json
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

import repo
from test_contract import DIRECTORIES, FILES, HEADINGS

README = (repo.ROOT / "README.md").read_text(encoding="utf-8")
TEXT = re.sub(r"(?s)<!--.*?-->", "", README)  # without comments
PROSE = re.sub(r"(?ms)^```.*?^```", "", TEXT)  # without code blocks
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?:e-?\d+)?")  # not the digits of GPT-2 and R1


def section(title: str) -> str:
    """The text below the second-level heading `title`."""
    return PROSE.split(f"## {title}\n")[1].split("\n## ")[0]


def gallery() -> dict[str, list[str]]:
    """The cells of each row of the gallery, by the folder that its first cell links to."""
    lines = [line for line in section("Gallery").splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {re.match(r"\[(\w+)\]\(\1/\)", row[0])[1]: row for row in rows}


# links, pictures, first lines


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", PROSE) + re.findall(r'src="([^"]+)"', PROSE)
    local = [target.split("#")[0] for target in targets if "://" not in target]
    assert [target for target in local if not (repo.ROOT / target).exists()] == []
    remote = [target for target in targets if "://" in target]
    assert [target for target in remote if target.endswith((".png", ".jpg", ".svg"))] == []


def test_pictures_have_words_for_who_cannot_see_them() -> None:
    assert re.findall(r"!\[\s*\]\(", PROSE) == []


def test_first_lines() -> None:
    """What it is, in two sentences, then a picture by line 5; no badges, no emojis but ours."""
    lines = README.splitlines()
    assert lines[2].startswith("Piko is ")
    assert any("![" in line for line in lines[:5])
    without = TEXT
    for heading in HEADINGS:
        without = without.replace(heading, "")
    assert [c for c in without if unicodedata.category(c) == "So"] == []
    assert "shields.io" not in README


# folders


def test_the_gallery_shows_the_folders_that_exist() -> None:
    """One row each. A new folder needs its row and no change here."""
    assert sorted(gallery()) == sorted(repo.folders())


def test_a_row_is_complete() -> None:
    """Idea, picture of the folder's own, headline, time, what it is proven against."""
    for name, row in gallery().items():
        assert len(row) == 5 and all(row), name
        assert re.fullmatch(rf"!\[[^]]+\]\({name}/assets/[\w.-]+\)", row[1]), name


# numbers


def normal(text: str) -> str:
    """Without emphasis, code marks and line breaks."""
    return " ".join(re.sub(r"[*`_]", "", text).split())


def values(data: object) -> Iterator[float]:
    """All the numbers in a JSON value."""
    if isinstance(data, (int, float)) and not isinstance(data, bool):
        yield data
    elif isinstance(data, (list, dict)):
        for inner in data.values() if isinstance(data, dict) else data:
            yield from values(inner)


def is_rounded(value: float, number: str) -> bool:
    """Does `number` say `value`, with as many decimals as it has? Whole numbers must be exact."""
    decimals = len(number.partition(".")[2])
    if "e" in number or not decimals:
        return value == float(number)
    return f"{value:.{decimals}f}" == number


def unproven(cell: str, folder: Path) -> list[str]:
    """The numbers of `cell` that the folder does not state.

    A number counts as stated if the folder's README, which the folder's tests check, has it with
    the same word after it, or a JSON file of its data, pretrained or assets has it when rounded.
    """
    readme = folder / "README.md"
    stated = normal(readme.read_text(encoding="utf-8")) if readme.is_file() else ""
    files = [f for place in ("data", "pretrained", "assets") for f in folder.glob(f"{place}/*.json")
             if not f.name.startswith("tokenizer")]  # fmt: skip
    known = [v for f in files for v in values(json.loads(f.read_text(encoding="utf-8")))]
    missing, cell = [], normal(re.sub(r"\]\([^)]*\)", "]", cell))
    for match in NUMBER.finditer(cell):
        word = re.match(r"\s*([^\s,.;:()]+)", cell[match.end() :])
        after = r"\s*" + re.escape(word[1]) if word else r"(?!\w|[.,]\d)"
        in_words = re.search(r"(?<![\w.,])" + re.escape(match[0]) + after, stated)
        number = match[0].replace(",", "")
        if not in_words and not any(is_rounded(value, number) for value in known):
            missing.append(match[0])
    return missing


def test_the_numbers_of_the_gallery_are_the_folders_own() -> None:
    rows = gallery().items()
    found = {
        name: [n for cell in row for n in unproven(cell, repo.ROOT / name)] for name, row in rows
    }
    assert {name: numbers for name, numbers in found.items() if numbers} == {}


def test_the_times_of_the_gallery_are_those_of_the_commands() -> None:
    """As the help of the folder's main.py, or else its README, puts it."""
    for name, row in gallery().items():
        files = [repo.ROOT / name / file for file in ("main.py", "README.md")]
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
        assert any(normal(row[3]) in normal(text) for text in texts), (name, row[3])


def test_all_other_numbers_are_known() -> None:
    """Outside the gallery and code only the version of Python has digits; pyproject.toml has it."""
    text = PROSE.replace(section("Gallery"), "")
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|(?m:^\d+\. )", " ", text)
    major, minor = re.search(
        r'target-version = "py(\d)(\d+)"', (repo.ROOT / "pyproject.toml").read_text("utf-8")
    ).groups()
    assert {match[0] for match in NUMBER.finditer(text)} == {f"{major}.{minor}"}


def test_an_unproven_number_is_found(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    readme = "It ends at **1.10 ×**\nthe floor of 3.25 nats, equal to 1e-4, in 12,000 steps or 61s."
    (tmp_path / "README.md").write_text(readme, "utf-8")
    floor = '{"a": [{"floor": 0.10806, "good": true, "stories": 144}]}'
    (tmp_path / "data" / "floor.json").write_text(floor, "utf-8")
    fine = (
        "1.10 × [the 9](9/) floor, 0.1081 nats, 3.25 nats, 1e-4, 12,000 steps, 61 s, 144 of GPT-2"
    )
    assert unproven(fine, tmp_path) == ["9"]
    wrong = ["1.10", "0.1082", "3.2", "25", "1e-5", "000", "1", "144.5", "61"]
    cell = "1.10 nats, 0.1082, 3.2 nats, 25, 1e-5, 000 steps, 1 good, 144.5, 61 m"
    assert unproven(cell, tmp_path) == wrong


# commands


def commands() -> list[list[str]]:
    """The words of each command in a bash block, or in the text between backquotes."""
    lines = "\n".join(re.findall(r"(?ms)^```bash\n(.*?)^```", TEXT)).splitlines()
    lines += [c for c in re.findall(r"`([^`\n]+)`", PROSE) if c.startswith(("python ", "diff "))]
    parts = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in parts if words]


def check(words: list[str], helps: dict[str, str]) -> str:
    """What is wrong with a command, or nothing. helps: of each folder's main.py."""
    match words:
        case ["pip", "install", "-r", file]:
            return "" if (repo.ROOT / file).is_file() else f"no {file}"
        case ["python", "run_tests.py", *names]:
            known = {*repo.folders(), "your_folder"}
            return "" if (repo.ROOT / "run_tests.py").is_file() and known >= set(names) else "?"
        case ["python", script, *options] if Path(script).name == "main.py":
            folder = Path(script).parent.name or next(iter(helps), "")
            flags = [option for option in options if option.startswith("--")]
            text = helps.get(folder, "")
            unknown = [f for f in flags if not re.search(rf"{re.escape(f)}(?![\w-])", text)]
            return f"{script} has no {unknown}" if unknown or not text else ""
        case ["git", "clone", *_] | ["cd", _]:
            return ""
        case ["ruff", "check" | "format", *_] | ["diff", "../llama/model.py", "model.py"]:
            return ""
    return "not a command that this check knows"


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `python FOLDER/main.py` prints, for each folder that the README calls by name."""
    named = [Path(w).parent.name for words in commands() for w in words if w.endswith("/main.py")]
    return {
        name: subprocess.run(
            [sys.executable, str(repo.ROOT / name / "main.py")],
            capture_output=True, encoding="utf-8",
        ).stdout
        for name in named
    }  # fmt: skip


def test_commands_parse(helps: dict[str, str]) -> None:
    found = {" ".join(words): check(words, helps) for words in commands()}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}
    assert "pip install -r requirements.txt" in found and "python run_tests.py" in found


@pytest.mark.parametrize(
    "command",
    ["pip install -r nowhere.txt", "python main.py --trian", "python run_tests.py lama",
     "python lama/main.py --train", "make"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str, helps: dict[str, str]) -> None:
    assert check(command.split(), helps)


# template


def test_the_template_is_the_contract() -> None:
    """The tree names the files that every folder must have, the block its four headings."""
    block = re.search(r"(?ms)^```text\n(.*?)^```", TEXT)[1]
    for name in [*FILES, *(f"{directory}/" for directory in DIRECTORIES)]:
        assert re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", block), name
    assert re.search(r"(?ms)^```markdown\n(.*?)^```", TEXT)[1].splitlines() == HEADINGS
