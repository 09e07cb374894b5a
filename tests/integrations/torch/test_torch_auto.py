"""The policy ``auto`` in a DDP model."""

from __future__ import annotations

import json
import pathlib

import pytest
import thinwire.torch as tw
import torch
import torch.distributed as dist
from thinwire.errors import PolicyError
from torch.nn.parallel import DistributedDataParallel
from torch_models import Mlp, batch, loss_of, seeded
from torch_ranks import run_ranks

STEPS = 30


def train(model: DistributedDataParallel, rank: int, steps: range) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def job_auto(rank: int, size: int, file: str) -> None:
    """Replicas stay equal while it tries and changes, and it says what it does."""
    model = DistributedDataParallel(seeded(Mlp))
    reducer = tw.compress(model, "auto", log=file)
    train(model, rank, range(STEPS))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty(0)] * size
    dist.all_gather_object(everyone, weights)
    assert all(torch.equal(other, weights) for other in everyone)
    reducer.state_dict()  # when all is decided
    decisions = reducer.decisions()
    assert decisions[0].startswith("auto: begins with")
    assert reducer.decisions() == decisions
    spoken: list[list[str]] = [[]] * size
    dist.all_gather_object(spoken, decisions)
    assert all(other == decisions for other in spoken)
    reasons = [layer["reason"] for layer in reducer.stats()["layers"]]
    assert any(reason.startswith("auto: ") for reason in reasons)


def job_resumes(rank: int, size: int) -> None:
    """The codecs that were chosen are part of the state."""
    model = DistributedDataParallel(seeded(Mlp))
    reducer = tw.compress(model, "auto,families=topk,error=0.9")
    train(model, rank, range(STEPS))
    state = reducer.state_dict()
    again = DistributedDataParallel(seeded(Mlp))
    resumed = tw.compress(again, "auto,families=topk,error=0.9")
    resumed.load_state_dict(state)
    assert resumed.state_dict()["codecs"] == state["codecs"]
    for key, values in state["residuals"].items():
        assert torch.equal(resumed.state_dict()["residuals"][key], values)
    train(again, rank, range(STEPS, 2 * STEPS))


def job_optimizer(rank: int, size: int) -> None:
    model = DistributedDataParallel(seeded(Mlp))
    reducer = tw.compress(model, "auto")
    with pytest.raises(PolicyError, match="auto"):
        tw.optim.OneBitAdam(model.parameters(), reducer=reducer, lr=1e-3)
    train(model, rank, range(3))


def jobs(rank: int, size: int, file: str) -> None:
    job_auto(rank, size, file)
    job_resumes(rank, size)
    job_optimizer(rank, size)


def test_auto(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "run.jsonl"
    run_ranks(__file__, "jobs", 4, str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    plans = [line for line in lines if line["kind"] == "plan"]
    assert {line["rank"] for line in plans} == {0, 1, 2, 3}
    assert all(line["decisions"][0].startswith("auto: ") for line in plans)
