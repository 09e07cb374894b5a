"""Arrows between layers point one way: compressors <- comm <- optim <- integrations."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = ("compressors", "comm", "optim", "integrations")
# What users of the library are, not parts of it: no layer may need them.
OUTSIDE = ("examples", "tests")
CXX = {".h", ".hpp", ".cc", ".cpp", ".cu", ".cuh", ".inc"}

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?P<open>["<])(?P<path>[^">]+)[">]', re.MULTILINE)
# The Python package of integrations.
IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t]+(?P<name>thinwire)\b(?!_)", re.MULTILINE)


def complaints(name: str, text: str, root: pathlib.Path = ROOT) -> list[str]:
    """What is wrong with the arrows that leave file `name` (relative to the root)."""
    path = pathlib.PurePosixPath(name)
    layer = LAYERS.index(path.parts[0])
    found = []
    if path.suffix == ".py":
        if path.parts[0] != "integrations":
            found += [f"{name}: imports {m['name']} (integrations)" for m in IMPORT.finditer(text)]
        return found
    for match in INCLUDE.finditer(text):
        target = match["path"]
        top = target.split("/")[0]
        if top in OUTSIDE or (top in LAYERS and LAYERS.index(top) > layer):
            found.append(f"{name}: includes {target}, against the layers")
        elif match["open"] == '"' and not (root / target).is_file():
            found.append(f"{name}: includes {target}, which is no path from the repository root")
    return found


def sources() -> list[pathlib.Path]:
    """Source files of the layers, build products left out."""
    return sorted(
        path
        for layer in LAYERS
        for path in (ROOT / layer).rglob("*")
        if path.suffix in CXX | {".py"} and "build" not in path.relative_to(ROOT).parts
    )


def test_every_arrow_points_down() -> None:
    files = sources()
    assert {"compressors", "comm", "optim"} <= {f.relative_to(ROOT).parts[0] for f in files}
    found = [
        line
        for file in files
        for line in complaints(file.relative_to(ROOT).as_posix(), file.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("compressors/core/bad.cc", '#include "comm/communicator.h"\n'),
        ("compressors/core/bad.cc", "#include <comm/communicator.h>\n"),
        ("compressors/core/bad.h", '#pragma once\n#  include   "optim/schedule.h"\n'),
        ("comm/bad.cc", '#include "integrations/torch/binding.h"\n'),
        ("comm/bad.cc", '#include "optim/schedules.h"\n'),
        ("optim/bad.cc", '#include "integrations/torch/binding.h"\n'),
        ("comm/bad.cc", '#include "tests/support/ranks.h"\n'),
        ("comm/bad.cc", '#include "communicator.h"\n'),
        ("optim/bad.py", "import thinwire.torch as tw\n"),
        ("comm/bad.py", "    from thinwire import codec\n"),
    ],
)
def test_a_wrong_arrow_is_caught(name: str, text: str) -> None:
    assert len(complaints(name, text)) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("comm/good.cc", '#include <vector>\n\n#include "compressors/core/codec.h"\n'),
        ("compressors/core/good.cc", '#include "compressors/core/codec.h"\n#include <xxhash.h>\n'),
        ("optim/good.cc", '#include "comm/reducer.h"\n#include "compressors/core/convert.h"\n'),
        ("integrations/torch/good.cc", '#include "comm/reducer.h"\n#include <torch/extension.h>\n'),
        ("integrations/torch/good.cc", '#include "optim/schedules.h"\n'),
        ("integrations/torch/thinwire/good.py", "import thinwire\nfrom thinwire import codec\n"),
        ("comm/good.py", "import thinwire_lab\n"),
    ],
)
def test_a_right_arrow_is_left_alone(name: str, text: str) -> None:
    assert complaints(name, text) == []
