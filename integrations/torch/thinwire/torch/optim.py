"""Optimizers whose gradients travel compressed: DGCSGD, OneBitAdam, ZeroOneAdam, OneBitLAMB.

Each works with the reducer of one DDP model, and is a ``torch.optim.Optimizer``: parameter groups,
learning-rate schedulers, ``state_dict``, closures, ``GradScaler``. What they exchange during
``backward()`` may be momentum instead of gradients: from then until ``step()``, ``p.grad`` is the
reduced quantity, the same on all ranks, and ``clip_grad_norm_`` clips that. (In ZeroOneAdam's local
steps it is the rank's own gradient.)

::

    reducer = tw.compress(ddp_model, "onebit")
    opt = tw.optim.OneBitAdam(ddp_model.parameters(), reducer=reducer, lr=1e-3)

A step with NaN or Inf anywhere is left out on all ranks alike. With a ``GradScaler`` call
``reducer.set_loss_scale(scaler.get_scale())`` before the first ``backward()`` and after each
``scaler.update()``. Gradients are accumulated under the model's ``no_sync()``.

Weights in bf16 or fp16 are kept in fp32 beside (the slot ``master``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from thinwire.errors import InvalidArgument, NotAvailable
from thinwire.torch._reducer import Reducer

__all__ = ["DGCSGD", "OneBitAdam", "OneBitLAMB", "ZeroOneAdam"]

_VERSION = 1
_SCALE_NOT_TOLD = (
    "{name}: a GradScaler is in use, whose scale the reducer was not told (it knows {told})\n"
    "hint: reducer.set_loss_scale(scaler.get_scale()) before the first backward() and after each "
    "scaler.update()"
)


class _Optimizer(torch.optim.Optimizer):
    """What the optimizers share: the native one does the work, on the parameters in order."""

    # GradScaler then hands over its scale and whether it found Inf, and leaves the rest to step().
    _step_supports_amp_scaling = True
    _native: Any = None

    def __init__(self, params: Any, defaults: dict[str, Any], reducer: Reducer) -> None:
        if not isinstance(reducer, Reducer):
            raise InvalidArgument(
                f"{type(self).__name__}: reducer: expected what thinwire.torch.compress() "
                f"returned, got {type(reducer).__name__}\n"
                "hint: reducer = thinwire.torch.compress(ddp_model, policy)"
            )
        super().__init__(params, defaults)
        self._reducer = reducer
        layers = reducer._layer_indices()
        self._parameters: list[torch.Tensor] = []
        self._names: list[str] = []
        members: list[tuple[int, int]] = []
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if not parameter.requires_grad:
                    continue
                layer = layers.get(id(parameter))
                if layer is None:
                    raise InvalidArgument(
                        f"{type(self).__name__}: parameter {place} of group {number}, shape "
                        f"{list(parameter.shape)} on {parameter.device}, is none of the "
                        f"{len(layers)} that the reducer knows\nhint: give the parameters of the "
                        "model that compress() was called with; call it after the last change of "
                        "the model"
                    )
                index, name = layer
                members.append((index, number))
                self._parameters.append(parameter)
                self._names.append(name)
        self._native = self._make(reducer._native, members, self._options())
        reducer._before_forward(self._publish)
        self._refresh_state()

    def _make(self, reducer: Any, members: list[tuple[int, int]], options: list[Any]) -> Any:
        raise NotImplementedError

    def _options(self) -> list[Any]:
        """Of each group, as the native optimizer takes them."""
        raise NotImplementedError

    def _publish(self) -> None:
        """Before each forward pass: what schedulers changed counts for the next reduction."""
        self._native.set_options(self._options())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._native is not None:
            raise NotAvailable(
                f"{type(self).__name__}: groups cannot be added later\n"
                "hint: make a new reducer and optimizer"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Apply what was reduced. Returns the closure's loss.

        Nothing is applied when the reducer's last step was skipped (NaN or Inf on some rank).
        InvalidArgument when nothing was reduced since the last call.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._scaled_gradients_are_finite():
            self._publish()
            self._native.step(self._parameters, self._names)
            if self._native.slots_version() != self._shown:
                self._refresh_state()
        return loss

    def _scaled_gradients_are_finite(self) -> bool:
        """With a GradScaler: undoes its scale, unless that was done; False if it found Inf."""
        scale = getattr(self, "grad_scale", None)
        found = getattr(self, "found_inf", None)
        if found is not None and not self._reducer._scale_told:
            raise InvalidArgument(_SCALE_NOT_TOLD.format(name=type(self).__name__, told="nothing"))
        if found is not None and float(found) > 0:
            return False
        if scale is not None and float(scale) != 1.0:
            told = self._reducer._native.loss_scale()
            if float(scale) != told:
                raise InvalidArgument(
                    _SCALE_NOT_TOLD.format(name=type(self).__name__, told=told)
                    + f"; gradients come multiplied by {float(scale)}"
                )
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            if any(gradient.dtype == torch.float16 for gradient in gradients):
                raise InvalidArgument(
                    f"{type(self).__name__}: a GradScaler with fp16 parameters would undo its "
                    "scale in fp16\nhint: keep parameters in fp32 and compute under torch.autocast"
                )
            torch._foreach_div_(gradients, float(scale))
        return True

    @property
    def steps(self) -> int:
        """Steps applied."""
        return self._native.steps()

    def _refresh_state(self) -> None:
        """Makes ``state`` show the native optimizer's memory."""
        self._shown = self._native.slots_version()
        self.state.clear()
        for slot, (_, values) in self._native.slots().items():
            for parameter, value in zip(self._parameters, values, strict=True):
                if value is not None:
                    self.state[parameter][slot] = _shaped(value, parameter)

    def state_dict(self) -> dict[str, Any]:
        """Everything this rank needs to go on bit for bit: moments, counters and schedules, and the
        reducer's residuals, velocities and loss scale. Each rank saves its own, or all of them
        together: see ``gather_state_dict``. Plain values and tensors."""
        packed: dict[str, Any] = super().state_dict()
        rank = self._native.state()
        shared = rank.pop("shared")
        slots = {slot for slot, (local, _) in self._native.slots().items() if not local}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for index, parameter, name in self._indexed():
            values = {slot: shared[key] for slot in slots if (key := f"{slot}/{name}") in shared}
            if values:
                state[index] = {s: _shaped(v, parameter) for s, v in values.items()}
        return {**packed, "state": state, "thinwire": _VERSION, "ranks": [rank]}

    def _indexed(self) -> list[tuple[int, torch.Tensor, str]]:
        """Each parameter with its index in a state_dict and its name."""
        names = {id(p): n for p, n in zip(self._parameters, self._names, strict=True)}
        every = [p for group in self.param_groups for p in group["params"]]
        return [(i, p, names[id(p)]) for i, p in enumerate(every) if id(p) in names]

    def _shared_entries(self, state: dict[int, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        entries = {}
        known = {index: (parameter, name) for index, parameter, name in self._indexed()}
        for index, values in state.items():
            if index not in known:
                raise InvalidArgument(
                    f"{type(self).__name__}: load_state_dict: no parameter {index} here\n"
                    "hint: load the state of the same model"
                )
            parameter, name = known[index]
            for slot, value in values.items():
                if value.shape != parameter.shape:
                    raise InvalidArgument(
                        f"{type(self).__name__}: load_state_dict: {slot} of parameter {name}: "
                        f"expected shape {list(parameter.shape)}, got {list(value.shape)}\n"
                        "hint: load the state of the same model"
                    )
                entries[f"{slot}/{name}"] = _flat(value, parameter)
        return entries

    def gather_state_dict(self) -> dict[str, Any]:
        """The state of all ranks in one, for one file; any number of ranks can load it. Collective
        over the model's process group."""
        state = self.state_dict()
        return {**state, "ranks": self._reducer._all_gather(state["ranks"][0])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` of the same rank or ``gather_state_dict`` gave.

        With as many ranks as were saved it goes on bit for bit. Another number needs the gathered
        state: the pending update, (1/P) sum of residuals, is conserved element by element.

        InvalidArgument for a state of another optimizer, version, model or, not gathered, of
        another rank or world size; then nothing has changed.
        """
        if not isinstance(state_dict, dict) or state_dict.get("thinwire") != _VERSION:
            raise InvalidArgument(
                f"{type(self).__name__}: load_state_dict: expected a state of thinwire's "
                f"optimizers, version {_VERSION}, got "
                + (
                    f"version {state_dict['thinwire']}"
                    if isinstance(state_dict, dict) and "thinwire" in state_dict
                    else "none of thinwire"
                )
                + "\nhint: pass what this class's state_dict() or gather_state_dict() returned"
            )
        saved, mine = state_dict["param_groups"], self.param_groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in mine]:
            raise InvalidArgument(
                f"{type(self).__name__}: load_state_dict: expected parameter groups of "
                f"{[len(g['params']) for g in mine]} parameters, got "
                f"{[len(g['params']) for g in saved]}\n"
                "hint: load the state of the same model, in groups made in the same way"
            )
        shared = self._shared_entries(state_dict["state"])
        ranks = [{**rank, "shared": shared} for rank in state_dict["ranks"]]
        before = [dict(group) for group in mine]
        try:  # what is pending is carried over with the saved options
            _set_options(mine, saved)
            self._publish()
            self._native.restore(ranks, *self._reducer._place())
        except BaseException:
            _set_options(mine, before)
            self._publish()
            raise
        self._reducer._resumed(ranks[0]["reducer"]["step"])
        self._refresh_state()


def _set_options(groups: list[dict[str, Any]], options: list[dict[str, Any]]) -> None:
    """Everything of parameter groups but their parameters."""
    for group, values in zip(groups, options, strict=True):
        group.update({key: value for key, value in values.items() if key != "params"})


def _shaped(values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Values in the order of the parameter's memory, as a tensor of its shape; a view."""
    return values.as_strided(parameter.shape, parameter.stride())


def _flat(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The reverse; a copy."""
    like = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False).copy_(value)
    return like.as_strided((parameter.numel(),), (1,))


def _adam_options(group: dict[str, Any]) -> tuple[float, float, float, float, float]:
    beta1, beta2 = group["betas"]
    return float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"]


def _freeze_step(name: str, value: int | None) -> int:
    if value is not None and value < 1:
        raise InvalidArgument(
            f"{name}: freeze_step: expected 1 or more, got {value}\n"
            "hint: leave it out to freeze when the variance is stable"
        )
    return value or 0


class DGCSGD(_Optimizer):
    """Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887): SGD whose momentum is
    applied before gradients are thinned, and cleared where an entry is sent.

    For top-k policies: ``"topk:0.001,values=q8,warmup=STEPS"``; the warm-up raises the sparsity
    exponentially. Layers without top-k (biases) have ordinary momentum after the reduction. With
    one rank it is ``torch.optim.SGD``.

    momentum, nesterov: of a group, and fixed once made. weight_decay: applied after aggregation,
    with a momentum of its own. clip: each rank's gradient of a top-k tensor is rescaled to an L2
    norm of at most ``clip / sqrt(P)`` before it is accumulated. clip_norm: ``"tensor"``, the
    gradient's own norm, or ``"last"``, the step before's, which saves a pass over memory.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reducer: Reducer,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        clip: float | None = None,
        clip_norm: str = "tensor",
    ) -> None:
        if clip is not None and not clip > 0:
            raise InvalidArgument(
                f"DGCSGD: clip: expected more than 0, got {clip}\nhint: leave it out for none"
            )
        if clip_norm not in ("tensor", "last"):
            raise InvalidArgument(
                f"DGCSGD: clip_norm: expected 'tensor' or 'last', got {clip_norm!r}"
            )
        self._clip = (clip or 0.0, clip_norm == "last")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, reducer)

    def _options(self) -> list[Any]:
        return [
            (float(g["lr"]), g["momentum"], g["weight_decay"], g["nesterov"])
            for g in self.param_groups
        ]

    def _make(self, reducer: Any, members: list[tuple[int, int]], options: list[Any]) -> Any:
        from thinwire import _torch  # type: ignore[attr-defined]

        return _torch.DGCSGD(reducer, members, options, *self._clip)


class _AdamLike(_Optimizer):
    def _options(self) -> list[Any]:
        return [_adam_options(group) for group in self.param_groups]


class OneBitAdam(_AdamLike):
    """1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888): AdamW on uncompressed gradients until
    the variance is stable, then compressed momentum with the variance frozen.

    Made for the policy ``"onebit"``. Layers that the policy leaves uncompressed (biases) stay with
    AdamW, and so does everything with one rank. Elements that had no gradient before the freeze
    take none after it.

    freeze_step: applied steps before the variance freezes (15 to 25 % of the run is advised); None:
    when the L1 norm of the variance has fallen to no less than freeze_ratio of what it was
    ``1 / (1 - beta2)`` steps before (beta2 of the first group), not before min_freeze_step (the
    learning rate's warm-up). Steps on one rank alone do not count. variance_floor: a frozen
    variance is at least this times the mean square of the tensor's momentum, which one bit an
    element is off by; 0 as in the paper, which diverges where variances of a tensor differ by
    orders.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reducer: Reducer,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int | None = None,
        freeze_ratio: float = 0.96,
        min_freeze_step: int = 0,
        variance_floor: float = 0.1,
    ) -> None:
        step = _freeze_step("OneBitAdam", freeze_step)
        self._freeze = (step, freeze_ratio, min_freeze_step, variance_floor)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, reducer)

    def _make(self, reducer: Any, members: list[tuple[int, int]], options: list[Any]) -> Any:
        from thinwire import _torch  # type: ignore[attr-defined]

        return _torch.OneBitAdam(reducer, members, options, *self._freeze)

    @property
    def frozen_after(self) -> int:
        """Applied steps before the variance froze; 0 while it has not."""
        return self._native.frozen_after()


class ZeroOneAdam(_AdamLike):
    """0/1 Adam (Lu et al., ICLR 2023, arXiv 2202.06009): AdamW that measures its variance ever more
    rarely, exchanges compressed momentum between, and after var_freeze_step trains on each rank
    alone for ever longer intervals that end with one compressed exchange.

    Within an interval the ranks' weights differ; after its last step they are the same bits again:
    evaluate and save models there (``synchronised``).

    kappa: variance steps before the gap between them doubles. local_step_scaler: steps after which
    the interval doubles, up to local_step_clipper steps. variance_floor as in OneBitAdam, from the
    first compressed step on.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reducer: Reducer,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        var_freeze_step: int = 100_000,
        kappa: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        variance_floor: float = 0.1,
    ) -> None:
        intervals = (local_step_scaler, local_step_clipper)
        self._schedule = (kappa, var_freeze_step, *intervals, variance_floor)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, reducer)

    def _make(self, reducer: Any, members: list[tuple[int, int]], options: list[Any]) -> Any:
        from thinwire import _torch  # type: ignore[attr-defined]

        return _torch.ZeroOneAdam(reducer, members, options, *self._schedule)

    @property
    def synchronised(self) -> bool:
        """The weights are the same on all ranks: no step since the last exchange was local."""
        return self._native.synchronised()


class OneBitLAMB(_AdamLike):
    """1-bit LAMB (Li et al., HiPC 2022, arXiv 2104.06069): LAMB on uncompressed gradients until the
    variance is stable, then compressed momentum with variance and trust coefficients frozen, and
    the coefficients corrected within bounds by a variance rebuilt from the momenta.

    freeze_step, freeze_ratio, min_freeze_step, variance_floor as in OneBitAdam. min_coeff,
    max_coeff: bounds of the trust coefficient |w| / |update|. coeff_beta: of its running mean,
    which is frozen. factor_min, factor_max: bounds of the correction, which changes by at most
    factor_threshold a step. Uncompressed layers, and everything with one rank or the policy
    ``"none"``: plain LAMB.
    """

    def __init__(
        self,
        params: Iterable[Any],
        reducer: Reducer,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int | None = None,
        freeze_ratio: float = 0.96,
        min_freeze_step: int = 0,
        variance_floor: float = 0.1,
        min_coeff: float = 0.01,
        max_coeff: float = 10.0,
        coeff_beta: float = 0.9,
        factor_min: float = 0.5,
        factor_max: float = 4.0,
        factor_threshold: float = 0.1,
    ) -> None:
        step = _freeze_step("OneBitLAMB", freeze_step)
        self._freeze = (step, freeze_ratio, min_freeze_step, variance_floor)
        self._lamb = (min_coeff, max_coeff, coeff_beta, factor_min, factor_max, factor_threshold)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, reducer)

    def _make(self, reducer: Any, members: list[tuple[int, int]], options: list[Any]) -> Any:
        from thinwire import _torch  # type: ignore[attr-defined]

        return _torch.OneBitLAMB(reducer, members, options, *self._freeze, *self._lamb)

    @property
    def frozen_after(self) -> int:
        """Applied steps before the variance froze; 0 while it has not."""
        return self._native.frozen_after()
