"""Figures that say how well one ranking agrees with another: correlations and overlaps of the top, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_SAMPLES = 10
"""Samples below which a correlation says nothing."""
RESAMPLES = 1000
"""Bootstrap resamples behind each interval."""
MOST_DRAWN, LEAST_RESAMPLES = 1 << 24, 200
"""With very many samples there are fewer resamples, so that so many values are drawn in all, but never fewer than these."""
LEVEL = 0.95
CHUNK_VALUES = 1 << 22
"""Most float64 values held at once while resampling (32 MiB an array)."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of predicted with measured scores. None where it is undefined.

    spearman, pearson                    rank and linear correlation
    spearman_interval, pearson_interval  95 % bootstrap intervals, (lower, upper)
    overlap                              for each keep fraction: share of the measured top that is also in the predicted top
    overlap_interval                     95 % bootstrap intervals of these
    """

    spearman: float | None
    pearson: float | None
    spearman_interval: Interval | None
    pearson_interval: Interval | None
    overlap: dict[float, float]
    overlap_interval: dict[float, Interval]

    def as_dict(self) -> dict[str, Any]:
        """All figures as JSON."""
        return {
            "spearman": self.spearman,
            "spearman_interval": list(self.spearman_interval) if self.spearman_interval else None,
            "pearson": self.pearson,
            "pearson_interval": list(self.pearson_interval) if self.pearson_interval else None,
            "overlap": {f"{keep:g}": value for keep, value in self.overlap.items()},
            "overlap_interval": {
                f"{keep:g}": list(value) for keep, value in self.overlap_interval.items()
            },
        }


NO_AGREEMENT = RankAgreement(None, None, None, None, {}, {})
"""Figures of what cannot be judged."""


def rank_agreement(
    predictions: Mapping[str, np.ndarray], measured: np.ndarray, seed: int, keep: Sequence[float]
) -> dict[str, RankAgreement]:
    """Figures of several predictions, float [n] by name, of the same measured scores, float [n], under the same resamples.

    n must be at least 1; with equal values on either side the correlations are None.
    """
    n, once = len(measured), np.ones((1, len(measured)))
    pairs = {
        name: _Pair(np.asarray(predicted, np.float64), measured, seed)
        for name, predicted in predictions.items()
    }
    drawn = _resample(pairs, n, seed, keep)
    result = {}
    for name, pair in pairs.items():
        overlap = {fraction: float(pair.overlap(once, fraction)[0]) for fraction in keep}
        between = {fraction: _interval(drawn[name][fraction]) for fraction in keep}
        result[name] = RankAgreement(
            _finite(pair.spearman(once)[0]),
            _finite(pair.pearson(once)[0]),
            _interval(drawn[name]["spearman"]),
            _interval(drawn[name]["pearson"]),
            overlap,
            {
                fraction: value or (overlap[fraction], overlap[fraction])
                for fraction, value in between.items()
            },
        )
    return result


def chance(n: int, keep: Sequence[float]) -> RankAgreement:
    """What a random order of n samples gives: the expected figures, and the range of 95 % of the random orders.

    The correlations of a random order have the variance 1 / (n - 1); the overlap of two tops is hypergeometric.
    """
    from scipy.stats import hypergeom, norm

    between = float(norm.ppf((1 + LEVEL) / 2)) / math.sqrt(max(1, n - 1))
    tops = {fraction: _top(fraction, n) for fraction in keep}
    ranges = {fraction: hypergeom(n, top, top).interval(LEVEL) for fraction, top in tops.items()}
    return RankAgreement(
        0.0,
        0.0,
        (max(-1.0, -between), min(1.0, between)),
        (max(-1.0, -between), min(1.0, between)),
        {fraction: top / n for fraction, top in tops.items()},
        {
            fraction: (float(low) / tops[fraction], float(high) / tops[fraction])
            for fraction, (low, high) in ranges.items()
        },
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation with ties at their mean rank; None when it is undefined (constant, or fewer than 2 values)."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return _finite(_Pair(a, b, 0).spearman(np.ones((1, len(a))))[0])


def spearman_of_resamples(
    predictions: Mapping[Any, np.ndarray], measured: np.ndarray, seed: int
) -> dict[Any, np.ndarray]:
    """Rank correlations float64 [resamples] of several predictions under the same resamples; NaN where one is undefined."""
    pairs = {
        name: _Pair(np.asarray(predicted, np.float64), measured, seed)
        for name, predicted in predictions.items()
    }
    return {
        name: values["spearman"]
        for name, values in _resample(pairs, len(measured), seed, ()).items()
    }


class _Pair:
    """Statistics of n pairs under weights: a resample is how often it drew each pair, integers [resamples, n]."""

    def __init__(self, a: np.ndarray, b: np.ndarray, seed: int) -> None:
        # each its own order of ties: one order for both would let equal values agree on the top by accident
        rng = np.random.default_rng(seed)
        self._a, self._b = (
            _Ordered(a, rng.permutation(len(a))),
            _Ordered(b, rng.permutation(len(b))),
        )

    def pearson(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.value[None], self._b.value[None], weight)

    def spearman(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.ranks(weight), self._b.ranks(weight), weight)

    def overlap(self, weight: np.ndarray, keep: float) -> np.ndarray:
        top = _top(keep, float(weight[0].sum()))
        return np.minimum(self._a.top(weight, top), self._b.top(weight, top)).sum(1) / top


class _Ordered:
    """Values with their order, computed once for all resamples."""

    def __init__(self, value: np.ndarray, tie: np.ndarray) -> None:
        # centred and scaled, since scores of 1e-4 or 1e6 would lose digits in the sums below
        spread = float(value.std())
        self.value = (value - value.mean()) / spread if spread > 0 else np.zeros_like(value)
        self._order = np.lexsort((tie, value))
        self._back = self._order.argsort()
        ordered = value[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])

    def ranks(self, weight: np.ndarray) -> np.ndarray:
        """Mean ranks [resamples, n] within each resample."""
        size = np.add.reduceat(weight[:, self._order], self._starts, axis=1)
        rank = size.cumsum(1) - (size - 1) / 2
        return rank[:, self._group][:, self._back]

    def top(self, weight: np.ndarray, count: int) -> np.ndarray:
        """How many of each pair's draws are among the `count` highest, [resamples, n]."""
        falling = weight[:, self._order[::-1]]
        before = falling.cumsum(1) - falling
        return np.clip(count - before, 0, falling)[:, ::-1][:, self._back]


