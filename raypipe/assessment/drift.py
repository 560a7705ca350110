"""Drift: whether new samples lie where the old samples lay when the seed set was drawn.

New samples are compared with *old samples outside the seed set*, never with the seed set itself.
The proxy was trained on the seed set, which alone shifts its embeddings. Without drift, new and old
samples are exchangeable; this is the null hypothesis.

There are two figures. Each is the probability that a number is higher for a new sample than for an
old one: an effect size that is 0.5 without drift and, unlike a p-value, does not grow with the
number of samples.

auc
    The number is the output of a classifier that separates new from old samples, on samples it was
    not trained on. This is the classifier two-sample test of Lopez-Paz & Oquab, Revisiting
    Classifier Two-Sample Tests, ICLR 2017, with the AUC instead of the accuracy, because the sides
    differ in size. Any difference that the classifier can see counts: other domains, cameras,
    classes.
farther
    The number is the distance to the nearest seed samples, from which extrapolation suffers
    directly. This is Mann-Whitney's U / (n m).

Intervals use the variance of the placement values (DeLong, DeLong & Clarke-Pearson, Biometrics 44,
1988). Those of the cross-validated AUC use it within folds (LeDell, Petersen & van der Laan,
Electronic Journal of Statistics 9, 2015).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.neighbours import NeighbourIndex

MIN_SAMPLES_PER_SIDE = 30
"""With fewer samples on either side no figure is computed."""
NEIGHBOURS = 10
"""The distance of a sample is its mean distance to this many seed samples."""
FOLDS = 5
COMPONENTS, SQUARED_COMPONENTS = 32, 8
"""Principal components that the classifier sees, and how many of them it also sees squared, for
differences of spread."""
NORMAL_QUANTILE = 1.959964
"""Standard errors on either side of a 95 % interval."""

ConfidenceInterval = tuple[float, float]
"""Lower and upper end of a 95 % interval from a standard error."""


@dataclass(frozen=True)
class Drift:
    """Difference between new and old samples; 0.5 means no drift.

    Attributes
    ----------
    n_new, n_old
        Numbers of samples.
    auc, farther
        See the module; None if there are too few samples.
    auc_interval, farther_interval
        Their 95 % intervals.
    note
        Why there are no figures; else empty.
    """

    n_new: int
    n_old: int
    auc: float | None = None
    auc_interval: ConfidenceInterval | None = None
    farther: float | None = None
    farther_interval: ConfidenceInterval | None = None
    note: str = ""

    def beyond(self, limit: float) -> bool:
        """Whether the lower end of either interval is above `limit`; never if this is 1."""
        intervals = (self.auc_interval, self.farther_interval)
        return limit < 1 and any(
            interval is not None and interval[0] > limit for interval in intervals
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the drift as JSON data."""
        result = dict(vars(self))
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in result.items()
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Drift:
        """Restore a drift from `as_dict`."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return Drift(**fields)


def embedding_drift(new: np.ndarray, old: np.ndarray, seed: np.ndarray) -> Drift:
    """Return the drift of embeddings. The same arrays give the same figures.

    Parameters
    ----------
    new
        Embeddings of new samples, float32 [n, d].
    old
        Embeddings of old samples outside the seed set, float32 [m, d].
    seed
        Embeddings of (part of) the seed set, float32 [s, d].

    Raises
    ------
    RaypipeError
        Shapes do not fit or a value is not finite.
    """
    for name, values in (("new", new), ("old", old), ("seed", seed)):
        if values.ndim != 2 or values.shape[1] != new.shape[1]:
            raise RaypipeError(
                f"{name} embeddings have shape {list(values.shape)}; "
                "expected 2 dimensions, as wide as the new ones"
            )
        if not np.isfinite(values).all():
            raise RaypipeError(f"{name} embeddings are not all finite")
    n, m = len(new), len(old)
    for count, what in (
        (n, "new samples"),
        (m, "old samples outside the seed set"),
        (len(seed), "seed samples"),
    ):
        if count < MIN_SAMPLES_PER_SIDE:
            return Drift(
                n, m, note=f"only {count} {what}; at least {MIN_SAMPLES_PER_SIDE} are needed"
            )
    pooled = np.concatenate([new, old]).astype(np.float32)
    distance, _ = NeighbourIndex(seed.astype(np.float32)).search(pooled, NEIGHBOURS)
    far = distance.astype(np.float64).mean(1)
    farther, farther_interval = superiority(far[:n], far[n:])
    spread = float(far.std())
    columns = [_components(pooled), ((far - far.mean()) / (spread or 1.0))[:, None]]
    auc, auc_interval = _cross_validated_auc(np.concatenate(columns, 1), np.arange(n + m) < n)
    return Drift(n, m, auc, auc_interval, farther, farther_interval)


def superiority(new: np.ndarray, old: np.ndarray) -> tuple[float, ConfidenceInterval]:
    """Return the probability that a new value is above an old one, and its 95 % interval.

    `new` is float [n], `old` float [m]; ties count half.
    """
    return _estimate(*placements(new, old))


def placements(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the placement values of both sides.

    Returns
    -------
    of_new
        For each new value, the share of old ones below it, float64 [n].
    of_old
        For each old value, the share of new ones above it, float64 [m].
    """
    return _share_below(new, old), 1 - _share_below(old, new)


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of `others` below each value; equal ones count half."""
    ordered = np.sort(others)
    left, right = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (left + right) / (2 * len(others))


def _estimate(of_new: np.ndarray, of_old: np.ndarray) -> tuple[float, ConfidenceInterval]:
    """Return the mean of placement values and its 95 % interval."""
    theta = float(of_new.mean())
    error = math.sqrt(of_new.var(ddof=1) / len(of_new) + of_old.var(ddof=1) / len(of_old))
    # full separation has no variance, but is not certain either
    error = max(error, 1 / (2 * NORMAL_QUANTILE * min(len(of_new), len(of_old))))
    return theta, (
        max(0.0, theta - NORMAL_QUANTILE * error),
        min(1.0, theta + NORMAL_QUANTILE * error),
    )


def _components(values: np.ndarray) -> np.ndarray:
    """Return the leading principal components and the squares of the first, float64 [n + m, c].

    They are those of both sides together, scaled to unit variance.
    """
    centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    spread, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    used = [
        column
        for column in range(len(spread))[::-1][:COMPONENTS]
        if spread[column] > 1e-9 * max(spread[-1], 1e-300)
    ]
    components = centred @ directions[:, used] / np.sqrt(spread[used])
    return np.concatenate([components, components[:, :SQUARED_COMPONENTS] ** 2], 1)


def _cross_validated_auc(
    features: np.ndarray, is_new: np.ndarray
) -> tuple[float, ConfidenceInterval]:
    """Return the AUC of a shrunken linear discriminant on held-out folds, and its interval."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fold, rng = np.empty(len(is_new), np.int64), np.random.default_rng(0)
    for side in (is_new, ~is_new):
        rows = np.flatnonzero(side)
        fold[rng.permutation(rows)] = np.arange(len(rows)) % FOLDS
    placement_parts = []
    for number in range(FOLDS):
        held = fold == number
        # equal priors only move the threshold, on which the AUC does not depend
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        model.fit(features[~held], is_new[~held])
        score = model.decision_function(features[held])
        placement_parts.append(placements(score[is_new[held]], score[~is_new[held]]))
    of_new, of_old = zip(*placement_parts)
    return _estimate(np.concatenate(of_new), np.concatenate(of_old))


