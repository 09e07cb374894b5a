"""Programs on the hosts: their environment, their output, their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab_support import Command, wait_until
from thinwire_lab import Lab, LabError, bring_up
from thinwire_lab.holder import processes_in

SHOW = "import json, os; print(json.dumps({k: v for k, v in os.environ.items()}))"


def test_each_host_gets_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("RANK", "7")
    with Lab(hosts=3) as lab:
        jobs = [
            lab.popen(rank, [sys.executable, "-c", SHOW], {"EXTRA": "1"}, stdout=subprocess.PIPE)
            for rank in range(3)
        ]
        seen = [json.loads(job.communicate(timeout=30)[0]) for job in jobs]
        for rank, env in enumerate(seen):
            assert env["RANK"] == str(rank)
            assert (env["WORLD_SIZE"], env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"]) == (
                "3",
                "0",
                "1",
            )
            assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == (lab.addresses[0], str(lab.port))
            assert (env["GLOO_SOCKET_IFNAME"], env["OMP_NUM_THREADS"]) == ("eth0", "1")
            assert env["EXTRA"] == "1"
        assert lab.environment(0, {"OMP_NUM_THREADS": "4"})["OMP_NUM_THREADS"] == "4"


def test_hosts_reach_each_other_and_nothing_else() -> None:
    script = (
        "import os, socket\n"
        "links = sorted(name for _, name in socket.if_nameindex())\n"
        "assert links == ['eth0', 'lo'], links\n"
        "try: socket.create_connection(('192.0.2.1', 80), 1); raise SystemExit(1)\n"
        "except OSError: pass\n"
    )
    with Lab(hosts=2) as lab:
        assert lab.run([sys.executable, "-c", script]) == 0


def test_output_is_prefixed_on_request(thinwire_lab: Command) -> None:
    bring_up(2, "1gbit")
    plain = thinwire_lab("run", "--", "echo", "hello")
    assert plain.stdout == "hello\nhello\n"
    marked = thinwire_lab("run", "--prefix", "--", "sh", "-c", "echo out; echo err >&2")
    assert sorted(marked.stdout.splitlines()) == ["[rank 0] out", "[rank 1] out"]
    assert sorted(marked.stderr.splitlines()) == ["[rank 0] err", "[rank 1] err"]


def test_the_first_failure_ends_the_others_and_sets_the_exit_code(thinwire_lab: Command) -> None:
    bring_up(3, "1gbit")
    script = "test $RANK = 1 && exit 7; exec sleep 1000"
    failed = thinwire_lab("run", "--grace", "0.1", "--", "sh", "-c", script)
    assert failed.returncode == 7
    assert "rank 1 exited with 7" in failed.stderr


def test_survivors_have_the_grace_to_report(tmp_path: Path) -> None:
    script = f"test $RANK = 0 && exit 3; sleep 0.5; echo said > {tmp_path}/report"
    with Lab(hosts=2) as lab:
        assert lab.run(["sh", "-c", script], grace_s=20.0) == 3
    assert (tmp_path / "report").read_text() == "said\n"


def test_keep_going_leaves_the_others_running(tmp_path: Path) -> None:
    script = f"test $RANK = 0 && kill -9 $$; sleep 0.5; echo done > {tmp_path}/file"
    with Lab(hosts=2) as lab:
        assert lab.run(["sh", "-c", script], keep_going=True, grace_s=0.0) == 128 + signal.SIGKILL
    assert (tmp_path / "file").read_text() == "done\n"


def test_a_program_that_ignores_the_request_is_killed() -> None:
    script = "trap '' TERM; test $RANK = 0 && exit 5; while :; do sleep 1; done"
    with Lab(hosts=2) as lab:
        assert lab.run(["sh", "-c", script], grace_s=0.0) == 5


def test_past_the_timeout_all_are_ended() -> None:
    with Lab(hosts=2) as lab:
        with pytest.raises(TimeoutError):
            lab.run(["sleep", "1000"], timeout_s=0.3)
        assert len(processes_in(lab._state.inodes)) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_forwards_signals(number: signal.Signals, tmp_path: Path) -> None:
    bring_up(2, "1gbit")
    script = (
        f"trap 'echo > {tmp_path}/caught$RANK; exit 0' INT TERM\n"
        f"echo > {tmp_path}/ready$RANK\n"
        "while :; do sleep 0.05; done"
    )
    run = subprocess.Popen([sys.executable, "-m", "thinwire_lab", "run", "--", "sh", "-c", script])
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    run.send_signal(number)
    assert run.wait(timeout=20) == 128 + number
    assert (tmp_path / "caught0").exists()
    assert (tmp_path / "caught1").exists()


def test_a_signal_while_the_programs_are_started_is_passed_on(thinwire_lab: Command) -> None:
    bring_up(8, "1gbit")
    script = "test $RANK = 0 && kill -TERM $PPID; exec sleep 1000"
    assert thinwire_lab("run", "--", "sh", "-c", script).returncode == 128 + signal.SIGTERM


def test_killing_run_kills_its_programs(tmp_path: Path) -> None:
    lab, _ = bring_up(2, "1gbit")
    script = f"echo > {tmp_path}/ready$RANK; exec sleep 1000"
    run = subprocess.Popen([sys.executable, "-m", "thinwire_lab", "run", "--", "sh", "-c", script])
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    run.kill()
    run.wait(timeout=20)
    inodes = lab._state.inodes
    wait_until(lambda: len(processes_in(inodes)) == 1, "the programs have ended")


def wait_for(*files: Path) -> None:
    wait_until(lambda: all(file.exists() for file in files), f"{files} exist")


def test_mpirun_starts_one_rank_a_host(thinwire_lab: Command) -> None:
    bring_up(3, "1gbit")
    show = "echo $OMPI_COMM_WORLD_RANK $OMPI_COMM_WORLD_SIZE $RANK $(ip -br address show eth0)"
    done = thinwire_lab("run", "--mpi", "--", "sh", "-c", show)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in sorted(done.stdout.splitlines())]
    assert [row[:3] for row in rows] == [[str(i), "3", str(i)] for i in range(3)]
    assert [row[-1] for row in rows] == [f"198.18.0.{i + 1}/24" for i in range(3)]


ALLREDUCE = """
#include <mpi.h>
#include <stdlib.h>
int main(int argc, char** argv) {
  const int count = 250000;
  int rank, size;
  float* values = malloc(count * sizeof *values);
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  for (int i = 0; i < count; ++i) values[i] = rank;
  MPI_Allreduce(MPI_IN_PLACE, values, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  if (values[count - 1] != size * (size - 1) / 2) MPI_Abort(MPI_COMM_WORLD, 9);
  MPI_Finalize();
}
"""


def test_mpi_traffic_crosses_the_links(tmp_path: Path) -> None:
    """A ring allreduce of 1 MB sends 1.5 MB a host; a rendezvous and headers come on top."""
    (tmp_path / "allreduce.c").write_text(ALLREDUCE)
    program = str(tmp_path / "allreduce")
    subprocess.run(["mpicc", "-o", program, str(tmp_path / "allreduce.c")], check=True)
    with Lab(hosts=4, rate="1gbit") as lab:
        assert lab.run([program], mpi=True, timeout_s=60.0) == 0
        sent = lab.sent_bytes()
    assert 4 * 1.5e6 < sum(sent) < 4 * 1.5e6 * 1.2
    assert min(sent) > 1.0e6


def test_mpirun_passes_a_failure_on(thinwire_lab: Command) -> None:
    bring_up(2, "1gbit")
    assert thinwire_lab("run", "--mpi", "--", "sh", "-c", "exit 4").returncode == 4


def test_a_missing_mpirun_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with Lab(hosts=1) as lab:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(LabError, match="mpirun is not installed") as caught:
            lab.run([sys.executable], mpi=True)
    assert caught.value.hint == "apt-get install openmpi-bin"


def test_rank_outside_the_lab_is_refused() -> None:
    with Lab(hosts=2) as lab, pytest.raises(LabError, match="rank 2 is not a host"):
        lab.popen(2, ["true"])


NOBODY = 65534


@pytest.mark.skipif(os.geteuid() != 0, reason="every test of an ordinary user is rootless already")
def test_an_ordinary_user_gets_the_same_lab(tmp_path: Path) -> None:
    """As user nobody: up, link, counters, mpirun, down, all in a user namespace."""
    copy = Path("/tmp") / f"thinwire-lab-rootless-{os.getpid()}"
    source = Path(__file__).resolve().parents[3] / "cluster" / "lab" / "thinwire_lab"
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    env = {**os.environ, "PYTHONPATH": str(copy), "XDG_RUNTIME_DIR": str(copy / "run"), "HOME": "/"}
    # The tests' own Python may lie in a home folder that others cannot enter.
    python = next(
        path
        for path in (os.path.realpath(sys.executable), "/usr/bin/python3")
        if subprocess.run([*become, "test", "-r", path, "-a", "-x", path], check=False).returncode
        == 0
    )

    def lab(*words: str) -> str:
        done = subprocess.run(
            [*become, python, "-m", "thinwire_lab", *words],
            cwd="/", env=env, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    try:
        copy.mkdir(mode=0o755)
        subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
        (copy / "run").mkdir()
        os.chown(copy / "run", NOBODY, NOBODY)
        lab("up", "--hosts", "2", "--rate", "100mbit")
        try:
            assert json.loads(lab("status", "--json", "-"))["rootless"] is True
            send = (
                "import os, socket, time\n"
                "at = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
                "if os.environ['RANK'] == '0':\n"
                "    link = socket.create_server(at).accept()[0]\n"
                "    while link.recv(1 << 20): pass\n"
                "else:\n"
                "    while True:\n"
                "        try: link = socket.create_connection(at); break\n"
                "        except ConnectionRefusedError: time.sleep(0.01)\n"
                "    link.sendall(bytes(100_000))\n"
            )
            lab("run", "--", python, "-c", send)
            lab("rate", "10mbit")
            status = json.loads(lab("status", "--json", "-"))
            assert 100_000 < status["sent_bytes"][1] < 110_000
            assert status["rate"] == "10mbit"
            out = lab("run", "--mpi", "--", "sh", "-c", "echo mpi $OMPI_COMM_WORLD_RANK")
            assert sorted(out.splitlines()) == ["mpi 0", "mpi 1"]
        finally:
            lab("down")
        assert [path.name for path in (copy / "run").glob("*/*")] == ["lock"]
    finally:
        subprocess.run(["rm", "-rf", str(copy)], check=True)
