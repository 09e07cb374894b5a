"""The demo's pictures. Each method has one colour in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from examples.demo.records import (
    RatePoint,
    RunRecord,
    crossing,
    groups,
    link_bits,
    link_text,
)

# Okabe-Ito: told apart with every common colour blindness; warm for thinwire, cool and grey for
# the others.
_FIXED = {
    "bound": "#999999",
    "ddp": "#bbbbbb",
    "none": "#222222",
    "fp16": "#56b4e9",
    "powersgd": "#0072b2",
}
_OURS = ["#d55e00", "#e69f00", "#cc79a7", "#009e73", "#f0e442"]
STYLE: Any = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlesize": 12,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}


def colours(methods: list[str]) -> dict[str, str]:
    """A colour a method; thinwire's in order of first appearance."""
    given: dict[str, str] = {}
    for method in methods:
        family = method.split(":")[0]
        ours = sum(m.startswith("thinwire") for m in given)
        if method not in given:
            given[method] = _FIXED.get(family, _OURS[ours % len(_OURS)])
    return given


def overview(records: list[RunRecord], file: Path) -> None:
    """One row a task: step time on every link, the metric over time and over bytes on the slowest
    link."""
    ran = [r for r in records if not r.failed]
    with plt.rc_context(STYLE):
        rows = groups(ran, "task")
        figure, axes = plt.subplots(
            len(rows), 3, figsize=(14, 4.3 * len(rows) + 0.7), squeeze=False, layout="constrained"
        )
        colour = colours([r.method for r in records])
        for row, task in zip(axes, rows, strict=True):
            slowest = groups(task, "link")[-1]
            _bars(row[0], task, colour)
            _curves(row[1], slowest, colour, over_bytes=False)
            _curves(row[2], slowest, colour, over_bytes=True)
        _legend(figure, records, colour)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def curves(records: list[RunRecord], file: Path) -> None:
    """One row a task and link: the metric over time and over bytes."""
    ran = [r for r in records if not r.failed]
    with plt.rc_context(STYLE):
        rows = groups(ran, "task", "link")
        figure, axes = plt.subplots(
            len(rows), 2, figsize=(12, 3.9 * len(rows) + 0.7), squeeze=False, layout="constrained"
        )
        colour = colours([r.method for r in records])
        for row, group in zip(axes, rows, strict=True):
            _curves(row[0], group, colour, over_bytes=False)
            _curves(row[1], group, colour, over_bytes=True)
        _legend(figure, records, colour)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _legend(figure: Figure, records: list[RunRecord], colour: dict[str, str]) -> None:
    names = {r.method: r.label for r in records if not r.failed}
    handles = [
        Line2D([], [], color=colour[m], linewidth=5, label=name) for m, name in names.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)


