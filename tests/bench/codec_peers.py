"""What stands beside each codec: the same compression by other means, on one core.

    python tests/bench/codec_peers.py [--elements N] [--layer N] [--rounds R] [PEER...]

Rows are those of codecs_bench: one tensor of --elements, and layers of --layer from a set larger
than the caches; a peer that works on matrices has shapes of its own. A round encodes with error
feedback (v = gradient + residual, the payload's parts, the new residual) and decodes into an fp32
tensor; beside it, in turns, runs the probe r = g + r over the gradient's bytes as fp32. Medians,
[least, most] over the rounds. Bytes are those that the peer's arrays hold: what a hook would send.
"""

from __future__ import annotations

import argparse
import ctypes
import ctypes.util
import json
import statistics
import sys
import time
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

COLD_BYTES = 512 << 20
"""A set of layers that is cycled through holds at least this much: more than any cache."""
MOST_LAYERS = 64


class CannotRunError(RuntimeError):
    """A peer lacks a library; the text names it."""


class Peer(ABC):
    """One tensor's state in one peer. `encode` keeps what would be sent, `decode` reads it."""

    name: ClassVar[str]
    beside: ClassVar[str]
    """The policy whose codec does the same."""
    shapes: ClassVar[tuple[tuple[int, ...], ...]] = ()
    """Of tensors that are no flat array; else --elements and --layer decide."""
    dtype: ClassVar[torch.dtype] = torch.float32

    decodes: ClassVar[bool] = True
    """False: `encode` leaves in `out` what arrives."""

    def __init__(self, grad: Tensor, residual: Tensor, out: Tensor) -> None:
        self.grad, self.residual, self.out = grad, residual, out

    @abstractmethod
    def encode(self) -> None:
        """Adds the gradient to the residual, keeps the payload, leaves the error."""

    @abstractmethod
    def decode(self) -> None:
        """Fills `out`, an fp32 tensor of the gradient's shape."""

    @abstractmethod
    def bytes(self) -> int:
        """Of the payload that the last encode kept."""


class TorchTopK(Peer):
    """torch.topk of the magnitudes, values gathered, error feedback by zeroing what is sent."""

    name, beside = "torch.topk:0.001", "topk:0.001"
    density = 0.001

    def encode(self) -> None:
        v = self.residual.add_(self.grad)
        k = max(1, round(self.density * v.numel()))
        self.indices = torch.topk(v.abs(), k, sorted=False).indices
        self.values = v[self.indices]
        v[self.indices] = 0

    def decode(self) -> None:
        self.out.zero_().scatter_(0, self.indices, self.values)

    def bytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes


class NumpyTopK(Peer):
    """numpy.argpartition of the magnitudes."""

    name, beside = "numpy.argpartition:0.001", "topk:0.001"
    density = 0.001

    def encode(self) -> None:
        v, grad = self.residual.numpy(), self.grad.numpy()
        np.add(v, grad, out=v)
        k = max(1, round(self.density * v.size))
        self.indices = np.argpartition(np.abs(v), v.size - k)[v.size - k :].astype(np.uint32)
        self.values = v[self.indices]
        v[self.indices] = 0

    def decode(self) -> None:
        out = self.out.numpy()
        out.fill(0)
        out[self.indices] = self.values

    def bytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes


class TorchInt8(Peer):
    """torch.quantize_per_tensor: one scale for all. Deprecated since 2.13, and still there."""

    name, beside = "torch.int8", "q8"

    def encode(self) -> None:
        v = self.residual.add_(self.grad)
        scale = float(v.abs().max()) / 127
        self.sent = torch.quantize_per_tensor(v, scale, 0, torch.qint8)
        v.sub_(self.sent.dequantize())

    def decode(self) -> None:
        self.out.copy_(self.sent.dequantize())

    def bytes(self) -> int:
        return self.sent.numel() + 4


