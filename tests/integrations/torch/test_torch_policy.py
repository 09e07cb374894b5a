"""Reducer.set_policy: another policy from one backward() to the next, in a DDP model."""

from __future__ import annotations

import pathlib

import pytest
import thinwire.torch as tw
import torch
import torch.distributed as dist
from thinwire.errors import InvalidArgument, MismatchError, PolicyError
from thinwire.report.runs import gather
from torch.nn.parallel import DistributedDataParallel
from torch_models import Mlp, batch, loss_of, seeded
from torch_ranks import run_ranks

EPOCHS = ("topk:0.1", "topk:0.02,values=q8", "q4", "none")
STEPS = 3


def train(
    model: DistributedDataParallel, optimizer: torch.optim.Optimizer, rank: int, steps: range
) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        optimizer.step()


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def pending_of(model: torch.nn.Module, reducer: tw.Reducer) -> torch.Tensor:
    """Of every element, through all ranks: (1/P) sum of the workers' residuals + the owner's."""
    size = dist.get_world_size()
    names = [name for name, _ in model.named_parameters()]
    layers = {
        name: torch.zeros(p.numel(), dtype=torch.float64) for name, p in model.named_parameters()
    }
    for key, values in reducer.state_dict()["residuals"].items():
        role, _, rest = key.partition("/")
        name, _, place = rest.rpartition("/")
        begin, end = map(int, place.split(":"))
        layers[name][begin:end] += values.double() / (size if role == "worker" else 1)
    total = torch.cat([layers[name] for name in names])
    dist.all_reduce(total)
    return total


def job_epochs(rank: int, size: int, file: str) -> None:
    """Each epoch its policy; replicas stay equal, and what is pending is there in the next one."""
    for views in (False, True):
        model = DistributedDataParallel(seeded(Mlp), gradient_as_bucket_view=views)
        reducer = tw.compress(model, EPOCHS[0], log=file)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for epoch, policy in enumerate(EPOCHS):
            before = pending_of(model.module, reducer)
            assert epoch == 0 or size == 1 or float(before.abs().max()) > 0
            reducer.set_policy(policy)
            assert reducer.policy == policy
            assert reducer.state_dict()["policy"] == policy
            after = pending_of(model.module, reducer)
            torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-6)
            train(model, optimizer, rank, range(epoch * STEPS, (epoch + 1) * STEPS))
            codecs = {layer["codec"] for layer in reducer.stats()["layers"]}
            assert any(codec.startswith(policy.split(",")[0]) for codec in codecs)
            reducer.log(epoch=epoch)
        assert not pending_of(model.module, reducer).any()
        all_weights = [torch.empty(0)] * size
        dist.all_gather_object(all_weights, weights_of(model))
        assert all(torch.equal(weights, all_weights[0]) for weights in all_weights)


def job_resumes(rank: int, size: int) -> None:
    """A state that was saved under another policy is loaded after set_policy()."""
    ends = []
    state, weights = None, None
    for restarted in (False, True):
        model = DistributedDataParallel(seeded(Mlp))
        reducer = tw.compress(model, "topk:0.1")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if not restarted:
            train(model, optimizer, rank, range(STEPS))
            reducer.set_policy("topk:0.05")
            train(model, optimizer, rank, range(STEPS, 2 * STEPS))
            state = reducer.state_dict()
            weights = {k: v.clone() for k, v in model.module.state_dict().items()}
        else:
            assert state is not None
            assert weights is not None
            with pytest.raises(InvalidArgument, match=r"policy: expected 'topk:0.1', got"):
                reducer.load_state_dict(state)
            reducer.set_policy("topk:0.05")
            reducer.load_state_dict(state)
            model.module.load_state_dict(weights)
        train(model, optimizer, rank, range(2 * STEPS, 3 * STEPS))
        ends.append(weights_of(model))
    assert torch.equal(*ends)


def job_refuses(rank: int, size: int) -> None:
    model = DistributedDataParallel(seeded(Mlp))
    reducer = tw.compress(model, "onebit")
    opt = tw.optim.OneBitAdam(model.parameters(), reducer=reducer, freeze_step=2)
    train(model, opt, rank, range(STEPS))
    with pytest.raises(PolicyError, match=r"OneBitAdam: layer '.*weight': cannot go from"):
        reducer.set_policy("none")
    with pytest.raises(PolicyError, match=r"topk"):
        reducer.set_policy("topk:2")
    assert reducer.policy == "onebit"
    reducer.set_policy("q4")
    train(model, opt, rank, range(STEPS, 2 * STEPS))
    if size > 1:
        reducer.set_policy("onebit" if rank else "q8")
        with pytest.raises(MismatchError, match=r"policy"):
            train(model, opt, rank, range(1))


def jobs(rank: int, size: int, file: str) -> None:
    job_epochs(rank, size, file)
    job_resumes(rank, size)
    job_refuses(rank, size)


@pytest.mark.parametrize("size", [1, 3])
def test_policies_change_between_steps(tmp_path: pathlib.Path, size: int) -> None:
    file = tmp_path / "run.jsonl"
    run_ranks(__file__, "jobs", size, str(file))
    runs, left_out = gather([file])
    assert left_out == []
    assert [run.ended for run in runs] == [True, True]
    for run in runs:
        assert run.policy == (
            "topk:0.1, from step 0 topk:0.1, from step 3 topk:0.02,values=q8, from step 6 q4, "
            "from step 9 none"
        )
        assert all(layer.dense for layer in run.layers)
