"""Runs the code blocks of our Markdown files whose info string says so: ```bash test, ```python
test, ```cpp test, ```toml test. Each runs in a folder of its own, which holds the example script,
in an environment as torchrun makes it for one process."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ.get("TW_BUILD", ROOT / "build" / "dev"))
BLOCK = re.compile(
    r"^```(?P<language>\w+) test[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    file: str
    line: int
    language: str
    code: str


def blocks_of(file: str, text: str) -> list[Block]:
    return [
        Block(file, text.count("\n", 0, match.start()) + 1, match["language"], match["code"])
        for match in BLOCK.finditer(text)
    ]


def documents() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in out.splitlines() if (ROOT / name).exists()]


BLOCKS = [b for name in documents() for b in blocks_of(name, (ROOT / name).read_text())]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """As if the package were installed and its environment active, which it need not be."""
    command = folder.with_name(folder.name + "-bin") / "thinwire"
    command.parent.mkdir(exist_ok=True)
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m thinwire.cli "$@"\n')
    command.chmod(0o755)
    programs = [str(command.parent), str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    packages = [str(ROOT / "integrations" / "torch"), str(ROOT / "cluster" / "lab")]
    packages += [path for path in [os.environ.get("PYTHONPATH")] if path]
    return {
        **os.environ,
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(packages),
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_block(language: str, code: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    match language:
        case "bash":
            return execute(["bash", "-euo", "pipefail", "-c", code], folder)
        case "python":
            # The interpreter's end may abort in a thread of Gloo's (PyTorch issue 190489).
            end = "\nimport os, sys\nsys.stdout.flush()\nos._exit(0)\n"
            return execute([sys.executable, "-c", code + end], folder)
        case "cpp":
            (folder / "block.cc").write_text(code)
            flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}"]
            link = [f"-L{BUILD}", f"-Wl,-rpath,{BUILD}", "-lthinwire", "-pthread"]
            made = execute(["c++", *flags, "block.cc", "-o", "block", *link], folder)
            return made if made.returncode else execute(["./block"], folder)
        case "toml":
            tomllib.loads(code)
            return subprocess.CompletedProcess([], 0, "", "")
    raise ValueError(f"no way to run a {language} block")


def execute(command: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("block", BLOCKS, ids=[f"{b.file}:{b.line}" for b in BLOCKS])
def test_block(block: Block, tmp_path: pathlib.Path) -> None:
    shutil.copy(ROOT / "examples" / "pytorch" / "train.py", tmp_path)
    out = run_block(block.language, block.code, tmp_path)
    assert out.returncode == 0, f"{block.file}:{block.line}\n{out.stdout}\n{out.stderr}"


def test_the_readme_has_blocks_that_run() -> None:
    assert any(block.file == "README.md" for block in BLOCKS)


def test_only_marked_blocks_are_found() -> None:
    text = "# a\n\n```bash\nfalse\n```\n\n```bash test\ntrue\n```\n```\nplain\n```\n"
    assert blocks_of("x.md", text) == [Block("x.md", 7, "bash", "true\n")]


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("bash", "false; true"),
        ("python", "raise SystemExit(3)"),
        ("cpp", "int main() { return 1; }"),
        ("cpp", "int main() { return missing(); }"),
    ],
)
def test_a_block_that_fails_is_noticed(language: str, code: str, tmp_path: pathlib.Path) -> None:
    assert run_block(language, code, tmp_path).returncode != 0
