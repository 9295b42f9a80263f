"""`--folder NAME` narrows the checks to some folders; a test that takes `folder` runs for each."""

import pytest

import repo


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that run_tests.py passes on."""
    parser.addoption("--folder", action="append", help="check this folder alone (repeatable)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`folder` is each folder that exists, or each that was asked for."""
    if "folder" in metafunc.fixturenames:
        folders = metafunc.config.getoption("--folder") or repo.folders()
        metafunc.parametrize("folder", [repo.ROOT / name for name in folders], ids=folders)
