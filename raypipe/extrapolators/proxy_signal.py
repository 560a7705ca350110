"""The proxy's own word: one of its signals, mapped to the scale of the score.

Loss, margin and entropy cost nothing beyond the forward pass that gives the embedding; scoring the rest directly by them is the
baseline that reviewers of score extrapolation (arXiv 2506.09010) asked for. The signal, and its direction, is the one with
the highest absolute Spearman correlation with the scored samples. Its map to the score is centred isotonic regression (Oron &
Flournoy 2017, "Centered Isotonic Regression", section 2): the steps of isotonic regression, least squares among monotone maps,
joined by straight lines through their centres. Within the flat ends a slope far below the spread of the scores keeps the order of
the signal, also beyond its range in the seed set: a proxy's losses are larger on samples it was not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback

SLOPE = 1e-2
"""Of the tie-breaking part of a map, in spreads of the score over the whole range of the signal."""

MONOTONE_NUMBERS = ("middle", "reach", "slope", "agreement")


@dataclass(frozen=True)
class Monotone:
    """A monotone map of one signal to the score.

    x, y           float64 [m], knots: signal, rising, and score; the map is constant beyond them but for the slope
    middle, reach  of the signal in the seed set: median and interquartile range
    slope          of the score for each unit of t / (1 + |t|), t = (signal - middle) / reach; negative for a falling map
    agreement      absolute Spearman correlation of signal and score on the seed set
    """

    x: np.ndarray
    y: np.ndarray
    middle: float
    reach: float
    slope: float
    agreement: float

    @classmethod
    def fit(cls, signal: np.ndarray, score: np.ndarray) -> Monotone | None:
        """From the finite values of a signal, float [n], and their scores, float [n]; None where there is no order in them."""
        good = np.isfinite(signal)
        signal, score = signal[good].astype(np.float64), score[good]
        if len(score) < 2 or not np.ptp(signal) or not np.ptp(score):
            return None
        rho = float(np.corrcoef(rankdata(signal), rankdata(score))[0, 1])
        if not rho:
            return None
        x, y = _centres(signal, IsotonicRegression(increasing=rho > 0).fit_transform(signal, score))
        low, middle, high = np.quantile(signal, [0.25, 0.5, 0.75])
        reach = float(high - low) or float(np.ptp(signal))
        return cls(x, y, float(middle), reach, float(np.sign(rho) * SLOPE * score.std()), abs(rho))

    def __call__(self, signal: np.ndarray) -> np.ndarray:
        """Scores, float64 [n]."""
        t = (signal.astype(np.float64) - self.middle) / self.reach
        return np.interp(signal, self.x, self.y) + self.slope * t / (1 + np.abs(t))


def _centres(x: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of x and height of every step of a monotone step function given at n points."""
    order = np.argsort(x, kind="stable")
    x, step = x[order], step[order]
    group = np.cumsum(np.r_[0, step[1:] != step[:-1]])
    centre = np.bincount(group, x) / np.bincount(group)
    return centre, step[np.r_[True, step[1:] != step[:-1]]]


class ProxyStatisticsMap:
    """The signals of the proxy, each with its map to the score; the one that ranks best is used where it is finite, elsewhere the
    next best, and the mean score where there is none."""

    def __init__(self, width: int, mean: float, maps: dict[int, Monotone]) -> None:
        self.width, self.mean, self.maps = width, mean, maps

    @classmethod
    def fit(cls, signals: np.ndarray, score: np.ndarray) -> ProxyStatisticsMap:
        """From float [n, s] and scores float [n]; a signal that says nothing of the order of the scores gets no map."""
        found = {column: Monotone.fit(values, score) for column, values in enumerate(signals.T)}
        maps = {column: one for column, one in found.items() if one is not None}
        return cls(signals.shape[1], float(score.mean()), maps)

    def __call__(self, signals: np.ndarray) -> np.ndarray:
        """Scores, float64 [n]. Raises RaypipeError for another number of signals than in the fit."""
        if signals.shape[1] != self.width:
            raise RaypipeError(
                f"{signals.shape[1]} signals for each sample, but the fit had {self.width}"
            )
        result = np.full(len(signals), self.mean)
        for column in sorted(
            self.maps, key=lambda column: self.maps[column].agreement
        ):  # the best last, over the others
            good = np.isfinite(signals[:, column])
            result[good] = self.maps[column](signals[good, column])
        return result

    def tensors(self) -> dict[str, np.ndarray]:
        result = {"about": np.array([self.width, self.mean])}
        for column, one in self.maps.items():
            result |= {
                f"x{column}": one.x,
                f"y{column}": one.y,
                f"numbers{column}": np.array([getattr(one, n) for n in MONOTONE_NUMBERS]),
            }
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], prefix: str) -> ProxyStatisticsMap:
        """Restore what `tensors` gave, here with names that begin with `prefix`. Raises KeyError for one that is missing."""
        width, mean = tensors[prefix + "about"].tolist()
        maps = {}
        for column in range(int(width)):
            names = [f"{prefix}{name}{column}" for name in ("x", "y", "numbers")]
            if any(name in tensors for name in names):
                x, y, numbers = (np.array(tensors[name]) for name in names)
                maps[column] = Monotone(x, y, *numbers.tolist())
        return cls(int(width), mean, maps)


class ProxySignal(Extrapolator):
    """The signal of the proxy that ranks the scored samples best."""

    name = "proxy"
    default_neighbours = 20
    fewest = 2

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Choose the signal and fit its map. Raises RaypipeError for samples without signals and scores that are not finite."""
        score = self._check_fit(seed, score)
        if not seed.signals.shape[1]:
            raise RaypipeError(
                f"{self.name}: the samples come without the proxy's signals (loss, margin, entropy), so there is nothing to map to "
                "the score; use another extrapolate.method"
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
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None
