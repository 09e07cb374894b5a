"""The plain PyTorch example, as a user starts it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "pytorch"
SCRIPT = EXAMPLES / "train.py"


def torchrun(folder, script, *options):
    """What the script printed on two ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node=2", str(script), *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def figure(pattern, printed):
    found = re.search(pattern, printed)
    assert found, printed
    return float(found[1])


def test_trains_under_torchrun(tmp_path):
    printed = torchrun(tmp_path, SCRIPT, "--steps", "60", "--width", "128")
    assert "step 60: loss" in printed
    assert figure(r"test accuracy ([\d.]+)%", printed) > 60.0


def test_minilm_is_fine_tuned_with_one_bit_adam(tmp_path):
    script = EXAMPLES / "finetune_minilm.py"
    log = tmp_path / "run.jsonl"
    options = ["--steps", "12", "--freeze-step", "6", "--batch", "4", "--held-out", "64"]
    printed = torchrun(tmp_path, script, *options, "--run-log", str(log))
    assert "step 10: loss" in printed
    assert "frozen after 6" in printed
    assert figure(r"test accuracy ([\d.]+)%", printed) > 50.0
    assert figure(r"1/([\d.]+) of fp32", printed) == pytest.approx(2.0, rel=0.1)
    assert '"accuracy"' in log.read_text(encoding="utf-8")


def test_the_lstm_learns_with_dgc(tmp_path):
    script = EXAMPLES / "char_lstm_dgc.py"
    printed = torchrun(tmp_path, script, "--steps", "20", "--density", "0.01")
    assert "step 20: loss" in printed
    assert figure(r"test perplexity ([\d.]+)", printed) < 60.0  # of 76 characters
    assert figure(r"1/([\d.]+) of fp32", printed) > 20.0


def test_knows_nothing_of_thinwire():
    code = SCRIPT.read_text(encoding="utf-8").split('"""', 2)[2]
    assert "thinwire" not in code
