"""One rank of one run: trains as its run.json says, and rank 0 writes result.json beside it.

    python -m tests.convergence.worker FOLDER        with RANK, WORLD_SIZE, GLOO_SOCKET_IFNAME

It ends when its standard input does, so that it does not outlive the process that started it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from examples.demo.tasks import Shard, Task
from examples.demo.worker import parameter_hash
from tests.convergence.methods import Attached, attach
from tests.convergence.settings import rate_factor
from tests.convergence.tasks import TASKS

_TIMED_SECONDS, _TIMED_STEPS = 10.0, 20


class ReplicasDifferError(RuntimeError):
    """Ranks ended with different weights."""


class Training:
    """The model of one rank and its steps."""

    def __init__(self, run: dict[str, Any], rank: int, world: int) -> None:
        self.task: Task = TASKS[run["task"]]()
        self._rank, self._world = rank, world
        self._clip: float | None = run["clip"]
        torch.manual_seed(run["seed"])
        module = self.task.model(run["seed"])
        self.elements = sum(parameter.numel() for parameter in module.parameters())
        self.attached: Attached = attach(run, module, world)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.attached.optimizer,
            lambda step: rate_factor(step, run["steps"], run["warmup"]),
        )
        self._batches = self.task.batches(rank, world, run["seed"])
        self.steps = 0

    def step(self) -> float:
        """One training step; returns the loss of this rank's batch."""
        inputs, targets = next(self._batches)
        self.attached.optimizer.zero_grad()
        loss = self.task.loss(self.attached.model, inputs, targets)
        loss.backward()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.attached.model.parameters(), self._clip)
        self.attached.optimizer.step()
        self._schedule.step()
        self.steps += 1
        return loss.item()

    def point(self, loss: float) -> dict[str, Any]:
        """The curve's next point, over all ranks; collective. None: not finite."""
        module = self.attached.model.module
        module.eval()
        shard = self.task.evaluate(module, self._rank, self._world)
        module.train()
        mine = (shard, loss, self.attached.wire_bytes(self.steps))
        shards, losses, sent = zip(*gathered(mine, self._world), strict=True)
        return {
            "step": self.steps,
            "loss": finite(sum(losses) / self._world),
            "metric": score(self.task, shards),
            "wire_bytes": round(sum(sent) / self._world),
        }

    def hash(self) -> str:
        """Of the parameters; ReplicasDifferError unless all ranks have the same. Collective."""
        hashes = gathered(parameter_hash(self.attached.model.module), self._world)
        if len(set(hashes)) > 1:
            raise ReplicasDifferError(f"replicas differ after {self.steps} steps: {hashes}")
        return str(hashes[0])


def gathered(mine: Any, world: int) -> list[Any]:
    """Every rank's value, by rank."""
    all_of_them: list[Any] = [None] * world
    dist.all_gather_object(all_of_them, mine)
    return all_of_them


def finite(value: float) -> float | None:
    """To four digits; None: not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def score(task: Task, shards: tuple[Shard, ...]) -> float | None:
    """The metric; None when the loss is not finite."""
    if not all(math.isfinite(shard.total) for shard in shards):
        return None
    return round(task.score(list(shards)), 4)


def train(run: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """The whole run: its curve, from before the first step, and how long it took."""
    training = Training(run, rank, world)
    curve = [training.point(math.nan)]
    began, evaluating_s = time.perf_counter(), 0.0
    losses = []
    while training.steps < run["steps"]:
        losses.append(training.step())
        if training.steps % run["eval_every"] == 0 or training.steps == run["steps"]:
            paused = time.perf_counter()
            curve.append(training.point(sum(losses) / len(losses)))
            losses.clear()
            evaluating_s += time.perf_counter() - paused
    return {
        "parameters": training.elements,
        "curve": curve,
        "final": curve[-1]["metric"],
        "wire_bytes": curve[-1]["wire_bytes"],
        "wire_bytes_computed": training.attached.computed,
        "hash": training.hash(),
        "train_seconds": round(time.perf_counter() - began - evaluating_s, 1),
    }


def measure(run: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Time of a step after `dense_steps + 2` others: DDP rebuilds its buckets after its first. At
    least two steps, at most what fits into some seconds."""
    training = Training(run, rank, world)
    for _ in range(run["dense_steps"] + 2):
        began = time.perf_counter()
        training.step()
        last_s = time.perf_counter() - began
    slowest_s = max(gathered(last_s, world))
    steps = max(2, min(_TIMED_STEPS, int(_TIMED_SECONDS / slowest_s)))
    began = time.perf_counter()
    for _ in range(steps):
        training.step()
    dist.barrier()
    return {"step_seconds": (time.perf_counter() - began) / steps, "timed_steps": steps}


def end_with_parent() -> None:
    """Leave at once when standard input ends: the parent holds its other end."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world
    )
    result = (measure if run["measure"] else train)(run, rank, world)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the interpreter's end may abort in a thread of Gloo's (PyTorch issue 190489)
