"""What the lines of a run log say of the job that writes it now. No input or output; what is kept
does not grow with the log."""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass, field

from thinwire.report.run_log import (
    REASONS_SHOWN,
    Counts,
    End,
    Layer,
    Layers,
    Metrics,
    Plan,
    Start,
    Work,
    left_out,
    parse,
)
from thinwire.report.runs import MB, LayerFigures, layer_figures

_WINDOW_SECONDS = 10.0
"""Rates are those of the last lines, so far back."""
_APART_SECONDS = 0.1
"""Of lines closer together only the last counts."""
_NORMS_KEPT = 64
_DECISIONS_KEPT = 5
_SILENT_SECONDS = 5.0
"""A job is silent after three times what lies between its lines, and not before this."""


@dataclass(frozen=True)
class Sample:
    """A rank's counts at one moment."""

    counts: Counts
    work: Work | None


@dataclass
class Rank:
    """What one rank wrote last."""

    start: Start
    began: int
    """Number of its line ``start``."""
    latest: int
    """Number of its last line."""
    layers: list[Layer]
    policy: str
    end: End | None = None
    last: Metrics | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    samples: deque[Sample] = field(default_factory=deque)
    norms: deque[Layers] = field(default_factory=lambda: deque(maxlen=_NORMS_KEPT))
    decisions: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_DECISIONS_KEPT))

    def add(self, sample: Sample) -> None:
        samples = self.samples
        if samples and sample.counts.seconds < samples[-1].counts.seconds:
            samples.clear()
        if len(samples) > 1 and _seconds(samples[-2], sample) < _APART_SECONDS:
            samples.pop()
        samples.append(sample)
        while len(samples) > 2 and _seconds(samples[1], sample) >= _WINDOW_SECONDS:
            samples.popleft()


def _seconds(before: Sample, after: Sample) -> float:
    return after.counts.seconds - before.counts.seconds


@dataclass(frozen=True)
class Rates:
    """Of one rank, a second, over the last lines. Shares are of the time; None: an older log."""

    steps: float
    megabytes: float
    encode: float | None
    decode: float | None
    wait: float | None


class Model:
    """One model of the job: the latest attempt of each rank."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.ranks: dict[int, Rank] = {}
        self.latest = 0

    def start(self, rank: int, number: int, start: Start) -> None:
        """A rank that starts again begins another attempt of the job; what the other ranks wrote
        before it did belongs to the one before."""
        before = self.ranks.get(rank)
        if before is not None:
            self.ranks = {
                other: state
                for other, state in self.ranks.items()
                if state.began > before.latest and state.start.world_size == start.world_size
            }
        self.ranks[rank] = Rank(start, number, number, start.layers, start.policy)

    @property
    def shown(self) -> Rank:
        """The lowest that wrote counts; else the lowest."""
        ranks = [self.ranks[rank] for rank in sorted(self.ranks)]
        return next((rank for rank in ranks if rank.samples), ranks[0])

    @property
    def world_size(self) -> int:
        return self.shown.start.world_size

    @property
    def ended(self) -> int:
        """How many ranks have."""
        return sum(rank.end is not None for rank in self.ranks.values())

    @property
    def counts(self) -> Counts:
        """The latest of the rank that is shown."""
        samples = self.shown.samples
        return samples[-1].counts if samples else Counts(0, 0, 0, 0, 0.0)

    @property
    def step(self) -> int:
        """As the job counts them: from before its restart on, where it was resumed."""
        last = self.shown.last
        return self.counts.steps if last is None else max(last.step, self.counts.steps)

    @property
    def ratio(self) -> float | None:
        """Bytes of a ring allreduce of the same gradients as fp32 ÷ bytes sent."""
        counts = self.counts
        return counts.dense_wire_bytes / counts.wire_bytes if counts.wire_bytes else None

    @property
    def rates(self) -> Rates | None:
        """None until there are two lines with counts."""
        samples = self.shown.samples
        if len(samples) < 2 or not _seconds(samples[0], samples[-1]) > 0:
            return None
        first, last = samples[0], samples[-1]
        seconds = _seconds(first, last)
        steps = last.counts.steps - first.counts.steps
        sent = last.counts.wire_bytes - first.counts.wire_bytes
        shares: list[float | None] = [None] * 3
        if first.work is not None and last.work is not None:
            shares = [
                (last.work.encode_seconds - first.work.encode_seconds) / seconds,
                (last.work.decode_seconds - first.work.decode_seconds) / seconds,
                (last.work.wait_seconds - first.work.wait_seconds) / seconds,
            ]
        return Rates(steps / seconds, sent / MB / seconds, *shares)

    @property
    def patience(self) -> float:
        """Seconds without a line after which the job is called silent."""
        gaps = [_seconds(a, b) for a, b in itertools.pairwise(self.shown.samples)]
        return max(_SILENT_SECONDS, 3 * max(gaps, default=0.0))

    @property
    def layers(self) -> list[LayerFigures]:
        """Of the rank that is shown; norms since its last plan."""
        rank = self.shown
        return layer_figures(rank.layers, rank.norms, ended=rank.end is not None)


class Job:
    """All models of a run log."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.lines = 0
        self.reasons: list[str] = []
        """Why the first lines that say nothing were left out."""
        self._left_out = 0

    def take(self, line: str) -> None:
        self.lines += 1
        try:
            self._take(line)
        except ValueError as error:
            self._left_out += 1
            if len(self.reasons) < REASONS_SHOWN:
                self.reasons.append(f"line {self.lines}: {error}")

    def _take(self, line: str) -> None:
        (number, label), record = parse(line)
        if isinstance(record, Start):
            self.models.setdefault(label, Model(label)).start(number, self.lines, record)
        model = self.models.get(label)
        rank = None if model is None else model.ranks.get(number)
        if model is None or rank is None:
            raise ValueError(f"rank {number}, model {label}: no line of kind start before it")
        match record:
            case Metrics():
                rank.last = record
                rank.values |= record.values
                rank.add(Sample(record.counts, record.work))
            case Plan():
                _check_length("plan", rank, len(record.layers))
                rank.layers, rank.policy = record.layers, record.policy
                rank.norms.clear()
                rank.decisions.extend((record.step, text) for text in record.decisions)
            case Layers():
                _check_length("layers", rank, len(record.residual_norm))
                rank.norms.append(record)
            case End():
                _check_length("end", rank, len(record.layers))
                rank.end, rank.layers = record, record.layers
                rank.add(Sample(record.counts, record.work))
        rank.latest = model.latest = self.lines

    @property
    def left_out(self) -> list[str]:
        return left_out(self.reasons, self._left_out, self.lines)

    @property
    def ended(self) -> bool:
        """Every rank of every model has written its last line."""
        models = self.models.values()
        return bool(models) and all(model.ended >= model.world_size for model in models)


def _check_length(kind: str, rank: Rank, got: int) -> None:
    if got != len(rank.layers):
        raise ValueError(f"{kind}: expected figures of {len(rank.layers)} layers, got {got}")


def residual_of(layer: LayerFigures) -> float | None:
    """The last norm of the layer's residual."""
    return layer.norms[-1] if layer.norms else None


def error_of(layer: LayerFigures) -> float | None:
    """Root mean square of the residual's elements, which can be compared between layers."""
    norm = residual_of(layer)
    return None if norm is None or not layer.elements else norm / math.sqrt(layer.elements)
