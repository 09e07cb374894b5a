"""Trains the demo's character LSTM on the King James text with Deep Gradient Compression: 0.1 % of
each gradient travels, its momentum corrected, after a warm-up that starts at 25 %.

    torchrun --nproc-per-node=2 examples/pytorch/char_lstm_dgc.py --run-log lstm.jsonl
    thinwire report lstm.jsonl

On several hosts, here four emulated ones with 10 Mbit/s (as root, or see cluster/lab/README.md):

    thinwire lab up --hosts 4 --rate 10mbit
    thinwire lab run -- python examples/pytorch/char_lstm_dgc.py
    thinwire lab down

The text comes with Debian's bible-kjv, part of the project's set-up.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import thinwire.torch as tw
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from examples.demo.tasks import CharLstm, Shard


def perplexity(task: CharLstm, model: torch.nn.Module) -> float:
    """Of all ranks' shares of the held-out windows."""
    mine = task.evaluate(model, dist.get_rank(), dist.get_world_size())
    sums = torch.tensor([mine.total, mine.count], dtype=torch.float64)
    dist.all_reduce(sums)
    return task.score([Shard(sums[0].item(), int(sums[1].item()))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--lr", type=float, default=0.5)
    parser.add_argument("--run-log", help="a run log for `thinwire report`")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 or os.environ.get("LOCAL_RANK") == "0":
        CharLstm.prepare()
    dist.barrier()
    task = CharLstm()
    batches = task.batches(rank, world, seed=1)

    model = DistributedDataParallel(task.model(seed=1), gradient_as_bucket_view=True)
    warmup = max(1, args.steps // 5)
    policy = f"topk:{args.density:g},values=q8,warmup={warmup}"
    reducer = tw.compress(model, policy, log=args.run_log)
    optimizer = tw.optim.DGCSGD(model.parameters(), reducer, lr=args.lr, momentum=0.9, clip=1.0)

    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        optimizer.zero_grad()
        loss = task.loss(model, *next(batches))
        loss.backward()
        optimizer.step()
        reducer.log(loss=loss)
        if rank == 0 and step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    per_step = (time.perf_counter() - start) / args.steps
    reached = perplexity(task, model.module)
    reducer.log(loss=loss, perplexity=reached)
    if rank == 0:
        sent = reducer.stats()
        print(
            f"{per_step * 1e3:.0f} ms a step, test perplexity {reached:.2f}, "
            f"{sent['wire_bytes'] / 1e6:.2f} MB sent by a rank, 1/{sent['ratio']:.0f} of fp32"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