def _bars(axes: Axes, task: list[RunRecord], colour: dict[str, str]) -> None:
    """Horizontal bars of step ÷ bound on a log axis, a block of bars a link."""
    title = task[0].task_title
    position, ticks, names = 0.0, [], []
    task = [r for r in task if r.bound_ms]
    highest = max((r.over_bound for r in task), default=1.0)
    for link in groups(task, "link"):
        for record in link:
            axes.barh(
                position,
                record.over_bound - 1.0,
                left=1.0,
                height=0.82,
                color=colour[record.method],
            )
            text = (
                f"{record.over_bound:.2f}x"
                if record.over_bound < 10
                else f"{record.over_bound:.0f}x"
            )
            axes.text(
                max(record.over_bound, 1.0) * 1.04,
                position,
                f"{text}  {record.step_ms:,.0f} ms",
                va="center",
            )
            position += 1.0
        ticks.append(position - len(link) / 2 - 0.5)
        names.append(link_text(link[0].link))
        position += 0.8
    axes.set_xscale("log")
    axes.set_xlim(0.97, max(2.0, highest) ** 1.75)
    axes.xaxis.set_major_locator(
        FixedLocator([t for t in (1, 2, 5, 10, 20, 50, 100, 200) if t <= highest * 1.6])
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_yticks(ticks, names, rotation=90, va="center")
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.axvline(1.0, color="#999999", linestyle="--", linewidth=1.2)
    axes.set_xlabel("step time ÷ bound step (1 = free communication)")
    axes.set_title(f"{title}: step time")


def _curves(
    axes: Axes, group: list[RunRecord], colour: dict[str, str], *, over_bytes: bool
) -> None:
    first = group[0]
    for record in group:
        shown = [p for p in record.curve if not over_bytes or p.megabytes > 0]
        x = [p.megabytes if over_bytes else p.seconds for p in shown]
        ours = record.method.startswith("thinwire")
        axes.plot(
            x,
            [p.value for p in shown],
            color=colour[record.method],
            linewidth=2.4 if ours else 1.8,
            marker="o",
            markersize=3.5,
            zorder=3 if ours else 2,
        )
    axes.axhline(first.target, color="#999999", linestyle="--", linewidth=1.2)
    axes.set_title(first.where)
    axes.set_ylabel(
        f"held-out {first.metric}{' (%)' if first.unit == '%' else ' (lower is better)'}"
    )
    if over_bytes:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlabel("MB sent by each host")
    else:
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds of training")
    if not first.higher_is_better:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([5, 10, 15, 20, 30, 40, 60, 100]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    else:
        values = [p.value for r in group for p in r.curve]
        axes.set_ylim(max(0.0, min(values) - 4), 100 if first.unit == "%" else None)


def bandwidth(points: list[RatePoint], file: Path) -> None:
    """Step time against link bandwidth, a column a task: every method, the bound, the crossing of
    plain DDP with the fastest compressed method of thinwire."""
    with plt.rc_context(STYLE):
        tasks = groups([p for p in points if link_bits(p.link)], "task_title")
        if not tasks:
            raise ValueError("no point has a link speed to plot against")
        figure, axes = plt.subplots(
            1, len(tasks), figsize=(7.5 * len(tasks), 5.6), squeeze=False, layout="constrained"
        )
        colour = colours([p.method for p in points])
        for ax, task in zip(axes[0], tasks, strict=True):
            _bandwidth(ax, task, colour)
        names = {p.method: p.label for p in points}
        handles = [Line2D([], [], color=colour[m], linewidth=4, label=n) for m, n in names.items()]
        handles.append(Line2D([], [], color=_FIXED["bound"], linestyle="--", label="bound"))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(file, dpi=110)
        plt.close(figure)


def _bandwidth(axes: Axes, task: list[RatePoint], colour: dict[str, str]) -> None:
    lines: dict[str, list[RatePoint]] = {}
    for group in groups(task, "method"):
        lines[group[0].method] = sorted(group, key=lambda p: link_bits(p.link) or 0.0)
    for method, line in lines.items():
        x = [link_bits(p.link) or 0.0 for p in line]
        ours = method.startswith("thinwire")
        axes.fill_between(
            x,
            [p.low_ms for p in line],
            [p.high_ms for p in line],
            color=colour[method],
            alpha=0.15,
            linewidth=0,
        )
        axes.plot(
            x,
            [p.ms for p in line],
            color=colour[method],
            marker="o",
            markersize=4.5,
            linewidth=2.6 if ours else 1.9,
            zorder=3 if ours else 2,
        )
    bounds = sorted({(link_bits(p.link) or 0.0, p.bound_ms) for p in task})
    by_rate = {x: [b for other, b in bounds if other == x] for x, _ in bounds}
    axes.plot(
        list(by_rate),
        [sum(values) / len(values) for values in by_rate.values()],
        color=_FIXED["bound"],
        linestyle="--",
        linewidth=1.6,
    )
    _mark_crossing(axes, lines)
    rates = sorted({p.link for p in task}, key=lambda link: link_bits(link) or 0.0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator([link_bits(rate) or 0.0 for rate in rates]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([link_text(rate) for rate in rates])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("link bandwidth of each host")
    axes.set_ylabel("step time (ms)")
    axes.set_title(task[0].workload, fontsize=10)


def _mark_crossing(axes: Axes, lines: dict[str, list[RatePoint]]) -> None:
    """Where the fastest thinwire method at the slowest link stops being faster than plain DDP."""
    plain = lines.get("none")
    ours = [line for method, line in lines.items() if method.startswith("thinwire")]
    if plain is None or not ours:
        return
    best = min(ours, key=lambda line: line[0].ms)
    shared = [(a, b) for a in plain for b in best if a.link == b.link]
    xs = [link_bits(a.link) or 0.0 for a, _ in shared]
    met = crossing(xs, [a.ms for a, _ in shared], [b.ms for _, b in shared])
    if met is not None:
        axes.plot(*met, marker="o", markersize=13, fillstyle="none", color="#222222", zorder=4)
        axes.annotate(
            f"plain DDP and {best[0].label}\nequally fast at {met[0] / 1e9:.2g} Gbit/s",
            met,
            xytext=(0.98, 0.97),
            textcoords="axes fraction",
            ha="right",
            va="top",
            arrowprops={"arrowstyle": "-", "color": "#222222", "shrinkB": 7},
        )
        return
    faster = all(b.ms < a.ms for a, b in shared)
    text = (
        f"{best[0].label}:\n{'faster' if faster else 'slower'} than plain DDP on every link shown"
    )
    axes.text(0.98, 0.97, text, transform=axes.transAxes, ha="right", va="top", style="italic")
