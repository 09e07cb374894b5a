"""scripts/run_tests.py PRESET [--pytest]: runs ctest in build/PRESET (and pytest), prints counts.

Last come the failed tests, what each printed from its first failure on, and their names: a log of
which only the end was kept tells them. The exit status is 0 only if something was run, nothing
failed and nothing was skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHOWN_LINES = 30  # of what a failed test printed
FAILURE = re.compile(  # as gtest, the sanitizers and Python say it
    r": Failure$|ERROR: |WARNING: ThreadSanitizer|runtime error: |^E  |^\w*Error\b"
)


@dataclasses.dataclass
class Counts:
    runner: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    returncode: int = 0
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # test -> what it printed

    @property
    def good(self) -> bool:
        return self.passed > 0 and not (self.failed or self.skipped or self.returncode)

    def __str__(self) -> str:
        text = f"{self.runner:<8}{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        if self.returncode and not self.failed:
            text += f" (exit status {self.returncode})"
        return f"{text} in {self.seconds:.0f} s"


def case_name(case: ElementTree.Element) -> str:
    """A ctest test's name, or module::test of pytest."""
    name, folder = case.get("name", "?"), case.get("classname", "")
    return name if folder in ("", name) else f"{folder}::{name}"


def from_first_failure(printed: str) -> str:
    """The lines that tell what failed; the last ones where no line says so."""
    lines = printed.strip().splitlines()
    marked = (i for i, line in enumerate(lines) if FAILURE.search(line))
    first = next(marked, max(0, len(lines) - SHOWN_LINES))
    return "\n".join(lines[first : first + SHOWN_LINES])


def run(runner: str, command: list[str], report: pathlib.Path) -> Counts:
    """Runs a test runner that writes a JUnit report, and reads the counts from that report."""
    report.unlink(missing_ok=True)
    start = time.monotonic()
    environment = {**os.environ, "TW_BUILD": str(report.parent)}
    process = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    counts = Counts(runner, returncode=process.returncode)
    counts.seconds = time.monotonic() - start
    if not report.exists():
        return counts
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"} or case.get("status") == "fail":
            counts.failed += 1
            counts.failures[case_name(case)] = "".join(case.itertext())
        elif "skipped" in kinds or case.get("status") in ("notrun", "disabled"):
            counts.skipped += 1
        else:
            counts.passed += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset")
    parser.add_argument("--pytest", action="store_true", help="the Python tests, too")
    options = parser.parse_args()
    folder = ROOT / "build" / options.preset
    jobs = os.environ.get("JOBS", str(os.cpu_count()))

    report = folder / "ctest.xml"
    ctest = ["ctest", "--preset", options.preset, "-j", jobs, "--output-junit", str(report)]
    results = [run("ctest", [*ctest, "--progress"], report)]
    if options.pytest:
        report = folder / "pytest.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        results.append(run("pytest", pytest, report))
    print()
    for counts in results:
        for name, printed in counts.failures.items():
            print(f"{counts.runner}  {name}:")
            print(from_first_failure(printed))
    for counts in results:
        print(counts)
        for name in counts.failures:
            print(f"{counts.runner}  failed: {name}")
    return 0 if all(counts.good for counts in results) else 1


if __name__ == "__main__":
    sys.exit(main())
