"""Filters and orders of the page, applied to the columns of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np

from raypipe.errors import ConfigError
from raypipe.selection import ALWAYS, NEVER
from raypipe.selection.radix_select import FREE
from raypipe.view.samples import AUDIT, REST, SEED, Samples

SORTS = ("lowest", "highest", "uncertain", "labels", "source")
CHOICES = {
    "kept": ("", "kept", "pruned"),
    "drawn": ("", "seed", "audit", "rest"),
    "mark": ("", "always", "never", "none"),
    "sort": SORTS,
}
"""Values of the fields that name one; "" for any sample."""
SETS = {"seed": SEED, "audit": AUDIT, "rest": REST}
MARKS = {"always": ALWAYS, "never": NEVER, "none": FREE}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


READERS: dict[str, Callable[[str], int | float]] = {
    "label": int,
    "doubtful": int,
    "low": _finite,
    "high": _finite,
    "keep": _finite,
}
"""How fields that are numbers are read."""


@dataclass(frozen=True)
class Query:
    """Which samples to show, and in which order.

    Attributes
    ----------
    label : int or None
        Class index; -1: without a label. None: all.
    low, high : float or None
        Limits of the score, inclusive.
    keep : float or None
        A keep fraction, which `kept` needs.
    kept : str
        "kept" or "pruned" at that fraction.
    drawn : str
        "seed", "audit" or "rest".
    doubtful : int or None
        Only the first so many of the labels to check.
    mark : str
        "always", "never" or "none": the lists of this page.
    text : str
        Part of the id.
    sort : str
        One of SORTS.
    """

    label: int | None = None
    low: float | None = None
    high: float | None = None
    keep: float | None = None
    kept: str = ""
    drawn: str = ""
    doubtful: int | None = None
    mark: str = ""
    text: str = ""
    sort: str = "lowest"

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> Query:
        """Read the fields of a form. Raises ConfigError, which names a field that is wrong."""
        given = {name: value for name, value in values.items() if value != ""}
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown filter: {', '.join(sorted(unknown))}")
        parsed: dict[str, int | float | str] = {}
        for name, value in given.items():
            try:
                parsed[name] = READERS[name](value) if name in READERS else value
            except ValueError:
                raise ConfigError(f"{name}: {value[:40]!r} is not a number") from None
            if value not in CHOICES.get(name, (value,)):
                raise ConfigError(f"{name}: {value[:40]!r} is not one of {CHOICES[name]}")
        query = cls(**parsed)  # type: ignore[arg-type]
        if query.keep is not None and not 0 < query.keep <= 1:
            raise ConfigError("keep fraction: must be above 0 and at most 1")
        if query.kept and query.keep is None:
            raise ConfigError("kept or pruned: give the keep fraction")
        return query

    def rows(self, samples: Samples, marks: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
        """Return the rows that match, in order, int32.

        Parameters
        ----------
        samples : Samples
            The run.
        marks : numpy.ndarray
            FREE, ALWAYS or NEVER, uint8 [n].
        kept : numpy.ndarray or None
            Samples that the list of `keep` holds, bool [n].
        """
        matching = np.ones(len(samples), bool)
        if self.label is not None:
            matching &= samples.label == self.label
        if self.low is not None:
            matching &= samples.score >= np.float32(self.low)
        if self.high is not None:
            matching &= samples.score <= np.float32(self.high)
        if self.kept and kept is not None:
            matching &= kept == (self.kept == "kept")
        if self.drawn:
            matching &= samples.drawn == SETS[self.drawn]
        if self.doubtful is not None:
            matching &= (samples.doubt_rank > 0) & (samples.doubt_rank <= self.doubtful)
        if self.mark:
            matching &= marks == MARKS[self.mark]
        if self.text:
            matching &= samples.ids.containing(self.text)
        order = samples.order(self.sort)
        return order[matching[order]]
