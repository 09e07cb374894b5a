"""Laws of thinwire.codec for every family that this version lists, on hostile arrays and bytes."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import thinwire
import torch
from hypothesis import strategies as st
from thinwire import _codec

# The corners of a family that differ in code, beside its sample in `thinwire codecs`.
MORE = {
    "none": (),
    "bf16": ("bf16,decay=0.875",),
    "fp16": (),
    "topk": (
        "topk:1",
        "topk:0.1,values=q8",
        "topk:0.2,values=ternary",
        "topk:k=3,chunk=64",
        "topk:0.1,select=carried",
    ),
    "q1 to q8": (
        "q1",
        "q3,block=64",
        "q8",
        "q4,stochastic",
        "q4,decay=0.5",
        "q4,kind=maxmin",
        "q6,kind=mx",
        "q4,rotate",
    ),
    "lowrank": ("lowrank:1",),
    "onebit": ("onebit,block=64,scale=l1",),
    "dct": ("dct:3,tile=16,values=q8",),
    "fedzip": ("fedzip:0.2,k=6", "fedzip:1"),
    "lossless": (),
}
FAMILIES = [f for f in _codec.families() if "linear" not in f["traits"]]
SPECS = [spec for f in FAMILIES for spec in (f["sample"], *MORE.get(f["name"], ()))]
RAW = ("none", "lossless")
"""What these send is v itself."""
SPARSE = [f["words"][0] for f in FAMILIES if "sparse" in f["traits"]]
SHAPES = ((), (0,), (1,), (2,), (63,), (64,), (257,), (1009,), (3, 0, 5), (13, 1, 29), (2, 3, 5, 7))
BAD = (None, None, None, math.nan, math.inf, -math.inf)
Make = Callable[[np.random.Generator, int], np.ndarray]
VALUES: dict[str, Make] = {
    "normal": lambda g, n: g.standard_normal(n),
    "zero": lambda g, n: np.where(g.random(n) < 0.5, 0.0, -0.0),
    "constant": lambda g, n: np.full(n, 10.0 ** g.integers(-30, 30)),
    "spike": lambda g, n: np.where(np.arange(n) == g.integers(max(n, 1)), 1e30, 1e-6),
    "sparse": lambda g, n: g.standard_normal(n) * (g.random(n) < 0.1),
    "subnormal": lambda g, n: g.integers(-9, 9, n) * 1e-45,
    "huge": lambda g, n: g.uniform(-3.4e38, 3.4e38, n),
    "octaves": lambda g, n: g.standard_normal(n) * 2.0 ** g.integers(-140, 120, n),
}

settings = hypothesis.settings(
    max_examples=12, deadline=None, derandomize="CI" in os.environ, database=None
)
every_spec = pytest.mark.parametrize("spec", SPECS)


class Case(NamedTuple):
    """An array, whose memory is aligned to its values only, and the residual before it."""

    x: np.ndarray
    residual: np.ndarray


def values(kind: str, n: int, seed: int) -> np.ndarray:
    return VALUES[kind](np.random.default_rng(seed), n).astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = draw(st.sampled_from(SHAPES))
    n = math.prod(shape)
    seed, shift = draw(st.integers(0, 2**32)), draw(st.integers(0, 15))
    memory = np.zeros(n + shift, np.float32)
    x = memory[shift:].reshape(shape)
    x[...] = values(draw(st.sampled_from(sorted(VALUES))), n, seed).reshape(shape)
    bad = draw(st.sampled_from(BAD))
    if bad is not None and n > 0:
        x.reshape(-1)[draw(st.integers(0, n - 1))] = bad
    before = draw(st.sampled_from(["zero", "normal", "octaves", "subnormal"]))
    return Case(x, values(before, n, seed + 1).reshape(shape))


def decay_of(spec: str) -> np.float32:
    found = re.search(r"decay=([\d.]+)", spec)
    return np.float32(found[1] if found else 1)


def test_every_family_is_covered() -> None:
    listed = {f["name"] for f in FAMILIES}
    assert set(MORE) == listed, "give each payload family its corners in MORE, or ()"
    assert {thinwire.codec(spec).spec for spec in SPECS} == {*SPECS}, "canonical specs only"


@every_spec
@hypothesis.given(case=cases())
@settings
def test_what_is_sent_plus_the_residual_is_what_came_in(spec: str, case: Case) -> None:
    codec, x = thinwire.codec(spec), case.x
    residual, again = case.residual.copy(), case.residual.copy()
    data = codec.encode(x, residual=residual, key="w", step=2)
    assert codec.encode(x.copy(), residual=again, key="w", step=2) == data
    assert again.tobytes() == residual.tobytes()
    y = codec.decode(data, key="w", step=2)
    assert isinstance(y, np.ndarray)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    if spec == "none":
        assert y.tobytes() == x.tobytes()
        assert residual.tobytes() == case.residual.tobytes()
        return
    with np.errstate(over="ignore", invalid="ignore"):
        v = x + decay_of(spec) * case.residual  # two roundings
        if not np.isfinite(v).all():
            assert np.isnan(y).all()
            assert residual.tobytes() == case.residual.tobytes(), "NaN entered the memory"
        elif not x.any():
            assert not y.any()
            assert residual.tobytes() == case.residual.tobytes()
        else:
            np.testing.assert_array_equal(residual, v - y)  # one rounding
            assert spec not in RAW or y.tobytes() == v.tobytes()


@every_spec
@hypothesis.given(case=cases(), name=st.sampled_from(["float16", "bfloat16", "float64"]))
@settings
def test_other_dtypes_send_what_their_values_send(spec: str, case: Case, name: str) -> None:
    """A tensor of another dtype leaves the residual, and decodes to the rounded values, of the fp32
    tensor of its values."""
    codec = thinwire.codec(spec)
    x = torch.from_numpy(case.x.copy()).to(getattr(torch, name))
    residual, expected = (torch.from_numpy(case.residual.copy()) for _ in range(2))
    try:
        y = codec.decode(codec.encode(x, residual=residual))
    except thinwire.InvalidArgument:
        if name != "float64":  # which some families do not take
            raise
        return
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    of_floats = codec.decode(codec.encode(x.float(), residual=expected))
    assert torch.equal(residual, expected)
    wanted = x if spec == "none" else of_floats.to(x.dtype)
    assert ((y == wanted) | (y.isnan() & wanted.isnan())).all()


@every_spec
@hypothesis.given(case=cases())
@settings
def test_torch_and_numpy_send_the_same(spec: str, case: Case) -> None:
    codec = thinwire.codec(spec)
    of_numpy = codec.encode(case.x, key="w", step=3)
    of_torch = codec.encode(torch.from_numpy(case.x), key="w", step=3)
    assert [*Frame(of_numpy).parts()] == [*Frame(of_torch).parts()]
    y, z = (codec.decode(data, key="w", step=3) for data in (of_numpy, of_torch))
    assert z.numpy().tobytes() == y.tobytes()


@hypothesis.given(case=cases(), offset=st.integers(1, 3))
@settings
def test_other_layouts_are_refused(case: Case, offset: int) -> None:
    codec = thinwire.codec("q8")
    twice = np.repeat(case.x.reshape(-1), 2)
    misaligned = np.frombuffer(bytes(offset) + case.x.tobytes(), np.float32, offset=offset)
    for other in (twice[::2], misaligned):
        if other.flags.c_contiguous and other.flags.aligned:  # of no or one value
            continue
        with pytest.raises(thinwire.InvalidArgument, match=r"contiguous|aligned"):
            codec.encode(other)
        assert codec.encode(other.copy()) == codec.encode(case.x.reshape(-1))


class Frame:
    """The bytes of encode() taken apart (FORMAT.md, "Python frame"), changed and sealed anew."""

    def __init__(self, data: bytes) -> None:
        dimensions, spec = data[6], data[7]
        begin = 12 + 8 * dimensions + spec
        self.start = data[:5]
        self.kind = data[5]
        self.shape = [*np.frombuffer(data[12 : 12 + 8 * dimensions], np.int64).tolist()]
        self.spec = data[begin - spec : begin]
        self.message = data[begin:]
        self.body = self.message if self.spec == b"none" else self.message[24:]

    def parts(self) -> tuple[Any, ...]:
        """All but the kind of array."""
        return self.start, self.shape, self.spec, self.message

    def sealed(self, body: bytes, shape: list[int] | None = None) -> bytes:
        """A sound frame of another body, or of a shape that is claimed."""
        shape = self.shape if shape is None else shape
        start = self.start + bytes([self.kind, len(shape), len(self.spec)])
        rest = np.array(shape, np.int64).tobytes() + self.spec
        frame = start + (xxh3(start + bytes(4) + rest) & 0xFFFFFFFF).to_bytes(4, "little") + rest
        if self.spec == b"none":
            return frame + body
        header = self.message[:8] + (math.prod(shape) % 2**64).to_bytes(8, "little")
        return frame + header + xxh3(body, xxh3(header)).to_bytes(8, "little") + body


def xxh3(data: bytes, seed: int = 0) -> int:
    return _xxhash.XXH3_64bits_withSeed(data, len(data), seed)


_xxhash = ctypes.CDLL(ctypes.util.find_library("xxhash"))  # of libxxhash-dev, setup/apt.txt
_xxhash.XXH3_64bits_withSeed.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
_xxhash.XXH3_64bits_withSeed.restype = ctypes.c_uint64


def small(spec: str, shape: tuple[int, ...] = (20, 30)) -> bytes:
    return thinwire.codec(spec).encode(values("octaves", math.prod(shape), 1).reshape(shape))


@every_spec
@hypothesis.given(data=st.data())
@settings
def test_damaged_bytes_are_refused(spec: str, data: st.DataObject) -> None:
    codec, good = thinwire.codec(spec), small(spec)
    cut = data.draw(st.integers(0, len(good) - 1), label="cut")
    # Raw values carry no checksum: there only the header's bytes are guarded.
    guarded = len(good) - 2400 if spec == "none" else len(good)
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, guarded - 1), label="at")] ^= 1 << data.draw(
        st.integers(0, 7), label="bit"
    )
    noise = data.draw(st.binary(max_size=300), label="noise")
    for bad in (good[:cut], good + b"\0", bytes(flipped), noise, good[:cut] + noise):
        with pytest.raises((thinwire.CorruptPayload, thinwire.InvalidArgument)):
            codec.decode(bad)


@every_spec
@hypothesis.given(data=st.data())
@settings
def test_any_body_under_good_checksums_decodes_or_is_refused(
    spec: str, data: st.DataObject
) -> None:
    codec = thinwire.codec(spec)
    frame = Frame(small(spec))
    assert frame.sealed(frame.body) == small(spec)
    body = bytearray(frame.body)
    for _ in range(data.draw(st.integers(0, 4), label="flips")):
        body[data.draw(st.integers(0, len(body) - 1), label="at")] ^= 1 << data.draw(
            st.integers(0, 7), label="bit"
        )
    cut = data.draw(st.integers(0, len(body)), label="cut")
    noise = data.draw(st.binary(max_size=40), label="noise")
    for bad in (body, body[:cut], body[:cut] + noise, body[:1] + noise):
        try:
            y = codec.decode(frame.sealed(bytes(bad)))
        except thinwire.CorruptPayload:
            continue
        assert (y.shape, y.dtype) == ((20, 30), np.float32)


def peak_bytes() -> int:
    """The most memory that this process held since forget_peak()."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def forget_peak() -> None:
    pathlib.Path("/proc/self/clear_refs").write_text("5")


@every_spec
def test_claims_of_many_elements_are_refused_without_memory(spec: str) -> None:
    codec = thinwire.codec(spec)
    frame = Frame(small(spec, (5,)))
    claims = [[2**60], [2**20] * 3, [2**60 + 1] * 3, [2**31 + 1]]
    if spec.partition(":")[0] not in SPARSE:  # of these a few bytes may be all of a large tensor
        claims.append([2**30])
    bodies = (frame.body, frame.body[:1], frame.body[:1] + b"\xff" * 40, bytes(range(16, 80)))
    for _ in range(2):  # what the interpreter itself needs is there the second time
        forget_peak()
        before = peak_bytes()
        for shape in claims:
            for body in bodies:
                with pytest.raises(thinwire.CorruptPayload):
                    codec.decode(frame.sealed(body, shape))
    assert peak_bytes() - before < 2**20
