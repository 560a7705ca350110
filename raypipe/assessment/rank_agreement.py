"""Agreement of two rankings: correlations and overlaps of the top, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_SAMPLES = 10
"""With fewer samples a correlation means nothing."""
RESAMPLES = 1000
"""Bootstrap resamples per interval."""
MAX_DRAWS, MIN_RESAMPLES = 1 << 24, 200
"""Many samples mean fewer resamples, so that at most this many values are drawn in all. The number
of resamples never falls below the minimum."""
LEVEL = 0.95
"""Coverage of the intervals."""
CHUNK_VALUES = 1 << 22
"""Maximum number of float64 values held at once while resampling (32 MiB per array)."""

BootstrapInterval = tuple[float, float]
"""Lower and upper end of a 95 % interval from resampling."""


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of predicted with measured scores; None where it is undefined.

    Attributes
    ----------
    spearman, pearson
        Rank and linear correlation.
    spearman_interval, pearson_interval
        Their 95 % bootstrap intervals, (lower, upper).
    overlap
        For each keep fraction, the share of the measured top that is also in the predicted top.
    overlap_interval
        95 % bootstrap intervals of the overlaps.
    """

    spearman: float | None
    pearson: float | None
    spearman_interval: BootstrapInterval | None
    pearson_interval: BootstrapInterval | None
    overlap: dict[float, float]
    overlap_interval: dict[float, BootstrapInterval]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
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
"""The result where agreement cannot be assessed."""


def rank_agreement(
    predictions: Mapping[str, np.ndarray], measured: np.ndarray, seed: int, keep: Sequence[float]
) -> dict[str, RankAgreement]:
    """Compare several predictions with the same measured scores, under the same resamples.

    Parameters
    ----------
    predictions
        Predicted scores, float [n] by name; n must be at least 1.
    measured
        Measured scores, float [n].
    seed
        Seed of the bootstrap and of the order of ties.
    keep
        Keep fractions for the overlaps.

    Returns
    -------
    dict[str, RankAgreement]
        By name. If all values on either side are equal, the correlations are None.
    """
    n, once = len(measured), np.ones((1, len(measured)))
    pairs = _score_pairs(predictions, measured, seed)
    resampled = _resample(pairs, n, seed, keep)
    result = {}
    for name, pair in pairs.items():
        overlap = {fraction: float(pair.overlap(once, fraction)[0]) for fraction in keep}
        overlap_interval = {
            fraction: _interval(resampled[name][fraction]) or (overlap[fraction], overlap[fraction])
            for fraction in keep
        }
        result[name] = RankAgreement(
            _finite(pair.spearman(once)[0]),
            _finite(pair.pearson(once)[0]),
            _interval(resampled[name]["spearman"]),
            _interval(resampled[name]["pearson"]),
            overlap,
            overlap_interval,
        )
    return result


def chance(n: int, keep: Sequence[float]) -> RankAgreement:
    """Return the expected agreement of a random order of n samples.

    The intervals contain 95 % of the random orders. The correlations of a random order have the
    variance 1 / (n - 1); the overlap of two tops is hypergeometric.
    """
    from scipy.stats import hypergeom, norm

    half_width = float(norm.ppf((1 + LEVEL) / 2)) / math.sqrt(max(1, n - 1))
    correlation_interval = (max(-1.0, -half_width), min(1.0, half_width))
    tops = {fraction: _top(fraction, n) for fraction in keep}
    ranges = {fraction: hypergeom(n, top, top).interval(LEVEL) for fraction, top in tops.items()}
    return RankAgreement(
        0.0,
        0.0,
        correlation_interval,
        correlation_interval,
        {fraction: top / n for fraction, top in tops.items()},
        {
            fraction: (float(low) / tops[fraction], float(high) / tops[fraction])
            for fraction, (low, high) in ranges.items()
        },
    )


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Return the rank correlation, with ties at their mean rank.

    Return None if it is undefined: a constant side, fewer than 2 values, or values not finite.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    return _finite(_ScorePair(a, b, 0).spearman(np.ones((1, len(a))))[0])


def spearman_of_resamples(
    predictions: Mapping[Any, np.ndarray], measured: np.ndarray, seed: int
) -> dict[Any, np.ndarray]:
    """Return rank correlations of several predictions under the same resamples.

    Returns
    -------
    dict[Any, np.ndarray]
        float64 [resamples] by the keys of `predictions`; NaN where a correlation is undefined.
    """
    pairs = _score_pairs(predictions, measured, seed)
    resampled = _resample(pairs, len(measured), seed, ())
    return {name: values["spearman"] for name, values in resampled.items()}


