"""`thinwire doctor`: what is built, found and working here, what codecs cost on it, and, of a job's
processes, what links they have.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.table import Table

from thinwire import _environment
from thinwire.errors import PeerLost
from thinwire.version import __version__

_CODECS = (
    "bf16",
    "q8",
    "q4",
    "onebit",
    "topk:0.01,values=q8",
    "topk:0.001,values=q8",
    "powersgd:1",
    "powersgd:4",
)
_PATIENCE = timedelta(seconds=60)
_GOOD, _BAD = "yes", "NO"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: str
    """What was found, or NO with the reason."""
    fix: str = ""
    matters: bool = True
    """Without it something that others use fails."""

    @property
    def good(self) -> bool:
        return not self.state.startswith(_BAD)


def _try(name: str, find: Callable[[], str], fix: str, matters: bool = True) -> Check:
    try:
        return Check(name, find())
    except Exception as error:  # a broken torch raises anything
        return Check(name, f"{_BAD}: {type(error).__name__}: {error}".splitlines()[0], fix, matters)


def _library() -> str:
    from thinwire import _codec  # type: ignore[attr-defined]

    return f"{_GOOD}, SIMD {', '.join(_codec.simd_targets())}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _backends() -> str:
    import torch.distributed as dist

    if not dist.is_available():
        raise RuntimeError("this torch is built without torch.distributed")
    names = [("gloo", dist.is_gloo_available()), ("nccl", dist.is_nccl_available())]
    names.append(("mpi", dist.is_mpi_available()))
    return ", ".join(name for name, found in names if found)


def _extension() -> str:
    import thinwire.torch  # noqa: F401

    return _GOOD


def checks() -> list[Check]:
    """In the order in which they are shown; none raises."""
    again = "pip install --force-reinstall thinwire, or `make setup build` in a clone"
    return [
        _try("C++ library", _library, again),
        _try("PyTorch", _torch, "pip install torch; codecs on arrays work without it", False),
        _try("torch.distributed", _backends, "install a torch with torch.distributed", False),
        _try("thinwire for PyTorch", _extension, again + ", with this torch installed", False),
    ]


def machine() -> str:
    """One line."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}"


def show(console: Console) -> bool:
    """Print the report; True when nothing that matters is missing."""
    console.print(f"thinwire {__version__}, Python {platform.python_version()}, {machine()}")
    policy = _environment.policy()
    console.print(f"{_environment.POLICY}: {policy or 'not set'}\n")
    found = checks()
    for check in found:
        mark = "[x]" if check.good else "[ ]"
        console.print(f"{mark} {check.name}: {check.state}", markup=False, highlight=False)
        if not check.good:
            console.print(f"      hint: {check.fix}", markup=False, highlight=False)
    if found[0].good:
        console.print()
        console.print(_speeds())
        console.print(
            "pays below: the speed of a link between two hosts at which the codec takes as long as "
            "the wire time it saves, nothing overlapped.\nnext: thinwire plan MODEL --rate 1gbit "
            "reckons with a model and its steps; torchrun --no-python ... thinwire doctor measures "
            "the links between hosts"
        )
    return all(check.good for check in found if check.matters)


def started_by_a_launcher() -> bool:
    """As one of several processes, by torchrun or what sets its variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    return "RANK" in os.environ and (not size.isdigit() or int(size) > 1)


def measure_links(console: Console) -> tuple[float, float]:
    """Measure all pairs' links and print them on rank 0; the slowest one's latency and rate.

    Collective: PeerLost where ranks do not come, or go.
    """
    import torch.distributed as dist

    from thinwire import _link

    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        links = _link.measure(lambda text: console.print(f"\n{text}"))
        if dist.get_rank() == 0:
            for line in _link.describe(links):
                console.print(line, markup=False, highlight=False)
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            f"doctor: rank {os.environ['RANK']}: not all of {os.environ['WORLD_SIZE']} ranks can "
            f"be reached: {str(error).splitlines()[0]}\nhint: start the doctor on all hosts at "
            "once, by torchrun --no-python; GLOO_SOCKET_IFNAME names the network interface"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return _link.slowest(links)


def _speeds() -> Table:
    from thinwire import _codec  # type: ignore[attr-defined]

    table = Table(box=box.SIMPLE_HEAD, title="Codecs, one core", title_justify="left")
    for name in ("codec", "encode GB/s", "decode GB/s", "pays below Gbit/s"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    elements = 1 << 20
    job = (["x"], [[1024, 1024]], [0])
    for spec, encode, decode, more in _codec.codec_speeds(list(_CODECS)):
        # Two ranks: an allreduce sends the tensor once.
        (thin,) = _codec.forecast(*job, [], [spec], 2, 1e-9, 1.0, 0.0)
        saved = 4 * elements - thin["sent_bytes"]
        work = elements * (encode + decode + more)
        table.add_row(
            spec,
            f"{4e-9 / encode:.3g}" if encode else "-",
            f"{4e-9 / decode:.3g}" if decode else "-",
            f"{8e-9 * saved / work:.3g}",
        )
    return table