class TorchInt8Blocks(Peer):
    """torch.quantize_per_channel with a scale for 256 values, as q8 has it; whole blocks only."""

    name, beside = "torch.int8,block=256", "q8"
    block = 256

    def _blocks(self, flat: Tensor) -> Tensor:
        return flat[: flat.numel() // self.block * self.block].view(-1, self.block)

    def encode(self) -> None:
        v = self._blocks(self.residual.add_(self.grad))
        scales = v.abs().amax(1).div_(127).clamp_(min=2**-100)
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        self.sent = torch.quantize_per_channel(v, scales, zeros, 0, torch.qint8)
        v.sub_(self.sent.dequantize())

    def decode(self) -> None:
        self._blocks(self.out).copy_(self.sent.dequantize())

    def bytes(self) -> int:
        return self.sent.numel() + 4 * self.sent.shape[0]


class TorchSigns(Peer):
    """Signs and the L2 scale ||v|| / sqrt(n), signs packed by numpy."""

    name, beside = "torch.signs", "onebit"

    def encode(self) -> None:
        v = self.residual.add_(self.grad)
        self.scale = float(v.norm()) / v.numel() ** 0.5
        negative = v < 0
        self.packed = np.packbits(negative.numpy())
        v.sub_(torch.where(negative, -self.scale, self.scale))

    def decode(self) -> None:
        negative = torch.from_numpy(np.unpackbits(self.packed, count=self.out.numel()))
        torch.sub(self.scale, negative, alpha=2 * self.scale, out=self.out)

    def bytes(self) -> int:
        return self.packed.nbytes + 4


class TorchPowerSgd(Peer):
    """What torch's PowerSGD hook computes for a matrix between its two allreduces: warm start,
    its own orthogonalisation, error feedback through a copy of the input."""

    name, beside = "torch.PowerSGD:4", "powersgd:4"
    shapes = ((4096, 4096), (4096, 1024))
    decodes = False
    rank = 4

    def __init__(self, grad: Tensor, residual: Tensor, out: Tensor) -> None:
        super().__init__(grad, residual, out)
        generator = torch.Generator().manual_seed(1)
        self.q = torch.randn(1, grad.shape[1], self.rank, generator=generator)
        self.p = torch.empty(1, grad.shape[0], self.rank)

    def encode(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _orthogonalize

        # The hook works in the bucket: its result overwrites its input.
        torch.add(self.grad, self.residual, out=self.out)
        self.residual.copy_(self.out)
        matrix = self.out.unsqueeze(0)
        _orthogonalize(self.q)
        torch.bmm(matrix, self.q, out=self.p)
        _orthogonalize(self.p)
        torch.bmm(matrix.transpose(1, 2), self.p, out=self.q)
        torch.bmm(self.p, self.q.transpose(1, 2), out=matrix)
        self.residual.sub_(self.out)

    def decode(self) -> None:
        """The hook's last product has done it."""

    def bytes(self) -> int:
        return self.p.nbytes + self.q.nbytes


class TorchDct(Peer):
    """DCT-II of each tile of 64 as a matrix product, its 32 largest as bf16; whole tiles only."""

    name, beside = "torch.DCT:32", "dct:32"
    tile, keep = 64, 32

    def __init__(self, grad: Tensor, residual: Tensor, out: Tensor) -> None:
        super().__init__(grad, residual, out)
        k, j = torch.arange(self.tile).view(-1, 1), torch.arange(self.tile)
        basis = torch.cos(torch.pi / self.tile * (j + 0.5) * k) * (2 / self.tile) ** 0.5
        basis[0] /= 2**0.5
        self.basis = basis.float()  # row k: the k-th cosine

    def _tiles(self, flat: Tensor) -> Tensor:
        return flat[: flat.numel() // self.tile * self.tile].view(-1, self.tile)

    def encode(self) -> None:
        v = self._tiles(self.residual.add_(self.grad))
        coefficients = v @ self.basis.T
        indices = torch.topk(coefficients.abs(), self.keep, 1, sorted=False).indices
        self.indices = indices.to(torch.uint8)
        self.values = coefficients.gather(1, indices).bfloat16()
        v.sub_(self._decoded())

    def _decoded(self) -> Tensor:
        kept = torch.zeros(len(self.indices), self.tile)
        return kept.scatter_(1, self.indices.long(), self.values.float()) @ self.basis

    def decode(self) -> None:
        self._tiles(self.out).copy_(self._decoded())

    def bytes(self) -> int:
        return self.indices.nbytes + self.values.nbytes


class Zstd(Peer):
    """zstd's level 1 over the gradient's bytes; nothing is lost, so nothing is fed back."""

    name, beside = "zstd:1", "lossless"

    def __init__(self, grad: Tensor, residual: Tensor, out: Tensor) -> None:
        super().__init__(grad, residual, out)
        path = ctypes.util.find_library("zstd")
        if path is None:
            raise CannotRunError("libzstd is not installed")
        library = ctypes.CDLL(path)
        sized, pointer = ctypes.c_size_t, ctypes.c_void_p
        for function, kinds in (
            ("ZSTD_compressBound", [sized]),
            ("ZSTD_compress", [pointer, sized, pointer, sized, ctypes.c_int]),
            ("ZSTD_decompress", [pointer, sized, pointer, sized]),
        ):
            getattr(library, function).argtypes = kinds
            getattr(library, function).restype = sized
        self.library = library
        self.payload = np.zeros(library.ZSTD_compressBound(grad.nbytes), np.uint8)
        self.restored = torch.zeros_like(grad)

    def encode(self) -> None:
        place, room = self.payload.ctypes.data, self.payload.nbytes
        source, size = self.grad.data_ptr(), self.grad.nbytes
        self.size = self.library.ZSTD_compress(place, room, source, size, 1)

    def decode(self) -> None:
        place, room = self.restored.data_ptr(), self.restored.nbytes
        size = self.library.ZSTD_decompress(place, room, self.payload.ctypes.data, self.size)
        assert size == self.grad.nbytes

    def bytes(self) -> int:
        return self.size


class ZstdBF16(Zstd):
    """The same over bf16 gradients."""

    name, beside = "zstd:1,bf16", "lossless"
    dtype = torch.bfloat16


class NumpyFedzip(Peer):
    """FedZip's steps in plain numpy, as nobody ships it: argpartition, Lloyd's k-means of the kept
    values (two centroids beside zero), zlib over gaps and labels. A stand-in, not a package."""

    name, beside = "numpy.fedzip:0.01", "fedzip:0.01"
    density, clusters, iterations = 0.01, 2, 10

    def encode(self) -> None:
        v, grad = self.residual.numpy(), self.grad.numpy()
        np.add(v, grad, out=v)
        k = max(1, round(self.density * v.size))
        indices = np.sort(np.argpartition(np.abs(v), v.size - k)[v.size - k :])
        kept = v[indices]
        centroids = np.quantile(kept, (np.arange(self.clusters) + 0.5) / self.clusters)
        for _ in range(self.iterations):
            labels = np.abs(kept[:, None] - centroids).argmin(1)
            counts = np.bincount(labels, minlength=self.clusters)
            sums = np.bincount(labels, kept, self.clusters)
            moved = np.where(counts > 0, sums / np.maximum(counts, 1), centroids)
            if np.array_equal(moved, centroids):
                break
            centroids = moved
        self.centroids = centroids.astype(np.float32)
        v[indices] -= self.centroids[labels]
        gaps = np.diff(indices, prepend=-1).astype(np.uint32)
        planes = gaps.view(np.uint8).reshape(-1, 4).T.tobytes()
        self.payload = zlib.compress(planes + labels.astype(np.uint8).tobytes())

    def decode(self) -> None:
        planes = np.frombuffer(zlib.decompress(self.payload), np.uint8).reshape(5, -1)
        gaps = planes[:4].T.copy().view(np.uint32).ravel()
        out = self.out.numpy()
        out.fill(0)
        out[np.cumsum(gaps, dtype=np.int64) - 1] = self.centroids[planes[4]]

    def bytes(self) -> int:
        return len(self.payload) + self.centroids.nbytes


PEERS: tuple[type[Peer], ...] = (
    TorchTopK,
    NumpyTopK,
    TorchInt8,
    TorchInt8Blocks,
    TorchSigns,
    TorchPowerSgd,
    TorchDct,
    Zstd,
    ZstdBF16,
    NumpyFedzip,
)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: Iterable[float], factor: float = 1) -> list[float]:
    """Median, least, most."""
    scaled = sorted(factor * value for value in values)
    return [statistics.median(scaled), scaled[0], scaled[-1]]


def measure(kind: type[Peer], shape: tuple[int, ...], layers: int, rounds: int) -> dict[str, Any]:
    """One row, in the form of codecs_bench's."""
    torch.manual_seed(1)
    grads = [torch.randn(shape, dtype=kind.dtype) for _ in range(layers)]
    peers = [kind(grad, torch.randn(shape), torch.zeros(shape)) for grad in grads]
    words = [grad.view(-1).view(torch.float32) for grad in grads]
    probed = [torch.randn(len(word)) for word in words]

    def probe() -> float:
        return sum(seconds(lambda g=g, r=r: r.add_(g)) for g, r in zip(words, probed, strict=True))

    def encode() -> float:
        return sum(seconds(peer.encode) for peer in peers)

    def decode() -> float:
        return sum(seconds(peer.decode) for peer in peers)

    times: dict[str, list[float]] = {"probe": [], "encode": [], "decode": []}
    for number in range(-1, rounds):  # the first one warms up and is not counted
        order = [probe, encode] if number % 2 == 0 else [encode, probe]
        took = {work.__name__: work() for work in order}
        took["decode"] = decode()
        if number >= 0:
            for name, value in took.items():
                times[name].append(value / layers)
    shares = [p / e for p, e in zip(times["probe"], times["encode"], strict=True)]
    row: dict[str, Any] = {
        "spec": kind.name,
        "beside": kind.beside,
        "dtype": "bf16" if kind.dtype == torch.bfloat16 else "fp32",
        "elements": grads[0].numel(),
        "bytes": peers[-1].bytes(),
    }
    if len(shape) > 1:
        row["shape"] = shape
    for name in ("probe", "encode", "decode") if kind.decodes else ("probe", "encode"):
        row[f"{name}_us"] = spread(times[name], 1e6)
    row["share"] = spread(shares)
    return row


def plans(kind: type[Peer], elements: int, layer: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """(shape, layers) of each row."""

    def cold(n: int) -> int:
        return min(MOST_LAYERS, COLD_BYTES // (n * kind.dtype.itemsize) + 1)

    if kind.shapes:
        for shape in kind.shapes:
            yield shape, cold(shape[0] * shape[1])
    else:
        yield (elements,), 1
        yield (layer,), cold(layer)


def text(row: dict[str, Any]) -> str:
    share, probe, encode = row["share"], row["probe_us"][0], row["encode_us"][0]
    decode = f"{probe / row['decode_us'][0]:.3f}" if "decode_us" in row else "-"
    return (
        f"{row['spec']:<26} {row['elements']:>10}  {probe / 1e3:9.2f} {encode / 1e3:9.2f}  "
        f"{share[0]:.3f} [{share[1]:.3f}, {share[2]:.3f}]  {decode:>6}  {row['bytes']:>11}"
    )


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="codec_peers.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [kind.name for kind in PEERS]
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"default: {' '.join(names)}")
    parser.add_argument("--elements", type=int, default=250_000_000)
    parser.add_argument("--layer", type=int, default=4_194_304)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(words)
    if unknown := set(options.peers) - set(names):
        parser.error(f"no peer {' '.join(sorted(unknown))}; there are {' '.join(names)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*quantize_per_tensor.* are deprecated")
    print(f"# torch {torch.__version__}, numpy {np.__version__}, one thread")
    print(f"# command: {' '.join(['python', 'tests/bench/codec_peers.py', *words])}")
    print(f"# {'peer':<24} {'elements':>10}  {'probe ms':>9} {'encode ms':>9}  ", end="")
    print(f"{'share':<20}  {'decode':>6}  {'bytes':>11}")
    lines = []
    for kind in PEERS:
        if options.peers and kind.name not in options.peers:
            continue
        for shape, layers in plans(kind, options.elements, options.layer):
            try:
                row = measure(kind, shape, layers, options.rounds)
            except CannotRunError as error:
                print(f"# {kind.name}: left out, {error}", file=sys.stderr)
                break
            print(text(row), flush=True)
            lines.append(json.dumps(row) + "\n")
    if options.json:
        options.json.write_text("".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
