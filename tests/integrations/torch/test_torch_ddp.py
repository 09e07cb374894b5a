"""compress() under everything that DDP can do. Each test is one job of several ranks."""

import copy
import io
import logging
from contextlib import nullcontext
from typing import Any

import pytest
import thinwire
import thinwire.torch as tw
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.optim.swa_utils import AveragedModel
from torch_models import Mlp, assert_identical, batch, digest, loss_of, seeded, state_digest, train
from torch_ranks import run_ranks

SPECS = ("none", "topk:0.05", "topk:0.05,values=q8", "q8", "q4", "bf16", "randmask:0.2")


def job_specs(rank: int, size: int) -> None:
    """Every family: replicas stay identical, the error fed back, and lossless ones match DDP."""
    plain = DDP(seeded(Mlp))
    train(plain, rank, range(4))
    for spec in SPECS:
        model = DDP(seeded(Mlp))
        reducer = tw.compress(model, spec)
        train(model, rank, range(4))
        stats = reducer.stats()
        assert stats["steps"] == 4, spec
        assert stats["skipped_steps"] == 0, spec
        assert {layer["name"] for layer in stats["layers"]} == {
            name for name, _ in model.module.named_parameters()
        }
        assert not reducer.last_step_skipped
        if spec == "none":
            for a, b in zip(plain.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        if size > 1 and spec != "none":
            assert stats["wire_bytes"] > 0
            weights = [layer for layer in stats["layers"] if layer["name"] == "second.weight"]
            assert weights[0]["ratio"] > 1.9, (spec, weights)


def job_modes(rank: int, size: int) -> None:
    """Ways to build and run a DDP model."""
    for options in (
        {"static_graph": True},
        {"gradient_as_bucket_view": True},
        {"static_graph": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 0.004},
        {"bucket_cap_mb": 0.004},  # several buckets, rebuilt after the first step
        {"find_unused_parameters": True},
        {"batched_grad_copy": True},
    ):
        model = DDP(seeded(Mlp), **options)
        tw.compress(model, "topk:0.1")
        train(model, rank, range(4))


def job_accumulation(rank: int, size: int) -> None:
    """no_sync: three batches of which the last one reduces give what one step of the sum gives."""
    results = []
    for accumulate in (True, False):
        model = DDP(seeded(Mlp))
        reducer = tw.compress(model, "q8")
        if accumulate:
            for step in range(3):
                with model.no_sync() if step < 2 else nullcontext():
                    loss_of(model, batch(rank, step)).backward()
        else:
            sum(loss_of(model, batch(rank, step)) for step in range(3)).backward()
        assert reducer.stats()["steps"] == 1
        assert_identical(model)
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)


def job_two_models(rank: int, size: int) -> None:
    """Two models step in turn and in one backward; each has its own reducer and steps."""
    one, two = DDP(seeded(Mlp)), DDP(seeded(lambda: Mlp(64), 8))
    first, second = tw.compress(one, "topk:0.05"), tw.compress(two, "q4")
    train(one, rank, range(2))
    train(two, rank, range(3))
    (loss_of(one, batch(rank, 9)) + loss_of(two, batch(rank, 9))).backward()
    assert_identical(one)
    assert_identical(two)
    assert first.stats()["steps"] == 3
    assert second.stats()["steps"] == 4


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(24, 48)
        self.left = nn.Linear(48, 32)
        self.right = nn.Linear(48, 32)
        self.never = nn.Linear(48, 32)

    def forward(self, x: torch.Tensor, left: bool = True) -> torch.Tensor:
        return (self.left if left else self.right)(self.body(x))


def job_unused(rank: int, size: int) -> None:
    """Ranks use different branches; one branch is used by nobody and gets no gradient."""
    model = DDP(seeded(Branches), find_unused_parameters=True)
    reducer = tw.compress(model, "topk:0.1")
    for step in range(3):
        model.zero_grad()
        model(batch(rank, step), left=(rank + step) % 2 == 0).square().mean().backward()
        assert_identical(model, f"step {step}")
        assert model.module.never.weight.grad is None
        assert model.module.left.weight.grad is not None
    residuals = reducer.state_dict()["residuals"]
    never = [v for key, v in residuals.items() if "never.weight" in key]
    assert all(not v.any() for v in never), "an unused layer has a residual"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 64)
        self.embed = nn.Linear(64, 64)
        self.out = nn.Linear(64, 64)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.embed(self.inner(x))))


def job_tied(rank: int, size: int) -> None:
    model = DDP(seeded(Tied))
    reducer = tw.compress(model, "q8")
    train(model, rank, range(3))
    names = [layer["name"] for layer in reducer.stats()["layers"]]
    assert "embed.weight" in names
    assert "out.weight" not in names


