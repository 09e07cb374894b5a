"""The report's tables and sentences on a rich console."""

from __future__ import annotations

import os

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from thinwire.report.runs import (
    By,
    LayerFigures,
    RankFigures,
    Run,
    Target,
    reached_by_all,
    straggler,
)

_METRICS_SHOWN = 4
_LAYERS_SHOWN = 30
_RANKS_SHOWN = 32
_UNITS = {By.STEP: "step {:.0f}", By.SECONDS: "{:.1f} s", By.BYTES: "{:.4g} MB"}


def console(*, stderr: bool = False) -> Console:
    """As wide as the terminal; 100 columns where there is none. Rich itself honours NO_COLOR."""
    made = Console(stderr=stderr)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 100
    return made


def say(where: Console, text: str) -> None:
    """One line as it is: no markup, no colour, not folded."""
    where.print(text, markup=False, highlight=False, soft_wrap=True)


def show(where: Console, runs: list[Run], target: Target | None, by: By | None) -> None:
    """Everything that is known of the runs."""
    for run in runs:
        say(where, _header(run))
    where.print()
    _show_runs(where, runs, target, by)
    for sentence in _remarks(runs, target):
        say(where, sentence)
    for run in runs:
        where.print()
        _show_layers(where, run)
    for run in runs:
        if len(run.ranks) > 1:
            where.print()
            _show_ranks(where, run)
    where.print()


def _header(run: Run) -> str:
    ranks = plural(run.world_size, "rank")
    attempts = f", {run.attempts} attempts" if run.attempts > 1 else ""
    return f"# {run.name}: {run.file}, policy {run.policy}, {ranks}, torch {run.torch}{attempts}"


