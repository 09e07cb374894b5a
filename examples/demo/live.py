"""What the demo shows while it runs, on stderr: a live display on a terminal, plain lines
elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from examples.demo import report
from examples.demo.pool import Progress as Step
from examples.demo.records import MB, RunRecord, link_text

_PLAIN_EVERY_S = 5.0


@dataclass(frozen=True)
class Current:
    """The run that is going on."""

    task: str
    link: str
    label: str
    seconds: float

    @property
    def where(self) -> str:
        return f"{self.task} at {link_text(self.link)}"


class Screen(ABC):
    """Told by the runner what happens."""

    @abstractmethod
    def say(self, text: str) -> None:
        """A remark that is not about a step."""

    @abstractmethod
    def begin(self, run: Current) -> None:
        """A run starts."""

    @abstractmethod
    def progress(self, step: Step) -> None:
        """A step of the present run, some twice a second."""

    @abstractmethod
    def evaluated(self, value: str) -> None:
        """The present run's metric, as text."""

    @abstractmethod
    def end(self, record: RunRecord | None = None) -> None:
        """The present run is over."""

    @abstractmethod
    def close(self) -> None:
        """No more is to be shown."""


def summary(record: RunRecord) -> str:
    """One line on a run that is over."""
    where = f"{record.where}, {record.label}"
    if record.failed:
        return f"{where}: FAILED: {record.failed}"
    same = "" if record.replicas_identical else ", REPLICAS DIFFER"
    return (
        f"{where}: {record.step_ms:.0f} ms a step, {record.wire_mb_step:.3g} MB a step, "
        f"{record.metric} {report.metric_text(record, record.value)} "
        f"after {record.steps} steps{same}"
    )


class PlainScreen(Screen):
    """A line every five seconds and one a run: for logs and pipes."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._done = console, runs, 0
        self._run: Current | None = None
        self._last = 0.0
        self._value = ""

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, run: Current) -> None:
        self._run, self._value, self._last = run, "", time.monotonic()

    def progress(self, step: Step) -> None:
        if self._run is None or time.monotonic() - self._last < _PLAIN_EVERY_S:
            return
        self._last = time.monotonic()
        left = max(0.0, self._run.seconds - step.seconds)
        value = f", held-out {self._value}" if self._value else ""
        self.say(
            f"  {self._run.where}, {self._run.label}: step {step.step}, "
            f"loss {step.loss:.3f}{value}, {step.bytes / MB:.1f} MB sent, {left:.0f} s left"
        )

    def evaluated(self, value: str) -> None:
        self._value = value

    def close(self) -> None:
        self._run = None

    def end(self, record: RunRecord | None = None) -> None:
        self._run = None
        if record is not None:
            self._done += 1
            self.say(f"[{self._done}/{self._runs}] {summary(record)}")


class LiveScreen(Screen):
    """A bar over all runs and one for the present run; what has ended scrolls by above them."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console, self._runs, self._done = console, runs, 0
        self._all = Progress(
            TextColumn("[bold]all runs"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._all_task = self._all.add_task("all", total=runs)
        self._one = Progress(
            TextColumn("[bold]this run"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[left]:.0f} s left"),
            console=console,
        )
        self._one_task = self._one.add_task("one", total=1.0, left=0.0)
        self._run: Current | None = None
        self._step: Step | None = None
        self._value = "-"
        self._live = Live(
            console=console,
            # Drawing takes processor time from the runs.
            refresh_per_second=2,
            get_renderable=self._render,
            transient=True,
        )
        self._live.start()

    def _render(self) -> Group:
        facts = Table.grid(padding=(0, 2))
        if self._run is not None:
            facts.add_row("task", Text(f"{self._run.where}", style="bold"))
            facts.add_row("method", Text(self._run.label, style="bold cyan"))
            if self._step is None:
                facts.add_row("state", "warming up")
            else:
                loss, sent = f"loss {self._step.loss:.3f}", f"{self._step.bytes / MB:.1f} MB sent"
                facts.add_row(
                    "step",
                    f"{self._step.step}   {loss}   {sent}   held-out {self._value}",
                )
        return Group(facts, self._one, self._all)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def begin(self, run: Current) -> None:
        self._run, self._step, self._value = run, None, "-"
        self._one.update(self._one_task, completed=0.0, total=run.seconds, left=run.seconds)

    def progress(self, step: Step) -> None:
        self._step = step
        if self._run is not None:
            left = max(0.0, self._run.seconds - step.seconds)
            self._one.update(
                self._one_task, completed=min(step.seconds, self._run.seconds), left=left
            )

    def evaluated(self, value: str) -> None:
        self._value = value

    def end(self, record: RunRecord | None = None) -> None:
        self._run = None
        if record is not None:
            self._done += 1
            self._all.update(self._all_task, completed=self._done)
            style = "red" if record.failed or not record.replicas_identical else None
            self._console.print(summary(record), markup=False, highlight=False, style=style)

    def close(self) -> None:
        self._live.stop()


def screen_for(console: Console, runs: int) -> Screen:
    """Live on a terminal, plain lines elsewhere."""
    return LiveScreen(console, runs) if console.is_terminal else PlainScreen(console, runs)
