"""Rehearsal: learning from half of the seed set what a fit on the seed set cannot know.

A trajectory score (EL2N, TDDS, ...) tells how training on a sample went, so that it is measured only on samples that were trained on. What
the proxy says of these is not what it says of others: their losses are lower, and what a low loss means for the score is another thing. Nor
is the score that a training on few samples gives what a training on all would give. Both are shifts between the seed set, which an
extrapolator learns from, and the samples that it is applied to, and nothing within the seed set shows them.

So the whole is rehearsed in small. A second proxy is trained on a random half of the seed set only. The other half stands to it as all other samples
stand to the seed set: it was not trained on, and its scores are known from a training on a set twice as large. An extrapolator is
fitted on the first half, and a map from its opinions and the second proxy's signals to these scores is learned on the other half:

    order(x) = sum_j w_j * rank_j(x) ,    score(x) = m(order(x))

rank_j, normal score of the rank of input j; w, ridge regression on the normal scores of the scores; m, centred isotonic regression. The
map is then applied to the extrapolator that was fitted on the whole seed set, and to the signals of the proxy. This is stacked
regression (Wolpert 1992) with level-one data from cross-fitting (Chernozhukov et al. 2018, section 3), of one fold, in which the
networks as well as the fits are held apart.

What it predicts of the other half, each fifth of it by a map that was learned on the rest, is also the honest figure of fidelity for such
scores: on samples that the proxy was not trained on, though from half the seed set, and to a set twice as large instead of the whole source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.extrapolate.base import Nodes, Progress
from raypipe.extrapolate.features import NormalScores
from raypipe.extrapolate.fidelity import Predictions, simpler_predictions, split
from raypipe.extrapolate.proxy import NUMBERS, Monotone

if TYPE_CHECKING:
    from raypipe.extrapolate.gnn import AnchorGnn

RIDGE_ROWS = 10.0
"""Rows' worth of pull of the weights to 0."""
FOLDS = 5


@dataclass(frozen=True)
class Rehearsal:
    """The seed set in two halves, both as the proxy of the first sees them.

    known, score     the first half; its scores in that proxy's training, float [m]
    nodes, measured  the other; its scores in the training on the whole seed set, float [n]
    """

    known: Nodes
    score: np.ndarray
    nodes: Nodes
    measured: np.ndarray


@dataclass(frozen=True)
class Transfer:
    """The map from inputs, float [n, c], to scores.

    ranks    of the inputs
    weights  float64 [c]
    mean     of the scores that it was learned on, where there is no order in them
    rising   the map of the order to the score; None where there is none
    """

    ranks: NormalScores
    weights: np.ndarray
    mean: float
    rising: Monotone | None

    @classmethod
    def fit(cls, inputs: np.ndarray, score: np.ndarray) -> Transfer:
        """From float [n, c] and float [n]; an input that is not finite says nothing."""
        score = np.asarray(score, np.float64)
        ranks = NormalScores.fit(inputs)
        x = ranks(inputs).astype(np.float64)
        y = NormalScores.fit(score[:, None])(score[:, None])[:, 0].astype(np.float64)
        weights = np.linalg.solve(x.T @ x + RIDGE_ROWS * np.eye(x.shape[1]), x.T @ y)
        return cls(ranks, weights, float(score.mean()), Monotone.fit(x @ weights, score))

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Scores, float64 [n]; each depends on its own row alone."""
        if self.rising is None:
            return np.full(len(inputs), self.mean)
        # summed column by column: a matrix product may round a row differently beside other rows
        order = np.zeros(len(inputs))
        for column, weight in zip(self.ranks(inputs).T, self.weights):
            order += weight * column.astype(np.float64)
        return self.rising(order)

    def tensors(self) -> dict[str, np.ndarray]:
        result = {"knots": self.ranks.knots, "weights": self.weights, "mean": np.array([self.mean])}
        if self.rising is not None:
            numbers = np.array([getattr(self.rising, name) for name in NUMBERS])
            result |= {"x": self.rising.x, "y": self.rising.y, "numbers": numbers}
        return result

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> Transfer:
        """Restore what `tensors` gave. Raises KeyError for one that is missing."""
        rising = None
        if "x" in tensors:
            rising = Monotone(np.array(tensors["x"]), np.array(tensors["y"]), *np.array(tensors["numbers"]).tolist())
        mean = float(tensors["mean"][0])
        return cls(NormalScores(np.array(tensors["knots"])), np.array(tensors["weights"]), mean, rising)


def rehearse(
    make: Callable[[], AnchorGnn], rehearsal: Rehearsal, seed: int, progress: Progress | None = None
) -> tuple[Transfer, Predictions]:
    """The map learned in a rehearsal, and what is predicted of the other half without looking at the scores of the fifth that is predicted.

    make  an extrapolator, not fitted yet;  seed  of the division in fifths
    Raises RaypipeError where the fit on the first half does.
    """
    model, measured = make(), np.asarray(rehearsal.measured, np.float64)
    model.fit(rehearsal.known, np.asarray(rehearsal.score, np.float64), progress)
    inputs, difficulty = model.opinions(rehearsal.nodes)
    predicted = np.empty(len(measured))
    for held in split(len(measured), 1 / FOLDS, FOLDS, seed):
        kept = np.setdiff1d(np.arange(len(measured)), held)
        predicted[held] = Transfer.fit(inputs[kept], measured[kept])(inputs[held])
    baselines = simpler_predictions(rehearsal.known, np.asarray(rehearsal.score, np.float64), rehearsal.nodes, model)
    found = Predictions(rehearsal.nodes.label, measured, predicted, difficulty, baselines, n_fit=len(rehearsal.known))
    return Transfer.fit(inputs, measured), found
