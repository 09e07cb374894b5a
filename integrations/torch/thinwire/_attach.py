"""Attaches thinwire to every DistributedDataParallel of a program that does not know of it.

``install()`` wraps ``DistributedDataParallel.__init__``: at once when torch is there already, else
right after its import. A model is then compressed when THINWIRE_POLICY is set or its process group
has the backend "thinwire". Started by ``thinwire run`` (sitecustomize) or by torch itself, which
calls ``autoload`` at the end of its import. Imports nothing heavy.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from thinwire import _environment

BACKEND = "thinwire"
DEFAULT_POLICY = "q8"
_MODULE = "torch.nn.parallel.distributed"


def install() -> None:
    """Wrap DistributedDataParallel now or when it is imported. Idempotent."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "DistributedDataParallel"):
        _wrap(module)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def autoload() -> None:
    """Entry point of the group ``torch.backends``, called at the end of ``import torch``."""
    if _environment.policy() is not None:
        install()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, by asking the others, and wraps what it defines."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> Any:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_wrap(module: ModuleType) -> None:
                execute(module)
                _wrap(module)

            spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType) -> None:
    ddp = module.DistributedDataParallel
    original = ddp.__init__
    if hasattr(original, "_thinwire"):
        return

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _compress(self)

    init._thinwire = True  # type: ignore[attr-defined]
    ddp.__init__ = init


def _compress(model: Any) -> None:
    policy = _environment.policy()
    over_backend = BACKEND in str(sys.modules["torch.distributed"].get_backend(model.process_group))
    if policy is None and not over_backend:
        return
    from thinwire import _logging
    from thinwire.torch._compress import compress

    if policy is None:
        policy = DEFAULT_POLICY
        _logging.say(f"policy {policy!r} (the default; {_environment.POLICY} is not set)")
    compress(model, policy)
