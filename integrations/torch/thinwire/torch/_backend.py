"""The backend name ``"thinwire"``: Gloo, and DDP models built over it compress their gradients."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from thinwire import _attach

NAME = _attach.BACKEND


def register() -> None:
    """Make ``init_process_group("thinwire")`` work. Idempotent."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])
    _attach.install()


def _create(options: Any, _backend_options: Any) -> Any:
    """A plain Gloo group: whatever is no DDP gradient is delegated by being Gloo's own."""
    backend = dist.ProcessGroupGloo(
        options.store, options.group_rank, options.group_size, options.timeout
    )
    backend._set_sequence_number_for_group()
    return backend
