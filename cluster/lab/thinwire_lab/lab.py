"""Several hosts on one machine, joined by links of a stated speed: the lab's Python interface.

    with Lab(hosts=4, rate="100mbit") as lab:
        code = lab.run([sys.executable, "train.py"])
        print(lab.sent_bytes())

A Lab made this way belongs to its process: `close()`, the end of the `with` block, or the death of
the process by whatever cause removes it and ends what runs in it. `bring_up` makes one that stays
until `down`, which `Lab.attach` finds by its name.
A Lab is used from one thread at a time; several labs may exist side by side.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from thinwire_lab import mpi as mpi_launcher
from thinwire_lab import namespaces
from thinwire_lab import state as states
from thinwire_lab.errors import LabError
from thinwire_lab.job import Job
from thinwire_lab.link import Rate
from thinwire_lab.namespaces import INTERFACE
from thinwire_lab.state import State

DEFAULT_NAME = "default"
_serial = 0


@dataclass(frozen=True)
class Status:
    """A lab at one moment; the lists have one entry a host."""

    name: str
    hosts: int
    rate: str
    rate_bits_per_s: int
    burst_bytes: int
    queue_bytes: int
    network: str
    rootless: bool
    congestion_control: str
    addresses: list[str]
    sent_bytes: list[int]


class Lab:
    """`hosts` hosts, 1 to 254, each on its own cable of `rate` in each direction to one switch."""

    def __init__(
        self, hosts: int = 4, rate: str | Rate = "1gbit", *, name: str | None = None
    ) -> None:
        global _serial
        if name is None:
            _serial += 1
            name = f"lab-{os.getpid()}-{_serial}"
        self._process: subprocess.Popen[str] | None
        self._state, self._process = _create(hosts, Rate.parse(rate), name, persistent=False)
        self._pid = os.getpid()
        self.port = 0
        self.fresh_port()

    @classmethod
    def attach(cls, name: str = DEFAULT_NAME) -> Lab:
        """The lab of that name that is up already. Closing this object leaves it up."""
        states.check_name(name)
        state = states.load(name)
        if state is None or not state.alive:
            up = [other.name for other in states.load_all() if other.alive]
            flag = "" if name == DEFAULT_NAME else f" --name {name}"
            raise LabError(
                f"there is no lab named '{name}'"
                + (f"; up are: {', '.join(up)}" if up else "; none is up"),
                f"thinwire lab up{flag}",
            )
        lab = cls.__new__(cls)
        lab._state, lab._process, lab._pid = state, None, os.getpid()
        lab.port = 0
        lab.fresh_port()
        return lab

    @property
    def name(self) -> str:
        return self._state.name

    @property
    def hosts(self) -> int:
        return self._state.hosts

    @property
    def rate(self) -> Rate:
        """The links' present speed, whoever set it."""
        state = states.load(self.name)
        return Rate.parse((state or self._state).rate)

    @property
    def addresses(self) -> list[str]:
        return self._state.addresses

    def fresh_port(self) -> int:
        """Another MASTER_PORT for what is started next, so that jobs do not meet by accident."""
        self.port = random.SystemRandom().randrange(20_000, 30_000)
        return self.port

    def environment(self, rank: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """`base` (default: this process's) with what a distributed program on that host reads."""
        env = dict(os.environ if base is None else base)
        env.setdefault("OMP_NUM_THREADS", "1")
        env.update(
            RANK=str(rank),
            WORLD_SIZE=str(self.hosts),
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR=self.addresses[0],
            MASTER_PORT=str(self.port),
            GLOO_SOCKET_IFNAME=INTERFACE,
        )
        env[states.MARK] = self._state.token
        return env

    def command(self, rank: int, argv: Sequence[str]) -> list[str]:
        """argv as it must be called from outside to run on that host."""
        if not 0 <= rank < self.hosts:
            raise LabError(f"rank {rank} is not a host of this lab", f"take 0 to {self.hosts - 1}")
        self._check_open()
        return [*namespaces.enter(self._state, rank + 1), *argv]

    def popen(
        self,
        rank: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[Any]:
        """Starts argv on one host; `options` go to subprocess.Popen.

        `env` is added to this process's environment. The returned pid is the program's own, so
        signals reach it; it leads a process group of its own unless options say otherwise.
        """
        merged = {**os.environ, **(env or {})}
        check_command(argv, merged.get("PATH"))
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("start_new_session", True)
        return subprocess.Popen(
            self.command(rank, argv), env=self.environment(rank, merged), **options
        )

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        mpi: bool = False,
        prefix: bool = False,
        die_with_us: bool = False,
        **options: Any,
    ) -> Job:
        """Starts argv on every host, or with mpi one mpirun across them. See `run`.

        die_with_us: a sudden death of the calling thread kills the programs.
        """
        self.fresh_port()
        if prefix:
            options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        check_command(argv, {**os.environ, **(env or {})}.get("PATH"))
        if mpi:
            argv = mpi_launcher.mpirun(self._state, argv, prefix=prefix)
            env = {**(env or {}), **mpi_launcher.ENVIRONMENT}
        if die_with_us and (setpriv := shutil.which("setpriv")):
            argv = [setpriv, "--pdeathsig", "KILL", "--", *argv]
        ranks = [0] if mpi else list(range(self.hosts))
        processes: list[subprocess.Popen[Any]] = []
        try:
            for rank in ranks:
                processes.append(self.popen(rank, argv, env, **options))
        except BaseException:
            Job(processes, [str(rank) for rank in ranks[: len(processes)]]).end()
            raise
        return Job(processes, ["mpirun"] if mpi else [f"rank {rank}" for rank in ranks])

    def run(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        mpi: bool = False,
        prefix: bool = False,
        keep_going: bool = False,
        grace_s: float = 5.0,
        timeout_s: float | None = None,
        **options: Any,
    ) -> int:
        """Runs argv on every host and waits: the exit code of the first that failed, or 0.

        When one fails the others get grace_s seconds, then are ended, unless keep_going.
        prefix: each line of output is preceded by the rank it comes from.
        """
        job = self.start(argv, env, mpi=mpi, prefix=prefix, **options)
        try:
            return job.wait(keep_going=keep_going, grace_s=grace_s, timeout_s=timeout_s)
        finally:
            job.end()

    def set_rate(self, rate: str | Rate) -> None:
        """Another speed for every link, also while programs run; counters go on."""
        new = Rate.parse(rate)
        self._check_open()
        with states.locked():
            namespaces.limit(self._state, new, "change")
            self._state.rate = str(new)
            self._state.save()

    def sent_bytes(self) -> list[int]:
        """Bytes that each host has sent since the lab came up.

        Whole Ethernet frames without preamble and checksum, the headers of every segment counted
        as on a real wire, also where the kernel hands several segments over as one.
        """
        self._check_open()
        return [namespaces.sent_bytes(self._state, rank) for rank in range(self.hosts)]

    def status(self) -> Status:
        rate = self.rate
        return Status(
            name=self.name,
            hosts=self.hosts,
            rate=str(rate),
            rate_bits_per_s=rate.bits_per_s,
            burst_bytes=rate.burst_bytes,
            queue_bytes=rate.queue_bytes,
            network=self._state.network,
            rootless=self._state.rootless,
            congestion_control=namespaces.congestion_control(self._state),
            addresses=self.addresses,
            sent_bytes=self.sent_bytes(),
        )

    def _check_open(self) -> None:
        if not self._state.alive:
            raise LabError(
                f"lab '{self.name}' is down", "make a new one; its programs have been ended"
            )

    def close(self) -> None:
        """Removes the lab and ends what runs in it. Twice is no error; an attached lab stays up."""
        if self._process is None or os.getpid() != self._pid:
            return
        process, self._process = self._process, None
        with states.locked():
            namespaces.remove(self._state, grace_s=1.0)
        namespaces.end_holder(process)

    def __enter__(self) -> Lab:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_command(argv: Sequence[str], path: str | None = None) -> None:
    """Raises LabError unless argv[0] is a program that can be started."""
    if not argv:
        raise LabError("no command to run", "thinwire lab run -- COMMAND [ARGUMENT...]")
    if shutil.which(argv[0], path=path) is None:
        raise LabError(
            f"the command '{argv[0]}' is not found or cannot be executed",
            "check its spelling and PATH; a shell line needs: sh -c '...'",
        )


def bring_up(hosts: int, rate: str | Rate, name: str = DEFAULT_NAME) -> tuple[Lab, bool]:
    """A lab that stays until `down`, and whether it is new.

    One of that name that is up already is kept, its links set to `rate`.
    """
    wanted = Rate.parse(rate)
    states.check_name(name)
    state = states.load(name)
    if state is not None and state.alive:
        if state.hosts != hosts:
            raise LabError(
                f"lab '{name}' is up with {state.hosts} hosts, not {hosts}",
                f"thinwire lab down --name {name}, or choose another --name",
            )
        lab = Lab.attach(name)
        if lab.rate != wanted:
            lab.set_rate(wanted)
        return lab, False
    _create(hosts, wanted, name, persistent=True)
    return Lab.attach(name), True


def down(name: str = DEFAULT_NAME) -> bool:
    """Removes the lab of that name and what dead labs left; whether there was one."""
    states.check_name(name)
    with states.locked():
        namespaces.remove_dead()
        state = states.load(name)
        if state is None:
            return False
        namespaces.remove(state, grace_s=2.0)
        return True


def names() -> list[str]:
    """The labs of this user that are up."""
    return [state.name for state in states.load_all() if state.alive]


def _create(
    hosts: int, rate: Rate, name: str, *, persistent: bool
) -> tuple[State, subprocess.Popen[str] | None]:
    if not 1 <= hosts <= namespaces.MAX_HOSTS:
        raise LabError(
            f"a lab of {hosts} hosts is not possible",
            f"take 1 to {namespaces.MAX_HOSTS}; each host is a namespace of this one machine",
        )
    states.check_name(name)
    with states.locked():
        namespaces.remove_dead()
        others = states.load_all()
        if any(other.name == name for other in others):
            raise LabError(
                f"a lab named '{name}' is up already",
                f"choose another name, or thinwire lab down --name {name}",
            )
        process, rootless, state = namespaces.start_holder(hosts, namespaces.lab_files(name))
        try:
            state.name, state.rate, state.rootless = name, str(rate), rootless
            state.subnet = states.free_subnet(others)
            state.owner = None if persistent else states.process_identity(os.getpid())
            namespaces.connect(state, rate)
            state.save()
            if not persistent:
                return state, process
            assert process.stdin is not None
            process.stdin.write("keep\n")
            process.stdin.flush()
        except BaseException:
            namespaces.end_holder(process)
            raise
        _release(process)
        return state, None


def _release(process: subprocess.Popen[str]) -> None:
    """Forgets a holder that is to outlive us, without waiting for it."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    process.returncode = 0
