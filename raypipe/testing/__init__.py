"""Check parts of your own against the contracts of raypipe, in tests of your own.

Each function raises `ContractError` with one line that names what is broken, and returns nothing
otherwise. No cluster is needed.

Examples
--------
>>> from raypipe.testing import check_score
>>> from raypipe_example.late_doubt import LateDoubt  # doctest: +SKIP
>>> check_score(LateDoubt, epochs=2)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raypipe.testing.contract import ContractError

if TYPE_CHECKING:
    from raypipe.testing.extrapolators import check_extrapolator
    from raypipe.testing.images import check_augment, check_transform
    from raypipe.testing.scores import check_score
    from raypipe.testing.sources import check_source
    from raypipe.testing.strategies import check_strategy

__all__ = [
    "ContractError",
    "check_augment",
    "check_extrapolator",
    "check_score",
    "check_source",
    "check_strategy",
    "check_transform",
]

_HOMES = {
    "check_augment": "images",
    "check_extrapolator": "extrapolators",
    "check_score": "scores",
    "check_source": "sources",
    "check_strategy": "strategies",
    "check_transform": "images",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # only what is used is imported: extrapolators need torch, which is slow to import
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"raypipe.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'raypipe.testing' has no attribute {name!r}")
