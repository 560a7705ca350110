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

from raypipe.testing.contract import ContractError
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
