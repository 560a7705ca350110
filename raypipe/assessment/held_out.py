"""Predictions for samples that were not fitted on, by an extrapolator and by simpler methods.

There are two kinds of such samples. The first is the seed set: parts of it are held out of the fit,
and each part is predicted by a fit on the rest. The proxy was trained on these samples, so they do
not reveal a shift between the seed set and the other samples. The second is an audit set outside
the seed set, for scores that can be measured on any sample. It is predicted by the fit on the whole
seed set, so its figure is unbiased.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from raypipe.assessment.extremes import ExtremeZone
from raypipe.assessment.intervals import Calibration
from raypipe.config import ExtrapolateSettings
from raypipe.config.choices import PROXY_STATISTICS
from raypipe.errors import RaypipeError
from raypipe.extrapolators.base import DOUBTS, Extrapolator, Nodes, TransductiveExtrapolator
from raypipe.extrapolators.mlp import Mlp
from raypipe.extrapolators.neighbours import NeighbourIndex
from raypipe.extrapolators.proxy_signal import ProxyStatisticsMap
from raypipe.progress import ProgressCallback

NEIGHBOURS = 20
"""Neighbours of the published kNN among the baselines."""
MLP_EPOCHS = 20
"""Epochs of the network among the baselines; it learns little after them."""


@dataclass(frozen=True)
class HeldOutPredictions:
    """Predictions for m samples that were not fitted on.

    Attributes
    ----------
    label
        Classes, int64 [m].
    measured, predicted
        Measured and predicted scores, float64 [m].
    difficulty
        `Extrapolator.difficulty`, float32 [m].
    baselines
        Predictions of simpler methods, float64 [m] by name; unavailable ones are absent.
    n_fit
        Number of samples in the fit.
    note
        Why there are no predictions; else empty.
    doubt
        `Extrapolator.doubt`, float32 [m, 4]; None in files of version 0.2.0 or older.
    correct
        Whether the proxy gives the samples their label, bool [m]; None without a proxy.
    """

    label: np.ndarray
    measured: np.ndarray
    predicted: np.ndarray
    difficulty: np.ndarray
    baselines: Mapping[str, np.ndarray]
    n_fit: int
    note: str = ""
    doubt: np.ndarray | None = None
    correct: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.measured)

    def calibration(self) -> Calibration:
        """Return what `Intervals.fit` calibrates on."""
        doubt = self.doubt
        if doubt is None:
            doubt = np.zeros((len(self), len(DOUBTS)), np.float32)
            doubt[:, 0] = self.difficulty
        return Calibration(self.residual, self.predicted, doubt, self.label)

    @property
    def residual(self) -> np.ndarray:
        """Measured minus predicted scores, float64 [m]; what `Intervals.fit` calibrates on."""
        return self.measured - self.predicted

    @staticmethod
    def concat(parts: Sequence[HeldOutPredictions]) -> HeldOutPredictions:
        """Join predictions, with the baselines that all parts have.

        Raises
        ------
        RaypipeError
            There are no parts.
        """
        if not parts:
            raise RaypipeError("no predictions to join")
        names = [
            name for name in parts[0].baselines if all(name in part.baselines for part in parts)
        ]
        return HeldOutPredictions(
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.measured for part in parts]),
            np.concatenate([part.predicted for part in parts]),
            np.concatenate([part.difficulty for part in parts]),
            {name: np.concatenate([part.baselines[name] for part in parts]) for name in names},
            min(part.n_fit for part in parts),
            next((part.note for part in parts if part.note), ""),
            _joined([part.doubt for part in parts]),
            _joined([part.correct for part in parts]),
        )


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Join arrays; None unless all parts have one."""
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if len(arrays) == len(parts) else None


def proxy_is_right(nodes: Nodes) -> np.ndarray | None:
    """Return whether the proxy gives the samples their label, bool [n]; None without signals.

    Its margin is then positive.
    """
    margin = PROXY_STATISTICS.index("margin")
    if nodes.signals.shape[1] != len(PROXY_STATISTICS):
        return None
    return nodes.signals[:, margin] > 0


