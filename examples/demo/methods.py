"""How gradients travel in one run: nothing, DDP as it is, PyTorch's hooks, thinwire.

`attach(spec, model)` gives an Attached whose `model` is trained. All DDP models are built with
gradient_as_bucket_view=True (no method pays a copy that another saves) and init_sync=False (every
rank builds the same weights from the seed; the workers check it by hash).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

BOUND = "bound"
FLOOR = "ddp"
"""DDP whose hook sends nothing, and one 4-byte allreduce: what DDP's own copy into its buckets
costs before any hook has its turn. Its replicas drift apart; it is a timing, not training."""
FEEDBACK = "feedback"
"""The same, whose hook adds the gradient to a residual and zeroes it: what error feedback reads and
writes, whatever is sent."""
ONE_BUCKET_MB = 100_000
"""Larger than any model here: PyTorch's PowerSGD hook aborts the process on Gloo when there are
two buckets."""


@dataclass
class Attached:
    """A model with its way of communication."""

    model: nn.Module
    after_backward: Callable[[], None]
    """What the step calls between backward and the optimiser."""
    stats: Callable[[], dict[str, Any]]
    reducer: Any = None


def check_spec(spec: str) -> str:
    """Return the spec, or say what is wrong with it."""
    family, _, argument = spec.partition(":")
    if spec in (BOUND, FLOOR, FEEDBACK, "none", "fp16"):
        return spec
    if family == "powersgd" and argument.isdigit() and int(argument) > 0:
        return spec
    if family == "thinwire" and argument:
        return spec
    raise ValueError(
        f"unknown method '{spec}': expected bound, ddp, feedback, none, fp16, powersgd:RANK "
        "or thinwire:POLICY (such as thinwire:topk:0.01,values=q8)"
    )


def label(spec: str) -> str:
    """How tables and plots call a method."""
    family, _, argument = spec.partition(":")
    if family == "thinwire":
        return f"thinwire {argument}"
    names = {
        FLOOR: "DDP that sends nothing",
        FEEDBACK: "DDP that keeps residuals and sends nothing",
        "none": "plain DDP (fp32)",
        "fp16": "PyTorch fp16 hook",
        "powersgd": f"PyTorch PowerSGD rank {argument}",
    }
    return names.get(family, family)


def attach(spec: str, model: nn.Module) -> Attached:
    """Wrap the model; collective: every rank calls it with the same spec."""
    family, _, argument = check_spec(spec).partition(":")
    if family == BOUND:
        word = torch.zeros(1)
        return Attached(model, lambda: _allreduce(word), dict)
    ddp = DistributedDataParallel(
        model,
        gradient_as_bucket_view=True,
        init_sync=False,
        bucket_cap_mb=ONE_BUCKET_MB if family == "powersgd" else None,
    )
    if family in (FLOOR, FEEDBACK):
        word = torch.zeros(1)
        if family == FLOOR:
            ddp.register_comm_hook(None, _send_nothing)
        else:
            ddp.register_comm_hook({}, _keep_residual)
        return Attached(ddp, lambda: _allreduce(word), dict)
    if family == "fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif family == "powersgd":
        # 2 is the earliest start the hook allows with error feedback.
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=int(argument), start_powerSGD_iter=2
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    elif family == "thinwire":
        import thinwire.torch as tw

        reducer = tw.compress(ddp, argument)
        return Attached(ddp, _nothing, lambda: dict(reducer.stats()), reducer)
    return Attached(ddp, _nothing, dict)


def _nothing() -> None:
    pass


# DDP reads the annotations of a hook and refuses postponed ones.
def _send_nothing(_, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN202
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _keep_residual(residuals: dict[int, torch.Tensor], bucket):  # type: ignore[no-untyped-def]  # noqa: ANN202
    gradient = bucket.buffer()
    kept = residuals.get(bucket.index())
    if kept is None or kept.shape != gradient.shape:  # DDP rebuilds its buckets once
        kept = residuals[bucket.index()] = torch.zeros_like(gradient)
    kept.add_(gradient)
    gradient.zero_()
    return _send_nothing(None, bucket)


def _allreduce(word: torch.Tensor) -> None:
    dist.all_reduce(word)
