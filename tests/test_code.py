"""The code of the folders: what it imports, and how it opens files.

Each check is a function that returns its complaints, and is shown to complain.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import repo

DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "tiktoken_ext": "tiktoken"}
IMPORTERS = ("import_module", "__import__", "importorskip")
MODE = re.compile(r"[rwaxbt+]{1,3}")


# imports


def own_modules(folder: Path) -> set[str]:
    """What `import name` finds inside `folder` itself: its modules and those beside its scripts."""
    return {file.stem for file in repo.python_files(folder)}


def imports(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Each import below `tree` and the top name it asks for; "." for a relative import.

    importlib.import_module, __import__ and pytest.importorskip of a constant are imports too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." if node.level else node.module.split(".")[0]
    for call, name in repo.calls(tree):
        what = call.args[0] if call.args else None
        if name.split(".")[-1] in IMPORTERS and isinstance(what, ast.Constant):
            yield call, str(what.value).split(".")[0]


def guarded(tree: ast.Module) -> set[ast.AST]:
    """All nodes that may fail to import: in a `try` that catches it, or for type checkers alone."""
    caught = ("ImportError", "ModuleNotFoundError", "Exception")
    safe: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            handlers = [ast.unparse(h.type) if h.type else "Exception" for h in node.handlers]
            is_guard = any(name in handler for handler in handlers for name in caught)
        elif isinstance(node, ast.With):
            is_guard = any("suppress" in ast.unparse(i) and "Error" in ast.unparse(i)
                           for i in node.items)  # fmt: skip
        else:
            is_guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_guard:
            safe.update(inner for statement in node.body for inner in ast.walk(statement))
    return safe


def inside_functions(tree: ast.Module) -> set[ast.AST]:
    """All nodes that run only when some function is called."""
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    return {inner for function in functions for inner in ast.walk(function)}


def requirements(name: str) -> set[str]:
    """The packages in requirements file `name`, and in those that it includes."""
    found: set[str] = set()
    for line in (repo.ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            found |= requirements(line[3:].strip())
        elif match := re.match(r"[\w-]+", line):
            found.add(match[0].lower().replace("_", "-"))
    return found


def missing_requirements(file: Path, folder: Path) -> list[str]:
    """The imports of `file` that a user may not have: what is guarded or comes with Python is fine.

    Tests may import what is in requirements-dev.txt. bench.py looks for its peers when it runs, so
    its functions may import anything, but main.py imports it and must not fail.
    """
    tree, is_test = repo.parse(file), "tests" in file.relative_to(folder).parts
    known = requirements("requirements-dev.txt" if is_test else "requirements.txt")
    fine = set() if is_test else guarded(tree)
    if file.name == "bench.py":
        fine |= inside_functions(tree)
    return [
        f"{file.name}:{node.lineno}: {name} is in no requirements file that applies here"
        for node, name in imports(tree)
        if node not in fine
        and name not in sys.stdlib_module_names | own_modules(folder) | {"."}
        and DISTRIBUTIONS.get(name, name).lower().replace("_", "-") not in known
    ]


def climbs(expression: ast.expr, names: dict[str, ast.expr]) -> float:
    """How many directories above the file the path `expression` ends; inf if it is not known."""
    total, known = 0.0, False
    for node in ast.walk(expression):
        if isinstance(node, ast.Name) and node.id in names:
            total += climbs(names[node.id], {k: v for k, v in names.items() if k != node.id})
            known = True
        known |= isinstance(node, ast.Name) and node.id == "__file__"
        total += isinstance(node, ast.Attribute) and node.attr == "parent"
        total += isinstance(node, ast.Attribute) and node.attr == "dirname"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            total += node.value.split("/").count("..")
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("parents"):
            total += node.slice.value + 1 if isinstance(node.slice, ast.Constant) else float("inf")
    return total if known else float("inf")


def path_tricks(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.expr]]:
    """Each place that makes other files importable or runs them, with the path it names."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(target).startswith("sys.path") for target in targets):
                yield node, node.value
    loaders = ("spec_from_file_location", "run_path", "SourceFileLoader", "addsitedir")
    for call, name in repo.calls(tree):
        if re.search(r"\bsys\.path\.(insert|append|extend)$", name) or name.endswith(loaders):
            at = 1 if name.endswith(("insert", "spec_from_file_location", "Loader")) else 0
            arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
            yield call, arguments[min(at, len(arguments) - 1)]


def foreign_imports(file: Path, folder: Path, others: set[str]) -> list[str]:
    """Where `file` imports from outside its folder: by name, by dots, or by a changed path."""
    tree, relative = repo.parse(file), file.relative_to(folder)
    names = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = [
        f"{relative}:{node.lineno}: imports {'relatively' if name == '.' else f'folder {name}'}"
        for node, name in imports(tree)
        if name == "." or name in others - {folder.name} - own_modules(folder)
    ]
    for node, path in path_tricks(tree):
        if climbs(path, names) > len(relative.parts):
            found.append(f"{relative}:{node.lineno}: looks for modules outside its folder")
    return found


# files


def careless_files(file: Path) -> list[str]:
    """Text opened in the platform's encoding, and torch.load that would run what it reads."""
    found = []
    for call, name in repo.calls(repo.parse(file)):
        keys = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        if None in keys:  # f(**options): not to be seen from here
            continue
        if name == "torch.load" and keys.get("weights_only") != "True":
            found.append(f"{file.name}:{call.lineno}: torch.load without weights_only=True")
        if opens_text(call, name, keys) and "encoding" not in keys:
            found.append(f"{file.name}:{call.lineno}: {name}() of text without encoding")
    return found


