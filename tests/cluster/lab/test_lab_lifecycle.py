"""Up, down, and everything a lab must survive: twice, side by side, Ctrl-C, sudden death."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab_support import Command, wait_until
from thinwire_lab import Lab, LabError, bring_up, down, namespaces
from thinwire_lab import lab as labs
from thinwire_lab import state as states
from thinwire_lab.holder import processes_in

# A program that makes a lab, starts a sleeper in it, says so and waits.
OWNER = """
import subprocess, sys, time
from thinwire_lab import Lab
with Lab(hosts=2, name="owned") as lab:
    lab.popen(1, ["sleep", "1000"])
    print("ready", flush=True)
    time.sleep(1000)
"""


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 9), 1)"


def start_owner() -> tuple[subprocess.Popen[str], states.State]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "ready\n"
    owner.stdout.close()
    state = states.load("owned")
    assert state is not None
    inodes = state.inodes
    wait_until(lambda: len(processes_in(inodes)) == 2, "holder and sleeper are in the lab")
    return owner, state


def test_up_twice_is_no_error_and_down_twice_neither(thinwire_lab: Command) -> None:
    assert thinwire_lab("up", "--hosts", "3", "--rate", "10mbit").returncode == 0
    again = thinwire_lab("up", "--hosts", "3", "--rate", "20mbit")
    assert again.returncode == 0
    assert "was up already" in again.stderr
    lab = Lab.attach()
    assert (lab.hosts, str(lab.rate)) == (3, "20mbit")
    assert thinwire_lab("down").returncode == 0
    assert labs.names() == []
    assert thinwire_lab("down").returncode == 0


def test_up_with_other_hosts_is_refused(thinwire_lab: Command) -> None:
    bring_up(2, "1gbit")
    refused = thinwire_lab("up", "--hosts", "3")
    assert refused.returncode == 2
    assert "2 hosts, not 3" in refused.stderr
    assert "hint: thinwire lab down" in refused.stderr


def test_a_lab_brought_up_outlives_its_command(thinwire_lab: Command) -> None:
    assert thinwire_lab("up", "--hosts", "2", "--name", "stays").returncode == 0
    ran = thinwire_lab("run", "--name", "stays", "--", "sh", "-c", "echo host $RANK")
    assert sorted(ran.stdout.split("\n")) == ["", "host 0", "host 1"]


def test_two_labs_side_by_side() -> None:
    with Lab(hosts=2) as one, Lab(hosts=2) as two:
        assert one.name != two.name
        assert not set(one.addresses) & set(two.addresses)
        reach = [
            sys.executable,
            "-c",
            "import socket, sys; socket.create_connection(sys.argv[1:], 1)",
        ]
        assert one.run([*reach, two.addresses[0], "9"], stderr=subprocess.DEVNULL) != 0
        two.close()
        assert one.run(["true"]) == 0


def test_closing_ends_what_runs_and_leaves_no_file(runtime_folder: Path) -> None:
    lab = Lab(hosts=2)
    sleeper = lab.popen(0, ["sleep", "1000"])
    daemon = lab.popen(1, ["sh", "-c", "setsid sleep 1000 & exit 0"])
    assert daemon.wait(timeout=10) == 0
    inodes = lab._state.inodes
    lab.close()
    lab.close()
    assert sleeper.wait(timeout=10) == -signal.SIGTERM
    assert processes_in(inodes) == []
    assert [path.name for path in states.folder().iterdir()] == ["lock"]
    with pytest.raises(LabError, match="is down"):
        lab.sent_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_owners_end_removes_its_lab(number: signal.Signals) -> None:
    owner, state = start_owner()
    owner.send_signal(number)
    owner.wait(timeout=20)
    wait_until(lambda: not processes_in(state.inodes), "no process left in the lab")
    wait_until(lambda: not states.is_running(state.holder), "the holder has ended")
    wait_until(lambda: not states.state_file("owned").exists(), "the state file is gone")


@pytest.mark.parametrize("clean_up", ["up", "down", "Lab"])
def test_the_next_command_removes_what_a_crash_left(clean_up: str) -> None:
    """The worst case: owner and holder are killed at once, so nobody was left to clean up."""
    owner, state = start_owner()
    os.kill(state.holder[0], signal.SIGSTOP)
    owner.kill()
    owner.wait(timeout=20)
    os.kill(state.holder[0], signal.SIGKILL)
    wait_until(lambda: not states.is_running(state.holder), "the holder has ended")
    assert processes_in(state.inodes, state.mark)
    assert states.state_file("owned").exists()
    if clean_up == "up":
        bring_up(1, "1gbit")
    elif clean_up == "down":
        down()
    else:
        Lab(hosts=1).close()
    assert processes_in(state.inodes, state.mark) == []
    assert not states.state_file("owned").exists()


def test_a_crashed_labs_clean_up_spares_who_has_its_namespaces_now() -> None:
    """The kernel reuses namespace numbers, so a dead lab's may be those of a stranger."""
    stranger = Lab(hosts=1)
    program = stranger.popen(0, ["sleep", "1000"])
    try:
        wait_until(lambda: len(processes_in(stranger._state.inodes)) == 2, "the program is in")
        dead = states.State(**{**vars(stranger._state), "name": "dead", "token": "0" * 32})
        dead.holder = (dead.holder[0], dead.holder[1] - 1)
        dead.save()
        assert down("dead") is False
        assert not states.state_file("dead").exists()
        assert program.poll() is None
    finally:
        stranger.close()
        program.wait(timeout=10)