def job_half(rank: int, size: int) -> None:
    """bf16 and fp16 parameters, autocast, one model of two dtypes."""
    for dtype in (torch.bfloat16, torch.float16):
        for spec in ("q8", "topk:0.1", "none"):
            model = DDP(seeded(lambda dtype=dtype: Mlp(dtype=dtype)))
            reducer = tw.compress(model, spec)
            train(model, rank, range(3), lr=0.01, dtype=dtype)
            assert all(p.grad.dtype == dtype for p in model.parameters())
            assert reducer.stats()["steps"] == 3
    model = DDP(seeded(Mlp))
    tw.compress(model, "q8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch(rank, 0)).float().square().mean()
    loss.backward()
    assert_identical(model)
    mixed = seeded(Mlp)
    mixed.second.to(torch.bfloat16)
    mixed.forward = lambda x: mixed.last(mixed.second(mixed.first(x).bfloat16()).float())
    model = DDP(mixed)
    tw.compress(model, "topk:0.1,values=q8")
    train(model, rank, range(3))


def job_scaler(rank: int, size: int) -> None:
    """A step with Inf on one rank: all ranks see it, GradScaler skips it, memory is untouched."""
    model = DDP(seeded(Mlp))
    reducer = tw.compress(model, "topk:0.05")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    reducer.set_loss_scale(256.0)

    def step(n: int, poison: bool = False) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, batch(rank, n))
        if poison and rank == size - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        reducer.set_loss_scale(scaler.get_scale())

    for n in range(3):
        step(n)
    before, weights = reducer.state_dict(), digest(model.parameters())
    step(3, poison=True)
    assert reducer.last_step_skipped
    assert scaler.get_scale() == 128.0
    assert digest(model.parameters()) == weights
    after = reducer.state_dict()
    assert after["loss_scale"] == 128.0
    for key, residual in before["residuals"].items():
        assert torch.equal(after["residuals"][key], residual * 0.5), key
    step(4)
    assert not reducer.last_step_skipped
    assert reducer.stats()["skipped_steps"] == 1
    assert_identical(model)


def job_clipping(rank: int, size: int) -> None:
    model = DDP(seeded(Mlp))
    tw.compress(model, "topk:0.05,values=q8")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for n in range(3):
        optimizer.zero_grad()
        (1000 * loss_of(model, batch(rank, n))).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        optimizer.step()
        assert_identical(model)


