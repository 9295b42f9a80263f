"""Run the tests: each folder's in a process of its own, then the checks of the repo as a whole.

    python run_tests.py                        everything
    python run_tests.py llama                  one folder, and what the repo asks of it
    python run_tests.py llama -- -x -k rope    with arguments for pytest
    python run_tests.py --jobs 1               one folder at a time, and not two

Every folder has a model.py, so two folders cannot share a process. What a folder printed is shown
when it is done. The last line is
`N passed, N failed` (and `, N skipped`), the exit code 1 if anything failed. A folder whose tests
crash or find nothing to run has failed.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "tests", *arguments, f"--junitxml={report}"]
        done = subprocess.run(
            command,
            cwd=home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        code, printed = done.returncode, done.stdout.decode("utf-8", errors="replace")
        try:
            counts = results(report)
        except (OSError, ElementTree.ParseError):
            counts, code = Counter(), code or "0, but left no report"
    if code != 0 and not counts["failed"] and not (code == 5 and selected):
        counts["failed"] = 1
        why = "no test was found" if code == 5 else f"pytest ended early with exit code {code}"
        printed += f"{home.name}: {why}; counted as one failure\n"
    name = home.name if home != ROOT else "the repo as a whole"
    print(f"\n── {name}\n{printed}", end="", flush=True)
    return counts


def main(arguments: list[str]) -> int:
    """Run what the command line names. Returns the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="*", help="a folder with main.py and tests/")
    parser.add_argument("--jobs", type=int, default=2, help="folders at a time (default 2)")
    parser.usage = "python run_tests.py [--jobs N] [folder ...] [-- pytest arguments]"
    options = parser.parse_args(arguments[:cut])
    asked = [Path(name).name for name in options.folder]
    for_pytest = arguments[cut + 1 :]
    if unknown := sorted(set(asked) - set(folders())):
        parser.error(f"no folder with main.py and tests/ is called {', '.join(unknown)}")
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        homes = [ROOT / name for name in asked or folders()]
        counted = pool.map(lambda home: run_pytest(home, for_pytest, bool(for_pytest)), homes)
        counts = sum(counted, Counter())
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
