"""Extrapolators: the score of samples that were not measured, predicted from those that were. Arrays in, arrays out.

A new one is a file in this package and a line in `_HOMES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from raypipe.errors import ConfigError

if TYPE_CHECKING:
    from raypipe.config import ExtrapolateSettings
    from raypipe.extrapolators.base import Extrapolator


_HOMES = {
    "gnn": ("raypipe.extrapolators.blend", "AnchorGnn"),
    "knn": ("raypipe.extrapolators.knn", "Knn"),
    "mlp": ("raypipe.extrapolators.mlp", "Mlp"),
    "trees": ("raypipe.extrapolators.trees", "Trees"),
    "proxy": ("raypipe.extrapolators.proxy_signal", "ProxySignal"),
    "gnn-published": ("raypipe.extrapolators.published.gnn", "GnnPublished"),
    "knn-published": ("raypipe.extrapolators.published.knn", "KnnPublished"),
}

METHODS = tuple(_HOMES)
"""Names `make` understands in `settings.method`."""


def make(settings: ExtrapolateSettings, num_classes: int) -> Extrapolator:
    """The extrapolator `settings.method` names, not fitted. Raises ConfigError for an unknown one."""
    if settings.method not in _HOMES:
        raise ConfigError(
            f"extrapolate.method: {settings.method!r} is not one of {', '.join(METHODS)}"
        )
    module, name = _HOMES[settings.method]
    extrapolator: Extrapolator = getattr(import_module(module), name)(settings, num_classes)
    return extrapolator
