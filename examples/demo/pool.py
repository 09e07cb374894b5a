"""Workers on all hosts, and the orchestrator's side of their command channel.

A command goes to every worker; the call returns when all have answered, or raises WorkerError
with the reason of the first that failed, after which the pool has to be closed: its survivors may
wait for the lost one for ever. Used from one thread.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.demo.board import Board
from examples.demo.hosts import Hosts

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 5.0
_FAILING_TIMEOUT_S = 10.0
"""How long the others may take to answer once one has failed."""

Message = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker raised, died or fell silent; the text is the reason, in one line."""

    def __init__(self, reason: str, usable: bool = False) -> None:
        super().__init__(reason)
        self.usable = usable
        """All workers refused to open a job (a bad policy): none waits for another, and the pool
        may be used on."""


@dataclass(frozen=True)
class Point:
    """The state of a run when its clock stood still."""

    seconds: float
    bytes: float
    """Sent by a host since the span's clock started."""
    step: int
    shards: list[tuple[float, int]] | None


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float
    seconds: float
    bytes: int
    """Sent by the first host since the span's clock started, roughly."""


@dataclass(frozen=True)
class SpanResult:
    """One timed span over all ranks."""

    steps: int
    seconds: float
    bytes: float
    loss: float
    points: list[Point]

    @property
    def step_ms(self) -> float:
        return 1000.0 * self.seconds / self.steps


class _Channel:
    """A worker's socket, read in whole lines."""

    def __init__(self, channel: socket.socket) -> None:
        self.socket = channel
        self._rest = b""

    def read(self) -> list[Message] | None:
        """Wait for bytes; the messages they complete, or None at the end of the stream."""
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionError:
            data = b""
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)


