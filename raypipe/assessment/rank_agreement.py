"""Agreement of two rankings: correlations and overlaps of the top, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from raypipe.assessment.hypergeometric import hypergeometric_interval

MIN_SAMPLES = 10
"""With fewer samples a correlation means nothing."""
RESAMPLES = 1000
"""Bootstrap resamples per interval."""
MAX_DRAWS, MIN_RESAMPLES = 1 << 24, 200
"""Many samples mean fewer resamples, so that at most this many values are drawn in all. The number
of resamples never falls below the minimum."""
LEVEL = 0.95
"""Coverage of the intervals."""
CHUNK_VALUES = 1 << 16
"""Values of an array while resampling (512 KiB): arrays that fit the cache take half the time."""
CONSTANT = 1e-12
"""Values whose sum of squares around their mean is less than this of that around 0 are equal."""

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
    spearman_within, spearman_within_interval
        Rank correlation within classes, and its 95 % bootstrap interval; see
        `RanksWithinClasses`. None without classes.
    """

    spearman: float | None
    pearson: float | None
    spearman_interval: BootstrapInterval | None
    pearson_interval: BootstrapInterval | None
    overlap: dict[float, float]
    overlap_interval: dict[float, BootstrapInterval]
    spearman_within: float | None = None
    spearman_within_interval: BootstrapInterval | None = None

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
            "spearman_within": self.spearman_within,
            "spearman_within_interval": (
                list(self.spearman_within_interval) if self.spearman_within_interval else None
            ),
        }


NO_AGREEMENT = RankAgreement(None, None, None, None, {}, {})
"""The result where agreement cannot be assessed."""


