"""`thinwire plan`: what policies would make of a model's steps on a network, without training."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from thinwire import _codec  # type: ignore[attr-defined]
from thinwire._model_file import ModelLayer
from thinwire.errors import InvalidArgument

BACKWARD_SHARE = 2 / 3
"""Of a step: a backward pass takes twice as long as the forward one."""
_MOST_ROWS = 40
_MATTERS = 0.02
"""Of a step: less is no gain that anybody would see."""
_RATE = re.compile(r"(\d+(?:\.\d*)?)\s*([kmg]?)bit", re.IGNORECASE)
_TIME = re.compile(r"(\d+(?:\.\d*)?)\s*(us|ms|s)", re.IGNORECASE)


def parse_rate(text: str) -> float:
    """Bytes a second: "1gbit", "100mbit"."""
    match = _RATE.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise InvalidArgument(f"--rate {text}: expected a speed\nhint: 1gbit, 100mbit, 25gbit")
    return float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()] / 8


def parse_time(option: str, text: str) -> float:
    """Seconds: "25us", "60ms", "1.5s"."""
    match = _TIME.fullmatch(text.strip())
    if not match or float(match[1]) <= 0:
        raise InvalidArgument(f"{option} {text}: expected a time\nhint: 25us, 60ms, 1.5s")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2].lower()]


@dataclass(frozen=True)
class Situation:
    """Where the job would run."""

    ranks: int
    rate: float
    """Bytes a second."""
    latency: float
    """Seconds."""
    step: float
    """Seconds of a step that communicates nothing."""

    def text(self) -> str:
        return (
            f"{self.ranks} ranks, {8e-9 * self.rate:.4g} Gbit/s, {1e6 * self.latency:.4g} us, "
            f"steps of {1e3 * self.step:g} ms without communication"
        )


def forecast(
    layers: Sequence[ModelLayer],
    policies: Sequence[str],
    where: Situation,
    gradients: Mapping[str, np.ndarray] | None = None,
) -> list[dict[str, Any]]:
    """One dict a policy: ``policy``, ``step_seconds``, ``exposed_seconds``, ``work_seconds``,
    ``sent_bytes``, ``layers``. PolicyError as from compress().

    gradients: by layer, as float32; what is not there is taken for a usual gradient.
    """
    known = gradients or {}
    none = np.empty(0, np.float32)
    found = _codec.forecast(
        [layer.name for layer in layers],
        [list(layer.shape) for layer in layers],
        [layer.dtype for layer in layers],
        [known.get(layer.name, none).reshape(-1) for layer in layers],
        list(policies),
        where.ranks,
        where.latency,
        where.rate,
        BACKWARD_SHARE * where.step,
    )
    return [
        {"policy": policy, "step_seconds": where.step + one["exposed_seconds"], **one}
        for policy, one in zip(policies, found, strict=True)
    ]


def verdict(forecasts: Sequence[Mapping[str, Any]], where: Situation) -> str:
    """The sentence below the table; the first forecast is the one without compression."""
    plain = forecasts[0]["step_seconds"]
    best = min(forecasts, key=lambda one: one["step_seconds"])
    if plain - where.step < _MATTERS * where.step:
        return (
            f"compression will not help here: uncompressed gradients add "
            f"{1e3 * (plain - where.step):.2g} ms to a step of {1e3 * where.step:g} ms"
        )
    if plain - best["step_seconds"] < _MATTERS * plain:
        return (
            f"compression will not help here: what it saves on the wire its work takes "
            f"({1e3 * best['work_seconds']:.3g} ms a step for {best['policy']})"
        )
    return (
        f"{best['policy']}: {1e3 * best['step_seconds']:.4g} ms a step instead of "
        f"{1e3 * plain:.4g}, {plain / best['step_seconds']:.2g} times as fast"
    )


def save_policy(file: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    """Write a plan as a policy file that pins each layer's codec.

    layers: dicts with ``name`` and ``codec``. InvalidArgument when the file cannot be written.
    """
    lines = ['policy = "none"']
    for layer in layers:
        if not layer["codec"].startswith("none"):
            lines += ["", "[[rule]]", f"name = {json.dumps(layer['name'])}"]
            lines += [f"policy = {json.dumps(layer['codec'])}"]
    try:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgument(f"cannot write {file}: {error.strerror}") from error


def show(forecasts: Sequence[Mapping[str, Any]], where: Situation, console: Console) -> None:
    """The tables: a row a policy, then the layers of the last one."""
    table = Table(box=box.SIMPLE_HEAD, title=where.text(), title_justify="left")
    for name in ("policy", "ms a step", "÷ without communication", "MB a rank", "ms of work"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for one in forecasts:
        table.add_row(
            one["policy"],
            f"{1e3 * one['step_seconds']:.4g}",
            f"{one['step_seconds'] / where.step:.2f}",
            f"{1e-6 * one['sent_bytes']:.3g}",
            f"{1e3 * one['work_seconds']:.3g}",
        )
    console.print(table)
    chosen = forecasts[-1]
    largest = sorted(chosen["layers"], key=lambda layer: -layer["elements"])[:_MOST_ROWS]
    layers = Table(
        box=box.SIMPLE_HEAD,
        title=f"{chosen['policy']}, the {len(largest)} largest of {len(chosen['layers'])} layers",
        title_justify="left",
    )
    for name in ("layer", "elements", "codec", "ms", "kB a rank", "why"):
        layers.add_column(
            name,
            overflow="fold",
            justify="right" if name in ("elements", "ms", "kB a rank") else "left",
        )
    for layer in largest:
        layers.add_row(
            layer["name"],
            str(layer["elements"]),
            layer["codec"],
            f"{1e3 * layer['seconds']:.3g}",
            f"{1e-3 * layer['sent_bytes']:.4g}",
            layer["reason"],
        )
    console.print(layers)
