"""A model as `thinwire plan` needs it: layers' names, shapes and dtypes, and their gradients."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from thinwire.errors import InvalidArgument

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3}  # DType of core/dtype.h
_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_KINDS = (
    "a PyTorch checkpoint (.pt, .pth, .bin), a .safetensors file, a .json of names and shapes, or "
    "package.module:function that returns a model"
)


@dataclass(frozen=True)
class ModelLayer:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: int


def read_layers(source: str) -> list[ModelLayer]:
    """The floating-point parameters, in the model's order.

    source: see _KINDS. InvalidArgument, with what to do, for what is none of these.
    """
    path = Path(source)
    try:
        if path.suffix == ".safetensors":
            layers = _from_safetensors(path)
        elif path.suffix == ".json":
            layers = _from_json(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            layers = _from_checkpoint(path)
        elif ":" in source:
            layers = _from_function(source)
        else:
            raise InvalidArgument(f"plan: {source} is no model\nhint: name {_KINDS}")
    except OSError as error:
        raise InvalidArgument(
            f"plan: cannot read {source}: {error.strerror or error}\nhint: name {_KINDS}"
        ) from error
    if not layers:
        raise InvalidArgument(f"plan: {source} has no floating-point parameters")
    return layers


def read_gradients(source: str, layers: Sequence[ModelLayer]) -> dict[str, np.ndarray]:
    """The gradients of some or all layers by name, as float32.

    source: a .safetensors file, or one that torch.save() made of {name: gradient}.
    InvalidArgument for another one, for names that the model does not have, and for other shapes.
    """
    path = Path(source)
    try:
        if path.suffix == ".safetensors":
            arrays = _arrays_of_safetensors(path)
        elif path.suffix in (".pt", ".pth", ".bin"):
            arrays = _arrays_of_checkpoint(path)
        else:
            raise InvalidArgument(
                f"plan: {source} holds no gradients\n"
                "hint: torch.save({name: p.grad for name, p in model.named_parameters()}, FILE.pt)"
            )
    except OSError as error:
        raise InvalidArgument(f"plan: cannot read {source}: {error.strerror or error}") from error
    shapes = {layer.name: layer.shape for layer in layers}
    for name, array in arrays.items():
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, 1)
            raise InvalidArgument(
                f"plan: {source} has a gradient of '{name}', which the model does not have"
                + (f"\nhint: the nearest layer is '{near[0]}'" if near else "")
            )
        if array.shape != shapes[name]:
            raise InvalidArgument(
                f"plan: {source}: the gradient of '{name}' is {list(array.shape)}, expected "
                f"{list(shapes[name])}"
            )
    if not arrays:
        raise InvalidArgument(f"plan: {source} holds no gradients")
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def _layer(name: str, shape: Any, dtype: str) -> list[ModelLayer]:
    """None for what is no gradient's type."""
    known = dtype in _DTYPES
    return [ModelLayer(name, tuple(map(int, shape)), _DTYPES[dtype])] if known else []


def _from_safetensors(path: Path) -> list[ModelLayer]:
    try:
        return [
            layer
            for name, entry in _safetensors_header(path)[0].items()
            for layer in _layer(name, entry["shape"], _SAFETENSORS.get(entry["dtype"], ""))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"plan: {path} is no safetensors file: {error!r}") from error


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries by name, and where their bytes begin. ValueError, AttributeError for no such
    file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= os.path.getsize(path) else b""
    header = json.loads(text)
    header.pop("__metadata__", None)
    return header, 8 + size


def _arrays_of_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Those of a gradient's type, as float32."""
    try:
        header, start = _safetensors_header(path)
        data = np.memmap(path, np.uint8, "r", start)
        arrays = {}
        for name, entry in header.items():
            kind = _SAFETENSORS.get(entry["dtype"], "")
            begin, end = entry["data_offsets"]
            values = data[begin:end]
            if kind == "bfloat16":
                values = (values.view("<u2").astype(np.uint32) << 16).view(np.float32)
            elif kind:
                values = values.view(np.dtype(kind).newbyteorder("<")).astype(np.float32)
            else:
                continue
            arrays[name] = values.reshape(entry["shape"])
        return arrays
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"plan: {path} is no safetensors file: {error!r}") from error


def _from_json(path: Path) -> list[ModelLayer]:
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))
        return [layer for name, shape in shapes.items() for layer in _layer(name, shape, "float32")]
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f'plan: {path}: expected {{"name": [rows, columns], ...}}: {error!r}'
        ) from error


def _load(path: Path) -> Mapping[str, Any]:
    """A state_dict, or what holds one."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise InvalidArgument(
            f"plan: {path} is no checkpoint of tensors: {error}\n"
            "hint: torch.save(model.state_dict(), FILE)"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise InvalidArgument(f"plan: {path} holds a {type(state).__name__}, expected a state_dict")
    return state


def _from_checkpoint(path: Path) -> list[ModelLayer]:
    import torch

    return [
        layer
        for name, value in _load(path).items()
        if isinstance(value, torch.Tensor)
        for layer in _layer(name, value.shape, str(value.dtype).removeprefix("torch."))
    ]


def _arrays_of_checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Those of a gradient's type, as float32."""
    import torch

    return {
        name: value.detach().to_dense().float().numpy()
        for name, value in _load(path).items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _from_function(source: str) -> list[ModelLayer]:
    module, _, function = source.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        model = getattr(importlib.import_module(module), function)()
        parameters = list(model.named_parameters())
    except Exception as error:
        raise InvalidArgument(
            f"plan: {source} gives no model: {error!r}\n"
            "hint: name a function without arguments that returns a torch.nn.Module"
        ) from error
    return [
        layer
        for name, value in parameters
        if value.requires_grad
        for layer in _layer(name, value.shape, str(value.dtype).removeprefix("torch."))
    ]
