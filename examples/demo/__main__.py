"""`python -m examples.demo`: the main job.

Results go to stdout and into a folder, progress to stderr. Exit code: 0; 1 when a thinwire run
failed or replicas differ; 2 when the demo cannot run here; 130 after Ctrl-C (what was measured by
then is still written).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.demo import report
from examples.demo.environment import (
    CannotRunError,
    console,
    header,
    header_lines,
    open_hosts,
    say,
)
from examples.demo.hosts import LOOPBACK
from examples.demo.live import screen_for
from examples.demo.methods import check_spec
from examples.demo.records import RunRecord, write_json_lines
from examples.demo.runner import (
    LINKS,
    METHODS,
    QUICK_LINKS,
    QUICK_METHODS,
    QUICK_SECONDS,
    QUICK_TASKS,
    SECONDS,
    Demo,
    Options,
)
from examples.demo.tasks import TASKS, USUAL_TASKS

NEXT = (
    "thinwire run --policy topk:0.01,values=q8 -- "
    "torchrun --nproc-per-node=2 examples/pytorch/train.py"
)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Trains two real models on emulated hosts, plain and compressed.",
    )
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument(
        "--quick",
        action="store_true",
        default=quick,
        help="one task, one link, three methods (or QUICK=1)",
    )
    parser.add_argument(
        "--task",
        action="append",
        choices=sorted(TASKS),
        help=f"repeatable; default: {' '.join(USUAL_TASKS)}",
    )
    parser.add_argument(
        "--rate", action="append", help=f"link speed, repeatable; default: {' '.join(LINKS)}"
    )
    parser.add_argument(
        "--method", action="append", help=f"repeatable; default: {' '.join(METHODS)}"
    )
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"wall time of each run; default: {SECONDS:g}, with --quick {QUICK_SECONDS:g}",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/demo"), help="folder for what is written"
    )
    parser.add_argument(
        "--loopback",
        action="store_true",
        help="plain processes instead of lab hosts: no link speed",
    )
    arguments = parser.parse_args(argv)
    try:
        for method in arguments.method or []:
            check_spec(method)
    except ValueError as error:
        parser.error(str(error))
    if arguments.loopback and arguments.rate:
        parser.error("--loopback has no link speed, so --rate cannot be given with it")
    if arguments.seconds is not None and arguments.seconds <= 0:
        parser.error(f"--seconds {arguments.seconds:g}: more than 0 is needed")
    if arguments.hosts < 2:
        parser.error(f"--hosts {arguments.hosts}: at least 2 hosts are needed to exchange anything")
    return arguments


def options_of(arguments: argparse.Namespace) -> Options:
    quick = arguments.quick
    links = arguments.rate or (QUICK_LINKS if quick else LINKS)
    return Options(
        tasks=arguments.task or (QUICK_TASKS if quick else list(USUAL_TASKS)),
        links=[LOOPBACK] if arguments.loopback else links,
        methods=arguments.method or (QUICK_METHODS if quick else METHODS),
        hosts=arguments.hosts,
        seconds=arguments.seconds or (QUICK_SECONDS if quick else SECONDS),
        out=arguments.out,
    )


def write(out: Path, head: dict[str, Any], records: list[RunRecord]) -> list[tuple[Path, str]]:
    """All files and what each is."""
    lines = out / "runs.jsonl"
    write_json_lines(lines, head, records)
    written = [(lines, "one JSON object a run")]
    if any(not record.failed for record in records):
        from examples.demo import plots

        pictures = [out / "demo.png", out / "curves.png"]
        plots.overview(records, pictures[0])
        plots.curves(records, pictures[1])
        page = out / "demo.html"
        page.write_text(report.page(head, records, pictures), encoding="utf-8")
        written = [
            (page, "tables and pictures in one file"),
            *((p, "picture") for p in pictures),
            *written,
        ]
    return written


def finish(out: Path, head: dict[str, Any], records: list[RunRecord], stdout: Console) -> int:
    """Tables, files, what next; the exit code."""
    for line in header_lines(head):
        say(stdout, line)
    stdout.print()
    report.show(stdout, records)
    stdout.print()
    for file, what in write(out, head, records):
        say(stdout, f"wrote {file} ({what})")
    say(stdout, f"open:  xdg-open {out / 'demo.html'}")
    say(stdout, f"next:  {NEXT}")
    bad = any(
        (r.failed and r.method.startswith("thinwire")) or not (r.failed or r.replicas_identical)
        for r in records
    )
    return 1 if bad else 0


def main(argv: list[str]) -> int:
    options = options_of(parse(argv))
    stdout, stderr = console(), console(stderr=True)
    try:
        hosts = open_hosts(options.hosts, options.links, options.tasks)
    except CannotRunError as error:
        say(stderr, f"error: {error}")
        return 2
    runs = len(options.tasks) * len(options.links) * len(options.methods)
    screen = screen_for(stderr, runs)
    demo = Demo(options, hosts, screen)
    interrupted = False
    try:
        head = header(hosts, ["python", "-m", "examples.demo", *argv])
        screen.say(f"{runs} runs of {options.seconds:.0f} s on {head['hosts']}")
        demo.run()
    except KeyboardInterrupt:
        interrupted = True
    finally:
        screen.close()
        hosts.close()
    code = finish(options.out, head, demo.records, stdout) if demo.records else 1
    return 130 if interrupted else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
