"""Gradient-boosted trees over what the scored neighbours say, in numbers, and the proxy's signals.

Source: histogram-based gradient boosting (Friedman 2001, "Greedy Function Approximation", algorithm 1; Ke et al. 2017, LightGBM, as
`sklearn.ensemble.HistGradientBoostingRegressor` has it). Features of a sample, over its k and its k / 4 nearest scored samples of
any class, and over those of its own class: mean score, mean weighted by exp(-(d - d_1) / (h D)), spread of the scores, distances to
the nearest and on average (D, the typical distance of the scored samples, is 1); the share of neighbours of its class; how much
nearer the own class is than any; loss, margin and entropy.

In the fit no sample is its own neighbour. The class itself is not a feature: together with the mean over all others of a small class
it would tell the one score that is left out. An unlabelled sample has no number (NaN) where classes are asked for; each split
knows which way such samples go.

Three ensembles, each on all scored samples but another tenth, with the number of trees that predicts these tenths best; the
prediction is their mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.extrapolators.features import Target
from raypipe.extrapolators.neighbours import ClassNeighbours
from raypipe.extrapolators.tree_arrays import Forest
from raypipe.progress import ProgressCallback

MEMBERS, FOLDS = 3, 10
BANDWIDTH = 0.2
FEATURES = 23
"""Without the signals."""
OPTIONS = {
    "learning_rate": 0.05,
    "max_iter": 200,
    "max_leaf_nodes": 8,
    "min_samples_leaf": 10,
    "l2_regularization": 1.0,
    "max_features": 0.5,
    "early_stopping": False,
}


class NeighbourStatistics:
    """The features above, from scored samples: their neighbours by class, class int64 [n], score float [n], and D."""

    def __init__(
        self, classes: ClassNeighbours, label: np.ndarray, score: np.ndarray, typical: float
    ) -> None:
        self._classes, self._label, self._score, self._typical = classes, label, score, typical

    def __call__(
        self, nodes: Nodes, distance: np.ndarray, row: np.ndarray, exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """Features float64 [m, f] of samples with their k nearest of any class (`NeighbourIndex.search`), both [m, k].

        `exclude`, int64 [m]: their own rows, where they are themselves scored.
        """
        count = distance.shape[1]
        same, same_row = self._classes.search(nodes.embedding, nodes.label, count, exclude)
        agree = np.where(
            nodes.label[:, None] >= 0, self._label[row] == nodes.label[:, None], np.nan
        )
        few = max(1, count // 4)
        columns = [
            self._statistics(away[:, :k], near[:, :k])
            for away, near in ((distance, row), (same, same_row))
            for k in (few, count)
        ]
        nearer = columns[2][:, 3] - columns[0][:, 3]
        shares = [_mean(agree[:, :k], np.ones_like(agree[:, :k])) for k in (few, count)]
        signals = np.where(np.isfinite(nodes.signals), nodes.signals, np.nan)
        return np.column_stack([*columns, nearer, *shares, signals])

    def _statistics(self, distance: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Of each sample's neighbours, those at infinite distance left out: mean, weighted mean and spread of the scores, least and
        mean distance, float64 [m, 5]; not a number where there are none."""
        there, score = np.isfinite(distance), self._score[row]
        away = np.where(there, distance, 0) / self._typical
        least = np.where(there.any(1), np.where(there, away, np.inf).min(1, initial=np.inf), np.nan)
        mean = _mean(score, there)
        weight = there * np.exp(-(away - np.nan_to_num(least)[:, None]) / BANDWIDTH)
        spread = np.sqrt(_mean(np.square(score - np.nan_to_num(mean)[:, None]), there))
        return np.stack([mean, _mean(score, weight), spread, least, _mean(away, there)], 1)


def _mean(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Weighted mean of each row, float64 [m]; not a number where the weights are 0."""
    total = weight.sum(1).astype(np.float64)
    return np.divide(
        (value * weight).sum(1), total, out=np.full(len(value), np.nan), where=total > 0
    )


class Trees(Extrapolator):
    """Boosted trees over neighbour statistics and signals."""

    name = "trees"
    default_neighbours = 20
    fewest = 20

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises RaypipeError for fewer than 20 samples, scores or embeddings that are not finite, labels out of range.
        """
        score = self._check_fit(seed, score)
        self._build_index(seed.embedding, seed.label)
        self._target, z = Target.fit(score)
        self._label, self._z, self._width = seed.label, z, seed.signals.shape[1]
        self._forests: list[Forest] = []
        self._prepare()
        if self._target.spread:
            own = np.arange(len(seed))
            x = self._statistics(
                seed, *self._scored.search(seed.embedding, self.neighbours, own), own
            )
            order = np.random.default_rng(self.settings.seed).permutation(len(seed))
            held = [order[member::FOLDS] for member in range(MEMBERS)]
            self._forests = grow(x, z, held, self.settings.seed, progress)
        elif progress is not None:
            progress(1, 1)

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        return self._predict(nodes, *self._nearest(nodes))

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        distance, near = self._nearest(nodes)
        return self._predict(nodes, distance, near), self._remoteness(distance)

    def _predict(self, nodes: Nodes, distance: np.ndarray, near: np.ndarray) -> np.ndarray:
        if nodes.signals.shape[1] != self._width:
            raise RaypipeError(
                f"{self.name}: {nodes.signals.shape[1]} signals for each sample, but the fit had {self._width}"
            )
        if not self._forests:
            return np.full(len(nodes), self._target.mean, np.float32)
        x = self._statistics(nodes, distance, near)
        return self._target.restore(np.mean([forest.predict(x) for forest in self._forests], 0))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {"label": self._label, "score": self._z}
        for number, forest in enumerate(self._forests):
            tensors |= {f"forest{number}.{name}": value for name, value in forest.tensors().items()}
        meta |= {"mean": self._target.mean, "spread": self._target.spread, "signals": self._width}
        return tensors, meta | {"forests": len(self._forests)}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._target, self._width = (
                Target(float(meta["mean"]), float(meta["spread"])),
                int(meta["signals"]),
            )
            self._label, self._z = np.array(tensors["label"]), np.array(tensors["score"])
            self._prepare()
            width = FEATURES + self._width
            self._forests = [
                Forest.from_tensors(tensors, f"forest{number}.", width)
                for number in range(int(meta["forests"]))
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RaypipeError(
                f"{self.name}: the fitted extrapolator is damaged ({error}); fit it again"
            ) from None

    def _prepare(self) -> None:
        self._statistics = NeighbourStatistics(self._of_class, self._label, self._z, self._typical)


def grow(
    x: np.ndarray,
    z: np.ndarray,
    held: list[np.ndarray],
    seed: int,
    progress: ProgressCallback | None = None,
) -> list[Forest]:
    """For each of `held`, int64 [m], boosted trees fitted on all other rows of x float [n, f], with as many trees as predict the
    held rows best, the same number for all."""
    x = np.where(np.isnan(x).all(0), 0, x)  # scikit-learn cannot bin a feature without any number
    models, errors = [], []
    for member, left in enumerate(held):
        rows = np.setdiff1d(np.arange(len(z)), left)
        models.append(
            HistGradientBoostingRegressor(random_state=seed + member, **OPTIONS).fit(
                x[rows], z[rows]
            )
        )
        errors.append(
            [np.square(guess - z[left]).sum() for guess in models[-1].staged_predict(x[left])]
        )
        if progress is not None:
            progress(member + 1, len(held))
    count = int(np.sum(errors, 0).argmin()) + 1
    return [Forest.of(model, count) for model in models]
