"""Reads run logs (docs/run-log.md), also broken ones and those that grow: a line that is no run
log's is left out with a reason; a file without any line that can be used is an error."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire._run_log import FORMAT
from thinwire.errors import InvalidArgument

REASONS_SHOWN = 3
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Layer:
    """As the lines ``start``, ``plan`` and ``end`` give it; None for what older logs lack."""

    name: str
    elements: int
    codec: str
    reason: str
    ratio: float | None = field(default=None, compare=False)
    slot_bytes: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Start:
    world_size: int
    policy: str
    torch: str
    layers: list[Layer]


@dataclass(frozen=True)
class Resume:
    step: int


@dataclass(frozen=True)
class Plan:
    """What a run goes on by from a step on."""

    step: int
    policy: str
    layers: list[Layer]
    decisions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Work:
    """So far in one process: seconds of its communication thread."""

    encode_seconds: float
    decode_seconds: float
    wait_seconds: float


@dataclass(frozen=True)
class Counts:
    """So far in one process, of one rank."""

    steps: int
    skipped_steps: int
    wire_bytes: int
    dense_wire_bytes: int
    seconds: float


@dataclass(frozen=True)
class Metrics:
    step: int
    counts: Counts
    values: dict[str, float | None]
    work: Work | None = None  # older logs have none


@dataclass(frozen=True)
class LayerFigures:
    """One figure a layer, in the order of the line ``start``."""

    ratio: list[float]
    slot_bytes: list[int]


@dataclass(frozen=True)
class Layers:
    step: int
    figures: LayerFigures
    residual_norm: list[float | None]


@dataclass(frozen=True)
class End:
    counts: Counts
    work: Work
    layers: list[Layer]


@dataclass
class Attempt:
    """What one process wrote about one model, from a line ``start`` to the next."""

    rank: int
    model: str
    start: Start
    resumed: bool = False
    metrics: list[Metrics] = field(default_factory=list)
    layers: list[Layers] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    end: End | None = None
    _rolled_back: bool = False

    @property
    def policy(self) -> str:
        """That of the start, and what followed it from which step on."""
        return ", ".join(
            [self.start.policy, *(f"from step {plan.step} {plan.policy}" for plan in self.plans)]
        )

    @property
    def last_policy(self) -> str:
        return self.plans[-1].policy if self.plans else self.start.policy

    @property
    def layer_table(self) -> list[Layer]:
        """The latest. Not every change of a plan on trial has a line ``plan``."""
        if self.end is not None:
            return self.end.layers
        return self.plans[-1].layers if self.plans else self.start.layers

    @property
    def counts(self) -> Counts:
        """The latest."""
        if self.end is not None:
            return self.end.counts
        return self.metrics[-1].counts if self.metrics else Counts(0, 0, 0, 0, 0.0)

    def add(self, record: Resume | Plan | Metrics | Layers | End) -> None:
        """Take the next line; a step that goes back replaces what was logged from there on."""
        match record:
            case Resume():
                self.resumed = self.resumed or not self.metrics
                self._rolled_back = True
            case Plan():
                expected, got = len(self.start.layers), len(record.layers)
                if got != expected:
                    raise ValueError(f"plan: expected {expected} layers, got {got}")
                self.plans.append(record)
            case Metrics():
                # Several lines may be of one step, unless a state was loaded between them.
                kept = record.step - self._rolled_back
                while self.metrics and self.metrics[-1].step > kept:
                    self.metrics.pop()
                self.metrics.append(record)
                self._rolled_back = False
            case Layers():
                expected, got = len(self.start.layers), len(record.residual_norm)
                if got != expected:
                    raise ValueError(f"layers: expected figures of {expected} layers, got {got}")
                while self.layers and self.layers[-1].step >= record.step:
                    self.layers.pop()
                self.layers.append(record)
            case End():
                expected, got = len(self.start.layers), len(record.layers)
                if got != expected:
                    raise ValueError(f"end: expected figures of {expected} layers, got {got}")
                self.end = record


def read(file: Path) -> tuple[list[Attempt], list[str]]:
    """The file's attempts in the order of their starts, and what was left out and why.

    InvalidArgument for a file that cannot be read or holds no line of a run log.
    """
    attempts: list[Attempt] = []
    latest: dict[tuple[int, str], Attempt] = {}
    reasons: list[str] = []
    lines = 0
    for number, line in _lines(file):
        lines += 1
        try:
            who, parsed = parse(line)
            if isinstance(parsed, Start):
                latest[who] = Attempt(*who, parsed)
                attempts.append(latest[who])
            elif who in latest:
                latest[who].add(parsed)
            else:
                raise ValueError(f"rank {who[0]}, model {who[1]}: no line of kind start before it")
        except ValueError as error:
            reasons.append(f"line {number}: {error}")
    if not attempts:
        raise no_run_log(file, reasons)
    return attempts, left_out(reasons, len(reasons), lines)


def no_run_log(file: Path, reasons: list[str]) -> InvalidArgument:
    """The error for a file without a line of kind start, and why its first line was left out."""
    got = reasons[0] if reasons else "an empty file"
    return InvalidArgument(
        f"{file}: expected a run log, whose lines are JSON of kind start, metrics, layers and "
        f"end, got {got}\nhint: thinwire run --stats run.jsonl -- COMMAND writes one, and so "
        "does thinwire.torch.compress(..., log='run.jsonl')"
    )


class Follower:
    """The lines of a run log that is still being written, each once and only when it is whole.

    InvalidArgument for a file that cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._identity: tuple[int, int] | None = None
        self._position = 0
        self._rest = b""
        self.modified = 0.0
        """When the file was last appended to, in Unix seconds."""
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise InvalidArgument(
                f"{file}: cannot read it: {error.strerror}\nhint: thinwire run --stats "
                f"{file} -- COMMAND makes a job write it"
            ) from error

    def lines(self) -> Iterator[str]:
        """Those that came since the last call. A file that was replaced, or cut, begins anew; of
        one that is gone there is nothing new."""
        try:
            file = open(self._file, "rb")  # noqa: SIM115
        except OSError:
            return
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._position:
                self._identity, self._position, self._rest = identity, 0, b""
            self.modified = status.st_mtime
            file.seek(self._position)
            while chunk := file.read(_CHUNK_BYTES):
                self._position += len(chunk)
                *whole, self._rest = (self._rest + chunk).split(b"\n")
                for line in (data.decode(errors="replace") for data in whole):
                    if line.strip():
                        yield line


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise InvalidArgument(
            f"{file}: cannot read it: {error.strerror}\nhint: thinwire report FILE..."
        ) from error