def rank_agreement(
    predictions: Mapping[str, np.ndarray],
    measured: np.ndarray,
    seed: int,
    keep: Sequence[float],
    label: np.ndarray | None = None,
    weight: np.ndarray | None = None,
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
    label
        Classes, int [n], -1 without, for the correlation within classes.
    weight
        Weights of the samples, float [n] with a mean of 1; None for equal ones. Samples of one
        weight are a stratum, and resamples are drawn within strata.

    Returns
    -------
    dict[str, RankAgreement]
        By name. If all values on either side are equal, the correlations are None.
    """
    if weight is None:
        weight = np.ones(len(measured))
    once = weight[None].astype(np.float64)
    pairs = _score_pairs(predictions, measured, seed)
    within = {}
    if label is not None:
        within = {
            name: RanksWithinClasses(np.asarray(predicted, np.float64), measured, label, weight)
            for name, predicted in predictions.items()
        }
    resampled = _resample(pairs, weight, seed, keep, within)
    result = {}
    for name, pair in pairs.items():
        overlap = {
            fraction: float(value[0]) for fraction, value in pair.overlaps(once, keep).items()
        }
        overlap_interval = {
            fraction: bootstrap_interval(resampled[name][fraction])
            or (overlap[fraction], overlap[fraction])
            for fraction in keep
        }
        result[name] = RankAgreement(
            _finite(pair.spearman(once)[0]),
            _finite(pair.pearson(once)[0]),
            bootstrap_interval(resampled[name]["spearman"]),
            bootstrap_interval(resampled[name]["pearson"]),
            overlap,
            overlap_interval,
            _finite(within[name].spearman(once)[0]) if within else None,
            bootstrap_interval(resampled[name]["within"]) if within else None,
        )
    return result


@dataclass(frozen=True)
class Ceiling:
    """The best agreement that a continuous prediction can reach, given ties in measured scores.

    Attributes
    ----------
    spearman
        Rank correlation of a perfect order that breaks ties at random with the measured scores, in
        which tied scores share their mean rank. None if all scores are equal.
    overlap
        Expected overlap of its top with that of the measured scores, by keep fraction.
    """

    spearman: float | None
    overlap: dict[float, float]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        overlap = {f"{keep:g}": value for keep, value in self.overlap.items()}
        return {"spearman": self.spearman, "overlap": overlap}


def ceiling(measured: np.ndarray, keep: Sequence[float]) -> Ceiling:
    """Return the best agreement that ties in the measured scores, float [n], allow.

    Notes
    -----
    With groups of t tied scores, the correlation is sqrt(1 - sum(t^3 - t) / (n^3 - n)). If a top of
    k samples holds a samples above the tied group at the cut and m of the t samples in it, the
    expected overlap is (a + m^2 / t) / k.
    """
    n = len(measured)
    _, ties = np.unique(measured, return_counts=True)  # from the lowest score up
    size = ties.astype(np.float64)
    best = math.sqrt(max(0.0, 1 - float((size**3 - size).sum()) / (n**3 - n))) if n > 1 else 0.0
    overlap = {}
    for fraction in keep:
        top = _top(fraction, n)
        above = np.cumsum(ties[::-1]) - ties[::-1]  # samples above each group
        group = int(np.searchsorted(above, top, side="left")) - 1
        inside, tied = top - int(above[group]), int(ties[::-1][group])
        overlap[fraction] = (int(above[group]) + inside**2 / tied) / top
    return Ceiling(best if len(ties) > 1 else None, overlap)


def chance(n: int, keep: Sequence[float]) -> RankAgreement:
    """Return the expected agreement of a random order of n samples.

    The intervals contain 95 % of the random orders. The correlations of a random order have the
    variance 1 / (n - 1); the overlap of two tops is hypergeometric.
    """
    half_width = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(max(1, n - 1))
    correlation_interval = (max(-1.0, -half_width), min(1.0, half_width))
    tops = {fraction: _top(fraction, n) for fraction in keep}
    ranges = {
        fraction: hypergeometric_interval(n, top, top, LEVEL) for fraction, top in tops.items()
    }
    return RankAgreement(
        0.0,
        0.0,
        correlation_interval,
        correlation_interval,
        {fraction: top / n for fraction, top in tops.items()},
        {
            fraction: (low / tops[fraction], high / tops[fraction])
            for fraction, (low, high) in ranges.items()
        },
        0.0,
        correlation_interval,
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
    resampled = _resample(pairs, np.ones(len(measured)), seed, ())
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

    A resample is given as weights: how often it drew each pair, times the weight of the pair,
    [resamples, n].
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, seed: int) -> None:
        # Ties are ordered alike on both sides, as the ids of samples do it in keep-lists: a
        # prediction that repeats the measured scores must agree with them entirely.
        tie = np.random.default_rng(seed).permutation(len(a))
        self._a, self._b = _RankedValues(a, tie), _RankedValues(b, tie)
        x, y = self._a.value, self._b.value
        self._moments = np.stack([np.ones_like(x), x, y, x * y, x * x, y * y], 1)

    def pearson(self, weight: np.ndarray) -> np.ndarray:
        total, sum_a, sum_b, ab, aa, bb = (weight @ self._moments).T
        centred_aa, centred_bb = aa - sum_a**2 / total, bb - sum_b**2 / total
        # what rounding leaves of the spread where a resample drew equal values only
        centred_aa[centred_aa < CONSTANT * aa] = 0
        centred_bb[centred_bb < CONSTANT * bb] = 0
        return _correlation(ab - sum_a * sum_b / total, centred_aa, centred_bb)

    def spearman(self, weight: np.ndarray) -> np.ndarray:
        a, b = self._a.centred_ranks(weight), self._b.centred_ranks(weight)
        weighted_a, weighted_b = weight * a, weight * b
        return _correlation(
            np.einsum("rn,rn->r", weighted_a, b),
            np.einsum("rn,rn->r", weighted_a, a),
            np.einsum("rn,rn->r", weighted_b, b),
        )

    def overlaps(self, weight: np.ndarray, keep: Sequence[float]) -> dict[float, np.ndarray]:
        """Return the overlap of the tops at each keep fraction, float64 [resamples] each."""
        tops = [_top(fraction, float(weight[0].sum())) for fraction in keep]
        pairs = zip(self._a.tops(weight, tops), self._b.tops(weight, tops), strict=True)
        return {
            fraction: np.minimum(*pair).sum(1) / top
            for fraction, top, pair in zip(keep, tops, pairs, strict=True)
        }


class RanksWithinClasses:
    """Rank correlation of pairs of scores within classes.

    Ranks are taken within each class and centred. Their correlation over all classes is the mean of
    the classes' Spearman correlations, weighted by the spread of the ranks (about the number of
    samples). With weights, ranks are those in the weighted class. Within few samples, Spearman's
    correlation is biased towards 0: for n pairs from a normal distribution with correlation rho its
    expectation is

        6 / (pi (n + 1)) (arcsin rho + (n - 2) arcsin(rho / 2))

    (Moran 1948). The mean over the classes is replaced by the correlation in large classes that
    has this expectation; with weights, n is the effective number of samples. Classes of one sample,
    and unlabelled samples, do not count. In a single class it is the plain correlation, as over all
    samples.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray, label: np.ndarray, weight: np.ndarray) -> None:
        ranks_a, ranks_b = np.zeros(len(a)), np.zeros(len(a))
        sizes, weights = [], []
        for y in np.unique(label[label >= 0]):
            rows = np.flatnonzero(label == y)
            if len(rows) < 2:
                continue
            own = weight[rows]
            total = float(own.sum())
            for side, values in ((ranks_a, a), (ranks_b, b)):
                side[rows] = _centred_ranks(values[rows], own) / (total + 1)
            sizes.append(total**2 / float(np.square(own).sum()))
            weights.append(float((own * np.square(ranks_b[rows])).sum()))
        self._products = np.stack([ranks_a * ranks_b, ranks_a**2, ranks_b**2], 1)
        self._rho = np.linspace(-1, 1, 401)
        self._expected = self._rho
        self._corrects = len(sizes) > 1
        if sum(weights) > 0:
            n = np.array(sizes, np.float64)[:, None]
            direct, half = np.arcsin(self._rho), np.arcsin(self._rho / 2)
            expected = 6 / (np.pi * (n + 1)) * (direct + (n - 2) * half)
            self._expected = np.average(expected, axis=0, weights=weights)

    def spearman(self, weight: np.ndarray) -> np.ndarray:
        """Return the correlation in each resample, float64 [resamples]; NaN if undefined."""
        observed = _correlation(*(weight @ self._products).T)
        if not self._corrects:
            return observed
        rho = np.interp(observed, self._expected, self._rho)
        return np.where(np.isfinite(observed), 6 / np.pi * np.arcsin(rho / 2), np.nan)


