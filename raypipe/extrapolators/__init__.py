"""Extrapolators predict the scores of samples that were not measured from those that were.

They take and return arrays. To add one to raypipe, write a module in this package and add a line to
`_CLASSES`. A package can add its own: a subclass of `Extrapolator` that it declares as an entry
point of the group `raypipe.extrapolators`, or that `extrapolate.method` names as `module:Class`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from raypipe.errors import ConfigError
from raypipe.plugins import EXTRAPOLATOR, find, named_failures

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
"""Extrapolators of raypipe."""
CALLED = ("fit", "predict_with_doubt", "predict", "doubt", "difficulty", "state", "load_state")
"""Methods that a run calls."""
RETURNED = {
    "predict": ("predict",),
    "difficulty": ("difficulty",),
    "doubt": ("doubt",),
    "predict_with_doubt": ("predict", "doubt"),
}
"""What those of them return that have a result for each sample."""


def make(settings: ExtrapolateSettings, num_classes: int) -> Extrapolator:
    """Return the extrapolator that `settings.method` names, not fitted.

    Raises
    ------
    ConfigError
        The method is unknown, or one from outside raypipe cannot be imported, or must not be.
    """
    if settings.method not in _CLASSES:
        return _outside(settings, num_classes)
    module, name = _CLASSES[settings.method]
    extrapolator: Extrapolator = getattr(import_module(module), name)(settings, num_classes)
    return extrapolator


def _outside(settings: ExtrapolateSettings, num_classes: int) -> Extrapolator:
    from raypipe.extrapolators.base import Extrapolator

    kind = find(EXTRAPOLATOR, settings.method, Extrapolator)
    if kind.transductive:
        raise ConfigError(
            f"extrapolate.method: {settings.method!r} is transductive; only raypipe's own "
            "extrapolators can fit all samples together"
        )
    kind.name = settings.method  # by which a fitted extrapolator knows its own state
    with named_failures(EXTRAPOLATOR, settings.method):
        extrapolator = kind(settings, num_classes)
    for method in CALLED:
        named = _with_named_failures(settings.method, getattr(extrapolator, method))
        setattr(extrapolator, method, named)
    return extrapolator


def _with_named_failures(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of an extrapolator from outside whose errors name the extrapolator.

    What it returns for each sample is checked.
    """

    @functools.wraps(method)
    def call(*args: Any, **options: Any) -> Any:
        with named_failures(EXTRAPOLATOR, name):
            result = method(*args, **options)
            if method.__name__ in RETURNED:
                samples, columns = len(args[0]), RETURNED[method.__name__]
                parts = result if len(columns) > 1 else (result,)
                for what, values in zip(columns, parts, strict=True):
                    _check_values(what, values, samples)
            return result

    return call


def _check_values(what: str, values: Any, samples: int) -> None:
    """Raise ValueError unless values are a finite number, or a row of them, for each sample."""
    from raypipe.extrapolators.base import DOUBTS

    shape = (samples, len(DOUBTS)) if what == "doubt" else (samples,)
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f" or values.shape != shape:
        kind = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(
            f"{what} returned {kind} of shape {list(np.shape(values))}; expected float32 of shape "
            f"{list(shape)}"
        )
    if bad := int((~np.isfinite(values)).sum()):
        raise ValueError(f"{what}: {bad} of {values.size} values are not finite")
