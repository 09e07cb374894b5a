"""``compress``: attach a reducer to a DistributedDataParallel model."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from thinwire import _environment, _logging, _run_log, _trace
from thinwire.errors import InvalidArgument, NotAvailable
from thinwire.torch._group import make_private_group
from thinwire.torch._reducer import Reducer

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_YEAR_SECONDS = 365 * 24 * 3600.0


def compress(
    ddp_model: DistributedDataParallel,
    policy: str,
    *,
    deadline: float = 300.0,
    grace: float = 3.0,
    log: str | os.PathLike[str] | None = None,
    log_layers_every: int = 10,
    trace: str | os.PathLike[str] | None = None,
) -> Reducer:
    """Compress the gradients of a DDP model from its next ``backward()`` on.

    Collective: every rank of the model's process group calls it, for the same models in the same
    order. Everything else the model exchanges stays as it was. Copies of the model (deepcopy,
    pickle) are plain DDP models.

    policy: one line (``"topk:0.01,values=q8"``), TOML text, or ``"@FILE"``.
    deadline: seconds that any wait for a peer may take. grace: seconds that survivors of a failure
    give each other to report. Both above 0, at most a year.
    log: the file that the run log is appended to, for `thinwire report`; default THINWIRE_STATS,
    else none. log_layers_every: calls of ``Reducer.log`` from one line on layers to the next.
    trace: the file that says where each step's time goes, for Perfetto or chrome://tracing;
    default THINWIRE_TRACE, else none.

    Raises PolicyError, MismatchError (ranks disagree), PeerLost, NotAvailable for what this version
    does not do, InvalidArgument for a model that cannot be compressed.
    """
    _check_seconds("deadline", deadline)
    _check_seconds("grace", grace)
    _check_model(ddp_model)
    log_file = _log_file(log, log_layers_every)
    trace_file = _trace_file(trace, ddp_model)
    names, parameters = _layers(ddp_model)
    from thinwire import _torch  # type: ignore[attr-defined]

    group = make_private_group(ddp_model.process_group, deadline)
    native = _torch.GradientReducer(
        backend=group.backend,
        store=group.store,
        store_host=group.store_host,
        names=names,
        parameters=parameters,
        policy=policy,
        deadline=deadline,
        grace=grace,
        trace_file=trace_file,
        trace_process=dist.get_rank(),
        trace_model=_trace.next_model() if trace_file else 0,
    )
    try:
        handover = native.attach(ddp_model.reducer, parameters, _may_hand_over(ddp_model))
    except RuntimeError as error:
        raise InvalidArgument(_HOOK_TAKEN.format(hook="a built-in hook")) from error
    ours: Hooks = {"_forward_hooks": [], "_forward_pre_hooks": []}
    if handover is not None:
        ours["_forward_hooks"].append(_arm_after_forward(ddp_model, handover))
    run_log = _start_log(ddp_model, native, policy, log_file, log_layers_every)
    is_first = dist.get_rank(ddp_model.process_group) == 0
    reducer = Reducer(
        native,
        policy,
        list(zip(names, parameters, strict=True)),
        ddp_model.process_group,
        functools.partial(_tell_before_forward, weakref.ref(ddp_model), ours),
        run_log=run_log,
    )
    _mark(ddp_model, reducer, ours)
    if run_log is not None and is_first:
        reducer._before_forward(run_log.tick)
    reducer._tell_decisions()
    if trace_file:
        tell = functools.partial(_tell_warnings, native)
        reducer._before_forward(tell)
        weakref.finalize(ddp_model, tell)
    if is_first:
        _logging.say(reducer.summary().removeprefix("thinwire: "))
    return reducer


def _log_file(file: str | os.PathLike[str] | None, layers_every: int) -> Path | None:
    """The file of the run log, checked; the argument goes before the environment."""
    if not isinstance(layers_every, int) or layers_every < 1:
        raise InvalidArgument(
            f"compress: log_layers_every: expected a whole number above 0, got {layers_every!r}\n"
            "hint: leave it out for the default"
        )
    file = file or _environment.stats_file()
    return None if file is None else _run_log.check_file(file)


def _trace_file(file: str | os.PathLike[str] | None, model: DistributedDataParallel) -> str:
    """Empty: none. The argument goes before the environment."""
    file = file or _environment.trace_file()
    if file is None:
        return ""
    if dist.get_world_size(model.process_group) == 1:
        _logging.say(f"trace: one rank alone exchanges nothing; nothing is written to {file}")
        return ""
    return os.path.abspath(file)


def _tell_warnings(native: Any) -> None:
    for line in native.take_warnings():
        _logging.say(line, warning=True)


def _start_log(
    model: DistributedDataParallel, native: Any, policy: str, file: Path | None, layers_every: int
) -> _run_log.RunLog | None:
    """The model's run log with its first line; the last one is written when the model ends, or
    else the program."""
    ranks = dist.get_process_group_ranks(model.process_group)
    label = _run_log.model_label(ranks, dist.get_world_size())
    if file is None:
        return None
    run_log = _run_log.RunLog(file, native, dist.get_rank(), label, layers_every)
    run_log.start(len(ranks), policy, torch.__version__)
    weakref.finalize(model, run_log.end)
    return run_log


def _may_hand_over(model: DistributedDataParallel) -> bool:
    """Whether gradients may go to the reducer without DDP's copy: see gradient_handover.h."""
    in_backward = any(hasattr(p, "_in_backward_optimizers") for p in model.parameters())
    return bool(
        model.gradient_as_bucket_view
        and model.mixed_precision is None
        and not getattr(model, "batched_grad_copy", False)
        and not in_backward
    )


