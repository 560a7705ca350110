"""Calibrated intervals around predicted scores: split conformal prediction with widths scaled by local difficulty.

With residuals r_i and difficulties d_i of n samples the extrapolator did not see, sigma_i = 1 + d_i and q the
ceil((n + 1) * confidence)-th smallest |r_i| / sigma_i, a new sample's score lies within prediction +- q * sigma with probability
at least `confidence`, provided it is exchangeable with the n (normalised split conformal: Papadopoulos et al. 2008,
Lei et al. 2018, section 5.2). The 1 keeps intervals of samples with a scored twin from shrinking to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError


@dataclass(frozen=True)
class Conformal:
    """Half-widths of prediction intervals.

    quantile    of |residual| / (1 + difficulty); None when there were too few residuals for this confidence
    confidence  share of samples whose score should lie in its interval
    count       residuals it was fitted on
    """

    quantile: float | None
    confidence: float
    count: int

    @classmethod
    def fit(cls, residual: np.ndarray, difficulty: np.ndarray, confidence: float) -> Conformal:
        """Calibrate on held-out residuals (measured - predicted), float [n], and difficulties (>= 0), float [n].

        Raises RaypipeError when lengths differ, a value is not finite or a difficulty is negative.
        """
        residual, difficulty = np.asarray(residual, np.float64), np.asarray(difficulty, np.float64)
        if residual.ndim != 1 or residual.shape != difficulty.shape:
            raise RaypipeError(f"{residual.shape} residuals do not match {difficulty.shape} difficulties")
        if not (np.isfinite(residual).all() and np.isfinite(difficulty).all() and (difficulty >= 0).all()):
            raise RaypipeError("intervals need finite residuals and finite difficulties of at least 0")
        rank = math.ceil((len(residual) + 1) * confidence - 1e-9)  # 1e-9: 0.9 * 10 must not become 10 by rounding
        if not 0 < rank <= len(residual):
            return cls(None, confidence, len(residual))
        normalised = np.sort(np.abs(residual) / (1 + difficulty))
        return cls(float(normalised[rank - 1]), confidence, len(residual))

    def half_width(self, difficulty: np.ndarray) -> np.ndarray:
        """Half the width of each interval, float32 [n], in units of the score; infinite where `quantile` is None."""
        difficulty = np.asarray(difficulty, np.float64)
        if self.quantile is None:
            return np.full(difficulty.shape, np.inf, np.float32)
        return (self.quantile * (1 + difficulty)).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Itself as JSON."""
        return {"quantile": self.quantile, "confidence": self.confidence, "count": self.count}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Conformal:
        """Restore what `state` gave."""
        return cls(state["quantile"], state["confidence"], state["count"])
