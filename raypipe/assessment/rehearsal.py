"""Rehearsal: learning from half of the seed set what a fit on the seed set cannot know.

A trajectory score (EL2N, TDDS, ...) tells how training on a sample went, so that it is measured only on samples that were trained on. What
the proxy says of these is not what it says of others: their losses are lower, and what a low loss means for the score is another thing. Nor
is the score that a training on few samples gives what a training on all would give. Both are shifts between the seed set, which an
extrapolator learns from, and the samples that it is applied to, and nothing within the seed set shows them.

So the whole is rehearsed in small. A second proxy is trained on a random half of the seed set only. The other half stands to it as all other samples
stand to the seed set: it was not trained on, and its scores are known from a training on a set twice as large. An extrapolator is
fitted on the first half, and a map from its expert_predictions and the second proxy's signals to these scores is learned on the other half:

    order(x) = sum_j w_j * rank_j(x) ,    score(x) = m(order(x))

rank_j, normal score of the rank of input j; w, ridge regression on the normal scores of the scores; m, centred isotonic regression. The
map is then applied to the extrapolator that was fitted on the whole seed set, and to the signals of the proxy. This is stacked
regression (Wolpert 1992) with level-one data from cross-fitting (Chernozhukov et al. 2018, section 3), of one fold, in which the
networks as well as the fits are held apart.

What it predicts of the other half, each fifth of it by a map that was learned on the rest, is also the honest figure of fidelity for such
scores: on samples that the proxy was not trained on, though from half the seed set, and to a set twice as large instead of the whole source.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.assessment.fidelity import HeldOutPredictions, simpler_predictions, split
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.transfer import Transfer
from raypipe.progress import ProgressCallback

if TYPE_CHECKING:
    from raypipe.extrapolators.blend import AnchorGnn


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


def rehearse(
    make: Callable[[], AnchorGnn],
    rehearsal: Rehearsal,
    seed: int,
    progress: ProgressCallback | None = None,
) -> tuple[Transfer, HeldOutPredictions]:
    """The map learned in a rehearsal, and what is predicted of the other half without looking at the scores of the fifth that is predicted.

    make  an extrapolator, not fitted yet;  seed  of the division in fifths
    Raises RaypipeError where the fit on the first half does.
    """
    model, measured = make(), np.asarray(rehearsal.measured, np.float64)
    model.fit(rehearsal.known, np.asarray(rehearsal.score, np.float64), progress)
    inputs, difficulty = model.expert_predictions(rehearsal.nodes)
    predicted = np.empty(len(measured))
    for held in split(len(measured), 1 / FOLDS, FOLDS, seed):
        kept = np.setdiff1d(np.arange(len(measured)), held)
        predicted[held] = Transfer.fit(inputs[kept], measured[kept])(inputs[held])
    baselines = simpler_predictions(
        rehearsal.known, np.asarray(rehearsal.score, np.float64), rehearsal.nodes, model
    )
    found = HeldOutPredictions(
        rehearsal.nodes.label,
        measured,
        predicted,
        difficulty,
        baselines,
        n_fit=len(rehearsal.known),
    )
    return Transfer.fit(inputs, measured), found
