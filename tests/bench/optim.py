"""The optimizers' step() beside torch's, without wire: the same tensors, turn by turn.

    PYTHONPATH=.:integrations/torch python tests/bench/optim.py [--elements N] [--tensors N]
        [--rounds R] [--threads N] [--json FILE]

Two ranks, since one alone never compresses; only rank 0 works while its step is timed. The bytes
are what a step must move at least, reads and writes of weights, gradient and states, each once.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import thinwire.torch as tw
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FREEZE = 3


class Tensors(nn.Module):
    """Parameters whose gradient is a constant: a backward pass that costs next to nothing."""

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        rows = elements // tensors // 1024
        self.weights = nn.ParameterList(0.02 * torch.randn(rows, 1024) for _ in range(tensors))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = torch.stack([(w * x).sum() for w in self.weights]).sum()
        return total


Make = Callable[[list[nn.Parameter], Any], torch.optim.Optimizer]
INTERVAL = 2
"""Steps of one round, whose mean counts: in intervals every second one exchanges."""
OURS: dict[str, tuple[str, Make, float, str]] = {
    # name: policy, optimizer, streams of 4 bytes an element, torch's that it stands beside
    "OneBitAdam, warm-up": (
        "onebit",
        lambda p, r: tw.optim.OneBitAdam(p, r, freeze_step=10**6),
        7,
        "AdamW",
    ),
    "OneBitAdam, frozen": (
        "onebit",
        lambda p, r: tw.optim.OneBitAdam(p, r, freeze_step=FREEZE),
        5,
        "AdamW",
    ),
    "ZeroOneAdam, warm-up": ("onebit", lambda p, r: tw.optim.ZeroOneAdam(p, r), 7, "AdamW"),
    "ZeroOneAdam, intervals": (
        "onebit",
        lambda p, r: tw.optim.ZeroOneAdam(
            p, r, var_freeze_step=FREEZE, local_step_scaler=1, local_step_clipper=INTERVAL
        ),
        6.5,  # 8 in the local step, 5 in the one that exchanges
        "AdamW",
    ),
    "OneBitLAMB, warm-up": (
        "onebit",
        lambda p, r: tw.optim.OneBitLAMB(p, r, freeze_step=10**6),
        10,
        "AdamW",
    ),
    "OneBitLAMB, frozen": (
        "onebit",
        lambda p, r: tw.optim.OneBitLAMB(p, r, freeze_step=FREEZE),
        11,
        "AdamW",
    ),
    "DGCSGD": ("topk:0.001,values=q8", lambda p, r: tw.optim.DGCSGD(p, r), 3, "SGD"),
}
TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p, **kind: torch.optim.SGD(p, momentum=0.9, **kind),
}
KINDS = ("fused", "foreach")


def timed(optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def measure(rank: int, name: str, options: argparse.Namespace) -> dict[str, Any]:
    policy, make, streams, beside = OURS[name]
    module = Tensors(options.elements, options.tensors)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ours = make(list(module.parameters()), tw.compress(model, policy))
    plain = {
        kind: TORCH[beside](
            [nn.Parameter(p.detach().clone()) for p in module.parameters()], **{kind: True}
        )
        for kind in KINDS
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in ("ours", *KINDS)}
    for step in range(FREEZE + 2 + INTERVAL * options.rounds):
        ours.zero_grad()
        model(torch.tensor(1.0 + 0.1 * (step % 7))).backward()
        took = {}
        for turn in range(dist.get_world_size()):
            dist.barrier()
            if turn == rank:
                took["ours"] = timed(ours)
                for kind, optimizer in plain.items() if rank == 0 else ():
                    for mine, theirs in zip(
                        module.parameters(), optimizer.param_groups[0]["params"], strict=True
                    ):
                        theirs.grad = mine.grad
                    took[kind] = timed(optimizer)
        if step >= FREEZE + 2:
            for kind, value in took.items():
                seconds[kind].append(value)
    seconds = {
        kind: [statistics.fmean(v[i : i + INTERVAL]) for i in range(0, len(v), INTERVAL)]
        for kind, v in seconds.items()
    }
    elements = sum(p.numel() for p in module.parameters())
    figures = {
        kind: [1e3 * f(v) for f in (statistics.median, min, max)]
        for kind, v in seconds.items()
        if v
    }
    return {
        "name": name,
        "beside": beside,
        "elements": elements,
        "ms": figures,
        "gb_s": 4e-9 * streams * elements / statistics.median(seconds["ours"]),
        "over_fused": statistics.median(
            a / b for a, b in zip(seconds["ours"], seconds["fused"], strict=True)
        )
        if rank == 0
        else 0.0,
    }


def work(rank: int, port: int, options: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    rows = []
    for name in OURS:
        row = measure(rank, name, options)
        if rank == 0:
            rows.append(row)
            cells = [f"{row['ms'][kind][0]:8.2f}" for kind in ("ours", *KINDS)]
            print(
                f"{name:24}{''.join(cells)}  {row['beside']:6}{row['over_fused']:6.2f}"
                f"{row['gb_s']:7.1f}",
                flush=True,
            )
    if rank == 0 and options.json:
        Path(options.json).write_text("".join(json.dumps(row) + "\n" for row in rows))
    dist.destroy_process_group()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="optim.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=16_777_216)
    parser.add_argument("--tensors", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    options = parser.parse_args(words)
    print(
        f"# {options.elements:,} values in {options.tensors} tensors, {options.threads} threads, "
        f"{options.rounds} rounds; milliseconds a step, median"
    )
    print(
        f"{'optimizer':24}{'ours':>8}{'fused':>8}{'foreach':>8}  beside ÷fused   GB/s", flush=True
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(work, (port, options), nprocs=2)  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