def _top(keep: float, n: float) -> int:
    return max(1, round(keep * n))


def _correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    total = weight.sum(1, keepdims=True)
    a = a - (weight * a).sum(1, keepdims=True) / total
    b = b - (weight * b).sum(1, keepdims=True) / total
    between = (weight * a * b).sum(1)
    spread = np.sqrt((weight * a * a).sum(1) * (weight * b * b).sum(1))
    return np.divide(between, spread, out=np.full(len(weight), np.nan), where=spread > 1e-12)


def _resample(
    pairs: Mapping[Any, _Pair], n: int, seed: int, keep: Sequence[float]
) -> dict[Any, dict[str | float, np.ndarray]]:
    """By pair: spearman, pearson and the overlap at every keep fraction, each float64 [resamples]."""
    rng = np.random.default_rng(seed)
    parts: dict[Any, list[dict[str | float, np.ndarray]]] = {name: [] for name in pairs}
    resamples = min(RESAMPLES, max(LEAST_RESAMPLES, MOST_DRAWN // n))
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        for name, pair in pairs.items():
            part: dict[str | float, np.ndarray] = {
                "pearson": pair.pearson(weight),
                "spearman": pair.spearman(weight),
            }
            parts[name].append(
                part | {fraction: pair.overlap(weight, fraction) for fraction in keep}
            )
    return {
        name: {key: np.concatenate([part[key] for part in found]) for key in found[0]}
        for name, found in parts.items()
    }


def _interval(values: np.ndarray) -> Interval | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    lower, upper = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)


def _finite(value: float) -> float | None:
    return float(np.clip(value, -1, 1)) if np.isfinite(value) else None
