"""One program run on all hosts of a lab: start, watch, end together.

A Job is used from one thread. It owns its processes: when `wait` returns none of them is left.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

# From asking a program to end to forcing it.
_FORCE_AFTER_S = 3.0


class Job:
    """Processes that live and die together; `processes[i]` is labelled `labels[i]`."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]], labels: Sequence[str]) -> None:
        self.processes = list(processes)
        self.labels = list(labels)
        self._readers: list[threading.Thread] = []
        for process, label in zip(self.processes, self.labels, strict=True):
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                if source is not None:
                    self._follow(source, sink, f"[{label}] ")

    def _follow(self, source: IO[bytes], sink: IO[str], prefix: str) -> None:
        def copy() -> None:
            for line in source:
                sink.write(prefix + line.decode(errors="replace").rstrip("\n") + "\n")
                sink.flush()

        thread = threading.Thread(target=copy, daemon=True)
        thread.start()
        self._readers.append(thread)

    def signal(self, number: int) -> None:
        """Sends a signal to the process group of every program still running."""
        for process in self.processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)

    def wait(
        self,
        *,
        keep_going: bool = False,
        grace_s: float = 5.0,
        timeout_s: float | None = None,
        report: Callable[[str], None] = lambda _line: None,
    ) -> int:
        """Waits for all; the exit code of the first that failed, 128 + N for signal N, else 0.

        After a failure the others get `grace_s` seconds to end by themselves (to report which
        peer they lost), then SIGTERM, then SIGKILL; with keep_going they are left to run.
        Past `timeout_s` all are ended and TimeoutError is raised.
        """
        started = time.monotonic()
        end = None if timeout_s is None else started + timeout_s
        force: list[tuple[float, int]] = []
        code, timed_out = 0, False
        with _Watch(self.processes) as watch:
            while watch.running:
                moments = [moment for moment, _ in force[:1]] + ([end] if end is not None else [])
                for index in watch.next_exits(min(moments, default=None)):
                    result = _exit_code(self.processes[index])
                    if result == 0 or code != 0:
                        continue
                    code = result
                    report(f"{self.labels[index]} exited with {code}")
                    if not keep_going and watch.running:
                        report(f"ending the others in {grace_s:g} s")
                        force = _escalation(time.monotonic() + grace_s)
                now = time.monotonic()
                if end is not None and now >= end and watch.running:
                    end, timed_out, force = None, True, _escalation(now)
                while force and now >= force[0][0]:
                    self.signal(force.pop(0)[1])
        for thread in self._readers:
            thread.join(timeout=2.0)
        if timed_out:
            raise TimeoutError(f"the job did not end within {timeout_s:g} s and was ended")
        return code

    def end(self) -> None:
        """Ends what still runs: SIGTERM, after three seconds SIGKILL. Safe to call twice."""
        self.signal(signal.SIGTERM)
        deadline = time.monotonic() + _FORCE_AFTER_S
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


def _escalation(start: float) -> list[tuple[float, int]]:
    return [(start, signal.SIGTERM), (start + _FORCE_AFTER_S, signal.SIGKILL)]


def _exit_code(process: subprocess.Popen[Any]) -> int:
    code = process.wait()
    return code if code >= 0 else 128 - code


class _Watch:
    """Sleeps until a process ends: no polling beside programs whose speed is measured."""

    def __init__(self, processes: Sequence[subprocess.Popen[Any]]) -> None:
        self._selector = selectors.DefaultSelector()
        self._files: list[int] = []
        for index, process in enumerate(processes):
            if process.poll() is None:
                file = os.pidfd_open(process.pid)
                self._files.append(file)
                self._selector.register(file, selectors.EVENT_READ, index)
        self._ended = [i for i, p in enumerate(processes) if p.returncode is not None]

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._selector.close()
        for file in self._files:
            os.close(file)

    @property
    def running(self) -> bool:
        return bool(self._ended) or bool(self._selector.get_map())

    def next_exits(self, until: float | None) -> list[int]:
        """Indices of processes that ended; empty when the moment `until` came first."""
        if self._ended:
            ended, self._ended = self._ended, []
            return ended
        timeout = None if until is None else max(0.0, until - time.monotonic())
        exits = []
        for key, _ in self._selector.select(timeout):
            self._selector.unregister(key.fileobj)
            exits.append(int(key.data))
        return sorted(exits)
