"""Top-k the plain way in PyTorch, to set beside codecs_bench's rows: one thread, fp32.

    python tests/bench/torch_topk.py [--elements N] [--density D] [--rounds R] [--json FILE]

A round is what a hand-written hook does: v = grad + residual; torch.topk of |v|; gather; zero the
sent positions of v, which becomes the residual. The probe r = g + r runs in turns with it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=250_000_000)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(1)
    n = options.elements
    k = max(1, round(options.density * n))
    grad = torch.randn(n)
    residual = torch.randn(n)
    probed = torch.randn(n)
    total = torch.zeros(n)
    sent: dict[str, torch.Tensor] = {}

    def encode() -> None:
        residual.add_(grad)
        indices = torch.topk(residual.abs(), k, sorted=False).indices
        sent["indices"] = indices
        sent["values"] = residual[indices]
        residual[indices] = 0

    def accumulate() -> None:
        total.index_add_(0, sent["indices"], sent["values"], alpha=0.25)

    probe, encodes, adds = [], [], []
    for _ in range(options.rounds):
        probe.append(seconds(lambda: probed.add_(grad)))
        encodes.append(seconds(encode))
        adds.append(seconds(accumulate))
    shares = sorted(p / e for p, e in zip(probe, encodes, strict=True))
    gigabytes = n * 4 / 1e9
    row = {
        "spec": f"torch.topk:{options.density:g}",
        "elements": n,
        "bytes": k * 12,  # fp32 values and int64 indices
        "probe_gbs": gigabytes / statistics.median(probe),
        "encode_gbs": gigabytes / statistics.median(encodes),
        "share": [statistics.median(shares), shares[0], shares[-1]],
        "accumulate_ns_per_kept": statistics.median(adds) * 1e9 / k,
    }
    print(f"# torch {torch.__version__}, one thread")
    print(f"# command: {' '.join(['python', *sys.argv])}")
    print(
        f"{row['spec']:<24} {n:>10}  probe {row['probe_gbs']:.2f} GB/s, encode "
        f"{row['encode_gbs']:.2f} GB/s, share {shares[len(shares) // 2]:.3f} "
        f"[{shares[0]:.3f}, {shares[-1]:.3f}], add {row['accumulate_ns_per_kept']:.1f} ns/kept"
    )
    if options.json:
        options.json.write_text(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
