"""Select the samples of a large labelled image dataset that are worth training on.

The public API is in `__all__`. Functions mirror the commands of the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe._version import __version__

if TYPE_CHECKING:
    from raypipe.api.finished import evaluate, export, load_scores, select
    from raypipe.api.preview import inspect
    from raypipe.api.runs import attach, extrapolate, run
    from raypipe.config import Config
    from raypipe.keeplists.dataset import KeepList
    from raypipe.keeplists.infobatch import InfoBatch
    from raypipe.runs.run import Run


__all__ = [
    "Config",
    "InfoBatch",
    "KeepList",
    "Run",
    "__version__",
    "attach",
    "evaluate",
    "export",
    "extrapolate",
    "inspect",
    "load_scores",
    "run",
    "select",
]


_HOMES = {
    "Config": "raypipe.config",
    "InfoBatch": "raypipe.keeplists.infobatch",
    "KeepList": "raypipe.keeplists.dataset",
    "Run": "raypipe.runs.run",
    "attach": "raypipe.api.runs",
    "evaluate": "raypipe.api.finished",
    "export": "raypipe.api.finished",
    "extrapolate": "raypipe.api.runs",
    "inspect": "raypipe.api.preview",
    "load_scores": "raypipe.api.finished",
    "run": "raypipe.api.runs",
    "select": "raypipe.api.finished",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import raypipe`, and with it the command line, fast.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raypipe' has no attribute {name!r}")
