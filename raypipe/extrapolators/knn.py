"""Class-aware nearest neighbours: a weighted mean of scored neighbours, shrunk to the class mean.

    score(x) = (sum_i w_i s_i + c m_y) / (sum_i w_i + c)
    w_i = exp(-(d_i - d_1) / (h D)) * (1 if y_i = y else r)

The sum runs over the k nearest scored samples of the same class, and over those of the k nearest of
any class that belong to another class. d_1 is the smallest distance, D the typical distance of the
scored samples, m_y the mean score of the class (shrunk to the mean of all with the weight of one
sample). The number of neighbours k, the bandwidth h, the weight r of other classes and the
shrinkage c minimise the squared error of leave-one-out predictions of the scored samples. For a
sample without a label every neighbour has the factor 1, and m_y is the mean of all.

This is the published kNN (arXiv 2506.09010, see `published.knn`) as a kernel-weighted mean
(Nadaraya 1964, Watson 1964) whose constants are chosen by cross-validation instead of by the scores
of the unscored samples. The labels of the neighbours carry much of what the published method
misses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.progress import ProgressCallback

NEIGHBOURS = (5, 10, 20, 40)
"""Candidates for k."""
BANDWIDTHS = (0.05, 0.1, 0.2, 0.5, 2.0)
"""Candidates for h."""
OTHER_WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates for r."""
SHRINKAGES = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Candidates for c."""
CHOICE_ROWS = 4000
"""Scored samples on which the constants are chosen. More would cost quadratic time and change
little."""
MIN_SHRINKAGE = 1e-9
"""Minimum weight of the class mean, which is the prediction if no neighbour has any weight."""


@dataclass(frozen=True)
class KnnConstants:
    """The constants k, h, r and c of the formula."""

    neighbours: int
    bandwidth: float
    others: float
    shrinkage: float


@dataclass(frozen=True)
class _ScoredNeighbours:
    """Scored neighbours of n samples.

    Attributes
    ----------
    same, other
        Distances to neighbours of the same and of another class, [n, k]; infinite for none.
    same_score, other_score
        Scores of these neighbours, [n, k].
    labelled
        Whether a sample has a label, bool [n].
    class_mean
        m_y, float64 [n].
    """

    same: np.ndarray
    same_score: np.ndarray
    other: np.ndarray
    other_score: np.ndarray
    labelled: np.ndarray
    class_mean: np.ndarray

    def sums(self, count: int, width: float) -> _Sums:
        """Sum over the `count` nearest, with distances in units of `width`, which is h D."""
        same, other = self.same[:, :count], self.other[:, :count]
        nearest = np.minimum(same[:, :1], other.min(1, keepdims=True, initial=np.inf))
        nearest = np.where(np.isfinite(nearest), nearest, 0).astype(np.float64)
        same_weight = np.exp((nearest - same) / width)
        other_weight = np.exp((nearest - other) / width)
        return _Sums(
            same_weight.sum(1),
            (same_weight * self.same_score[:, :count]).sum(1),
            other_weight.sum(1),
            (other_weight * self.other_score[:, :count]).sum(1),
        )

    def mean(self, sums: _Sums, other_weight: float, shrinkage: float) -> np.ndarray:
        """Return the shrunken weighted mean, float64 [n]."""
        factor = np.where(self.labelled, other_weight, 1.0)
        shrinkage = max(shrinkage, MIN_SHRINKAGE)
        score = sums.same_score + factor * sums.other_score + shrinkage * self.class_mean
        return score / (sums.same_weight + factor * sums.other_weight + shrinkage)


class _Sums(NamedTuple):
    """Sums of weights and of weights times scores, each float64 [n]."""

    same_weight: np.ndarray
    same_score: np.ndarray
    other_weight: np.ndarray
    other_score: np.ndarray


class Knn(Extrapolator):
    """Scored neighbours weighted by distance and class, with constants from leave-one-out."""

    name = "knn"
    default_neighbours = 20
    min_samples = 2

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Index the seed set and choose the constants; `settings.neighbours` can fix k.

        Raises
        ------
        RaypipeError
            There are fewer than two samples, or scores or embeddings are not finite.
        """
        self._score = self._check_fit(seed, score)
        self._label = seed.label
        counts = NEIGHBOURS if self.settings.neighbours == "auto" else (self.neighbours,)
        self._build_index(seed.embedding, seed.label, max(counts))
        rows = np.random.default_rng(self.settings.seed).permutation(len(seed))[:CHOICE_ROWS]
        scored = self._scored_neighbours(seed.take(rows), max(counts), exclude=rows)
        best_error = np.inf
        grid = list(itertools.product(counts, BANDWIDTHS))
        for done, (count, bandwidth) in enumerate(grid):
            sums = scored.sums(count, bandwidth * self._typical)
            for other_weight, shrinkage in itertools.product(OTHER_WEIGHTS, SHRINKAGES):
                predicted = scored.mean(sums, other_weight, shrinkage)
                error = float(np.square(predicted - self._score[rows]).mean())
                if error < best_error:
                    best_error = error
                    self._constants = KnnConstants(count, bandwidth, other_weight, shrinkage)
            if progress is not None:
                progress(done + 1, len(grid))

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        constants = self._constants
        scored = self._scored_neighbours(nodes, constants.neighbours)
        sums = scored.sums(constants.neighbours, constants.bandwidth * self._typical)
        return scored.mean(sums, constants.others, constants.shrinkage).astype(np.float32)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        return {**tensors, "score": self._score, "label": self._label}, meta | {
            "constants": vars(self._constants)
        }

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._score = np.array(tensors["score"], np.float64)
            self._label = np.array(tensors["label"], np.int64)
            constants = meta["constants"]
            self._constants = KnnConstants(
                int(constants["neighbours"]),
                float(constants["bandwidth"]),
                float(constants["others"]),
                float(constants["shrinkage"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from None
        if len(self._score) != len(self._scored):
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged: "
                "scores do not match the index; fit it again"
            )

    def _scored_neighbours(
        self, nodes: Nodes, k: int, exclude: np.ndarray | None = None
    ) -> _ScoredNeighbours:
        """Find the k nearest of each kind; `exclude` holds the own rows of scored samples."""
        same, same_row = self._of_class.search(nodes.embedding, nodes.label, k, exclude)
        other, other_row = self._scored.search(nodes.embedding, k, exclude)
        labelled = nodes.label >= 0
        # neighbours of the same class are in `same`
        other[(self._label[other_row] == nodes.label[:, None]) & labelled[:, None]] = np.inf
        # row -1 picks the last score, but its infinite distance gives it the weight 0
        return _ScoredNeighbours(
            same,
            self._score[same_row],
            other,
            self._score[other_row],
            labelled,
            self._class_mean(nodes.label, exclude),
        )

    def _class_mean(self, label: np.ndarray, exclude: np.ndarray | None) -> np.ndarray:
        """Return m_y of each sample, float64 [m], without the score of row `exclude`."""
        size = np.bincount(self._label + 1, minlength=self.num_classes + 1).astype(np.float64)
        total = np.bincount(self._label + 1, self._score, minlength=self.num_classes + 1)
        size[0] = total[0] = 0  # samples without a label are no class
        leave_out = exclude is not None
        own = self._score[exclude] if leave_out else np.zeros(len(label))
        overall_mean = (self._score.sum() - own) / (len(self._score) - leave_out)
        in_class = leave_out & (label >= 0)
        class_total = total[label + 1] - own * in_class + overall_mean
        return class_total / (size[label + 1] - in_class + 1)
