"""Puts the lab's source on the path and keeps every lab of a test run apart from the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[3] / "cluster" / "lab"
sys.path.insert(0, str(SOURCE))

from thinwire_lab import Lab, NoNamespaceError  # noqa: E402
from thinwire_lab import lab as labs  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def kernel_allows_labs() -> None:
    """What no set-up can install: a kernel or container that grants namespaces."""
    try:
        Lab(hosts=1).close()
    except NoNamespaceError as error:
        pytest.skip(error.message)


@pytest.fixture(autouse=True)
def runtime_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    yield tmp_path
    for name in labs.names():
        labs.down(name)


@pytest.fixture
def thinwire_lab() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `thinwire lab` with these arguments to its end."""

    def call(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "thinwire_lab", *words],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return call
