"""What ``thinwire top`` does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from rich.console import Console
from rich.live import Live

from thinwire._forecast import parse_rate
from thinwire.errors import InvalidArgument
from thinwire.report import tables
from thinwire.report.run_log import Follower, no_run_log
from thinwire.top.column import Column
from thinwire.top.job import Job
from thinwire.top.keyboard import Keyboard, Keys, NoKeys
from thinwire.top.screen import Screen

REDRAW_SECONDS = 1.0


def top(
    file: Path, once: bool, sort: Column, reverse: bool, rate: str | None, json_file: Path | None
) -> None:
    """A live view on a terminal, until the job ends or the user leaves; then, or else, one
    snapshot. InvalidArgument for a file that cannot be read, or shown, and where nothing can be
    written."""
    speed = None if rate is None else parse_rate(rate)
    follower, job, screen = Follower(file), Job(), Screen(str(file), sort, reverse, speed)
    console = tables.console()
    if console.is_terminal and not once and json_file is None:
        with ExitStack() as stack:
            stack.enter_context(suppress(KeyboardInterrupt))
            keys = stack.enter_context(Keyboard()) if sys.stdin.isatty() else NoKeys()
            watch(follower, job, screen, console, keys)
    _take(follower, job)
    age = time.time() - follower.modified
    model = screen.model(job)
    if model is None:
        raise no_run_log(file, job.reasons)
    screen.snapshot(job, model, age, console)
    if json_file is not None:
        _write(json_file, json.dumps(screen.as_json(job, model, age), indent=1) + "\n")
        tables.say(console, f"wrote {json_file} (all figures)")


def watch(
    follower: Follower,
    job: Job,
    screen: Screen,
    console: Console,
    keys: Keys,
    clock: Callable[[], float] = time.time,
) -> None:
    """Draws what the follower finds, once a second and after each key, until the job has ended or
    the user leaves."""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            _take(follower, job)
            shown = screen.live(job, clock() - follower.modified, console.height)
            live.update(shown, refresh=True)
            if job.ended or not screen.press(keys.read(REDRAW_SECONDS)):
                return


def _take(follower: Follower, job: Job) -> None:
    for line in follower.lines():
        job.take(line)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(
            f"top: cannot write {file}: {error.strerror}\nhint: --json FILE says where to write"
        ) from error
