"""The plain PyTorch example, as a user starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pytorch" / "train.py"


def test_trains_under_torchrun(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(SCRIPT), "--steps", "60", "--width", "128"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 60: loss" in done.stdout
    found = re.search(r"test accuracy ([\d.]+)%", done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 60.0


def test_knows_nothing_of_thinwire():
    code = SCRIPT.read_text(encoding="utf-8").split('"""', 2)[2]
    assert "thinwire" not in code
