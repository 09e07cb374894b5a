"""Makes the runs that are missing, one at a time: a process a rank, a record a run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.demo.environment import machine
from examples.demo.hosts import Hosts
from tests.convergence.methods import NotAvailableError, check_available
from tests.convergence.runs import Run, finished, store
from tests.convergence.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 3600.0
_POLL_S = 0.05
_ERROR_LINES = 30


class RunFailedError(RuntimeError):
    """A rank raised, died, or all took too long; the text is the end of its log."""


def versions() -> dict[str, str]:
    from thinwire.version import __version__

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    # The records themselves change with each run.
    changed = git("status", "--porcelain", "--", ".", ":!tests/convergence/records")
    return {
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown")
        + ("-dirty" if changed else ""),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "thinwire": __version__,
        "machine": machine(),
    }


def launch(settings: dict[str, Any], hosts: Hosts) -> dict[str, Any]:
    """One run in processes of its own; they end with it, whatever becomes of us."""
    with tempfile.TemporaryDirectory(prefix="tw-convergence-") as name:
        folder = Path(name)
        (folder / "run.json").write_text(json.dumps(settings), encoding="utf-8")
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(hosts.count):
                with open(_log(folder, rank), "wb") as log:
                    argv = [sys.executable, "-m", "tests.convergence.worker", str(folder)]
                    processes.append(
                        hosts.spawn(
                            rank, argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log
                        )
                    )
            _wait(processes, folder)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                if process.stdin is not None:
                    process.stdin.close()
        result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return result


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.log"


def _wait(processes: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Until all have ended; RunFailedError as soon as one has failed."""
    deadline = time.monotonic() + _LIMIT_S
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        if failed:
            raise RunFailedError(_reason(processes, folder, failed[0]))
        if time.monotonic() > deadline:
            raise RunFailedError(f"no end after {_LIMIT_S:.0f} s")
        time.sleep(_POLL_S)
    for rank, process in enumerate(processes):
        if process.returncode:
            raise RunFailedError(_reason(processes, folder, rank))


def _reason(processes: list[subprocess.Popen[bytes]], folder: Path, rank: int) -> str:
    lines = _log(folder, rank).read_text(errors="replace").strip().splitlines()
    said = "\n".join(lines[-_ERROR_LINES:]) or "it printed nothing"
    return f"rank {rank} exited with {processes[rank].returncode}:\n{said}"


def make(run: Run, out: Path, hosts: Hosts) -> dict[str, Any]:
    """Make one run and store its record, which has `error` when it failed."""
    began = time.monotonic()
    try:
        check_available(run.settings)
        result = launch(run.settings, hosts)
    except NotAvailableError as error:
        result = {"error": f"not available: {error}"}
    except RunFailedError as error:
        result = {"error": str(error)}
    result |= {"seconds": round(time.monotonic() - began, 1), "versions": versions()}
    store(run, out, result)
    return result


def make_all(
    runs: list[Run],
    out: Path,
    hosts: Callable[[Run], Hosts],
    deadline: float | None,
    say: Callable[[str], None],
) -> bool:
    """Make what is not finished yet, starting none after the deadline (of time.monotonic); `hosts`
    gives each run its hosts. True: everything asked for is finished."""
    missing = [run for run in runs if finished(run, out) is None]
    say(f"{len(runs)} runs, {len(runs) - len(missing)} of them finished before; records in {out}")
    failed = 0
    for number, run in enumerate(missing, start=1):
        if deadline is not None and time.monotonic() > deadline:
            say(f"the time is over; runs left: {len(missing) - number + 1}")
            return False
        result = make(run, out, hosts(run))
        failed += "error" in result
        say(f"[{number}/{len(missing)}] {run.title}: {_told(run, result)}")
    if failed:
        say(f"{failed} of {len(missing)} runs failed; the next call tries them again")
    return not failed


def _told(run: Run, result: dict[str, Any]) -> str:
    if "error" in result:
        error = str(result["error"])
        return error if error.startswith("not available") else f"failed: {error.splitlines()[-1]}"
    if run.link is not None:
        return f"{1000 * result['step_seconds']:.1f} ms a step"
    metric = TASKS[run.task].metric
    final = "not finite" if result["final"] is None else metric.text(result["final"])
    return (
        f"{metric.name} {final}, {result['wire_bytes'] / 1e6:.1f} MB a rank, "
        f"{result['seconds']:.0f} s"
    )
