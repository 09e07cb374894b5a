"""Gradients that reach the reducer without DDP's copy: every result as with it, to the bit."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import thinwire
import thinwire.torch as tw
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.utils.checkpoint import checkpoint
from torch_models import Mlp, assert_identical, batch, digest, loss_of, seeded, state_digest
from torch_ranks import run_ranks

COPY = "torch::distributed::reducer::copy_"
Step = Callable[[DDP, int, int], None]


def backward(model: DDP, rank: int, n: int) -> None:
    loss_of(model, batch(rank, n)).backward()


def accumulated(model: DDP, rank: int, n: int) -> None:
    for part in range(3):
        with model.no_sync() if part < 2 else nullcontext():
            loss_of(model, batch(rank, 10 * n + part)).backward()


def kept_gradients(model: DDP, rank: int, n: int) -> None:
    model.zero_grad(set_to_none=n % 2 == 0)
    backward(model, rank, n)


def evaluated(model: DDP, rank: int, n: int) -> None:
    """A forward without gradients in between, and one that is never differentiated."""
    with torch.no_grad():
        model(batch(rank, 100 + n))
    backward(model, rank, n)
    with torch.no_grad():
        model(batch(rank, 200 + n))


def two_forwards(model: DDP, rank: int, n: int) -> None:
    (loss_of(model, batch(rank, n)) + loss_of(model, batch(rank, 50 + n))).backward()


def around_ddp(model: DDP, rank: int, n: int) -> None:
    """The module itself, without DDP, has local gradients, whatever was reduced before."""
    backward(model, rank, n)
    reduced = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model.module, batch(rank, 300 + n)).backward()
    local = torch.autograd.grad(
        loss_of(model.module, batch(rank, 300 + n)), list(model.parameters())
    )
    for p, expected, grad in zip(model.parameters(), local, reduced, strict=True):
        assert torch.equal(p.grad, expected)
        p.grad = grad


def second_backward(model: DDP, rank: int, n: int) -> None:
    """A second backward of the same graph is not reduced: it adds the local gradient."""
    loss = loss_of(model, batch(rank, n))
    loss.backward(retain_graph=True)
    assert_identical(model)
    reduced = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    for p, grad in zip(model.parameters(), reduced, strict=True):
        assert not torch.equal(p.grad, grad)
        p.grad = grad


def hooked(model: DDP, rank: int, n: int) -> None:
    """Hooks on parameters see and change the local gradient."""
    seen: list[torch.Tensor] = []
    handles = [
        model.module.first.weight.register_hook(lambda grad: 2 * grad),
        model.module.second.weight.register_post_accumulate_grad_hook(
            lambda p: seen.append(p.grad.clone())
        ),
    ]
    x = batch(rank, n)
    (local,) = torch.autograd.grad(loss_of(model.module, x), [model.module.second.weight])
    loss_of(model, x).backward()
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], local)


def hooked_node(model: DDP, rank: int, n: int) -> None:
    """A hook in front of the node that accumulates sees the local gradient and may change it."""
    weight = model.module.second.weight
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    handle = node.register_prehook(lambda grads: (3 * grads[0],))
    backward(model, rank, n)
    handle.remove()


SCENES: tuple[Step, ...] = (
    backward,
    accumulated,
    kept_gradients,
    evaluated,
    two_forwards,
    around_ddp,
    second_backward,
    hooked,
    hooked_node,
)


class Checkpointed(nn.Module):
    """Reentrant checkpoints: autograd reaches the shared layer twice in one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.shared = nn.Linear(48, 48)
        self.last = nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(lambda y: torch.relu(self.shared(y)), x, use_reentrant=True)
        return self.last(x)


class ReusedBuffer(torch.autograd.Function):
    """A linear layer that writes the gradient of its weight to the same memory every time."""

    buffer = torch.zeros(48, 48)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        torch.mm(grad.t(), x, out=ReusedBuffer.buffer)
        return grad @ weight, ReusedBuffer.buffer


class ReusedView(ReusedBuffer):
    """The same through a view that nobody else holds."""

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_grad, weight_grad = ReusedBuffer.backward(ctx, grad)
        return x_grad, weight_grad.view(48, 48)


class ReusedArray(ReusedBuffer):
    """The same in memory of NumPy's."""

    array = ReusedBuffer.buffer.clone().numpy()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_grad, weight_grad = ReusedBuffer.backward(ctx, grad)
        ReusedArray.array[:] = weight_grad.numpy()
        return x_grad, torch.from_numpy(ReusedArray.array)


class Reusing(nn.Module):
    layer: type[ReusedBuffer] = ReusedBuffer

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 48)
        self.weights = nn.ParameterList(torch.randn(48, 48) / 7 for _ in range(3))
        self.last = nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for weight in self.weights:
            x = torch.relu(self.layer.apply(x, weight))
        return self.last(x)


class ReusingViews(Reusing):
    layer = ReusedView


class ReusingArrays(Reusing):
    layer = ReusedArray


