"""Makes and removes a lab's network: namespaces, cables, switch, limits.

Runs `ip`, `tc`, `nsenter` and `unshare`; the machine's own network is never touched, since even the
switch lives in a namespace. With root it works directly, otherwise inside a user namespace.
Not thread safe on one lab: callers hold `state.locked()`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path

from thinwire_lab import holder as holder_program
from thinwire_lab import state as states
from thinwire_lab.errors import LabError, NoNamespaceError
from thinwire_lab.link import Rate
from thinwire_lab.state import State

INTERFACE = "eth0"
# One /24 network: .1 to .254.
MAX_HOSTS = 254
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
_HOLDER_TIMEOUT_S = 60.0


def tool(name: str) -> str:
    """The full path of a system program; sbin counts even where PATH leaves it out."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    found = shutil.which(name, path=path)
    if found is None:
        package = _TOOLS[name]
        raise LabError(
            f"the lab needs the program '{name}', which is not installed",
            f"apt-get install {package}",
        )
    return found


def start_holder(hosts: int, files: list[Path]) -> tuple[subprocess.Popen[str], bool, State]:
    """A holder process, whether it is rootless, and a state with the fields that it decides."""
    for name in _TOOLS:
        tool(name)
    program = [sys.executable, "-I", holder_program.__file__, str(hosts), *map(str, files)]
    rootless_prefix = [tool("unshare"), "--user", "--map-root-user", "--"]
    reasons = []
    for rootless, prefix in ((False, []), (True, rootless_prefix)):
        process = subprocess.Popen(
            prefix + program,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd="/",
        )
        try:
            reply = _first_line(process)
            if "descriptors" in reply:
                return process, rootless, _draft(process, hosts, rootless, reply)
        except BaseException:
            end_holder(process)
            raise
        reasons.append(reply["error"])
        end_holder(process)
    raise NoNamespaceError(
        f"this system grants no network namespace: as {_who()}: {reasons[0]}; "
        f"in a user namespace: {reasons[1]}",
        "run as root; or allow user namespaces (sysctl user.max_user_namespaces, "
        "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns); "
        "in a container, start it with --cap-add SYS_ADMIN --cap-add NET_ADMIN",
    )


def _who() -> str:
    return "root" if os.geteuid() == 0 else f"user {os.geteuid()}"


def _first_line(process: subprocess.Popen[str]) -> dict[str, list[int] | str]:
    assert process.stdout is not None
    assert process.stderr is not None
    ready, _, _ = select.select([process.stdout], [], [], _HOLDER_TIMEOUT_S)
    line = process.stdout.readline() if ready else ""
    if line:
        reply: dict[str, list[int] | str] = json.loads(line)
        return reply
    if not ready:
        return {"error": f"no answer in {_HOLDER_TIMEOUT_S:.0f} s"}
    lines = process.stderr.read().strip().splitlines()
    return {"error": lines[-1] if lines else "the holder process ended without a word"}


def _draft(
    process: subprocess.Popen[str], hosts: int, rootless: bool, reply: dict[str, list[int] | str]
) -> State:
    descriptors, inodes = reply["descriptors"], reply["inodes"]
    assert isinstance(descriptors, list)
    assert isinstance(inodes, list)
    return State(
        name="",
        hosts=hosts,
        rate="",
        subnet=0,
        rootless=rootless,
        holder=states.process_identity(process.pid),
        owner=None,
        token=uuid.uuid4().hex,
        descriptors=descriptors,
        inodes=inodes,
    )


def end_holder(process: subprocess.Popen[str]) -> None:
    """Closes the pipe, which ends the holder and everything in its namespaces, and waits for it."""
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def enter(state: State, place: int, *, from_inside: bool = False) -> list[str]:
    """Command prefix that runs a program in a namespace: 0 is the switch, rank + 1 a host.

    Each of its stages replaces itself by the next, so the process id is the program's own.
    from_inside: the caller runs on a host, hence in the lab's user namespace already.
    """
    pid = state.holder[0]
    prefix = [tool("nsenter"), f"--net=/proc/{pid}/fd/{state.descriptors[place]}"]
    if state.rootless and not from_inside:
        prefix[1:1] = ["--preserve-credentials", f"--user=/proc/{pid}/ns/user"]
    return [*prefix, "--"]