def table_of(title: str, names: list[str], texts: int = 1) -> Table:
    """A table whose first `texts` columns hold text and fold; the others hold figures."""
    made = Table(
        title=title,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for n, name in enumerate(names):
        if n < texts:
            made.add_column(Text(name), overflow="fold")
        else:
            made.add_column(Text(name), justify="right", no_wrap=True)
    return made


def _print(where: Console, table: Table, caption: str) -> None:
    where.print(table)
    if caption:
        where.print(Text(f" {caption}", style="italic"))


def add_row(table: Table, *cells: str, style: str | None = None) -> None:
    """A row of plain text: names of layers and policies are no markup."""
    table.add_row(*map(Text, cells), style=style)


def _show_runs(where: Console, runs: list[Run], target: Target | None, by: By | None) -> None:
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    shown = metrics[:_METRICS_SHOWN]
    caption = ["MB: sent by one rank; ÷ fp32, ÷ bf16: bytes of a plain ring allreduce over those"]
    limit = None
    if by is not None and metrics:
        limit = reached_by_all(runs, by)
        caption.append(f"metrics at {_UNITS[by].format(limit)}, which all runs reached")
    if len(metrics) > len(shown):
        caption.append(f"more metrics in --json: {', '.join(metrics[_METRICS_SHOWN:])}")
    names = ["run", *shown, "steps", "seconds", "MB", "÷\nfp32", "÷\nbf16", "skipped\nsteps"]
    if target is not None:
        names += ["target\ns", "target\nMB"]
        caption.append(f"target: {target}")
    table = table_of("Runs", names)
    for run in runs:
        values = [run.last(metric, by or By.STEP, limit) for metric in shown]
        cells = [
            run.name,
            *("-" if value is None else f"{value:.4g}" for value in values),
            f"{run.steps}",
            f"{run.seconds:.1f}",
            figure(run.megabytes),
            ratio_text(run.ratio_fp32),
            ratio_text(run.ratio_bf16),
            f"{run.skipped_steps}",
        ]
        if target is not None:
            point = run.first_at(target)
            cells += (
                ["-", "-"] if point is None else [f"{point.seconds:.1f}", figure(point.megabytes)]
            )
        add_row(table, *cells)
    _print(where, table, "; ".join(caption))


def _remarks(runs: list[Run], target: Target | None) -> list[str]:
    remarks = []
    for run in runs:
        if not run.metrics:
            remarks.append(
                f"{run.name}: no metrics; reducer.log(loss=loss.item()) in the training script "
                "logs them"
            )
        for metric, lines in run.not_finite.items():
            remarks.append(f"{run.name}: {metric} was NaN or Inf in {plural(lines, 'line')}")
        if not run.ended:
            remarks.append(
                f"{run.name}: rank {run.rank} has no end line: the run goes on or was killed; "
                "totals are those of its last line"
            )
        for layer in run.layers:
            if layer.growth is not None:
                remarks.append(
                    f"{run.name}: the residual of {layer.name} keeps growing, "
                    f"{layer.growth:.2f} times in the last quarter of the run"
                )
        slow = straggler(run)
        if slow is not None:
            remarks.append(
                f"{run.name}: rank {slow.rank} waited {slow.wait_seconds:.1f} s, less than half "
                "of what the others did: they may be waiting for it"
            )
    return remarks + _verdict(runs, target)


def _verdict(runs: list[Run], target: Target | None) -> list[str]:
    """Who reached the target first, and with the fewest bytes."""
    if target is None or len(runs) < 2:
        return []
    reached = [(run, point) for run in runs if (point := run.first_at(target)) is not None]
    if not reached:
        return [f"{target}: no run reached it"]
    first, soonest = min(reached, key=lambda pair: pair[1].seconds)
    thin, fewest = min(reached, key=lambda pair: pair[1].megabytes)
    return [
        f"{target}: first reached by {first.name}, after {soonest.seconds:.1f} s; with the fewest "
        f"bytes by {thin.name}, {figure(fewest.megabytes)} MB"
    ]


def _show_layers(where: Console, run: Run) -> None:
    """Compressed layers, largest first; dense ones are counted."""
    compressed = [layer for layer in run.layers if not layer.dense]
    dense = [layer for layer in run.layers if layer.dense]
    largest = sorted(compressed, key=lambda layer: -layer.elements)[:_LAYERS_SHOWN]
    rest = []
    if len(compressed) > len(largest):
        rest.append(f"{len(compressed) - len(largest)} smaller compressed layers: --json")
    if dense:
        elements = sum(layer.elements for layer in dense)
        verb = "goes" if len(dense) == 1 else "go"
        rest.append(f"{plural(len(dense), 'layer')} of {elements:,} elements {verb} dense")
    names = ["layer", "codec", "elements", "ratio", "slot\nbytes"]
    if any(layer.finite_norms for layer in largest):
        names += ["norm\nfirst", "norm\nlast", "norm\nmax"]
        names += ["norm"] if any(layer.growth for layer in largest) else []
    elif largest:
        rest.append("residual norms come with reducer.log()")
    caption = "; ".join(rest)
    if not largest:
        say(where, f"Layers of {run.name}: none is compressed; {caption}")
        return
    table = table_of(f"Layers of {run.name}", names, texts=2)
    for layer in largest:
        cells = [*_layer_cells(layer), "grows" if layer.growth else ""]
        add_row(table, *cells[: len(names)], style="yellow" if layer.growth else None)
    _print(where, table, caption)


def _layer_cells(layer: LayerFigures) -> list[str]:
    norms = layer.finite_norms
    return [
        layer.name,
        layer.codec,
        f"{layer.elements:,}",
        ratio_text(layer.ratio),
        "-" if layer.slot_bytes is None else f"{layer.slot_bytes:,}",
        *([figure(norms[0]), figure(norms[-1]), figure(max(norms))] if norms else ["-"] * 3),
    ]


def _show_ranks(where: Console, run: Run) -> None:
    """Each rank's seconds; of very many, those that waited least."""
    rows = sorted(run.ranks, key=lambda rank: rank.wait_seconds or 0.0)[:_RANKS_SHOWN]
    caption = "wait, encode, decode: seconds; who waits least may be who the others wait for"
    if len(rows) < len(run.ranks):
        caption += f"; {len(run.ranks) - len(rows)} ranks that waited longer: --json"
    table = table_of(f"Ranks of {run.name}", ["rank", "steps", "MB", "wait", "encode", "decode"])
    for rank in sorted(rows, key=lambda row: row.rank):
        add_row(table, *_rank_cells(rank))
    _print(where, table, caption)


def _rank_cells(rank: RankFigures) -> list[str]:
    seconds = (rank.wait_seconds, rank.encode_seconds, rank.decode_seconds)
    return [
        f"{rank.rank}",
        f"{rank.steps}",
        figure(rank.megabytes),
        *("-" if value is None else f"{value:.2f}" for value in seconds),
    ]


def ratio_text(value: float | None) -> str:
    """In three digits: 0.98x, 35.4x, 1240x."""
    if value is None:
        return "-"
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
