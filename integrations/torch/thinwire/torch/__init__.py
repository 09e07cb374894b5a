"""thinwire for PyTorch: one line after ``DistributedDataParallel(...)``.

::

    import thinwire.torch as tw

    reducer = tw.compress(ddp_model, "topk:0.01,values=q8")

Importing this module also makes the backend name ``"thinwire"`` known to ``torch.distributed``.
"""

from thinwire.torch import optim
from thinwire.torch._backend import register as _autoload
from thinwire.torch._compress import compress
from thinwire.torch._reducer import Reducer, gather_state_dicts

__all__ = ["Reducer", "compress", "gather_state_dicts", "optim"]

_autoload()
