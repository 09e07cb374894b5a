"""Bytes at the same total error, on gradients of models in training: a codec for each layer, as the
planner chooses them, beside the best one for all layers.

    PYTHONPATH=.:integrations/torch python tests/bench/layerwise.py [--model NAME]... [--steps N]
        [--json FILE]

A model learns in one process, uncompressed, as its task says. Beside it, from the first step on,
error feedback runs as it would under a reference codec for all layers: v = gradient + residual, and
the residual is what the codec leaves of v (PowerSGD's from `lowrank`, which is the same in one
shot). At 5 %, half and the end of the steps layerwise_bench gets each v: it measures what every
candidate codec loses of every layer and solves for the plan. A row is one recording, set of codecs,
grid of parameters and measure of error; tests/bench/layerwise.cpp says what these are.

factor: bytes of the best uniform setting over those of the plan, of the layers that are compressed.
factor_all counts the biases and norms that both send as fp32, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import thinwire
import torch
from torch import nn

from examples.demo import tasks as demo
from tests.convergence.settings import RECIPES, rate_factor
from tests.convergence.tasks import TASKS

BENCH = Path(__file__).resolve().parents[2] / "build/release/bench/layerwise_bench"
SEED = 1
POINTS = (0.05, 0.5, 1.0)
"""Of a model's steps, when recordings are made."""
TOPK, POWERSGD = ("topk", "topk-q", "all"), ("powersgd", "all")
REFERENCES = {
    "topk:0.001": TOPK,
    "topk:0.01": TOPK,
    "powersgd:4": POWERSGD,
    "powersgd:8": POWERSGD,
}
"""What error feedback runs with, and the sets of codecs that are then compared. (By the error of
rank 1, than which nothing of its set is thinner, there is nothing to choose.)"""

Row = dict[str, Any]


@dataclass
class Job:
    """A model and how it learns."""

    task: demo.Task
    steps: int
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    clip: Callable[[nn.Module], object]
    rate_factor: Callable[[int, int], float] = lambda step, steps: 1.0
    """Of the learning rate: (step, from 0; steps) -> what it is multiplied by."""


def from_recipe(name: str) -> Job:
    """As tests/convergence trains it, on one rank."""
    TASKS[name].prepare()
    recipe = RECIPES[name]
    arguments = recipe.optimizer(recipe.family)
    make = getattr(torch.optim, arguments.pop("class"))
    most = float("inf") if recipe.clip is None else recipe.clip
    return Job(
        TASKS[name](),
        recipe.steps,
        lambda model: make(model.parameters(), **arguments),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), most),
        lambda step, steps: rate_factor(step, steps, steps * recipe.warmup // recipe.steps),
    )


def from_demo(name: str, steps: int) -> Job:
    """As the demo trains it, on one rank."""
    demo.TASKS[name].prepare()
    task = demo.TASKS[name]()
    return Job(task, steps, task.optimizer, task.clip)


MODELS: dict[str, Callable[[], Job]] = {
    "cnn": lambda: from_recipe("cnn"),
    "lstm": lambda: from_recipe("lstm"),
    "lstm-2x650": lambda: from_demo("lstm", 200),
    "gpt": lambda: from_recipe("gpt"),
    "minilm": lambda: from_recipe("minilm"),
    "mlp": lambda: from_demo("mnist", 200),
}


class ErrorFeedback:
    """The residuals that one codec for all layers leaves; those of a step go into the next."""

    def __init__(self, reference: str) -> None:
        self._codec = thinwire.codec(reference.replace("powersgd", "lowrank"))
        self._residuals: dict[str, np.ndarray] = {}
        self._step = 0

    def add(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """gradient + residual, by layer; biases and norms have none."""
        return {
            name: gradient + self._residuals[name] if name in self._residuals else gradient
            for name, gradient in gradients.items()
        }

    def end_step(self, gradients: dict[str, np.ndarray]) -> None:
        for name, gradient in gradients.items():
            if gradient.ndim < 2:
                continue
            residual = self._residuals.setdefault(name, np.zeros(gradient.shape, np.float32))
            self._codec.encode(gradient, residual=residual, key=name, step=self._step)
        self._step += 1


def compare(values: dict[str, np.ndarray], reference: str) -> list[Row]:
    """The rows of one recording."""
    with tempfile.TemporaryDirectory(prefix="tw-layerwise-") as name:
        layers, file = Path(name) / "layers.txt", Path(name) / "values.f32"
        lines = [" ".join([key, *map(str, v.shape)]) + "\n" for key, v in values.items()]
        layers.write_text("".join(lines), encoding="utf-8")
        with file.open("wb") as out:
            for v in values.values():
                v.tofile(out)
        command = [str(BENCH), str(layers), str(file), reference, *REFERENCES[reference]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [with_factors(json.loads(line)) for line in done.stdout.splitlines()]


def with_factors(row: Row) -> Row:
    dense = row["dense_bytes"]
    return row | {
        "factor": row["uniform_bytes"] / row["bytes"],
        "factor_all": (row["uniform_bytes"] + dense) / (row["bytes"] + dense),
    }


def rows_of(name: str, job: Job, steps: int) -> Iterator[Row]:
    """Trains the model and compares at each point."""
    torch.manual_seed(SEED)
    model = job.task.model(SEED)
    optimizer = job.optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: job.rate_factor(step, steps)
    )
    batches = job.task.batches(0, 1, SEED)
    memories = {reference: ErrorFeedback(reference) for reference in REFERENCES}
    recorded = {max(1, round(point * steps)) for point in POINTS}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = job.task.loss(model, *next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {
            key: p.grad.contiguous().numpy()
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        for reference, memory in memories.items():
            if step in recorded:
                for row in compare(memory.add(gradients), reference):
                    yield {"model": name, "step": step, "loss": loss.item()} | row
            memory.end_step(gradients)
        job.clip(model)
        optimizer.step()
        schedule.step()


def told(row: Row) -> str:
    """A line of the printed table."""
    plan = sorted(row["layers"], key=lambda layer: layer["bytes"] / layer["uniform_bytes"])
    ends = [f"{layer['name']} {layer['codec']}" for layer in (plan[0], plan[-1])]
    return (
        f"{row['model']:<11}{row['step']:>5}  {row['reference']:<11}{row['set']:<9}{row['grid']:<5}"
        f"{row['measure']:<8}{row['uniform']:<23}{row['uniform_bytes']:>11,.0f}{row['bytes']:>11,.0f}"
        f"{row['factor']:>7.2f}{row['factor_all']:>7.2f}  {ends[0]} .. {ends[1]}"
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="layerwise.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if not BENCH.exists():
        print(f"layerwise: {BENCH} is not built\nhint: make release", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    print(f"# command: {' '.join(['python', 'tests/bench/layerwise.py', *words])}")
    print(
        f"# {'model':<9}{'step':>5}  {'reference':<11}{'set':<9}{'grid':<5}{'error':<8}"
        f"{'best for all':<23}{'bytes':>11}{'layerwise':>11}{'factor':>7}{'all':>7}  "
        "thinned most .. least"
    )
    lines = []
    for name in options.model or MODELS:
        job = MODELS[name]()
        print(f"# {name}: {job.task.workload}", flush=True)
        for row in rows_of(name, job, options.steps or job.steps):
            print(told(row), flush=True)
            lines.append(json.dumps(row) + "\n")
            if options.json:
                options.json.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
