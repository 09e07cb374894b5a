"""Runs and the figures about them, from the records of run logs alone: no input or output."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from thinwire.errors import InvalidArgument
from thinwire.report.run_log import Attempt, Counts, Layer, Layers, read

MB = 1e6
# Of a run's time; under it a rank's waiting is no news.
_WAIT_SHARE = 0.05
# A norm that has settled differs less than this from one quarter of the run to the next.
_GROWTH = 1.1
_SAMPLES_A_QUARTER = 2
_LOWER_IS_BETTER = ("loss", "perplexity", "ppl", "err", "mse", "mae", "nll")


class By(enum.StrEnum):
    """What runs are compared at: the largest value of it that all of them reached."""

    STEP = "step"
    SECONDS = "seconds"
    BYTES = "bytes"


@dataclass(frozen=True)
class Point:
    """The metrics of one moment. Seconds and MB are those of all attempts so far, of one rank."""

    step: int
    seconds: float
    megabytes: float
    values: dict[str, float]

    def at(self, by: By) -> float:
        match by:
            case By.STEP:
                return self.step
            case By.SECONDS:
                return self.seconds
            case By.BYTES:
                return self.megabytes


@dataclass(frozen=True)
class LayerFigures:
    """ratio: fp32 bytes ÷ slot bytes, None where no line has it; norms: rank's L2 norm of the
    residual at each of `steps`, None where it was not finite."""

    name: str
    elements: int
    codec: str
    reason: str
    ratio: float | None
    slot_bytes: int | None
    steps: list[int]
    norms: list[float | None]

    @property
    def dense(self) -> bool:
        return self.codec == "none"

    @property
    def finite_norms(self) -> list[float]:
        return [norm for norm in self.norms if norm is not None]

    @property
    def growth(self) -> float | None:
        """Norm of the last quarter of the samples ÷ norm of the quarter before, where the norm
        keeps growing: 10 % or more over each of the last two. None: settled, or too few samples."""
        norms = self.finite_norms
        quarter = len(norms) // 4
        if quarter < _SAMPLES_A_QUARTER:
            return None
        last, third, second = (
            mean(norms[len(norms) - (i + 1) * quarter : len(norms) - i * quarter]) for i in range(3)
        )
        grows = third >= _GROWTH * second and last >= _GROWTH * third > 0
        return last / third if grows else None


@dataclass(frozen=True)
class RankFigures:
    """One rank's own time, from its line `end`; None where the process wrote none."""

    rank: int
    steps: int
    megabytes: float
    encode_seconds: float | None
    decode_seconds: float | None
    wait_seconds: float | None


@dataclass
class Run:
    """One model of one run, of all its attempts. Counts, points and layers are those of `rank`."""

    name: str
    file: str
    model: str
    policy: str
    torch: str
    world_size: int
    attempts: int
    ended: bool
    rank: int
    steps: int
    skipped_steps: int
    seconds: float
    megabytes: float
    dense_megabytes: float
    points: list[Point]
    not_finite: dict[str, int]
    layers: list[LayerFigures]
    ranks: list[RankFigures]

    @property
    def ratio_fp32(self) -> float | None:
        """Bytes of a ring allreduce of the same gradients as fp32 ÷ bytes sent."""
        return self.dense_megabytes / self.megabytes if self.megabytes else None

    @property
    def ratio_bf16(self) -> float | None:
        return self.ratio_fp32 / 2 if self.ratio_fp32 else None

    @property
    def metrics(self) -> list[str]:
        """Names, in order of first appearance."""
        return list(dict.fromkeys(name for point in self.points for name in point.values))

    def curve(self, metric: str) -> list[Point]:
        return [point for point in self.points if metric in point.values]

    def last(self, metric: str, by: By = By.STEP, limit: float | None = None) -> float | None:
        """The latest value, at `limit` or before."""
        points = [p for p in self.curve(metric) if limit is None or p.at(by) <= limit]
        return points[-1].values[metric] if points else None

    def first_at(self, target: Target) -> Point | None:
        """Where the target was reached first."""
        return next((p for p in self.points if target.is_reached(p)), None)

    def as_json(self, target: Target | None) -> dict[str, Any]:
        """All fields and derived figures."""
        fields = dataclasses.asdict(self)
        for layer, values in zip(self.layers, fields["layers"], strict=True):
            values["growth"] = layer.growth
        reached = None if target is None else self.first_at(target)
        return {
            **fields,
            "ratio_fp32": self.ratio_fp32,
            "ratio_bf16": self.ratio_bf16,
            "final": {metric: self.last(metric) for metric in self.metrics},
            "to_target": None if reached is None else dataclasses.asdict(reached),
        }