def left_out(reasons: list[str], count: int, lines: int) -> list[str]:
    """One sentence, or none; reasons: the first of ``count`` ones."""
    if not count:
        return []
    shown = reasons[:REASONS_SHOWN]
    if count > len(shown):
        shown = [*shown, f"and {count - len(shown)} more"]
    return [f"{count} of {lines} lines left out: {'; '.join(shown)}"]


def _object(line: str) -> dict[str, Any]:
    try:
        # What JSON has no number for (NaN) is as null here.
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        raise ValueError(f"not whole JSON, a torn line perhaps: {_short(line)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {_short(line)}")
    return record


def printable(text: str) -> str:
    """On one line and without control characters, which may come from a damaged file."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _short(text: str) -> str:
    text = printable(text)
    return text if len(text) <= 40 else text[:39] + "…"


def parse(line: str) -> tuple[tuple[int, str], Record]:
    """Rank and model that a line is of, and what it says. ValueError for what is no such line."""
    record = _object(line)
    parsed = _parse(record)
    return (_count(record, "rank"), _text(record, "model")), parsed


def _parse(record: dict[str, Any]) -> Record:
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"expected kind {', '.join(_KINDS)}, got {_short(repr(kind))}")
    try:
        return _KINDS[kind](record)
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


def _start(record: dict[str, Any]) -> Start:
    if _count(record, "format") > FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {record['format']}: a newer version's")
    layers = _layer_table(record)
    return Start(
        _count(record, "world_size"), _text(record, "policy"), _text(record, "torch"), layers
    )


def _layer_table(record: dict[str, Any]) -> list[Layer]:
    return [
        Layer(
            _text(layer, "name"),
            _count(layer, "elements"),
            _text(layer, "codec"),
            _text(layer, "reason"),
            _number(layer, "ratio") if "ratio" in layer else None,
            _count(layer, "slot_bytes") if "slot_bytes" in layer else None,
        )
        for layer in _objects(record, "layers")
    ]


def _resume(record: dict[str, Any]) -> Resume:
    return Resume(_count(record, "step"))


def _plan(record: dict[str, Any]) -> Plan:
    lines = _list(record, "decisions") if "decisions" in record else []
    decisions = [printable(line) for line in lines if isinstance(line, str)]
    return Plan(_count(record, "step"), _text(record, "policy"), _layer_table(record), decisions)


def _metrics(record: dict[str, Any]) -> Metrics:
    values = record.get("values")
    if not isinstance(values, dict):
        raise ValueError(f"values: expected an object, got {_short(repr(values))}")
    return Metrics(
        _count(record, "step"),
        _counts(record),
        {printable(name): _maybe(values, name) for name in values},
        _work(record) if "encode_seconds" in record else None,
    )


def _layers(record: dict[str, Any]) -> Layers:
    lists = {name: _list(record, name) for name in ("ratio", "slot_bytes", "residual_norm")}
    if len({len(values) for values in lists.values()}) != 1:
        raise ValueError("ratio, slot_bytes and residual_norm: expected lists of one length")
    rows = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    return Layers(
        _count(record, "step"), _figures(rows), [_maybe(row, "residual_norm") for row in rows]
    )


def _end(record: dict[str, Any]) -> End:
    return End(_counts(record), _work(record), _layer_table(record))


Record = Start | Resume | Plan | Metrics | Layers | End
_KINDS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "start": _start,
    "resume": _resume,
    "plan": _plan,
    "metrics": _metrics,
    "layers": _layers,
    "end": _end,
}


def _counts(record: dict[str, Any]) -> Counts:
    return Counts(
        _count(record, "steps"),
        _count(record, "skipped_steps"),
        _count(record, "wire_bytes"),
        _count(record, "dense_wire_bytes"),
        _number(record, "seconds"),
    )


def _work(record: dict[str, Any]) -> Work:
    return Work(
        _number(record, "encode_seconds"),
        _number(record, "decode_seconds"),
        _number(record, "wait_seconds"),
    )


def _figures(rows: list[dict[str, Any]]) -> LayerFigures:
    return LayerFigures(
        [_number(row, "ratio") for row in rows], [_count(row, "slot_bytes") for row in rows]
    )


def _refuse(record: dict[str, Any], name: str, expected: str) -> ValueError:
    got = _short(repr(record[name])) if name in record else "nothing"
    return ValueError(f"{name}: expected {expected}, got {got}")


def _count(record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**64:
        raise _refuse(record, name, "a whole number, 0 or more")
    return value


def _number(record: dict[str, Any], name: str) -> float:
    """Finite, 0 or more."""
    value = _maybe(record, name)
    if value is None or value < 0:
        raise _refuse(record, name, "a number, 0 or more")
    return value


def _maybe(record: dict[str, Any], name: str) -> float | None:
    """None for null and for what is not finite."""
    value = record.get(name)
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _refuse(record, name, "a number or null")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise _refuse(record, name, "text")
    return printable(value)


def _list(record: dict[str, Any], name: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list):
        raise _refuse(record, name, "a list")
    return value


def _objects(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    values = _list(record, name)
    if not all(isinstance(value, dict) for value in values):
        raise _refuse(record, name, "a list of objects")
    return values
