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
from raypipe.extrapolate.base import Extrapolator, Nodes, Progress

SLOPE = 1e-2
"""Of the tie-breaking part of a map, in spreads of the score over the whole range of the signal."""

NUMBERS = ("middle", "reach", "slope", "agreement")


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


class Proxy(Extrapolator):
    """The signal of the proxy that ranks the scored samples best. A sample where it is not finite gets the map of the next best;
    one without any signal, the mean."""

    name = "proxy"
    default_neighbours = 20
    fewest = 2

    def fit(self, seed: Nodes, score: np.ndarray, progress: Progress | None = None) -> None:
        """Choose the signal and fit its map. Raises RaypipeError for samples without signals and scores that are not finite."""
        score = self._check_fit(seed, score)
        if not seed.signals.shape[1]:
            raise RaypipeError(
                f"{self.name}: the samples come without the proxy's signals (loss, margin, entropy), so there is nothing to map to "
                "the score; use another extrapolate.method"
            )
        self._build_index(seed.embedding)
        self._width, self._mean = seed.signals.shape[1], float(score.mean())
        self._maps = {
            column: found for column, values in enumerate(seed.signals.T) if (found := Monotone.fit(values, score)) is not None
        }
        if progress is not None:
            progress(1, 1)

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        if nodes.signals.shape[1] != self._width:
            raise RaypipeError(f"{self.name}: {nodes.signals.shape[1]} signals for each sample, but the fit had {self._width}")
        result = np.full(len(nodes), self._mean)
        for column in sorted(self._maps, key=lambda column: self._maps[column].agreement):  # the best last, over the others
            good = np.isfinite(nodes.signals[:, column])
            result[good] = self._maps[column](nodes.signals[good, column])
        return result.astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        maps = []
        for column, found in self._maps.items():
            tensors |= {f"map{column}.x": found.x, f"map{column}.y": found.y}
            maps.append({"column": column} | {name: getattr(found, name) for name in NUMBERS})
        return tensors, meta | {"mean": self._mean, "signals": self._width, "maps": maps}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta)
        try:
            self._mean, self._width, self._maps = float(meta["mean"]), int(meta["signals"]), {}
            for values in meta["maps"]:
                column = int(values["column"])
                x, y = np.array(tensors[f"map{column}.x"]), np.array(tensors[f"map{column}.y"])
                numbers = {name: float(values[name]) for name in NUMBERS}
                self._maps[column] = Monotone(x, y, **numbers)
        except (KeyError, TypeError, ValueError) as error:
            raise RaypipeError(f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again") from None
