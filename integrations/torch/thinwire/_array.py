"""Codecs on arrays: numpy arrays and CPU torch tensors to bytes and back. Needs no torch."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from thinwire.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

_NUMPY, _TORCH = 0, 1
# The numbers of compressors/core/dtype.h.
_DTYPE_NAMES = {0: "float32", 1: "bfloat16", 2: "float16", 3: "float64"}
_DTYPE_CODES = {name: code for code, name in _DTYPE_NAMES.items()}


class Codec:
    """One compression method with its parameters, immutable and thread-safe.

    The same array, ``key`` and ``step`` give the same bytes on every machine; a stochastic codec
    needs another ``step`` (or ``key``) for each call.
    """

    def __init__(self, spec: str) -> None:
        from thinwire import _codec  # type: ignore[attr-defined]

        self._parse_frame = _codec.parse_frame
        self._codec = _codec.ArrayCodec(spec)

    @property
    def spec(self) -> str:
        """The canonical one-line spec, e.g. ``"topk:0.01,values=q8"``."""
        return self._codec.spec

    def __repr__(self) -> str:
        return f"thinwire.codec({self.spec!r})"

    def encode(
        self, x: Array, residual: Array | None = None, *, key: str = "", step: int = 0
    ) -> bytes:
        """Encode an array into bytes that ``decode`` of the same codec reads.

        x: contiguous numpy array or CPU torch tensor of any shape, float32, float16, bfloat16
        (torch, or numpy with ml_dtypes) or, where the family takes it, float64; unchanged.
        residual: optional contiguous float32 array of as many elements. What is encoded is then
        ``x + residual``, and ``residual`` becomes what the bytes do not hold; ``none``, which
        holds all of ``x``, leaves it alone.
        NaN or Inf in ``x + residual``: the bytes say so and decode to NaN everywhere
        (``lossless`` and ``none`` send them as they are), ``residual`` stays; with
        ``nonfinite=error`` in the spec NonFiniteError, which names the first of them by its index
        in row-major order.
        Raises InvalidArgument for other dtypes, devices or layouts.
        """
        data, shape, dtype, kind = _describe(x, "x")
        error = 0
        if residual is not None:
            error, error_shape, error_dtype, _ = _describe(residual, "residual")
            if error_dtype != _DTYPE_CODES["float32"] or math.prod(error_shape) != math.prod(shape):
                raise InvalidArgument(
                    f"residual: expected float32 with {math.prod(shape)} elements, got "
                    f"{_DTYPE_NAMES[error_dtype]} with {math.prod(error_shape)}\n"
                    "hint: start with zeros of x's shape and pass the same array every time"
                )
            if isinstance(residual, np.ndarray) and not residual.flags.writeable:
                raise InvalidArgument("residual: the array is read-only\nhint: pass a copy")
        return self._codec.encode(data, shape, dtype, kind, error, key, step)

    def decode(
        self,
        data: bytes | bytearray | memoryview,
        *,
        key: str = "",
        step: int = 0,
        max_elements: int = 2**31,
    ) -> Array:
        """Return a new array of the encoded one's shape, dtype and kind (numpy or torch).

        Accepts any bytes: CorruptPayload when they are no sound frame or claim more than
        ``max_elements``, which bounds the memory; InvalidArgument for a frame of another codec.
        """
        data = bytes(data)
        dtype, kind, shape, spec, begin, elements = self._parse_frame(data, max_elements)
        if spec != self.spec:
            raise InvalidArgument(
                f"decode: expected bytes of {self.spec!r}, got bytes of {spec!r}\n"
                f"hint: thinwire.codec({spec!r}).decode(data)"
            )
        out = _empty(shape, dtype, kind)
        pointer = out.ctypes.data if kind == _NUMPY else out.data_ptr()
        self._codec.decode(data, begin, pointer, elements, dtype, key, step)
        return out


def codec(spec: str) -> Codec:
    """The codec of a one-line spec, e.g. ``"topk:0.001"`` or ``"q8,block=256,stochastic"``.

    PolicyError for a bad spec, with the place and the nearest valid spelling; NotAvailable for
    families that this version lacks or that only work between ranks.
    """
    return Codec(spec)


def families() -> list[str]:
    """Names of the codec families of this version."""
    from thinwire import _codec  # type: ignore[attr-defined]

    return [word for family in _codec.families() for word in family["words"]]


def _describe(array: Any, name: str) -> tuple[int, list[int], int, int]:
    """(address, shape, dtype code, kind) of an array whose memory may be read as it is."""
    if isinstance(array, np.ndarray):
        dtype, kind, contiguous = array.dtype.name, _NUMPY, array.flags.c_contiguous
        if array.dtype.byteorder == ">":
            dtype = "big-endian " + dtype
        where, address = "cpu", array.ctypes.data
    elif _is_torch_tensor(array):
        dtype, kind = str(array.dtype).removeprefix("torch."), _TORCH
        contiguous, where = array.is_contiguous(), array.device.type
        address = array.data_ptr() if where == "cpu" else 0
    else:
        raise InvalidArgument(
            f"{name}: expected a numpy array or a torch tensor, got {type(array).__name__}"
        )
    if where != "cpu":
        raise InvalidArgument(
            f"{name}: expected memory of the CPU, got {where}\nhint: pass {name}.cpu()"
        )
    if dtype not in _DTYPE_CODES:
        raise InvalidArgument(
            f"{name}: expected float32, float16, bfloat16 or float64, got {dtype}\n"
            "hint: integers, booleans and complex numbers are never compressed"
        )
    if not contiguous:
        raise InvalidArgument(
            f"{name}: expected a contiguous array, got strides {_strides(array)}\n"
            "hint: numpy.ascontiguousarray(x) or x.contiguous()"
        )
    if address % array.itemsize != 0:
        raise InvalidArgument(
            f"{name}: expected memory aligned to its values of {array.itemsize} bytes, got address "
            f"{address:#x}\nhint: pass {name}.{'copy' if kind == _NUMPY else 'clone'}()"
        )
    return address, list(array.shape), _DTYPE_CODES[dtype], kind


def _strides(array: Any) -> tuple[int, ...]:
    return tuple(array.strides if isinstance(array, np.ndarray) else array.stride())


def _is_torch_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")  # who holds a tensor has imported it
    return torch is not None and isinstance(array, torch.Tensor)


def _empty(shape: tuple[int, ...], dtype: int, kind: int) -> Any:
    name = _DTYPE_NAMES[dtype]
    if kind == _TORCH:
        try:
            import torch
        except ImportError as error:
            raise InvalidArgument(
                "decode: the bytes hold a torch tensor, and torch cannot be imported\n"
                "hint: install torch, or encode x.numpy()"
            ) from error
        return torch.empty(shape, dtype=getattr(torch, name))
    if name == "bfloat16":
        try:
            import ml_dtypes  # type: ignore[import-not-found]
        except ImportError as error:
            raise InvalidArgument(
                "decode: the bytes hold a numpy array of bfloat16, and ml_dtypes cannot be imported"
                "\nhint: pip install ml_dtypes"
            ) from error
        return np.empty(shape, dtype=ml_dtypes.bfloat16)
    return np.empty(shape, dtype=name)
