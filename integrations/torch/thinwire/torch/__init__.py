"""thinwire for PyTorch: one line after ``DistributedDataParallel(...)``.

::

    import thinwire.torch as tw

    reducer = tw.compress(ddp_model, "topk:0.01,values=q8")

Importing this module also makes the backend name ``"thinwire"`` known to ``torch.distributed``.
"""

from typing import Any

from thinwire.errors import NotAvailable
from thinwire.torch._backend import register as _autoload
from thinwire.torch._compress import compress
from thinwire.torch._reducer import Reducer

__all__ = ["Reducer", "compress"]

_autoload()


def __getattr__(name: str) -> Any:
    if name == "optim":
        raise NotAvailable(
            "thinwire.torch.optim is not part of this version\n"
            "hint: use torch.optim with thinwire.torch.compress(); error feedback is in the reducer"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
