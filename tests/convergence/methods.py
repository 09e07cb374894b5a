"""The compared methods, a row each, and how a row becomes a model and its optimiser.

`settings_of` turns (method, task) into plain values; `attach` needs nothing else, so two runs of
equal settings are the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from tests.convergence.settings import ADAM, LAMB, RECIPES, SGD, Recipe

ONE_BUCKET_MB = 100_000
"""Larger than any model here: PyTorch's PowerSGD hook aborts the process on Gloo when there are
two buckets."""
LONGEST_INTERVAL = 4
"""Steps of 0/1 Adam between two exchanges, at the end of a run: runs of some hundred steps end with
an exchange then. (16 in the paper, after more than 100,000 steps.)"""
FREEZES = ("freeze_step", "var_freeze_step")
"""Arguments that say for how long an optimiser sends dense gradients."""
FREEZE_SHARE = 0.2
"""Of 1-bit Adam and its kin: of the 15 to 25 % advised."""
INTERVAL_SHARE = 0.28
"""Of a run, until 0/1 Adam's intervals double: 32,678 of the 118,000 steps of BERT's training."""
VARIANCE_FLOOR = 0.1
"""The optimisers' default, here so that it is among a run's settings."""
_POWERSGD_DENSE_STEPS = 2
"""The earliest start that the hook allows with error feedback."""


TCP_BYTES_A_BYTE = (1448 + 66) / 1448
"""Headers of full segments, as thinwire counts them (comm/wire_bytes.h)."""


class NotAvailableError(RuntimeError):
    """The method needs something that this thinwire does not have."""


@dataclass(frozen=True)
class Method:
    """One row. `{rank}` and `{dense_steps}` in a transport are filled in for the task."""

    name: str
    title: str
    transport: str
    """`ddp`, `torch-fp16`, `torch-powersgd:RANK`, or `thinwire:POLICY`."""
    family: str | None = None
    """None: the task's own."""
    optimizer: str | None = None
    """A class of thinwire.torch.optim; None: the plain optimiser of the family."""
    options: Callable[[Recipe], dict[str, Any]] = lambda _: {}
    """Further arguments of the optimiser."""
    freezes: bool = False
    """Its optimiser sends dense gradients until it freezes the variance."""
    density_falls: bool = False
    clips_locally: bool = False
    """Its optimiser clips each rank's gradient, in place of the reduced one's clipping."""

    def dense_steps(self, recipe: Recipe) -> int:
        """Of the first steps, those sent dense, or denser than the rest."""
        if self.density_falls:
            return min(recipe.density_warmup, recipe.steps // 2)
        return frozen_after(recipe) if self.freezes else 0


def frozen_after(recipe: Recipe) -> int:
    return max(1, int(recipe.steps * FREEZE_SHARE))


def freeze(recipe: Recipe) -> dict[str, Any]:
    """Arguments of 1-bit Adam and 1-bit LAMB."""
    return {"freeze_step": frozen_after(recipe), "variance_floor": VARIANCE_FLOOR}


def steps_of_an_interval(recipe: Recipe) -> int:
    """Until 0/1 Adam's doubles: whole ones of the longest, so that a run ends with an exchange if
    the steps after the freeze are, too."""
    steps = int(recipe.steps * INTERVAL_SHARE)
    return max(1, steps - steps % LONGEST_INTERVAL)


METHODS = {
    method.name: method
    for method in (
        Method("none", "plain DDP, fp32", "ddp"),
        Method(
            "topk",
            "thinwire topk:0.001,values=q8",
            "thinwire:topk:0.001,values=q8,warmup={dense_steps}",
            density_falls=True,
        ),
        Method("powersgd", "thinwire powersgd", "thinwire:powersgd:{rank}"),
        Method("onebit", "thinwire onebit,scale=l1", "thinwire:onebit,scale=l1"),
        Method("q4", "thinwire q4", "thinwire:q4"),
        Method("q2", "thinwire q2", "thinwire:q2"),
        Method("bf16", "thinwire bf16", "thinwire:bf16"),
        Method("q4-rotate", "thinwire q4,rotate", "thinwire:q4,rotate"),
        Method("torch-powersgd", "PyTorch PowerSGD hook", "torch-powersgd:{rank}"),
        Method("torch-fp16", "PyTorch fp16 hook", "torch-fp16"),
        Method(
            "dgc",
            "DGC, 0.1 %",
            "thinwire:topk:0.001,values=q8,warmup={dense_steps}",
            SGD,
            "DGCSGD",
            lambda _: {"nesterov": False},
            density_falls=True,
            clips_locally=True,
        ),
        Method("adam", "plain DDP, AdamW", "ddp", ADAM),
        Method(
            "onebit-adam",
            "1-bit Adam",
            "thinwire:onebit",
            ADAM,
            "OneBitAdam",
            freeze,
            freezes=True,
        ),
        Method(
            "zeroone-adam",
            "0/1 Adam",
            "thinwire:onebit",
            ADAM,
            "ZeroOneAdam",
            lambda recipe: {
                "var_freeze_step": frozen_after(recipe),
                "local_step_scaler": steps_of_an_interval(recipe),
                "local_step_clipper": LONGEST_INTERVAL,
                "variance_floor": VARIANCE_FLOOR,
            },
            freezes=True,
        ),
        Method(
            "onebit-adam-paper",
            "1-bit Adam, no variance floor",
            "thinwire:onebit",
            ADAM,
            "OneBitAdam",
            lambda recipe: {**freeze(recipe), "variance_floor": 0.0},
            freezes=True,
        ),
        Method("lamb", "uncompressed, LAMB", "thinwire:none", LAMB, "OneBitLAMB"),
        Method(
            "onebit-lamb",
            "1-bit LAMB",
            "thinwire:onebit",
            LAMB,
            "OneBitLAMB",
            freeze,
            freezes=True,
        ),
    )
}
CODECS = [
    *("none", "bf16", "torch-fp16", "torch-powersgd", "powersgd"),
    *("q4", "q4-rotate", "q2", "onebit", "topk"),
]
"""With the plain optimiser of the task's family."""
ROWS = {
    "mlp": [*CODECS, "dgc", "adam", "onebit-adam", "zeroone-adam"],
    "cnn": [
        *(*CODECS, "dgc", "adam", "onebit-adam", "onebit-adam-paper", "zeroone-adam"),
        *("lamb", "onebit-lamb"),
    ],
    "lstm": [*CODECS, "dgc"],
    "lstm-once": ["none", "topk", "dgc"],
    "gpt": [*CODECS, "onebit-adam", "zeroone-adam", "lamb", "onebit-lamb"],
    "minilm": [*CODECS, "onebit-adam", "zeroone-adam"],
}
"""Each task's rows, in the order of the tables: an optimiser is compared where its family's plain
one trains the task well."""
BASELINES = {ADAM: "adam", LAMB: "lamb"}
"""The uncompressed row of a family that is not the task's own."""
MORE_SEEDS = {("cnn", name): 15 for name in ("adam", "onebit-adam", "lamb", "onebit-lamb")}
"""Of (task, method), instead of the recipe's: what five seeds left between a half and one deviation
behind its baseline, and that baseline."""


def methods_of(task: str) -> list[Method]:
    """All rows of a task."""
    return [METHODS[name] for name in ROWS[task]]


def baseline_of(task: str, method: Method) -> str:
    """The uncompressed run that a method is compared with."""
    family = method.family or RECIPES[task].family
    return "none" if family == RECIPES[task].family else BASELINES[family]


def is_baseline(method: Method) -> bool:
    return method.transport in ("ddp", "thinwire:none")


def title_of(task: str, method: Method) -> str:
    """The row's title, with the rank where the transport has one."""
    rank = f", rank {RECIPES[task].rank}" if "{rank}" in method.transport else ""
    return method.title + rank


def settings_of(task: str, method: Method, recipe: Recipe, dense_steps: int) -> dict[str, Any]:
    """What decides how gradients travel and how weights change. `dense_steps` is the method's, but
    for timing, which looks at what follows them."""
    optimizer = recipe.optimizer(method.family or recipe.family)
    if method.optimizer is not None:
        options = method.options(recipe)
        options |= {name: dense_steps for name in FREEZES if name in options}
        optimizer |= {"class": f"thinwire.{method.optimizer}", **options}
    if method.clips_locally and recipe.clip is not None:
        optimizer["clip"] = recipe.clip
    return {
        "task": task,
        "method": method.name,
        "transport": method.transport.format(rank=recipe.rank, dense_steps=dense_steps),
        "optimizer": optimizer,
        "clip": None if method.clips_locally else recipe.clip,
    }


@dataclass
class Attached:
    """A model with its way of communication and its optimiser."""

    model: DistributedDataParallel
    optimizer: torch.optim.Optimizer
    wire_bytes: Callable[[int], float]
    """Sent by this rank in its first `steps` steps, which must be all so far."""
    computed: bool
    """The bytes are a ring allreduce's, worked out; else counted by thinwire."""


def attach(settings: dict[str, Any], module: nn.Module, world: int) -> Attached:
    """Wrap the module; collective. NotAvailableError for an optimiser that thinwire lacks."""
    family, _, argument = str(settings["transport"]).partition(":")
    make_optimizer = _optimizer(dict(settings["optimizer"]))
    ddp = DistributedDataParallel(
        module,
        gradient_as_bucket_view=True,
        bucket_cap_mb=ONE_BUCKET_MB if family == "torch-powersgd" else None,
    )
    if family == "thinwire":
        import thinwire.torch as tw

        reducer = tw.compress(ddp, argument)
        optimizer = make_optimizer(module.parameters(), reducer)
        return Attached(ddp, optimizer, lambda _: float(reducer.stats()["wire_bytes"]), False)
    optimizer = make_optimizer(module.parameters(), None)
    elements = sum(parameter.numel() for parameter in module.parameters())
    ring = 2 * (world - 1) / world * TCP_BYTES_A_BYTE
    if family == "torch-powersgd":
        state = powerSGD_hook.PowerSGDState(
            None,
            matrix_approximation_rank=int(argument),
            start_powerSGD_iter=_POWERSGD_DENSE_STEPS,
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

        def low_rank_bytes(steps: int) -> float:
            dense = min(steps, _POWERSGD_DENSE_STEPS) * elements
            return ring * 4 * (dense + state.total_numel_after_compression)

        return Attached(ddp, optimizer, low_rank_bytes, True)
    width = {"ddp": 4, "torch-fp16": 2}[family]
    if family == "torch-fp16":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return Attached(ddp, optimizer, lambda steps: ring * width * elements * steps, True)


def _optimizer(arguments: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """(parameters, reducer or None) -> optimiser, from a class name and arguments."""
    name = arguments.pop("class")
    if "betas" in arguments:
        arguments["betas"] = tuple(arguments["betas"])
    if name in ("SGD", "AdamW"):
        plain = getattr(torch.optim, name)
        return lambda parameters, _: plain(parameters, **arguments)
    made = _ours(name.removeprefix("thinwire."))
    return lambda parameters, reducer: made(parameters, reducer=reducer, **arguments)


def _ours(name: str) -> Any:
    """A class of thinwire.torch.optim."""
    import thinwire.torch as tw
    from thinwire.errors import NotAvailable

    try:
        return getattr(tw.optim, name)
    except (NotAvailable, AttributeError) as error:
        raise NotAvailableError(
            f"this thinwire has no thinwire.torch.optim.{name}\n"
            "hint: another thinwire, or choose others by --method"
        ) from error


def check_available(settings: dict[str, Any]) -> None:
    """Raise what `attach` would for a missing optimiser, without a process group."""
    _optimizer(dict(settings["optimizer"]))
