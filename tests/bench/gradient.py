"""codecs_bench on the gradient of a model in training.

    PYTHONPATH=.:integrations/torch python tests/bench/gradient.py [--task lstm|mnist] [--steps N]
        [--dtype T] [--elements N] [--rounds R] [--threads N] [--json FILE] [SPEC...]

The task's model learns for N steps by the task's own optimizer; the gradient of the step after
them, clipped as the task clips it, is what codecs_bench repeats to fill its tensors.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from examples.demo.tasks import CharLstm, DemoTask, MnistMlp

BENCH = Path(__file__).resolve().parents[2] / "build/release/bench/codecs_bench"
TASKS: dict[str, type[DemoTask]] = {"lstm": CharLstm, "mnist": MnistMlp}
PASSED_ON = {"dtype": "bf16", "elements": 25_000_000, "rounds": 7, "threads": 1}
"""Options of codecs_bench, and their values here."""


def gradient(task: DemoTask, steps: int) -> tuple[np.ndarray, float]:
    """All parameters' gradients in a row, fp32, and the loss."""
    torch.manual_seed(1)
    model = task.model(seed=1)
    optimizer = task.optimizer(model)
    batches = task.batches(0, 1, seed=1)
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = task.loss(model, *next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        task.clip(model)
        if step < steps:
            optimizer.step()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(grads).numpy(), loss.item()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="gradient.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", choices=TASKS, default="lstm")
    parser.add_argument("--steps", type=int, default=50)
    for name, value in PASSED_ON.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--json")
    parser.add_argument("specs", nargs="*", default=["lossless"])
    options = parser.parse_args(words)
    task = TASKS[options.task]
    task.prepare()
    values, loss = gradient(task(), options.steps)
    state = f"after {options.steps} steps, loss {loss:.2f}"
    print(f"# {task.workload}; {state}: {values.size:,} values", flush=True)
    command = [str(BENCH)]
    for name in (*PASSED_ON, *(["json"] if options.json else [])):
        command += [f"--{name}", str(getattr(options, name))]
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        values.tofile(file.name)
        command += ["--gradient", file.name, *options.specs]
        return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