def job_join(rank: int, size: int) -> None:
    """Rank r has 2 + r batches: who has finished contributes zeros until the last one has."""
    for spec in ("topk:0.1", "q8"):
        model = DDP(seeded(Mlp), bucket_cap_mb=0.004)
        reducer = tw.compress(model, spec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with Join([model]):
            for n in range(2 + rank):
                optimizer.zero_grad()
                loss_of(model, batch(rank, n)).backward()
                optimizer.step()
        assert reducer.stats()["steps"] == 2 + size - 1
        parameters: list = [None] * size
        dist.all_gather_object(parameters, digest(model.parameters()))
        assert len(set(parameters)) == 1


def job_state(rank: int, size: int) -> None:
    """Two steps, save, two more; the same two from the saved state end with the same bits."""
    for spec in ("topk:0.05,values=q8", "q4,stochastic", "randmask:0.2"):
        model = DDP(seeded(Mlp), bucket_cap_mb=0.004)
        reducer = tw.compress(model, spec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

        def step(n: int, model: DDP = model, optimizer: torch.optim.SGD = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model, batch(rank, n)).backward()
            optimizer.step()

        for n in range(2):
            step(n)
        saved = copy.deepcopy((model.module.state_dict(), reducer.state_dict()))
        for n in range(2, 4):
            step(n)
        expected = digest(model.parameters()), state_digest(reducer.state_dict())

        again = DDP(seeded(Mlp, 99), bucket_cap_mb=0.004)
        reborn = tw.compress(again, spec)
        other = torch.optim.SGD(again.parameters(), lr=0.05)
        # DDP rebuilds its buckets after a first step, and Gloo's order of summing goes by bucket.
        loss_of(again, batch(rank, 50)).backward()
        again.zero_grad()
        loss_of(again, batch(rank, 51)).backward()
        again.module.load_state_dict(saved[0])
        reborn.load_state_dict(saved[1])
        for n in range(2, 4):
            step(n, again, other)
        got = digest(again.parameters()), state_digest(reborn.state_dict())
        assert got == expected, spec
        wrong = dict(saved[1], policy="q8")
        with pytest.raises(thinwire.InvalidArgument, match="policy"):
            reborn.load_state_dict(wrong)
        with pytest.raises(thinwire.InvalidArgument, match="state_dict"):
            reborn.load_state_dict({"version": 1})


def job_copies(rank: int, size: int) -> None:
    """Copies of a compressed model are plain DDP models; the model itself goes on."""
    for bucket_view in (False, True):
        model = DDP(seeded(Mlp), gradient_as_bucket_view=bucket_view)
        reducer = tw.compress(model, "q8")
        train(model, rank, range(2))
        pickled = io.BytesIO()
        torch.save(model, pickled)
        pickled.seek(0)
        for other in (
            copy.deepcopy(model),
            torch.load(pickled, weights_only=False),
            AveragedModel(model).module,
        ):
            assert digest(other.parameters()) == digest(model.parameters())
            assert not hasattr(other, "_thinwire_reducer")
            assert len(other._forward_hooks) == 0
            train(other, rank, range(1))
            other.register_comm_hook(None, allreduce_hook)
        assert reducer.stats()["steps"] == 2
        again = copy.deepcopy(model)
        assert tw.compress(again, "q8") is not reducer
        train(again, rank, range(2))
        train(model, rank, range(2, 4))
        assert reducer.stats()["steps"] == 4


def job_abandoned_step(rank: int, size: int) -> None:
    """abandon_step() ends a step that lost buckets, and does nothing between steps."""

    class Fragile(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            if broken:
                raise ArithmeticError("backward ends here")
            return grad

    class FragileMlp(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.second(Fragile.apply(torch.relu(self.first(x))))))

    broken = False
    model = DDP(seeded(FragileMlp), bucket_cap_mb=0.004)
    reducer = tw.compress(model, "q8")
    reducer.abandon_step()
    train(model, rank, range(2))
    reducer.abandon_step()
    before = state_digest(reducer.state_dict())
    broken = True
    with pytest.raises(ArithmeticError, match="ends here"):
        loss_of(model, batch(rank, 2)).backward()
    with pytest.raises(thinwire.InvalidArgument, match=r"abandon_step\(\)"):
        reducer.state_dict()
    reducer.abandon_step()
    assert state_digest(reducer.state_dict()) == before
    assert reducer.stats()["skipped_steps"] == 1
    # DDP takes no other step with this model: a copy goes on.
    broken = False
    again = copy.deepcopy(model)
    reborn = tw.compress(again, "q8")
    reborn.load_state_dict(reducer.state_dict())
    train(again, rank, range(2, 4))
    assert reborn.stats()["steps"] == 2


def job_backend(rank: int, size: int) -> None:
    """A group whose backend is "thinwire": models over it are compressed, nothing else is."""
    group = dist.new_group(list(range(size)), backend="thinwire")
    value = torch.full((1000,), float(rank))
    dist.all_reduce(value, group=group)
    assert torch.equal(value, torch.full((1000,), sum(range(size)) * 1.0))
    gathered = [torch.zeros(3, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(gathered, torch.full((3,), rank), group=group)
    assert [int(t[0]) for t in gathered] == list(range(size))
    model = DDP(seeded(Mlp), process_group=group)
    assert model._thinwire_reducer.policy == "q8"
    train(model, rank, range(3))
    by_device = DDP(
        seeded(Mlp), process_group=dist.new_group(list(range(size)), backend="cpu:gloo")
    )
    tw.compress(by_device, "q8")
    train(by_device, rank, range(2))
    untouched = DDP(seeded(Mlp))
    assert not hasattr(untouched, "_thinwire_reducer")


def job_subgroup(rank: int, size: int) -> None:
    """Models over groups that leave ranks out, and another order of private groups elsewhere."""
    evens, odds = dist.new_group([0, 2]), dist.new_group([1, 3])
    group = evens if rank % 2 == 0 else odds
    model = DDP(seeded(Mlp), process_group=group)
    reducer = tw.compress(model, "topk:0.05")
    for n in range(2):
        loss_of(model, batch(rank, n)).backward()
    assert reducer.stats()["steps"] == 2
    whole = DDP(seeded(Mlp))
    tw.compress(whole, "q8")
    train(whole, rank, range(2))


def job_summary(rank: int, size: int) -> None:
    """Rank 0 says before the first step what it will do and how much memory that takes."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("thinwire").addHandler(handler)
    model = DDP(seeded(Mlp))
    reducer = tw.compress(model, "topk:0.05")
    assert len(lines) == (1 if rank == 0 else 0)
    assert "topk:0.05" in reducer.summary()
    assert "memory" in reducer.summary().lower()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert "libgloo" not in maps.read()


ALONE = (
    "job_specs",
    "job_modes",
    "job_accumulation",
    "job_state",
    "job_backend",
)


def jobs(rank: int, size: int, *names: str) -> None:
    """Several jobs in one set of processes."""
    for name in names:
        try:
            globals()[name](rank, size)
        except BaseException as error:
            error.add_note(f"in {name}")
            raise


def test_alone() -> None:
    run_ranks(__file__, "jobs", 1, *ALONE)


def test_modes_of_ddp() -> None:
    run_ranks(
        __file__,
        "jobs",
        2,
        "job_modes",
        "job_accumulation",
        "job_two_models",
        "job_summary",
        "job_copies",
    )


def test_models() -> None:
    run_ranks(
        __file__, "jobs", 3, "job_specs", "job_unused", "job_tied", "job_half", "job_clipping"
    )


def test_training_loops() -> None:
    run_ranks(__file__, "jobs", 3, "job_scaler", "job_join", "job_state", "job_abandoned_step")


def test_groups() -> None:
    run_ranks(__file__, "jobs", 4, "job_backend", "job_subgroup")
