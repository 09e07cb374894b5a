"""The link model: what one emulated network cable lets through, and when.

Pure functions on plain values; thread safe. A host's cable is a veth pair with a token bucket
(tc-tbf) at each end: the host's own end limits what it sends, the switch's end what it receives.

    burst = max(1 ms of the rate, 2 frames)   bytes that may leave at once after a silence
    queue = 1 s of the rate                   bytes that wait before any is dropped

The burst decides whether thin traffic pays: with 256 kB, a common choice, everything a good
compressor sends would cross a slow link at no cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from thinwire_lab.errors import LabError

# 1500 bytes of IP packet and the 14 of the Ethernet header, which the kernel's counters include.
FRAME_BYTES = 1514
MIN_BITS_PER_S = 1_000_000
MAX_BITS_PER_S = 10_000_000_000
# "unlimited" is a bucket that never runs dry rather than no bucket: changing the rate then keeps
# the byte counters, which live in the bucket.
UNLIMITED_BITS_PER_S = 1_000_000_000_000
# tbf keeps burst and queue in 32 bits; below 2^31 leaves room for its own rounding.
_MAX_TBF_BYTES = 2_000_000_000

_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_RATE = re.compile(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)(?:/s)?")
_HINT = "write a rate such as 10mbit, 100mbit, 1gbit, 10gbit or unlimited"


@dataclass(frozen=True)
class Rate:
    """A link's speed in bits per second, in each direction on its own."""

    bits_per_s: int

    @classmethod
    def parse(cls, text: str | Rate) -> Rate:
        """From '100mbit', '2.5gbit' or 'unlimited'; 1 Mbit/s to 10 Gbit/s."""
        if isinstance(text, Rate):
            return text
        word = text.strip().lower()
        if word == "unlimited":
            return cls(UNLIMITED_BITS_PER_S)
        match = _RATE.fullmatch(word)
        if match is None:
            raise LabError(f"'{text}' is not a rate", _HINT)
        bits = round(float(match[1]) * _UNITS[match[2]])
        if not MIN_BITS_PER_S <= bits <= MAX_BITS_PER_S:
            raise LabError(
                f"the rate {text} is outside the range 1mbit to 10gbit",
                "take a rate inside it, or 'unlimited' for no limit at all",
            )
        return cls(bits)

    @property
    def unlimited(self) -> bool:
        return self.bits_per_s >= UNLIMITED_BITS_PER_S

    @property
    def burst_bytes(self) -> int:
        return max(self.bits_per_s // 8000, 2 * FRAME_BYTES)

    @property
    def queue_bytes(self) -> int:
        return min(self.bits_per_s // 8, _MAX_TBF_BYTES)

    def wire_seconds(self, frame_bytes: int) -> float:
        """The time that many bytes, headers included, take on an idle link."""
        return frame_bytes * 8 / self.bits_per_s

    def tbf(self, verb: str, device: str) -> str:
        """One line for `tc -batch`; verb is 'add' or 'change'."""
        return (
            f"qdisc {verb} dev {device} root handle 1: tbf rate {self.bits_per_s}bit "
            f"burst {self.burst_bytes} limit {self.queue_bytes}"
        )

    def __str__(self) -> str:
        if self.unlimited:
            return "unlimited"
        for unit in ("gbit", "mbit"):
            if self.bits_per_s >= _UNITS[unit]:
                return f"{self.bits_per_s / _UNITS[unit]:.12g}{unit}"
        return f"{self.bits_per_s / 1e3:.12g}kbit"
