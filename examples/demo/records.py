"""What one run of the demo leaves behind, and the figures derived from it. Pure data: no I/O but
the JSON Lines file."""

from __future__ import annotations

import abc
import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

MB = 1e6
Item = TypeVar("Item")


@dataclass(frozen=True)
class CurvePoint:
    """The metric at one moment of the clock; bytes are per host since the clock started."""

    seconds: float
    megabytes: float
    step: int
    value: float


@dataclass
class Measured(abc.ABC):
    """One (task, link, method), and what follows from its bytes."""

    task: str
    task_title: str
    workload: str
    link: str
    method: str
    label: str
    hosts: int
    parameters: int = 0

    @property
    @abc.abstractmethod
    def wire_mb_step(self) -> float:
        """MB that a host sends in one step."""

    @property
    def where(self) -> str:
        """Task and link: `MNIST MLP at 1 Gbit/s`."""
        return f"{self.task_title} at {link_text(self.link)}"

    @property
    def ratio_fp32(self) -> float:
        """Bytes a host of a plain fp32 ring allreduce ÷ bytes on the wire; 0 when none were."""
        wire = self.wire_mb_step
        return dense_mb(self.parameters, self.hosts) / wire if wire else 0.0

    @property
    def ratio_bf16(self) -> float:
        return self.ratio_fp32 / 2.0


@dataclass
class RunRecord(Measured):
    """One run of the demo. `failed` is empty, or why no figure holds, in one line."""

    budget_s: float = 0.0
    """Wall time that the run was given; no step is started that would end after it."""
    seconds: float = 0.0
    warm_steps: int = 0
    steps: int = 0
    step_ms: float = 0.0
    bound_ms: float = 0.0
    wire_mb_step: float = 0.0
    metric: str = ""
    unit: str = ""
    higher_is_better: bool = True
    target: float = 0.0
    value: float = 0.0
    replicas_identical: bool = False
    curve: list[CurvePoint] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    failed: str = ""

    @property
    def over_bound(self) -> float:
        """Step time ÷ bound step."""
        return self.step_ms / self.bound_ms if self.bound_ms else 0.0

    @property
    def time_to_target(self) -> float | None:
        """Seconds on the clock at the first evaluation that had reached the target."""
        for point in self.curve:
            if point.value >= self.target if self.higher_is_better else point.value <= self.target:
                return point.seconds
        return None

    def as_json(self) -> dict[str, Any]:
        """All fields and derived figures."""
        derived = ("over_bound", "ratio_fp32", "ratio_bf16", "time_to_target")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def link_bits(link: str) -> float | None:
    """Bits a second of `100mbit`; None for what has no number, such as `loopback`."""
    for unit, factor in _UNITS.items():
        if link.endswith(unit):
            return float(link.removesuffix(unit)) * factor
    return None


def link_text(link: str) -> str:
    """`100mbit` as people write it: 100 Mbit/s."""
    for unit in _UNITS:
        if link.endswith(unit):
            return f"{link.removesuffix(unit)} {unit.capitalize()}/s"
    return link


@dataclass(frozen=True)
class RatePoint:
    """Step time of one method on one link, for the picture of step time against bandwidth."""

    task_title: str
    workload: str
    link: str
    method: str
    label: str
    ms: float
    low_ms: float
    high_ms: float
    bound_ms: float


def crossing(
    xs: list[float], first: list[float], second: list[float]
) -> tuple[float, float] | None:
    """Where two curves over ascending xs meet, on straight lines in log-log space; the last such
    place, or None. The ys are those of `first` and `second` at xs, all above 0."""
    found = None
    gaps = [math.log(a / b) for a, b in zip(first, second, strict=True)]
    for i in range(len(xs) - 1):
        if gaps[i] != gaps[i + 1] and gaps[i] * gaps[i + 1] <= 0:
            share = gaps[i] / (gaps[i] - gaps[i + 1])
            found = (
                math.exp(math.log(xs[i]) + share * math.log(xs[i + 1] / xs[i])),
                math.exp(math.log(first[i]) + share * math.log(first[i + 1] / first[i])),
            )
    return found


def dense_mb(parameters: int, hosts: int) -> float:
    """MB that each host sends for one ring allreduce of `parameters` fp32 values, headers not
    counted."""
    return 2.0 * (hosts - 1) / hosts * 4.0 * parameters / MB


def write_json_lines(file: Path, head: dict[str, Any], records: list[RunRecord]) -> None:
    """A first line that describes the machine and the command, then one line a run."""
    lines = [
        {"kind": "header", **head},
        *({"kind": "run", **record.as_json()} for record in records),
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def read_json_lines(file: Path) -> tuple[dict[str, Any], list[RunRecord]]:
    """What write_json_lines wrote."""
    head: dict[str, Any] = {}
    records: list[RunRecord] = []
    names = {f.name for f in dataclasses.fields(RunRecord)}
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if values.pop("kind") == "header":
            head = values
            continue
        kept = {k: v for k, v in values.items() if k in names}
        kept["curve"] = [CurvePoint(**point) for point in kept["curve"]]
        records.append(RunRecord(**kept))
    return head, records


def groups(items: Iterable[Item], *fields: str) -> list[list[Item]]:
    """Items that agree in the named fields, in order of first appearance."""
    found: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        found.setdefault(tuple(getattr(item, f) for f in fields), []).append(item)
    return list(found.values())
