"""Run the tests: each folder's in a process of its own, then the checks of the repo as a whole.

    python run_tests.py                        everything
    python run_tests.py llama                  one folder, and what the repo asks of it
    python run_tests.py llama -- -x -k rope    with arguments for pytest

Every folder has a model.py, so two folders cannot share a process. The last line is
`N passed, N failed` (and `, N skipped`), the exit code 1 if anything failed. A folder whose tests
crash or find nothing to run has failed.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent


def folders() -> list[str]:
    """The folders with a main.py and tests, by name."""
    return sorted(f.parent.name for f in ROOT.glob("*/main.py") if (f.parent / "tests").is_dir())


def results(report: Path) -> Counter:
    """How many tests in pytest's JUnit report `report` passed, failed and were skipped."""
    counts: Counter = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        failed = outcomes & {"failure", "error"}
        counts["failed" if failed else "skipped" if "skipped" in outcomes else "passed"] += 1
    return counts


def run_pytest(home: Path, arguments: list[str], selected: bool = False) -> Counter:
    """Run pytest on `home`/tests with `home` as the working directory, and count.

    selected: finding nothing to run is no failure, since the arguments may say so.
    """
    print(f"\n── {home.name if home != ROOT else 'the repo as a whole'}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", *arguments, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=home).returncode
        try:
            counts = results(report)
        except (OSError, ElementTree.ParseError):
            counts, code = Counter(), code or "0, but left no report"
    if code == 5 and selected:
        return counts
    if code != 0 and not counts["failed"]:
        counts["failed"] = 1
        why = "no test was found" if code == 5 else f"pytest ended early with exit code {code}"
        print(f"{home.name}: {why}; counted as one failure", flush=True)
    return counts


def main(arguments: list[str]) -> int:
    """Run what the command line names. Returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="*", help="a folder with main.py and tests/")
    parser.usage = "python run_tests.py [folder ...] [-- pytest arguments]"
    asked = [Path(name).name for name in parser.parse_args(arguments[:cut]).folder]
    for_pytest = arguments[cut + 1 :]
    if unknown := sorted(set(asked) - set(folders())):
        parser.error(f"no folder with main.py and tests/ is called {', '.join(unknown)}")
    counts: Counter = Counter()
    for name in asked or folders():
        counts += run_pytest(ROOT / name, for_pytest, bool(for_pytest))
    for_root = [f"--folder={name}" for name in asked] + for_pytest
    counts += run_pytest(ROOT, for_root, bool(for_pytest))
    if not counts:
        print("nothing was run; counted as one failure")
        counts["failed"] = 1
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    print(f"\n{counts['passed']} passed, {counts['failed']} failed{skipped}")
    return int(counts["failed"] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