@dataclass(frozen=True)
class Target:
    """A value of a metric to be reached."""

    metric: str
    value: float
    lower_is_better: bool

    def __str__(self) -> str:
        return f"{self.metric} {'≤' if self.lower_is_better else '≥'} {self.value:g}"

    def is_reached(self, point: Point) -> bool:
        value = point.values.get(self.metric)
        if value is None:
            return False
        return value <= self.value if self.lower_is_better else value >= self.value


def target_of(text: str, runs: list[Run]) -> Target:
    """`loss=2.0`. Less is better for a loss, perplexity or error, and for what fell in most runs.

    InvalidArgument for what is not NAME=NUMBER and for a metric that no run logged.
    """
    metric, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        raise InvalidArgument(
            f"--target: expected NAME=NUMBER, got {text!r}\nhint: --target loss=2.0"
        ) from None
    logged = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if metric not in logged:
        raise InvalidArgument(
            f"--target: expected a metric that was logged ({', '.join(logged) or 'none was'}), got "
            f"{metric!r}\nhint: reducer.log({metric or 'loss'}=...) in the training script"
        )
    curves = [curve for run in runs if (curve := run.curve(metric))]
    falls = sum(curve[-1].values[metric] < curve[0].values[metric] for curve in curves)
    named = any(word in metric.lower() for word in _LOWER_IS_BETTER)
    return Target(metric, value, named or 2 * falls > len(curves))


def reached_by_all(runs: list[Run], by: By) -> float:
    """The largest step, second or MB at which every run that logged a metric has one."""
    return min(
        (max(p.at(by) for p in run.points if p.values) for run in runs if run.metrics), default=0.0
    )


def straggler(run: Run) -> RankFigures | None:
    """The rank that waited less than half as long as the others, where those waited for a
    noticeable share of the run: they may be waiting for it."""
    waits = [rank.wait_seconds for rank in run.ranks if rank.wait_seconds is not None]
    if len(waits) < max(2, len(run.ranks)):
        return None
    least, *others = sorted(waits)
    usual = median(others)
    if usual < _WAIT_SHARE * run.seconds or 2 * least >= usual:
        return None
    return next(rank for rank in run.ranks if rank.wait_seconds == least)


def gather(files: list[Path]) -> tuple[list[Run], list[str]]:
    """The runs of all files, each with a name of its own, and what was left out of which file."""
    runs: list[Run] = []
    left_out: list[str] = []
    for file in files:
        attempts, reasons = read(file)
        runs += _runs_of(file, attempts)
        left_out += [f"{file}: {reason}" for reason in reasons]
    _name(runs)
    return runs, left_out


def _runs_of(file: Path, attempts: list[Attempt]) -> list[Run]:
    """A model's n-th run is made of the n-th one of each rank."""
    runs = []
    for model in dict.fromkeys(attempt.model for attempt in attempts):
        by_rank = {
            rank: _joined([a for a in attempts if (a.rank, a.model) == (rank, model)])
            for rank in sorted({a.rank for a in attempts if a.model == model})
        }
        for n in range(max(map(len, by_rank.values()))):
            runs.append(_run(file, [own[n] for own in by_rank.values() if n < len(own)]))
    return runs


def _joined(attempts: list[Attempt]) -> list[list[Attempt]]:
    """Attempts of one rank and model as runs: one that resumed goes on with the run before it."""
    runs: list[list[Attempt]] = []
    for attempt in attempts:
        before = runs[-1][-1] if runs else None
        if attempt.resumed and before and _goes_on(before, attempt):
            runs[-1].append(attempt)
        else:
            runs.append([attempt])
    return runs


def _goes_on(before: Attempt, attempt: Attempt) -> bool:
    """By the policy that the one before began or ended with."""
    began = {attempt.start.policy, *(plan.policy for plan in attempt.plans)}
    return before.start.policy == attempt.start.policy or before.last_policy in began