class WorkerPool:
    """One worker a host. Use as a context manager, or call `close`."""

    def __init__(self, hosts: Hosts, log_folder: Path) -> None:
        self._hosts, self._log_folder = hosts, log_folder
        self._folder = tempfile.TemporaryDirectory(prefix="tw-demo-")
        self._processes: list[subprocess.Popen[Any]] = []
        self._channels: list[_Channel] = []
        self._idle = True
        """No command is being carried out, so workers will read the next one."""
        self._logs: list[Path] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        folder, world = Path(self._folder.name), self._hosts.count
        Board.create(folder / "board", world)
        self._log_folder.mkdir(parents=True, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with listener:
            listener.bind(str(folder / "socket"))
            listener.listen(world)
            listener.settimeout(0.2)
            for rank in range(world):
                self._logs.append(self._log_folder / f"rank{rank}.log")
                with open(self._logs[-1], "wb") as log:
                    argv = [sys.executable, "-m", "examples.demo.worker", "--folder", str(folder)]
                    self._processes.append(
                        self._hosts.spawn(rank, argv, cwd=REPOSITORY, stdout=log, stderr=log),
                    )
            channels = self._accept(listener)
        self._channels = [channels[rank] for rank in range(world)]
        self.call("join")

    def _accept(self, listener: socket.socket) -> dict[int, _Channel]:
        channels: dict[int, _Channel] = {}
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(channels) < self._hosts.count:
            self._check_alive()
            if time.monotonic() > deadline:
                raise WorkerError(f"{self._hosts.count - len(channels)} worker(s) did not start")
            with contextlib.suppress(TimeoutError):
                accepted, _ = listener.accept()
                accepted.settimeout(START_TIMEOUT_S)
                channel = _Channel(accepted)
                for message in channel.read() or []:
                    channels[message["rank"]] = channel
        return channels

    def _check_alive(self) -> None:
        for rank, process in enumerate(self._processes):
            if process.poll() is not None:
                raise WorkerError(self._death(rank))

    def _death(self, rank: int) -> str:
        """Why a worker is gone: its exit code or signal and the last line that it wrote."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(timeout=_END_TIMEOUT_S)
        code = self._processes[rank].returncode
        if code is None:
            how = "closed its channel"
        else:
            how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        lines = self._logs[rank].read_text(errors="replace").strip().splitlines()
        return f"rank {rank} {how}" + (f": {lines[-1].strip()[:200]}" if lines else "")

    def _broadcast(self, message: Message) -> None:
        data = (json.dumps(message) + "\n").encode()
        for rank, channel in enumerate(self._channels):
            try:
                channel.send(data)
            except OSError:
                raise WorkerError(self._death(rank)) from None

    def call(
        self,
        command: str,
        on_event: Callable[[int, Message], None] | None = None,
        timeout_s: float = START_TIMEOUT_S,
        **arguments: Any,
    ) -> list[Message]:
        """Send a command to all and collect the answers, by rank. The time limit restarts with
        every message."""
        self._idle = False
        self._broadcast({"command": command, **arguments})
        answers: dict[int, Message] = {}
        failures: list[str] = []
        with selectors.DefaultSelector() as selector:
            for rank, channel in enumerate(self._channels):
                selector.register(channel.socket, selectors.EVENT_READ, rank)
            while len(answers) < len(self._channels):
                ready = selector.select(_FAILING_TIMEOUT_S if failures else timeout_s)
                if failures and not ready:
                    raise WorkerError(failures[0])
                if not ready:
                    waiting = sorted(set(range(len(self._channels))) - set(answers))
                    raise WorkerError(
                        f"rank(s) {waiting} said nothing for {timeout_s:.0f} s in '{command}'"
                    )
                for key, _ in ready:
                    failures += self._take(key.data, answers, on_event)
        self._idle = True
        if failures:
            raise WorkerError(
                failures[0], usable=command == "open" and len(failures) == len(answers)
            )
        return [answers[rank] for rank in range(len(self._channels))]

    def _take(
        self,
        rank: int,
        answers: dict[int, Message],
        on_event: Callable[[int, Message], None] | None,
    ) -> list[str]:
        """Take what one worker has sent; returns the reason if that was a failure."""
        messages = self._channels[rank].read()
        if messages is None:
            raise WorkerError(self._death(rank))
        failures = []
        for message in messages:
            event = message.pop("event")
            if event == "failed":
                failures.append(f"rank {rank}: {message['reason']}")
            if event in ("done", "failed"):
                answers[rank] = message
            elif on_event is not None:
                on_event(rank, {"event": event, **message})
        return failures

    def run(
        self,
        job: str,
        *,
        steps: int = 1_000_000,
        seconds: float = 1e9,
        warm_steps: int = 2,
        eval_every_s: float = 0.0,
        on_progress: Callable[[Progress], None] | None = None,
        on_point: Callable[[Point], None] | None = None,
        timeout_s: float = START_TIMEOUT_S,
    ) -> SpanResult:
        """Train a job for a span; see worker.Span for the limits."""
        points: list[Point] = []
        pending: dict[int, Message] = {}
        start_bytes = 0.0

        def on_event(rank: int, message: Message) -> None:
            nonlocal start_bytes
            event = message.pop("event")
            if event == "progress" and on_progress:
                on_progress(Progress(**message))
            if event != "point":
                return
            pending[rank] = message
            if len(pending) < self._hosts.count:
                return
            sent = self._hosts.sent_bytes()
            start_bytes = sent if not points else start_bytes
            points.append(_point([pending[r] for r in sorted(pending)], sent - start_bytes))
            pending.clear()
            if on_point:
                on_point(points[-1])
            self._broadcast({"command": "go"})

        answers = self.call(
            "run",
            on_event,
            timeout_s,
            job=job,
            steps=steps,
            seconds=seconds,
            warm_steps=warm_steps,
            eval_every_s=eval_every_s,
        )
        sent = self._hosts.sent_bytes() - start_bytes
        first = answers[0]
        return SpanResult(first["steps"], first["seconds"], sent, first["loss"], points)

    def close(self) -> None:
        """End the workers: politely, then SIGTERM, then SIGKILL. Twice is no error."""
        with contextlib.suppress(WorkerError):
            self._broadcast({"command": "exit"})
        for channel in self._channels:
            channel.socket.close()
        self._channels = []
        ends: list[Callable[[subprocess.Popen[Any]], None]] = [_leave, _terminate, _kill]
        for end in ends if self._idle else ends[1:]:
            for process in self._processes:
                if process.poll() is None:
                    end(process)
            deadline = time.monotonic() + _END_TIMEOUT_S
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.01, deadline - time.monotonic()))
        self._processes = []
        self._folder.cleanup()


def _point(messages: list[Message], sent: float) -> Point:
    shards = [(m["shard"][0], m["shard"][1]) for m in messages if m["shard"] is not None]
    return Point(messages[0]["seconds"], sent, messages[0]["step"], shards or None)


def _leave(_process: subprocess.Popen[Any]) -> None:
    """Nothing to send: the worker has been told over its channel."""


def _terminate(process: subprocess.Popen[Any]) -> None:
    process.terminate()


def _kill(process: subprocess.Popen[Any]) -> None:
    process.kill()
