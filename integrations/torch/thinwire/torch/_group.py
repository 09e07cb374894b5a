"""The private process group of a reducer, made over the same ranks as the model's own.

A group of its own, since sharing the user's would let collectives interleave differently on
different ranks. For Gloo it is built from the store directly: unlike ``dist.new_group`` that asks
nothing of ranks outside the group and leaves no trace in torch's tables.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from thinwire import _environment
from thinwire.errors import NotAvailable, PeerLost

# Gloo's own time limit ends later than the reducer's deadline, whose message says more.
_SLACK_SECONDS = 5.0


@dataclasses.dataclass
class Group:
    """backend: a c10d Backend for CPU tensors; store: keys of this group only, over a connection of
    its own; store_host: the group rank that serves the store, -1 when none does."""

    backend: Any
    store: Any
    store_host: int


def make_private_group(group: dist.ProcessGroup, deadline_seconds: float) -> Group:
    """Make the private group. Collective over ``group``; PeerLost names ranks that did not come."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    users_backend = _cpu_backend(group)
    if users_backend.name() == "mpi":  # its groups have no store, and none can be made by a part
        raise NotAvailable(
            "PyTorch's MPI backend is not supported\nhint: init_process_group('gloo')"
        )
    store_host = _store_host(group)
    store = c10d._get_process_group_store(group)
    timeout = timedelta(seconds=deadline_seconds + _SLACK_SECONDS)
    try:
        # Every rank's n-th private group over these ranks gets the same n. Asked over the open
        # connection: it fails at once where clone() would try to reach a dead host for minutes.
        n = store.add(f"thinwire/groups/{rank}", 1)
        if hasattr(store, "clone"):
            store = store.clone()
        store = c10d.PrefixStore(f"thinwire/{n}", store)
        store.set(f"joined/{rank}", "1")
        if isinstance(users_backend, dist.ProcessGroupGloo) or users_backend.name() == "gloo":
            backend = dist.ProcessGroupGloo(c10d.PrefixStore("gloo", store), rank, size, timeout)
        else:
            backend = _delegate(group, users_backend.name(), timeout)
    except RuntimeError as error:
        raise PeerLost(
            f"rank {rank}: thinwire's group of {size} did not come together within "
            f"{timeout.total_seconds():.0f} s; {_missing(store, size, store_host)} ({error})\n"
            "hint: call thinwire.torch.compress() on every rank, for the same models in the same "
            "order"
        ) from error
    return Group(backend, store, store_host)


def _cpu_backend(group: dist.ProcessGroup) -> Any:
    try:
        return group._get_backend(torch.device("cpu"))
    except RuntimeError as error:
        raise NotAvailable(
            "the model's process group has no backend for CPU tensors\n"
            "hint: init_process_group('gloo'); this version compresses gradients on CPUs"
        ) from error


def _delegate(group: dist.ProcessGroup, name: str, timeout: timedelta) -> Any:
    """A group of another backend than Gloo (UCC, a plug-in), for CPU tensors."""
    ranks = dist.get_process_group_ranks(group)
    private = dist.new_group(
        ranks, timeout=timeout, backend=name, use_local_synchronization=len(ranks) > 1
    )
    return private._get_backend(torch.device("cpu"))


def _missing(store: Any, size: int, store_host: int) -> str:
    """The ranks that did not join; the store's host, when the store does not answer either."""
    try:
        missing = [r for r in range(size) if not store.check([f"joined/{r}"])]
    except RuntimeError:
        if store_host < 0:
            return "the rendezvous store does not answer"
        return f"missing ranks: [{store_host}], whose store does not answer"
    return f"missing ranks: {missing or 'none'}"


def _store_host(group: dist.ProcessGroup) -> int:
    if _environment.agent_serves_store():
        return -1
    ranks = dist.get_process_group_ranks(group)
    return ranks.index(0) if 0 in ranks else -1