def _run(file: Path, ranks: list[list[Attempt]]) -> Run:
    """ranks: each rank's attempts, ascending. The lowest one that logged a value is shown."""
    shown = next(
        (own for own in ranks if any(m.values for a in own for m in a.metrics)),
        ranks[0],
    )
    last, counts = shown[-1], _total(shown)
    return Run(
        name="",
        file=str(file),
        model=last.model,
        policy=last.policy,
        torch=last.start.torch,
        world_size=last.start.world_size,
        attempts=len(shown),
        ended=last.end is not None,
        rank=last.rank,
        steps=counts.steps,
        skipped_steps=counts.skipped_steps,
        seconds=counts.seconds,
        megabytes=counts.wire_bytes / MB,
        dense_megabytes=counts.dense_wire_bytes / MB,
        points=_points(shown),
        not_finite=_not_finite(shown),
        layers=_layers(shown),
        ranks=[_rank(own) for own in ranks],
    )


def _total(attempts: Iterable[Attempt]) -> Counts:
    rows = [dataclasses.astuple(attempt.counts) for attempt in attempts]
    return Counts(*map(sum, zip(*rows, strict=True))) if rows else Counts(0, 0, 0, 0, 0.0)


def _points(attempts: list[Attempt]) -> list[Point]:
    points: list[Point] = []
    for n, attempt in enumerate(attempts):
        before = _total(attempts[:n])
        if attempt.metrics:
            points = [p for p in points if p.step < attempt.metrics[0].step]
        points += [
            Point(
                line.step,
                before.seconds + line.counts.seconds,
                (before.wire_bytes + line.counts.wire_bytes) / MB,
                {name: value for name, value in line.values.items() if value is not None},
            )
            for line in attempt.metrics
        ]
    return points


def _not_finite(attempts: list[Attempt]) -> dict[str, int]:
    """Lines in which a metric was NaN or Inf, where any was."""
    counts: dict[str, int] = {}
    for attempt in attempts:
        for line in attempt.metrics:
            for name, value in line.values.items():
                if value is None:
                    counts[name] = counts.get(name, 0) + 1
    return counts


def _layers(attempts: list[Attempt]) -> list[LayerFigures]:
    """Of the last attempt's layer table; norms also of those before that began with the same."""
    last = attempts[-1]
    lines: list[Layers] = []
    for attempt in attempts:
        if attempt.start.layers != last.start.layers:
            continue
        if attempt.layers:
            lines = [line for line in lines if line.step < attempt.layers[0].step]
        lines += attempt.layers
    if last.plans:  # other codecs, other norms and figures
        lines = [line for line in lines if line.step > last.plans[-1].step]
    return layer_figures(last.layer_table, lines, ended=last.end is not None)


def layer_figures(
    table: Sequence[Layer], lines: Sequence[Layers], *, ended: bool
) -> list[LayerFigures]:
    """The table's layers with the latest figures: its own where it is that of the line ``end``,
    else those of the last line ``layers`` about them."""
    figures = lines[-1].figures if lines and not ended else None
    return [
        LayerFigures(
            layer.name,
            layer.elements,
            layer.codec,
            layer.reason,
            layer.ratio if figures is None else figures.ratio[i],
            layer.slot_bytes if figures is None else figures.slot_bytes[i],
            [line.step for line in lines],
            [line.residual_norm[i] for line in lines],
        )
        for i, layer in enumerate(table)
    ]


def _rank(attempts: list[Attempt]) -> RankFigures:
    counts = _total(attempts)
    ends = [attempt.end for attempt in attempts if attempt.end is not None]
    known = len(ends) == len(attempts)
    return RankFigures(
        attempts[-1].rank,
        counts.steps,
        counts.wire_bytes / MB,
        sum(end.work.encode_seconds for end in ends) if known else None,
        sum(end.work.decode_seconds for end in ends) if known else None,
        sum(end.work.wait_seconds for end in ends) if known else None,
    )


def _name(runs: list[Run]) -> None:
    """By policy where several runs have one each, else by file; numbered where that is not
    enough."""
    policies = {run.policy for run in runs}
    stems = {Path(run.file).stem for run in runs}
    files = {run.file for run in runs}
    for run in runs:
        if 1 < len(runs) == len(policies):
            run.name = run.policy
        else:
            run.name = Path(run.file).stem if len(stems) == len(files) else run.file
    for name in {run.name for run in runs}:
        alike = [run for run in runs if run.name == name]
        models = len({run.model for run in alike})
        for n, run in enumerate(alike, 1):
            if models == len(alike) > 1:
                run.name = f"{name} model {run.model}"
            elif len(alike) > 1:
                run.name = f"{name} #{n}"