@dataclass(frozen=True)
class ExtremePredictions:
    """Predictions for samples that were drawn from the extreme ones.

    Attributes
    ----------
    predictions
        The predictions.
    zone
        Where they were drawn, with all samples that the random draw does not hold counted.
    """

    predictions: HeldOutPredictions
    zone: ExtremeZone


def split(count: int, holdout: float, folds: int, seed: int) -> list[np.ndarray]:
    """Split samples into disjoint random parts.

    Parameters
    ----------
    count
        Number of samples.
    holdout
        Share of the samples in each part.
    folds
        Number of parts.
    seed
        Seed of the split.

    Returns
    -------
    list[np.ndarray]
        Sorted rows of each part, int64.

    Raises
    ------
    RaypipeError
        Nothing would be left to fit on.
    """
    if count < 2 or round(count * holdout) >= count:
        raise RaypipeError(
            f"{count} measured samples cannot be split to assess fidelity; raise seed.fraction"
        )
    order = np.random.default_rng(seed).permutation(count)
    bounds = [min(count, round(count * holdout * part)) for part in range(folds + 1)]
    return [np.sort(order[start:stop]) for start, stop in itertools.pairwise(bounds)]


def hold_out(
    make_extrapolator: Callable[[], Extrapolator],
    seed_nodes: Nodes,
    score: np.ndarray,
    held: np.ndarray,
    all_nodes: Nodes | None = None,
    scored_rows: np.ndarray | None = None,
    progress: ProgressCallback | None = None,
    mlp: bool = True,
) -> HeldOutPredictions:
    """Fit on the seed set without some rows, and predict these.

    Parameters
    ----------
    make_extrapolator
        Returns an extrapolator that is not fitted.
    seed_nodes, score
        The seed set and its measured scores, float [m].
    held
        Rows of the seed set to hold out, int64.
    all_nodes, scored_rows
        For transductive extrapolators only: all samples, and the rows of the seed set among them,
        int64 [m].
    progress
        Called during the fit.
    mlp
        Whether the network is among the baselines; see `simpler_predictions`.

    Returns
    -------
    HeldOutPredictions
        Has a note instead of predictions if too few samples are left to fit on.

    Raises
    ------
    RaypipeError
        Lengths differ, or the fit raises it.
    """
    score = np.asarray(score, np.float64)
    count = len(seed_nodes)
    if score.shape != (count,):
        raise RaypipeError(f"{count} seed samples but scores of shape {list(score.shape)}")
    fit_rows = np.setdiff1d(np.arange(count), held)
    model = make_extrapolator()
    fit_nodes, fit_score = seed_nodes.take(fit_rows), score[fit_rows]
    # enough samples for a fit, but not for a fit on part of them
    if len(fit_rows) < model.min_samples <= count:
        return _no_predictions(count, len(fit_rows), model.min_samples)
    if not isinstance(model, TransductiveExtrapolator):
        model.fit(fit_nodes, fit_score, progress)
        return predict(model, fit_nodes, fit_score, seed_nodes.take(held), score[held], mlp=mlp)
    if all_nodes is None or scored_rows is None or len(scored_rows) != count:
        raise RaypipeError(
            f"{model.name}: to assess it, pass all samples and the row of every seed sample "
            "among them"
        )
    rows = np.asarray(scored_rows)
    model.fit_graph(all_nodes, rows[fit_rows], fit_score, progress)
    return predict(model, fit_nodes, fit_score, seed_nodes.take(held), score[held], rows[held], mlp)


def _no_predictions(count: int, n_fit: int, min_samples: int) -> HeldOutPredictions:
    """Return the result if `n_fit` of `count` samples are too few to fit on."""
    note = (
        f"{count} measured samples leave {n_fit} to fit on, fewer than the {min_samples} needed: "
        "raise seed.fraction"
    )
    empty = np.empty(0)
    doubt = np.empty((0, len(DOUBTS)), np.float32)
    return HeldOutPredictions(
        np.empty(0, np.int64), empty, empty, np.empty(0, np.float32), {}, n_fit, note, doubt
    )


