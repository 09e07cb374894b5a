"""The command `thinwire lab`: up, run, rate, status, down.

Data goes to standard output, everything else to standard error. Exit codes: that of the program
run, 2 for a mistake or a missing permission, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from thinwire_lab import lab as labs
from thinwire_lab.errors import LabError
from thinwire_lab.job import Job
from thinwire_lab.lab import DEFAULT_NAME, Lab, Status

_EPILOG = """\
examples:
  thinwire lab up --hosts 4 --rate 100mbit
  thinwire lab run -- python train.py
  thinwire lab run --mpi -- ./solver
  thinwire lab rate 1gbit
  thinwire lab status
  thinwire lab down
"""


def say(line: str) -> None:
    print(f"lab: {line}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="thinwire lab",
        description="Several hosts on this machine, joined by links of a stated speed.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.add_argument(
            "--name", help=f"which lab, when there are several {_twin('name', DEFAULT_NAME)}"
        )
        return sub

    up = verb("up", "Make a lab that stays until `down`; one that is up is kept.")
    up.add_argument("--hosts", help=f"1 to 254 {_twin('hosts', '4')}")
    up.add_argument(
        "--rate",
        help=f"speed of each link: 1mbit to 10gbit, or unlimited {_twin('rate', '1gbit')}",
    )
    run = verb("run", "Run a command on every host, with RANK, WORLD_SIZE, MASTER_ADDR ... set.")
    run.add_argument("--mpi", action="store_true", help="start one mpirun across the hosts")
    run.add_argument("--prefix", action="store_true", help="put the rank before each output line")
    run.add_argument(
        "--keep-going", action="store_true", help="when one fails, leave the others running"
    )
    run.add_argument(
        "--grace",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="time the others get after a failure (default: %(default)s)",
    )
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    rate = verb("rate", "Change the speed of every link, also while something runs.")
    rate.add_argument("rate", metavar="RATE")
    status = verb("status", "Show the hosts and the bytes each has sent.")
    status.add_argument("--json", metavar="FILE", help="write it as JSON too; - for the output")
    verb("down", "Remove the lab and end what runs in it.")
    return parser


def _twin(flag: str, default: str) -> str:
    return f"(environment: THINWIRE_LAB_{flag.upper()}; default: {default})"


def _setting(flag: str, given: str | None, default: str) -> str:
    """The flag, else its environment twin (said, lest a forgotten one wins), else the default."""
    variable = f"THINWIRE_LAB_{flag.upper()}"
    if given is not None:
        return given
    if variable in os.environ:
        say(f"--{flag} {os.environ[variable]} from {variable}")
    return os.environ.get(variable, default)


def _up(options: argparse.Namespace) -> int:
    try:
        hosts = int(count := _setting("hosts", options.hosts, "4"))
    except ValueError:
        raise LabError(f"'{count}' is not a number of hosts", "take 1 to 254") from None
    lab, new = labs.bring_up(hosts, _setting("rate", options.rate, "1gbit"), options.name)
    state = "is up" if new else "was up already"
    say(f"'{lab.name}' {state}: {lab.hosts} hosts, {lab.rate}, {_network(lab.addresses)}")
    flag = "" if lab.name == DEFAULT_NAME else f" --name {lab.name}"
    say(f"next: thinwire lab run{flag} -- COMMAND; then: thinwire lab down{flag}")
    return 0


def _network(addresses: Sequence[str]) -> str:
    return addresses[0] if len(addresses) == 1 else f"{addresses[0]} to {addresses[-1]}"


def _run(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    lab = Lab.attach(options.name)
    interrupts = _Forward()
    job = lab.start(command, mpi=options.mpi, prefix=options.prefix, die_with_us=True)
    interrupts.begin(job)
    code = job.wait(keep_going=options.keep_going, grace_s=options.grace, report=say)
    job.end()
    return interrupts.exit_code or code


class _Forward:
    """Passes SIGINT, SIGTERM and SIGHUP on to the job; the third Ctrl-C kills it.

    It listens from before the job is started, since the first program may run, and be seen to run,
    before the last is started; what comes until `begin` is passed on there.
    """

    def __init__(self) -> None:
        self._job: Job | None = None
        self._early: list[int] = []
        self._count = 0
        self.exit_code = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def begin(self, job: Job) -> None:
        self._job = job
        while self._early:
            job.signal(self._early.pop(0))

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._count += 1
        self.exit_code = 128 + number
        sent = number if self._count < 3 else signal.SIGKILL
        if self._job is None:
            self._early.append(sent)
        else:
            self._job.signal(sent)


def _rate(options: argparse.Namespace) -> int:
    lab = Lab.attach(options.name)
    lab.set_rate(options.rate)
    say(f"'{lab.name}': every link now at {lab.rate}")
    return 0


def _status(options: argparse.Namespace) -> int:
    status = Lab.attach(options.name).status()
    text = json.dumps(asdict(status), indent=2) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return 0
    _table(status)
    if options.json:
        Path(options.json).write_text(text)
        say(f"wrote {options.json}")
    return 0


def _table(status: Status) -> None:
    print(
        f"# lab {status.name}: {status.hosts} hosts up, {status.rate}, "
        f"burst {status.burst_bytes} B, queue {status.queue_bytes} B, "
        f"{status.congestion_control}{', rootless' if status.rootless else ''}"
    )
    print(f"{'host':>4}  {'address':<15}  {'sent_bytes':>14}")
    rows = zip(status.addresses, status.sent_bytes, strict=True)
    for rank, (address, sent) in enumerate(rows):
        print(f"{rank:>4}  {address:<15}  {sent:>14}")


def _down(options: argparse.Namespace) -> int:
    found = labs.down(options.name)
    say(f"'{options.name}' {'is down' if found else 'was not up'}")
    return 0


_VERBS = {"up": _up, "run": _run, "rate": _rate, "status": _status, "down": _down}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    try:
        options.name = _setting("name", options.name, DEFAULT_NAME)
        return _VERBS[options.verb](options)
    except LabError as error:
        print(f"thinwire lab: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"\nhint: {error.hint}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"thinwire lab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
