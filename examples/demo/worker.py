"""One training process of one host. It takes commands from the orchestrator over a Unix socket
and keeps its models between commands, so that torch is imported once and several methods can take
turns in the same processes.

Commands and replies are JSON objects, one a line. The socket is a path in the file system: it
crosses network namespaces, and nothing it carries is seen by the measured link.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FileStore

from examples.demo.board import Board
from examples.demo.hosts import interface_sent
from examples.demo.methods import Attached, attach
from examples.demo.tasks import TASKS, DemoTask


def parameter_hash(model: nn.Module) -> str:
    """A hash over the bits of all parameters in order."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@dataclass
class Job:
    """One model trained by one method."""

    task: DemoTask
    attached: Attached
    optimizer: torch.optim.Optimizer
    batches: Iterator[tuple[Tensor, Tensor]]
    steps: int = 0

    def step(self) -> float:
        """One training step; returns the loss of this rank's batch."""
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        loss = self.task.loss(self.attached.model, inputs, targets)
        loss.backward()
        self.attached.after_backward()
        self.task.clip(self.attached.model)
        self.optimizer.step()
        self.steps += 1
        return loss.item()


@dataclass
class Span:
    """What one timed span may last: the first of both limits ends it, at least one step is made."""

    steps: int
    seconds: float
    warm_steps: int
    eval_every_s: float
    """0: no evaluation inside of the span."""


class Clock:
    """Wall time of a span without its pauses; starts paused."""

    def __init__(self) -> None:
        self._before_s = 0.0
        self._since: float | None = None

    def now(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before_s + running

    def pause(self) -> None:
        self._before_s = self.now()
        self._since = None

    def resume(self) -> None:
        self._since = time.perf_counter()


class Worker:
    """The command loop and its state."""

    def __init__(self, channel: socket.socket, rank: int, world: int, folder: Path) -> None:
        self._channel, self._rank, self._world = channel, rank, world
        self._board = Board(folder / "board", rank, world)
        self._folder = folder
        self._commands = channel.makefile("r", encoding="utf-8")
        self._tasks: dict[str, DemoTask] = {}
        self._jobs: dict[str, Job] = {}
        self._interface = os.environ["GLOO_SOCKET_IFNAME"]
        self._last_progress = 0.0
        self._start_bytes = 0

    def send(self, **message: Any) -> None:
        self._channel.sendall((json.dumps(message) + "\n").encode())

    def serve(self) -> None:
        """Obey until the orchestrator says `exit` or closes the socket."""
        while line := self._commands.readline():
            command = json.loads(line)
            name = command.pop("command")
            if name == "exit":
                break
            try:
                self.send(event="done", **getattr(self, f"do_{name}")(**command))
            except Exception as error:
                traceback.print_exc()
                self.send(
                    event="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())}"
                )
        self._jobs.clear()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()

    def do_join(self) -> dict[str, Any]:
        """Form the process group. The rendezvous is a file: it sends nothing."""
        store = FileStore(str(self._folder / "store"), self._world)
        dist.init_process_group("gloo", store=store, rank=self._rank, world_size=self._world)
        return {"torch": torch.__version__, "pid": os.getpid()}

    def do_open(self, job: str, task: str, method: str, seed: int) -> dict[str, Any]:
        """Build a model and attach the method."""
        if task not in self._tasks:
            self._tasks[task] = TASKS[task]()
        job_task = self._tasks[task]
        model = job_task.model(seed)
        parameters = sum(p.numel() for p in model.parameters())
        start = parameter_hash(model)
        attached = attach(method, model)
        self._jobs[job] = Job(
            job_task,
            attached,
            job_task.optimizer(attached.model),
            job_task.batches(self._rank, self._world, seed),
        )
        return {"parameters": parameters, "hash": start}

    def do_close(self, job: str) -> dict[str, Any]:
        self._jobs.pop(job)
        gc.collect()
        return {}

    def do_result(self, job: str) -> dict[str, Any]:
        """Hash of the parameters, this rank's shard of the evaluation, and the method's own
        statistics."""
        held = self._jobs[job]
        model = held.attached.model
        stats = held.attached.stats()
        layers = stats.get("layers")
        return {
            "hash": parameter_hash(model),
            "steps": held.steps,
            "shard": self._evaluate(held),
            "stats": {k: v for k, v in stats.items() if isinstance(v, int | float | str)},
            "layers": len(layers) if isinstance(layers, list | tuple | dict) else 0,
        }

    def do_run(self, job: str, **limits: Any) -> dict[str, Any]:
        """Warm up, then train until the span's limits, the same number of steps on every rank."""
        held, span = self._jobs[job], Span(**limits)
        self._board.barrier()
        if self._rank == 0:
            self._board.clear()
        self._board.barrier()
        last_s = 0.0
        for _ in range(span.warm_steps):
            began = time.perf_counter()
            self._report_progress(0, held.step(), 0.0)
            last_s = time.perf_counter() - began
        self._board.barrier()
        self._start_bytes = interface_sent(self._interface)
        clock = Clock()
        self._report_point(held, span, clock, 0)
        step, next_eval = 0, span.eval_every_s
        clock.resume()
        while True:
            began = clock.now()
            if self._rank == 0:
                if step + 1 >= span.steps or began + 2 * last_s > span.seconds:
                    self._board.announce_stop(step)
                elif span.eval_every_s and began + last_s >= next_eval:
                    self._board.announce_pause(step)
            loss = held.step()
            stopping, pausing = self._board.stops_after(step), self._board.pauses_after(step)
            step += 1
            if stopping or pausing:
                self._board.barrier()
                clock.pause()
            last_s = clock.now() - began
            if stopping:
                return {"steps": step, "seconds": clock.now(), "loss": loss}
            if pausing:
                self._report_point(held, span, clock, step)
                next_eval = clock.now() + span.eval_every_s
                clock.resume()
            self._report_progress(step, loss, clock.now())

    def _report_progress(self, step: int, loss: float, seconds: float) -> None:
        if self._rank == 0 and time.perf_counter() - self._last_progress > 0.4:
            self._last_progress = time.perf_counter()
            # The interface's own counter: cheap, and near enough for a display. Results use the
            # lab's.
            sent = interface_sent(self._interface) - self._start_bytes
            self.send(event="progress", step=step, loss=loss, seconds=seconds, bytes=sent)

    def _report_point(self, held: Job, span: Span, clock: Clock, step: int) -> None:
        """Evaluate if the span wants it, report, and wait until the orchestrator has read the
        links' counters."""
        shard = self._evaluate(held) if span.eval_every_s else None
        self.send(event="point", seconds=clock.now(), step=step, shard=shard)
        if not self._commands.readline():
            raise ConnectionError("the orchestrator is gone")

    def _evaluate(self, held: Job) -> list[float]:
        """[total, count] of this rank's shard; on the bare module, so that DDP's own forward
        hooks do not run."""
        model = getattr(held.attached.model, "module", held.attached.model)
        model.eval()
        shard = held.task.evaluate(model, self._rank, self._world)
        model.train()
        return [shard.total, shard.count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder with the socket, the board and the store"
    )
    arguments = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel,
        contextlib.suppress(BrokenPipeError),
    ):
        channel.connect(str(arguments.folder / "socket"))
        worker = Worker(channel, rank, world, arguments.folder)
        worker.send(event="hello", rank=rank)
        worker.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