def label_drift(new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    """Return the drift of the class shares.

    Parameters
    ----------
    new, old
        Numbers of new and old samples of each class, int64 [classes].

    Returns
    -------
    dict[str, Any]
        `n_new` and `n_old`, the labelled samples. `total_variation`, half the sum of the
        differences of the shares, 0 to 1; sampling alone makes it positive. `cramers_v`, 0 to 1,
        corrected for sampling (Bergsma, Journal of the Korean Statistical Society 42, 2013); None
        with one class. Both are None if a side has fewer than `MIN_SAMPLES_PER_SIDE` samples.
    """
    counts = np.stack([np.asarray(new, np.float64), np.asarray(old, np.float64)])
    totals = counts.sum(1)
    result: dict[str, Any] = {
        "n_new": int(totals[0]),
        "n_old": int(totals[1]),
        "total_variation": None,
        "cramers_v": None,
    }
    if totals.min() < MIN_SAMPLES_PER_SIDE:
        return result
    share = counts / totals[:, None]
    result["total_variation"] = float(np.abs(share[0] - share[1]).sum() / 2)
    counts = counts[:, counts.sum(0) > 0]
    classes, total = counts.shape[1], totals.sum()
    if classes > 1:
        expected = totals[:, None] * counts.sum(0) / total
        phi_squared = float(((counts - expected) ** 2 / expected).sum()) / total
        corrected = max(0.0, phi_squared - (classes - 1) / (total - 1))
        rows, columns = 2 - 1 / (total - 1), classes - (classes - 1) ** 2 / (total - 1)
        result["cramers_v"] = min(1.0, math.sqrt(corrected / (min(rows, columns) - 1)))
    return result
