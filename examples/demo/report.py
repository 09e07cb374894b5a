"""The demo's tables, sentences and HTML page, from records alone."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from examples.demo.records import RunRecord, groups, link_text

COLUMNS = [
    "method",
    "step\nms",
    "÷\nbound",
    "MB a\nstep",
    "vs\nfp32",
    "vs\nbf16",
    "reached",
    "target\nat",
    "replicas\nequal",
]
NOT_REACHED = "not reached"


def ratio_text(value: float) -> str:
    """A compression ratio in three digits: 0.98x, 35.4x, 1240x."""
    if value <= 0:
        return "-"
    return f"{value:.0f}x" if value >= 100 else f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def metric_text(record: RunRecord, value: float) -> str:
    return f"{value:.1f} %" if record.unit == "%" else f"{value:.2f}"


def target_text(record: RunRecord) -> str:
    """`accuracy >= 90.0 %`."""
    sign = ">=" if record.higher_is_better else "<="
    return f"{record.metric} {sign} {metric_text(record, record.target)}"


def cells(record: RunRecord) -> list[str]:
    """One row of the table, in the order of COLUMNS."""
    if record.failed:
        return [record.label, "failed"] + ["-"] * (len(COLUMNS) - 2)
    reached = record.time_to_target
    return [
        record.label,
        f"{record.step_ms:.0f}",
        f"{record.over_bound:.2f}" if record.bound_ms else "-",
        f"{record.wire_mb_step:.3g}" if record.wire_mb_step < 10 else f"{record.wire_mb_step:.1f}",
        ratio_text(record.ratio_fp32),
        ratio_text(record.ratio_bf16),
        metric_text(record, record.value),
        f"{reached:.1f} s" if reached is not None else NOT_REACHED,
        "yes" if record.replicas_identical else "NO",
    ]


def caption(records: list[RunRecord]) -> str:
    """What the runs of one task and link have in common."""
    first = records[0]
    bound = next((r.bound_ms for r in records if r.bound_ms), 0.0)
    return (
        f"{first.workload}; {first.hosts} hosts, {link_text(first.link)}; "
        f"bound step {f'{bound:.0f} ms' if bound else 'not measured'}; "
        f"{first.budget_s:.0f} s a run; target: {target_text(first)}; MB sent by each host"
    )


def table(records: list[RunRecord]) -> Table:
    """The table of one task and link."""
    first = records[0]
    shown = Table(
        title=f"{first.where}",
        caption=caption(records),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        padding=0,
    )
    for name in COLUMNS:
        if name == "method":
            shown.add_column(name, min_width=19, overflow="fold")
        else:
            shown.add_column(name, justify="right", no_wrap=True, min_width=_width(name, records))
    for record in records:
        style = "red" if record.failed or not record.replicas_identical else None
        bold = "bold" if record.method.startswith("thinwire") and not style else style
        shown.add_row(*cells(record), style=bold)
    return shown


def _width(column: str, records: list[RunRecord]) -> int:
    """What a column of figures needs: on a narrow terminal only the method's name may fold."""
    index = COLUMNS.index(column)
    return max(*map(len, column.split()), *(len(cells(record)[index]) for record in records))


def verdict(records: list[RunRecord]) -> str:
    """One sentence on who won in one task and link, whoever it is."""
    ran = [r for r in records if not r.failed]
    if len(ran) < 2:
        return ""
    best = min(ran, key=lambda r: -r.value if r.higher_is_better else r.value)
    fastest = min(ran, key=lambda r: r.step_ms)
    plain = next((r for r in ran if r.method == "none"), None)
    text = f"{best.where}: best {best.metric} {metric_text(best, best.value)} by {best.label}"
    text += f"; shortest step {fastest.step_ms:.0f} ms by {fastest.label}"
    if plain is not None and plain is not fastest:
        text += f", {plain.step_ms / fastest.step_ms:.1f} times faster than {plain.label}"
    return text + "."


def show(console: Console, records: list[RunRecord]) -> None:
    """All tables, the failures with their reasons, and the sentences."""
    for group in groups(records, "task", "link"):
        console.print(table(group))
        for record in group:
            if record.failed:
                console.print(
                    f"  failed: {record.label}: {record.failed}", markup=False, style="red"
                )
        console.print()
    for group in groups(records, "task", "link"):
        if sentence := verdict(group):
            console.print(sentence, markup=False, highlight=False)


_STYLE = """
body{font:16px/1.45 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0
1rem;color:#1d1f21;background:#fff} table{border-collapse:collapse;margin:.5rem 0
1rem}th,td{padding:.25rem .7rem;text-align:right;white-space:nowrap} th{border-bottom:2px solid
#1d1f21}td{border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left} tr.ours
td{font-weight:600}tr.bad td{color:#b00020}img{max-
width:100%;height:auto}p.caption{color:#555;margin:.2rem 0} code{background:#f3f3f3;padding:.1rem
.3rem}
"""


def page(head: dict[str, Any], records: list[RunRecord], pictures: list[Path]) -> str:
    """A web page in one file: tables and embedded pictures, nothing fetched from anywhere."""
    facts = "; ".join(html.escape(str(head.get(key, ""))) for key in ("hosts", "machine", "date"))
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><title>thinwire demo</title>',
        f"<style>{_STYLE}</style><h1>thinwire demo</h1>",
        f"<p>{facts}; <code>{html.escape(str(head.get('command', '')))}</code></p>",
    ]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode("ascii")
        parts.append(
            f'<p><img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}"></p>'
        )
    for group in groups(records, "task", "link"):
        parts.append(_html_table(group))
    parts.append(
        "<p>bound = the step of the same job whose only communication is one 4-byte allreduce. "
        "vs fp32, vs bf16 = bytes of a plain ring allreduce in that type ÷ bytes counted on the "
        "links. Evaluation stands outside of the clock, which starts after the same untimed "
        "warm-up steps for every method.</p></html>"
    )
    return "\n".join(parts) + "\n"


def _html_table(records: list[RunRecord]) -> str:
    first = records[0]
    rows = [f"<h2>{html.escape(first.where)}</h2>"]
    rows.append(f'<p class="caption">{html.escape(caption(records))}</p><table><tr>')
    rows += [f"<th>{html.escape(name.replace(chr(10), ' '))}</th>" for name in COLUMNS]
    rows.append("</tr>")
    for record in records:
        bad = record.failed or not record.replicas_identical
        kind = "bad" if bad else "ours" if record.method.startswith("thinwire") else ""
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(record))
        rows.append(f'<tr class="{kind}">{row}</tr>')
    rows.append("</table>")
    rows += [
        f'<p class="caption">failed: {html.escape(r.label)}: {html.escape(r.failed)}</p>'
        for r in records
        if r.failed
    ]
    return "".join(rows)