class _RankedValues:
    """Values and their order, computed once for all resamples; `tie` orders equal values."""

    def __init__(self, value: np.ndarray, tie: np.ndarray) -> None:
        # standardised, because scores of size 1e-4 or 1e6 would lose digits in the sums below
        spread = float(value.std())
        self.value = (value - value.mean()) / spread if spread > 0 else np.zeros_like(value)
        self._order = np.lexsort((tie, value))
        place = self._order.argsort()
        self._descending_place = len(value) - 1 - place
        ordered = value[self._order]
        self._starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self._group = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])[place]

    def centred_ranks(self, weight: np.ndarray) -> np.ndarray:
        """Return mean ranks within each resample, less their mean, [resamples, n]."""
        size = np.add.reduceat(weight[:, self._order], self._starts, axis=1)
        rank = size.cumsum(1)
        rank -= (size + rank[:, -1:]) / 2
        return rank[:, self._group]

    def tops(self, weight: np.ndarray, counts: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield how many draws of each value are among the highest, [resamples, n] for a count."""
        descending = weight[:, self._order[::-1]]
        before = descending.cumsum(1) - descending
        for count in counts:
            yield np.clip(count - before, 0, descending)[:, self._descending_place]


def _centred_ranks(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return mean ranks in a weighted sample, less their mean, float64 [n]."""
    _, group = np.unique(values, return_inverse=True)
    size = np.bincount(group, weight)
    return (size.cumsum() - size / 2)[group] - weight.sum() / 2


def _top(keep: float, n: float) -> int:
    """Return the size of the top for a keep fraction."""
    return max(1, round(keep * n))


def _correlation(ab: np.ndarray, aa: np.ndarray, bb: np.ndarray) -> np.ndarray:
    """Return linear correlations from sums of products of centred values, float64 [resamples].

    NaN where a side is constant.
    """
    spread = np.sqrt(aa * bb)
    return np.divide(ab, spread, out=np.full(len(ab), np.nan), where=spread > 1e-12)


def resample_weights(weight: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield bootstrap resamples of weighted samples, float64 [n], in chunks of bounded size.

    Samples of one weight are a stratum, within which resamples are drawn.

    Yields
    ------
    np.ndarray
        How often each resample drew each sample, times its weight, float64 [resamples, n].
    """
    n, strata = len(weight), [np.flatnonzero(weight == value) for value in np.unique(weight)]
    # each stratum has a generator: the draws do not depend on the size of the chunks
    generators = [np.random.default_rng([seed, number]) for number in range(1, len(strata))]
    generators.insert(0, np.random.default_rng(seed))
    resamples = min(RESAMPLES, max(MIN_RESAMPLES, MAX_DRAWS // n))
    step = max(1, CHUNK_VALUES // n)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = np.concatenate(
            [
                stratum[rng.integers(0, len(stratum), (rows, len(stratum)))]
                for stratum, rng in zip(strata, generators, strict=True)
            ],
            1,
        )
        place = drawn + n * np.arange(rows)[:, None]
        yield np.bincount(place.ravel(), minlength=rows * n).reshape(rows, n) * weight


def _resample(
    pairs: Mapping[Any, _ScorePair],
    weight: np.ndarray,
    seed: int,
    keep: Sequence[float],
    within: Mapping[Any, RanksWithinClasses] | None = None,
) -> dict[Any, dict[str | float, np.ndarray]]:
    """Return, for each pair, "spearman", "pearson" and the overlap at every keep fraction.

    With classes also "within". Each is float64 [resamples].
    """
    chunks: dict[Any, list[dict[str | float, np.ndarray]]] = {name: [] for name in pairs}
    for resample in resample_weights(weight, seed):
        for name, pair in pairs.items():
            chunk: dict[str | float, np.ndarray] = {
                "pearson": pair.pearson(resample),
                "spearman": pair.spearman(resample),
            }
            chunk.update(pair.overlaps(resample, keep).items())
            if within:
                chunk["within"] = within[name].spearman(resample)
            chunks[name].append(chunk)
    return {
        name: {key: np.concatenate([chunk[key] for chunk in of_pair]) for key in of_pair[0]}
        for name, of_pair in chunks.items()
    }


def bootstrap_interval(values: np.ndarray) -> BootstrapInterval | None:
    """Return the percentile interval of the finite values; None if there are none."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    lower, upper = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(lower), float(upper)


def _finite(value: float) -> float | None:
    """Return a correlation clipped to -1..1, or None if it is undefined."""
    return float(np.clip(value, -1, 1)) if np.isfinite(value) else None
