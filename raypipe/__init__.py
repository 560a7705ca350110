"""raypipe: which samples of a large labelled image dataset are worth training on?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe._version import __version__

__all__ = [
    "Config",
    "KeepList",
    "Run",
    "__version__",
    "evaluate",
    "export",
    "extrapolate",
    "inspect",
    "load_scores",
    "run",
    "select",
]

if TYPE_CHECKING:
    from raypipe.api import evaluate, export, extrapolate, inspect, load_scores, run, select
    from raypipe.config import Config
    from raypipe.keeplist import KeepList
    from raypipe.rundir import Run

_HOMES = {
    "Config": "raypipe.config",
    "KeepList": "raypipe.keeplist",
    "Run": "raypipe.rundir",
    "evaluate": "raypipe.api",
    "export": "raypipe.api",
    "inspect": "raypipe.api",
    "load_scores": "raypipe.api",
    "run": "raypipe.api",
    "select": "raypipe.api",
}


def __getattr__(name: str) -> Any:
    # Imports on first use keep `import raypipe`, and so the command line, fast.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    if name == "extrapolate":  # the package of that name can be called
        from importlib import import_module

        return import_module("raypipe.extrapolate")
    raise AttributeError(f"module 'raypipe' has no attribute {name!r}")
