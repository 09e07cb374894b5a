"""The run log: what a run did, as JSON Lines. docs/run-log.md gives every line's fields and units.

All ranks and models append to one file, each line in a single write, so that lines do not mix.
Imports no torch.
"""

from __future__ import annotations

import collections
import json
import math
import operator
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire import _logging
from thinwire.errors import InvalidArgument
from thinwire.version import __version__

FORMAT = 1
_TICK_SECONDS = 1.0
_models: collections.Counter[tuple[int, ...]] = collections.Counter()


def model_label(ranks: Sequence[int], world_size: int) -> str:
    """What lines call this process's next model over ``ranks``: the same on each of them."""
    key = tuple(ranks)
    number = _models[key]
    _models[key] += 1
    if len(key) == world_size:
        return str(number)
    return f"{number} on ranks {','.join(map(str, key))}"


def check_file(file: str | os.PathLike[str]) -> Path:
    """The file's absolute path, after making it; InvalidArgument where nothing can be appended."""
    path = Path(file).absolute()
    try:
        with open(path, "ab"):
            return path
    except OSError as error:
        raise InvalidArgument(
            f"run log: cannot append to {path}: {error.strerror}\n"
            "hint: name a file in a folder that exists and may be written to"
        ) from error


class RunLog:
    """One rank's lines about one model.

    native: the reducer of the extension module, or what has its ``stats()`` and
    ``residual_norms()``. layers_every: calls of ``log`` from one ``layers`` line to the next.
    """

    def __init__(self, path: Path, native: Any, rank: int, model: str, layers_every: int) -> None:
        self._path: Path | None = path
        self._native = native
        self._who = {"rank": rank, "model": model}
        self._layers_every = layers_every
        self._began = self._last_line = time.monotonic()
        self._calls = 0
        self._last_step = 0
        self._steps_before = 0
        self._not_finite: set[str] = set()
        self._policy = ""

    def start(self, world_size: int, policy: str, torch_version: str) -> None:
        self._policy = policy
        self._append(
            "start",
            format=FORMAT,
            time=time.time(),
            world_size=world_size,
            policy=policy,
            thinwire=__version__,
            torch=torch_version,
            layers=self._layer_table(),
        )

    def plan(self, policy: str, decisions: Sequence[str] = ()) -> None:
        """The run goes on by another policy, or as the policy ``auto`` has decided."""
        self._policy = policy
        step = max(self._last_step, self._steps_before + self._native.stats()["steps"])
        why = {"decisions": list(decisions)} if decisions else {}
        self._append("plan", step=step, policy=policy, **why, layers=self._layer_table())

    def resume(self, step: int) -> None:
        """The run goes on from a saved state, at ``step``."""
        self._steps_before = step - self._native.stats()["steps"]
        self._last_step = 0
        self._append("resume", step=step)

    def log(self, step: int | None, metrics: Mapping[str, Any]) -> None:
        """A ``metrics`` line and, each so many calls, a ``layers`` line."""
        stats = self._native.stats()
        step = self._checked_step(step, stats)
        values = {name: self._number(name, value, step) for name, value in metrics.items()}
        self._metrics(stats, step, values)
        if self._calls % self._layers_every == 0:
            self._layers(stats, step)
        self._calls += 1

    def tick(self) -> None:
        """A ``metrics`` line without values, if the last one is a second old."""
        if time.monotonic() - self._last_line >= _TICK_SECONDS:
            stats = self._native.stats()
            step = max(self._last_step, self._steps_before + stats["steps"])
            self._metrics(stats, step, {})

    def end(self) -> None:
        self._append("end", policy=self._policy, seconds=self._seconds(), **self._native.stats())

    def _layer_table(self) -> list[dict[str, Any]]:
        fields = ("name", "elements", "codec", "reason", "slot_bytes", "ratio")
        return [
            {field: layer[field] for field in fields} for layer in self._native.stats()["layers"]
        ]

    def _checked_step(self, step: Any, stats: Mapping[str, Any]) -> int:
        if step is None:
            step = max(self._last_step, self._steps_before + stats["steps"])
        if not hasattr(step, "__index__") or isinstance(step, bool) or step < self._last_step:
            raise InvalidArgument(
                f"log: step: expected a whole number, {self._last_step} (the last one logged) or "
                f"more, got {step!r}\nhint: leave step out for the reducer's own count"
            )
        return operator.index(step)

    def _number(self, name: str, value: Any, step: int) -> int | float | None:
        """A value that JSON can hold: None for NaN and Inf, which is said once a name."""
        try:
            number = value.item() if hasattr(value, "item") else value
        except (RuntimeError, ValueError):  # a tensor or an array of several values
            number = None
        if not isinstance(number, int | float) or isinstance(number, bool):
            raise InvalidArgument(
                f"log: {name}: expected a number, got {type(value).__name__} {value!r:.60}\n"
                "hint: log(loss=loss.item())"
            )
        if abs(number) <= sys.float_info.max:
            return number
        if name not in self._not_finite:
            self._not_finite.add(name)
            _logging.say(
                f"run log: {name} is {number} at step {step}; JSON has no such number, the line "
                "holds null (said once)",
                warning=True,
            )
        return None

    def _metrics(
        self, stats: Mapping[str, Any], step: int, values: Mapping[str, float | None]
    ) -> None:
        self._last_step = step
        self._last_line = time.monotonic()
        counts = (
            "steps", "skipped_steps", "wire_bytes", "dense_wire_bytes",
            "encode_seconds", "decode_seconds", "wait_seconds",
        )  # fmt: skip
        self._append(
            "metrics",
            step=step,
            seconds=self._seconds(),
            **{name: stats[name] for name in counts},
            values=values,
        )

    def _layers(self, stats: Mapping[str, Any], step: int) -> None:
        norms = self._native.residual_norms()
        self._append(
            "layers",
            step=step,
            ratio=[layer["ratio"] for layer in stats["layers"]],
            slot_bytes=[layer["slot_bytes"] for layer in stats["layers"]],
            residual_norm=[norm if math.isfinite(norm) else None for norm in norms],
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._began, 6)

    def _append(self, kind: str, **fields: Any) -> None:
        if self._path is None:
            return
        line = json.dumps({"kind": kind, **self._who, **fields}, allow_nan=False) + "\n"
        if kind == "start" and _is_torn(self._path):
            line = "\n" + line
        data = line.encode()
        try:
            with open(self._path, "ab", buffering=0) as file:
                written = file.write(data)
            cause = "" if written == len(data) else "the line was cut short"
        except OSError as error:
            cause = str(error.strerror)
        if cause:
            _logging.say(
                f"run log: cannot write to {self._path}: {cause}; no more lines from rank "
                f"{self._who['rank']}, the training goes on",
                warning=True,
            )
            self._path = None


def _is_torn(path: Path) -> bool:
    """Whether the file ends within a line, as a job that was killed may leave it."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