def _score_pairs(
    predictions: Mapping[Any, np.ndarray], measured: np.ndarray, seed: int
) -> dict[Any, _ScorePair]:
    return {
        name: _ScorePair(np.asarray(predicted, np.float64), measured, seed)
        for name, predicted in predictions.items()
    }


class _ScorePair:
    """Statistics of n pairs of scores in resamples.

    A resample is given as weights: how often it drew each pair, integers [resamples, n].
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, seed: int) -> None:
        # Ties are ordered independently on each side. With one order for both, equal values would
        # agree on the top by accident.
        rng = np.random.default_rng(seed)
        self._a = _RankedValues(a, rng.permutation(len(a)))
        self._b = _RankedValues(b, rng.permutation(len(b)))

    def pearson(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.value[None], self._b.value[None], weight)

    def spearman(self, weight: np.ndarray) -> np.ndarray:
        return _correlation(self._a.ranks(weight), self._b.ranks(weight), weight)

    def overlap(self, weight: np.ndarray, keep: float) -> np.ndarray:
        top = _top(keep, float(weight[0].sum()))
        return np.minimum(self._a.top(weight, top), self._b.top(weight, top)).sum(1) / top


class _RankedValues:
    """Values and their order, computed once for all resamples; `tie` orders equal values."""

    def __init__(self, value: np.ndarray, tie: np.ndarray) -> None:
        # standardised, because scores of size 1e-4 or 1e6 would lose digits in the sums below
        spread = float(value.std())
        self.value = (value - value.mean()) / spread if spread > 0 else np.zeros_like(value)
        self._order = np.lexsort((tie, value))
        self._position = self._order.argsort()
        ordered = value[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])

    def ranks(self, weight: np.ndarray) -> np.ndarray:
        """Return mean ranks within each resample, [resamples, n]."""
        size = np.add.reduceat(weight[:, self._order], self._starts, axis=1)
        rank = size.cumsum(1) - (size - 1) / 2
        return rank[:, self._group][:, self._position]

    def top(self, weight: np.ndarray, count: int) -> np.ndarray:
        """Return how many draws of each value are among the `count` highest, [resamples, n]."""
        descending = weight[:, self._order[::-1]]
        before = descending.cumsum(1) - descending
        return np.clip(count - before, 0, descending)[:, ::-1][:, self._position]


def _top(keep: float, n: float) -> int:
    """Return the size of the top for a keep fraction."""
    return max(1, round(keep * n))


def _correlation(a: np.ndarray, b: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return weighted linear correlations, float64 [resamples]; NaN where a side is constant."""
    total = weight.sum(1, keepdims=True)
    a = a - (weight * a).sum(1, keepdims=True) / total
    b = b - (weight * b).sum(1, keepdims=True) / total
    covariance = (weight * a * b).sum(1)
    spread = np.sqrt((weight * a * a).sum(1) * (weight * b * b).sum(1))
    return np.divide(covariance, spread, out=np.full(len(weight), np.nan), where=spread > 1e-12)


def _resample(
    pairs: Mapping[Any, _ScorePair], n: int, seed: int, keep: Sequence[float]
) -> dict[Any, dict[str | float, np.ndarray]]:
    """Return, for each pair, "spearman", "pearson" and the overlap at every keep fraction.

    Each is float64 [resamples].
    """
    rng = np.random.default_rng(seed)
    chunks: dict[Any, list[dict[str | float, np.ndarray]]] = {name: [] for name in pairs}
    resamples = min(RESAMPLES, max(MIN_RESAMPLES, MAX_DRAWS // n))
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        for name, pair in pairs.items():
            chunk: dict[str | float, np.ndarray] = {
                "pearson": pair.pearson(weight),
                "spearman": pair.spearman(weight),
            }
            chunk |= {fraction: pair.overlap(weight, fraction) for fraction in keep}
            chunks[name].append(chunk)
    return {
        name: {key: np.concatenate([chunk[key] for chunk in of_pair]) for key in of_pair[0]}
        for name, of_pair in chunks.items()
    }


def _interval(values: np.ndarray) -> BootstrapInterval | None:
    """Return the percentile interval of the finite values; None if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    lower, upper = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)


def _finite(value: float) -> float | None:
    """Return a correlation clipped to -1..1, or None if it is undefined."""
    return float(np.clip(value, -1, 1)) if np.isfinite(value) else None
