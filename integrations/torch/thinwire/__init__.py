"""thinwire makes gradients thin before they meet the wire.

``thinwire.codec(spec)`` compresses arrays; ``thinwire.torch.compress(ddp_model, policy)`` a
training job; ``thinwire run --policy P -- COMMAND`` an unchanged script. Importing this package
imports no torch.
"""

from thinwire._array import Codec, codec, families
from thinwire.errors import (
    CorruptPayload,
    Error,
    InvalidArgument,
    MismatchError,
    NonFiniteError,
    NotAvailable,
    PeerLost,
    PolicyError,
    TransportError,
)
from thinwire.version import __version__

__all__ = [
    "Codec",
    "CorruptPayload",
    "Error",
    "InvalidArgument",
    "MismatchError",
    "NonFiniteError",
    "NotAvailable",
    "PeerLost",
    "PolicyError",
    "TransportError",
    "__version__",
    "codec",
    "families",
]
