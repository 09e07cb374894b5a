"""What `thinwire top` shows: a few lines on the job's health, a table of layers, the last decisions
of the policy auto."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from thinwire.report.runs import LayerFigures
from thinwire.report.tables import add_row, figure, plural, ratio_text, table_of
from thinwire.top.column import Column
from thinwire.top.job import Job, Model, error_of, residual_of

_HELP = """\
s  sort by the next column       r  reverse the order
m  the next model                q  leave (also Ctrl-C)
?  this help
residual: L2 norm of what error feedback keeps; rms: the same an element, to compare layers. Both
come with reducer.log(). Yellow: it keeps growing.
"""
_KEYS = "s sort  r reverse  m model  ? help  q quit"
# Above and below the table's rows.
_OTHER_LINES = 6


_VALUES: dict[Column, Callable[[LayerFigures], Any]] = {
    Column.LAYER: lambda layer: layer.name,
    Column.CODEC: lambda layer: layer.codec,
    Column.ELEMENTS: lambda layer: layer.elements,
    Column.RATIO: lambda layer: layer.ratio,
    Column.BYTES: lambda layer: layer.slot_bytes,
    Column.RESIDUAL: residual_of,
    Column.RMS: error_of,
}
_TEXTS = (Column.LAYER, Column.CODEC)


def in_order(layers: list[LayerFigures], column: Column, reverse: bool) -> list[LayerFigures]:
    """Texts ascending, numbers descending, or the other way round; those without a value last."""
    value = _VALUES[column]
    known = [layer for layer in layers if value(layer) is not None]
    rest = [layer for layer in layers if value(layer) is None]
    return sorted(known, key=value, reverse=(column not in _TEXTS) != reverse) + rest


@dataclass
class Screen:
    """What is shown how; ``press`` changes it. rate: bytes a second of a host's link."""

    name: str
    sort: Column = Column.ELEMENTS
    reverse: bool = False
    rate: float | None = None
    help: bool = False
    _number: int = field(default=0, init=False)

    def press(self, key: str) -> bool:
        """False: the user leaves."""
        match key:
            case "q" | "Q":
                return False
            case "s":
                columns = list(Column)
                self.sort = columns[(columns.index(self.sort) + 1) % len(columns)]
            case "r":
                self.reverse = not self.reverse
            case "m":
                self._number += 1
            case "?":
                self.help = not self.help
        return True

    def model(self, job: Job) -> Model | None:
        """The one that wrote last, or the next ones after it."""
        if not job.models:
            return None
        models = list(job.models.values())
        latest = max(range(len(models)), key=lambda n: models[n].latest)
        return models[(latest + self._number) % len(models)]

    def live(self, job: Job, age: float, height: int) -> RenderableType:
        """As much as fits into so many lines."""
        model = self.model(job)
        if model is None:
            said = job.left_out or [f"{self.name}: waits for the job's first line"]
            return Text("\n".join([*said, "", _KEYS]))
        parts = [*self.health(job, model, age)]
        if self.help:
            parts += ["", *_HELP.splitlines()]
        decisions = self._decisions(model)
        room = height - _OTHER_LINES - len(parts) - len(decisions)
        return Group(
            Text("\n".join(parts), no_wrap=True, overflow="ellipsis"),
            self._table(model, max(1, room)),
            Text("\n".join([*decisions, _KEYS]), style="dim", no_wrap=True, overflow="ellipsis"),
        )

    def snapshot(self, job: Job, model: Model, age: float, console: Console) -> None:
        """All of it, once."""
        for line in self.health(job, model, age):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(self._table(model, len(model.layers)))
        for line in self._decisions(model):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def health(self, job: Job, model: Model, age: float) -> list[str]:
        counts, rates = model.counts, model.rates
        lines = [
            f"# {self.name}: policy {model.shown.policy}, {len(model.ranks)} of "
            f"{plural(model.world_size, 'rank')}, step {model.step:,}"
            + (f", model {model.label} of {len(job.models)}" if len(job.models) > 1 else ""),
            self._state(model, age) + f"; {plural(counts.skipped_steps, 'step')} skipped",
            "no rates yet: they take two lines with counts" if rates is None else "",
        ]
        if rates is not None:
            step = f", {1e3 / rates.steps:.4g} ms a step" if rates.steps else ""
            shares = [
                f"{name} {share:.0%}"
                for name, share in (
                    ("encode", rates.encode),
                    ("decode", rates.decode),
                    ("wait for the wire", rates.wait),
                )
                if share is not None
            ]
            lines[-1] = "; ".join([f"{figure(rates.steps)} steps/s{step}", *shares])
            sent = f"{figure(rates.megabytes)} MB/s a rank"
            if rates.steps:
                sent += f", {figure(rates.megabytes / rates.steps)} MB a step"
            if self.rate is not None:
                sent += f", {1e6 * rates.megabytes / self.rate:.0%} of the link"
            lines.append(sent)
        if model.ratio is not None:
            fp32, bf16 = ratio_text(model.ratio), ratio_text(model.ratio / 2)
            lines[-1] += f"; {fp32} less than fp32, {bf16} less than bf16"
        values = [
            f"{name} {'NaN' if value is None else f'{value:.4g}'}"
            for name, value in model.shown.values.items()
        ]
        return lines + ([", ".join(values)] if values else []) + job.left_out

    def _state(self, model: Model, age: float) -> str:
        ended, size = model.ended, model.world_size
        if ended >= size:
            return f"ended after {model.counts.seconds:.1f} s"
        some = f"; {ended} of {size} ranks have ended" if ended else ""
        if age > model.patience:
            return (
                f"silent for {age:.0f} s: stopped, killed, or in a step that takes that long{some}"
            )
        return f"alive, last line {max(age, 0):.1f} s ago{some}"

    def _table(self, model: Model, rows: int) -> RenderableType:
        layers = in_order(model.layers, self.sort, self.reverse)
        names = [
            f"{column} {'↑' if (column in _TEXTS) != self.reverse else '↓'}"
            if column == self.sort
            else str(column)
            for column in Column
        ]
        table = table_of("", names, texts=2)
        for layer in layers[:rows]:
            residual, rms = residual_of(layer), error_of(layer)
            add_row(
                table,
                layer.name,
                layer.codec,
                f"{layer.elements:,}",
                ratio_text(layer.ratio),
                "-" if layer.slot_bytes is None else f"{layer.slot_bytes:,}",
                "-" if residual is None else figure(residual),
                "-" if rms is None else f"{rms:.2e}",
                style="yellow" if layer.growth else None,
            )
        if len(layers) <= rows:
            return table
        return Group(table, Text(f" {plural(len(layers) - rows, 'more layer')}", style="italic"))

    def _decisions(self, model: Model) -> list[str]:
        return [f"step {step}: {text}" for step, text in model.shown.decisions]

    def as_json(self, job: Job, model: Model, age: float) -> dict[str, Any]:
        """The figures of a snapshot."""
        rates = model.rates
        return {
            "file": self.name,
            "model": model.label,
            "policy": model.shown.policy,
            "world_size": model.world_size,
            "ranks": sorted(model.ranks),
            "ended_ranks": model.ended,
            "silent": model.ended < model.world_size and age > model.patience,
            "last_line_seconds_ago": age,
            "step": model.step,
            "steps": model.counts.steps,
            "skipped_steps": model.counts.skipped_steps,
            "steps_per_second": None if rates is None else rates.steps,
            "megabytes_per_second": None if rates is None else rates.megabytes,
            "encode_share": None if rates is None else rates.encode,
            "decode_share": None if rates is None else rates.decode,
            "wait_share": None if rates is None else rates.wait,
            "ratio": model.ratio,
            "ratio_bf16": None if model.ratio is None else model.ratio / 2,
            "metrics": model.shown.values,
            "layers": [
                {str(column): value(layer) for column, value in _VALUES.items()}
                for layer in in_order(model.layers, self.sort, self.reverse)
            ],
            "decisions": [{"step": step, "text": text} for step, text in model.shown.decisions],
            "left_out": job.left_out,
        }
