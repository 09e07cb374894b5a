"""What the package says: the ``thinwire`` logger, on stderr where the program set up no logging."""

from __future__ import annotations

import logging

from thinwire import _environment

logger = logging.getLogger("thinwire")


def say(text: str, *, warning: bool = False) -> None:
    """Log a message that a user should see. Thread-safe."""
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("thinwire: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(_environment.log_level() or logging.INFO)
    logger.log(logging.WARNING if warning else logging.INFO, text)