def test_a_dead_lab_is_not_mistaken_for_one_that_is_up(thinwire_lab: Command) -> None:
    lab, _ = bring_up(2, "1gbit")
    os.kill(lab._state.holder[0], signal.SIGKILL)
    wait_until(lambda: not states.is_running(lab._state.holder), "the holder has ended")
    status = thinwire_lab("status")
    assert status.returncode == 2
    assert "no lab named 'default'" in status.stderr
    assert thinwire_lab("up", "--hosts", "2").returncode == 0
    assert thinwire_lab("status").returncode == 0


def test_status_is_a_table_and_json(thinwire_lab: Command, tmp_path: Path) -> None:
    bring_up(3, "100mbit")
    file = tmp_path / "status.json"
    shown = thinwire_lab("status", "--json", str(file))
    assert shown.returncode == 0
    assert "198.18.0.3" in shown.stdout
    status = json.loads(file.read_text())
    assert status["addresses"] == ["198.18.0.1", "198.18.0.2", "198.18.0.3"]
    assert (status["rate"], status["burst_bytes"], len(status["sent_bytes"])) == (
        "100mbit",
        12500,
        3,
    )


def test_a_file_that_cannot_be_written_is_named(thinwire_lab: Command) -> None:
    bring_up(1, "1gbit")
    done = thinwire_lab("status", "--json", "/no/such/folder/status.json")
    assert done.returncode == 2
    assert "/no/such/folder/status.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_environment_replaces_flags_and_says_so(thinwire_lab: Command) -> None:
    env = {"THINWIRE_LAB_NAME": "envy", "THINWIRE_LAB_HOSTS": "3", "THINWIRE_LAB_RATE": "20mbit"}
    done = thinwire_lab("up", "--rate", "30mbit", **env)
    assert done.returncode == 0
    assert "--hosts 3 from THINWIRE_LAB_HOSTS" in done.stderr
    assert "--rate" not in done.stderr
    lab = Lab.attach("envy")
    assert (lab.hosts, str(lab.rate)) == (3, "30mbit")


def test_rate_command(thinwire_lab: Command) -> None:
    lab, _ = bring_up(2, "100mbit")
    assert thinwire_lab("rate", "10mbit").returncode == 0
    assert str(lab.rate) == "10mbit"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["up", "--rate", "fast"], "'fast' is not a rate"),
        (["up", "--hosts", "0"], "a lab of 0 hosts"),
        (["up", "--hosts", "300"], "a lab of 300 hosts"),
        (["up", "--hosts", "many"], "'many' is not a number"),
        (["up", "--name", "../x"], "'../x' cannot name a lab"),
        (["run", "--name", "nowhere", "--", "true"], "no lab named 'nowhere'"),
        (["status", "--name", "nowhere"], "no lab named 'nowhere'"),
        (["rate", "10mbit", "--name", "nowhere"], "no lab named 'nowhere'"),
        (["run", "--", "no-such-program"], "'no-such-program' is not found"),
        (["run"], "no command to run"),
        (["rate", "1tbit"], "'1tbit' is not a rate"),
    ],
)
def test_bad_input_names_the_cause_and_a_way_out(
    thinwire_lab: Command, words: list[str], says: str
) -> None:
    if words[0] != "up":
        bring_up(1, "1gbit")
    done = thinwire_lab(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "\nhint: " in done.stderr


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_a, **_k: None)
    with pytest.raises(LabError, match="'ip', which is not installed") as caught:
        Lab(hosts=1)
    assert caught.value.hint == "apt-get install iproute2"


def test_an_interrupted_up_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    holders = []

    def interrupted(state: states.State, _rate: object) -> None:
        holders.append(state.holder)
        raise KeyboardInterrupt

    monkeypatch.setattr("thinwire_lab.namespaces.connect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bring_up(2, "1gbit")
    assert not states.is_running(holders[0])
    assert labs.names() == []


def test_without_permission_both_reasons_are_given(
    thinwire_lab: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in holder refuses the way a kernel without namespaces does."""
    refusing = tmp_path / "holder.py"
    refusing.write_text("""print('{"error": "Operation not permitted"}')\n""")
    monkeypatch.setattr("thinwire_lab.holder.__file__", str(refusing))
    with pytest.raises(LabError, match="grants no network namespace") as caught:
        Lab(hosts=1)
    assert caught.value.message.count("Operation not permitted") == 2
    assert "--cap-add" in caught.value.hint
    assert labs.names() == []


def plain_state(**fields: Any) -> states.State:
    """A lab's state without a lab."""
    return states.State(
        **{
            "name": "plain",
            "hosts": 0,
            "rate": "1gbit",
            "subnet": 0,
            "rootless": False,
            "holder": (0, 0),
            "owner": None,
            "token": "token",
            "descriptors": [],
            "inodes": [],
            **fields,
        }
    )


def test_a_holder_that_ends_during_the_grace_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    holder = subprocess.Popen(["sleep", "1000"])
    state = plain_state(holder=states.process_identity(holder.pid))
    state.save()

    def end_holder(*_: object) -> None:
        holder.kill()
        holder.wait()

    monkeypatch.setattr(namespaces, "_terminate", end_holder)
    namespaces.remove(state, grace_s=0.0)
    assert states.load("plain") is None


def test_labs_get_the_lowest_free_network_of_512() -> None:
    everything = [plain_state(subnet=number) for number in range(512)]
    assert states.free_subnet(everything[:3] + everything[4:]) == 3
    assert states.free_subnet(everything[:511]) == 511
    assert states.host_address(511, 0) == "198.19.255.1"
    with pytest.raises(LabError, match="all 512 networks"):
        states.free_subnet(everything)
