"""Extrapolators predict the scores of samples that were not measured from those that were.

They take and return arrays. To add one, write a module in this package and add a line to
`_CLASSES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from raypipe.errors import ConfigError

if TYPE_CHECKING:
    from raypipe.config import ExtrapolateSettings
    from raypipe.extrapolators.base import Extrapolator


_CLASSES = {
    "gnn": ("raypipe.extrapolators.blend", "AnchorGnn"),
    "knn": ("raypipe.extrapolators.knn", "Knn"),
    "mlp": ("raypipe.extrapolators.mlp", "Mlp"),
    "trees": ("raypipe.extrapolators.trees", "Trees"),
    "proxy": ("raypipe.extrapolators.proxy_signal", "ProxySignal"),
    "gnn-published": ("raypipe.extrapolators.published.gnn", "GnnPublished"),
    "knn-published": ("raypipe.extrapolators.published.knn", "KnnPublished"),
}

METHODS = tuple(_CLASSES)
"""Valid values of `settings.method`."""


def make(settings: ExtrapolateSettings, num_classes: int) -> Extrapolator:
    """Return the extrapolator that `settings.method` names, not fitted.

    Raises
    ------
    ConfigError
        The method is unknown.
    """
    if settings.method not in _CLASSES:
        raise ConfigError(
            f"extrapolate.method: {settings.method!r} is not one of {', '.join(METHODS)}"
        )
    module, name = _CLASSES[settings.method]
    extrapolator: Extrapolator = getattr(import_module(module), name)(settings, num_classes)
    return extrapolator
