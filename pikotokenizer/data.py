"""Text to train and measure on: load → documents by name → training and held-out lines.

The default is the corpus in data/ (English and Indonesian, see data/README.md). `--data` takes a
UTF-8 file, a folder of *.txt, or hf:OWNER/NAME for a Hugging Face dataset with a text column.
"""

from pathlib import Path

from options import UserError

CORPUS = Path(__file__).resolve().parent / "data"


def read_text(path: Path) -> str:
    """A text file, with line ends as they are; UserError if it is missing, empty or not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}: convert it first") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path} is empty: give a text to work on")
    return text


def from_hub(name: str) -> dict[str, str]:
    """The text column of a Hugging Face dataset's training split."""
    try:
        import datasets
    except ImportError:
        raise UserError("--data hf:… needs `pip install datasets`") from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises some thirty kinds
        raise UserError(
            f"cannot load the dataset {name}: {str(error).partition(chr(10))[0]}"
        ) from None
    if "text" not in rows.column_names:
        raise UserError(f"the dataset {name} has no column text, only {rows.column_names}")
    return {name: "\n".join(rows["text"])}


def load_texts(source: str | Path | None = None) -> dict[str, str]:
    """Name → text. For the default corpus the names are the languages."""
    if source is not None and str(source).startswith("hf:"):
        return from_hub(str(source)[3:])
    path = CORPUS if source is None else Path(source)
    if not path.exists():
        raise UserError(f"{path} does not exist: give --data a file, a folder or hf:OWNER/NAME")
    if path.is_file():
        return {path.stem: read_text(path)}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise UserError(f"{path} holds no *.txt: give --data a file or a folder of text files")
    return {file.stem: read_text(file) for file in files}


def split_lines(text: str, held_out: int = 10) -> tuple[list[str], list[str]]:
    """Lines (with their ends) to train on, and every `held_out`-th to measure on.

    With 0, and where there are fewer lines than that, all lines are in both (one list).
    """
    lines = text.splitlines(keepends=True)
    if not held_out or len(lines) < held_out:
        return lines, lines
    kept = [line for i, line in enumerate(lines) if i % held_out]
    return kept, lines[::held_out]
