"""The demo from end to end on two processes, tiny; what happens when a method fails; bad input."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from examples.demo.__main__ import parse
from examples.demo.methods import check_spec, label
from examples.demo.records import read_json_lines

ROOT = Path(__file__).resolve().parents[2]


SOURCES = [str(ROOT / "cluster" / "lab"), str(ROOT / "integrations" / "torch")]
sys.path[:0] = [path for path in SOURCES if path not in sys.path]


def demo(*arguments, **env):
    path = os.pathsep.join([*SOURCES, os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "examples.demo", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def hosts_here():
    """Lab hosts, or processes on loopback where the system grants no network namespace."""
    from thinwire_lab import Lab, LabError

    try:
        Lab(hosts=1).close()
    except LabError:
        return ["--loopback"]
    return ["--rate", "1gbit"]


def test_two_hosts_from_end_to_end_with_a_method_that_fails(tmp_path):
    done = demo(
        *hosts_here(),
        *("--hosts", "2", "--seconds", "1", "--task", "mnist", "--out", str(tmp_path)),
        *("--method", "thinwire:no-such-family", "--method", "none"),
        *("--method", "thinwire:topk:0.01,values=q8"),
        NO_COLOR="1",
    )
    assert done.returncode == 1, done.stderr
    _, (failed, plain, thin) = read_json_lines(tmp_path / "runs.jsonl")
    assert failed.failed
    assert "failed: thinwire no-such-family" in done.stdout
    assert plain.replicas_identical
    assert thin.replicas_identical
    assert thin.wire_mb_step < plain.wire_mb_step / 20
    assert plain.steps >= 1
    assert plain.bound_ms > 0
    assert plain.curve[-1].value == plain.value
    assert plain.wire_mb_step == pytest.approx(23.3, rel=0.1)
    assert "\x1b" not in done.stdout + done.stderr
    for name in ("demo.html", "demo.png", "curves.png", "runs.jsonl"):
        assert (tmp_path / name).stat().st_size > 0
        assert str(tmp_path / name) in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "nonsense"], "unknown method 'nonsense'"),
        (["--hosts", "1"], "at least 2 hosts"),
        (["--seconds", "0"], "more than 0"),
        (["--loopback", "--rate", "1gbit"], "--rate cannot be given"),
        (["--task", "imagenet"], "invalid choice"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(arguments, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_method_specs():
    assert label(check_spec("thinwire:topk:0.01,values=q8")) == "thinwire topk:0.01,values=q8"
    assert label(check_spec("powersgd:4")) == "PyTorch PowerSGD rank 4"
    for bad in ("powersgd", "powersgd:0", "thinwire", "thinwire:", "None"):
        with pytest.raises(ValueError, match="unknown method"):
            check_spec(bad)
