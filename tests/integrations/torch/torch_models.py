"""Small models, training steps and comparisons that the jobs of these tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Mlp(nn.Module):
    """Three linear layers; weights are above the 1024 elements under which layers go dense."""

    def __init__(self, width: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(24, width, dtype=dtype)
        self.second = nn.Linear(width, width, dtype=dtype)
        self.last = nn.Linear(width, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def seeded(make: Any, seed: int = 7) -> Any:
    torch.manual_seed(seed)
    return make()


def batch(rank: int, step: int, n: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Another batch on every rank and step, the same in every run."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(n, 24, generator=generator).to(dtype)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).float().square().mean()


def train(
    model: DistributedDataParallel,
    rank: int,
    steps: Iterable[int],
    lr: float = 0.05,
    **batch_of: Any,
) -> None:
    """Steps of SGD with momentum; after each, all replicas must hold the same bits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, batch(rank, step, **batch_of)).backward()
        optimizer.step()
        assert_identical(model, f"step {step}")


def digest(tensors: Iterable[torch.Tensor]) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def state_digest(state: dict[str, Any]) -> str:
    """Of the residuals alone."""
    return digest(state["residuals"][key] for key in sorted(state["residuals"]))


def assert_identical(model: nn.Module, where: str = "") -> None:
    """Parameters and gradients have the same bits on all ranks."""
    tensors = list(model.parameters())
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, digest(tensors))
    assert len(set(everywhere)) == 1, f"replicas differ {where}: {everywhere}"
