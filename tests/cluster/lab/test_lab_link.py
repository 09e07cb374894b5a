"""The link is honest: thin traffic pays, the counters count it, and a new rate takes effect."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from thinwire_lab import Lab, LabError, Rate

PROBE = Path(__file__).with_name("lab_link_probe.py")
# IPv4 and TCP headers with time stamps, and the Ethernet header: what each 1448 bytes drag along.
SEGMENT_BYTES, HEADER_BYTES = 1448, 66


def wire_bytes(payload: int) -> int:
    return payload + -(-payload // SEGMENT_BYTES) * HEADER_BYTES


def probe(lab: Lab, size: int, count: int, silence_s: float) -> list[float]:
    """Seconds that each of `count` messages of `size` bytes took from host 1 to host 0."""
    lab.fresh_port()
    argv = [sys.executable, str(PROBE), str(size), str(count), str(silence_s)]
    receiver = lab.popen(0, argv, stdout=subprocess.PIPE)
    sender = lab.popen(1, argv)
    out, _ = receiver.communicate(timeout=60)
    assert sender.wait(timeout=60) == 0
    times: list[float] = json.loads(out)
    return times


@pytest.mark.parametrize(("size", "tolerance"), [(100_000, 0.15), (10_000, 0.30)])
def test_thin_traffic_pays_after_a_silence(size: int, tolerance: float) -> None:
    rate = Rate.parse("10mbit")
    with Lab(hosts=2, rate=rate) as lab:
        took = statistics.median(probe(lab, size, count=5, silence_s=1.0))
    expected = rate.wire_seconds(wire_bytes(size))
    assert took == pytest.approx(expected, rel=tolerance)


def test_receiving_is_limited_too() -> None:
    """Three hosts send to one at once: its own cable, not theirs, sets the time."""
    rate, size = Rate.parse("20mbit"), 200_000
    script = (
        "import os, socket, time\n"
        "address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))\n"
        "if os.environ['RANK'] == '0':\n"
        "    server = socket.create_server(address)\n"
        "    links = [server.accept()[0] for _ in range(3)]\n"
        "    start = time.monotonic()\n"
        "    for link in links: link.sendall(b'g')\n"
        "    for link in links:\n"
        "        while link.recv(1 << 20): pass\n"
        "    print(time.monotonic() - start)\n"
        "else:\n"
        "    while True:\n"
        "        try: link = socket.create_connection(address); break\n"
        "        except ConnectionRefusedError: time.sleep(0.01)\n"
        "    link.recv(1)\n"
        f"    link.sendall(bytes({size}))\n"
    )
    with Lab(hosts=4, rate=rate) as lab:
        argv = [sys.executable, "-c", script]
        receiver = lab.popen(0, argv, stdout=subprocess.PIPE)
        senders = [lab.popen(rank, argv) for rank in (1, 2, 3)]
        out, _ = receiver.communicate(timeout=60)
        assert [sender.wait(timeout=60) for sender in senders] == [0, 0, 0]
    alone = rate.wire_seconds(wire_bytes(size))
    assert float(out) > 2.7 * alone


def test_rate_changes_while_bytes_are_on_their_way() -> None:
    rate, size = Rate.parse("10mbit"), 3_000_000
    with Lab(hosts=2, rate=rate) as lab:
        argv = [sys.executable, str(PROBE), str(size), "1", "0"]
        receiver = lab.popen(0, argv, stdout=subprocess.PIPE)
        sender = lab.popen(1, argv)
        while lab.sent_bytes()[1] < size // 10:
            assert sender.poll() is None
        lab.set_rate("1gbit")
        out, _ = receiver.communicate(timeout=60)
        assert sender.wait(timeout=60) == 0
    assert json.loads(out)[0] < 0.7 * rate.wire_seconds(size)


def test_a_new_rate_takes_effect() -> None:
    """The least time of three: what else the machine does can only add."""
    with Lab(hosts=2, rate="10mbit") as lab:
        slow = min(probe(lab, 100_000, count=3, silence_s=0.2))
        lab.set_rate("100mbit")
        fast = min(probe(lab, 100_000, count=3, silence_s=0.2))
        assert str(lab.rate) == "100mbit"
        lab.set_rate("unlimited")
        free = min(probe(lab, 100_000, count=3, silence_s=0.2))
    assert slow > 4 * fast > 4 * free


@pytest.mark.parametrize("rate", ["100mbit", "10gbit", "unlimited"])
def test_counters_agree_with_what_was_sent(rate: str) -> None:
    """Also where the kernel passes 64 kB at once and puts one header on it."""
    size, count = 1_000_000, 4
    with Lab(hosts=2, rate=rate) as lab:
        before = lab.sent_bytes()
        probe(lab, size, count, silence_s=0.0)
        after = lab.sent_bytes()
    assert after[1] - before[1] == pytest.approx(wire_bytes(size * count), rel=0.01)
    assert after[0] - before[0] < 0.05 * size * count


def test_counters_survive_a_change_of_rate() -> None:
    with Lab(hosts=2, rate="10gbit") as lab:
        probe(lab, 100_000, count=1, silence_s=0.0)
        before = lab.sent_bytes()
        for rate in ("1mbit", "unlimited", "10gbit"):
            lab.set_rate(rate)
            assert lab.sent_bytes()[1] >= before[1] > 100_000


@pytest.mark.parametrize(
    ("text", "bits", "burst"),
    [
        ("1mbit", 1_000_000, 3028),
        ("10mbit", 10_000_000, 3028),
        ("100Mbit/s", 100_000_000, 12_500),
        ("2.5gbit", 2_500_000_000, 312_500),
        ("10gbit", 10_000_000_000, 1_250_000),
    ],
)
def test_rates_are_read(text: str, bits: int, burst: int) -> None:
    rate = Rate.parse(text)
    assert (rate.bits_per_s, rate.burst_bytes, rate.queue_bytes) == (bits, burst, bits // 8)
    assert Rate.parse(str(rate)) == rate


@pytest.mark.parametrize("text", ["fast", "", "10", "-1mbit", "0mbit", "999kbit", "11gbit", "9bps"])
def test_bad_rates_are_refused(text: str) -> None:
    with pytest.raises(LabError) as caught:
        Rate.parse(text)
    assert "gbit" in caught.value.hint or "unlimited" in caught.value.hint
