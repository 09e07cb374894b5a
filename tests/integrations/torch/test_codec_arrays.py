"""thinwire.codec on numpy arrays and torch tensors, without and with torch in the process."""

import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import thinwire
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch_ranks import environment

SPECS = (
    "none",
    "lossless",
    "bf16",
    "fp16",
    "topk:0.1",
    "topk:0.1,values=q8",
    "q8",
    "q4,stochastic",
    "q1",
    "fedzip:0.2,k=6",
    "onebit",
    "dct:8",
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, max_side=40)


def floats(dtype: str) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(dtype, SHAPES, elements=st.floats(-100, 100, width=16))


@pytest.mark.parametrize("spec", SPECS)
@hypothesis.given(x=floats("float32"))
@hypothesis.settings(max_examples=40, deadline=None)
def test_decoded_plus_residual_is_the_array(spec: str, x: np.ndarray) -> None:
    codec = thinwire.codec(spec)
    residual = np.zeros(x.shape, np.float32)
    data = codec.encode(x, residual=residual)
    y = codec.decode(data)
    assert isinstance(y, np.ndarray)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y + residual, x, rtol=2e-6, atol=1e-5)
    assert codec.encode(x) == codec.encode(x)


@pytest.mark.parametrize("spec", SPECS)
@hypothesis.given(x=floats("float32"))
@hypothesis.settings(max_examples=20, deadline=None)
def test_torch_and_numpy_give_the_same_message(spec: str, x: np.ndarray) -> None:
    codec = thinwire.codec(spec)
    tensor = torch.from_numpy(x.copy())
    of_torch = codec.encode(tensor, key="w", step=3)
    of_numpy = codec.encode(x, key="w", step=3)
    kind, checksum = 5, slice(8, 12)
    strip = lambda data: (data[:kind], data[kind + 1 : checksum.start], data[checksum.stop :])  # noqa: E731
    assert strip(of_torch) == strip(of_numpy)
    y, z = (codec.decode(data, key="w", step=3) for data in (of_torch, of_numpy))
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.float32
    assert tuple(y.shape) == x.shape
    assert z.tobytes() == y.numpy().tobytes()
    residual = torch.zeros(x.shape)
    fed = codec.decode(codec.encode(tensor, residual=residual, key="w", step=3), key="w", step=3)
    torch.testing.assert_close(fed + residual, tensor, rtol=2e-6, atol=1e-5)


def test_residual_is_fed_back() -> None:
    codec = thinwire.codec("topk:0.01")
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    residual, total = np.zeros_like(x), np.zeros_like(x)
    for step in range(200):
        total += codec.decode(codec.encode(x, residual=residual, step=step))
    np.testing.assert_allclose(total + residual, 200 * x, rtol=1e-3, atol=1e-2)
    assert np.abs(total / 200 - x).mean() < 0.5 * np.abs(x).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(33, 65, generator=torch.Generator().manual_seed(1)).to(dtype)
    for spec in ("q8", "topk:0.2", "none"):
        y = thinwire.codec(spec).decode(thinwire.codec(spec).encode(x))
        assert y.dtype == dtype
        assert y.shape == x.shape
    for spec in ("none", "lossless"):
        assert torch.equal(thinwire.codec(spec).decode(thinwire.codec(spec).encode(x)), x)


def test_stochastic_rounding_needs_another_step() -> None:
    codec = thinwire.codec("q2,stochastic")
    x = np.linspace(-1, 1, 5000, dtype=np.float32)
    assert codec.encode(x, step=1) == codec.encode(x, step=1)
    assert codec.encode(x, step=1) != codec.encode(x, step=2)
    assert codec.encode(x, key="a") != codec.encode(x, key="b")


