"""The process that keeps a lab's network namespaces alive. Run by path, never imported.

    python holder.py HOSTS STATE_FILE...

It makes one namespace for the switch and one for each host, keeps them open as file descriptors
(others enter by /proc/PID/fd/N) and prints one JSON line saying which. Namespaces vanish with
their last process and descriptor, so a lab needs no other clean-up than the end of its processes.

Its standard input is a pipe whose other end the lab's owner holds. End of file means that the
owner is gone, however it died: the holder then ends all processes in its namespaces, removes the
given files and exits. A line "keep" makes the lab outlive its owner; SIGTERM ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

CLONE_NEWNET = 0x40000000
# A killed process may take a moment to leave its namespace, and a fork may outrun one sweep.
MAX_SWEEPS = 100


def new_network_namespace() -> int:
    """Moves this process to a fresh namespace and returns a descriptor of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    # IPv6 autoconfiguration would put frames on the wire that no program asked for. Loopback,
    # which exists already, keeps its ::1. Containers may show these settings read-only; the
    # price is then a few hundred bytes a host at the start.
    with contextlib.suppress(OSError):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
    return os.open("/proc/self/ns/net", os.O_RDONLY)


def processes_in(namespaces: Iterable[int], mark: str = "") -> list[int]:
    """Process ids, other than our own, whose network namespace has one of these inode numbers.

    The kernel gives a vanished namespace's number to the next one made. Unless the holder is alive,
    only processes whose environment has the lab's `mark` are certain to be the lab's.
    """
    wanted = {f"net:[{inode}]" for inode in namespaces}
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if os.readlink(entry / "ns/net") not in wanted:
                continue
            if not mark or mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def end_processes(namespaces: Iterable[int], spare: int = 0, mark: str = "") -> None:
    """Kills what runs in these namespaces, except the process `spare`; mark: see processes_in."""
    inodes = list(namespaces)
    for _ in range(MAX_SWEEPS):
        victims = [pid for pid in processes_in(inodes, mark) if pid != spare]
        if not victims:
            return
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def delete(paths: Iterable[Path]) -> None:
    """Removes files and whole folders, as far as they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def main(argv: list[str]) -> int:
    hosts, files = int(argv[1]), argv[2:]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    try:
        descriptors = [new_network_namespace() for _ in range(hosts + 1)]
    except OSError as error:
        print(json.dumps({"error": error.strerror}), flush=True)
        return 1
    inodes = [os.fstat(fd).st_ino for fd in descriptors]
    print(json.dumps({"descriptors": descriptors, "inodes": inodes}), flush=True)
    os.close(1)
    try:
        if sys.stdin.readline() == "keep\n":
            while True:
                signal.pause()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_processes(inodes)
        delete(map(Path, files))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
