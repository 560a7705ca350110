"""Intervals of runs of version 0.2.0 or older: split conformal prediction by class and difficulty.

Newer runs have those of `raypipe.assessment.intervals`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Conformal:
    """Half-widths of prediction intervals, stretch * quantile * (1 + difficulty).

    Attributes
    ----------
    quantile
        Quantile for classes without their own; None if there were too few residuals.
    confidence
        Share of samples whose score should lie in its interval.
    count
        Number of residuals in the fit.
    of_class
        Quantile by class, for classes with enough residuals.
    stretch
        Factor by which the residuals of an audit set changed all half-widths.
    stretch_count
        Number of these residuals; 0 without.
    """

    quantile: float | None
    confidence: float
    count: int
    of_class: Mapping[int, float] = field(default_factory=dict)
    stretch: float = 1.0
    stretch_count: int = 0

    def half_width(self, difficulty: np.ndarray, label: np.ndarray | None = None) -> np.ndarray:
        """Return half the width of each interval in units of the score, float32 [n].

        It is infinite where `quantile` is None.
        """
        difficulty = np.asarray(difficulty, np.float64)
        quantile = np.full(difficulty.shape, np.inf if self.quantile is None else self.quantile)
        if label is not None:
            for y, class_quantile in self.of_class.items():
                quantile[label == y] = class_quantile
        return (self.stretch * quantile * (1 + difficulty)).astype(np.float32)

    def around(self, predicted: np.ndarray, doubt: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Return `half_width`, from the arguments of `Intervals.around`."""
        return self.half_width(doubt[:, 0], label)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Conformal:
        """Restore intervals from the JSON data of a run."""
        return cls(
            **{
                **state,
                "of_class": {int(label): value for label, value in state["of_class"].items()},
            }
        )
