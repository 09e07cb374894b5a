"""A rank is killed at twenty points of a step: every survivor hears whose fault it is, in time.

One process forks all trials, several at once; each trial is three ranks of which one kills itself.
"""

import json
import os
import pathlib
import random
import signal
import sys
import threading
import time
from typing import Any

import pytest
import thinwire
import thinwire.torch as tw
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch_models import Mlp, batch, loss_of, seeded, state_digest
from torch_ranks import fork_ranks, run_ranks, wait_ranks

SIZE = 3
TRIALS = 20
DEADLINE, GRACE = 20.0, 2.0
POLICIES = ("topk:0.05,values=q8", "q8", "none", "randmask:0.2")


def trial(rank: int, size: int, number: int, folder: str) -> None:
    """Trains until the victim is gone; survivors write what they saw."""
    rng = random.Random(number)
    # Not before the second step has begun: there DDP rebuilds its buckets over its own group.
    victim, fatal_step, moment = rng.randrange(size), rng.randrange(2, 4), rng.random()
    model = DDP(seeded(lambda: Mlp(64)), bucket_cap_mb=0.004)
    reducer = tw.compress(model, POLICIES[number % len(POLICIES)], deadline=DEADLINE, grace=GRACE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    committed: dict[int, str] = {}

    def die(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def backward(step: int) -> None:
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()
        state = reducer.state_dict()
        committed[state["step"]] = state_digest(state)

    committed[0] = state_digest(reducer.state_dict())
    for step in range(fatal_step):
        backward(step)
    if rank == victim:
        if number % 3 == 0:  # before the last bucket goes: its only parameter's gradient is ready
            model.module.first.weight.register_hook(die)
        elif number % 3 == 1:  # while the last bucket is on its way
            post = model.module.first.weight.register_post_accumulate_grad_hook
            post(lambda _: threading.Timer(0.002 * moment, die).start())
        else:  # anywhere in the step
            threading.Timer(0.03 * moment, die).start()
    began = time.monotonic()
    error: thinwire.PeerLost | None = None
    try:
        for step in range(fatal_step, fatal_step + 1000):
            backward(step)
    except thinwire.PeerLost as lost:
        error = lost
    assert error is not None, "no error"
    took = time.monotonic() - began
    state = reducer.state_dict()
    seen = {
        "rank": rank,
        "victim": victim,
        "named": list(error.ranks),
        "message": str(error),
        "at": error.step,
        "step": state["step"],
        "committed": committed.get(state["step"]) == state_digest(state),
        "seconds": took,
    }
    pathlib.Path(folder, f"{number}-{rank}.json").write_text(json.dumps(seen))
    with pytest.raises(RuntimeError):  # PeerLost again, or DDP, which saw its step not end
        backward(0)
    sys.stdout.flush()
    os._exit(0)  # without destroy_process_group(), which would wait for the victim


def job(rank: int, size: int, folder: str) -> None:
    """Not a rank: forks the trials, four at a time, and waits for them."""
    dist.destroy_process_group()
    for first in range(0, TRIALS, 4):
        trials = [
            fork_ranks(trial, SIZE, number, folder)
            for number in range(first, min(first + 4, TRIALS))
        ]
        for pids in trials:
            codes = wait_ranks(pids, 60)
            assert sorted(codes) == [-signal.SIGKILL, 0, 0], codes


def test_killed_at_twenty_points(tmp_path: pathlib.Path) -> None:
    run_ranks(__file__, "job", 1, str(tmp_path), seconds=150)
    reports = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert len(reports) == TRIALS * (SIZE - 1)
    for report in reports:
        where = f"{report}"
        assert report["named"] == [report["victim"]], where
        assert f"rank {report['victim']}" in report["message"], where
        assert "step" in report["message"], where
        assert "hint:" in report["message"], where
        assert report["seconds"] < DEADLINE + GRACE + 5, where
        assert report["committed"], where
        assert report["at"] - report["step"] in (0, 1), where
    by_trial: dict[str, list[int]] = {}
    for file in tmp_path.iterdir():
        by_trial.setdefault(file.name.split("-")[0], []).append(
            json.loads(file.read_text())["step"]
        )
    assert all(max(steps) - min(steps) <= 1 for steps in by_trial.values()), by_trial


def stuck(rank: int, size: int) -> None:
    """A rank that hangs: the deadline ends the wait of the others, who name it."""
    model = DDP(seeded(Mlp))
    reducer = tw.compress(model, "topk:0.05", deadline=2.0, grace=1.0)
    for step in range(2):  # then DDP has rebuilt its buckets
        loss_of(model, batch(rank, step)).backward()
    dist.barrier()
    if rank == 1:
        time.sleep(8)
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(thinwire.PeerLost) as lost:
        loss_of(model, batch(rank, 2)).backward()
    assert lost.value.ranks == (1,), lost
    assert 1.9 < time.monotonic() - began < 7.5  # the deadline, not the end of rank 1
    assert isinstance(lost.value, ConnectionError)
    assert reducer.state_dict()["step"] == 2
    sys.stdout.flush()
    os._exit(0)


def test_stuck_rank() -> None:
    run_ranks(__file__, "stuck", 3, seconds=60)


def aborted(rank: int, size: int) -> None:
    """abort() from another thread ends a waiting step, and that of the other rank."""
    model = DDP(seeded(Mlp))
    reducer = tw.compress(model, "q8", deadline=30.0, grace=0.3)
    for step in range(2):
        loss_of(model, batch(rank, step)).backward()
    if rank == 0:
        threading.Timer(0.3, reducer.abort).start()
        with pytest.raises(thinwire.Error, match="abort"):
            loss_of(model, batch(rank, 1)).backward()
        dist.barrier()
    else:
        dist.barrier()
        with pytest.raises(thinwire.Error):
            loss_of(model, batch(rank, 1)).backward()


def test_abort() -> None:
    run_ranks(__file__, "aborted", 2, seconds=60)
