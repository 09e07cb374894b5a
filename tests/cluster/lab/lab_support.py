"""What the lab's tests share."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

Command = Callable[..., subprocess.CompletedProcess[str]]


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Fails when the condition is still false after 10 s."""
    for _ in range(1000):
        if true():
            return
        time.sleep(0.01)
    pytest.fail(f"after 10 s still not true: {what}")
