"""The command line: unchanged scripts under `thinwire run`, and what it says when it cannot."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import tomllib

import pytest
from thinwire import _codec
from torch_ranks import ROOT, environment, free_port

TRAIN = """\
import sys
import tomllib
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("{backend}")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64)))
for step in range(3):
    model.zero_grad()
    torch.manual_seed(10 * step + dist.get_rank())
    model(torch.randn(8, 32)).square().mean().backward()
grads = [p.grad.sum().item() for p in model.parameters()]
# One write: torchrun's ranks share a pipe.
sys.stdout.write(f"trained {{type(model).__name__}} {{grads}}\\n")
dist.barrier()
dist.destroy_process_group()
{ending}
"""


def thinwire(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "thinwire.cli", *arguments],
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_alike(stdout: str, ranks: int = 2) -> None:
    """Every rank says that it has trained, and with which gradients: the same ones."""
    lines = [line for line in stdout.splitlines() if line.startswith("trained ")]
    assert len(lines) == ranks, stdout
    assert len(set(lines)) == 1, stdout
    assert lines[0].startswith("trained DistributedDataParallel [")


def torchrun(ranks: int) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
    ]  # fmt: skip


@pytest.fixture
def script(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN.format(backend="gloo", ending=""))
    return path


def test_unchanged_script_under_torchrun(script: pathlib.Path, tmp_path: pathlib.Path) -> None:
    stats = tmp_path / "stats.jsonl"
    done = thinwire(
        "run", "--policy", "topk:0.05,values=q8", "--stats", str(stats), "--",
        *torchrun(2), str(script), THINWIRE_POLICY="q4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_alike(done.stdout)
    assert "policy topk:0.05,values=q8 (--policy; THINWIRE_POLICY=q4 is set aside)" in done.stderr
    assert "memory" in done.stderr.lower()
    lines = [json.loads(line) for line in stats.read_text().splitlines()]
    ends = [line for line in lines if line["kind"] == "end"]
    assert sorted(line["rank"] for line in ends) == [0, 1]
    for line in ends:
        assert line["steps"] == 3
        assert line["wire_bytes"] > 0
        assert line["layers"][2]["codec"] == "topk:0.05,values=q8"


def test_policy_from_the_environment_and_single_process(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(TRAIN.format(backend="gloo", ending="sys.exit(7)"))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    done = thinwire(
        "run", "--", sys.executable, str(path),
        THINWIRE_POLICY="q4", MASTER_PORT=str(free_port()), **alone,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert_alike(done.stdout, 1)
    assert "policy q4 (THINWIRE_POLICY)" in done.stderr
    done = thinwire("run", sys.executable, str(path), MASTER_PORT=str(free_port()), **alone)
    assert done.returncode == 7, done.stderr
    assert "policy q8 (the default; set --policy or THINWIRE_POLICY)" in done.stderr


def test_backend_by_name(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "train.py"
    path.write_text("import thinwire.torch\n" + TRAIN.format(backend="thinwire", ending=""))
    done = subprocess.run(
        [*torchrun(2), str(path)], env=environment(), capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_alike(done.stdout)
    assert "policy 'q8' (the default; THINWIRE_POLICY is not set)" in done.stderr


def test_own_traceback_first_and_hidden_sitecustomize(tmp_path: pathlib.Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the hidden sitecustomize ran')\n")
    path = tmp_path / "boom.py"
    path.write_text("import os\nprint('env', os.environ['THINWIRE_POLICY'])\n1 / 0\n")
    env = environment()
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = thinwire(
        "run", "--policy", "q8", "--", sys.executable, str(path), PYTHONPATH=env["PYTHONPATH"]
    )
    assert done.returncode == 1
    assert "the hidden sitecustomize ran" in done.stdout
    assert "env q8" in done.stdout
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_signals_reach_the_program(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "wait.py"
    path.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "thinwire.cli", "run", "--", sys.executable, str(path)]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 42


def test_mistakes() -> None:
    bad = thinwire("run", "--policy", "topq:0.1", "--", "true")
    assert bad.returncode == 2
    assert "topk" in bad.stderr
    assert "hint:" in bad.stderr
    nothing = thinwire("run", "--policy", "q8")
    assert nothing.returncode == 2
    assert "no command" in nothing.stderr
    missing = thinwire("run", "--", "no-such-program-here")
    assert missing.returncode == 127
    assert "no-such-program-here" in missing.stderr
    unknown = thinwire("rnu")
    assert unknown.returncode == 2
    assert "run" in unknown.stderr


def test_help_and_version() -> None:
    assert thinwire("--version").stdout == "thinwire 0.1.0\n"
    text = thinwire("--help").stdout
    for command in ("run", "report", "top", "lab", "demo", "bench"):
        assert f"  {command} " in text
    assert "up" in thinwire("lab", "--help").stdout
    assert "--quick" in thinwire("demo", "--help").stdout
    assert "--rate" in thinwire("bench", "steps", "--help").stdout
    other = thinwire("bench", "stepps")
    assert other.returncode == 2
    assert (
        "codecs, curves, gradient, peers, fedzip, layerwise, planner, optim, steps, table"
        in other.stderr
    )


def test_codecs_are_listed_as_on_their_page() -> None:
    page = thinwire("codecs", "--markdown")
    assert page.returncode == 0
    assert page.stdout == (ROOT / "docs" / "codecs.md").read_text(), (
        "thinwire codecs --markdown > docs/codecs.md"
    )
    text = thinwire("codecs").stdout
    for family in _codec.families():
        assert family["use"]
        assert family["sample"].partition(":")[0] in family["words"]
        options = [option for option, *_ in [*family["options"], *_codec.common_options()]]
        for word in (family["name"], family["sample"], *options):
            assert word in text
        for option in options:
            assert f"`{option}`" in page.stdout


def test_policy_in_the_environment_alone(tmp_path: pathlib.Path) -> None:
    """Without `thinwire run`: torch itself calls the package's entry point at its import."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "thinwire_of_the_tests-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: thinwire-of-the-tests\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nthinwire = " + entries["torch.backends"]["thinwire"] + "\n"
    )
    path = tmp_path / "train.py"
    path.write_text(TRAIN.format(backend="gloo", ending="assert model._thinwire_reducer"))
    env = environment(THINWIRE_POLICY="q4")
    env["PYTHONPATH"] += os.pathsep + str(tmp_path)
    done = subprocess.run(
        [*torchrun(2), str(path)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_alike(done.stdout)
    assert "q4" in done.stderr
