"""How often intervals hold: overall, for extreme predictions and far from the scored samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.assessment.extremes import ExtremeZone
from raypipe.assessment.intervals import Calibration, Intervals, cross_coverage

TENTH = 0.1
"""Share of the samples with extreme predictions, and of far samples."""


@dataclass(frozen=True)
class Coverage:
    """How often the score of a sample lies in its interval, calibrated without the sample.

    Attributes
    ----------
    confidence
        How often it should.
    overall, extreme, farthest
        Share of all samples, of the tenth with the most extreme predictions (the farthest from the
        median) and of the tenth farthest from the scored samples.
    n, n_extreme, n_farthest
        Number of samples, of those among them with extreme predictions, and of the farthest.
    """

    confidence: float
    overall: float
    extreme: float
    farthest: float
    n: int
    n_extreme: int
    n_farthest: int

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return dict(vars(self))


def measure_coverage(
    held_out: Calibration,
    confidence: float,
    seed: int,
    audit: Calibration | None = None,
    extremes: Calibration | None = None,
    zone: ExtremeZone | None = None,
) -> Coverage | None:
    """Return how often intervals hold that are calibrated on other samples.

    The samples are those of `audit`, or of `held_out` without one.

    Parameters
    ----------
    held_out, confidence, seed, audit
        As `cross_coverage` takes them.
    extremes, zone
        Samples drawn from the extreme predictions in addition, and where they were drawn. No
        interval is calibrated on them; all samples are then weighted.

    Returns
    -------
    Coverage or None
        None if there are too few samples for finite intervals.
    """
    inside = cross_coverage(held_out, confidence, seed, audit)
    if inside is None:
        return None
    data = held_out if audit is None else audit
    weight, middle = np.ones(len(data)), float(np.median(data.predicted))
    if extremes is not None and zone is not None:
        intervals = Intervals.fit(held_out, confidence, audit)
        width = intervals.around(extremes.predicted, extremes.doubt, extremes.label)
        inside = np.r_[inside, np.abs(extremes.residual) <= width]
        weight = zone.weights(data.predicted, len(extremes))
        data = Calibration.concat([data, extremes])
    extreme = _highest_tenth(np.abs(data.predicted - middle), weight)
    farthest = _highest_tenth(data.doubt[:, 0], weight)
    return Coverage(
        confidence,
        float(np.average(inside, weights=weight)),
        float(np.average(inside[extreme], weights=weight[extreme])),
        float(np.average(inside[farthest], weights=weight[farthest])),
        len(data),
        len(extreme),
        len(farthest),
    )


def _highest_tenth(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the rows with the highest values that have a tenth of the weight, at least one."""
    order = np.argsort(-values, kind="stable")
    above = np.cumsum(weight[order]) - weight[order] / 2
    return order[: max(1, int(np.searchsorted(above, TENTH * weight.sum(), "right")))]