def opens_text(call: ast.Call, name: str, keys: dict[str, str]) -> bool:
    """Does `call` open, read or write text, with no encoding among its positional arguments?"""
    last, constants = name.split(".")[-1], [getattr(a, "value", None) for a in call.args]
    if last in ("read_text", "write_text") and "." in name:
        return len(call.args) <= ("read_text", "write_text").index(last)
    if name == "open":
        mode, at_most = keys.get("mode") or (constants[1:2] or ["r"])[0], 3
    elif last == "open" and "." in name:  # path.open(), not image.open(file)
        mode, at_most = keys.get("mode") or (constants[:1] or ["r"])[0], 2
        if not (isinstance(mode, str) and MODE.fullmatch(mode.strip("'\""))):
            return False
    elif last in ("fdopen", "NamedTemporaryFile", "TemporaryFile"):
        at, default = (1, "r") if last == "fdopen" else (0, "w+b")
        mode, at_most = keys.get("mode") or (constants[at : at + 1] or [default])[0], 3
    else:
        return False
    return "b" not in str(mode) and len(call.args) <= at_most


def test_no_folder_imports_another(folder: Path) -> None:
    others = set(repo.folders())
    files = repo.python_files(folder)
    assert [c for file in files for c in foreign_imports(file, folder, others)] == []


def test_every_import_is_required_or_guarded(folder: Path) -> None:
    files = repo.python_files(folder)
    assert [c for file in files for c in missing_requirements(file, folder)] == []


def test_files_are_opened_with_care(folder: Path) -> None:
    assert [c for file in repo.python_files(folder) for c in careless_files(file)] == []


def test_the_root_opens_files_with_care() -> None:
    files = [repo.ROOT / "run_tests.py", *repo.python_files(repo.ROOT / "tests")]
    assert [c for file in files for c in careless_files(file)] == []


# the checks themselves


def plant(tmp_path: Path, code: str, name: str = "model.py") -> Path:
    """A file with `code` in a folder called mine that also has a data.py."""
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "mine" / "data.py").touch()
    file.write_text(code + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "code",
    [
        "import llama",
        "from llama.model import Llama",
        "from .data import batch",
        "from . import data",
        "def later():\n    from llama import model",
        "importlib.import_module('llama.model')",
        "sys.path.append('..')",
        "sys.path.insert(0, str(Path(__file__).parent.parent))",
        "sys.path += [os.path.join(os.path.dirname(__file__), '..', 'llama')]",
        "HERE = Path(__file__).resolve().parent\nsys.path[:0] = [str(HERE.parents[0])]",
        "runpy.run_path(Path(__file__).parents[1] / 'llama/main.py')",
        "spec_from_file_location('model', '/home/me/piko/llama/model.py')",
    ],
)
def test_a_foreign_import_is_found(code: str, tmp_path: Path) -> None:
    assert foreign_imports(plant(tmp_path, code), tmp_path / "mine", {"llama", "mine"})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("model.py", "import torch, data, llamas\nfrom data import batch"),
        ("model.py", "sys.path.insert(0, str(Path(__file__).parent))"),
        ("tests/conftest.py", "sys.path.insert(0, str(Path(__file__).parent.parent))"),
        ("tests/test_a.py", "HERE = Path(__file__).parents[1]\nsys.path.append(str(HERE))"),
    ],
)
def test_an_import_of_ones_own_is_none(name: str, code: str, tmp_path: Path) -> None:
    assert not foreign_imports(plant(tmp_path, code, name), tmp_path / "mine", {"llama", "data"})


@pytest.mark.parametrize(
    ("name", "code", "complaints"),
    [
        ("model.py", "import torch, numpy, json, data", 0),
        ("model.py", "import transformers", 1),
        ("model.py", "def f():\n    import sklearn.datasets", 1),
        ("model.py", "try:\n    import tokenizers\nexcept ImportError:\n    tokenizers = None", 0),
        ("model.py", "try:\n    import tokenizers\nexcept OSError:\n    pass", 1),
        ("model.py", "with contextlib.suppress(ImportError):\n    import tiktoken", 0),
        ("model.py", "if TYPE_CHECKING:\n    import tiktoken", 0),
        ("bench.py", "def main():\n    import torchvision", 0),
        ("bench.py", "import transformers", 1),
        ("tests/test_a.py", "import transformers, hypothesis, tiktoken", 0),
        ("tests/test_a.py", "pytest.importorskip('torchvision')", 1),
    ],
)
def test_a_missing_requirement_is_found(
    name: str, code: str, complaints: int, tmp_path: Path
) -> None:
    file = plant(tmp_path, code, name)
    assert len(missing_requirements(file, tmp_path / "mine")) == complaints


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "open(path, 'w')",
        "open(path, mode='r+')",
        "path.open()",
        "Path(name).open('a')",
        "gzip.open('rt')",
        "path.read_text()",
        "path.write_text(text)",
        "os.fdopen(number, 'w')",
        "NamedTemporaryFile('w')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
    ],
)
def test_a_careless_file_is_found(code: str, tmp_path: Path) -> None:
    assert len(careless_files(plant(tmp_path, code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'rb')",
        "open(path, mode='wb')",
        "open(path, encoding='utf-8')",
        "open(path, **options)",
        "path.open('rb')",
        "Image.open(path)",
        "archive.open('member.txt')",
        "path.read_text('utf-8')",
        "path.write_text(text, encoding='utf-8')",
        "os.fdopen(number, 'wb')",
        "tempfile.NamedTemporaryFile()",
        "torch.load(path, weights_only=True)",
    ],
)
def test_a_careful_file_is_fine(code: str, tmp_path: Path) -> None:
    assert not careless_files(plant(tmp_path, code))
