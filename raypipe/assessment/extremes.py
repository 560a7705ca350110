"""Weights of a sample that holds more of the extreme predictions than a random one.

A random draw holds few of the most extreme predictions, although errors are largest there. So a
second draw takes more samples from the *zone* of extreme predictions: those farther from the median
m than t,

    |p - m| > t .

m and t are the median of the random draw and the distance that a tenth of it exceeds. Both draws
together are a stratified sample: within the zone and outside it, every sample is as likely to be
drawn as any other. If n of the N samples of a stratum are drawn, each has the weight N / n, the
inverse of its inclusion probability. Weighted figures then estimate those of all samples without a
bias from the second draw (Horvitz and Thompson 1952; with normalised weights, Hajek 1971).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SHARE = 0.1
"""Share of the samples in the zone."""


@dataclass(frozen=True)
class ExtremeZone:
    """Where predictions are extreme, and how many samples there are inside and outside.

    Attributes
    ----------
    middle, distance
        m and t.
    inside, outside
        Number of samples inside and outside the zone that the random draw does not hold.
    """

    middle: float
    distance: float
    inside: int = 0
    outside: int = 0

    @classmethod
    def of(cls, predicted: np.ndarray) -> ExtremeZone:
        """Return the zone by the predictions for a random draw, float [n]; nothing is counted."""
        middle = float(np.median(predicted))
        return cls(middle, float(np.quantile(np.abs(predicted - middle), 1 - SHARE)))

    def contains(self, predicted: np.ndarray) -> np.ndarray:
        """Return whether predictions lie in the zone, bool [n]."""
        return np.abs(np.asarray(predicted, np.float64) - self.middle) > self.distance

    def count(self, predicted: np.ndarray) -> ExtremeZone:
        """Return the zone with further samples counted; the random draw does not hold them."""
        inside = int(self.contains(predicted).sum())
        return replace(
            self, inside=self.inside + inside, outside=self.outside + len(predicted) - inside
        )

    def weights(self, random: np.ndarray, extremes: int) -> np.ndarray:
        """Return the weights of both draws, float64 [n + extremes], with a mean of 1.

        Parameters
        ----------
        random
            Predictions for the random draw, float [n].
        extremes
            Number of samples in the second draw.
        """
        extreme = np.r_[self.contains(random), np.ones(extremes, bool)]
        drawn = np.array([(~extreme).sum(), extreme.sum()])
        every = np.array([self.outside, self.inside]) + drawn - np.array([0, extremes])
        weight = (every / np.maximum(drawn, 1))[extreme.astype(np.int64)]
        return weight / weight.mean()

    def as_dict(self) -> dict[str, float | int]:
        """Return the zone as JSON data."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExtremeZone:
        """Restore a zone from `as_dict`."""
        return cls(**data)
