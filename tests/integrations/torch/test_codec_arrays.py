"""thinwire.codec on numpy arrays and torch tensors, without and with torch in the process."""

import subprocess
import sys

import numpy as np
import pytest
import thinwire
import torch
from torch_ranks import environment


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


@pytest.mark.parametrize("spec", ["q8", "topk:0.1,transactional=off", "lossless", "none"])
def test_nonfinite_error_names_the_first_value(spec: str) -> None:
    codec = thinwire.codec(f"{spec},nonfinite=error")
    x, residual = np.ones((10, 10), np.float32), np.full((10, 10), 0.5, np.float32)
    codec.encode(x)
    x[4, 2], x[7, 3] = -np.inf, np.nan
    with pytest.raises(thinwire.NonFiniteError, match=r"x: value -inf at index 42;"):
        codec.encode(x)
    with pytest.raises(ArithmeticError, match=r"x 'w': value -inf at index 42"):
        codec.encode(torch.from_numpy(x), residual=residual, key="w")
    assert (residual == 0.5).all()


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
        with pytest.raises(thinwire.NotAvailable, match="velocity"):
            thinwire.codec("topk:0.1,momentum=0.9")
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
