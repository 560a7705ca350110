"""Gradient-boosted trees over statistics of the scored neighbours and the proxy statistics.

Histogram-based gradient boosting (Friedman 2001, "Greedy Function Approximation", algorithm 1; Ke
et al. 2017, LightGBM), in the form of `sklearn.ensemble.HistGradientBoostingRegressor`.

The features of a sample describe its k and its k / 4 nearest scored samples of any class, and those
of its own class: mean score, mean score weighted by exp(-(d - d_1) / (h D)), spread of the scores,
least and mean distance, where the unit D is the typical distance of the scored samples. Further
features are the share of neighbours of its class, how much nearer its own class is than any class,
and loss, margin and entropy.

During the fit no sample is its own neighbour. The class itself is not a feature: together with the
mean over all others of a small class it would reveal the one score that is left out. For an
unlabelled sample the features that involve classes are NaN; each split learns which way such
samples go.

The prediction is the mean of three ensembles. Each is fitted on all scored samples except another
tenth, and has the number of trees that predicts these tenths best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import Extrapolator, Nodes
from raypipe.extrapolators.features import Bounds, Target
from raypipe.extrapolators.neighbours import ClassNeighbours, Neighbours
from raypipe.extrapolators.tree_arrays import Forest
from raypipe.progress import ProgressCallback

MEMBERS, FOLDS = 3, 10
"""Ensembles, and the parts of the seed set of which each leaves out another one."""
BANDWIDTH = 0.2
"""h in the weights of the neighbours."""
FEATURES = 23
"""Number of features without the signals."""
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
    """Computes the features above.

    Parameters
    ----------
    classes
        The scored samples, indexed by class.
    label, score
        Their classes, int64 [n], and scores, float [n].
    typical
        D, their typical distance to the nearest.
    """

    def __init__(
        self, classes: ClassNeighbours, label: np.ndarray, score: np.ndarray, typical: float
    ) -> None:
        self._classes, self._label, self._score, self._typical = classes, label, score, typical

    def __call__(
        self, nodes: Nodes, distance: np.ndarray, row: np.ndarray, exclude: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the features of m samples, float64 [m, f].

        Parameters
        ----------
        nodes
            The samples.
        distance, row
            Their k nearest scored samples of any class, as in `Neighbours`, both [m, k].
        exclude
            Their own rows if they are themselves scored, int64 [m].
        """
        count = distance.shape[1]
        any_class = Neighbours(distance, row)
        own_class = self._classes.search(nodes.embedding, nodes.label, count, exclude)
        counts = (max(1, count // 4), count)
        columns = [
            self._statistics(nearest.distance[:, :k], nearest.row[:, :k])
            for nearest in (any_class, own_class)
            for k in counts
        ]
        least = 3  # column of the least distance
        nearer = columns[2][:, least] - columns[0][:, least]
        same_class = np.where(
            nodes.label[:, None] >= 0, self._label[row] == nodes.label[:, None], np.nan
        )
        shares = [
            _weighted_mean(same_class[:, :k], np.ones_like(same_class[:, :k])) for k in counts
        ]
        signals = np.where(np.isfinite(nodes.signals), nodes.signals, np.nan)
        return np.column_stack([*columns, nearer, *shares, signals])

    def _statistics(self, distance: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Summarise the neighbours of each sample, leaving out those at infinite distance.

        Returns
        -------
        np.ndarray
            Mean, weighted mean and spread of their scores, least and mean distance, float64 [m, 5];
            NaN for a sample without neighbours.
        """
        valid, score = np.isfinite(distance), self._score[row]
        scaled = np.where(valid, distance, 0) / self._typical
        least = np.where(valid, scaled, np.inf).min(1, initial=np.inf)
        least = np.where(valid.any(1), least, np.nan)
        mean = _weighted_mean(score, valid)
        weight = valid * np.exp(-(scaled - np.nan_to_num(least)[:, None]) / BANDWIDTH)
        deviation = score - np.nan_to_num(mean)[:, None]
        spread = np.sqrt(_weighted_mean(np.square(deviation), valid))
        weighted = _weighted_mean(score, weight)
        return np.stack([mean, weighted, spread, least, _weighted_mean(scaled, valid)], 1)


def _weighted_mean(value: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the weighted mean of each row, float64 [m]; NaN where all weights are 0."""
    total = weight.sum(1).astype(np.float64)
    return np.divide(
        (value * weight).sum(1), total, out=np.full(len(value), np.nan), where=total > 0
    )


class Trees(Extrapolator):
    """Boosted trees over neighbour statistics and proxy statistics."""

    name = "trees"
    default_neighbours = 20
    min_samples = 20

    def fit(self, seed: Nodes, score: np.ndarray, progress: ProgressCallback | None = None) -> None:
        """Learn from the seed set and its measured scores, float [n].

        Raises
        ------
        RaypipeError
            There are fewer than 20 samples, scores or embeddings are not finite, or labels are out
            of range.
        """
        score = self._check_fit(seed, score)
        self._build_index(seed.embedding, seed.label)
        self._target, z = Target.fit(score)
        self._bounds = Bounds.fit(self._target.unscaled(z))
        self._label, self._z, self._width = seed.label, z, seed.signals.shape[1]
        self._forests: list[Forest] = []
        self._statistics = self._neighbour_statistics()
        if self._target.spread:
            own = np.arange(len(seed))
            nearest = self._scored.search(seed.embedding, self.neighbours, own)
            x = self._statistics(seed, *nearest, own)
            order = np.random.default_rng(self.settings.seed).permutation(len(seed))
            folds = [order[member::FOLDS] for member in range(MEMBERS)]
            self._forests = grow(x, z, folds, self.settings.seed, progress)
        elif progress is not None:
            progress(1, 1)

    def predict(self, nodes: Nodes) -> np.ndarray:
        self._check_nodes(nodes)
        return self._predict(nodes, self._nearest(nodes))

    def predict_with_difficulty(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        nearest = self._nearest(nodes)
        return self._predict(nodes, nearest), self._remoteness(nearest.distance)

    def doubt(self, nodes: Nodes) -> np.ndarray:
        return self.predict_with_doubt(nodes)[1]

    def predict_with_doubt(self, nodes: Nodes) -> tuple[np.ndarray, np.ndarray]:
        self._check_nodes(nodes)
        nearest = self._nearest(nodes)
        members = self._member_predictions(nodes, nearest)
        doubt = self._doubts(nodes, self._remoteness(nearest.distance), disagreement=members.std(0))
        return self._bounds(self._target.unscaled(members.mean(0))), doubt

    def _predict(self, nodes: Nodes, nearest: Neighbours) -> np.ndarray:
        members = self._member_predictions(nodes, nearest)
        return self._bounds(self._target.unscaled(members.mean(0)))

    def _member_predictions(self, nodes: Nodes, nearest: Neighbours) -> np.ndarray:
        """Return the predictions of the ensembles in standard units, float64 [members, n]."""
        if nodes.signals.shape[1] != self._width:
            raise RaypipeError(
                f"{self.name}: {nodes.signals.shape[1]} signals for each sample, "
                f"but the fit had {self._width}"
            )
        if not self._forests:
            return np.zeros((1, len(nodes)))
        x = self._statistics(nodes, *nearest)
        return np.stack([forest.predict(x) for forest in self._forests])

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, meta = self._base_state()
        tensors |= {"label": self._label, "score": self._z}
        for number, forest in enumerate(self._forests):
            tensors |= {f"forest{number}.{name}": value for name, value in forest.tensors().items()}
        meta |= {"mean": self._target.mean, "spread": self._target.spread, "signals": self._width}
        meta |= {"bounds": self._bounds.state()}
        return tensors, meta | {"forests": len(self._forests)}

    def load_state(self, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        self._load_base(tensors, meta, classes=True)
        try:
            self._target = Target(float(meta["mean"]), float(meta["spread"]))
            self._bounds = Bounds.from_meta(meta)
            self._width = int(meta["signals"])
            self._label, self._z = np.array(tensors["label"]), np.array(tensors["score"])
            self._statistics = self._neighbour_statistics()
            width = FEATURES + self._width
            self._forests = [
                Forest.from_tensors(tensors, f"forest{number}.", width)
                for number in range(int(meta["forests"]))
            ]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise self._damaged(error) from None

    def _neighbour_statistics(self) -> NeighbourStatistics:
        return NeighbourStatistics(self._of_class, self._label, self._z, self._typical)


def grow(
    x: np.ndarray,
    z: np.ndarray,
    folds: list[np.ndarray],
    seed: int,
    progress: ProgressCallback | None = None,
) -> list[Forest]:
    """Fit one ensemble of boosted trees for each fold, on all rows outside it.

    All ensembles get the same number of trees: the one that predicts the held-out folds best.

    Parameters
    ----------
    x
        Features, float [n, f].
    z
        Scores, float [n].
    folds
        Held-out rows of each ensemble, int64 [m].
    seed
        Of the first ensemble; each further one adds 1.
    progress
        Called after each ensemble.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor  # 0.6 s, and other methods need none

    x = np.where(
        np.isnan(x).all(0), 0, x
    )  # scikit-learn cannot bin a feature that is NaN throughout
    models, errors = [], []
    for member, held in enumerate(folds):
        rows = np.setdiff1d(np.arange(len(z)), held)
        model = HistGradientBoostingRegressor(random_state=seed + member, **OPTIONS)
        models.append(model.fit(x[rows], z[rows]))
        errors.append(
            [np.square(predicted - z[held]).sum() for predicted in model.staged_predict(x[held])]
        )
        if progress is not None:
            progress(member + 1, len(folds))
    count = int(np.sum(errors, 0).argmin()) + 1
    return [Forest.of(model, count) for model in models]
