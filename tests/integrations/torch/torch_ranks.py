"""Runs a function of a test file on several ranks: processes forked from one that has torch loaded.

In a test: ``run_ranks(__file__, "job", 3)`` calls ``job(rank, size)`` in three processes with a
Gloo process group over loopback, and fails the test when one of them raises or dies. As a program
(``torch_ranks.py FILE FUNCTION RANKS SECONDS [JSON arguments]``) it is the process that forks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[3]


def environment(**more: str) -> dict[str, str]:
    """The environment of test processes: the package from its sources, Gloo on loopback."""
    path = [str(ROOT / "integrations/torch"), str(ROOT / "cluster/lab"), str(ROOT)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("THINWIRE_")}
    old = [clean["PYTHONPATH"]] if clean.get("PYTHONPATH") else []
    return clean | {
        "PYTHONPATH": os.pathsep.join(path + old),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run_ranks(
    file: str, function: str, size: int, *arguments: Any, seconds: float = 120, **env: str
) -> str:
    """Returns what the ranks printed. AssertionError with their output when one failed."""
    command = [sys.executable, __file__, file, function, str(size), str(seconds)]
    process = subprocess.run(
        [*command, json.dumps(arguments)],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds + 30,
        check=False,
    )
    assert process.returncode == 0, f"{function} on {size} ranks:\n{process.stdout}"
    return process.stdout


_ports = itertools.count(10_000 + os.getpid() * 61 % 20_000)


def free_port() -> int:
    """Another port each time, below those that the kernel hands out by itself."""
    for port in _ports:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                listener.bind(("127.0.0.1", port))
                return port
    raise AssertionError("unreachable")


def fork_ranks(function: Any, size: int, *arguments: Any, backend: str = "gloo") -> list[int]:
    """Forks ``size`` ranks that call function(rank, size, *arguments); returns their pids."""
    port = free_port()
    pids = []
    sys.stdout.flush()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            os._exit(_be_rank(function, rank, size, port, backend, arguments))
        pids.append(pid)
    return pids


def _be_rank(
    function: Any, rank: int, size: int, port: int, backend: str, arguments: tuple[Any, ...]
) -> int:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        torch.set_num_threads(1)
        torch.manual_seed(1234 + rank)
        dist.init_process_group(backend)
        function(rank, size, *arguments)
        if dist.is_initialized():
            dist.destroy_process_group()
        code = 0
    except BaseException:
        print(f"--- rank {rank} of {size}\n{traceback.format_exc()}", flush=True)
        code = 1
    sys.stdout.flush()
    return code


def wait_ranks(pids: list[int], seconds: float) -> list[int]:
    """Exit codes (negative: the signal), after killing what is still there after ``seconds``."""
    end = time.monotonic() + seconds
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                print(f"--- rank {pids.index(pid)} still ran after {seconds} s", flush=True)
                os.kill(pid, signal.SIGKILL)
                end = time.monotonic() + 5
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def _main() -> int:
    file, function, size, seconds, arguments = sys.argv[1:]
    import thinwire.torch  # noqa: F401
    import torch._dynamo  # noqa: F401  (DDP imports it; before the fork, so that it is loaded once)

    spec = importlib.util.spec_from_file_location("job", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["job"] = module
    spec.loader.exec_module(module)
    pids = fork_ranks(getattr(module, function), int(size), *json.loads(arguments))
    return max(map(abs, wait_ranks(pids, float(seconds))))


if __name__ == "__main__":
    sys.exit(_main())