def _arm_after_forward(model: DistributedDataParallel, handover: Any) -> int:
    """Returns the key of the forward hook."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def arm(module: Any, _args: object, _output: object) -> None:
        # As DDP itself decides whether the coming backward reduces.
        handover.arm(torch.is_grad_enabled() and module.require_backward_grad_sync)

    return model.register_forward_hook(arm).id


Hooks = dict[str, list[int]]  # the keys of our hooks, by the module's attribute


def _tell_before_forward(
    model_ref: weakref.ref[DistributedDataParallel],
    ours: Hooks,
    callback: Callable[[], None],
) -> None:
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tell(_module: Any, _args: object) -> None:
        callback()

    model = model_ref()
    if model is not None:
        ours["_forward_pre_hooks"].append(model.register_forward_pre_hook(tell).id)


def _mark(model: DistributedDataParallel, reducer: Reducer, ours: Hooks) -> None:
    """Attributes of this instance alone; the weak reference keeps the model free of cycles."""
    model._thinwire_reducer = reducer  # type: ignore[assignment]
    model.register_comm_hook = _refuse_hook  # type: ignore[method-assign]
    model.__getstate__ = functools.partial(  # type: ignore[method-assign]
        _state_of_a_copy, weakref.ref(model), ours
    )


def _state_of_a_copy(
    model_ref: weakref.ref[DistributedDataParallel], ours: Hooks
) -> dict[str, Any]:
    """What copies and pickles of the model get: the model as if it had never been compressed."""
    model = model_ref()
    assert model is not None
    state: dict[str, Any] = type(model).__getstate__(model)
    for kind, keys in ours.items():
        hooks = state[kind].copy()
        for key in keys:
            hooks.pop(key, None)
        state[kind] = hooks
    for name in ("_thinwire_reducer", "register_comm_hook", "__getstate__"):
        del state[name]
    return state


_HOOK_TAKEN = (
    "the model already has a communication hook ({hook}), and DDP takes one only\n"
    "hint: leave out register_comm_hook(), or thinwire"
)


def _refuse_hook(state: object, hook: Any) -> None:
    raise InvalidArgument(
        f"register_comm_hook({getattr(hook, '__name__', hook)}): thinwire already compresses this "
        "model's gradients, and DDP takes one hook only\nhint: leave out register_comm_hook(), or "
        "run without thinwire"
    )


def _check_seconds(name: str, value: float) -> None:
    if not 0 < value <= _YEAR_SECONDS:
        raise InvalidArgument(
            f"compress: {name}: expected seconds above 0, at most {_YEAR_SECONDS:.0f} (a year), "
            f"got {value}\nhint: leave it out for the default"
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, DistributedDataParallel):
        kind = type(model).__name__
        if "FullySharded" in kind or "FSDP" in kind:
            raise NotAvailable(
                f"compress: {kind} is not part of this version\n"
                "hint: wrap the model in torch.nn.parallel.DistributedDataParallel"
            )
        raise InvalidArgument(
            f"compress: expected a DistributedDataParallel model, got {kind}\n"
            "hint: ddp = DistributedDataParallel(model); thinwire.torch.compress(ddp, policy)"
        )
    if not dist.is_initialized():
        raise InvalidArgument(
            "compress: torch.distributed is not initialised (any more)\n"
            "hint: call torch.distributed.init_process_group() first"
        )
    if model._use_python_reducer:
        raise NotAvailable(
            "compress: DDP's Python reducer (optimize_ddp='python_reducer') is not supported\n"
            "hint: torch._dynamo.config.optimize_ddp = True"
        )
    if getattr(model, "_thinwire_reducer", None) is not None:
        raise InvalidArgument(
            "compress: thinwire already compresses this model's gradients\n"
            "hint: call it once a model; `thinwire run` and the backend 'thinwire' do it themselves"
        )
    if model._comm_hooks:
        hook = model._comm_hooks[0][0]
        raise InvalidArgument(
            "compress: " + _HOOK_TAKEN.format(hook=getattr(hook, "__name__", hook))
        )
    sparse = [
        name or "(the model itself)"
        for name, module in model.module.named_modules()
        if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.sparse
    ]
    if sparse:
        raise NotAvailable(
            f"compress: sparse gradients of {', '.join(sparse)} are not supported\n"
            "hint: build the embedding with sparse=False"
        )


def _layers(model: DistributedDataParallel) -> tuple[list[str], list[torch.Tensor]]:
    """Names and parameters whose gradients DDP reduces; shared parameters once."""
    names, parameters = [], []
    for name, parameter in model.module.named_parameters():
        if not parameter.requires_grad or name in model.parameters_to_ignore:
            continue
        if parameter.device.type != "cpu":
            raise NotAvailable(
                f"compress: parameter {name} is on {parameter.device}; this version compresses "
                "gradients on CPUs\nhint: model.to('cpu'), or train without thinwire"
            )
        if parameter.dtype not in _DTYPES:
            raise InvalidArgument(
                f"compress: parameter {name} has dtype {parameter.dtype}; expected float32, "
                "bfloat16, float16 or float64\nhint: split complex parameters into real ones"
            )
        names.append(name)
        parameters.append(parameter)
    return names, parameters
