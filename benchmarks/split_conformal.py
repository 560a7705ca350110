"""The intervals of version 0.2.0, which newer ones are compared with.

They are split conformal prediction by class and difficulty.

Take n samples that the extrapolator did not see, with residuals r_i and difficulties d_i. Let
sigma_i = 1 + d_i, and q the ceil((n + 1) * confidence)-th smallest |r_i| / sigma_i. The score of a
new sample then lies within prediction +- q * sigma with probability at least `confidence`, provided
it is exchangeable with the n (normalised split conformal: Papadopoulos et al. 2008, Lei et al.
2018, section 5.2). The 1 in sigma keeps the interval of a sample with a scored twin from shrinking
to nothing.

A class with enough residuals has its own q, from them alone, so that the guarantee holds for the
class (Mondrian conformal prediction: Vovk et al. 2005, section 4.5). The other classes share one q,
from the residuals of all of them.

There are many held-out samples of the seed set, but the proxy was trained on them, so they are not
exchangeable with the other samples. Audit samples are, but there are few of them. `stretched` uses
both: the held-out samples decide which samples have wide intervals, the audit samples how wide
intervals must be overall, by a last conformal step over the ratios of their residuals to the
half-widths.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from raypipe.assessment.conformal import Conformal
from raypipe.errors import RaypipeError

MIN_SAMPLES_OF_CLASS = 30
"""A class with at least this many residuals has its own quantile. With fewer, chance would change
its coverage as much as sharing a quantile does."""
MIN_SAMPLES_TO_RESCALE = 100
"""With at least this many audit residuals, these decide how wide the intervals are."""


def fit(
    residual: np.ndarray,
    difficulty: np.ndarray,
    confidence: float,
    label: np.ndarray | None = None,
) -> Conformal:
    """Calibrate on samples that were held out of the fit.

    Parameters
    ----------
    residual
        Measured minus predicted scores, [n].
    difficulty
        Difficulties, [n], at least 0.
    confidence
        Share of samples whose score should lie in its interval.
    label
        Classes, [n], for quantiles by class.

    Raises
    ------
    RaypipeError
        Lengths differ, a value is not finite or a difficulty is negative.
    """
    residual, difficulty = _checked(residual, difficulty)
    normalised = np.abs(residual) / (1 + difficulty)
    of_class: dict[int, float] = {}
    rest = np.ones(len(normalised), bool)
    if label is not None:
        for y in np.unique(label[label >= 0]).tolist():
            in_class = label == y
            if in_class.sum() < MIN_SAMPLES_OF_CLASS:
                continue
            quantile = _quantile(normalised[in_class], confidence)
            if quantile is not None:
                of_class[int(y)] = quantile
                rest &= ~in_class
    # for classes with too few residuals, and for classes without any
    shared = _quantile(normalised[rest], confidence)
    return Conformal(
        shared if shared is not None else _quantile(normalised, confidence),
        confidence,
        len(residual),
        of_class,
    )


def stretched(
    intervals: Conformal,
    residual: np.ndarray,
    difficulty: np.ndarray,
    label: np.ndarray | None = None,
) -> Conformal:
    """Return intervals, rescaled to fit samples outside the seed set.

    With fewer than 100 samples they are returned unchanged. Parameters and errors are as in `fit`.
    """
    residual, difficulty = _checked(residual, difficulty)
    if len(residual) < MIN_SAMPLES_TO_RESCALE:
        return intervals
    if intervals.quantile is None:
        return fit(residual, difficulty, intervals.confidence)
    width = intervals.half_width(difficulty, label).astype(np.float64)
    ratio = np.divide(np.abs(residual), width, out=np.full(len(width), np.inf), where=width > 0)
    factor = _quantile(ratio, intervals.confidence)
    # an infinite factor comes from half-widths of 0, which come from residuals of 0
    if factor is None or not math.isfinite(factor):
        return fit(residual, difficulty, intervals.confidence)
    return replace(intervals, stretch=intervals.stretch * factor, stretch_count=len(residual))


def _checked(residual: np.ndarray, difficulty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as float64, or raise RaypipeError."""
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
    """Return the ceil((n + 1) * confidence)-th smallest of n values; None if n is too small."""
    # 1e-9: rounding must not turn 0.9 * 10 into rank 10
    rank = math.ceil((len(values) + 1) * confidence - 1e-9)
    return float(np.partition(values, rank - 1)[rank - 1]) if 0 < rank <= len(values) else None
