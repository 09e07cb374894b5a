"""The report's pictures. A run has one colour in all of them. Imports matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from thinwire.report.runs import By, Run, Target

# Okabe-Ito: told apart with every common colour blindness.
_COLOURS = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999"]
_LINES = ["-", "--", ":"]
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
}
_AXES = {By.STEP: "steps", By.SECONDS: "seconds", By.BYTES: "MB sent by one rank"}
_METRICS_DRAWN = 6
_LAYERS_DRAWN = 12
_WIDE = 10.0


def metrics(runs: list[Run], target: Target | None, file: Path) -> bool:
    """Each metric against steps, seconds and MB; False, and no file, where there is none."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))[:_METRICS_DRAWN]
    if not names:
        return False
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 3.6 * len(names) + 0.6), layout="constrained")
        grid = figure.subplots(len(names), 3, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            for axes, by in zip(row, By, strict=True):
                _curves(axes, runs, name, by)
                if target is not None and target.metric == name:
                    axes.axhline(target.value, color="#999999", linestyle="--", linewidth=1.2)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(file, dpi=110)
    return True


def layers(runs: list[Run], file: Path) -> bool:
    """Residual norms over steps and ratios, a row a run; False, and no file, where none has any."""
    shown = [run for run in runs if any(not layer.dense for layer in run.layers)]
    if not shown:
        return False
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 4.4 * len(shown)), layout="constrained")
        grid = figure.subplots(len(shown), 2, squeeze=False)
        for row, run in zip(grid, shown, strict=True):
            largest = sorted(run.layers, key=lambda layer: (layer.dense, -layer.elements))
            drawn = [layer for layer in largest if not layer.dense][:_LAYERS_DRAWN]
            style = {
                layer.name: (_COLOURS[n % len(_COLOURS)], _LINES[n // len(_COLOURS) % len(_LINES)])
                for n, layer in enumerate(drawn)
            }
            for layer in drawn:
                colour, line = style[layer.name]
                points = [
                    (step, norm)
                    for step, norm in zip(layer.steps, layer.norms, strict=True)
                    if norm is not None
                ]
                if points:
                    row[0].plot(
                        *zip(*points, strict=True),
                        color=colour,
                        linestyle=line,
                        marker="o" if len(points) == 1 else None,
                    )
            if not any(layer.finite_norms for layer in drawn):
                row[0].text(0.5, 0.5, "none logged", transform=row[0].transAxes, ha="center")
            row[0].set_xlabel("steps")
            row[0].set_ylabel("L2 norm of the residual")
            row[0].set_ylim(bottom=0)
            row[0].set_title(f"{_literal(run.name)}: residuals of rank {run.rank}")
            _bars(row[1], run, [(layer.name, layer.ratio) for layer in drawn], style)
        figure.savefig(file, dpi=110)
    return True


def _curves(axes: Axes, runs: list[Run], metric: str, by: By) -> None:
    widest = []
    for n, run in enumerate(runs):
        curve = run.curve(metric)
        xs = [point.at(by) for point in curve]
        axes.plot(
            xs,
            [point.values[metric] for point in curve],
            color=_COLOURS[n % len(_COLOURS)],
            linestyle=_LINES[n // len(_COLOURS) % len(_LINES)],
            linewidth=1.8,
            marker="o" if len(curve) < 30 else None,
            markersize=3.5,
            label=_literal(run.name),
        )
        widest += xs[-1:]
    if by is By.BYTES and widest and min(widest) > 0 and max(widest) > _WIDE * min(widest):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    else:
        axes.set_xlim(left=0)
    axes.set_xlabel(_AXES[by])
    axes.set_ylabel(_literal(metric))


def _bars(
    axes: Axes,
    run: Run,
    ratios: list[tuple[str, float | None]],
    style: dict[str, tuple[str, str]],
) -> None:
    """Ratio by layer, which also tells what colour each layer's residual has."""
    for n, (name, ratio) in enumerate(ratios):
        axes.barh(n, ratio or 0.0, color=style[name][0], linestyle=style[name][1])
        text = "not known yet" if ratio is None else f"{ratio:.3g}x"
        axes.text(ratio or 0.0, n, f" {text}", va="center")
    axes.set_yticks(range(len(ratios)), [_literal(name) for name, _ in ratios])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
    axes.set_xlabel("fp32 bytes ÷ slot bytes")
    axes.set_title(f"{_literal(run.name)}: ratio by layer")


def _literal(name: str) -> str:
    """matplotlib reads formulas between dollar signs, and leaves out labels that start with _."""
    shown = name.replace("$", r"\$")
    return shown if not shown.startswith("_") else f" {shown}"