def connect(state: State, rate: Rate) -> None:
    """Lays the cables: one veth pair a host, from its eth0 to a port of the switch's bridge."""
    pid = state.holder[0]
    lines = [
        "link set lo up",
        "link add switch type bridge stp_state 0 mcast_snooping 0",
        "link set switch up",
    ]
    for rank in range(state.hosts):
        namespace = f"/proc/{pid}/fd/{state.descriptors[rank + 1]}"
        lines += [
            f"link add host{rank} type veth peer name {INTERFACE} netns {namespace}",
            f"link set host{rank} master switch up",
        ]
    _batch(state, 0, "ip", lines)
    for rank, address in enumerate(state.addresses):
        lines = [
            "link set lo up",
            f"address add {address}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
        ]
        _batch(state, rank + 1, "ip", lines)
    limit(state, rate, "add")


def limit(state: State, rate: Rate, verb: str) -> None:
    """Sets the speed of every cable in both directions; queued bytes and counters stay."""
    _batch(state, 0, "tc", [rate.tbf(verb, f"host{rank}") for rank in range(state.hosts)])
    for rank in range(state.hosts):
        _batch(state, rank + 1, "tc", [rate.tbf(verb, INTERFACE)])


def sent_bytes(state: State, rank: int) -> int:
    """Bytes that left the host since the lab came up, with the headers of every segment."""
    command = [*enter(state, rank + 1), tool("tc"), "-s", "-j", "qdisc", "show", "dev", INTERFACE]
    for qdisc in json.loads(_output(command, "")):
        if qdisc["kind"] == "tbf":
            return int(qdisc["bytes"])
    raise LabError(
        f"host {rank} of lab '{state.name}' has lost its rate limit",
        f"thinwire lab down --name {state.name}, then up again",
    )


def _batch(state: State, place: int, program: str, lines: list[str]) -> None:
    _output([*enter(state, place), tool(program), "-batch", "-"], "\n".join(lines) + "\n")


def _output(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = " ".join((done.stderr or done.stdout).split())
        raise LabError(
            f"'{' '.join(command)}' failed: {reason}",
            "the kernel needs the modules veth, bridge and sch_tbf (modprobe them, or take a "
            "kernel that has them)",
        )
    return done.stdout


def remove(state: State, grace_s: float) -> None:
    """Ends all programs of the lab (SIGTERM, after the grace SIGKILL), its holder and its files."""
    if states.is_running(state.holder):
        holder = state.holder[0]
        _terminate(state, holder, grace_s)
        holder_program.end_processes(state.inodes, spare=holder)
        # It may have ended by itself meanwhile.
        with contextlib.suppress(ProcessLookupError):
            os.kill(holder, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while states.is_running(state.holder):
                if time.monotonic() > deadline:
                    os.kill(holder, signal.SIGKILL)
                time.sleep(0.005)
    # What a dead holder could not end, and what was on its way in while the holder ended.
    holder_program.end_processes(state.inodes, mark=state.mark)
    holder_program.delete(lab_files(state.name))


def _terminate(state: State, holder: int, grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while time.monotonic() < deadline:
        running = [pid for pid in holder_program.processes_in(state.inodes) if pid != holder]
        if not running:
            return
        for pid in set(running) - asked:
            asked.add(pid)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.02)


def lab_files(name: str) -> list[Path]:
    """Every file and folder a lab keeps: its state, and what mpirun needs."""
    return [states.state_file(name), mpi_folder(name)]


def mpi_folder(name: str) -> Path:
    """For the agent that mpirun calls, whose path must have no space, and for its daemons' sockets,
    whose paths may have 107 bytes at most.
    """
    key = zlib.crc32(str(states.state_file(name)).encode())
    return Path("/tmp") / f"twlab-{os.getuid()}-{key:08x}"


def remove_dead() -> None:
    """Removes what labs whose owner or holder died have left: processes, namespaces, files."""
    for state in states.load_all():
        if not state.alive:
            remove(state, grace_s=0.0)


def congestion_control(state: State) -> str:
    """How TCP inside the lab shares a link: the machine's own setting, 'cubic' or 'bbr'."""
    command = [*enter(state, 1), "cat", "/proc/sys/net/ipv4/tcp_congestion_control"]
    return _output(command, "").strip()
