"""The scale simulation at 8 and 16 ranks."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]


@pytest.mark.skipif(shutil.which("smpirun") is None, reason="no smpirun (Debian: libsimgrid-dev)")
def test_predictions_pick_the_fastest_collective() -> None:
    build = pathlib.Path(os.environ.get("TW_BUILD", ROOT / "build" / "dev")).name
    done = subprocess.run(
        [sys.executable, "-m", "cluster.scale", "--quick", "--build", build],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "topk:0.01 split-reduce" in done.stdout
