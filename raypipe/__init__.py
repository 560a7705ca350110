"""Select the samples of a large labelled image dataset that are worth training on.

The public API is in `__all__`. Functions mirror the commands of the command line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe._version import __version__

if TYPE_CHECKING:
    from raypipe.api import (
        attach,
        evaluate,
        export,
        extrapolate,
        inspect,
        load_scores,
        run,
        select,
    )
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
    "attach": "raypipe.api",
    "evaluate": "raypipe.api",
    "export": "raypipe.api",
    "extrapolate": "raypipe.api",
    "inspect": "raypipe.api",
    "load_scores": "raypipe.api",
    "run": "raypipe.api",
    "select": "raypipe.api",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # Importing on first use keeps `import raypipe`, and with it the command line, fast.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'raypipe' has no attribute {name!r}")
