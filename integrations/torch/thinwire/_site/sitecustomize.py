"""First on PYTHONPATH of what ``thinwire run`` starts: attaches thinwire, then goes on.

The environment's own sitecustomize, which this one hides, runs as it would have without us.
"""

import importlib.machinery
import importlib.util
import os
import sys


def _run_hidden() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    path = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


def _attach() -> None:
    try:
        from thinwire import _attach
    except ImportError:  # another interpreter than the one thinwire is installed in
        print(
            f"thinwire: not installed for {sys.executable}; its gradients are not compressed",
            file=sys.stderr,
        )
        return
    _attach.install()


_attach()
_run_hidden()
