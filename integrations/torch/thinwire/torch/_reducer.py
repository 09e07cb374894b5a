"""The reducer that ``compress`` returns: a model's compressed gradients, seen from Python."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire import _logging
from thinwire._run_log import RunLog
from thinwire.errors import InvalidArgument

_VERSION = 1


class Reducer:
    """Reduces one DDP model's gradients over a private group, on a thread of its own.

    Calls may come from any thread, one at a time. ``log``, ``state_dict``, ``load_state_dict``,
    ``set_policy`` and ``set_loss_scale`` belong between steps: after ``backward()`` returned on
    every rank.
    """

    def __init__(
        self,
        native: Any,
        policy: str,
        layers: list[tuple[str, torch.Tensor]],
        group: dist.ProcessGroup | None,
        tell_before_forward: Callable[[Callable[[], None]], None],
        run_log: RunLog | None = None,
    ) -> None:
        self._native = native
        self._policy = policy
        self._layers = layers
        self._group = group
        self._before_forward = tell_before_forward  # has a callable called before each one
        self._run_log = run_log
        self._scale_told = False
        self._decisions: list[str] = []
        self._tells_decisions = False

    def __repr__(self) -> str:
        return f"<thinwire.torch.Reducer policy={self._policy!r}>"

    @property
    def policy(self) -> str:
        """The policy as given, at last to ``set_policy``."""
        return self._policy

    def stats(self) -> dict[str, Any]:
        """What was done so far on this rank.

        ``steps``, ``skipped_steps``; ``wire_bytes`` sent, headers included; ``dense_wire_bytes`` a
        ring allreduce of the same gradients as fp32 would have sent; ``ratio`` of the two and
        ``ratio_bf16``, half of it; ``memory_bytes`` of residuals and ``buffer_bytes``;
        ``encode_seconds``, ``decode_seconds``, ``wait_seconds``; ``layers``: a dict each with
        ``name``, ``elements``, ``codec``, ``reason``, ``slot_bytes``, ``ratio``,
        ``nonfinite_steps``.
        """
        return self._native.stats()

    def log(self, step: int | None = None, **metrics: Any) -> None:
        """Append the metrics of a step to the run log; does nothing where there is none.

        ``reducer.log(loss=loss.item())``. step: never less than the one before; by default this
        reducer's own count, which goes on from a state that was loaded. metrics: numbers, also as
        tensors or arrays of one value; NaN and Inf are written as null. Any rank may call it, as
        often as it likes; `thinwire report` shows the lowest one's metrics. Each so many calls
        (``compress(log_layers_every=)``) it adds every layer's residual norm, which reads all
        residuals once. InvalidArgument for what is no number, and for a step that goes back.
        """
        if self._run_log is not None:
            self._run_log.log(step, metrics)

    def summary(self) -> str:
        """One paragraph: what is compressed how, what goes dense and why, memory to be taken."""
        return self._native.summary()

    def decisions(self) -> list[str]:
        """What the policy ``auto`` has decided so far, a line each, the oldest first.

        What it goes by, tries, keeps or takes back, with the times and bytes that decided; the same
        on every rank. Empty for other policies.
        """
        self._take_decisions()
        return list(self._decisions)

    def _tell_decisions(self) -> None:
        """From the next forward pass on, where there are any."""
        if self._native.chooses() and not self._tells_decisions:
            self._tells_decisions = True
            self._before_forward(self._take_decisions)

    def _take_decisions(self) -> None:
        """Log what was decided since the last call; cheap where nothing was."""
        lines = self._native.take_decisions()
        if not lines:
            return
        self._decisions += lines
        if self._run_log is not None:
            self._run_log.plan(self._policy, lines)
        if self._place()[0] == 0:
            for line in lines:
                _logging.say(line)

    @property
    def last_step_skipped(self) -> bool:
        """The last step was rolled back: NaN or Inf somewhere, or abandoned. Same on every rank."""
        return self._native.last_step_skipped()

    def set_loss_scale(self, scale: float) -> None:
        """Say that gradients come multiplied by ``scale`` from now on; residuals are rescaled.

        With a GradScaler: ``reducer.set_loss_scale(scaler.get_scale())`` after ``scaler.update()``.
        """
        self._native.set_loss_scale(float(scale))
        self._scale_told = True

    def set_policy(self, policy: str) -> None:
        """Go on by another policy from the next ``backward()`` on: other densities each epoch, say.

        ``reducer.set_policy("topk:0.001")``. Every rank calls it at the same place with the same
        policy; a rank for which it fails must end. Nothing pending is lost: layers that get another
        codec take their residual along; those that get none add it to their next gradient.
        ``start=`` and ``warmup=`` count from the first step of all. PolicyError, with nothing
        changed, as from ``compress``, and for a change that the optimizer of
        ``thinwire.torch.optim`` at work cannot follow. Another policy on another rank is a
        MismatchError of the next ``backward()``.
        """
        self._native.set_policy(policy)
        self._policy = policy
        self._tell_decisions()
        if self._run_log is not None:
            self._run_log.plan(policy)
        if self._place()[0] == 0:
            _logging.say(self.summary().removeprefix("thinwire: "))

    def save_plan(self, file: str | os.PathLike[str]) -> None:
        """Write which layer has which codec now as a policy file: ``policy="@file"`` pins it.

        InvalidArgument when the file cannot be written. The file names this model's layers: for
        another one it is a PolicyError.
        """
        from thinwire._forecast import save_policy

        save_policy(Path(file), self.stats()["layers"])

    def state_dict(self) -> dict[str, Any]:
        """This rank's residuals (fp32 CPU tensors by key), step, loss scale and policy.

        Plain values and tensors: ``torch.save`` takes it, ``torch.load(weights_only=True)`` gives
        it back. Each rank saves its own, or all of them together: see ``gather_state_dict``.
        """
        return self._native.state()

    def gather_state_dict(self) -> dict[str, Any]:
        """The states of all ranks in one, for one file; any number of ranks can load it.

        Collective over the model's process group.
        """
        return gather_state_dicts(self._all_gather(self.state_dict()))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` of the same rank gave, bit for bit, or a gathered state.

        Where a gathered state is of another number of ranks, the pending update of each element,
        (1/P) sum of the workers' residuals + the owner's, is conserved.

        InvalidArgument for a state of another version, policy or model or, not gathered, of another
        rank or world size.
        """
        gathered = isinstance(state, dict) and "ranks" in state
        states = state["ranks"] if gathered else [state]
        self._native.restore(states)
        self._resumed(states[0]["step"])

    def _resumed(self, step: int) -> None:
        if self._run_log is not None:
            self._run_log.resume(step)

    def _layer_indices(self) -> dict[int, tuple[int, str]]:
        """Index and name of each parameter, by its id()."""
        return {id(p): (index, name) for index, (name, p) in enumerate(self._layers)}

    def _place(self) -> tuple[int, int]:
        """Rank and world size."""
        return dist.get_rank(self._group), dist.get_world_size(self._group)

    def _all_gather(self, value: Any) -> list[Any]:
        values = [None] * self._place()[1]
        dist.all_gather_object(values, value, group=self._group)
        return values

    def abandon_step(self) -> None:
        """End a step whose ``backward()`` raised before all its gradients were handed over.

        Waits for what is in flight, then rolls residuals back; counts as a skipped step. Every rank
        must call it at the same place. Does nothing when no step is open.

        DDP itself refuses another step after such an error: wrap the module anew, and give the
        residuals to the new reducer (``load_state_dict``).
        """
        self._native.abandon_step()

    def abort(self) -> None:
        """End everything in flight with an error on every rank. The job cannot go on after it."""
        self._native.abort()


def gather_state_dicts(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state from those that all ranks saved, in any order: of reducers, or of optimizers.

    Needs no process group. InvalidArgument for what is neither.
    """
    if states and all("ranks" in state for state in states):
        return {**states[0], "ranks": [rank for state in states for rank in state["ranks"]]}
    if not states or any("residuals" not in state for state in states):
        raise InvalidArgument(
            "gather_state_dicts: expected the state_dict() of every rank's reducer, or of every "
            f"rank's optimizer, got {len(states)} states of other kinds or of both\n"
            "hint: torch.load each rank's file and pass them as a list"
        )
    return {"version": _VERSION, "ranks": list(states)}
