"""Does compressed training reach the accuracy of uncompressed training?

    python -m tests.convergence            trains what is not trained yet; stop and go on at will
    python -m tests.convergence times      step times on four lab hosts, for the page's last columns
    python -m tests.convergence table      docs/convergence.md and .png from the results
    python -m tests.convergence all        these three, one after the other

Records are kept in git, so what stands there is not trained again; `--out FOLDER` begins anew.

Exit code: 0 all asked for is there; 1 runs failed, are not available, or were left for want of
hours; 2 cannot run here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from examples.demo.data import DataMissingError
from examples.demo.environment import CannotRunError, console, say
from examples.demo.hosts import Hosts, LoopbackHosts
from tests.convergence.methods import METHODS
from tests.convergence.runner import make_all
from tests.convergence.runs import Choice, Run, timing_runs, training_runs
from tests.convergence.settings import WORLD
from tests.convergence.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
RECORDS = Path(__file__).parent / "records"
LINKS = ("1gbit", "100mbit", "10mbit")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=["train", "times", "table", "all"], default="train")
    add("--task", action="append", choices=list(TASKS), help="repeatable; default: all")
    add("--method", action="append", choices=list(METHODS), help="repeatable; default: all")
    add("--seeds", type=int, help="default: the task's own number")
    add("--out", type=Path, default=RECORDS, help="results: %(default)s")
    add("--hours", type=float, help="start no run after this many")
    add("--link", action="append", help=f"times: repeatable; default: {' '.join(LINKS)}")
    add("--docs", type=Path, default=ROOT / "docs", help="table: where the page goes")
    add("--steps", type=int, help="for trying out: fewer, with an --out of their own")
    add(
        "--ranks",
        type=int,
        default=WORLD,
        help="for trying out, with an --out of their own: default %(default)s",
    )
    arguments = parser.parse_args(argv)
    if arguments.ranks < 2 or (arguments.steps or 1) < 1 or (arguments.seeds or 1) < 1:
        parser.error("--ranks takes 2 or more, --steps and --seeds 1 or more")
    tries = arguments.steps is not None or arguments.ranks != WORLD
    if tries and arguments.out == RECORDS:
        parser.error(
            "--steps and --ranks make other runs than those kept: give them an --out FOLDER"
        )
    hours = arguments.hours
    arguments.deadline = None if hours is None else time.monotonic() + 3600 * hours
    return arguments


class LinkHosts:
    """The lab's hosts, started with the first run and set to each run's link."""

    def __init__(self, count: int, links: list[str]) -> None:
        self._count, self._links = count, links
        self._hosts: Hosts | None = None
        self._link = ""

    def __call__(self, run: Run) -> Hosts:
        from thinwire_lab import LabError

        from examples.demo.hosts import LabHosts

        if self._hosts is None:
            try:
                self._hosts = LabHosts(self._count, self._links)
            except LabError as error:
                raise CannotRunError(str(error)) from error
        if run.link is not None and run.link != self._link:
            self._hosts.set_rate(run.link)
            self._link = run.link
        return self._hosts

    def close(self) -> None:
        if self._hosts is not None:
            self._hosts.close()


def train(choice: Choice, arguments: argparse.Namespace, tell: Callable[[str], None]) -> bool:
    hosts = LoopbackHosts(choice.ranks)
    runs = training_runs(choice)
    return make_all(runs, arguments.out, lambda _: hosts, arguments.deadline, tell)


def times(choice: Choice, arguments: argparse.Namespace, tell: Callable[[str], None]) -> bool:
    links = arguments.link or list(LINKS)
    lab = LinkHosts(choice.ranks, links)
    try:
        return make_all(timing_runs(choice, links), arguments.out, lab, arguments.deadline, tell)
    finally:
        lab.close()


def table(choice: Choice, arguments: argparse.Namespace, tell: Callable[[str], None]) -> bool:
    from tests.convergence.table import write

    for file in write(choice, arguments.out, LINKS, arguments.docs):
        tell(f"wrote {file}")
    return True


COMMANDS = {"train": [train], "times": [times], "table": [table], "all": [train, times, table]}


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    choice = Choice(
        tuple(arguments.task or TASKS),
        tuple(arguments.method or METHODS),
        arguments.seeds,
        arguments.steps,
        arguments.ranks,
    )
    tell = partial(say, console(stderr=True))
    try:
        for task in choice.tasks:
            TASKS[task].prepare()
        done = [command(choice, arguments, tell) for command in COMMANDS[arguments.command]]
    except (CannotRunError, DataMissingError) as error:
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        tell("interrupted; finished runs are kept, the same command goes on from here")
        return 130
    if arguments.command in ("train", "times"):
        tell("next: python -m tests.convergence table")
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
