"""What the checks of all parts share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from raypipe.assessment.rank_agreement import spearman
from raypipe.config.base import Settings
from raypipe.config.problems import problem_lines


class ContractError(AssertionError):
    """A part breaks its contract. The message names the part and what is broken."""


def require(condition: bool, part: Any, message: str) -> None:
    """Raise ContractError with the name of the part unless the condition holds."""
    if not condition:
        raise ContractError(f"{getattr(part, '__name__', part)}: {message}")


def check_declaration(part: Any, base: type, options: Mapping[str, Any]) -> Settings:
    """Check what every part declares; return its options.

    Parameters
    ----------
    part : type
    base : type
        The class that it must be derived from.
    options : Mapping
        Options by name.
    """
    derived = isinstance(part, type) and issubclass(part, base)
    require(derived, part, f"is not a class derived from {base.__name__}")
    summary = getattr(part, "summary", None)
    has_summary = isinstance(summary, str) and bool(summary.strip()) and "\n" not in summary
    require(has_summary, part, "has no summary; give it a text of one line")
    missing = sorted(getattr(part, "__abstractmethods__", ()))
    require(not missing, part, f"lacks {', '.join(missing)}")
    model = part.Options
    require(
        isinstance(model, type) and issubclass(model, Settings),
        part,
        "Options is not derived from raypipe.config.base.Settings, which refuses unknown options",
    )
    bare = [name for name, field in model.model_fields.items() if not field.description]
    require(not bare, part, f"option {', '.join(bare)} has no description")
    try:
        return model.model_validate(dict(options))
    except ValidationError as error:
        lines = "; ".join(line.strip() for line in problem_lines(error, model))
        raise ContractError(f"{part.__name__}: options: {lines}") from None


@contextlib.contextmanager
def failures(part: Any, doing: str) -> Iterator[None]:
    """Turn an error of a part into a ContractError that names what it was doing."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        name = getattr(part, "__name__", part)
        raise ContractError(f"{name}: {doing} raises {type(error).__name__}: {error}") from error


def same(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether two arrays are equal bit for bit."""
    return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=True)


def twice(part: Any, function: Callable[[], np.ndarray], what: str) -> np.ndarray:
    """Return the result of a function; check that a second call gives the same, bit for bit.

    The global random generator of NumPy has another state at the second call, and must keep it.
    """
    state = np.random.get_state()
    try:
        np.random.seed(1)
        first = np.array(function())
        np.random.seed(2)
        before = _global_state()
        second = function()
        kept = _global_state() == before
    finally:
        np.random.set_state(state)
    require(same(first, second), part, f"the same input gives other {what} at a second call")
    require(kept, part, "draws from NumPy's global random generator; use one of its own")
    return first


def _global_state() -> str:
    return repr([np.asarray(item).tobytes() for item in np.random.get_state(legacy=True)])


class Unchanged:
    """Copies of arrays, to check that a part does not change its input."""

    def __init__(self, part: Any, arrays: Mapping[str, np.ndarray]) -> None:
        self._part, self._arrays = part, dict(arrays)
        self._copies = {name: array.copy() for name, array in arrays.items()}

    def check(self) -> None:
        """Raise ContractError if an array has changed."""
        for name, array in self._arrays.items():
            unchanged = same(array, self._copies[name])
            require(unchanged, self._part, f"changes its input {name}; work on a copy")


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return Spearman's rank correlation; 0 if one of the arrays is constant."""
    return spearman(first, second) or 0.0
