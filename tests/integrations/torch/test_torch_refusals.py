"""Bad input to compress(): each gets its own error, and ranks that disagree hear how."""

import os
import select

import pytest
import thinwire
import thinwire.torch as tw
import torch
import torch.distributed as dist
from thinwire.torch import _group
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch_models import Mlp, batch, loss_of, seeded, train
from torch_ranks import run_ranks


class Words(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 32, **options)
        self.out = nn.Linear(32, 64)


def job_models(rank: int, size: int) -> None:
    with pytest.raises(thinwire.InvalidArgument, match=r"expected a DistributedDataParallel.*Mlp"):
        tw.compress(Mlp(), "q8")
    hooked = DDP(Mlp())
    hooked.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(thinwire.InvalidArgument, match="fp16_compress_hook"):
        tw.compress(hooked, "q8")
    builtin = DDP(Mlp())
    builtin._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    with pytest.raises(thinwire.InvalidArgument, match="built-in hook"):
        tw.compress(builtin, "q8")
    twice = DDP(Mlp())
    tw.compress(twice, "q8")
    with pytest.raises(thinwire.InvalidArgument, match="already compresses"):
        tw.compress(twice, "q8")
    with pytest.raises(thinwire.InvalidArgument, match=r"fp16_compress_hook.*already"):
        twice.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(thinwire.NotAvailable, match="sparse gradients of words"):
        tw.compress(DDP(Words(sparse=True)), "q8")
    tw.compress(DDP(Words()), "q8")
    python_reducer = DDP(Mlp())
    python_reducer._use_python_reducer = True
    with pytest.raises(thinwire.NotAvailable, match="Python reducer"):
        tw.compress(python_reducer, "q8")
    complex_model = DDP(nn.Linear(64, 64, dtype=torch.complex64))
    with pytest.raises(thinwire.InvalidArgument, match=r"weight has dtype torch\.complex64"):
        tw.compress(complex_model, "q8")

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(thinwire.NotAvailable, match="FullyShardedDataParallel"):
        tw.compress(FullyShardedDataParallel(), "q8")


def job_policies(rank: int, size: int) -> None:
    for policy, message in (
        ("topq:0.1", "topk"),
        ("q9", "q8"),
        ("topk:0.1,value=q8", "values"),
        ("topk:2", "2"),
    ):
        with pytest.raises(thinwire.PolicyError, match=message):
            tw.compress(DDP(Mlp()), policy)
    with pytest.raises(thinwire.PolicyError):
        tw.compress(DDP(nn.Linear(4, 4)), "q8")  # no layer is large enough
    unmatched = 'policy = "q8"\n[[rule]]\nname = "secnd.*"\npolicy = "none"\n'
    with pytest.raises(thinwire.PolicyError, match=r"secnd(.|\n)*second"):
        tw.compress(DDP(Mlp()), unmatched)
    with pytest.raises(thinwire.PolicyError, match=r"families(.|\n)*topk"):
        tw.compress(DDP(Mlp()), "auto,families=topq")
    model = DDP(seeded(Mlp))  # and the job goes on
    tw.compress(model, unmatched.replace("secnd", "second"))
    train(model, rank, range(2))


def job_disagreement(rank: int, size: int) -> None:
    with pytest.raises(thinwire.MismatchError, match=r"policy(.|\n)*q8(.|\n)*q4") as caught:
        tw.compress(DDP(seeded(Mlp)), "q4" if rank == 1 else "q8")
    assert "1" in str(caught.value)
    model = DDP(seeded(Mlp))
    model.module.second = nn.Linear(48, 48) if rank == 1 else model.module.second
    if rank == 1:
        for parameter in model.module.second.parameters():
            parameter.requires_grad_(False)
    with pytest.raises(thinwire.MismatchError, match="layer"):
        tw.compress(model, "q8")


def job_absent(rank: int, size: int, absent: int) -> None:
    """One rank never calls compress(): the others learn which one, in bounded time."""
    model = DDP(seeded(Mlp))
    if rank != absent:
        _group._SLACK_SECONDS = 0.0
        with pytest.raises(thinwire.PeerLost, match=rf"missing ranks: \[{absent}\]"):
            tw.compress(model, "q8", deadline=1.5)
    dist.barrier()


def job_store_gone(rank: int, size: int) -> None:
    """Rank 0, whose process serves the store, ends before the others call compress()."""
    model = DDP(seeded(Mlp))
    pids: list[int] = [0] * size
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        os._exit(0)
    gone = select.poll()
    gone.register(os.pidfd_open(pids[0]), select.POLLIN)
    assert gone.poll(30_000)
    with pytest.raises(thinwire.PeerLost, match=r"missing ranks: \[0\], whose store"):
        tw.compress(model, "q8", deadline=1.5)
    os._exit(0)


def job_foreign_parameter(rank: int, size: int) -> None:
    """A parameter swapped after compress(): an error that names the way out, from backward()."""
    model = DDP(seeded(Mlp))
    native = tw.compress(model, "q8")._native
    other = DDP(seeded(Mlp))
    native.attach(other.reducer, list(model.parameters()), False)
    with pytest.raises(thinwire.InvalidArgument, match="compress"):
        loss_of(other, batch(rank, 0)).backward()


def jobs(rank: int, size: int, *names: str) -> None:
    for name in names:
        globals()[name](rank, size)


def test_refused_models() -> None:
    run_ranks(__file__, "jobs", 1, "job_models", "job_foreign_parameter")


def test_bad_policies_and_ranks_that_disagree() -> None:
    run_ranks(__file__, "jobs", 2, "job_policies", "job_disagreement")


@pytest.mark.parametrize("absent", [0, 1])
def test_absent_rank(absent: int) -> None:
    run_ranks(__file__, "job_absent", 3, absent)


def test_absent_store() -> None:
    run_ranks(__file__, "job_store_gone", 3, seconds=30)


@pytest.mark.parametrize("name", ["deadline", "grace"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e12, 0, -1.0])
def test_times_out_of_range(name: str, value: float) -> None:
    with pytest.raises(thinwire.InvalidArgument, match=rf"{name}: expected seconds above 0"):
        tw.compress(nn.Linear(2, 2), "q8", **{name: value})


def test_uninitialised() -> None:
    with pytest.raises(thinwire.InvalidArgument, match="DistributedDataParallel"):
        tw.compress(nn.Linear(2, 2), "q8")
