"""Extrapolators: the score of samples that were not measured, predicted from those that were. Arrays in, arrays out.

A new one is a file in this package and a line in `_HOMES`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from raypipe.errors import ConfigError

if TYPE_CHECKING:
    from raypipe.config import ExtrapolateSettings
    from raypipe.extrapolate.base import Extrapolator

_HOMES = {
    "gnn": ("raypipe.extrapolate.gnn", "AnchorGnn"),
    "knn": ("raypipe.extrapolate.knn", "Knn"),
    "mlp": ("raypipe.extrapolate.mlp", "Mlp"),
    "trees": ("raypipe.extrapolate.trees", "Trees"),
    "proxy": ("raypipe.extrapolate.proxy", "Proxy"),
    "gnn-published": ("raypipe.extrapolate.gnn_published", "GnnPublished"),
    "knn-published": ("raypipe.extrapolate.knn_published", "KnnPublished"),
}

METHODS = tuple(_HOMES)
"""Names `make` understands in `settings.method`."""


def make(settings: ExtrapolateSettings, num_classes: int) -> Extrapolator:
    """The extrapolator `settings.method` names, not fitted. Raises ConfigError for an unknown one."""
    if settings.method not in _HOMES:
        raise ConfigError(f"extrapolate.method: {settings.method!r} is not one of {', '.join(METHODS)}")
    module, name = _HOMES[settings.method]
    extrapolator: Extrapolator = getattr(import_module(module), name)(settings, num_classes)
    return extrapolator


class _Package(ModuleType):
    """This package, which is the verb `raypipe.extrapolate(...)` as well.

    Python binds a package to its name in the parent as soon as anything imports it, so a function of that name in `raypipe` would
    be there or not depending on what was imported before. A module whose class can be called is both, always (see "Customizing
    module attribute access" in the Python reference). Nothing in this package calls upward: a caller of the verb does.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """See `raypipe.api.extrapolate`."""
        return import_module("raypipe.api").extrapolate(*arguments, **options)


sys.modules[__name__].__class__ = _Package
