"""make lint: clang-format, clang-tidy, ruff format, ruff check, mypy over the files git knows.

clang-tidy is slow, so a file is skipped when nothing it depends on has changed since it passed:
the key is the hash of the source, of every header of ours, of .clang-tidy, of this file, of
clang-tidy's version and of its compile command. Every tool is run even when an earlier one
complains; the exit status tells.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "dev"
CACHE = ROOT / ".cache" / "tidy"
# Of requirements.txt: newer than Debian 12's, and faster.
TIDY = pathlib.Path(sys.executable).with_name("clang-tidy")
CXX = (".h", ".cc", ".cpp")


def tracked(*suffixes: str) -> list[str]:
    """Files that git tracks or would add, relative to the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(n for n in names.splitlines() if n.endswith(suffixes) and (ROOT / n).exists())


def clang_format() -> bool:
    """By the version that the formatting was settled with, where it is installed."""
    tool = shutil.which("clang-format-14") or "clang-format"
    return call([tool, "--dry-run", "-Werror", *tracked(*CXX)])


def call(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def tidy_commands() -> dict[str, str]:
    """Sources of ours that the dev build compiles -> their compile command.

    Left to the compiler's warnings: tests, and what includes torch; their headers would take most
    of the time of a run.
    """
    entries = json.loads((BUILD / "compile_commands.json").read_text())
    ours = set(tracked(".cc", ".cpp"))
    commands = {}
    for entry in entries:
        name = os.path.relpath(entry["file"], ROOT)
        if (
            name in ours
            and not name.startswith("tests/")
            and "torch/include" not in entry["command"]
        ):
            commands[name] = entry["command"]
    return commands


def included(command: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """The headers of ours that a source includes, directly or not, as the compiler sees them."""
    words = shlex.split(command)
    if words[0].endswith("ccache"):
        words = words[1:]
    kept = []
    skip = False
    for word in words:
        if skip or word in ("-MD", "-c"):
            skip = False
        elif word in ("-o", "-MF", "-MT"):
            skip = True
        else:
            kept.append(word)
    out = subprocess.run([*kept, "-MM"], cwd=folder, capture_output=True, text=True, check=False)
    paths = (pathlib.Path(p) for p in out.stdout.replace("\\\n", " ").split()[1:])
    return sorted(p for p in paths if p.is_relative_to(ROOT))


@functools.cache
def tidy_version() -> bytes:
    return subprocess.run([str(TIDY), "--version"], capture_output=True, check=True).stdout


def tidy_key(command: str) -> str:
    key = hashlib.sha256(command.encode())
    key.update(tidy_version())
    for path in (ROOT / ".clang-tidy", pathlib.Path(__file__), *included(command, BUILD)):
        key.update(path.read_bytes())
    return key.hexdigest()


def tidy_one(name: str, command: str) -> tuple[str, bool, str]:
    stamp = CACHE / tidy_key(command)
    if stamp.exists():
        return name, True, ""
    run = [str(TIDY), "-p", str(BUILD), "--quiet"]
    # Options that the compiler of the build knows and clang does not; and the SIMD kernels for one
    # target, since those of the others are the same lines.
    run += [
        "--extra-arg=-DHWY_COMPILE_ONLY_STATIC",
        "--extra-arg=-Wno-unknown-warning-option",
        "--extra-arg=-Wno-ignored-optimization-argument",
    ]
    out = subprocess.run([*run, name], cwd=ROOT, capture_output=True, text=True, check=False)
    if out.returncode == 0:
        stamp.touch()
    text = "\n".join(
        line for line in (out.stdout + out.stderr).splitlines() if "warnings generated" not in line
    )
    return name, out.returncode == 0, text


def clang_tidy() -> bool:
    if not TIDY.exists():
        print(f"clang-tidy: there is no {TIDY}\nhint: make lint without PYTHON=")
        return False
    CACHE.mkdir(parents=True, exist_ok=True)
    good = True
    with concurrent.futures.ThreadPoolExecutor(
        int(os.environ.get("JOBS") or os.cpu_count() or 1)
    ) as pool:
        jobs = [pool.submit(tidy_one, *item) for item in tidy_commands().items()]
        for job in concurrent.futures.as_completed(jobs):
            name, passed, text = job.result()
            if not passed:
                good = False
                print(f"clang-tidy: {name}\n{text}")
    return good


def ruff_format() -> bool:
    return call([sys.executable, "-m", "ruff", "format", "--quiet", "--diff", "."])


def ruff_check() -> bool:
    return call([sys.executable, "-m", "ruff", "check", "--quiet", "."])


def mypy() -> bool:
    return call([sys.executable, "-m", "mypy", "--no-error-summary"])


def timed(step: Callable[[], bool]) -> bool:
    start = time.monotonic()
    passed = step()
    verdict = "passed" if passed else "failed"
    print(f"{step.__name__.replace('_', '-'):<13} {verdict} in {time.monotonic() - start:.0f} s")
    return passed


def main() -> int:
    with concurrent.futures.ThreadPoolExecutor(1) as beside:  # the others keep one core busy
        tidy = beside.submit(timed, clang_tidy)
        results = [timed(step) for step in (clang_format, ruff_format, ruff_check, mypy)]
        results.append(tidy.result())
    failed = results.count(False)
    print(f"lint: {len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
