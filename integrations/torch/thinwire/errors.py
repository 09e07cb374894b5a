"""The exceptions of thinwire: one class for each of the C++ library's errors.

Messages say what happened, which rank and tensor, what was expected and got, and after a line
``hint:`` what to do. Every class is also the built-in exception nearest to its meaning.
"""

from __future__ import annotations


class Error(RuntimeError):
    """Base of all errors that thinwire raises on purpose."""


class InvalidArgument(Error, ValueError):  # noqa: N818
    """The caller broke a precondition: wrong dtype, size, state or order of calls."""


class PolicyError(Error, ValueError):
    """A policy or codec spec that cannot be read or cannot be obeyed."""


class CorruptPayload(Error, ValueError):  # noqa: N818
    """Bytes that no encoder of this version wrote, or damaged ones."""


class MismatchError(Error):
    """Ranks disagree on version, policy or layer table; nothing was exchanged but the handshake."""


class NonFiniteError(Error, ArithmeticError):
    """NaN or Inf in a gradient under ``nonfinite=error``; raised on every rank at the same step."""


class TransportError(Error, ConnectionError):
    """The transport failed, or a group was used after ``abort()``."""


class PeerLost(Error, ConnectionError):  # noqa: N818
    """A peer died or did not answer before the deadline. Memory is at a committed step.

    ``ranks``: those that did not answer, ascending, empty when unknown; ``step``: where it was.
    """

    ranks: tuple[int, ...] = ()
    step: int | None = None


class NotAvailable(Error, NotImplementedError):  # noqa: N818
    """Known to the design, not in this version."""


def _peer_lost_type(ranks: list[int], step: int) -> type[PeerLost]:
    """A PeerLost class for one failure: C++ hands Python a class and a message, no attributes."""
    details = {"ranks": tuple(ranks), "step": step, "__module__": __name__}
    return type("PeerLost", (PeerLost,), details)