def predict(
    model: Extrapolator,
    fit_nodes: Nodes,
    fit_score: np.ndarray,
    nodes: Nodes,
    measured: np.ndarray,
    rows: np.ndarray | None = None,
    mlp: bool = True,
) -> HeldOutPredictions:
    """Predict samples with a fitted extrapolator and with the baselines.

    Parameters
    ----------
    model
        The fitted extrapolator.
    fit_nodes, fit_score
        The samples of its fit and their scores, float [n].
    nodes, measured
        The samples to predict and their measured scores, float [m].
    rows
        For transductive extrapolators only: the rows of `nodes` in the graph, int64 [m].
    mlp
        Whether the network is among the baselines; see `simpler_predictions`.
    """
    if isinstance(model, TransductiveExtrapolator):
        if rows is None:
            raise RaypipeError(
                f"{model.name}: to predict, pass the rows of the samples in the graph"
            )
        predicted, doubt = model.predict_rows(rows), model.doubt(nodes)
    else:
        predicted, doubt = model.predict_with_doubt(nodes)
    baselines = simpler_predictions(fit_nodes, np.asarray(fit_score, np.float64), nodes, model, mlp)
    measured = np.asarray(measured, np.float64)
    return HeldOutPredictions(
        nodes.label,
        measured,
        predicted.astype(np.float64),
        doubt[:, 0],
        baselines,
        n_fit=len(fit_nodes),
        doubt=doubt,
        correct=proxy_is_right(nodes),
    )


def simpler_predictions(
    fit_nodes: Nodes,
    fit_score: np.ndarray,
    nodes: Nodes,
    model: Extrapolator | None = None,
    mlp: bool = True,
) -> dict[str, np.ndarray]:
    """Predict samples with methods that need no or little fitting.

    Parameters
    ----------
    fit_nodes, fit_score
        Scored samples and their scores, float64 [n].
    nodes
        The samples to predict.
    model
        An extrapolator that was fitted on `fit_nodes`; its index is reused.
    mlp
        Whether to include the network, which takes nearly all of the time.

    Returns
    -------
    dict[str, np.ndarray]
        Predictions, float64 [m] by name:

        class_mean
            Mean score of the class; of all samples if the class has no scored one.
        knn_published
            `raypipe.extrapolators.published.knn`.
        mlp
            `raypipe.extrapolators.mlp` after 20 epochs, if there are enough samples for it.
        proxy
            The proxy statistic that ranks the scored samples best
            (`raypipe.extrapolators.proxy_signal`), if there is one.
        proxy_loss
            The proxy's loss, if the samples have signals.
    """
    label = fit_nodes.label + 1  # -1, no label, is a group of its own
    groups = int(max(fit_nodes.label.max(initial=-1), nodes.label.max(initial=-1))) + 2
    count = np.bincount(label, minlength=groups)
    total = np.bincount(label, fit_score, minlength=groups)
    mean = np.where(count > 0, total / np.maximum(count, 1), fit_score.mean())
    index = model.index_of(fit_nodes.embedding) if model else NeighbourIndex(fit_nodes.embedding)
    distance, row = index.search(nodes.embedding, NEIGHBOURS)
    weight = np.exp(-(distance - distance[:, :1]).astype(np.float64))
    result = {
        "class_mean": mean[nodes.label + 1],
        "knn_published": (weight * fit_score[row]).sum(1) / weight.sum(1),
    }
    # the neighbours of the network are never used, so it needs no fast index
    network = Mlp(
        ExtrapolateSettings(method="mlp", epochs=MLP_EPOCHS, exact_neighbours=len(fit_nodes)),
        groups - 1,
    )
    if mlp and len(fit_nodes) >= network.min_samples:
        network.fit(fit_nodes, fit_score)
        result["mlp"] = network.predict(nodes).astype(np.float64)
    statistics = ProxyStatisticsMap.fit(fit_nodes.signals, fit_score)
    if statistics.maps:
        result["proxy"] = statistics(nodes.signals)
    if nodes.signals.shape[1]:
        result["proxy_loss"] = nodes.signals[:, 0].astype(np.float64)
    return result