def test_nonfinite_and_zero() -> None:
    codec = thinwire.codec("q8")
    x = np.ones(100, np.float32)
    x[7] = np.nan
    residual = np.full(100, 0.5, np.float32)
    assert np.isnan(codec.decode(codec.encode(x, residual=residual))).all()
    assert (residual == 0.5).all(), "NaN entered the memory"
    assert (codec.decode(codec.encode(np.zeros(100, np.float32))) == 0).all()


class TestRefusals:
    def test_arguments(self) -> None:
        codec = thinwire.codec("q8")
        x = np.zeros((4, 6), np.float32)
        for bad, message in (
            ([1.0], "list"),
            (x.astype(np.int32), "int32"),
            (x.astype(">f4"), "float32"),
            (x[:, ::2], "contiguous"),
            (torch.zeros(4, dtype=torch.int64), "int64"),
            (torch.zeros(4, 6).T, "contiguous"),
            (torch.zeros(4, device="meta"), "meta"),
            (np.frombuffer(bytes(21), np.float32, offset=5), "aligned"),
        ):
            with pytest.raises(thinwire.InvalidArgument, match=message):
                codec.encode(bad)
        for residual in (np.zeros(3, np.float32), np.zeros((4, 6))):
            with pytest.raises(thinwire.InvalidArgument, match="residual"):
                codec.encode(x, residual=residual)
        frozen = np.zeros((4, 6), np.float32)
        frozen.flags.writeable = False
        with pytest.raises(thinwire.InvalidArgument, match="read-only"):
            codec.encode(x, residual=frozen)
        codec.encode(frozen)

    def test_specs(self) -> None:
        with pytest.raises(thinwire.PolicyError, match=r"(.|\n)*topk"):
            thinwire.codec("topq:0.1")
        with pytest.raises(thinwire.NotAvailable, match="mean"):
            thinwire.codec("randmask:0.5")
        with pytest.raises(ValueError, match=r"."):
            thinwire.codec("q17")
        assert "topk" in thinwire.families()

    def test_other_codec(self) -> None:
        data = thinwire.codec("q8").encode(np.ones(10, np.float32))
        with pytest.raises(thinwire.InvalidArgument, match=r"'q4'.*'q8'"):
            thinwire.codec("q4").decode(data)

    def test_empty_arrays_keep_their_shape(self) -> None:
        codec = thinwire.codec("q8")
        x = np.zeros((0, 2**40), np.float32)
        assert codec.decode(codec.encode(x)).shape == x.shape

    def test_claims_of_size_are_bounded(self) -> None:
        data = thinwire.codec("topk:0.1").encode(np.zeros(1000, np.float32))
        with pytest.raises(thinwire.CorruptPayload, match="max_elements"):
            thinwire.codec("topk:0.1").decode(data, max_elements=999)


@pytest.mark.parametrize("spec", ["none", "topk:0.1,values=q8", "q4"])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_refused(spec: str, data: st.DataObject) -> None:
    codec = thinwire.codec(spec)
    x = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    good = codec.encode(x)
    cut = data.draw(st.integers(0, len(good) - 1), label="cut")
    at = data.draw(st.integers(0, len(good) - 1), label="flipped")
    flipped = bytearray(good)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    if spec == "none":  # raw values carry no checksum: only the header's bytes are guarded
        at_header = at < len(good) - x.nbytes
        damaged = [good[:cut], good + b"\0"] + ([bytes(flipped)] if at_header else [])
    else:
        damaged = [good[:cut], good + b"\0", bytes(flipped)]
    damaged.append(data.draw(st.binary(max_size=300), label="noise"))
    for bad in damaged:
        with pytest.raises((thinwire.CorruptPayload, thinwire.InvalidArgument)):
            codec.decode(bad)


def test_no_torch_is_imported() -> None:
    program = (
        "import sys, numpy as np, thinwire\n"
        "c = thinwire.codec('topk:0.1')\n"
        "c.decode(c.encode(np.ones((3, 5), np.float32)))\n"
        "assert 'torch' not in sys.modules\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libtorch' not in maps and 'libgloo' not in maps and 'libmpi' not in maps\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)
