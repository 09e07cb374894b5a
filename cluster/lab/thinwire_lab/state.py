"""What a lab must remember between commands, one small JSON file a lab.

The folder is this user's own (XDG_RUNTIME_DIR, else /tmp), and every change happens under its lock,
so two commands at once see each other's whole work or none. A state whose holder process or owner
is gone describes a dead lab.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from thinwire_lab.errors import LabError

MARK = "THINWIRE_LAB"
_SUBNETS = 512
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,40}")


@dataclass
class State:
    """holder and owner are (pid, start time): a pid alone may be reused. owner None: until `down`.

    token: unique to this lab among all that ever were; descriptors are the holder's, inodes the
    numbers of the namespaces behind them, the switch's first.
    """

    name: str
    hosts: int
    rate: str
    subnet: int
    rootless: bool
    holder: tuple[int, int]
    owner: tuple[int, int] | None
    token: str
    descriptors: list[int]
    inodes: list[int]

    @property
    def alive(self) -> bool:
        return is_running(self.holder) and (self.owner is None or is_running(self.owner))

    @property
    def mark(self) -> str:
        """What the environment of every program started in the lab contains."""
        return f"{MARK}={self.token}"

    @property
    def addresses(self) -> list[str]:
        return [host_address(self.subnet, rank) for rank in range(self.hosts)]

    @property
    def network(self) -> str:
        return f"{_prefix(self.subnet)}.0/24"

    def save(self) -> None:
        path = state_file(self.name)
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)


def _prefix(subnet: int) -> str:
    """The networks of 24 bits in 198.18.0.0/15, which RFC 2544 sets aside for benchmarks."""
    return f"198.{18 + subnet // 256}.{subnet % 256}"


def host_address(subnet: int, rank: int) -> str:
    return f"{_prefix(subnet)}.{rank + 1}"


def process_identity(pid: int) -> tuple[int, int]:
    """(pid, start time in clock ticks since boot). Raises OSError when there is no such process."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        raise ProcessLookupError(pid)
    return pid, int(fields[19])


def is_running(identity: tuple[int, int]) -> bool:
    try:
        return process_identity(identity[0]) == tuple(identity)
    except OSError:
        return False


def folder() -> Path:
    """The folder of this user's lab states, made if need be."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if not base or not os.access(base, os.W_OK):
        base = "/tmp"
    return private_folder(Path(base) / f"thinwire-lab-{os.getuid()}")


def private_folder(path: Path) -> Path:
    """Makes the folder if need be and refuses one that another user could have laid out."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077 or path.is_symlink():
        raise LabError(
            f"{path} is not a private folder of this user",
            "remove it, or point XDG_RUNTIME_DIR at a folder of your own",
        )
    return path


def state_file(name: str) -> Path:
    return folder() / f"{name}.json"


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise LabError(
            f"'{name}' cannot name a lab",
            "use up to 41 letters, digits, dots, dashes and underscores, a letter or digit first",
        )


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Holds this user's lab lock; the kernel releases it if the process dies."""
    with (folder() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def load(name: str) -> State | None:
    """The state of that name, or None; an unreadable file counts as none."""
    try:
        data = json.loads(state_file(name).read_text())
        data["holder"] = tuple(data["holder"])
        data["owner"] = tuple(data["owner"]) if data["owner"] else None
        return State(**data)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def load_all() -> list[State]:
    states = [load(path.stem) for path in sorted(folder().glob("*.json"))]
    return [state for state in states if state is not None]


def free_subnet(states: list[State]) -> int:
    """The lowest network number that none of these labs has."""
    taken = {state.subnet for state in states}
    for number in range(_SUBNETS):
        if number not in taken:
            return number
    raise LabError(
        f"all {_SUBNETS} networks of 198.18.0.0/15 belong to labs that are up",
        "thinwire lab down --name NAME ends one",
    )
