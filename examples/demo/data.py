"""The data sets that examples are trained on: texts from Debian's packages, and where prepared
arrays are kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

BIBLE_COMMAND = ["bible", "-f", "gen1:1-rev22:21"]


class DataMissingError(RuntimeError):
    """A data set cannot be made here; the message says which package brings it."""


def cache_folder() -> Path:
    """Where prepared data sets lie: $XDG_CACHE_HOME/thinwire, or ~/.cache/thinwire."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "thinwire"


def king_james_verses() -> list[str]:
    """The 31,102 verses in order, Genesis 1:1 to Revelation 22:21."""
    if shutil.which(BIBLE_COMMAND[0]) is None:
        raise DataMissingError(
            "the King James text comes with Debian's bible-kjv and bible-kjv-text: "
            "apt-get install bible-kjv bible-kjv-text"
        )
    printed = subprocess.run(BIBLE_COMMAND, check=True, capture_output=True, text=True).stdout
    return [line.split(" ", 1)[1] for line in printed.splitlines() if " " in line]


def encode_text(text: str) -> tuple[np.ndarray, int]:
    """Characters as codes 0, 1, ... in sorted order of the alphabet, and the alphabet's size."""
    alphabet = {character: code for code, character in enumerate(sorted(set(text)))}
    return np.array([alphabet[character] for character in text], dtype=np.uint8), len(alphabet)


def save_atomically(file: Path, **arrays: np.ndarray | np.generic) -> None:
    """Write an .npz so that a reader sees the whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.stem}.{os.getpid()}.npz")
    np.savez(part, **arrays)  # type: ignore[arg-type]
    part.replace(file)
