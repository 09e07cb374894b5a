"""stats()["wire_bytes"] against the counters of the lab's links."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest
import thinwire.torch as tw
import torch
import torch.distributed as dist
from thinwire_lab import Lab, NoNamespaceError
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch_models import Mlp, batch, loss_of, seeded
from torch_ranks import environment

STEPS = 12
POLICIES = ("topk:0.01,values=q8", "q8", "none", "randmask:0.1")
HOSTS = 3


def be_host(folder: pathlib.Path) -> None:
    """One rank in the lab: for each policy warms up, waits for the go, trains, reports."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for i, policy in enumerate(POLICIES):
        model = DDP(seeded(lambda: Mlp(512)))
        reducer = tw.compress(model, policy)
        for step in range(2):
            loss_of(model, batch(rank, step)).backward()
        dist.barrier()
        before = reducer.stats()["wire_bytes"]
        (folder / f"ready-{i}-{rank}").touch()
        while not (folder / f"go-{i}").exists():
            time.sleep(0.01)
        for step in range(STEPS):
            loss_of(model, batch(rank, step)).backward()
        sent = reducer.stats()["wire_bytes"] - before
        (folder / f"part-{i}-{rank}").write_text(json.dumps(sent))
        (folder / f"part-{i}-{rank}").rename(folder / f"done-{i}-{rank}")
        while not (folder / f"next-{i}").exists():
            time.sleep(0.01)
    dist.destroy_process_group()


def await_files(folder: pathlib.Path, pattern: str, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 90
    while len(list(folder.glob(pattern))) < HOSTS:
        assert time.monotonic() < end, f"no {pattern}"
        assert all(process.poll() in (None, 0) for process in processes), "a host failed"
        time.sleep(0.02)


def test_wire_bytes_agree_with_the_links(tmp_path: pathlib.Path) -> None:
    try:
        lab = Lab(HOSTS, "1gbit")
    except NoNamespaceError as error:
        pytest.skip(error.message)
    env = environment(PYTHONPATH=environment()["PYTHONPATH"])
    with lab:
        command = [sys.executable, __file__, str(tmp_path)]
        processes = [lab.popen(rank, command, env) for rank in range(HOSTS)]
        for i, policy in enumerate(POLICIES):
            await_files(tmp_path, f"ready-{i}-*", processes)
            time.sleep(0.2)  # the last acknowledgements of the warm-up
            before = lab.sent_bytes()
            (tmp_path / f"go-{i}").touch()
            await_files(tmp_path, f"done-{i}-*", processes)
            time.sleep(0.2)
            for rank, (old, new) in enumerate(zip(before, lab.sent_bytes(), strict=True)):
                stated = json.loads((tmp_path / f"done-{i}-{rank}").read_text())
                seen = new - old
                print(f"{policy} rank {rank}: stated {stated}, on the wire {seen}")
                assert stated == pytest.approx(seen, rel=0.05), (policy, rank)
            (tmp_path / f"next-{i}").touch()
        assert [process.wait(30) for process in processes] == [0] * HOSTS


if __name__ == "__main__":
    torch.set_num_threads(1)
    be_host(pathlib.Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
