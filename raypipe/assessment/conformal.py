"""Calibrated intervals around predicted scores: split conformal prediction, by class, with widths scaled by local difficulty.

With residuals r_i and difficulties d_i of n samples the extrapolator did not see, sigma_i = 1 + d_i and q the
ceil((n + 1) * confidence)-th smallest |r_i| / sigma_i, a new sample's score lies within prediction +- q * sigma with probability
at least `confidence`, provided it is exchangeable with the n (normalised split conformal: Papadopoulos et al. 2008,
Lei et al. 2018, section 5.2). The 1 keeps intervals of samples with a scored twin from shrinking to nothing.

A class with enough residuals has a q of its own, from them alone, so that the statement holds for the class (Mondrian conformal
prediction: Vovk et al. 2005, section 4.5); the other classes share one, from the residuals of all of them.

Held-out samples of the seed set are many, but the proxy was trained on them, so they are not exchangeable with the other samples.
Audit samples are, but they are few. `stretched` uses both: the first say which samples have wide intervals, the second how wide
they must be on the whole, by a last conformal step over the ratios of their residuals to the half-widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError

MIN_SAMPLES_OF_CLASS = 30
"""Residuals from which a class has its own quantile: with fewer, chance moves its coverage as far as sharing one would."""
MIN_SAMPLES_TO_RESCALE = 100
"""Audit residuals from which they decide how wide the intervals are."""


@dataclass(frozen=True)
class Conformal:
    """Half-widths of prediction intervals.

    quantile    of |residual| / (1 + difficulty), of the classes without one of their own; None: too few residuals for this confidence
    confidence  share of samples whose score should lie in its interval
    count       residuals it was fitted on
    of_class    quantile by class, for those with at least 30 residuals
    stretch     what `stretched` multiplied all half-widths by;  stretch_count  residuals that decided it, 0 without
    """

    quantile: float | None
    confidence: float
    count: int
    of_class: Mapping[int, float] = field(default_factory=dict)
    stretch: float = 1.0
    stretch_count: int = 0

    @classmethod
    def fit(
        cls,
        residual: np.ndarray,
        difficulty: np.ndarray,
        confidence: float,
        label: np.ndarray | None = None,
    ) -> Conformal:
        """Calibrate on held-out residuals (measured - predicted), difficulties (>= 0) and, for quantiles by class, labels, all [n].

        Raises RaypipeError when lengths differ, a value is not finite or a difficulty is negative.
        """
        residual, difficulty = _checked(residual, difficulty)
        normalised = np.abs(residual) / (1 + difficulty)
        of_class: dict[int, float] = {}
        rest = np.ones(len(normalised), bool)
        if label is not None:
            for known in np.unique(label[label >= 0]).tolist():
                own = label == known
                found = (
                    _quantile(normalised[own], confidence)
                    if own.sum() >= MIN_SAMPLES_OF_CLASS
                    else None
                )
                if found is not None:
                    of_class[int(known)] = found
                    rest &= ~own
        # classes that were too few of it, or that are not here at all
        shared = _quantile(normalised[rest], confidence)
        return cls(
            shared if shared is not None else _quantile(normalised, confidence),
            confidence,
            len(residual),
            of_class,
        )

    def stretched(
        self, residual: np.ndarray, difficulty: np.ndarray, label: np.ndarray | None = None
    ) -> Conformal:
        """These intervals, made as much wider or narrower as samples outside the seed set need; all [n]. As they are for n < 100.

        Raises RaypipeError as `fit` does.
        """
        residual, difficulty = _checked(residual, difficulty)
        if len(residual) < MIN_SAMPLES_TO_RESCALE:
            return self
        if self.quantile is None:
            return Conformal.fit(residual, difficulty, self.confidence)
        width = self.half_width(difficulty, label).astype(np.float64)
        ratio = np.divide(np.abs(residual), width, out=np.full(len(width), np.inf), where=width > 0)
        found = _quantile(ratio, self.confidence)
        if found is None or not math.isfinite(
            found
        ):  # widths of nothing, from residuals of nothing
            return Conformal.fit(residual, difficulty, self.confidence)
        return replace(self, stretch=self.stretch * found, stretch_count=len(residual))

    def half_width(self, difficulty: np.ndarray, label: np.ndarray | None = None) -> np.ndarray:
        """Half the width of each interval, float32 [n], in units of the score; infinite where `quantile` is None."""
        difficulty = np.asarray(difficulty, np.float64)
        quantile = np.full(difficulty.shape, np.inf if self.quantile is None else self.quantile)
        if label is not None:
            for known, own in self.of_class.items():
                quantile[label == known] = own
        return (self.stretch * quantile * (1 + difficulty)).astype(np.float32)

    def state(self) -> dict[str, Any]:
        """Itself as JSON."""
        return {
            **vars(self),
            "of_class": {str(label): value for label, value in self.of_class.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Conformal:
        """Restore what `state` gave."""
        return cls(
            **{
                **state,
                "of_class": {int(label): value for label, value in state["of_class"].items()},
            }
        )


def _checked(residual: np.ndarray, difficulty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    residual, difficulty = np.asarray(residual, np.float64), np.asarray(difficulty, np.float64)
    if residual.ndim != 1 or residual.shape != difficulty.shape:
        raise RaypipeError(
            f"{residual.shape} residuals do not match {difficulty.shape} difficulties"
        )
    if not (
        np.isfinite(residual).all() and np.isfinite(difficulty).all() and (difficulty >= 0).all()
    ):
        raise RaypipeError("intervals need finite residuals and finite difficulties of at least 0")
    return residual, difficulty


def _quantile(values: np.ndarray, confidence: float) -> float | None:
    """The ceil((n + 1) * confidence)-th smallest of n; None where there is none."""
    rank = math.ceil(
        (len(values) + 1) * confidence - 1e-9
    )  # 1e-9: 0.9 * 10 must not become 10 by rounding
    return float(np.partition(values, rank - 1)[rank - 1]) if 0 < rank <= len(values) else None
