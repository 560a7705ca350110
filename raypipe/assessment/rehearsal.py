"""Rehearsal: learn from half of the seed set what a fit on the seed set cannot show.

A trajectory score (EL2N, TDDS, ...) describes how training on a sample went, so it is measured only
on samples that were trained on. What the proxy reports about these differs from what it reports
about others: their losses are lower, and a low loss means something else for the score. Moreover,
the score from a training on few samples is not the score from a training on all. Both are shifts
between the seed set, from which an extrapolator learns, and the samples to which it is applied.
Nothing within the seed set shows them.

A rehearsal therefore repeats the whole on a smaller scale. A second proxy is trained on a random
half of the seed set. The other half relates to this proxy as all other samples relate to the seed
set: the proxy was not trained on it, and its scores are known from a training on a set twice as
large. An extrapolator is fitted on the first half. On the other half, a map from its expert
predictions and the second proxy's statistics to these scores is learned:

    order(x) = sum_j w_j * rank_j(x) ,    score(x) = m(order(x))

rank_j is the normal score of the rank of input j; w comes from ridge regression on the normal
scores of the scores; m is a centred isotonic regression. The map is then applied to the
extrapolator that was fitted on the whole seed set and to the statistics of the first proxy.

The predictions for the other half, each fifth of it by a map that was learned on the rest, also
give an honest figure of fidelity for such scores: on samples that the proxy was not trained on. It
differs from the real case in that it starts from half the seed set, and extrapolates to a set twice
as large instead of to the whole source.

References
----------
This is stacked regression (Wolpert 1992) with level-one data from cross-fitting (Chernozhukov et
al. 2018, section 3), of one fold, where the proxies as well as the fits are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raypipe.assessment.held_out import (
    HeldOutPredictions,
    proxy_is_right,
    simpler_predictions,
    split,
)
from raypipe.extrapolators.base import Nodes
from raypipe.extrapolators.transfer import Transfer
from raypipe.progress import ProgressCallback

if TYPE_CHECKING:
    from raypipe.extrapolators.blend import AnchorGnn


FOLDS = 5
"""The other half is predicted in this many parts."""


@dataclass(frozen=True)
class Rehearsal:
    """The seed set in two halves, both as seen by the proxy that was trained on the first.

    Attributes
    ----------
    fit_nodes, fit_score
        The first half, and its scores from the training of that proxy, float [m].
    nodes, measured
        The other half, and its scores from the training on the whole seed set, float [n].
    """

    fit_nodes: Nodes
    fit_score: np.ndarray
    nodes: Nodes
    measured: np.ndarray


def rehearse(
    make: Callable[[], AnchorGnn],
    rehearsal: Rehearsal,
    seed: int,
    progress: ProgressCallback | None = None,
) -> tuple[Transfer, HeldOutPredictions]:
    """Learn the map, and predict each fifth of the other half without its scores.

    Parameters
    ----------
    make
        Returns an extrapolator that is not fitted.
    rehearsal
        The two halves of the seed set.
    seed
        Seed of the division into fifths.
    progress
        Called during the fit on the first half.

    Returns
    -------
    transfer
        The map.
    held_out
        Predictions for the other half.

    Raises
    ------
    RaypipeError
        The fit on the first half raises it.
    """
    fit_score = np.asarray(rehearsal.fit_score, np.float64)
    measured = np.asarray(rehearsal.measured, np.float64)
    model = make()
    model.fit(rehearsal.fit_nodes, fit_score, progress)
    inputs, difficulty = model.expert_predictions(rehearsal.nodes)
    doubt = model.doubt(rehearsal.nodes)
    predicted = np.empty(len(measured))
    for held in split(len(measured), 1 / FOLDS, FOLDS, seed):
        rest = np.setdiff1d(np.arange(len(measured)), held)
        predicted[held] = Transfer.fit(inputs[rest], measured[rest])(inputs[held])
    held_out = HeldOutPredictions(
        rehearsal.nodes.label,
        measured,
        predicted,
        difficulty,
        simpler_predictions(rehearsal.fit_nodes, fit_score, rehearsal.nodes, model),
        n_fit=len(rehearsal.fit_nodes),
        doubt=doubt,
        correct=proxy_is_right(rehearsal.nodes),
    )
    return Transfer.fit(inputs, measured), held_out
