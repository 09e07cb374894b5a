"""Results of codecs, peers, fedzip and layerwise in out/bench as the Markdown tables of docs.

    python -m tests.bench table [--results FOLDER] [--markdown FILE]

A share is the probe's time over the codec's, both of the same run: 1 is as fast as r = g + r.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "out" / "bench"
BF16, LSTM = "-bf16", "-lstm"
"""In the name of a file of codecs_bench's: its gradients were bf16, a char LSTM's."""

LAYERWISE = ("norms", "floor")
"""The measures of error that have a table; tests/bench/layerwise.cpp explains them."""

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON Lines; none where there is no file."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_codecs(folder: Path) -> list[Row]:
    rows = []
    for file in sorted(folder.glob("codecs*.json"), key=lambda file: file.stem):
        made = {"dtype": "bf16" if BF16 in file.stem else "fp32", "noise": LSTM not in file.stem}
        rows += [made | row for row in read(file)]
    return rows


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, figures to the right."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def name(row: Row) -> str:
    dtype = " of bf16" if row.get("dtype") == "bf16" else ""
    return f"`{row['spec']}`" + dtype + ("" if row.get("noise", True) else ", a char LSTM's")


def spread(share: list[float]) -> str:
    digits = 2 if share[0] >= 0.1 else 3
    median, least, most = (f"{value:.{digits}f}" for value in share)
    return f"{median} [{least}–{most}]"


def share_of(row: Row, time: str, times: float = 1) -> str:
    """Of what was measured: codecs_bench writes zeros for the rest."""
    took = row.get(time, [0])[0]
    return f"{times * row['probe_us'][0] / took:.2f}" if took else "–"


def size(row: Row) -> str:
    if row["bytes"] == 0:
        return "–"
    return f"{row['bytes']:,} ({8 * row['bytes'] / row['elements']:.3g} bits a value)"


def codec_table(codecs: list[Row], peers: list[Row]) -> str:
    """A row a codec and size; `beside` are the peers that do the same to as many values."""
    rows = []
    for row in codecs:
        same = (row["spec"], row["dtype"], row["elements"])
        beside = [p for p in peers if (p["beside"], p["dtype"], p["elements"]) == same]
        rows.append(
            [
                name(row),
                f"{row['elements']:,}",
                spread(row["share"]),
                f"{share_of(row, 'decode_us')} / {share_of(row, 'sum_us', 4)}",
                size(row),
                "<br>".join(f"`{p['spec']}` {spread(p['share'])}" for p in beside) or "–",
            ]
        )
    head = ["codec", "values", "encode, share [range]", "decode / sum, share", "bytes", "beside"]
    return markdown(head, rows)


def peer_table(peers: list[Row]) -> str:
    head = ["peer", "stands beside", "values", "encode, share [range]", "decode, share", "bytes"]
    rows = [
        [
            name(row),
            f"`{row['beside']}`",
            " × ".join(f"{n:,}" for n in row.get("shape", [row["elements"]])),
            spread(row["share"]),
            share_of(row, "decode_us"),
            size(row),
        ]
        for row in peers
    ]
    return markdown(head, rows)


def threads_table(rows: list[Row]) -> str:
    head = ["codec", "values", "one thread, share", "all, share of all", "gain", "by CPU time"]
    return markdown(
        head,
        [
            [
                name(row),
                f"{row['elements']:,}",
                spread(row["share_one"]),
                spread(row["share_all"]),
                spread(row["gain"]),
                spread(row["cpu_gain"]),
            ]
            for row in rows
        ],
    )


def fedzip_table(rows: list[Row]) -> str:
    head = ["update", "values", "density", "bytes", "factor", "share of the square"]
    return markdown(
        head,
        [
            [
                row["update"],
                f"{row['elements']:,}",
                f"{row['density']:g}",
                f"{row['bytes']:,}",
                f"{row['factor']:,.0f}",
                f"{row['share']:.3f}",
            ]
            for row in rows
        ],
    )


def layerwise_table(rows: list[Row], measure: str) -> str:
    """Median and range over a model's recordings; after the stroke with the layers left dense."""
    factors: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row["measure"] == measure:
            kind = (row["grid"], row["set"], row["reference"])
            factors.setdefault(kind, {}).setdefault(row["model"], []).append(row)
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for (grid, codecs, reference), by_model in sorted(factors.items(), key=lambda item: item[0][0]):
        cells = [f"{codecs}, {grid}", f"`{reference}`"]
        for model in models:
            of_layers = [row["factor"] for row in by_model[model]]
            share = [statistics.median(of_layers), min(of_layers), max(of_layers)]
            whole = statistics.median(row["factor_all"] for row in by_model[model])
            cells.append(f"{spread(share)} / {whole:.2f}")
        lines.append(cells)
    return markdown([f"{measure}: codecs, grid", "error of", *models], lines)


def tables(folder: Path) -> str:
    """All tables of which there are results; empty when there are none."""
    codecs, peers = read_codecs(folder), read(folder / "peers.json")
    threads, fedzip = read(folder / "threads.json"), read(folder / "fedzip.json")
    layerwise = read(folder / "layerwise.json")
    parts = [codec_table(codecs, peers)] if codecs else []
    parts += [peer_table(peers)] if peers else []
    parts += [threads_table(threads)] if threads else []
    parts += [fedzip_table(fedzip)] if fedzip else []
    parts += [layerwise_table(layerwise, name) for name in LAYERWISE] if layerwise else []
    return "\n".join(parts)


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="table.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--markdown", type=Path, help="a file to write to as well")
    options = parser.parse_args(words)
    text = tables(options.results)
    if not text:
        print(f"table: no results in {options.results}\nhint: make bench", file=sys.stderr)
        return 2
    print(text, end="")
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
