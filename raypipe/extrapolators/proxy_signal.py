"""The best of the proxy's statistics, mapped to the scale of the score.

Loss, margin and entropy cost nothing beyond the forward pass that computes the embedding. Ranking
the remaining samples directly by them is the baseline that reviewers of score extrapolation
(arXiv 2506.09010) requested. The extrapolator takes the statistic with the highest absolute
Spearman correlation with the measured scores; the sign gives its direction.

The map to the score is centred isotonic regression (Oron & Flournoy 2017, "Centered Isotonic
Regression", section 2): the steps of isotonic regression, which is least squares among monotone
maps, joined by straight lines through their centres. A slope far below the spread of the scores is
added. It keeps the order of the statistic where the map is flat, also beyond its range in the seed
set: a proxy's losses are larger on samples it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback

TIE_BREAKING_SLOPE = 1e-2
"""Of a map, in standard deviations of the score over the whole range of the signal."""
MONOTONE_NUMBERS = ("middle", "reach", "slope", "agreement")
"""Fields of `Monotone` that are stored as one array."""


@dataclass(frozen=True)
class Monotone:
    """A monotone map from one signal to the score.

    Attributes
    ----------
    x, y
        Knots: rising values of the signal and their scores, float64 [m]. Beyond them the map is
        constant except for the slope.
    middle, reach
        Median and interquartile range of the signal in the seed set.
    slope
        Change of the score per unit of t / (1 + |t|), t = (signal - middle) / reach; negative for a
        falling map.
    agreement
        Absolute Spearman correlation of signal and score on the seed set.
    """

    x: np.ndarray
    y: np.ndarray
    middle: float
    reach: float
    slope: float
    agreement: float

    @classmethod
    def fit(cls, signal: np.ndarray, score: np.ndarray) -> Monotone | None:
        """Fit a map to the finite values of a signal, float [n], and their scores, float [n].

        Return None if signal or score is constant, or their rank correlation is 0.
        """
        finite = np.isfinite(signal)
        signal, score = signal[finite].astype(np.float64), score[finite]
        if len(score) < 2 or not np.ptp(signal) or not np.ptp(score):
            return None
        rho = float(np.corrcoef(_mean_ranks(signal), _mean_ranks(score))[0, 1])
        if not rho:
            return None
        x, y = _isotonic_steps(signal, score, rho > 0)
        low, middle, high = np.quantile(signal, [0.25, 0.5, 0.75])
        reach = float(high - low) or float(np.ptp(signal))
        slope = float(np.sign(rho) * TIE_BREAKING_SLOPE * score.std())
        return cls(x, y, float(middle), reach, slope, abs(rho))

    def __call__(self, signal: np.ndarray) -> np.ndarray:
        """Return scores, float64 [n]."""
        t = (signal.astype(np.float64) - self.middle) / self.reach
        return np.interp(signal, self.x, self.y) + self.slope * t / (1 + np.abs(t))


def _mean_ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1, those of ties their mean, float64 [n]."""
    _, place, size = np.unique(values, return_inverse=True, return_counts=True)
    return (size.cumsum() - (size - 1) / 2)[place]


def _isotonic_steps(x: np.ndarray, y: np.ndarray, rising: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of x and the height of each step of the isotonic regression of y on x."""
    # equal x get one height
    values, place, size = np.unique(x, return_inverse=True, return_counts=True)
    fitted = isotonic_regression(np.bincount(place, y) / size, weights=size, increasing=rising)
    starts = fitted.blocks[:-1]
    return np.add.reduceat(values * size, starts) / fitted.weights, fitted.x[starts]


class ProxyStatisticsMap:
    """The proxy's signals, each with its map to the score.

    The signal that ranks best is used where it is finite, elsewhere the next best, and the mean
    score where none is finite.

    Parameters
    ----------
    width
        Number of signals.
    mean
        Mean score of the fit.
    maps
        The map of each signal, by its column; a signal without rank correlation has none.
    """

    def __init__(self, width: int, mean: float, maps: dict[int, Monotone]) -> None:
        self.width, self.mean, self.maps = width, mean, maps

    @classmethod
    def fit(cls, signals: np.ndarray, score: np.ndarray) -> ProxyStatisticsMap:
        """Fit a map to each column of signals, float [n, s], and scores, float [n]."""
        fits = {column: Monotone.fit(values, score) for column, values in enumerate(signals.T)}
        maps = {column: fitted for column, fitted in fits.items() if fitted is not None}
        return cls(signals.shape[1], float(score.mean()), maps)

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        """Return scores, float64 [n].

        Raises
        ------
        RaypipeError
            The number of signals differs from that of the fit.
        """
        if signals.shape[1] != self.width:
            raise RaypipeError(
                f"{signals.shape[1]} signals for each sample, but the fit had {self.width}"
            )
        result = np.full(len(signals), self.mean)
        # the best comes last and overwrites the others
        for column in sorted(self.maps, key=lambda column: self.maps[column].agreement):
            finite = np.isfinite(signals[:, column])
            result[finite] = self.maps[column](signals[finite, column])
        return result

    def tensors(self) -> dict[str, np.ndarray]:
        """Return everything fitted."""
        result = {"about": np.array([self.width, self.mean])}
        for column, monotone in self.maps.items():
            result |= {
                f"x{column}": monotone.x,
                f"y{column}": monotone.y,
                f"numbers{column}": np.array([getattr(monotone, n) for n in MONOTONE_NUMBERS]),
            }
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str) -> ProxyStatisticsMap:
        """Restore a map from its `tensors`, whose names begin with `prefix`.

        Raises
        ------
        KeyError
            A tensor is missing.
        """
        width, mean = tensors[prefix + "about"].tolist()
        maps = {}
        for column in range(int(width)):
            names = [f"{prefix}{name}{column}" for name in ("x", "y", "numbers")]
            if any(name in tensors for name in names):
                x, y, numbers = (np.array(tensors[name]) for name in names)
                maps[column] = Monotone(x, y, *numbers.tolist())
        return cls(int(width), mean, maps)


class ProxySignal(Extrapolator):
    """The proxy statistic that ranks the scored samples best."""

    name = "proxy"
    default_neighbours = 20
    min_samples = 2

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Fit a map to each signal.

        Raises
        ------
        RaypipeError
            The samples have no signals, or a score is not finite.
        """
        score = self._check_fit(seed, score)
        if not seed.signals.shape[1]:
            raise RaypipeError(
                f"{self.name}: the samples come without the proxy's signals (loss, margin, "
                "entropy), so there is nothing to map to the score; use another extrapolate.method"
            )
        self._build_index(seed.embedding)
        self._map = ProxyStatisticsMap.fit(seed.signals, score)
        if progress is not None:
            progress(1, 1)

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        return self._map(nodes.signals).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        return tensors | {f"map.{name}": value for name, value in self._map.tensors().items()}, meta

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        try:
            self._map = ProxyStatisticsMap.from_tensors(tensors, "map.")
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from None
