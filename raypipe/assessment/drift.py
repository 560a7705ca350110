"""Drift: whether new samples lie where those lie that were there when the seed set was drawn.

New samples are compared with *old samples outside the seed set*, never with the seed set itself: the proxy was trained on the seed
set, whose embeddings are shifted for that reason alone. Without drift new and old ones are exchangeable, which is the null.

Two figures, each the probability that a number is higher of a new sample than of an old one: an effect size that is 0.5 without
drift and does not grow with the number of samples, as a p-value does.

    auc      of a classifier trained to tell new from old, on samples it was not trained on: the classifier two-sample test of
             Lopez-Paz & Oquab, Revisiting Classifier Two-Sample Tests, ICLR 2017, with the AUC in place of the accuracy, since the
             sides differ in size. Any difference that the classifier can see counts: other domains, cameras, classes
    farther  of the distance to the nearest seed samples: what extrapolation suffers from directly. Mann-Whitney's U / (n m)

Intervals by the variance of the placement values (DeLong, DeLong & Clarke-Pearson, Biometrics 44, 1988); of the cross-validated AUC
within folds, as LeDell, Petersen & van der Laan, Electronic Journal of Statistics 9, 2015.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.neighbours import NeighbourIndex

FEWEST = 30
"""Samples on either side below which nothing is said."""
NEIGHBOURS = 10
"""Seed samples to which the distance of a sample is the mean."""
FOLDS = 5
COMPONENTS, SQUARED = 32, 8
"""Principal components that the classifier sees, and how many of them squared as well, for differences of spread."""
NORMAL = 1.959964
"""Standard errors on either side of a 95 % interval."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Drift:
    """What tells n_new new samples from n_old old ones; None where there are too few, as `note` says. 0.5 means no drift.

    auc, farther                    see the module
    auc_interval, farther_interval  95 % intervals
    """

    n_new: int
    n_old: int
    auc: float | None = None
    auc_interval: Interval | None = None
    farther: float | None = None
    farther_interval: Interval | None = None
    note: str = ""

    def beyond(self, most: float) -> bool:
        """Whether the lower end of either interval is above `most`, an AUC; never for 1."""
        return most < 1 and any(
            found is not None and found[0] > most
            for found in (self.auc_interval, self.farther_interval)
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        result = dict(vars(self))
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in result.items()
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Drift:
        """From what `as_dict` gives."""
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        return Drift(**fields)


def embedding_drift(new: np.ndarray, old: np.ndarray, seed: np.ndarray) -> Drift:
    """Drift of embeddings: new float32 [n, d], old [m, d] outside the seed set, seed [s, d] of (part of) the seed set.

    The same arrays give the same figures. Raises RaypipeError for arrays of other shapes and for values that are not finite.
    """
    for name, values in (("new", new), ("old", old), ("seed", seed)):
        if values.ndim != 2 or values.shape[1] != new.shape[1]:
            raise RaypipeError(
                f"{name} embeddings have shape {list(values.shape)}; expected 2 dimensions, as wide as the new ones"
            )
        if not np.isfinite(values).all():
            raise RaypipeError(f"{name} embeddings are not all finite")
    n, m = len(new), len(old)
    for count, what in (
        (n, "new samples"),
        (m, "old samples outside the seed set"),
        (len(seed), "seed samples"),
    ):
        if count < FEWEST:
            return Drift(n, m, note=f"only {count} {what}; at least {FEWEST} are needed")
    pooled = np.concatenate([new, old]).astype(np.float32)
    distance, _ = NeighbourIndex(seed.astype(np.float32)).search(pooled, NEIGHBOURS)
    far = distance.astype(np.float64).mean(1)
    farther, between = superiority(far[:n], far[n:])
    spread = float(far.std())
    columns = [_components(pooled), ((far - far.mean()) / (spread or 1.0))[:, None]]
    auc, auc_between = _cross_validated(np.concatenate(columns, 1), np.arange(n + m) < n)
    return Drift(n, m, auc, auc_between, farther, between)


def superiority(new: np.ndarray, old: np.ndarray) -> tuple[float, Interval]:
    """Probability that a value of `new`, float [n], is above one of `old`, float [m], ties counted half; and its 95 % interval."""
    return _estimate(*placements(new, old))


def placements(new: np.ndarray, old: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each new value the share of old ones below it, float64 [n]; of each old value the share of new ones above it, [m]."""

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        ordered = np.sort(others)
        return (
            np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
        ) / (2 * len(others))

    return below(new, old), 1 - below(old, new)


def _estimate(of_new: np.ndarray, of_old: np.ndarray) -> tuple[float, Interval]:
    theta = float(of_new.mean())
    error = math.sqrt(of_new.var(ddof=1) / len(of_new) + of_old.var(ddof=1) / len(of_old))
    # all apart has no variance, and still is no certainty
    error = max(error, 1 / (2 * NORMAL * min(len(of_new), len(of_old))))
    return theta, (max(0.0, theta - NORMAL * error), min(1.0, theta + NORMAL * error))


def _components(values: np.ndarray) -> np.ndarray:
    """The leading principal components of both sides together, at unit variance, and squares of the first, float64 [n + m, c]."""
    centred = values.astype(np.float64) - values.mean(0, dtype=np.float64)
    spread, directions = np.linalg.eigh(centred.T @ centred / len(centred))
    kept = [
        column
        for column in range(len(spread))[::-1][:COMPONENTS]
        if spread[column] > 1e-9 * max(spread[-1], 1e-300)
    ]
    found = centred @ directions[:, kept] / np.sqrt(spread[kept])
    return np.concatenate([found, found[:, :SQUARED] ** 2], 1)


def _cross_validated(features: np.ndarray, is_new: np.ndarray) -> tuple[float, Interval]:
    """AUC of a shrunken linear discriminant on the folds it was not fitted on, and its interval."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    fold, rng = np.empty(len(is_new), np.int64), np.random.default_rng(0)
    for side in (is_new, ~is_new):
        rows = np.flatnonzero(side)
        fold[rng.permutation(rows)] = np.arange(len(rows)) % FOLDS
    parts = []
    for number in range(FOLDS):
        held = fold == number
        # equal priors only move the threshold, which an AUC does not depend on
        model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
        model.fit(features[~held], is_new[~held])
        score = model.decision_function(features[held])
        parts.append(placements(score[is_new[held]], score[~is_new[held]]))
    return _estimate(
        np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    )


def label_drift(new: np.ndarray, old: np.ndarray) -> dict[str, Any]:
    """Drift of the class shares: new and old samples of each class, int64 [classes].

    total_variation  half the sum of the differences of the shares, 0 to 1; sampling alone makes it positive
    cramers_v        0 to 1, corrected for that (Bergsma, Journal of the Korean Statistical Society 42, 2013); None with one class
    n_new, n_old     labelled samples; too few (below FEWEST) give None for both
    """
    counts = np.stack([np.asarray(new, np.float64), np.asarray(old, np.float64)])
    totals = counts.sum(1)
    result: dict[str, Any] = {
        "n_new": int(totals[0]),
        "n_old": int(totals[1]),
        "total_variation": None,
        "cramers_v": None,
    }
    if totals.min() < FEWEST:
        return result
    share = counts / totals[:, None]
    result["total_variation"] = float(np.abs(share[0] - share[1]).sum() / 2)
    counts = counts[:, counts.sum(0) > 0]
    classes, total = counts.shape[1], totals.sum()
    if classes > 1:
        expected = totals[:, None] * counts.sum(0) / total
        square = float(((counts - expected) ** 2 / expected).sum()) / total
        corrected = max(0.0, square - (classes - 1) / (total - 1))
        rows, columns = 2 - 1 / (total - 1), classes - (classes - 1) ** 2 / (total - 1)
        result["cramers_v"] = min(1.0, math.sqrt(corrected / (min(rows, columns) - 1)))
    return result
