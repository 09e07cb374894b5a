"""The only place where the Python package reads or writes the environment."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

POLICY = "THINWIRE_POLICY"
STATS = "THINWIRE_STATS"
TRACE = "THINWIRE_TRACE"
LOG = "THINWIRE_LOG"


def policy() -> str | None:
    """The policy for jobs that have no other way to say it; None when unset or empty."""
    return os.environ.get(POLICY) or None


def stats_file() -> str | None:
    """Where each rank appends its run log, docs/run-log.md; None: nowhere."""
    return os.environ.get(STATS) or None


def trace_file() -> str | None:
    """Where each rank appends its trace, docs/trace.md; None: nowhere."""
    return os.environ.get(TRACE) or None


def log_level() -> str | None:
    """Level of the ``thinwire`` logger; None: the program's own settings."""
    return os.environ.get(LOG) or None


def agent_serves_store() -> bool:
    """True when the launcher, not rank 0, hosts the rendezvous store (torchrun says so)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def for_child(
    python_path: list[str],
    policy: str | None = None,
    stats: str | None = None,
    trace: str | None = None,
) -> MutableMapping[str, str]:
    """This process's environment with the given settings; ``python_path`` goes first."""
    environment = dict(os.environ)
    for name, value in ((POLICY, policy), (STATS, stats), (TRACE, trace)):
        if value is not None:
            environment[name] = value
    old = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(python_path + ([old] if old else []))
    return environment
