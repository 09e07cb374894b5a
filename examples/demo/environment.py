"""What the demo and the benchmark need from where they run: a console, hosts, a description."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo.data import DataMissingError
from examples.demo.hosts import LOOPBACK, Hosts, LabHosts, LoopbackHosts
from examples.demo.tasks import TASKS


class CannotRunError(RuntimeError):
    """Nothing can be measured here; the text says why and what to do."""


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; 100 columns where there is none. Rich itself honours NO_COLOR."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 100
    return made


def say(where: Console, text: str) -> None:
    """One line as it is: no markup, no colour, not folded."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


def machine() -> str:
    """CPU model and count, and the kernel."""
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return f"{os.cpu_count()} x {model}, {platform.system()} {platform.release()}"


def header(hosts: Hosts, command: list[str]) -> dict[str, Any]:
    """Machine, versions and command, for every table and file."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "hosts": hosts.describe(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": shlex.join(command),
    }


def header_lines(head: dict[str, Any]) -> list[str]:
    """The header as `#` lines."""
    return [f"# {key}: {value}" for key, value in head.items()]


def open_hosts(count: int, links: list[str], tasks: list[str]) -> Hosts:
    """Data and hosts, or CannotRunError. `links` are lab rates, or LOOPBACK alone."""
    try:
        for task in tasks:
            TASKS[task].prepare()
    except DataMissingError as error:
        raise CannotRunError(str(error)) from error
    if links == [LOOPBACK]:
        return LoopbackHosts(count)
    try:
        from thinwire_lab import LabError
    except ImportError as error:
        raise CannotRunError(
            f"the lab cannot be imported ({error})\n"
            "hint: pip install . once, or PYTHONPATH=cluster/lab; `make demo` does either"
        ) from error
    try:
        return LabHosts(count, links)
    except LabError as error:
        raise CannotRunError(
            f"{error}\nhint: --loopback runs the same jobs without link speeds"
        ) from error
