"""A few integers in shared memory: how the ranks of one run agree without touching the network.

Rank 0 announces at the start of step s that something (stopping, evaluating) happens after step
s. Every other rank looks after it has finished step s, which it can only have finished with rank
0's gradients of step s, so after the announcement: all ranks act on the same step and not one
byte crosses the measured link. The file is mapped by all ranks (processes of one machine); each
cell is an aligned 8-byte word with a single writer.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path

NEVER = -1
_WORD = 8
_STOP, _PAUSE, _ARRIVALS = 0, 1, 2


class BoardTimeoutError(RuntimeError):
    """Some rank did not arrive at a barrier."""


class Board:
    """One process's view of the board. Not thread-safe within a process."""

    def __init__(self, file: Path, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        with open(file, "r+b") as handle:
            self._map = mmap.mmap(handle.fileno(), (_ARRIVALS + world) * _WORD)
        self._cells = memoryview(self._map).cast("q")

    @staticmethod
    def create(file: Path, world: int) -> None:
        """Make the file, with nothing announced and nobody arrived."""
        file.write_bytes(
            NEVER.to_bytes(_WORD, "little", signed=True) * _ARRIVALS + bytes(world * _WORD),
        )

    def clear(self) -> None:
        """Forget announcements. Rank 0 calls it between two barriers."""
        self._cells[_STOP] = self._cells[_PAUSE] = NEVER

    def announce_stop(self, step: int) -> None:
        self._cells[_STOP] = step

    def announce_pause(self, step: int) -> None:
        self._cells[_PAUSE] = step

    def stops_after(self, step: int) -> bool:
        return self._cells[_STOP] == step

    def pauses_after(self, step: int) -> bool:
        return self._cells[_PAUSE] == step

    def barrier(self, timeout_s: float = 120.0) -> None:
        """Wait until every rank has called it equally often."""
        arrived = self._cells[_ARRIVALS + self._rank] + 1
        self._cells[_ARRIVALS + self._rank] = arrived
        deadline = time.monotonic() + timeout_s
        while True:
            late = [r for r in range(self._world) if self._cells[_ARRIVALS + r] < arrived]
            if not late:
                return
            if time.monotonic() > deadline:
                raise BoardTimeoutError(
                    f"rank {self._rank} waited {timeout_s:.0f} s for rank(s) {late}"
                )
            time.sleep(0.0003)
