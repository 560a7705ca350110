"""Nearest neighbours that know classes: a weighted mean of scored neighbours, shrunk to the mean of the class.

    score(x) = (sum_i w_i s_i + c m_y) / (sum_i w_i + c) ,   w_i = exp(-(d_i - d_1) / (h D)) * (1 if y_i = y else r)

over the k nearest scored samples of the same class and those of the k nearest of any class that are of another; d_1 is the smallest
distance, D the typical one of the scored samples, m_y the mean score of the class (drawn to the mean of all by one sample's weight).
k, bandwidth h, weight r of other classes and shrinkage c minimise the squared error of leave-one-out predictions of the scored
samples. For a sample without a label every neighbour has weight factor 1, and m_y is the mean of all.

Source: the published kNN (arXiv 2506.09010, see `knn_published`) with a kernel-weighted mean (Nadaraya 1964, Watson 1964) whose
constants are chosen by cross-validation instead of by the scores of the unscored samples; neighbours' labels carry much of what the
published one misses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback

NEIGHBOURS = (5, 10, 20, 40)
BANDWIDTHS = (0.05, 0.1, 0.2, 0.5, 2.0)
OTHERS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SHRINKAGES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
CHOICE_ROWS = 4000
"""Scored samples that the constants are chosen on; more would cost quadratic time and change little."""
TINY = 1e-9
"""Least weight of the class mean: it decides where no neighbour has any."""


@dataclass(frozen=True)
class Constants:
    """k, h, r and c above."""

    neighbours: int
    bandwidth: float
    others: float
    shrinkage: float


@dataclass(frozen=True)
class _Found:
    """Neighbours of n samples: distances [n, k] (infinite: none) and scores [n, k] within and outside the class, and m_y [n]."""

    same: np.ndarray
    same_score: np.ndarray
    other: np.ndarray
    other_score: np.ndarray
    labelled: np.ndarray
    mean: np.ndarray


class Knn(Extrapolator):
    """Nearest scored neighbours, weighted by distance and class; the constants come from leave-one-out."""

    name = "knn"
    default_neighbours = 20
    fewest = 2

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Index the seed set and choose the constants; `settings.neighbours` fixes k. Raises RaypipeError for scores or embeddings
        that are not finite, or fewer than two samples."""
        self._score = self._check_fit(seed, score)
        self._label = seed.label
        sizes = NEIGHBOURS if self.settings.neighbours == "auto" else (self.neighbours,)
        self._build_index(seed.embedding, seed.label, max(sizes))
        rows = np.random.default_rng(self.settings.seed).permutation(len(seed))[:CHOICE_ROWS]
        found = self._find(seed.take(rows), max(sizes), exclude=rows)
        best = np.inf
        grid = list(itertools.product(sizes, BANDWIDTHS))
        for done, (neighbours, bandwidth) in enumerate(grid):
            sums = _sums(found, neighbours, bandwidth * self._typical)
            for others, shrinkage in itertools.product(OTHERS, SHRINKAGES):
                error = float(
                    np.square(_mean(found, sums, others, shrinkage) - self._score[rows]).mean()
                )
                if error < best:
                    best, self._constants = (
                        error,
                        Constants(neighbours, bandwidth, others, shrinkage),
                    )
            if progress is not None:
                progress(done + 1, len(grid))

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        chosen = self._constants
        found = self._find(nodes, chosen.neighbours)
        sums = _sums(found, chosen.neighbours, chosen.bandwidth * self._typical)
        return _mean(found, sums, chosen.others, chosen.shrinkage).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        return {**tensors, "score": self._score, "label": self._label}, meta | {
            "constants": vars(self._constants)
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._score, self._label = (
                np.array(tensors["score"], np.float64),
                np.array(tensors["label"], np.int64),
            )
            given = meta["constants"]
            self._constants = Constants(
                int(given["neighbours"]),
                float(given["bandwidth"]),
                float(given["others"]),
                float(given["shrinkage"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None
        if len(self._score) != len(self._scored):
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged: scores do not match the index; fit it again"
            )

    def _find(self, nodes: Nodes, k: int, exclude: np.ndarray | None = None) -> _Found:
        same, row = self._of_class.search(nodes.embedding, nodes.label, k, exclude)
        other, other_row = self._scored.search(nodes.embedding, k, exclude)
        labelled = nodes.label >= 0
        other[(self._label[other_row] == nodes.label[:, None]) & labelled[:, None]] = (
            np.inf
        )  # these are among `same`
        # -1 picks the last score, which infinite distance weighs with 0
        return _Found(
            same,
            self._score[row],
            other,
            self._score[other_row],
            labelled,
            self._class_mean(nodes.label, exclude),
        )

    def _class_mean(self, label: np.ndarray, exclude: np.ndarray | None) -> np.ndarray:
        """m_y of each sample, float64 [m], without the score of row `exclude`."""
        size = np.bincount(self._label + 1, minlength=self.num_classes + 1).astype(np.float64)
        total = np.bincount(self._label + 1, self._score, minlength=self.num_classes + 1)
        size[0] = total[0] = 0  # samples without a label are no class
        own = self._score[exclude] if exclude is not None else np.zeros(len(label))
        left = exclude is not None
        everything = (self._score.sum() - own) / (len(self._score) - left)
        inside = left & (label >= 0)
        return (total[label + 1] - own * inside + everything) / (size[label + 1] - inside + 1)


def _sums(found: _Found, neighbours: int, width: float) -> tuple[np.ndarray, ...]:
    """Sums of weights, and of weights times scores, float64 [n]: within the class, then outside."""
    same, other = found.same[:, :neighbours], found.other[:, :neighbours]
    first = np.minimum(same[:, :1], other.min(1, keepdims=True, initial=np.inf))
    first = np.where(np.isfinite(first), first, 0).astype(np.float64)
    result = []
    for distance, score in ((same, found.same_score), (other, found.other_score)):
        weight = np.exp((first - distance) / width)
        result += [weight.sum(1), (weight * score[:, :neighbours]).sum(1)]
    return tuple(result)


def _mean(
    found: _Found, sums: tuple[np.ndarray, ...], others: float, shrinkage: float
) -> np.ndarray:
    """The weighted mean, float64 [n]."""
    same, same_score, other, other_score = sums
    factor = np.where(found.labelled, others, 1.0)
    shrinkage = max(shrinkage, TINY)
    return (same_score + factor * other_score + shrinkage * found.mean) / (
        same + factor * other + shrinkage
    )
