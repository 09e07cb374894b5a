"""Single keys of a terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any, Protocol, Self


class Keys(Protocol):
    def read(self, seconds: float) -> str:
        """The next key; empty when none came for so long."""


class NoKeys:
    """In the place of a keyboard that there is not."""

    def read(self, seconds: float) -> str:
        time.sleep(seconds)
        return ""


class Keyboard:
    """The terminal on stdin, which neither echoes nor waits for whole lines within the context."""

    def __enter__(self) -> Self:
        self._terminal = sys.stdin.fileno()
        self._before: list[Any] = termios.tcgetattr(self._terminal)
        tty.setcbreak(self._terminal)
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        termios.tcsetattr(self._terminal, termios.TCSADRAIN, self._before)

    def read(self, seconds: float) -> str:
        ready, _, _ = select.select([self._terminal], [], [], seconds)
        if not ready:
            return ""
        # A special key is several bytes, and none of ours. The terminal's end is the user's leave.
        typed = os.read(self._terminal, 32)
        return typed.decode(errors="replace") if typed else "q"
