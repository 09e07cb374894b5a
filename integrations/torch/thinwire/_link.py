"""The links between the processes of a job, measured pair by pair: which of them are slow."""

from __future__ import annotations

import itertools
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

_FEW_BYTES, _FIRST_BYTES, _MOST_BYTES, _GROWTH = 64, 1 << 14, 1 << 24, 4
_REPEATS = 5
_ENOUGH_SECONDS = 0.02
"""Of a message that says what bytes cost."""
_ALIKE = 1.5
"""Links whose speeds differ by less are one kind of link."""
_MOST_LINES = 8


@dataclass(frozen=True)
class PairLink:
    """What a message between two ranks takes: latency + bytes / rate."""

    ranks: tuple[int, int]
    latency: float
    """Seconds."""
    rate: float
    """Bytes a second in one direction, while the other one is idle."""

    def text(self) -> str:
        return (
            f"rank {self.ranks[0]} – rank {self.ranks[1]}: {8e-9 * self.rate:.3g} Gbit/s, "
            f"{1e6 * self.latency:.0f} us"
        )


def measure(tell: Callable[[str], None]) -> list[PairLink]:
    """Of one rank of each host with every other, or of all ranks where there is one host; over the
    default group. Collective, the same on all ranks. tell: is told what is measured, on rank 0.
    """
    rank = dist.get_rank()
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    first_of = {host: hosts.index(host) for host in hosts}
    measured = sorted(first_of.values()) if len(first_of) > 1 else list(range(len(hosts)))
    rounds = _rounds(measured)
    if rank == 0:
        count = len(measured) * (len(measured) - 1) // 2
        tell(f"measuring {count} links in {len(rounds)} rounds ...")
    mine = []
    for pairs in rounds:
        dist.barrier()  # nobody else's messages are on the way
        for pair in pairs:
            if rank in pair:
                link = _measure_pair(pair)
                if rank == pair[0]:
                    mine.append(link)
    everybody: list[list[PairLink]] = [[] for _ in hosts]
    dist.all_gather_object(everybody, mine)
    return sorted(itertools.chain(*everybody), key=lambda link: link.ranks)


def _rounds(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    """All pairs, in rounds in which each rank has one partner at the most: the circle method of
    tournaments."""
    circle: list[int | None] = list(ranks)
    if len(circle) % 2:
        circle.append(None)  # who meets it has a rest
    rounds = []
    for _ in range(len(circle) - 1):
        meetings = zip(circle[: len(circle) // 2], reversed(circle), strict=False)
        known = [(a, b) for a, b in meetings if a is not None and b is not None]
        rounds.append([(min(pair), max(pair)) for pair in known])
        circle.insert(1, circle.pop())
    return rounds


def _measure_pair(pair: tuple[int, int]) -> PairLink:
    def least(size: int) -> float:
        return min(_there_and_back(pair, size) for _ in range(_REPEATS))

    _there_and_back(pair, _FEW_BYTES)  # the connection is made with the first
    latency = max(least(_FEW_BYTES) / 2, 1e-7)
    size = _FIRST_BYTES
    while True:
        # Both ends go by the first one's clock.
        word = torch.tensor([least(size) / 2 - latency])
        if dist.get_rank() == pair[0]:
            dist.send(word, pair[1])
        else:
            dist.recv(word, pair[0])
        seconds = float(word)
        if seconds >= _ENOUGH_SECONDS or size * _GROWTH > _MOST_BYTES:
            return PairLink(pair, latency, size / max(seconds, 1e-7))
        size *= _GROWTH


def _there_and_back(pair: tuple[int, int], size: int) -> float:
    message = torch.zeros(size, dtype=torch.uint8)
    here, there = pair if dist.get_rank() == pair[0] else pair[::-1]
    began = time.perf_counter()
    if here == pair[0]:
        dist.send(message, there)
        dist.recv(message, there)
    else:
        dist.recv(message, there)
        dist.send(message, there)
    return time.perf_counter() - began


def slowest(links: Sequence[PairLink]) -> tuple[float, float]:
    """(latency, rate) that a collective over all ranks goes by: those of the slowest pair."""
    return max(link.latency for link in links), min(link.rate for link in links)


def describe(links: Sequence[PairLink]) -> list[str]:
    """Lines: one where all are alike, else the slow ones one by one, the slowest first."""
    rates = [link.rate for link in links]
    latencies = [link.latency for link in links]

    def span(values: Sequence[float], format_: str) -> str:
        texts = [format(value, format_) for value in (min(values), max(values))]
        return texts[0] if texts[0] == texts[1] else "–".join(texts)

    lines = [
        f"{len(links)} pair{'' if len(links) == 1 else 's'} of ranks: "
        f"{span([8e-9 * rate for rate in rates], '.3g')} Gbit/s, "
        f"{span([1e6 * latency for latency in latencies], '.0f')} us"
    ]
    usual = statistics.median_high(rates)
    slow = sorted(
        (link for link in links if link.rate * _ALIKE < usual), key=lambda link: link.rate
    )
    if slow:
        lines.append("collectives go by the slowest; slower than the usual link:")
        lines += [f"  {link.text()}" for link in slow[:_MOST_LINES]]
        if len(slow) > _MOST_LINES:
            lines.append(f"  and {len(slow) - _MOST_LINES} more")
    return lines
