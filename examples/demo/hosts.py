"""Where the workers run: the lab's hosts behind emulated links, or plain processes on loopback.

Used from one thread.
"""

from __future__ import annotations

import os
import socket
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

LOOPBACK = "loopback"


class Hosts(ABC):
    """`count` hosts, each of which runs one worker."""

    count: int

    @abstractmethod
    def spawn(self, rank: int, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        """Start argv on one host, with RANK, WORLD_SIZE and GLOO_SOCKET_IFNAME set."""

    @abstractmethod
    def set_rate(self, rate: str) -> None:
        """Another speed for every link, also while workers run."""

    @abstractmethod
    def sent_bytes(self) -> float:
        """Bytes on the wire that a host has sent so far, headers included: the mean over the
        hosts."""

    @abstractmethod
    def describe(self) -> str:
        """One line for headers of tables."""

    @abstractmethod
    def close(self) -> None:
        """End what runs on the hosts and remove them."""


class LabHosts(Hosts):
    """Network namespaces of `thinwire lab`. All links start at the first of `rates`; the others are
    only checked, so that a bad one is refused at once."""

    def __init__(self, count: int, rates: list[str]) -> None:
        from thinwire_lab import Lab, Rate

        parsed = [Rate.parse(rate) for rate in rates]
        self.count = count
        self._lab = Lab(hosts=count, rate=parsed[0])

    def spawn(self, rank: int, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        return self._lab.popen(rank, argv, **options)

    def set_rate(self, rate: str) -> None:
        self._lab.set_rate(rate)

    def sent_bytes(self) -> float:
        return sum(self._lab.sent_bytes()) / self.count

    def describe(self) -> str:
        status = self._lab.status()
        how = "rootless" if status.rootless else "root"
        return (
            f"{self.count} lab hosts ({how}), one process a host, TCP {status.congestion_control}"
        )

    def close(self) -> None:
        self._lab.close()


class LoopbackHosts(Hosts):
    """Processes of this machine that talk over 127.0.0.1: no rate, for tests and for trying
    things out."""

    def __init__(self, count: int) -> None:
        self.count = count

    def spawn(self, rank: int, argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        env = {**os.environ, **(options.pop("env", None) or {})}
        env |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.count),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(argv, env=env, **options)

    def set_rate(self, rate: str) -> None:
        if rate != LOOPBACK:
            raise ValueError(
                f"processes on loopback have no rate, so '{rate}' cannot be set; give '{LOOPBACK}'"
            )

    def sent_bytes(self) -> float:
        return interface_sent("lo") / self.count

    def describe(self) -> str:
        return f"{self.count} processes over loopback on {socket.gethostname()}, no rate limit"

    def close(self) -> None:
        pass


def interface_sent(interface: str) -> int:
    """Bytes that a network interface of this process's namespace has sent; 0 when there is none
    of that name."""
    return sent_in(Path("/proc/self/net/dev").read_text(encoding="ascii"), interface)


def sent_in(table: str, interface: str) -> int:
    """The same from the text of /proc/net/dev."""
    for line in table.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    return 0
