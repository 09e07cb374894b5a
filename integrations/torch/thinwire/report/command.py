"""What ``thinwire report`` does."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from thinwire.errors import InvalidArgument
from thinwire.report import tables
from thinwire.report.runs import By, Run, Target, gather, target_of


def report(
    files: list[Path], out: Path, json_file: Path | None, target: str | None, by: By | None
) -> None:
    """Tables to stdout, pictures into ``out``, figures into ``json_file``; then says what was
    written. InvalidArgument for files and targets that cannot be shown, and where nothing can be
    written."""
    runs, left_out = gather(files)
    wanted = None if target is None else target_of(target, runs)
    stdout, stderr = tables.console(), tables.console(stderr=True)
    for reason in left_out:
        tables.say(stderr, f"thinwire: warning: {reason}")
    tables.show(stdout, runs, wanted, by)
    try:
        written = _draw(runs, wanted, out, stdout)
        if json_file is not None:
            figures = {"runs": [run.as_json(wanted) for run in runs]}
            json_file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
            written.append((json_file, "all figures"))
    except OSError as error:
        raise InvalidArgument(
            f"report: cannot write {error.filename or out}: {error.strerror}\n"
            "hint: --out FOLDER and --json FILE say where to write"
        ) from error
    for file, what in written:
        tables.say(stdout, f"wrote {file} ({what})")
    if written:
        tables.say(stdout, f"open:  xdg-open {written[0][0]}")


def _draw(
    runs: list[Run], target: Target | None, out: Path, stdout: Console
) -> list[tuple[Path, str]]:
    """The pictures that there was something for; none, and why, without matplotlib."""
    try:
        from thinwire.report import plots
    except ImportError as error:
        tables.say(stdout, f"no pictures ({error}); pip install matplotlib")
        return []
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if plots.metrics(runs, target, file := out / "metrics.png"):
        written.append((file, "metrics against steps, seconds and MB"))
    if plots.layers(runs, file := out / "layers.png"):
        written.append((file, "residual norms over steps, ratio by layer"))
    return written
