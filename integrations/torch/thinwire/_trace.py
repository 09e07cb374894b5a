"""The trace's file, as far as Python has to do with it: comm/trace.h writes it."""

from __future__ import annotations

import fcntl
import itertools
import os
from pathlib import Path

from thinwire.errors import InvalidArgument

_BEGIN = b'[\n{"name":"process_name"'
_models = itertools.count()


def next_model() -> int:
    """The number of this process's next model that is traced."""
    return next(_models)


def begin_file(file: str | os.PathLike[str]) -> Path:
    """A new trace without events, also in an older one's place; the absolute path.

    InvalidArgument where it cannot be written, and for a file that holds something else.
    """
    path = Path(file).absolute()
    try:
        with open(path, "a+b") as trace:
            fcntl.flock(trace, fcntl.LOCK_EX)  # ranks may be started by a command each
            trace.seek(0)
            if not _BEGIN.startswith(trace.read(len(_BEGIN))):
                raise InvalidArgument(
                    f"trace: {path}: expected a new file or a trace, got something else\n"
                    "hint: name another file"
                )
            trace.truncate(0)
            trace.write(b"[\n")
    except OSError as error:
        raise InvalidArgument(
            f"trace: cannot write to {path}: {error.strerror}\n"
            "hint: name a file in a folder that exists and may be written to"
        ) from error
    return path