class OwnGradients(nn.Module):
    """Two weights added to each other, each with memory of its own for its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(24, 48) / 7)
        self.second = nn.Parameter(torch.randn(48, 24) / 7)
        self.last = nn.Linear(48, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.parts()[0] + self.parts()[1]
        return self.last(torch.relu(x @ weight.view(24, 48)))

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first.view(-1) * 1, self.second.view(-1) * 1


class SharedGradients(OwnGradients):
    """The gradients of both are views of one memory."""

    def parts(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first.view(-1), self.second.view(-1)


class Images(nn.Module):
    """Weights in another layout than the default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 40, 3).to(memory_format=torch.channels_last)
        self.last = nn.Linear(40, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x[:, :, None, None].expand(-1, -1, 4, 4).reshape(-1, 6, 8, 8)
        return self.last(self.conv(images).mean((2, 3)))


def results(rank: int, make: Any, scene: Step, spec: str, steps: int = 5, **options: Any) -> Any:
    model = DDP(seeded(make), bucket_cap_mb=0.01, **options)
    reducer = tw.compress(model, spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    grads = []
    for n in range(steps):
        optimizer.zero_grad()
        scene(model, rank, n)
        grads.append(digest(p.grad for p in model.parameters()))
        optimizer.step()
        assert_identical(model, f"{scene.__name__}, {spec}, step {n}")
    return grads, digest(model.parameters()), state_digest(reducer.state_dict())


def job_same_as_copied(rank: int, size: int) -> None:
    for scene in SCENES:
        for spec in ("topk:0.05,values=q8", "q4") if scene is backward else ("topk:0.05",):
            plain = results(rank, Mlp, scene, spec)
            views = results(rank, Mlp, scene, spec, gradient_as_bucket_view=True)
            assert views == plain, f"{scene.__name__}, {spec}"


def job_every_family(rank: int, size: int) -> None:
    for spec in ("none", "bf16", "randmask:0.2", "topk:0.1,start=3"):
        plain = results(rank, Mlp, backward, spec)
        views = results(rank, Mlp, backward, spec, gradient_as_bucket_view=True)
        assert views == plain, spec


def job_other_models(rank: int, size: int) -> None:
    models = ((Checkpointed, {"static_graph": True}), (Reusing, {}), (Images, {}))
    for make, options in models:
        plain = results(rank, make, backward, "topk:0.1", **options)
        views = results(rank, make, backward, "topk:0.1", gradient_as_bucket_view=True, **options)
        assert views == plain, make.__name__


def job_memory_that_others_reach(rank: int, size: int) -> None:
    """Without thinwire param.grad would be that memory, too; here no gradient changes another's."""
    for make, apart in (
        (ReusingViews, Reusing),
        (ReusingArrays, Reusing),
        (SharedGradients, OwnGradients),
    ):
        got = results(rank, make, backward, "topk:0.1", gradient_as_bucket_view=True)
        expected = results(rank, apart, backward, "topk:0.1", gradient_as_bucket_view=True)
        assert got == expected, make.__name__


def copies(model: DDP, rank: int, n: int) -> int:
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(model, rank, n)
    return sum(event.name == COPY for event in profile.events())


def job_no_copies(rank: int, size: int) -> None:
    """DDP copies nothing once its buckets are settled, and every gradient where it is not asked."""
    for views in (True, False):
        model = DDP(seeded(Mlp), gradient_as_bucket_view=views)
        tw.compress(model, "topk:0.05")
        for n in range(2):
            model.zero_grad()
            backward(model, rank, n)
        assert copies(model, rank, 2) == (0 if views else 6)
        assert_identical(model)


def job_named_values(rank: int, size: int) -> None:
    """nonfinite=error finds the value also where the gradient's memory could be the residual's."""
    bad = torch.zeros(48, 48)
    bad[3, 5] = -torch.inf
    for spec in ("dct:32", "q4"):
        for views in (True, False):
            model = DDP(seeded(Mlp), gradient_as_bucket_view=views)
            tw.compress(model, f"{spec},nonfinite=error")
            for n in range(3):  # until DDP's buckets are settled
                backward(model, rank, n)
                model.zero_grad()
            weight = model.module.second.weight
            hook = weight.register_hook(lambda grad: grad + bad if rank == 1 else grad)
            with pytest.raises(thinwire.NonFiniteError) as raised:
                backward(model, rank, 3)
            first = "rank 1, tensor 'second.weight', index 149, value -inf\n"
            assert f"the first: {first}" in str(raised.value)
            hook.remove()
            model.zero_grad()
            backward(model, rank, 4)
            assert_identical(model)


def jobs(rank: int, size: int, *names: str) -> None:
    for name in names:
        globals()[name](rank, size)


def test_alone() -> None:
    run_ranks(__file__, "jobs", 1, "job_same_as_copied")


def test_same_as_copied() -> None:
    run_ranks(__file__, "jobs", 2, "job_same_as_copied", "job_no_copies", "job_named_values")


def test_families_and_models() -> None:
    jobs = ("job_every_family", "job_other_models", "job_memory_that_others_reach")
    run_ranks(__file__, "jobs", 3, *jobs)
