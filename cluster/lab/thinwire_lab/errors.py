"""The lab's one error type. Thread safe: plain data."""

from __future__ import annotations


class LabError(Exception):
    """What went wrong, and what to do about it.

    The command line prints `message`, then `hint: ...`, and exits with 2.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message}\nhint: {hint}" if hint else message)
        self.message = message
        self.hint = hint


class NoNamespaceError(LabError):
    """The kernel or the container grants no network namespace to this user."""
